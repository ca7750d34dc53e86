"""Exports, opened by the programs that people have."""

import functools
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, normalizers

import model as M
import msd
from test_msd import HERE, TEXTS, apart, batch, run, tiny, write
from tests.test_checkpoints import edit
from tools.checkpoints import load
from tools.export import export

# Each program that an export is made for opens one, and gives our vectors.
HOME = tempfile.TemporaryDirectory()  # transformers copies the code of a model there


os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": HOME.name}


STUDENTS = {
    "bert": {},
    "xlm-roberta": {"normalize": True, "pooling": "cls"},
    "prompt": {"pooling": "mean_sqrt_len", "prompt": "query: "},
    "dense": {"pooling": "max", "dense": ((24, "tanh", True), (8, "identity", False))},
}


FAMILIES = ["bert", "xlm-roberta"]  # for ONNX


SAID = ["Two DOGS run  ", *TEXTS]  # the last is too long


package = lambda name: pytest.importorskip(name, reason=f"{name} is not installed")


vectors = lambda folder, **how: load(folder, "float32", "cpu").encode(SAID, **how)


cosines = lambda a, b: (M.unit(np.asarray(a)) * M.unit(np.asarray(b))).sum(1)


def opened(folder, **how):
    st = package("sentence_transformers")
    return st.SentenceTransformer(str(folder), trust_remote_code=True, device="cpu", **how)


@pytest.fixture(scope="session")
def students(tokenizer, tmp_path_factory):
    """{name: folder} of random students with bottleneck and recurrence, 2 MB each."""
    root = tmp_path_factory.mktemp("students")
    cased = Tokenizer.from_str(tokenizer.to_str())
    cased.normalizer = normalizers.NFKC()
    sizes = {"vocab_size": 8000, "hidden_size": 128, "intermediate_size": 256}
    for name, changes in STUDENTS.items():
        kind = name if name in FAMILIES else "bert"
        m = tiny(cased, std=0.1, model_type=kind, **sizes, **changes)
        for p in (p for n, p in m.named_parameters() if n.endswith("bias")):
            p.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(p)))
        msd.make_student(m, 32, (1, 2), 2).save(root / name)
    return {name: root / name for name in STUDENTS}


@pytest.fixture(scope="session")
def exported(students, tmp_path_factory):
    @functools.cache
    def get(name, **options):
        for needed in ("onnx", "onnxscript", "onnxruntime") if "onnx" in options else ():
            package(needed)
        export(students[name], out := tmp_path_factory.mktemp("export") / name, **options)
        return out

    return get


@pytest.mark.parametrize(
    "weights, low, size",
    [("float32", 1 - 1e-6, 1), ("float16", 0.9999, 0.51), ("int8", 0.999, 0.28)],
)
@pytest.mark.parametrize("name", STUDENTS)
def test_export_opens_here(students, exported, tmp_path, name, weights, low, size):
    out = exported(name, weights=weights)
    m = load(out, "float32", "cpu")
    want = m.encode(SAID)
    assert cosines(vectors(students[name]), want).min() > low
    before, after = ((p / "model.safetensors").stat().st_size for p in (students[name], out))
    assert after < size * before + 9000
    if weights == "int8":  # in memory, too
        assert m.int8 and all(t.dim() < 2 or t.dtype == torch.int8 for t in m.state_dict().values())
    m.save(tmp_path / "again")
    assert np.array_equal(vectors(tmp_path / "again"), want)
    assert cosines(load(out, "bfloat16").encode(SAID), want).min() > 0.99


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to ask for memory")
@pytest.mark.parametrize(
    "weights, dtype", [("int8", "float32"), ("float16", "float32"), ("float32", "bfloat16")]
)
def test_load_keeps_a_table_in_its_file(students, tokenizer, tmp_path, weights, dtype):
    """A table of 51 MB in float32 is mapped and never widened, or narrowed, as a whole."""
    tiny(tokenizer, vocab_size=200_000, bottleneck_size=64).save(tmp_path / "m")
    export(tmp_path / "m", tmp_path / "small", weights)
    code = """if True:
        import re, sys, model
        dtype, *folders = sys.argv[1:]
        for folder in folders:
            model.load(folder, dtype, "cpu").encode(["A man reads."] * 9)
            print(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])"""
    args = [sys.executable, "-c", code, dtype, students["bert"], tmp_path / "small"]
    done = subprocess.run(args, capture_output=True, text=True, cwd=HERE)
    warm, peak = map(int, done.stdout.split())
    assert peak - warm < 20_000
    assert torch.equal(  # in training it is copied, in float32
        load(tmp_path / "m", "bfloat16", train=True).embeddings.word.weight,
        load(tmp_path / "m", "float32").embeddings.word.weight,
    )


def test_load_refuses_damaged_int8(exported, tmp_path):
    out = exported("bert", weights="int8")
    with pytest.raises(M.InputError, match="cannot be trained"):
        load(out, train=True)
    shutil.copytree(out, tmp_path, dirs_exist_ok=True)
    tensors, _ = M.read_safetensors(out / "model.safetensors")
    for name, value, message in (
        ("encoder.layer.0.output.dense.scale", None, "Missing.*layers.0.down.scale"),
        ("encoder.layer.1.output.dense.scale", torch.ones(3), "mismatch for layers.1.down.scale"),
        ("encoder.layer.1.output.dense.scale", torch.ones(128) * math.nan, "not finite"),
        ("encoder.layer.7.output.dense.scale", torch.ones(128), "num_hidden_layers"),
        ("embeddings.word_embeddings.scale", None, "Missing.*embeddings.word.scale"),
        ("embeddings.LayerNorm.scale", torch.ones(128), "embeddings.norm.scale"),
        ("encoder.layer.0.attention.self.query.weight", torch.ones(128, 128), "several dtypes"),
        ("encoder.layer.0.output.dense.scale", torch.ones(128).to(torch.int8), "int8 weights"),
    ):
        kept = {k: v for k, v in {**tensors, name: value}.items() if v is not None}
        M.write_safetensors(tmp_path / "model.safetensors", kept)
        with pytest.raises(M.InputError, match=message):
            load(tmp_path).encode("red")


@pytest.mark.parametrize(
    "name, weights",
    [*((name, "float32") for name in STUDENTS), ("bert", "float16"), ("xlm-roberta", "int8")],
)
def test_export_in_sentence_transformers(exported, name, weights, tmp_path):
    out = exported(name, weights=weights)
    m, want, width = opened(out), vectors(out), 8 if name == "dense" else 128
    with pytest.raises(ValueError, match="trust_remote_code"):
        type(m)(str(out), device="cpu")
    assert all(apart(m.encode(SAID, batch_size=n), want) < 1e-5 for n in (1, 3, 32))
    for prompt in ("", "passage: "):
        assert apart(m.encode(SAID, prompt=prompt), vectors(out, prompt=prompt)) < 1e-5
    assert m.get_embedding_dimension() == width and m.max_seq_length == 48
    tokens = m.encode(SAID[:1], output_value="token_embeddings")[0]
    assert tokens.shape[1] == 128 and len(tokens) < 48
    if weights == "int8":
        with pytest.raises(Exception, match="int8 weights cannot be trained"):
            m.train()(m.tokenize(SAID[:2]))
    else:
        m.train()(m.tokenize(SAID[:2]))["sentence_embedding"].sum().backward()
        assert all(p.grad is not None for p in m.parameters())
    m.max_seq_length = 8
    short = m.encode(SAID)
    m.save(str(tmp_path / "again"))
    assert apart(opened(tmp_path / "again").encode(SAID), short) < 1e-5 < 1e-3 < apart(short, want)
    assert apart(vectors(tmp_path / "again"), short) < 1e-5
    m.max_seq_length = 10**6
    assert m.max_seq_length == 66 - 2 * (name == "xlm-roberta")
    assert m.encode("x y " * 999).shape == (width,)
    half = m.bfloat16().encode(SAID, convert_to_tensor=True).float()
    assert cosines(half, m.float().encode(SAID)).min() > 0.98
    # A name on the hub, served from a cache as huggingface_hub lays it out
    shutil.copytree(out, tmp_path / "models--a--b" / "snapshots" / ("a" * 40))
    write(tmp_path / "models--a--b" / "refs" / "main", "a" * 40)
    assert apart(opened("a/b", cache_folder=str(tmp_path)).encode(SAID), want) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_export_in_onnx_runtime(exported, name):
    out = exported(name, onnx=True)
    import onnx
    import onnxruntime

    full, small = (out / "onnx" / f"{n}.onnx" for n in ("model", "model_quantized"))
    onnx.checker.check_model(full)
    assert sorted((out / "onnx").iterdir()) == [full, small]
    assert "TextEmbedding.add_custom_model" in (out / "README.md").read_text()
    exact = (out / "model.safetensors").stat().st_size  # of K layers, not K x R
    assert full.stat().st_size < 1.05 * exact and small.stat().st_size < 0.35 * exact
    for place in (HERE, sys.prefix, torch.__path__[0]):
        assert str(place).encode() not in full.read_bytes() + small.read_bytes()
    m, session = load(out, "float32", "cpu"), onnxruntime.InferenceSession(full)
    assert [i.name for i in session.get_inputs()] == ["input_ids", "attention_mask"]
    for texts in (SAID[:1], SAID[1:4], SAID):
        ids, mask = batch(m, texts)
        feed = {"input_ids": ids.numpy(), "attention_mask": mask.long().numpy()}
        (got,) = session.run(["last_hidden_state"], feed)
        assert apart(got[mask.numpy()], m.hidden(ids, mask)[mask].detach()) < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_export_in_fastembed(exported, name):
    fastembed, out = package("fastembed"), exported(name, onnx=True)
    from fastembed.common.model_description import ModelSource, PoolingType

    c, got = load(out).config, []
    how = {"pooling": PoolingType[c.pooling.upper()], "normalization": c.normalize}
    how |= {"dim": c.width, "sources": ModelSource(hf="a/b")}
    for file in ("onnx/model.onnx", "onnx/model_quantized.onnx"):
        fastembed.TextEmbedding.add_custom_model(name + file, model_file=file, **how)
        m = fastembed.TextEmbedding(name + file, specific_model_path=str(out))
        got.append(np.stack(list(m.embed(SAID))))
    assert apart(got[0], vectors(out)) < 1e-4 and cosines(got[1], vectors(out)).min() > 0.98


JS = """
import { pipeline, env } from "@huggingface/transformers";
import { readFileSync } from "node:fs";
const [root, name, pooling] = process.argv.slice(1);
const texts = JSON.parse(readFileSync(0, "utf-8"));
env.allowRemoteModels = false;
env.localModelPath = root;
for (const dtype of ["fp32", "q8"]) {
  const extract = await pipeline("feature-extraction", name, { dtype });
  const tokens = (t) => [...extract.tokenizer(t, { truncation: true }).input_ids.data].map(Number);
  console.log(JSON.stringify([texts.map(tokens), (await extract(texts, { pooling })).tolist()]));
}
"""


NODE = Path(os.environ.get("MSD_NODE_MODULES", "none"))


@pytest.mark.skipif(
    not (NODE / "@huggingface" / "transformers").exists(),
    reason="MSD_NODE_MODULES names no node_modules folder with @huggingface/transformers",
)
@pytest.mark.parametrize("name", FAMILIES)
def test_export_in_transformers_js(exported, name):
    m = load(out := exported(name, onnx=True), "float32", "cpu")
    args = ["node", "--input-type=module", "-e", JS, "--", out.parent, name, m.config.pooling]
    how = {"input": json.dumps(SAID), "capture_output": True, "text": True, "cwd": NODE.parent}
    done = subprocess.run(args, **how)
    assert done.returncode == 0 and "Unknown" not in done.stderr, done.stderr
    flat, starts = m.tokenize(SAID)
    for line, low in zip(done.stdout.splitlines(), (1 - 1e-5, 0.98), strict=True):
        ids, got = json.loads(line)
        assert sum(ids[:-1], []) == flat[: starts[-2]].tolist()
        assert ids[-1][:-1] == flat[starts[-2] : -1].tolist()  # it cuts the end token, too
        assert cosines(got, m.encode(SAID))[:-1].min() > low


@pytest.mark.parametrize(
    "name, options, near",
    [
        ("bert", {"onnx": True}, 2e-5),
        ("xlm-roberta", {}, 2e-5),
        ("prompt", {}, 1e-4),  # longer vectors
        ("bert", {"weights": "float16"}, 0.02),
    ],
)
def test_plain_export(students, exported, tmp_path, name, options, near):
    out, want = exported(name, plain=True, **options), vectors(students[name])
    assert apart(vectors(out), want) < near and not list(out.rglob("*.py"))
    m = opened(out, model_kwargs={"dtype": torch.float32})
    assert apart(m.encode(SAID, batch_size=3), want) < near and m.max_seq_length == 48
    m.save(str(tmp_path))
    assert apart(vectors(tmp_path), want) < near
    import transformers

    body = transformers.AutoModel.from_pretrained(out, dtype=torch.float32).eval()
    c, split = load(out).config, transformers.AutoTokenizer.from_pretrained(out)
    assert body.config.num_hidden_layers == 4 and body.config.model_type == c.model_type
    demanded = json.loads((out / "config.json").read_text())  # by text-embeddings-inference
    assert demanded["architectures"] == [type(body).__name__] and demanded["initializer_range"]
    lines = (out / "README.md").read_text("utf-8").split("    # transformers; ")[1].splitlines()
    code = "\n".join(line.strip() for line in lines[1:3]).replace(out.name, str(out))
    exec("from transformers import AutoModel, AutoTokenizer\n" + code, {})
    texts = [c.prompt + t for t in SAID]
    feed = dict(split(texts, padding=True, truncation=True, return_tensors="pt"))
    x, mask = body(**feed).last_hidden_state.detach(), feed["attention_mask"] > 0
    assert cosines(M.pool(x, mask, c.pooling), want).min() > 0.9999
    if "onnx" in options:
        import onnxruntime

        session = onnxruntime.InferenceSession(out / "onnx" / "model.onnx")
        (y,) = session.run(None, {i.name: feed[i.name].numpy() for i in session.get_inputs()})
        assert apart(y[mask], x[mask]) < 1e-4


def test_export_refuses(students, exported, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    for source, out, options, message in (
        (students["bert"], "there", {}, "is there already"),
        (students["bert"], "a", {"weights": "int8", "plain": True}, "no other program"),
        (exported("bert", weights="int8"), "a", {}, "weights are int8"),
        (tmp_path / "none", "a", {}, "no such model directory"),
        (students["dense"], "a", {"onnx": True}, "has a Dense module"),
        (students["dense"], "a", {"plain": True}, "has a Dense module"),
        (students["prompt"], "a", {"onnx": True}, "the users of ONNX know mean, cls"),
        (students["bert"], "a", {"onnx": True}, "onnx needs onnxscript.*: pip install"),
    ):
        with pytest.raises(M.InputError, match=message):
            export(source, tmp_path / out, **options)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "there"]


def test_export_command_and_card(world, finished, tmp_path):
    results = json.loads((world / "whole" / "results.json").read_text())
    results["rows"]["student, stage 4"]["spearman"] |= {"en-no": 70.0, "de-de": math.nan}
    shutil.copytree(world / "whole" / "student", tmp_path / "student")
    write(tmp_path / "results.json", json.dumps(results))
    out, full = tmp_path / "new" / "my-{model}", (50_000, 50_000)
    args = [sys.executable, "-m", "tools", "export", tmp_path / "student", out]
    how = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, full)}  # a full disk
    done = subprocess.run(args, capture_output=True, text=True, **how)
    assert done.returncode == 2 and "cannot write (File too large)" in done.stderr, done.stderr
    assert not list(out.parent.iterdir())
    done = run([*args, "--weights", "float16"])
    assert re.fullmatch(r".*my-{model}: [\d,]+ parameters; weights [\d.]+ MB\n", done.stdout), done
    text = (out / "README.md").read_text("utf-8")
    origin = "Teacher: teacher; assistant: made of the teacher; data: en-de.tsv; seed 0; code: "
    found = r"Translations found: [\d.]+ % from English, [\d.]+ % into it"
    assert origin in text and re.search(found, text), text
    assert "Made by multi-stage distillation" in text
    sizes = ("embedding", "layers", "other", "total", "MB float32", "MB float16", "MB int8")
    for part in ("my-{model}", "en-no 70.0; mean", "in float16", "licence", "MIT", *sizes):
        assert part in text, part
    assert not any(part in text for part in ("nan", "None", str(tmp_path), str(world)))
    head = package("yaml").safe_load(text.split("---")[1])  # where a bare no would be false
    assert head["language"] == ["de", "en", "no"] and head["license"] == "other"
    assert head["library_name"] == "sentence-transformers" in head["tags"]
    assert head["pipeline_tag"] == "sentence-similarity"
    said = export(tmp_path / "student", tmp_path / "plain", plain=True)
    small, large = (msd.ledger(load(f).config)["total"] for f in (out, tmp_path / "plain"))
    assert f"{large:,} parameters, {large / small:.1f} x those of student; weights" in said
    assert large > 1.5 * small
    prompts = {"prompts": {"query": "q: ", "document": "d: "}, "default_prompt_name": "query"}
    write(tmp_path / "student" / "config_sentence_transformers.json", json.dumps(prompts))
    for i, foreign in enumerate(("[1]", '{"rows": []}', "{")):  # another program's results.json
        write(tmp_path / "results.json", foreign)
        export(tmp_path / "student", tmp_path / f"out{i}")
        assert "distillation" not in (tmp_path / f"out{i}" / "README.md").read_text("utf-8")
    file = tmp_path / "out0" / "config_sentence_transformers.json"
    assert json.loads(file.read_text()) == prompts  # all of them, for encode_query and its like
    assert load(tmp_path / "out0").config.prompt == "q: "
    edit(file, truncate_dim=8)  # as sentence-transformers saves it
    with pytest.raises(M.InputError, match="truncate_dim is 8"):
        load(tmp_path / "out0")
