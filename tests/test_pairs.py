"""Wrong pairs are found before a run trains on them: forms, sides, alignment, leaks."""

import csv
import gzip
import io
import itertools
import json
import math
import os
import re
import shlex
import subprocess
import sys
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest

import data
import model as M
from checks import forms, pairs
from demo import corpus as demo
from test_msd import CASES, HERE, SHARED, needs_cases, write

needs_data = pytest.mark.skipif(
    not (SHARED / "data").exists(), reason="no shared/data beside the checkout"
)


def run(command):
    """Run a printed command, and read the pairs of the file that it writes."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "LC_ALL": "C"}
    subprocess.run(command, shell=True, check=True, cwd=HERE, env=env)
    new = shlex.split(command)[-1]
    return [tuple(sides) for _, *sides in data.read_pairs(Path(new), {})]


def command_of(message):
    return re.split(r"(?:it|side|columns|back|as): (?=python|awk|cut|zcat|paste|cat)", message)[-1]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """{language: pairs} of the built-in corpus, and its folder."""
    folder = tmp_path_factory.mktemp("demo") / "data"
    demo.write_demo(folder, sentences=600, dev=100, scored=5, teacher=1)
    read = {x: [*data.read_pairs(folder / "train" / f"en-{x}.tsv", {})] for x in demo.LANGUAGES}
    return {x: [(a, b) for _, a, b in some] for x, some in read.items()}, folder


def tsv(rows):
    return "".join("\t".join(map(str, row)) + "\n" for row in rows)


def csv_of(rows, **options):
    csv.writer(f := io.StringIO(), lineterminator="\n", **options).writerows(rows)
    return f.getvalue()


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=i % 2) + "\n" for i, row in enumerate(rows))


def tmx(rows, attribute="xml:lang", codes=("EN-US", "de")):
    unit = "<tuv {0}='{1}'><seg>{2}</seg></tuv>\n"
    units = (
        "<tu>\n\t" + "".join(unit.format(attribute, c, s) for c, s in sides) + "</tu>\n"
        for sides in (list(zip(codes, row))[:: -1 if i % 2 else 1] for i, row in enumerate(rows))
    )
    return f"<?xml version='1.0'?>\n<tmx version='1.4'><header/><body>{''.join(units)}</body></tmx>"


PAIRS = [
    (f'The dog number {i}, and "not" the cat; you know.', f'Der Hund {i} und „nicht“, "die" Katze.')
    for i in range(30)
]
PLAIN = [
    (f"The dog {i} sees you and the cat.", f"Der Hund {i} sieht eine Katze.") for i in range(9)
]
URL = "https://example.org/a"
FORMS = {
    "csv": ("CSV", csv_of(PAIRS)),
    "csv-all-quoted": ("CSV", csv_of(PLAIN, quoting=csv.QUOTE_ALL)),
    "csv-header-bom": ("CSV", "\ufeff" + csv_of([("english", "german"), *PAIRS])),
    "csv-id-german-first": ("CSV", csv_of((i, b, a) for i, (a, b) in enumerate(PAIRS))),
    "csv-semicolon": ("CSV", csv_of(PAIRS, delimiter=";")),
    "csv-line-ends": ("CSV", csv_of((a.replace(" ", "\n", 1), b) for a, b in PAIRS)),
    "tsv-quoted": ("CSV", csv_of(PAIRS, delimiter="\t", quoting=csv.QUOTE_ALL)),
    "tsv-quoted-where-needed": ("CSV", csv_of(PAIRS, delimiter="\t")),
    "json-flat": ("JSON", jsonl({"id": i, "de": b, "en": a} for i, (a, b) in enumerate(PAIRS))),
    "json-nested": (
        "JSON",
        jsonl({"id": "x", "translation": {"en": a, "de": b}} for a, b in PAIRS),
    ),
    "json-odd-keys": ("JSON", jsonl({"the 'en'": a, 'ü"$': b} for a, b in PAIRS)),
    "json-lists": ("JSON", jsonl(PAIRS)),
    "json-set": ("JSON", jsonl({"set": row} for row in PAIRS)),
    "json-lacking": (
        "JSON",
        jsonl([{"en": PAIRS[0][0], "de": None}, {"en": "You"}])
        + jsonl({"en": a, "de": b} for a, b in PAIRS).replace("\n", "\n\n"),
    ),
    "json-within": ("JSON", json.dumps({"n": 30, "data": [{"en": a, "de": b} for a, b in PAIRS]})),
    "json-columns": (
        "JSON",
        json.dumps({"en": [a for a, _ in PAIRS], "de": [b for _, b in PAIRS]}),
    ),
    "json-pandas": (
        "JSON",
        json.dumps(
            {x: dict(enumerate(side)) for x, side in zip(("de", "en"), list(zip(*PAIRS))[::-1])}
        ),
    ),
    "json-one-list": ("JSON", json.dumps([{"en": a, "de": b} for a, b in PAIRS], indent=1)),
    "tmx": ("TMX", tmx(PLAIN)),
    "tmx-inline": (
        "TMX",
        tmx([("", "Leer."), *PLAIN])
        .replace("The ", "<bpt i='1'>&lt;b></bpt>The ")
        .replace(" cat", "<ph>{}</ph> <hi>c</hi>at")
        .replace("<tmx ", "<tmx xmlns='http://www.lisa.org/tmx14' "),
    ),
    "tmx-two-english": (
        "TMX",
        tmx(PLAIN).replace("</tu>", "<tuv xml:lang='en-GB'><seg>The other.</seg></tuv></tu>"),
    ),
    "tmx-utf-16": ("TMX", tmx(PLAIN).replace("'1.0'", "'1.0' encoding='UTF-16'")),
    "tmx-old": ("TMX", tmx(PLAIN, "lang", ("en", "ZH-cn"))),
    "bars": ("text with |||", "".join(f"{a} ||| {b}\n" for a, b in PAIRS)),
    "bars-scores": ("text with |||", "".join(f"{b}|||{a}|||0.5 0.1\n" for a, b in PAIRS)),
    "score-first": ("", tsv((1.2 - i / 99, *row) for i, row in enumerate(PAIRS))),
    "score-first-german": ("", tsv((i / 9, b, a) for i, (a, b) in enumerate(PAIRS))),
    "score-last": ("", tsv((*row, i / 9) for i, row in enumerate(PAIRS))),
    "ids": ("", tsv((i, a, 1000 + i, b) for i, (a, b) in enumerate(PAIRS))),
    "ids-words": ("", tsv((f"tatoeba-{i}", a, f"news-{i}", b) for i, (a, b) in enumerate(PAIRS))),
    "codes": ("", tsv(("en", "de", *row) for row in PAIRS)),
    "addresses": ("", tsv((URL, URL + str(i), *row, 0.7) for i, row in enumerate(PAIRS))),
    "two-tabs": ("", tsv((a, "", b) for a, b in PAIRS)),
    "tab-at-the-end": ("", tsv((*row, "") for row in PAIRS)),
    "licence-last": ("", tsv((*row, f"CC-BY (France) #{i} (CK)") for i, row in enumerate(PAIRS))),
    "two-lines": ("", tsv((i, *row) for i, row in enumerate(PLAIN[:2]))),
}


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gz"])
@pytest.mark.parametrize("kind", FORMS)
def test_fix_of_gives_the_pairs(tmp_path, kind, pack):
    """The file is named, and its command, run as it is printed, gives the pairs."""
    name, text = FORMS[kind]
    suffix = ".gz" if pack is gzip.compress else ""
    code = "utf-16" if "utf-16" in kind else "utf-8"
    file = write(tmp_path / "l'  été" / f"en-de.x{suffix}", pack(text.encode(code)))
    with pytest.raises(M.InputError) as e:
        list(data.read_pairs(file, {}))
    assert (f"t is {name}. Convert it: " if name else "Keep two columns: ") in str(e.value)
    got = run(command_of(str(e.value)))
    right = [(a, b) for a, b in PAIRS + PLAIN if (a, b) in got]
    assert got == right and len(got) == len(
        PLAIN[:2] if kind == "two-lines" else PLAIN if "tmx" in kind or "all-q" in kind else PAIRS
    )


MOSES = ["c.en c.de", "en.txt de.txt", "c.de-en.en.gz c.de-en.de.gz", "c.en_XX c.de_DE.gz"]
MOSES += ["src-train.txt tgt-train.txt", "train.source train.target", "t.en.gz t.de"]


@pytest.mark.parametrize("names", MOSES)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_fix_of_moses(tmp_path, names, end):
    for name, side in zip(names.split(), zip(*PLAIN)):
        text = "".join(f"{s}{end}" for s in side).encode()
        if name.endswith(".gz") and "_" not in name:
            text = gzip.compress(text)
        file = write(tmp_path / name.removesuffix(".gz" * ("_" in name)), text)
    for file in sorted(tmp_path.iterdir()):
        with pytest.raises(M.InputError, match="It is one of Moses' two files") as e:
            list(data.read_pairs(file, {}))
        assert run(command_of(str(e.value))) == PLAIN
        Path(shlex.split(command_of(str(e.value)))[-1]).unlink()
    file.unlink()
    with pytest.raises(M.InputError, match="no tab") as e:
        list(data.read_pairs(next(tmp_path.iterdir()), {}))
    assert "Moses" not in str(e.value)


def test_fix_of_another_encoding(tmp_path):
    rows = [(a, b.replace("Katze", "große Kätzin")) for a, b in PLAIN]
    for text, command in (
        (tsv(rows), "Western Europe. Convert it: iconv -f WINDOWS-1252 -t UTF-8"),
        (csv_of(rows, delimiter=";"), "Convert it: iconv -f WINDOWS-1252 -t UTF-8"),
        (tsv((a, "狗看见一只猫") for a, _ in rows), "With its encoding for X: iconv -f X -t UTF-8"),
    ):
        code = "gb18030" if "X" in command.split() else "cp1252"
        file = write(tmp_path / "a.txt", text.encode(code))
        with pytest.raises(M.InputError, match="not UTF-8") as e:
            list(data.read_pairs(file, {}))
        assert command in str(e.value)
        subprocess.run(
            re.split("(?:it|X): ", str(e.value))[-1].replace("-f X", "-f gb18030"), shell=True
        )
        assert (tmp_path / "text-a.tsv").read_text("utf-8") == text


def test_refuse_formats_of_a_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "a b.zip", "w") as z:
        z.writestr("README", "Of an archive.\n")
        z.writestr("c.de-en.en", "".join(f"{a}\n" for a, _ in PLAIN))
        z.writestr("c.de-en.de", "".join(f"{b}\n" for _, b in PLAIN))
    with pytest.raises(M.InputError, match="it is a zip of 2 files. Unpack it: ") as e:
        list(data.read_pairs(tmp_path / "a b.zip", {}))
    subprocess.run(
        str(e.value).split("Unpack it: ")[1].replace("python", sys.executable), shell=True
    )
    with pytest.raises(M.InputError, match="one of Moses' two files") as e:
        list(data.read_pairs(tmp_path / "a b" / "c.de-en.en", {}))
    assert run(command_of(str(e.value))) == PLAIN
    with zipfile.ZipFile(tmp_path / "a.xlsx", "w") as z:
        z.writestr("xl/workbook.xml", "")
    with pytest.raises(M.InputError, match="it is a spreadsheet"):
        list(data.read_pairs(tmp_path / "a.xlsx", {}))


def test_in_quotes_leaves_plain_text():
    """Titles and speech in quotes are no CSV; a cell with a quote in it, quoted, is."""
    speech = [(f'"Titel {i}"', f'Er sagte "ja {i}".') for i in range(20)]
    titles = [(f'"Title {i}"', f'"Titel {i}"') for i in range(12)] + [("a", "b")] * 40
    for rows in (speech, titles, PAIRS):
        assert not forms.in_quotes([cell for row in rows for cell in row])
    assert forms.in_quotes([f'"He said ""no"" {i}"' for i in range(10)] + ["plain"] * 99)


def test_refuse_bad_quotes_far_down(tmp_path):
    """Most lines are in quotes, but not the first ones by which a file is judged."""
    rows = [(f"The dog {i}", f"Der Hund {i}") for i in range(forms.SAMPLE)]
    rows += [(f'"{a}"', f'"{b}"') for a, b in rows + rows[:9]]
    with pytest.raises(M.InputError, match="most lines are in quotes, such as .*:1001: "):
        list(data.read_pairs(write(tmp_path / "a.tsv", tsv(rows)), {}))


def test_refuse_bad_scores(tmp_path):
    for side in ("0.98", "tatoeba-17", "https://a.b/c", "17", "1,200"):
        for row in ((side, "The dog sleeps."), ("The dog sleeps.", side)):
            with pytest.raises(M.InputError, match="found scores or ids, such as") as e:
                list(data.read_pairs(write(tmp_path / "a.tsv", tsv([row] * 30)), {}))
            assert f"column {row.index(side) + 1}:" in str(e.value)
    chinese = [(a, "".join(f"&#{ord(c)};" for c in "狗看见一只猫")) for a, _ in PLAIN]
    assert len([*data.read_pairs(write(tmp_path / "a.tsv", tsv(chinese)), {})]) == len(PLAIN)
    few = tsv([("17", "17"), *PLAIN])
    assert len([*data.read_pairs(write(tmp_path / "a.tsv", few), {})]) == 1 + len(PLAIN)


SPECIAL = [
    (f"You said ‘no’ – {i} cats & the dogs…", f"Er sagte „größer“ – {i} Mädchen & ihr €…")
    for i in range(50)
]


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gz"])
@pytest.mark.parametrize(
    "kind, damage",
    [
        ("HTML entities", lambda s: "".join(c if c.isascii() else f"&#{ord(c)};" for c in s)),
        ("HTML entities", lambda s: s.replace("&", "&amp;amp;").replace("ä", "&auml;")),
        ("HTML entities", lambda s: s.replace("&", "&#x26;").replace(" cats", "&#10;cats")),
        ("text that was decoded twice", lambda s: s.encode().decode("cp1252")),
        ("text that was decoded twice", lambda s: s.encode().decode("latin-1")),
        (
            "text that was decoded twice",
            lambda s: s.encode().decode("cp1252").encode().decode("cp1252"),
        ),
    ],
)
def test_describe_mends(tmp_path, pack, kind, damage):
    """Damage is counted; the command that is printed mends it."""
    rows = [tuple(map(damage, row)) for row in SPECIAL]
    file = write(tmp_path / "en-de.tsv", pack(tsv(rows).encode()))
    try:
        told = [*data.build_corpus([file], tmp_path / "cache").describe(10**9)]
        line = next(line for line in told if kind in line)
        assert line.startswith("  warning: 100.0%: ")
        before = "; mend it and give the new file in its place: "
    except M.InputError as e:  # Latin-1 leaves control characters
        line, before = str(e), "It was decoded twice. Mend it: "
        assert "decoded twice" in kind and before in line
    assert run(line.split(before)[1]) == SPECIAL


def test_suspicions_of_right_text():
    """What looks like damage and is none."""
    for text in (
        "« Voilà » dit-il, « là\u00a0»",
        "AT&T; R&D; Q&A",
        "Was für ein Spaß“, „heiß“",
        "SÃO PAULO, É “bom”… “É”, Å–Ä",
        "ÇA ÉTÉ; CAFÉ’S",
        "дом & сад – “да”",
        "x &lt y",
    ):
        odd = [*forms.suspicions(f"{text}\tb", text, "b")]
        assert odd in ([], ["twice"]) and ("twice" in odd) == ("É”" in text or "É’" in text)


def test_read_lines_composes(tmp_path):
    """A letter with its accent in two characters, as macOS writes it, is the same sentence."""
    rows = [(f"Café {i}", f"Über größe é {i}") for i in range(9)]
    for form in ("NFC", "NFD"):
        file = write(tmp_path / f"{form}.tsv", unicodedata.normalize(form, tsv(rows)))
        assert [tuple(sides) for _, *sides in data.read_pairs(file, {})] == rows
    files = [tmp_path / f"{form}.tsv" for form in ("NFC", "NFD")]
    assert len(data.build_corpus(files, tmp_path / "cache").first) == 18


# --------------------------------------------------------------------- sides, alignment, leaks
def checked(folder, files, dev=None, sts=None, sts_folder=None):
    """The lines of the report on {name: pairs}."""
    paths = [write(folder / name, tsv(rows)) for name, rows in files.items()]
    corpus = data.build_corpus(paths, folder.parent / "cache")
    return corpus, [*pairs.check(corpus, dev, sts, sts_folder)]


WRONG = {  # what is done to right pairs; the words of the error; what its command gives back
    "exchanged": (lambda p: [(b, a) for a, b in p], "English is the second side", lambda p: p),
    "exchanged from": (
        lambda p: p[:85] + [(b, a) for a, b in p[85:]],
        r"English is the second side in lines 86 to",
        lambda p: p,
    ),
    "exchanged amid": (
        lambda p: p[:60] + [(b, a) for a, b in p[60:130]] + p[130:],
        r"English is the second side in lines 61 to 130",
        lambda p: p,
    ),
    "exchanged with names": (  # which say nothing of sides
        lambda p: [row for i, (a, b) in enumerate(p[::2]) for row in ((b, a), (f"Tom {i}",) * 2)],
        "English is the second side, such as",
        lambda p: [r for i, row in enumerate(p[::2]) for r in (row, (f"Tom {i}",) * 2)],
    ),
    "exchanged mixed": (
        lambda p: [row[:: 1 if i % 2 else -1] for i, row in enumerate(p)],
        r"English is the second side of [45]\d% of its lines",
        None,
    ),
    "a line lost": (
        lambda p: [(a[0], b[1]) for a, b in zip(p, p[1:])],
        "do not translate each other.*: the translation of line n stands in line n-1",
        lambda p: p[1:-1],
    ),
    "a line lost, blank ones left": (
        lambda p: [
            row
            for i, (a, b) in enumerate(zip(p, p[1:]))
            for row in [("",)] * (i % 7 == 3) + [(a[0], b[1])]
        ],
        "the translation of line n stands in line n-1",
        lambda p: p[1:-1],
    ),
    "three lines added": (
        lambda p: [(a[0], b[1]) for a, b in zip(p[3:], p)],
        r"the translation of line n stands in line n\+3",
        lambda p: p[3:-3],
    ),
    "a line lost amid": (
        lambda p: p[:90] + [(a[0], b[1]) for a, b in zip(p[90:], p[91:])],
        r"do not translate each other in lines \d+ to \d+: .* line n-1.* a line is missing",
        None,
    ),
    "sorted": (
        lambda p: list(zip([a for a, _ in p], sorted(b for _, b in p))),
        "do not translate each other, such as .*Align",
        None,
    ),
    "constant": (
        lambda p: [(p[0][0], b) for _, b in p],
        "only 1 of 100 sentences of a side differ, ",
        None,
    ),
    "constant from": (
        lambda p: p[:90] + [(a, p[0][1]) for a, _ in p[90:]],
        r"only 1 of 100 sentences of a side differ in lines",
        None,
    ),
    "ten in turn": (
        lambda p: [(a, p[i % 10][1]) for i, (a, _) in enumerate(p)],
        "only 10 of 100 sentences of a side differ, ",
        None,
    ),
    "codes": (
        lambda p: [("en", "de")] * len(p),
        "only 1 of 100 sentences of a side differ, ",
        None,
    ),
}


@pytest.mark.parametrize("language", ["de", "nl", "ar", "tr"])
@pytest.mark.parametrize("kind", WRONG)
def test_check_refuses(tmp_path, made, kind, language):
    """From 200 lines on, alone or among right files; the command gives the pairs back."""
    wrong, message, mended = WRONG[kind]
    right = made[0][language]
    for n, others in ((200, {}), (600, {"en-es.tsv": made[0]["es"]})):
        name = f"en-{language}.tsv"
        with pytest.raises(M.InputError, match=f"{name}: .*{message}") as e:
            checked(tmp_path / str(n), {name: wrong(right[:n]), **others})
        assert str(e.value).count("<TAB>") == 3 and "\n" not in str(e.value)
        if mended:
            assert run(command_of(str(e.value))) == mended(right[:n])


def test_check_refuses_a_constant_end(tmp_path, made):
    """One block of many is enough, where hardly a sentence differs."""
    rows = made[0]["de"]
    for few in (1, 2):
        end = [(a, rows[i % few][1]) for i, (a, _) in enumerate(rows[480:])]
        with pytest.raises(M.InputError, match=f"only {few} of 100 .* differ in lines"):
            checked(tmp_path / str(few), {"en-de.tsv": rows[:480] + end})


def test_check_warns_of_pairs_without_english(tmp_path, made):
    """Some such words are in any text; words alone, as names, have none."""
    rows = [(a, b) for (_, a), (_, b) in zip(made[0]["de"], made[0]["nl"])]
    rows[7] = ("Das ist The Who", rows[7][1])
    for n in (99, 200, 600):
        _, told = checked(tmp_path / str(n), {"en-nl.tsv": rows[:n]})
        assert ("en-nl.tsv: English is on neither side" in told[-1]) == (n > 99)
    names = [(a.split()[-1], b.split()[-1] + f" {i}") for i, (a, b) in enumerate(made[0]["nl"])]
    _, told = checked(tmp_path / "names", {"en-nl.tsv": names})
    assert len(told) == 2


def test_check_of_sorted_text(tmp_path):
    """Where neighbours have no word in common, as in files that are sorted, a block says nothing:
    lines from all over the file do, here each topic's."""
    rng, count = np.random.default_rng(0), itertools.count(10_000)

    def sentence(topic):
        return " ".join([topic, *(f"{next(count)}x" for _ in range(rng.integers(3, 6)))])

    topics = np.concatenate([rng.permutation(100) for _ in range(8)])
    right = [(sentence(f"the {i}a"), sentence(f"{i}b")) for i in topics]
    corpus, _ = checked(tmp_path / "right", {"en-xx.tsv": right})
    assert corpus.report[0]["score"] > 2 * pairs.SURE
    wrong = [(a, right[i][1]) for (a, _), i in zip(right, rng.permutation(800))]
    with pytest.raises(M.InputError, match="do not translate each other, such as .*Align"):
        checked(tmp_path / "wrong", {"en-xx.tsv": wrong})


def test_check_passes(tmp_path, made):
    """Right files, and those too odd to judge, go through; the report is in the corpus, too."""
    texts, folder = made
    right = {f"en-{x}.tsv": rows[:200] for x, rows in texts.items()}
    words = sorted({w for a, _ in texts["de"] for w in a.lower().strip(".").split()})
    odd = {
        "words.tsv": [(w, f"{w[::-1]}a") for w in words] * 3,  # says nothing of its order
        "few.tsv": texts["de"][:30],
        "many.tsv": [(a, f"{b} {i}") for a, b in texts["fr"][:70] for i in range(4)],  # versions
        "twice.tsv": [row for row in texts["it"][:150] for _ in (0, 1)],
    }
    corpus, told = checked(tmp_path / "a", right | odd)
    assert len(told) == 1 + len(right) + len(odd)  # the table, no warning
    for r in corpus.report:
        if r["file"] in right:
            assert r["english first"] == 1 and r["score"] > 2 * pairs.SURE and r["loose"] < 0.1
        assert r["repeated"] == {"twice.tsv": 150}.get(r["file"], r["repeated"])
    line = next(line for line in told if line.endswith("en-de.tsv"))
    assert line.split()[0] == "200" and "100.0%" in line
    mixed = [row[:: -1 if i % 20 == 0 else 1] for i, row in enumerate(texts["de"])]
    _, told = checked(tmp_path / "b", {"en-de.tsv": mixed})
    assert "en-de.tsv: English is second in 5%" in told[-1]
    loose = texts["de"][:]
    for i in range(0, 600, 5):
        loose[i] = (loose[i][0], texts["de"][(7 * i + 300) % 600][1])
        loose[i + 1] = (loose[i + 1][0], texts["de"][(11 * i + 200) % 600][1])
    _, told = checked(tmp_path / "c", {"en-de.tsv": loose})
    assert "of its lines fit no better than others" in told[-1]


def test_check_finds_leaks(tmp_path, made):
    """Held-out sentences in the training text are counted whatever their case, spaces and signs;
    the command drops them."""
    texts, folder = made
    train, held = texts["de"], texts["de"][:40]
    changed = [(f"“{a.upper()}”", b.replace(" ", "  ").rstrip(".") + " !") for a, b in held]
    new = [*data.read_pairs(folder / "dev" / "en-de.tsv", {})]
    dev = write(tmp_path / "dev" / "en-de.tsv", tsv(changed + [(a, b) for _, a, b in new]))
    write(tmp_path / "sts" / "STS.en-de.txt", f"{train[50][0]}\tx y\t1\nno one's\tz\t2\n")
    sts, dev = data.read_sts(tmp_path / "sts"), data.build_corpus([dev], tmp_path / "cache")
    corpus, told = checked(tmp_path / "train", {"en-de.tsv": train}, dev, sts, tmp_path / "sts")
    assert "  81 of 284 sentences of --dev and --sts are in the training text" in told[-2]
    assert corpus.report[0]["leaks"] == 41 and "warning: so are 29% of " in told[-1]
    _, command = told[-1].split("files such as this, and give the new ones in their place: ")
    assert run(command) == train[40:50] + train[51:]
    corpus, told = checked(tmp_path / "train", {"en-de.tsv": train[60:]}, dev, sts, tmp_path)
    assert told[-1].startswith("  0 of 284 ")


def test_check_finds_leaks_with_emoji(tmp_path, made):
    """A key has letters alone; those beyond 16 bits are looked up by their keys."""
    train = made[0]["de"]
    held = [(f"{a} {sign}", f"{sign} {b}") for (a, b), sign in zip(train, "🤣🤔🥰😀𐐷")]
    dev = data.build_corpus([write(tmp_path / "en-de.tsv", tsv(held))], tmp_path / "cache")
    _, told = checked(tmp_path / "train", {"en-de.tsv": train}, dev, {}, None)
    assert "  8 of 10 sentences of --dev" in told[-2]  # 𐐷 is a letter: another sentence


def test_main_drops_sentences_and_not_scores(tmp_path, made):
    """A folder's other files are not read, and a score is no sentence."""
    folder = tmp_path / "sts"
    write(folder / "STS.en-de.txt", "a red dog\tein roter Hund\t2.4\n")
    (folder / "sts.zip").write_bytes(b"PK\x03\x04")
    (folder / "notes").mkdir()
    text = "24\tvierundzwanzig\nA red dog!\tein Hund\n"
    command = [sys.executable, "-m", "checks.pairs"]
    done = subprocess.run([*command, folder], input=text, capture_output=True, text=True, cwd=HERE)
    assert done.stdout == "24\tvierundzwanzig\n" and not done.stderr
    gone = tmp_path / "gone.tsv"
    done = subprocess.run([*command, gone], input=text, capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 2 and re.fullmatch(f"error: {gone}: .*\n", done.stderr)


def test_check_judges_each_similarity_set(tmp_path, made):
    """A small set may be in the training text whole."""
    train, folder = made[0]["de"], tmp_path / "sts"
    write(folder / "STS.en-de.txt", tsv([(*train[0], 1), (*train[1], 2)]))
    write(folder / "STS.en-nl.txt", tsv((f"the {i}x", f"de {i}y", i % 6) for i in range(400)))
    sts = data.read_sts(folder)
    _, told = checked(tmp_path / "train", {"en-de.tsv": train}, None, sts, folder)
    assert "  4 of 804 sentences" in told[-2] and f"so are 100% of en-de of {folder}." in told[-1]
    _, command = told[-1].split("files such as this, and give the new ones in their place: ")
    assert run(command) == train[2:]


def test_awk_reads_the_line_ends_of_windows(tmp_path):
    file = write(tmp_path / "a.tsv", "x\ty\r\n" * 3)
    assert run(pairs.awk(file, "{print $2, $1}")) == [("y", "x")] * 3
    assert (tmp_path / "text-a.tsv").read_bytes() == b"y\tx\n" * 3


@needs_cases
@pytest.mark.parametrize("name", ["clean", "swapped", "shifted"])
def test_check_of_cases(tmp_path, name):
    corpus = data.build_corpus([CASES / "data" / f"en-de.{name}.tsv"], tmp_path)
    if name == "clean":
        assert len([*pairs.check(corpus)]) == 2  # no warning
        return
    with pytest.raises(M.InputError, match="second side" if name == "swapped" else "line n-1"):
        list(pairs.check(corpus))


@needs_data
@pytest.mark.parametrize("n", [200, 2000])
def test_check_of_real_text(tmp_path, n):
    """Every file right way round passes, every exchanged or shifted one is found; a fourth of them
    with more lines, which takes longer."""
    for path in sorted(SHARED.glob("data*/train/*.tsv.gz"))[:: 1 if n == 200 else 4]:
        rows = [row for _, *row in data.read_pairs(path, {}, max_lines=n)]
        corpus, told = checked(tmp_path / "right", {path.stem: rows})
        assert len(told) == 2
        for kind in ("exchanged", "exchanged from", "a line lost", "a line lost amid", "constant"):
            wrong, message, _ = WRONG[kind]
            with pytest.raises(M.InputError, match=message):
                checked(tmp_path / kind, {path.stem: wrong([*map(tuple, rows)])})


@needs_data
def test_check_of_sorted_real_text(tmp_path):
    """Of files that are sorted by length the whole, the shortest and the longest lines pass; the
    longest shifted do not."""
    for path in sorted(SHARED.glob("data*/train/*.tsv.gz")):
        rows = [tuple(row) for _, *row in data.read_pairs(path, {}, max_lines=8000)]
        rows.sort(key=lambda row: len(row[0]))
        for part in (rows[::8], rows[:1000], rows[-1000:]):
            corpus, told = checked(tmp_path / "right", {path.stem: part})
            assert len(told) == 2 or part is not rows[::8]
        with pytest.raises(M.InputError, match="do not translate each other"):
            checked(tmp_path / "wrong", {path.stem: WRONG["a line lost"][0](rows[-1000:])})


def test_spaced_takes_a_sample(monkeypatch):
    """Of text without spaces; other text is all there."""
    monkeypatch.setattr(data, "UNSPACED", 100)
    words = [f"ein Satz mit Wörtern {i}" for i in range(99)]
    signs = ["我爱看足球" * 4] * 50
    both = [text for two in zip(words, signs) for text in two]
    assert [t for t in data.spaced(both) if t in words] == words[:50]
    assert sum(t in signs for t in data.spaced(both)) == 5
    assert [*data.spaced(words)] == words


@pytest.mark.parametrize("dtype, row", [("<u4", ()), ("<i8", ()), ("<f2", (3,)), ("|u1", ())])
@pytest.mark.parametrize("n", [0, 1, 1000])
def test_array_file_is_numpys(tmp_path, dtype, row, n):
    """Written row by row, it is the file that numpy writes at once, to the byte."""
    rows = (np.arange(n * math.prod(row)) % 200).astype(dtype).reshape(n, *row)
    with data.array_file(tmp_path / "a.npy", dtype, *row) as f:
        for part in np.array_split(rows, 7):
            f.write(part.tobytes())
    np.save(tmp_path / "b.npy", rows)
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
