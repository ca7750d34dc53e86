"""Draw mean Spearman against size: the student of each results.json, and the assistants as lines.

python results/plot.py results/curve.svg results/real/size-*.json results/real/all.json

Needs matplotlib, which nothing else here does.
"""

import json
import sys

import numpy as np

try:
    from matplotlib import rcParams
    from matplotlib.figure import Figure
except ImportError:
    sys.exit("error: this needs matplotlib: pip install matplotlib")


def means(row):
    """(monolingual, cross-lingual) means of a row's sets, named A-B."""
    pairs = {name: name.split("-") for name in row["spearman"]}
    mono = [v for name, v in row["spearman"].items() if len(set(pairs[name])) == 1]
    cross = [v for name, v in row["spearman"].items() if len(set(pairs[name])) == 2]
    return np.mean(mono), np.mean(cross)


def draw(out, files):
    points, lines = [], []
    for file in files:
        with open(file, encoding="utf-8") as f:
            rows = json.load(f)["rows"]
        student = rows[[k for k in rows if k.startswith("student, stage")][-1]]
        share = student["sizes"]["total"] / rows["assistant"]["sizes"]["total"]
        points.append((100 * share, *means(student)))
        lines.append(means(rows["assistant"]))
    rcParams.update({"svg.hashsalt": "msd", "svg.fonttype": "none"})  # the same bytes each time
    figure = Figure((6, 3.5), layout="constrained")
    ax, points = figure.subplots(), np.array(sorted(points))
    for i, name in enumerate(("monolingual", "cross-lingual")):
        color = f"C{i}"
        ax.plot(points[:, 0], points[:, i + 1], "o", color=color, label=f"student, {name}")
        level = np.mean([x[i] for x in lines])
        ax.axhline(level, color=color, linestyle=":", label=f"assistant, {name}")
    ax.set(xlabel="parameters, % of the assistant's", ylabel="mean Spearman x 100", xlim=(0, 105))
    ax.legend(fontsize="small")
    figure.savefig(out, metadata={"Date": None} if out.endswith(".svg") else None)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    draw(sys.argv[1], sys.argv[2:])
