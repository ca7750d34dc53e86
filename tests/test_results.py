"""results/: the figures of the tables, the pictures."""

import ast
import importlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "results"))
import check  # noqa: E402 - found through the line above
import pictures  # noqa: E402 - as above
import plot  # noqa: E402 - as above


@pytest.mark.parametrize("page", check.PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_check_page_of_the_results(page):
    text = page.read_text(encoding="utf-8")
    checked, _, wrong = check.check_page(text, strict=page.parent == check.HERE)
    assert not wrong, "\n".join(wrong)
    assert checked or page.name in ("paper.md", "peers.md")  # no table; the test below


def changed_digits(text):
    """The text with another digit, at each digit of a figure in a checked column; (line, text)."""
    for at, _, header, rows in check.tables(text):
        if header[-1] != "file":
            continue
        for n, row in enumerate(rows):
            line = at + 1 + n  # counted from 0: the header is line at - 1
            for head, cell in zip(header[1:-1], row[1:-1]):
                if head.startswith(check.SETTINGS) or row[-1] == "-" or head == "pairs":
                    continue
                for digit in re.finditer(r"\d", cell):
                    other = str((int(digit[0]) + 1) % 10)
                    new = cell[: digit.start()] + other + cell[digit.end() :]
                    cells = [new if h == head else c for h, c in zip(header, row)]
                    yield line, "| " + " | ".join(cells) + " |"


def test_check_page_finds_a_changed_digit():
    text = (ROOT / "results/README.md").read_text(encoding="utf-8")
    lines, tried = text.splitlines(), 0
    for line, other in changed_digits(text):
        wrong = check.check_page("\n".join([*lines[:line], other, *lines[line + 1 :]]))[2]
        assert len(wrong) == 1, f"line {line + 1}, {other}: {wrong}"
        tried += 1
    assert tried > 100


def test_check_page_finds_changed_pairs():
    row = "| | pairs | file |\n|---|---|---|\n| a | {} | `one-pass-1` |\n"
    assert not check.check_page(row.format("382,380"))[2]
    assert check.check_page(row.format("382,301"))[2]
    assert check.check_page(row.format("382,480"))[2]


def test_check_page_wants_files_or_no_file():
    table = "| | mono |\n|---|---|\n| a | 1.0 |\n"
    assert check.check_page("of no run\n\n" + table)[2]
    assert check.check_page("timings (no file)\n\n" + table) == (0, 1, [])
    assert check.check_page("<!-- files: all; all -->\n" + table)[2]
    wrong = check.check_page("<!-- files: all -->\n" + table)[2]
    assert "mono is 1.0" in wrong[0] and "63.8" in wrong[0]


def test_check_page_names_an_unknown_column():
    table = "| | speed | file |\n|---|---|---|\n| a | 1.0 | `all` |\n"
    assert "'speed'" in check.check_page(table)[2][0]


def test_check_page_names_a_missing_file_or_row():
    table = "| | mono | file |\n|---|---|---|\n| a | 1.0 | `{}` |\n"
    assert "gone.json" in check.check_page(table.format("gone"))[2][0]
    assert "student, stage 9" in check.check_page(table.format("all: student, stage 9"))[2][0]


def test_check_page_takes_another_base():
    table = "| | mono, % of A | file |\n|---|---|---|\n| a | {} % | `all of {}` |\n"
    of = [check.Row("all").mean("mono") / check.Row(b).mean("mono") for b in ("assistant", "all")]
    assert f"{100 * of[0]:.1f}" != f"{100 * of[1]:.1f}" == "100.0"
    assert not check.check_page(table.format(f"{100 * of[0]:.1f}", "assistant"))[2]
    assert check.check_page(table.format(f"{100 * of[0]:.1f}", "all"))[2]


def test_every_file_is_shown():
    shown = set()
    for page in check.PAGES:
        for _, _, header, rows in check.tables(page.read_text(encoding="utf-8")):
            if header[-1] == "file":
                specs = [row[-1] for row in rows if row[-1] != "-"]
                shown |= {row.name for spec in specs for row in check.seeds(spec)}
    files = {f.stem for f in (ROOT / "results/real").glob("*.json")} - {"peers", "search"}
    assert files == shown


def test_pages_name_tests_that_are_there():
    """README's audit table has its own test; the other pages name tests, too."""
    tests = [ROOT / "test_msd.py", *(ROOT / "tests").glob("test_*.py")]
    there = set(re.findall(r"^def (test_\w+)", "".join(f.read_text("utf-8") for f in tests), re.M))
    named = set()
    for page in [ROOT / "README.md", *(ROOT / "results").glob("*.md")]:
        named |= set(re.findall(r"`(test_\w+)`", page.read_text("utf-8")))
    assert len(named) > 30 and named <= there, named - there


def test_peers_are_those_of_their_files():
    page = (ROOT / "results/peers.md").read_text(encoding="utf-8")
    keys = ("megabytes", "mono", "cross", "en-xx", "xx-en")
    for x in json.loads((ROOT / "results/real/peers.json").read_text(encoding="utf-8")):
        cells = [f"{x['parameters']:,}", *(f"{x[k]:.1f}" for k in keys)]
        cells.append(f"{x['sentences_per_second']:,.0f}")
        assert f"| {x['name']} | {' | '.join(cells)} |" in page
    for x in json.loads((ROOT / "results/real/search.json").read_text(encoding="utf-8")):
        ways = ("en-xx", "xx-en", "en-xx, foreign distractors", "en-xx, questions")
        kinds = ("recall at 1", "recall at 10", "MRR")
        cells = [" / ".join(f"{x[way][kind]:.1f}" for kind in kinds) for way in ways]
        hubs = x["hubs"]["N_1"]
        cells.append(f"{hubs['largest']} / {hubs['99.9th percentile']:.0f}")
        assert f"| {x['name']} | {' | '.join(cells)} |" in page


@pytest.mark.parametrize("name", ["method", "quality"])
def test_pictures_are_those_of_the_files(name):
    made = str(getattr(pictures, name)())
    file = ROOT / f"results/{name}.svg"
    assert made == file.read_text(encoding="utf-8"), "run: python results/pictures.py"


def labels(picture):
    """(x, text, anchor, size) of each text of a picture, which must be sound XML."""
    for e in ElementTree.fromstring(str(picture)).iter("{http://www.w3.org/2000/svg}text"):
        yield float(e.get("x")), e.text, e.get("text-anchor"), float(e.get("font-size"))


@pytest.mark.parametrize("name", ["method", "quality"])
def test_picture_text_is_large_and_inside(name):
    picture = getattr(pictures, name)()
    for x, text, anchor, size in labels(picture):
        width = 0.55 * size * len(text)
        left = x - width * {"start": 0, "middle": 0.5, "end": 1}[anchor]
        assert left > 0 and left + width < picture.size[0], text
        assert size >= 14 * picture.size[0] / 800, text


def write_log(folder, *entries):
    lines = [json.dumps(e) + "\n" for e in entries]
    (folder / "log.jsonl").write_text("".join([*lines, '{"stage": "st']), encoding="utf-8")


def test_plot_draws_stages_terms_and_dev(tmp_path):
    def step(stage, n, **terms):
        return {"stage": stage, "step": n, **terms, "lr": 1e-3, "norm": 1.0, "tokens_per_s": 9}

    write_log(
        tmp_path,
        {"data": []},
        *[step("stage 3", n, loss=0.3 / (n + 1), en=0.1, tr=0.2) for n in range(3)],
        {"stage": "stage 3", "step": 2, "dev": 0.25},
        {"stage": "stage 3", "done": True, "steps": 3, "seconds": 1.0, "best_dev": 0.25},
        *[step("stage 4", n, loss=math.nan, en=0.1, tr=0.2, mcl=0.3) for n in range(2)],
    )
    found = {name: plot.curves(entries) for name, entries in plot.read_log(tmp_path).items()}
    assert found["stage 3"]["loss"] == [(1, 0.3), (2, 0.15), (3, pytest.approx(0.1))]
    assert found["stage 3"]["dev"] == [(3, 0.25)]
    assert found["stage 4"].keys() == {"en", "tr", "mcl"}  # a loss that is no number is left out
    command = [sys.executable, ROOT / "results/plot.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "log.svg")
    texts = [text for _, text, *_ in labels((tmp_path / "log.svg").read_text(encoding="utf-8"))]
    assert {"stage 3", "stage 4", "loss", "en", "tr", "mcl", "dev"} <= set(texts)


def test_plot_says_what_is_missing(tmp_path):
    with pytest.raises(SystemExit, match="log.jsonl is not there"):
        plot.draw(tmp_path)
    write_log(tmp_path, {"data": []})
    with pytest.raises(SystemExit, match="no step yet"):
        plot.draw(tmp_path)


def test_plot_draws_a_finished_run(finished, world):
    """The names in the log are those that train.py writes."""
    picture = plot.draw(world / "whole")
    texts = [text for _, text, *_ in labels(picture)]
    assert [f"stage {n}" for n in (1, 2, 3, 4)] == [t for t in texts if t.startswith("stage")]
    assert texts.count("dev") == texts.count("loss") == 4 and texts.count("mcl") == 1
    unknown = {e for log in plot.read_log(world / "whole").values() for e in plot.curves(log)}
    assert unknown <= {*plot.COLOURS, "dev"}


def script(name, *args):
    command = [sys.executable, ROOT / f"results/{name}.py", *args]
    done = subprocess.run([str(a) for a in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_device_measures(world):
    """It runs: what it measures is of no use here."""
    pairs, small = world / "d/en-de.tsv", ["--batch", 4, "--seconds", 0, "--lines", 32]
    out = script("device", world / "teacher", pairs, *small)
    assert "encoding, here, float32:" in out and "targets:" in out
    assert "training, 4 pairs, each side in a call of its own:" in out


def test_memory_script_measures(world):
    row = script("memory", world / "teacher", "--rounds", 1).splitlines()[-1]
    cells = [c.strip() for c in row.strip("|").split("|")]
    size = sum(f.stat().st_size for f in (world / "teacher").glob("*.safetensors"))
    assert cells[:2] == ["teacher", f"{size / 1e6:.1f}"] and len(cells) == 6


def names_of_modules(tree):
    """{name: module of this project} that a script imports."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.asname or a.name: a.name for a in node.names if "." not in a.name}
        elif isinstance(node, ast.ImportFrom) and node.module in ("tools", "checks", "demo"):
            found |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    ours = {k: v for k, v in found.items() if (ROOT / f"{v.replace('.', '/')}.py").exists()}
    return {name: importlib.import_module(module) for name, module in ours.items()}


def test_scripts_use_what_is_there():
    """A function that moves to another module leaves behind scripts that no test runs."""
    used = 0
    for folder in (".", "audit", "checks", "demo", "results", "tools"):
        for file in sorted((ROOT / folder).glob("*.py")):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            modules = names_of_modules(tree)
            for node in ast.walk(tree):
                if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) in modules:
                    used += 1
                    module = modules[node.value.id]
                    assert hasattr(module, node.attr), f"{file}:{node.lineno}: {node.attr}"
    assert used > 300
