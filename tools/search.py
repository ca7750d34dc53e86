"""Search: the lines of a text file that are nearest to a query; their vectors are stored."""

import os
import sys
from pathlib import Path

import numpy as np
import torch

import model as M
from data import atomic, digest, meter, note
from model import InputError, need, reading, unit
from tools.checkpoints import fingerprint, load
from tools.cli import read_texts


def blocks(vectors, rows=4096):
    """Stored vectors in float32, so many rows at a time: all at once may not fit."""
    for i in range(0, len(vectors), rows):
        yield vectors[i : i + rows].astype(np.float32)


def corpus_vectors(args, lines, model):
    """Unit vectors (n, width) float16 of a corpus, for queries by `model`; stored beside it.

    One file a corpus and model; of a changed corpus it is written anew. Its name is hidden and ends
    like nothing that is read, so that no pattern and no folder of files takes it for its own.
    The key knows corpus and model, not --dtype: what bfloat16 stored, a float32 query reads.
    Raises: InputError for a file that holds no such vectors, and for models of two widths.
    """
    source, shape = args.index or args.model, (len(lines), model.config.width)
    key = digest(2, lines, maker := fingerprint(source), shape)  # 2: the version of what is stored
    file = Path(args.corpus).with_name(f".{Path(args.corpus).name}.{maker}.vectors")
    if os.path.exists(file):  # Path's own raises where the name is too long
        with reading(file, f"float16 {shape}", "; delete it"):
            tensors, meta = M.read_safetensors(file, fix="")
            out = tensors["vectors"].numpy()
            if meta.get("key") == key:
                need(out.dtype == np.float16 and out.shape == shape, f"{out.dtype} {out.shape}")
                units = all(abs(np.linalg.norm(x, axis=1) - 1).max() < 0.01 for x in blocks(out))
                need(units, "not all rows are unit vectors")
                return out
            del tensors, out  # Windows replaces no file that is mapped
    maker = load(args.index, args.dtype) if args.index else model
    if (width := maker.config.width) != shape[1]:
        widths = f"{args.model} makes vectors of {shape[1]}, {source} of {width}"
        raise InputError(f"{widths}; choose models of one width")
    out = maker.encode(lines, normalize=True, progress=meter(args.corpus)).astype(np.float16)
    need(out.any(1).all() and np.isfinite(out).all(), f"{source}: makes vectors that are 0 or NaN")
    try:
        if args.corpus != "-":
            with atomic(file) as tmp:
                M.write_safetensors(tmp, {"vectors": torch.from_numpy(out)}, {"key": key})
            note(f"{file}: the vectors of {args.corpus}, stored for the next query")
    except InputError as e:
        note(f"the vectors are not stored: {e}")
    return out


def search(args, model):
    """Print the lines of a corpus that are nearest to the query, or to each of standard input."""
    need(args.query is not None or args.corpus != "-", "a corpus on standard input needs a query")
    lines = read_texts(args.corpus)
    vectors = corpus_vectors(args, lines, model)
    filled = [i for i, line in enumerate(lines) if line.strip()]  # a blank line is no answer

    def answer(query):
        q = model.encode(query, normalize=True)  # (width,)
        scores = np.concatenate([unit(x) @ q for x in blocks(vectors)])[filled]
        for i in np.argsort(-scores, kind="stable")[: args.top]:
            at = filled[i]
            print(f"{scores[i]:.4f}\t{at + 1}\t{lines[at]}")

    if args.query is not None:
        return answer(args.query)
    sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")  # encode() complains
    if sys.stdin.isatty():
        note("type a query a line; Ctrl-D ends")
    for query in filter(None, map(str.strip, sys.stdin)):  # as they come
        try:
            answer(query)
        except InputError as e:  # the next one may be sound
            print(f"error: {e}", file=sys.stderr, flush=True)
        print(flush=True)
