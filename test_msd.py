"""Tests: hermetic and quick.

Those that compare with outside numbers skip, with a reason, where those are absent.

python -m pytest -q: these, and those in tests/
"""

import ast
import functools
import gzip
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

import data
import model as M
import msd
import train
from demo import corpus as demo
from tools import checkpoints, evaluation

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
    write(
        folder / "sts" / "STS.en-de.txt",
        "".join(f"{a}\t{b}\t{i % 6}\n" for i, (a, b) in enumerate(list(rows.items())[:20])),
    )
    return folder


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
    usual = {"--teacher": world / "teacher", "--train": d / "en-*.tsv", "--dev": d / "en-de.tsv"}
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


@pytest.fixture(scope="session")
@functools.cache
def finished(world):
    done = run(command(world, world / "whole", "--keep"))
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---------------------------------------------------------------------- msd: the losses, the stages
def test_losses_against_loops():
    rng = np.random.default_rng(0)
    x, y, z = (rng.normal(size=(5, 7)) for _ in range(3))
    mse = sum((x[i, d] - y[i, d]) ** 2 for i in range(5) for d in range(7)) / 35
    assert float(msd.mse(*map(torch.tensor, (x, y)))) == pytest.approx(mse, rel=1e-12)
    cos = lambda a, b: (
        sum(p * q for p, q in zip(a, b)) / math.sqrt(sum(p * p for p in a) * sum(q * q for q in b))
    )
    soft = sum((cos(x[i], y[j]) - cos(z[i], z[j])) ** 2 for i in range(5) for j in range(5)) / 25
    assert float(msd.contrastive(*map(torch.tensor, (x, y, z)))) == pytest.approx(soft, rel=1e-12)


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_stage_terms_and_their_gradients(tokenizer, stage):
    """The terms are those of the paper's table, and each alone moves the weights the stage trains,
    and no others."""
    m = tiny(tokenizer, bottleneck_size=8 if stage > 1 else 0)
    y_s, y_t = torch.randn(3, 32), torch.randn(3, 32)
    terms = msd.stage_loss(stage, m, *batch(m, TEXTS[:6]), y_s, y_t)
    assert list(terms) == ["en", "tr"] + ["mcl"] * (stage == 4)
    for name, texts, y in (
        ("en", TEXTS[:3], y_s),
        ("tr", TEXTS[3:6], y_t if stage in (2, 3) else y_s),
    ):
        alone = msd.mse(m(*batch(m, texts), embeddings_only=stage == 2), y)
        gap = abs(terms[name] - alone)
        assert gap < 1e-5 * alone, f"both sides in one call: {name} differs by {gap}"
    for name, term in terms.items():
        m.zero_grad()
        term.backward(retain_graph=True)
        moved = {
            k for k, p in m.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0
        }
        assert any(k.startswith("embeddings.word") for k in moved), name
        assert any(k.startswith("layers.3") for k in moved) == (stage != 2), name
    terms = msd.stage_loss(stage, m, *batch(m, TEXTS[:6]), y_s, y_t, contrast=False)
    assert list(terms) == ["en", "tr"]


@pytest.mark.parametrize("kind", PARITY)
def test_parity_with_the_authors(kind, tmp_path):
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


def test_presets_and_schedule():
    """The authors' configuration, literally, but the bottleneck's start; warm-up over 10 % of the
    steps, then linear to 0."""
    for name, sizes, lr, batches in (
        ("xlmr", (128, (1, 2, 3), 4), (16e-5, 16e-5, 8e-5, 16e-5), (64, 128, 64, 64)),
        ("minilm", (128, (1, 2, 3, 4, 5, 6), 2), (16e-5,) * 4, (64, 256, 64, 64)),
    ):
        p = msd.PRESETS[name]
        assert (
            (p.bottleneck, p.layers, p.recurrence) == sizes
            and p.lr == lr
            and p.batch == batches
            and p.epochs == (20, 10, 10, 60)
        )
        assert (
            p.init == "text"
            and (p.max_tokens, p.max_chars, msd.WEIGHT_DECAY, msd.CLIP, msd.WARMUP)
            == (128, 250, 0.01, 1.0, 0.1)
            and p.max_lines == (500_000, 300_000, 300_000, 500_000)
        )
    for p in msd.PRESETS.values():  # a fifth stage is a fifth value everywhere
        schedule = (p.lr, p.batch, p.epochs, p.max_lines)
        assert [len(values) for values in schedule] == [len(msd.STAGES)] * 4
    data_flags = ["--train", "x", "--teacher", "y"]
    assert train.parse(["--preset", "xlmr", "--bottleneck", "0", *data_flags]).lr == (16e-5,) * 4
    rates = [train.rate_at(s, 100) for s in range(100)]
    assert (
        rates[:3] == pytest.approx([1 / 11, 2 / 11, 3 / 11])
        and rates[10] == 1
        and rates[55] == 0.5
        and rates[99] == pytest.approx(1 / 90)
    )


# -------------------------------------------------------- msd: how a student and an assistant begin
def test_student_start(tokenizer):
    A = tiny(tokenizer)
    S = msd.make_student(A, 8, (1, 2), 3)
    assert (S.config.bottleneck_size, S.config.num_hidden_layers, S.config.recurrence) == (8, 2, 3)
    for l in range(2):
        assert all(
            torch.equal(a, b) for a, b in zip(S.layers[l].parameters(), A.layers[l].parameters())
        )
    E = A.embeddings.word.weight.detach()
    U, s, Vt = torch.linalg.svd(E, full_matrices=False)
    ours = (S.embeddings.word.weight @ S.embeddings.project.weight.T - E).norm()
    assert ours.item() == pytest.approx(
        float(s[8:].norm()), rel=1e-4
    )  # Eckart-Young: nothing is closer
    counts = 10000 // np.arange(1, len(E) + 1)
    W, root = (
        msd.make_student(A, 8, (1, 2), 3, counts=counts),
        torch.tensor(counts)[:, None] ** (3 / 8),
    )
    tail = torch.linalg.svdvals(root * E)[8:].norm()  # the same, rows weighted by count ** 3/4
    assert (
        root * (W.embeddings.word.weight @ W.embeddings.project.weight.T - E)
    ).norm().item() == pytest.approx(float(tail), rel=1e-4)
    assert (
        root * (S.embeddings.word.weight @ S.embeddings.project.weight.T - E)
    ).norm() > 1.01 * tail
    for part in ("position", "token_type", "norm"):
        assert torch.equal(getattr(S.embeddings, part).weight, getattr(A.embeddings, part).weight)
    noise = msd.make_student(A, 8, (1, 2), 3, init="paper")
    assert not torch.equal(
        noise.embeddings.position.weight, A.embeddings.position.weight
    ) and torch.all(noise.embeddings.norm.weight == 1)
    full = msd.make_student(A, 0, (1, 2, 3, 4), 1)
    assert np.abs(full.encode(TEXTS) - A.encode(TEXTS)).max() < 1e-6
    chosen = msd.make_student(A, 8, (1, 4), 3)  # not the paper's: which layers, by number
    for mine, k in zip(chosen.layers, (0, 3), strict=True):
        assert all(map(torch.equal, mine.parameters(), A.layers[k].parameters()))
    for bad in ((8, (1, 5), 1), (32, (1,), 1), (8, (), 1), (8, (0,), 1), (8, (1, 2), 0)):
        with pytest.raises(M.InputError):
            msd.make_student(A, *bad)


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_new_vocabulary_starts_from_the_teachers_pieces(tokenizer, model_type):
    T = tiny(tokenizer, model_type=model_type)
    new = data.train_tokenizer(
        ["a man reads a book", "ein Mann liest ein Buch"] * 3, 120, lower_case=True
    )
    A = msd.make_assistant(T, new)
    piece = next(
        p
        for p in new.get_vocab()
        if p.startswith("▁") and len(T.tokenizer.encode(p[1:], add_special_tokens=False).ids) > 1
    )
    ids = T.tokenizer.encode(piece[1:], add_special_tokens=False).ids
    assert torch.allclose(
        A.embeddings.word.weight[new.token_to_id(piece)],
        T.embeddings.word.weight[ids].mean(0),
        atol=1e-6,
    )
    assert torch.equal(A.embeddings.word.weight[1], torch.zeros(32))
    assert torch.equal(A.embeddings.position.weight, T.embeddings.position.weight)
    assert A.config.first_position == T.config.first_position  # read where the teacher read them


def test_word_alignment_against_loops():
    """IBM Model 1 as in a textbook: t(f | e) from dictionaries, one link at a time."""
    english, foreign = [[7, 8], [7, 9], [9], [8, 8, 7]], [[1, 2], [1, 3], [3, 3], [2, 1]]
    t = {(f, e): 1.0 for es, fs in zip(english, foreign) for e in es for f in fs}
    for _ in range(5):
        count = dict.fromkeys(t, 0.0)
        for es, fs in zip(english, foreign):
            for f in fs:
                for e in es:
                    count[f, e] += t[f, e] / sum(t[f, x] for x in es)
        total = {e: sum(n for (_, x), n in count.items() if x == e) for _, e in t}
        t = {(f, e): n / total[e] for (f, e), n in count.items()}

    def flat(sentences):  # each between a start 50 and an end 51, then one without words
        rows = [[50, *s, 51] for s in sentences] + [[50, 51]]
        return np.concatenate(rows).astype(np.uint32), np.cumsum([0, *map(len, rows)])

    f, e, n = msd.align(*flat(english), *flat(foreign))
    assert {(int(a), int(b)): pytest.approx(c) for a, b, c in zip(f, e, n)} == count
    assert count[1, 7] > 2 * count[1, 9] and n.sum() == pytest.approx(sum(map(len, foreign)))
    short = msd.align(*flat(english), *flat(foreign), longest=4)  # the last pair has six links
    assert short[2].sum() == pytest.approx(6)
    assert all(len(x) == 0 for x in msd.align(*flat([]), *flat([])))


def test_new_vocabulary_learns_translations(tokenizer):
    """A word of another language starts at the row of the English word it stands for, one of both
    at the mean of the two."""
    T = tiny(tokenizer)
    text = [
        ("man", "mann"),
        ("man two", "mann boy"),
        ("two", "boy"),
        ("two", "boy"),
        ("boy", "zon"),
        ("man", "猫"),
    ]
    new = data.train_tokenizer([x for pair in text[:-1] * 20 for x in pair], 60, lower_case=True)
    A = msd.make_assistant(T, new, *zip(*text))
    plain = msd.make_assistant(T, new).embeddings.word.weight

    def row(word):
        ids = T.tokenizer.encode(word, add_special_tokens=False).ids
        return T.embeddings.word.weight[ids].mean(0)

    got = {
        w: A.embeddings.word.weight[new.token_to_id("▁" + w)]
        for w in ("man", "mann", "two", "boy", "zon")
    }
    near = lambda a, b: float(torch.nn.functional.cosine_similarity(a, b, 0).detach())
    assert torch.allclose(got["man"], row("man"), atol=1e-5)
    assert torch.allclose(got["zon"], row("boy"), atol=1e-5)
    assert near(got["mann"], row("man")) > 0.95
    both = (
        3 * row("two") + row("boy")
    ) / 4  # three times a translation of two, once English itself
    assert near(got["boy"], both) > 0.95 > near(got["boy"], row("boy"))
    for name in data.SPECIAL:
        assert torch.equal(
            A.embeddings.word.weight[new.token_to_id(name)], plain[new.token_to_id(name)]
        )
    assert 3 in new.encode("猫").ids  # a character that the vocabulary lacks moves no special row


# ------------------------------------------------------------------------ model: files, safetensors
def test_safetensors_golden_bytes(tmp_path):
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
def plain_encode(m, text, layers=True):
    """One sentence through the encoder, in numpy loops: no batch, no SDPA, no fused projection,
    float64."""
    w = {k: v.double().numpy() for k, v in M.to_hf(m.state_dict()).items()}
    c, E = m.config, "embeddings."
    ids = m.tokenizer.encode(text.strip()).ids
    norm = lambda x, n: (
        (x - x.mean()) / math.sqrt(x.var() + c.layer_norm_eps) * w[n + ".weight"] + w[n + ".bias"]
    )

    def dense(x, n):
        return w[n + ".weight"] @ x + w[n + ".bias"]

    xs = []
    for t, i in enumerate(ids):
        word = w[E + "word_embeddings.weight"][i]
        word = w[E + "word_embeddings_2.weight"] @ word if c.bottleneck_size else word
        position = t if c.model_type == "bert" else c.pad_token_id + 1 + t
        xs.append(
            norm(
                word
                + w[E + "position_embeddings.weight"][position]
                + w[E + "token_type_embeddings.weight"][0],
                E + "LayerNorm",
            )
        )
    for l in [k for _ in range(c.recurrence) for k in range(c.num_hidden_layers)] * layers:
        p, d = f"encoder.layer.{l}.", c.hidden_size // c.num_attention_heads
        q, k, v = (
            [dense(x, p + f"attention.self.{n}") for x in xs] for n in ("query", "key", "value")
        )
        out = []
        for t, x in enumerate(xs):
            heads = []
            for h in range(c.num_attention_heads):
                part = slice(h * d, h * d + d)
                a = np.exp([q[t][part] @ k[u][part] / math.sqrt(d) for u in range(len(xs))])
                heads.append(sum(a[u] / a.sum() * v[u][part] for u in range(len(xs))))
            x = norm(
                x + dense(np.concatenate(heads), p + "attention.output.dense"),
                p + "attention.output.LayerNorm",
            )
            up = dense(x, p + "intermediate.dense")
            up = np.array([z * 0.5 * (1 + math.erf(z / math.sqrt(2))) for z in up])
            out.append(norm(x + dense(up, p + "output.dense"), p + "output.LayerNorm"))
        xs = out
    if layers and c.pooling == "cls":
        return xs[0]
    return sum(xs) / len(xs)  # of the embedding block whatever the pooling: <s> is always the same


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bottleneck_size": 8},
        {"num_hidden_layers": 2, "recurrence": 3},
        {"model_type": "xlm-roberta", "layer_norm_eps": 1e-5},
        {"pooling": "cls", "bottleneck_size": 8},
    ],
    ids=str,
)
def test_encoder_against_plain_loops(tokenizer, changes):
    m = tiny(tokenizer, **changes)
    for layers in (True, False):
        want = np.stack([plain_encode(m, t, layers) for t in TEXTS[:5]])
        got = m.embed(*m.tokenize(TEXTS[:5]), embeddings_only=not layers)
        assert np.abs(got - want).max() < 1e-5
        with torch.enable_grad():  # the training path: attention as two products
            assert (
                np.abs(
                    m(*batch(m, TEXTS[:5]), embeddings_only=not layers).detach().numpy() - want
                ).max()
                < 1e-5
            )


def test_recurrence_is_the_cycle_order(tokenizer):
    """K layers, R times, equal an unrolled stack 1..K, 1..K, and not 1..1, 2..2."""
    m = tiny(tokenizer, num_hidden_layers=2, recurrence=2)
    long = tiny(tokenizer, num_hidden_layers=4)
    for order, same in (([0, 1, 0, 1], True), ([0, 0, 1, 1], False)):
        long.load_state_dict(
            {
                **m.state_dict(),
                **{
                    f"layers.{i}.{k}": v
                    for i, l in enumerate(order)
                    for k, v in m.layers[l].state_dict().items()
                },
            }
        )
        assert np.allclose(long.encode(TEXTS), m.encode(TEXTS), atol=1e-6) == same


def test_bottleneck_shape(tokenizer):
    m = tiny(tokenizer, bottleneck_size=8)
    assert m.embeddings.word.weight.shape == (tokenizer.get_vocab_size(), 8)
    assert m.embeddings.project.weight.shape == (32, 8) and m.embeddings.project.bias is None


def test_poolings(tokenizer):
    x, mask = torch.randn(2, 4, 3), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    rows = [x[0], x[1, :2]]
    for how, f in (
        ("mean", lambda r: r.mean(0)),
        ("cls", lambda r: r[0]),
        ("max", lambda r: r.max(0)[0]),
        ("mean_sqrt_len", lambda r: r.sum(0) / len(r) ** 0.5),
    ):
        assert torch.allclose(M.pool(x, mask, how), torch.stack([f(r) for r in rows]), atol=1e-6), (
            how
        )


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_padding_batch_size_and_order_change_nothing(tokenizer, model_type):
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


def test_fast_paths_equal_plain_ones(tokenizer):
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
def test_long_work_by_packed_matrices(tokenizer, dtype):
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


def test_dropout_is_for_training_alone(tokenizer, tmp_path):
    tiny(tokenizer).save(tmp_path / "m")
    run = train.Run(train.parse(["--out", str(tmp_path / "run"), "--dropout", "0.3"]))
    m, batch = run.load(tmp_path / "m", train=True), (torch.tensor([[0, 9, 8, 2]]),) * 2
    seeded = lambda seed: torch.manual_seed(seed) and m(batch[0], batch[1] > -1)
    assert not torch.equal(seeded(1), seeded(2)) and torch.equal(seeded(3), seeded(3))
    m.eval()
    assert torch.equal(seeded(1), seeded(2))


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta"])
def test_hidden_states_of_transformers(kind, tokenizer, tmp_path):
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
def test_real_teacher():
    """The known score of a published model on English STS benchmark (82.03 in float32; the copy
    here is float16)."""
    m = checkpoints.load(SHARED / "teacher", "float32")
    a, b, gold = data.read_sts(SHARED / "data" / "sts")["en-en"]
    sets = {"en-en": (a[:400], b[:400], gold[:400])}
    scores = evaluation.similarity_scores(m.encode, sets)["en-en"]
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
def test_sizes_to_the_unit(config, embedding, layers, total):
    assert msd.ledger(config) == {
        "embedding": embedding,
        "layers": layers,
        "other": 0,
        "total": total,
    }


# ------------------------------------------------------------------------- model: model directories
def test_save_and_load(tokenizer, tmp_path):
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


def test_vocabulary_larger_than_the_table(tokenizer, tmp_path):
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


def test_a_vocabulary_with_a_gap(tokenizer, tmp_path):
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
def test_reading_pairs_adds_up(tmp_path):
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
    with pytest.raises(M.InputError, match="more than 1 %"):
        list(data.read_pairs(write(tmp_path / "bad.tsv", "a\tb\nno tab\n"), {}))
    with pytest.raises(M.InputError, match="long.tsv: .* a line of more than 1048576 bytes"):
        endless = "x" * (data.LINE_LIMIT + 5) + "\ty\n"
        list(data.read_pairs(write(tmp_path / "long.tsv", endless), {}))
    packed = gzip.compress(good.encode())
    assert len(list(data.read_pairs(write(tmp_path / "en-fr.tsv.gz", packed), {}))) == 995
    for broken in (packed[:-9], packed[:50] + b"\0\0\0" + packed[53:]):
        with pytest.raises(M.InputError, match="en-fr.tsv.gz: .*(end-of-stream|decompressing)"):
            list(data.read_pairs(write(tmp_path / "en-fr.tsv.gz", broken), {}))


# ----------------------------------------------------------------------------- data: the disk store
def test_corpus_store(tmp_path, tokenizer):
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


# ------------------------------------------------------------------------ data: vocabulary, batches
def test_tokenizer_repeats_and_covers(tokenizer):
    text = [
        line
        for x in ("de", "ar")
        for line in (demo.DEMO / f"{x}.txt").read_text("utf-8").splitlines()
    ]
    one, two = (data.train_tokenizer(t, 300, lower_case=True).to_str() for t in (text, text[::-1]))
    assert one == two
    assert (
        tokenizer.encode("Der Mann").ids[0] == 0
        and tokenizer.encode("Der Mann").ids[-1] == 2
        and 3 not in tokenizer.encode("Der Mann liest").ids
    )


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
def test_vocabulary_cut_to_a_text(kind, tmp_path):
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


def test_word_level_cannot_be_cut():
    t = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    with pytest.raises(M.InputError, match="a WordLevel tokenizer; only Unigram, BPE and WordP"):
        data.always_kept(t, 1)


def test_batches_cover_every_pair_once_and_repeat():
    lengths = np.random.default_rng(0).integers(5, 50, 1000)
    batches = data.batch_order(lengths, 16, [0, 1, 0])
    assert sorted(np.concatenate(batches)) == list(range(1000)) and all(
        len(b) == 16 for b in batches if len(b) != 8
    )
    assert all(
        np.array_equal(a, b) for a, b in zip(batches, data.batch_order(lengths, 16, [0, 1, 0]))
    )
    assert not np.array_equal(batches[0], data.batch_order(lengths, 16, [0, 1, 1])[0])
    assert np.mean([np.ptp(lengths[b]) for b in batches]) < 5  # little padding


# ------------------------------------------------------------------------------------- train: a run
def test_end_to_end(world, finished):
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


def test_stages_hand_over(world, finished):
    """Stage 3 trained stage 2's embedding block and the assistant's first layers, so it must differ
    from both."""
    out = world / "whole"
    student = M.load(out / "student").config
    assert student.bottleneck_size == 8
    assert student.num_hidden_layers * student.recurrence == 4
    names = ("assistant", "stages/stage2", "stages/stage3")
    assistant, two, three = (M.load(out / name, "float32").layers for name in names)
    for k in range(2):
        assert torch.equal(two[k].qkv.weight, assistant[k].qkv.weight)
    assert not torch.equal(three[0].qkv.weight, two[0].qkv.weight)


def test_same_bytes_again(world, finished):
    """Another process, hash seed, cache and folder: the same student, to the bit."""
    done = run(command(world, world / "second", "--cache", world / "cache2"), PYTHONHASHSEED="7")
    assert done.returncode == 0, done.stderr
    for model in ("assistant", "student"):
        for file in ("model.safetensors", "config.json", "tokenizer.json"):
            one, two = (world / run / model / file for run in ("second", "whole"))
            assert one.read_bytes() == two.read_bytes(), model
    left = {"assistant", "student", "results.json", "log.jsonl", "run.json"}
    assert {p.name for p in (world / "second").iterdir()} == left  # without --keep


def test_layers_by_number():
    assert [train.layer_list(x) for x in ("3", "1,6,12", "12,")] == [(1, 2, 3), (1, 6, 12), (12,)]


def test_which_pairs_a_stage_trains_on(world, tmp_path, capsys):
    """--extra is for stages 2 and 3 alone, --max-lines for each; a file of both counts once; a
    stage that would have none stops the run before any work. Names may hold brackets."""
    place = tmp_path / "a [1]"
    files = [tsv(place, n) / "en-de.tsv" for n in (40,)]
    more = write(place / "en-tr.tsv", "one\tbir\ntwo\tiki\n")
    twice = place / ".." / place.name / files[0].name
    flags = ["--train", *files, "--extra", more, "--extra", twice, "--max-lines", "40,10,40,5"]
    run = train.Run(train.parse(command(world, tmp_path / "x", *flags)[2:]))
    train.read_inputs(run)
    assert [len(train.stage_pairs(run, k)) for k in (1, 2, 3, 4)] == [40, 12, 42, 5]
    write(files[0], "english\tgerman\none\teins\n")
    flags[-1] = "9,9,9,1"
    with pytest.raises(M.InputError, match="stage 4 has no pairs: .*--max-lines 1 were dropped"):
        train.main(command(world, tmp_path / "y", *flags)[2:])
    assert not (tmp_path / "y" / "run.json").exists()


def test_ablations_by_flags(world, finished, tmp_path, capsys):
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


# ------------------------------------------------------------------ train: the loop, the checkpoint
def test_optimizer_and_fit(tokenizer, tmp_path, monkeypatch):
    """No decay on biases and LayerNorm; the best dev reading's weights are kept; what reaches the
    optimizer is a clipped gradient and the schedule's rate."""
    m = tiny(tokenizer)
    optimizer = train.make_optimizer(m, 1e-3)
    decayed = {
        id(q) for g in optimizer.param_groups if g["weight_decay"] == 0.01 for q in g["params"]
    }
    assert (
        decayed
        == {id(q) for k, q in m.named_parameters() if not k.endswith("bias") and "norm" not in k}
        and optimizer.defaults["eps"] == 1e-6
    )
    norms, rates, real = [], [], torch.optim.AdamW.step

    def spy(optimizer, *args, **options):
        rates.append({g["lr"] for g in optimizer.param_groups})
        grads = [q.grad for g in optimizer.param_groups for q in g["params"] if q.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(grads)))
        return real(optimizer, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    run = train.Run(train.parse(["--out", str(tmp_path)]))
    kept, readings = {}, iter([4.0, 3.0, 1.0, 2.0])
    target = m.embeddings.norm.bias

    def dev():
        value = next(readings)
        kept[value] = target.detach().clone()
        return value

    train.fit(run, "x", m, 8, 1e-2, lambda step: ({"a": 1e6 * (target - 1).square().sum()}, 1), dev)
    assert torch.equal(target, kept[1.0]) and not torch.equal(kept[1.0], kept[2.0])
    log = [json.loads(x) for x in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[0]["norm"] > 1e6 and max(norms) < 1.001 * msd.CLIP
    assert rates == [{1e-2 * train.rate_at(step, 8)} for step in range(8)]


def test_fused_adamw_equals_the_plain_one(tokenizer):
    one, two = tiny(tokenizer), tiny(tokenizer)
    fused, plain = (train.make_optimizer(m, 1e-3) for m in (one, two))
    for group in plain.param_groups:
        group["fused"] = False
    for _ in range(3):
        for m, optimizer in ((one, fused), (two, plain)):
            optimizer.zero_grad()
            m(*batch(m, TEXTS[:3])).square().mean().backward()
            optimizer.step()
    gap = max((a - b).abs().max() for a, b in zip(one.parameters(), two.parameters()))
    assert 0 < (one.layers[0].up.weight - tiny(tokenizer).layers[0].up.weight).abs().max()
    assert gap < 2e-5, f"fused AdamW differs by {gap}, after three steps of 1e-3"


def test_nothing_waits_for_a_gpu(tokenizer):
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


def test_a_loss_that_is_not_finite_stops(world, finished, tmp_path):
    done = run(command(world, tmp_path / "nan", "--lr", "1e30"))
    assert (
        done.returncode == 2
        and "stage 1: by step" in done.stderr
        and "not finite. Choose a lower --lr and another --out" in done.stderr
    )
    assert not (tmp_path / "nan" / "assistant").exists()


def test_every_stage_resumes_to_the_bit(world, finished, tmp_path, monkeypatch):
    """Each stage stopped after its second step by an exception in its third, then continued: the
    uninterrupted bits."""
    args = command(world, tmp_path / "run", "--keep")[2:]
    real, stopped = train.stage_batches, set()
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)

    def fragile(run, stage, *rest):
        loss_at, steps = real(run, stage, *rest)

        def at(step):
            if (
                step == 2 and stage not in stopped and len(rest) == 5
            ):  # in training: epochs is given
                stopped.add(stage)
                raise KeyError("the power is gone")
            return loss_at(step)

        return at, steps

    monkeypatch.setattr(train, "stage_batches", fragile)
    for _ in range(4):
        with pytest.raises(KeyError, match="power"):
            train.main(args)
    train.main(args)
    assert stopped == {1, 2, 3, 4}
    for name in ("assistant", "stages/stage2", "stages/stage3", "student"):
        one, two = (x / name / "model.safetensors" for x in (tmp_path / "run", world / "whole"))
        assert one.read_bytes() == two.read_bytes(), name


STARTS = {1: "assistant-start", 2: "student-start", 3: "stage2", 4: "stage3"}


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_stages_get_their_inputs_and_targets(world, finished, stage, monkeypatch, tmp_path):
    """What reaches the loss in a run: the model from the stage before, each pair's own target,
    from the right source."""
    out, seen = world / "whole", {}

    def spy(k, model, ids, mask, y_s, y_t=None, contrast=True, gather=None):
        if k == stage and not seen:
            source = M.load(world / "teacher" if k in (1, 4) else out / "assistant", "float32")
            before = M.load(out / "stages" / STARTS[k], "float32")
            texts = [before.tokenizer.decode(row[m].tolist()) for row, m in zip(ids, mask)]
            seen.update(
                en=texts[: len(y_s)],
                tr=texts[len(y_s) :],
                y_s=y_s,
                y_t=y_t,
                contrast=contrast,
                source=source,
            )
            old = before.state_dict()
            seen["same"] = [
                n for n, p in model.named_parameters() if n in old and torch.equal(p, old[n])
            ]
            seen["all"] = [n for n, _ in model.named_parameters()]
            raise KeyError("seen")
        return terms(k, model, ids, mask, y_s, y_t, contrast)

    terms = msd.stage_loss
    monkeypatch.setattr(msd, "stage_loss", spy)
    args = command(world, tmp_path / "run", "--dtype", "float32")[2:]
    monkeypatch.setattr(train.Run, "has", lambda run, folder: folder.exists())  # made by another
    (tmp_path / "run" / "stages").mkdir(parents=True)
    done = ["assistant"] * (stage > 1) + [f"stages/{STARTS[k]}" for k in range(1, stage + 1)]
    for name in done:  # the stages before are done
        (tmp_path / "run" / name).symlink_to(out / name)
    with pytest.raises(KeyError, match="seen"):
        train.main(args)
    assert set(seen["same"]) == set(seen["all"])
    if stage == 2:  # the SVD start: the assistant's positions, norm and first layers
        assistant = M.load(out / "assistant", "float32").state_dict()
        begun = M.load(out / "stages" / STARTS[2], "float32").state_dict()
        parts = [k for k in begun if not k.startswith(("embeddings.word", "embeddings.project"))]
        assert parts and all(torch.equal(begun[k], assistant[k]) for k in parts)
    pairs = dict(line.split("\t") for line in (world / "d" / "en-de.tsv").read_text().splitlines())
    assert [pairs[e] for e in seen["en"]] == seen["tr"]
    embed = lambda texts: seen["source"].embed(
        *seen["source"].tokenize(texts), embeddings_only=stage == 2
    )
    assert (seen["y_t"] is None) == (stage in (1, 4))
    for side, y in (("en", seen["y_s"]), ("tr", seen["y_t"])):
        gap = 0 if y is None else np.abs(embed(seen[side]) - y.numpy()).max()
        assert gap < 2e-3, f"targets cached in float16 differ by {gap}"


# ------------------------------------------------------------------ train: several processes, a GPU
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


def test_two_processes_give_the_gradients_of_one(world, finished, tmp_path):
    """The gradients of two processes are those of one, in every stage and every batch of a pass.

    The last batch has one pair and leaves a process without any. The loss terms are the same, too,
    the contrastive one over all pairs of the batch, and so is the dev loss of a single batch.
    """
    dev = write(
        tmp_path / "en-de.tsv", "".join(f"{w} red\tder {w}\n" for w in ("old", "new", "big"))
    )
    file = script(
        tmp_path / "gradients.py",
        """
def fit(run, name, model, steps, lr, loss_at, dev_loss=None):
    for step in range(8):
        model.zero_grad()
        terms = loss_at(step)[0]
        sum(terms.values()).backward()
        if run.rank == 0:
            named = model.named_parameters()
            grads = {k: q.grad for k, q in named if q.grad is not None}
            M.write_safetensors(run.out / f"{name[-1]}-{step}", {**terms, **grads})
    if run.rank == 0:
        M.write_safetensors(run.out / f"{name[-1]}-dev", {"dev": train.torch.tensor(dev_loss())})
    else:
        dev_loss()
    return model
train.fit = fit
""",
    )
    for out, launch in (("one", lambda a: a), ("two", torchrun)):
        more = "--batch 17 --dropout 0 --dtype float32 --device cpu --dev".split()
        args = command(world, tmp_path / out, *more, dev, script=file)
        done = run(launch(args))
        assert done.returncode == 0, done.stderr
    seen = 0
    for one in sorted((tmp_path / "one").glob("[1-4]-*")):
        a, b = M.read_safetensors(one)[0], M.read_safetensors(tmp_path / "two" / one.name)[0]
        assert set(a) == set(b) and (one.name[0] != "4" or "dev" in one.name or "mcl" in a)
        for k in a:
            assert torch.allclose(
                a[k], b[k], rtol=1e-4, atol=1e-5 * float(a[k].abs().max()) + 1e-9
            ), (one.name, k)
        seen += len(a)
    assert seen > 4 * 8 * 10


# --------------------------------------------------------------------- train: evaluation, the table
def test_spearman_by_hand():
    assert list(evaluation.ranks([10, 20, 20, 30])) == [1, 2.5, 2.5, 4]
    assert evaluation.spearman([1, 2, 3, 4, 5], [2, 4, 6, 8, 10]) == pytest.approx(1)
    assert evaluation.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # ranks 1 2.5 2.5 4 and 1 3 2 4: covariance 4.5, variances 4.5 and 5
    assert evaluation.spearman([1, 2, 2, 3], [1, 3, 2, 4]) == pytest.approx(
        4.5 / math.sqrt(4.5 * 5)
    )
    assert math.isnan(evaluation.spearman([1, 1], [1, 2]))


def test_retrieval():
    x = np.eye(4)
    assert evaluation.retrieval(x, x) == (100, 100)
    assert evaluation.retrieval(x, x[[1, 0, 2, 3]]) == (50, 50)
    assert evaluation.retrieval(np.ones((4, 4)), np.ones((4, 4))) == (
        0,
        0,
    )  # all alike: 0
    y = x.copy()
    y[1] = x[0]  # two translations are one: x0 finds a tie, x1 nothing;
    assert evaluation.retrieval(x, y) == (50, 75)  # backwards only y1 is led astray


def test_look_finds_a_collapsed_teacher():
    v = np.ones((50, 8)) + 1e-3 * np.random.default_rng(0).normal(size=(50, 8))
    norm, cosine, constant_mse = evaluation.describe_vectors(v)
    assert cosine > 0.99 and norm == pytest.approx(8**0.5, rel=1e-2)
    assert constant_mse == pytest.approx(v.var(0).mean(), rel=1e-3)


def test_evaluate_by_hand():
    class Fixed:
        def encode(self, texts, normalize=None):
            return np.array([[float(t[0]), 1.0] for t in texts])

    row, _ = evaluation.evaluate(
        Fixed(),
        {"en-de": (["1a", "2a"], ["1b", "9b"], np.array([5, 0]))},
        {"de": (["1", "5"], ["1", "5"])},
        {"de": np.array([[1.0, 1.0], [5.0, 2.0]])},
    )
    assert (
        row["spearman"]["en-de"] == pytest.approx(100)
        and row["accuracy"]["de"] == (100, 100)
        and row["mse"]["de"] == pytest.approx([25, 25])
    )
    assert evaluation.mean_spearman({"en-en": 80, "de-de": 60, "en-de": 40}) == (60, 70, 40)


def test_bootstrap():
    """A model against itself: no difference, ever. A better one: the bounds hold the difference,
    and exclude 0."""
    rng, gold = np.random.default_rng(0), np.arange(200.0)
    sets = {"en-en": ([], [], gold), "en-de": ([], [], gold[:150])}
    good, bad = (
        {k: s[2] + rng.normal(0, sd, len(s[2])) for k, s in sets.items()} for sd in (10, 80)
    )
    assert all(v == [0, 0, 0] for v in evaluation.bootstrap(sets, good, good, 50).values())
    got = evaluation.bootstrap(sets, bad, good, 200)
    want = [
        100 * (evaluation.spearman(good[k], sets[k][2]) - evaluation.spearman(bad[k], sets[k][2]))
        for k in sets
    ]
    assert (
        got["mono"][0] == pytest.approx(want[0])
        and got["cross"][0] == pytest.approx(want[1])
        and got["all"][0] == pytest.approx(np.mean(want))
    )
    assert all(0 < low < d < high for d, low, high in got.values())


def test_scores():
    m = demo.Meaning("one", "man", "tired", "read", "book", "-", "park")
    assert demo.similarity(m, m) == 5 == sum(demo.WEIGHTS)
    assert (
        demo.similarity(m, m._replace(noun="woman")) == 4
        and demo.similarity(m, m._replace(place="hotel")) == 4.5
    )


# --------------------------------------------------------------------------------------- the README
def test_audit_table_of_the_readme():
    """Every function and every test that it names exists."""
    text = (HERE / "README.md").read_text("utf-8")
    rows = re.findall(r"\| `(\w+)\.([\w.]+)` \| (`test_.*) \|", text)
    assert len(rows) > 20
    for module, path, tests in rows:
        node = ast.parse((HERE / f"{module}.py").read_text("utf-8"))
        for name in path.split("."):
            node = next(n for n in node.body if getattr(n, "name", None) == name)
        assert all(callable(globals().get(t)) for t in re.findall(r"`(\w+)`", tests)), tests
