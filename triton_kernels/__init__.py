"""The three operations in Triton, over the tables of a plan.

Installed as ``autodrop_ext.triton_kernels``, for machines without nvcc and for AMD GPUs. One
source, specialised by dtype and alignment; offsets are int64. The kernels have no validation:
:mod:`autodrop_ext.ops.triton` checks and launches. Importing this package imports triton.
"""

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
    "tensor_kernel",
    "write_back_kernel",
]
