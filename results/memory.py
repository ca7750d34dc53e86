"""What a model costs where it is used: bytes on disk, seconds to load, peak memory.

    python results/memory.py MODEL ... [--theirs MODEL] [--dtype float32] [--rounds 3]

Each is loaded by a process of its own and encodes 1,000 sentences of 9 words; memory is the peak
above that of a process that only imports. --theirs: the same by sentence-transformers.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

HEAD = """
import json, resource, sys, time
unit = 1 if sys.platform == "darwin" else 1024
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
texts = [" ".join(f"word{i % (k + 7)}" for k in range(9)) for i in range(1000)]
"""
OURS = """
sys.path.insert(0, {root!r})
import numpy, torch
from tools.checkpoints import load
base, begun = peak(), time.perf_counter()
m = load({folder!r}, {dtype!r}, "cpu")
"""
THEIRS = """
import numpy, sentence_transformers, torch
base, begun = peak(), time.perf_counter()
m = sentence_transformers.SentenceTransformer({folder!r}, device="cpu")
"""
END = """
seconds, loaded = time.perf_counter() - begun, peak() - base
m.encode(texts)
print(json.dumps([seconds, loaded, peak() - base]))
"""


def measure(program, rounds, **values):
    """[seconds to load, MB after loading, MB after encoding], medians."""
    command = [sys.executable, "-c", HEAD + program.format(**values) + END]
    done = [subprocess.run(command, check=True, capture_output=True).stdout for _ in range(rounds)]
    return [statistics.median(x) for x in zip(*(json.loads(d.splitlines()[-1]) for d in done))]


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("models", nargs="+")
    ap.add_argument("--theirs", nargs="*", default=[])
    ap.add_argument("--dtype", default="float32")
    ap.add_argument("--rounds", type=int, default=3)
    args = ap.parse_args()
    root = str(Path(__file__).resolve().parent.parent)
    print("| | weights, MB | folder, MB | seconds to load | MB after loading | after 1,000 |")
    print("|---|---|---|---|---|---|")
    for program, folder in [(OURS, f) for f in args.models] + [(THEIRS, f) for f in args.theirs]:
        files = {f: f.stat().st_size / 1e6 for f in Path(folder).rglob("*") if f.is_file()}
        weights = sum(size for f, size in files.items() if f.suffix == ".safetensors")
        kept = sum(size for f, size in files.items() if "onnx" not in f.parts)
        values = {"root": root, "folder": folder, "dtype": args.dtype}
        cells = [weights, kept, *measure(program, args.rounds, **values)]
        name = Path(folder).name + " (sentence-transformers)" * (program is THEIRS)
        print("| " + " | ".join([name, *(f"{x:,.1f}" for x in cells)]) + " |", flush=True)


if __name__ == "__main__":
    main()
