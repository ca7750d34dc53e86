"""Train: `python train.py` runs all four stages on the built-in corpus; `python train.py --help` says what else it can do.

A run lives in one folder. The same command again continues it, exactly, wherever it was stopped.
"""
import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import difflib
import fcntl
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
import tempfile
import time
import timeit
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.distributed as dist

import data
import msd
from model import Encoder, InputError, atomic, best_dtype, load, need, pad, put, read_json, read_safetensors, write_safetensors
from msd import PRESETS, STAGES, Preset


class Stop(Exception):
    """The run ends before its end: a signal, or a loss that is not finite. code: the exit status."""
    def __init__(self, code, message="stopped; the same command continues here"):
        super().__init__(message)
        self.code = code


# ------------------------------------------------------------------------------------------------------------ arguments
# What may differ between a run and its continuation: results do not depend on it, or in their last bits only, but that
# another device, --compile or number of processes draws other dropout masks.
FREE = {"out", "cache", "restart", "save_seconds", "threads", "check", "check_update", "strict", "device", "compile", "brief"}


def parser():
    ap = msd.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    ap.add_argument("--preset", help=f"sizes and schedule: {', '.join(PRESETS)}; demo without --train, minilm with it")
    ap.add_argument("--teacher", metavar="DIR", help="English sentence encoder: a sentence-transformers or Hugging Face directory")
    ap.add_argument("--assistant", metavar="DIR", help="multilingual encoder of the teacher's width; "
                    "without it one is made of the teacher's body and a new vocabulary")
    ap.add_argument("--train", nargs="+", metavar="GLOB", help="english<TAB>translation files, plain or .gz; quote the pattern or not")
    ap.add_argument("--extra", nargs="+", metavar="GLOB", default=[], help="more such files for stages 2 and 3 alone, as the paper does")
    ap.add_argument("--dev", nargs="+", metavar="GLOB", default=[],
                    help="held-out pairs, en-XX.tsv: they pick the checkpoint of each stage and give the accuracy")
    ap.add_argument("--sts", metavar="DIR", help="similarity sets *.A-B.txt for the table, read once at the end; use a dev set while you try things")
    ap.add_argument("--languages", default=",".join(data.LANGUAGES),
                    help="of the built-in corpus, with commas; your own data's are in its file names")
    ap.add_argument("--stages", default="1-4", help="such as 1-4, 2-4 (takes --assistant as it is), 1,4 or 1")
    ap.add_argument("--no-contrast", action="store_true", help="stage 4 without its contrastive term")
    ap.add_argument("--out", default=None, metavar="DIR", help="the run's folder (runs/PRESET); the same command continues what is there")
    ap.add_argument("--cache", default="runs/cache", metavar="DIR", help="tokens and targets, shared by all runs; safe to delete")
    ap.add_argument("--seed", type=int, default=0, help="report several; results on small sets differ by a point between seeds")
    ap.add_argument("--dtype", choices=("float32", "bfloat16"), help="arithmetic; left out, the best on this device; weights are float32 always")
    ap.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    ap.add_argument("--threads", type=int, help="CPU threads; the number of real cores is best")
    ap.add_argument("--compile", action="store_true", help="torch.compile the model; a minute or two at first, for long runs on a GPU")
    ap.add_argument("--evals", type=int, default=4, help="dev readings a stage; the best one's weights are kept")
    ap.add_argument("--brief", action="store_true", help="only the assistant and the finished student in the table; for many short runs")
    ap.add_argument("--save-seconds", type=float, default=60, help="time between checkpoints; what a crash in training can cost you")
    ap.add_argument("--strict", action="store_true", help="stop at the first malformed line instead of dropping up to 1 %%")
    ap.add_argument("--restart", action="store_true", help="delete this run's models and checkpoints and start over")
    ap.add_argument("--check", action="store_true", help="short fixed recipe against the committed reference: is this installation right?")
    ap.add_argument("--check-update", action="store_true", help="write that reference anew, after a change that is meant to change results")
    for f in dataclasses.fields(Preset):
        ap.add_argument(f"--{f.name.replace('_', '-')}", metavar="X", help=f.metadata["help"])
    return ap


def parse(argv):
    """(arguments, Preset) from the command line. Raises: InputError for an unknown flag or value, naming the nearest."""
    ap = parser()
    flags = [s for a in ap._actions for s in a.option_strings]
    for word in argv:
        name = word.split("=")[0]
        if name.startswith("--") and name not in flags:
            raise InputError(f"unknown flag {name}" + _nearest(name, flags))
    args = ap.parse_args(argv)
    args.preset = args.preset or ("minilm" if args.train or args.teacher else "demo")
    need(args.preset in PRESETS, f"unknown preset {args.preset!r}" + _nearest(args.preset, PRESETS))
    changes = {}
    for f in dataclasses.fields(Preset):
        text, old = getattr(args, f.name), getattr(PRESETS[args.preset], f.name)
        if text is None:
            continue
        four, name = isinstance(old, tuple), f"--{f.name.replace('_', '-')}"
        kind = float if f.name in ("epochs", "lr") else type(old[0] if four else old)
        try:
            values = tuple(kind(v) for v in text.split(","))
        except ValueError:
            raise InputError(f"{name} {text!r}: expected {kind.__name__} values") from None
        need(len(values) == 1 or four and len(values) == 4, f"{name} {text!r}: expected one value" + four * " or four, for stages 1 to 4")
        need(all(map(f.metadata["ok"], values)), f"{name} {text}: expected {f.metadata['expected']}")
        changes[f.name] = (values * 4)[:4] if four else values[0]
    p = dataclasses.replace(PRESETS[args.preset], **changes)
    if p.bottleneck == 0 and args.lr is None:                   # the paper lowers stage 3's rate for the bottleneck alone
        p = dataclasses.replace(p, lr=(p.lr[0], p.lr[1], p.lr[0], p.lr[3]))
    need(0 <= args.seed < 2 ** 31, "--seed: expected 0 or more")
    need(args.threads is None or 1 <= args.threads <= 1024, "--threads: expected 1 or more")
    need(args.evals >= 1, "--evals: expected 1 or more")
    need(args.save_seconds >= 0, "--save-seconds: expected 0 or more")
    try:
        if torch.device(args.device).type == "cuda":            # each process of torchrun has a GPU of its own
            args.device = f"cuda:{os.environ.get('LOCAL_RANK', torch.device(args.device).index or 0)}"
            torch.cuda.set_device(args.device)
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise InputError(f"--device {args.device!r} is not usable here ({str(e).splitlines()[0]}); expected cpu or cuda") from None
    spans = [re.fullmatch(r" *([1-4])(?:-([1-4]))? *", part) for part in args.stages.split(",")]
    wanted = {k for m in spans if m for k in range(int(m[1]), int(m[2] or m[1]) + 1)}
    args.stages = sorted(wanted - {2} if p.bottleneck == 0 else wanted)         # without a bottleneck there is nothing to align
    need(all(spans) and args.stages, "--stages: expected stages 1 to 4, such as 1-4 or 1,4; stage 2 alone needs a bottleneck")
    need(1 in args.stages or args.assistant, f"--stages {args.stages} without stage 1 needs --assistant DIR, a trained multilingual encoder")
    own = args.preset != "demo" or args.train or args.teacher or args.dev or args.sts or args.extra
    need(not own or args.train and args.teacher,
         "your own data needs both --teacher DIR and --train GLOB; for the built-in corpus leave out these, --dev, --sts and --extra")
    args.languages = args.languages.split(",")
    for x in args.languages:
        need(x in data.LANGUAGES, f"unknown language {x!r}; the built-in corpus has {', '.join(data.LANGUAGES)}")
    args.out = Path(args.out or f"runs/{args.preset}")
    return args, p


def _nearest(word, known):
    close = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"


def expand(patterns, flag):
    """Files of a list of glob patterns. Raises: InputError for a pattern that matches nothing."""
    files = set()
    for pattern in patterns:
        found = {f for f in glob.glob(pattern, recursive=True) if os.path.isfile(f)}
        need(found, f"{flag} {pattern}: no such file")
        files |= found
    return sorted(files)


# -------------------------------------------------------------------------------------------------------------- the run
class Run:
    """What all parts of a run share: arguments, preset, folder, log, its place among the processes of torchrun, and the
    signal that asks it to stop. All processes do the same; the first one alone writes."""
    def __init__(self, args, preset):
        self.args, self.p, self.out, self.stop, self.busy = args, preset, args.out, None, False
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        # The processes wait for the first one, which may take hours over targets, in a group of their own: with NCCL's
        # short patience kept, a process that dies is noticed on a GPU, too.
        self.group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1)) if self.world > 1 else None
        self.dtype, why = (getattr(torch, args.dtype), "asked for") if args.dtype else best_dtype(args.device)
        torch.set_num_threads(args.threads or torch.get_num_threads())
        # Freed blocks stay with the process: by default glibc gives the large ones back to the system and fetches them anew,
        # zeroed page by page, at every step, which costs a sixth of the time on CPU. -1: M_TRIM_THRESHOLD, -3: M_MMAP_THRESHOLD.
        if hasattr(libc := ctypes.CDLL(None), "mallopt"):
            libc.mallopt(-1, 2 ** 31 - 1), libc.mallopt(-3, 2 ** 30)
        self.rate = self.world * matrix_rate(self.dtype, args.device)
        self.say(f"device {args.device}, {str(self.dtype)[6:]} ({why}), {torch.get_num_threads()} threads, {self.world} processes, "
                 f"matrix rate {self.rate / 1e9:,.0f} GFLOP/s; {args.preset}, stages {args.stages}, seed {args.seed}, folder {self.out}")

    def say(self, text):
        if self.rank == 0:
            print(text, flush=True)

    def log(self, **entry):
        if self.rank == 0:
            with open(self.out / "log.jsonl", "a") as f:
                f.write(json.dumps(entry) + "\n")

    def agree(self, *values):
        """The largest of each number over all processes."""
        if self.world == 1:
            return values
        dist.all_reduce(t := torch.tensor(values, dtype=torch.int64), op=dist.ReduceOp.MAX, group=self.group)
        return t.tolist()

    @contextlib.contextmanager
    def first(self):
        """The first process goes through alone and makes what the others then find."""
        if self.rank:
            dist.barrier(self.group)
        yield
        if self.world > 1 and self.rank == 0:
            dist.barrier(self.group)

    def save(self, write, where):
        """The first process writes; nobody leaves, or torchrun ends, before it has."""
        with self.first():
            if self.rank == 0:
                write(where)

    def on_signal(self, number, frame):
        """During a step: finish it, save, leave. Elsewhere leave at once; nothing half-written stays."""
        self.stop = number
        if not self.busy:
            raise Stop(128 + number)

    def remember(self):
        """Write down what this run is, once its inputs have been read: a mistyped path leaves nothing to refuse the next try."""
        if self.rank == 0 and not (self.out / "run.json").exists():
            with atomic(self.out / "run.json") as tmp:
                tmp.write_text(json.dumps(self.identity, indent=1))


def matrix_rate(dtype, device):
    """Floating-point operations a second in a square matrix product, the best of several: what the device can do."""
    n = 8192 if torch.device(device).type == "cuda" else 1024
    a = torch.randn(n, n, device=device).to(dtype)

    def clock():
        if a.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()
    return 2 * n ** 3 * 5 / min(timeit.repeat(lambda: a @ a, timer=clock, repeat=10, number=5))


def rate_at(step, steps, warmup):
    """Learning rate as a share of its peak: linear up over the first `warmup` of the steps, then linear to 0."""
    w = warmup * steps
    return (step + 1) / (w + 1) if step < w else (steps - step) / (steps - w)


def make_optimizer(model, p, lr):
    """AdamW as the paper sets it; no decay on biases and LayerNorm. With bias correction, which the authors leave out."""
    def of(plain):
        return [q for k, q in model.named_parameters() if (k.endswith("bias") or "norm" in k) == plain]
    groups = [{"params": of(False), "weight_decay": p.weight_decay}, {"params": of(True), "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, eps=1e-6, fused=True)


MOMENTS = ("exp_avg", "exp_avg_sq")                             # what AdamW keeps of each weight


def clip_and_step(model, optimizer, clip, table=None):
    """Clip the gradient, take a step of AdamW, return the norm before clipping.

    table: zeros of the word table's shape, where its gradient is sparse. A batch touches some thousand rows: they alone are
    kept, measured and clipped. AdamW moves every row at every step, so they are then written into the full table, which
    nothing else fills or reads: at V = 250,002, B = 128 the vocabulary takes 4 % of a step and not 11."""
    word, grads = model.embeddings.word.weight, [q.grad for q in model.parameters() if q.grad is not None]
    if sparse := word.grad is not None and word.grad.is_sparse:
        g = word.grad.coalesce()
        rows, grads = g.indices()[0], [v for v in grads if not v.is_sparse] + [g.values()]
    norm = torch.nn.utils.get_total_norm(grads)
    torch._foreach_mul_(grads, (clip / (norm + 1e-6)).clamp(max=1.0))
    if sparse:
        word.grad = table.index_copy_(0, rows, g.values())
    optimizer.step()
    if sparse:
        table.index_fill_(0, rows, 0.0)
    return norm


def fit(run, name, model, steps, lr, terms_at, dev_loss=None):
    """Train `model` for `steps` steps and leave the weights of the best dev loss in it.

    terms_at(step): (loss terms by name, tokens, batch ids), a pure function of the step. Every random draw depends on seed,
    stage and step alone, so a checkpoint needs no generator state and a continued run gives the same bits. The loop never
    waits for a GPU but where it reports, reads dev or saves. Of several processes all do the same; the first one writes.
    Raises: Stop at a signal, after a save; Stop at a loss that is not finite, with nothing saved over."""
    args, p, file = run.args, run.p, run.out / "checkpoint.safetensors"
    model.train()
    named, optimizer = dict(model.named_parameters()), make_optimizer(model, p, lr)
    sparse = model.embeddings.word.sparse = model.device.type == "cpu" and run.world == 1 and not args.compile
    table = torch.zeros_like(model.embeddings.word.weight) if sparse else None
    start, best, best_loss, seconds = 0, None, float("inf"), 0.0
    state, meta = read_safetensors(file) if file.exists() else ({}, {})
    if meta.get("stage") == name:
        fits = all(f"model.{k}" in state and state[f"model.{k}"].shape == q.shape for k, q in named.items())
        if not (fits and meta.get("step", "").isdigit() and int(meta["step"]) <= steps):
            raise InputError(f"{file}: a damaged checkpoint; delete it to begin {name} again")
        start, best_loss, seconds = int(meta["step"]), float(meta["best"]), float(meta["seconds"])
        model.load_state_dict({k: state[f"model.{k}"] for k in named})
        for k, q in named.items():
            if f"exp_avg.{k}" in state:                          # stage 2 never moves the layers
                optimizer.state[q] = {m: state[f"{m}.{k}"].clone().to(q.device) for m in MOMENTS}
                optimizer.state[q]["step"] = torch.tensor(float(start), device=q.device)
        best = {k[5:]: v.clone() for k, v in state.items() if k.startswith("best.")} or None
        run.say(f"{name}: continues at step {start} of {steps}")
    del state
    if run.rank == 0:                                           # the log forgets what came after that checkpoint
        kept = [e for e in read_log(run.out) if e.get("stage") != name or e.get("step", start) < start]
        with atomic(run.out / "log.jsonl") as tmp:
            tmp.write_text("".join(json.dumps(e) + "\n" for e in kept))

    def save(step):
        state = {f"model.{k}": q for k, q in named.items()}
        state.update({f"{m}.{k}": optimizer.state[q][m] for k, q in named.items() for m in MOMENTS if m in optimizer.state.get(q, ())})
        state.update({f"best.{k}": v for k, v in (best or {}).items()})
        write_safetensors(file, state, {"stage": name, "step": str(step), "best": repr(best_loss),
                                        "seconds": repr(seconds + time.monotonic() - begun)})

    def check():
        if (bad := int(broken)) >= 0:
            raise Stop(1, f"{name}, step {bad}: the loss or the gradient norm is not finite; batch {list(map(int, terms_at(bad)[2][:16]))}... "
                       f"The last good checkpoint is {file if file.exists() else 'none yet'}; --lr or --clip may be too high")

    # Parameters that multiply each token: the layers, unless they rest (stage 2), R times, and the map B -> H.
    c, active = model.config, sum(q.numel() for q in model.layers.parameters() if q.requires_grad)
    used = c.recurrence * active + c.bottleneck_size * c.hidden_size
    evals = {-(-steps * (i + 1) // args.evals) for i in range(args.evals)}
    begun = saved = shown = last = time.monotonic()
    counted = 0
    every, broken = max(1, steps // 100), torch.tensor(-1, device=model.device)
    for step in range(start, steps):
        run.busy = True
        torch.manual_seed(int.from_bytes(data.digest(args.seed, name, step, *[run.rank] * (run.rank > 0)).encode()[:7], "little"))     # dropout
        for group in optimizer.param_groups:
            group["lr"] = lr * rate_at(step, steps, p.warmup)
        terms, tokens, _ = terms_at(step)
        loss = sum(terms.values())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = clip_and_step(model, optimizer, p.clip, table)
        counted += tokens
        broken = torch.where((broken < 0) & ~torch.isfinite(loss + norm), step, broken)
        shows = (step + 1) % every == 0 or step + 1 == steps
        if shows or step + 1 in evals or model.device.type == "cpu":
            check()
        if shows:
            now = time.monotonic()                              # after check(), which has waited for the GPU
            speed = counted / max(now - last, 1e-9)
            numbers = {k: float(v.detach()) for k, v in terms.items()}
            run.log(stage=name, step=step, loss=float(loss.detach()), **numbers, lr=group["lr"], norm=float(norm),
                    tokens_per_s=round(speed), share=round(6 * used * speed / run.rate, 3))
            if now - shown > 5 or step + 1 == steps:
                left = (now - begun) / (step + 1 - start) * (steps - step - 1)
                run.say(f"{name}  step {step + 1}/{steps}  " + "  ".join(f"{k} {v:.4f}" for k, v in numbers.items()) +
                        f"  |g| {float(norm):.2f}  {speed:,.0f} tokens/s "
                        f"({600 * used * speed / run.rate:.0f} % of the matrix rate)  {left // 60:.0f}:{left % 60:02.0f} left")
                shown = now
            counted, last = 0, now
        if step + 1 in evals and dev_loss:
            value = dev_loss()
            run.log(stage=name, step=step, dev=value)
            if not value >= best_loss:
                best_loss, best = value, {k: q.detach().clone() for k, q in named.items()}
            counted, last = 0, time.monotonic()
        stop, due = run.agree(run.stop or 0, time.monotonic() - saved > args.save_seconds and step + 1 < steps)
        if stop or due:
            check()
            run.save(save, step + 1)
            saved = time.monotonic()
        run.busy = False
        if stop:                                                # a signal that comes during a save is seen one step later
            raise Stop(128 + stop)
    if best:
        model.load_state_dict(best)
    run.log(stage=name, done=True, steps=steps, seconds=round(seconds + time.monotonic() - begun, 1), best_dev=best_loss if best else None)
    return model


def read_log(folder):
    """The entries of a run's log; a line that cannot be read, such as the last one of a killed run, is left out."""
    file, entries = folder / "log.jsonl", []
    for line in file.read_text(errors="replace").splitlines() if file.exists() else []:
        with contextlib.suppress(ValueError):
            entries.append(json.loads(line))
    return [e for e in entries if isinstance(e, dict) and isinstance(e.get("step", 0), int)]


# --------------------------------------------------------------------------------------------------------------- stages
def pair_batches(run, stage, model, corpus, rows, source, name, epochs=None):
    """(terms_at, loss, steps): the batches of a stage for `fit`, over the pairs numbered `rows`.

    source: the encoder that gives the targets, name: its fingerprint. terms_at(step): for training, `epochs` passes;
    loss(): the mean loss over all rows, for dev. Targets are computed for the sentences that will be seen, once, and read
    from disk by step. Of several processes each takes its share of every batch."""
    s, batch, cache = STAGES[stage], run.p.batch[stage - 1], run.args.cache
    with run.first():
        flat, starts = data.tokens(corpus, model, cache)
    sizes = np.diff(starts)[corpus.pairs[rows]]                # (n, 2)
    longer, size, seed = sizes.max(1), sizes.sum(1), [run.args.seed, stage]
    first = data.batch_order(longer, batch, [*seed, 0])        # the first pass; its length is that of all
    steps = max(1, math.ceil((epochs or 1) * len(first)))
    seen = corpus.pairs[rows[np.concatenate(first[:steps])]]                           # all of them from one pass on
    ids = np.unique(seen if s.own else seen[:, 0])
    form = run.p.targets if s.source == "teacher" else "raw"
    with run.first():
        vectors = data.vectors(corpus, ids, source, name, cache, s.layers, form, progress(run, f"targets of stage {stage}"))
    orders, live = {0: first}, model                           # live: what training calls
    if epochs and run.args.compile:
        torch.compiler.reset()                                  # a stage's model is new; the last one's code counts against a limit
        model.compile(dynamic=True)
    if epochs and run.world > 1:                                # averages the gradients over the processes
        live = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)

    def side(ids):
        return tuple(put(a, run.args.device) for a in pad(flat, starts, ids, model.config.pad_token_id))

    def target(wanted):
        return put(vectors[np.searchsorted(ids, wanted)], run.args.device).float()

    def terms(numbers, model=model, mine=slice(None), gather=None):
        i, j = corpus.pairs[rows[numbers]].T                                           # (N,) English, (N,) translations
        return msd.stage_loss(stage, model, side(i[mine]), side(j[mine]), target(i), target(j) if s.own else None, not run.args.no_contrast, gather)

    def terms_at(step):
        epoch, i = divmod(step, len(first))
        if epoch not in orders:
            orders.clear()
            orders[epoch] = data.batch_order(longer, batch, [*seed, epoch])
        numbers = orders[epoch][i]
        return terms(numbers, live, *part_of(run, len(numbers))), int(size[numbers].sum()), rows[numbers]

    def loss():
        model.eval()
        with torch.inference_mode():
            total = torch.tensor([sum(len(b) * float(sum(terms(b).values())) for b in first[run.rank::run.world])], dtype=torch.float64)
        if run.world > 1:
            dist.all_reduce(total, group=run.group)
        model.train()
        return float(total) / len(rows)

    return terms_at, loss, steps


def part_of(run, n):
    """(rows, gather) of one process in a batch of n pairs: every world-th row, and what puts the vectors (N, H) of all rows
    together. The loss is then the same formula over the whole batch, contrastive matrix and all, on every process; each
    sends gradient back through its own rows alone, and the mean over processes that follows is made up for here."""
    if run.world == 1:
        return slice(None), None
    mine = np.arange(run.rank, n, run.world)
    index = put(mine, run.args.device)

    def gather(x):
        x = x[:len(mine)]                                      # of an empty share, a row that does not count
        whole = x.new_zeros(n, x.shape[1]).index_copy(0, index, x.detach())
        dist.all_reduce(whole)
        if x.requires_grad:
            x.register_hook(lambda g: run.world * g)
        return whole.index_copy(0, index, x)
    return mine if len(mine) else np.zeros(1, np.int64), gather


def progress(run, what):
    """A callback that reports (done, all) at most every five seconds."""
    begun = shown = time.monotonic()

    def show(done, total):
        nonlocal shown
        now = time.monotonic()
        if now - shown > 5:
            left = (now - begun) / done * (total - done)
            run.say(f"{what}  {done:,}/{total:,} sentences  {done / (now - begun):,.0f}/s  {left // 60:.0f}:{left % 60:02.0f} left")
            shown = now
    return show


def fingerprint(folder):
    """Names a model directory by its content. Raises: InputError where there is none."""
    files = sorted(f for pattern in ("**/*.safetensors", "**/*.json") for f in Path(folder).glob(pattern))
    need(files, f"{folder}: no model directory; expected config.json, tokenizer.json and model.safetensors in it")
    return data.digest(*files)


def load_for(run, folder, train=False):
    """A model of the run with its arithmetic; --max-tokens and, in training, --dropout apply."""
    return load(folder, str(run.dtype)[6:], run.args.device, train, run.p.dropout, run.p.max_tokens)


def demo_teacher(run, folder):
    """Train a small English encoder on the scored pairs of the built-in corpus: the demo's stand-in for a real teacher."""
    a, b, scores = data.read_sts(run.out / "data" / "sts-train")["en-en"]
    tokenizer = data.train_tokenizer([*a, *b], 600, lower_case=True)
    config = dataclasses.replace(msd.DEMO_TEACHER, vocab_size=tokenizer.get_vocab_size())
    model = msd.init_weights(Encoder(config, tokenizer, run.dtype), torch.Generator().manual_seed(run.args.seed)).to(run.args.device)
    flat, starts = model.tokenize([*a, *b])
    sizes, n, batch = np.diff(starts), len(a), 128
    gold = torch.tensor(scores / 5, dtype=torch.float32, device=run.args.device)

    def terms_at(step):
        rows = np.random.default_rng([run.args.seed, step]).choice(n, batch, replace=False)
        x, y = (model(*(put(z, run.args.device) for z in pad(flat, starts, rows + k, config.pad_token_id))) for k in (0, n))
        cos = torch.nn.functional.cosine_similarity(x, y)
        return {"score": msd.mse(cos, gold[put(rows, run.args.device)])}, int((sizes[rows] + sizes[rows + n]).sum()), rows
    run.save(fit(run, "teacher", model, msd.DEMO_TEACHER_STEPS, 2e-3, terms_at).save, folder)


def pipeline(run):
    """All stages, each from what the one before it left in the run's folder; then the table."""
    args, p, out = run.args, run.p, run.out
    teacher_dir = Path(args.teacher) if args.teacher else out / "teacher"
    if not args.train:
        msd.check_sizes(msd.DEMO_TEACHER, p.bottleneck, p.layers, p.recurrence)
        run.remember()
        with run.first():
            if not (out / "data").exists():
                data.write_demo(out / "data")
        files = {split: [f"{out}/data/{split}/en-{x}.tsv" for x in args.languages] for split in ("train", "dev")}
        args = argparse.Namespace(**{**vars(args), **files, "sts": f"{out}/data/sts"})
        if not teacher_dir.exists():
            demo_teacher(run, teacher_dir)
    teacher = load_for(run, teacher_dir)
    given = load_for(run, args.assistant) if args.assistant else None
    H, width = teacher.config.hidden_size, (given or teacher).config.hidden_size
    need(width == H, f"{args.assistant}: hidden size {width}, but the teacher {teacher_dir} has {H}; they are compared, so the widths must match")
    if args.stages != [1]:
        msd.check_sizes((given or teacher).config, p.bottleneck, p.layers, p.recurrence)
    sts = data.read_sts(args.sts) if args.sts else {}
    sts = sts if run.args.train else {k: v for k, v in sts.items() if set(k.split("-")) <= {"en", *args.languages}}
    with run.first():
        corpus = data.build_corpus(expand(args.train, "--train"), args.cache, expand(args.extra, "--extra"), args.strict,
                                   p.max_chars, max(p.max_lines))
        dev = data.build_corpus(expand(args.dev, "--dev"), args.cache, (), args.strict, p.max_chars) if args.dev else None
    run.remember()
    report(run, corpus)
    look(run, teacher, corpus)

    start = Path(args.assistant or out / "start")
    assistant_dir = out / "assistant" if 1 in args.stages else start
    sources = {"teacher": teacher_dir, "assistant": assistant_dir}
    with run.first():
        if not start.exists() and not assistant_dir.exists():
            normalizer = teacher.tokenizer.normalizer
            lower = teacher.config.do_lower_case or normalizer is not None and normalizer.normalize_str("A") == "a"
            tokenizer = data.vocabulary(corpus, p.vocab, lower, args.cache, run.say)
            some = np.sort(np.random.default_rng(0).permutation(len(corpus.pairs))[:p.align])
            if len(some):
                run.say(f"vocabulary: its start from the alignment of {len(some):,} pairs")
            msd.make_assistant(load(teacher_dir, "float32", "cpu"), tokenizer, data.SPECIAL.index("<pad>"),
                               *(corpus.texts(side) for side in corpus.pairs[some].T)).save(start)
    names = {k: "assistant" if k == 1 else "student" if k == args.stages[-1] else f"stage{k}" for k in args.stages}
    before = start

    def untrained(assistant):
        tokens = data.tokens(corpus, assistant, args.cache)[0][:10 ** 7]               # sentences are in no order: a fair sample
        return msd.make_student(assistant, p.bottleneck, p.layers, p.recurrence, p.init, args.seed,
                                np.bincount(tokens, minlength=assistant.config.vocab_size))

    for k, name in names.items():
        if not (out / name).exists():
            model = load_for(run, before, train=True)
            if k > 1 and before == assistant_dir:
                with run.first():
                    data.tokens(corpus, model, args.cache)
                model = untrained(model)
            run.save(train_stage(run, k, model, corpus, dev, sources).save, out / name)
        before = out / name
    names.pop(1, None)
    if run.rank == 0:
        finish(run, teacher_dir, assistant_dir, names, sts, dev, untrained)


def train_stage(run, stage, model, corpus, dev, sources):
    """One stage of STAGES from start to best weights. sources: {"teacher": folder, "assistant": folder}."""
    p, k = run.p, stage - 1
    folder = sources[STAGES[stage].source]
    source, name = load_for(run, folder), fingerprint(folder)
    model.layers.requires_grad_(STAGES[stage].layers)           # stage 2 has no use for them
    rows = np.flatnonzero(((corpus.group == 0) | (stage in (2, 3))) & (corpus.line <= p.max_lines[k]))
    terms_at, _, steps = pair_batches(run, stage, model, corpus, rows, source, name, p.epochs[k])
    few = dev and np.sort(np.random.default_rng(0).permutation(len(dev.pairs))[:1000])    # enough to rank checkpoints
    dev_loss = pair_batches(run, stage, model, dev, few, source, name)[1] if dev else None
    run.say(f"stage {stage}, {STAGES[stage].title}: {len(rows):,} pairs, {steps:,} steps of {p.batch[k]}, learning rate {p.lr[k]:g}")
    return fit(run, f"stage {stage}", model, steps, p.lr[k], terms_at, dev_loss)


# -------------------------------------------------------------------------------------------------------------- reports
def report(run, corpus):
    """What was read and what was dropped, with totals that add up."""
    lines, kept, long, blank = (sum(r[k] for r in corpus.report) for k in ("lines", "kept", "long", "blank"))
    bad = sum(sum(r["bad"].values()) for r in corpus.report)
    twice = len(corpus.pairs) - len(np.unique(corpus.pairs[:, 0].astype(np.uint64) * np.uint64(2 ** 32) + corpus.pairs[:, 1]))
    run.say(f"data: {len(corpus.report)} files, {lines:,} lines = {kept:,} pairs + {long:,} too long + {blank:,} blank + {bad:,} malformed; "
            f"{len(corpus.first):,} distinct sentences, {twice / kept:.1%} of the pairs are repeated")
    if cut := sum(r["lines"] >= max(run.p.max_lines) for r in corpus.report):
        run.say(f"  {cut} files reach --max-lines {max(run.p.max_lines):,}; lines beyond it are not read")
    for example in [e for r in corpus.report for e in r["examples"]][:3]:
        run.say(f"  dropped {example}")
    run.log(data=corpus.report, distinct=len(corpus.first), repeated=twice)


def look(run, teacher, corpus):
    """A look at the teacher before hours of training on it."""
    ids = np.unique(corpus.pairs[:, 0])
    texts = corpus.texts(np.sort(np.random.default_rng(0).permutation(ids)[:4000]))
    flat, starts = teacher.tokenize(texts)
    v = data.as_targets(teacher.embed(flat, starts), run.p.targets)
    seen = {**msd.look(v), "truncated": float((np.diff(starts) >= teacher.config.max_seq_length).mean())}
    run.say(f"teacher: width {seen['width']}, mean norm {seen['norm']:.3f}, mean cosine of different sentences {seen['cosine']:.3f}, "
            f"{seen['truncated']:.1%} truncated; "
            f"MSE of the best constant guess {seen['constant_mse']:.5f}: a loss near it has learnt nothing")
    if run.p.targets == "unit":
        run.say(f"  warning: unit targets: an MSE of at most {seen['constant_mse']:.5f} drowns beside the contrastive term; prefer --targets raw")
    if seen["cosine"] > 0.8:
        run.say("  warning: all sentences look alike to this teacher; is it a sentence encoder, with the right pooling?")
    run.log(teacher=seen)


def finish(run, teacher_dir, assistant_dir, names, sts, dev, untrained):
    """Read the test sets, once; write results.json and print the table. untrained: makes the student's start of the assistant."""
    args, out = run.args, run.out
    pairs, end = {}, 0                                          # {language: (english, translations)}
    for r in dev.report if dev else []:
        m = re.search(r"en-([a-z]{2,3})\b", r["file"])
        start, end = end, end + r["kept"]
        for side, ids in zip(pairs.setdefault(m[1] if m else r["file"], ([], [])), dev.pairs[start:end].T):
            side.extend(dev.texts(ids))
    pairs = {k: v for k, v in pairs.items() if v[0]}
    teacher = load_for(run, teacher_dir)
    goal = {k: data.as_targets(teacher.encode(english, normalize=False), run.p.targets) for k, (english, _) in pairs.items()}
    rows, cosines, begun = {}, {}, time.monotonic()

    def score(label, model):
        english = {k: v for k, v in sts.items() if k == "en-en"}                       # all that an English teacher is scored on
        rows[label], cosines[label] = msd.evaluate(model, *((english, {}) if label == "teacher" else (sts, pairs)), goal)
        rows[label]["sizes"] = msd.ledger(model.config)
        run.say(f"evaluated {label}: mean Spearman {msd.mean_spearman(rows[label]['spearman'])[0]:.1f} ({time.monotonic() - begun:.0f} s)")
        return model

    score("teacher", teacher)
    if (out / "start").exists() and not args.brief:
        score("assistant, untrained", load_for(run, out / "start"))
    assistant = score("assistant", load_for(run, assistant_dir))
    if names and not args.brief:
        score("student, untrained", untrained(assistant))
    for k, name in [*names.items()][-1 if args.brief else 0:]:
        score(f"student, stage {k}", load_for(run, out / name))
    entries, last = read_log(out), list(rows)[-1]
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    revision = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    given = settings(run)
    for k in ("teacher", "assistant", "train", "extra", "dev", "sts"):                  # names without folders: this file is made to be shown
        given[k] = [Path(x).name for x in given[k]] if isinstance(given[k], list) else given[k] and Path(given[k]).name
    results = {"rows": rows, "bootstrap": msd.bootstrap(sts, cosines["assistant"], cosines[last]) if names and sts else None,
               "stages": [e for e in entries if e.get("done") and "stage" in e],
               "teacher_look": next(e["teacher"] for e in reversed(entries) if "teacher" in e),
               "arguments": given,
               "seed": args.seed, "git": revision or None, "dtype": str(run.dtype)[6:], "threads": torch.get_num_threads(), "processes": run.world,
               "machine": f"{platform.machine()}, {os.cpu_count()} cores, {args.device}", "python": platform.python_version(),
               "versions": {"torch": torch.__version__, "tokenizers": tokenizers.__version__, "numpy": np.__version__}}
    with atomic(out / "results.json") as tmp:
        tmp.write_text(json.dumps(results, indent=1))
    (out / "checkpoint.safetensors").unlink(missing_ok=True)
    print_table(results)


def print_table(results):
    """The whole story of a run, from its results.json."""
    rows = results["rows"]
    names = [k for k in rows["assistant"]["spearman"]]
    print("\nSpearman x 100" + " " * 8 + "".join(f"{n:>7}" for n in names) + "   mono  cross    all")
    for label, row in rows.items():
        everything, mono, cross = msd.mean_spearman(row["spearman"])
        means = (mono, *([None] * 2 if label == "teacher" else (cross, everything)))
        print(f"{label:22}" + "".join(f"{'-':>7}" if v is None or v != v else f"{v:7.1f}" for v in (*map(row["spearman"].get, names), *means)))
    print("\ndev pairs, mean of languages   en->xx  xx->en  100 MSE en  100 MSE xx")
    for label, row in rows.items():
        if row["accuracy"]:
            print(f"{label:29}{np.mean([a for a, _ in row['accuracy'].values()]):8.1f}{np.mean([b for _, b in row['accuracy'].values()]):8.1f}"
                  f"{np.mean([a for a, _ in row['mse'].values()]):12.3f}{np.mean([b for _, b in row['mse'].values()]):12.3f}")
    print("\nparameters            embedding       layers      other        total   MB f32   of the assistant")
    full = rows["assistant"]["sizes"]["total"]
    for label in [k for k in rows if k in ("teacher", "assistant")] + [k for k in rows if k.startswith("student")][-1:]:
        s = rows[label]["sizes"]
        print(f"{label.split(',')[0]:18}{s['embedding']:13,}{s['layers']:13,}{s['other']:11,}{s['total']:13,}"
              f"{s['total'] * 4 / 2 ** 20:9.1f}{s['total'] / full:12.1%}")
    if results.get("bootstrap"):
        bounds = (f"{k} {d:+.1f} ({low:+.1f} to {high:+.1f})" for k, (d, low, high) in results["bootstrap"].items() if d == d)
        print("\nstudent - assistant, with 95 % of paired resamples: " + ", ".join(bounds))
    seconds = ", ".join(f"{e['stage']} {e['seconds']:.0f} s" for e in results["stages"])
    print(f"\n{seconds}; {results['dtype']}, {results['threads']} threads, seed {results['seed']}", flush=True)


# -------------------------------------------------------------------------------------------------------------- command
def settings(run):
    """Everything that the result depends on, as plain values."""
    known = {k: v for k, v in vars(run.args).items() if k not in FREE and not hasattr(run.p, k)}
    return json.loads(json.dumps({**known, **vars(run.p), "dtype": str(run.dtype)[6:]}))


def same_run(run):
    """Refuse to continue a run with other arguments or other data. Raises: InputError with both values."""
    file, now = run.out / "run.json", settings(run)
    now["content of --sts"] = data.digest(*sorted(f for f in Path(run.args.sts).glob("*") if f.is_file())) if run.args.sts else None
    for flag in ("train", "extra", "dev"):
        now[f"content of --{flag}"] = data.digest(*[Path(f) for f in expand(getattr(run.args, flag) or [], f"--{flag}")])
    for flag in ("teacher", "assistant"):
        now[f"content of --{flag}"] = fingerprint(getattr(run.args, flag)) if getattr(run.args, flag) else None
    if file.exists():
        before = read_json(file)
        for key in sorted(set(now) | set(before)):
            need(key in before, f"{run.out}: started by another version of this code, which knew no {key}; choose another --out, or --restart")
            if now.get(key) != before[key]:
                raise InputError(f"{run.out}: this run was started with {key} {before.get(key)!r}, now it is {now.get(key)!r}. "
                                 "Give the old value to continue, another --out for a new run, or --restart to start over")
    run.identity = now


def take(folder):
    """Lock a run's folder against a second command. Raises: InputError if it cannot be written or is taken."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lock
    except BlockingIOError:
        raise InputError(f"{folder}: another process is working on this run; wait for it, or choose another --out") from None
    except (OSError, ValueError) as e:
        raise InputError(f"--out {folder}: not a folder that can be written ({e})") from None


def execute(args, preset):
    """Run, continue or report a run in args.out."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():          # torchrun has started several processes
        dist.init_process_group("cpu:gloo,cuda:nccl" if "cuda" in args.device else "gloo")
    if not dist.is_initialized() or dist.get_rank() == 0:
        lock = take(args.out)                                   # held until this function ends
        if args.restart:
            for name in ("data", "teacher", "start", "assistant", "stage2", "stage3", "student"):
                shutil.rmtree(args.out / name, ignore_errors=True)
            for name in ("run.json", "results.json", "log.jsonl", "checkpoint.safetensors"):
                (args.out / name).unlink(missing_ok=True)
    if dist.is_initialized():
        dist.barrier()
    run = Run(args, preset)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, run.on_signal)
    same_run(run)
    if (args.out / "results.json").exists():
        run.say("this run is finished; without its results.json the same command evaluates it again, --restart starts over")
        try:
            return run.rank == 0 and print_table(read_json(args.out / "results.json"))
        except (KeyError, TypeError, AttributeError):
            raise InputError(f"{args.out / 'results.json'}: damaged; delete it and run the same command to write it again") from None
    pipeline(run)


CHECK = ["--preset", "demo", "--epochs", "0.02,0.05,0.01,0.02", "--dtype", "float32", "--evals", "1", "--seed", "0"]
CURVE, SCORE = 0.05, 1.0            # tolerances: a loss in relative terms; a Spearman x 100 in points


def check(update):
    """Train a short fixed recipe and compare its losses and scores with results/check.json; the first difference fails.

    One thread against two, on one machine, differ by 0.01 % in the losses and 0.3 points in the scores; the tolerances
    leave room for other processors."""
    file = Path(__file__).parent / "results" / "check.json"
    want = None if update else read_json(file)
    with tempfile.TemporaryDirectory() as tmp:
        args, preset = parse([*CHECK, "--out", f"{tmp}/run", "--cache", f"{tmp}/cache"])
        execute(args, preset)
        got = {"curve": [[e["stage"], e["step"], e["loss"]] for e in read_log(args.out) if "loss" in e][::5],
               "spearman": {k: msd.mean_spearman(r["spearman"])[0] for k, r in read_json(args.out / "results.json")["rows"].items()}}
    if update:
        with atomic(file) as tmp:
            tmp.write_text(json.dumps(got, indent=1))
        return print(f"wrote {file}")
    old, new = ([f"{stage}, step {step}: loss" for stage, step, _ in x["curve"]] for x in (want, got))
    if old != new:
        raise Stop(1, f"check failed: {len(new)} losses, the last {new[-1]}; the reference has {len(old)}, the last {old[-1]}")
    losses = [(name, e[2], o[2], CURVE * o[2]) for name, o, e in zip(old, want["curve"], got["curve"])]
    scores = [(f"{row}: Spearman", got["spearman"][row], old, SCORE) for row, old in want["spearman"].items()]
    for what, new, old, tolerance in losses + scores:
        if not abs(new - old) <= tolerance:
            raise Stop(1, f"check failed: {what} {new:.6f}, the reference has {old:.6f} (tolerance {tolerance:.6f})")
    print(f"check passed: {len(losses)} losses within {max(abs(n - o) / o for _, n, o, _ in losses):.2%}, "
          f"{len(scores)} scores within {max(abs(n - o) for _, n, o, _ in scores):.3f}")


def main(argv=None):
    args, preset = parse(sys.argv[1:] if argv is None else argv)
    need(not (args.check or args.check_update) or int(os.environ.get("WORLD_SIZE", 1)) == 1, "--check is for one process; start it without torchrun")
    try:
        check(args.check_update) if args.check or args.check_update else execute(args, preset)
    except Stop as e:
        if os.environ.get("RANK", "0") == "0":
            print(e, file=sys.stderr)
        sys.exit(e.code)
    except RuntimeError as e:
        lost = isinstance(e, dist.DistError) or any(x in str(e) for x in ("gloo", "peer", "Broken pipe", "Timed out"))
        if not dist.is_initialized() or not lost:
            raise
        print(f"error: process {dist.get_rank()} lost the others: one of them has ended, and says why above unless it was killed. "
              "The same command continues from the last checkpoint", file=sys.stderr)
        os._exit(1)                                             # an orderly end would wait for the one that is gone


if __name__ == "__main__":
    msd.run_cli(main)
