"""The loop, its checkpoint, and what every stage gets: pairs, targets, dev, a share of a batch."""

import math
import multiprocessing
import os
import random
import signal
import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch

import data
import model as M
import msd
import train
from test_msd import (
    apart,
    batch,
    command,
    pad_at,
    plain_stage_loss,
    random64,
    rough,
    same,
    tiny,
    write,
)
from tools import evaluation


# ------------------------------------------------------------------- fixtures that can tell a stage
def some_pairs(n, seed):
    """n distinct English sentences of 1 to 7 words, and translations of other lengths."""
    words = "red blue green old new small big fast slow warm".split()
    rng, rows = random.Random(seed), {}
    while len(rows) < n:
        one, two = (" ".join(rng.choices(words, k=rng.randint(1, 7))) for _ in range(2))
        rows[one] = two[::-1]
    return list(rows.items())


def pair_file(path, pairs):
    return write(path, "".join(f"{a}\t{b}\n" for a, b in pairs))


STAGE = {"batch": (4, 5, 6, 7), "lr": (1e-3, 2e-3, 3e-3, 4e-3), "epochs": (2, 1.5, 1, 2.5)}


@pytest.fixture(scope="session")
def models(tokenizer, tmp_path_factory):
    """{name: folder}: a teacher, an assistant with a pad id of its own, and its student."""
    root = tmp_path_factory.mktemp("models")
    own = {"model_type": "roberta", "pad_token_id": 7}
    assistant = rough(tiny(pad_at(tokenizer, 7), seed=5, std=0.2, **own))
    made = {"teacher": rough(tiny(tokenizer, seed=6, std=0.2, pooling="cls"))}
    made["assistant"] = assistant
    made["student"] = msd.make_student(assistant, 8, (1, 2), 2)
    for name, model in made.items():
        model.save(root / name)
    return {name: root / name for name in made}


@pytest.fixture
def small(tmp_path, models):
    """run(*flags): a run of 21 pairs, 8 more for stages 2 and 3, and 9 of dev, ready for a stage.
    An English sentence has two translations; all that a stage may have of its own differs."""
    pairs, extra = some_pairs(20, 1), some_pairs(8, 2)
    pairs.append((pairs[3][0], pairs[4][1]))
    files = [pair_file(tmp_path / "in" / "en-de.tsv", pairs)]
    more = [pair_file(tmp_path / "in" / "en-tr.tsv", extra)]
    dev = [pair_file(tmp_path / "in" / "dev" / "en-de.tsv", some_pairs(9, 3))]

    def run(*flags, name="run"):
        each = [x for k, v in STAGE.items() for x in (f"--{k}", ",".join(map(str, v)))]
        usual = "--dtype float32 --device cpu --seed 3 --dropout 0.1".split()
        usual += ["--teacher", models["teacher"], "--train", files[0], "--extra", more[0]]
        usual += ["--dev", dev[0], "--cache", tmp_path / "cache", "--out", tmp_path / name]
        args = train.parse([str(x) for x in (*usual, *each, *flags)])
        args.out.mkdir(exist_ok=True)
        made = train.Run(args)
        made.sts, made.corpus = {}, data.build_corpus(files, args.cache, more)
        made.dev = data.build_corpus(dev, args.cache)
        made.pairs = {k: pairs + extra * (k in (2, 3)) for k in msd.STAGES}
        return made

    return run


def caught_fit(monkeypatch, run, stage, models, start="student"):
    """What train_stage gives to fit: its arguments by name; nothing is trained."""
    given = []
    monkeypatch.setattr(train, "fit", lambda *a: given.append(a))
    train.train_stage(run, stage, models, models[start], run.out / f"after{stage}")
    names = ("run", "name", "model", "steps", "lr", "loss_at", "dev_loss")
    return SimpleNamespace(**dict(zip(names, given[0])))


def caught_losses(monkeypatch):
    """A list to which each call of msd.stage_loss adds its arguments and its terms."""
    calls, real = [], msd.stage_loss

    def spy(stage, model, ids, mask, y_s, y_t=None, contrast=True, gather=None):
        terms = real(stage, model, ids, mask, y_s, y_t, contrast, gather)
        call = dict(stage=stage, model=model, ids=ids, mask=mask, y_s=y_s, y_t=y_t)
        calls.append(SimpleNamespace(**call, contrast=contrast, gather=gather, terms=terms))
        return terms

    monkeypatch.setattr(msd, "stage_loss", spy)
    return calls


def texts_of(model, sentences):
    """{ids of a sentence: the sentence}, to read a batch by."""
    return {tuple(model.tokenize([t])[0].tolist()): t for t in sentences}


def read_batch(call, known):
    """The sentences of a batch that stage_loss was given: (English, translations)."""
    rows = [known[tuple(row[m].tolist())] for row, m in zip(call.ids, call.mask)]
    return rows[: len(rows) // 2], rows[len(rows) // 2 :]


# ------------------------------------------------------------------ train: the loop, the checkpoint
class Toy(torch.nn.Module):
    """The smallest thing that fit trains: a decayed weight, a bias and a norm's weight."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([[1.0, -2.0], [0.5, 3.0]]))
        self.bias = torch.nn.Parameter(torch.tensor([0.5, -0.25]))
        self.norm = torch.nn.LayerNorm(2)


def toy_terms(toy, scale=1.0):
    """Two loss terms with different gradients in every weight."""
    one = toy.norm(toy.bias + toy.weight.sum(0))
    return {
        "a": scale * (one - 3).square().mean(),
        "b": scale * (toy.weight.square().mean() + (toy.bias + one).pow(3).mean()),
    }


def a_run(place, **changes):
    run = train.Run(train.parse(["--out", str(place), "--device", "cpu", "--dtype", "float32"]))
    place.mkdir(exist_ok=True)
    vars(run).update(changes)
    return run


def caught_steps(monkeypatch):
    """A list of what reached AdamW at each step: {name of group: ...} rates and gradients."""
    steps, real = [], torch.optim.AdamW.step

    def spy(optimizer, *args, **options):
        groups = optimizer.param_groups
        grads = [q.grad.clone() for g in groups for q in g["params"]]
        steps.append(SimpleNamespace(rates={g["lr"] for g in groups}, grads=grads))
        return real(optimizer, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    return steps


def by_group(toy):
    """Its parameters in the order of make_optimizer's groups."""
    return [toy.weight, toy.bias, toy.norm.weight, toy.norm.bias]


def norm_of(grads):
    return math.sqrt(sum(float(g.double().square().sum()) for g in grads))


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_fit_gives_adamw_the_clipped_gradient_of_the_sum(tmp_path, monkeypatch, scale):
    """At each step that of this step's terms, all of them, 1:1, as it is where its norm is below 1,
    else at norm 1; at the schedule's rate. The log says the terms and the norm before the cut."""
    steps, want, toy = caught_steps(monkeypatch), [], Toy()

    def loss_at(step):
        terms = toy_terms(toy, scale * (step + 1))
        grads = torch.autograd.grad(sum(toy_terms(toy, scale * (step + 1)).values()), by_group(toy))
        assert step == len(want)
        want.append(({k: float(v.detach()) for k, v in terms.items()}, grads))
        return terms, 1

    train.fit(a_run(tmp_path), "x", toy, 7, 1e-2, loss_at)
    log = [e for e in train.read_log(tmp_path) if "loss" in e]
    assert len(steps) == len(want) == len(log) == 7
    for i, (got, (terms, grads), entry) in enumerate(zip(steps, want, log)):
        norm = norm_of(grads)
        assert (norm > 1) == (scale > 1)
        cut = max(norm, 1)
        assert all(torch.allclose(a, b / cut, rtol=1e-4) for a, b in zip(got.grads, grads))
        assert got.rates == {1e-2 * train.rate_at(i, 7)}
        assert {k: entry[k] for k in terms} == pytest.approx(terms, rel=1e-6)
        assert entry["loss"] == pytest.approx(sum(terms.values()), rel=1e-6)
        assert entry["norm"] == pytest.approx(norm, rel=1e-5)
        assert (entry["step"], entry["lr"]) == (i, pytest.approx(1e-2 * train.rate_at(i, 7)))


def test_fit_trains_in_training_mode_with_dropout_by_seed(tmp_path):
    """What a step draws depends on seed, stage, step and process, and on nothing before it."""

    def drawn(seed=0, name="x", rank=0, steps=3, more=0):
        run, toy, seen = a_run(tmp_path, rank=rank), Toy().eval(), []
        run.args.seed = seed

        def loss_at(step):
            assert toy.training
            seen.append(float(torch.rand(())))
            torch.rand(more)  # a longer sentence draws more
            return toy_terms(toy), 1

        (tmp_path / "log.jsonl").unlink(missing_ok=True)
        train.fit(run, name, toy, steps, 1e-3, loss_at)
        return seen

    usual = drawn()
    assert len(set(usual)) == 3 and usual == drawn(more=7) == drawn(steps=5)[:3]
    others = drawn(seed=1), drawn(name="y"), drawn(rank=1)
    assert all(not set(usual) & set(other) for other in others)


READINGS = {3: 4.0, 5: 1.0, 8: 1.0, 10: 3.0}  # dev by steps made: the best is in the middle


def fit_toy(run, toy, stop_at=None, saves=10):
    """Ten steps of a toy with dropout and READINGS, the first ones saved; at stop_at the power
    goes."""
    made = []

    def loss_at(step):
        patch.setattr(train, "SAVE_SECONDS", -1 if step < saves else 1e9)
        if step == stop_at:
            raise KeyError("the power is gone")
        made.append(step + 1)
        noise = torch.nn.functional.dropout(toy.weight, 0.5)
        return {"noise": (noise - 1).square().mean(), **toy_terms(toy, 1e-2)}, 1

    seen = {}

    def dev():
        seen[made[-1]] = [q.detach().clone() for q in toy.parameters()]
        return READINGS[made[-1]]

    with pytest.MonkeyPatch.context() as patch:
        train.fit(run, "x", toy, 10, 0.05, loss_at, dev)
    return seen


def untimed(log):
    return [{k: v for k, v in e.items() if k not in ("tokens_per_s", "seconds")} for e in log]


def test_fit_keeps_the_weights_of_the_best_dev_reading(tmp_path):
    """Dev is read four times, evenly; of two equal readings the first one's weights are kept."""
    toy = Toy()
    seen = fit_toy(a_run(tmp_path), toy)
    assert list(seen) == list(READINGS)
    assert all(map(torch.equal, toy.parameters(), seen[5]))
    assert not any(map(torch.equal, seen[8], seen[5]))
    log = train.read_log(tmp_path)
    assert {e["step"] + 1: e["dev"] for e in log if "dev" in e} == READINGS
    assert log[-1]["best_dev"] == 1.0 and log[-1]["done"] and log[-1]["steps"] == 10


def test_fit_without_dev_keeps_the_last_weights(tmp_path):
    one, two = Toy(), Toy()
    train.fit(a_run(tmp_path), "x", one, 3, 0.05, lambda step: (toy_terms(one), 1))
    optimizer = train.make_optimizer(two, 0.05)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.05 * train.rate_at(
            step, 3
        )
        optimizer.zero_grad()
        sum(toy_terms(two).values()).backward()
        torch.nn.utils.clip_grad_norm_(two.parameters(), 1.0)
        optimizer.step()
    assert all(map(torch.equal, one.parameters(), two.parameters()))
    assert train.read_log(tmp_path)[-1]["best_dev"] is None


@pytest.mark.parametrize("saves, stop_at", [(1, 1), (2, 4), (4, 6), (6, 9), (9, 9)])
def test_fit_resumes_to_the_bit(tmp_path, saves, stop_at):
    """Stopped anywhere, before or after the best reading, and continued: the same weights, AdamW
    state and log as if nothing had been. What the checkpoint does not hold is done again."""
    whole, again = Toy(), Toy()
    fit_toy(a_run(tmp_path / "whole"), whole)
    with pytest.raises(KeyError, match="power"):
        fit_toy(a_run(tmp_path / "run"), again, stop_at, saves)
    for q in again.parameters():
        q.data.fill_(9)  # all that matters is in the file
    file = tmp_path / "run" / "checkpoint.safetensors"
    tensors, meta = M.read_safetensors(file)
    M.write_safetensors(file, tensors, meta | {"seconds": "1000"})
    fit_toy(a_run(tmp_path / "run"), again)
    assert all(map(torch.equal, whole.parameters(), again.parameters()))
    assert untimed(train.read_log(tmp_path / "run")) == untimed(train.read_log(tmp_path / "whole"))
    one, two = (
        M.read_safetensors(tmp_path / x / "checkpoint.safetensors") for x in ("run", "whole")
    )
    assert set(one[0]) == set(two[0]) and all(torch.equal(v, two[0][k]) for k, v in one[0].items())
    assert one[1] | {"seconds": ""} == two[1] | {"seconds": ""}
    assert (two[1]["stage"], two[1]["step"], two[1]["best"]) == ("x", "9", "1.0")
    assert train.read_log(tmp_path / "run")[-1]["seconds"] >= 1000


def test_fit_saves_when_it_is_due(tmp_path, monkeypatch):
    """After SAVE_SECONDS, but not after the last step. The checkpoint of another stage is not its
    own."""
    assert train.SAVE_SECONDS == 60 and train.EVALS == 4
    saved, toy = [], Toy()
    monkeypatch.setattr(train.Training, "save", lambda self, step: saved.append(step))
    M.write_safetensors(tmp_path / "checkpoint.safetensors", {}, {"stage": "y", "step": "2"})
    for seconds in (-1, 1e9):
        monkeypatch.setattr(train, "SAVE_SECONDS", seconds)
        train.fit(a_run(tmp_path), "x", toy, 4, 1e-3, lambda step: (toy_terms(toy), 1))
        assert saved == [1, 2, 3]


def test_fit_saves_every_minute(tmp_path, monkeypatch):
    """Once more than SAVE_SECONDS have passed since the last save, or the start. The log says how
    long it took, to a tenth of a second."""
    now, saved, toy = [1e4], [], Toy()
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: now[0]))
    real = train.Training.save
    monkeypatch.setattr(train.Training, "save", lambda *a: (saved.append(a[1]), real(*a)))

    def loss_at(step):
        now[0] += 20 if step < 12 else 20.34
        return toy_terms(toy), 1

    train.fit(a_run(tmp_path), "x", toy, 13, 1e-3, loss_at)
    assert saved == [4, 8, 12] and train.read_log(tmp_path)[-1]["seconds"] == 260.3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_fit_leaves_after_the_step_of_a_signal(tmp_path, number):
    """Saved, and with the exit code of a process that the signal ended."""
    toy = Toy()

    def loss_at(step):
        if step == 2:
            signal.raise_signal(number)
        return toy_terms(toy), 1

    with pytest.raises(SystemExit) as left:
        train.fit(a_run(tmp_path), "x", toy, 9, 1e-3, loss_at)
    assert left.value.code == 128 + number
    assert M.read_safetensors(tmp_path / "checkpoint.safetensors")[1]["step"] == "3"


def test_deferred_signals_leaves_an_ignored_one_ignored():
    """A script's job in the background: the keyboard's signal is not for it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with train.deferred_signals() as caught:
            signal.raise_signal(signal.SIGINT)
        assert not caught and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def a_training(place):
    """A Training that is saved after 5 of 9 steps."""
    toy = Toy()
    training = train.Training(a_run(place), "x", toy, train.make_optimizer(toy, 1e-3), 9)
    training.save(5)
    return training


def test_restore_forgets_what_its_log_says_of_later_steps(tmp_path):
    """Of its own stage alone: what the others said stays."""
    training = a_training(tmp_path)
    said = [{"stage": stage, "step": step} for stage in "wxy" for step in (4, 5, 99)]
    for entry in said:
        training.run.log(**entry)
    assert training.restore() == 5
    kept = [e for e in said if e["stage"] != "x" or e["step"] == 4]
    assert [{k: e[k] for k in ("stage", "step")} for e in train.read_log(tmp_path)] == kept


def test_restore_refuses_what_is_not_its_checkpoint(tmp_path):
    """Of another run, or with a weight of another shape, even one that could be broadcast."""
    training = a_training(tmp_path)
    tensors, meta = M.read_safetensors(training.file)
    for key in ("", "z"):
        M.write_safetensors(training.file, tensors, meta | {"run": key})
        with pytest.raises(M.InputError, match="not of this run; delete it to redo x"):
            training.restore()
    for n in (1, 3):
        M.write_safetensors(training.file, tensors | {"best.bias": torch.zeros(n)}, meta)
        told = "best.bias is of another shape; delete it to redo x"
        with pytest.raises(M.InputError, match=told):
            training.restore()


@pytest.mark.parametrize("value", [math.nan, math.inf, 0])
def test_fit_stops_at_a_loss_that_is_not_finite(tmp_path, monkeypatch, value):
    """Or at such a gradient of a loss of 0, before anything is saved over; the line says what to
    do. Once is enough, even where the next losses are finite again."""
    told = (
        "x: by step {} the loss or the gradient norm is not finite. Choose a lower --lr and anoth"
    )
    # It looks at every fifth step of 500, and before a save.
    for seconds, found, saved in ((-1, 4, "3"), (1e9, 5, None)):
        monkeypatch.setattr(train, "SAVE_SECONDS", seconds)
        run, toy = a_run(tmp_path / str(found)), Toy()

        def loss_at(step, toy=toy):
            root = (toy.weight * 0).square().sum().sqrt()  # 0, of no finite gradient
            spoilt = torch.tensor(value) if value else root
            return toy_terms(toy) | ({"c": spoilt} if step == 3 else {}), 1

        with pytest.raises(M.InputError, match=told.format(found)):
            train.fit(run, "x", toy, 500, 1e-3, loss_at)
        file = run.out / "checkpoint.safetensors"
        assert file.exists() == bool(saved)
        assert not saved or M.read_safetensors(file)[1]["step"] == saved


def test_make_optimizer_groups(tokenizer):
    """Decay 0.01 on matrices and tables, none on biases and LayerNorm: every weight once."""
    m = tiny(tokenizer, bottleneck_size=8, dense=((24, "tanh", True),))
    optimizer = train.make_optimizer(m, 3e-3)
    name_of = {id(q): k for k, q in m.named_parameters()}
    decays = {
        name_of[id(q)]: g["weight_decay"] for g in optimizer.param_groups for q in g["params"]
    }
    tables = [f"embeddings.{x}.weight" for x in ("word", "project", "position", "token_type")]
    maps = [f"layers.{i}.{x}.weight" for i in range(4) for x in ("qkv", "out", "up", "down")]
    want = dict.fromkeys(name_of.values(), 0.0)
    want |= dict.fromkeys([*tables, *maps, "dense.0.linear.weight"], 0.01)
    assert decays == want
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(name_of)
    for g in optimizer.param_groups:
        assert (g["lr"], g["betas"], g["eps"], g["amsgrad"]) == (3e-3, (0.9, 0.999), 1e-6, False)
        assert not g["maximize"] and g["fused"]


def test_make_optimizer_against_adamw_by_hand():
    """Three steps in float64: moments, bias correction, eps, decay apart from the gradient."""
    toy, lr = Toy().double(), 0.1
    optimizer = train.make_optimizer(toy, lr)
    plain = {k: q.detach().clone() for k, q in toy.named_parameters()}
    m, v = ({k: torch.zeros_like(q) for k, q in plain.items()} for _ in range(2))
    for step in range(1, 4):
        optimizer.zero_grad()
        sum(toy_terms(toy, 1e-5).values()).backward()  # so small that eps matters
        for k, q in toy.named_parameters():
            m[k] = 0.9 * m[k] + 0.1 * q.grad
            v[k] = 0.999 * v[k] + 0.001 * q.grad**2
            rise = (m[k] / (1 - 0.9**step)) / ((v[k] / (1 - 0.999**step)).sqrt() + 1e-6)
            plain[k] = plain[k] * (1 - lr * 0.01 * (k == "weight")) - lr * rise
        optimizer.step()
        for k, q in toy.named_parameters():
            assert torch.allclose(q, plain[k], rtol=1e-10), (step, k)


def test_rate_at_by_hand():
    """Up over a tenth of the steps, where 1 is reached, then down to one step before 0."""
    want = [1 / 3, 2 / 3, *((20 - s) / 18 for s in range(2, 20))]
    assert [train.rate_at(s, 20) for s in range(20)] == pytest.approx(want, rel=1e-12)
    assert train.rate_at(2, 20) == 1 and train.rate_at(19, 20) == pytest.approx(1 / 18)
    want = [1 / 1.5, 4 / 4.5, 3 / 4.5, 2 / 4.5, 1 / 4.5]  # half a step of warm-up
    assert [train.rate_at(s, 5) for s in range(5)] == pytest.approx(want, rel=1e-12)


# ------------------------------------------------------------------ train: the stages, the pipeline
def test_train_stage_resumes_every_stage_to_the_bit(world, finished, tmp_path, monkeypatch):
    """Each stage of a run stopped in its third step, then continued: the uninterrupted bits."""
    args = command(world, tmp_path / "run", "--keep")[2:]
    real, calls, stopped = msd.stage_loss, [], set()
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)

    def fragile(stage, *rest, **how):
        if not torch.is_inference_mode_enabled():  # in training, not for dev
            calls.append(stage)
            if calls.count(stage) == 3 and stage not in stopped:
                stopped.add(stage)
                raise KeyError("the power is gone")
        return real(stage, *rest, **how)

    monkeypatch.setattr(msd, "stage_loss", fragile)
    for _ in range(4):
        with pytest.raises(KeyError, match="power"):
            train.main(args)
    train.main(args)
    assert stopped == {1, 2, 3, 4}
    for name in ("assistant", "stages/stage2", "stages/stage3", "student"):
        one, two = (x / name / "model.safetensors" for x in (tmp_path / "run", world / "whole"))
        assert one.read_bytes() == two.read_bytes(), name


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_train_stage_gives_each_pair_its_target(stage, models, small, monkeypatch):
    """Of every batch of every pass: which pairs, both sides, from the right source, each with its
    own target; the terms that fit gets and logs are msd's of the batch."""
    run = small()
    fit = caught_fit(monkeypatch, run, stage, models, "assistant" if stage == 1 else "student")
    n, size = len(run.pairs[stage]), STAGE["batch"][stage - 1]
    one_pass = math.ceil(n / size)
    assert (fit.name, fit.lr) == (f"stage {stage}", STAGE["lr"][stage - 1])
    assert fit.steps == math.ceil(STAGE["epochs"][stage - 1] * one_pass)
    kind = {1: "teacher", 2: "assistant", 3: "assistant", 4: "teacher"}[stage]
    source = M.load(models[kind], "float32")
    known = texts_of(fit.model, {t for pair in run.pairs[stage] for t in pair})
    calls, model = caught_losses(monkeypatch), fit.model.eval()
    corpus_pairs = train.stage_pairs(run, stage)
    lengths = [max(len(model.tokenize([t])[0]) for t in run.corpus.texts(p)) for p in corpus_pairs]
    for step in range(fit.steps):
        terms, tokens = fit.loss_at(step)
        call = calls.pop()
        english, translations = read_batch(call, known)
        epoch, i = divmod(step, one_pass)
        numbers = data.batch_order(np.array(lengths), size, (3, stage, epoch))[i]
        want = [tuple(run.corpus.texts(corpus_pairs[j])) for j in numbers]
        assert list(zip(english, translations)) == want and set(want) <= set(run.pairs[stage])
        assert tokens == int(call.mask.sum())
        y = [source.embed(*source.tokenize(x), stage == 2) for x in (english, translations)]
        assert apart(call.y_s, y[0]) < 2e-3, "targets in float16"
        assert call.y_t is None if stage in (1, 4) else apart(call.y_t, y[1]) < 2e-3
        assert (call.stage, call.contrast, call.gather) == (stage, True, None)
        with torch.no_grad():
            sides = [model(*batch(model, x), stage == 2) for x in (english, translations)]
        want = plain_stage_loss(stage, *sides, call.y_s, call.y_t)
        assert {k: float(v.detach()) for k, v in terms.items()} == pytest.approx(want, rel=1e-4)


def test_train_stage_sees_every_pair_once_a_pass(models, small, monkeypatch):
    """A pass is all pairs once; the next one, another stage's and another seed's come in another
    order."""
    orders = []
    for seed, stage in ((3, 1), (3, 4), (4, 4)):
        run = small("--seed", seed, "--epochs", 2, "--batch", 4, name=f"{seed}{stage}")
        fit = caught_fit(monkeypatch, run, stage, models)
        calls = caught_losses(monkeypatch)
        known = texts_of(fit.model, {t for pair in run.pairs[stage] for t in pair})
        for step in range(fit.steps):
            fit.loss_at(step)
        rows = [pair for call in calls for pair in zip(*read_batch(call, known))]
        half = len(rows) // 2
        assert sorted(rows[:half]) == sorted(rows[half:]) == sorted(run.pairs[stage])
        orders += [rows[:half], rows[half:]]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_train_stage_takes_fewer_than_a_pass(models, small, monkeypatch):
    """A part of a pass needs targets of its own sentences alone; without contrast there is none."""
    run = small("--epochs", 0.4, "--batch", 4, "--no-contrast")
    fit = caught_fit(monkeypatch, run, 4, models)
    assert fit.steps == 3  # of six batches
    calls = caught_losses(monkeypatch)
    terms = [fit.loss_at(step)[0] for step in range(3)]
    assert [list(t) for t in terms] == [["en", "tr"]] * 3
    assert not any(call.contrast for call in calls)
    teacher = M.load(models["teacher"], "float32")
    made = sorted(len(np.load(f)) for f in Path(run.args.cache).glob("vectors-*.npy"))
    known = texts_of(fit.model, {t for pair in run.pairs[4] for t in pair})
    sides = [read_batch(call, known)[0] for call in calls]
    for call, side in zip(calls, sides):
        assert apart(call.y_s, teacher.embed(*teacher.tokenize(side))) < 2e-3
    english = set().union(*sides)
    assert made == sorted([9, len(english)])  # dev's and those of three batches


@pytest.mark.parametrize("stage", [2, 4])
def test_train_stage_reads_dev_as_it_trains(stage, models, small, monkeypatch):
    """The mean over dev's batches of the stage's terms, of dev's own pairs, without dropout or
    gradient; then training goes on with dropout."""
    run = small()
    fit = caught_fit(monkeypatch, run, stage, models)
    dev, calls = some_pairs(9, 3), caught_losses(monkeypatch)
    known = texts_of(fit.model, {t for pair in dev for t in pair})
    fit.model.train()
    got = fit.dev_loss()
    assert fit.model.training and fit.dev_loss() == got
    rows = [pair for call in calls for pair in zip(*read_batch(call, known))]
    assert sorted(rows) == sorted(dev * 2)
    assert [len(c.y_s) for c in calls] in ([5, 4, 5, 4], [4, 5, 4, 5], [7, 2, 7, 2], [2, 7, 2, 7])
    model, want = fit.model.eval(), []
    for call in calls:
        assert not any(t.requires_grad for t in call.terms.values())
        with torch.no_grad():
            sides = [model(*batch(model, x), stage == 2) for x in read_batch(call, known)]
        want.append(sum(plain_stage_loss(stage, *sides, call.y_s, call.y_t).values()))
    assert got == pytest.approx(np.mean(want), rel=1e-4)


def test_train_stage_reads_a_sample_of_a_large_dev(models, small, monkeypatch, tmp_path):
    """1,000 pairs from anywhere in it, always the same."""
    run, many = small("--batch", 100), some_pairs(1300, 4)
    run.dev = data.build_corpus([pair_file(tmp_path / "in" / "en-fr.tsv", many)], run.args.cache)
    fit, seen = caught_fit(monkeypatch, run, 4, models), []
    known = texts_of(fit.model, {t for pair in many for t in pair})

    def spy(stage, model, ids, mask, *rest, **how):
        seen.extend(read_batch(SimpleNamespace(ids=ids, mask=mask), known)[0])
        return {"en": torch.zeros(())}

    monkeypatch.setattr(msd, "stage_loss", spy)
    fit.dev_loss()
    first = {a for a, _ in many[:1000]}
    assert len(seen) == len(set(seen)) == 1000 and len(first - set(seen)) > 100
    again, seen[:] = list(seen), []
    fit.dev_loss()
    assert seen == again


def test_train_stage_trains_what_the_stage_is_about(models, small, monkeypatch):
    """Stage 2 the embedding block alone, the others everything; from the model in `start`, with the
    run's dropout and length; what fit leaves is saved, and made once."""
    run = small("--max-tokens", 11)
    for stage in msd.STAGES:
        fit = caught_fit(monkeypatch, run, stage, models)
        moved = {k for k, q in fit.model.named_parameters() if q.requires_grad}
        named = dict(fit.model.named_parameters())
        assert moved == {k for k in named if stage != 2 or k.startswith("embeddings.")}
        start = M.load(models["student"], "float32").state_dict()
        assert all(torch.equal(q, start[k]) for k, q in named.items())
        c = fit.model.config
        assert (c.dropout, c.max_seq_length, fit.model.training) == (0.1, 11, True)
        assert fit.run is run and callable(fit.dev_loss)
    run = small(name="other")
    run.dev = None

    def fit(run, name, model, steps, lr, loss_at, dev_loss):
        assert dev_loss is None
        model.embeddings.norm.bias.data.fill_(3)

    monkeypatch.setattr(train, "fit", fit)
    out = run.out / "made"
    assert train.train_stage(run, 4, models, models["student"], out) == out
    assert (M.load(out).embeddings.norm.bias == 3).all()
    monkeypatch.setattr(train, "fit", None)  # it is there: not again
    assert train.train_stage(run, 4, models, models["student"], out) == out


def test_mean_loss_is_without_dropout_and_gradient():
    toy, seen = Toy(), []

    def loss_at(step):
        seen.append((step, toy.training, torch.is_grad_enabled()))
        return {"a": torch.tensor(float(step)), "b": torch.tensor(1.0)}, 9

    assert train.mean_loss(toy, loss_at, 4) == pytest.approx(2.5)
    assert seen == [(step, False, False) for step in range(4)] and toy.training


def test_stage_pairs_by_file_and_line(models, small):
    """--extra for stages 2 and 3 alone; --max-lines of each file, by stage, counted from 1."""
    run = small("--max-lines", "21,5,99,1")
    assert [len(train.stage_pairs(run, k)) for k in msd.STAGES] == [21, 10, 29, 1]
    texts = [tuple(run.corpus.texts(p)) for p in train.stage_pairs(run, 2)]
    assert texts == run.pairs[1][:5] + run.pairs[2][21:26]
    assert [tuple(run.corpus.texts(p)) for p in train.stage_pairs(run, 4)] == run.pairs[1][:1]


PIPELINES = {  # flags: what each stage starts from, by the folder's name
    "": {1: "assistant-start", 2: "student-start", 3: "stage2", 4: "stage3"},
    "--stages 2-4 --assistant GIVEN": {2: "student-start", 3: "stage2", 4: "stage3"},
    "--stages 1,4": {1: "assistant-start", 4: "student-start"},
    "--bottleneck 0": {1: "assistant-start", 3: "student-start", 4: "stage3"},
    "--assistant GIVEN --keep-vocab 90": {1: "assistant-start", 2: "student-start"},
    "--assistant GIVEN --keep-vocab 90 --stages 2-4": {2: "student-start"},
}


@pytest.mark.parametrize("flags", PIPELINES)
def test_pipeline_hands_each_stage_its_start(flags, models, small, monkeypatch):
    """The paper's figure: what each stage starts from, whose targets it may take, what the table
    is made of. Nothing is trained."""
    given = flags.replace("GIVEN", str(models["assistant"])).split()
    run, seen, table = small(*given), {}, {}
    cut = "--keep-vocab" in flags
    for name in ("read_inputs", "write_run_json", "look_at_teacher"):
        monkeypatch.setattr(train, name, lambda *a: None)
    makers = {"start_assistant": [], "start_cut_assistant": [], "start_student": []}
    for name, calls in makers.items():
        monkeypatch.setattr(train, name, lambda run, *a, calls=calls: calls.append(a))
    monkeypatch.setattr(run, "build", lambda folder, make: (make(), folder)[1])

    def stage(run, k, known, start, folder):
        seen[k] = start.name, folder, dict(known)
        return folder

    monkeypatch.setattr(train, "train_stage", stage)
    monkeypatch.setattr(train, "finish", lambda run, models: table.update(models))
    train.pipeline(run)
    assert {k: v[0] for k, v in seen.items()} == {
        **{k: v for k, v in PIPELINES[""].items() if k in seen},
        **PIPELINES[flags],
    }
    assert list(seen) == run.args.stages
    last = max(seen)
    for k, (_, folder, known) in seen.items():
        own = run.out / "assistant" if k == 1 else run.out / "stages" / f"stage{k}"
        assert folder == (run.out / "student" if k == last > 1 else own)
        assert known["teacher"] == models["teacher"]
    trained = 1 in seen or cut
    assistant = run.out / "assistant" if trained else models["assistant"]
    assert all(v[2]["assistant"] == assistant for k, v in seen.items() if k > 1)
    assert makers["start_student"] == [(assistant,)]
    assert len(makers["start_assistant"]) == ("--assistant" not in flags)
    assert len(makers["start_cut_assistant"]) == cut
    rows = ["teacher", *["assistant, given"] * cut, *["assistant, untrained"] * (1 in seen)]
    rows += ["assistant", "student, untrained", *(f"student, stage {k}" for k in seen if k > 1)]
    assert sorted(table) == sorted(rows)
    assert table[f"student, stage {last}"] == run.out / "student"
    assert table["assistant"] == assistant


def test_start_student_gives_make_student_what_was_asked(models, small, monkeypatch):
    """Sizes, start and seed of the command; how often the text uses each piece of the assistant."""
    given = {}
    run = small("--layers", "2,4", "--recurrence", 3, "--bottleneck", 9, "--init", "paper")
    names = ("assistant", "B", "layers", "R", "init", "seed", "counts")
    monkeypatch.setattr(msd, "make_student", lambda *a: given.update(zip(names, a)))
    train.start_student(run, models["assistant"])
    assistant = M.load(models["assistant"], "float32")
    want = np.zeros(assistant.config.vocab_size, int)
    for text in {t for pair in run.pairs[2] for t in pair}:
        for i in assistant.tokenize([text])[0]:
            want[i] += 1
    # A sentence that is there twice is counted once.
    assert np.array_equal(given.pop("counts"), want)
    made = given.pop("assistant").state_dict()
    assert all(torch.equal(v, made[k]) for k, v in assistant.state_dict().items())
    assert given == {"B": 9, "layers": (2, 4), "R": 3, "init": "paper", "seed": 3}


@pytest.mark.parametrize("lower_case", [True, False])
def test_start_assistant_learns_from_the_pairs(lower_case, models, small, monkeypatch, tmp_path):
    """A vocabulary of the corpus, cased as the teacher's; its start from pairs of anywhere."""
    run, given = small("--vocab", 120), {}
    teacher = M.load(models["teacher"], "float32")
    if not lower_case:
        teacher.tokenizer.normalizer = tokenizers.normalizers.NFKC()
    teacher.save(tmp_path / "cased")
    monkeypatch.setattr(data, "vocabulary", lambda *a: a)
    monkeypatch.setattr(msd, "make_assistant", lambda *a: given.update(args=a))
    seen = []
    for most in (300_000, 5):
        monkeypatch.setattr(msd, "ALIGNED_PAIRS", most)
        train.start_assistant(run, tmp_path / "cased")
        made, (corpus, size, lower, _), *sides = given["args"]
        assert same(made, teacher)
        assert (corpus, size, lower) == (run.corpus, 120, lower_case)
        seen.append(list(zip(*map(list, sides))))
    assert sorted(seen[0]) == sorted(run.pairs[2])
    assert len(seen[1]) == 5 and set(seen[1]) <= set(seen[0]) and seen[1] != seen[0][:5]


def test_start_cut_assistant_by_the_counts_of_the_corpus(models, small, monkeypatch):
    run, given = small("--assistant", models["assistant"], "--keep-vocab", 400), {}
    real = data.cut_vocabulary

    def spy(tokenizer, counts, size):
        given.update(counts=counts, size=size)
        return real(tokenizer, counts, size)

    monkeypatch.setattr(data, "cut_vocabulary", spy)
    cut = train.start_cut_assistant(run)
    assistant = M.load(models["assistant"], "float32")
    flat, _ = assistant.tokenize(sorted({t for pair in run.pairs[2] for t in pair}))
    want = np.bincount(flat, minlength=assistant.config.vocab_size)
    assert np.array_equal(given["counts"], want)
    assert given["size"] == 400 == cut.config.vocab_size
    assert same(cut.layers, assistant.layers)


def test_evaluate_all_compares_with_the_teachers_english(models, small):
    """The teacher is scored on en-en alone; its vectors of dev's English sides are all others'
    goals."""
    run = small()
    dev = run.dev.by_language()
    sets = {k: ([*dev["de"][0]], [*dev["de"][1]], np.arange(9.0)) for k in ("en-en", "en-de")}
    labels = ("teacher", "assistant", "student")
    got = {
        label: (row, cosines)
        for label, row, cosines in evaluation.evaluate_all(
            run.load, {k: models[k] for k in labels}, sets, dev
        )
    }
    assert list(got["teacher"][0]["spearman"]) == ["en-en"] and not got["teacher"][0]["mse"]
    goal = run.load(models["teacher"]).encode(dev["de"][0], normalize=False)
    for label in labels[1:]:
        row, model = got[label][0], run.load(models[label])
        want, cosines = evaluation.evaluate(model, sets, dev, {"de": goal})
        assert row == want | {"sizes": msd.ledger(model.config)}
        assert all(np.array_equal(v, got[label][1][k]) for k, v in cosines.items())


def test_finish_compares_the_last_model_with_the_assistant(models, small, monkeypatch):
    run = small()
    scores = {k: np.random.default_rng(i).normal(size=30) for i, k in enumerate(models)}
    run.sts = {"en-en": ([], [], np.arange(30.0))}
    made = [(k, {"spearman": {}}, {"en-en": v}) for k, v in scores.items()]
    monkeypatch.setattr(train, "evaluate_all", lambda *a: made)
    train.finish(run, models)
    results = M.read_json(run.out / "results.json")
    a, b = ({"en-en": scores[k]} for k in ("assistant", "student"))
    assert results["bootstrap"] == evaluation.bootstrap(run.sts, a, b)
    assert list(results["rows"]) == ["teacher", "assistant", "student"]


# ----------------------------------------------------------------------- train: several processes
@pytest.mark.parametrize("n, world", [(7, 2), (8, 2), (5, 3), (1, 2), (2, 4)])
def test_share_of_gives_the_gradients_of_the_whole_batch(n, world, monkeypatch):
    """Each process takes every world-th row. Gathered, all see the vectors of all rows; the mean of
    their gradients is that of one process with all of the batch, for every loss and every row."""
    table, y_s = random64(n, 7), random64(n, 7, seed=1)
    loss = lambda x: msd.mse(x, y_s) + msd.contrastive(x, 2 * x.flip(1), y_s)
    whole = table.clone().requires_grad_()
    loss(whole).backward()
    shares, taken, mean = [], [], torch.zeros_like(table)
    for rank in range(world):
        shares.append(train.share_of(a_share(rank, world), n))
    for rank, (rows, gather) in enumerate(shares):
        assert len(rows) > 0  # an empty share takes a row that does not count
        taken += [i for i in rows if i % world == rank]
        others = [table[r] for k, (r, _) in enumerate(shares) if k != rank]

        def all_reduce(total, rank=rank):  # what the other processes add
            for k in range(world):
                if k != rank:
                    total[k::world] += table[k::world]

        monkeypatch.setattr(train.dist, "all_reduce", all_reduce)
        own = table.clone().requires_grad_()
        got = gather(own[torch.from_numpy(rows)])
        assert torch.equal(got, table) and len(others) == world - 1
        loss(got).backward()
        mean += own.grad / world
        with torch.no_grad():
            assert torch.equal(gather(table[torch.from_numpy(rows)]), table)
    assert sorted(taken) == list(range(n))
    assert torch.allclose(mean, whole.grad, rtol=1e-10)
    assert train.share_of(a_share(0, 1), n) == (slice(None), None)


def a_share(rank, world):
    return SimpleNamespace(rank=rank, world=world, args=SimpleNamespace(device="cpu"))


def in_processes(n, work):
    """Call work() in n processes that find each other as torchrun's do."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    fork = multiprocessing.get_context("fork")

    def begin(rank):
        place = {"WORLD_SIZE": n, "RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {k: str(v) for k, v in place.items()}
        work()

    processes = [fork.Process(target=begin, args=(rank,)) for rank in range(n)]
    for p in processes:
        p.start()
    for p in processes:
        p.join()
    assert [p.exitcode for p in processes] == [0] * n


def test_train_stage_in_two_processes_gives_the_gradients_of_one(models, small, monkeypatch):
    """In every stage and batch of a pass, of the loss terms, too, and of the dev loss. The last
    batch has one pair and leaves a process without any."""

    calls = caught_losses(monkeypatch)

    def fit(run, name, model, steps, lr, loss_at, dev_loss):
        calls.clear()
        seen = {"dev": torch.tensor(dev_loss())}
        for step in range(steps):
            model.zero_grad()
            terms = loss_at(step)[0]
            sum(terms.values()).backward()
            grads = {k: q.grad.clone() for k, q in model.named_parameters() if q.grad is not None}
            seen |= {f"{step} {k}": v.detach() for k, v in {**terms, **grads}.items()}
        seen["rows"] = torch.tensor([len(call.ids) for call in calls])
        M.write_safetensors(run.out / f"{name} {run.rank}", seen)

    monkeypatch.setattr(train, "fit", fit)
    flags = "--epochs 1 --batch 10,14,14,10 --dropout 0".split()

    def stages(name):
        run = small(*flags, name=name)
        for k in msd.STAGES:
            train.train_stage(run, k, models, models["student"], run.out / f"after{k}")
        return run.out

    one = stages("one")
    in_processes(2, lambda: stages("two"))
    assert len(list(one.glob("stage*"))) == 4
    for file in one.glob("stage*"):
        want = M.read_safetensors(file)[0]
        rows = want.pop("rows")
        for rank in (0, 1):
            got = M.read_safetensors(one.parent / "two" / f"{file.name[:-1]}{rank}")[0]
            assert got.pop("rows").tolist() == [2 * max(1, (n // 2 + 1 - rank) // 2) for n in rows]
            assert set(got) == set(want) and len(want) > 20
            for k, v in want.items():
                near = {"rtol": 1e-4, "atol": 1e-5 * float(v.abs().max()) + 1e-9}
                assert torch.allclose(got[k], v, **near), (file.name, k)
