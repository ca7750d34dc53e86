"""What other programs and people do with a loaded or an exported model."""

import copy
import json
import os
import shlex
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import data
import model as M
from test_msd import HERE, TEXTS, apart, tiny, write
from tests.test_export import SAID, cosines, opened, package, vectors
from tools import __main__ as command
from tools.checkpoints import fingerprint, load
from tools.export import export


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A model of 2 MB whose matrices are large enough for torch to use threads."""
    root = tmp_path_factory.mktemp("consumers") / "m"
    tiny(tokenizer, std=0.1, hidden_size=256, intermediate_size=512).save(root)
    return root


@pytest.fixture(scope="module")
def exported(folder):
    export(folder, folder.with_name("exported"))
    return folder.with_name("exported")


# ---------------------------------------------------------------------------- sentence-transformers
def test_tokenizer_as_transformers_has_it(exported, tmp_path):
    m = opened(exported)
    t, ours = m.tokenizer, M.load(exported, "float32", "cpu")
    flat, starts = ours.tokenize(SAID)
    want = [flat[a:b].tolist() for a, b in zip(starts, starts[1:])]
    ids = t(SAID, padding=True, truncation=True, return_tensors="pt")
    rows = zip(ids["input_ids"], ids["attention_mask"] > 0)
    assert [x[mask].tolist() for x, mask in rows] == want
    assert ids["input_ids"][0, -1] == t.pad_token_id == ours.config.pad_token_id
    assert [t.encode(x, truncation=True) for x in SAID] == want
    assert len(t.encode(SAID[-1])) > len(want[-1]) == t.model_max_length == m.max_seq_length
    assert len(t) == ours.tokenizer.get_vocab_size() and t.cls_token_id == want[0][0]
    assert t.decode(want[0], skip_special_tokens=True).strip() == "two dogs run"
    assert apart(m.encode(SAID), ours.encode(SAID)) < 1e-5  # padding and truncation touch no other
    m.max_seq_length = 5
    assert t.model_max_length == 5 and len(t.encode(SAID[-1], truncation=True)) == 5
    for length in (0, 1, 2):
        with pytest.raises(Exception, match=f"max_seq_length is {length}, expected 3 or more"):
            m.max_seq_length = length
    m.save(str(tmp_path / "used"))
    new = opened(exported)
    new.max_seq_length = 5
    new.save(str(tmp_path / "new"))
    names = ("tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors")
    assert all(
        (tmp_path / "used" / n).read_bytes() == (tmp_path / "new" / n).read_bytes() for n in names
    )
    assert isinstance(copy.deepcopy(m).tokenizer, type(t))


def test_tokenizer_in_langchain(exported):
    splitters = package("langchain_text_splitters")
    text = "two red dogs run in the old house " * 9
    how = {"trust_remote_code": True, "device": "cpu"}
    s = splitters.SentenceTransformersTokenTextSplitter(
        model_name=str(exported), tokens_per_chunk=12, chunk_overlap=2, model_kwargs=how
    )
    tokenizer = M.load(exported).tokenizer
    tokenizer.no_truncation()
    assert s.count_tokens(text=text) == len(tokenizer.encode(text).ids)
    parts = s.split_text(text)
    assert len(parts) > 3 and all(len(tokenizer.encode(p).ids) <= 15 for p in parts)
    assert "two red dogs run" in parts[0]


# ------------------------------------------------------------------------------ processes and files
FORK = """if True:
    import os, sys, model, tools.checkpoints
    loader, folder, dtype, out = sys.argv[1:]
    threads = lambda: len(os.listdir("/proc/self/task"))
    before = threads()
    m = {"model": model, "tools": tools.checkpoints}[loader].load(folder, dtype, "cpu")
    assert threads() == before, "load started threads"
    if not os.fork():
        model.np.save(out, m.encode(["two dogs run"] * 9))
        os._exit(0)
    sys.exit(os.wait()[1])"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc to count threads")
@pytest.mark.parametrize("loader", ["model", "tools"])
@pytest.mark.parametrize("dtype, weights", [("float32", "float16"), ("bfloat16", "float32")])
def test_load_before_a_fork(folder, tmp_path, loader, dtype, weights):
    export(folder, tmp_path / "m", weights)
    args = [sys.executable, "-c", FORK, loader, tmp_path / "m", dtype, tmp_path / "v.npy"]
    env = {**os.environ, "OMP_NUM_THREADS": "4"}
    subprocess.run(args, cwd=HERE, env=env, check=True, timeout=300)  # a hang ends here
    want = M.load(tmp_path / "m", dtype, "cpu").encode(["two dogs run"] * 9)
    assert cosines(np.load(tmp_path / "v.npy"), want).min() > 0.999


@pytest.mark.parametrize("weights", ["float32", "float16", "int8"])
def test_load_copied_outlives_its_file(folder, tmp_path, weights):
    """As load() says: a copy holds none of the file's pages, which a mapped model does."""
    export(folder, tmp_path / "m", weights)
    held = copy.deepcopy(M.load(tmp_path / "m", "float32", "cpu"))
    want, file = held.encode(TEXTS), tmp_path / "m" / "model.safetensors"
    with open(file, "r+b") as f:
        f.truncate(9)
    assert np.array_equal(held.encode(TEXTS), want)


def test_load_keeps_scales_as_stored(folder, tmp_path):
    export(folder, tmp_path / "m", "int8")
    stored, _ = M.read_safetensors(tmp_path / "m" / "model.safetensors")
    for loader in (M.load, load):
        m = loader(tmp_path / "m", "bfloat16", "cpu")
        scales = {k: v for k, v in m.state_dict().items() if k.endswith("scale")}
        assert scales and all(v.dtype == torch.float32 for v in scales.values())
        assert {k: v.tolist() for k, v in M.to_hf(scales).items()} == {
            k: v.tolist() for k, v in stored.items() if k.endswith("scale")
        }


def test_load_refuses_lengths_without_a_word(folder):
    for tokens in (-1, 0, 1, 2):
        with pytest.raises(M.InputError, match=f"max_tokens is {tokens}, expected 3 or more"):
            load(folder, max_tokens=tokens)
    short = load(folder, max_tokens=3)
    flat, starts = short.tokenize(["two dogs run"])
    assert len(flat) == 3 and short.config.max_seq_length == 3


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_load_names_git_lfs(folder, tmp_path, name):
    write(tmp_path / "m" / "x", "")
    for file in folder.iterdir():
        write(tmp_path / "m" / file.name, file.read_bytes())
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 470641600\n"
    write(tmp_path / "m" / name, pointer)
    for loader in (M.load, load):
        with pytest.raises(M.InputError, match=f"{name}: .*a Git LFS pointer, .*: git lfs pull"):
            loader(tmp_path / "m")


def test_load_says_that_a_tokenizer_may_be_anothers(tokenizer, tmp_path, capsys):
    n = tokenizer.get_vocab_size()
    for rows, said in ((n + 1024, False), (n + 1025, True)):
        tiny(tokenizer, vocab_size=rows).save(tmp_path / str(rows))
        data.note.cache_clear()
        load(tmp_path / str(rows))
        assert (f"{n} pieces for {rows} rows" in capsys.readouterr().err) == said


def test_read_json_with_a_byte_order_mark(folder, tmp_path):
    for file in folder.iterdir():
        mark = b"\xef\xbb\xbf" * (file.name in ("config.json", "tokenizer_config.json"))
        write(tmp_path / file.name, mark + file.read_bytes())
    for loader in (M.load, load):
        assert loader(tmp_path).config == M.load(folder).config


# ------------------------------------------------------------------------------------- the commands
@pytest.mark.parametrize(
    "args",
    [
        ("info", ""),
        ("encode", " "),
        ("similarity", "", "a", "b"),
        ("export", "", "x"),
        ("export", "m", ""),
        ("search", "", "corpus", "q"),
        ("search", "m", "", "q"),
        ("search", "m", "corpus", "q", "--index", ""),
    ],
)
def test_main_refuses_an_empty_path(args):
    with pytest.raises(M.InputError, match="an empty path"):
        command.main(list(args))


def test_encode_to_a_pipe_that_closes(folder):
    args = [sys.executable, "-m", "tools", "encode", folder]
    with subprocess.Popen(args, stdin=-1, stdout=-1, stderr=-1, cwd=HERE) as p:
        p.stdout.close()
        p.stdin.write(b"two dogs run\n" * 500)
        p.stdin.close()
        assert p.stderr.read() == b"" and p.wait() == 1


def test_search_store_is_no_part_of_a_model(folder, tmp_path, capsys):
    export(folder, tmp_path / "m")
    write(tmp_path / "m" / "corpus.txt", "two dogs\nred old\n")
    before = fingerprint(tmp_path / "m")
    for _ in range(2):
        command.main(["search", str(tmp_path / "m"), str(tmp_path / "m" / "corpus.txt"), "dogs"])
        assert fingerprint(tmp_path / "m") == before
    assert len(list((tmp_path / "m").glob(".corpus.txt.*.vectors"))) == 1


# ---------------------------------------------------------------------------------------- an export
def test_export_of_a_read_only_prompt(folder, tmp_path):
    export(folder, tmp_path / "m")
    prompts = {"prompts": {"query": "q: "}, "default_prompt_name": "query"}
    file = write(tmp_path / "m" / "config_sentence_transformers.json", json.dumps(prompts))
    file.chmod(0o400)
    for plain in (False, True):
        export(tmp_path / "m", tmp_path / f"out{plain}", plain=plain)
        assert load(tmp_path / f"out{plain}").config.prompt == "q: "
        (tmp_path / f"out{plain}" / file.name).write_text("{}", "utf-8")  # its own mode


def card(tokenizer, tmp_path, name, results=None, **changes):
    tiny(tokenizer, **changes).save(tmp_path / "run" / "student")
    if results:
        write(tmp_path / "run" / "results.json", json.dumps(results))
    export(tmp_path / "run" / "student", tmp_path / name, plain=True)
    return (tmp_path / name / "README.md").read_text("utf-8")


@pytest.mark.parametrize("pooling", M.POOLINGS)
def test_model_card_names_a_router_that_knows_the_pooling(tokenizer, tmp_path, pooling):
    text = card(tokenizer, tmp_path, "x", pooling=pooling)
    line = f"text-embeddings-router --model-id x --pooling {pooling}\n"
    assert (line in text) == (pooling in ("mean", "cls")) == ("text-embeddings-router" in text)


def test_model_card_quotes_names_and_prompts(tokenizer, tmp_path):
    name, prompt = 'it\'s "my" {model}', 'say "so":\n'
    text = card(tokenizer, tmp_path, name, prompt=prompt)
    lines = [line.strip() for line in text.splitlines()]
    code = [x for x in lines if "SentenceTransformer(" in x or "from_pretrained(" in x]
    assert len(code) == 3
    for line in code:
        compile(line, "card", "exec")
    (router,) = [shlex.split(x) for x in lines if x.startswith("text-embeddings-router")]
    assert router[2] == name and json.dumps(prompt + "Hi") in text


def test_origin_lists_languages_that_are_codes(tokenizer, tmp_path):
    pair = (50.0, 50.0)
    names = ("de", "pt_BR", "zh-Hans", "DE", "mine2", "x", "ceb", "a b", "")
    row = {"spearman": {"en-fr": 70.0}, "accuracy": dict.fromkeys(names, pair)}
    given = {"teacher": None, "assistant": None, "train": [], "extra": [], "seed": 0}
    results = {"rows": {"student": {**row, "folder": "student"}}, "arguments": given, "git": None}
    text = card(tokenizer, tmp_path, "x", results)
    assert 'language: ["ceb", "de", "en", "fr", "pt", "zh"]\n' in text


@pytest.fixture(scope="module")
def unigram():
    """A tokenizer as XLM-R's: Unigram, with a map of characters that changes none."""
    words = [w for t in TEXTS for w in t.split()]
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [(f"▁{w}", -5.0) for w in dict.fromkeys(words) if w.isalpha()][:40]
    pieces += [(c, -9.0) for c in sorted({c for w in words for c in w})]
    t = Tokenizer(models.Unigram(list(dict(pieces).items()), 3, False))
    chars = normalizers.Precompiled(struct.pack("<I", 1024) + bytes(1025))
    t.normalizer = normalizers.Sequence([chars, normalizers.Replace("  ", " ")])
    t.pre_tokenizer = pre_tokenizers.Metaspace()
    t.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>"])
    ends = [("<s>", 0), ("</s>", 2)]
    t.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=ends)
    return t


LLAMA = """if True:
    import json, sys, llama_cpp
    m = llama_cpp.Llama(sys.argv[1], embedding=True, verbose=False)
    print(json.dumps([m.embed(t, normalize=False) for t in json.load(sys.stdin)]))"""


def llama(folder, out, kind, texts):
    """Vectors of llama.cpp, by its own converter and library."""
    home = Path(os.environ.get("MSD_LLAMA_CPP", "none"))
    if not (home / "convert_hf_to_gguf.py").exists():
        pytest.skip("MSD_LLAMA_CPP names no source folder of llama.cpp")
    package("llama_cpp")
    args = [sys.executable, home / "convert_hf_to_gguf.py", folder, "--outfile", out]
    subprocess.run([*args, "--outtype", kind], check=True, capture_output=True)
    args = [sys.executable, "-c", LLAMA, out]
    done = subprocess.run(args, input=json.dumps(texts), text=True, check=True, stdout=-1)
    return np.array(json.loads(done.stdout))


@pytest.mark.parametrize("model_type", ["bert", "xlm-roberta"])
def test_plain_export_with_the_tokenizer_of_xlmr(unigram, tmp_path, model_type):
    sizes = {"model_type": model_type, "hidden_size": 64, "num_attention_heads": 2}
    m = tiny(unigram, std=0.2, pad_token_id=1, bottleneck_size=16, recurrence=2, **sizes)
    m.save(tmp_path / "m")
    export(tmp_path / "m", tmp_path / "out", plain=True)
    want = vectors(tmp_path / "m")
    assert apart(vectors(tmp_path / "out"), want) < 1e-4
    raw = json.loads((tmp_path / "out" / "tokenizer.json").read_text("utf-8"))
    assert raw["normalizer"]["precompiled_charsmap"]  # where llama.cpp's converter looks for it
    config = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    assert config["architectures"] == ["XLMRobertaModel"]
    assert "convert_hf_to_gguf.py" in (tmp_path / "out" / "README.md").read_text("utf-8")
    st = opened(tmp_path / "out", model_kwargs={"dtype": torch.float32})
    assert apart(st.encode(SAID), want) < 1e-4
    transformers = package("transformers")
    t, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "out"), m.tokenizer
    assert [t(x, truncation=True)["input_ids"] for x in SAID] == [ours.encode(x).ids for x in SAID]
    # llama.cpp cuts spaces at the ends and no tokens, and joins no unknown characters.
    known = lambda ids: len(ids) < 48 and 3 not in ids
    texts = [x.strip() for x in SAID if known(ours.encode(x).ids)]
    got = llama(tmp_path / "out", tmp_path / "f32.gguf", "f32", texts)
    assert cosines(got, M.load(tmp_path / "m", "float32").encode(texts)).min() > 0.9999
