"""Place of the Triton kernels; installed as ``autodrop_ext.triton_kernels``.

This version has none: tensors on accelerators are served by the reference backend.
"""
