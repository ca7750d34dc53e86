"""Train: `python train.py` runs all four stages on the built-in corpus; --help says what else.

A run lives in one folder. The same command again continues it, whenever it was stopped; on a CPU
to the same bits (a GPU's attention adds up its gradients in no fixed order).
Random, and from --seed: the order of batches, dropout, a start from noise (--init paper), the
demo's teacher. Fixed: samples of text (for the alignment, for dev, for a look), the demo's corpus,
the resamples of the bootstrap.

    arguments | the run | the loop | checkpoint and log | the stages | the pipeline | the end"""

import argparse
import contextlib
import ctypes
import datetime
import functools
import json
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P and -I leave it out

import checks.pairs
import data
import model as M
import msd
from demo import corpus as demo
from model import need, put
from tools import checkpoints
from tools.cli import Parser, filled, number, run_cli
from tools.evaluation import bootstrap, evaluate_all, look_at_teacher, table

SAVE_SECONDS = 60  # between checkpoints: what a crash in training can cost
EVALS = 4  # dev evaluations a stage; the best one's weights are kept

# -------------------------------------------------------------------------------------- arguments
# Flags that may differ when a run goes on; another device changes the bits. --dtype may not.
FREE = {"out", "cache", "device", "keep"}


def stage_list(text):
    """A type for argparse: 1-4 or 1,4 -> the list of stages."""
    spans = [re.fullmatch(r"(\d)(?:-(\d))?", part.strip()) for part in text.split(",")]
    parts = [range(int(m[1]), int(m[2] or m[1]) + 1) for m in spans if m]  # 4-2 is empty
    wanted = set().union(*parts)
    if not all(spans) or not all(parts) or not wanted <= set(msd.STAGES):
        known = f"stages 1 to {max(msd.STAGES)}, such as 1-{max(msd.STAGES)} or 1,4"
        raise argparse.ArgumentTypeError(f"{text!r}: expected {known}")
    return sorted(wanted)


def layer_list(text):
    """A type for argparse: 3 -> (1, 2, 3), the first three; 1,6,12 -> those; 12, -> (12,)."""
    if not re.fullmatch(r"[1-9]\d{0,2}(,[1-9]\d{0,2})*,?", text, re.ASCII):
        known = "3 (the first three), 1,6,12 or 12, (that one); numbers from 1 to 999"
        raise argparse.ArgumentTypeError(f"{text!r:.80}: expected layers as {known}")
    numbers = tuple(map(int, text.removesuffix(",").split(",")))
    return numbers if "," in text else tuple(range(1, numbers[0] + 1))


def parser():
    """Every flag there is. Those that a preset sets are None here; parse() fills them in."""
    raw = argparse.RawDescriptionHelpFormatter
    here = "cuda" if torch.cuda.is_available() else "cpu"
    ap = Parser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    files = {"nargs": "+", "action": "extend", "default": [], "metavar": "GLOB", "type": filled}
    folder = {"metavar": "DIR", "type": filled}
    n = len(msd.STAGES)
    each = functools.partial(number, n=n)
    add = ap.add_argument_group("your data").add_argument
    add("--teacher", **folder, help="English sentence encoder: its folder")
    add("--assistant", **folder, help="multilingual encoder; without it one is made")
    add("--train", **files, help="english<TAB>translation files, plain or .gz")
    add("--extra", **files, help="more such files for stages 2 and 3 alone, as the paper does")
    add("--dev", **files, help="held-out pairs, en-XX.tsv: pick the checkpoints, give the accuracy")
    add("--sts", **folder, help="sets *.A-B.txt, scored once, at the end; or dev sets, to try")
    add = ap.add_argument_group("sizes").add_argument
    add("--preset", choices=msd.PRESETS, help="demo without your own data, minilm with it")
    add("--bottleneck", type=number(int, 0), help="B, width of the word table; 0: full, no stage 2")
    add("--layers", type=layer_list, help="the first K layers, as 3; or which, as 1,6,12; one: 12,")
    add("--recurrence", type=number(int, 1, 1000), help="R, times they run; time grows with K x R")
    add("--vocab", type=number(int, 100, 10**7), help="pieces learnt here; more help up to a point")
    add("--keep-vocab", type=number(int, 1), help="pieces of --assistant to keep, most used first")
    add = ap.add_argument_group(
        f"schedule; of numbers one, or {n} for stages 1 to {n}"
    ).add_argument
    all_stages = {"type": stage_list, "default": [*msd.STAGES]}
    add("--stages", **all_stages, help=f"1-{n}; 2-{n} takes --assistant as it is")
    add("--epochs", type=each(float, 1e-6, 1e6), help="passes over the pairs; 0.1: a quick look")
    add("--batch", type=each(int, 1), help="pairs a step; in stage 4 each is contrasted with all")
    add("--lr", type=each(float, 1e-12, math.inf), help="peak learning rate; 1e-3 for small models")
    add("--dropout", type=number(float, 0, 1), help="0 suits a few passes, 0.1 the paper's many")
    add("--init", choices=("text", "paper"), help="of the bottleneck: SVD by text, paper's noise")
    add("--no-contrast", action="store_true", help="stage 4 without its contrastive term")
    add("--max-tokens", type=number(int, 3), help="longer sentences are cut; fewer save memory")
    add("--max-chars", type=number(int, 1), help="pairs with a longer side are dropped")
    add("--max-lines", type=each(int, 1, 2**62), help="read at most so many lines of each file")
    add = ap.add_argument_group("the run").add_argument
    add("--out", **folder, help="its folder; default: runs/PRESET")
    add("--cache", default="runs/cache", **folder, help="for all runs; safe to delete")
    add("--keep", action="store_true", help="keep the models between stages, in OUT/stages")
    add("--seed", type=number(int, 0), default=0, help="scores of two differ by about a point")
    add("--dtype", choices=("float32", "bfloat16"), help="arithmetic; default: the best here")
    add("--device", default=here, help="cpu or cuda; default: what is here")
    return ap


def parse(argv):
    """The arguments, those not given filled in from the preset. Raises: InputError."""
    args = parser().parse_args(argv)
    args.preset = args.preset or ("minilm" if args.train or args.teacher else "demo")
    given = argparse.Namespace(**vars(args))
    for name, value in vars(msd.PRESETS[args.preset]).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.bottleneck == 0:  # there is nothing to align
        args.stages = [k for k in args.stages if k != 2]
        # Only with a bottleneck does the paper halve xlmr's rate in stage 3.
        args.lr = given.lr or (*args.lr[:2], args.lr[0], *args.lr[3:])
    need(args.stages, "--stages 2 alone needs a bottleneck")
    need(args.assistant or not args.keep_vocab, "--keep-vocab needs --assistant DIR, to cut its")
    ready = 1 in args.stages or args.assistant
    need(ready, "--stages without 1 needs --assistant DIR, a trained multilingual encoder")
    own = args.preset != "demo" or args.teacher or args.train or args.dev or args.sts or args.extra
    fix = "for the built-in corpus leave out these, --dev, --sts and --extra"
    both = "your own data needs both --teacher DIR and --train GLOB"
    need(args.teacher and args.train or not own, f"{both}; {fix}")
    if idle := unused(args, given):
        data.note(f"{', '.join(idle)}: not used with these stages and sizes")
    args.out = Path(args.out or f"runs/{args.preset}")
    args.device = usable_device(args.device)
    args.dtype = args.dtype or M.best_dtype(args.device)[0]
    return args


def unused(args, given):
    """The flags among those given that play no part in the run of these arguments."""
    stages = [msd.STAGES[k] for k in args.stages]
    used = dict.fromkeys(("bottleneck", "layers", "recurrence", "init"), args.stages != [1])
    used |= {"init": used["init"] and args.bottleneck, "vocab": not args.assistant}
    used |= {"extra": any(s.extra for s in stages), "no_contrast": any(s.contrast for s in stages)}
    return [f"--{k.replace('_', '-')}" for k in used if not used[k] and getattr(given, k)]


def usable_device(name):
    """cpu, or a GPU by its full name. Raises: InputError where it is not here."""
    here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name == "cuda" or name.startswith("cuda") and "LOCAL_RANK" in os.environ:  # torchrun's
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    need(name in here, f"--device {name} is not usable here; there is {', '.join(here)}")
    if name != "cpu":
        torch.cuda.set_device(name)
    return name


# ---------------------------------------------------------------------------------------- the run
MARK = "run.key"  # in each folder that a run makes, see Run.mark


class Run:
    """What all parts of a run share: arguments, folder, log, its place among several processes, and
    what read_inputs adds. All processes do the same; the first one alone writes.

    files: of --train, --extra and --dev. identity: what makes it this run. result: its last model.
    trained: that one is there, only the table is missing; what came before may be gone."""

    def __init__(self, args):
        self.args, self.out = args, args.out
        self.result = self.out / ("assistant" if args.stages == [1] else "student")
        self.trained, self.is_marked = False, True
        with M.reading("WORLD_SIZE and RANK", "as torchrun sets them", "; without it unset them"):
            self.world = int(os.environ.get("WORLD_SIZE") or 1)
            self.rank = int(os.environ.get("RANK") or -1) if self.world > 1 else 0
            need(0 <= self.rank < self.world, "RANK is not from 0 to below WORLD_SIZE")
            if self.world > 1:
                dist.init_process_group("cpu:gloo,cuda:nccl" if "cuda" in args.device else "gloo")
                # Waiting for process 0, which may make targets for hours, has a group of its own
                # with a limit of a day; NCCL's stays short, so that a dead process is noticed.
                self.group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))
        best, why = M.best_dtype(args.device)
        why = why if args.dtype == best else "asked for"
        where = f"device {args.device}, {args.dtype} ({why}), {torch.get_num_threads()} threads"
        what = f"{args.preset}, stages {args.stages}, seed {args.seed}, folder {self.out}"
        self.say(f"{where}, {self.world} processes; {what}")
        self.files = {x: data.expand(getattr(args, x), f"--{x}") for x in ("train", "extra", "dev")}
        self.identity = run_identity(args, self.files)
        self.key = data.digest(self.identity)

    def say(self, text):
        if self.rank == 0:
            print(text, flush=True)

    def log(self, **entry):
        if self.rank == 0:
            with open(self.out / "log.jsonl", "a", encoding="utf-8") as f:
                f.write(json.dumps(entry) + "\n")

    def largest(self, *values):
        """The largest of each number over all processes."""
        t = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(t, dist.ReduceOp.MAX, group=self.group)
        return t.tolist()

    @contextlib.contextmanager
    def main_process_first(self):
        """The first process goes through alone and makes what the others then find."""
        if self.rank:
            dist.barrier(self.group)
        yield self.rank == 0
        if self.world > 1 and self.rank == 0:
            dist.barrier(self.group)

    def build(self, folder, make):
        """The folder of a model, make(), which the first process saves if it is not there."""
        return folder if self.trained else self.fill(folder, lambda tmp: make().save(tmp))

    def fill(self, folder, write):
        """The folder that write(new folder) fills, which the first process does, once in a run."""
        with self.main_process_first() as is_main:
            if is_main and not self.has(folder):
                with data.atomic(folder) as tmp:
                    write(tmp)
                    (tmp / MARK).write_text(self.mark(folder, tmp), "utf-8")
        unseen = f"{folder}: process {self.rank} does not see what the first one made"
        need(folder.exists(), f"{unseen}; all need the same --out and --cache, on a shared disk")
        return folder

    def has(self, folder):
        """Is a folder there? Raises: InputError where this run did not make it."""
        if folder.exists() and self.is_marked:
            mark = folder / MARK
            ours = mark.is_file() and mark.read_bytes() == self.mark(folder, folder).encode()
            need(ours, f"{folder}: not made by this run. Move it away or choose another --out")
        return folder.exists()

    def mark(self, folder, now):
        """What this run writes into a folder, which is `now` elsewhere, to know it again: a digest
        of the run, the folder's name, and the weights or texts in it."""
        files = (f for kind in ("*.safetensors", "*.tsv", "STS*.txt") for f in now.rglob(kind))
        return data.digest(self.key, folder.name, *sorted(files))

    def load(self, folder, train=False):
        """A model with this run's arithmetic; --max-tokens and, in training, --dropout apply."""
        a = self.args
        return checkpoints.load(folder, a.dtype, a.device, train, a.dropout, a.max_tokens)


def keep_memory():
    """Freed blocks stay with the process: glibc would give them back and fetch them anew, zeroed,
    at every step, which costs a sixth of the time on a CPU."""
    with contextlib.suppress(OSError, TypeError, AttributeError):  # no glibc, nothing to do
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**30) or libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD; an old glibc's most


def run_identity(args, files):
    """What a run is: its settings, and the names and content of its files, as JSON gives it."""
    now = {k: v for k, v in vars(args).items() if k not in FREE}
    if args.sts:
        files = files | {"sts": data.sts_files(args.sts).values()}
    now |= {flag: sorted((f.name, data.digest(f)) for f in some) for flag, some in files.items()}
    models = {k: now[k] for k in ("teacher", "assistant") if now[k]}
    now |= {flag: (Path(f).name, checkpoints.fingerprint(f)) for flag, f in models.items()}
    return json.loads(json.dumps(now))


def claim(run):
    """Make sure that all there is in the run's folder is of this run. Raises: InputError."""
    out, file, now = run.out, run.out / "run.json", run.identity
    need(not out.is_file(), f"--out {out}: is a file; give a folder")
    if file.exists():
        with M.reading(file, "what a run is", f"; delete all of {out} or choose another --out"):
            before = M.read_json(file)
        # Runs of older revisions have no key, nor have the folders they made.
        run.is_marked = before.pop("key", None) is not None
        for key in sorted(now | before):
            was, new = before.get(key), now.get(key)
            began = f"{out}: this run was started with {key} {was!r}, now it is {new!r}"
            known = key in now and key in before
            fix = "Give the old value" if known else "Take the revision of this code that began it"
            need(was == new, f"{began}. {fix} to continue, or choose another --out")
    else:
        for name in ("results.json", "log.jsonl", "checkpoint.safetensors"):
            unknown = f"{out / name}: of a run that no run.json beside it describes"
            need(not (out / name).exists(), f"{unknown}. Move it away or choose another --out")
    names = ["assistant", "student"] + ["data", "teacher"] * (not run.args.train)
    for folder in [*map(out.joinpath, names), *out.glob("stages/[!.]*")]:
        run.has(folder)
    run.trained = run.result.exists()


# --------------------------------------------------------------------------------------- the loop
def fit(run, name, model, steps, lr, loss_at, dev_loss=None):
    """Train `model` for `steps` steps and leave the weights of the best dev loss in it.

    loss_at(step): (loss terms by name, number of tokens) of the batch of that step. dev_loss(): the
    loss to choose by. A continued run gives the same bits, on a CPU. Each of several processes has
    its rows. Leaves at a signal, after a save. Raises: InputError at a loss that is not finite.
    """
    model.train()
    optimizer = make_optimizer(model, lr)
    training = Training(run, name, model, optimizer, steps)
    eval_steps = {math.ceil(steps * (i + 1) / EVALS) for i in range(EVALS)} if dev_loss else ()
    with deferred_signals() as caught:
        for step in range(training.restore(), steps):
            seed = data.digest(run.args.seed, name, step, run.rank)  # of dropout
            torch.manual_seed(int(seed[:15], 16))
            for group in optimizer.param_groups:
                group["lr"] = lr * rate_at(step, steps)

            terms, tokens = loss_at(step)
            optimizer.zero_grad()
            sum(terms.values()).backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), msd.CLIP)
            optimizer.step()

            training.report(step, terms, norm, tokens)
            if step + 1 in eval_steps:
                training.keep_if_best(step, dev_loss())
            due = time.monotonic() - training.saved > SAVE_SECONDS and step + 1 < steps
            stop, due = run.largest(max(caught, default=0), due)
            if stop or due:
                training.save(step + 1)
            if stop:
                run.say("stopped; the same command continues here")
                sys.exit(128 + int(stop))
    training.finish()


@contextlib.contextmanager
def deferred_signals():
    """Yields a list; SIGINT and SIGTERM are put there, not obeyed. A second one ends at once."""
    caught = []

    def defer(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    both = signal.SIGINT, signal.SIGTERM  # a script's job in the background ignores the first
    before = {n: signal.signal(n, defer) for n in both if signal.getsignal(n) != signal.SIG_IGN}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if caught:  # since the loop last looked
        signal.raise_signal(caught[0])


def rate_at(step, steps):
    """Learning rate as a share of its peak: linear up over WARMUP of the steps, then to 0."""
    w = msd.WARMUP * steps
    return (step + 1) / (w + 1) if step < w else (steps - step) / (steps - w)


def make_optimizer(model, lr):
    """AdamW as the paper sets it, with bias correction; no decay on biases and LayerNorm."""
    decayed, others = [], []
    for name, q in model.named_parameters():
        plain = name.endswith("bias") or "norm" in name
        (others if plain else decayed).append(q)
    groups = [{"params": decayed, "weight_decay": msd.WEIGHT_DECAY}, {"params": others}]
    return torch.optim.AdamW(groups, lr, eps=msd.ADAM_EPS, weight_decay=0.0, fused=True)


# ----------------------------------------------------------------------------- checkpoint and log
class Training:
    """What a stage's training keeps beside the loop: its checkpoint, its log, the best weights.

    A checkpoint holds weights, AdamW's state, the best weights so far (the start's, before a dev
    loss) with their dev loss, stage, step and seconds spent; no generator state, as every random
    draw depends on seed, stage, step and process. What a stage does not train is not in it.
    """

    def __init__(self, run, name, model, optimizer, steps):
        self.run, self.name, self.optimizer, self.steps = run, name, optimizer, steps
        self.file = run.out / "checkpoint.safetensors"
        self.best_loss = math.inf
        trained = {k: q for k, q in model.named_parameters() if q.requires_grad}
        self.weights = [q.detach() for q in trained.values()]
        self.best = [q.clone() for q in self.weights]
        self.tensors = {}  # all that training changes, to save, and to restore in place
        for (k, q), best in zip(trained.items(), self.best):
            moments = {m: torch.zeros_like(best) for m in ("exp_avg", "exp_avg_sq")}
            optimizer.state[q] = {"step": torch.zeros((), device=q.device), **moments}
            parts = {"model": q.detach(), "best": best, **optimizer.state[q]}
            self.tensors |= {f"{part}.{k}": v for part, v in parts.items()}
        self.tokens = 0
        self.loss_sum = torch.zeros((), device=model.device)
        self.begun = self.saved = self.shown = self.logged = time.monotonic()

    def seconds(self):
        return time.monotonic() - self.begun

    def save(self, step):
        """Write the checkpoint: the first process does, and nobody goes on before it has."""
        self.check(step)
        meta = {"run": self.run.key, "stage": self.name, "step": step}
        meta |= {"best": self.best_loss, "seconds": self.seconds()}
        with self.run.main_process_first() as is_main:
            if is_main:
                with data.atomic(self.file) as tmp:
                    M.write_safetensors(tmp, self.tensors, {k: str(v) for k, v in meta.items()})
        self.saved = time.monotonic()

    def restore(self):
        """The step to begin at: that of this stage's checkpoint, or 0. Raises: InputError."""
        fix, key = f"; delete it to redo {self.name}", self.run.key
        tensors, meta = M.read_safetensors(self.file, fix=fix) if self.file.exists() else ({}, {})
        need(meta.get("run", key) == key, f"{self.file}: not of this run{fix}")
        step = 0
        if meta.get("stage") == self.name:
            with M.reading(self.file, "a whole checkpoint", fix):
                for k, v in self.tensors.items():
                    need(tensors[k].shape == v.shape, f"{k} is of another shape")
                    v.copy_(tensors[k])
                step, self.best_loss = int(meta["step"]), float(meta["best"])
                self.begun -= float(meta["seconds"])
            self.run.say(f"{self.name}: continues at step {step} of {self.steps}")
        if self.run.rank == 0:  # the log forgets what came after the checkpoint
            log = read_log(self.run.out)
            log = [e for e in log if e.get("stage") != self.name or e.get("step", step) < step]
            with data.atomic(self.run.out / "log.jsonl") as tmp:
                tmp.write_text("".join(json.dumps(e) + "\n" for e in log), "utf-8")
        return step

    def report(self, step, terms, norm, tokens):
        """Log about a hundred times a stage: reading numbers makes the host wait for a GPU."""
        loss = sum(terms.values()).detach()
        done = step + 1
        self.loss_sum += loss + norm  # once it is not finite, it stays so
        self.tokens += tokens
        if done % max(1, self.steps // 100) and done < self.steps:
            return
        self.check(done)
        entry = {k: float(v.detach()) for k, v in {"loss": loss, **terms}.items()}
        now = time.monotonic()  # a GPU has caught up
        entry |= {"lr": self.optimizer.param_groups[0]["lr"], "norm": float(norm)}
        speed = round(self.tokens / max(now - self.logged, 1e-9))
        self.run.log(stage=self.name, step=step, **entry, tokens_per_s=speed)
        self.tokens, self.logged = 0, now
        if now - self.shown > 5 or done == self.steps:
            left = datetime.timedelta(seconds=round(self.seconds() / done * (self.steps - done)))
            shown = "  ".join(f"{k} {v:.4g}" for k, v in entry.items())
            shown += f"  {speed:,} tokens/s  {left} left"
            self.run.say(f"{self.name}  step {done}/{self.steps}  {shown}")
            self.shown = now

    def check(self, step):
        """Raises: InputError if a loss was not finite, before anything is saved over."""
        what = f"{self.name}: by step {step} the loss or the gradient norm is not finite"
        need(math.isfinite(self.loss_sum), f"{what}. Choose a lower --lr and another --out")

    def keep_if_best(self, step, loss):
        """Keep the weights if this dev loss is the best so far."""
        self.run.log(stage=self.name, step=step, dev=loss)
        if loss < self.best_loss:
            self.best_loss = loss
            torch._foreach_copy_(self.best, self.weights)

    def finish(self):
        """Leave the best weights in the model, if dev chose any."""
        chosen = self.best_loss < math.inf
        if chosen:
            torch._foreach_copy_(self.weights, self.best)
        done = {"done": True, "steps": self.steps, "seconds": round(self.seconds(), 1)}
        self.run.log(stage=self.name, **done, best_dev=self.best_loss if chosen else None)


def read_log(folder):
    """The entries of a run's log; a line that cannot be read, as a kill leaves it, is left out."""
    file = folder / "log.jsonl"
    entries, text = [], file.read_text("utf-8", errors="replace") if file.exists() else ""
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            entries.append(json.loads(line))
    return [e for e in entries if isinstance(e, dict)]


# ------------------------------------------------------------------------------------- the stages
def train_stage(run, stage, models, start, folder):
    """One stage of the paper, from the model in `start` to `folder`, which it returns.

    models: {"teacher": folder, "assistant": folder}; msd.STAGES says which gives the targets.
    """
    if run.trained or run.has(folder):
        return folder
    args, spec = run.args, msd.STAGES[stage]
    lr, batch, epochs = (x[stage - 1] for x in (args.lr, args.batch, args.epochs))
    model = run.load(start, train=True)
    source = models[spec.targets]
    for part in (model.layers, model.dense):
        part.requires_grad_(not spec.embeddings_only)  # stage 2 has no use for them
    pairs = stage_pairs(run, stage)
    loss_at, steps = stage_batches(run, stage, model, run.corpus, pairs, source, epochs)
    dev_loss = None
    if run.dev:
        sample = np.random.default_rng(0).permutation(run.dev.pairs)[:1000]
        on_dev = stage_batches(run, stage, model, run.dev, sample, source)
        dev_loss = functools.partial(mean_loss, model, *on_dev)
    run.say(
        f"stage {stage}, {spec.title}: from {start.name}, targets from the {spec.targets}, "
        f"{len(pairs):,} pairs, {steps:,} steps of {batch}, learning rate {lr:g}"
    )
    fit(run, f"stage {stage}", model, steps, lr, loss_at, dev_loss)
    return run.build(folder, lambda: model)


def stage_pairs(run, stage):
    """The pairs of the corpus that a stage trains on: (n, 2)."""
    used = (run.corpus.group == 0) | msd.STAGES[stage].extra
    return run.corpus.pairs[used & (run.corpus.line <= run.args.max_lines[stage - 1])]


def stage_batches(run, stage, model, corpus, pairs, source, epochs=None):
    """(loss_at, steps) of a stage over these pairs (n, 2) of a corpus, for fit. source: the folder
    of the encoder that gives the targets. epochs: passes, for training; without, one for dev."""
    args = run.args
    with run.main_process_first():
        flat, starts = data.tokens(corpus, model, args.cache)
    lengths = np.diff(starts)[pairs]  # (n, 2)

    @functools.lru_cache(1)
    def batches(epoch):
        return data.batch_order(lengths.max(1), args.batch[stage - 1], (args.seed, stage, epoch))

    one_pass = batches(0)
    steps = math.ceil((epochs or 1) * len(one_pass))
    seen = pairs[np.concatenate(one_pass[:steps])]  # (m, 2)
    targets_of = stage_targets(run, stage, corpus, seen, source)
    net = model  # what the loss calls
    if epochs and run.world > 1:  # averages the gradients over the processes
        net = DistributedDataParallel(model, gradient_as_bucket_view=True)

    def loss_at(step):
        epoch, i = divmod(step, len(one_pass))
        numbers = batches(epoch)[i]  # (N,)
        targets = targets_of(pairs[numbers])
        rows, gather = share_of(run, len(numbers))
        both = pairs[numbers[rows]].T.ravel()  # (2N,): English sides, then translations
        ids, mask = model.batch(flat, starts, both)  # (2N, T) each
        how = {"contrast": not args.no_contrast, "gather": gather}
        terms = msd.stage_loss(stage, net, ids, mask, *targets, **how)
        return terms, int(lengths[numbers].sum())

    return loss_at, steps


def stage_targets(run, stage, corpus, pairs, source):
    """targets_of(some of these pairs (N, 2)): the targets (N, H) of each side, or of the English
    one, which serve both. The encoder in the folder `source` gives them, once: then they are read
    from disk as they are needed."""
    args, spec = run.args, msd.STAGES[stage]
    wanted = np.unique(pairs if spec.per_side else pairs[:, 0])
    name = checkpoints.fingerprint(source)
    with run.main_process_first():
        encoder = run.load(source)
        made = data.vectors(corpus, wanted, encoder, name, args.cache, spec.embeddings_only)

    def targets_of(pairs):
        sides = pairs.T if spec.per_side else pairs.T[:1]  # each (N,)
        return [put(made[np.searchsorted(wanted, s)], args.device).float() for s in sides]

    return targets_of


@torch.inference_mode()
def mean_loss(model, loss_at, steps):
    """The mean loss of all batches, without dropout: for dev."""
    model.eval()
    total = sum(float(sum(loss_at(step)[0].values())) for step in range(steps))
    model.train()
    return total / steps


def share_of(run, n):
    """(rows, gather) of one process in a batch of n pairs: these lines make two GPUs equal one, up
    to rounding and but for dropout, whose masks differ by process.

    Each process takes every world-th row; gather puts the vectors (N, H) of all rows together. The
    loss is then the same formula over the whole batch, contrastive matrix and all, on every
    process; each sends gradient back through its own rows alone, and the mean over processes that
    DDP takes is made up for here.
    """
    if run.world == 1:
        return slice(None), None
    rows = np.arange(run.rank, n, run.world)
    index = put(rows, run.args.device)

    def gather(x):
        x = x[: len(rows)]  # a process without rows has computed one, which is not for the loss
        whole = x.new_zeros(n, x.shape[1]).index_copy(0, index, x.detach())
        dist.all_reduce(whole)
        if x.requires_grad:
            x.register_hook(lambda g: run.world * g)
        return whole.index_copy(0, index, x)

    # One row where there are none: DDP waits for the gradients of every process.
    return rows if len(rows) else np.zeros(1, np.int64), gather


# ----------------------------------------------------------------------------------- the pipeline
def pipeline(run):
    """The paper's figure: teacher, assistant, student's start, stages 2, 3 and 4, then the table.

    Each step is skipped where its folder is there: the same command continues a run."""
    read_inputs(run)
    write_run_json(run)
    args, out, stage_dir = run.args, run.out, run.out / "stages"
    teacher = Path(args.teacher) if args.teacher else demo.make_teacher(run, fit)
    models = {"teacher": teacher}  # by row of the table
    if run.rank == 0:
        run.say(look_at_teacher(run.load(teacher), run.corpus))

    # The assistant: given, or the teacher's body with a new vocabulary; stage 1 trains it.
    assistant = args.assistant and Path(args.assistant)
    if not assistant:
        start = stage_dir / "assistant-start"
        assistant = run.build(start, lambda: start_assistant(run, teacher))
    elif args.keep_vocab:
        models["assistant, given"] = assistant
        cut = stage_dir / "assistant-start" if 1 in args.stages else out / "assistant"
        assistant = run.build(cut, lambda: start_cut_assistant(run))
    if 1 in args.stages:
        models["assistant, untrained"] = assistant
        assistant = train_stage(run, 1, models, assistant, out / "assistant")
    models["assistant"] = assistant

    # The student: bottleneck, some of the assistant's layers; stages 2 to 4 train it.
    if student_stages := [k for k in args.stages if k > 1]:
        student = run.build(stage_dir / "student-start", lambda: start_student(run, assistant))
        models["student, untrained"] = student
        for k in student_stages:
            folder = run.result if k == student_stages[-1] else stage_dir / f"stage{k}"
            student = train_stage(run, k, models, student, folder)
            models[f"student, stage {k}"] = student
    if run.rank == 0:
        finish(run, models)


def read_inputs(run):
    """Set run.corpus, run.dev and run.sts, and say what they look like. Raises: InputError for
    what does not fit, before any work."""
    args, files, sts = run.args, run.files, run.args.sts
    check_models(run)
    if not args.train:
        files, sts = demo.corpus_files(run)
    run.sts = data.read_sts(sts) if sts else {}
    run.say(f"data: reading {sum(map(len, files.values()))} files")
    most = max(args.max_lines)
    with run.main_process_first():
        read = functools.partial(data.build_corpus, cache=args.cache, max_chars=args.max_chars)
        run.corpus = read(files["train"], extra=files["extra"], max_lines=most)
        run.dev = read(files["dev"]) if files["dev"] else None
    run.say("\n".join(run.corpus.describe(most)))
    for line in checks.pairs.check(run.corpus, run.dev, run.sts, sts):
        run.say(line)
    for k in args.stages:
        dropped = f"all lines of --train up to --max-lines {args.max_lines[k - 1]} were dropped"
        need(stage_pairs(run, k).size, f"stage {k} has no pairs: {dropped}")


def write_run_json(run):
    """Note what this run is, once its inputs are known: a mistyped path leaves nothing behind."""
    if run.rank == 0 and not (run.out / "run.json").exists():
        with data.atomic(run.out / "run.json") as tmp:
            tmp.write_text(json.dumps(run.identity | {"key": run.key}, indent=1), "utf-8")
        run.log(data=run.corpus.report)


def check_models(run):
    """Raises: InputError where teacher, assistant and the sizes asked for do not go together."""
    args = run.args
    body = teacher = run.load(args.teacher).config if args.teacher else demo.TEACHER
    if args.assistant:
        given = run.load(args.assistant)
        body = given.config
        if args.keep_vocab:
            data.always_kept(given.tokenizer, args.keep_vocab)
        named = args.teacher or "of the demo, as no --teacher is given,"
        widths = f"vectors of width {body.width}, the teacher {named} has {teacher.width}"
        need(body.width == teacher.width, f"{args.assistant}: {widths}; the widths must match")
    if args.stages != [1]:
        which = args.assistant or args.teacher
        need(not body.bottleneck_size, f"{which}: has a bottleneck; give the full-size model")
        msd.check_sizes(body, args.bottleneck, args.layers, args.recurrence)


def start_assistant(run, teacher_folder):
    """The teacher's body with a vocabulary learnt from the training text."""
    args, corpus = run.args, run.corpus
    teacher = checkpoints.load(teacher_folder, "float32", "cpu", train=True)
    lower_case = np.array_equal(teacher.tokenize(["A"])[0], teacher.tokenize(["a"])[0])
    some = np.random.default_rng(0).permutation(len(corpus.pairs))[: msd.ALIGNED_PAIRS]
    run.say(f"vocabulary: {args.vocab:,} pieces, begun by the alignment of {len(some):,} pairs")
    tokenizer = data.vocabulary(corpus, args.vocab, lower_case, args.cache)
    sides = (corpus.texts(side) for side in corpus.pairs[np.sort(some)].T)
    return msd.make_assistant(teacher, tokenizer, *sides)


def start_cut_assistant(run):
    """The given assistant with the --keep-vocab pieces that the training text uses most."""
    assistant = checkpoints.load(run.args.assistant, "float32", "cpu", train=True)
    counts = data.piece_counts(run.corpus, assistant, run.args.cache)
    tokenizer, kept = data.cut_vocabulary(assistant.tokenizer, counts, run.args.keep_vocab)
    for language, sides in run.dev.by_language().items() if run.dev else ():
        flat, _ = assistant.tokenize([t for side in sides for t in side])
        lost = 1 - np.isin(flat, kept).mean()
        run.say(f"vocabulary: {len(kept):,} pieces; of dev en-{language}, {lost:.2%} are cut anew")
    return msd.cut_assistant(assistant, tokenizer, kept)


def start_student(run, assistant_folder):
    """The student before its first stage."""
    a = run.args
    assistant = run.load(assistant_folder, train=True)  # float32
    counts = data.piece_counts(run.corpus, assistant, a.cache, most=10**7)
    return msd.make_student(assistant, a.bottleneck, a.layers, a.recurrence, a.init, a.seed, counts)


# ---------------------------------------------------------------------------------------- the end
def finish(run, models):
    """Score models {row: folder} on the test sets, once, and write results.json."""
    # What came before a trained model may be gone, but not the assistant: all is compared with it.
    models = {k: f for k, f in models.items() if f.exists() or k == "assistant"}
    dev = run.dev.by_language() if run.dev else {}
    rows, cosines = {}, {}
    for label, row, found in evaluate_all(run.load, models, run.sts, dev):
        if (run.out / "results.json").exists():
            return  # the same command, running twice, was faster
        folder = models[label]
        row["folder"] = str(folder.relative_to(run.out)) if run.out in folder.parents else None
        rows[label], cosines[label] = row, found
        run.say(f"evaluated {label}")
    last = list(models)[-1]  # the student, or with stage 1 alone the assistant
    sure = bootstrap(run.sts, cosines["assistant"], cosines[last]) if last != "assistant" else {}
    git = {"cwd": Path(__file__).parent, "shell": True, "capture_output": True, "text": True}
    results = {
        "rows": rows,
        "bootstrap": sure,
        "stages": [*{e["stage"]: e for e in read_log(run.out) if e.get("done")}.values()],
        "arguments": run.identity,
        "keep": run.args.keep,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {run.args.device}, {run.world} processes",
        "versions": {m.__name__: m.__version__ for m in (torch, tokenizers, np)},
        "git": subprocess.run("git describe --always --dirty", **git).stdout.strip() or None,
    }
    with data.atomic(run.out / "results.json") as tmp:
        tmp.write_text(json.dumps(results, indent=1), "utf-8")


def report(run):
    """Print the table of a finished run and what to type next; delete what only training needs."""
    file = run.out / "results.json"
    with M.reading(file, "this run's results", "; delete it and run the same command again"):
        results = M.read_json(file)
        need(results["arguments"] == run.identity, "of other arguments or data")
        text = table(results)
    data.delete(run.out / "checkpoint.safetensors")
    if not (run.args.keep or results.get("keep", True)):  # a kill may have left them
        data.delete(run.out / "stages")
    texts = [*run.files["dev"], *run.files["train"], *sorted(run.out.glob("data/dev/*.tsv"))]
    lines = next((f for f in texts if f.suffix != ".gz"), "lines.txt")  # to search, for example
    model, lines, export = (shlex.quote(str(f)) for f in (run.result, lines, run.out / "export"))
    run.say("this run is finished; without its results.json the same command writes it again")
    run.say(f"{text}\n\npython -m tools search {model} {lines} 'what to look for'")
    run.say(f"python -m tools export {model} {export}")


def main(argv=None):
    """Run, continue or report a run in --out."""
    run = Run(parse(argv))
    keep_memory()
    claim(run)
    if not (run.out / "results.json").exists():
        pipeline(run)
    if run.rank == 0:
        report(run)
    if run.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_cli(main)
