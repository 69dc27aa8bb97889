"""The CUDA and Triton backends on a GPU: bits of the reference, streams, graphs, determinism.

What of this needs no GPU runs without one as well: the case table in Triton's interpreter and in
the emulator of the CUDA kernels, and captures, errors and threads in ``test_emulated.py``.
"""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
from autodrop_ext.ops.device_sums import DeviceSums
from cases import CASES, make
from torch import Tensor

from autodrop_ext import AngularVelocity
from autodrop_ext.ops import BACKENDS
from autodrop_ext.ops.plan import Plan

WINDOW = 3
every_gpu_backend = pytest.mark.parametrize("backend", ["cuda", "triton"])


def on_device(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """Copies with the same strides and the same misalignment: storages move, views follow."""
    storages: dict[int, Tensor] = {}
    moved = []
    for t in tensors:
        key = t.untyped_storage().data_ptr()
        whole = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())  # type: ignore[call-overload]
        if key not in storages or storages[key].dtype != t.dtype:
            storages[key] = whole.to(device)
        view = storages[key].as_strided(t.shape, t.stride(), t.storage_offset())
        moved.append(view.conj() if t.is_conj() else view)
    return moved


def move(tensors: list[Tensor], step: int) -> None:
    for i, tensor in enumerate(tensors):
        tensor.mul_(1 + 0.0078125 * ((i + step) % 3) - 0.00390625 * step)


def run(tensors: list[Tensor], backend: str, form: str) -> tuple[list[Tensor], list[list[float]]]:
    """Arenas (on the CPU) and sums after four windows."""
    named = [(f"t{i}", t) for i, t in enumerate(tensors)]
    device = tensors[0].device
    plan = Plan(named, device, chunk_elements=8192)
    arenas = DeviceSums(plan, BACKENDS[backend])
    sums = []
    for window in range(4):
        for step in range(WINDOW):
            move(tensors, step + window)
            if window == 0 and step == 0:
                arenas.begin(form)  # type: ignore[arg-type]
            else:
                arenas.add(first=step == 0)
        sums.append(list(arenas.close(WINDOW)))
    return [arena.cpu() for arena in (arenas.running, arenas.previous, arenas.before)], sums


def require(backend: str) -> None:
    reason = BACKENDS[backend].missing(torch.device("cuda"))
    assert reason is None, reason


@every_gpu_backend
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", ["sum", "delta"])
def test_arenas_have_the_bits_of_the_reference(
    gpu: torch.device, backend: str, case: str, form: str
) -> None:
    require(backend)
    got, sums = run(on_device(make(case), gpu), backend, form)
    # The reference on the same GPU, so that the parameters themselves move by the same roundings.
    wanted, wanted_sums = run(on_device(make(case), gpu), "reference", form)
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a.view(torch.int32), b.view(torch.int32))
    for a, b in zip(sums, wanted_sums, strict=True):
        assert a == pytest.approx(b, rel=1e-10, abs=1e-300)  # float64 sums in another order


@every_gpu_backend
def test_the_gpu_agrees_with_the_cpu_to_1e_9_degrees(gpu: torch.device, backend: str) -> None:
    require(backend)
    generator = torch.Generator().manual_seed(0)
    shapes = [(300, 70), (1000,), (64,), (3,)]
    host = [torch.randn(s, generator=generator) for s in shapes]
    device = [t.to(gpu) for t in host]
    meters = AngularVelocity(host, 4), AngularVelocity(device, 4, backend=backend)
    for _ in range(40):
        for a, b in zip(host, device, strict=True):
            a += 0.01 * torch.randn(a.shape, generator=generator)
            b.copy_(a)
        on_host, on_gpu = (meter.observe() for meter in meters)
    assert on_host is not None
    assert on_gpu is not None
    assert on_gpu.angle == pytest.approx(on_host.angle, abs=1e-9)


@every_gpu_backend
def test_ten_runs_give_the_same_bits(gpu: torch.device, backend: str) -> None:
    require(backend)
    results = [run(on_device(make("threads"), gpu), backend, "sum") for _ in range(10)]
    for arenas, sums in results[1:]:
        assert sums == results[0][1]
        assert all(torch.equal(a, b) for a, b in zip(arenas, results[0][0], strict=True))


@every_gpu_backend
def test_the_current_stream_is_used(gpu: torch.device, backend: str) -> None:
    """Work queued behind a slow kernel on a side stream sees that kernel's result."""
    require(backend)
    x = torch.zeros(1_000_000, device=gpu)
    arenas = DeviceSums(Plan([("x", x)], gpu), BACKENDS[backend])
    arenas.begin("sum")
    side = torch.cuda.Stream(gpu)
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        x.fill_(3.0)
        arenas.add(first=True)
        assert arenas.close(1).mean_norm == 9e6


def test_accumulate_can_be_captured_and_replayed_over_windows(gpu: torch.device) -> None:
    """One graph per phase of the ring of arenas, first step and other steps: six in sum form."""
    require("cuda")
    x = torch.randn(100_000, device=gpu)
    named = [("x", x)]
    captured, plain = (DeviceSums(Plan(named, gpu), BACKENDS["cuda"]) for _ in range(2))
    for arenas in (captured, plain):
        arenas.begin("sum")
    graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
    for step in range(1, 24):
        x.add_(0.1)
        first = step % WINDOW == 0
        phase = (captured.running.data_ptr(), first)
        if phase not in graphs:
            graphs[phase] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[phase]):
                captured.add(first=first)
        graphs[phase].replay()
        plain.add(first=first)
        if step % WINDOW == WINDOW - 1:
            assert captured.close(WINDOW) == plain.close(WINDOW)
    assert len(graphs) == 6


def test_a_step_is_one_launch(gpu: torch.device) -> None:
    require("cuda")
    tensors = [torch.randn(64, device=gpu, dtype=d) for d in (torch.float32, torch.bfloat16)] * 50
    arenas = DeviceSums(Plan([(f"t{i}", t) for i, t in enumerate(tensors)], gpu), BACKENDS["cuda"])
    arenas.begin("sum")
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        arenas.add(first=False)
        torch.cuda.synchronize()
    kernels = [e for e in profile.events() if "accumulate_kernel" in e.name]
    assert len(kernels) == 1


@every_gpu_backend
@pytest.mark.parametrize("form", ["sum", "delta"])
def test_more_than_2_to_the_31_elements(gpu: torch.device, backend: str, form: str) -> None:
    require(backend)
    if torch.cuda.mem_get_info(gpu)[0] < 34 * 2**30:
        pytest.skip("needs 34 GiB of free GPU memory")
    n = 2**31 + 100
    x = torch.ones(n, dtype=torch.bfloat16, device=gpu)
    x[-1] = 3.0
    arenas = DeviceSums(Plan([("x", x)], gpu), BACKENDS[backend])
    arenas.begin(form)  # type: ignore[arg-type]
    x.mul_(2)
    arenas.add(first=False)
    # In delta form the first iterate stands in for the mean: what was added is the difference.
    assert arenas.running[n - 1].item() == (9.0 if form == "sum" else 3.0)
    assert arenas.running[2**31 - 1].item() == (3.0 if form == "sum" else 1.0)
    sums = arenas.close(2)
    assert sums.mean_norm == (n - 1) * 1.5**2 + 4.5**2
    assert sums.norm == (sums.mean_norm if form == "sum" else (n - 1) * 0.5**2 + 1.5**2)
    newest = arenas.previous if form == "sum" else arenas.before
    BACKENDS[backend].bind(arenas.plan).write_back(newest, None, 0.5 if form == "sum" else 1.0)
    assert x[-1].item() == 4.5
    assert x[2**31 - 1].item() == x[0].item() == 1.5
    del arenas, x, newest
    torch.cuda.empty_cache()


@every_gpu_backend
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("delta", [False, True])
def test_weighted_steps_have_the_bits_of_the_reference(
    gpu: torch.device, backend: str, case: str, delta: bool
) -> None:
    require(backend)
    results = []
    for name in (backend, "reference"):
        tensors = on_device(make(case), gpu)
        named = [(f"t{i}", t) for i, t in enumerate(tensors)]
        arenas = DeviceSums(Plan(named, gpu), BACKENDS[name])
        mean = arenas.before if delta else None
        operations = BACKENDS[name].bind(arenas.plan)
        if delta:
            operations.accumulate(arenas.before, None, first=True)
            move(tensors, 1)
        operations.accumulate(arenas.running, mean, first=True, weight=3.0)
        move(tensors, 2)
        operations.accumulate(arenas.running, mean, first=False, weight=0.1)
        results.append(arenas.running.view(torch.int32).cpu())
    assert torch.equal(*results)


@every_gpu_backend
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("with_mean", [False, True])
def test_write_back_has_the_bits_of_the_reference(
    gpu: torch.device, backend: str, case: str, with_mean: bool
) -> None:
    require(backend)
    results = []
    for name in (backend, "reference"):
        tensors = on_device(make(case), gpu)
        named = [(f"t{i}", t) for i, t in enumerate(tensors)]
        arenas = DeviceSums(Plan(named, gpu), BACKENDS[name])
        arenas.begin("sum")
        arenas.before.copy_(arenas.running * 0.25)
        mean = arenas.before if with_mean else None
        BACKENDS[name].bind(arenas.plan).write_back(arenas.running, mean, 0.3)
        results.append([t.cpu() for t in tensors])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def second_gpu(gpu: torch.device) -> torch.device:
    """A GPU that is not the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    return torch.device("cuda", (torch.cuda.current_device() + 1) % torch.cuda.device_count())


@every_gpu_backend
@pytest.mark.parametrize("form", ["sum", "delta"])
def test_a_second_device_while_another_is_current(
    gpu: torch.device, second_gpu: torch.device, backend: str, form: str
) -> None:
    require(backend)
    here, sums = run(on_device(make("mixed dtypes"), gpu), backend, form)
    there, other_sums = run(on_device(make("mixed dtypes"), second_gpu), backend, form)
    assert torch.cuda.current_device() == gpu.index
    assert sums == other_sums
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def test_a_probe_makes_a_context_on_its_own_device_only(
    gpu: torch.device, second_gpu: torch.device
) -> None:
    """In a process of its own, because this one has touched both."""
    program = (
        "import torch; from autodrop_ext.ops import select; "
        f"select('auto', torch.device('cuda', {second_gpu.index})); "
        "print([torch._C._cuda_hasPrimaryContext(i) for i in range(torch.cuda.device_count())])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    wanted = [i == second_gpu.index for i in range(torch.cuda.device_count())]
    assert done.stdout.strip() == str(wanted)


@every_gpu_backend
def test_memory_freed_under_a_waiting_kernel_is_not_given_away(
    gpu: torch.device, backend: str
) -> None:
    require(backend)
    n = 5_000_000
    x = torch.ones(n, device=gpu)
    arenas = DeviceSums(Plan([("x", x)], gpu), BACKENDS[backend])
    arenas.begin("sum")
    torch.cuda.synchronize(gpu)
    side = torch.cuda.Stream(gpu)
    with torch.cuda.stream(side):
        torch.cuda._sleep(400_000_000)  # a fifth of a second or so
        arenas.add(first=False)
    address = arenas.running.data_ptr()
    size = len(arenas.running)
    del arenas
    fresh = [torch.zeros(size, device=gpu) for _ in range(8)]
    assert address not in [t.data_ptr() for t in fresh]
    torch.cuda.synchronize(gpu)
    assert all(t.count_nonzero().item() == 0 for t in fresh)


def test_a_close_inside_a_capture_is_refused_and_the_next_step_is_good(gpu: torch.device) -> None:
    """The capture is this plan's first use of the kernels: a probe has loaded them all."""
    require("cuda")
    x = torch.ones(100_000, device=gpu)
    arenas = DeviceSums(Plan([("x", x)], gpu), BACKENDS["cuda"])
    arenas.begin("sum")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        arenas.add(first=False)
        with pytest.raises(RuntimeError, match="cudaErrorStreamCaptureUnsupported"):
            arenas.close(2)
    graph.replay()
    arenas.add(first=False)
    assert arenas.close(3).mean_norm == 100_000.0


@every_gpu_backend
def test_two_meters_in_two_threads(gpu: torch.device, backend: str) -> None:
    require(backend)
    results: dict[tuple[str, int], list[float]] = {}

    def measure(where: str, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        device = gpu if where == "gpu" else torch.device("cpu")
        host = torch.randn(200_000, generator=generator)
        x = host.to(device)
        meter = AngularVelocity([x], 3, backend=backend if where == "gpu" else "auto")
        angles = results[where, seed] = []
        with torch.cuda.stream(torch.cuda.Stream(gpu)):
            for _ in range(30):
                host += 0.01 * torch.randn(host.shape, generator=generator)
                x.copy_(host)
                reading = meter.observe()
                if reading is not None:
                    angles.append(reading.angle or 0.0)

    threads = [threading.Thread(target=measure, args=("gpu", seed)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (1, 2):
        measure("cpu", seed)
        assert len(results["cpu", seed]) == 8
        assert results["gpu", seed] == pytest.approx(results["cpu", seed], abs=1e-9)


@every_gpu_backend
def test_sampled_readings_are_those_of_the_cpu(backend: str, gpu: torch.device) -> None:
    """Until the survey is over: its float32 sums may end otherwise, and draw other chunks."""
    require(backend)
    generator = torch.Generator().manual_seed(0)
    here = [torch.randn(n, generator=generator) for n in (300_000, 70_001, 5)]
    there = [t.to(gpu) for t in here]
    meters = [
        AngularVelocity(here, 2, sample=1 / 8, per_tensor=True),
        AngularVelocity(there, 2, sample=1 / 8, per_tensor=True, backend=backend),
        AngularVelocity(there, 2, backend=backend),
    ]
    readings = []
    for step in range(20):
        for x, y in zip(here, there, strict=True):
            x += 0.01 * (torch.randn(x.shape, generator=generator) + x.sign())
            y.copy_(x)
        readings.append([meter.observe() for meter in meters])
        if step == 5:
            on_cpu, on_gpu, _ = readings[-1]
            assert on_cpu is not None and on_gpu is not None
            assert on_gpu.angle == pytest.approx(on_cpu.angle, abs=1e-9)
            assert on_gpu.standard_error == pytest.approx(on_cpu.standard_error, rel=1e-6)
    _, sampled, exact = readings[-1]
    assert sampled is not None and exact is not None and sampled.standard_error > 0
    # 370 chunks of alike elements: five standard errors.
    assert abs((sampled.angle or 0) - (exact.angle or 0)) < 5 * sampled.standard_error
