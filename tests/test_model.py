"""model.py by itself: copied alone, shipped with an export, imported by the rest."""

import ast
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import model as M
import msd
from test_msd import HERE, TEXTS, tiny, write
from tests.test_checkpoints import edit, folder  # noqa: F401 - a fixture
from tools.export import SHIPPED, describe_code, export


def test_encode_that_fails_leaves_the_model_as_it_was(tokenizer):
    """Interrupted, out of memory: it trains on with dropout."""
    m = tiny(tokenizer).train()

    def interrupt(done, n):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        m.encode(TEXTS, progress=interrupt)
    assert m.training and m.layers.training


def test_encode_gives_float32_under_another_default(tokenizer):
    m = tiny(tokenizer)
    want = m.encode(TEXTS)
    torch.set_default_dtype(torch.float64)
    try:
        got = m.encode(TEXTS)
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == np.float32 and np.allclose(got, want, atol=1e-6)


def test_save_refuses_weights_that_were_rounded(tokenizer, tmp_path):
    tiny(tokenizer).save(tmp_path / "m")
    with pytest.raises(M.InputError, match="rounded to bfloat16; load it with dtype='float32'"):
        M.load(tmp_path / "m", "bfloat16").save(tmp_path / "n")
    assert not (tmp_path / "n").exists()
    M.load(tmp_path / "m", "bfloat16", train=True).save(tmp_path / "n")  # in training they are not


def test_best_dtype_of_an_older_torch(monkeypatch):
    """Before 2.5 torch.cpu could not be asked."""
    for ask in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, ask)
    assert M.best_dtype("cpu") == ("float32", "the CPU has no bfloat16 units")


PROGRAM = """
import sys, numpy, model
texts = {texts!r}
try:
    numpy.save(sys.argv[2], model.load(sys.argv[1], "float32", "cpu").encode(texts))
except model.InputError as e:
    print(e)
"""


@pytest.fixture
def alone(tmp_path):
    """(vectors of TEXTS, what is printed) of a folder by a copy of model.py in an empty folder."""

    def call(source):
        out = tmp_path / "vectors.npy"
        out.unlink(missing_ok=True)
        code = PROGRAM.format(texts=TEXTS)
        args = [sys.executable, "-c", code, str(source), str(out)]
        done = subprocess.run(args, capture_output=True, text=True, cwd=tmp_path / "empty")
        assert done.returncode == 0, done.stderr
        return np.load(out) if out.exists() else None, done.stdout

    (tmp_path / "empty").mkdir()
    shutil.copy(HERE / "model.py", tmp_path / "empty")
    return call


def test_load_alone_an_ordinary_folder(tokenizer, tmp_path, alone):
    """As AutoModel saves it: no setting of ours, a pooler, position ids."""
    m = tiny(tokenizer)
    m.save(root := tmp_path / "m")
    edit(root / "config.json", **dict.fromkeys(("pooling", "recurrence", "max_seq_length"), ...))
    edit(root / "config.json", transformers_version="5", architectures=["BertModel"])
    more = {"pooler.dense.weight": torch.zeros(32, 32), "embeddings.position_ids": torch.arange(66)}
    M.write_safetensors(root / "model.safetensors", M.to_hf(m.state_dict()) | more)
    got, said = alone(root)
    assert np.array_equal(got, m.encode(TEXTS)) and not said


@pytest.mark.parametrize(
    "options",
    [None, {}, {"weights": "int8"}, {"plain": True}],
    ids=["run", "export", "int8", "plain"],
)
def test_load_alone_a_student_and_its_exports(tokenizer, tmp_path, alone, options):
    m = tiny(tokenizer, model_type="xlm-roberta", normalize=True, pooling="cls", prompt="query: ")
    student = msd.make_student(m, 8, (1, 2), 2)
    student.save(root := tmp_path / "student")  # as a run does
    if options is not None:
        export(root, root := tmp_path / "export", **options)
    got, said = alone(root)
    low = 0.99 if options == {"weights": "int8"} else 1 - 1e-6
    assert (got * student.encode(TEXTS)).sum(1).min() > low and not said


def test_load_alone_refuses_in_one_line(folder, tmp_path, alone):  # noqa: F811 - the fixture
    """What tools.checkpoints would open, and what nothing opens."""
    root, m = folder
    lacks = "; model.py alone does not open it; tools.checkpoints of the MSD project may\n"
    got, said = alone(root)
    assert got is None
    assert said == f"{root}: made of sentence-transformers' modules{lacks}"
    (root / "modules.json").unlink()
    assert alone(root)[1].endswith(f"are no weights of an encoder{lacks}")  # under bert.
    (root / "model.safetensors").rename(root / "model-00001-of-00001.safetensors")
    assert alone(root)[1] == f"{root / 'model.safetensors'}: no such file{lacks}"
    assert alone(tmp_path / "none")[1] == f"{tmp_path / 'none'}: no such model directory\n"
    m.save(tmp_path / "deep")
    edit(tmp_path / "deep" / "config.json", num_hidden_layers=10**9)
    expected = "num_hidden_layers is 1000000000, expected 4, the layers in the weights\n"
    assert alone(tmp_path / "deep")[1] == f"{tmp_path / 'deep' / 'config.json'}: {expected}"


def test_load_an_export_that_other_programs_saved(tokenizer, tmp_path):
    """Their prompts are obeyed; a config.json that transformers wrote says nothing of modules."""
    m = tiny(tokenizer)
    m.save(tmp_path / "m")
    export(tmp_path / "m", tmp_path / "out")
    prompts = {"prompts": {"query": "query: "}, "default_prompt_name": "query"}
    write(tmp_path / "out" / "config_sentence_transformers.json", json.dumps(prompts))
    assert M.load(tmp_path / "out").config.prompt == "query: "
    export(tmp_path / "m", tmp_path / "plain", plain=True)
    edit(tmp_path / "plain" / "config.json", transformers_version="5.24.0")
    with pytest.raises(M.InputError, match="modules; model.py alone does not open it"):
        M.load(tmp_path / "plain")


def test_save_where_it_is_read_and_where_it_fails(tokenizer, tmp_path):
    m = tiny(tokenizer)
    m.save(tmp_path / "m")
    again = M.load(tmp_path / "m", "float32")  # views of the file that is written now
    again.save(tmp_path / "m", new=False)
    assert np.array_equal(M.load(tmp_path / "m", "float32").encode(TEXTS), m.encode(TEXTS))
    with torch.no_grad():
        m.layers[0].up.weight[0, 0] = torch.nan
    with pytest.raises(M.InputError, match="layers.0.up.weight holds values that are not finite"):
        m.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    again.tokenizer = None
    with pytest.raises(AttributeError):
        again.save(tmp_path / "half")
    with pytest.raises(M.InputError, match="no such"):
        M.load(tmp_path / "half")


def imported(tree):
    """The first names of all modules that some code imports; "." for its own folder."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield "." if node.level else node.module.split(".")[0]


def test_shipped_code_is_short_and_harmless():
    """What a reviewer of an export reads: nothing deletes, starts a process, talks to a network or
    parses a command line, and only what saves writes."""
    imports = "contextlib dataclasses functools itertools json math mmap pathlib re".split()
    imports += ["numpy", "torch", "tokenizers", "transformers", "sentence_transformers", "."]
    builtins = {"eval", "exec", "compile", "__import__", "globals", "setattr"}
    methods = {"unlink", "remove", "rmdir", "rmtree", "rename", "truncate", "system", "popen"}
    modules = {"jit", "hub", "serialization", "multiprocessing", "distributed", "ctypeslib"}
    writes = {"write", "write_text", "write_bytes", "mkdir", "touch", "tofile", "save", "savez"}
    lines, writers = 0, set()
    for file in SHIPPED:
        text = file.read_text("utf-8")
        lines += sum(bool(line.strip()) for line in text.splitlines())
        tree = ast.parse(text)
        assert not set(imported(tree)) - set(imports)
        for function in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
            names = {n.id for n in ast.walk(function) if isinstance(n, ast.Name)}
            attributes = {n.attr for n in ast.walk(function) if isinstance(n, ast.Attribute)}
            assert not names & builtins and not attributes & (methods | modules), function.name
            writers |= {function.name} if attributes & writes else set()
        assert not re.search(r"torch\.(load|save|utils)", text)
    assert writers == {"save", "write_safetensors"}
    assert lines <= 700 and f"{lines} lines without the blank ones" in describe_code()
    assert len(SHIPPED[0].read_text("utf-8").splitlines()) <= 750


def test_imports_go_one_way():
    """tools and train stand above msd, which stands above data and model; model above nothing."""
    own = {p.stem for p in HERE.glob("*.py")} | {"tools", "demo"}
    below = {"model": set(), "data": {"model"}, "msd": {"model", "data"}}
    for name, allowed in below.items():
        tree = ast.parse((HERE / f"{name}.py").read_text("utf-8"))
        assert set(imported(tree)) & own <= allowed, name
