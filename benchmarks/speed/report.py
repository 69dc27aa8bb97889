"""Print a pytest-benchmark file of bench_throughput.py as a Markdown table.

python benchmarks/speed/report.py benchmark.json
"""

from __future__ import annotations

import json
import pathlib
import sys


def main(path: str) -> None:
    data = json.loads(pathlib.Path(path).read_text())
    print("| benchmark | model | dtype | compared with | ours, ms | theirs, ms | speedup | GB/s |")
    print("|:--|:--|:--|:--|--:|--:|--:|--:|")
    for entry in data["benchmarks"]:
        info = entry["extra_info"]
        if "ratio" not in info:
            continue
        name, (model, dtype, peer) = entry["group"], entry["name"][:-1].split("[")[1].split("-")
        print(
            f"| {name} | {model} | {dtype} | {peer} | {entry['stats']['median'] * 1e3:.3f} "
            f"| {info['peer_median_s'] * 1e3:.3f} | {info['ratio']:.2f}x | {info['gb_per_s']:.1f} |"
        )


if __name__ == "__main__":
    main(sys.argv[1])
