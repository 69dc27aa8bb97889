"""The table's CUDA kernels in machine code: no spills, wide accesses, loads in flight.

Counts are those of instructions in the binary.
"""

from __future__ import annotations

import functools

import machine_code
import pytest

needs_tools = pytest.mark.skipif(
    None in machine_code.tools(), reason="needs nvcc and nvdisasm (pip install triton has that)"
)
every_architecture = pytest.mark.parametrize(
    "architecture",
    [90, 89, *(pytest.param(a, marks=pytest.mark.slow) for a in (80, 86, 100, 103, 120))],
)
FEW_FLOAT64_UNITS = (86, 89, 103, 120)
# Instructions that the multiprocessors of an A100, RTX 3090, RTX 4090, H200, B200 and RTX 5090 can
# issue while the memory delivers two bytes (docs/kernels.md). A B300 can issue 8.5, too few for two
# float32 numbers: its limit is what the kernels reach.
SLOTS = {80: 19.5, 86: 38, 89: 82, 90: 12.6, 100: 8.5, 103: 10.5, 120: 58}
kernels = functools.cache(machine_code.kernels)


@needs_tools
@every_architecture
def test_no_kernel_spills_or_looks_up_the_kind_of_memory(architecture: int) -> None:
    found = kernels(architecture)
    assert set(found) == {"accumulate", "add_partials", "accumulate_exact", "close", "nothing"}
    for name, kernel in found.items():
        assert kernel.spilled == 0, name
        assert machine_code.blocks_at_once(kernel) >= 2, name
        assert kernel.count(r"(LD|ST)\.|(LD|ST)$") == 0, f"{name} has generic accesses"
        assert kernel.count(r"(LD|ST)L") == 0, f"{name} uses local memory"
        assert kernel.count(r"ATOM|RED") == 0, f"{name} has atomics"


@needs_tools
@every_architecture
def test_a_pass_has_128_bytes_in_flight_and_few_instructions(architecture: int) -> None:
    """64 KiB a multiprocessor; latency times bandwidth of an H200 is 21 KiB, of a B200 32."""
    accumulate = kernels(architecture)["accumulate"]
    found = machine_code.passes(accumulate)
    assert set(found) == set(machine_code.PASSES)
    for name, p in found.items():
        assert p.bytes_in_flight == 128, name
        assert p.bytes_in_flight * machine_code.THREADS * 2 >= 34 * 1024
        # Two float32 numbers are added where there are few float64 units, but for float64 itself.
        if architecture in FEW_FLOAT64_UNITS and name != "float64":
            assert (p.float64, p.conversions) == (0, 0), name
            assert p.float32 == machine_code.ADDITIONS * p.elements, name
            assert p.an_element <= (11 if architecture == 103 else 17), name
        else:
            assert (p.float64, p.float32) == (p.elements, 0), name
            assert p.conversions == (0 if name == "float64" else p.elements), name
            assert p.an_element <= 10, name
        if p.elements == 64:
            assert p.an_element <= SLOTS[architecture], name


@needs_tools
@pytest.mark.slow
def test_a_b300_adds_two_pairs_at_once() -> None:
    accumulate = kernels(103)["accumulate"]
    assert accumulate.count("FADD2|FFMA2") > 1000
    assert accumulate.count(r"FADD(\.|$)") == 0


@needs_tools
@every_architecture
def test_tables_move_16_bytes_at_a_time(architecture: int) -> None:
    found = kernels(architecture)
    # Two packets of eight lanes: read to add to them, and written.
    assert found["accumulate"].count(r"STG\.E\.128$") >= 8
    assert found["accumulate"].count(r"STG\.E(\.64)?$") == 0
    assert found["add_partials"].count(r"LDG\.E(\.64)?$") == 0
    assert found["add_partials"].count(r"STG\.E\.128$") == 1
    # A pass of two pairs of three tables, and one of one pair.
    assert found["close"].count(r"LDG\.E\.128$") >= 9
    assert found["close"].count(r"STG\.E\.128$") >= 9
    # For each dtype passes of four times and of once four elements.
    assert found["accumulate_exact"].count(r"STG\.E\.128$") >= 4 * (4 + 1) * 2
