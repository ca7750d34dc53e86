# SPDX-License-Identifier: MIT
"""The encoder, its weights in and out, and what one does with a finished model.

This is the one file to copy where a model is used. Its parts, each built on those before it:
    files | safetensors | configuration | layers | the encoder | loading | export | use

    python model.py similarity MODEL "A man reads." "Ein Mann liest."
    python model.py search MODEL corpus.txt ["query in any language"] [--top 5] [--index MODEL2]
    python model.py encode MODEL < lines.txt > vectors.npy
    python model.py info MODEL
    python model.py export MODEL OUT [--weights float16|int8] [--onnx] [--plain]

Shapes, everywhere in this project: N sentences, T tokens, H hidden size, h heads, d = H / h,
B bottleneck, V vocabulary, K unique layers, R recurrences.
"""

import argparse
import contextlib
import difflib
import functools
import hashlib
import json
import logging
import math
import mmap
import os
import platform
import re
import shutil
import sys
import textwrap
import time
import warnings
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, normalizers
from tokenizers.models import Unigram
from torch import nn

# ------------------------------------------------------------------------------------------ files


class InputError(Exception):
    """What the user gave cannot be used: the message names it, what was expected, and the fix."""


def need(ok, message):
    """Raises: InputError with the message unless ok."""
    if not ok:
        raise InputError(message)


@functools.cache
def note(text):
    """Say on stderr, once, what is worth knowing but stops nothing."""
    print(f"note: {text}", file=sys.stderr, flush=True)


def delete(path):
    """Delete a file or a folder, if it is there."""
    with contextlib.suppress(FileNotFoundError):  # another process may do the same
        remove = shutil.rmtree if path.is_dir() and not path.is_symlink() else os.unlink
        remove(path)


@contextlib.contextmanager
def reading(path, expected, fix=""):
    """Around what reads a file: any failure becomes one InputError line that names the file."""
    try:
        yield
    except MemoryError:
        raise
    except InputError as e:  # whole: it may hold a command, and in it a path with two spaces
        raise InputError(f"{path}: not {expected}: {e}{fix}") from e
    except OSError as e:
        raise InputError(f"{path}: cannot read ({e.strerror or e}){fix}") from e
    except Exception as e:  # a damaged file can make a library raise anything
        why = " ".join(str(e).split())
        raise InputError(f"{path}: not {expected}: {why:.900}{fix}") from e


@contextlib.contextmanager
def atomic(path):
    """Yield a temporary name beside `path`, for a file or a new folder; success renames it.

    On failure it goes. A kill at any moment leaves the old content or the new, never a part.
    Raises: InputError where it cannot be written, naming the path.
    """
    path = Path(path)
    prefix = f".{path.name}.tmp-{platform.node()}@"  # machines may share a folder
    tmp = path.with_name(f"{prefix}{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in (f for f in path.parent.iterdir() if f.name.startswith(prefix)):
            process = Path("/proc", old.name.removeprefix(prefix))
            if Path("/proc/self").exists() and not process.exists():  # it was killed in a save
                delete(old)
        try:
            yield tmp
            for file in (f for f in [tmp, *tmp.rglob("*")] if f.is_file()):
                with open(file, "rb+") as f:
                    os.fsync(f.fileno())  # a rename must not reach the disk before the content
            try:
                os.replace(tmp, path)
            except OSError:
                if not (tmp.is_dir() and path.is_dir()):  # two folders: another process was first
                    raise
        finally:
            delete(tmp)
    except OSError as e:
        fix = "nothing there was changed. Free some space or choose another folder, then repeat"
        raise InputError(f"{path}: cannot write ({e.strerror or e}); {fix}") from e


def read_json(path, kind=dict):
    """The value of a JSON file. Raises: InputError if missing, malformed or of another kind."""
    with reading(path, "readable as JSON"):
        value = json.loads(Path(path).read_bytes().decode("utf-8"))
        need(isinstance(value, kind), f"a {type(value).__name__}, expected a {kind.__name__}")
    return value


def digest(*parts):
    """A short hex digest of files (Path) and values: names what was made of them."""
    h = hashlib.blake2b(digest_size=10)
    for part in parts:
        if isinstance(part, Path):
            with reading(part, "readable"), open(part, "rb") as f:
                part = hashlib.file_digest(f, "blake2b").hexdigest()
        h.update(repr(part).encode() + b"\0")
    return h.hexdigest()


def fingerprint(folder):
    """Names a model directory by what load() reads. Raises: InputError where there is none."""
    body, dense, said = read_modules(folder)
    kinds = ("*.safetensors", "*.json")
    files = sorted(f for place in (body, *dense) for kind in kinds for f in place.glob(kind))
    return digest(sorted((name, value) for name, (value, _) in said.items()), *files)


# ------------------------------------------------------------------------------------ safetensors
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8}
DTYPES |= {"U8": torch.uint8, "BOOL": torch.bool}


def is_count(value, limit=2**62):
    """Is it a whole number from 0 to below the limit?"""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < limit


def read_safetensors(path, to=None, copy=False, but=(), fix=". Fetch or export it again"):
    """(tensors by name, metadata) of a safetensors file.

    Tensors are views of a private mapping of the file: a page costs memory when it is used. With
    `to`, those of floating dtypes are converted, or with `copy` copied, one at a time, `but` for
    those whose name ends so.
    Raises: InputError with the file and the reason.
    """
    with reading(path, "a valid safetensors file", fix):
        with open(path, "rb") as f:
            data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
        body = 8 + int.from_bytes(data[:8], "little")
        short = f"{len(data)} bytes, too short for its header: truncated or damaged"
        need(body <= len(data), short)
        header = json.loads(data[8:body].decode("utf-8"))
        need(isinstance(header, dict), "the header is no JSON object")
        meta = header.pop("__metadata__", {})
        tensors, at = {}, 0
        # A header is not to be trusted: each tensor must begin where the one before it ended.
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            kind, shape = DTYPES.get(entry["dtype"]), entry["shape"]
            start, end = entry["data_offsets"]
            known = kind and type(shape) is list and all(map(is_count, [*shape, start, end]))
            known = known and len(entry) == 3 and name.isprintable()
            form = f"dtype (one of {', '.join(DTYPES)}), shape and data_offsets"
            need(known, f"{name!r} is {entry!r:.200}, expected exactly {form}")
            fits = start == at and end - start == math.prod(shape) * kind.itemsize
            where = f"{name!r}, {entry!r:.200}, in {len(data) - body} bytes from {at} on"
            why = "truncated, an overlap, a hole or of another size"
            need(fits and body + end <= len(data), f"{where}: {why}")
            raw = torch.from_numpy(np.frombuffer(data, np.uint8, end - start, body + start))
            raw = raw.clone() if (body + start) % kind.itemsize else raw  # not aligned
            tensors[name], at = raw.view(kind).view(shape), end
            if to and kind.is_floating_point and not name.endswith(but):
                tensors[name] = tensors[name].to(to, copy=copy)
                if hasattr(data, "madvise"):  # let go of what was read; the file still has it
                    data.madvise(mmap.MADV_DONTNEED)
        need(body + at == len(data), f"the tensors end at byte {body + at} of {len(data)}: damaged")
    return tensors, meta


def write_safetensors(path, tensors, meta=None):
    """Write tensors by name as one safetensors file, atomically; equal tensors give equal bytes."""
    names = {v: k for k, v in DTYPES.items()}
    # Widest dtypes first keeps every tensor aligned to its own item size; names break ties.
    order = sorted(tensors, key=lambda k: (-tensors[k].dtype.itemsize, k))
    header = {"__metadata__": {"format": "pt", **(meta or {})}}
    offset = 0
    for name in order:
        t = tensors[name]
        span = [offset, offset + t.nbytes]
        header[name] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(header, separators=(",", ":"), sort_keys=True).encode()
    text += b" " * (-len(text) % 8)
    with atomic(path) as tmp, open(tmp, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            f.write(flat.view(torch.uint8).numpy().data if flat.numel() else b"")


# ---------------------------------------------------------------------------------- configuration
TEACHERS = "all-MiniLM-L6-v2, all-distilroberta-v1, paraphrase-MiniLM-L12-v2"  # that work
# A new one goes here and into pool(); look then at its name in write_extras() and write_onnx().
POOLINGS = ("mean", "cls", "max", "mean_sqrt_len")
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_new": nn.GELU("tanh"),
    "gelu_pytorch_tanh": nn.GELU("tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "identity": nn.Identity(),
}


@dataclass(frozen=True)
class Config:
    """The shape of an encoder. Names are those of Hugging Face's config.json where it has them."""

    vocab_size: int  # V, rows of the word table
    hidden_size: int  # H
    num_hidden_layers: int  # K, unique layers
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int  # rows of the position table
    model_type: str = "bert"  # bert: positions 0..T-1; the others: pad_id + 1, pad_id + 2, ...
    type_vocab_size: int = 1
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"  # exact (erf) GELU
    pad_token_id: int = 0  # the tokenizer's; this word row has no gradient
    dropout: float = 0.0  # in training only; presets set it
    recurrence: int = 1  # R: the K layers are applied R times in the order 1..K, 1..K, ...
    bottleneck_size: int = 0  # B; 0: no bottleneck, the word table is (V, H)
    pooling: str = "mean"
    dense: tuple = ()  # after pooling: (width, activation, bias) of each linear map, if any
    normalize: bool = False  # encode() returns unit vectors
    prompt: str = ""  # put before every text
    max_seq_length: int = 128  # tokens, start and end included
    do_lower_case: bool = False  # before the tokenizer; load() makes it a part of it

    @property
    def first_position(self):
        return self.pad_token_id + 1 if self.model_type != "bert" else 0

    @property
    def width(self):
        """Of the sentence vectors."""
        return self.dense[-1][0] if self.dense else self.hidden_size


FAMILIES = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta"}  # in class names
FAMILIES |= {"camembert": "Camembert"}
TYPES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
KNOWN = {  # what is usual first: a config.json may leave it out
    "model_type": tuple(FAMILIES),
    "hidden_act": tuple(ACTIVATIONS),
    "pooling": POOLINGS,
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "include_prompt": (True,),
    "processing_kwargs": ({},),
    "truncation_side": ("right",),
}


def read_config(file, modules, pad_id, shapes):
    """The Config of a model directory: its config.json, what read_modules found and the weights.

    pad_id: the tokenizer's. shapes: of the weights, by our names; they tell what a config.json
    leaves out or has wrong: the authors' students say nothing of B, K and R, and position tables
    are often cut or extended. Raises: InputError naming the file, the value and what was expected.
    """
    said = {k: (v, file) for k, v in read_json(file).items()} | modules
    said = {k: v for k, v in said.items() if v[0] is not None and k != "dropout"}
    raw = {f.name: f.default for f in fields(Config)} | {"type_vocab_size": 2}  # as in others' BERT
    beside = file.with_name("tokenizer_config.json")
    told = read_json(beside) if beside.exists() else {}
    if is_count(told.get("model_max_length"), 2**31):  # others write 1e30 for none
        said.setdefault("max_seq_length", (told["model_max_length"], beside))
    if "truncation_side" in told:
        said["truncation_side"] = told["truncation_side"], beside
    raw |= {"max_seq_length": 2**30} | {k: v[0] for k, v in said.items()}

    def check(ok, name, expected):
        value, place = said.get(name, (None, file))
        need(ok, f"{place}: {name} is {value!r}, expected {expected}")

    _check_values(raw, check)
    (V, width), H = shapes["embeddings.word.weight"], raw["hidden_size"]
    check(raw["vocab_size"] == V, "vocab_size", f"{V}, the rows of the word table in the weights")
    B = width if width != H or raw["bottleneck_size"] else 0
    same = "bottleneck_size" not in said or raw["bottleneck_size"] == B
    check(same, "bottleneck_size", f"{B}, the width of the word table in the weights")
    # The authors' students keep the assistant's config.json: their K x R is its number of layers.
    # Without their bottleneck, fewer layers than config.json says are a damaged file.
    depth = raw["num_hidden_layers"]
    K = len({k.split(".")[1] for k in shapes if k.startswith("layers.")})
    unsaid = "recurrence" not in said and B > 0 and K > 0 and depth % K == 0
    check(K == depth or unsaid, "num_hidden_layers", f"{K}, the layers in the weights")
    R = depth // K if unsaid else raw["recurrence"]
    positions = raw["max_position_embeddings"]
    P = shapes.get("embeddings.position.weight", [positions])[0]
    if P != positions:
        note(f"{file}: {positions} positions, the table in the weights has {P}")
    same = raw["model_type"] == "bert" or said.get("pad_token_id", (pad_id,))[0] == pad_id
    check(same, "pad_token_id", f"{pad_id}, the tokenizer's: positions are counted from it")
    raw |= {"num_hidden_layers": K, "recurrence": R, "bottleneck_size": B, "pad_token_id": pad_id}
    place = said.get("dense", (None, file))[1]
    with reading(place, f"[width, one of {', '.join(ACTIVATIONS)}, bias] of each Dense"):
        dense = tuple((n, act, bias) for n, act, bias in raw["dense"])
        known = (is_count(n, 2**31) and n and act in ACTIVATIONS for n, act, _ in dense)
        need(all(known) and all(type(bias) is bool for *_, bias in dense), raw["dense"])
    raw |= {"max_position_embeddings": P, "dense": dense}
    config = Config(**{f.name: raw[f.name] for f in fields(Config)})
    cut = raw.get("truncate_dim", config.width)
    least = f"none, or {config.width} and more"
    check(is_count(cut) and cut >= config.width, "truncate_dim", least)
    longest = min(config.max_seq_length, P - config.first_position)
    check(longest > 2, "max_seq_length", f"over 2, within the {P} positions in the weights")
    return replace(config, max_seq_length=longest)


def _check_values(raw, check):
    """Has every value of a config.json its type, and is it one that this encoder knows?"""
    for name, known in KNOWN.items():
        expected = f"one of {', '.join(map(str, known))}. Teachers that work: {TEACHERS}"
        check(raw.get(name, known[0]) in known, name, expected)
    for f in (f for f in fields(Config) if f.type in TYPES):
        typed = type(raw[f.name]) is f.type
        check(typed and (f.type is not int or is_count(raw[f.name], 2**31)), f.name, TYPES[f.type])
    H, heads = raw["hidden_size"], raw["num_attention_heads"]
    check(heads and H % heads == 0, "num_attention_heads", f"a divisor of hidden_size {H}")
    check(0 < raw["layer_norm_eps"] < 1, "layer_norm_eps", "a small positive number")
    check(0 < raw["recurrence"] < 1000, "recurrence", "1 to 999")


def read_modules(root):
    """(the transformer's folder, those of Dense modules, {setting: (value, file that says it)}).

    From sentence-transformers' files; without a modules.json, `root` itself and nothing else.
    Raises: InputError for modules that are not supported.
    """
    root = Path(root)
    expected = "config.json, tokenizer.json and model.safetensors in it"
    need(root.is_dir(), f"{root}: no such model directory; expected {expected}")
    file, prompts = root / "modules.json", root / "config_sentence_transformers.json"
    if not file.exists():
        return root, [], {}
    listed = read_json(file, list)
    with reading(file, "a list of modules with type and path"):
        modules = [(m["type"].rsplit(".", 1)[-1], root / m["path"]) for m in listed]
    names = " ".join(name for name, _ in modules)
    said, settings = {}, read_json(prompts) if prompts.exists() else {}
    with reading(prompts, "prompts by name"):
        known = {None: "", "query": "", "document": ""} | (settings.get("prompts") or {})
        name = settings.get("default_prompt_name")
        need(name in known, f"default_prompt_name {name!r} is not among them")
        said["prompt"] = known[name], prompts
    said["truncate_dim"] = settings.get("truncate_dim"), prompts
    if names == "SentenceEncoder":  # an export of this project: the rest is in its config.json
        return root, [], said if settings else {}
    known = "Transformer Pooling( Dense)*( Normalize)?"
    fits = re.fullmatch(known, names)
    need(fits, f"{file}: modules {names!r}, expected {known}; others are not supported")
    body, pooling, *dense = [folder for name, folder in modules if name != "Normalize"]
    said["normalize"] = names.endswith("Normalize"), file
    pooled = read_json(pooling / "config.json")
    said["pooling"] = _pooling_mode(pooled), pooling / "config.json"
    maps, files = [], [folder / "config.json" for folder in dense]
    for at, raw in zip(files, map(read_json, files)):
        for key in ("use_residual", "module_input_name", "module_output_name"):
            usual = raw.get(key) in (None, False, "sentence_embedding")
            need(usual, f"{at}: {key} is {raw.get(key)!r}, which is not supported")
        activation = str(raw.get("activation_function", "Tanh")).rsplit(".", 1)[-1].lower()
        maps.append([raw.get("out_features"), activation, raw.get("bias", True)])
    said["dense"] = maps, ", ".join(map(str, files)) or file
    if said["prompt"][0] and not pooled.get("include_prompt", True):
        said["include_prompt"] = False, pooling / "config.json"
    beside = body / "sentence_bert_config.json"
    lengths = read_json(beside) if beside.exists() else {}
    for name in lengths.keys() & {"max_seq_length", "do_lower_case", "processing_kwargs"}:
        said[name] = lengths[name], beside
    return body, dense, said


def _pooling_mode(raw):
    """The pooling that a Pooling module's config.json switches on; a list, if not just one."""
    modes = [k for k, v in raw.items() if k.startswith("pooling_mode_") and v is not False]
    modes = [str(raw["pooling_mode"])] if "pooling_mode" in raw else modes  # the newer form
    modes = [re.sub("^pooling_mode_|_tokens?$", "", mode) for mode in modes]
    return modes[0] if len(modes) == 1 else modes


# ----------------------------------------------------------------------------------------- layers
class Int8Weight:
    """A module whose weight (m, n) may be int8, with a scale (m,) beside it.

    It stays so in memory and widens in use: a matrix in each call, of a table the rows looked up.
    """

    def _load_from_state_dict(self, state, prefix, *how):
        """Make room for int8 rows, in buffers, as parameters must be floating."""
        weight = state.get(f"{prefix}weight")
        if weight is not None and weight.dtype == torch.int8:
            size, device = self.weight.shape, self.weight.device
            del self.weight
            self.register_buffer("weight", torch.empty(size, dtype=torch.int8, device=device))
            self.register_buffer("scale", torch.empty(size[0], device=device))
        super()._load_from_state_dict(state, prefix, *how)


class Linear(Int8Weight, nn.Linear):
    """A linear map whose weights follow the dtype of its input, then an activation.

    Master weights stay float32 and are cast once a call: autocast does the same with more copies,
    which cost more than the products at these sizes.
    """

    packed = None  # the weight in oneDNN's own order, while Encoder.packed() lasts

    def forward(self, x, activation="identity"):
        weight = self.weight * self.scale[:, None] if hasattr(self, "scale") else self.weight
        weight = weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        fused = {"identity": "none", "gelu": "gelu"}.get(activation)
        if fused and not torch.is_grad_enabled() and has_onednn(x.device.type, x.dtype):
            packed = self.packed  # once: another thread's call may end meanwhile
            weight = weight if packed is None else packed
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, fused, [], "none")
        return ACTIVATIONS[activation](F.linear(x, weight, bias))


@functools.cache
def has_onednn(device, dtype):
    """Can inference call oneDNN itself? torch sends float32 products to MKL, which is slower on AMD
    (Intel was not measured), and oneDNN applies GELU while a product is still in the cache."""
    if device != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    bfloat16 = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return bfloat16 or dtype == torch.float32


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class Table(Int8Weight, nn.Embedding):
    """Rows by id: (V, B or H) for words, (positions, H), (token types, H)."""

    def forward(self, ids):
        rows = super().forward(ids)
        return rows * self.scale[ids][..., None] if hasattr(self, "scale") else rows


class Embeddings(nn.Module):
    """Ids to vectors. With a bottleneck the word table is (V, B), then a map B -> H, no bias."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        H = c.hidden_size
        width = c.bottleneck_size or H
        # Zeros, set later: a random start on the meta device would import a second of torch.
        self.word = Table.from_pretrained(torch.zeros(c.vocab_size, width), False, c.pad_token_id)
        self.project = Linear(width, H, bias=False) if c.bottleneck_size else None
        self.position = Table.from_pretrained(torch.zeros(c.max_position_embeddings, H), False)
        self.token_type = Table.from_pretrained(torch.zeros(c.type_vocab_size, H), False)
        self.norm = LayerNorm(H, eps=c.layer_norm_eps)

    def forward(self, ids, dtype):  # ids (N, T)
        c = self.config
        if c.model_type == "bert":
            position = torch.arange(ids.shape[1], device=ids.device)  # (T,)
        else:  # pads stay at pad_id
            real = (ids != c.pad_token_id).long()
            position = real.cumsum(1) * real + c.pad_token_id  # (N, T)
        x = self.word(ids).to(dtype)  # (N, T, B or H)
        x = self.project(x) if self.project is not None else x  # (N, T, H)
        segment = ids.new_zeros(1)  # token type 0 everywhere: a sentence is one segment
        x = x + (self.position(position) + self.token_type(segment)).to(dtype)
        return F.dropout(self.norm(x), c.dropout, self.training)


def plain_attention(q, k, v, attn_mask, dropout=0.0):
    """softmax(q k' / sqrt(d) + attn_mask) v; q, k, v (N, h, T, d), attn_mask of Encoder.hidden.

    The path on a CPU at sentence lengths, where SDPA costs more than these two products, and in
    training at any, where its backward pass does, too.
    """
    T = k.shape[2]
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (N, h, T, T)
    scores = scores if attn_mask is None else scores + attn_mask
    # torch's softmax takes three times as long for rows of less than 16 numbers as for 16.
    scores = F.pad(scores, (0, max(0, 16 - T)), value=torch.finfo(scores.dtype).min)
    # In float32: more exact, and faster than bfloat16's own kernel at most lengths.
    weights = F.softmax(scores, dim=-1, dtype=torch.float32)[..., :T].to(v.dtype)
    return F.dropout(weights, dropout, dropout > 0) @ v  # (N, h, T, d)


class Layer(nn.Module):
    """One post-LayerNorm transformer layer, as in BERT."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        H, eps = c.hidden_size, c.layer_norm_eps
        self.qkv, self.out = Linear(H, 3 * H), Linear(H, H)
        self.norm1 = LayerNorm(H, eps=eps)
        self.up, self.down = Linear(H, c.intermediate_size), Linear(c.intermediate_size, H)
        self.norm2 = LayerNorm(H, eps=eps)

    def forward(self, x, attn_mask):  # x (N, T, H)
        c, (N, T, H) = self.config, x.shape
        p = c.dropout if self.training else 0.0
        qkv = self.qkv(x).view(N, T, 3, c.num_attention_heads, -1)  # (N, T, 3, h, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (N, h, T, d)
        plain = x.device.type == "cpu" and not torch.compiler.is_compiling()
        if plain and (T < 128 or torch.is_grad_enabled()):
            a = plain_attention(q, k, v, attn_mask, p)
        else:
            a = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p=p)
        a = self.out(a.transpose(1, 2).reshape(N, T, H))  # heads side by side again
        x = self.norm1(x + F.dropout(a, p, self.training))
        y = self.down(self.up(x, c.hidden_act))
        return self.norm2(x + F.dropout(y, p, self.training))


class Dense(nn.Module):
    """A linear map of sentence vectors and its activation, as sentence-transformers' Dense."""

    def __init__(self, in_features, out_features, activation, bias):
        super().__init__()
        self.linear = Linear(in_features, out_features, bias)
        self.activation = activation

    def forward(self, x):  # (N, H) -> (N, out_features), in float32
        return self.linear(x, self.activation)


def pool(x, mask, how):
    """(N, T, H) -> (N, H) float32 over real tokens, start and end included: all pooling is here."""
    x, m = x.float(), mask.unsqueeze(-1).float()  # m (N, T, 1)
    if how == "cls":
        return x[:, 0]
    if how == "max":
        return x.masked_fill(m == 0, -math.inf).amax(1)
    total, n = (x * m).sum(1), m.sum(1).clamp(min=1)  # (N, H), (N, 1)
    return {"mean": total / n, "mean_sqrt_len": total / n.sqrt()}[how]


# ------------------------------------------------------------------------------------ the encoder
class Encoder(nn.Module):
    """Sentences to vectors: embedding block, K layers applied R times, pooling."""

    def __init__(self, config, tokenizer=None, dtype=torch.float32):
        super().__init__()
        c = config
        self.config, self.dtype = c, dtype  # dtype of the arithmetic; the weights have their own
        self.embeddings = Embeddings(c)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        widths = [c.hidden_size, *(d[0] for d in c.dense)]
        self.dense = nn.Sequential(*(Dense(w, *d) for w, d in zip(widths, c.dense)))
        self.tokenizer = tokenizer
        if tokenizer is not None:
            tokenizer.enable_truncation(c.max_seq_length)

    @property
    def device(self):
        return self.embeddings.word.weight.device

    @property
    def int8(self):
        """Are any of its weights int8? They cannot be trained, nor exported again."""
        return any(hasattr(m, "scale") for m in self.modules())

    def hidden(self, ids, mask, embeddings_only=False):
        """ids, mask (N, T) -> (N, T, H). embeddings_only: before the layers, as in stage 2."""
        x = self.embeddings(ids, self.dtype)
        if embeddings_only:
            return x
        attn_mask = None  # added to the scores, (N, 1, 1, T): the lowest number at pads
        traced = torch.compiler.is_compiling()  # for ONNX: no branch may hang on the data
        if traced or mask.device.type != "cpu" or not mask.all():  # asking a GPU would wait for it
            lowest = torch.finfo(x.dtype).min
            attn_mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, lowest)
            attn_mask = attn_mask[:, None, None]
        for layer in [*self.layers] * self.config.recurrence:  # cycle order 1..K, 1..K, ...
            x = layer(x, attn_mask)
        return x

    def forward(self, ids, mask, embeddings_only=False):
        """ids, mask (N, T) -> sentence vectors (N, width), float32, before any Normalize.

        embeddings_only: (N, H), the mean of the embedding block, whatever the pooling is, as there
        the first token is the same in every sentence.
        """
        x = self.hidden(ids, mask, embeddings_only)  # (N, T, H)
        if embeddings_only:
            return pool(x, mask, "mean")
        return self.dense(pool(x, mask, self.config.pooling))

    def tokenize(self, texts, prompt=None, chunk=2**14):
        """Texts -> (flat ids (sum of lengths,) uint32, starts (n + 1,) int64), truncated.

        prompt: put before every text; None: the model's own.
        """
        prompt = self.config.prompt if prompt is None else prompt
        texts = [prompt + t for t in texts] if prompt else texts
        flat, lengths = [np.zeros(0, np.uint32)], [np.zeros(1, np.int64)]
        for i in range(0, len(texts), chunk):  # the tokenizer's own results are large
            found = self.tokenizer.encode_batch_fast(texts[i : i + chunk])
            flat.append(np.fromiter((id for e in found for id in e.ids), np.uint32))
            lengths.append(np.fromiter(map(len, found), np.int64))
        return np.concatenate(flat), np.cumsum(np.concatenate(lengths))

    def batch(self, flat, starts, rows, device=None):
        """Rows of a flat token store -> ids int64 and mask bool, (N, T) each, on the device."""
        start, n = starts[rows], starts[rows + 1] - starts[rows]  # (N,)
        t = np.arange(max(int(n.max()), 1))
        mask = t < n[:, None]  # (N, T)
        ids = np.full(mask.shape, self.config.pad_token_id, np.int64)
        ids[mask] = flat[(start[:, None] + t)[mask]]
        return put(ids, device or self.device), put(mask, device or self.device)

    @contextlib.contextmanager
    def packed(self):
        """While it lasts, the layers' matrices are there in oneDNN's order, too.

        The same products, 10 to 20 % faster, for a copy of the layers in memory; int8 stays small.
        The weights must not change meanwhile.
        """
        maps = [m for m in self.layers.modules() if isinstance(m, Linear)]
        try:
            for m in maps if not self.int8 else ():
                m.packed = torch.ops.mkldnn._reorder_linear_weight(m.weight.to(self.dtype), 512)
            yield
        finally:
            for m in maps:
                m.packed = None

    @torch.inference_mode()
    def embed(self, flat, starts, embeddings_only=False, progress=None, most=None):
        """Vectors (n, width) float32, in input order, of tokenised sentences; before any Normalize.

        Sorted by length and cut by a budget of tokens: padding costs almost nothing and memory
        stays bounded. The budget was chosen by measurement: on a CPU a thread's activations should
        stay in its cache, a GPU wants to be filled. Long work on a CPU packs the layers. progress:
        called with (done, all). most: sentences at once.
        """
        lengths = np.diff(starts)
        was_training = self.training
        self.eval()
        threads = min(16, torch.get_num_threads())
        on_cpu = threads * (512 if self.dtype == torch.bfloat16 else 256)
        budget = 2**16 if self.device.type == "cuda" else on_cpu
        order = np.argsort(-lengths, kind="stable")
        width = self.config.hidden_size if embeddings_only else self.config.width
        out = torch.empty(len(lengths), width, device=self.device)
        pays = len(flat) > 2**15 and has_onednn(self.device.type, self.dtype)  # some ms a call
        i = 0
        with self.packed() if pays else contextlib.nullcontext():
            while i < len(order):
                n = max(1, min(most or len(order), budget // int(lengths[order[i]])))
                rows = order[i : i + n]
                out[put(rows, self.device)] = self(*self.batch(flat, starts, rows), embeddings_only)
                i += len(rows)
                if progress:
                    progress(i, len(order))
        self.train(was_training)
        out = out.cpu().numpy()
        need(np.isfinite(out).all(), "the model's vectors are not finite: are its weights damaged?")
        return out

    def encode(self, texts, normalize=None, prompt=None, progress=None, batch=None):
        """Texts -> float32 array (n, width) in input order; a single str -> (width,).

        texts: any iterable of str. normalize: unit vectors; prompt: put before every text; None:
        as the model's files say. progress: called with (done, all); None: shown on a terminal.
        batch: texts at once, at most. Raises: InputError with the index of what is no text.
        """
        single = isinstance(texts, str)
        texts = [texts] if single else list(texts)
        for i, t in enumerate(texts):
            if not isinstance(t, str) or re.search("[\ud800-\udfff]", t):  # half of a pair
                raise InputError(f"text {i} is {t!r:.60}, expected a str of whole characters")
        if progress is None and sys.stderr and sys.stderr.isatty():
            progress = meter("encode")
        out = self.embed(*self.tokenize(texts, prompt), progress=progress, most=batch)
        normalize = self.config.normalize if normalize is None else normalize
        out = unit(out) if normalize else out
        return out[0] if single else out

    def save(self, folder):
        """Write a model directory, atomically, with float32 weights; see write()."""
        need(not Path(folder).exists(), f"{folder}: is there already; choose another folder")
        with atomic(folder) as tmp:
            tmp.mkdir()
            self.write(tmp)

    def write(self, folder, weights="float32"):
        """Put config.json, tokenizer's two files and model.safetensors into a folder.

        weights: as in narrow(). Names are Hugging Face's, so a model without bottleneck and
        recurrence opens there as well.
        """
        c = {**vars(self.config), "position_embedding_type": "absolute"}
        c["hidden_dropout_prob"] = c["attention_probs_dropout_prob"] = c.pop("dropout")
        if not c["bottleneck_size"] and c["recurrence"] == 1:  # text-embeddings-inference demands:
            c |= {"architectures": [f"{FAMILIES[c['model_type']]}Model"], "initializer_range": 0.02}
        text = json.dumps(c, indent=1, sort_keys=True) + "\n"
        Path(folder, "config.json").write_text(text, "utf-8")
        pad = self.tokenizer.id_to_token(self.config.pad_token_id)
        limits = {"pad_token": pad, "model_max_length": self.config.max_seq_length}
        text = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **limits}) + "\n"
        Path(folder, "tokenizer_config.json").write_text(text, "utf-8")
        Path(folder, "tokenizer.json").write_text(self.tokenizer.to_str(), "utf-8")
        tensors = narrow(to_hf(self.state_dict()), weights)
        for name, t in tensors.items():
            need(torch.isfinite(t).all(), f"{name} holds values that are not finite in {weights}")
        write_safetensors(Path(folder, "model.safetensors"), tensors)


def put(array, device):
    """A numpy array as a tensor on a device; a copy to a GPU does not wait for what it is doing."""
    t = torch.from_numpy(array)
    if torch.device(device).type == "cuda":
        return t.pin_memory().to(device, non_blocking=True)
    return t.to(device)


def unit(x):
    """Rows of x (..., H) at length 1; a zero row stays zero."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


BYTES = {"float32": 4, "float16": 2, "int8": 1}  # a parameter, in the files that export makes


def ledger(config):
    """Parameters by part, {"embedding", "layers", "other", "total"}.

    embedding: word table and B -> H map, positions, token types, LayerNorm; other: Dense. Counted
    on the meta device, which takes no memory.
    """
    with torch.device("meta"):
        model = Encoder(config)
    parts = {"embedding": model.embeddings, "layers": model.layers, "other": model.dense}
    parts["total"] = model
    return {k: sum(p.numel() for p in part.parameters()) for k, part in parts.items()}


# ---------------------------------------------------------------------------------------- loading
NAMES = {  # ours and Hugging Face's
    "embeddings.word.": "embeddings.word_embeddings.",
    "embeddings.project.": "embeddings.word_embeddings_2.",  # the authors' name
    "embeddings.position.": "embeddings.position_embeddings.",
    "embeddings.token_type.": "embeddings.token_type_embeddings.",
    "embeddings.norm.": "embeddings.LayerNorm.",
    "layers.": "encoder.layer.",
    ".qkv.": ".attention.self.qkv.",
    ".out.": ".attention.output.dense.",
    ".norm1.": ".attention.output.LayerNorm.",
    ".up.": ".intermediate.dense.",
    ".down.": ".output.dense.",
    ".norm2.": ".output.LayerNorm.",
}
TABLE = "embeddings.word_embeddings.weight"
QKV = ("query", "key", "value")  # one weight here, "qkv"
# What pretraining and classifiers leave in a checkpoint; no sentence vector needs it.
HEADS = {"pooler", "lm_head", "cls", "classifier", "pre_classifier", "qa_outputs", "score"}
HEADS |= {"vocab_transform", "vocab_layer_norm", "vocab_projector"}
# What a directory may hold in place of the file that is read here.
OLD = {
    "model.safetensors": ("pytorch_model.bin", "tf_model.h5", "model.ckpt.index"),
    "tokenizer.json": ("sentencepiece.bpe.model", "spiece.model", "vocab.txt", "vocab.json"),
}


def to_hf(state):
    """Our names to Hugging Face's, of weights or gradients; qkv (3H, H) becomes three."""
    out = {}
    for name, t in state.items():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs, 1)
        names = [name.replace("qkv", part) for part in QKV] if "qkv" in name else [name]
        out.update(zip(names, t.chunk(len(names))))
    return out


def narrow(tensors, weights):
    """Tensors as a file holds them: float32, float16 or int8.

    int8: each matrix NAME.weight (m, n) is rounded, row by row, to 127 steps of its largest value;
    NAME.scale (m,) is a step in float32. What is int8 already stays so.
    """
    kind = torch.float16 if weights == "float16" else torch.float32
    out = {}
    for name, t in tensors.items():
        if weights == "int8" and t.dim() == 2:
            scale = t.float().abs().amax(1).clamp(min=1e-12) / 127
            out[name.removesuffix("weight") + "scale"] = scale
            t = (t / scale[:, None]).round().to(torch.int8)
        out[name] = t.to(kind) if t.is_floating_point() else t
    return out


def from_hf(tensors, place):
    """The inverse of to_hf, for the tensors of anybody's checkpoint: an encoder's, by our names.

    The body is where the word table is, whatever a training wrapper put before or between; heads
    are left out. What is no known head passes through, for a strict load to list.
    Raises: InputError for two bodies; KeyError or RuntimeError where a query, key or value is
    missing or misshapen.
    """
    clean = []
    for name, t in tensors.items():  # without module., _orig_mod., _fsdp_wrapped_module. and kin
        name = ".".join(p for p in name.split(".") if p != "module" and not p.startswith("_"))
        name = name.replace("Norm.gamma", "Norm.weight")  # TensorFlow's names
        clean.append((name.replace("Norm.beta", "Norm.bias"), t))
    bodies = sorted({n.removesuffix(TABLE) for n, _ in clean if n.endswith(TABLE)}) or [""]
    need(len(bodies) < 2, f"{place}: encoders under {bodies}; keep one of them in the file")
    out, heads = {}, set()
    for name, t in clean:
        name = name.removeprefix(bodies[0])
        found = HEADS.intersection(name.split("."))
        if found and not name.startswith(("embeddings.", "encoder.")):
            heads |= found
        elif not name.endswith("position_ids"):
            for ours, theirs in NAMES.items():
                name = name.replace(theirs, ours, 1)
            need(name not in out, f"{name} is there twice")
            numbers = t.is_floating_point() or t.dtype == torch.int8 and name.endswith("weight")
            need(numbers, f"{name} has dtype {t.dtype}, expected a floating one, or int8 weights")
            out[name] = t
    table = out.get("embeddings.word.weight")
    need(table is not None and table.dim() == 2, f"no 2-dimensional {TABLE}")
    if heads - {"pooler"}:
        note(f"{place}: left out, as an encoder does not need them: {', '.join(sorted(heads))}")
    for name in [n for n in out if ".attention.self.query." in n]:
        parts = [out.pop(name.replace("query", part)) for part in QKV]
        joined = name.replace(".attention.self.query.", ".qkv.")
        need(len({p.dtype for p in parts}) == 1, f"{joined} has parts of several dtypes")
        out[joined] = torch.stack(parts).flatten(0, 1)  # which demands equal shapes
    return out


def read_weights(folder, to=None, copy=False):
    """All tensors of an encoder's directory by our names; to, copy: as in read_safetensors.

    Raises: InputError for files that are missing or damaged, and for weights that are there twice
    or of no floating dtype.
    """
    folder = Path(folder)
    files = [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.exists() and not files[0].exists():
        listed = read_json(index)
        with reading(index, "a weight_map from tensor names to files beside it"):
            files = [folder / Path(f).name for f in sorted(set(listed["weight_map"].values()))]
    tensors = {}
    for file in files:
        must_exist(file, "AutoModel.from_pretrained", folder)
        # A table that is not copied stays as it is stored: rows are converted when looked up.
        found, _ = read_safetensors(file, to, copy, but=() if copy else TABLE)
        need(tensors.keys().isdisjoint(found), f"{file}: holds what another file holds, too")
        tensors |= found
    with reading(folder, "an encoder's weights"):
        return from_hf(tensors, folder)


def must_exist(file, opener, folder):
    """Raises: InputError where `file` is missing, with how `opener` makes it of what is there."""
    old = next((n for n in OLD.get(file.name, ()) if file.with_name(n).exists()), None)
    risk = ", but it may run code when read" if old == "pytorch_model.bin" else ""
    fix = f"{opener}({str(folder)!r}).save_pretrained({str(folder)!r})"
    there = f"; {old} is there{risk}. Convert it once, with transformers: {fix}" if old else ""
    need(file.exists(), f"{file}: no such file{there}")


def read_tokenizer(folder):
    """(tokenizer, pad id) of a directory: tokenizer.json, and the pad token that its files name.

    The pad id is the tokenizer's, not config.json's: it fills batches, and RoBERTa counts positions
    from it; the authors' MiniLM says 0 there, which is <s>.
    Raises: InputError where there is no pad token of its own, or no start and end are added.
    """
    file = Path(folder, "tokenizer.json")
    must_exist(file, "AutoTokenizer.from_pretrained", folder)
    beside = [file.with_name(n) for n in ("special_tokens_map.json", "tokenizer_config.json")]
    names = [read_json(f).get("pad_token") for f in beside if f.exists()]
    names = [n.get("content") if isinstance(n, dict) else n for n in names] + ["<pad>", "[PAD]"]
    with reading(file, "a usable tokenizer"):
        tokenizer = Tokenizer.from_file(str(file))
        ids = [tokenizer.token_to_id(n) for n in names if isinstance(n, str)]
        pad_id = next((i for i in ids if i is not None), None)
        need(pad_id is not None, f"no pad token (looked for {names}); batches need one")
        tokenizer.no_padding()
        ends = tokenizer.encode("").ids
        fix = "save it again with transformers"
        need(len(ends) >= 2, f"its post_processor adds no start and end tokens; {fix}")
        need(pad_id not in ends, f"its pad token, id {pad_id}, is also its start or end token")
    return tokenizer, pad_id


def best_dtype(device):
    """(name, why): bfloat16 where the device multiplies it faster than float32."""
    if torch.device(device).type == "cuda":
        what, has = "GPU", torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        cpu = torch.cpu
        what, has = "CPU", cpu._is_amx_tile_supported() or cpu._is_avx512_bf16_supported()
    why = f"the {what} has {'' if has else 'no '}bfloat16 units"
    return "bfloat16" if has else "float32", why


def load(folder, dtype=None, device=None, train=False, dropout=0.0, max_tokens=math.inf):
    """An Encoder from a model directory; never runs code from a file.

    folder: this project's, sentence-transformers', plain Hugging Face (BERT and RoBERTa families),
    or the authors' students. dtype: 'float32', 'bfloat16' or None, the best on this device.
    train: keep float32 master weights whatever the dtype. dropout: in training.
    max_tokens: truncate to fewer tokens than the files say.
    Raises: InputError naming the file and the fix for anything missing, damaged or unsupported.
    """
    root = Path(folder)
    need(dtype in (None, "float32", "bfloat16"), f"dtype {dtype!r}: expected float32 or bfloat16")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = getattr(torch, dtype or best_dtype(device)[0])
    on_cpu = torch.device(device).type == "cpu"
    # cuDNN's attention builds a plan for every new shape, and each of our batches has a new one.
    if not on_cpu:
        torch.backends.cuda.enable_cudnn_sdp(False)
    body, dense, modules = read_modules(root)
    tokenizer, pad_id = read_tokenizer(body)
    state = read_weights(body, torch.float32 if train else kind, copy=train or not on_cpu)
    for i, file in enumerate(f / "model.safetensors" for f in dense):
        must_exist(file, "SentenceTransformer", root)
        state |= {f"dense.{i}.{k}": v for k, v in read_safetensors(file, torch.float32)[0].items()}
    shapes = {k: tuple(v.shape) for k, v in state.items()}
    config = read_config(body / "config.json", modules, pad_id, shapes)
    if config.do_lower_case:
        steps = [normalizers.Lowercase(), tokenizer.normalizer or normalizers.Sequence([])]
        tokenizer.normalizer = normalizers.Sequence(steps)
    length = min(config.max_seq_length, max_tokens)
    config = replace(config, dropout=dropout, max_seq_length=length, do_lower_case=False)
    ids = [tokenizer.get_vocab_size() - 1, *tokenizer.get_added_tokens_decoder()]
    if not isinstance(tokenizer.model, Unigram):  # the one without gaps; listing it takes a while
        ids += tokenizer.get_vocab().values()
    few = f"token ids up to {max(ids)}, but the word table has {config.vocab_size} rows"
    need(max(ids) < config.vocab_size, f"{body / 'tokenizer.json'}: {few}; not of one model")
    with torch.device("meta"):  # shapes only: the weights are the file's, not copies
        model = Encoder(config, tokenizer, kind)
    with reading(body / "model.safetensors", "the weights that config.json describes"):
        model.load_state_dict(state, assign=True)  # lists what is missing, unexpected, misshapen
    better = "train the float32 model that it was made of"
    need(not (train and model.int8), f"{body}: int8 weights cannot be trained; {better}")
    return model.to(device).requires_grad_(train).train(train)


# ----------------------------------------------------------------------------------------- export
def export(folder, out, weights="float32", onnx=False, plain=False):
    """Write `out`, a folder ready to upload; returns a line that says how large it is.

    It opens here and in sentence-transformers, with `onnx` also in ONNX Runtime, transformers.js
    and fastembed. weights: float32, float16 or int8, of model.safetensors. plain: an ordinary
    directory of the model's family, for anything else; see unroll().
    Raises: InputError for what cannot be; then there is nothing at `out`.
    """
    source, out = Path(folder).resolve(), Path(out)
    need(not out.exists(), f"{out}: is there already; choose another folder, or delete it first")
    need(not plain or weights != "int8", "--plain: no other program reads our int8; take float16")
    model = load(source, "float32", "cpu").float()  # the table may be float16
    need(not model.int8, f"{source}: its weights are int8; export the float32 model it was made of")
    dense = f"{source}: has a Dense module; other programs open it without --onnx and --plain"
    need(not model.config.dense or not (plain or onnx), dense)
    before = ledger(model.config)["total"]
    model = unroll(model) if plain else model
    with atomic(out) as tmp:
        tmp.mkdir()
        write_extras(model, source, tmp, plain)
        model.write(tmp, weights)
        card = model_card(model, source, out.name, weights, onnx, plain)
        (tmp / "README.md").write_text(card, "utf-8")
        if onnx:
            write_onnx(model, tmp / "onnx")
    total = ledger(model.config)["total"]
    stored = (out / "model.safetensors").stat().st_size
    larger = f", {total / before:.1f} x those of {source.name}" if plain else ""
    return f"{out}: {total:,} parameters{larger}; weights {stored / 1e6:,.1f} MB"


@torch.no_grad()
def unroll(model):
    """Make it an ordinary encoder of the same vectors, without bottleneck and recurrence.

    The word table (V, B) is multiplied by the map B -> H, and the K layers are listed R times.
    """
    c, e = model.config, model.embeddings
    if c.bottleneck_size:
        e.word.weight, e.project = nn.Parameter(e.word.weight @ e.project.weight.T), None
    model.layers = nn.ModuleList([*model.layers] * c.recurrence)
    model.config = replace(c, bottleneck_size=0, recurrence=1, num_hidden_layers=len(model.layers))
    return model


def write_extras(model, source, folder, plain):
    """What other programs look for beside our own files."""
    c = model.config
    home, files, kinds = "model", {}, ["SentenceEncoder"]
    if plain:
        home, kinds = "sentence_transformers.models", ["Transformer", "Pooling"]
        kinds += ["Normalize"] * c.normalize
        pooling = {f"pooling_mode_{p}_token{'s' * (p != 'cls')}": p == c.pooling for p in POOLINGS}
        files["1_Pooling/config.json"] = {"word_embedding_dimension": c.hidden_size, **pooling}
        length = {"max_seq_length": c.max_seq_length, "do_lower_case": False}
        files["sentence_bert_config.json"] = length
    else:
        (folder / "model.py").write_bytes(Path(__file__).read_bytes())
    said = source / "config_sentence_transformers.json"  # it may name more prompts than ours
    if said.exists():
        shutil.copy(said, folder)
    elif c.prompt:
        files[said.name] = {"prompts": {"default": c.prompt}, "default_prompt_name": "default"}
    files["modules.json"] = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"{home}.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    for name, value in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(value, indent=1) + "\n", "utf-8")


class SentenceEncoder(nn.Module):
    """An Encoder as the one module of a sentence-transformers model, found in its own model.py."""

    save_in_root = True

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder.requires_grad_()
        self.tokenizer = encoder.tokenizer

    @classmethod
    def load(cls, path, **options):
        """path: a folder, or a name on the hub, from which these files alone are fetched."""
        from sentence_transformers.util import load_file_path

        known = ("token", "cache_folder", "revision", "local_files_only")
        where = {k: options.get(k) for k in known}
        names = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
        files = [load_file_path(path, name, **where) for name in names]
        encoder = load(Path(files[0]).parent, "float32", "cpu")
        return cls(encoder.float())  # the table may be float16, which does not train

    def save(self, folder, **_):
        self.encoder.write(folder)

    def tokenize(self, texts, **_):
        flat, starts = self.encoder.tokenize(texts, prompt="")  # the prompt is there already
        # On the CPU: a DataLoader pins what it collates, and its workers must not touch a GPU.
        ids, mask = self.encoder.batch(flat, starts, np.arange(len(texts)), "cpu")
        return {"input_ids": ids, "attention_mask": mask.long()}  # (N, T) each

    def forward(self, features, **_):
        e = self.encoder
        trains = self.training and torch.is_grad_enabled()
        need(not (trains and e.int8), "int8 weights cannot be trained; train the float32 model")
        mask = features["attention_mask"].bool()
        e.dtype = e.embeddings.norm.weight.dtype  # half() and bfloat16() are obeyed
        x = e.hidden(features["input_ids"], mask)  # (N, T, H)
        v = e.dense(pool(x, mask, e.config.pooling))
        v = F.normalize(v, dim=-1) if e.config.normalize else v
        return {**features, "token_embeddings": x, "sentence_embedding": v}

    def get_embedding_dimension(self):
        return self.encoder.config.width

    get_sentence_embedding_dimension = get_embedding_dimension  # the name before version 5

    @property
    def max_seq_length(self):
        return self.encoder.config.max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, tokens):
        c = self.encoder.config
        tokens = min(tokens, c.max_position_embeddings - c.first_position)
        self.encoder.config = replace(c, max_seq_length=tokens)
        self.encoder.tokenizer.enable_truncation(tokens)


def write_onnx(model, folder):
    """Write model.onnx, float32, and model_quantized.onnx, 8 bits.

    input_ids, attention_mask, int64 (N, T) -> last_hidden_state (N, T, H). The model's maps are
    turned: it is spoilt afterwards. Raises: InputError without the packages, over 2 GB, or for a
    pooling that the consumers lack.
    """
    c = model.config
    need(c.pooling in ("mean", "cls"), f"pooling {c.pooling!r}: the users of ONNX know mean, cls")
    need(4 * ledger(c)["total"] < 2**31, "over 2 GB, the limit of an ONNX file")
    try:  # sentence-transformers demands every package that model.py imports outside of a try
        import onnxscript  # noqa: F401 - torch.onnx needs it
        from onnx_ir.passes.common import ClearMetadataAndDocStringPass
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as e:
        fix = "pip install onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0"
        raise InputError(f"--onnx needs {e.name}, which nothing else does: {fix}") from None

    def turned(m, x, activation="identity"):
        return ACTIVATIONS[activation](x @ m.weight + (0 if m.bias is None else m.bias))

    # Turned here, not by the graph, a tied matrix stands in the file once, and can be quantized.
    for m in [m for m in model.modules() if isinstance(m, Linear)]:
        m.weight = nn.Parameter(m.weight.T.contiguous(), requires_grad=False)
        m.forward = functools.partial(turned, m)
    model.forward = lambda input_ids, attention_mask: model.hidden(input_ids, attention_mask.bool())
    ids = torch.ones(2, 7, dtype=torch.int64)  # any: values are not looked at
    names = {"input_names": ["input_ids", "attention_mask"], "output_names": ["last_hidden_state"]}
    names["dynamic_shapes"] = [{0: "batch", 1: "length"}] * 2
    folder.mkdir()
    with warnings.catch_warnings(action="ignore"), contextlib.ExitStack() as after:
        logging.disable(logging.WARNING)  # of packages that tracer and quantizer could do without
        after.callback(logging.disable, logging.NOTSET)
        program = torch.onnx.export(model, (ids, ids.clone()), dynamo=True, verbose=False, **names)
        ClearMetadataAndDocStringPass()(program.model)  # this machine's paths are in it
        program.save(full := folder / "model.onnx")
        # Unsigned: without VNNI, x86 processors add up signed products with saturation.
        unsigned = {"per_channel": True, "weight_type": QuantType.QUInt8}
        quantize_dynamic(full, folder / "model_quantized.onnx", **unsigned)


def origin(folder):
    """(languages, text): scores and origin of a model, by results.json beside its folder."""
    with contextlib.suppress(InputError), reading(folder, "of a run"):  # the file may be anybody's
        results = read_json(folder.parent / "results.json")
        row = [v for k, v in results["rows"].items() if k.split(",")[0] == folder.name][-1]
        scores = {k: v for k, v in row["spearman"].items() if not math.isnan(v)}
        text = ""
        if scores:
            shown = ", ".join(f"{k} {v:.1f}" for k, v in scores.items())
            text = f"Spearman x 100: {shown}; mean {sum(scores.values()) / len(scores):.1f}.\n\n"
        if row["accuracy"]:
            there, back = np.mean([*row["accuracy"].values()], axis=0)
            text += f"Translations found: {there:.1f} % from English, {back:.1f} % into it.\n\n"
        given = results["arguments"]
        teacher = given["teacher"] or ["built in"]  # [name, fingerprint]
        assistant = given["assistant"] or ["made of the teacher"]
        files = ", ".join(name for name, _ in given["train"] + given["extra"]) or "built in"
        text += f"Teacher: {teacher[0]}; assistant: {assistant[0]}; data: {files}; "
        text += f"seed {given['seed']}; code: {results['git'] or 'unknown'}.\n"
        seen = {x for pair in scores for x in pair.split("-")} | set(row["accuracy"])
        return sorted(seen) or ["multilingual"], text
    return ["multilingual"], ""


def model_card(model, source, name, weights, onnx, plain):
    """README.md for a hub, of the model that was read from the folder `source`."""
    c = model.config
    languages, made = origin(source)
    trust = "" if plain else ", trust_remote_code=True"
    uses = f"""from sentence_transformers import SentenceTransformer
SentenceTransformer("{name}"{trust}).encode(["A sentence.", "Ein Satz."])
"""
    bare = f"""
# transformers; {c.pooling} pooling of (N, T, {c.hidden_size}) gives the vectors
ids = AutoTokenizer.from_pretrained("{name}")(["{c.prompt}Hi"], return_tensors="pt")
AutoModel.from_pretrained("{name}")(**ids).last_hidden_state

text-embeddings-router --model-id {name} --pooling {c.pooling}
"""
    here = f'model.load("{name}").encode(["A sentence."])  # with the model.py here\n'
    others = f"""
// transformers.js; "fp32" is exact, "q8" 8 bits, at a cosine of about 0.99 to it
const extract = await pipeline("feature-extraction", "{name}", {{ dtype: "q8" }});
await extract(["{c.prompt}Hi"], {{ pooling: "{c.pooling}", normalize: true }});

# fastembed; of a folder here: TextEmbedding("{name}", specific_model_path="{name}")
TextEmbedding.add_custom_model("{name}", pooling=PoolingType.{c.pooling.upper()}, dim={c.width},
    normalization=True, sources=ModelSource(hf="{name}"), model_file="onnx/model.onnx")
list(TextEmbedding("{name}").embed(["{c.prompt}Hi"]))

# ONNX Runtime; ids and mask: int64 (N, T); {c.pooling} pooling of (N, T, {c.hidden_size})
InferenceSession("onnx/model.onnx").run(None, {{"input_ids": ids, "attention_mask": mask}})[0]
"""
    return f"""---
language: {json.dumps(languages)}
license: other
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, feature-extraction, multilingual]
---
# {name}

Sentences to vectors, compared by cosine. Its weights are stored in {weights}.

{made}Made by multi-stage distillation ([arXiv 2209.05869](https://arxiv.org/abs/2209.05869)).
The licences of teacher, assistant and training data apply to this model; the code is MIT.

{textwrap.indent(uses + (bare if plain else here) + others * onnx, "    ")}
Its shape, and its size by part and precision:

{textwrap.indent(describe(model), "    ")}
"""


# -------------------------------------------------------------------------------------------- use
class Parser(argparse.ArgumentParser):
    """argparse, its complaints in one line like every other, with the nearest known flag."""

    def error(self, message):
        known = [s for a in self._actions for s in a.option_strings]
        word = message.split(": ")[-1].split("=")[0].split(" ")[0]
        near = difflib.get_close_matches(word, known, 1) if "unrecognized" in message else ()
        hint = f"did you mean {near[0]}?" if near else "--help lists what there is"
        raise InputError(f"{message}; {hint}")


def run_cli(main):
    """Call a command line's main(); an error that one can mend becomes one line and exit code 2."""
    for stream in (sys.stdout, sys.stderr):  # a console of one byte a character shows escapes
        stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except BrokenPipeError:
        sys.exit(1)
    except (InputError, OSError) as e:  # OSError: a full disk under the log, standard output
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def read_texts(path):
    """The lines of a UTF-8 text file or, for "-", of standard input."""
    with reading(path, "readable"):
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    with reading(path, "UTF-8 text", "; convert it with iconv"):
        text = raw.decode("utf-8-sig")
    need(text, f"{path}: no lines to read")
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def meter(what):
    """A callback (done, all) that tells stderr of long work, at most every five seconds."""
    begun = shown = time.monotonic()

    def show(done, total):
        nonlocal shown
        now = time.monotonic()
        if now - shown > 5:
            rate = done / (now - begun)
            m, s = divmod((total - done) / rate, 60)
            left = f"{m:.0f}:{s:02.0f} left"
            print(f"{what}  {done:,}/{total:,}  {rate:,.0f}/s  {left}", file=sys.stderr, flush=True)
            shown = now

    return show


def describe(model):
    """The shape and the size of a model: its Config, then the parameters and MB of each part."""
    lines = [f"{name:25}{value!r:>14}" for name, value in vars(model.config).items()]
    for part, n in ledger(model.config).items():
        sizes = [f"{n * size / 1e6:10,.1f} MB {kind}" for kind, size in BYTES.items()]
        lines.append(f"{part:12}{n:14,} parameters{''.join(sizes)}")
    return "\n".join(lines)


def blocks(vectors, rows=4096):
    """Stored vectors in float32, so many rows at a time: all at once may not fit."""
    for i in range(0, len(vectors), rows):
        yield vectors[i : i + rows].astype(np.float32)


def corpus_vectors(args, lines, model):
    """Unit vectors (n, width) float16 of a corpus, for queries by `model`; stored beside it.

    The key knows corpus and model, not --dtype: what bfloat16 stored, a float32 query reads.
    Raises: InputError for a file that holds no such vectors, and for models of two widths.
    """
    source, shape = args.index or args.model, (len(lines), model.config.width)
    key = digest(2, lines, fingerprint(source), shape)  # 2: the version of what is stored
    file = f"{args.corpus}.{key}.safetensors"  # the key is inside, too: names can be changed
    if os.path.exists(file):
        with reading(file, f"float16 {shape}", "; delete it"):
            tensors, meta = read_safetensors(file, fix="")
            out = tensors["vectors"].numpy()
            need(out.dtype == np.float16 and out.shape == shape, f"{out.dtype} {out.shape}")
            need(meta.get("key") == key, "those of another corpus or model")
            units = all(abs(np.linalg.norm(x, axis=1) - 1).max() < 0.01 for x in blocks(out))
            need(units, "not all rows are unit vectors")
            return out
    maker = load(args.index, args.dtype) if args.index else model
    widths = f"{args.model} makes vectors of {shape[1]}, {source} of {maker.config.width}"
    need(maker.config.width == shape[1], f"{widths}; choose models of one width")
    out = maker.encode(lines, normalize=True, progress=meter(args.corpus)).astype(np.float16)
    need(out.any(1).all() and np.isfinite(out).all(), f"{source}: makes vectors that are 0 or NaN")
    try:
        if args.corpus != "-":
            write_safetensors(file, {"vectors": torch.from_numpy(out)}, {"key": key})
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
    queries = [args.query]
    if args.query is None:
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")  # encode() complains
        queries = filter(None, map(str.strip, sys.stdin))  # as they come
        if sys.stdin.isatty():
            note("type a query a line; Ctrl-D ends")
    for query in queries:
        q = model.encode(query, normalize=True)  # (width,)
        scores = np.concatenate([unit(x) @ q for x in blocks(vectors)])[filled]
        for i in np.argsort(-scores, kind="stable")[: args.top]:
            at = filled[i]
            print(f"{scores[i]:.4f}\t{at + 1}\t{lines[at]}")
        print(end="\n" if args.query is None else "", flush=True)


def main(argv=None):
    ap = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = ("float32", "bfloat16")
    ap.add_argument("--dtype", choices=kinds, help="arithmetic; default: the best")
    commands = ap.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, text, *arguments):
        sub = commands.add_parser(name, help=text, description=text)
        for argument in ("model", *arguments):
            sub.add_argument(argument)
        sub.add_argument("--dtype", choices=kinds, default=argparse.SUPPRESS, help="here or before")
        return sub.add_argument

    command("similarity", "the cosine of two sentences", "a", "b")
    add = command("search", "the lines of a text file that are nearest to a query", "corpus")
    add("query", nargs="?", help="without one, each line of standard input is a query")
    add("--top", type=int, default=5, help="lines to show")
    add("--index", metavar="MODEL2", help="encodes the corpus, MODEL the queries; of one space")
    command("encode", "lines of standard input to vectors, a .npy file on standard output")
    command("info", "shape and size")
    add = command("export", "a folder ready to upload, for other programs, too", "out")
    add("--weights", choices=("float32", "float16", "int8"), default="float32")
    add("--onnx", action="store_true", help="for ONNX Runtime, transformers.js and fastembed, too")
    add("--plain", action="store_true", help="without bottleneck and recurrence: opens anywhere")
    args, rest = ap.parse_known_args(argv)
    # Python 3.11 gives an optional positional up at the first flag before it.
    if len(rest) == 1 and getattr(args, "query", "") is None and not rest[0].startswith("-"):
        args.query = rest.pop()
    if rest:
        ap.error(f"unrecognized arguments: {' '.join(rest)}")
    odd = re.search("[\0-\x1f\x7f-\x9f\ud800-\udfff]", " ".join(map(str, vars(args).values())))
    need(not odd, "expected text in UTF-8 without control characters")
    need(getattr(args, "top", 1) > 0, "--top: expected 1 or more")
    if args.command == "export":
        return print(export(args.model, args.out, args.weights, args.onnx, args.plain))
    model = load(args.model, args.dtype)
    if args.command == "similarity":
        a, b = unit(model.encode([args.a, args.b]))
        print(f"{float(a @ b):.4f}")
    elif args.command == "search":
        search(args, model)
    elif args.command == "encode":
        np.save(sys.stdout.buffer, model.encode(read_texts("-"), progress=meter("encode")))
    else:
        print(describe(model))


if __name__ == "__main__":
    run_cli(main)
