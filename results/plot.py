"""Draw mean Spearman against size: the students of results.json files, assistants as lines.

python results/plot.py results/curve.svg results/real/one-pass-*.json ...

Files of one size and as many steps are seeds of one student: their mean, with the deviation as a
bar. Needs matplotlib, which nothing else here does.
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
    students, lines = {}, []
    for file in files:
        with open(file, encoding="utf-8") as f:
            results = json.load(f)
        rows = results["rows"]
        student = rows[[k for k in rows if k.startswith("student, stage")][-1]]
        steps = sum(stage["steps"] for stage in results["stages"])
        students.setdefault((student["sizes"]["total"], steps), []).append(means(student))
        lines.append(means(rows["assistant, given" if "assistant, given" in rows else "assistant"]))
    rcParams.update({"svg.hashsalt": "msd", "svg.fonttype": "none"})  # the same bytes each time
    figure = Figure((6, 3.5), layout="constrained")
    ax = figure.subplots()
    millions = [size / 1e6 for size, _ in sorted(students)]
    seeds = [np.array(students[key]) for key in sorted(students)]  # (n, 2) each
    for i, name in enumerate(("monolingual", "cross-lingual")):
        color = f"C{i}"
        mean = [x[:, i].mean() for x in seeds]
        bars = [x[:, i].std(ddof=1) if len(x) > 1 else 0 for x in seeds]
        ax.errorbar(millions, mean, bars, fmt="o", color=color, capsize=3, label=f"student, {name}")
        for level in {round(x[i], 1) for x in lines}:
            ax.axhline(level, color=color, linestyle=":", label=f"assistant, {name}")
    ax.set(xlabel="parameters, millions", ylabel="mean Spearman x 100", xscale="log")
    ax.set_xticks([5, 10, 20, 50], ["5", "10", "20", "50"])
    ax.minorticks_off()
    ax.legend(fontsize="small")
    figure.savefig(out, metadata={"Date": None} if out.endswith(".svg") else None)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    draw(sys.argv[1], sys.argv[2:])
