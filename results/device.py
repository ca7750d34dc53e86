"""How much of a device is used: encoding in float32 and bfloat16, and a training step.

python results/device.py MODEL_DIR PAIRS.tsv.gz [PAIRS A STEP, default 512]

PAIRS: english<TAB>translation lines. The share is 6 x the parameters that a token uses x tokens a
second, over the rate of a large bfloat16 product measured in the same run.
"""

import gzip
import itertools
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import data  # noqa: E402 - found through the line above
import model as M  # noqa: E402 - as above
import msd  # noqa: E402 - as above
import train  # noqa: E402 - as above

ROUNDS = 3


def clock():
    """Seconds, once the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def matrix_rate(device, n):
    a = torch.randn(n, n, device=device).bfloat16()
    times = []
    for _ in range(10):
        begun = clock()
        a @ a
        times.append(clock() - begun)
    return 2 * n**3 / min(times)


def encoding(folder, texts):
    """{dtype: sentences a second}, in turn, medians."""
    models = {dtype: M.load(folder, dtype) for dtype in ("float32", "bfloat16")}
    rates = {dtype: [] for dtype in models}
    for i in range(ROUNDS + 1):
        for dtype, model in models.items():
            begun = clock()
            model.encode(texts)
            if i:  # the first round warms up
                rates[dtype].append(len(texts) / (clock() - begun))
    return {dtype: round(statistics.median(r)) for dtype, r in rates.items()}


def training(folder, pairs, size, seconds=20):
    """(tokens a second, parameters a token uses, different batch shapes) of stage 1's step."""
    model = M.load(folder, "bfloat16", train=True)
    tokens = [model.tokenize(side) for side in zip(*pairs)]
    lengths = [np.diff(starts) for _, starts in tokens]
    longer, sizes = np.maximum(*lengths), np.add(*lengths)
    optimizer = train.make_optimizer(model, 1e-5)
    target = torch.randn(size, model.config.width, device=model.device)
    shapes, counted, begun = set(), 0, None
    for i, rows in enumerate(itertools.cycle(data.batch_order(longer, size, 0))):
        if len(rows) < size:
            continue
        sides = [model.batch(*side, rows) for side in tokens]
        sum(msd.stage_loss(1, model, *sides, target).values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), msd.CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        shapes |= {ids.shape for ids, _ in sides}
        counted += int(sizes[rows].sum())
        if i == 5:
            begun, counted = clock(), 0
        if begun and clock() - begun > seconds:
            break
    c = model.config
    used = c.recurrence * sum(p.numel() for p in model.layers.parameters())
    used += c.bottleneck_size * c.hidden_size
    return counted / (clock() - begun), used, len(shapes)


def main(folder, file, size="512"):
    with gzip.open(file, "rt", encoding="utf-8") as f:
        pairs = [line.rstrip("\n").split("\t") for line in itertools.islice(f, 40000)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rate = matrix_rate(device, 8192 if device == "cuda" else 1024)
    print(f"{device}: {rate / 1e12:.1f} TFLOP/s in bfloat16")
    print("sentences a second:", encoding(folder, [s for s, _ in pairs[:20000]]))
    speed, used, shapes = training(folder, pairs, int(size))
    share = 6 * used * speed / rate
    print(f"training: {speed:,.0f} tokens/s, {share:.1%} of the rate, {shapes} batch shapes")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(*sys.argv[1:])
