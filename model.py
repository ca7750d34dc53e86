# SPDX-License-Identifier: MIT
"""The encoder: sentences to vectors, its weights out of a folder and into one.

    vectors = load("runs/demo/student").encode(["A man reads.", "Ein Mann liest."])  # (2, H)

The one file to copy where a model is used, and the one that travels with an export: it reads the
folder that load() is given, computes, and writes the folder that save() is given; nothing else.

Shapes, everywhere in this project: N sentences, T tokens, H hidden size, h heads, d = H / h,
B bottleneck, V vocabulary, K unique layers, R recurrences."""

import contextlib
import functools
import itertools
import json
import math
import mmap
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models
from torch import nn


# ----------------------------------------------------------------------------------------- errors
class InputError(Exception):
    """What the user gave cannot be used: the message names it, what was expected, and the fix."""


def need(ok, message):
    """Raises: InputError with the message unless ok."""
    if not ok:
        raise InputError(message)


def is_out_of_memory(e):
    """Does an exception say so? On a CPU torch's is a RuntimeError."""
    return isinstance(e, MemoryError) or re.search("(out of|allocate|not enough) memory", str(e))


@contextlib.contextmanager
def reading(path, expected, fix=""):
    """Around what reads a file: any failure becomes one InputError line that names the file."""
    try:
        small = Path(path).is_file() and Path(path).stat().st_size < 200
        if small and Path(path).read_bytes().startswith(b"version https://git-lfs"):
            raise InputError("a Git LFS pointer, not the file itself; run: git lfs pull")
        yield
    except InputError as e:  # whole: it may hold a command, and in it a path with two spaces
        raise InputError(f"{path}: not {expected}: {e}{fix}") from e
    except OSError as e:
        raise InputError(f"{path}: cannot read ({e.strerror or e}){fix}") from e
    except Exception as e:  # a damaged file can make a library raise anything
        if is_out_of_memory(e):
            raise
        why = " ".join(str(e).split())
        raise InputError(f"{path}: not {expected}: {why:.900}{fix}") from e


def read_json(path, kind=dict):
    """The value of a JSON file. Raises: InputError if missing, malformed or of another kind."""
    with reading(path, "readable as JSON"):
        value = json.loads(Path(path).read_bytes().decode("utf-8-sig"))
        need(isinstance(value, kind), f"a {type(value).__name__}, expected a {kind.__name__}")
    return value


# ---------------------------------------------------------------------------------- configuration
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

    @property
    def first_position(self):
        return self.pad_token_id + 1 if self.model_type != "bert" else 0

    @property
    def width(self):  # of the sentence vectors
        return self.dense[-1][0] if self.dense else self.hidden_size


# ----------------------------------------------------------------------------------------- layers
ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh}
ACTIVATIONS |= dict.fromkeys(("gelu_new", "gelu_pytorch_tanh"), nn.GELU("tanh"))
ACTIVATIONS |= {"sigmoid": torch.sigmoid, "identity": nn.Identity()}


class Int8Weight:
    """A module whose weight (m, n) may be int8; row i is then weight[i] * scale[i], scale (m,). It
    stays so in memory and widens in use: a matrix in each call, of a table the rows looked up."""

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
    """A linear map whose weights follow the dtype of its input, then an activation. They are cast
    once a call: autocast makes more copies, which cost more than the products at these sizes."""

    packed = None  # the weight in oneDNN's own order, while Encoder.at_work() lasts

    def forward(self, x, activation="identity"):
        weight = self.weight.to(x.dtype)
        if hasattr(self, "scale"):  # in x's dtype: float32 products would take half as long again
            weight = weight * self.scale.to(x.dtype)[:, None]
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
        rows = super().forward(ids)  # (..., B or H), of the dtype that is stored
        return rows * self.scale[ids][..., None] if hasattr(self, "scale") else rows


class Embeddings(nn.Module):
    """Ids to vectors. With a bottleneck the word table is (V, B), then a map B -> H, no bias."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        H = c.hidden_size
        width = c.bottleneck_size or H
        # Zeros, set later: a random start on the meta device imports modules for a second.
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
    """softmax(q k' / sqrt(d) + attn_mask) v; q, k, v (N, h, T, d), attn_mask of Encoder.hidden. On
    a CPU SDPA costs more than these two products: at sentence lengths, and in training at any."""
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


# ---------------------------------------------------------------------------------------- pooling
# All pooling is here. A new one is one more line, and its name among sentence-transformers' in
# POOLING of tools/checkpoints.py; consumers of ONNX know no other than mean and cls.
POOLINGS = {  # x (N, T, H), m (N, T, 1), 1 at real tokens and 0 at pads -> (N, H)
    "mean": lambda x, m: (x * m).sum(1) / m.sum(1).clamp(min=1),
    "cls": lambda x, m: x[:, 0],
    "max": lambda x, m: x.masked_fill(m == 0, -math.inf).amax(1),
    "mean_sqrt_len": lambda x, m: (x * m).sum(1) / m.sum(1).clamp(min=1).sqrt(),
}


def pool(x, mask, how):
    """x (N, T, H), mask (N, T) -> (N, H) float32, over real tokens, start and end included."""
    return POOLINGS[how](x.float(), mask.unsqueeze(-1).float())


class Dense(nn.Module):
    """A linear map of sentence vectors and its activation, as sentence-transformers' Dense."""

    def __init__(self, in_features, out_features, activation, bias):
        super().__init__()
        self.linear = Linear(in_features, out_features, bias)
        self.activation = activation

    def forward(self, x):  # (N, H) -> (N, out_features), in float32
        return self.linear(x, self.activation)


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

        embeddings_only: (N, H), the mean of the embedding block, in which a first token would be
        the same in every sentence."""
        x = self.hidden(ids, mask, embeddings_only)  # (N, T, H)
        if embeddings_only:
            return pool(x, mask, "mean")
        return self.dense(pool(x, mask, self.config.pooling))

    def tokenize(self, texts, prompt=None, chunk=2**14):
        """Texts -> (flat ids (sum of lengths,) uint32, starts (n + 1,) int64), truncated. prompt:
        put before every text; None: the model's own."""
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
    def at_work(self, pack):
        """In eval mode while it lasts. pack: with the layers' matrices, not int8 ones, in oneDNN's
        order, too: 10 to 20 % faster, for a copy. The weights must not change meanwhile."""
        was_training = self.training
        maps = [m for m in self.layers.modules() if isinstance(m, Linear) and pack]
        try:
            self.eval()
            for m in maps if not self.int8 else ():
                m.packed = torch.ops.mkldnn._reorder_linear_weight(m.weight.to(self.dtype), 512)
            yield
        finally:
            for m in maps:
                m.packed = None
            self.train(was_training)

    @torch.inference_mode()
    def embed(self, flat, starts, embeddings_only=False, progress=None, most=None):
        """Vectors (n, width) float32, in input order, of tokenised sentences; before any Normalize.

        Sorted by length and cut by a budget of tokens: padding costs almost nothing and memory
        stays bounded. progress: called with (done, all). most: sentences at once."""
        lengths = np.diff(starts)
        # Measured: a thread's activations should stay in its cache, a GPU wants to be filled.
        threads = min(16, torch.get_num_threads())
        on_cpu = threads * (512 if self.dtype == torch.bfloat16 else 256)
        budget = 2**16 if self.device.type == "cuda" else on_cpu
        order = np.argsort(-lengths, kind="stable")
        width = self.config.hidden_size if embeddings_only else self.config.width
        out = torch.empty(len(lengths), width, dtype=torch.float32, device=self.device)
        pays = len(flat) > 2**15 and has_onednn(self.device.type, self.dtype)  # some ms a call
        i = 0
        with self.at_work(pays):
            while i < len(order):
                n = max(1, min(most or len(order), budget // int(lengths[order[i]])))
                rows = order[i : i + n]
                out[put(rows, self.device)] = self(*self.batch(flat, starts, rows), embeddings_only)
                i += len(rows)
                if progress:
                    progress(i, len(order))
        out = out.cpu().numpy()
        need(np.isfinite(out).all(), "the model's vectors are not finite: are its weights damaged?")
        return out

    def encode(self, texts, normalize=None, prompt=None, progress=None, batch=None):
        """Texts -> float32 array (n, width) in input order; a single str -> (width,).

        texts: any iterable of str. normalize: unit vectors; prompt: put before every text; None:
        as the model's files say. progress: called with (done, all), such as data.meter("encode").
        batch: texts at once, at most. Raises: InputError with the index of what is no text."""
        single = isinstance(texts, str)
        texts = [texts] if single else list(texts)
        for i, t in enumerate(texts):
            if not isinstance(t, str) or re.search("[\ud800-\udfff]", t):  # half of a pair
                raise InputError(f"text {i} is {t!r:.60}, expected a str of whole characters")
        out = self.embed(*self.tokenize(texts, prompt), progress=progress, most=batch)
        normalize = self.config.normalize if normalize is None else normalize
        out = unit(out) if normalize else out
        return out[0] if single else out

    def save(self, folder, weights=None, new=True):
        """Write config.json, the tokenizer's two files and, last and in one move, the weights: what
        a failure leaves in a new folder is no model, and load() says so.

        weights: by our names; None: its own, in float32, int8 ones as they are. new: refuse a
        folder that is there. Names in the files are Hugging Face's.
        Raises: InputError, before anything is written, if the folder is there or a weight is not
        finite or was rounded by load(); OSError where it cannot be written: a full disk."""
        folder = Path(folder)
        need(not new or not folder.exists(), f"{folder}: is there already; choose another folder")
        if weights is None:
            rounded = next(self.layers.parameters()).dtype == torch.bfloat16
            need(not rounded, "its weights were rounded to bfloat16; load it with dtype='float32'")
            state = self.state_dict().items()
            weights = {k: t.float() if t.is_floating_point() else t for k, t in state}
        for name, t in weights.items():
            need(torch.isfinite(t).all(), f"{name} holds values that are not finite in {t.dtype}")
        c = {**vars(self.config), "position_embedding_type": "absolute"}
        c["hidden_dropout_prob"] = c["attention_probs_dropout_prob"] = c.pop("dropout")
        pad = self.tokenizer.id_to_token(self.config.pad_token_id)
        limits = {"pad_token": pad, "model_max_length": self.config.max_seq_length}
        limits["tokenizer_class"] = "PreTrainedTokenizerFast"
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in (("config.json", c), ("tokenizer_config.json", limits)):
            text = json.dumps(value, indent=1, sort_keys=True) + "\n"
            (folder / name).write_text(text, "utf-8")
        (folder / "tokenizer.json").write_text(self.tokenizer.to_str(), "utf-8")
        write_safetensors(folder / "model.safetensors", to_hf(weights))


def put(array, device):
    """A numpy array as a tensor on a device; a copy to a GPU does not wait for what it is doing."""
    t, on_gpu = torch.from_numpy(array), torch.device(device).type == "cuda"
    return (t.pin_memory() if on_gpu else t).to(device, non_blocking=on_gpu)


def unit(x):
    """Rows of x (..., H) at length 1; a zero row stays zero."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


# ------------------------------------------------------------------------------------ safetensors
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8}
DTYPES |= {"U8": torch.uint8, "BOOL": torch.bool}


def is_count(value, limit=2**62):
    """Is it a whole number from 0 to below the limit?"""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < limit


def read_safetensors(path, convert=None, fix=". Fetch or export it again"):
    """(tensors by name, metadata) of a safetensors file. Raises: InputError with the reason.

    Tensors are views of a private mapping of the file: a page costs memory when it is used.
    convert: called with (name, tensor) of one after the other, gives what is kept instead."""
    with reading(path, "a valid safetensors file", fix):
        with open(path, "rb") as f:
            data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
        body = 8 + int.from_bytes(data[:8], "little")
        if body > len(data):
            raise InputError(f"{len(data)} bytes, too short for its header: truncated or damaged")
        header = json.loads(data[8:body].decode("utf-8"))
        need(isinstance(header, dict), "the header is no JSON object")
        meta = header.pop("__metadata__", {})
        tensors, at = {}, body
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            kind, shape, size = _check_entry(name, entry, at - body, len(data) - body)
            raw = torch.from_numpy(np.frombuffer(data, np.uint8, size, at))
            raw = join([raw], torch.uint8) if at % kind.itemsize else raw  # not aligned
            tensors[name], at = raw.view(kind).view(shape), at + size
            if convert:
                tensors[name] = convert(name, tensors[name])
                if hasattr(data, "madvise"):  # let go of what was read; the file still has it
                    data.madvise(mmap.MADV_DONTNEED)
        need(at == len(data), f"the tensors end at byte {at} of {len(data)}: damaged")
    return tensors, meta


def _check_entry(name, entry, at, size):
    """(dtype, shape, bytes) of a tensor in a header, which is not to be trusted: it must begin at
    byte `at`, where the one before it ended, and end within the `size` bytes there are."""
    kind, shape, (start, end) = DTYPES.get(entry["dtype"]), entry["shape"], entry["data_offsets"]
    counts = type(shape) is list and all(map(is_count, [*shape, start, end]))
    if not (kind and counts and len(entry) == 3 and name.isprintable()):
        form = f"dtype (one of {', '.join(DTYPES)}), shape and data_offsets"
        raise InputError(f"{name!r} is {entry!r:.200}, expected exactly {form}")
    if start != at or end > size or end - start != math.prod(shape) * kind.itemsize:
        why = "truncated, an overlap, a hole or of another size"
        raise InputError(f"{name!r}, {entry!r:.200}, in {size} bytes from {at} on: {why}")
    return kind, shape, end - start


def write_safetensors(path, tensors, meta=None):
    """Write tensors by name as one safetensors file; equal tensors give equal bytes. Raises:
    OSError, and then the file is as it was before, and a part of PATH.new may be there."""
    new, names = Path(f"{path}.new"), {v: k for k, v in DTYPES.items()}
    # Widest dtypes first keeps every tensor aligned to its own item size; names break ties.
    order = sorted(tensors, key=lambda k: (-tensors[k].dtype.itemsize, k))
    header = {"__metadata__": {"format": "pt", **(meta or {})}}
    ends = [0, *itertools.accumulate(tensors[k].nbytes for k in order)]
    for name, *span in zip(order, ends, ends[1:]):
        t = tensors[name]
        header[name] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": span}
    text = json.dumps(header, separators=(",", ":"), sort_keys=True).encode()
    text += b" " * (-len(text) % 8)
    with open(new, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            f.write(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    new.replace(path)  # not before: the tensors may be views of the file that was there


# ------------------------------------------------------------------------------- names of weights
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


def to_hf(state):
    """Our names to Hugging Face's, of weights or gradients; qkv (3H, H) becomes three."""
    out = {}
    for name, t in state.items():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs, 1)
        names = [name.replace("qkv", part) for part in QKV] if "qkv" in name else [name]
        out.update(zip(names, t.chunk(len(names))))
    return out


def join(parts, dtype):
    """Tensors (m, ...) of one shape, copied one after the other: (len(parts) * m, ...); in pieces
    for which torch starts no threads, as a process forked then would wait for them for ever."""
    out = parts[0].new_empty((len(parts), *parts[0].shape), dtype=dtype)
    for part, place in zip(parts, out):
        for a, b in zip(place.view(-1).split(2**14), part.reshape(-1).split(2**14)):
            a.copy_(b)
    return out.view(-1, *parts[0].shape[1:])


def from_hf(tensors):
    """The inverse of to_hf, for use in reading(). Raises: InputError for what is no number, others
    where a query, key or value is missing or misshapen."""
    out = {}
    for name, t in tensors.items():
        for ours, theirs in NAMES.items():
            name = name.replace(theirs, ours, 1)
        numbers = t.is_floating_point() or t.dtype == torch.int8 and name.endswith("weight")
        need(numbers, f"{name} has dtype {t.dtype}, expected a floating one, or int8 weights")
        out[name] = t
    for name in [n for n in out if ".attention.self.query." in n]:
        parts = [out.pop(name.replace("query", part)) for part in QKV]
        joined = name.replace(".attention.self.query.", ".qkv.")
        kinds = [f"{p.dtype} {list(p.shape)}" for p in parts]
        need(len({*kinds}) == 1, f"{joined} has parts of several dtypes or sizes: {kinds}")
        out[joined] = join(parts, parts[0].dtype)
    return out


# ---------------------------------------------------------------------------- a folder's settings
FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert")
TYPES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
# What this encoder knows; the first is taken where a folder does not say.
KNOWN = {"model_type": FAMILIES, "hidden_act": tuple(ACTIVATIONS), "pooling": tuple(POOLINGS)}
KNOWN |= {"position_embedding_type": ("absolute",), "is_decoder": (False,)}
KNOWN |= {"truncation_side": ("right",), "truncate_dim": (None,)}


def collect(folder, modules=()):
    """{setting: (value, the file that says it)} of a folder's files. modules: settings in the
    same form that go before these, of tools/checkpoints.py."""
    file, beside = Path(folder, "config.json"), Path(folder, "tokenizer_config.json")
    said = {k: (v, file) for k, v in read_json(file).items()} | read_prompt(folder) | dict(modules)
    said = {k: v for k, v in said.items() if v[0] is not None and k != "dropout"}
    told = read_json(beside) if beside.exists() else {}
    if is_count(told.get("model_max_length"), 2**31):  # others write 1e30 for none
        said.setdefault("max_seq_length", (told["model_max_length"], beside))
    if "truncation_side" in told:
        said["truncation_side"] = told["truncation_side"], beside
    return said


def read_prompt(folder):
    """What a file of sentence-transformers sets for all texts, in the form of collect()."""
    file = Path(folder, "config_sentence_transformers.json")
    if not file.exists():
        return {}
    settings = read_json(file)
    name = settings.get("default_prompt_name")
    with reading(file, "prompts by name"):
        known = {None: "", "query": "", "document": ""} | (settings.get("prompts") or {})
        need(name in known, f"default_prompt_name {name!r} is not among them")
    return {"prompt": (known[name], file), "truncate_dim": (settings.get("truncate_dim"), file)}


def check_config(folder, said, pad_id):
    """The Config of what collect() found; pad_id: the tokenizer's. Raises: InputError naming the
    file, the value and what was expected, for a value of another type, not known here or odd."""
    file = Path(folder, "config.json")
    values = {f.name: f.default for f in fields(Config)} | {"type_vocab_size": 2}  # as in BERT
    values |= {"max_seq_length": 2**30} | {k: value for k, (value, _) in said.items()}

    def expect(ok, name, expected):
        if not ok:
            value, place = said.get(name, (None, file))
            raise InputError(f"{place}: {name} is {value!r}, expected {expected}")

    for name, known in KNOWN.items():
        expect(values.get(name, known[0]) in known, name, f"one of {', '.join(map(str, known))}")
    for f in (f for f in fields(Config) if f.type in TYPES):
        typed = type(values[f.name]) is f.type
        typed = typed and (f.type is not int or is_count(values[f.name], 2**31))
        expect(typed, f.name, TYPES[f.type])
    H, heads = values["hidden_size"], values["num_attention_heads"]
    expect(heads and H % heads == 0, "num_attention_heads", f"a divisor of hidden_size {H}")
    expect(0 < values["layer_norm_eps"] < 1, "layer_norm_eps", "a small positive number")
    expect(0 < values["recurrence"] < 1000, "recurrence", "1 to 999")
    agree = values["model_type"] == "bert" or said.get("pad_token_id", (pad_id,))[0] == pad_id
    expect(agree, "pad_token_id", f"{pad_id}, the tokenizer's: positions are counted from it")
    form = f"[width, one of {', '.join(ACTIVATIONS)}, bias] of each Dense"
    with reading(said.get("dense", ("", file))[1], form):
        dense = tuple((n, act, bias) for n, act, bias in values["dense"])
        known = (is_count(n, 2**31) and n and act in ACTIVATIONS for n, act, _ in dense)
        need(all(known) and all(type(bias) is bool for *_, bias in dense), values["dense"])
    values |= {"pad_token_id": pad_id, "dense": dense}
    config = Config(**{f.name: values[f.name] for f in fields(Config)})
    longest = min(config.max_seq_length, config.max_position_embeddings - config.first_position)
    expect(longest > 2, "max_seq_length", "over 2, and a position for each token")
    return replace(config, max_seq_length=longest)


def read_tokenizer(folder):
    """(tokenizer, pad id) of a folder: tokenizer.json, and the pad token that its files name, not
    config.json's pad id: it fills batches, RoBERTa counts positions from it, and the authors'
    MiniLM says 0, which is <s>. Raises: InputError without a pad token, or start and end."""
    file = Path(folder, "tokenizer.json")
    beside = [file.with_name(n) for n in ("special_tokens_map.json", "tokenizer_config.json")]
    names = [read_json(f).get("pad_token") for f in beside if f.exists()]
    names = [n.get("content") if isinstance(n, dict) else n for n in names] + ["<pad>", "[PAD]"]
    with reading(file, "a usable tokenizer", "; save it again with transformers"):
        tokenizer = Tokenizer.from_file(str(file))
        ids = [tokenizer.token_to_id(n) for n in names if isinstance(n, str)]
        pad_id = next((i for i in ids if i is not None), None)
        need(pad_id is not None, f"no pad token (looked for {names}); batches need one")
        tokenizer.no_padding()
        ends = tokenizer.encode("").ids
        need(len(ends) >= 2, "its post_processor adds no start and end tokens")
        need(pad_id not in ends, f"its pad token, id {pad_id}, is also its start or end token")
    return tokenizer, pad_id


# ---------------------------------------------------------------------------------------- loading
ELSEWHERE = "model.py alone does not open it; tools.checkpoints of the MSD project may"


def best_dtype(device):
    """(name, why): bfloat16 where the device multiplies it faster than float32."""
    if torch.device(device).type == "cuda":
        what, has = "GPU", torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        asks = "_is_amx_tile_supported", "_is_avx512_bf16_supported"  # from torch 2.5 on
        what, has = "CPU", any(getattr(torch.cpu, ask, bool)() for ask in asks)
    name = "bfloat16" if has else "float32"
    return name, f"the {what} has {'' if has else 'no '}bfloat16 units"


def arithmetic(dtype, device, train):
    """(dtype of the arithmetic, device, convert of read_safetensors), of the arguments of load."""
    need(dtype in (None, "float32", "bfloat16"), f"dtype {dtype!r}: expected float32 or bfloat16")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, dtype or best_dtype(device)[0])
    stored = torch.float32 if train else dtype  # master weights stay float32
    copy = train or torch.device(device).type != "cpu"

    def convert(name, t):
        # Neither int8 weights nor their steps, which, rounded, would move whole rows; and a table
        # that is not copied stays as the file stores it: rows are widened when looked up.
        fixed = not t.is_floating_point() or name.endswith(".scale")
        same = t.dtype == stored or name.endswith(TABLE)
        return t if fixed or same and not copy else join([t], stored).view(t.shape)

    return dtype, device, convert


def assemble(folder, config, tokenizer, state, dtype, device, train):
    """The Encoder of what was read from a folder. state: its weights, by our names. Raises:
    InputError where tokenizer, config and weights are not of one model."""
    ids = [tokenizer.get_vocab_size() - 1, *tokenizer.get_added_tokens_decoder()]
    if not isinstance(
        tokenizer.model, models.Unigram
    ):  # the one without gaps; listing it takes a while
        ids += tokenizer.get_vocab().values()
    if max(ids) >= config.vocab_size:
        few = f"token ids up to {max(ids)}, but the word table has {config.vocab_size} rows"
        raise InputError(f"{folder / 'tokenizer.json'}: {few}; not of one model")
    K = len({name.split(".")[1] for name in state if name.startswith("layers.")})
    if config.num_hidden_layers != K:  # before a wrong number of them is built
        wrong = f"num_hidden_layers is {config.num_hidden_layers}, expected {K}"
        raise InputError(f"{folder / 'config.json'}: {wrong}, the layers in the weights")
    with torch.device("meta"):  # shapes only: the weights are the file's, not copies
        model = Encoder(config, tokenizer, dtype)
    with reading(folder / "model.safetensors", "the weights that config.json describes"):
        model.load_state_dict(state, assign=True)  # lists what is missing, unexpected, misshapen
    if train and model.int8:
        raise InputError(f"{folder}: int8 weights cannot be trained; take the float32 model")
    # cuDNN's attention builds a plan for every new shape, and each of our batches has a new one.
    if torch.device(device).type != "cpu":
        torch.backends.cuda.enable_cudnn_sdp(False)
    return model.to(device).requires_grad_(train).train(train)


def load(folder, dtype=None, device=None, train=False):
    """An Encoder from a folder of this project or an ordinary one of BERT, RoBERTa or XLM-R.

    dtype: of the arithmetic, 'float32', 'bfloat16' or None, the best on this device. train: with
    float32 weights whatever the dtype. No code is run from a file.
    Raises: InputError naming the file and the fix for anything missing, damaged or unsupported."""
    folder = Path(folder)
    need(folder.is_dir(), f"{folder}: no such model directory")
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        need((folder / name).exists(), f"{folder / name}: no such file; {ELSEWHERE}")
    said = collect(folder)
    # A config.json of ours says what modules would; transformers signs what it writes over it.
    ours = "pooling" in said and "transformers_version" not in said
    if (folder / "modules.json").exists() and not ours:
        raise InputError(f"{folder}: made of sentence-transformers' modules; {ELSEWHERE}")
    dtype, device, convert = arithmetic(dtype, device, train)
    tokenizer, pad_id = read_tokenizer(folder)
    tensors, _ = read_safetensors(folder / "model.safetensors", convert)
    # What AutoModel saves, too, and no sentence vector needs.
    tensors = {k: t for k, t in tensors.items() if not re.match(r"pooler\.|.*position_ids$", k)}
    others = [k for k in tensors if not k.startswith(("embeddings.", "encoder.", "dense."))]
    need(not others, f"{folder}: {others[:3]} are no weights of an encoder; {ELSEWHERE}")
    with reading(folder, "an encoder's weights"):
        state = from_hf(tensors)
    config = check_config(folder, said, pad_id)
    return assemble(folder, config, tokenizer, state, dtype, device, train)
