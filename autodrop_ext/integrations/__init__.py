"""AutoDrop inside other libraries; each module imports its library when it is imported."""

from .loggers import TensorBoardLog, WandbLog

__all__ = ["TensorBoardLog", "WandbLog"]
