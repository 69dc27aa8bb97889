"""Which backend serves a device, and what is said about it."""

from __future__ import annotations

import logging

import pytest
import torch

from autodrop_ext import ops
from autodrop_ext.ops.cuda import CudaBackend
from autodrop_ext.ops.triton import TritonBackend

GPU = torch.device("cuda", 1)


@pytest.fixture(autouse=True)
def _fresh_choice():
    """Choices are remembered for the life of a process."""
    ops._best.cache_clear()
    yield
    ops._best.cache_clear()


def replace(monkeypatch: pytest.MonkeyPatch, **reasons: str | None) -> list[torch.device]:
    """Give backends made-up reasons; the devices that they are asked about."""
    asked = []

    def missing(reason: str | None):
        def answer(device: torch.device) -> str | None:
            asked.append(device)
            return reason

        return answer

    for name, reason in reasons.items():
        monkeypatch.setattr(ops.BACKENDS[name], "missing", missing(reason))
    return asked


def test_a_gpu_left_to_the_reference_is_a_warning_with_tritons_failure(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failure = "a test launch failed: NameError: Cannot access global variable"
    asked = replace(monkeypatch, cpu="on cpu only", cuda="no CUDA kernels", triton=failure)
    with caplog.at_level(logging.INFO, "autodrop_ext"):
        assert ops.select("auto", GPU).name == "reference"
        assert ops.select("auto", GPU).name == "reference"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "backend for cuda:1: reference" in record.message
    assert f"not triton: {failure}" in record.message
    assert set(asked) == {GPU}


def test_a_gpu_that_triton_serves_is_no_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    replace(monkeypatch, cpu="on cpu only", cuda="no CUDA kernels", triton=None)
    with caplog.at_level(logging.INFO, "autodrop_ext"):
        assert ops.select("auto", GPU).name == "triton"
    assert [r.levelno for r in caplog.records] == [logging.INFO]


def test_the_cpu_without_its_compiled_core_is_no_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    replace(monkeypatch, cpu="the compiled core does not load", triton="it runs on GPUs")
    with caplog.at_level(logging.INFO, "autodrop_ext"):
        assert ops.select("auto", "cpu").name == "reference"
    assert [r.levelno for r in caplog.records] == [logging.INFO]


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_no_backend_is_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for backend in (CudaBackend(), TritonBackend()):
        reason = backend.missing(torch.device("cuda"))
        assert reason is not None
        assert "test launch" not in reason
    assert ops.select("auto", "cuda").name == "reference"
