"""The kernels in Triton: GPUs without the compiled ones, AMD's among them."""

from __future__ import annotations

import importlib
import os

import torch
from torch import Tensor

from .plan import FloatArray, IntArray, Plan


class TritonBackend:
    """The kernels in Triton."""

    name = "triton"

    def missing(self, device: torch.device) -> str | None:
        # Triton's interpreter, which tests use, runs kernels on the CPU.
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if device.type not in (("cpu", "cuda") if interpreted else ("cuda",)):
            return f"it runs on GPUs, not on {device.type}"
        try:
            importlib.import_module("triton")
        except ImportError as error:
            return f"triton does not load ({error}): pip install triton"
        if interpreted:
            return None
        if not torch.cuda.is_available():
            return "torch sees no GPU"
        return _probe(device)

    def bind(self, plan: Plan) -> TritonAccumulation:
        return TritonAccumulation(plan)

    def close(
        self, running: Tensor, mean: Tensor, displacement: Tensor, divisor: float, bounds: IntArray
    ) -> FloatArray:
        raise NotImplementedError
