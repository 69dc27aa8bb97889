"""The table's operations in Triton, for machines without nvcc and for AMD GPUs.

Installed as ``autodrop_ext.triton_kernels``. :mod:`.launches` has the operations, :mod:`.table` the
kernels. Neither validates anything: :mod:`autodrop_ext.ops.triton` does. Importing this package
imports triton.
"""

from . import launches
from .kernels import (
    accumulate_kernel,
    close_delta_kernel,
    close_sum_kernel,
    tensor_kernel,
    write_back_kernel,
)

__all__ = [
    "accumulate_kernel",
    "close_delta_kernel",
    "close_sum_kernel",
    "launches",
    "tensor_kernel",
    "write_back_kernel",
]
