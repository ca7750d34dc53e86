"""Compute every figure of the results' tables again, from the files of the runs.

    python results/check.py

In results/*.md a row's last column, `file`, says which runs of real/ it shows: `student-{0,1,2}`
are three seeds, `all: assistant` is the row "assistant" of all.json, without it the run's last;
`b of a` takes the last model of a.json for A. Several are joined by " + ". The README's table says
the same in a comment above it, row by row, "-" for none. A table without that column says "no file"
in the paragraph above it.
"""

import functools
import json
import re
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
PAGES = [*sorted(HERE.glob("*.md")), HERE.parent / "README.md"]
NUMBER = re.compile(r"[+-]?\d[\d,]*(?:\.\d+)?")
SETTINGS = ("layers", "seconds", "chosen on")  # columns that no file is asked for
COMMENT = "<!-- files: "


@functools.cache
def read(name):
    return json.loads((HERE / f"real/{name}.json").read_text(encoding="utf-8"))


class Row:
    """One row of one run's table: what the columns are computed from."""

    def __init__(self, name, key=None, base=None):
        self.name, self.run, self.base = name, read(name), base
        self.key = key or list(self.run["rows"])[-1]
        self.row = self.run["rows"][self.key]

    def total(self):
        return self.row["sizes"]["total"]

    def assistant(self, cut=False):
        """The run's assistant, with its whole vocabulary or as the run cut it; or that of base."""
        if self.base and not cut:
            return Row(self.base)
        whole = "assistant, given"
        return Row(self.name, "assistant" if cut or whole not in self.run["rows"] else whole)

    def mean(self, kind):
        """Mean Spearman of the sets named A-B: mono A = B, cross A != B."""
        sets = self.row["spearman"].items()
        languages = {"mono": 1, "cross": 2}[kind]
        return float(np.mean([v for name, v in sets if len(set(name.split("-"))) == languages]))

    def spearman(self, name):
        return self.row["spearman"][name]

    def accuracy(self, side):
        return float(np.mean([both[side] for both in self.row["accuracy"].values()]))

    def share(self):
        return 100 * self.total() / self.assistant().total()

    def percent(self, kind, cut=False):
        return 100 * self.mean(kind) / self.assistant(cut).mean(kind)

    def difference(self, kind):
        return self.mean(kind) - self.assistant(cut=True).mean(kind)

    def stages(self):
        """[(number, steps)] that the run made up to this row; none of what it was given."""
        made = [(int(s["stage"][-1]), s["steps"]) for s in self.run["stages"]]
        if self.key.startswith("student, stage"):
            return [(n, steps) for n, steps in made if n <= int(self.key[-1])]
        return made if self.key == "assistant" and made[-1][0] == 1 else []

    def passes(self):
        return sum(self.run["arguments"]["epochs"][n - 1] for n, _ in self.stages())

    def pairs(self):
        """(least, most) pairs seen: a stage's last batch may be a part of one."""
        batches = [(steps, self.run["arguments"]["batch"][n - 1]) for n, steps in self.stages()]
        most = sum(steps * size for steps, size in batches)
        return max(most - sum(size - 1 for _, size in batches), 0), most

    def bottleneck(self):
        return self.run["arguments"]["bottleneck"]

    def shipped(self):
        """Megabytes of weights: an assistant's in float32, a student's in int8."""
        return self.int8() if "student" in self.key else 4 * self.total() / 1e6

    def int8(self, hidden=384, positions=512):
        """Megabytes of int8 weights, by count: each row and each vector keeps float32 numbers.

        A layer has 12 hidden**2 numbers in matrices of 9 hidden rows, and 13 hidden in vectors.
        """
        sizes = self.row["sizes"]
        layers = sizes["layers"] // (12 * hidden**2 + 13 * hidden)
        others = (positions + 2) * hidden + 2 * hidden  # positions, token types, LayerNorm
        pieces = (sizes["embedding"] - others) // self.bottleneck() - hidden
        rows = pieces + hidden + positions + 2 + layers * 9 * hidden
        vectors = (2 + 13 * layers) * hidden
        return (self.total() + 4 * rows + 3 * vectors) / 1e6


def seeds(text):
    """[Row] of a cell such as `a-{0,1}: student, stage 3 + b`."""
    found = []
    for part in text.replace("`", "").split(" + "):
        name, _, base = part.strip().partition(" of ")
        name, _, key = name.partition(": ")
        head, _, rest = name.partition("{")
        middle, _, tail = rest.partition("}")
        found += [Row(head + x + tail, key or None, base) for x in middle.split(",")]
    return found


def resamples(rows, kind):
    """(lowest, highest) end of 95 % of the paired resamples, over the seeds."""
    ends = [r.run["bootstrap"][kind] for r in rows]
    return min(e[1] for e in ends), max(e[2] for e in ends)


SETS = ("en-en", "ar-ar", "en-ar")
COLUMNS = {  # header: the figure of one run
    "parameters": Row.total,
    "share": Row.share,
    "smaller by": lambda r: 100 - r.share(),
    "B": Row.bottleneck,
    "passes": Row.passes,
    "int8, MB": Row.int8,
    "MB": Row.shipped,
    "training, s": lambda r: sum(stage["seconds"] for stage in r.run["stages"]),
    "threads": lambda r: r.run["threads"],
    "en→xx": lambda r: r.accuracy(0),
    "xx→en": lambda r: r.accuracy(1),
}
COLUMNS |= {name: lambda r, name=name: r.spearman(name) for name in SETS}
for KIND in ("mono", "cross"):
    COLUMNS[KIND] = lambda r, kind=KIND: r.mean(kind)
    COLUMNS[f"{KIND}, difference"] = lambda r, kind=KIND: r.difference(kind)
    COLUMNS[f"{KIND}, % of A"] = lambda r, kind=KIND: r.percent(kind)
    COLUMNS[f"{KIND}, % of cut A"] = lambda r, kind=KIND: r.percent(kind, cut=True)


def shown_as(cell, values):
    """The values as the cell shows its figures: a list, mean ± deviation, or mean."""
    first = NUMBER.search(cell)[0]
    decimals = len(first.partition(".")[2])
    spec = ("+" if first[0] in "+-" and "," not in first else "") + f",.{decimals}f"
    if "±" in cell:
        deviation = np.std(values, ddof=1) if len(values) > 1 else np.nan
        return f"{np.mean(values):{spec}} ± {deviation:.{decimals}f}"
    if len(NUMBER.findall(cell)) > 1:
        return " ".join(f"{v:{spec}}" for v in values)
    return f"{np.mean(values):{spec}}"


def expected(header, cell, rows, first):
    """What the cell should say, by the files; rows: its runs, first: the table's first ones."""
    kind, _, how = header.partition(", ")
    if header in ("seeds", "number"):
        return str(len(rows))
    if header == "git":
        return ", ".join(dict.fromkeys(r.run["git"].removesuffix("-dirty") for r in rows))
    if header == "pairs":
        low, high = rows[0].pairs()
        seen = int(cell.replace(",", ""))
        return cell if low <= seen <= high else f"{low:,} to {high:,}"
    if how == "resamples":
        return "{:+.1f} to {:+.1f}".format(*resamples(rows, kind))
    if how == "less the first":
        values = [a.mean(kind) - b.mean(kind) for a, b in zip(rows, first)]
        return shown_as(cell, values)
    return shown_as(cell, [COLUMNS[header](r) for r in rows])


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def tables(text):
    """(line number, paragraph above, header, rows) of each table: lines that begin with |."""
    lines, at = text.splitlines(), 0
    while at < len(lines):
        if not lines[at].startswith("|"):
            at += 1
            continue
        end = next((i for i in range(at, len(lines)) if not lines[i].startswith("|")), len(lines))
        above = " ".join("\n".join(lines[:at]).rstrip().split("\n\n")[-1].split())
        yield at + 1, above, cells(lines[at]), [cells(line) for line in lines[at + 2 : end]]
        at = end


def figures(cell):
    return len(NUMBER.findall(cell))


def plain(cell):
    return re.sub(r"[*%()]|(?<=\d)[,;](?= )", "", cell).strip()


def check_row(name, file, columns, runs, first):
    """What is wrong in a row, as texts; columns: {header: cell} to check."""
    for head, cell in columns.items():
        try:
            right = expected(head, plain(cell), runs, first)
        except KeyError as e:
            yield f"{name}: column {head!r} is in no file ({e})"
            continue
        if right != plain(cell):
            yield f"{name}: {head} is {cell}, by {file} it is {right}"


def check_table(header, rows, files):
    """(figures checked, figures without a file, mistakes as texts) of a table with files."""
    checked, without, wrong, first = 0, 0, [], None
    for row, file in zip(rows, files):
        columns = dict(zip(header[1:], row[1:]))
        columns.pop("file", None)
        columns = {h: c for h, c in columns.items() if not h.startswith(SETTINGS) and figures(c)}
        count = sum(figures(cell) for cell in columns.values())
        if file == "-":
            without += count
            continue
        try:
            runs = seeds(file)
        except (OSError, KeyError) as e:
            wrong.append(f"{row[0]}: {file}: there is no such run, or row of it ({e})")
            continue
        checked, first = checked + count, first or runs
        wrong += check_row(row[0], file, columns, runs, first)
    return checked, without, wrong


def check_page(text, strict=True):
    """(figures checked, figures without a file, mistakes) of a page's tables.

    strict: each table names its files or says "no file".
    """
    checked, without, wrong = 0, 0, []
    for at, above, header, rows in tables(text):
        if header[-1] == "file":
            files = [row[-1] for row in rows]
        elif COMMENT in above:
            files = above.split(COMMENT)[1].split(" -->")[0].split("; ")
        else:
            without += sum(figures(cell) for row in rows for cell in row[1:])
            if strict and "no file" not in above.lower():
                wrong.append(f"line {at}: the table names no files and does not say so")
            continue
        if len(files) != len(rows):
            wrong.append(f"line {at}: {len(files)} files for {len(rows)} rows")
            continue
        some = check_table(header, rows, files)
        checked, without = checked + some[0], without + some[1]
        wrong += [f"table of line {at}, {text}" for text in some[2]]
    return checked, without, wrong


def main():
    wrong = []
    for page in PAGES:
        checked, without, mistakes = check_page(page.read_text("utf-8"), page.parent == HERE)
        name = page.relative_to(HERE.parent)
        print(f"{name}: {checked} figures checked, {without} without a file")
        wrong += [f"{name}, {text}" for text in mistakes]
    sys.exit("\n".join(wrong) or None)


if __name__ == "__main__":
    main()
