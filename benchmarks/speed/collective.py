"""Measure what the ranks exchange at the end of a window, and what that is on many ranks.

    python benchmarks/speed/collective.py [--ranks 2 4 8] [--windows 200] [--json FILE]

First table: gloo between processes of this machine, where latency is that of its scheduler and not
of a network. ``gather`` is the first collective of a window, ``agree`` what every rank then
computes from the rows, ``add up`` the second collective, which adds up a table of 2^18 float64;
medians over windows of the slowest rank.

Second table: bytes on paper, and ``agree`` measured on synthetic rows. Every rank receives the rows
of all others, ``(ranks - 1) * bytes of a row``, and, whatever the number of ranks, about twice the
bytes of a table; how many messages carry them is the library's choice. Rows are those of replicas
(DDP), of shards (FSDP: every rank holds something else), and of shards in 16 pipeline stages.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from autodrop_ext.agreement import Row, agree, facts_differ
from autodrop_ext.ranks import find_group

ROW_BYTES = 8 * len(Row._fields)  # float64
BUCKETS = 2**18  # the default
TABLE_BYTES = 8 * BUCKETS
STEPS_PER_WINDOW = 64  # the default window
MANY = (8, 64, 512, 1024, 4096, 10_000)
WARM_UP = 20  # windows, until gloo's connections are made
REPEATS = 7  # of agree on synthetic rows; their median is taken

LAYOUTS: dict[str, Callable[[int, int], list[Row]]] = {
    "replicas": lambda ranks, stages: [row(r, ranks, 1, held=0) for r in range(ranks)],
    "shards": lambda ranks, stages: [row(r, ranks, 1, held=r) for r in range(ranks)],
    "stages": lambda ranks, stages: [row(r, ranks, stages, held=r) for r in range(ranks)],
}
STAGES = 16


def row(rank: int, ranks: int, stages: int, held: int) -> Row:
    """What a rank might say; ranks in stages that do not divide them are left uneven."""
    stage = rank % stages
    members = len(range(stage, ranks, stages))
    return Row(
        steps=640.0,
        windows=10.0,
        window=float(STEPS_PER_WINDOW),
        calls=640.0,
        windows_since_restart=3.0,
        restart=0.0,
        incomplete=0.0,
        not_finite=0.0,
        settings=float(2**45),  # equal on all ranks, as the rates are
        rates=float(2**44),
        layout=float(2**47 + stage),  # as long as a real hash
        held=float(2**46 + held),
        stage=float(stage),
        num_stages=float(stages),
        elements=2.0**33 / stages / members,
        model_elements=2.0**33 / stages,
        checksum=3456.789 / ranks,
    )


def judge(rows: list[Row]) -> None:
    """What every rank does with the rows of all ranks."""
    agree(rows)
    if facts_differ(rows):
        raise SystemExit("the benchmark's ranks have different settings")


def exchange(rank: int, ranks: int, windows: int, store: str, output: str) -> None:
    """One process: time the parts of every window, and let rank 0 write all ranks' times."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    group = find_group(None, [])
    mine = row(rank, ranks, 1, held=rank)
    table = torch.ones(BUCKETS, dtype=torch.float64)
    times: list[tuple[float, float, float]] = []
    for _ in range(WARM_UP + windows):
        dist.barrier()  # so that a late rank's delay is not taken for the collective's time
        begin = time.perf_counter()
        rows = group.gather(mine)
        gathered = time.perf_counter()
        judge(rows)
        judged = time.perf_counter()
        group.add_up(table)
        times.append((gathered - begin, judged - gathered, time.perf_counter() - judged))
    everyone: list[Any] = [None] * ranks
    dist.all_gather_object(everyone, times[WARM_UP:])
    if rank == 0:
        pathlib.Path(output).write_text(json.dumps(everyone))
    dist.destroy_process_group()


def measure_exchange(ranks: int, windows: int) -> dict[str, float]:
    """Median over windows of the slowest rank's time, seconds."""
    with tempfile.TemporaryDirectory() as folder:
        output = pathlib.Path(folder, "times.json")
        arguments = (ranks, windows, str(pathlib.Path(folder, "store")), str(output))
        mp.spawn(exchange, args=arguments, nprocs=ranks)
        times = torch.tensor(json.loads(output.read_text()), dtype=torch.float64)
    gather, verdict, add_up = times.amax(dim=0).quantile(0.5, dim=0).tolist()  # [ranks, windows, 3]
    return {
        "ranks": ranks,
        "received_bytes": (ranks - 1) * ROW_BYTES,
        "gather_s": gather,
        "agree_s": verdict,
        "add_up_s": add_up,
    }


def measure_agree(ranks: int) -> dict[str, float]:
    """Median time of agree on synthetic rows as they arrive, seconds by layout."""
    result: dict[str, float] = {"ranks": ranks, "received_bytes": (ranks - 1) * ROW_BYTES}
    for layout, make in LAYOUTS.items():
        rows = torch.tensor(make(ranks, min(STAGES, ranks)), dtype=torch.float64)
        times = []
        for _ in range(REPEATS):
            begin = time.perf_counter()
            judge([Row(*values) for values in rows.tolist()])
            times.append(time.perf_counter() - begin)
        result[f"agree_{layout}_s"] = statistics.median(times)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8], help="local processes")
    parser.add_argument("--windows", type=int, default=200)
    parser.add_argument("--many", type=int, nargs="+", default=list(MANY), help="synthetic ranks")
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()

    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    print(
        f"A row has {len(Row._fields)} float64, {ROW_BYTES} bytes, a table {TABLE_BYTES:,} bytes; "
        "one collective of each a window.\n"
    )
    print(
        f"Measured with gloo on one machine of {cores} cores (load {load:.1f} before), torch "
        f"{torch.__version__}, Python {platform.python_version()}:\n"
    )
    print("| ranks | rows received by each, bytes | gather, ms | agree, ms | add up, ms |")
    print("|--:|--:|--:|--:|--:|")
    exchanged = []
    for ranks in arguments.ranks:
        result = measure_exchange(ranks, arguments.windows)
        exchanged.append(result)
        print(
            f"| {ranks} | {result['received_bytes']:,.0f} | {result['gather_s'] * 1e3:.2f} "
            f"| {result['agree_s'] * 1e3:.3f} | {result['add_up_s'] * 1e3:.2f} |",
            flush=True,
        )
    print(
        "\nBytes on paper, a window and, for windows of "
        f"{STEPS_PER_WINDOW}, a step; agree on synthetic rows, one core of this machine:\n"
    )
    columns = ["ranks", "received by each, bytes", "a step", "by all together, bytes"]
    columns += [f"agree, {layout}, ms" for layout in LAYOUTS]
    print(f"| {' | '.join(columns)} |")
    print(f"|{'--:|' * len(columns)}")
    computed = []
    for ranks in arguments.many:
        result = measure_agree(ranks)
        computed.append(result)
        received = result["received_bytes"]
        agreed = [f"{result[f'agree_{layout}_s'] * 1e3:.2f}" for layout in LAYOUTS]
        cells = [f"{ranks:,}", f"{received:,.0f}", f"{received / STEPS_PER_WINDOW:,.0f}"]
        print(f"| {' | '.join([*cells, f'{received * ranks:,.0f}', *agreed])} |", flush=True)
    if arguments.json:
        machine = {"cores": cores, "load": load, "processor": platform.machine()}
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        data = {"backend": "gloo on one machine", "row_bytes": ROW_BYTES, **machine, **versions}
        data["table_bytes"] = TABLE_BYTES
        tables = {"measured": exchanged, "extrapolated": computed}
        arguments.json.write_text(json.dumps(data | tables, indent=1))


if __name__ == "__main__":
    main()
