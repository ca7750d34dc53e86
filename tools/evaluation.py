"""What vectors are worth: a look at a teacher's, the scores of finished models, their table."""

import math

import numpy as np

import data
import model as M
import msd

FEWEST_PAIRS = 10  # resamples of fewer are too much alike to say how sure a difference is


# -------------------------------------------------------------------------------------- a teacher
def look_at_teacher(teacher, corpus):
    """What a teacher's vectors of English sentences look like, before hours of training on them."""
    ids = np.random.default_rng(0).permutation(np.unique(corpus.pairs[:, 0]))[:4000]
    flat, starts = teacher.tokenize(corpus.texts(np.sort(ids)))
    progress = data.meter("a look at the teacher")
    norm, cosine, error = describe_vectors(teacher.embed(flat, starts, progress=progress))
    cut = (np.diff(starts) >= teacher.config.max_seq_length).mean()
    alike = "\n  warning: all sentences look alike to this teacher; is it the right pooling?"
    return (
        f"teacher: width {teacher.config.width}, mean norm {norm:.3f}, mean cosine of different "
        f"sentences {cosine:.3f}, {cut:.1%} at its limit; MSE of the best constant guess "
        f"{error:.5f}: a loss term near it has learnt nothing{alike if cosine > 0.8 else ''}"
    )


def describe_vectors(v):
    """(mean norm, mean off-diagonal cosine, MSE of the best constant guess) of vectors (n, H)."""
    n, total = len(v), M.unit(v).sum(0)
    cosine = (total @ total - n) / (n * (n - 1)) if n > 1 else math.nan
    return np.linalg.norm(v, axis=1).mean(), cosine, v.var(0).mean()


# ---------------------------------------------------------------------------------------- scores
def ranks(x):
    """Ranks from 1, ties averaged."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def spearman(x, y):
    """Spearman's rank correlation of two arrays (n,), ties averaged; nan where one is constant."""
    with np.errstate(invalid="ignore"):
        return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


def mean_spearman(scores):
    """(all, monolingual, cross-lingual) means over sets named A-B; nan for none."""
    mono = [x for name, x in scores.items() if len(set(name.split("-"))) == 1]
    cross = [x for name, x in scores.items() if len(set(name.split("-"))) == 2]
    return tuple(float(np.mean(x)) if x else math.nan for x in ([*scores.values()], mono, cross))


def similarity_scores(encode, sets):
    """{"en-de": cosine of each pair (n,)} for the sets of data.read_sts; a sentence once."""
    texts = list(dict.fromkeys(t for a, b, _ in sets.values() for t in (*a, *b)))
    vector = dict(zip(texts, M.unit(encode(texts))))
    sides = {k: [np.stack([vector[t] for t in side]) for side in s[:2]] for k, s in sets.items()}
    return {k: (a * b).sum(1) for k, (a, b) in sides.items()}


def retrieval(x, y, block=1024):
    """Translation accuracy in both directions, in percent: x[i] and y[i] (n, H) are translations.

    The nearest neighbour by cosine must be the right one; ties are wrong: equal vectors score 0.
    """
    x, y = M.unit(x), M.unit(y)

    def hits(a, b):
        n = 0
        for i in range(0, len(a), block):
            sims = a[i : i + block] @ b.T  # (block, n)
            right = sims.diagonal(i)  # of x[i] with y[i]
            n += int(((sims >= right[:, None]).sum(1) == 1).sum())
        return 100 * n / len(a)

    return hits(x, y), hits(y, x)


def evaluate(model, sets, dev, dev_targets):
    """(one row of the table, cosines by set).

    Spearman x 100 by set, accuracy both ways and 100 x MSE to the teacher by dev language.
    sets: data.read_sts. dev: {language: (english, translations)}. dev_targets: {language: (n, H)}.
    """
    cosines = similarity_scores(model.encode, sets) if sets else {}
    scores = {k: 100 * spearman(c, sets[k][2]) for k, c in cosines.items()}
    row = {"spearman": scores, "accuracy": {}, "mse": {}}
    for language, sides in dev.items():
        x, y = (model.encode(side, normalize=False) for side in sides)
        row["accuracy"][language] = retrieval(x, y)
        goal = dev_targets[language]
        row["mse"][language] = [100 * float(np.square(v - goal).mean()) for v in (x, y)]
    return row, cosines


def evaluate_all(load, models, sets, dev):
    """Yield (label, row, cosines) of evaluate() of models {label: folder}, the teacher first."""
    for label, folder in models.items():
        model, theirs, pairs = load(folder), sets, dev
        if label == "teacher":  # it knows English alone, and gives the goals of all others
            theirs, pairs = {k: v for k, v in sets.items() if k == "en-en"}, {}
            goals = {k: model.encode(sides[0], normalize=False) for k, sides in dev.items()}
        row, cosines = evaluate(model, theirs, pairs, goals)
        yield label, row | {"sizes": msd.ledger(model.config)}, cosines


def bootstrap(sets, a, b, n=1000, seed=0):
    """How sure is the difference b - a of two models?

    {"all": [difference, low, high], "mono": ..., "cross": ...} of mean Spearman x 100, with the
    bounds of 95 % of n paired resamples of the sentence pairs; {} where a set has too few for that.
    sets: data.read_sts; a, b: similarity_scores of the two. Sets of one length share their draws:
    the languages of STS benchmark translate the same pairs, and drawing them apart would make the
    bounds too narrow.
    """
    if min((len(gold) for _, _, gold in sets.values()), default=0) < FEWEST_PAIRS:
        return {}

    def difference(rows):  # (3,); rows: {length: numbers of pairs}
        drawn = [(k, gold, rows[len(gold)]) for k, (_, _, gold) in sets.items()]
        scores = ({k: 100 * spearman(c[k][i], g[i]) for k, g, i in drawn} for c in (a, b))
        before, after = map(mean_spearman, scores)
        return np.subtract(after, before)

    rng, sizes = np.random.default_rng(seed), sorted({len(s[2]) for s in sets.values()})
    whole = difference({m: np.arange(m) for m in sizes})
    draws = np.array([difference({m: rng.integers(0, m, m) for m in sizes}) for _ in range(n)])
    bounds = {}
    for kind, value, drawn in zip(("all", "mono", "cross"), whole, draws.T):
        if not math.isnan(value):  # there are such sets
            low, high = np.nanpercentile(drawn, [2.5, 97.5])  # a draw may be constant
            bounds[kind] = [float(value), float(low), float(high)]
    return bounds


# -------------------------------------------------------------------------------------- the table
def table(results):
    """The whole story of a run as text, from its results.json."""
    rows, scores, sizes = results["rows"], {}, {}
    names = list(rows["assistant"]["spearman"])
    for label, row in rows.items():
        everything, mono, cross = mean_spearman(row["spearman"])
        everything = math.nan if label == "teacher" else everything  # it has en-en alone
        by_set = (row["spearman"].get(k, math.nan) for k in names)
        scores[label] = *by_set, mono, cross, everything
        by_language = [(*row["accuracy"][k], *row["mse"][k]) for k in row["accuracy"]]
        dev = np.mean(by_language, axis=0) if by_language else [math.nan] * 4
        share = row["sizes"]["total"] / rows["assistant"]["sizes"]["total"]
        sizes[label] = *row["sizes"].values(), share, *dev
    heads = ["Spearman x 100", *names, "mono", "cross", "all"]
    lines = aligned(heads, [".1f"] * (len(names) + 3), scores)
    heads = ["parameters; dev pairs", "embedding", "layers", "other", "total", "of assistant"]
    heads += ["en->xx", "xx->en", "100 MSE en", "100 MSE xx"]
    lines += aligned(heads, [",", ",", ",", ",", ".1%", ".1f", ".1f", ".3f", ".3f"], sizes)
    if compared := results["bootstrap"]:
        bounds = [f"{k} {d:+.1f} ({a:+.1f} to {b:+.1f})" for k, (d, a, b) in compared.items()]
        lines += ["", f"student - assistant, with 95 % of paired resamples: {', '.join(bounds)}"]
    seconds = ", ".join(f"{e['stage']} {e['seconds']:.0f} s" for e in results["stages"])
    given = results["arguments"]
    how = f"{given['dtype']}, {results['threads']} threads, seed {given['seed']}"
    return "\n".join([*lines, "", f"{seconds}; {how}"])


def aligned(heads, formats, rows):
    """Lines of a table: rows {label: values}, under heads, the labels' first; nan as "-"."""
    cells = [heads]
    for label, values in rows.items():
        shown = ("-" if math.isnan(v) else format(v, f) for v, f in zip(values, formats))
        cells.append([label, *shown])
    widths = [max(map(len, column)) + 2 for column in zip(*cells)]
    lines = [""]
    for label, *numbers in cells:
        lines.append(label.ljust(widths[0]) + "".join(map(str.rjust, numbers, widths[1:])))
    return lines
