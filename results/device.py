"""How much of a device is used: encoding, targets and training, in one run.

    python results/device.py MODEL PAIRS.tsv.gz [--batch 512 1024] [--seconds 60]

PAIRS: english<TAB>translation lines. Encoding is in float32 and bfloat16, beside
sentence-transformers where that is installed. Training is stage 1's step as it is, and two ways
that were left: cuDNN's attention, which plans for every new shape, and a call for each side of the
pairs. Its share is 6 x the parameters that a token uses x tokens a second, over the rate of a large
bfloat16 product. At the end the profile of a step as it is.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import data  # noqa: E402 - found through the line above
import model as M  # noqa: E402 - as above
import msd  # noqa: E402 - as above
import train  # noqa: E402 - as above
from tools.checkpoints import load  # noqa: E402 - as above
from tools.cli import run_cli  # noqa: E402 - as above

ROUNDS = 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def clock():
    """Seconds, once the device has done what it was given."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def matrix_rate(n):
    a = torch.randn(n, n, device=DEVICE).bfloat16()
    times = []
    for _ in range(10):
        begun = clock()
        a @ a
        times.append(clock() - begun)
    return 2 * n**3 / min(times)


def encoders(folder):
    """{name: encode}: ours in both precisions, sentence-transformers in several batches."""
    ours = {f"here, {dtype}": load(folder, dtype).encode for dtype in ("float32", "bfloat16")}
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        print("sentence-transformers is not installed: no row of it")
        return ours
    theirs = SentenceTransformer(folder, device=DEVICE, trust_remote_code=True)
    for size in (64, 256, 1024):

        def encode(texts, size=size):
            return theirs.encode(texts, batch_size=size, show_progress_bar=False)

        ours[f"sentence-transformers, {size} at once"] = encode
    return ours


def encoding(folder, texts):
    """Print sentences a second, in turn, medians; return bfloat16's."""
    variants = encoders(folder)
    rates = {name: [] for name in variants}
    for i in range(ROUNDS + 1):
        for name, encode in variants.items():
            begun = clock()
            encode(texts)
            if i:  # the first round warms up
                rates[name].append(len(texts) / (clock() - begun))
    for name, some in rates.items():
        print(f"encoding, {name}: {statistics.median(some):,.0f} sentences/s")
    return statistics.median(rates["here, bfloat16"])


def targets(folder, corpus, rate):
    """Print how fast targets are made: text from the store, vectors to the disk in float16."""
    model, ids = load(folder, "bfloat16"), np.arange(len(corpus.first))
    with tempfile.TemporaryDirectory() as cache:
        begun = clock()
        data.vectors(corpus, ids, model, "", cache)
        speed = len(ids) / (clock() - begun)
    print(f"targets: {speed:,.0f} sentences/s, {speed / rate:.0%} of encoding")


class Step:
    """Stage 1's training step on whole batches of pairs, again and again."""

    def __init__(self, folder, corpus, size):
        self.model = load(folder, "bfloat16", train=True)
        s, t = (corpus.texts(side) for side in corpus.pairs.T)
        self.tokens, self.at_once = self.model.tokenize(s + t), True
        lengths = np.diff(self.tokens[1]).reshape(2, -1)
        order = data.batch_order(lengths.max(0), size, 0)
        whole = [rows for rows in order if len(rows) == size]
        M.need(whole, f"--batch {size}: {len(order[0])} pairs are too few")
        self.batches = itertools.cycle(whole)
        self.lengths, self.shapes = lengths.sum(0), set()
        self.optimizer = train.make_optimizer(self.model, 1e-5)
        self.target = torch.randn(size, self.model.config.width, device=self.model.device)

    def __call__(self):
        """One step; the number of its tokens."""
        rows = next(self.batches)
        pair = rows, rows + len(self.lengths)  # English sentences, their translations
        self.optimizer.zero_grad()
        if self.at_once:
            ids, mask = self.model.batch(*self.tokens, np.concatenate(pair))
            self.shapes.add(ids.shape)
            loss = sum(msd.stage_loss(1, self.model, ids, mask, self.target).values())
        else:
            sides = [self.model.batch(*self.tokens, side) for side in pair]
            self.shapes |= {ids.shape for ids, _ in sides}
            loss = sum(msd.mse(self.model(*side), self.target) for side in sides)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), msd.CLIP)
        self.optimizer.step()
        return int(self.lengths[rows].sum())

    def used(self):
        """Parameters that a token uses."""
        c = self.model.config
        layers = sum(p.numel() for p in self.model.layers.parameters())
        return c.recurrence * layers + c.bottleneck_size * c.hidden_size


def training(step, seconds):
    """Tokens a second, after five steps of warming up."""
    for _ in range(5):
        step()
    begun, tokens = clock(), 0
    while clock() - begun < seconds:
        tokens += sum(step() for _ in range(5))  # the clock waits: not at every step
    return tokens / (clock() - begun)


def profile(step):
    """Print what a step spends its time on, by operation."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if DEVICE == "cuda" else []
    with torch.profiler.profile(activities=kinds) as seen:
        for _ in range(5):
            step()
        clock()
    by = "self_device_time_total" if DEVICE == "cuda" else "self_cpu_time_total"
    print(seen.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=50))


def main():
    text = argparse.RawDescriptionHelpFormatter
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=text)
    ap.add_argument("model")
    ap.add_argument("pairs")
    ap.add_argument("--batch", type=int, nargs="+", default=[512, 1024], help="pairs a step")
    ap.add_argument("--seconds", type=float, default=60, help="of training, by each batch size")
    ap.add_argument("--lines", type=int, default=40000)
    args = ap.parse_args()
    train.keep_memory()
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    rate = matrix_rate(8192 if DEVICE == "cuda" else 1024)
    print(f"{name}, torch {torch.__version__}: {rate / 1e12:.1f} TFLOP/s in bfloat16")
    with tempfile.TemporaryDirectory() as cache:
        corpus = data.build_corpus([Path(args.pairs)], cache, max_lines=args.lines)
        speed = encoding(args.model, corpus.texts(slice(20000)))
        targets(args.model, corpus, speed)
        for size in args.batch:
            step = Step(args.model, corpus, size)
            some = min(args.seconds, 20)
            ways = {"as it is": args.seconds, "each side in a call of its own": some}
            if DEVICE == "cuda":  # which plans for every shape
                ways = {"with cuDNN's attention": some, **ways}
            for how, seconds in ways.items():
                torch.backends.cuda.enable_cudnn_sdp("cuDNN" in how)
                step.at_once = "of its own" not in how
                speed = training(step, seconds)
                share = 6 * step.used() * speed / rate
                shapes = f"{len(step.shapes)} shapes so far"
                print(
                    f"training, {size} pairs, {how}: {speed:,.0f} tokens/s, {share:.1%}, {shapes}"
                )
            step.at_once = True
        profile(step)


if __name__ == "__main__":
    run_cli(main)
