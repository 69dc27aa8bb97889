"""Which backend serves a device, and what is said about it."""

from __future__ import annotations

import importlib.util
import logging
import pathlib
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from autodrop_ext import AngularVelocity, ops
from autodrop_ext.ops import cuda, native
from autodrop_ext.ops.backends import CpuBackend, table_device
from autodrop_ext.ops.cuda import CudaBackend
from autodrop_ext.ops.plan import Plan, Source
from autodrop_ext.ops.triton import TritonBackend

if importlib.util.find_spec("triton") is not None:
    # Imported under the tests' TRITON_INTERPRET=1, which some tests below take away: kernels that
    # were imported then would not be interpreted in any later test.
    importlib.import_module("autodrop_ext.triton_kernels")

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


def test_the_cpu_without_its_compiled_core_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    replace(monkeypatch, cpu="the compiled core does not load", triton="it runs on GPUs")
    with caplog.at_level(logging.INFO, "autodrop_ext"):
        assert ops.select("auto", "cpu").name == "reference"
    assert [r.levelno for r in caplog.records] == [logging.WARNING]


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_no_backend_is_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for backend in (CudaBackend(), TritonBackend()):
        reason = backend.missing(torch.device("cuda"))
        assert reason is not None
        assert "test launch" not in reason
    assert ops.select("auto", "cuda").name == "reference"


def test_a_missing_backend_is_refused_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "core", None)
    monkeypatch.setattr(native, "import_error", "libfoo.so not found")
    meter = AngularVelocity([torch.zeros(3)], backend="cpu")
    with pytest.raises(
        RuntimeError, match=r"'cpu' cannot be used .*libfoo.so not found.*autodrop doctor"
    ):
        meter.observe()


def test_auto_falls_back_to_the_reference_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(native, "core", None)
    monkeypatch.setattr(native, "import_error", "libfoo.so not found")
    with caplog.at_level("INFO", logger="autodrop_ext"):
        meter = AngularVelocity([torch.zeros(3)], 1)
        meter.observe()
        meter.observe()
    assert [r.message for r in caplog.records if "backend for cpu: reference" in r.message]
    assert "libfoo.so not found" in caplog.text


@pytest.mark.parametrize(
    ("sources", "advice"),
    [
        (["csrc"], r"imports the package from its checkout .* run Python in another directory"),
        ([], "install the package again in its checkout: pip install --force-reinstall"),
    ],
    ids=["checkout", "installed"],
)
def test_what_repairs_a_missing_core(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, sources: list[str], advice: str
) -> None:
    for folder in sources:
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(native, "__file__", str(tmp_path / "autodrop_ext" / "ops" / "native.py"))
    assert re.search(advice, native.why_missing())


def test_an_unknown_instruction_set_is_refused() -> None:
    x = torch.zeros(3)
    plan = Plan([Source("x", lambda: x, 3, x.dtype)], torch.device("cpu"), buckets=4096)
    read = CpuBackend("mmx").bind(plan)
    with pytest.raises(ValueError, match="does not run 'mmx'"):
        read.accumulate(torch.zeros(4096, dtype=torch.float64), np.array([x.data_ptr()]))


def test_a_gpu_without_machine_code_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    core = SimpleNamespace(cuda_built=True, cuda_architectures="80-real 90-real")
    monkeypatch.setattr(native, "core", core)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    reason = cuda.explain("probe: cudaErrorNoKernelImageForDevice (no kernel image ...)", 0)
    assert "built for the CUDA architectures 80-real 90-real, and" in reason
    assert "GPU 0 (Tesla T4) is sm_75" in reason
    assert "reinstall with CUDAARCHS=75" in reason
    other = cuda.explain("probe: cudaErrorLaunchFailure (unspecified launch failure)", 1)
    assert other.startswith("a test launch on GPU 1 failed: probe: cudaErrorLaunchFailure")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_backends_that_need_a_gpu_say_why_they_are_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = ops.BACKENDS["cuda"].missing(torch.device("cuda"))
    assert reason is not None
    if native.core is not None and native.core.cuda_built:
        assert "torch sees no CUDA GPU" in reason
    else:
        assert "AUTODROP_CUDA=1" in reason
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    on_cpu = ops.report("cpu")
    assert on_cpu["cuda"] == "it runs on cuda tensors, not on cpu"
    assert on_cpu["triton"] == "it runs on GPUs, not on cpu"
    assert on_cpu["cpu"] is None
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot be used for cpu parameters"):
        AngularVelocity([torch.zeros(3)], backend="cuda").observe()


def test_tables_are_where_float64_is() -> None:
    assert table_device(torch.device("mps")) == torch.device("cpu")
    assert table_device(GPU) == GPU
