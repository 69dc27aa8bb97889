"""The table's CUDA and Triton kernels on a GPU: cases, streams, graphs, launches, large tensors.

What of this needs no GPU runs without one as well: the cases in Triton's interpreter and in the
emulator of the CUDA kernels (``test_table_kernels.py``), launches in ``test_emulated.py``.
"""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest
import table_model
import torch
from table_cases import (
    CASES,
    CudaKernels,
    Kernels,
    KernelTests,
    TritonKernels,
    case,
    to_device,
)
from table_model import LANES

from autodrop_ext.ops import BACKENDS
from autodrop_ext.ops.plan import Plan, Source

BLOCK = np.array([[0, LANES]], np.int64)


def core() -> ModuleType:
    from autodrop_ext import _C

    assert _C.cuda_built, _C.cuda_reason
    return _C


def has_two_floats(device: torch.device) -> bool:
    """Return True if the kernels for a GPU add two float32 numbers (csrc/cuda/sums.h)."""
    full_rate = ((6, 0), (7, 0), (8, 0), (9, 0), (10, 0))
    return torch.cuda.get_device_capability(device) not in full_rate


def cuda_kernels(device: torch.device) -> CudaKernels:
    return CudaKernels(device, core(), two_floats=has_two_floats(device))


@pytest.fixture(params=["cuda", "triton"])
def kernels(request: pytest.FixtureRequest, gpu: torch.device) -> Kernels:
    return cuda_kernels(gpu) if request.param == "cuda" else TritonKernels(gpu)


@pytest.fixture
def cuda(gpu: torch.device) -> CudaKernels:
    return cuda_kernels(gpu)


class TestOnGpu(KernelTests):
    pass


def test_the_bits_are_those_of_the_emulator(cuda: CudaKernels) -> None:
    """The same additions in the same order, on the CPU."""
    emulated = pytest.importorskip("emulated")
    if not emulated.COMPILER:
        pytest.skip("needs g++ or clang++")
    flags = emulated.TWO_FLOATS if has_two_floats(cuda.device) else ()
    there = CudaKernels(torch.device("cpu"), emulated.module(*flags))
    for name in CASES:
        if name != "not finite":
            tables = [k.accumulate(case(name), 2, 3, 3) for k in (cuda, there)]
            assert np.array_equal(*tables), name


def test_a_step_is_two_launches(cuda: CudaKernels) -> None:
    work = cuda.prepare(case("dtypes, weights and groups"), 2, 3, 3)
    work.run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work.run()
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if "_kernel" in e.name]
    assert len(names) == 2, names


def test_a_step_can_be_captured_and_replayed(gpu: torch.device) -> None:
    stream = torch.cuda.Stream(gpu)
    cuda = CudaKernels(gpu, core(), stream.cuda_stream)
    cuda.core.cuda_probe(gpu.index)
    captured, plain = (cuda.prepare(case("shards, float32"), 2, 1, 3) for _ in range(2))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    tables = [torch.zeros(LANES, dtype=torch.float64, device=gpu) for _ in range(3)]
    blocks, sums = to_device(BLOCK, gpu), torch.zeros(1, 2, dtype=torch.float64, device=gpu)
    with torch.cuda.graph(graph, stream=stream):
        captured.run()
        with pytest.raises(RuntimeError, match="close: cudaErrorStreamCaptureUnsupported"):
            cuda.launch_close(tables, 1.0, blocks, sums)
        captured.run()
    assert not captured.table.any()
    graph.replay()
    torch.cuda.synchronize()
    plain.run()
    plain.run()
    torch.cuda.synchronize()
    assert torch.equal(captured.table, plain.table)


def test_the_backend_refuses_a_close_inside_a_capture_in_words_and_goes_on(
    gpu: torch.device,
) -> None:
    backend = BACKENDS["cuda"]
    assert backend.missing(gpu) is None
    x = torch.ones(10_000, device=gpu)
    accumulation = backend.bind(
        Plan([Source("x", lambda: x, x.numel(), x.dtype)], gpu, buckets=LANES)
    )
    tables = [torch.zeros(LANES, dtype=torch.float64, device=gpu) for _ in range(3)]
    bases = np.array([x.data_ptr()], np.int64)
    accumulation.accumulate(tables[0], bases)
    once = tables[0].clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        accumulation.accumulate(tables[0], bases)
        with pytest.raises(RuntimeError, match="outside of a CUDA graph's capture"):
            backend.close(tables[0], tables[1], tables[2], 1.0, np.array([0, LANES], np.int64))
        accumulation.accumulate(tables[0], bases)
    graph.replay()
    torch.cuda.synchronize()
    assert once.any()
    assert torch.equal(tables[0], 3 * once)  # sums of ones are exact


def test_the_given_stream_is_used(gpu: torch.device) -> None:
    """Work queued behind a slow kernel on a side stream sees that kernel's result."""
    side = torch.cuda.Stream(gpu)
    cuda = CudaKernels(gpu, core(), side.cuda_stream)
    work = cuda.prepare([table_model.Tensor.of(np.zeros(1_000_000))], 4, 1, 2)
    memory = work.memory[0]
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        memory.view(torch.float32).fill_(3.0)
        work.run()
    side.synchronize()
    assert work.table.abs().sum().item() == 3_000_000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_more_than_2_to_the_31_elements(
    kernels: Kernels, gpu: torch.device, dtype: torch.dtype
) -> None:
    n = 2**31 + 100
    if torch.cuda.mem_get_info(gpu)[0] < 1.2 * n * dtype.itemsize:
        pytest.skip("needs 10 GiB of free GPU memory")
    x = torch.zeros(n, dtype=dtype, device=gpu)
    x[-1], x[2**31 - 1] = 3.0, 5.0
    code = table_model.BFLOAT16 if dtype == torch.bfloat16 else table_model.FLOAT32
    nothing = np.zeros(64, np.uint8)
    # Two stretches that end with the last element and with number 2^31 - 1.
    ends = (n, 2**31)
    parts = [table_model.Tensor(nothing, 0, code, 300, first=end - 300, key=7) for end in ends]
    pieces, runs = table_model.pieces_of(parts, 1)
    pieces["offset"] += np.array([end - 300 for end in ends])[pieces["tensor"]] * dtype.itemsize
    pieces["tensor"] = 0
    spans = table_model.spans_of(parts, [0, 300])
    spans["offset"] += np.array([end - 300 for end in ends])[spans["tensor"]] * dtype.itemsize
    spans["tensor"] = 0
    bases = torch.tensor([x.data_ptr()], device=gpu)
    tables = [torch.zeros(LANES, dtype=torch.float64, device=gpu) for _ in range(2)]
    there, runs_there, spans_there = (to_device(a, gpu) for a in (pieces, runs, spans))
    if isinstance(kernels, CudaKernels):
        at = [t.data_ptr() for t in (there, runs_there, bases, tables[0])]
        kernels.core.cuda_accumulate(gpu.index, *at[:2], 1, 1, at[2], 0, at[3], False, 0)
        kernels.core.cuda_accumulate_exact(
            gpu.index, spans_there.data_ptr(), len(spans), at[2], tables[1].data_ptr(), 0
        )
    else:
        from triton_kernels import launches

        partials = torch.zeros(8, LANES, dtype=torch.float64, device=gpu)
        launches.accumulate(there, runs_there, bases, partials, tables[0], {code})
        launches.accumulate_exact(spans_there, bases, tables[1], {code})
    assert sorted(tables[0][tables[0] != 0].abs().tolist()) == [3.0, 5.0]
    assert tables[1][299].item() == 3.0
    assert tables[1][599].item() == 5.0
    del x
    torch.cuda.empty_cache()


@pytest.fixture
def second_gpu(gpu: torch.device) -> torch.device:
    """A GPU that is not the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    return torch.device("cuda", (torch.cuda.current_device() + 1) % torch.cuda.device_count())


def test_a_second_device_while_another_is_current(
    gpu: torch.device, second_gpu: torch.device
) -> None:
    tensors = case("dtypes, weights and groups")
    here, there = (CudaKernels(d, core()).accumulate(tensors, 2, 3, 2) for d in (gpu, second_gpu))
    assert torch.cuda.current_device() == gpu.index
    assert np.array_equal(here, there)


def test_a_probe_makes_a_context_on_one_device_only(
    gpu: torch.device, second_gpu: torch.device
) -> None:
    """In another process, because this one has touched both."""
    program = (
        f"import torch; torch.cuda.set_device({second_gpu.index}); from autodrop_ext import _C; "
        f"_C.cuda_probe({second_gpu.index}); "
        "print([torch._C._cuda_hasPrimaryContext(i) for i in range(torch.cuda.device_count())])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    wanted = [i == second_gpu.index for i in range(torch.cuda.device_count())]
    assert done.stdout.strip() == str(wanted)
