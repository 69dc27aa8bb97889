"""The cuda backend's launches and uploads, with the kernels in the emulator."""

from __future__ import annotations

import contextlib

import emulated
import numpy as np
import pytest
import torch
from torch import Tensor

from autodrop_ext.ops import cuda
from autodrop_ext.ops.plan import Plan, Source

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

needs_a_compiler = pytest.mark.skipif(not emulated.COMPILER, reason="needs g++ or clang++")


def launches_of_a_read(tensors: list[Tensor], buckets: int | None) -> int:
    ends = np.cumsum([0, *(t.numel() for t in tensors)]).tolist()
    sources = [
        Source(f"p{i}", lambda t=t: t, t.numel(), t.dtype, bucket=ends[i])
        for i, t in enumerate(tensors)
    ]
    plan = Plan(sources, CPU, buckets=buckets, num_buckets=ends[-1])
    accumulation = emulated.EmulatedCuda().bind(plan)
    table = torch.zeros(plan.num_buckets, dtype=torch.float64)
    bases = np.array([t.data_ptr() for t in tensors], np.int64)
    before = emulated.module().launches()
    accumulation.accumulate(table, bases)
    assert table.any()
    launched: int = emulated.module().launches() - before
    return launched


@needs_a_compiler
@pytest.mark.parametrize("count", [1, 10, 500])
def test_a_read_is_two_launches_whatever_the_number_of_tensors_and_dtypes(count: int) -> None:
    tensors = [torch.ones(300 + i, dtype=DTYPES[i % 4]) for i in range(count)]
    assert launches_of_a_read(tensors, None) == 1
    # A row of the table that has few pieces belongs to one block, whose sums need no second launch.
    assert launches_of_a_read(tensors, 4096) == (1 if count <= 10 else 2)


class Uploads:
    """What :meth:`DeviceTables.addresses` does to the array that it uploads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, bool]] = []
        self.pinned: list[Tensor] = []
        monkeypatch.setattr(Tensor, "pin_memory", self.pin)
        monkeypatch.setattr(Tensor, "to", self.to)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def pin(self) -> Tensor:
        self.calls.append(("pin", True))
        return torch.empty(0)

    def to(self, device: torch.device, non_blocking: bool = False) -> Tensor:
        assert device == GPU
        self.calls.append(("upload", non_blocking))
        return torch.empty(0)


@pytest.fixture
def tables() -> cuda.DeviceTables:
    """Tables of a plan, which then claims to be on a GPU that is not there."""
    x = torch.ones(10)
    plan = Plan([Source("x", lambda: x, 10, x.dtype)], CPU, buckets=None, num_buckets=10)
    made = cuda.DeviceTables(plan)
    plan.device = GPU
    return made


def test_addresses_are_uploaded_if_they_change_from_pinned_memory_without_waiting(
    tables: cuda.DeviceTables, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads = Uploads(monkeypatch)
    for _ in range(3):
        tables.addresses(np.array([64, 128], np.int64))
    assert uploads.calls == [("pin", True), ("upload", True)]
    tables.addresses(np.array([64, 192], np.int64))
    assert uploads.calls == [("pin", True), ("upload", True)] * 2


def test_an_upload_inside_a_capture_is_refused_in_words(
    tables: cuda.DeviceTables, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay would read memory on the host that has another use by then."""
    uploads = Uploads(monkeypatch)
    tables.addresses(np.array([64], np.int64))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    tables.addresses(np.array([64], np.int64))
    with pytest.raises(RuntimeError, match="take a step before the capture"):
        tables.addresses(np.array([128], np.int64))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    tables.addresses(np.array([128], np.int64))
    assert uploads.calls == [("pin", True), ("upload", True)] * 2


def test_a_close_inside_a_capture_is_refused_in_words_before_it_does_harm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A copy to the device from memory that is not pinned would end the capture."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(cuda, "current_device", lambda device: contextlib.nullcontext())

    def launch(blocks: Tensor, sums: Tensor) -> None:
        pytest.fail("a kernel was launched")

    with pytest.raises(RuntimeError, match="close: expected the end of a window outside"):
        cuda.close_on(GPU, np.array([0, 4096], np.int64), launch)
