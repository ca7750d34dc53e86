"""Why a line is no pair, what a file is that holds none, and the command that makes pairs of it.

The commands are of Python's own libraries or of programs that are everywhere; that for parquet
needs pandas. Line ends and tabs within a cell become spaces. data.py asks here; nothing here reads
more than it is given.
"""

import contextlib
import csv
import html
import json
import os
import re
import shlex
import zipfile
from collections import Counter
from pathlib import Path

from model import InputError

SAMPLE = 1000  # lines by which a file is judged
GZIP = b"\x1f\x8b"
ENGLISH = frozenset(  # words that its near languages do not have
    "the and you that with this they from would there what not your which about who where".split()
)
SCORE = re.compile(r"[\W\d_]*|[!-~]*(\d|://)[!-~]*")  # or an id, an address, nothing
WORD = re.compile(r"[\W\d_]*|[!-~]*")  # or a score, a code, a name; no sentence
# UTF-8 that was read as Latin-1 or Windows-1252: a first byte and those that must follow it.
LATER = r"[\x80-\xbf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc"
LATER += r"\u2013-\u203a\u20ac\u2122]"
TWICE = rf"(?:[\xc2-\xdb]|\xe0[\xa4-\xbf]|[\xe1-\xef]{LATER}|[\xf0-\xf4]{LATER}{{2}}){LATER}"
NOT_TEXT = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd]")
NOT_UTF8 = re.compile("[\ud800-\udfff]")
ALONE = re.compile("(?<![^\0-\x7f])[\ud800-\udfff](?![^\0-\x7f])")  # a byte amid ASCII
QUOTED = re.compile('"([^"]|"")*"')  # as a cell of CSV
ENTITY = re.compile("&(#[0-9]{2,6}|#x[0-9A-Fa-f]{2,5}|[A-Za-z]{2,8}[0-9]{0,2});")
IS_TWICE = re.compile(TWICE)


# ----------------------------------------------------------------------------------- what a line is
def fault_of(text, sides):
    """Why a line is no pair, or None."""
    if found := NOT_UTF8.search(text):
        return f"not UTF-8 (at character {found.start() + 1})"
    if found := NOT_TEXT.search(text):
        return f"a character that is no text (U+{ord(found[0]):04X})"
    if len(sides) != 2:
        return "no tab" if len(sides) == 1 else f"too many columns ({len(sides)})"
    return None if all(sides) else "an empty side"


def suspicions(text, a, b):
    """What is odd about a line that is a pair: names out of data.ODD."""
    if a == b:
        yield "same"
    if len(a) > 1 < len(b) and a[0] == a[-1] == b[0] == b[-1] == '"':
        yield "quoted"
    if "&" in text and ENTITY.search(text):
        yield "entities"
    if not text.isascii() and IS_TWICE.search(text):
        yield "twice"


def is_header(sides):
    """Are these the names of two columns, such as english and non_english, or source and target?"""
    a, b = (re.sub("[^a-z]", "", side.lower()) for side in sides)
    first = re.fullmatch(
        "eng?|engl?isc?h|(source|src|original|input)[a-z]*|(sentence|text)(en)?", a
    )
    return bool(first and b and " " not in sides[0] + sides[1])


def is_score(cell, pattern=SCORE):
    """Is this a score, an id, an address, or nothing? By WORD: or one word."""
    return bool(pattern.fullmatch(html.unescape(cell.strip())))


def in_quotes(cells):
    """Are quotes those of CSV, around whole cells? Some writers set them only where a cell needs
    them; in plain text few cells with a quote are in quotes as a whole."""
    held = [cell for cell in cells if '"' in cell]
    whole = sum(map(bool, map(QUOTED.fullmatch, held)))
    doubled = any('""' in cell[1:-1] for cell in held)
    return len(held) >= 10 and whole > 0.95 * len(held) and (doubled or len(held) > len(cells) / 4)


# ----------------------------------------------------------------------------------- what a file is
def python(imports, script):
    return f"python -X utf8 -c {shlex.quote(f'import {imports}, sys; {script}')}"


def printed(imports, cells, rows, first=""):
    """The command that prints two cells of each row r of its input, where both are text."""
    text = "if all(isinstance(s, str) and s.strip() for s in c)"
    cells = (
        f'print(*(" ".join(s.split()) for s in c), sep="\\t") for r in {rows} for c in [({cells})]'
    )
    return python(imports, f"{first}[{cells} {text}]")


INPUT = 'open(0, encoding="utf-8-sig")'
LEAVES = (  # f: all that a value holds, in one list
    "f = lambda v: [x for p in (v.values() if isinstance(v, dict) else v) for x in f(p)] "
    "if isinstance(v, (dict, list)) else [v]; "
)
READ = "pandas.read_parquet(io.BytesIO(sys.stdin.buffer.read())).reset_index()"
ROWS = f'{READ}.to_json(orient="values")'
LENGTH = "lambda i: -sum(len(r[i]) for r in t if isinstance(r[i], str))"
PAPERS = "README|LICENSE|_about|__MACOSX"  # what lies beside the text in a zip
ZIP = "z = zipfile.ZipFile(io.BytesIO(sys.stdin.buffer.read())); "
ZIP += "[sys.stdout.buffer.write(z.read(n)) for n in z.namelist() "
ZIP += f'if not re.match("{PAPERS}", n)]'
CODES = '("bpt", "ept", "ph", "it", "ut")'  # in a segment: what they hold is markup
SEGMENT = f'(("" if e.tag.endswith({CODES}) else e.text or "") + (e.tail or "") for e in s)'
LANGUAGE = '(v.get("{http://www.w3.org/XML/1998/namespace}lang") or v.get("lang") or "")'
TMX = (  # English first, then the first of the other languages
    "TMX",
    printed(
        "xml.etree.ElementTree as E",
        "r.get(False), r.get(True)",
        f'({{{LANGUAGE}[:2].lower() != "en": "".join([s.text or "", *{SEGMENT}]) '
        'for v in [*t][::-1] if v.tag.endswith("tuv") for s in v if s.tag.endswith("seg")} '
        'for _, t in E.iterparse(sys.stdin.buffer) if t.tag.endswith("tu"))',
    ),
)
FORMATS = {  # by the first bytes
    rb"PAR1": (
        "parquet",  # the two columns of most text, however deep
        printed(
            "io, json, pandas",
            "r[a], r[b]",
            "t",
            f"{LEAVES}t = [*map(f, json.loads({ROWS}))]; "
            f"a, b = sorted(sorted(range(len(t[0])), key={LENGTH})[:2]); ",
        ),
    ),
    rb"PK\x03\x04": (
        "zip",  # of one file
        python("io, re, zipfile", ZIP),
    ),
    rb"BZh": ("bzip2", "bzcat"),
    rb"\xfd7zXZ": ("xz", "xzcat"),
    rb"\x28\xb5\x2f\xfd": ("zstd", "zstdcat"),
    rb"\xff\xfe\0\0|\0\0\xfe\xff": ("UTF-32", "iconv -f UTF-32 -t UTF-8"),
    rb"(?s)(\xff\xfe|\xfe\xff).{,3000}?<\0?t\0?m\0?x": TMX,  # XML says its own encoding
    rb"\xff\xfe|\xfe\xff": ("UTF-16", "iconv -f UTF-16 -t UTF-8"),
    rb"(\0[^\0]){4}": ("UTF-16", "iconv -f UTF-16BE -t UTF-8"),  # no mark, English letters
    rb"([^\0]\0){4}": ("UTF-16", "iconv -f UTF-16LE -t UTF-8"),
    rb"(?s)(\xef\xbb\xbf)?\s*<.{,3000}?<tmx": TMX,
}
CHAR = 'c.encode("latin-1" if c < "\\u0100" else "cp1252")'
MENDED = f'm = lambda s: re.sub(r"{TWICE}", lambda m: b"".join({CHAR} for c in m[0])'
MENDED += '.decode(errors="replace"), s); '
CELL = '" ".join(m(m(html.unescape(html.unescape(s)))).split())'  # some are damaged twice over
MEND = python(  # of entities and of text decoded twice, cell by cell
    "html, re",
    f'{MENDED}[print(*({CELL} for s in r.split("\\t")), sep="\\t") for r in {INPUT}]',
)


def piped(path, command, name=None):
    """The command, from a file, plain or gzipped, into a new one beside it."""
    with open(path, "rb") as f:
        packed = f.read(2) == GZIP
    name = name or f"text-{Path(path).name.removesuffix('.gz').rsplit('.', 1)[0]}.tsv"
    old, new = (shlex.quote(str(p)) for p in (path, Path(path).with_name(name)))
    return f"zcat {old} | {command} > {new}" if packed else f"{command} < {old} > {new}"


def refuse_formats(path, head):
    """Raises: InputError where the first bytes of a file are not those of UTF-8 text."""
    for start, (name, command) in FORMATS.items():
        if re.match(start, head):
            if name == "zip" and zipfile.is_zipfile(path):
                several_of(path)
            raise InputError(f"it is {name}. Convert it: {piped(path, command)}")


def several_of(path):
    """Raises: InputError where a zip holds several files: they are unpacked first."""
    with zipfile.ZipFile(path) as z:
        names = [n for n in z.namelist() if not n.endswith("/") and not re.match(PAPERS, n)]
    if "xl/workbook.xml" in names:
        raise InputError("it is a spreadsheet. Save its sheet as text between tabs, in UTF-8")
    if len(names) > 1:
        old, new = (shlex.quote(str(p)) for p in (path, Path(path).with_suffix("")))
        raise InputError(
            f"it is a zip of {len(names)} files. Unpack it: python -m zipfile -e {old} {new}"
        )


def count_english(texts):
    return sum(word in ENGLISH for word in re.findall(r"\w+", " ".join(texts).lower()))


def text_columns(rows):
    """The numbers of the two columns of rows that hold sentences, English first; fewer where there
    are fewer. Columns of scores, ids, codes, names, addresses and columns without text are none."""
    width = Counter(map(len, rows)).most_common(1)[0][0]
    columns = list(zip(*(row for row in rows if len(row) == width)))

    def those_but(wrong):
        for i, cells in enumerate(columns):
            distinct = len(set(cells)) > max(len(cells) > 1, len(cells) / 10)
            right = sum(not is_score(cell, wrong) for cell in cells)
            if distinct and right > len(cells) / 2:
                yield i

    found = [*those_but(WORD)]
    found = found if len(found) > 1 else [*those_but(SCORE)]  # a list of words
    found.sort(key=lambda i: -count_english(columns[i]))
    return [*found[:1], *sorted(found[1:])][:2]


def leaves(value, path="r"):
    """Yield all strings in a value of JSON: (how to reach it from r, string)."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        start = path if path == "r" else f"({path} or {{}})"
        for key, part in value.items():  # which one row or another may lack
            yield from leaves(part, f"{start}.get({json.dumps(key, ensure_ascii=False)})")
    elif isinstance(value, list):
        for i, part in enumerate(value):
            yield from leaves(part, f"{path}[{i}]")


def rows_within(value, reader):
    """(some rows, how to read all) of one value of JSON: a list of rows, maybe within an object, or
    an object of columns, whose cells may be named by their number."""
    if isinstance(value, dict):
        for key, part in value.items():
            if isinstance(part, list) and isinstance([*part, ""][0], (dict, list)):
                return rows_within(part, f"{reader}[{json.dumps(key, ensure_ascii=False)}]")
        columns = "[*v.values()] if isinstance(v, dict) else v for v in {}.values()"
        columns += " if isinstance(v, (list, dict))"
        reader = f"map(list, zip(*({columns.format(reader)})))"
        columns = [v for v in value.values() if isinstance(v, (list, dict))]
        columns = [[*v.values()] if isinstance(v, dict) else v for v in columns]
        value = [*map(list, zip(*columns))]
    return (value[:SAMPLE], reader) if isinstance(value, list) and len(value) > 1 else ([], "")


def from_json(lines):
    """The command for JSON lines or one value of JSON, flat or nested; None where it is neither."""
    rows, reader = [], f"(json.loads(l) for l in {INPUT} if l.strip())"
    with contextlib.suppress(ValueError):
        rows = [json.loads(line) for line in lines[:SAMPLE] if line.strip()]
    if len(rows) < 2:
        rows = []
        with contextlib.suppress(ValueError):
            rows, reader = rows_within(json.loads("\n".join(lines)), f"json.load({INPUT})")
    rows = [dict(leaves(row)) for row in rows]
    seen = Counter(key for row in rows for key in row)
    keys = [key for key, n in seen.items() if n > len(rows) / 2]
    found = text_columns([[row.get(key, "") for key in keys] for row in rows]) if keys else []
    cells = ", ".join(keys[i] for i in found)
    return printed("json", cells, reader) if len(found) == 2 else None


def from_moses(path):
    """The command that joins a file with that of the other language; None where there is none.

    Their names differ in the language alone: corpus.en and corpus.de, en.txt.gz and de.txt.gz.
    """
    path = Path(path)
    for other in sorted(path.parent.iterdir()):
        a, b = (p.name.removesuffix(".gz") for p in (path, other))
        start = len(re.sub("[A-Za-z]*$", "", os.path.commonprefix([a, b])))
        end = len(re.sub("[A-Za-z]*$", "", os.path.commonprefix([a[::-1], b[::-1]])))
        names = a[start : len(a) - end], b[start : len(b) - end]
        codes = [re.fullmatch(r"([A-Za-z]{2,3}|[a-z]{5,})([-_]\w+)?", name) for name in names]
        english = [bool(re.match("en([-_g]|$)|(src|source)$", name.lower())) for name in names]
        if other.is_file() and all(codes) and sum(english) == 1:
            code = "-".join(sorted(names, key=lambda n: n != names[english.index(True)]))
            pair = (path, other) if english[0] else (other, path)
            new = shlex.quote(str(path.with_name(f"text-{a[:start]}{code}.tsv")))
            a, b = (shlex.quote(str(p)) for p in pair)
            clean = f"tr -d '\\r' > {new}"
            if not any(p.suffix == ".gz" for p in pair):
                return f"paste {a} {b} | {clean}"
            return f"zcat -f {a} | {{ zcat -f {b} | paste /dev/fd/3 -; }} 3<&0 | {clean}"
    return None


def csv_rows(lines, mark):
    """The rows of CSV, less empty ones; none of a damaged file."""
    try:
        return [row for row in csv.reader(lines, delimiter=mark) if row]
    except csv.Error:
        return []


def from_cells(path, lines):
    """(what it is, command) of lines with cells between tabs, bars or commas; ("", "") of others.

    Quotes around cells are taken off.
    """
    for mark, name in (("\t", "columns"), ("|||", "text with |||"), (",", "CSV"), (";", "CSV")):
        marked = [line for line in lines if mark in line]
        if len(marked) <= len(lines) / 4:  # a cell may go on in the next line
            continue
        quoted = sum(line.strip()[-1:] == '"' or f'"{mark}' in line for line in marked)
        rows = [line.split(mark) for line in marked]
        is_csv = name == "CSV"
        if mark == "\t":
            is_csv = quoted > len(marked) / 2 or in_quotes([cell for row in rows for cell in row])
        if is_csv:
            rows = csv_rows(lines, mark)
        if not rows:
            continue
        width, n = Counter(map(len, rows)).most_common(1)[0]
        found = text_columns(rows)
        wrong = is_csv or mark != "\t" or width > 2  # two columns between tabs are what is wanted
        if width < 2 or n < 0.8 * len(rows) or len(found) < 2 or not wrong:
            continue
        a, b = found
        if is_csv:
            reader = f"csv.reader({INPUT}, delimiter={json.dumps(mark)}) if len(r) == {width}"
            return "CSV", piped(path, printed("csv", f"r[{a}], r[{b}]", reader))
        if mark == "\t" and a < b:
            return name, piped(path, f"cut -f{a + 1},{b + 1}")
        mark = r"\t" if mark == "\t" else " *[|][|][|] *"
        script = f"awk -F '{mark}' -v OFS='\\t' '{{print ${a + 1}, ${b + 1}}}'"
        return name, piped(path, script)
    return "", ""


def fix_of(path, lines):
    """What the lines of a file are instead of pairs, with the command to run; "" if unknown."""
    bad = sum(bool(NOT_UTF8.search(line)) for line in lines)
    if bad > len(lines) / 100 and not any(map(NOT_TEXT.search, lines)):
        if sum(bool(ALONE.search(line)) for line in lines) > 0.9 * bad:
            command = piped(path, "iconv -f WINDOWS-1252 -t UTF-8")
            return f" It is Windows-1252, if of Western Europe. Convert it: {command}"
        return f" With its encoding for X: {piped(path, 'iconv -f X -t UTF-8')}"
    if lines and lines[0].lstrip()[:1] in ("{", "[") and (command := from_json(lines)):
        return f" It is JSON. Convert it: {piped(path, command)}"
    name, command = from_cells(path, lines[:SAMPLE])
    if name == "columns":
        return f" Keep two columns: {command}"
    if name:
        return f" It is {name}. Convert it: {command}"
    if sum(bool(IS_TWICE.search(line)) for line in lines) > len(lines) / 100:
        return f" It was decoded twice. Mend it: {piped(path, MEND)}"
    if not any("\t" in line for line in lines) and (command := from_moses(path)):
        return f" It is one of Moses' two files. Put them side by side: {command}"
    return ""
