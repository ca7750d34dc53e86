"""Train: `python train.py` runs all four stages on the built-in corpus; --help says what else.

A run lives in one folder. The same command again continues it, exactly, wherever it was stopped.

    arguments  |  the run  |  the loop  |  the stages  |  the pipeline  |  evaluation  |  the table
"""

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import functools
import glob
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.distributed as dist

import data
import model as M
import msd
from demo import corpus as demo
from model import InputError, need, put
from msd import PRESETS, STAGES, Preset

try:
    import fcntl
except ImportError:  # Windows: two commands in one folder are then not noticed
    fcntl = None

SAVE_SECONDS = 60  # between checkpoints: what a crash in training can cost
EVALS = 4  # dev readings a stage; the best one's weights are kept


class Stop(Exception):
    """The run ends before its end: a signal, or a loss that is not finite. code: exit status."""

    def __init__(self, code, message="stopped; the same command continues here"):
        super().__init__(message)
        self.code = code


# -------------------------------------------------------------------------------------- arguments
# What may differ between a run and its continuation: results do not depend on it, or in their last
# bits only, but that another device or number of processes draws other dropout masks.
FREE = {"out", "cache", "device", "keep"}


def number(kind, low, below=math.inf):
    """A type for argparse: a number from `low` to below `below`."""

    def parse(text):
        if not low <= (x := kind(text)) < below:
            limit = "" if below == math.inf else f", less than {below}"
            raise argparse.ArgumentTypeError(f"{text}: expected {low} or more{limit}")
        return x

    parse.__name__ = kind.__name__  # what argparse calls it in its error
    return parse


def each(kind, low, below=math.inf):
    """A type for argparse: one value for all stages, or four with commas -> a tuple of four."""

    def parse(text):
        values = tuple(map(number(kind, low, below), text.split(",")))
        if len(values) not in (1, 4):
            raise argparse.ArgumentTypeError(f"{text}: expected one value, or four with commas")
        return values * (4 // len(values))

    parse.__name__ = kind.__name__
    return parse


def stages(text):
    """A type for argparse: 1-4 or 1,4 -> the list of stages."""
    spans = [re.fullmatch("([1-4])(?:-([1-4]))?", part.strip()) for part in text.split(",")]
    wanted = {k for m in spans if m for k in range(int(m[1]), int(m[2] or m[1]) + 1)}
    if not all(spans) or not wanted:
        raise argparse.ArgumentTypeError(f"{text!r}: expected stages 1 to 4, such as 1-4 or 1,4")
    return sorted(wanted)


def parser():
    """Every flag there is. Those that a preset sets are None here; parse() fills them in."""
    raw, here = argparse.RawDescriptionHelpFormatter, "cuda" if torch.cuda.is_available() else "cpu"
    ap = M.Parser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    files = {"nargs": "+", "default": [], "metavar": "GLOB"}
    add = ap.add_argument_group("your data").add_argument
    add("--teacher", metavar="DIR", help="English sentence encoder: its folder")
    add("--assistant", metavar="DIR", help="multilingual encoder; without it one is made")
    add("--train", **files, help="english<TAB>translation files, plain or .gz")
    add("--extra", **files, help="more such files for stages 2 and 3 alone, as the paper does")
    add("--dev", **files, help="held-out pairs, en-XX.tsv: pick the checkpoints, give the accuracy")
    add(
        "--sts", metavar="DIR", help="sets *.A-B.txt, read once at the end; a dev set to try things"
    )
    add = ap.add_argument_group("sizes").add_argument
    add("--preset", choices=PRESETS, help="demo without --train, minilm with it")
    add("--bottleneck", type=number(int, 0), help="B, width of the word table; 0: full, no stage 2")
    add("--layers", type=number(int, 1), help="K, unique layers; fewer is smaller, not faster")
    add("--recurrence", type=number(int, 1, 1000), help="R, times they run; speed follows K x R")
    add("--vocab", type=number(int, 100), help="pieces learnt here; more helps across languages")
    add = ap.add_argument_group("schedule: one value, or four for stages 1 to 4").add_argument
    add("--stages", type=stages, default=[1, 2, 3, 4], help="1-4; 2-4 takes --assistant as it is")
    add("--epochs", type=each(float, 1e-6, 1e6), help="passes over the pairs; 0.1: a quick look")
    add("--batch", type=each(int, 1), help="pairs a step; in stage 4 each is contrasted with all")
    add("--lr", type=each(float, 1e-12), help="peak learning rate; small models take 1e-3 and more")
    add("--dropout", type=number(float, 0, 1), help="0 suits a few passes, 0.1 the paper's many")
    add("--init", choices=("text", "paper"), help="of the bottleneck: SVD by text, paper's noise")
    add("--no-contrast", action="store_true", help="stage 4 without its contrastive term")
    add("--max-tokens", type=number(int, 3), help="longer sentences are cut; fewer save memory")
    add("--max-chars", type=number(int, 1), help="pairs with a longer side are dropped")
    add("--max-lines", type=each(int, 1), help="read at most so many lines of each file")
    add = ap.add_argument_group("the run").add_argument
    add("--out", type=Path, metavar="DIR", help="its folder; default: runs/PRESET")
    add("--cache", default="runs/cache", metavar="DIR", help="for all runs; safe to delete")
    add("--keep", action="store_true", help="keep the models between stages, in OUT/stages")
    add("--seed", type=number(int, 0, 2**31), default=0, help="report several: a point apart")
    add("--dtype", choices=("float32", "bfloat16"), help="arithmetic; default: the best here")
    add("--device", default=here, help="cpu or cuda; default: what is here")
    return ap


def parse(argv):
    """The arguments, those not given filled in from the preset. Raises: InputError."""
    args = parser().parse_args(argv)
    args.preset = args.preset or ("minilm" if args.train or args.teacher else "demo")
    rates = args.lr
    for f in dataclasses.fields(Preset):
        if getattr(args, f.name) is None:
            setattr(args, f.name, getattr(PRESETS[args.preset], f.name))
    if args.bottleneck == 0:  # there is nothing to align, and no need of the lower rate in stage 3
        args.stages = [k for k in args.stages if k != 2]
        args.lr = rates or (*args.lr[:2], args.lr[0], args.lr[3])
    need(args.stages, "--stages 2 alone needs a bottleneck")
    ready = 1 in args.stages or args.assistant
    need(ready, "--stages without 1 needs --assistant DIR, a trained multilingual encoder")
    own = args.preset != "demo" or args.teacher or args.train or args.dev or args.sts or args.extra
    need(
        not own or args.train and args.teacher,
        "your own data needs both --teacher DIR and --train GLOB; for the built-in corpus leave "
        "out these, --dev, --sts and --extra",
    )
    args.out = args.out or Path(f"runs/{args.preset}")
    args.device = usable_device(args.device)
    return args


def usable_device(name):
    """The device by its full name. Raises: InputError where it cannot be used."""
    try:
        device = torch.device(name)
        if device.type == "cuda":  # each process of torchrun has a GPU of its own
            index, count = (
                int(os.environ.get("LOCAL_RANK", device.index or 0)),
                torch.cuda.device_count(),
            )
            need(
                index < count,
                f"--device {name}: process {index} has no GPU, there are {count}; "
                "start fewer processes, or give --device cpu",
            )
            device = torch.device("cuda", index)
            torch.cuda.set_device(device)
        need(
            device.type in ("cpu", "cuda"),
            f"--device {name} is not usable here: only cpu and cuda are",
        )
        torch.zeros(1, device=device).item()
        return str(device)
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0]
        raise InputError(
            f"--device {name} is not usable here ({reason}); give cpu or cuda"
        ) from None


def expand(patterns, flag):
    """Files of a list of glob patterns. Raises: InputError for a pattern that matches nothing."""
    files = set()
    for pattern in patterns:
        found = {f for f in glob.glob(pattern, recursive=True) if os.path.isfile(f)}
        need(found, f"{flag} {pattern}: no such file")
        files |= found
    return sorted(files)


# ---------------------------------------------------------------------------------------- the run
class Run:
    """What all parts of a run share: arguments, folder, log, its place among several processes, and
    the signal that asks it to stop. All processes do the same; the first one alone writes."""

    def __init__(self, args):
        self.args, self.out, self.stop, self.busy = args, args.out, None, False
        several = dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
        # The processes wait for the first one, which may take hours over targets, in a group of
        # their own: with NCCL's short patience kept, one that dies is noticed on a GPU, too.
        day = datetime.timedelta(days=1)
        self.group = dist.new_group(backend="gloo", timeout=day) if several else None
        dtype, why = M.best_dtype(args.device)
        self.dtype, why = (getattr(torch, args.dtype), "asked for") if args.dtype else (dtype, why)
        args.dtype = str(self.dtype).removeprefix("torch.")
        self.say(
            f"device {args.device}, {args.dtype} ({why}), {torch.get_num_threads()} threads, "
            f"{self.world} processes; {args.preset}, stages {args.stages}, seed {args.seed}, "
            f"folder {self.out}"
        )

    def say(self, text):
        if self.rank == 0:
            print(text, flush=True)

    def log(self, **entry):
        if self.rank == 0:
            with open(self.out / "log.jsonl", "a", encoding="utf-8") as f:
                f.write(json.dumps(entry) + "\n")

    def meter(self, what):
        return M.meter(what, self.say)

    def agree(self, *values):
        """The largest of each number over all processes."""
        if self.world == 1:
            return values
        t = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(t, op=dist.ReduceOp.MAX, group=self.group)
        return t.tolist()

    @contextlib.contextmanager
    def first(self):
        """The first process goes through alone and makes what the others then find."""
        if self.rank:
            dist.barrier(self.group)
        yield self.rank == 0
        if self.world > 1 and self.rank == 0:
            dist.barrier(self.group)

    def on_signal(self, number, frame):
        """In a step: finish it, save, leave. Elsewhere leave at once; nothing half-written stays."""
        self.stop = number
        if not self.busy:
            raise Stop(128 + number)

    def save(self, model, folder):
        """The first process writes; nobody goes on before it has."""
        with self.first() as mine:
            if mine:
                model.save(folder)

    def load(self, folder, train=False):
        """A model with this run's arithmetic; --max-tokens and, in training, --dropout apply."""
        a = self.args
        return M.load(folder, a.dtype, a.device, train, a.dropout, a.max_tokens)


def keep_memory():
    """Freed blocks stay with the process.

    By default glibc gives large ones back to the system and fetches them anew, zeroed page by page,
    at every step, which costs a sixth of the time on a CPU.
    """
    with contextlib.suppress(OSError, TypeError, AttributeError):  # no glibc, nothing to do
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD


def take(folder):
    """Lock a run's folder against a second command. Raises: InputError if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w", encoding="utf-8")
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lock
    except BlockingIOError:
        busy = "another process is working on this run; wait for it, or choose another --out"
        raise InputError(f"{folder}: {busy}") from None
    except (OSError, ValueError) as e:
        raise InputError(f"--out {folder}: not a folder that can be written ({e})") from None


def settings(args):
    """Everything that the result depends on, as plain values."""
    known = {k: v for k, v in vars(args).items() if k not in FREE}
    return json.loads(json.dumps(known))


def same_run(run):
    """Refuse to continue a run with other arguments or other data; write down what this one is.

    Raises: InputError with both values.
    """
    args, file, now = run.args, run.out / "run.json", settings(run.args)
    sts = sorted(f for f in Path(args.sts or "").glob("*") if f.is_file()) if args.sts else []
    content = {"sts": data.digest(*sts)}
    for flag in ("train", "extra", "dev"):
        files = expand(getattr(args, flag), f"--{flag}")
        content[flag] = data.digest(*map(Path, files))
    for flag in ("teacher", "assistant"):
        folder = getattr(args, flag)
        content[flag] = fingerprint(folder) if folder else None
    now |= {f"content of --{flag}": digest for flag, digest in content.items()}
    before = M.read_json(file) if file.exists() else now
    other = "choose another --out, or delete this folder to start over"
    for key in sorted(set(now) | set(before)):
        known = key in before and key in now
        need(known, f"{run.out}: started by another version of this code ({key}); {other}")
        need(
            now[key] == before[key],
            f"{run.out}: this run was started with {key} {before[key]!r}, now it is {now[key]!r}. "
            f"Give the old value to continue, {other}",
        )
    return now


def fingerprint(folder):
    """Names a model directory by its content. Raises: InputError where there is none."""
    patterns = ("**/*.safetensors", "**/*.json")
    files = sorted(f for pattern in patterns for f in Path(folder).glob(pattern))
    expected = "expected config.json, tokenizer.json and model.safetensors in it"
    need(files, f"{folder}: no model directory; {expected}")
    return data.digest(*files)


# --------------------------------------------------------------------------------------- the loop
def rate_at(step, steps):
    """Learning rate as a share of its peak: linear up over WARMUP of the steps, then to 0."""
    w = msd.WARMUP * steps
    return (step + 1) / (w + 1) if step < w else (steps - step) / (steps - w)


def make_optimizer(model, lr):
    """AdamW as the paper sets it, with bias correction; no decay on biases and LayerNorm."""

    def of(plain):
        named = model.named_parameters()
        return [q for k, q in named if (k.endswith("bias") or "norm" in k) == plain]

    groups = [{"params": of(False), "weight_decay": msd.WEIGHT_DECAY}]
    groups += [{"params": of(True), "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, eps=msd.ADAM_EPS, fused=True)


def clip_gradients(model, limit, table=None):
    """Scale the gradient to a norm of at most `limit`; returns the norm before.

    table: a tensor of the word table's shape, where its gradient is sparse. A batch touches some
    thousand rows: they alone are measured and clipped, then written into the table for AdamW, which
    moves every row at every step. With 250,000 pieces that saves a tenth of a step.
    """
    word = model.embeddings.word.weight
    grads = [q.grad for q in model.parameters() if q.grad is not None]
    sparse = table is not None and word.grad is not None
    if sparse:
        g = word.grad.coalesce()
        grads = [v for v in grads if not v.is_sparse] + [g.values()]
    norm = torch.nn.utils.get_total_norm(grads)
    torch._foreach_mul_(grads, (limit / (norm + 1e-6)).clamp(max=1.0))
    if sparse:
        word.grad = table.zero_().index_copy_(0, g.indices()[0], g.values())
    return norm


MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of each weight


class Training:
    """The state of a stage's training, its checkpoint, and the choice of the best weights by dev.

    A checkpoint holds step, weights, AdamW's moments, the best weights so far with their dev loss,
    and the seconds spent; no generator state, as every random draw depends on seed, stage and step.
    """

    def __init__(self, run, name, model, optimizer):
        self.run, self.name, self.model, self.optimizer = run, name, model, optimizer
        self.file = run.out / "checkpoint.safetensors"
        self.named = dict(model.named_parameters())
        self.best, self.best_loss = {}, math.inf
        self.begun = self.saved = time.monotonic()

    def seconds(self):
        return time.monotonic() - self.begun

    def restore(self, steps):
        """The step to begin at: that of this stage's checkpoint, or 0. Raises: InputError."""
        state, meta = M.read_safetensors(self.file, copy=True) if self.file.exists() else ({}, {})
        if meta.get("stage") != self.name:
            return 0
        shapes = {k: state[f"model.{k}"].shape for k in self.named if f"model.{k}" in state}
        fits = shapes == {k: q.shape for k, q in self.named.items()}
        step = int(meta["step"]) if meta.get("step", "").isdigit() else steps + 1
        again = f"a damaged checkpoint; delete it to begin {self.name} again"
        need(fits and step <= steps, f"{self.file}: {again}")
        self.model.load_state_dict({k: state[f"model.{k}"] for k in self.named})
        for k, q in self.named.items():
            if f"exp_avg.{k}" in state:  # stage 2 never moves the layers
                moments = {m: state[f"{m}.{k}"].to(q.device) for m in MOMENTS}
                moments["step"] = torch.tensor(float(step), device=q.device)
                self.optimizer.state[q] = moments
        self.best = {k[5:]: v for k, v in state.items() if k.startswith("best.")}
        self.best_loss, self.begun = float(meta["best"]), self.begun - float(meta["seconds"])
        self.run.say(f"{self.name}: continues at step {step} of {steps}")
        return step

    def save(self, step):
        """Write the checkpoint: the first process does, and nobody goes on before it has."""
        state = {f"model.{k}": q for k, q in self.named.items()}
        state |= {f"best.{k}": v for k, v in self.best.items()}
        for k, q in self.named.items():
            kept = self.optimizer.state.get(q, {})
            state |= {f"{m}.{k}": kept[m] for m in MOMENTS if m in kept}
        meta = {"stage": self.name, "step": str(step), "best": repr(self.best_loss)}
        with self.run.first() as mine:
            if mine:
                M.write_safetensors(self.file, state, {**meta, "seconds": repr(self.seconds())})
        self.saved = time.monotonic()

    def choose(self, step, loss):
        """Keep the weights if this dev loss is the best so far."""
        self.run.log(stage=self.name, step=step, dev=loss)
        if not loss >= self.best_loss:
            self.best_loss = loss
            self.best = {k: q.detach().clone() for k, q in self.named.items()}

    def finish(self, steps):
        """Leave the best weights in the model."""
        self.model.load_state_dict(self.best or self.model.state_dict())
        best, seconds = self.best_loss if self.best else None, round(self.seconds(), 1)
        self.run.log(stage=self.name, done=True, steps=steps, seconds=seconds, best_dev=best)


class Reporter:
    """The log and the console of a stage, and the watch for a loss that is not finite.

    It reads numbers from a GPU only where it reports: reading makes the host wait.
    """

    def __init__(self, run, name, start, steps):
        self.run, self.name, self.start, self.steps = run, name, start, steps
        self.every, self.tokens = max(1, steps // 100), 0
        self.broken = torch.tensor(-1, device=run.args.device)  # the first step that is not finite
        self.begun = self.shown = self.last = time.monotonic()
        if run.rank == 0:  # the log forgets what came after the checkpoint
            entries = read_log(run.out)
            kept = [e for e in entries if e.get("stage") != name or e.get("step", start) < start]
            with M.atomic(run.out / "log.jsonl") as tmp:
                tmp.write_text("".join(json.dumps(e) + "\n" for e in kept), "utf-8")

    def add(self, step, terms, norm, lr, tokens):
        loss = sum(terms.values()).detach()
        self.tokens += tokens
        bad = (self.broken < 0) & ~torch.isfinite(loss + norm)
        self.broken = torch.where(bad, step, self.broken)
        if (step + 1) % self.every and step + 1 < self.steps:
            return
        numbers = {k: float(v.detach()) for k, v in terms.items()}  # a GPU has caught up now
        now = time.monotonic()
        speed = round(self.tokens / max(now - self.last, 1e-9))
        entry = {"loss": float(loss), **numbers, "lr": lr, "norm": float(norm)}
        self.run.log(stage=self.name, step=step, **entry, tokens_per_s=speed)
        if now - self.shown > 5 or step + 1 == self.steps:
            left = (now - self.begun) / (step + 1 - self.start) * (self.steps - step - 1)
            terms = "  ".join(f"{k} {v:.4f}" for k, v in numbers.items())
            self.run.say(
                f"{self.name}  step {step + 1}/{self.steps}  {terms}  |g| {entry['norm']:.2f}  "
                f"{speed:,} tokens/s  {left // 60:.0f}:{left % 60:02.0f} left"
            )
            self.shown = now
        self.tokens, self.last = 0, now

    def check(self, pairs_at, file):
        """Raises: Stop if a loss was not finite, before anything is saved over."""
        if (bad := int(self.broken)) >= 0:
            good = file if file.exists() else "none yet"
            raise Stop(
                1,
                f"{self.name}, step {bad}: the loss or the gradient norm is not finite; batch "
                f"{list(map(int, pairs_at(bad)[:16]))}... The last good checkpoint is {good}; "
                "--lr may be too high",
            )


def fit(run, name, model, steps, lr, loss_at, dev_loss=None):
    """Train `model` for `steps` steps and leave the weights of the best dev loss in it.

    loss_at(step): (loss terms by name, tokens, pair numbers), a pure function of the step.
    dev_loss(): the loss to choose by. A continued run gives the same bits. Of several processes all
    do the same. Raises: Stop at a signal, after a save, and at a loss that is not finite.
    """
    model.train()
    optimizer = make_optimizer(model, lr)
    sparse = model.embeddings.word.sparse = model.device.type == "cpu" and run.world == 1
    table = torch.zeros_like(model.embeddings.word.weight) if sparse else None
    training = Training(run, name, model, optimizer)
    start = training.restore(steps)
    reporter = Reporter(run, name, start, steps)
    readings = {math.ceil(steps * (i + 1) / EVALS) for i in range(EVALS)} if dev_loss else ()
    for step in range(start, steps):
        run.busy = True  # a signal now waits for the end of the step
        torch.manual_seed(seed_of(run, name, step))  # dropout
        rate = lr * rate_at(step, steps)
        for group in optimizer.param_groups:
            group["lr"] = rate

        terms, tokens, _ = loss_at(step)
        optimizer.zero_grad(set_to_none=True)
        sum(terms.values()).backward()
        norm = clip_gradients(model, msd.CLIP, table)
        optimizer.step()

        reporter.add(step, terms, norm, rate, tokens)
        if step + 1 in readings:
            training.choose(step, dev_loss())
        due = time.monotonic() - training.saved > SAVE_SECONDS and step + 1 < steps
        stop, due = run.agree(run.stop or 0, due)
        if stop or due or step + 1 in readings or model.device.type == "cpu":
            reporter.check(lambda bad: loss_at(bad)[2], training.file)
        if stop or due:
            training.save(step + 1)
        run.busy = False
        if stop:  # a signal that comes during a save is seen one step later
            raise Stop(128 + stop)
    training.finish(steps)
    return model


def seed_of(run, name, step):
    """The seed of what is random in a step: a function of --seed, stage, step and process."""
    process = [run.rank] * (run.rank > 0)
    return int.from_bytes(data.digest(run.args.seed, name, step, *process).encode()[:7], "little")


def read_log(folder):
    """The entries of a run's log; a line that cannot be read, as a kill leaves it, is left out."""
    file, entries = folder / "log.jsonl", []
    text = file.read_text("utf-8", errors="replace") if file.exists() else ""
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            entries.append(json.loads(line))
    return [e for e in entries if isinstance(e, dict) and isinstance(e.get("step", 0), int)]


# ------------------------------------------------------------------------------------- the stages
def train_stage(run, stage, sources, inputs, start, leaves):
    """One stage of the paper, from the model in `start` to the folder `leaves`, which it returns.

    sources: {"teacher": folder, "assistant": folder}; msd.STAGES says which of them gives the
    targets.
    """
    if leaves.exists():
        return leaves
    args, k, row = run.args, stage - 1, STAGES[stage]
    source = sources[row.targets]
    model = run.load(start, train=True)
    model.layers.requires_grad_(row.layers)  # stage 2 has no use for them
    corpus, dev = inputs["corpus"], inputs["dev"]
    used = (corpus.group == 0) | (stage in (2, 3))  # --extra is for stages 2 and 3
    rows = np.flatnonzero(used & (corpus.line <= args.max_lines[k]))
    loss_at, _, steps = stage_batches(run, stage, model, corpus, rows, source, args.epochs[k])
    dev_loss = None
    if dev:
        few = np.sort(np.random.default_rng(0).permutation(len(dev.pairs))[:1000])
        dev_loss = stage_batches(run, stage, model, dev, few, source)[1]
    run.say(
        f"stage {stage}, {row.title}: from {start.name}, targets from the {row.targets}, "
        f"{len(rows):,} pairs, {steps:,} steps of {args.batch[k]}, learning rate {args.lr[k]:g}"
    )
    fit(run, f"stage {stage}", model, steps, args.lr[k], loss_at, dev_loss)
    run.save(model, leaves)
    return leaves


def stage_batches(run, stage, model, corpus, rows, source, epochs=None):
    """(loss_at, loss, steps) of a stage over the pairs numbered `rows`, for fit.

    source: the folder of the encoder that gives the targets. loss_at(step): for training, `epochs`
    passes; loss(): the mean over all rows, for dev. Targets are computed for the sentences that
    will be seen, once, and read from disk by step.
    """
    args, row = run.args, STAGES[stage]
    with run.first():
        tokens = data.tokens(corpus, model, args.cache, run.meter("tokens"))
    pad_id, seed = model.config.pad_token_id, [args.seed, stage]
    batches = data.Batches(corpus, rows, tokens, args.batch[stage - 1], seed, pad_id, args.device)
    steps = batches.steps(epochs or 1)
    seen = batches.seen(steps)
    ids = np.unique(seen if row.own else seen[:, 0])
    name, what = fingerprint(source), run.meter(f"targets of stage {stage}")
    with run.first():
        encoder = run.load(source)
        stored = data.vectors(corpus, ids, encoder, name, args.cache, row.layers, what)
    live = model  # what training calls
    if epochs and run.world > 1:  # averages the gradients over the processes
        wrap = torch.nn.parallel.DistributedDataParallel
        live = wrap(model, gradient_as_bucket_view=True)

    def target(which, numbers):
        wanted = np.searchsorted(ids, batches.pairs[numbers, which])
        return put(stored[wanted], args.device).float()  # (N, H)

    def terms(model, numbers, mine=slice(None), gather=None):
        s, t = (batches.side(which, numbers[mine]) for which in (0, 1))
        y_s, y_t = target(0, numbers), target(1, numbers) if row.own else None
        return msd.stage_loss(stage, model, s, t, y_s, y_t, not args.no_contrast, gather)

    def loss_at(step):
        numbers = batches.at(step)
        share = share_of(run, len(numbers))
        tokens = int(batches.lengths[numbers].sum())
        return terms(live, numbers, *share), tokens, rows[numbers]

    def loss():
        model.eval()
        with torch.inference_mode():
            mine = batches.first[run.rank :: run.world]
            losses = [len(b) * float(sum(terms(model, b).values())) for b in mine]
        model.train()
        total = torch.tensor([sum(losses)], dtype=torch.float64)
        if run.world > 1:
            dist.all_reduce(total, group=run.group)
        return float(total) / len(rows)

    return loss_at, loss, steps


def share_of(run, n):
    """(rows, gather) of one process in a batch of n pairs: these lines make two GPUs equal one.

    Each process takes every world-th row; gather puts the vectors (N, H) of all rows together. The
    loss is then the same formula over the whole batch, contrastive matrix and all, on every
    process; each sends gradient back through its own rows alone, and the mean over processes that
    DDP takes is made up for here.
    """
    if run.world == 1:
        return slice(None), None
    mine = np.arange(run.rank, n, run.world)
    index = put(mine, run.args.device)

    def gather(x):
        x = x[: len(mine)]  # of an empty share, a row that does not count
        whole = x.new_zeros(n, x.shape[1]).index_copy(0, index, x.detach())
        dist.all_reduce(whole)
        if x.requires_grad:
            x.register_hook(lambda g: run.world * g)
        return whole.index_copy(0, index, x)

    return mine if len(mine) else np.zeros(1, np.int64), gather


# ----------------------------------------------------------------------------------- the pipeline
def pipeline(run, identity):
    """The paper's figure: teacher, assistant, student's start, stages 2, 3 and 4, then the table.

    Each step is skipped where its folder is there: the same command continues a run.
    """
    args, out, between = run.args, run.out, run.out / "stages"
    inputs = read_inputs(run)
    if run.rank == 0 and not (out / "run.json").exists():  # a mistyped path leaves nothing behind
        with M.atomic(out / "run.json") as tmp:
            tmp.write_text(json.dumps(identity, indent=1), "utf-8")
    teacher = inputs["teacher"]
    models = {"teacher": teacher}

    # The assistant: given, or the teacher's body with a new vocabulary; stage 1 trains it.
    assistant = Path(args.assistant) if args.assistant else between / "assistant-start"
    models["assistant, untrained"] = assistant
    if not args.assistant:
        start_assistant(run, inputs, assistant)
    if 1 in args.stages:
        sources = {"teacher": teacher}
        assistant = train_stage(run, 1, sources, inputs, assistant, out / "assistant")
    if args.assistant or 1 not in args.stages:
        del models["assistant, untrained"]  # a published one is no start of ours
    models["assistant"] = assistant

    # The student: bottleneck, the assistant's first layers; stages 2 to 4 train it.
    if student_stages := [k for k in args.stages if k > 1]:
        sources = {"teacher": teacher, "assistant": assistant}
        student = models["student, untrained"] = between / "student-start"
        start_student(run, inputs, assistant, student)
        for k in student_stages:
            leaves = out / "student" if k == student_stages[-1] else between / f"stage{k}"
            student = train_stage(run, k, sources, inputs, student, leaves)
            models[f"student, stage {k}"] = student
    if run.rank == 0:
        finish(run, models, inputs)


def read_inputs(run):
    """{"teacher": folder, "corpus", "dev", "sts"}; reports what was read and looks at the teacher.

    Raises: InputError for sizes that do not fit, before any work.
    """
    args, out = run.args, run.out
    teacher_dir = Path(args.teacher) if args.teacher else out / "teacher"
    files = {flag: getattr(args, flag) for flag in ("train", "extra", "dev")}
    sts = args.sts
    if not args.train:
        if args.stages != [1]:
            msd.check_sizes(demo.TEACHER, args.bottleneck, args.layers, args.recurrence)
        with run.first():
            if not (out / "data").exists():
                demo.write_demo(out / "data")
        files |= {x: [str(out / "data" / x / "en-*.tsv")] for x in ("train", "dev")}
        sts = out / "data" / "sts"
        if not teacher_dir.exists():
            train_demo_teacher(run, teacher_dir)
    teacher = run.load(teacher_dir)
    assistant = run.load(args.assistant) if args.assistant else teacher
    width, wanted = assistant.config.width, teacher.config.width
    need(
        width == wanted,
        f"{args.assistant}: its vectors have {width} dimensions, those of the teacher {teacher_dir} "
        f"have {wanted}; they are compared, so the widths must match",
    )
    if args.stages != [1]:
        msd.check_sizes(assistant.config, args.bottleneck, args.layers, args.recurrence)
    sets = data.read_sts(sts) if sts else {}
    paths = {flag: expand(files[flag], f"--{flag}") for flag in files}
    build = functools.partial(data.build_corpus, cache=args.cache, max_chars=args.max_chars)
    with run.first():
        corpus = build(paths["train"], extra=paths["extra"], max_lines=max(args.max_lines))
        dev = build(paths["dev"]) if paths["dev"] else None
    report(run, corpus)
    look(run, teacher, corpus)
    return {"teacher": teacher_dir, "corpus": corpus, "dev": dev, "sts": sets}


def train_demo_teacher(run, folder):
    """The stand-in for a real teacher, trained on the scored pairs of the built-in corpus."""
    args, scored = run.args, data.read_sts(run.out / "data" / "sts-train")["en-en"]
    model, loss_at = demo.teacher(scored, args.seed, run.dtype, args.device)
    fit(run, "teacher", model, demo.TEACHER_STEPS, demo.TEACHER_LR, loss_at)
    run.save(model, folder)


def start_assistant(run, inputs, folder):
    """The teacher's body with a vocabulary learnt from the training text, saved in `folder`."""
    args, corpus = run.args, inputs["corpus"]
    if folder.exists():
        return
    with run.first() as mine:
        if mine:
            teacher = M.load(inputs["teacher"], "float32", "cpu")
            normalizer = teacher.tokenizer.normalizer
            lower = normalizer is not None and normalizer.normalize_str("A") == "a"
            lower = lower or teacher.config.do_lower_case
            run.say(f"vocabulary: learning {args.vocab:,} pieces")
            tokenizer = data.vocabulary(corpus, args.vocab, lower, args.cache)
            some = np.random.default_rng(0).permutation(len(corpus.pairs))[: msd.ALIGNED_PAIRS]
            run.say(f"vocabulary: its start from the alignment of {len(some):,} pairs")
            sides = (corpus.texts(side) for side in corpus.pairs[np.sort(some)].T)
            pad_id = data.SPECIAL.index("<pad>")
            msd.make_assistant(teacher, tokenizer, pad_id, *sides).save(folder)


def start_student(run, inputs, assistant_dir, folder):
    """The student before its first stage, saved in `folder`."""
    args, corpus = run.args, inputs["corpus"]
    with run.first() as mine:
        if mine and not folder.exists():
            assistant = run.load(assistant_dir)
            ids = data.tokens(corpus, assistant, args.cache, run.meter("tokens"))[0]
            ids = ids[: 10**7]  # sentences are in no order: a fair sample
            counts = np.bincount(ids, minlength=assistant.config.vocab_size)
            sizes = args.bottleneck, args.layers, args.recurrence
            msd.make_student(assistant, *sizes, args.init, args.seed, counts).save(folder)


def report(run, corpus):
    """What was read and what was dropped, with totals that add up."""
    kinds = ("lines", "kept", "long", "blank", "header", "same", "quoted")
    total = {k: sum(r[k] for r in corpus.report) for k in kinds}
    bad = sum(sum(r["bad"].values()) for r in corpus.report)
    keys = corpus.pairs[:, 0].astype(np.uint64) * np.uint64(2**32) + corpus.pairs[:, 1]
    twice = len(keys) - len(np.unique(keys))
    run.say(
        f"data: {len(corpus.report)} files, {total['lines']:,} lines = {total['kept']:,} pairs + "
        f"{total['long']:,} too long + {total['blank']:,} blank + {total['header']:,} headers + "
        f"{bad:,} malformed; {len(corpus.first):,} distinct sentences, {twice / total['kept']:.1%} "
        "of the pairs are repeated"
    )
    most = max(run.args.max_lines)
    if cut := sum(r["lines"] >= most for r in corpus.report):
        run.say(f"  {cut} files reach --max-lines {most:,}; lines beyond it are not read")
    examples = [(kind, e) for r in corpus.report for kind, e in r["examples"].items()]
    for what, warn in (("same", "both sides are equal"), ("quoted", "both sides are in quotes")):
        if total[what]:
            example = next(e for kind, e in examples if kind == what)
            sign = "warning: " if total[what] > 0.03 * total["kept"] else ""
            run.say(f"  {sign}{total[what] / total['kept']:.1%}: {warn}, such as {example}")
    for _, example in [e for e in examples if e[0] not in ("same", "quoted")][:3]:
        run.say(f"  dropped {example}")
    run.log(data=corpus.report, distinct=len(corpus.first), repeated=twice)


def look(run, teacher, corpus):
    """A look at the teacher before hours of training on it."""
    ids = np.unique(corpus.pairs[:, 0])
    some = np.sort(np.random.default_rng(0).permutation(ids)[:4000])
    flat, starts = teacher.tokenize(corpus.texts(some))
    seen = describe_vectors(
        teacher.embed(flat, starts, progress=run.meter("a look at the teacher"))
    )
    seen["truncated"] = float((np.diff(starts) >= teacher.config.max_seq_length).mean())
    run.say(
        f"teacher: width {seen['width']}, mean norm {seen['norm']:.3f}, mean cosine of different "
        f"sentences {seen['cosine']:.3f}, {seen['truncated']:.1%} truncated; MSE of the best "
        f"constant guess {seen['constant_mse']:.5f}: a loss near it has learnt nothing"
    )
    if seen["cosine"] > 0.8:
        run.say("  warning: all sentences look alike to this teacher; is it the right pooling?")
    run.log(teacher=seen)


def describe_vectors(v):
    """What a teacher's vectors (n, H) look like: mean norm, mean off-diagonal cosine, and the MSE
    of the best constant guess, which any student must beat."""
    n, total = len(v), M.unit(v).sum(0)
    cosine = float((total @ total - n) / (n * (n - 1))) if n > 1 else math.nan
    norm = float(np.linalg.norm(v, axis=1).mean())
    size = {"n": n, "width": v.shape[1], "norm": norm}
    return {**size, "cosine": cosine, "constant_mse": float(v.var(0).mean())}


# ------------------------------------------------------------------------------------- evaluation
def ranks(x):
    """Ranks from 1, ties averaged."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def spearman(x, y):
    """Spearman's rank correlation of two arrays (n,), ties averaged; nan where one is constant."""
    a, b = (r - r.mean() for r in (ranks(x), ranks(y)))
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm else math.nan


def mean_spearman(scores):
    """(all, monolingual, cross-lingual) means over sets named A-B; nan for none."""

    def mean(keep):
        kept = [v for k, v in scores.items() if keep(*k.split("-"))]
        return float(np.mean(kept)) if kept else math.nan

    return mean(lambda a, b: True), mean(lambda a, b: a == b), mean(lambda a, b: a != b)


def similarity_scores(encode, sets):
    """{"en-de": cosine of each pair (n,)} for the sets of data.read_sts; a sentence once."""
    texts = list(dict.fromkeys(t for a, b, _ in sets.values() for t in (*a, *b)))
    row, v = {t: i for i, t in enumerate(texts)}, M.unit(encode(texts))

    def vectors(side):
        return v[[row[t] for t in side]]

    return {name: (vectors(a) * vectors(b)).sum(1) for name, (a, b, _) in sets.items()}


def retrieval(x, y, block=1024):
    """Translation accuracy in both directions, in percent: x[i] and y[i] (n, H) are translations.

    The nearest neighbour by cosine must be the right one. A tie counts as wrong, so equal vectors
    cannot score.
    """
    x, y = M.unit(x), M.unit(y)

    def hits(a, b):
        n = 0
        for i in range(0, len(a), block):
            sims = a[i : i + block] @ b.T  # (block, n)
            right = sims[np.arange(len(sims)), np.arange(i, i + len(sims))]
            n += int(((sims >= right[:, None]).sum(1) == 1).sum())
        return 100 * n / len(a)

    return hits(x, y), hits(y, x)


def evaluate(model, sets, dev, dev_targets):
    """(one row of the table, cosines by set).

    Spearman x 100 by set, accuracy both ways and 100 x MSE to the teacher by dev language.
    sets: data.read_sts. dev: {language: (english, translations)}. dev_targets: {language: (n, H)}.
    """
    cosines = similarity_scores(model.encode, sets) if sets else {}
    scores = {k: 100 * spearman(c, sets[k][2]) for k, c in cosines.items()}
    row = {"spearman": scores, "accuracy": {}, "mse": {}}
    for language, sides in dev.items():
        x, y = (model.encode(side, normalize=False) for side in sides)
        row["accuracy"][language] = retrieval(x, y)
        errors = [float(np.square(v - dev_targets[language]).mean()) for v in (x, y)]
        row["mse"][language] = [100 * e for e in errors]
    return row, cosines


def bootstrap(sets, a, b, n=1000, seed=0):
    """How sure is the difference b - a of two models?

    {"all": [difference, low, high], "mono": ..., "cross": ...} of mean Spearman x 100, with the
    bounds of 95 % of n paired resamples of the sentence pairs. sets: data.read_sts; a, b:
    similarity_scores of the two. Sets of one length share their draws: the languages of STS
    benchmark are translations of the same pairs, and drawing them apart would make the bounds too
    narrow.
    """

    def difference(rows):
        def mean(cosines):
            drawn = {k: rows[len(gold)] for k, (_, _, gold) in sets.items()}
            scores = {k: spearman(cosines[k][i], sets[k][2][i]) for k, i in drawn.items()}
            return mean_spearman({k: 100 * v for k, v in scores.items()})

        return np.subtract(mean(b), mean(a))  # (3,)

    rng, sizes = np.random.default_rng(seed), sorted({len(s[2]) for s in sets.values()})
    whole = difference({m: np.arange(m) for m in sizes})
    draws = [difference({m: rng.integers(0, m, m) for m in sizes}) for _ in range(n)]
    low, high = np.nanpercentile(np.array(draws), [2.5, 97.5], axis=0)  # a draw may be constant
    names = ("all", "mono", "cross")
    return {k: [float(x[i]) for x in (whole, low, high)] for i, k in enumerate(names)}


# -------------------------------------------------------------------------------------- the table
def dev_pairs(dev):
    """{language: (english, translations)} of the dev files, by their names, en-XX."""
    pairs, end = {}, 0
    for r in dev.report if dev else []:
        m = re.search(r"en-([a-z]{2,3})\b", r["file"])
        start, end = end, end + r["kept"]
        sides = pairs.setdefault(m[1] if m else r["file"], ([], []))
        for side, ids in zip(sides, dev.pairs[start:end].T):
            side.extend(dev.texts(ids))
    return {k: v for k, v in pairs.items() if v[0]}


def finish(run, models, inputs):
    """Read the test sets, once; write results.json, print the table, clear up.

    models: {row of the table: folder}.
    """
    args, out, sts = run.args, run.out, inputs["sts"]
    pairs = dev_pairs(inputs["dev"])
    teacher = run.load(models["teacher"])
    goal = {k: teacher.encode(side, normalize=False) for k, (side, _) in pairs.items()}
    english = {k: v for k, v in sts.items() if k == "en-en"}  # all that it is scored on
    rows, cosines = {}, {}
    for label, folder in models.items():
        model, begun = run.load(folder), time.monotonic()
        given = (english, {}) if label == "teacher" else (sts, pairs)
        rows[label], cosines[label] = evaluate(model, *given, goal)
        rows[label]["sizes"] = M.ledger(model.config)
        score = mean_spearman(rows[label]["spearman"])[0]
        seconds = time.monotonic() - begun
        run.say(f"evaluated {label}: mean Spearman {score:.1f} ({seconds:.0f} s)")
    results = {"rows": rows, "bootstrap": None, **circumstances(run)}
    if (last := list(models)[-1]).startswith("student") and sts:
        results["bootstrap"] = bootstrap(sts, cosines["assistant"], cosines[last])
    with M.atomic(out / "results.json") as tmp:
        tmp.write_text(json.dumps(results, indent=1), "utf-8")
    (out / "checkpoint.safetensors").unlink(missing_ok=True)
    if not args.keep:
        M.delete(out / "stages")
    print_table(results)


def circumstances(run):
    """What results.json says of how a run was made; file names without folders."""
    entries, given = read_log(run.out), settings(run.args)
    for k in ("teacher", "assistant", "train", "extra", "dev", "sts"):
        many = isinstance(given[k], list)
        given[k] = [Path(x).name for x in given[k]] if many else given[k] and Path(given[k]).name
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    there = shutil.which("git")
    revision = subprocess.run(git, capture_output=True, text=True).stdout.strip() if there else ""
    return {
        "stages": [e for e in entries if e.get("done") and "stage" in e],
        "teacher_look": next(e["teacher"] for e in reversed(entries) if "teacher" in e),
        "arguments": given,
        "seed": run.args.seed,
        "git": revision or None,
        "dtype": run.args.dtype,
        "threads": torch.get_num_threads(),
        "processes": run.world,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {run.args.device}",
        "python": platform.python_version(),
        "versions": {m.__name__: m.__version__ for m in (torch, tokenizers, np)},
    }


def print_table(results):
    """The whole story of a run, from its results.json."""
    rows = results["rows"]
    names = list(rows["assistant"]["spearman"])
    print(f"\n{'Spearman x 100':22}" + "".join(f"{n:>7}" for n in names) + "   mono  cross    all")
    for label, row in rows.items():
        everything, mono, cross = mean_spearman(row["spearman"])
        means = (mono, math.nan, math.nan) if label == "teacher" else (mono, cross, everything)
        scores = [row["spearman"].get(n, math.nan) for n in names]
        cells = (f"{'-':>7}" if math.isnan(v) else f"{v:7.1f}" for v in (*scores, *means))
        print(f"{label:22}" + "".join(cells))
    print("\ndev pairs, mean of languages   en->xx  xx->en  100 MSE en  100 MSE xx")
    for label, row in rows.items():
        if row["accuracy"]:
            there, back = np.mean(list(row["accuracy"].values()), axis=0)
            en, xx = np.mean(list(row["mse"].values()), axis=0)
            print(f"{label:29}{there:8.1f}{back:8.1f}{en:12.3f}{xx:12.3f}")
    heads = ("embedding", "layers", "other", "total", "MB f32", "of assistant")
    print(f"\n{'parameters':18}" + "".join(f"{h:>13}" for h in heads))
    full = rows["assistant"]["sizes"]["total"]
    students = [k for k in rows if k.startswith("student")]
    for label in ["teacher", "assistant", *students[-1:]]:
        s = rows[label]["sizes"]
        counts = "".join(f"{s[k]:13,}" for k in ("embedding", "layers", "other", "total"))
        share = s["total"] / full
        print(f"{label.split(',')[0]:18}{counts}{s['total'] * 4 / 2**20:13.1f}{share:13.1%}")
    if results.get("bootstrap"):
        known = [(k, *v) for k, v in results["bootstrap"].items() if not math.isnan(v[0])]
        bounds = ", ".join(f"{k} {d:+.1f} ({low:+.1f} to {high:+.1f})" for k, d, low, high in known)
        print(f"\nstudent - assistant, with 95 % of paired resamples: {bounds}")
    seconds = ", ".join(f"{e['stage']} {e['seconds']:.0f} s" for e in results["stages"])
    how = f"{results['dtype']}, {results['threads']} threads, seed {results['seed']}"
    print(f"\n{seconds}; {how}", flush=True)


# ---------------------------------------------------------------------------------------- command
def execute(args):
    """Run, continue or report a run in args.out."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():  # torchrun's
        backend = "cpu:gloo,cuda:nccl" if "cuda" in args.device else "gloo"
        dist.init_process_group(backend)
    if not dist.is_initialized() or dist.get_rank() == 0:
        lock = take(args.out)  # noqa: F841 - held until this function ends
    if dist.is_initialized():
        dist.barrier()
    keep_memory()
    run, file = Run(args), args.out / "results.json"
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, run.on_signal)
    identity = same_run(run)
    if file.exists():
        again = "without its results.json the same command evaluates it again"
        run.say(f"this run is finished; {again}")
        try:
            return run.rank == 0 and print_table(M.read_json(file))
        except (KeyError, TypeError, AttributeError):
            fix = "damaged; delete it and run the same command to write it again"
            raise InputError(f"{file}: {fix}") from None
    pipeline(run, identity)


def main(argv=None):
    try:
        execute(parse(argv))
    except Stop as e:
        if os.environ.get("RANK", "0") == "0":
            print(e, file=sys.stderr)
        sys.exit(e.code)
    except RuntimeError as e:
        signs = ("gloo", "peer", "Broken pipe", "Timed out")
        lost = isinstance(e, dist.DistError) or any(x in str(e) for x in signs)
        if not dist.is_initialized() or not lost:
            raise
        print(
            f"error: process {dist.get_rank()} lost the others: one of them has ended, and says "
            "why above unless it was killed. The same command continues from the last checkpoint",
            file=sys.stderr,
        )
        os._exit(1)  # an orderly end would wait for the one that is gone


if __name__ == "__main__":
    M.run_cli(main)
