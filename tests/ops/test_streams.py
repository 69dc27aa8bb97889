"""Which device is current at a launch, and which memory torch is told about."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from autodrop_ext.ops.streams import StreamUse, current_device

GPU = torch.device("cuda", 1)


@pytest.fixture
def handle(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """``handle.stream`` is the current stream's."""
    state = SimpleNamespace(stream=7)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=state.stream)
    )
    return state


class Memory:
    """A tensor that notes the streams it is recorded on."""

    def __init__(self, address: int) -> None:
        self.address = address
        self.streams: list[int] = []

    def data_ptr(self) -> int:
        return self.address

    def record_stream(self, stream: SimpleNamespace) -> None:
        self.streams.append(stream.cuda_stream)


def test_memory_is_recorded_once_on_every_stream_but_the_first(handle: SimpleNamespace) -> None:
    table, arena, other = (Memory(a) for a in (1, 2, 3))
    use = StreamUse(GPU, [table])  # type: ignore[list-item]
    assert use.current(arena, None) == 7  # type: ignore[arg-type]
    assert table.streams == arena.streams == []
    handle.stream = 8
    for _ in range(3):
        assert use.current(arena, None) == 8  # type: ignore[arg-type]
    assert table.streams == arena.streams == [8]
    assert use.current(other) == 8  # type: ignore[arg-type]
    handle.stream = 9
    use.current(arena)  # type: ignore[arg-type]
    assert (table.streams, arena.streams, other.streams) == ([8, 9], [8, 9], [8])
    handle.stream = 7
    use.current(arena)  # type: ignore[arg-type]
    assert table.streams == [8, 9]


def test_another_device_is_made_current_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    entered = []

    @contextlib.contextmanager
    def device(index: torch.device):
        entered.append(index)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with current_device(GPU):
        assert entered == [GPU]
    with current_device(torch.device("cuda", 0)), current_device(torch.device("cpu")):
        pass
    assert entered == [GPU]
