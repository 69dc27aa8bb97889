"""The table's operations in Triton, for machines without nvcc and for AMD GPUs.

Installed as ``autodrop_ext.triton_kernels``. :mod:`.launches` has the operations, :mod:`.table` the
kernels. Neither validates anything: :mod:`autodrop_ext.ops.triton` does. Importing this package
imports triton.
"""

from . import launches, table

__all__ = ["launches", "table"]
