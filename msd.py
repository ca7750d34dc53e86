"""Multi-stage distillation: the method of Ding et al., Findings of NAACL 2022, arXiv 2209.05869.

The paper in its order, then what a run needs where no published assistant is at hand:
    losses  |  the four stages  |  sizes and presets  |  how a student begins  |  an assistant

s is an English sentence, t its translation; T the teacher, A the assistant, S the student.
N pairs a batch, H hidden size and width of the vectors (a Dense module may change the latter), V
vocabulary, B bottleneck, K unique layers, R recurrences; T in a shape is tokens.
What runs the stages on files is train.py.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from model import Encoder, need

# ----------------------------------------------------------------------------------------- losses


def mse(x, y):
    """Mean squared error over batch and dimensions; x, y (N, H)."""
    return (x - y).square().mean()


def cos_matrix(x, y):
    """Cosines of all rows of x (N, H) with all rows of y (M, H): (N, M)."""
    return F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).T


def contrastive(S_s, S_t, T_s):
    """The soft contrastive loss of stage 4; S(s), S(t), T(s), each (N, H).

    mean_ij (cos(S(s_i), S(t_j)) - cos(T(s_i), T(s_j)))^2. The teacher's own similarities in the
    batch are the target, diagonal included: no temperature, no hard negatives.
    """
    # A temperature would only weigh this term against the others; to matter it needs another
    # distance, such as the KL divergence between the softmax of rows.
    return mse(cos_matrix(S_s, S_t), cos_matrix(T_s, T_s))  # both (N, N)


# -------------------------------------------------------------------------------- the four stages
@dataclass(frozen=True)
class Stage:
    """One row of the paper's schedule; a preset may change its numbers."""

    title: str
    targets: str  # whose vectors are the targets: teacher or assistant
    epochs: float  # passes over the pairs
    batch: int  # pairs a step
    max_lines: int  # of each file
    per_side: bool = False  # True: each side has its own target; False: the English one serves both
    embeddings_only: bool = False  # on both sides of the loss: no layers, mean pooling
    contrast: bool = False  # add the contrastive loss, "mcl" in the log
    extra: bool = False  # train on the files of --extra, too


# Stage 1 trains the assistant, the others the student. For a fifth: a row here, what is new of its
# loss in stage_loss, and its numbers in those PRESETS that have their own.
STAGES = {
    1: Stage("teaching assistant", "teacher", 20, 64, 500_000),
    2: Stage(
        "align", "assistant", 10, 128, 300_000, per_side=True, embeddings_only=True, extra=True
    ),
    3: Stage("distil", "assistant", 10, 64, 300_000, per_side=True, extra=True),
    4: Stage("multilingual contrastive learning", "teacher", 60, 64, 500_000, contrast=True),
}


def stage_loss(stage, model, ids, mask, y_s, y_t=None, contrast=True, gather=None):
    """The loss terms of a batch, to be summed 1:1:1: {"en": ..., "tr": ..., "mcl" in stage 4}.

    stage 1: MSE(A(s), T(s)) + MSE(A(t), T(s))
    stage 2: MSE(S_emb(s), A_emb(s)) + MSE(S_emb(t), A_emb(t)), the embedding blocks alone, pooled
    stage 3: MSE(S(s), A(s)) + MSE(S(t), A(t))
    stage 4: MSE(S(s), T(s)) + MSE(S(t), T(s)) + contrastive(S(s), S(t), T(s))

    ids, mask: (2N, T), of N English sentences s and, behind them, their translations t. y_s, y_t:
    the targets (N, H) of the two sides; y_t is unused where the English side's serves both. gather:
    where a batch is spread over processes, makes of one process's vectors those of the whole batch,
    to which the targets belong.
    """
    row = STAGES[stage]
    # One call for both sides: half as many as two, and as little padding, as lengths are sorted.
    X_s, X_t = model(ids, mask, embeddings_only=row.embeddings_only).chunk(2)  # (N, H) each
    if gather:
        X_s, X_t = gather(X_s), gather(X_t)
    terms = {"en": mse(X_s, y_s), "tr": mse(X_t, y_t if row.per_side else y_s)}
    if row.contrast and contrast:
        terms["mcl"] = contrastive(X_s, X_t, y_s)
    return terms


# ------------------------------------------------------------------------------ sizes and presets
@dataclass(frozen=True)
class Preset:
    """Sizes and schedule of a run; each field is a flag of train.py. Those of STAGES and lr hold a
    value for each stage."""

    bottleneck: int  # B; 0 keeps the full word table and skips stage 2
    layers: tuple  # numbers of the assistant's layers to copy, from 1; the paper's: the first K
    recurrence: int  # R; the paper keeps K x R at the assistant's depth
    lr: tuple = (16e-5,) * len(STAGES)  # peak learning rates
    batch: tuple = tuple(stage.batch for stage in STAGES.values())
    epochs: tuple = tuple(stage.epochs for stage in STAGES.values())
    max_lines: tuple = tuple(stage.max_lines for stage in STAGES.values())
    init: str = "text"  # start of the bottleneck, see make_student
    dropout: float = 0.1
    max_tokens: int = 128
    max_chars: int = 250  # pairs with a longer side are dropped
    vocab: int = 32_000  # pieces of a vocabulary learnt here, where no assistant is given

    def __post_init__(self):
        for name in ("lr", "batch", "epochs", "max_lines"):
            values, n = getattr(self, name), len(STAGES)
            need(len(values) == n, f"a Preset's {name}={values}: expected {n} values, one a stage")


PRESETS = {
    "xlmr": Preset(128, (1, 2, 3), 4, lr=(16e-5, 16e-5, 8e-5, 16e-5)),
    "minilm": Preset(128, (1, 2, 3, 4, 5, 6), 2, batch=(64, 256, 64, 64)),
    "demo": Preset(
        12, (1, 2), 2, (2e-3, 4e-3, 2e-3, 2e-3), epochs=(0.25, 1, 0.12, 0.18), dropout=0, vocab=4000
    ),
}
# Common to all, as in the paper.
WARMUP = 0.1  # share of a stage's steps over which the learning rate rises
WEIGHT_DECAY = 0.01  # AdamW's, not on biases and LayerNorm
ADAM_EPS = 1e-6
CLIP = 1.0  # largest gradient norm
# Not the paper's: the pairs from which a new vocabulary learns its start.
ALIGNED_PAIRS = 300_000


def ledger(config):
    """Parameters by part, {"embedding", "layers", "other", "total"}.

    embedding: word table and B -> H map, positions, token types, LayerNorm; other: Dense. Counted
    on the meta device, which takes no memory.
    """
    with torch.device("meta"):
        model = Encoder(config)
    parts = {"embedding": model.embeddings, "layers": model.layers, "other": model.dense}
    parts["total"] = model
    return {k: sum(p.numel() for p in part.parameters()) for k, part in parts.items()}


def check_sizes(c, B, layers, R):
    """Raises: InputError where an assistant of Config c cannot give a student of these sizes."""
    H, depth = c.hidden_size, c.num_hidden_layers
    known = layers and all(1 <= k <= depth for k in layers)
    need(known, f"--layers {max(layers, default=0)}: expected 1 to {depth}, the assistant's")
    size = f"expected 0, for none, or up to {H - 1}, as hidden_size is {H}"
    need(0 <= B < H, f"--bottleneck {B}: {size}")
    need(R >= 1, f"--recurrence {R}: expected 1 or more")
    need(not c.bottleneck_size, "a model with a bottleneck is no assistant; give the full-size one")


# ---------------------------------------------------------------------------- how a student begins
@torch.no_grad()
def init_weights(model, generator, std=0.02):
    """BERT's random start: normal(0, std), LayerNorm at identity, biases and the pad row at 0."""
    for name, p in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            p.fill_(float(name.endswith("weight")))
        else:
            p.normal_(0, std, generator=generator)
    model.embeddings.word.weight[model.config.pad_token_id] = 0
    return model


@torch.no_grad()
def make_student(assistant, B, layers, R, init="text", seed=0, counts=None):
    """The student before stage 2: a new embedding block and K of the assistant's layers, R times.

    layers: their numbers, from 1; in the paper 1 to K. Where few are taken of a deep assistant, its
    last should be one of them: without it a student begins far off. Measured: results/README.md.
    Without a bottleneck (B = 0) it keeps the assistant's table, and stage 3 is its first.
    init: "text" starts the bottleneck from the truncated SVD of the assistant's word table, its
    rows weighted by how often a piece occurs, counts (V,), to the power 3/4, or alike without
    counts; positions, token types and LayerNorm are the assistant's. "paper" starts the whole block
    from noise.
    Raises: InputError for sizes that do not fit.
    """
    c = assistant.config
    check_sizes(c, B, layers, R)
    sizes = replace(c, bottleneck_size=B, num_hidden_layers=len(layers), recurrence=R)
    student = Encoder(sizes, assistant.tokenizer, assistant.dtype)
    if init == "paper":
        init_weights(student, torch.Generator().manual_seed(seed))
    student.to(assistant.device)
    for layer, k in zip(student.layers, layers):
        layer.load_state_dict(assistant.layers[k - 1].state_dict())
    student.dense.load_state_dict(assistant.dense.state_dict())
    ours, theirs = student.embeddings, assistant.embeddings
    if B and init == "paper":
        return student
    for part in ("position", "token_type", "norm"):
        getattr(ours, part).load_state_dict(getattr(theirs, part).state_dict())
    E = theirs.word.weight  # (V, H)
    if B:
        P = principal_directions(E, B, counts)  # (H, B)
        ours.project.weight.copy_(P)
        E = E.float() @ P  # (V, B); times P' it is nearest to the assistant's table
    ours.word.weight.copy_(E)
    return student


def principal_directions(E, B, counts=None):
    """(H, B): the top B right singular vectors of a word table E (V, H), rows weighted by counts.

    The weight counts (V,) ** 3/4 keeps frequent pieces best, but full stops do not crowd out what
    carries meaning. Measured: results/README.md.
    """
    # Eigenvectors of E'WE, (H, H), summed in float64: a product in float32 moves with the memory's
    # alignment, and a run must repeat.
    weights = torch.ones(len(E)) if counts is None else torch.from_numpy(counts) ** 0.75
    gram = torch.zeros(E.shape[1], E.shape[1], dtype=torch.float64, device=E.device)
    for rows, w in zip(E.split(16384), weights.to(E.device).double().split(16384)):
        rows = rows.double()
        gram += rows.T @ (rows * w[:, None])
    need(torch.isfinite(gram).all(), "the assistant's word table is damaged: it is not finite")
    return torch.linalg.eigh(gram)[1][:, -B:].float()


# ------------------------------------------------------------------------ how an assistant begins
# The paper's assistants are published checkpoints. One may be cut to the pieces that are used.
# Where none is given, one is made of the teacher's body and a vocabulary learnt from the training
# text, and stage 1 trains it.


@torch.no_grad()
def make_assistant(teacher, tokenizer, english=(), translations=()):
    """The teacher's body with a new vocabulary, before stage 1.

    Each new piece starts at the mean of the teacher's pieces for its text; special tokens take over
    the teacher's rows, so what the teacher knows of English survives. With sentence pairs, a piece
    of another language starts at the mean of the teacher's pieces that it translates, by their
    share in align(); one that English uses, too, at the mean of both starts, by links and tokens.
    """
    word = teacher.embeddings.word.weight.float()  # (V of the teacher, H)
    vocab = tokenizer.get_vocab()
    pieces = sorted(vocab, key=vocab.get)
    texts = [p.replace("▁", " ") for p in pieces]  # the space matters to a RoBERTa teacher
    spelling = teacher.tokenizer.encode_batch(texts, add_special_tokens=False)
    V, pad_id = len(vocab), vocab["<pad>"]
    empty = word.new_zeros(1).expand(V, word.shape[1])  # a placeholder
    model = with_vocabulary(teacher, tokenizer, empty, pad_id, normalize=False, prompt="")

    # A row is a weighted mean of the teacher's rows: links (new piece, its piece, weight).
    lengths = torch.tensor([len(row.ids) for row in spelling])
    piece = torch.repeat_interleave(lengths)
    old = torch.tensor([i for row in spelling for i in row.ids])
    weight = 1 / lengths[piece]
    if len(english):
        sides = *teacher.tokenize(english, prompt=""), *model.tokenize(translations)
        f, e, n = (torch.from_numpy(x) for x in align(*sides))
        uses = np.bincount(model.tokenize(english)[0], minlength=V)
        uses = torch.from_numpy(uses).float().clamp(min=1e-6)  # unused: told by links alone
        weight = torch.cat([weight * uses[piece], n.float()])
        piece, old = torch.cat([piece, f]), torch.cat([old, e])
    links = torch.stack([piece, old])
    mix = torch.sparse_coo_tensor(links, weight, (V, len(word)), check_invariants=True)
    table, total = mix @ word, mix @ torch.ones(len(word), 1)  # (V, H), (V, 1)
    table = torch.where(total > 0, table / total, word.mean(0))  # (V, H)
    start, *_, end = teacher.tokenizer.encode("").ids
    table[vocab["<s>"]], table[vocab["</s>"]] = word[start], word[end]
    for row in map(teacher.tokenizer.token_to_id, ("[UNK]", "<unk>")):
        if row is not None:
            table[vocab["<unk>"]] = word[row]
    table[pad_id] = 0
    model.embeddings.word.weight.copy_(table)
    return model


@torch.no_grad()
def cut_assistant(assistant, tokenizer, ids):
    """An assistant of fewer pieces: the rows `ids` of its word table, with their tokenizer.

    A text whose pieces all stay gets the same vectors, to the bit; see data.cut_vocabulary.
    """
    table = assistant.embeddings.word.weight[torch.from_numpy(ids)]  # (len(ids), H)
    pad_id = int(np.flatnonzero(ids == assistant.config.pad_token_id)[0])
    return with_vocabulary(assistant, tokenizer, table, pad_id)


def with_vocabulary(encoder, tokenizer, table, pad_id, **changes):
    """The same body with a new vocabulary: a tokenizer, its word table (V, H) and its pad id."""
    c = encoder.config
    same = c.model_type == "bert" or pad_id == c.pad_token_id
    move = f"from id {c.pad_token_id} to {pad_id}, and with it what counts positions"
    fix = f"--teacher or --assistant is a {c.model_type}; give a bert"
    need(same, f"the pad token would move {move}: {fix}")
    c = replace(c, vocab_size=len(table), pad_token_id=pad_id, **changes)
    model = Encoder(c, tokenizer, encoder.dtype)
    model.load_state_dict(encoder.state_dict() | {"embeddings.word.weight": table})
    return model


def align(e, e_at, f, f_at, iterations=5, longest=200):
    """Which English piece a foreign piece translates, from sentence pairs alone.

    IBM Model 1 (Brown et al. 1993), by EM, without its empty word. e, e_at and f, f_at: tokenised
    English and foreign sentences, as Encoder.tokenize gives them; start and end tokens take no
    part, nor do pairs of more than `longest` links, which say little and cost most.
    Returns, for each two pieces that occur together, (foreign piece, English piece, expected number
    of links), each (L,).
    """
    V = int(e.max(initial=0)) + 1
    keys, width = [np.zeros(0, np.int64)], []
    for a, b, c, d in zip(e_at[:-1] + 1, e_at[1:] - 1, f_at[:-1] + 1, f_at[1:] - 1):
        if 0 < (b - a) * (d - c) <= longest:  # each foreign piece with each English one
            keys.append((f[c:d, None].astype(np.int64) * V + e[a:b]).ravel())
            width += [b - a] * (d - c)
    key = np.concatenate(keys)  # (l,) links
    del keys
    width = np.array(width, np.int64)  # (m,) links of each foreign token
    token = np.repeat(np.arange(len(width)), width)  # (l,)
    kinds, kind = np.unique(key, return_inverse=True)  # (L,), (l,)
    english, t = kinds % V, np.ones(len(kinds))  # t(f | e), not yet normalised
    for _ in range(iterations):
        p = t[kind]  # (l,) E step: a link's share of its foreign token
        p /= np.add.reduceat(p, np.cumsum(width) - width)[token]
        count = np.bincount(kind, p, len(kinds))
        t = count / np.bincount(english, count)[english]  # M step
    return kinds // V, english, count
