"""Multi-stage cross-lingual distillation (Ding et al., Findings of NAACL 2022, arXiv 2209.05869), in the paper's order:
losses, stages, presets, the models of each stage, evaluation, and what one does with a finished student.

    python msd.py similarity DIR "sentence" "Satz"      python msd.py search DIR corpus.txt "query" [--top 5]
    python msd.py encode DIR < lines > vectors.npy      python msd.py info DIR
    python msd.py plot curve.svg results.json ...
"""
import argparse
import math
import sys
import unicodedata
from dataclasses import MISSING, dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F

from data import read_lines
from model import Config, Encoder, InputError, load, need, read_json, unit


# --------------------------------------------------------------------------------------------------------------- losses
def mse(x, y):
    """Mean squared error over batch and dimensions; x, y (N, H)."""
    return (x - y).square().mean()


def cos_matrix(x, y):
    """Cosines of all rows of x (N, H) with all rows of y (M, H): (N, M)."""
    return F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).T


def contrastive(S_s, S_t, T_s):
    """The soft contrastive loss of stage 4: mean_ij (cos(S(s_i), S(t_j)) - cos(T(s_i), T(s_j)))^2; all (N, H).

    The teacher's own similarities in the batch are the target, diagonal included: no temperature, no hard negatives."""
    return mse(cos_matrix(S_s, S_t), cos_matrix(T_s, T_s))                             # both (N, N)


# --------------------------------------------------------------------------------------------------------------- stages
@dataclass(frozen=True)
class Stage:
    """One row of the paper's schedule."""
    title: str
    source: str               # who gives the targets: teacher or assistant
    layers: bool              # False: the embedding blocks alone, pooled, on both sides of the loss
    own: bool                 # True: each side has its own target; False: the English side's serves both
    contrast: bool = False    # add the contrastive loss


STAGES = {
    1: Stage("teaching assistant", "teacher", layers=True, own=False),
    2: Stage("align the bottleneck", "assistant", layers=False, own=True),
    3: Stage("distil", "assistant", layers=True, own=True),
    4: Stage("multilingual contrastive learning", "teacher", layers=True, own=False, contrast=True),
}


def stage_loss(stage, model, s, t, y_s, y_t=None, contrast=True, gather=None):
    """The loss terms of one stage for a batch, to be summed 1:1:1: {"en": ..., "tr": ..., and "mcl" in stage 4}.

    stage: 1 to 4. s, t: (ids, mask), each (N, T), of English sentences and translations. y_s, y_t: targets (N, H) of the
    two sides (STAGES[stage].source gives them; y_t is unused where the English side's serves both). gather: where a batch
    is spread over processes, makes of this one's vectors those of the whole batch, to which the targets belong."""
    X_s, X_t = model(*s, layers=STAGES[stage].layers), model(*t, layers=STAGES[stage].layers)     # (N, H) each
    if gather:
        X_s, X_t = gather(X_s), gather(X_t)
    terms = {"en": mse(X_s, y_s), "tr": mse(X_t, y_t if STAGES[stage].own else y_s)}
    if STAGES[stage].contrast and contrast:
        terms["mcl"] = contrastive(X_s, X_t, y_s)
    return terms


# -------------------------------------------------------------------------------------------------------------- presets
def flag(help, default=MISSING, ok=lambda v: 0 < v < math.inf, expected="a positive number"):
    """A field of Preset with its help, and what its value, or each of four, must be."""
    return field(default=default, metadata={"help": help, "ok": ok, "expected": expected})


@dataclass(frozen=True)
class Preset:
    """Everything a run needs to know. Every field is a flag of train.py; tuples hold stages 1 to 4."""
    bottleneck: int = flag("B, width of the student's word table; 128 takes half the memory of 256; 0 keeps the full table and skips stage 2",
                           ok=lambda v: v >= 0, expected="0 or more")
    layers: int = flag("K, unique layers, the assistant's first; fewer is smaller, not faster: speed follows K x R",
                       ok=lambda v: v >= 1, expected="1 or more")
    recurrence: int = flag("R, times the K layers are applied; the paper keeps K x R at the assistant's depth",
                           ok=lambda v: 1 <= v < 1000, expected="1 or more")
    lr: tuple = flag("peak learning rate, one for all stages or four with commas; small models on small data take 1e-3 and more",
                     (16e-5, 16e-5, 16e-5, 16e-5))
    batch: tuple = flag("pairs a step, one or four with commas; in stage 4 each pair is contrasted with the rest of its batch", (64, 128, 64, 64))
    epochs: tuple = flag("passes over the pairs, one or four with commas; fractions are fine, 0.1 is a quick look", (20, 10, 10, 60),
                         lambda v: 0 < v < 1e6)
    init: str = flag("start of the bottleneck: svd of the assistant's table, text (the same, weighted by how often a piece occurs: "
                     "best for large vocabularies), or paper (noise)", "svd", ("svd", "text", "paper").__contains__, "svd, text or paper")
    targets: str = flag("the teacher's vectors: raw (before Normalize), unit, or scaled (unit times the root of the width)", "raw",
                        ("raw", "unit", "scaled").__contains__, "raw, unit or scaled")
    dropout: float = flag("0 suits one or a few passes; 0.1 for the paper's long schedule", 0.1, lambda v: 0 <= v < 1, "0 up to 1")
    max_tokens: int = flag("longer sentences are truncated; lower it where memory is short", 128, lambda v: v >= 3, "3 or more")
    max_chars: int = flag("pairs with a longer side are dropped, as in the paper", 250)
    max_lines: tuple = flag("read at most so many lines of each file, one or four with commas", (500_000, 300_000, 300_000, 500_000))
    vocab: int = flag("pieces of the multilingual vocabulary, where it is trained here; more helps across languages, and the bottleneck makes "
                      "them cheap", 32_000, lambda v: v >= 100, "100 or more")
    align: int = flag("sentence pairs from which a vocabulary trained here learns its start, by word alignment; 0 does without",
                      300_000, lambda v: v >= 0, "0 or more")
    warmup: float = flag("share of a stage's steps over which the learning rate rises", 0.1, lambda v: 0 <= v < 1, "0 up to 1")
    weight_decay: float = flag("AdamW's, not on biases and LayerNorm", 0.01, lambda v: 0 <= v < math.inf, "0 or more")
    clip: float = flag("largest gradient norm; a log full of much larger norms asks for a lower learning rate", 1.0, lambda v: v > 0)


PRESETS = {
    # The demo begins at the spelling alone (align 0), so that its table shows what stage 1 does.
    "demo": Preset(12, 2, 2, lr=(2e-3, 4e-3, 2e-3, 2e-3), epochs=(0.25, 1, 0.12, 0.18), dropout=0.0, vocab=4000, align=0),
    "minilm": Preset(128, 6, 2, batch=(64, 256, 64, 64), init="text"),
    "xlmr": Preset(128, 3, 4, lr=(16e-5, 16e-5, 8e-5, 16e-5), init="text"),
}

# The demo's own teacher, trained on the built-in scores; train.py sets the vocabulary.
DEMO_TEACHER = Config(0, 128, 4, 4, 512, 64, model_type="bert", pad_token_id=1, max_seq_length=64)
DEMO_TEACHER_STEPS = 450


# ------------------------------------------------------------------------------------------------ the models of a stage
def init_weights(model, generator, std=0.02):
    """BERT's random start: normal(0, std), LayerNorm at identity, biases and the pad row at zero."""
    for name, p in model.named_parameters():
        with torch.no_grad():
            if "norm" in name:
                p.fill_(float(name.endswith("weight")))
            elif name.endswith("bias"):
                p.zero_()
            else:
                p.normal_(0, std, generator=generator)
    model.embeddings.word.weight.data[model.config.pad_token_id] = 0
    return model


def align(e, e_at, f, f_at, iterations=5, longest=200):
    """Which English piece a foreign piece translates, from sentence pairs alone: IBM Model 1 (Brown et al. 1993), by EM,
    without its empty word.

    e, e_at and f, f_at: tokenised English and foreign sentences, as Encoder.tokenize gives them; start and end tokens take
    no part, nor do pairs of more than `longest` links, which say little and cost most: one in five at 9 words a side.
    Returns, for each two pieces that occur together, (foreign piece, English piece, expected number of links), each (L,)."""
    V, keys, width = int(e.max(initial=0)) + 1, [np.zeros(0, np.int64)], []
    for a, b, c, d in zip(e_at[:-1] + 1, e_at[1:] - 1, f_at[:-1] + 1, f_at[1:] - 1):
        if 0 < (b - a) * (d - c) <= longest:                                           # each foreign piece with each English one
            keys.append((f[c:d, None].astype(np.int64) * V + e[a:b]).ravel())
            width += [b - a] * (d - c)
    key, keys, width = np.concatenate(keys), None, np.array(width, np.int64)           # (l,) links; (m,) of each foreign token
    token = np.repeat(np.arange(len(width)), width)                                    # (l,)
    kinds, kind = np.unique(key, return_inverse=True)                                  # (L,), (l,)
    english, t = kinds % V, np.ones(len(kinds))                                        # t(f | e), not yet normalised
    count = np.zeros(len(kinds))
    for _ in range(iterations if len(kinds) else 0):
        p = t[kind]                                                                    # (l,) a link's share of its foreign token
        p /= np.add.reduceat(p, np.cumsum(width) - width)[token]
        count = np.bincount(kind, p, len(kinds))
        t = count / np.bincount(english, count)[english]
    return kinds // V, english, count


@torch.no_grad()
def make_assistant(teacher, tokenizer, pad_id, english=(), translations=()):
    """Where no multilingual checkpoint exists: the teacher's body with a new vocabulary, for stage 1 to train.

    Each new piece starts at the mean of the teacher's pieces for its text; special tokens take over the teacher's rows,
    so what the teacher knows of English survives: piece by piece the two read nearly the same. With sentence pairs, a
    piece of another language starts at the mean of the teacher's pieces that it translates, by their share in align(),
    if a pair that takes part there holds it; one that English uses, too, at the mean of both starts, by links and tokens."""
    word, old = teacher.embeddings.word.weight.float(), teacher.tokenizer              # (V, H)
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda x: x[1])
    pieces = [p.replace("▁", " ") for p, _ in vocab]                                   # the space matters to a RoBERTa teacher
    ids = [e.ids for e in old.encode_batch(pieces, add_special_tokens=False)]
    start, end = (old.encode("").ids[i] for i in (0, -1))
    unk = old.token_to_id("[UNK]") if old.token_to_id("[UNK]") is not None else old.token_to_id("<unk>")
    for name, row in (("<s>", start), ("</s>", end), ("<unk>", unk), ("<pad>", teacher.config.pad_token_id)):
        ids[tokenizer.token_to_id(name)] = [] if row is None else [row]
    # Every row is a weighted mean of the teacher's rows `old_piece`: here of its own text, below also of what it translates.
    lengths, old_piece = torch.tensor([len(row) for row in ids]), torch.tensor([i for row in ids for i in row])
    piece = torch.repeat_interleave(lengths)
    weight = 1 / lengths[piece]
    # BERT counts positions from 0: a RoBERTa teacher's rows move down to where they will be read.
    first = teacher.config.first_position
    config = replace(teacher.config, vocab_size=len(ids), pad_token_id=pad_id, model_type="bert", normalize=False,
                     do_lower_case=False, max_position_embeddings=teacher.config.max_position_embeddings - first)
    model = Encoder(config, tokenizer, teacher.dtype)
    if len(english):
        f, e, n = (torch.from_numpy(x) for x in align(*teacher.tokenize(english), *model.tokenize(translations)))
        own = torch.from_numpy(np.bincount(model.tokenize(english)[0], minlength=len(ids))).float()
        own[own == 0] = 1e-6                                                           # tells only where nothing is linked
        own[[tokenizer.token_to_id(name) for name in ("<s>", "</s>", "<unk>")]] = 2 ** 30   # keep their rows
        piece, old_piece, weight = torch.cat([piece, f]), torch.cat([old_piece, e]), torch.cat([weight * own[piece], n.float()])
    table, total = torch.zeros(len(ids), word.shape[1]), torch.zeros(len(ids), 1)      # (V, H), (V, 1)
    for part in torch.arange(len(piece)).split(2 ** 14):                               # not all rows in memory at once
        table.index_add_(0, piece[part], word[old_piece[part]] * weight[part, None])
        total.index_add_(0, piece[part], weight[part, None])
    table = torch.where(total > 0, table / total, word.mean(0))
    table[pad_id] = 0
    state = {k: v.float().clone() for k, v in teacher.state_dict().items()}
    state["embeddings.word.weight"], state["embeddings.position.weight"] = table, state["embeddings.position.weight"][first:]
    model.load_state_dict(state)
    return model


def check_sizes(c, B, K, R):
    """Raises: InputError where an assistant of Config c cannot give a student of these sizes."""
    need(1 <= K <= c.num_hidden_layers, f"--layers {K}: expected 1 to {c.num_hidden_layers}, the assistant's")
    need(0 <= B < c.hidden_size, f"--bottleneck {B}: expected less than {c.hidden_size}, the assistant's hidden size, or 0 for none")
    need(R >= 1, f"--recurrence {R}: expected 1 or more")
    need(c.bottleneck_size == 0, "the assistant has a bottleneck itself; give the full-size model")


@torch.no_grad()
def make_student(assistant, B, K, R, init="svd", seed=0, counts=None):
    """The student before stage 2 (or, without a bottleneck, 3): B -> H embedding block, the assistant's first K layers, R times.

    init: "svd" starts the bottleneck from the truncated SVD of the assistant's word table, with its positions, token
    types and LayerNorm; "text" weights each row by its piece's occurrences, counts (V,), to the power 3/4: frequent pieces
    are kept best, but full stops do not crowd out what carries meaning; "paper" starts the whole block from noise.
    Raises: InputError for sizes that do not fit."""
    c = assistant.config
    check_sizes(c, B, K, R)
    student = Encoder(replace(c, bottleneck_size=B, num_hidden_layers=K, recurrence=R), assistant.tokenizer, assistant.dtype)
    init_weights(student, torch.Generator().manual_seed(seed)).to(assistant.device)
    student.layers.load_state_dict({k: v.float() for k, v in assistant.layers.state_dict().items() if int(k.split(".")[0]) < K})
    ours, theirs = student.embeddings, assistant.embeddings
    if B and init == "paper":
        return student
    for part in ("position", "token_type", "norm"):
        getattr(ours, part).load_state_dict(getattr(theirs, part).state_dict())
    E = theirs.word.weight                                                             # (V, H)
    if not B:
        ours.word.weight.copy_(E)
        return student
    # The right singular vectors of E are the eigenvectors of E'E, which is only (H, H): exact, and no copy of E.
    gram = torch.zeros(c.hidden_size, c.hidden_size, dtype=torch.float64, device=E.device)
    n = torch.ones(len(E)) if init == "svd" else torch.from_numpy(counts) ** 0.75      # (V,)
    for rows, weight in zip(E.split(16384), n.to(E.device).double().split(16384)):
        rows = rows.double()
        gram += rows.T @ (rows * weight[:, None])
    P = torch.linalg.eigh(gram)[1][:, -B:].float()                                     # (H, B), the B largest
    ours.word.weight.copy_(E.float() @ P)                                              # E ~ (E P) P'
    ours.project.weight.copy_(P)
    return student


def ledger(config):
    """Parameters by part, {"embedding", "layers", "other", "total"}, by building the model without memory.

    embedding: word table and B -> H map, positions, token types, LayerNorm. No part is left for other so far."""
    with torch.device("meta"):
        sizes = {k: p.numel() for k, p in Encoder(config).named_parameters()}
    parts = {part: sum(n for k, n in sizes.items() if k.startswith(prefix)) for part, prefix in (("embedding", "embeddings."), ("layers", "layers."))}
    return {**parts, "other": sum(sizes.values()) - sum(parts.values()), "total": sum(sizes.values())}


# ----------------------------------------------------------------------------------------------------------- evaluation
def ranks(x):
    """Ranks from 1, ties averaged."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def spearman(x, y):
    """Spearman's rank correlation of two arrays (n,): Pearson's on averaged ranks; nan where one is constant."""
    a, b = (r - r.mean() for r in (ranks(x), ranks(y)))
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm else float("nan")


def similarity_scores(encode, sets):
    """{"en-de": cosine of each pair (n,)} for the sets of data.read_sts; every distinct sentence is encoded once."""
    texts = list(dict.fromkeys(t for a, b, _ in sets.values() for t in (*a, *b)))
    row, v = {t: i for i, t in enumerate(texts)}, unit(encode(texts))
    return {name: (v[[row[t] for t in a]] * v[[row[t] for t in b]]).sum(1) for name, (a, b, _) in sets.items()}


def retrieval(x, y, block=1024):
    """Translation accuracy in both directions, in percent: x[i] and y[i] (n, H) are translations, and the nearest
    neighbour by cosine is the right one. A tie counts as wrong, so equal vectors cannot score."""
    x, y = unit(x), unit(y)
    def hits(a, b):
        n = 0
        for i in range(0, len(a), block):
            sims = a[i:i + block] @ b.T                                                # (block, n)
            right = sims[np.arange(len(sims)), np.arange(i, i + len(sims))]
            n += int(((sims >= right[:, None]).sum(1) == 1).sum())
        return 100 * n / len(a)
    return hits(x, y), hits(y, x)


def mean_spearman(scores):
    """(all, monolingual, cross-lingual) means over sets named A-B; nan for none."""
    def mean(keep):
        kept = [v for k, v in scores.items() if keep(*k.split("-"))]
        return float(np.mean(kept)) if kept else float("nan")
    return mean(lambda a, b: True), mean(lambda a, b: a == b), mean(lambda a, b: a != b)


def bootstrap(sets, a, b, n=1000, seed=0):
    """How sure is the difference b - a of two models? {"all": [difference, low, high], "mono": ..., "cross": ...} of mean
    Spearman x 100, with the bounds of 95 % of n paired resamples of the sentence pairs.

    sets: data.read_sts; a, b: similarity_scores of the two. Sets of one length share their draws: the languages of STS
    benchmark are translations of the same pairs, and drawing them apart would make the bounds too narrow."""
    def difference(rows):
        means = [mean_spearman({k: 100 * spearman(c[k][rows[len(c[k])]], sets[k][2][rows[len(c[k])]]) for k in sets}) for c in (a, b)]
        return np.subtract(means[1], means[0])                                         # (3,)
    rng, sizes = np.random.default_rng(seed), sorted({len(s[2]) for s in sets.values()})
    whole = difference({m: np.arange(m) for m in sizes})
    draws = np.array([difference({m: rng.integers(0, m, m) for m in sizes}) for _ in range(n)])
    low, high = np.nanpercentile(draws, [2.5, 97.5], axis=0)                           # of tiny sets a draw may be constant
    return {name: [float(x[i]) for x in (whole, low, high)] for i, name in enumerate(("all", "mono", "cross"))}


def evaluate(model, sets, dev, dev_targets):
    """(one row of the table, cosines by set): Spearman x 100 by set, accuracy both ways and 100 x MSE to the teacher by
    dev language. sets: data.read_sts; dev: {language: (english, translations)}; dev_targets: {language: vectors (n, H)}."""
    cosines = similarity_scores(model.encode, sets)
    row = {"spearman": {k: 100 * spearman(c, sets[k][2]) for k, c in cosines.items()}, "accuracy": {}, "mse": {}}
    for language, (english, translated) in dev.items():
        x, y = (model.encode(list(side), normalize=False) for side in (english, translated))
        row["accuracy"][language] = retrieval(x, y)
        row["mse"][language] = [100 * float(np.square(v - dev_targets[language]).mean()) for v in (x, y)]
    return row, cosines


def look(vectors):
    """What a teacher's vectors (n, H) look like: mean norm, mean off-diagonal cosine, and the MSE of the best constant
    guess, which any student must beat."""
    v = np.asarray(vectors, np.float32)
    u, n = unit(v), len(v)
    total = u.sum(0)
    cosine = float((total @ total - n) / (n * (n - 1))) if n > 1 else float("nan")
    return {"n": n, "width": v.shape[1], "norm": float(np.linalg.norm(v, axis=1).mean()), "cosine": cosine, "constant_mse": float(v.var(0).mean())}


def plot(out, files):
    """Draw mean Spearman, monolingual and cross-lingual, against size: the student of each results.json, and the mean of
    the assistants as lines. Raises: InputError without matplotlib, an optional extra, or for a file of another kind."""
    try:
        from matplotlib import rcParams
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("plot needs matplotlib, which the rest of this project does not: pip install matplotlib") from None
    points, bars = [], []
    for file in files:
        try:
            rows = read_json(file)["rows"]
            last = rows[[k for k in rows if k.startswith("student, stage")][-1]]
            points.append((100 * last["sizes"]["total"] / rows["assistant"]["sizes"]["total"], *mean_spearman(last["spearman"])[1:]))
            bars.append(mean_spearman(rows["assistant"]["spearman"])[1:])
        except (KeyError, IndexError, TypeError, AttributeError) as e:
            raise InputError(f"{file}: not the results.json of a run with a student ({e!r} is missing)") from None
    rcParams.update({"svg.hashsalt": "msd", "svg.fonttype": "none"})                   # the same bytes each time; text stays text
    figure = Figure((6, 3.5), layout="constrained")
    ax, points = figure.subplots(), sorted(points)
    for i, name in enumerate(("monolingual", "cross-lingual")):
        ax.plot([p[0] for p in points], [p[i + 1] for p in points], "o", color=f"C{i}", label=f"student, {name}")
        ax.axhline(np.mean([b[i] for b in bars]), color=f"C{i}", linestyle=":", label=f"assistant, {name}")
    ax.set(xlabel="parameters, % of the assistant's", ylabel="mean Spearman x 100", xlim=(0, 105))
    ax.legend(fontsize="small")
    try:
        figure.savefig(out, metadata={"Date": None} if str(out).endswith(".svg") else None)
    except (OSError, ValueError) as e:
        raise InputError(f"{out}: cannot draw there ({e}); expected a name such as curve.svg or curve.png") from None


# ---------------------------------------------------------------------------------------------------------------- usage
def read_texts(path):
    """The lines of a text file or, for "-", of standard input."""
    out = []
    for number, text, fault in read_lines("/dev/stdin" if path == "-" else path):
        need(not fault, f"{path}:{number}: {fault}")
        out.append(text)
    need(out, f"{path}: no lines to read")
    return out


def main(argv=None):
    ap = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--dtype", choices=("float32", "bfloat16"), help="arithmetic; leave it out for the best on this device")
    sub = ap.add_subparsers(dest="command", required=True)
    for name, extra in (("similarity", ("a", "b")), ("encode", ()), ("search", ("corpus", "query")), ("info", ())):
        p = sub.add_parser(name)
        for arg in ("dir", *extra):
            p.add_argument(arg)
    sub.choices["search"].add_argument("--top", type=int, default=5, help="how many lines to show")
    p = sub.add_parser("plot")
    p.add_argument("out")
    p.add_argument("results", nargs="+")
    args = ap.parse_args(argv)
    if any(unicodedata.category(x) in ("Cc", "Cs") for x in " ".join(map(str, vars(args).values()))) or getattr(args, "top", 1) < 1:
        raise InputError("expected text in UTF-8 without control characters, and --top of 1 or more")
    if args.command == "plot":
        return plot(args.out, args.results)
    model = load(args.dir, args.dtype)
    if args.command == "similarity":
        a, b = unit(model.encode([args.a, args.b]))
        print(f"{float(a @ b):.4f}")
    elif args.command == "encode":
        np.save(sys.stdout.buffer, model.encode(read_texts("-")))
    elif args.command == "search":
        lines = read_texts(args.corpus)
        scores = unit(model.encode(lines)) @ unit(model.encode([args.query]))[0]       # (n,)
        for i in np.argsort(-scores, kind="stable")[:args.top]:
            print(f"{scores[i]:.4f}\t{i + 1}\t{lines[i]}")
    else:
        c = model.config
        print(f"{args.dir}: {c.model_type}, hidden {c.hidden_size}, {c.num_hidden_layers} layers x {c.recurrence}, "
              f"bottleneck {c.bottleneck_size or 'none'}, vocabulary {c.vocab_size}, {c.pooling} pooling"
              f"{', unit vectors' if c.normalize else ''}, at most {c.max_seq_length} tokens")
        for part, n in ledger(c).items():
            print(f"{part:10}{n:14,} parameters{n * 4 / 2**20:10.1f} MB float32{n * 2 / 2**20:10.1f} MB bfloat16")


class Parser(argparse.ArgumentParser):
    """argparse, its complaints in one line like every other."""
    def error(self, message):
        raise InputError(f"{message}; --help lists what there is")


def run_cli(main):
    """Call a command line's main(); an InputError becomes one line and exit code 2."""
    try:
        main()
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    run_cli(main)
