"""The CUDA kernels in machine code: no spills, wide accesses, all loads of a pass in flight.

Counts are those of instructions in the binary. Every kernel has its work twice, for a block and for
a warp that share a chunk; accumulate and write_back also for four dtypes, each of them aligned and
not.
"""

from __future__ import annotations

import functools

import machine_code
import pytest

SITES, DTYPES, ALIGNMENTS = 2, 4, 2
PACKETS_OF_SUMS, PACKETS_OF_DELTAS, PACKETS_OF_CLOSES, PACKETS_WRITTEN = 4, 2, 2, 2
ARENA_LOAD, ARENA_STORE = r"LDG\.E\.EF\.128$", r"STG\.E\.EF\.128$"

needs_tools = pytest.mark.skipif(
    None in machine_code.tools(), reason="needs nvcc and nvdisasm (pip install triton has that)"
)
every_architecture = pytest.mark.parametrize(
    "architecture",
    [80, 90, *(pytest.param(a, marks=pytest.mark.slow) for a in (86, 89, 100, 120))],
)
kernels = functools.cache(machine_code.kernels)


@needs_tools
@every_architecture
def test_no_kernel_spills_or_looks_up_the_kind_of_memory(architecture: int) -> None:
    found = kernels(architecture)
    assert len(found) == 14
    for name, kernel in found.items():
        assert kernel.spilled == 0, name
        assert kernel.registers <= 65_536 // (2 * 256), name  # two blocks a multiprocessor
        assert kernel.count(r"(LD|ST)\.|(LD|ST)$") == 0, f"{name} has generic accesses"
        assert kernel.count(r"(LD|ST)L") == 0, f"{name} uses local memory"


@needs_tools
@every_architecture
def test_arenas_move_16_bytes_at_a_time(architecture: int) -> None:
    """Nothing but the at most three elements of a chunk after its last packet moves less."""
    found = kernels(architecture)
    variants = SITES * DTYPES * ALIGNMENTS
    for delta in (0, 1):
        packets = variants * ((PACKETS_OF_DELTAS if delta else PACKETS_OF_SUMS) + 1)
        for first in (0, 1):
            for weighted in (0, 1):
                name = f"accumulate {delta} {first} {weighted}"
                assert found[name].count(ARENA_LOAD) == packets * (1 - first + delta), name
                assert found[name].count(ARENA_STORE) == packets, name
                # The rest: one element of every variant, but not for every alignment.
                assert found[name].count(r"STG\.E$") <= variants, name
    closes = SITES * 3 * (PACKETS_OF_CLOSES + 1)
    assert found["close_sum"].count(ARENA_LOAD) == closes
    assert found["close_delta"].count(ARENA_LOAD) == closes
    assert found["close_delta"].count(ARENA_STORE) == closes
    # nvcc may put the choice of a mean, known at run time, outside the loops or inside.
    assert found["write_back"].count(ARENA_LOAD) >= 2 * variants * (PACKETS_WRITTEN + 1)


@needs_tools
@every_architecture
def test_rows_of_the_tables_are_read_16_bytes_at_a_time(architecture: int) -> None:
    found = kernels(architecture)
    # A tile and, at each site, two halves of a chunk's row; a close needs only the latter's half.
    assert found["close_sum"].count(r"LDG\.E\.128$") >= 1
    floats = SITES * (PACKETS_OF_SUMS + 1)
    doubles = SITES * 2 * (PACKETS_OF_SUMS + 1)
    assert found["accumulate 0 0 0"].count(r"LDG\.E\.128$") == 1 + SITES * 2 + floats + doubles


@needs_tools
@every_architecture
def test_every_load_of_a_pass_is_in_flight_before_its_first_store(architecture: int) -> None:
    found = kernels(architecture)

    def accumulates(arenas: int, packets: int) -> dict[int, int]:
        """Bytes of a pass, and how many passes have so many: parameters have 2, 2, 4 or 8."""
        passes = SITES * ALIGNMENTS
        return {packets * 4 * (4 * arenas + b): passes * n for b, n in ((2, 2), (4, 1), (8, 1))}

    # For each kernel: arenas that it reads, packets of a pass, and passes by bytes in flight.
    expected = {
        "accumulate 0 0 0": (1, PACKETS_OF_SUMS, accumulates(1, PACKETS_OF_SUMS)),
        "accumulate 1 0 0": (2, PACKETS_OF_DELTAS, accumulates(2, PACKETS_OF_DELTAS)),
        "close_sum": (3, PACKETS_OF_CLOSES, {3 * PACKETS_OF_CLOSES * 16: SITES}),
        "close_delta": (3, PACKETS_OF_CLOSES, {3 * PACKETS_OF_CLOSES * 16: SITES}),
    }
    for name, (arenas, packets, passes) in expected.items():
        got: dict[int, int] = {}
        for block in found[name].blocks:
            arena_loads = [i for i in block if i.startswith("LDG.E.EF")]
            if arena_loads:
                loads = machine_code.in_flight(block)
                every = [machine_code.width(i) for i in block if i.startswith("LDG")]
                assert loads == every, f"{name}: a load waits for a store"
                if len(arena_loads) == arenas * packets:
                    got[sum(loads)] = got.get(sum(loads), 0) + 1
        assert got == passes, name
