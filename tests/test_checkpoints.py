"""Other people's checkpoints: what opens, what is refused, and with which words."""

import json
import math

import numpy as np
import pytest
import torch

import model as M
import msd
from test_msd import CASES, TEXTS, needs_cases, tiny, write
from tools import checkpoints


@pytest.fixture
def folder(tokenizer, tmp_path):
    """A sentence-transformers directory, with prefix, pooler and position_ids, as they are found
    in the wild."""
    m = tiny(tokenizer)
    m.save(tmp_path / "st")
    tensors = {f"bert.{k}": v for k, v in M.to_hf(m.state_dict()).items()}
    tensors |= {
        "bert.pooler.dense.weight": torch.zeros(32, 32),
        "bert.embeddings.position_ids": torch.arange(66)[None],
    }
    M.write_safetensors(tmp_path / "st" / "model.safetensors", tensors)
    config = json.loads((tmp_path / "st" / "config.json").read_text())
    ours = {
        "pooling",
        "normalize",
        "max_seq_length",
        "do_lower_case",
        "recurrence",
        "bottleneck_size",
        "dropout",
    }
    write(
        tmp_path / "st" / "config.json",
        json.dumps({k: v for k, v in config.items() if k not in ours}),
    )
    (tmp_path / "st" / "1_Pooling").mkdir()
    write(
        tmp_path / "st" / "1_Pooling" / "config.json",
        json.dumps(
            {
                "word_embedding_dimension": 32,
                "pooling_mode_cls_token": False,
                "pooling_mode_mean_tokens": True,
            }
        ),
    )
    modules = [
        {"idx": i, "name": str(i), "path": p, "type": f"sentence_transformers.models.{t}"}
        for i, (t, p) in enumerate(
            (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"))
        )
    ]
    write(tmp_path / "st" / "modules.json", json.dumps(modules))
    write(
        tmp_path / "st" / "sentence_bert_config.json",
        json.dumps({"max_seq_length": 20, "do_lower_case": True}),
    )
    return tmp_path / "st", m


def test_load_sentence_transformers_modules(folder, tmp_path):
    root, m = folder
    raw = json.loads((root / "tokenizer.json").read_text("utf-8"))
    write(root / "tokenizer.json", json.dumps(raw | {"normalizer": {"type": "NFKC"}}))
    got = checkpoints.load(root, "float32")
    assert got.config.normalize and got.config.max_seq_length == 20 and got.config.pooling == "mean"
    assert np.array_equal(got.tokenize(["A MAN"])[0], got.tokenize(["a man"])[0])
    m.tokenizer.enable_truncation(20)
    assert (
        np.abs(got.encode(TEXTS[:3]) - M.unit(m.encode([t.lower() for t in TEXTS[:3]]))).max()
        < 1e-6
    )
    # The same weights in two shards and in half precision
    tensors, _ = M.read_safetensors(root / "model.safetensors")
    names, index = sorted(tensors), {}
    for i, part in enumerate((names[::2], names[1::2])):
        M.write_safetensors(
            root / f"part-{i}.safetensors",
            {k: tensors[k].half() if tensors[k].is_floating_point() else tensors[k] for k in part},
        )
        index |= {k: f"part-{i}.safetensors" for k in part}
    (root / "model.safetensors").unlink()
    write(root / "model.safetensors.index.json", json.dumps({"weight_map": index}))
    assert (checkpoints.load(root, "float32").encode(TEXTS) * got.encode(TEXTS)).sum(
        1
    ).min() > 0.9999
    M.write_safetensors(root / "part-0.safetensors", tensors)
    with pytest.raises(M.InputError, match="part-1.safetensors: holds what another file holds"):
        checkpoints.load(root)


def edit(path, **changes):
    value = json.loads(path.read_text())
    value.update(changes)
    write(path, json.dumps({k: v for k, v in value.items() if v is not ...}))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda r: (r / "config.json").unlink(), "config.json: cannot read .No such file"),
        (lambda r: write(r / "config.json", "{"), "config.json: not readable as JSON"),
        (
            lambda r: edit(r / "config.json", model_type="t5"),
            "model_type is 't5', expected one of bert",
        ),
        (
            lambda r: edit(r / "config.json", hidden_size=...),
            "hidden_size is None, expected a whole number",
        ),
        (
            lambda r: edit(r / "config.json", num_attention_heads=5),
            "expected a divisor of hidden_size",
        ),
        (
            lambda r: edit(r / "config.json", hidden_act="swish9"),
            "hidden_act is 'swish9', expected one of gelu",
        ),
        (
            lambda r: edit(r / "config.json", position_embedding_type="relative_key"),
            "position_embedding_type is 'relative_key', expected one of absolute",
        ),
        (lambda r: edit(r / "config.json", vocab_size=9), "vocab_size is 9, expected"),
        (
            lambda r: edit(r / "config.json", num_hidden_layers=3),
            "num_hidden_layers is 3, expected 4",
        ),
        (
            lambda r: edit(r / "config.json", intermediate_size=64),
            r"up.weight: .* shape torch.Size\(\[48, 32\]\) .* torch.Size\(\[64, 32\]\)",
        ),
        (
            lambda r: (r / "tokenizer.json").unlink() or write(r / "sentencepiece.bpe.model", "x"),
            "sentencepiece.bpe.model is there. Convert it once",
        ),
        (
            lambda r: (r / "tokenizer.json").unlink() or write(r / "vocab.txt", "x"),
            "vocab.txt is there. Convert it once",
        ),
        (
            lambda r: write(r / "tokenizer.json", "{}"),
            "tokenizer.json: not a usable tokenizer: Model missing",
        ),
        (
            lambda r: edit(r / "tokenizer.json", post_processor=None),
            "tokenizer.json: .* adds no start and end tokens",
        ),
        (
            lambda r: write(
                r / "tokenizer.json", (r / "tokenizer.json").read_text().replace("<pad>", "<gap>")
            ),
            "no pad token",
        ),
        (
            lambda r: (r / "model.safetensors").unlink() or write(r / "pytorch_model.bin", "x"),
            "pytorch_model.bin is there, but it may run code",
        ),
        (
            lambda r: write(r / "model.safetensors", (r / "model.safetensors").read_bytes()[:-7]),
            "model.safetensors: not a valid safetensors file: .* truncated",
        ),
        (
            lambda r: M.write_safetensors(r / "model.safetensors", {"x": torch.ones(2)}),
            "no 2-dimensional embeddings.word_embeddings.weight",
        ),
        (
            lambda r: edit(r / "1_Pooling" / "config.json", pooling_mode_max_tokens=True),
            r"1_Pooling/config.json: pooling is \['mean', 'max'\], expected one of mean",
        ),
        (
            lambda r: write(
                r / "modules.json",
                (r / "modules.json")
                .read_text()
                .replace("models.Normalize", "models.WeightedLayerPooling"),
            ),
            "others are not supported",
        ),
        (lambda r: write(r / "modules.json", "[1]"), "not a list of modules"),
        (
            lambda r: edit(r / "sentence_bert_config.json", max_seq_length="x"),
            "sentence_bert_config.json: max_seq_length is 'x', expected a whole number",
        ),
    ],
)
def test_load_refuses_bad_directories(folder, damage, message):
    root, _ = folder
    damage(root)
    with pytest.raises(M.InputError, match=message) as e:
        checkpoints.load(root)
    assert str(root) in str(e.value)


def test_load_lists_missing_and_unexpected_weights(folder):
    root, _ = folder
    tensors, _ = M.read_safetensors(root / "model.safetensors")
    M.write_safetensors(
        root / "model.safetensors",
        {k: v for k, v in tensors.items() if "layer.1.output.dense.bias" not in k}
        | {"bert.encoder.layr.1.output.dense.bias": torch.ones(3)},
    )
    with pytest.raises(
        M.InputError, match='Missing key.*"layers.1.down.bias".*Unexpected key.*"encoder.layr.1'
    ):
        checkpoints.load(root)


def test_load_refuses_broken_weights(folder):
    root, _ = folder
    tensors, _ = M.read_safetensors(root / "model.safetensors")
    key = "bert.encoder.layer.1.attention.self.key.weight"
    for change, message in (
        ({key: tensors[key] * math.nan}, "not finite"),
        ({key: tensors[key].long()}, "has dtype"),
        ({key[5:]: tensors[key]}, "is there twice"),
        (
            {key: tensors[key][:5]},
            r"not an encoder's weights: .*parts of several dtypes or sizes.*\[5, 32\]",
        ),
        (
            {"bert.encoder.layer.9.attention.self.key.weight": tensors[key]},
            "num_hidden_layers is 4, expected 5, the layers in the weights",
        ),
    ):
        M.write_safetensors(root / "model.safetensors", {**tensors, **change})
        with pytest.raises(M.InputError, match=message):
            checkpoints.load(root).encode("red")
    # Half of the layers gone is no recurrent model: only the authors' students, known by
    # their bottleneck, leave R unsaid.
    M.write_safetensors(
        root / "model.safetensors",
        {k: v for k, v in tensors.items() if not any(f".layer.{i}." in k for i in (2, 3))},
    )
    with pytest.raises(
        M.InputError, match="num_hidden_layers is 4, expected 2, the layers in the weights"
    ):
        checkpoints.load(root)


def test_fingerprint_is_of_what_load_reads(folder):
    """A run inside the teacher's folder does not make it another teacher; its pooling would."""
    root, _ = folder
    first = checkpoints.fingerprint(root)
    write(root / "run" / "results.json", "{}")
    assert checkpoints.fingerprint(root) == first
    edit(root / "1_Pooling" / "config.json", pooling_mode_mean_tokens=False, pooling_mode="cls")
    assert checkpoints.fingerprint(root) != first


@needs_cases
@pytest.mark.parametrize(
    "name, tokens",
    [
        ("masked-lm-head", 48),  # the expected vectors were cut there, though no file says so
        ("pretraining-heads", 48),
        ("data-parallel-prefix", math.inf),
        ("short-position-table", math.inf),
        ("dense-tanh-normalize", math.inf),
        ("default-prompt", math.inf),
    ],
)
def test_load_models_that_people_have(name, tokens):
    """Vectors made with sentence-transformers 6.2 in float32."""
    expected = json.loads((CASES / "models" / "expected.json").read_text("utf-8"))
    want = np.array(expected["vectors"][name])
    texts = [*expected["texts"], expected["long"]][: len(want)]
    got = checkpoints.load(CASES / "models" / name, "float32", max_tokens=tokens).encode(texts)
    assert np.abs(got - want).max() < 1e-5


@needs_cases
@pytest.mark.parametrize("name", sorted(p.name for p in CASES.glob("models/*/")))
def test_load_agrees_with_sentence_transformers(name):
    """Heads, prefixes, position tables, Dense and prompts: opened by both, as each is."""
    reason = "sentence-transformers is not installed"
    st = pytest.importorskip("sentence_transformers", reason=reason)
    root = CASES / "models" / name
    texts = json.loads((CASES / "models" / "expected.json").read_text("utf-8"))["texts"]
    if name in ("data-parallel-prefix", "short-position-table"):
        pytest.skip("sentence-transformers itself opens it with random weights, or not at all")
    theirs = st.SentenceTransformer(str(root), device="cpu").encode(texts)
    assert np.abs(checkpoints.load(root, "float32").encode(texts) - theirs).max() < 1e-5


@pytest.mark.parametrize(
    "prefix, heads, between",
    [
        ("roberta.", ["lm_head.dense.weight", "lm_head.bias"], ""),
        ("bert.", ["cls.predictions.bias", "cls.seq_relationship.weight"], ""),
        ("", ["pooler.dense.weight", "classifier.weight", "qa_outputs.bias"], ""),
        ("module.", ["module.pooler.dense.bias"], ""),
        ("_orig_mod.bert.", ["_orig_mod.classifier.bias"], ""),
        ("model.encoder.xlm.", ["model.lm_head.weight"], ""),
        ("0.auto_model.", ["0.auto_model.pooler.dense.weight"], ""),
        ("module._orig_mod.model.", ["module._orig_mod.classifier.out_proj.weight"], ""),
        ("_fsdp_wrapped_module.", [], "_fsdp_wrapped_module."),
        ("state.", [], "module."),
    ],
)
def test_body_of_finds_any_prefix(tokenizer, tmp_path, capsys, prefix, heads, between):
    m = tiny(tokenizer)
    m.save(tmp_path / "m")
    names = {
        k: prefix + k.replace("encoder.layer.", f"encoder.layer.{between}")
        for k in M.to_hf(m.state_dict())
    }
    tensors = {names[k]: v for k, v in M.to_hf(m.state_dict()).items()}
    tensors |= {head: torch.ones(3, 3) for head in heads}
    M.write_safetensors(tmp_path / "m" / "model.safetensors", tensors)
    assert np.array_equal(
        checkpoints.load(tmp_path / "m", "float32").encode(TEXTS), m.encode(TEXTS)
    )
    told = capsys.readouterr().err
    known = {h.split(".")[-3] if "out_proj" in h else "" for h in heads}
    assert ("left out" in told) == any("pooler" not in h for h in heads), (told, known)
    for extra, message in (
        ({f"other.{k}": v for k, v in tensors.items() if "word_emb" in k}, "encoders under"),
        ({f"{prefix}encoder.layr.0.bias": torch.ones(3)}, "encoder.layr.0.bias"),
        ({"mystery.weight": torch.ones(3)}, "mystery.weight"),
    ):
        M.write_safetensors(tmp_path / "m" / "model.safetensors", {**tensors, **extra})
        with pytest.raises(M.InputError, match=message):
            checkpoints.load(tmp_path / "m")


@pytest.mark.parametrize("rows", [20, 66, 90])
@pytest.mark.parametrize("model_type", ["bert", "xlm-roberta"])
def test_complete_position_table_of_another_length(tokenizer, tmp_path, rows, model_type, capsys):
    m = tiny(tokenizer, model_type=model_type, max_position_embeddings=rows, max_seq_length=rows)
    m.save(tmp_path / "m")
    edit(tmp_path / "m" / "config.json", max_position_embeddings=66, max_seq_length=...)
    got = checkpoints.load(tmp_path / "m", "float32")
    assert got.config.max_seq_length == rows - got.config.first_position
    assert (f"{rows}" in capsys.readouterr().err) == (rows != 66)
    assert got.encode(["word " * 300]).shape == (1, 32)


def test_read_modules_dense_and_prompt(folder, tmp_path):
    """A Dense with an activation between pooling and Normalize, and a default prompt."""
    root, m = folder
    torch.manual_seed(0)
    layers = [torch.nn.Linear(32, 24), torch.nn.Linear(24, 8, bias=False)]
    modules = json.loads((root / "modules.json").read_text())
    for i, (layer, activation) in enumerate(zip(layers, ("Tanh", "Identity"))):
        place = root / f"{i + 2}_Dense"
        place.mkdir()
        config = {"out_features": layer.out_features, "bias": layer.bias is not None}
        config["activation_function"] = f"torch.nn.modules.activation.{activation}"
        write(place / "config.json", json.dumps(config))
        weights = {f"linear.{k}": v for k, v in layer.state_dict().items()}
        M.write_safetensors(place / "model.safetensors", weights)
        modules.insert(i + 2, {"path": place.name, "type": "sentence_transformers.models.Dense"})
    write(root / "modules.json", json.dumps(modules))
    prompts = {"prompts": {"query": "query: "}, "default_prompt_name": "query"}
    write(root / "config_sentence_transformers.json", json.dumps(prompts))
    got = checkpoints.load(root, "float32")
    m.tokenizer.enable_truncation(20)
    texts = [f"query: {t}".lower() for t in TEXTS[:3]]
    want = layers[1](torch.tanh(layers[0](torch.from_numpy(m.encode(texts))))).detach().numpy()
    assert np.abs(got.encode(TEXTS[:3]) - M.unit(want)).max() < 1e-6
    assert np.abs(got.encode(texts, prompt="") - M.unit(want)).max() < 1e-6
    assert not np.allclose(got.encode(TEXTS[:3], prompt=""), got.encode(TEXTS[:3]))
    got.save(tmp_path / "ours")  # and from our own files
    assert np.array_equal(
        checkpoints.load(tmp_path / "ours", "float32").encode(TEXTS), got.encode(TEXTS)
    )
    student = msd.make_student(got, 8, (1, 2), 2)
    assert (
        student.config.width == 8 and msd.ledger(student.config)["other"] == 32 * 24 + 24 + 24 * 8
    )
    assert all(
        torch.equal(a, b) for a, b in zip(student.dense.parameters(), got.dense.parameters())
    )
    (root / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(M.InputError, match="2_Dense/model.safetensors: no such file"):
        checkpoints.load(root)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("2_Dense/config.json", {"use_residual": True}, "use_residual is True"),
        ("2_Dense/config.json", {"module_input_name": "token_embeddings"}, "module_input_name"),
        ("1_Pooling/config.json", {"include_prompt": False}, "include_prompt is False"),
        ("config_sentence_transformers.json", {"truncate_dim": 8}, "truncate_dim is 8"),
        ("sentence_bert_config.json", {"processing_kwargs": {"text": {}}}, "processing_kwargs"),
        ("config_sentence_transformers.json", {"default_prompt_name": "q"}, "'q' is not among"),
        ("tokenizer_config.json", {"truncation_side": "left"}, "truncation_side is 'left'"),
    ],
)
def test_read_modules_refuses_what_would_change_the_vectors(folder, name, changes, message):
    root, _ = folder
    modules = json.loads((root / "modules.json").read_text())
    modules.insert(2, {"path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    write(root / "modules.json", json.dumps(modules))
    layer = {"linear.weight": torch.eye(32), "linear.bias": torch.zeros(32)}
    write(root / "2_Dense" / "config.json", json.dumps({"out_features": 32}))
    M.write_safetensors(root / "2_Dense" / "model.safetensors", layer)
    harmless = {"truncate_dim": 32, "default_prompt_name": "query", "prompts": None}
    write(root / "config_sentence_transformers.json", json.dumps(harmless))
    edit(root / "1_Pooling" / "config.json", include_prompt=False)
    assert checkpoints.load(root).config.prompt == ""
    edit(root / "config_sentence_transformers.json", prompts={"query": "query: "})
    edit(root / "1_Pooling" / "config.json", include_prompt=True)
    assert checkpoints.load(root).config.prompt == "query: "
    edit(root / name, **changes)
    with pytest.raises(M.InputError, match=f"{name}: .*{message}"):
        checkpoints.load(root)


def test_collect_limit_and_pad_token_of_tokenizer_config(folder, tokenizer, tmp_path):
    """The length is that of tokenizer_config.json where nothing else says it; a pad token that is
    named there alone survives saving."""
    root, _ = folder
    (root / "sentence_bert_config.json").unlink()
    raw = (root / "tokenizer.json").read_text("utf-8").replace('"<pad>"', '"<PAD>"')
    write(root / "tokenizer.json", raw)
    write(root / "tokenizer_config.json", '{"pad_token": "<PAD>", "model_max_length": 9}')
    m = checkpoints.load(root, "float32")
    assert m.config.max_seq_length == 9 and m.config.pad_token_id == 1
    m.save(tmp_path / "again")
    assert checkpoints.load(tmp_path / "again").config == m.config
    edit(root / "tokenizer_config.json", model_max_length=2)
    with pytest.raises(M.InputError, match="tokenizer_config.json: max_seq_length is 2, expected"):
        checkpoints.load(root)
    edit(root / "tokenizer_config.json", model_max_length=int(1e30))
    assert checkpoints.load(root).config.max_seq_length == 66


@pytest.mark.parametrize("name", ["t5", "distilbert", "mpnet"])
def test_complete_names_teachers_that_work(folder, name):
    root, _ = folder
    edit(root / "config.json", model_type=name)
    with pytest.raises(M.InputError, match=f"model_type is '{name}'.*all-MiniLM-L6-v2"):
        checkpoints.load(root)
