"""Finished models in use: the commands, search and its store."""

import glob
import io
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import model as M
from test_msd import HERE, apart, run, tiny, write
from tools import __main__ as command
from tools import search as searching
from tools.checkpoints import fingerprint


def test_main_of_the_tools_uses_a_model(world, finished, tmp_path, capsys):
    student = world / "whole" / "student"

    def model_py(*args):
        capsys.readouterr()
        command.main([str(a) for a in args])
        return capsys.readouterr().out

    assert -1 <= float(model_py("similarity", student, "red old", "der alte")) <= 1
    lines = write(tmp_path / "lines", "red old\nblue new\n")
    encode = [sys.executable, "-m", "tools", "encode", student, "--dtype", "float32"]
    with open(lines, "rb") as f:
        done = subprocess.run([str(a) for a in encode], stdin=f, capture_output=True)
    if Path("/dev/full").exists():
        with open("/dev/full", "wb") as full, open(lines, "rb") as f:
            end = subprocess.run([str(a) for a in encode], stdin=f, stdout=full, stderr=-1)
        assert end.returncode == 2 and end.stderr.startswith(b"error: [Errno 28] No space left")
    (tmp_path / "v.npy").write_bytes(done.stdout)
    want = M.load(student, "float32").encode(["red old", "blue new"])
    assert np.array_equal(np.load(tmp_path / "v.npy"), want)
    assert model_py("search", student, lines, "blue new", "--top", "1").startswith(
        "1.0000\t2\tblue new"
    )
    assert model_py("similarity", student, "red\u200cold", "red old")  # Persian joins words so
    with pytest.raises(M.InputError, match="without control characters"):
        model_py("similarity", student, "red\x1bold", "red old")
    assert "total" in model_py("--dtype", "float32", "info", student)
    with pytest.raises(M.InputError, match=r"nowhere: cannot read \(No such file or directory\)$"):
        model_py("search", student, "nowhere", "red")
    gone = run([sys.executable, "-m", "tools", "info", tmp_path / "nowhere"])
    assert gone.returncode == 2 and "no such model directory" in gone.stderr
    assert gone.stderr.count("\n") == 1


@pytest.fixture
def search(tokenizer, tmp_path, capsys, monkeypatch):
    """Runs the command beside a corpus and two models: what it prints. search.seen: what it loads
    and encodes."""
    for seed, name in enumerate(("small", "large")):
        tiny(tokenizer, seed).save(tmp_path / name)
    write(tmp_path / "corpus.txt", "red old\nblue new\ntwo dogs run\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(searching.blocks, "__defaults__", (2,))  # rows: three lines are two blocks

    def spy(where, name):
        real = getattr(where, name)
        call = lambda *a, **k: (run.seen.append(a[where is M.Encoder]), real(*a, **k))[1]
        monkeypatch.setattr(where, name, call)

    def run(*args, model="small", corpus="corpus.txt", typed=b"", terminal=False):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed), "utf-8"))
        sys.stdin.isatty = lambda: terminal
        data.note.cache_clear()
        capsys.readouterr()
        run.seen = []
        command.main(["search", model, corpus, *args])
        return capsys.readouterr()

    spy(command, "load")
    spy(searching, "load")
    spy(M.Encoder, "encode")
    return run


def stored():
    return sorted(map(str, Path().glob(".*.vectors")))


def test_search_stores_the_corpus(search, tokenizer):
    first = search("blue new")
    assert first.out.splitlines()[0] == "1.0000\t2\tblue new"
    (file,) = stored()
    vectors = M.read_safetensors(file)[0]["vectors"]
    want = M.load("small").encode(["red old", "blue new", "two dogs run"])
    assert re.fullmatch(r"\.corpus\.txt\.\w+\.vectors", file) and file in first.err
    assert vectors.dtype == torch.float16 and apart(vectors, M.unit(want)) < 1e-3
    assert search("--top", "1", "blue new").out == first.out.splitlines(True)[0]
    again = search("blue new")
    assert again.out == first.out and not again.err and search.seen == ["small", "blue new"]
    before = Path(file).read_bytes()
    write(Path("corpus.txt"), "red old\nblue old\ntwo dogs run\n")
    search("blue new")
    assert stored() == [file] and Path(file).read_bytes() != before  # the old is of no more use
    data.delete(Path("small"))
    tiny(tokenizer, 2).save("small")
    search("blue new")
    assert len(stored()) == 2 and file in stored()


def test_search_replaces_the_vectors_of_another_corpus(search):
    search("blue new")
    (file,) = stored()
    shutil.copy(file, "old")
    write(Path("corpus.txt"), "blue new\nblue old\ntwo dogs run\n")
    want = search("blue new").out
    assert want.startswith("1.0000\t1\tblue new")
    shutil.copy("old", file)  # by its form alone it would do
    assert search("blue new").out == want and stored() == [file]
    assert search("blue new").out == want and search.seen == ["small", "blue new"]


def test_search_stores_beside_what_others_read(search):
    """A corpus in a model's folder, or among training files: the store is no part of these."""
    shutil.copy("corpus.txt", "small/corpus.txt")
    before = fingerprint("small")
    want = search("blue new", corpus="small/corpus.txt")
    again = search("blue new", corpus="small/corpus.txt")
    assert fingerprint("small") == before and "stored" in want.err
    assert again.out == want.out and search.seen == ["small", "blue new"]
    assert glob.glob("small/*corpus*") == ["small/corpus.txt"]


def changed(**change):
    """Stored vectors that are not what was stored: another dtype, other rows, a value."""

    def damage(file):
        tensors, meta = M.read_safetensors(file)
        v = tensors["vectors"].clone()
        v[-1, 0] = change.get("value", v[-1, 0])
        v = v.to(change.get("dtype", v.dtype))[change.get("rows", slice(None))]
        M.write_safetensors(file, {change.get("name", "vectors"): v}, meta)

    return damage


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: write(f, f.read_bytes()[:-5]), "truncated"),
        (lambda f: write(f, f.read_bytes()[:50]), "too short for its header"),
        (lambda f: write(f, b""), "empty file"),
        (lambda f: write(f, "red old\n"), "too short for its header"),
        (lambda f: np.savez(open(f, "wb"), x=np.zeros(3)), "too short for its header"),
        (changed(name="rows"), "vectors"),
        (changed(dtype=torch.float32), r"float32 \(3, 32\)"),
        (changed(rows=slice(2)), r"float16 \(2, 32\)"),
        (changed(rows=(slice(None), slice(9))), r"float16 \(3, 9\)"),
        (changed(value=math.nan), "unit"),
        (changed(value=math.inf), "unit"),
        (changed(value=2), "unit"),
    ],
)
def test_search_refuses_a_damaged_store(search, damage, message):
    search("blue new")
    (file,) = stored()
    damage(Path(file))
    with pytest.raises(
        M.InputError, match=rf"^{file}: not float16 \(3, 32\): .*{message}.*delete it$"
    ):
        search("blue new")
    assert stored() == [file]


def test_search_without_a_store(search):
    want = search("blue new").out
    shutil.copy("corpus.txt", name := "x" * 240)  # its vectors' name is too long for a file
    got = search("blue new", corpus=name)
    assert got.out == want and "not stored" in got.err and "cannot write" in got.err
    got = search("blue new", corpus="-", typed=Path("corpus.txt").read_bytes())
    assert got.out == want and not got.err and len(stored()) == 1
    with pytest.raises(M.InputError, match="needs a query"):
        search(corpus="-")


def test_search_leaves_out_blank_lines(search):
    want = search("blue new").out.replace("\t3\t", "\t6\t").replace("\t2\t", "\t4\t")
    write(Path("corpus.txt"), "red old\n\n \t\nblue new\n\ntwo dogs run\n\n")
    assert search("blue new").out == want and want.count("\n") == 3


def test_search_reads_queries(search):
    want = "".join(search(q).out + "\n" for q in ("blue new", "two dogs"))
    got = search(typed=b"\xef\xbb\xbfblue new\r\n\n  \ntwo dogs", terminal=True)
    assert got.out == want and "Ctrl-D" in got.err and search.seen[0] == "small"
    assert not search(typed=b"\n").out
    got = search(typed=b"caf\xe9\nblue new\ntwo dogs\n")  # a bad line ends nothing
    assert got.out == "\n" + want and re.fullmatch("error: .*whole characters\n", got.err)
    args = [sys.executable, "-m", "tools", "search", "small", "corpus.txt", "--top", "1"]
    where = {**os.environ, "PYTHONPATH": str(HERE)}
    with subprocess.Popen(args, stdin=-1, stdout=-1, text=True, env=where) as process:
        for query in ("blue new", "two dogs run"):  # each answer comes before the next question
            print(query, file=process.stdin, flush=True)
            assert query in process.stdout.readline() and process.stdout.readline() == "\n"


def test_search_by_a_larger_model(search, tokenizer):
    got = search("blue new", "--index", "large").out
    small, large = M.load("small"), M.load("large")
    cos = M.unit(large.encode(["red old", "blue new", "two dogs run"])) @ M.unit(
        small.encode("blue new")
    )
    assert [float(x[:6]) for x in got.splitlines()] == pytest.approx(sorted(cos)[::-1], abs=1e-3)
    assert search("blue new", "--index", "large").out == got and search.seen == [
        "small",
        "blue new",
    ]
    search("blue new", model="large")
    assert len(stored()) == 1  # the same vectors
    shutil.copytree("small", "twin")
    assert search("red", "--index", "twin").out == search("red").out and len(stored()) == 2
    tiny(tokenizer, hidden_size=16).save("narrow")
    for known in (False, True):
        with pytest.raises(M.InputError, match=".*narrow.* models of one width") as e:
            search("red", "--index", "narrow")
        assert re.search(r"small\b.*16|16.*small\b", str(e.value)) and "\n" not in str(e.value)
        assert len(stored()) == 2 + known
        search("red", model="narrow")
