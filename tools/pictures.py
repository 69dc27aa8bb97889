"""Makes the pictures of the documents out of the demo's runs, in a minute.

    python tools/pictures.py [--to docs/images]

``lengths.png`` is the demo's picture, ``digits.png`` the plot of its first AutoDrop run, each with
a ``-dark`` one for dark pages. ``watch.svg`` is a film of ``autodrop watch`` over that run,
recorded by rich.
"""

from __future__ import annotations

import argparse
import colorsys
import io
import pathlib
import re
import sys
import tempfile
from typing import Any

from matplotlib import colors
from matplotlib.collections import Collection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text
from PIL import Image
from rich.console import Console

from autodrop_ext import JsonLinesLog
from autodrop_ext.cli.watch import render
from autodrop_ext.log import LogReader
from autodrop_ext.plotting.run import plot_run

# Run as a file, the demo is not on the path.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "examples"))

from demo.digits import Digits
from demo.run import lengths_picture, read_at
from demo.training import SCHEDULES, SET_FOR_A_LENGTH, train

SEED = 0
WIDTH = 84  # columns of the terminal
FRAMES = 15
SECONDS = 0.6  # of a frame; the last one stays for REST
REST = 3.0


def main() -> None:
    """Train and write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=pathlib.Path, default=pathlib.Path("docs/images"))
    to = parser.parse_args().to
    task = Digits()
    lengths = (task.steps // 10, 3 * task.steps // 10, task.steps)
    settings = {"reads": read_at(lengths), "window": task.window}
    with tempfile.TemporaryDirectory() as folder:
        log = JsonLinesLog(pathlib.Path(folder) / "digits.jsonl")
        runs = {
            name: [
                train(
                    task,
                    name,
                    seed,
                    steps=steps,
                    log=log if (name, seed) == ("AutoDrop", SEED) else None,
                    **settings,
                )
                for seed in range(SEED, SEED + task.seeds)
                for steps in (lengths if name in SET_FOR_A_LENGTH else lengths[-1:])
            ]
            for name in SCHEDULES
        }
        reader = LogReader(log.path).read_all()
    in_both(lengths_picture(task, runs), to / "lengths.png")
    title = f"AutoDrop on {task.name}, seed {SEED}, window {task.window}: {task.description}"
    figure = plot_run(reader.readings, reader.metrics, threshold=0.1, title=title)
    in_both(figure, to / "digits.png")
    (to / "watch.svg").write_text(film(reader), encoding="utf-8")


def in_both(figure: Figure, path: pathlib.Path) -> None:
    """Save a picture for light pages, and one for dark ones next to it."""
    save(figure, path)
    darken(figure)
    save(figure, path.with_stem(f"{path.stem}-dark"))


def save(figure: Figure, path: pathlib.Path) -> None:
    """Save a picture in 128 colours, which is a third of the size and looks the same."""
    whole = io.BytesIO()
    figure.savefig(whole, dpi=150, format="png")
    with Image.open(whole) as image:
        image.convert("RGB").quantize(128).save(path, optimize=True)


# ---- dark pages -------------------------------------------------------------------------------


def darken(figure: Figure) -> None:
    """Turn the lightness of every colour over: white becomes black, and blue a lighter blue."""
    for artist in figure.findobj():
        if isinstance(artist, Line2D):
            # Read before the line's own colour changes, which markers may follow.
            face, edge = artist.get_markerfacecolor(), artist.get_markeredgecolor()
            artist.set_markerfacecolor(turned(face))
            artist.set_markeredgecolor(turned(edge))
        if isinstance(artist, (Line2D, Text)):
            artist.set_color(turned(artist.get_color()))
        if isinstance(artist, Patch):
            artist.set_facecolor(turned(artist.get_facecolor()))
            artist.set_edgecolor(turned(artist.get_edgecolor()))
        if isinstance(artist, Collection):
            artist.set_facecolor([turned(c) for c in artist.get_facecolor()])
            artist.set_edgecolor([turned(c) for c in artist.get_edgecolor()])


def turned(color: Any) -> tuple[float, ...]:
    """Return the colour with its lightness turned over, from 0.95 for black to 0.08 for white."""
    red, green, blue, alpha = colors.to_rgba(color)
    hue, lightness, saturation = colorsys.rgb_to_hls(red, green, blue)
    return (*colorsys.hls_to_rgb(hue, 0.95 - 0.87 * lightness, saturation), alpha)


# ---- the film ---------------------------------------------------------------------------------


def film(run: LogReader) -> str:
    """Return ``autodrop watch`` at equal distances of the run, as an SVG that shows them in turn.

    The last frame is below the others and does not move, so that a program that draws no animation
    shows the end of the run.
    """
    last = run.readings[-1]["step"]
    frames = [frame(run, last * i / FRAMES, f"f{i}") for i in range(FRAMES, 0, -1)]
    total = (FRAMES - 1) * SECONDS + REST
    shown = 100 * SECONDS / total
    style = (
        f".frame {{ opacity: 0; animation: show {total:g}s infinite; }}\n"
        f"@keyframes show {{ 0%, {shown:.3f}% {{ opacity: 1; }} "
        f"{shown + 0.001:.3f}%, 100% {{ opacity: 0; }} }}\n"
        "@media (prefers-reduced-motion: reduce) { .frame { animation: none; } }\n"
    )
    (size,) = {re.search(r'viewBox="([^"]*)"', each)[1] for each in frames}  # type: ignore[index]
    moving = "".join(
        f'<g class="frame" style="animation-delay: {SECONDS * i:g}s">{each}</g>\n'
        for i, each in enumerate(reversed(frames[1:]))
    )
    return (
        f'<svg viewBox="{size}" xmlns="http://www.w3.org/2000/svg">\n<style>{style}</style>\n'
        f"{frames[0]}\n{moving}</svg>\n"
    )


def frame(run: LogReader, end: float, name: str) -> str:
    """Return the view of the run up to a step."""
    part = LogReader("digits.jsonl")
    part.settings = run.settings
    part.readings = [r for r in run.readings if r["step"] <= end]
    part.metrics = [m for m in run.metrics if m["step"] <= end]
    console = Console(record=True, width=WIDTH, file=io.StringIO(), highlight=False)
    console.print(render(part, width=WIDTH))
    svg = console.export_svg(title="autodrop watch digits.jsonl", unique_id=name)
    # An image on a page loads no fonts from elsewhere.
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    return svg.replace("Fira Code, monospace", "DejaVu Sans Mono, Menlo, Consolas, monospace")


if __name__ == "__main__":
    main()
