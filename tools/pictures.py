"""The pictures of the documents, made of the demo's runs in a minute.

    python tools/pictures.py [--to docs/images]

``lengths.png`` is the demo's picture, ``digits.png`` the plot of its first AutoDrop run, each with
a ``-dark`` one for dark pages.
"""

from __future__ import annotations

import argparse
import colorsys
import io
import pathlib
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

from autodrop_ext import JsonLinesLog, read_log
from autodrop_ext.plotting.run import plot_run

# Run as a file, the demo is not on the path.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "examples"))

from demo.digits import Digits
from demo.run import lengths_picture, read_at
from demo.training import SCHEDULES, SET_FOR_A_LENGTH, train

SEED = 0


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
        readings, metrics, _ = read_log(log.path)
    in_both(lengths_picture(task, runs), to / "lengths.png")
    title = f"AutoDrop on {task.name}, seed {SEED}, window {task.window}: {task.description}"
    figure = plot_run(readings, metrics, title=title)
    in_both(figure, to / "digits.png")


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


if __name__ == "__main__":
    main()
