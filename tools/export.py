"""Export: a model's folder ready to upload, and what other programs look for in it."""

import contextlib
import functools
import json
import logging
import math
import re
import shlex
import textwrap
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers.models import Unigram
from torch import nn

import model as M
from data import atomic
from model import ACTIVATIONS, InputError, Linear, need, read_json, reading
from msd import ledger
from tools.checkpoints import POOLING, load

FAMILIES = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta"}  # in class names
FAMILIES |= {"camembert": "Camembert"}
SHIPPED = (Path(M.__file__), Path(__file__).with_name("sentence_encoder.py"))
BYTES = {"float32": 4, "float16": 2, "int8": 1}  # a parameter of a matrix, as export stores it


def export(folder, out, weights="float32", onnx=False, plain=False):
    """Write `out`, a folder ready to upload; returns a line that says how large it is.

    It opens here and in sentence-transformers, with `onnx` also in ONNX Runtime, transformers.js
    and fastembed. weights: float32, float16 or int8, of model.safetensors. plain: an ordinary
    directory of the model's family, for anything else; see unroll().
    Raises: InputError for what cannot be; then there is nothing at `out`.
    """
    source, out = Path(folder).resolve(), Path(out)
    need(not out.exists(), f"{out}: is there already; choose another folder, or delete it first")
    need(not plain or weights != "int8", "plain: no other program reads our int8; take float16")
    model = load(source, "float32", "cpu").float()  # the table may be float16
    need(not model.int8, f"{source}: its weights are int8; export the float32 model it was made of")
    if model.config.dense and (plain or onnx):
        raise InputError(f"{source}: has a Dense module; export it without onnx and plain")
    before = ledger(model.config)["total"]
    model = unroll(model) if plain else model
    with atomic(out) as tmp:
        model.save(tmp, narrow(model.state_dict(), weights))
        write_extras(model, source, tmp, plain)
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

    The word table (V, B) is multiplied by the map B -> H, and the K layers are listed R times. BERT
    with XLM-R's kind of tokenizer becomes an XLM-R: llama.cpp chooses the one by the other.
    """
    c, e = model.config, model.embeddings
    if c.model_type == "bert" and isinstance(model.tokenizer.model, Unigram):
        rows = F.pad(e.position.weight, (0, 0, c.pad_token_id + 1, 0))  # that it counts from
        e.position.weight = nn.Parameter(rows)
        c = e.config = replace(c, model_type="xlm-roberta", max_position_embeddings=len(rows))
    if c.bottleneck_size:
        e.word.weight, e.project = nn.Parameter(e.word.weight @ e.project.weight.T), None
    model.layers = nn.ModuleList([*model.layers] * c.recurrence)
    model.config = replace(c, bottleneck_size=0, recurrence=1, num_hidden_layers=len(model.layers))
    return model


def narrow(state, weights):
    """Weights by our names as a file holds them: float32, float16 or int8.

    int8: each matrix NAME.weight (m, n) is rounded, row by row, to 127 steps of its largest value;
    NAME.scale (m,) is a step in float32. model.Int8Weight is the way back.
    """
    kind = torch.float16 if weights == "float16" else torch.float32
    out = {}
    for name, t in state.items():
        if weights == "int8" and t.dim() == 2:
            scale = t.float().abs().amax(1).clamp(min=1e-12) / 127
            out[name.removesuffix("weight") + "scale"] = scale
            out[name] = (t / scale[:, None]).round().to(torch.int8)
        else:
            out[name] = t.to(kind)
    return out


def write_extras(model, source, folder, plain):
    """What other programs look for beside our own files."""
    c = model.config
    home, files, kinds = "sentence_encoder", {}, ["SentenceEncoder"]
    if not c.bottleneck_size and c.recurrence == 1:  # text-embeddings-inference demands:
        config = read_json(folder / "config.json") | {"initializer_range": 0.02}
        files["config.json"] = config | {"architectures": [f"{FAMILIES[c.model_type]}Model"]}
    if plain:
        home, kinds = "sentence_transformers.models", ["Transformer", "Pooling"]
        kinds += ["Normalize"] * c.normalize
        pooling = {f"pooling_mode_{name}": p == c.pooling for name, p in POOLING.items()}
        files["1_Pooling/config.json"] = {"word_embedding_dimension": c.hidden_size, **pooling}
        length = {"max_seq_length": c.max_seq_length, "do_lower_case": False}
        files["sentence_bert_config.json"] = length
        if isinstance(model.tokenizer.model, Unigram):
            files |= for_llama(model.tokenizer, folder)
    else:
        for file in SHIPPED:
            (folder / file.name).write_bytes(file.read_bytes())
    said = source / "config_sentence_transformers.json"  # it may name more prompts than ours
    if said.exists():
        (folder / said.name).write_bytes(said.read_bytes())
    elif c.prompt:
        files[said.name] = {"prompts": {"default": c.prompt}, "default_prompt_name": "default"}
    files["modules.json"] = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"{home}.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    for name, value in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(value, indent=1) + "\n", "utf-8")


def for_llama(tokenizer, folder):
    """An XLM-R's tokenizer files with what llama.cpp's converter looks for there, and where."""
    start, *_, end = tokenizer.encode("").tokens
    told = {"cls_token": start, "sep_token": end, "add_prefix_space": True}
    told["clean_up_tokenization_spaces"] = True
    raw = read_json(folder / "tokenizer.json")
    for step in (raw["normalizer"] or {}).get("normalizers", ()):
        if step["type"] == "Precompiled":  # tokenizers passes over a second one
            raw["normalizer"]["precompiled_charsmap"] = step["precompiled_charsmap"]
    config = read_json(folder / "tokenizer_config.json") | told
    return {"tokenizer.json": raw, "tokenizer_config.json": config}


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
        raise InputError(f"onnx needs {e.name}, which nothing else does: {fix}") from None

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
        rows = results["rows"].items()  # older ones name their folder in the label alone
        row = [v for k, v in rows if v.get("folder", k.split(",")[0]) == folder.name][-1]
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
        text += f"seed {given['seed']}; code: {results['git'] or 'unknown'}.\n\n"
        paper = "[arXiv 2209.05869](https://arxiv.org/abs/2209.05869)"
        text += f"Made by multi-stage distillation ({paper}).\n"
        seen = {x for pair in scores for x in pair.split("-")} | set(row["accuracy"])
        codes = {re.split("[-_]", x)[0] for x in seen}  # pt of pt_BR; a hub refuses what is none
        codes = {x for x in codes if re.fullmatch("[a-z]{2,3}", x)}
        return sorted(codes) or ["multilingual"], text
    return ["multilingual"], ""


def describe(model):
    """The shape and the size of a model: its Config, then the parameters and MB of each part."""
    lines = [f"{name:25}{value!r:>14}" for name, value in vars(model.config).items()]
    for part, n in ledger(model.config).items():
        sizes = [f"{n * size / 1e6:10,.1f} MB {kind}" for kind, size in BYTES.items()]
        lines.append(f"{part:12}{n:14,} parameters{''.join(sizes)}")
    return "\n".join(lines)


def describe_code():
    """What the files of SHIPPED do and how much there is to read before they are trusted."""
    texts = [file.read_text("utf-8") for file in SHIPPED]
    n = sum(bool(line.strip()) for text in texts for line in text.splitlines())
    return f"""What `trust_remote_code=True` runs is {" and ".join(f"`{f.name}`" for f in SHIPPED)},
{n} lines without the blank ones. They read the files of this folder, compute, and write where
`save` is told to; they use no network of their own, start no process and delete nothing.

"""


def model_card(model, source, name, weights, onnx, plain):
    """README.md for a hub, of the model that was read from the folder `source`."""
    c = model.config
    languages, made = origin(source)
    trust, code = ("", "") if plain else (", trust_remote_code=True", describe_code())
    quoted, hi = (json.dumps(x, ensure_ascii=False) for x in (name, c.prompt + "Hi"))
    shell = shlex.quote(name)
    uses = f"""from sentence_transformers import SentenceTransformer
SentenceTransformer({quoted}{trust}).encode(["A sentence.", "Ein Satz."])
"""
    bare = f"""
# transformers; {c.pooling} pooling of (N, T, {c.hidden_size}) gives the vectors
ids = AutoTokenizer.from_pretrained({quoted})([{hi}], return_tensors="pt")
AutoModel.from_pretrained({quoted})(**ids).last_hidden_state
"""
    if c.pooling in ("mean", "cls"):  # these know no other
        bare += f"\ntext-embeddings-router --model-id {shell} --pooling {c.pooling}\n"
        if c.model_type == "xlm-roberta" and isinstance(model.tokenizer.model, Unigram):
            bare += f"""
# llama.cpp (Ollama, LM Studio): a GGUF file by its own converter
python convert_hf_to_gguf.py {shell} --outtype f16 --outfile model.gguf
llama-embedding -m model.gguf -p {shlex.quote(c.prompt + "Hi")}
"""
    here = f'model.load({quoted}).encode(["A sentence."])  # with the model.py here\n'
    others = f"""
// transformers.js; "fp32" is exact, "q8" 8 bits, at a cosine of about 0.99 to it. It cuts a text
// over {c.max_seq_length} tokens without its end mark (cosine 0.999): keep texts shorter
const extract = await pipeline("feature-extraction", {quoted}, {{ dtype: "q8" }});
await extract([{hi}], {{ pooling: "{c.pooling}", normalize: true }});

# fastembed; of a folder here: TextEmbedding({quoted}, specific_model_path={quoted})
TextEmbedding.add_custom_model({quoted}, pooling=PoolingType.{c.pooling.upper()}, dim={c.width},
    normalization=True, sources=ModelSource(hf={quoted}), model_file="onnx/model.onnx")
list(TextEmbedding({quoted}).embed([{hi}]))

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

{made}The licences of what it was made of apply to this model; the code is MIT.

{code}{textwrap.indent(uses + (bare if plain else here) + others * onnx, "    ")}
Its shape, and its size by part and precision:

{textwrap.indent(describe(model), "    ")}
"""
