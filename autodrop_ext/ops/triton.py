"""The kernels in Triton: GPUs without the compiled ones, AMD's among them."""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .cuda import DeviceTables, close_on, current_device
from .plan import DTYPES, SWAPS, FloatArray, IntArray, Plan, Source


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
        def launch(blocks: Tensor, sums: Tensor) -> None:
            _launches().close(running, mean, displacement, divisor, blocks, sums)

        return close_on(running.device, bounds, launch)


def _launches() -> Any:
    # Imported here: Triton is optional and takes a second to load.
    return importlib.import_module("autodrop_ext.triton_kernels").launches


@functools.cache
def _probe(device: torch.device) -> str | None:
    """Read a tensor on a device before the kernels are trusted; return the failure, or None."""
    try:
        x = torch.ones(3, device=device)
        plan = Plan([Source("probe", lambda: x, 3, x.dtype)], x.device, buckets=None, num_buckets=3)
        table = torch.zeros(3, dtype=torch.float64, device=x.device)
        TritonAccumulation(plan).accumulate(table, np.array([x.data_ptr()], np.int64))
        total = float(table.sum())
    except Exception as error:  # compilers and drivers raise whatever they like
        return f"a test launch failed: {type(error).__name__}: {error}"
    return None if total == 3.0 else f"a test launch gave {total} instead of 3"


class TritonAccumulation:
    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._tables = DeviceTables(plan)
        self._dtypes = sorted({DTYPES.index(source.dtype) for source in plan.sources})
        rows = SWAPS if plan.hashed else 0  # a program for each way to permute packets
        self._partials = torch.empty(
            rows, plan.num_buckets, dtype=torch.float64, device=plan.device
        )

    def accumulate(self, table: Tensor, bases: IntArray) -> None:
        launches, tables = _launches(), self._tables
        with current_device(self._plan.device):
            addresses = tables.addresses(bases)
            if self._plan.hashed:
                launches.accumulate(
                    tables.table, tables.runs, addresses, self._partials, table, self._dtypes
                )
            else:
                launches.accumulate_exact(tables.table, addresses, table, self._dtypes)
            tables.record(self._partials, table)
