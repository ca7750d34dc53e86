"""Text that people have: formats, encodings, and what is suspicious."""

import gzip
import importlib
import shutil
import subprocess

import pytest

import data
import model as M
from test_msd import CASES, needs_cases, write


def test_read_pairs_counts_suspicious_lines(tmp_path):
    """Counted, with an example; the totals add up."""
    for first in (
        "english\tnon_english",
        "EN\tDE",
        "source\ttarget",
        "Sentence1\tSentence2",
        "src_text\ttgt_text",
        "English\tGerman",
    ):
        r = {}
        assert len(list(data.read_pairs(write(tmp_path / "a.tsv", f"{first}\n{GOOD}"), r))) == 300
        assert r["header"] == 1 and first[:2] in r["examples"]["header"]
    for first in ("I sing\tIch singe", "Texts matter.\tTexte zählen.", "Yes\tJa"):
        assert len(list(data.read_pairs(write(tmp_path / "a.tsv", f"{first}\n{GOOD}"), {}))) == 301
    odd = 'same\tsame\n"He said ""no"""\t"Er sagte ""nein"""\n'
    odd += "a\x00b\tc\nd\x1be\tf\ng\ufffd\th\ni\x85j\tk\n"
    r = {}
    pairs = list(data.read_pairs(write(tmp_path / "a.tsv", GOOD * 3 + odd), r))
    assert (r["same"], r["quoted"], len(pairs)) == (1, 1, 902)
    assert r["bad"] == {"a character that is no text": 4}
    told = list(data.build_corpus([tmp_path / "a.tsv"], tmp_path / "cache").describe(906))
    assert told[0] == (
        "data: 1 files, 906 lines = 902 pairs + 0 too long + 0 blank + 0 headers + 4 malformed; "
        "603 distinct sentences, 66.5% of the pairs are repeated"
    )
    assert told[1] == "  1 files reach --max-lines 906; lines beyond it are not read"
    assert told[2].startswith("  0.1%: both sides are equal, such as ") and ":901: 'same" in told[2]
    assert "both sides are in quotes" in told[3] and ":903: a character that" in told[4]
    assert len(told) == 5
    same = write(tmp_path / "a.tsv", GOOD + "same\tsame\n" * 20)
    told = list(data.build_corpus([same], tmp_path / "cache").describe(906))
    assert told[1].startswith("  warning: 6.2%: both sides are equal, such as ")
    three = "".join(f"a {i}\tb {i}\tc {i}\td\n" for i in range(50))
    with pytest.raises(M.InputError, match=r"Keep two columns: zcat .* cut -f1,2"):
        list(data.read_pairs(write(tmp_path / "b.tsv.gz", gzip.compress(three.encode())), {}))


@needs_cases
@pytest.mark.parametrize(
    "name, message",
    [
        ("en-de.utf16.tsv", "is UTF-16.*iconv"),
        ("en-de.three-columns.tsv", "Keep two columns.*cut -f1,2"),
        ("en-de.parquet", "is parquet.*pandas"),
        ("en-de.tsv.zip", "is zip.*zipfile"),
    ],
)
def test_read_pairs_refuses_other_files(name, message):
    with pytest.raises(M.InputError, match=message):
        list(data.read_pairs(CASES / "text" / name, {}))


@needs_cases
def test_read_pairs_of_suspicious_files():
    with pytest.raises(M.InputError, match=r"111 of 300 lines are bad.*\(U\+0000\)"):
        list(data.read_pairs(CASES / "text" / "en-de.nul.tsv", {}))
    for name, kind in (("header", "header"), ("untranslated", "same")):
        pairs = list(data.read_pairs(CASES / "text" / f"en-de.{name}.tsv", r := {}))
        assert r[kind] and kind in r["examples"] and r["lines"] == len(pairs) + r["header"]


GOOD = "".join(f"sentence {i}\tSatz {i}\n" for i in range(300))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_read_lines_recognises_other_encodings(tmp_path, encoding, pack):
    text = GOOD + "جملة\tجملة أخرى\n"
    file = write(tmp_path / "l'  été" / "en-ar.tsv", pack(text.encode(encoding)))
    name = encoding.upper()[:6]
    with pytest.raises(M.InputError, match=f"en-ar.tsv: .* is {name}. .*iconv -f {name}") as e:
        list(data.read_pairs(file, {}))
    subprocess.run(str(e.value).split("Convert it: ")[1], shell=True, check=True)  # mends it
    assert len(list(data.read_pairs(file.with_name("text-en-ar.tsv"), {}))) == 301


@pytest.mark.parametrize("module, name", [("bz2", "bzip2"), ("lzma", "xz"), ("zipfile", "zip")])
def test_packed_files_are_recognised(tmp_path, module, name):
    file = tmp_path / "en-de.tsv"
    if module == "zipfile":
        with importlib.import_module(module).ZipFile(file, "w") as z:
            z.writestr("LICENSE", "free\n")
            z.writestr("en-de.tsv", GOOD)
    else:
        write(file, importlib.import_module(module).compress(GOOD.encode()))
    with pytest.raises(M.InputError, match=f"en-de.tsv: not .* UTF-8 text: it is {name}") as e:
        list(data.read_pairs(file, {}))
    command = str(e.value).split("Convert it: ")[1]
    if shutil.which(command.split()[0]):
        subprocess.run(command, shell=True, check=True)
        assert len(list(data.read_pairs(tmp_path / "text-en-de.tsv", {}))) == 300  # not LICENSE
    with pytest.raises(M.InputError, match="is zstd"):
        list(data.read_pairs(write(file, b"\x28\xb5\x2f\xfd" + bytes(range(90))), {}))


def test_read_lines_of_joined_files(tmp_path):
    """Each of the files that were put together may have begun with a BOM."""
    file = write(tmp_path / "en-de.tsv", "\ufeffone\teins\n\ufefftwo\tzwei\n")
    assert [sides for _, *sides in data.read_pairs(file, {})] == [["one", "eins"], ["two", "zwei"]]


def test_sts_files(tmp_path):
    write(tmp_path / "STS.en-de.txt", "a\tb\t0\nc\td\t5.0\n")
    write(tmp_path / "stsb-dev.txt", "no pair of languages")
    sets = data.read_sts(tmp_path)
    assert list(sets) == ["en-de"] and sets["en-de"][2].tolist() == [0, 5]
    for bad in ("a\tb\t5.1", "a\tb\tnan", "a\tb", "a\t\t3", "a\tb\tx", ""):
        write(tmp_path / "STS.en-de.txt", f"a\tb\t1\n{bad}\nc\td\t2\n")
        with pytest.raises(M.InputError, match="STS.en-de.txt:2"):
            data.read_sts(tmp_path)
    write(tmp_path / "STS.en-de.txt", "a\tb\t1\nc\td\t1.0\n")
    with pytest.raises(M.InputError, match="STS.en-de.txt: 2 lines of one score"):
        data.read_sts(tmp_path)
    (tmp_path / "STS.en-de.txt").rename(tmp_path / "._STS.en-de.txt")  # as macOS leaves them
    for folder, why in ((tmp_path, "no similarity sets"), (tmp_path / "nowhere", "no such folder")):
        with pytest.raises(M.InputError, match=why):
            data.read_sts(folder)
