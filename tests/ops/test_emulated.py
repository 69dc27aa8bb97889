"""The table's CUDA kernels in the emulator: sanitizers and planted mistakes."""

from __future__ import annotations

import atexit
import functools
import pathlib
import shutil
import subprocess
import tempfile

import emulated
import pytest

pytestmark = pytest.mark.skipif(not emulated.COMPILER, reason="needs g++ or clang++")


def run(program: pathlib.Path, *arguments: str) -> tuple[int, str]:
    command = [str(program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    return done.returncode, done.stdout + done.stderr


# ---- the C++ test -------------------------------------------------------------------------------


SUMS = {"float64": (), "two floats": emulated.TWO_FLOATS, "pairs of two floats": emulated.PAIRS}


@pytest.fixture(
    scope="module",
    params=["float64", "two floats", pytest.param("pairs of two floats", marks=pytest.mark.slow)],
)
def sanitized(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
    """The test with AddressSanitizer and UBSan."""
    folder = tmp_path_factory.mktemp("sanitized")
    sources = (emulated.KERNELS, *emulated.OTHERS)
    flags = (*emulated.SANITIZED, *SUMS[request.param])
    objects = emulated.all_compiled(sources, folder, *flags)
    return emulated.linked(folder / "test_emulated", objects, *emulated.SANITIZED)


def test_kernels_add_the_bits_of_plain_loops_under_sanitizers(sanitized: pathlib.Path) -> None:
    code, output = run(sanitized, "quick")
    assert code == 0, output[-5000:]
    assert " 0 failures" in output
    checks, launches = (
        int(output.rsplit(word, 1)[0].split()[-1]) for word in ("checks", "launches")
    )
    assert checks > 1_000_000
    assert launches > 200


@pytest.mark.slow
def test_kernels_add_the_same_bits_in_any_order_of_threads(sanitized: pathlib.Path) -> None:
    code, output = run(sanitized, *map(str, range(1, 9)))
    assert code == 0, output[-5000:]
    assert " 0 failures; 8 seeds" in output


# ---- planted mistakes ---------------------------------------------------------------------------

# By UBSan, by AddressSanitizer, by the emulator itself.
ALIGNMENT, PAST_THE_END, EMULATOR = "misaligned address", "heap-buffer-overflow", "emulator: "
ADDRESS = "address"  # the check of that name: a signal
TABLE, OF_LANES, OF_SUMS = "cuda/table.cu", "cuda/lanes.h", "cuda/sums.h"
# File, what is replaced, by what, and what notices it: the name of a check of
# csrc/tests/test_emulated.cpp, or words of the emulator.
MISTAKES: dict[str, tuple[str, str, str, str]] = {
    "no barrier before the pieces are added": (
        TABLE,
        "bases);\n    }\n    __syncthreads();\n",
        "bases);\n    }\n",
        "sketch",
    ),
    "no barrier after the pieces were added": (
        TABLE,
        "    __syncthreads();\n  }\n  // Two floats",
        "  }\n  // Two floats",
        "sketch",
    ),
    "no barrier after counting": (
        TABLE,
        "  share.count();\n  __syncthreads();\n",
        "  share.count();\n",
        EMULATOR,
    ),
    "half of the threads at a barrier": (
        TABLE,
        "  share.count();\n  __syncthreads();\n",
        "  share.count();\n  if (threadIdx.x < 128) __syncthreads();\n",
        EMULATOR,
    ),
    "another thread's share": (TABLE, "blockIdx.x / num_rows;", "blockIdx.x % splits;", "sketch"),
    "pieces of a run next to each other": (
        TABLE,
        "runs[run] + split + (n - begin) * splits",
        "runs[run] + n - begin",
        "sketch",
    ),
    "runs of seven swaps": (TABLE, "r < kSwaps - 1; ++r", "r < kSwaps - 2; ++r", "sketch"),
    "one batch only": (
        TABLE,
        "begin < total; begin += kBatch",
        "begin < 1; begin += kBatch",
        "sketch",
    ),
    "the batch's last piece": (
        TABLE,
        "total - begin < kBatch ? total - begin : kBatch)",
        "total - begin < kBatch ? total - begin - (total > 256) : kBatch)",
        "sketch",
    ),
    "the start not subtracted": (
        TABLE,
        "std::uint64_t{p.start} * ",
        "std::uint64_t{0} * ",
        "sketch",
    ),
    "an address in 32 bits": (
        TABLE,
        "static_cast<std::uint64_t>(bases[p.tensor] + p.offset) -",
        "static_cast<std::uint64_t>(bases[p.tensor] + static_cast<int>(p.offset)) -",
        ADDRESS,
    ),
    "a span's offset in 32 bits": (
        TABLE,
        "bases[span.tensor] + span.offset",
        "bases[span.tensor] + static_cast<int>(span.offset)",
        ADDRESS,
    ),
    "alignment to 8 bytes": (
        TABLE,
        "stretch.origin % 16 == 0",
        "stretch.origin % 8 == 0",
        ALIGNMENT,
    ),
    "ragged ends forgotten": (
        TABLE,
        "(stretch.start | stretch.end) % kPacket != 0",
        "stretch.start % kPacket != 0",
        "sketch",
    ),
    "codes of another dtype in a row": (
        TABLE,
        "stretches[end].code == code",
        "stretches[end].code % 8 == code % 8",
        ADDRESS,
    ),
    "the rest of a run forgotten": (
        TABLE,
        "kMost > 1 && at < end",
        "kMost > 4 && at < end",
        "sketch",
    ),
    "partials of one split": (
        TABLE,
        "s < splits; ++s) {\n    const Two part",
        "s < 1; ++s) {\n    const Two part",
        "sketch",
    ),
    "the table overwritten by partials": (
        TABLE,
        "*to = {{old.element[0] + sum.element[0], old.element[1] + sum.element[1]}};",
        "*to = sum;",
        "sketch",
    ),
    "a single block's rows overwrite": (TABLE, "      if (adds) {", "      if (false) {", "sketch"),
    "half of the buckets": (
        TABLE,
        "buckets / (2 * kThreads), stream",
        "buckets / (4 * kThreads), stream",
        "sketch",
    ),
    "partials on another stream": (
        TABLE,
        "launch(add_partials_kernel, buckets / (2 * kThreads), stream,",
        "launch(add_partials_kernel, buckets / (2 * kThreads), nullptr,",
        "two launches at most",
    ),
    "always a second launch": (
        TABLE,
        "      adds || error != cudaSuccess",
        "      error != cudaSuccess",
        "two launches at most",
    ),
    "the rotation the other way": (
        OF_LANES,
        "kThreads - stretch.packet)",
        "kThreads + stretch.packet)",
        "sketch",
    ),
    "packets next to each other": (
        OF_LANES,
        "(thread + held * kThreads -",
        "(2 * thread + held -",
        "sketch",
    ),
    "signs of the first packet": (
        OF_LANES,
        "signs_of(stretches[u].hash, thread + h * kThreads);\n      Of::add",
        "signs_of(stretches[u].hash, thread);\n      Of::add",
        "sketch",
    ),
    "signs one lane off": (
        OF_LANES,
        "signs << (kPacket - 1 - l)",
        "signs << (kPacket - l)",
        "sketch",
    ),
    "signs of pairs exchanged": (
        OF_LANES,
        "constexpr int kLow = kSwap & 1;",
        "constexpr int kLow = 0;",
        "sketch",
    ),
    "swap of pairs forgotten": (OF_LANES, "word[q ^ kSwap >> 1]", "word[q]", "sketch"),
    "swap within 16 bytes forgotten": (
        OF_LANES,
        "element[l % kWide ^ kSwap]",
        "element[l % kWide]",
        "sketch",
    ),
    "swap of loads forgotten": (
        OF_LANES,
        "i ^ static_cast<int>(swap_of(stretch.code)) / Of::kWide",
        "i",
        "sketch",
    ),
    "swap of single elements forgotten": (OF_LANES, "(l ^ swap)", "l", "sketch"),
    "a packet past the end is whole": (
        OF_LANES,
        "(packet + 1) * kPacket <= stretch.end",
        "packet * kPacket < stretch.end",
        PAST_THE_END,
    ),
    "an element past the end": (
        OF_LANES,
        "j < stretch.end &&",
        "j <= stretch.end &&",
        PAST_THE_END,
    ),
    "weights of the first piece": (
        OF_LANES,
        "loads[u][h], signs, stretches[u].weight",
        "loads[u][h], signs, stretches[0].weight",
        "sketch",
    ),
    "no weights": (OF_SUMS, "__fma_rn(x, weight, sum)", "sum + x", "sketch"),
    "spans one thread short": (
        TABLE,
        "i < done; i += kThreads * kFour",
        "i + kFour < done; i += kThreads * kFour",
        "exact",
    ),
    "the rest of a span": (TABLE, "  int i = done + thread;\n", "  int i = length;\n", "exact"),
    "spans of any alignment": (
        TABLE,
        "address % alignof(Four<T>) == 0 && ",
        "",
        ALIGNMENT,
    ),
    "buckets of any alignment": (
        TABLE,
        " && reinterpret_cast<std::uintptr_t>(buckets) % 16 == 0",
        "",
        ALIGNMENT,
    ),
    "the new displacement for the old one": (
        TABLE,
        "  sums.dot = __fma_rn(s, displacement, sums.dot);\n",
        "  sums.dot = __fma_rn(s, s, sums.dot);\n",
        "dot",
    ),
    "a reciprocal": (TABLE, "running / divisor;", "running * (1.0 / divisor);", "closed mean"),
    "running kept": (TABLE, "  running = 0.0;\n", "", "running is zero"),
    "odd parts two at a time": (TABLE, "range.begin % 2 == 0", "range.begin % 1 == 0", ALIGNMENT),
    "a part's last bucket": (
        TABLE,
        "i < range.end; i += kThreads",
        "i + 1 < range.end; i += kThreads",
        "closed mean",
    ),
    "a warp's sum starts at 8": (TABLE, "int offset = kWarp / 2", "int offset = kWarp / 4", "dot"),
    "half a mask": (TABLE, "kAllLanes = 0xffffffffu", "kAllLanes = 0x0000ffffu", EMULATOR),
    "the last warp forgotten": (
        TABLE,
        "w < kThreads / kWarp; ++w",
        "w < kThreads / kWarp - 1; ++w",
        "dot",
    ),
    "no barrier between warps": (
        TABLE,
        "  __syncthreads();\n  if (threadIdx.x == 0) {\n    for (int w",
        "  if (threadIdx.x == 0) {\n    for (int w",
        "dot",
    ),
    "every thread stores the sum": (
        TABLE,
        "  if (thread == 0) {\n    reinterpret_cast<Two*>",
        "  {\n    reinterpret_cast<Two*>",
        "dot",
    ),
    "the device not set": (TABLE, "error_ = settled(cudaSetDevice(device));", "", "no error"),
    "the device not restored": (
        TABLE,
        "if (switched_) settled(cudaSetDevice(previous_));",
        "",
        "device restored",
    ),
    "errors stay": (TABLE, "if (error != cudaSuccess) cudaGetLastError();", "", "no error left"),
    "a close accepted in a capture": (
        TABLE,
        "if (status != cudaStreamCaptureStatusNone) return",
        "if (false) return",
        "close refused",
    ),
    "a kernel not loaded": (TABLE, "  next(add_partials_kernel);\n", "", "no error"),
    "another device probed": (
        TABLE,
        "cudaError_t probe(int device) {\n  const DeviceGuard guard(device);",
        "cudaError_t probe(int device) {\n  const DeviceGuard guard(device * 0);",
        "error returned",
    ),
    "a grid of any size": (
        TABLE,
        "if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;",
        "",
        "grid",
    ),
}
# Mistakes in sums of two float32 numbers.
OF_TWO_FLOATS: dict[str, tuple[str, str, str, str]] = {
    "the error as if the sum so far were the larger number": (
        OF_SUMS,
        "plus(minus(h, minus(s, of_x)), minus(x, of_x));",
        "minus(x, of_x);",
        "sketch",
    ),
    "the error of the sum so far only": (
        OF_SUMS,
        "plus(minus(h, minus(s, of_x)), minus(x, of_x));",
        "minus(h, minus(s, of_x));",
        "sketch",
    ),
    "the error subtracted": (
        OF_SUMS,
        "v = plus(low[pair], e)",
        "v = minus(low[pair], e)",
        "sketch",
    ),
    "earlier errors forgotten": (OF_SUMS, "v = plus(low[pair], e)", "v = e", "sketch"),
    "errors not carried over": (OF_SUMS, "high[pair] = plus(s, v);", "high[pair] = s;", "sketch"),
    "the second error the other way": (
        OF_SUMS,
        "minus(v, minus(high[pair], s));",
        "minus(s, minus(high[pair], v));",
        "sketch",
    ),
    "errors lost in the total": (
        OF_SUMS,
        "weight * (static_cast<double>(h.second) + static_cast<double>(l.second))",
        "weight * static_cast<double>(h.second)",
        "sketch",
    ),
    "the total in float32": (
        OF_SUMS,
        "static_cast<double>(h.first) + static_cast<double>(l.first)",
        "static_cast<double>(h.first + l.first)",
        "sketch",
    ),
    "no weight in the total": (
        OF_SUMS,
        "{{weight * (static_cast",
        "{{1.0 * (static_cast",
        "sketch",
    ),
    "other groups in a run": (TABLE, " && group_of(stretches[end]) == group", "", "sketch"),
    "other groups' whole packets": (
        TABLE,
        "!lanes::is_aligned(stretches[at].code) || group_of(stretches[at]) != group",
        "!lanes::is_aligned(stretches[at].code)",
        "sketch",
    ),
    "other groups' single elements": (
        TABLE,
        "!stretches[at].by_element || group_of(stretches[at]) != group",
        "!stretches[at].by_element",
        "sketch",
    ),
    "a group of all weights": (
        TABLE,
        ": numeric::bit_cast<std::uint64_t>(stretch.weight);",
        ": 0;",
        "sketch",
    ),
    "the first group only": (TABLE, "while (group != first);", "while (false);", "sketch"),
    "a group passed over": (
        TABLE,
        "next == 0 || after < next",
        "next == 0 || after > next",
        "sketch",
    ),
    "groups written over each other": (TABLE, "        adds = true;\n", "", "sketch"),
    "float64 with the others": (TABLE, "if (group == kFloat64Group) {", "if (false) {", "sketch"),
    "a block without pieces writes nothing": (
        TABLE,
        "if (!kTwoFloats || total == 0) write",
        "if (!kTwoFloats) write",
        "sketch",
    ),
}
# And in the functions for two pairs at once.
OF_PAIRS: dict[str, tuple[str, str, str, str]] = {
    "the second of a pair added": (OF_SUMS, "{-1.0f, -1.0f}", "{-1.0f, 1.0f}", "sketch"),
    "one lane's sum for both": (
        OF_SUMS,
        "__fadd2_rn({a.first, a.second}, {b.first, b.second});",
        "__fadd2_rn({a.first, a.first}, {b.first, b.first});",
        "sketch",
    ),
}
# Those that are planted in every run; the others take minutes.
ALWAYS = (
    "no barrier after counting",
    "half a mask",
    "errors stay",
    "signs one lane off",
    "earlier errors forgotten",
    "other groups in a run",
)


@functools.cache
def others(*flags: str) -> tuple[pathlib.Path, ...]:
    """Object files of the test without its kernels."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="autodrop-others-"))
    atexit.register(shutil.rmtree, folder)
    return tuple(emulated.all_compiled(emulated.OTHERS, folder, *flags))


MISTAKEN = {
    **{m: ((), *planted) for m, planted in MISTAKES.items()},
    **{m: (emulated.TWO_FLOATS, *planted) for m, planted in OF_TWO_FLOATS.items()},
    **{m: (emulated.PAIRS, *planted) for m, planted in OF_PAIRS.items()},
}


@pytest.mark.parametrize(
    "mistake",
    [m if m in ALWAYS else pytest.param(m, marks=pytest.mark.slow) for m in MISTAKEN],
)
def test_a_planted_mistake_is_noticed(mistake: str, tmp_path: pathlib.Path) -> None:
    of_sums, file, old, new, noticed = MISTAKEN[mistake]
    text = (emulated.CSRC / file).read_text()
    assert text.count(old) == 1, f"{text.count(old)} times: {old}"
    target = tmp_path / file
    target.parent.mkdir()
    target.write_text(text.replace(old, new))
    # UBSan and AddressSanitizer are slow, so only what they alone see is compiled with them.
    sanitized = emulated.SANITIZED if noticed in (ALIGNMENT, PAST_THE_END) else ()
    flags = (*sanitized, *of_sums)
    quiet = ("-Wno-unused-parameter", "-Wno-unused-function", "-Wno-unused-variable")
    kernels = emulated.compiled(emulated.KERNELS, tmp_path, *flags, *quiet, overlay=tmp_path)
    program = emulated.linked(tmp_path / "mistaken", [kernels, *others(*flags)], *sanitized)
    code, output = run(program, "quick")
    assert code != 0, f"nothing was noticed: {output[-500:]}"
    by_the_program = noticed in (ALIGNMENT, PAST_THE_END, EMULATOR)
    assert (noticed if by_the_program else f"FAILED {noticed} (") in output, output[:500]


def test_mistakes_have_different_names() -> None:
    assert len(MISTAKEN) == len(MISTAKES) + len(OF_TWO_FLOATS) + len(OF_PAIRS)
