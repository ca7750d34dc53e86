"""The encoder, and its weights in and out. Read bottom-up: files, configuration, layers, the model, loading.

Shapes, everywhere in this project: N sentences, T tokens, H hidden size, h heads, d = H / h, B bottleneck, V vocabulary.
"""
import contextlib
import json
import math
import mmap
import os
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn


class InputError(Exception):
    """What the user gave cannot be used. The message names the file, the value, what was expected and the fix."""


def need(ok, message):
    """Raises: InputError with the message unless ok."""
    if not ok:
        raise InputError(message)


# ---------------------------------------------------------------------------------------------------------------- files
def sync(path):
    """Flush a file or a folder to disk: a rename is only durable once its folder is, too."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def atomic(path):
    """Yield a temporary name beside `path`, a file's or a folder's; on success it takes the place of `path` by a rename,
    on failure it goes. A kill at any moment leaves a file's old content or its new, never a part; a folder likewise,
    where there was none before. Raises: InputError where it cannot be written, naming the path."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        host = os.uname().nodename                                              # machines may share a folder
        for old in path.parent.glob(f".{path.name}.tmp-{host}-*"):              # left by a process killed in a save
            if not os.path.exists(f"/proc/{old.name.split('-')[-1]}"):
                shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
        tmp = path.parent / f".{path.name}.tmp-{host}-{os.getpid()}"
        try:
            yield tmp
            for file in ([*tmp.rglob("*")] if tmp.is_dir() else []) + [tmp]:
                sync(file)
            if path.is_dir():
                os.rename(path, aside := path.parent / f".{path.name}.old.tmp-{host}-{os.getpid()}")
                os.replace(tmp, path)
                shutil.rmtree(aside)
            else:
                os.replace(tmp, path)
            sync(path.parent)
        finally:
            if tmp.exists():
                shutil.rmtree(tmp) if tmp.is_dir() else tmp.unlink()
    except OSError as e:
        raise InputError(f"{path}: cannot write ({e.strerror or e}); nothing there was changed. "
                         "Free some space or choose another folder, then run the same command again") from e


def read_json(path, kind=dict):
    """The value of a JSON file. Raises: InputError naming the file if it is missing, malformed or not of this kind."""
    try:
        value = json.loads(Path(path).read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{path}: not readable as JSON ({e})") from None
    need(isinstance(value, kind), f"{path}: expected a JSON {'list' if kind is list else 'object'}, found {type(value).__name__}")
    return value


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


def _no_duplicates(pairs):
    if len(pairs) != len(out := dict(pairs)):
        keys = [k for k, _ in pairs]
        raise ValueError(f"duplicate key {max(keys, key=keys.count)!r}")
    return out


def _count(value, limit=2 ** 62):
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < limit


def read_safetensors(path, to=None, copy=False):
    """(tensors by name, metadata) of a safetensors file. Tensors are views of a private mapping of the file: a page
    costs memory when it is first touched, and nothing is copied. With `to`, those of another floating dtype are
    converted, with `copy` all are copied, one at a time, and the pages they came from are given back.
    Raises: InputError with the file and the reason."""
    def check(ok, reason):
        need(ok, f"{path}: not a valid safetensors file: {reason}. Fetch or export it again")

    try:
        with open(path, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            check(size >= 8, f"{size} bytes, too short for a header")
            data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: cannot read ({e})") from None
    length = int.from_bytes(data[:8], "little")
    check(length <= size - 8, f"header of {length} bytes in a file of {size}; the file is truncated or damaged")
    try:
        header = json.loads(data[8:8 + length].decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as e:
        check(False, f"unreadable header ({e})")
    check(isinstance(header, dict), "the header is no JSON object")
    meta = header.pop("__metadata__", {})
    check(isinstance(meta, dict) and all(isinstance(v, str) for v in meta.values()), "metadata must map text to text")

    tensors, spans = {}, []
    for name, entry in header.items():
        check(name.isprintable() and isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"},
              f"{name!r} needs exactly dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        check(isinstance(dtype, str) and dtype in DTYPES, f"{name!r} has dtype {dtype!r}, known are {', '.join(DTYPES)}")
        check(all(isinstance(x, list) and all(map(_count, x)) for x in (shape, offsets)) and len(offsets) == 2,
              f"{name!r} has shape {shape!r} and offsets {offsets!r}")
        (a, b), kind = offsets, DTYPES[dtype]
        check(a <= b <= size - 8 - length, f"{name!r} ends at byte {b} of {size - 8 - length}; the file is truncated or damaged")
        check(b - a == math.prod(shape) * kind.itemsize, f"{name!r} is {dtype} {shape} but has {b - a} bytes")
        spans.append((a, b, name))
        start = 8 + length + a
        raw = torch.from_numpy(np.frombuffer(data, np.uint8, b - a, start))
        tensors[name] = (raw.clone() if start % kind.itemsize else raw).view(kind).view(shape)      # a foreign writer: align by a copy
        if copy or kind.is_floating_point and to not in (None, kind):
            tensors[name] = tensors[name].to(to if to and kind.is_floating_point else kind, copy=True)
            first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, (start + b - a) // mmap.PAGESIZE * mmap.PAGESIZE
            if last > first:
                data.madvise(mmap.MADV_DONTNEED, first, last - first)
    end = 0
    for a, b, name in sorted(spans):
        check(a == end, f"{name!r} starts at byte {a}, expected {end}: tensors overlap or leave a hole")
        end = b
    check(end == size - 8 - length, f"{size - 8 - length - end} bytes after the last tensor")
    return tensors, meta


def write_safetensors(path, tensors, meta=None):
    """Write tensors by name as one safetensors file, atomically; the same tensors give the same bytes."""
    names, header, offset = {v: k for k, v in DTYPES.items()}, {"__metadata__": {"format": "pt", **(meta or {})}}, 0
    # Widest dtypes first keeps every tensor aligned to its own item size; names break ties.
    order = sorted(tensors, key=lambda k: (-tensors[k].dtype.itemsize, k))
    for name in order:
        t = tensors[name]
        header[name] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": [offset, offset := offset + t.numel() * t.dtype.itemsize]}
    text = json.dumps(header, separators=(",", ":"), sort_keys=True).encode()
    text += b" " * (-len(text) % 8)
    with atomic(path) as tmp, open(tmp, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            f.write(flat.view(torch.uint8).numpy().data if flat.numel() else b"")


# -------------------------------------------------------------------------------------------------------- configuration
POOLINGS = ("mean", "cls", "max", "mean_sqrt_len")
ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu,
               "gelu_new": lambda x: F.gelu(x, approximate="tanh"), "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh")}


@dataclass(frozen=True)
class Config:
    """The shape of an encoder. Field names are those of Hugging Face's config.json where it has them."""
    vocab_size: int                       # V, rows of the word table
    hidden_size: int                      # H
    num_hidden_layers: int                # K, unique layers
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    model_type: str = "bert"              # bert: positions 0..T-1; roberta, xlm-roberta: pad_id + 1, + 2, ...
    type_vocab_size: int = 1
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"              # exact (erf) GELU
    pad_token_id: int = 0                 # the tokenizer's; this word row has no gradient
    dropout: float = 0.0                  # in training only; presets set it
    recurrence: int = 1                   # R: the K layers are applied R times in the order 1..K, 1..K, ...
    bottleneck_size: int = 0              # B; 0: no bottleneck, the word table is (V, H)
    pooling: str = "mean"
    normalize: bool = False               # encode() returns unit vectors (a sentence-transformers Normalize module)
    max_seq_length: int = 128             # tokens, start and end included
    do_lower_case: bool = False           # lower-case before the tokenizer (sentence_bert_config.json)

    @property
    def first_position(self):
        return self.pad_token_id + 1 if self.model_type != "bert" else 0


# What a config.json may leave out; None: the weights or the tokenizer tell.
DEFAULTS = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "type_vocab_size": 2, "recurrence": None, "bottleneck_size": None, "pad_token_id": None,
            "pooling": "mean", "normalize": False}
REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings")
FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert")


def read_config(folder, pad_id, table, layers):
    """The Config of a model directory: config.json, completed by sentence-transformers' modules.json and its kin.

    pad_id: the tokenizer's; table: shape of the word table in the weights; layers: how many layers the weights hold.
    Both repair what a config.json of the authors' students does not say: B, K and R."""
    folder, modules = _modules(Path(folder))
    file = folder / "config.json"
    raw = {**DEFAULTS, **read_json(file), **modules}

    def check(ok, name, expected):
        need(ok, f"{file}: {name} is {raw.get(name)!r}, expected {expected}")

    check(raw.get("model_type") in FAMILIES, "model_type", f"one of {', '.join(FAMILIES)}; other families are not supported")
    for name in REQUIRED:
        check(_count(raw.get(name), 2 ** 31) and raw[name] > 0, name, "a positive whole number")
    check(raw["hidden_size"] % raw["num_attention_heads"] == 0, "num_attention_heads", f"a divisor of hidden_size {raw['hidden_size']}")
    check(raw["hidden_act"] in list(ACTIVATIONS), "hidden_act", f"one of {', '.join(ACTIVATIONS)}")
    check(raw.get("position_embedding_type", "absolute") == "absolute", "position_embedding_type", "'absolute'")
    check(raw.get("is_decoder", False) is False, "is_decoder", "false")
    check(isinstance(raw["layer_norm_eps"], float) and 0 < raw["layer_norm_eps"] < 1, "layer_norm_eps", "a small positive number")
    for name in ("recurrence", "bottleneck_size", "pad_token_id", "type_vocab_size"):
        check(raw[name] is None and DEFAULTS[name] is None or _count(raw[name], 1000 if name == "recurrence" else 2 ** 31), name, "a whole number")
    check(raw["vocab_size"] == table[0], "vocab_size", f"{table[0]}, the rows of the word table in the weights")
    B = table[1] if table[1] != raw["hidden_size"] or raw["bottleneck_size"] else 0
    # The authors' students keep the assistant's config.json: their depth K x R is its num_hidden_layers. Without their
    # bottleneck, fewer layers than config.json says are a damaged file.
    depth, K = raw["num_hidden_layers"], layers
    R = raw["recurrence"] or (depth // K if B and K and depth % K == 0 else 1)
    check(K == depth or (raw["recurrence"] is None and K * R == depth), "num_hidden_layers", f"{K}, the layers in the weights")
    check(raw["bottleneck_size"] in (None, B), "bottleneck_size", f"{B}, the width of the word table in the weights")
    if raw["model_type"] != "bert":                     # positions hang on it, so a disagreement cannot be repaired
        check(raw["pad_token_id"] in (None, pad_id), "pad_token_id", f"{pad_id}, the tokenizer's, as positions count from it")
    check(raw["pooling"] in POOLINGS, "pooling", f"one of {', '.join(POOLINGS)}")
    check(isinstance(raw["normalize"], bool), "normalize", "true or false")
    raw.update(num_hidden_layers=K, recurrence=R, bottleneck_size=B, pad_token_id=pad_id)
    config = Config(**{k: raw[k] for k in ("model_type", *REQUIRED, *DEFAULTS)})
    # Maximum length and lower-casing: ours in config.json, sentence-transformers' beside it.
    beside = folder / "sentence_bert_config.json"
    settings, place = (read_json(beside), beside) if modules and beside.exists() else (raw, file)
    limit = config.max_position_embeddings - config.first_position
    tokens, lower = (default if settings.get(k) is None else settings[k] for k, default in (("max_seq_length", limit), ("do_lower_case", False)))
    need(_count(tokens) and min(tokens, limit) > 2 and isinstance(lower, bool), f"{place}: max_seq_length {tokens!r} ({limit} positions), "
         f"do_lower_case {lower!r}; expected whole numbers over 2, and true or false")
    return replace(config, max_seq_length=min(tokens, limit), do_lower_case=lower)


def _modules(root):
    """(folder of the transformer, {"pooling", "normalize"}) from a sentence-transformers modules.json, where there is one."""
    file, known = root / "modules.json", ["Transformer", "Pooling", "Normalize"]
    if not file.exists():
        return root, {}
    try:
        kinds = [(m["type"].rsplit(".", 1)[-1], root / m["path"]) for m in read_json(file, list)]
    except (KeyError, TypeError, AttributeError) as e:
        raise InputError(f"{file}: not a list of modules with type and path ({e})") from None
    names = [k for k, _ in kinds]
    for name in names:
        need(name in known, f"{file}: module {name} is not supported, only {', '.join(known)}")
    need(names in (known, known[:2]), f"{file}: modules {names}, expected Transformer, Pooling and perhaps Normalize, in this order")
    file = kinds[1][1] / "config.json"
    raw = read_json(file)
    modes = [raw["pooling_mode"]] if "pooling_mode" in raw else [       # pooling_mode_mean_tokens, pooling_mode_cls_token, ...
        re.sub("^pooling_mode_|_tokens?$", "", k) for k, v in raw.items() if k.startswith("pooling_mode_") and v is not False]
    need(len(modes) == 1 and modes[0] in POOLINGS, f"{file}: pooling {modes}, expected exactly one of {', '.join(POOLINGS)}")
    return kinds[0][1], {"pooling": modes[0], "normalize": len(names) == 3}


# --------------------------------------------------------------------------------------------------------------- layers
class Linear(nn.Linear):
    """A linear map whose weights follow the dtype of its input. Master weights stay float32 and are cast once a call:
    autocast does the same with more copies, which cost more than the products at these sizes."""
    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Embeddings(nn.Module):
    """Ids to vectors. With a bottleneck the word table is (V, B), followed by a map B -> H without bias."""
    def __init__(self, c):
        super().__init__()
        self.config, width = c, c.bottleneck_size or c.hidden_size
        self.word = nn.Embedding(c.vocab_size, width, padding_idx=c.pad_token_id)
        self.project = Linear(width, c.hidden_size, bias=False) if c.bottleneck_size else None
        self.position = nn.Embedding(c.max_position_embeddings, c.hidden_size)
        self.token_type = nn.Embedding(c.type_vocab_size, c.hidden_size)
        self.norm = LayerNorm(c.hidden_size, eps=c.layer_norm_eps)

    def forward(self, ids, dtype):                                                     # ids (N, T)
        c = self.config
        if c.model_type == "bert":
            position = torch.arange(ids.shape[1], device=ids.device)                   # (T,)
        else:                                                                          # pads stay at pad_id
            real = (ids != c.pad_token_id).long()
            position = real.cumsum(1) * real + c.pad_token_id                          # (N, T)
        x = self.word(ids).to(dtype)                                                   # (N, T, B or H)
        x = self.project(x) if self.project is not None else x
        x = x + (self.position(position) + self.token_type.weight[0]).to(dtype)        # type id 0: one segment
        return F.dropout(self.norm(x), c.dropout, self.training)                       # (N, T, H)


def plain_attention(q, k, v, bias, dropout=0.0):
    """softmax(q k' / sqrt(d) + bias) v, written out; q, k, v (N, h, T, d), bias (N, 1, 1, T) or None.

    The path on CPU in training, where SDPA's backward pass costs more than these two products at sentence lengths, and for
    short sentences in bfloat16, where its forward pass does, too."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5                             # (N, h, T, T)
    # Computed in float32: more exact, and twice as fast as bfloat16's own kernel at lengths that are no multiple of 32.
    weights = F.softmax(scores if bias is None else scores + bias, dim=-1, dtype=torch.float32).to(v.dtype)
    return F.dropout(weights, dropout, dropout > 0) @ v                                # (N, h, T, d)


class Layer(nn.Module):
    """One post-LayerNorm transformer layer, as in BERT."""
    def __init__(self, c):
        super().__init__()
        H, self.config = c.hidden_size, c
        self.qkv, self.out, self.norm1 = Linear(H, 3 * H), Linear(H, H), LayerNorm(H, eps=c.layer_norm_eps)
        self.up, self.down, self.norm2 = Linear(H, c.intermediate_size), Linear(c.intermediate_size, H), LayerNorm(H, eps=c.layer_norm_eps)

    def forward(self, x, bias):                                                        # x (N, T, H)
        c, (N, T, H) = self.config, x.shape
        p = c.dropout if self.training else 0.0
        q, k, v = self.qkv(x).view(N, T, 3, c.num_attention_heads, -1).permute(2, 0, 3, 1, 4)   # each (N, h, T, d)
        if x.device.type == "cpu" and (torch.is_grad_enabled() or T <= 32 and x.dtype == torch.bfloat16):
            a = plain_attention(q, k, v, bias, p)
        else:
            a = F.scaled_dot_product_attention(q, k, v, bias, dropout_p=p)
        a = self.out(a.transpose(1, 2).reshape(N, T, H))                               # heads side by side again
        x = self.norm1(x + F.dropout(a, p, self.training))
        y = self.down(ACTIVATIONS[c.hidden_act](self.up(x)))
        return self.norm2(x + F.dropout(y, p, self.training))


def pool(x, mask, how):
    """(N, T, H) -> (N, H) float32 over the real tokens, start and end included. The only pooling in this project."""
    x, m = x.float(), mask.unsqueeze(-1).float()                                       # m (N, T, 1)
    if how == "cls":
        return x[:, 0]
    if how == "max":
        return x.masked_fill(m == 0, -math.inf).amax(1)
    n = m.sum(1).clamp(min=1)
    return (x * m).sum(1) / (n if how == "mean" else n.sqrt())


# ------------------------------------------------------------------------------------------------------------ the model
class Encoder(nn.Module):
    """Sentences to vectors: embedding block, K layers applied R times, pooling."""
    def __init__(self, config, tokenizer=None, dtype=torch.float32):
        super().__init__()
        self.config, self.dtype = config, dtype                # dtype of the arithmetic; the weights have their own
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.tokenizer = tokenizer
        if tokenizer is not None:
            tokenizer.enable_truncation(config.max_seq_length)

    @property
    def device(self):
        return self.embeddings.word.weight.device

    def hidden(self, ids, mask, layers=True):
        """ids, mask (N, T) -> (N, T, H). layers=False stops after the embedding block (stage 2)."""
        x = self.embeddings(ids, self.dtype)
        bias = None                                            # asking a GPU whether there is padding would wait for it
        if mask.device.type != "cpu" or not mask.all():
            bias = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, torch.finfo(x.dtype).min)[:, None, None]   # (N, 1, 1, T)
        for _ in range(self.config.recurrence if layers else 0):
            for layer in self.layers:                          # cycle order 1..K, 1..K, ...
                x = layer(x, bias)
        return x

    def forward(self, ids, mask, layers=True):
        """ids, mask (N, T) -> sentence vectors (N, H), float32, before any Normalize."""
        return pool(self.hidden(ids, mask, layers), mask, self.config.pooling)

    def tokenize(self, texts):
        """Texts -> (flat ids (sum of lengths,) uint32, starts (n + 1,) int64), truncated to max_seq_length."""
        texts = [t.strip() for t in texts]
        texts = [t.lower() for t in texts] if self.config.do_lower_case else texts
        ids = [e.ids for e in self.tokenizer.encode_batch_fast(texts)]
        starts = np.concatenate([[0], np.cumsum([len(i) for i in ids], dtype=np.int64)])
        return np.concatenate([np.asarray(i, np.uint32) for i in ids] + [np.zeros(0, np.uint32)]), starts

    @torch.inference_mode()
    def embed(self, flat, starts, layers=True, budget=None):
        """Vectors (n, H) float32, in input order, of tokenised sentences; before any Normalize.

        Sorted by length and cut by a budget of tokens: padding costs almost nothing and memory stays bounded. The budget
        is measured: on a CPU the activations should stay in its cache, a GPU wants to be filled."""
        was_training, lengths = self.training, np.diff(starts)
        self.eval()
        budget = budget or (2 ** 16 if self.device.type == "cuda" else 2048 if self.dtype == torch.bfloat16 else 1024)
        order, out, i = np.argsort(-lengths, kind="stable"), torch.empty(len(lengths), self.config.hidden_size, device=self.device), 0
        while i < len(order):
            rows = order[i:i + max(1, budget // int(lengths[order[i]]))]
            ids, mask = (put(a, self.device) for a in pad(flat, starts, rows, self.config.pad_token_id))
            out[put(rows, self.device)] = self(ids, mask, layers)
            i += len(rows)
        self.train(was_training)
        return out.cpu().numpy()

    def encode(self, texts, normalize=None):
        """list of str -> float32 array (n, H) in input order. normalize: unit vectors; None: as the model's files say."""
        if isinstance(texts, str) or not all(isinstance(t, str) for t in texts):
            raise TypeError("encode() takes a list of strings")
        out = self.embed(*self.tokenize(texts))
        return unit(out) if (self.config.normalize if normalize is None else normalize) else out

    def save(self, folder):
        """Write a self-describing model directory, atomically: config.json, tokenizer.json, model.safetensors (float32).
        Names are Hugging Face's, so a model without bottleneck and recurrence opens there as well."""
        c = {**vars(self.config), "position_embedding_type": "absolute"}
        c["hidden_dropout_prob"] = c["attention_probs_dropout_prob"] = c.pop("dropout")
        with atomic(folder) as tmp:
            tmp.mkdir()
            (tmp / "config.json").write_text(json.dumps(c, indent=1, sort_keys=True) + "\n", "utf-8")
            (tmp / "tokenizer.json").write_text(self.tokenizer.to_str(pretty=True), "utf-8")
            write_safetensors(tmp / "model.safetensors", {k: v.float() for k, v in to_hf(self.state_dict()).items()})


def pad(flat, starts, rows, pad_id):
    """Rows of a flat token store -> ids (N, T) int64 and mask (N, T) bool, without a Python loop over sentences."""
    start, n = starts[rows], starts[rows + 1] - starts[rows]                           # (N,)
    t = np.arange(max(int(n.max()), 1))
    mask = t < n[:, None]                                                              # (N, T)
    ids = np.full(mask.shape, pad_id, np.int64)
    ids[mask] = flat[(start[:, None] + t)[mask]]
    return ids, mask


def unit(x):
    """Rows of x (..., H) at length 1; a zero row stays zero."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def put(array, device):
    """A numpy array as a tensor on a device; the copy to a GPU does not wait for what the GPU is doing."""
    t = torch.from_numpy(array)
    return t.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else t.to(device)


# ------------------------------------------------------------------------------------------------------ weights by name
NAMES = {"embeddings.word.": "embeddings.word_embeddings.", "embeddings.project.": "embeddings.word_embeddings_2.",   # _2: the authors' name
         "embeddings.position.": "embeddings.position_embeddings.", "embeddings.token_type.": "embeddings.token_type_embeddings.",
         "embeddings.norm.": "embeddings.LayerNorm.", "layers.": "encoder.layer.", ".out.": ".attention.output.dense.",
         ".norm1.": ".attention.output.LayerNorm.", ".up.": ".intermediate.dense.", ".down.": ".output.dense.", ".norm2.": ".output.LayerNorm."}
QKV = ["attention.self.query", "attention.self.key", "attention.self.value"]


def to_hf(state):
    """Our names to Hugging Face's; the fused qkv (3H, H) becomes query, key and value. For weights and gradients alike."""
    out = {}
    for name, t in state.items():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs, 1)
        names = [name.replace("qkv", part) for part in QKV] if "qkv" in name else [name]
        out.update(zip(names, t.chunk(len(names))))
    return out


def from_hf(tensors):
    """Hugging Face's names to ours: the inverse of to_hf. Names it does not know, and a query, key or value that stands
    alone, pass through, for a strict load to list."""
    out, tensors = {}, dict(tensors)
    for query in [name for name in tensors if QKV[0] in name]:
        parts = [query.replace(QKV[0], part) for part in QKV]
        if tensors[query].dim() and all(p in tensors and tensors[p].shape == tensors[query].shape for p in parts):
            tensors[query.replace(QKV[0], "qkv")] = torch.cat([tensors.pop(p) for p in parts])
    for name, t in tensors.items():
        for ours, theirs in sorted(NAMES.items(), key=lambda item: -len(item[1])):
            name = name.replace(theirs, ours, 1)
        out[name] = t
    return out


def read_weights(folder, to=None, copy=False):
    """All tensors of a directory by our names, pooler and position_ids left out; to, copy: as in read_safetensors."""
    folder = Path(folder)
    file, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if file.exists():
        tensors = read_safetensors(file, to, copy)[0]
    elif index.exists():
        shards, tensors = read_json(index).get("weight_map"), {}
        if not isinstance(shards, dict) or not all(isinstance(s, str) and Path(s).name == s for s in shards.values()):
            raise InputError(f"{index}: weight_map must map tensor names to files beside it")
        for shard in sorted(set(shards.values())):
            part = read_safetensors(folder / shard, to, copy)[0]
            if set(part) != {k for k, s in shards.items() if s == shard}:
                raise InputError(f"{folder / shard}: its tensors are not those that {index.name} lists for it")
            tensors.update(part)
    else:
        old = next((n for n in ("pytorch_model.bin", "tf_model.h5", "model.ckpt.index") if (folder / n).exists()), None)
        raise InputError(f"{file}: no such file" + (f"; {old} is there, but it may run code when read. Convert it once, with transformers: "
                         f"AutoModel.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})" if old else ""))
    out = {}
    for name, t in tensors.items():
        short = name.removeprefix("bert.").removeprefix("roberta.")
        short = short.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if short.startswith("pooler.") or short.endswith("position_ids"):
            continue
        need(short not in out, f"{folder}: weight {name} is there twice")
        need(t.is_floating_point(), f"{folder}: weight {name} has dtype {t.dtype}, expected a floating one")
        need(torch.isfinite(t.sum()), f"{folder}: weight {name} holds values that are not finite; the model is broken, use another checkpoint")
        out[short] = t
    return from_hf(out)


def read_tokenizer(folder):
    """(tokenizer, pad id) of a directory: tokenizer.json, its pad token, and start and end tokens that it adds itself."""
    folder = Path(folder)
    file = folder / "tokenizer.json"
    if not file.exists():
        old = next((n for n in ("sentencepiece.bpe.model", "spiece.model", "vocab.txt", "vocab.json") if (folder / n).exists()), None)
        raise InputError(f"{file}: no such file" + (f"; {old} is there. Convert it once, with transformers: "
                         f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})" if old else ""))
    try:
        tokenizer = Tokenizer.from_str(file.read_text("utf-8"))
    except Exception as e:                                       # tokenizers raises bare Exception; this re-raises with the name
        raise InputError(f"{file}: not a readable tokenizer ({e})") from None
    names = [read_json(f).get("pad_token") for f in (folder / "special_tokens_map.json", folder / "tokenizer_config.json") if f.exists()]
    names = [n.get("content") if isinstance(n, dict) else n for n in names] + ["<pad>", "[PAD]"]
    pad_id = next((i for n in names if isinstance(n, str) and (i := tokenizer.token_to_id(n)) is not None), None)
    if pad_id is None:
        raise InputError(f"{file}: no pad token (looked for {', '.join(repr(n) for n in dict.fromkeys(names) if n)}); "
                         "batches cannot be formed without one")
    tokenizer.no_padding()
    ends = tokenizer.encode("").ids
    if len(ends) < 2:
        raise InputError(f"{file}: adds no start and end tokens to a sentence; its post_processor is missing. Save it again with transformers")
    if pad_id in ends:
        raise InputError(f"{file}: its pad token has id {pad_id}, which is also that of its start or end token; expected one of its own")
    return tokenizer, pad_id


def best_dtype(device):
    """(dtype, why): bfloat16 where the device multiplies it faster than float32."""
    if torch.device(device).type == "cuda":
        what, has = "GPU", torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        what, has = "CPU", torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return (torch.bfloat16, f"the {what} has bfloat16 units") if has else (torch.float32, f"the {what} has no bfloat16 units")


def load(folder, dtype=None, device=None, train=False, dropout=0.0, max_tokens=math.inf):
    """An Encoder from a model directory: this project's, sentence-transformers', plain Hugging Face (BERT and RoBERTa
    families), or the authors' students. Never runs code from a file.

    dtype: 'float32', 'bfloat16' or None, the best on this device. train: keep float32 master weights whatever the dtype.
    dropout: in training; max_tokens: truncate to fewer tokens than the files say.
    Raises: InputError naming the file and the fix for anything missing, damaged or unsupported."""
    root = Path(folder)
    need(root.is_dir(), f"{root}: no such model directory; expected config.json, tokenizer.json and model.safetensors in it")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    need(dtype in (None, "float32", "bfloat16"), f"dtype {dtype!r}: expected 'float32', 'bfloat16' or None")
    kind = getattr(torch, dtype) if dtype else best_dtype(device)[0]
    body = _modules(root)[0]
    tokenizer, pad_id = read_tokenizer(body)
    state = read_weights(body, torch.float32 if train else kind, copy=train)
    table = state.get("embeddings.word.weight")
    need(table is not None and table.dim() == 2, f"{body / 'model.safetensors'}: no 2-dimensional embeddings.word_embeddings.weight in it; "
         "not an encoder of a supported family")
    layers = len({k.split(".")[1] for k in state if k.startswith("layers.")})
    config = read_config(root, pad_id, table.shape, layers)
    config = replace(config, dropout=dropout, max_seq_length=min(config.max_seq_length, max_tokens))
    largest = max(*tokenizer.get_vocab().values(), *tokenizer.encode("").ids)
    need(largest < config.vocab_size, f"{body / 'tokenizer.json'}: token ids up to {largest}, but the word table has {config.vocab_size} rows; "
         "they are not of one model")
    with torch.device("meta"):                                   # shapes only: the weights are the file's, not copies
        model = Encoder(config, tokenizer, kind)
    want = {k: v.shape for k, v in model.state_dict().items()}
    faults = [f"missing {k}" for k in want if k not in state] + [f"unexpected {k}" for k in state if k not in want] + [
        f"{k} has shape {tuple(state[k].shape)}, expected {tuple(s)}" for k, s in want.items() if k in state and state[k].shape != s]
    need(not faults, f"{body}: {len(faults)} weights do not fit config.json: {'; '.join(faults[:12])}{' ...' * (len(faults) > 12)}")
    model.load_state_dict(state, assign=True)
    return model.to(device).requires_grad_(train).train(train)
