"""Anybody's checkpoints: what model.load() opens, and what else people have.

load(folder) reads sentence-transformers' modules (Transformer, Pooling, Dense, Normalize,
prompts), strips heads and the prefixes of wrappers, joins shards, takes position tables of
another length and the authors' students; then model.py assembles the encoder.
"""

import math
import re
from dataclasses import replace
from pathlib import Path

from tokenizers import normalizers

import model as M
from data import digest, note
from model import InputError, is_count, need, read_json, reading

TEACHERS = "all-MiniLM-L6-v2, all-distilroberta-v1, paraphrase-MiniLM-L12-v2"  # that work
POOLING = {  # sentence-transformers' names and ours
    "cls_token": "cls",
    "mean_tokens": "mean",
    "max_tokens": "max",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
}
# What pretraining and classifiers leave in a checkpoint; no sentence vector needs it.
HEADS = {"pooler", "lm_head", "cls", "classifier", "pre_classifier", "qa_outputs", "score"}
HEADS |= {"vocab_transform", "vocab_layer_norm", "vocab_projector"}
# What a directory may hold in place of the file that is read here.
OLD = {
    "model.safetensors": ("pytorch_model.bin", "tf_model.h5", "model.ckpt.index"),
    "tokenizer.json": ("sentencepiece.bpe.model", "spiece.model", "vocab.txt", "vocab.json"),
}
# What load() reads in a folder beside the weights; nothing else changes a fingerprint.
SETTINGS = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
SETTINGS += ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")


# ---------------------------------------------------------------------------------------- loading
def load(folder, dtype=None, device=None, train=False, dropout=0.0, max_tokens=math.inf):
    """An Encoder from a model directory; never runs code from a file.

    folder: this project's, sentence-transformers', plain Hugging Face (BERT and RoBERTa families),
    or the authors' students. dtype: 'float32', 'bfloat16' or None, the best on this device.
    train: keep float32 master weights whatever the dtype. dropout: in training.
    max_tokens: truncate to fewer tokens than the files say, start and end included.
    Weights are views of the file: replace it by renaming, never in place, or hold
    copy.deepcopy(load(folder)). A process may fork after load(); after encode() use spawn.
    Raises: InputError naming the file and the fix for anything missing, damaged or unsupported.
    """
    need(max_tokens > 2, f"max_tokens is {max_tokens}, expected 3 or more: start and end count")
    dtype, device, convert = M.arithmetic(dtype, device, train)
    body, dense, modules = read_modules(folder)
    must_exist(body / "tokenizer.json", "AutoTokenizer.from_pretrained", body)
    tokenizer, pad_id = M.read_tokenizer(body)
    state = read_weights(body, convert)
    for i, file in enumerate(place / "model.safetensors" for place in dense):
        must_exist(file, "SentenceTransformer", folder)
        found, _ = M.read_safetensors(file, lambda _, t: t.float())
        state |= {f"dense.{i}.{k}": t for k, t in found.items()}
    said = M.collect(body, modules)
    lower_case, _ = said.pop("do_lower_case", (False, None))
    cut, file = said.pop("truncate_dim", (None, None))
    shapes = {k: tuple(t.shape) for k, t in state.items()}
    config = M.check_config(body, said | complete(said, shapes, body / "config.json"), pad_id)
    if not (cut is None or is_count(cut) and cut >= config.width):
        least = f"none, or {config.width} and more"
        raise InputError(f"{file}: truncate_dim is {cut!r}, expected {least}")
    if lower_case:
        steps = [normalizers.Lowercase(), tokenizer.normalizer or normalizers.Sequence([])]
        tokenizer.normalizer = normalizers.Sequence(steps)
    n = tokenizer.get_vocab_size()
    if config.vocab_size > n + 1024:  # tables are often filled up, but by less
        few = f"{n} pieces for {config.vocab_size} rows of the word table"
        note(f"{body / 'tokenizer.json'}: {few}; is it another model's?")
    length = min(config.max_seq_length, max_tokens)
    config = replace(config, dropout=dropout, max_seq_length=length)
    return M.assemble(body, config, tokenizer, state, dtype, device, train)


def complete(said, shapes, file):
    """Settings that the weights know better than config.json, `file`, as M.collect() gives them.

    The authors' students say nothing of B, K and R, and position tables are often cut or extended.
    Raises: InputError for an unknown model type, and for a word table of another size.
    """
    values = {name: value for name, (value, _) in said.items()}

    def expect(ok, name, expected):
        if not ok:
            raise InputError(f"{file}: {name} is {values.get(name)!r}, expected {expected}")

    families = f"one of {', '.join(M.FAMILIES)}. Teachers that work: {TEACHERS}"
    expect(values.get("model_type") in (None, *M.FAMILIES), "model_type", families)
    V, width = shapes["embeddings.word.weight"]
    expect(values.get("vocab_size") == V, "vocab_size", f"{V}, the rows of the word table")
    B = width if width != values.get("hidden_size") or values.get("bottleneck_size") else 0
    agree = values.get("bottleneck_size") in (None, B)
    expect(agree, "bottleneck_size", f"{B}, the width of the word table in the weights")
    found = {"bottleneck_size": B}
    # The authors' students keep the assistant's config.json: their K x R is its number of layers.
    # Without their bottleneck, fewer layers than config.json says are a damaged file.
    depth = values.get("num_hidden_layers")
    K = len({k.split(".")[1] for k in shapes if k.startswith("layers.")})
    if "recurrence" not in said and B and K and is_count(depth) and depth % K == 0:
        found |= {"num_hidden_layers": K, "recurrence": depth // K}
    positions = values.get("max_position_embeddings")
    P = shapes.get("embeddings.position.weight", [positions])[0]
    if P != positions:
        found["max_position_embeddings"] = P
        note(f"{file}: {positions} positions, the table in the weights has {P}")
    return {name: (value, file) for name, value in found.items()}


def fingerprint(folder):
    """Names a model directory by what load() reads. Raises: InputError where there is none."""
    body, dense, said = read_modules(folder)
    files = [place / name for place in (body, *dense) for name in SETTINGS]
    files += [f for place in (body, *dense) for f in weight_files(place)]
    files = sorted(f for f in files if f.exists())
    return digest(sorted((name, value) for name, (value, _) in said.items()), *files)


# ---------------------------------------------------------------------------------------- weights
def weight_files(folder):
    """The weights' files in a folder: one, or the shards of an index, which comes with them."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists() or not index.exists():
        return [single]
    listed = read_json(index)
    with reading(index, "a weight_map from tensor names to files beside it"):
        return [folder / Path(f).name for f in sorted(set(listed["weight_map"].values()))]


def read_weights(folder, convert):
    """All tensors of an encoder's directory by our names; convert: as in read_safetensors.

    Raises: InputError for files that are missing or damaged, and for weights that are there twice
    or of no floating dtype.
    """
    tensors = {}
    for file in weight_files(folder):
        must_exist(file, "AutoModel.from_pretrained", folder)
        found, _ = M.read_safetensors(file, convert)
        need(tensors.keys().isdisjoint(found), f"{file}: holds what another file holds, too")
        tensors |= found
    with reading(folder, "an encoder's weights"):
        state = M.from_hf(body_of(tensors, folder))
        table = state.get("embeddings.word.weight")
        need(table is not None and table.dim() == 2, f"no 2-dimensional {M.TABLE}")
    return state


def body_of(tensors, folder):
    """The tensors of the encoder in anybody's checkpoint, by Hugging Face's bare names.

    It is where the word table is, whatever a training wrapper put before or between; heads are left
    out. What is no known head stays, for a strict load to list.
    Raises: InputError for two encoders, and for a weight that is there twice.
    """
    clean = []
    for name, t in tensors.items():  # without module., _orig_mod., _fsdp_wrapped_module. and kin
        name = ".".join(p for p in name.split(".") if p != "module" and not p.startswith("_"))
        name = name.replace("Norm.gamma", "Norm.weight")  # TensorFlow's names
        clean.append((name.replace("Norm.beta", "Norm.bias"), t))
    tables = {name.removesuffix(M.TABLE) for name, _ in clean if name.endswith(M.TABLE)}
    if len(tables) > 1:
        raise InputError(f"{folder}: encoders under {sorted(tables)}; keep one of them in the file")
    prefix, out, heads = "".join(tables), {}, set()
    for name, t in clean:
        name = name.removeprefix(prefix)
        found = HEADS.intersection(name.split("."))
        if found and not name.startswith(("embeddings.", "encoder.")):
            heads |= found
        elif not name.endswith("position_ids"):
            need(name not in out, f"{name} is there twice")
            out[name] = t
    if heads - {"pooler"}:
        needless = ", ".join(sorted(heads))
        note(f"{folder}: left out, as an encoder does not need them: {needless}")
    return out


def must_exist(file, opener, folder):
    """Raises: InputError where `file` is missing, with how `opener` makes it of what is there."""
    old = next((n for n in OLD.get(file.name, ()) if file.with_name(n).exists()), None)
    risk = ", but it may run code when read" if old == "pytorch_model.bin" else ""
    fix = f"{opener}({str(folder)!r}).save_pretrained({str(folder)!r})"
    there = f"; {old} is there{risk}. Convert it once, with transformers: {fix}" if old else ""
    need(file.exists(), f"{file}: no such file{there}")


# ----------------------------------------------------------------- modules of sentence-transformers
def read_modules(root):
    """(the transformer's folder, those of Dense modules, {setting: (value, file that says it)}).

    From sentence-transformers' files; without a modules.json, `root` itself and nothing else.
    Raises: InputError for modules that are not supported.
    """
    root = Path(root)
    expected = "config.json, tokenizer.json and model.safetensors in it"
    need(root.is_dir(), f"{root}: no such model directory; expected {expected}")
    file = root / "modules.json"
    if not file.exists():
        return root, [], {}
    listed = read_json(file, list)
    with reading(file, "a list of modules with type and path"):
        modules = [(m["type"].rsplit(".", 1)[-1], root / m["path"]) for m in listed]
    names = " ".join(name for name, _ in modules)
    said = M.read_prompt(root)
    if names == "SentenceEncoder":  # an export of this project: the rest is in its config.json
        return root, [], said
    known = "Transformer Pooling( Dense)*( Normalize)?"
    fits = re.fullmatch(known, names)
    need(fits, f"{file}: modules {names!r}, expected {known}; others are not supported")
    body, pooling, *dense = [folder for name, folder in modules if name != "Normalize"]
    said = {"prompt": ("", file), "truncate_dim": (None, file)} | said
    said["normalize"] = names.endswith("Normalize"), file
    file = pooling / "config.json"
    said["pooling"] = read_pooling(file, said["prompt"][0]), file
    files = [folder / "config.json" for folder in dense]
    said["dense"] = [read_dense(f) for f in files], ", ".join(map(str, files)) or file
    beside = body / "sentence_bert_config.json"
    lengths = read_json(beside) if beside.exists() else {}
    for name in lengths.keys() & {"max_seq_length", "do_lower_case", "processing_kwargs"}:
        said[name] = lengths[name], beside
    usual = lengths.get("processing_kwargs") in (None, {})
    need(
        usual, f"{beside}: processing_kwargs is {lengths.get('processing_kwargs')!r}, expected none"
    )
    return body, dense, said


def read_pooling(file, prompt):
    """The pooling that a Pooling module's config.json switches on; a list, if not just one."""
    raw = read_json(file)
    modes = [k for k, v in raw.items() if k.startswith("pooling_mode_") and v is not False]
    modes = [raw["pooling_mode"]] if "pooling_mode" in raw else modes  # the newer form
    modes = [str(mode).removeprefix("pooling_mode_") for mode in modes]
    modes = [POOLING.get(mode, mode) for mode in modes]
    if prompt and not raw.get("include_prompt", True):
        raise InputError(f"{file}: include_prompt is False, expected True")
    return modes[0] if len(modes) == 1 else modes


def read_dense(file):
    """[width, activation, bias] of a Dense module's config.json."""
    raw = read_json(file)
    for key in ("use_residual", "module_input_name", "module_output_name"):
        usual = raw.get(key) in (None, False, "sentence_embedding")
        need(usual, f"{file}: {key} is {raw.get(key)!r}, which is not supported")
    activation = str(raw.get("activation_function", "Tanh")).rsplit(".", 1)[-1].lower()
    return [raw.get("out_features"), activation, raw.get("bias", True)]
