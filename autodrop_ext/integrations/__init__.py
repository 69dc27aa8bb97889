"""Where AutoDrop meets other libraries; each module imports its own when it is imported.

``loggers`` (TensorBoard, Weights & Biases), ``transformers`` and ``lightning``.
"""

from .loggers import TensorBoardLog, WandbLog

__all__ = ["TensorBoardLog", "WandbLog"]
