"""Tests: hermetic and quick.

Those that compare with outside numbers skip, with a reason, where those are absent. Here: the
losses, how models begin, the encoder, text, evaluation, a run. tests/test_training.py: the loop and
what each stage gets. audit/: what would happen if a line of the method were wrong.

python -m pytest -q: these, and those in tests/
"""

import functools
import gzip
import json
import math
import os
import pkgutil
import random
import re
import subprocess
import sys
import tempfile
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

import data
import model as M
import msd
import train
from audit import mutations
from demo import corpus as demo
from tools import checkpoints, evaluation
from tools.export import narrow

HERE = Path(__file__).parent
os.environ["OMP_NUM_THREADS"] = "1"  # of the commands started here; the same bits need as many
torch.set_num_threads(1)
GPUS = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same bits on every machine: on the CPU, but for one
SHARED = HERE.parent / "shared"
PARITY = [
    pytest.param(
        k,
        marks=pytest.mark.skipif(
            not (SHARED / "parity" / k).exists(), reason="no shared/parity beside the checkout"
        ),
    )
    for k in ("xlmr", "minilm")
]
# machines
CASES = SHARED / "cases"
needs_cases = pytest.mark.skipif(not CASES.exists(), reason="no shared/cases beside the checkout")
TEXTS = [
    "A man reads a book.",
    "Ein Mann liest ein Buch im Park.",
    "two dogs run",
    "",
    "رجل متعب يقرأ كتابا",
    "e\u0301 👩‍🚀 " * 9,
    "x" * 3000,
]


# The fixtures are made once, here and for tests/ (its conftest.py), hence the caches.
@pytest.fixture(scope="session")
@functools.cache
def tokenizer():
    texts = [
        line
        for p in (demo.DEMO / f"{x}.txt" for x in ("en", "de", "tr", "ar"))
        for line in p.read_text("utf-8").splitlines()
    ]
    return data.train_tokenizer(texts, 500, lower_case=True)


def tiny(tokenizer, seed=0, std=0.3, **changes):
    """A small random encoder; large weights make every part of it matter."""
    config = M.Config(
        tokenizer.get_vocab_size(),
        32,
        4,
        4,
        48,
        66,
        type_vocab_size=2,
        pad_token_id=1,
        max_seq_length=48,
    )
    return msd.init_weights(
        M.Encoder(replace(config, **changes), tokenizer), torch.Generator().manual_seed(seed), std
    )


@torch.no_grad()
def rough(m):
    """The same encoder with no bias at 0 and no LayerNorm at identity, each its own."""
    generator = torch.Generator().manual_seed(9)
    for name, p in m.named_parameters():
        if name.endswith("bias") or "norm" in name:
            p += 0.3 * torch.randn(p.shape, generator=generator)
    return m


def batch(encoder, texts):
    return encoder.batch(*encoder.tokenize(texts), np.arange(len(texts)))


def write(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


apart = lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max()


def tsv(folder, n=120):
    """A tiny corpus in the wild's format."""
    words = "red blue green old new small big fast slow warm".split()
    rng, rows = random.Random(0), {}
    while len(rows) < n:
        pick = [rng.choice(words) for _ in range(4)]
        rows[" ".join(pick)] = " ".join(w[::-1] for w in pick)
    folder.mkdir(exist_ok=True)
    write(folder / "en-de.tsv", "".join(f"{a}\t{b}\n" for a, b in rows.items()))
    held_out = (f"{a} {b}\t{b[::-1]}\n" for a, b in [*zip(words, words[1:])][:8])
    write(folder / "dev" / "en-de.tsv", "".join(held_out))
    write(
        folder / "sts" / "STS.en-de.txt",
        "".join(f"{a}\t{b}\t{i % 6}\n" for i, (a, b) in enumerate(list(rows.items())[:20])),
    )
    return folder


def token_at(tokenizer, token, row):
    """The same tokenizer with a special token of its own at another id."""
    raw = json.loads(tokenizer.to_str())
    model, old = raw["model"], tokenizer.token_to_id(token)
    vocab = model["vocab"]
    if isinstance(vocab, list):  # Unigram's
        vocab[old], vocab[row] = vocab[row], vocab[old]
        model["unk_id"] = row if model["unk_id"] == old else model["unk_id"]
    else:
        vocab[tokenizer.id_to_token(row)], vocab[token] = old, row
    next(t for t in raw["added_tokens"] if t["content"] == token)["id"] = row
    return tokenizers.Tokenizer.from_str(json.dumps(raw))


def pad_at(tokenizer, row):
    return token_at(tokenizer, "<pad>", row) if row != 1 else tokenizer


TEMPORARY = tempfile.TemporaryDirectory()  # of the fixtures; goes with the process


@functools.cache
def make_world(tokenizer):
    root = Path(TEMPORARY.name, "world")
    root.mkdir()
    tsv(root / "d")
    tiny(tokenizer, std=0.1).save(root / "teacher")
    return root


@pytest.fixture(scope="session")
def world(tokenizer):
    return make_world(tokenizer)


def command(world, out, *more, script=HERE / "train.py"):
    d = world / "d"
    usual = {
        "--teacher": world / "teacher",
        "--train": d / "en-*.tsv",
        "--dev": d / "dev" / "en-de.tsv",
    }
    usual |= {"--sts": d / "sts", "--preset": "demo"}
    data_flags = [x for flag in usual.items() if flag[0] not in more for x in flag]
    sizes = "--epochs 2 --batch 16 --vocab 200 --bottleneck 8 --dropout 0.1".split()
    place = ["--out", out, "--cache", world / "cache"]
    return [str(a) for a in (sys.executable, script, *data_flags, *sizes, *place, *more)]


def run(args, **environment):
    return subprocess.run(
        [str(a) for a in args], capture_output=True, text=True, env={**os.environ, **environment}
    )


def run_here(capsys, args):
    """What a command prints, run in this process: importing torch anew takes longer."""
    capsys.readouterr()
    train.main([str(a) for a in args[2:]])
    return capsys.readouterr().out


def script(path, body):
    return write(
        path,
        f"import os, signal, sys\nsys.path.insert(0, {str(HERE)!r})\nimport model as M, train\n"
        f"from tools.cli import run_cli\n{body}\nrun_cli(train.main)\n",
    )


def torchrun(args, n=2):
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={n}",
        *args[1:],
    ]


@pytest.fixture(scope="session")
@functools.cache
def finished(world):
    done = run(command(world, world / "whole", "--keep"))
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---------------------------------------------------------------------- msd: the losses, the stages
def random64(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def cosine(a, b):
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def is_its_gradient(f, *given):
    """The gradient of f by each of its arguments is that of finite differences, in float64."""
    return torch.autograd.gradcheck(f, [x.detach().clone().requires_grad_() for x in given])


def test_mse_against_loops():
    x, y = random64(5, 7), random64(5, 7, seed=1)
    want = sum((x[i, d] - y[i, d]) ** 2 for i in range(5) for d in range(7)) / 35
    assert float(msd.mse(x, y)) == pytest.approx(float(want), rel=1e-12)
    assert is_its_gradient(msd.mse, x, y)


def test_cos_matrix_against_loops():
    x, y = random64(5, 7), random64(3, 7, seed=1)
    got = msd.cos_matrix(x, y)
    assert got.shape == (5, 3)
    assert got.flatten().tolist() == pytest.approx([cosine(a, b) for a in x for b in y], rel=1e-12)
    assert torch.equal(msd.cos_matrix(x * 0, y), torch.zeros_like(got))  # not nan
    assert is_its_gradient(msd.cos_matrix, x, y)


def plain_contrastive(s, t, teacher):
    n = range(len(s))
    gaps = (cosine(s[i], t[j]) - cosine(teacher[i], teacher[j]) for i in n for j in n)
    return sum(gap**2 for gap in gaps) / len(s) ** 2


def test_contrastive_against_loops():
    s, t, teacher = (random64(5, 7, seed=k) for k in range(3))
    got = msd.contrastive(s, t, teacher)
    assert float(got) == pytest.approx(plain_contrastive(s, t, teacher), rel=1e-12)
    assert is_its_gradient(msd.contrastive, s, t, teacher)
    assert float(msd.contrastive(s, 3 * s, s)) == pytest.approx(0, abs=1e-12)


def plain_stage_loss(stage, s, t, y_s, y_t, contrast=True):
    """The terms as the paper's table writes them, of vectors (N, H)."""
    mse = lambda x, y: float((x - y).square().sum()) / x.numel()
    terms = {"en": mse(s, y_s), "tr": mse(t, y_s if stage in (1, 4) else y_t)}
    return terms | ({"mcl": plain_contrastive(s, t, y_s)} if stage == 4 and contrast else {})


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_stage_loss_and_its_gradient(stage, gathered):
    """Every term, and the gradient of their sum, of an encoder that is two tables: one for the
    whole model, one for the embedding block alone. Gathered: the batch is larger than its share."""
    whole, block = random64(8, 7), random64(8, 7, seed=1)
    y_s, y_t = random64(4, 7, seed=2), random64(4, 7, seed=3)
    mix = random64(4, 4, seed=10) if gathered else torch.eye(4, dtype=torch.float64)
    gather = (lambda x: mix @ x) if gathered else None
    ids, mask = torch.arange(8)[:, None], torch.ones(8, 1).bool()

    def terms(whole, block, y_s, y_t, contrast=True):
        def model(ids, mask, embeddings_only=False):
            return (block if embeddings_only else whole)[ids[:, 0]]

        return msd.stage_loss(stage, model, ids, mask, y_s, y_t, contrast, gather)

    x = block if stage == 2 else whole
    for contrast in (True, False):
        want = plain_stage_loss(stage, mix @ x[:4], mix @ x[4:], y_s, y_t, contrast)
        got = terms(whole, block, y_s, y_t, contrast)
        assert list(got) == list(want)
        assert {k: float(v) for k, v in got.items()} == pytest.approx(want, rel=1e-12)
    assert list(terms(whole, block, y_s, None if stage in (1, 4) else y_t)) == list(
        plain_stage_loss(stage, x[:4], x[4:], y_s, y_t)
    )
    total = lambda *given: sum(terms(*given).values())
    assert is_its_gradient(total, whole, block, y_s, y_t)


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_stage_loss_moves_what_the_stage_trains(tokenizer, stage):
    """Of an encoder: both sides in one call are two calls, and each term alone moves the weights
    that the stage trains, and no others."""
    m = tiny(tokenizer, bottleneck_size=8 if stage > 1 else 0)
    y_s, y_t = torch.randn(3, 32), torch.randn(3, 32)
    terms = msd.stage_loss(stage, m, *batch(m, TEXTS[:6]), y_s, y_t)
    with torch.no_grad():
        sides = [batch(m, texts) for texts in (TEXTS[:3], TEXTS[3:6])]
        alone = [m(*side, embeddings_only=stage == 2) for side in sides]
    want = plain_stage_loss(stage, *alone, y_s, y_t)
    got = {k: float(v.detach()) for k, v in terms.items()}
    assert got == pytest.approx(want, rel=1e-5), "both sides in one call differ from two"
    for name, term in terms.items():
        m.zero_grad()
        term.backward(retain_graph=True)
        moved = {k for k, p in m.named_parameters() if p.grad is not None and p.grad.any()}
        assert any(k.startswith("embeddings.word") for k in moved), name
        assert any(k.startswith("layers.3") for k in moved) == (stage != 2), name


def test_stages_are_those_of_the_paper():
    """Targets, passes, pairs a step, lines of a file, and what is special: not one more mark."""
    stage = {"per_side": False, "embeddings_only": False, "contrast": False, "extra": False}
    names = ("title", "targets", "epochs", "batch", "max_lines")
    rows = (
        (("teaching assistant", "teacher", 20, 64, 500_000), ()),
        (("align", "assistant", 10, 128, 300_000), ("per_side", "embeddings_only", "extra")),
        (("distil", "assistant", 10, 64, 300_000), ("per_side", "extra")),
        (("multilingual contrastive learning", "teacher", 60, 64, 500_000), ("contrast",)),
    )
    want = [stage | dict(zip(names, row)) | dict.fromkeys(marks, True) for row, marks in rows]
    assert [*msd.STAGES] == [1, 2, 3, 4] and [*map(vars, msd.STAGES.values())] == want
    for row in (msd.STAGES[1], msd.PRESETS["demo"]):  # nothing changes them in a run
        with pytest.raises(FrozenInstanceError):
            row.extra = True


@pytest.mark.parametrize("kind", PARITY)
def test_stage_loss_equals_the_authors(kind, tmp_path):
    """Embeddings, every loss term and every gradient of the authors' code, through this project's
    public functions."""
    root = SHARED / "parity" / kind
    fixture, want = json.loads((root / "fixture.json").read_text()), np.load(root / "expected.npz")
    # Their student directory: the assistant's files, with the student's weights in place of
    # the assistant's.
    for file in (root / "assistant").rglob("*.json"):
        write(tmp_path / file.relative_to(root / "assistant"), file.read_bytes())
    write(tmp_path / "model.safetensors", (root / "student.safetensors").read_bytes())
    A = checkpoints.load(root / "assistant", "float32", train=True)
    S = checkpoints.load(tmp_path, "float32", train=True)
    sizes = fixture["bottleneck_size"], fixture["student_layers"], fixture["recurrence"]
    c = S.config
    assert (c.bottleneck_size, c.num_hidden_layers, c.recurrence) == sizes
    bare = msd.make_student(A, 0, range(1, sizes[1] + 1), sizes[2])
    bare.train()
    texts = {"en": fixture["texts_en"], "mul": fixture["texts_mul"]}
    sides = {k: batch(A, v) for k, v in texts.items()}
    for k, (ids, mask) in sides.items():
        assert np.array_equal(ids, want[f"{k}_input_ids"])
        assert np.array_equal(mask, want[f"{k}_attention_mask"])
        for name, m, embeddings_only in (
            ("assistant", A, False),
            ("student", S, False),
            ("assistant_embedding", A, True),
            ("stage2/student", S, True),
        ):
            ours = m.embed(*m.tokenize(texts[k]), embeddings_only)
            assert np.abs(ours - want[f"{name}/{k}"]).max() < 1e-5, name
    pad_row_frozen = fixture["pad_token_id_in_embedding"] == 0
    for stage, key, m, source in (
        (1, "stage1", A, "teacher"),
        (2, "stage2", S, "assistant_embedding"),
        (3, "stage3", S, "assistant"),
        (4, "stage4", S, "teacher"),
        (3, "stage3_no_bottleneck", bare, "assistant"),
    ):
        both = batch(A, texts["en"] + texts["mul"])
        losses_and_gradients_are(want, stage, key, m, source, both, pad_row_frozen)


def losses_and_gradients_are(want, stage, key, m, source, both, pad_row_frozen):
    """A stage's loss terms, and their gradient by each weight, against the authors' numbers."""
    get = lambda name: torch.tensor(want[name])
    targets = ["teacher"] if source == "teacher" else [f"{source}/en", f"{source}/mul"]
    m.zero_grad()
    terms = msd.stage_loss(stage, m, *both, *map(get, targets))
    total = sum(terms.values())
    total.backward()
    named = {"total_loss": total, "en_loss": terms["en"], "mul_loss": terms["tr"]}
    named |= {"ce_loss": terms["mcl"]} if stage == 4 else {}
    for name, value in named.items():
        theirs = float(want[f"{key}/{name}"])
        assert value.item() == pytest.approx(theirs, rel=1e-5), (key, name)
    grads = M.to_hf({k: p.grad for k, p in m.named_parameters() if p.grad is not None})
    expected = {k.split("grad/")[1]: get(k) for k in want.files if k.startswith(f"{key}/grad/")}
    assert set(expected) == set(grads), key
    tables = ("word_embeddings.weight", "position_embeddings.weight")
    for name, theirs in expected.items():
        ours = grads[name].clone()
        if pad_row_frozen and name.endswith(tables) and theirs[0].abs().sum() == 0:
            ours[0] = 0  # they freeze row 0, by accident: see the README's deviations
        if name.endswith("key.bias"):  # exactly zero in theory: softmax ignores a constant
            assert ours.norm() < 1e-6 and theirs.norm() < 1e-6
        else:
            assert (ours - theirs).norm() <= 1e-4 * theirs.norm(), (key, name)


def test_presets_are_the_papers():
    """The authors' configuration, literally, but the bottleneck's start."""
    xlmr, minilm, demo_ = (vars(msd.PRESETS[k]) for k in ("xlmr", "minilm", "demo"))
    usual = {
        "epochs": (20, 10, 10, 60),
        "max_lines": (500_000, 300_000, 300_000, 500_000),
        "init": "text",
        "dropout": 0.1,
        "max_tokens": 128,
        "max_chars": 250,
        "vocab": 32_000,
        "bottleneck": 128,
    }
    assert xlmr == usual | {
        "layers": (1, 2, 3),
        "recurrence": 4,
        "lr": (16e-5, 16e-5, 8e-5, 16e-5),
        "batch": (64, 128, 64, 64),
    }
    assert minilm == usual | {
        "layers": (1, 2, 3, 4, 5, 6),
        "recurrence": 2,
        "lr": (16e-5,) * 4,
        "batch": (64, 256, 64, 64),
    }
    assert demo_ == usual | {  # sized to train in minutes; see results/
        "bottleneck": 12,
        "layers": (1, 2),
        "recurrence": 2,
        "lr": (2e-3, 4e-3, 2e-3, 2e-3),
        "batch": (64, 128, 64, 64),
        "epochs": (0.25, 1, 0.12, 0.18),
        "dropout": 0,
        "vocab": 4000,
    }
    assert (msd.WARMUP, msd.WEIGHT_DECAY, msd.ADAM_EPS, msd.CLIP) == (0.1, 0.01, 1e-6, 1.0)
    assert msd.ALIGNED_PAIRS == 300_000
    for name in ("lr", "batch", "epochs", "max_lines"):  # a fifth stage is a fifth value
        for n in (3, 5):
            with pytest.raises(M.InputError, match=f"{name}=.*: expected 4 values, one a stage"):
                replace(msd.PRESETS["demo"], **{name: (1,) * n})


def test_parse_fills_in_the_preset():
    flags = ["--train", "x", "--teacher", "y"]
    for name, p in msd.PRESETS.items():
        args = train.parse(["--preset", name, *flags])
        assert {k: getattr(args, k) for k in vars(p)} == vars(p)
        assert (args.stages, args.seed, args.no_contrast) == ([1, 2, 3, 4], 0, False)
    assert train.parse(flags).preset == "minilm" and train.parse([]).preset == "demo"
    given = "--lr 1,2,3,4 --batch 7 --epochs 0.5 --layers 2,4 --recurrence 5 --dropout 0".split()
    args = train.parse(["--preset", "xlmr", *flags, *given])
    assert (args.lr, args.batch, args.epochs) == ((1, 2, 3, 4), (7,) * 4, (0.5,) * 4)
    assert (args.layers, args.recurrence, args.dropout) == ((2, 4), 5, 0)
    full = train.parse(["--preset", "xlmr", "--bottleneck", "0", *flags])
    assert (full.stages, full.lr) == ([1, 3, 4], (16e-5,) * 4)  # only with one is stage 3's halved
    own = ["--preset", "xlmr", "--bottleneck", "0", "--lr", "1,2,3,4", *flags]
    assert train.parse(own).lr == (1, 2, 3, 4)


# -------------------------------------------------------- msd: how a student and an assistant begin
def same(one, two):
    """Have two modules the same weights, to the bit?"""
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def test_init_weights_by_hand(tokenizer):
    """Normal(0, std) in matrices and tables, from the generator alone; LayerNorm at identity,
    biases and the pad row at 0."""
    new = lambda seed, *std: msd.init_weights(
        M.Encoder(tiny(tokenizer, pad_token_id=7).config, tokenizer),
        torch.Generator().manual_seed(seed),
        *std,
    )
    m, count = new(0), 0
    for name, p in m.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        elif p.numel() > 1000:
            assert 0.018 < p.std() < 0.022 and abs(p.mean()) < 0.003, name
            count += 1
    assert count == 18
    assert not m.embeddings.word.weight[7].any() and m.embeddings.word.weight[1].any()
    torch.manual_seed(5)
    assert same(m, new(0)) and not same(m, new(1))
    assert 0.27 < new(0, 0.3).layers[0].up.weight.std() < 0.33


def test_make_student_copies_its_layers(tokenizer):
    """In the paper the first K, else those by number, from 1; whatever the start; and the Dense
    module. A run of the layers is that of the assistant's."""
    A = rough(tiny(tokenizer, dense=((24, "tanh", True),), type_vocab_size=2, hidden_act="relu"))
    A.dtype = torch.bfloat16  # of the arithmetic
    for layers in ((1, 2), (1, 4), (4, 2), (3,)):
        for how in ({}, {"init": "paper"}, {"B": 0}):
            S = msd.make_student(A, **{"B": 8, "layers": layers, "R": 3, **how})
            want = replace(A.config, num_hidden_layers=len(layers), recurrence=3)
            assert S.config == replace(want, bottleneck_size=how.get("B", 8))
            assert all(
                same(mine, A.layers[k - 1]) for mine, k in zip(S.layers, layers, strict=True)
            )
            assert same(S.dense, A.dense) and S.tokenizer is A.tokenizer and S.dtype == A.dtype
    full = msd.make_student(A, 0, (1, 2, 3, 4), 1)
    assert same(full, A) and np.array_equal(full.encode(TEXTS), A.encode(TEXTS))
    for q in full.parameters():
        q.data.fill_(0)
    assert all(q.any() for q in A.parameters())  # copied, not shared


def test_make_student_starts_the_bottleneck_from_the_table(tokenizer):
    """Nothing of rank B is closer to the assistant's word table, rows weighted by count ** 3/4, or
    alike without counts; the map's columns are orthonormal; all else of the block is copied."""
    A = rough(tiny(tokenizer))
    E = A.embeddings.word.weight.detach()
    counts = 10000 // np.arange(1, len(E) + 1)
    table = lambda S: S.embeddings.word.weight @ S.embeddings.project.weight.T
    for given, weight in ((None, np.ones(len(E))), (counts, counts**0.75)):
        S = msd.make_student(A, 8, (1, 2), 3, counts=given)
        root = torch.tensor(weight**0.5, dtype=torch.float32)[:, None]
        tail = torch.linalg.svdvals(root * E)[8:].norm()  # Eckart and Young
        gap = (root * (table(S) - E)).norm()
        assert float(gap.detach()) == pytest.approx(float(tail), rel=1e-4)
        P = S.embeddings.project.weight.detach()
        assert torch.allclose(P.T @ P, torch.eye(8), atol=1e-5)
        for part in ("position", "token_type", "norm"):
            assert same(getattr(S.embeddings, part), getattr(A.embeddings, part))
    plain = msd.make_student(A, 8, (1, 2), 3)
    assert (root * (table(plain) - E)).norm() > 1.01 * tail


def test_make_student_starts_from_noise_as_the_paper(tokenizer):
    """The whole embedding block, by the seed alone; never the layers."""
    A = tiny(tokenizer)
    paper = "paper".encode().decode()  # equal, as a command line's, but not the same object
    one, two, other = (msd.make_student(A, 8, (1, 2), 3, paper, seed) for seed in (4, 4, 5))
    assert same(one, two) and not same(one, other)
    assert same(
        msd.make_student(A, 8, (1,), 1, "paper"), msd.make_student(A, 8, (1,), 1, "paper", 0)
    )
    e = one.embeddings
    for part in (e.word, e.project, e.position):
        assert 0.017 < part.weight.std() < 0.023
    assert not torch.equal(e.token_type.weight, A.embeddings.token_type.weight)
    assert (e.norm.weight == 1).all() and not e.norm.bias.any() and not e.word.weight[1].any()
    full = msd.make_student(A, 0, (1, 2), 3, "paper")  # without a bottleneck there is no noise
    assert same(full.embeddings, A.embeddings)


def test_check_sizes_at_their_bounds(tokenizer):
    c = tiny(tokenizer).config
    for good in ((8, (1, 4), 1), (31, (1,), 1), (0, (4,), 9)):
        msd.check_sizes(c, *good)
    with_one = replace(c, bottleneck_size=8)
    bad = (
        (c, 33, (1,), 1, "--bottleneck 33: expected"),
        (c, 8, (1, 5), 1, "--layers 5: expected 1 to 4"),
        (c, 8, (0, 1), 1, "--layers 1: expected 1 to 4"),
        (c, 8, (), 1, "--layers 0: expected 1 to 4"),
        (
            c,
            32,
            (1,),
            1,
            "--bottleneck 32: expected 0, for none, or up to 31, as hidden_size is 32",
        ),
        (c, -1, (1,), 1, "--bottleneck -1: expected"),
        (c, 8, (1, 2), 0, "--recurrence 0: expected 1 or more"),
        (with_one, 8, (1,), 1, "a model with a bottleneck is no assistant"),
    )
    for *given, message in bad:
        with pytest.raises(M.InputError, match=message):
            msd.check_sizes(*given)


def test_principal_directions_of_a_large_table():
    """Summed piece by piece: each row keeps its own weight."""
    E, counts = random64(40_000, 6).float(), np.arange(40_000) ** 2
    P = msd.principal_directions(E, 2, counts).double()
    root = torch.from_numpy(counts**0.375)[:, None]
    want = torch.linalg.svd(root * E.double(), full_matrices=False)[2][:2]
    assert torch.allclose((want @ P).svd()[1], torch.ones(2, dtype=torch.float64), atol=1e-6)


def test_principal_directions_of_a_damaged_table():
    with pytest.raises(M.InputError, match="word table is damaged: it is not finite"):
        msd.principal_directions(torch.full((9, 4), math.nan), 2)


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_make_assistant_starts_pieces_from_the_teachers(tokenizer, model_type):
    """Each at the mean of the teacher's pieces for its text, with the space before it; special
    tokens at the teacher's, the pad row at 0; the body is the teacher's."""
    own = tokenizer
    if model_type == "bert":  # whose special tokens have names of their own, and no piece for " "
        names = {"<s>": "[CLS]", "<pad>": "[PAD]", "</s>": "[SEP]", "<unk>": "[UNK]"}
        raw = library_tokenizer("WordPiece", TEXTS).to_str()
        raw = re.sub("<s>|<pad>|</s>|<unk>", lambda m: names[m[0]], raw)
        own = tokenizers.Tokenizer.from_str(raw)
    T = rough(tiny(own, model_type=model_type, normalize=True, prompt="q: "))
    T.embeddings.word.weight.data[1] = 5.0
    texts = ["a man reads a book", "ein Mann liest ein Buch", "Q"] * 3
    new = data.train_tokenizer(texts, 120, lower_case=False)
    A = msd.make_assistant(T, new)
    rows, word = A.embeddings.word.weight, T.embeddings.word.weight
    several = alone = 0
    for piece, i in new.get_vocab().items():
        if piece in data.SPECIAL:
            continue
        text = piece.replace("▁", " ")
        ids = T.tokenizer.encode(text, add_special_tokens=False).ids
        several += len(ids) > 1
        alone += not ids
        want = word[ids].mean(0) if ids else word.mean(0)
        assert torch.allclose(rows[i], want, atol=1e-6), piece
    assert several > 3 and (alone > 0) == (model_type == "bert")
    start, *_, end = T.tokenizer.encode("").ids
    for name, i in (("<s>", start), ("</s>", end), ("<unk>", 3)):
        assert torch.equal(rows[new.token_to_id(name)], word[i])
    assert torch.equal(rows[1], torch.zeros(32))
    for part in ("position", "token_type", "norm"):
        assert same(getattr(A.embeddings, part), getattr(T.embeddings, part))
    assert same(A.layers, T.layers)
    usual = {"vocab_size": new.get_vocab_size(), "normalize": False, "prompt": ""}
    assert A.config == replace(T.config, **usual)  # and so positions are read where T reads them


def test_make_assistant_refuses_to_move_what_counts_positions(tokenizer):
    T = tiny(pad_at(tokenizer, 7), model_type="roberta", pad_token_id=7)
    with pytest.raises(M.InputError, match="the pad token would move from id 7 to 1, "):
        msd.make_assistant(T, tokenizer)
    read = "bert".encode().decode()  # equal to "bert", as a file's, but not the same object
    T = tiny(pad_at(tokenizer, 7), pad_token_id=7, model_type=read)
    bert = msd.make_assistant(T, tokenizer)
    assert bert.config.pad_token_id == 1 and not bert.embeddings.word.weight[1].any()


def test_align_against_loops():
    """IBM Model 1 as in a textbook: t(f | e) from dictionaries, one link at a time."""
    english = [[7, 8], [7, 9], [], [9], [8, 8, 7], [0, 7]]
    foreign = [[1, 2], [1, 3], [5, 6], [3, 3, 3], [2, 1], []]
    english, foreign = english[::-1], foreign[::-1]  # those with words come last
    t = {(f, e): 1.0 for es, fs in zip(english, foreign) for e in es for f in fs}
    for _ in range(5):
        count = dict.fromkeys(t, 0.0)
        for es, fs in zip(english, foreign):
            for f in fs:
                for e in es:
                    count[f, e] += t[f, e] / sum(t[f, x] for x in es)
        total = {e: sum(n for (_, x), n in count.items() if x == e) for _, e in t}
        t = {(f, e): n / total[e] for (f, e), n in count.items()}

    def flat(sentences):  # one without words, then each between a start 50 and an end 51
        rows = [[50, 51]] + [[50, *s, 51] for s in sentences]
        return np.concatenate(rows).astype(np.uint32), np.cumsum([0, *map(len, rows)])

    f, e, n = msd.align(*flat(english), *flat(foreign))
    assert {(f, e): pytest.approx(n) for f, e, n in zip(f.tolist(), e.tolist(), n)} == count
    assert f.dtype == e.dtype == np.int64
    assert count[1, 7] > 2 * count[1, 9] and n.sum() == pytest.approx(9)  # foreign words with links
    for longest, words in ((6, 9), (5, 7), (4, 7), (3, 3)):  # the pairs have 4, 4, 3 and 6 links
        fewer = msd.align(*flat(english), *flat(foreign), longest=longest)
        assert fewer[2].sum() == pytest.approx(words)
    many = [[7] * 10], [[1] * 20], [[1] * 21]  # 200 links count, 210 do not
    assert [len(msd.align(*flat(many[0]), *flat(f))[0]) for f in many[1:]] == [1, 0]
    assert all(len(x) == 0 for x in msd.align(*flat([]), *flat([])))


def test_make_assistant_learns_translations(tokenizer):
    """A word of another language starts at the row of the English word it stands for, one of both
    at the mean of the two: each piece at the mean of its spelling, by its uses in English, and of
    what it translates, by links."""
    T = rough(tiny(tokenizer))
    text = [("man", "mann"), ("man two", "mann boy"), ("two", "boy")]
    text += [("two", "boy"), ("boy", "zon"), ("man", "猫")]
    new = data.train_tokenizer([x for pair in text[:-1] * 20 for x in pair], 60, lower_case=True)
    english, foreign = zip(*text)
    A = msd.make_assistant(T, new, english, foreign)
    rows, word = A.embeddings.word.weight, T.embeddings.word.weight
    links = [x.tolist() for x in msd.align(*T.tokenize(english, ""), *A.tokenize(foreign))]
    uses = [i for t in english for i in new.encode(t).ids]
    for piece, i in new.get_vocab().items():
        if piece in data.SPECIAL:
            continue
        spelling = T.tokenizer.encode(piece.replace("▁", " "), add_special_tokens=False).ids
        use = max(uses.count(i), 1e-6)
        parts = [(use / len(spelling), k) for k in spelling]
        parts += [(n, e) for f, e, n in zip(*links) if f == i]
        want = sum(n * word[k] for n, k in parts) / sum(n for n, _ in parts)
        assert torch.allclose(rows[i], want, atol=1e-5), piece
    row = lambda w: word[T.tokenizer.encode(w, add_special_tokens=False).ids].mean(0)
    near = lambda a, b: float(torch.nn.functional.cosine_similarity(a, b, 0).detach())
    got = {w: rows[new.token_to_id("▁" + w)] for w in ("mann", "boy")}
    assert near(got["mann"], row("man")) > 0.95
    both = (3 * row("two") + row("boy")) / 4  # three times a translation, once English itself
    assert near(got["boy"], both) > 0.95 > near(got["boy"], row("boy"))
    plain = msd.make_assistant(T, new).embeddings.word.weight
    assert all(torch.equal(rows[i], plain[i]) for i in map(new.token_to_id, data.SPECIAL))
    assert 3 in new.encode("猫").ids  # a character that the vocabulary lacks moves no special row


# ------------------------------------------------------------------------ model: files, safetensors
def test_write_safetensors_golden_bytes(tmp_path):
    file = tmp_path / "x.safetensors"
    M.write_safetensors(
        file,
        {
            "b": torch.tensor([[1.0, 2.0]]),
            "a": torch.tensor([3], dtype=torch.int64),
            "e": torch.zeros(0, 4),
        },
    )
    raw = file.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    assert n % 8 == 0 and raw[8 + n :].hex() == "0300000000000000" + "0000803f00000040"
    assert json.loads(raw[8 : 8 + n]) == {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]},
        "b": {"dtype": "F32", "shape": [1, 2], "data_offsets": [8, 16]},
        "e": {"dtype": "F32", "shape": [0, 4], "data_offsets": [16, 16]},
    }
    back, meta = M.read_safetensors(file)
    assert (
        torch.equal(back["b"], torch.tensor([[1.0, 2.0]]))
        and back["e"].shape == (0, 4)
        and meta == {"format": "pt"}
    )
    for dtype in M.DTYPES.values():
        t = torch.arange(6).to(dtype).reshape(2, 3)
        M.write_safetensors(file, {"t": t, "one": torch.ones(1, dtype=torch.uint8)})
        assert torch.equal(M.read_safetensors(file)[0]["t"], t)


# ------------------------------------------------------------------------------- model: the encoder
def plain_encode(m, text, layers=True, drop=1.0):
    """One sentence through the encoder, in numpy loops: no batch, no SDPA, no fused projection,
    float64. drop: by what a dropout that lets all through multiplies, wherever there is one."""
    w = {k: v.double().numpy() for k, v in M.to_hf(m.state_dict()).items()}
    c, E = m.config, "embeddings."

    def norm(x, n):
        x = (x - x.mean()) / math.sqrt(x.var() + c.layer_norm_eps)
        return x * w[n + ".weight"] + w[n + ".bias"]

    def dense(x, n):
        return w[n + ".weight"] @ x + w[n + ".bias"]

    xs = []
    for t, i in enumerate(m.tokenizer.encode(text.strip()).ids):
        word = w[E + "word_embeddings.weight"][i]
        word = w[E + "word_embeddings_2.weight"] @ word if c.bottleneck_size else word
        position = t if c.model_type == "bert" else c.pad_token_id + 1 + t
        x = word + w[E + "position_embeddings.weight"][position]
        xs.append(drop * norm(x + w[E + "token_type_embeddings.weight"][0], E + "LayerNorm"))
    for l in [k for _ in range(c.recurrence) for k in range(c.num_hidden_layers)] * layers:
        p, d = f"encoder.layer.{l}.", c.hidden_size // c.num_attention_heads
        q, k, v = (
            [dense(x, p + f"attention.self.{n}") for x in xs] for n in ("query", "key", "value")
        )
        out = []
        for t, x in enumerate(xs):
            heads = []
            for part in (slice(h * d, h * d + d) for h in range(c.num_attention_heads)):
                a = np.exp([q[t][part] @ k[u][part] / math.sqrt(d) for u in range(len(xs))])
                heads.append(sum(drop * a[u] / a.sum() * v[u][part] for u in range(len(xs))))
            attention = dense(np.concatenate(heads), p + "attention.output.dense")
            x = norm(x + drop * attention, p + "attention.output.LayerNorm")
            up = dense(x, p + "intermediate.dense")
            up = np.array([z * 0.5 * (1 + math.erf(z / math.sqrt(2))) for z in up])
            out.append(norm(x + drop * dense(up, p + "output.dense"), p + "output.LayerNorm"))
        xs = out
    if layers and c.pooling == "cls":
        return xs[0]
    return sum(xs) / len(xs)  # of the embedding block whatever the pooling: <s> is always the same


LAYOUTS = [
    {},
    {"bottleneck_size": 8},
    {"num_hidden_layers": 2, "recurrence": 3},
    {"model_type": "xlm-roberta", "layer_norm_eps": 1e-2},
    {"pooling": "cls", "bottleneck_size": 8},
    {"pad_token_id": 7, "model_type": "roberta", "bottleneck_size": 8, "recurrence": 2},
    {"pad_token_id": 7, "num_attention_heads": 8, "layer_norm_eps": 1e-2},
]


@pytest.mark.parametrize("changes", LAYOUTS, ids=str)
def test_forward_against_plain_loops(tokenizer, changes, monkeypatch):
    """Batches of the paper's layout, whole and embedding block alone: in inference, in training
    without dropout, and with one in each of its places."""
    m = rough(tiny(pad_at(tokenizer, changes.get("pad_token_id", 1)), **changes))
    texts = TEXTS[:5]
    for layers in (True, False):
        want = np.stack([plain_encode(m, t, layers) for t in texts])
        assert apart(m.embed(*m.tokenize(texts), embeddings_only=not layers), want) < 1e-5
        with torch.enable_grad():  # the training path: attention as two products
            got = m(*batch(m, texts), embeddings_only=not layers)
        assert apart(got.detach(), want) < 1e-5

    def no_loss(x, p=0.5, training=True, inplace=False):
        assert p in (0, 0.25) and (p == 0.25 or not training)
        return x / (1 - p) if training else x

    monkeypatch.setattr(torch.nn.functional, "dropout", no_loss)
    m.config = replace(m.config, dropout=0.25)
    for part in m.modules():
        if hasattr(part, "config"):
            part.config = m.config
    for training in (True, False):
        m.train(training)
        drop = 1 / 0.75 if training else 1.0
        for layers in (True, False):
            want = np.stack([plain_encode(m, t, layers, drop) for t in texts[:3]])
            got = m(*batch(m, texts[:3]), embeddings_only=not layers).detach()
            assert apart(got, want) < 1e-5, f"dropout in training: {training}"


def test_forward_gives_sdpa_mask_and_dropout(tokenizer, monkeypatch):
    """Where attention is torch's own, as in inference on long texts, or on a GPU."""
    m, given = tiny(tokenizer, dropout=0.25, max_position_embeddings=200), []
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, dropout_p=0.0):
        given.append(dropout_p)
        return real(q, k, v, attn_mask, dropout_p)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    ids, mask = torch.randint(4, 400, (2, 128)), torch.arange(128) < torch.tensor([[128], [50]])
    with torch.no_grad():
        for training in (True, False):
            long = m.train(training)(ids, mask)
            m(ids[:, :127], mask[:, :127])  # shorter: two products
    assert given == [0.25] * 4 + [0.0] * 4
    assert apart(long, m(ids, mask).detach()) < 1e-5, "SDPA differs from two products"


def test_forward_adds_dense_after_pooling(tokenizer):
    m = tiny(tokenizer, dense=((24, "tanh", True), (5, "identity", False)), pooling="max")
    ids, mask = batch(m, TEXTS[:4])
    x = M.pool(m.hidden(ids, mask), mask, "max").double()
    one, two = (part.linear for part in m.dense)
    x = torch.tanh(x @ one.weight.double().T + one.bias.double()) @ two.weight.double().T
    assert apart(m(ids, mask).detach(), x.detach()) < 1e-5 and two.bias is None
    assert m.config.width == 5 and m(ids, mask, embeddings_only=True).shape == (4, 32)


def test_hidden_is_the_cycle_order(tokenizer):
    """K layers, R times, are 1..K, 1..K, not 1..1, 2..2 nor K..1."""
    m = rough(tiny(tokenizer, num_hidden_layers=2, recurrence=2))
    ids, mask = batch(m, TEXTS[:1])
    for order, is_it in (([0, 1, 0, 1], True), ([0, 0, 1, 1], False), ([1, 0, 1, 0], False)):
        x = m.embeddings(ids, torch.float32)
        assert torch.equal(m.hidden(ids, mask, embeddings_only=True), x)
        for i in order:
            x = m.layers[i](x, None)
        assert torch.allclose(m.hidden(ids, mask), x, atol=1e-6) == is_it


def test_embeddings_have_the_bottlenecks_shape(tokenizer):
    m = tiny(tokenizer, bottleneck_size=8)
    assert m.embeddings.word.weight.shape == (tokenizer.get_vocab_size(), 8)
    assert m.embeddings.project.weight.shape == (32, 8) and m.embeddings.project.bias is None
    assert tiny(tokenizer).embeddings.project is None


def test_pool_over_real_tokens():
    x, mask = torch.randn(2, 4, 3), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    x[1, 2:] = 100  # what stands at pads does not count
    rows = [x[0], x[1, :2]]
    for how, f in (
        ("mean", lambda r: r.mean(0)),
        ("cls", lambda r: r[0]),
        ("max", lambda r: r.max(0)[0]),
        ("mean_sqrt_len", lambda r: r.sum(0) / len(r) ** 0.5),
    ):
        want = torch.stack([f(r) for r in rows])
        assert torch.allclose(M.pool(x, mask, how), want, atol=1e-6), how
        assert M.pool(x.bfloat16(), mask, how).dtype == torch.float32
    assert not M.pool(x, mask & False, "mean").any()  # no token, no nan


def test_batch_pads_and_masks(tokenizer):
    """Rows of a token store, as long as the longest, the model's own pad id behind them."""
    m = tiny(pad_at(tokenizer, 7), pad_token_id=7)
    flat, starts = np.arange(10, 19, dtype=np.uint32), np.array([0, 2, 5, 9])
    ids, mask = m.batch(flat, starts, np.array([2, 0]))
    assert ids.tolist() == [[15, 16, 17, 18], [10, 11, 7, 7]]
    assert mask.tolist() == [[True] * 4, [True, True, False, False]]


def test_narrow_by_hand(tokenizer):
    """int8: each row of a matrix in 127 steps of its largest value; biases stay float32. float16
    and float32: all of it."""
    w = torch.tensor([[1.0, -0.5, 0.26], [-4.0, 0.0, 2.1], [0.0, 0.0, 0.0]])
    tensors = {"a.weight": w, "a.bias": torch.tensor([0.1, 0.2, 0.3])}
    got = narrow(tensors, str(torch.int8).removeprefix("torch."))
    assert set(got) == {"a.weight", "a.scale", "a.bias"}
    assert got["a.weight"].dtype == torch.int8 and got["a.scale"].dtype == torch.float32
    want = [[127, round(-63.5), round(33.02)], [-127, 0, round(66.675)], [0, 0, 0]]
    assert got["a.weight"].tolist() == want
    assert got["a.scale"][:2].tolist() == pytest.approx([1 / 127, 4 / 127]) and got["a.scale"].all()
    assert torch.equal(got["a.bias"], tensors["a.bias"])
    back = got["a.weight"] * got["a.scale"][:, None]
    assert ((back - w).abs().amax(1) <= w.abs().amax(1) / 254 + 1e-9).all()
    for kind in (torch.float16, torch.float32):
        half = narrow(tensors, str(kind).removeprefix("torch."))
        assert all(torch.equal(v, tensors[k].to(kind)) for k, v in half.items())


def test_load_of_int8_and_float16_gives_what_the_file_says(tokenizer, tmp_path):
    """Tables and maps: the vectors are those of the weights in the file, widened."""
    m = tiny(tokenizer, bottleneck_size=8, dense=((24, "tanh", True),))
    for kind in ("int8", "float16"):
        tensors = narrow(m.state_dict(), kind)
        for k in [k for k in tensors if k.endswith(".scale")]:
            scale = tensors.pop(k)
            name = k.removesuffix("scale") + "weight"
            tensors[name] = tensors[name].float() * scale[:, None]
        wide = tiny(tokenizer, bottleneck_size=8, dense=((24, "tanh", True),))
        wide.load_state_dict({k: v.float() for k, v in tensors.items()})
        m.save(tmp_path / kind, narrow(m.state_dict(), kind))
        back = M.load(tmp_path / kind, "float32")
        assert apart(back.encode(TEXTS), wide.encode(TEXTS)) < 1e-5, kind
        assert apart(wide.encode(TEXTS), m.encode(TEXTS)) > 1e-4
        assert back.int8 == (kind == "int8")


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_encode_is_free_of_padding_batch_size_and_order(tokenizer, model_type):
    m = tiny(tokenizer, model_type=model_type)
    alone = np.concatenate([m.encode([t]) for t in TEXTS])
    for vectors in (
        m.encode(TEXTS),
        m.encode(TEXTS[::-1])[::-1],
        m.embed(*m.tokenize(TEXTS), most=1),
    ):
        gap = np.abs(vectors - alone).max()
        assert gap < 1e-5, f"sorted batches differ by {gap}"
    assert m.encode([]).shape == (0, 32) and m.encode(TEXTS).dtype == np.float32


def test_plain_attention_and_linear_equal_the_fast_ones(tokenizer):
    """SDPA against two products, oneDNN against torch's linear map, bfloat16 against float32: the
    largest difference is in the message."""
    m = tiny(tokenizer, std=0.05)
    for T in (9, 20):  # under 16 its softmax is padded
        q, k, v = torch.randn(3, 2, 4, T, 8)
        pads, lowest = torch.arange(T) > 6, torch.finfo(torch.float32).min
        for mask in (None, torch.zeros(2, 1, 1, T).masked_fill(pads, lowest)):
            sdpa = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
            gap = (M.plain_attention(q, k, v, mask) - sdpa).abs().max()
            assert gap < 1e-6, f"attention over {T} tokens differs by {gap}"
    assert M.has_onednn("cpu", torch.float32) == torch.backends.mkldnn.is_available()
    for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        x = torch.randn(2, 9, 32).to(dtype)
        for activation in ("identity", "gelu", "relu"):
            plain = m.layers[0].up(x, activation)
            with torch.no_grad():
                gap = (m.layers[0].up(x, activation) - plain).abs().max()
            assert gap < limit, f"oneDNN's {activation} differs by {gap}"
    want = M.unit(m.encode(TEXTS))
    m.dtype = torch.bfloat16
    gap = 1 - (M.unit(m.encode(TEXTS)) * want).sum(1).min()
    assert gap < 1e-3, f"bfloat16 differs by a cosine of {gap}"
    slow = [i for e in tokenizer.encode_batch(TEXTS) for i in e.ids]
    assert m.tokenize(TEXTS)[0].tolist() == slow


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embed_packs_matrices_for_long_work(tokenizer, dtype):
    """The vectors are those of one sentence at a time; the matrices are packed while it lasts."""
    m = tiny(tokenizer, std=0.05)
    m.dtype = dtype
    texts = [t[:200] for t in TEXTS] * 300
    flat, starts = m.tokenize(texts)
    assert len(flat) > 2**15
    seen = []
    up = m.layers[0].up
    vectors = m.embed(flat, starts, progress=lambda *done: seen.append(up.packed is not None))
    assert set(seen) == {M.has_onednn("cpu", dtype)} and up.packed is None
    alone = m.embed(*m.tokenize(texts[: len(TEXTS)]), most=1)
    gap = np.abs(vectors.reshape(300, len(TEXTS), -1) - alone).max()
    assert gap < (1e-5 if dtype == torch.float32 else 3e-2), f"long work differs by {gap}"


def test_load_for_training_and_for_use(tokenizer, tmp_path):
    """A run's dropout and length in training alone; weights that can move; the same masks by the
    same seed."""
    tiny(tokenizer).save(tmp_path / "m")
    flags = "--dropout 0.3 --max-tokens 9 --dtype bfloat16 --device cpu".split()
    run = train.Run(train.parse(["--out", str(tmp_path / "run"), *flags]))
    m, given = run.load(tmp_path / "m", train=True), (torch.tensor([[0, 9, 8, 2]]),) * 2
    drawn = lambda seed: torch.manual_seed(seed) and m(given[0], given[1] > -1)
    assert not torch.equal(drawn(1), drawn(2)) and torch.equal(drawn(3), drawn(3))
    m.eval()
    assert torch.equal(drawn(1), drawn(2))
    for trains in (True, False):
        m = run.load(tmp_path / "m", train=trains)
        kinds = {(q.requires_grad, q.dtype) for k, q in m.named_parameters() if "layers" in k}
        assert kinds == {(trains, torch.float32 if trains else torch.bfloat16)}
        assert (m.config.max_seq_length, m.dtype, m.training) == (9, torch.bfloat16, trains)
    assert M.load(tmp_path / "m").config.max_seq_length == 48
    assert M.load(tmp_path / "m").config.dropout == 0


PAD_TOKENS = [  # what the tokenizer's files say of it, and its id
    ({}, "<pad>", 7),
    ({"special_tokens_map.json": {"pad_token": "<pad>"}}, "<pad>", 7),
    ({"tokenizer_config.json": {"pad_token": {"content": "<mask>"}}}, "<mask>", 8),
    ({"special_tokens_map.json": {"pad_token": "[PAD]"}}, "[PAD]", 9),
]


@pytest.mark.parametrize("said, name, pad_id", PAD_TOKENS)
def test_read_tokenizer_finds_the_pad_id(tokenizer, tmp_path, said, name, pad_id):
    """It is that of the token that the files name, not what config.json says, nor 0, nor 1; it
    fills batches, and a RoBERTa counts positions from it."""
    raw = json.loads(tokenizer.to_str())
    vocab = raw["model"]["vocab"]
    other = next(piece for piece, i in vocab.items() if i == pad_id)
    vocab[name], vocab[other] = pad_id, 1
    raw["added_tokens"][1] |= {"content": name, "id": pad_id}
    if name != "<pad>":
        del vocab["<pad>"]
    for model_type, in_config in (("bert", 0), ("roberta", pad_id)):
        m = tiny(tokenizer, model_type=model_type, pad_token_id=1)
        m.save(place := tmp_path / model_type)
        (place / "tokenizer_config.json").unlink()
        write(place / "tokenizer.json", json.dumps(raw))
        for file, text in said.items():
            write(place / file, json.dumps(text))
        config = json.loads((place / "config.json").read_text())
        write(place / "config.json", json.dumps(config | {"pad_token_id": in_config}))
        assert M.read_tokenizer(place)[1] == pad_id
        back = M.load(place, "float32")
        assert back.config.pad_token_id == pad_id
        assert back.config.first_position == (0 if model_type == "bert" else pad_id + 1)
        ids, mask = batch(back, ["a man", "a"])
        assert set(ids[~mask].tolist()) == {pad_id}
        want = np.stack([plain_encode(back, t) for t in ("a man", "a")])
        assert apart(back.encode(["a man", "a"]), want) < 1e-5


def test_tokenize_puts_the_prompt_before_and_cuts_behind(tokenizer):
    own = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    m = tiny(own, max_seq_length=6, prompt="q: ")
    for prompt, how in (("q: ", {}), ("", {"prompt": ""}), ("x ", {"prompt": "x "})):
        flat, starts = m.tokenize(TEXTS[:3], **how)
        for text, a, b in zip(TEXTS, starts, starts[1:]):
            want = tokenizers.Tokenizer.from_str(tokenizer.to_str())
            want.no_truncation()
            ids = want.encode(prompt + text).ids
            assert flat[a:b].tolist() == [*ids[:5], 2][: len(ids)]  # start and end included


def test_embed_is_without_dropout_and_encode_normalizes(tokenizer):
    """Whatever the mode, which stays as it was."""
    m = tiny(tokenizer, dropout=0.5, normalize=True)
    want = m.eval().embed(*m.tokenize(TEXTS))
    assert np.array_equal(m.train().embed(*m.tokenize(TEXTS)), want) and m.training
    unit = want / np.sqrt((want**2).sum(1, keepdims=True))
    assert apart(m.encode(TEXTS), unit) < 1e-6
    assert np.array_equal(m.encode(TEXTS, normalize=False), want) and not M.unit(want * 0).any()


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta"])
def test_hidden_equals_that_of_transformers(kind, tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    cls = {
        "bert": transformers.BertModel,
        "roberta": transformers.RobertaModel,
        "xlm-roberta": transformers.XLMRobertaModel,
    }[kind]
    config = cls.config_class(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=66,
        pad_token_id=1,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    theirs = cls(config).eval()
    theirs.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    m = M.load(tmp_path, "float32")
    ids, mask = batch(m, [*TEXTS, "y " * 5000])
    with torch.no_grad():
        want = theirs(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        assert (m.hidden(ids, mask) - want)[mask].abs().max() < 1e-5


@pytest.mark.skipif(
    not (SHARED / "teacher").exists(), reason="no shared/teacher beside the checkout"
)
def test_load_of_a_real_teacher_gives_its_score():
    """The known score of a published model on English STS benchmark (82.03 in float32; the copy
    here is float16)."""
    m = checkpoints.load(SHARED / "teacher", "float32")
    a, b, gold = data.read_sts(SHARED / "data" / "sts")["en-en"]
    scores = evaluation.similarity_scores(m.encode, {"en-en": (a[:400], b[:400], gold[:400])})[
        "en-en"
    ]
    assert 100 * evaluation.spearman(scores, gold[:400]) > 80
    assert (
        np.allclose(np.linalg.norm(m.encode(a[:5]), axis=1), 1, atol=1e-5)
        and np.linalg.norm(m.encode(a[:5], normalize=False), axis=1).min() > 2
    )


@pytest.mark.parametrize(
    "config, embedding, layers, total",
    [
        (
            M.Config(250002, 768, 12, 12, 3072, 514, "xlm-roberta"),
            192_398_592,
            85_054_464,
            277_453_056,
        ),
        (
            M.Config(250037, 384, 12, 12, 1536, 512, type_vocab_size=2),
            96_212_352,
            21_293_568,
            117_505_920,
        ),
        (
            M.Config(
                250002, 768, 3, 12, 3072, 514, "xlm-roberta", bottleneck_size=128, recurrence=4
            ),
            32_495_616,
            21_263_616,
            53_759_232,
        ),
        (
            M.Config(
                250002, 768, 3, 12, 3072, 514, "xlm-roberta", bottleneck_size=256, recurrence=4
            ),
            64_594_176,
            21_263_616,
            85_857_792,
        ),
        (
            M.Config(
                250037, 384, 6, 12, 1536, 512, type_vocab_size=2, bottleneck_size=128, recurrence=2
            ),
            32_252_032,
            10_646_784,
            42_898_816,
        ),
    ],
)
def test_ledger_to_the_unit(config, embedding, layers, total):
    assert msd.ledger(config) == {
        "embedding": embedding,
        "layers": layers,
        "other": 0,
        "total": total,
    }


def test_stage_loss_and_embed_do_not_wait_for_a_gpu(tokenizer):
    """On the meta device, whose tensors have no values: what would wait for one raises there."""
    m = tiny(tokenizer, bottleneck_size=8, type_vocab_size=1)
    m.load_state_dict({k: v.to("meta") for k, v in m.state_dict().items()}, assign=True)
    m.dtype = torch.bfloat16
    both, y = batch(m, TEXTS[:4] + TEXTS[3:]), torch.empty(4, 32, device="meta")
    for stage in msd.STAGES:
        loss = sum(msd.stage_loss(stage, m, *both, y, y).values())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(m.parameters(), msd.CLIP)
        assert (loss + norm).device.type == "meta"
    with pytest.raises(RuntimeError, match="meta"):
        float(loss.detach())
    seen = []
    with pytest.raises(NotImplementedError, match="meta"):  # the one wait, for all of the vectors
        m.embed(*m.tokenize(TEXTS), progress=lambda done, total: seen.append(done), most=2)
    assert seen[-1] == len(TEXTS)


# ------------------------------------------------------------------------- model: model directories
def test_save_and_load_to_the_bit(tokenizer, tmp_path):
    for i, changes in enumerate(
        (
            {},
            {"bottleneck_size": 8, "num_hidden_layers": 2, "recurrence": 3},
            {"model_type": "roberta", "pooling": "cls", "normalize": True},
        )
    ):
        m = tiny(tokenizer, **changes)
        m.save(tmp_path / str(i))
        back = M.load(tmp_path / str(i), "float32")
        assert back.config == m.config and np.array_equal(back.encode(TEXTS), m.encode(TEXTS))
        data.delete(tmp_path / "again")
        m.save(tmp_path / "again")
        with pytest.raises(M.InputError, match="again: is there already; choose another"):
            m.save(tmp_path / "again")
        assert all(
            (tmp_path / "again" / f).read_bytes() == (tmp_path / str(i) / f).read_bytes()
            for f in ("config.json", "tokenizer.json", "model.safetensors")
        )
        half = M.unit(M.load(tmp_path / str(i), "bfloat16").encode(TEXTS))
        assert (half * M.unit(m.encode(TEXTS))).sum(1).min() > 0.99


def test_load_refuses_a_vocabulary_larger_than_the_table(tokenizer, tmp_path):
    m = tiny(tokenizer)
    m.save(tmp_path / "m")
    m.tokenizer = tokenizer
    bigger = json.loads(tokenizer.to_str())
    bigger["model"]["vocab"]["zzz"] = len(tokenizer.get_vocab())
    write(tmp_path / "m" / "tokenizer.json", json.dumps(bigger))
    with pytest.raises(M.InputError, match="token ids up to .* but the word table has"):
        M.load(tmp_path / "m")
    pieces = [["<s>", 0.0], ["<pad>", 0.0], ["</s>", 0.0], ["<unk>", -9.0]]
    pieces += [[f"▁{i}", -9.0] for i in range(497)]
    bigger["model"] = {"type": "Unigram", "unk_id": 3, "vocab": pieces}
    write(tmp_path / "m" / "tokenizer.json", json.dumps(bigger))
    with pytest.raises(M.InputError, match="token ids up to 500, but the word table has 500 rows"):
        M.load(tmp_path / "m")


def test_load_refuses_a_vocabulary_with_a_gap(tokenizer, tmp_path):
    m = tiny(tokenizer)
    m.save(tmp_path / "m")
    raw = json.loads((tmp_path / "m" / "tokenizer.json").read_text("utf-8"))
    vocab = raw["model"]["vocab"]
    vocab[max(vocab, key=vocab.get)] = m.config.vocab_size
    write(tmp_path / "m" / "tokenizer.json", json.dumps(raw))
    with pytest.raises(M.InputError, match="token ids up to 500, but the word table has 500 rows"):
        M.load(tmp_path / "m")


# --------------------------------------------------------------------------------------- model: use
def test_encode_takes_what_people_give(tokenizer):
    m = tiny(tokenizer)
    want = m.encode(TEXTS)
    assert np.array_equal(m.encode(t for t in TEXTS), want)
    assert np.array_equal(m.encode(np.array(TEXTS)), want) and np.array_equal(
        m.encode(tuple(TEXTS)), want
    )
    assert m.encode("one text").shape == (32,) and m.encode([]).shape == (0, 32)
    assert m.encode(dict.fromkeys(TEXTS)).shape == want.shape
    for bad, message in (
        (None, "text 1 is None"),
        (b"x", "text 1 is b'x'"),
        (3.0, "text 1 is 3.0"),
        ("\ud800", "text 1 is .*ud800"),
    ):
        with pytest.raises(M.InputError, match=message):
            m.encode(["a", bad])
    sizes, shown = [], []
    m.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    got = m.encode(TEXTS, batch=2, progress=lambda *at: shown.append(at))
    assert apart(got, want) < 1e-5 and sizes == [2, 2, 2, 1]
    assert shown == [(2, 7), (4, 7), (6, 7), (7, 7)]
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    assert np.array_equal(m.encode(pandas.Series(TEXTS)), want)


# ------------------------------------------------------------------------------ data: reading files
def test_read_pairs_adds_up(tmp_path):
    good = "".join(f"sentence {i}\tSatz {i}\n" for i in range(995))
    odd = (
        b"x" * 250
        + b"\tkept\n"
        + b"y" * 251
        + b"\ttoo long\n"
        + b"no tab here\n"
        + b"a\tb\tc\n"
        + b"\xff\xfe\tx\n"
        + b"\tempty\n"
        + b"\n"
        + b"l" * 300
        + b"\tlong\n"
    )
    file = write(
        tmp_path / "en-de.tsv",
        b"\xef\xbb\xbffirst\terster\r\n" + good.encode() + odd + good.encode(),
    )
    r = {}
    pairs = list(data.read_pairs(file, r))
    assert pairs[0] == (1, "first", "erster") and r["kept"] == len(pairs) == 1992
    assert r["bad"] == {
        "no tab": 1,
        "too many columns": 1,
        "not UTF-8": 1,
        "an empty side": 1,
    }
    assert r["lines"] == r["kept"] + r["long"] + r["blank"] + r["header"] + sum(
        r["bad"].values()
    ) and (
        r["long"],
        r["blank"],
    ) == (2, 1)
    assert (
        set(r["examples"]) == set(r["bad"]) and "en-de.tsv:999: no tab" in r["examples"]["no tab"]
    )
    for lines, ok in ((200, True), (199, False)):  # two bad ones
        bad = write(tmp_path / "bad.tsv", "a\tb\n" * (lines - 2) + "no tab\n" * 2)
        if ok:
            assert len(list(data.read_pairs(bad, {}))) == 198
            continue
        with pytest.raises(M.InputError, match="2 of 199 lines are bad, more than 1 %"):
            list(data.read_pairs(bad, {}))
    for sides, kept in ((250, 250), 1), ((251, 1), 0), ((1, 251), 0):
        one = write(tmp_path / "one.tsv", "\t".join("x" * n for n in sides))
        assert len(list(data.read_pairs(one, {}))) == kept
        assert len(list(data.read_pairs(one, {}, max_chars=251))) == 1
    with pytest.raises(M.InputError, match="long.tsv: .* a line of more than 1048576 bytes"):
        endless = "x" * (data.LINE_LIMIT + 5) + "\ty\n"
        list(data.read_pairs(write(tmp_path / "long.tsv", endless), {}))
    packed = gzip.compress(good.encode())
    assert len(list(data.read_pairs(write(tmp_path / "en-fr.tsv.gz", packed), {}))) == 995
    for broken in (packed[:-9], packed[:50] + b"\0\0\0" + packed[53:]):
        with pytest.raises(M.InputError, match="en-fr.tsv.gz: .*(end-of-stream|decompressing)"):
            list(data.read_pairs(write(tmp_path / "en-fr.tsv.gz", broken), {}))


# ----------------------------------------------------------------------------- data: the disk store
def test_build_corpus_tokens_and_vectors(tmp_path, tokenizer):
    a = write(tmp_path / "en-de.tsv", "one\teins\ntwo\tzwei\none\teins\n")
    b = write(tmp_path / "en-fr.tsv", "one\tun\nthree\ttrois\n")
    c = data.build_corpus([b, a], tmp_path / "cache")
    assert [tuple(c.texts(p)) for p in c.pairs] == [
        ("one", "eins"),
        ("two", "zwei"),
        ("one", "eins"),
        ("one", "un"),
        ("three", "trois"),
    ]
    one = ["one", "two", "one"], ["eins", "zwei", "eins"]
    assert c.by_language() == {"de": one, "fr": (["one", "three"], ["un", "trois"])}
    assert len(c.first) == 7 and c.folder == data.build_corpus([a, b], tmp_path / "cache").folder
    assert data.build_corpus([a], tmp_path / "cache", extra=[b]).group.tolist() == [0, 0, 0, 1, 1]
    m = tiny(tokenizer)
    flat, starts = data.tokens(c, m, tmp_path / "cache", chunk=3)
    want, _ = m.tokenize(c.texts(np.arange(7)))
    assert np.array_equal(flat, want) and len(starts) == 8
    v = data.vectors(c, np.array([1, 4]), m, "x", tmp_path / "cache", chunk=1)
    assert v.dtype == np.float16 and np.abs(v - m.encode(c.texts([1, 4]))).max() < 2e-3
    with pytest.raises(M.InputError, match="no usable sentence pairs"):
        data.build_corpus([write(tmp_path / "empty.tsv", "")], tmp_path / "cache")
    assert not list((tmp_path / "cache").glob(".*"))


def test_vectors_and_tokens_are_stored_by_all_that_makes_them(tmp_path, tokenizer):
    """Targets are the encoder's own vectors, before a Normalize, in float16; a change of whatever
    makes them finds nothing that is stored of another. So do files, their limits and tokens."""
    own = lambda: tokenizers.Tokenizer.from_str(tokenizer.to_str())  # each its own truncation
    file = write(tmp_path / "en-de.tsv", "a man reads\tein Mann\ntwo dogs run\tzwei Hunde\n")
    more = write(tmp_path / "en-fr.tsv", "two cats\tdeux chats\na man\tun homme\n")
    cache = tmp_path / "cache"
    limits = ({}, {"max_chars": 11}, {"max_lines": 1}, {"extra": [more]})
    corpora = [data.build_corpus([file], cache, **x) for x in limits]
    assert [len(c.pairs) for c in corpora] == [2, 1, 1, 4]
    assert corpora[3].group.tolist() == [0, 0, 1, 1]
    assert not data.build_corpus([file, more], cache).group.any()
    bfloat16 = rough(tiny(own(), pooling="cls"))
    bfloat16.dtype = torch.bfloat16
    encoders = [rough(tiny(own(), pooling="cls")), rough(tiny(own(), seed=1)), bfloat16]
    changes = ({"prompt": "q: "}, {"max_seq_length": 4}, {"normalize": True})
    encoders += [rough(tiny(own(), pooling="cls", **x)) for x in changes]
    encoders.append(tiny(data.train_tokenizer(TEXTS, 150, lower_case=True)))
    names = ["x", "y", "x", "x", "x", "z", "t"]
    for c in corpora[::2]:
        for m, name in zip(encoders, names):
            flat, starts = data.tokens(c, m, cache)
            want = m.tokenize(c.texts(slice(None)))
            assert np.array_equal(flat, want[0]) and np.array_equal(starts, want[1])
            for ids in (np.arange(2), np.array([1, 0]), np.array([0])):
                for only in (False, True):
                    v = data.vectors(c, ids, m, name, cache, only)
                    want = m.embed(*m.tokenize(c.texts(ids)), only).astype(np.float16)
                    assert v.dtype == np.float16 and np.array_equal(v, want)


# ------------------------------------------------------------------------ data: vocabulary, batches
def test_train_tokenizer_repeats_and_covers(tokenizer):
    """XLM-R's special tokens and ends, NFKC; the same from text in any order."""
    files = (demo.DEMO / f"{x}.txt" for x in ("de", "ar"))
    text = [line for f in files for line in f.read_text("utf-8").splitlines()]
    one, two = (data.train_tokenizer(t, 300, lower_case=True).to_str() for t in (text, text[::-1]))
    assert one == two
    cased = data.train_tokenizer(text, 300, lower_case=False)
    assert cased.get_vocab_size() == 300
    for t, lower in ((tokenizer, True), (cased, False)):
        assert [t.token_to_id(x) for x in ("<s>", "<pad>", "</s>", "<unk>")] == [0, 1, 2, 3]
        ids = t.encode("Der Mann").ids
        assert (ids[0], ids[-1]) == (0, 2) and 3 not in ids
        assert (ids == t.encode("der mann").ids) == lower
        assert t.encode("Ｄer Mann").ids == ids and t.decode(ids).lower() == "der mann"
        assert t.encode("猫猫").ids.count(3) == 1


def library_tokenizer(kind, texts):
    """A tokenizer of another kind than ours, as published models have them."""
    special, small = ["<s>", "<pad>", "</s>", "<unk>"], {"vocab_size": 400, "show_progress": False}
    if "Unigram" in kind:
        t, small["unk_token"] = tokenizers.Tokenizer(tokenizers.models.Unigram()), "<unk>"
    else:
        model = getattr(tokenizers.models, kind.split("-")[-1])
        t = tokenizers.Tokenizer(model(unk_token="<unk>"))
    t.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    t.post_processor = tokenizers.processors.BertProcessing(("</s>", 2), ("<s>", 0))
    if kind == "byte-BPE":
        t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
        t.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
        small["initial_alphabet"] = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    name = {"WordPiece": "WordPieceTrainer", "Unigram": "UnigramTrainer"}.get(kind.split("-")[0])
    trainer = getattr(tokenizers.trainers, name or "BpeTrainer")
    t.train_from_iterator(texts, trainer(special_tokens=special, **small))
    return t


@pytest.mark.parametrize("kind", ["Unigram", "Unigram-bare", "BPE", "byte-BPE", "WordPiece"])
def test_cut_vocabulary_of_every_kind(kind, tmp_path):
    """The pieces a text uses most; what it cuts as before has the same vectors, to the bit."""
    files = [demo.DEMO / f"{x}.txt" for x in ("en", "de", "tr", "ar")]
    lines = [line for f in files for line in f.read_text("utf-8").splitlines()]
    old = library_tokenizer(kind, lines)
    if kind == "Unigram-bare":
        raw = json.loads(old.to_str())
        raw["model"]["unk_id"] = None
        old = tokenizers.Tokenizer.from_str(json.dumps(raw))
    m = tiny(old)
    size = len(data.always_kept(old, len(old.get_vocab()))) + 60
    counts = np.bincount(m.tokenize(lines[:80])[0], minlength=m.config.vocab_size)
    new, ids = data.cut_vocabulary(old, counts, size)
    assert len(ids) == len(set(ids.tolist())) == len(new.get_vocab()) <= size < len(old.get_vocab())
    assert all(old.id_to_token(int(i)) == new.id_to_token(k) for k, i in enumerate(ids))
    cut = msd.cut_assistant(m, new, ids)
    stay = [t for t in lines if set(old.encode(t).ids) <= set(ids.tolist())]
    assert 10 < len(stay) < len(lines)
    assert np.array_equal(m.encode(stay), cut.encode(stay))
    assert cut.encode(lines).shape == (len(lines), 32)  # all others have vectors, too
    cut.save(tmp_path / "cut")  # an ordinary directory
    assert np.array_equal(M.load(tmp_path / "cut", "float32").encode(stay), cut.encode(stay))
    used = {old.id_to_token(i) for t in lines[:80] for i in old.encode(t).ids}
    assert len(used & set(new.get_vocab())) > 50  # and not any others
    for wrong in (3, len(old.get_vocab()) + 1):
        with pytest.raises(M.InputError, match=f"--keep-vocab {wrong:,}: expected"):
            data.cut_vocabulary(old, counts, wrong)


@pytest.mark.parametrize("kind", ["Unigram", "BPE"])
def test_cut_vocabulary_keeps_the_most_used(kind):
    """By count, of equal ones the lowest ids; special tokens and characters always, and of BPE the
    parts of what stays; ids in their old order."""
    lines = (demo.DEMO / "de.txt").read_text("utf-8").splitlines()
    old = library_tokenizer(kind, lines)
    for row, name in enumerate(("<unk>", "<pad>", "</s>"), 280):  # their ids will change
        old = token_at(old, name, row)
    if kind == "BPE":
        old.post_processor = tokenizers.processors.BertProcessing(("</s>", 282), ("<s>", 0))
    else:
        ends = {"special_tokens": [("<s>", 0), ("</s>", 282)]}
        old.post_processor = tokenizers.processors.TemplateProcessing("<s> $A </s>", **ends)
    ids = old.get_vocab()
    always = data.always_kept(old, len(ids))
    assert always >= {"<s>", "<pad>", "</s>", "<unk>"} | {p for p in ids if len(p) == 1}
    assert not any(len(p) == 2 for p in always)
    others = sorted(ids.keys() - always, key=ids.get)
    used = others[-40::4]  # high ids: what merges latest
    counts = np.zeros(len(ids), int)
    counts[[ids[p] for p in used]] = range(5, 15)
    merges = json.loads(old.to_str())["model"].get("merges", ())
    parts = lambda p: {x for a, b in merges if a + b == p for x in (a, b, *parts(a), *parts(b))}
    need = {p: {p, *parts(p)} - always for p in others}
    new, kept = data.cut_vocabulary(
        old, counts, len(always) + len(set().union(*map(need.get, used)))
    )
    assert set(new.get_vocab()) == always.union(*map(need.get, used))
    assert kept.tolist() == sorted(ids[p] for p in new.get_vocab())
    assert new.encode("").ids == [new.token_to_id("<s>"), new.token_to_id("</s>")]
    for name in ("<unk>", "<pad>", "</s>"):  # they have moved, for the library, too
        assert new.token_to_id(name) == kept.tolist().index(ids[name]) < ids[name]
        assert new.encode(name, add_special_tokens=False).ids == [new.token_to_id(name)]
    assert set(new.encode("猫", add_special_tokens=False).ids) == {new.token_to_id("<unk>")}
    best = max(used, key=lambda p: counts[ids[p]])
    assert best in data.cut_vocabulary(old, counts, len(always) + len(need[best]))[0].get_vocab()
    none = data.cut_vocabulary(old, counts * 0, len(always) + 1)[0].get_vocab()
    assert none.keys() - always == {next(p for p in others if len(need[p]) == 1)}
    assert data.cut_vocabulary(old, counts, len(always))[0].get_vocab().keys() == always
    same_, every = data.cut_vocabulary(old, counts, len(ids))
    assert same_.get_vocab() == ids and every.tolist() == list(range(len(ids)))


def test_cut_assistant_to_some_rows(tokenizer):
    """Those of its ids, in their order, and its pad id with them; a RoBERTa's must stay."""
    wide = {"max_position_embeddings": 470, "pad_token_id": 400}
    for kind, ids in (("roberta", np.arange(450)), ("bert", np.arange(300, 450))):
        A = rough(tiny(pad_at(tokenizer, 400), model_type=kind, **wide))
        A.embeddings.word.weight.data[400] = 7.0
        cut = msd.cut_assistant(A, A.tokenizer, ids)
        assert torch.equal(cut.embeddings.word.weight, A.embeddings.word.weight[ids])
        pad_id = 400 if kind == "roberta" else 100
        assert cut.config == replace(A.config, vocab_size=len(ids), pad_token_id=pad_id)
        assert same(cut.layers, A.layers)
    with pytest.raises(M.InputError, match="the pad token would move from id 400 to 399"):
        cut = tiny(pad_at(tokenizer, 400), model_type="roberta", **wide)
        msd.cut_assistant(cut, cut.tokenizer, np.arange(1, 450))


def test_always_kept_refuses_word_level():
    t = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    with pytest.raises(M.InputError, match="a WordLevel tokenizer; only Unigram, BPE and WordP"):
        data.always_kept(t, 1)


def test_batch_order_by_hand():
    """Shuffled by the seed, sorted by length within stretches of 256 batches, cut, shuffled: every
    pair once, the same order for the same seed alone."""
    lengths = np.random.default_rng(0).integers(5, 50, 1100)
    got = data.batch_order(lengths, 2, (0, 1, 0))
    rng = np.random.default_rng((0, 1, 0))
    order, cuts = rng.permutation(1100).tolist(), []
    for at in range(0, 1100, 512):
        stretch = sorted(order[at : at + 512], key=lambda i: lengths[i])
        cuts += [stretch[i : i + 2] for i in range(0, len(stretch), 2)]
    assert [b.tolist() for b in got] == [cuts[i] for i in rng.permutation(len(cuts))]
    for seed in ((1, 1, 0), (0, 2, 0), (0, 1, 1)):
        other = data.batch_order(lengths, 2, seed)
        assert not any(map(np.array_equal, got[:9], other))


def test_batch_order_covers_every_pair_once():
    lengths = np.random.default_rng(0).integers(5, 50, 1000)
    batches = data.batch_order(lengths, 16, (0, 1, 0))
    assert sorted(np.concatenate(batches)) == list(range(1000))
    assert sorted(map(len, batches)) == [8] + [16] * 62
    assert np.mean([np.ptp(lengths[b]) for b in batches]) < 5  # little padding
    assert [len(b) for b in data.batch_order(lengths[:3], 16, (0, 1, 0))] == [3]


# ------------------------------------------------------------------------------------- train: a run
def test_main_prints_and_leaves_the_table(world, finished):
    """What a run prints and leaves, and that the same command again only reports it."""
    out = world / "whole"
    left = {"assistant", "student", "stages", "results.json", "log.jsonl", "run.json"}
    assert {p.name for p in out.iterdir()} == left
    between = {"assistant-start", "student-start", "stage2", "stage3"}
    assert {p.name for p in (out / "stages").iterdir()} == between
    results = json.loads((out / "results.json").read_text())
    rows = ["teacher", "assistant, untrained", "assistant", "student, untrained"]
    assert list(results["rows"]) == rows + [f"student, stage {k}" for k in (2, 3, 4)]
    assert all(label in finished for label in results["rows"])
    assert "student - assistant" in finished
    assert str(world) not in json.dumps(results)  # no path of this machine
    again = run(command(world, out))
    assert again.returncode == 0, again.stderr
    assert "this run is finished" in again.stdout and "student, stage 4" in again.stdout


def test_log_of_a_run(world, finished):
    log = [json.loads(x) for x in (world / "whole" / "log.jsonl").read_text().splitlines()]
    assert [e["stage"] for e in log if e.get("done")] == [f"stage {k}" for k in (1, 2, 3, 4)]
    losses = {k: [e for e in log if e.get("stage") == f"stage {k}" and "loss" in e] for k in (1, 4)}
    assert losses[1][-1]["loss"] < losses[1][0]["loss"]
    known = {"en", "tr", "mcl", "lr", "norm", "tokens_per_s"}
    assert losses[4] and all(set(e) >= known for e in losses[4])


def test_main_gives_the_same_bytes_again(world, finished):
    """Another process, hash seed, cache and folder: the same student, to the bit."""
    done = run(command(world, world / "second", "--cache", world / "cache2"), PYTHONHASHSEED="7")
    assert done.returncode == 0, done.stderr
    for model in ("assistant", "student"):
        for file in ("model.safetensors", "config.json", "tokenizer.json"):
            one, two = (world / run / model / file for run in ("second", "whole"))
            assert one.read_bytes() == two.read_bytes(), model
    left = {"assistant", "student", "results.json", "log.jsonl", "run.json"}
    assert {p.name for p in (world / "second").iterdir()} == left  # without --keep


def test_layer_list_by_number():
    assert [train.layer_list(x) for x in ("3", "1,6,12", "12,")] == [(1, 2, 3), (1, 6, 12), (12,)]


def test_main_with_ablations_by_flags(world, finished, tmp_path, capsys):
    """No bottleneck, no contrast, stages 2-4 from a given assistant, noise as the start: each runs
    to the table."""
    for flags, rows in (
        (
            ["--bottleneck", "0", "--layers", "3", "--recurrence", "1"],
            ["student, stage 3", "student, stage 4"],
        ),
        (
            [
                "--no-contrast",
                "--stages",
                "4",
                "--assistant",
                world / "whole" / "assistant",
            ],
            ["student, stage 4"],
        ),
        (
            [
                "--init",
                "paper",
                "--stages",
                "2-3",
                "--assistant",
                world / "whole" / "assistant",
            ],
            ["student, stage 2", "student, stage 3"],
        ),
    ):
        out = tmp_path / flags[0].strip("-")
        run_here(capsys, command(world, out, *flags))
        table = list(json.loads((out / "results.json").read_text())["rows"])
        assert [k for k in table if "stage" in k] == rows
        terms = {k for e in train.read_log(out) if e.get("stage") == "stage 4" for k in e}
        assert ("mcl" in terms) == ("--bottleneck" in flags)  # neither --no-contrast nor stage 3
    assert table == ["teacher", "assistant", "student, untrained", *rows]


# --------------------------------------------------------------------- train: evaluation, the table
def test_spearman_by_hand():
    assert list(evaluation.ranks([9, 4, 4, 7, 9, 9, 1])) == [6, 2.5, 2.5, 4, 6, 6, 1]
    assert evaluation.spearman([1, 2, 3, 4, 5], [2, 4, 6, 8, 10]) == pytest.approx(1)
    assert evaluation.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # ranks 1 2.5 2.5 4 and 1 3 2 4: covariance 4.5, variances 4.5 and 5
    assert evaluation.spearman([1, 2, 2, 3], [1, 3, 2, 4]) == pytest.approx(
        4.5 / math.sqrt(4.5 * 5)
    )
    assert math.isnan(evaluation.spearman([1, 1], [1, 2]))
    for x, y in (([1, 10, 100], [5, 6, 7]), ([5, 6, 7], [1, 10, 100])):  # the order alone counts
        assert evaluation.spearman(x, y) == pytest.approx(1)


def test_mean_spearman_of_sets():
    scores = {"en-en": 80, "de-de": 60, "en-de": 40, "tr-en": 20}
    assert evaluation.mean_spearman(scores) == (50, 70, 30)
    everything, mono, cross = evaluation.mean_spearman({"en-de": 40})
    assert (everything, cross) == (40, 40) and math.isnan(mono)


def test_similarity_scores_are_cosines():
    """Of each pair, in its order, set by set; a sentence that is in many is encoded once."""
    v = {t: np.random.default_rng(i).normal(size=3) * 9 for i, t in enumerate("abcd")}
    asked = []

    def encode(texts):
        asked.extend(texts)
        return np.stack([v[t] for t in texts])

    sets = {"en-en": (["a", "b"], ["c", "a"], None), "en-de": (["d"], ["b"], None)}
    got = evaluation.similarity_scores(encode, sets)
    assert sorted(asked) == ["a", "b", "c", "d"]
    for name, (one, two, _) in sets.items():
        want = [v[a] @ v[b] / np.sqrt(v[a] @ v[a] * (v[b] @ v[b])) for a, b in zip(one, two)]
        assert got[name].tolist() == pytest.approx(want)


def test_retrieval_by_hand():
    x = np.eye(4)
    assert evaluation.retrieval(x, x) == (100, 100)
    assert evaluation.retrieval(x, x[[1, 0, 2, 3]]) == (50, 50)
    assert evaluation.retrieval(np.ones((4, 4)), np.ones((4, 4))) == (
        0,
        0,
    )  # all alike must not score
    y = x.copy()
    y[1] = x[0]  # two translations are one: x0 finds a tie, x1 nothing;
    assert evaluation.retrieval(x, y) == (50, 75)  # backwards only y1 is led astray


@pytest.mark.parametrize("block", [1, 3, 10, 1024])
def test_retrieval_against_loops(block):
    """By cosine, whatever the lengths of the vectors; block by block the same."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(10, 4)) * rng.uniform(0.1, 9, (10, 1))
    y = (x + 3 * rng.normal(size=x.shape)) * rng.uniform(0.1, 9, (10, 1))
    cos = np.array([[a @ b / np.sqrt(a @ a * (b @ b)) for b in y] for a in x])
    want = tuple(100 * np.mean(c.argmax(1) == np.arange(10)) for c in (cos, cos.T))
    assert want[0] != want[1] and evaluation.retrieval(x, y, block) == pytest.approx(want)
    assert evaluation.retrieval.__defaults__ == (1024,)


def test_describe_vectors_finds_a_collapsed_teacher():
    v = np.ones((50, 8)) + 1e-3 * np.random.default_rng(0).normal(size=(50, 8))
    norm, cosine, constant_mse = evaluation.describe_vectors(v)
    assert cosine > 0.99 and norm == pytest.approx(8**0.5, rel=1e-2)
    assert constant_mse == pytest.approx(v.var(0).mean(), rel=1e-3)


def test_evaluate_by_hand():
    """Spearman x 100 by set, accuracy both ways, 100 x MSE to the teacher of each side."""
    asked = []

    class Fixed:
        def encode(self, texts, normalize=None):
            asked.append((len(texts), normalize))
            return np.array([[float(t[0]), 1.0] for t in texts])

    sets = {"en-de": (["1a", "2a", "3a"], ["1b", "9b", "1c"], np.array([5, 0, 3]))}
    dev = {"de": (["1", "5", "9"], ["1", "5", "6"]), "fr": (["2", "7"], ["7", "2"])}
    goals = {"de": np.array([[1.0, 1.0], [5.0, 2.0], [9.0, 1.0]]), "fr": np.zeros((2, 2))}
    row, cosines = evaluation.evaluate(Fixed(), sets, dev, goals)
    cos = [(a * b + 1) / math.sqrt((a * a + 1) * (b * b + 1)) for a, b in ((1, 1), (2, 9), (3, 1))]
    assert cosines["en-de"].tolist() == pytest.approx(cos)
    assert row["spearman"] == {"en-de": pytest.approx(100 * evaluation.spearman(cos, [5, 0, 3]))}
    assert abs(row["spearman"]["en-de"]) == pytest.approx(50)
    assert row["accuracy"] == {"de": (100, pytest.approx(200 / 3)), "fr": (0, 0)}
    assert row["mse"]["de"] == pytest.approx([100 * 1 / 6, 100 * (1 + 9) / 6])
    assert row["mse"]["fr"] == pytest.approx([100 * (4 + 49 + 2) / 4] * 2)
    assert asked == [(6, None), (3, False), (3, False), (2, False), (2, False)]
    assert evaluation.evaluate(Fixed(), {}, {}, {}) == (
        {"spearman": {}, "accuracy": {}, "mse": {}},
        {},
    )


def some_scores(*sizes):
    """(sets, a worse and a better model's scores) of so many pairs each."""
    rng = np.random.default_rng(0)
    names = ("en-en", "en-de", "de-de", "fr-de")
    sets = {k: ([], [], rng.permutation(np.arange(float(n)))) for k, n in zip(names, sizes)}
    models = ({k: s[2] + rng.normal(0, sd, len(s[2])) for k, s in sets.items()} for sd in (80, 10))
    return sets, *models


def test_bootstrap_of_a_model_with_itself_and_a_better_one():
    sets, bad, good = some_scores(200, 150)
    assert all(v == [0, 0, 0] for v in evaluation.bootstrap(sets, good, good, 50).values())
    got = evaluation.bootstrap(sets, bad, good, 200)
    score = lambda c, k: 100 * evaluation.spearman(c[k], sets[k][2])
    mono, cross = (score(good, k) - score(bad, k) for k in sets)
    assert got["mono"][0] == pytest.approx(mono) and got["cross"][0] == pytest.approx(cross)
    assert got["all"][0] == pytest.approx((mono + cross) / 2)
    assert all(0 < low < d < high for d, low, high in got.values())
    assert list(evaluation.bootstrap({"en-en": sets["en-en"]}, bad, good, 5)) == ["all", "mono"]
    for n, known in ((10, True), (9, False)):  # of fewer nothing is sure
        assert bool(evaluation.bootstrap(*some_scores(20, n), 5)) == known


def test_bootstrap_against_loops():
    """95 % of a thousand resamples, of both models' same pairs; sets of one length, whose pairs
    translate each other, are drawn alike."""
    sets, a, b = some_scores(11, 13, 11, 13)
    rng, draws = np.random.default_rng(3), []
    for _ in range(40):
        rows = {n: rng.integers(0, n, n) for n in (11, 13)}
        gaps = {}
        for k, (_, _, gold) in sets.items():
            i = rows[len(gold)]
            gaps[k] = 100 * (
                evaluation.spearman(b[k][i], gold[i]) - evaluation.spearman(a[k][i], gold[i])
            )
        draws.append((np.mean([*gaps.values()]), gaps["en-en"] / 2 + gaps["de-de"] / 2))
    got = evaluation.bootstrap(sets, a, b, 40, seed=3)
    for kind, values in zip(("all", "mono"), zip(*draws)):
        bounds = [np.interp(share * 39, range(40), sorted(values)) for share in (0.025, 0.975)]
        assert got[kind][1:] == pytest.approx(bounds)
    assert evaluation.bootstrap.__defaults__ == (1000, 0)


def test_similarity_of_the_demo():
    m = demo.Meaning("one", "man", "tired", "read", "book", "-", "park")
    assert demo.similarity(m, m) == 5 == sum(demo.WEIGHTS)
    assert (
        demo.similarity(m, m._replace(noun="woman")) == 4
        and demo.similarity(m, m._replace(place="hotel")) == 4.5
    )


# --------------------------------------------------------------------------------------- the README
def test_readme_audit_table_is_that_of_the_mutations():
    """Each row names a function, tests that must fail (not all of many), and the changes tried."""
    text = (HERE / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| (.+) \| `([\w.]+)` \| (`test_[^|]+`) \| (\d+) \|$", text, re.M)
    assert all(callable(pkgutil.resolve_name(path)) for _, path, *_ in rows)
    told = {row: (int(n), set(re.findall(r"`(\w+)`", tests))) for row, _, tests, n in rows}
    want = mutations.rows_of(mutations.changes()).items()
    assert {row: n for row, (n, _) in told.items()} == {row: n for row, (n, _) in want}
    assert all(told[row][1] <= set(tests) for row, (_, tests) in want)
    assert all(n >= 4 for n, _ in told.values())
