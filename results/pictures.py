"""Draw the pictures of the first pages: method.svg, and quality.svg from the files of real/.

    python results/pictures.py

No package is needed but numpy, for the means.
"""

import json
from pathlib import Path

from check import Row, seeds
from svg import Axes, Picture

HERE = Path(__file__).resolve().parent
STUDENTS = (  # of the published assistant, by size
    "two-passes-5",
    "under-10-million-no-contrast-{0,1,2}",
    "e5-20",
    "published-cut-192",
    "published-cut-256",
    "published-cut-{0,1,2}",
)
STAGES = (  # name, its targets for s and t, what it trains, for s and t
    ("1  assistant", ("T(s)", "T(s)"), ("A(s)", "A(t)")),
    ("2  bottleneck", ("A's words", "A's words"), ("S's words", "S's words")),
    ("3  distil", ("A(s)", "A(t)"), ("S(s)", "S(t)")),
    ("4  contrastive", ("T(s)", "T(s)"), ("S(s)", "S(t)")),
)
COLOURS = {"T": "orange", "A": "blue", "S": "green"}


def stack(p, middle, name, what, colour, layers, blocks):
    """A model as a tower: its embedding block at the bottom, its layers, its vector on top.

    blocks: (width, text), from the bottom; layers: texts.
    """
    y = 232
    for width, text in blocks:
        p.box(middle - width / 2, y, width, 34, colour, text, 15)
        y -= 40
    for text in layers:
        p.box(middle - 60, y + 6, 120, 26, colour, text, 15)
        y -= 30
    p.arrow((middle, y + 36), (middle, y + 14), "faint")
    p.text(middle, y + 6, "vector of H numbers", 14, "middle", "faint")
    p.text(middle, 26, name, 18, "middle", colour, font_weight=600)
    p.text(middle, 46, what, 15, "middle", "faint")


def method():
    """Teacher, assistant, student; below, whose vectors are the targets in each stage."""
    p = Picture(800, 570, "The method: three models and four stages")
    tower = ["layer 1", "layer 2", "…", "layer L"]
    stack(p, 130, "Teacher T", "English, not trained", "orange", tower, [(120, "words x H")])
    stack(p, 385, "Assistant A", "multilingual, large", "blue", tower, [(220, "words V x H")])
    blocks = [(110, "words V x B"), (160, "map B x H")]
    stack(p, 655, "Student S", "multilingual, small", "green", ["layers 1..K"] * 2, blocks)
    p.arrow((500, 249), (594, 249), "faint")
    p.text(547, 240, "narrower", 14, "middle", "faint")
    for i, text in enumerate(("the same", "weights,", "R times")):
        p.text(722, 134 + 18 * i, text, 14, colour="faint")
    for x, text in ((130, "s"), (385, "s or t"), (655, "s or t")):
        p.text(x, 286, text, 15, "middle", "faint", font_style="italic")
    p.line([(12, 302), (788, 302)], "rule", 1)
    for n, stage in enumerate(STAGES):
        panel(p, 12 + 197 * n, *stage)
    notes = (
        "Above the targets, which stay as they are; below what is trained to meet them.",
        "s an English sentence, t its translation; V pieces of the vocabulary, B the bottleneck.",
        "Stage 4 besides, for all i, j of a batch:  cos(S(sᵢ), S(tⱼ)) → cos(T(sᵢ), T(sⱼ))",
    )
    for i, note in enumerate(notes):
        p.text(16, 514 + 21 * i, note, 15, colour="ink" if i == 2 else "faint")
    return p


def panel(p, x, title, targets, trained):
    """One stage: for each side a target above and what must meet it below."""
    p.text(x + 4, 328, title, 17, font_weight=600)
    for i, side in enumerate("st"):
        left = x + 4 + 94 * i
        middle = left + 44
        p.box(left, 340, 88, 34, COLOURS[targets[i][0]], targets[i], 15, trained=False)
        p.arrow((middle, 428), (middle, 380), "faint")
        p.text(middle + 8, 410, "MSE", 14, colour="faint")
        p.box(left, 430, 88, 34, COLOURS[trained[i][0]], trained[i], 15)
        p.text(middle, 483, side, 15, "middle", "faint", font_style="italic")


def ours():
    """(megabytes, mono, cross, label) of each student, in int8, by count."""
    for spec in STUDENTS:
        rows = seeds(spec)
        mono, cross = (sum(r.mean(k) for r in rows) / len(rows) for k in ("mono", "cross"))
        yield rows[0].int8(), mono, cross, f"{rows[0].total() / 1e6:.0f} M"


def peers():
    """The same of what others made, where it was measured."""
    file = HERE / "real/peers.json"
    if not file.exists():
        return []
    found = json.loads(file.read_text(encoding="utf-8"))
    found = [x for x in found if not x["name"].startswith("student")]
    return [(x["megabytes"], x["mono"], x["cross"], x["name"]) for x in found]


def quality():
    """Mean Spearman against megabytes of weights on disk, across and within languages."""
    p = Picture(800, 690, "Quality against megabytes on disk")
    assistant, given = Row("published-assistant"), peers()
    whole = assistant.total() * 4 / 1e6, assistant.mean("mono"), assistant.mean("cross")
    for top, height, kind, name in ((52, 320, 2, "cross-lingual"), (438, 180, 1, "monolingual")):
        points = list(ours())
        values = [x[kind] for x in [*points, whole, *given]]
        low, high = 5 * (min(values) // 5), 5 * ((max(values) + 2) // 5 + 1)  # room for labels
        axes = Axes(p, (60, top, 710, height), (4, 640), (low, high), logx=True)
        ticks = {n: str(n) for n in (5, 10, 20, 50, 100, 200, 500)}
        title = f"{name}: mean Spearman x 100, STS benchmark test"
        unit = "megabytes of weights on disk" if kind == 1 else ""
        axes.frame(ticks, {n: f"{n:.0f}" for n in range(int(low), int(high) + 1, 5)}, unit, title)
        for x in given:
            axes.dot(x[0], x[kind], "orange", full=False)
        axes.dot(whole[0], whole[kind], "blue")
        axes.curve([(x[0], x[kind]) for x in points], "green")
        for x in points:
            axes.dot(x[0], x[kind], "green")
        axes.label(whole[0], whole[kind], "assistant, float32", "blue")
        for x in points:
            axes.label(x[0], x[kind], x[3], "green")
        for x in given:
            axes.label(x[0], x[kind], x[3], "orange")
    p.text(60, 680, "●", 16, colour="green")
    p.text(78, 680, "students here, int8, by parameters", 14)
    p.text(330, 680, "●", 16, colour="blue")
    p.text(348, 680, "their assistant", 14)
    if given:
        p.text(478, 680, "○", 16, colour="orange")
        p.text(496, 680, "other encoders, as installed", 14)
    return p


if __name__ == "__main__":
    method().save(HERE / "method.svg")
    quality().save(HERE / "quality.svg")
