"""Damaged and hostile files: refused by name, and nothing half-written stays."""

import gzip
import json
import os
import platform
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import model as M
from test_msd import HERE, tiny, write
from tools import checkpoints


def test_atomic_folder_that_appears_at_the_last_moment(tmp_path, monkeypatch):
    """The faster process is taken, whenever it comes; another machine's half is left alone."""
    other = write(tmp_path / f".x.tmp-{data.digest(platform.node())}@999999999", "half")
    real = os.replace

    def late(old, new):
        write(Path(new) / "whole", "theirs")
        real(old, new)

    monkeypatch.setattr(os, "replace", late)
    with data.atomic(tmp_path / "x") as tmp:
        write(tmp / "whole", "ours")
    assert (tmp_path / "x" / "whole").read_text() == "theirs" and other.exists()
    assert {f.name for f in tmp_path.iterdir()} == {"x", other.name}


def test_atomic_takes_away_what_its_number_left(tmp_path):
    """A container that starts again counts its processes from the start."""
    left = write(tmp_path / f".x.tmp-{data.place()}@{os.getpid()}" / "half", "half").parent
    with data.atomic(tmp_path / "x") as tmp:
        assert tmp == left and not left.exists()
        write(tmp / "whole", "ours")
    assert [f.name for f in tmp_path.iterdir()] == ["x"]


def test_atomic_leaves_what_a_living_process_is_writing(tmp_path):
    """Process 1 lives; a number beyond the largest there can be does not."""
    prefix = f".x.tmp-{data.place()}@"
    alive = [write(tmp_path / f"{prefix}1{end}", "theirs") for end in ("", ".new")]
    dead = [write(tmp_path / f"{prefix}{2**40}{end}", "left") for end in ("", ".new")]
    with data.atomic(tmp_path / "x") as tmp:
        write(tmp, "ours")
    assert all(f.exists() for f in alive) and not any(f.exists() for f in dead)


def test_atomic_closed_pipe_is_no_full_disk(tmp_path):
    with pytest.raises(BrokenPipeError), data.atomic(tmp_path / "x"):
        raise BrokenPipeError
    assert not list(tmp_path.iterdir())


def test_atomic_full_disk_keeps_the_last_good_file(tmp_path, tokenizer):
    """RLIMIT_FSIZE stands in for a full disk: a clear message, and what was there stays whole."""
    code = f"""
import resource, signal, sys, torch
sys.path.insert(0, {str(HERE)!r})
import data, model as M
file = {str(tmp_path / "x.safetensors")!r}
M.write_safetensors(file, {{"a": torch.ones(10)}})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50000, 50000))
try:
    with data.atomic(file) as tmp:
        M.write_safetensors(tmp, {{"a": torch.ones(100000)}})
except M.InputError as e:
    print(e)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "cannot write" in done.stdout and "nothing there was changed" in done.stdout
    assert (
        M.read_safetensors(tmp_path / "x.safetensors")[0]["a"].tolist() == [1] * 10
        and len(list(tmp_path.iterdir())) == 1
    )


def raw_safetensors(header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "cannot mmap an empty file"),
        (b"\0" * 4, "too short"),
        ((99).to_bytes(8, "little") + b"{}", "truncated or damaged"),
        ((2**63).to_bytes(8, "little") + b"{}", "truncated or damaged"),
        (raw_safetensors(b"{nope"), "Expecting property name"),
        (raw_safetensors(b"[" * 100000), "recursion depth"),
        (raw_safetensors([1]), "no JSON object"),
        (raw_safetensors({"a": ENTRY}, b"1234"), "in 4 bytes .* truncated"),
        (raw_safetensors({"a": ENTRY}, b"x" * 12), "end at byte"),
        (raw_safetensors({"a": {**ENTRY, "shape": [3]}}, b"x" * 8), "of another size"),
        (raw_safetensors({"a": {**ENTRY, "dtype": "F8"}}, b"x" * 8), "'dtype': 'F8'"),
        (raw_safetensors({"a": {**ENTRY, "shape": [-2]}}, b"x" * 8), "shape"),
        (raw_safetensors({"a": {**ENTRY, "shape": [True, 2]}}, b"x" * 8), "shape"),
        (raw_safetensors({"a": ENTRY, "b": ENTRY}, b"x" * 8), "overlap"),
        (raw_safetensors({"a": {**ENTRY, "data_offsets": [4, 12]}}, b"x" * 12), "hole"),
        (raw_safetensors({"a": {**ENTRY, "data_offsets": [8, 0]}}, b"x" * 8), "of another size"),
        (raw_safetensors({"a": {"dtype": "F32"}}), "data_offsets"),
        (
            raw_safetensors(
                b'{"a":'
                + json.dumps(ENTRY).encode()
                + b',"a":'
                + json.dumps({**ENTRY, "data_offsets": [8, 16]}).encode()
                + b"}",
                b"x" * 16,
            ),
            "hole",
        ),
    ],
)
def test_read_safetensors_refuses(tmp_path, content, reason):
    file = write(tmp_path / "x.safetensors", content)
    with pytest.raises(M.InputError, match=reason) as e:
        M.read_safetensors(file)
    assert str(file) in str(e.value)


def test_read_safetensors_fuzz(tmp_path):
    """10,000 mutations: an InputError, or tensors whose bytes are those the header points to."""
    file, rng = tmp_path / "x.safetensors", random.Random(0)
    M.write_safetensors(
        file,
        {
            "w": torch.randn(3, 4),
            "b": torch.arange(5, dtype=torch.int16),
            "h": torch.randn(2).bfloat16(),
        },
    )
    good, refused = file.read_bytes(), 0
    for _ in range(10000):
        raw = mutate(rng, good)
        write(file, raw)
        try:
            tensors, _ = M.read_safetensors(file)
        except M.InputError:
            refused += 1
            continue
        n = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + n])
        for k, t in tensors.items():
            a, b = header[k]["data_offsets"]
            assert (
                t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                == raw[8 + n + a : 8 + n + b]
            )
            assert list(t.shape) == header[k]["shape"] and t.dtype == M.DTYPES[header[k]["dtype"]]
    assert 3000 < refused < 10000


def mutate(rng, raw):
    raw = bytearray(raw)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(max(1, len(raw)))
        kind = rng.randrange(5)
        if kind == 0 and raw:
            raw[at % len(raw)] = rng.randrange(256)
        elif kind == 1:
            del raw[at : at + rng.randint(1, 20)]
        elif kind == 2:
            raw[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 9)))
        elif kind == 3:
            raw[at:at] = raw[at : at + rng.randint(1, 40)]
        else:
            raw[at : at + 1] = rng.choice(
                [b"0", b"9", b"-", b'"', b"}", b"\t", b"\n", b"null", b"1e99", b"\xff"]
            )
    return bytes(raw)


def test_read_pairs_and_read_sts_fuzz(tmp_path):
    """Mutated pair files, gzip files and similarity sets: InputError or a correct reading."""
    rng = random.Random(1)
    lines = "".join(f"sentence {i}\tSatz {i}\t{i % 6}\n" for i in range(30)).encode()
    pairs = "".join(f"sentence {i}\tSatz {i}\n" for i in range(200)).encode()
    outcomes = [0, 0]
    (tmp_path / "sts").mkdir()
    for i in range(3000):
        kind = i % 3
        try:
            if kind < 2:
                source = mutate(rng, pairs if kind == 0 else gzip.compress(pairs, 1))
                r = {}
                kept = list(data.read_pairs(write(tmp_path / "en-de.tsv", source), r))
                assert r["lines"] == r["kept"] + r["long"] + r["blank"] + r["header"] + sum(
                    r["bad"].values()
                ) and r["kept"] == len(kept)
                assert all(a and b and "\t" not in a + b for _, a, b in kept)
            else:
                write(tmp_path / "sts" / "STS.en-de.txt", mutate(rng, lines))
                a, b, scores = data.read_sts(tmp_path / "sts")["en-de"]
                assert len(a) == len(b) == len(scores) and scores.min() >= 0 and scores.max() <= 5
            outcomes[0] += 1
        except M.InputError:
            outcomes[1] += 1
    assert min(outcomes) > 400


@pytest.mark.parametrize("load", [M.load, checkpoints.load])
def test_load_config_fuzz(tmp_path, tokenizer, load):
    """1,000 mutated config.json: InputError, or the model with the shape of its weights."""
    rng, outcomes = random.Random(2), [0, 0]
    tiny(tokenizer).save(tmp_path / "m")
    config = (tmp_path / "m" / "config.json").read_bytes()
    for _ in range(1000):
        write(tmp_path / "m" / "config.json", mutate(rng, config))
        try:
            c = load(tmp_path / "m", "float32").config
            assert (c.vocab_size, c.hidden_size) == (tokenizer.get_vocab_size(), 32)
            assert c.num_hidden_layers == 4 and c.pooling in M.POOLINGS
            outcomes[0] += 1
        except M.InputError:
            outcomes[1] += 1
    assert min(outcomes) > 50


def test_build_corpus_by_two_builders(tmp_path, monkeypatch):
    """Runs side by side share a cache: the slower builder of an entry takes the faster one's."""
    file, cache = write(tmp_path / "en-de.tsv", "a man\tein Mann\n"), tmp_path / "cache"
    real = data._write_corpus

    def slow(*args):
        monkeypatch.setattr(data, "_write_corpus", real)
        monkeypatch.setattr(os, "getpid", lambda: 1)  # in the meantime, another process
        first.append(data.build_corpus([file], cache))
        real(*args)

    first = []
    monkeypatch.setattr(data, "_write_corpus", slow)
    second = data.build_corpus([file], cache)
    assert second.texts([0, 1]) == first[0].texts([0, 1])
    assert not list(cache.glob(".*"))


def test_open_array_names_a_damaged_cache(tmp_path, tokenizer):
    file = write(tmp_path / "en-de.tsv", "one\teins\ntwo\tzwei\n")
    c, m = data.build_corpus([file], tmp_path / "cache"), tiny(tokenizer)
    data.vectors(c, np.arange(2), m, "x", tmp_path / "cache")
    shorter = tiny(tokenizer, max_seq_length=3)
    data.vectors(c, np.arange(2), shorter, "x", tmp_path / "cache")
    stored = list((tmp_path / "cache").glob("vectors-*"))
    assert len(stored) == 2  # another length, other targets
    m.tokenizer.enable_truncation(48)
    for victim in (*stored, c.folder / "pairs.npy"):
        write(victim, victim.read_bytes()[:90])
    for call in (
        lambda: data.vectors(c, np.arange(2), m, "x", tmp_path / "cache"),
        lambda: data.build_corpus([file], tmp_path / "cache"),
    ):
        with pytest.raises(M.InputError, match="not a whole cache entry.* delete"):
            call()
    data.delete(c.folder)
    write(data.build_corpus([file], tmp_path / "cache").folder / "report.json", "")
    with pytest.raises(M.InputError, match="corpus-.*report.json: not readable as JSON.*; delete"):
        data.Corpus(c.folder)
