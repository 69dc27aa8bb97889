"""The table's GPU kernels against their NumPy model: CUDA emulated, Triton interpreted.

On a machine with a GPU, ``test_gpu.py`` runs the same cases there.
"""

from __future__ import annotations

import emulated
import numpy as np
import pytest
import table_model
import torch
from table_cases import CudaKernels, Kernels, KernelTests, TritonKernels

CPU = torch.device("cpu")
SUMS = {
    "cuda emulated": (),
    "cuda emulated, two floats": emulated.TWO_FLOATS,
    "cuda emulated, pairs of two floats": emulated.PAIRS,
}


@pytest.fixture(
    params=[
        "cuda emulated",
        "cuda emulated, two floats",
        pytest.param("cuda emulated, pairs of two floats", marks=pytest.mark.slow),
        "triton interpreted",
    ]
)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    if request.param == "triton interpreted":
        pytest.importorskip("triton", reason="needs triton: pip install triton")
        if torch.cuda.is_available():
            pytest.skip("with a GPU, Triton is not interpreted; test_gpu.py runs it there")
        return TritonKernels(CPU)
    if not emulated.COMPILER:
        pytest.skip("needs g++ or clang++")
    flags = SUMS[request.param]
    return CudaKernels(CPU, emulated.module(*flags), two_floats=bool(flags))


class TestWithoutGpu(KernelTests):
    pass


def test_a_failed_launch_raises_its_name_and_the_next_step_is_good() -> None:
    if not emulated.COMPILER:
        pytest.skip("needs g++ or clang++")
    core = emulated.module()
    kernels = CudaKernels(CPU, core)
    tensors = [table_model.Tensor.of(np.ones(100))]
    core.fail_once("cudaLaunchKernel")
    with pytest.raises(RuntimeError, match="accumulate: cudaErrorLaunchFailure"):
        kernels.accumulate(tensors, 1, 1, 1)
    assert np.abs(kernels.accumulate(tensors, 1, 1, 1)).sum() == 100
    core.fail_once("cudaStreamIsCapturing")
    with pytest.raises(RuntimeError, match="close: cudaErrorLaunchFailure"):
        kernels.close(np.ones(8), np.zeros(8), np.zeros(8), 1.0, np.array([[0, 8]]))


def test_a_close_inside_a_capture_is_refused_and_the_capture_goes_on() -> None:
    if not emulated.COMPILER:
        pytest.skip("needs g++ or clang++")
    core = emulated.module()
    core.cuda_probe(0)
    stream = core.new_stream()
    kernels = CudaKernels(CPU, core, stream)
    work = kernels.prepare([table_model.Tensor.of(np.full(5_000, 2.0))], 2, 1, 2)
    core.begin_capture(stream)
    work.run()
    with pytest.raises(RuntimeError, match="close: cudaErrorStreamCaptureUnsupported"):
        kernels.close(np.ones(8), np.zeros(8), np.zeros(8), 1.0, np.array([[0, 8]]))
    work.run()
    assert core.end_capture(stream)
    assert not work.table.any()  # nothing has run yet
    core.replay()
    assert work.table.abs().sum() == 20_000.0


def test_no_call_holds_pythons_lock() -> None:
    if not emulated.COMPILER:
        pytest.skip("needs g++ or clang++")
    core = emulated.module()
    before, held_before = core.calls()
    kernels = CudaKernels(CPU, core)
    tensors = [table_model.Tensor.of(np.ones(100))]
    kernels.accumulate(tensors, 1, 1, 2)
    kernels.accumulate_exact(tensors, [0], 100)
    kernels.close(np.ones(8), np.zeros(8), np.zeros(8), 1.0, np.array([[0, 8]]))
    core.cuda_probe(0)
    calls, held = core.calls()
    assert calls - before > 10
    assert held == held_before == 0
