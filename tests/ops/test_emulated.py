"""The CUDA kernels run by the emulator: under sanitizers, with planted mistakes, behind the meter.

The case table runs on it, too: ``tests/cases.py`` has it as the backend "cuda emulated".
"""

from __future__ import annotations

import pathlib
import subprocess
import threading
from collections.abc import Iterator

import emulated
import pytest
import torch
from autodrop_ext.ops.device_sums import DeviceSums
from torch import Tensor

from autodrop_ext import AngularVelocity, ops
from autodrop_ext.ops.plan import Plan

pytestmark = pytest.mark.skipif(not emulated.COMPILER, reason="needs g++ or clang++")
CPU = torch.device("cpu")


def run(program: pathlib.Path, *arguments: str) -> tuple[int, str]:
    command = [str(program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    return done.returncode, done.stdout + done.stderr


# ---- the C++ test -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The test with AddressSanitizer and UBSan."""
    folder = tmp_path_factory.mktemp("sanitized")
    sources = (emulated.KERNELS, *emulated.OTHERS)
    objects = emulated.all_compiled(sources, folder, *emulated.SANITIZED)
    return emulated.linked(folder / "test_emulated", objects, *emulated.SANITIZED)


def test_kernels_agree_with_the_cpu_under_sanitizers(sanitized: pathlib.Path) -> None:
    code, output = run(sanitized, "quick")
    assert code == 0, output[-5000:]
    assert " 0 failures" in output
    checks, launches = (
        int(output.rsplit(word, 1)[0].split()[-1]) for word in ("checks", "launches")
    )
    assert checks > 1_000_000
    assert launches > 500


@pytest.mark.slow
def test_kernels_agree_with_the_cpu_in_any_order_of_threads(sanitized: pathlib.Path) -> None:
    code, output = run(sanitized, *map(str, range(1, 9)))
    assert code == 0, output[-5000:]
    assert " 0 failures; 8 seeds" in output


# ---- planted mistakes ---------------------------------------------------------------------------

KERNELS, THREADS, DELTA = "cuda/kernels.cu", "core/thread_work.h", "core/delta.h"
MISTAKES: dict[str, tuple[str, str, str]] = {
    "no barrier": (KERNELS, "  __syncthreads();\n", ""),
    "half of the threads at a barrier": (
        KERNELS,
        "  __syncthreads();\n",
        "  if (threadIdx.x < 128) __syncthreads();\n",
    ),
    "a warp's sum starts at 8": (KERNELS, "int offset = kWarp / 2", "int offset = kWarp / 4"),
    "a shuffle forgotten": (
        KERNELS,
        "other.mean_norm = __shfl_down_sync(kAllLanes, sums.mean_norm, offset)",
        "other.mean_norm = sums.mean_norm",
    ),
    "half a mask": (KERNELS, "kAllLanes = 0xffffffffu", "kAllLanes = 0x0000ffffu"),
    "a shuffle under a condition": (
        KERNELS,
        "    const Sums sums = warp_sum(close(c, lane, lanes));",
        "    Sums sums = close(c, lane, lanes);\n    if (lane < 31) sums = warp_sum(sums);",
    ),
    "the last warp forgotten": (
        KERNELS,
        "w < kThreads / kWarp; ++w",
        "w < kThreads / kWarp - 1; ++w",
    ),
    "every lane stores": (
        KERNELS,
        "    if (lane == 0) partials[c] = sums;",
        "    partials[c] = sums;",
    ),
    "another thread stores": (
        KERNELS,
        "    if (threadIdx.x == 0) partials[",
        "    if (threadIdx.x == 32) partials[",
    ),
    "chunks of a tile skipped": (KERNELS, "c += kThreads / kWarp", "c += kThreads"),
    "one tile too few": (
        KERNELS,
        "return launch(kernel, plan.num_tiles,",
        "return launch(kernel, plan.num_tiles - 1,",
    ),
    "a grid of rows, not tiles": (
        KERNELS,
        "launch(close_sum_kernel, plan.num_tiles,",
        "launch(close_sum_kernel, plan.num_rows,",
    ),
    "not synchronised": (
        KERNELS,
        "  return settled(cudaStreamSynchronize(stream));",
        "  return cudaSuccess;",
    ),
    "too few bytes copied": (KERNELS, "sizeof(Sums),", "sizeof(double),"),
    "the total of chunks, not rows": (
        KERNELS,
        "stream, buffers.per_row, plan.row_weights",
        "stream, buffers.partials, plan.row_weights",
    ),
    "scales swapped": (
        KERNELS,
        "finish(plan, 1.0 / (window * window), 1.0,",
        "finish(plan, 1.0, 1.0 / (window * window),",
    ),
    "the total on another stream": (
        KERNELS,
        "launch(total_kernel, 1, stream,",
        "launch(total_kernel, 1, nullptr,",
    ),
    "the copy on another stream": (
        KERNELS,
        "cudaMemcpyDeviceToHost, stream)",
        "cudaMemcpyDeviceToHost, nullptr)",
    ),
    "the device not set": (KERNELS, "error_ = settled(cudaSetDevice(device));", ""),
    "the device not restored": (KERNELS, "if (switched_) settled(cudaSetDevice(previous_));", ""),
    "errors stay": (KERNELS, "if (error != cudaSuccess) cudaGetLastError();", ""),
    "the copy's error stays": (KERNELS, "settled(cudaMemcpyAsync(", "(cudaMemcpyAsync("),
    "a close accepted in a capture": (
        KERNELS,
        "? cudaSuccess : cudaErrorStreamCaptureUnsupported",
        "? cudaSuccess : cudaSuccess",
    ),
    "a kernel not loaded": (KERNELS, "  next(accumulate_kernel<true, false, true>);\n", ""),
    "another device probed": (
        KERNELS,
        "cudaError_t probe(int device) {\n  const DeviceGuard guard(device);",
        "cudaError_t probe(int device) {\n  const DeviceGuard guard(device * 0);",
    ),
    "weights where there are none": (
        KERNELS,
        "weight == 1.0f ? accumulate_kernel",
        "weight != 1.0f ? accumulate_kernel",
    ),
    "first steps add": (
        KERNELS,
        "first ? launch_accumulate<false, true>",
        "first ? launch_accumulate<false, false>",
    ),
    "packets side by side": (
        THREADS,
        "weight, std::int64_t{lanes} * kPacket);",
        "weight, kPacket);",
    ),
    "past the last packet": (THREADS, "p + (kCount - 1) * lanes < packets", "p < packets"),
    "the rest forgotten": (THREADS, "  return packets * kPacket;", "  return length;"),
    "a packet of four misread": (THREADS, "packet.element[j] = p[j];", "packet.element[j] = p[0];"),
    "columns of the table": (
        THREADS,
        "return {first.element[0], first.element[1], second.element[0], second.element[1]};",
        "return {first.element[0], first.element[1], second.element[0], 0};",
    ),
    "rows without weights": (THREADS, "weights == nullptr ? 1.0 : weights[i]", "1.0"),
    "rows in other lanes": (
        THREADS,
        "i = begin + lane; i < end; i += lanes",
        "i = begin; i < end; ++i",
    ),
    "every estimate trusted": (DELTA, "kSure = 0.5f - 0x1p-13f", "kSure = 0.6f"),
    "an estimate trusted too much": (DELTA, "kSure = 0.5f - 0x1p-13f", "kSure = 0.5f - 0x1p-21f"),
    "estimates of any size": (DELTA, "size > 0x1p-60f && size < 0x1p90f && ", ""),
    "a displacement cut, not rounded": (
        DELTA,
        "((bits + 0x80u) & 0xffffff00u) | low);\n  previous",
        "(bits & 0xffffff00u) | low);\n  previous",
    ),
}
# Those that are planted in every run; the others take minutes.
ALWAYS = ("no barrier", "half a mask", "errors stay", "an estimate trusted too much")


@pytest.fixture(scope="module")
def correct(tmp_path_factory: pytest.TempPathFactory) -> dict[pathlib.Path, pathlib.Path]:
    """Object files of the test without its kernels, not sanitized, which is quicker."""
    objects = emulated.all_compiled(emulated.OTHERS, tmp_path_factory.mktemp("correct"))
    return dict(zip(emulated.OTHERS, objects, strict=True))


@pytest.mark.parametrize(
    "mistake",
    [m if m in ALWAYS else pytest.param(m, marks=pytest.mark.slow) for m in MISTAKES],
)
def test_a_planted_mistake_is_noticed(
    mistake: str,
    correct: dict[pathlib.Path, pathlib.Path],
    tmp_path: pathlib.Path,
) -> None:
    file, old, new = MISTAKES[mistake]
    text = (emulated.CSRC / file).read_text()
    assert text.count(old) == 1 or mistake == "not synchronised", f"{text.count(old)} times: {old}"
    target = tmp_path / file
    target.parent.mkdir()
    target.write_text(text.replace(old, new, 1))
    # Of core/delta.h the test calls two functions itself.
    with_mistake = [emulated.KERNELS, *([emulated.TEST] if file == DELTA else [])]
    flags = ("-Wno-unused-parameter", "-Wno-unused-function")
    objects = {
        **correct,
        **{s: emulated.compiled(s, tmp_path, *flags, overlay=tmp_path) for s in with_mistake},
    }
    code, output = run(emulated.linked(tmp_path / "mistaken", [*objects.values()]), "quick")
    assert code != 0, f"nothing was noticed: {output[-500:]}"


# ---- the backend --------------------------------------------------------------------------------


@pytest.fixture
def as_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``backend="cuda"`` is the emulated one."""
    monkeypatch.setitem(ops.BACKENDS, "cuda", emulated.EmulatedCuda())
    yield
    emulated.Streams.handle = 0


def device_sums_of(tensors: list[Tensor]) -> DeviceSums:
    return DeviceSums(
        Plan([(f"t{i}", t) for i, t in enumerate(tensors)], CPU), emulated.EmulatedCuda()
    )


def test_a_meter_over_the_emulated_backend_reads_what_the_cpu_reads(as_cuda: None) -> None:
    generator = torch.Generator().manual_seed(0)
    here = [torch.randn(n, generator=generator) for n in (70_001, 300, 5)]
    there = [t.clone() for t in here]
    meters = AngularVelocity(here, 3), AngularVelocity(there, 3, backend="cuda")
    readings = []
    for _ in range(24):
        for a, b in zip(here, there, strict=True):
            a += 0.01 * torch.randn(a.shape, generator=generator)
            b.copy_(a)
        readings.append([meter.observe() for meter in meters])
    pairs = [(a, b) for a, b in readings if a is not None]
    assert len(pairs) == 6
    for on_cpu, emulated_reading in pairs:
        # The accuracy contract across backends.
        assert emulated_reading.angle == pytest.approx(on_cpu.angle, abs=1e-9)


def test_two_meters_in_two_threads(as_cuda: None) -> None:
    results: dict[int, list[float]] = {}

    def measure(seed: int, backend: str, into: dict[int, list[float]]) -> None:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(20_000 + seed, generator=generator)
        meter = AngularVelocity([x], 2, backend=backend)
        into[seed] = []
        for _ in range(12):
            x += 0.01 * torch.randn(x.shape, generator=generator)
            reading = meter.observe()
            if reading is not None:
                into[seed].append(reading.angle)

    threads = [threading.Thread(target=measure, args=(s, "cuda", results)) for s in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected: dict[int, list[float]] = {}
    for seed in (1, 2):
        measure(seed, "cpu", expected)
        assert len(expected[seed]) == 4
        assert results[seed] == pytest.approx(expected[seed], abs=1e-9)


def test_no_call_holds_pythons_lock() -> None:
    module = emulated.module()
    before, held_before = module.calls()
    x = torch.randn(100)
    arenas = device_sums_of([x])
    for form in ("sum", "delta"):
        arenas.begin(form)
        arenas.add(first=False)
        arenas.close(2)
    emulated.EmulatedCuda().bind(arenas.plan).write_back(arenas.running, None, 1.0)
    module.cuda_probe(0)
    calls, held = module.calls()
    assert calls - before > 30
    assert held == held_before == 0


def test_a_failed_launch_raises_its_name_and_the_next_step_is_good() -> None:
    x = torch.ones(100)
    arenas = device_sums_of([x])
    arenas.begin("sum")
    emulated.module().fail_once("cudaLaunchKernel")
    with pytest.raises(RuntimeError, match="accumulate: cudaErrorLaunchFailure"):
        arenas.add(first=False)
    arenas.add(first=False)
    assert arenas.running[:100].eq(2).all()
    emulated.module().fail_once("cudaStreamSynchronize")
    with pytest.raises(RuntimeError, match="close: cudaErrorLaunchFailure"):
        arenas.close(2)
    assert arenas.close(2).mean_norm == 100.0


def test_a_close_inside_a_capture_is_refused_and_the_capture_goes_on(as_cuda: None) -> None:
    module = emulated.module()
    module.cuda_probe(0)
    x = torch.full((10_000,), 2.0)
    arenas = device_sums_of([x])
    arenas.begin("sum")
    emulated.Streams.handle = stream = module.new_stream()
    module.begin_capture(stream)
    arenas.add(first=False)
    with pytest.raises(RuntimeError, match="close: cudaErrorStreamCaptureUnsupported"):
        arenas.close(2)
    arenas.add(first=False)
    assert module.end_capture(stream)
    assert arenas.running[:10_000].eq(2).all()  # nothing has run yet
    module.replay()
    assert arenas.running[:10_000].eq(6).all()
    assert arenas.close(3).mean_norm == 40_000.0
