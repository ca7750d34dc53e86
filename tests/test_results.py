"""results/: the figures of the tables, the pictures."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "results"))
import check  # noqa: E402 - found through the line above


@pytest.mark.parametrize("page", check.PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_check_page_of_the_results(page):
    text = page.read_text(encoding="utf-8")
    checked, _, wrong = check.check_page(text, strict=page.parent == check.HERE)
    assert not wrong, "\n".join(wrong)
    assert checked


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


def test_every_file_is_shown():
    shown = set()
    for page in check.PAGES:
        for _, _, header, rows in check.tables(page.read_text(encoding="utf-8")):
            if header[-1] == "file":
                specs = [row[-1] for row in rows if row[-1] != "-"]
                shown |= {row.name for spec in specs for row in check.seeds(spec)}
    files = {f.stem for f in (ROOT / "results/real").glob("*.json")} - {"peers"}
    assert files == shown
