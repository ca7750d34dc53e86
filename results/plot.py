"""Draw a run's losses by stage and its dev readings, from its log.jsonl, into its log.svg.

    python results/plot.py RUN

RUN: the folder of a run, finished or not. No package is needed.
"""

import contextlib
import json
import math
import sys
from pathlib import Path

from svg import Axes, Picture

COLOURS = {"loss": "ink", "en": "blue", "tr": "orange", "mcl": "purple"}
OTHERS = {"stage", "step", "lr", "norm", "tokens_per_s"}  # of an entry: not terms of the loss
WIDTH, HEIGHT = 400, 280  # of a panel


def read_log(folder):
    """{stage: [entry]}; a line that cannot be read, as a kill leaves it, is left out."""
    file = Path(folder) / "log.jsonl"
    if not file.is_file():
        sys.exit(f"error: {file} is not there; give the folder of a run, as runs/demo")
    stages = {}
    for line in file.read_text("utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict) and "step" in entry:
                stages.setdefault(entry["stage"], []).append(entry)
    if not stages:
        sys.exit(f"error: {file} has no step yet; wait for the first")
    return stages


def curves(entries):
    """{term, or "dev": [(step, value)]}, steps counted from 1; only what a logarithm takes."""
    found = {}
    for entry in entries:
        for name, value in entry.items():
            if name not in OTHERS and isinstance(value, float) and 0 < value < math.inf:
                found.setdefault(name, []).append((entry["step"] + 1, value))
    return found


def ticks(low, high):
    """{number: text}: 1, 2 and 5 times the powers of ten between, or the powers alone."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    some = [m * 10.0**n for n in powers for m in ((1, 2, 5) if high < 100 * low else (1,))]
    return {x: f"{x:g}" for x in some if low <= x <= high}


def panel(picture, left, top, stage, found):
    """One stage: its terms as lines, dev as dots, the best of them full."""
    values = [v for points in found.values() for _, v in points]
    last = max(step for points in found.values() for step, _ in points)
    low, high = 0.8 * min(values), 1.25 * max(values)
    area = (left + 62, top + 42, WIDTH - 84, HEIGHT - 100)
    axes = Axes(picture, area, (0, last), (low, high), logy=True)
    axes.frame({n: f"{n:,}" for n in (0, last // 2, last)}, ticks(low, high), "", stage)
    for name in sorted(found.keys() - {"dev"}, key=lambda n: n == "loss"):  # the sum on top
        axes.curve(found[name], COLOURS.get(name, "faint"))
    best = min((v for _, v in found.get("dev", [])), default=None)
    for step, value in found.get("dev", []):
        axes.dot(step, value, "green", full=value == best)
    x = left + 62
    for name in found:
        colour = "green" if name == "dev" else COLOURS.get(name, "faint")
        picture.text(x, top + HEIGHT - 16, name, 14, colour=colour, font_weight=600)
        x += 12 * len(name) + 10


def draw(folder):
    """The picture of a run: two stages beside each other."""
    stages = {name: curves(entries) for name, entries in read_log(folder).items()}
    columns = min(len(stages), 2)
    height = HEIGHT * math.ceil(len(stages) / columns) + 24
    picture = Picture(WIDTH * columns, height, f"{Path(folder).name}: losses and dev readings")
    for n, (stage, found) in enumerate(stages.items()):
        panel(picture, n % columns * WIDTH, n // columns * HEIGHT, stage, found)
    note = "en, tr, mcl: terms of the loss. Dots: dev, the best reading full."
    picture.text(12, height - 12, note, 13, colour="faint")
    return picture


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    out = Path(sys.argv[1]) / "log.svg"
    draw(sys.argv[1]).save(out)
    print(out)
