"""Do the lines of a corpus translate each other, is the first side English, is dev held out?

Found from the text alone, whatever the language and the teacher:
    sides      the commonest words of English stand on the English side
    alignment  sentences that are alike in English have translations that are alike: of each block
               of lines, the likeness of its English sentences to each other is laid over that of
               their translations, as they stand and shifted by some lines
    leaks      a sentence of dev or of a similarity set, but for case, spaces and punctuation
Files are judged by some blocks, evenly spread; a leak is looked for in every line. In a file that
is sorted by length a block's sentences are alike: lines that are spread over it decide, too.

python -m checks.pairs HELD_OUT... < TRAIN.tsv > NEW.tsv: the lines without held-out sentences
"""

import functools
import math
import re
import shlex
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np

from checks.forms import ENGLISH, piped
from data import read_lines
from model import InputError

BLOCK, BLOCKS = 100, 16  # lines that are compared with each other; such blocks of a file
# Standard deviations. Right blocks had 10 and more in ten languages, and in the built-in corpus,
# whose sentences are all alike; wrong ones at most 4.
SURE = 7
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"  # a sign is a word
WORD = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+|[?!]")
# Shares from which on there is a warning.
LOOSE = 0.2  # lines that fit no better than others
MIXED = 0.02  # lines with English second
# The share of lines with a word of English from which on a file has English: right ones had 0.1 and
# more, be it of their shortest lines, those of two other languages 0.02 at most.
SOME = 0.05


# ------------------------------------------------------------------------------ sides, alignment
def words(text):
    return WORD.findall(text.lower())


def votes(sides):
    """Which side of each pair is English: 1 the first, -1 the second, 0 unknown. sides: of words"""
    english = [[sum(w in ENGLISH for w in text) for text in side] for side in sides]
    return np.sign(np.subtract(*english))


def likeness(texts):
    """(n, n): how alike sentences are, by rare words that they share and by length; mean 0."""
    n, number = len(texts), {}
    parts = [[number.setdefault(w[:5], len(number)) for w in text] for text in texts]  # stems
    M = np.zeros((n, len(number)), np.float32)
    for row, part in zip(M, parts):
        row[part] = 1
    M *= np.log(n / M.sum(0))
    M /= np.linalg.norm(M, axis=1, keepdims=True) + 1e-9
    size = np.log([5 + sum(map(len, text)) for text in texts]).astype(np.float32)
    size = (size - size.mean()) / (size.std() + 1e-9)
    K = np.minimum(M @ M.T, 0.5) + 0.04 * np.exp(-4 * (size[:, None] - size) ** 2)
    np.fill_diagonal(K, 0)
    return K - K.mean(1, keepdims=True) - K.mean(0) + K.mean()


def alignment(english, translations):
    """(score, offset, share): how well n pairs, as lists of words, fit as they stand.

    score: in standard deviations over lines that are shifted far. offset: that at which they fit:
    where it is 1, a line's translation stands a line below; None: at none. share: of the lines
    whose translation fits no better than that of another line.
    """
    K, L, n = likeness(english), likeness(translations), len(english)
    twice = np.tile(L, (2, 2))

    def fit(shift):
        return np.einsum("ij,ij", K, twice[shift : shift + n, shift : shift + n])

    far = [fit(s) for s in np.linspace(n // 4, n - n // 4, 24).astype(int)]
    mean, deviation = np.mean(far), np.std(far) + 1e-9
    score, offset = (fit(0) - mean) / deviation, 0
    if score < SURE:
        fits = (np.array([fit(s) for s in range(n)]) - mean) / deviation
        offset = int(fits.argmax())
        offset = (offset + n // 2) % n - n // 2 if fits[offset] > SURE + 2 else None
    K /= np.linalg.norm(K, axis=1, keepdims=True) + 1e-9
    L /= np.linalg.norm(L, axis=1, keepdims=True) + 1e-9
    R = K @ L.T  # (n, n): how well translation j fits sentence i
    right = R.diagonal()
    better = ((R < right[:, None]).mean(1) + (R < right).mean(0)) / 2
    return score, offset, min(1.0, 2 * float((better < 0.5).mean()))


def look(corpus, start, end, spread=False):
    """What the blocks of a file, pairs start to end of a corpus, are like: a list of dicts.
    spread: those of lines that are far from each other."""
    blocks, n = [], min(BLOCK, end - start)
    count = min(BLOCKS, math.ceil((end - start) / n))
    rows = np.linspace(start, end - n, count).astype(int)[:, None] + np.arange(n)
    if spread:
        rows = np.linspace(start, end, n * count, endpoint=False).astype(int).reshape(n, count).T
    for some in rows:
        ids = corpus.pairs[some]
        sides = [[words(text) for text in corpus.texts(side)] for side in ids.T]
        block = {"begin": some[0], "end": some[-1] + 1, "votes": votes(sides)}
        block["english"] = np.mean([not ENGLISH.isdisjoint(a + b) for a, b in zip(*sides)])
        block["distinct"] = [len(np.unique(side)) for side in ids.T]
        block["words"] = [sum(map(len, side)) / n for side in sides]
        # Of lines with a sentence again, as of its other translations, one is enough.
        once = np.intersect1d(*(np.unique(side, return_index=True)[1] for side in ids.T))
        if len(once) >= BLOCK / 2:
            score, offset, loose = alignment(*([side[i] for i in once] for side in sides))
            offset = offset if len(once) > 0.9 * n else None  # in lines
            block |= {"score": score, "offset": offset, "loose": loose}
        blocks.append(block)
    return blocks


# --------------------------------------------------------------------------------- what is wrong
def stretch(votes):
    """(begin, end, net): where lines with English second are densest, and by how many votes."""
    total = np.concatenate([[0], -np.cumsum(votes)])
    rise = total - np.minimum.accumulate(total)
    end = len(votes) - int(rise[::-1].argmax())
    return int(total[: end + 1].argmin()), end, rise.max()


def awk(file, script):
    cut = r'{sub(/\r$/, "")}'  # the line ends of Windows
    return piped(file, f"awk -F '\\t' -v OFS='\\t' '{cut} {script}'")


def exchanged(corpus, start, end, file):
    """(what is wrong, fix) of a file that has English second. The stretch is found to the line:
    words of the lines that are sure decide on the others."""
    sides = [[words(text) for text in corpus.texts(ids)] for ids in corpus.pairs[start:end].T]
    counts = Counter(), Counter()
    for vote, *pair in zip(votes(sides), *sides):
        for text, count in zip(pair, counts[:: vote or 1]):
            count.update(text if vote else ())
    share = [{w: c[w] / c.total() + 1e-6 for w in counts[0] | counts[1]} for c in counts]
    weight = {w: math.log(share[0][w] / share[1][w]) for w in share[0]}
    sums = [[sum(weight.get(w, 0) for w in text) for text in side] for side in sides]
    vote = np.sign(np.subtract(*sums))
    first, last, _ = stretch(vote)
    first, last = first if first > 2 else 0, last if last < len(vote) - 2 else len(vote)
    wrong, right = ((sign * vote[first:last] > 0).sum() for sign in (-1, 1))
    if max((vote < 0).sum() - wrong, right) > 0.1 * wrong:
        what = f"English is the second side of {(vote < 0).mean():.0%} of its lines"
        return what, "Make it again"
    a, b = corpus.line[start + first], corpus.line[start + last - 1]
    lines = [f"NR >= {a}"] * (first > 0) + [f"NR <= {b}"] * (last < len(vote))
    script = f"{' && '.join(lines)} {{print $2, $1; next}} 1" if lines else "{print $2, $1}"
    what = "English is the second side" + f" in lines {a} to {b}" * bool(lines)
    return what, f"Exchange the columns: {awk(file, script)}"


def shifted(lines, blocks, bad, file):
    """(what is wrong, fix) of a file whose sides do not translate each other in its bad blocks."""
    what = f"its sides do not translate each other{lines}"
    offsets = {block["offset"] for block in bad} - {None}
    if not offsets:
        return what, "Align its lines again"
    k = offsets.pop()
    what += f": the translation of line n stands in line n{k:+}"
    if offsets or len(bad) < len(blocks):
        return what, "Before them a line is missing on one side: align its lines again"
    kept, pair = ("$1", f"t[n - {k}], $2") if k > 0 else ("$2", f"$1, t[n - {-k}]")
    script = f"NF > 1 {{t[++n] = {kept}; if (n > {abs(k)}) print {pair}}}"  # n: of pairs
    return what, f"Shift them back: {awk(file, script)}"


def fault(corpus, file, start, end, blocks):
    """(bad blocks, what is wrong with the pairs start to end, of one file, fix), or None."""

    def where(bad):
        a, b = (corpus.line[i] for i in (bad[0]["begin"], bad[-1]["end"] - 1))
        return f" in lines {a} to {b}" if len(bad) < len(blocks) else ""

    n = blocks[0]["end"] - blocks[0]["begin"]
    bad = [block for block in blocks if 10 * min(block["distinct"]) <= max(block["distinct"])]
    bad = bad or [block for block in blocks if BLOCK / 2 <= n >= 20 * min(block["distinct"])]
    least = min([n, *(min(block["distinct"]) for block in bad)])
    if bad and (least <= 2 or len(bad) >= len(blocks) / 8):
        what = f"only {least} of {n} sentences of a side differ{where(bad)}"
        return bad, what, "Make it again"
    votes = np.concatenate([block["votes"] for block in blocks])
    if stretch(votes)[2] >= 10 or (votes < 0).sum() >= max(10, 0.2 * np.abs(votes).sum()):
        bad = [block for block in blocks if block["votes"].sum() < 0] or blocks
        return bad, *exchanged(corpus, start, end, file)
    bad = [block for block in blocks if block.get("score", SURE) < SURE and min(block["words"]) > 2]
    known = any(block["offset"] is not None for block in bad)
    if len(bad) >= len(blocks) / 2 and not known:
        known = noted(corpus, bad[0]["begin"], bad[-1]["end"])["score"] < SURE
    if known:
        return bad, *shifted(where(bad), blocks, bad, file)
    return None


def refuse(corpus, file, start, end, blocks):
    """Raises: InputError where the pairs start to end of a corpus, of one file, are useless."""
    if not (found := fault(corpus, file, start, end, blocks)):
        return
    bad, what, fix = found
    rows = slice(bad[0]["begin"], bad[0]["begin"] + 3)
    texts = zip(corpus.line[rows], *(corpus.texts(ids) for ids in corpus.pairs[rows].T))
    shown = "; ".join(f"line {n}: {a[:60]!r} <TAB> {b[:60]!r}" for n, a, b in texts)
    raise InputError(f"{file}: {what}, such as {shown}. {fix}")


# ----------------------------------------------------------------------------------------- leaks
def key(text):
    """A sentence without case, accents, spaces and punctuation."""
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKD", text).casefold()))


@functools.cache
def letters():
    """(2^16,): a random number for each letter, the same whatever its case and accent; else 0."""
    random = np.random.default_rng(0).integers(0, 2**63, 2**16, np.uint64)
    table = np.zeros(2**16, np.uint64)
    for i in range(2**16):
        table[i] = random[[ord(c) & 0xFFFF for c in key(chr(i))]].sum(dtype=np.uint64)
    return table


def sums(text, begins):
    """(n,): of the sentences that begin at these characters of a text, the sums of letters()."""
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    found = letters()[points & 0xFFFF]
    found[points > 0xFFFF] = 0  # emoji and rare letters: their keys decide
    return np.add.reduceat(found, begins)


def leaks(corpus, held, chunk=100_000):
    """(keys, (n,) bool): which of the keys in `held` a corpus has, in which of its sentences.

    A sum of random numbers, one for each letter, finds what may be equal; the keys decide.
    """
    sizes = np.array([len(k) for k in held])
    seen = np.zeros(2**24, bool)
    seen[sums("".join(held), np.cumsum(sizes) - sizes) >> 40] = True
    maybe = []
    for i in range(0, len(corpus.starts) - 1, chunk):
        starts = corpus.starts[i : i + chunk + 1]
        text = corpus.text[starts[0] : starts[-1]]
        sizes = np.add.reduceat(text & 0xC0 != 0x80, starts[:-1] - starts[0], dtype=np.int64)
        found = sums(str(text.data, "utf-8"), np.cumsum(sizes) - sizes) >> 40
        maybe.append(i + np.flatnonzero(seen[found]))
    ids = np.unique(corpus.pairs.ravel()[np.concatenate(maybe)])
    found, leaked = set(), np.zeros(len(corpus.first), bool)
    for number, text in zip(ids, corpus.texts(ids)):
        if (k := key(text)) in held:
            found.add(k)
            leaked[number] = True
    return found, leaked


def told_leaks(corpus, dev, sts, folder):
    """Yield what is to be said of held-out sentences in the training text; noted in its report."""
    held = {}  # {file or similarity set: keys of its sentences}
    for file, start, end in by_file(dev) if dev else ():
        held[file] = set(map(key, dev.texts(np.unique(dev.pairs[start:end])))) - {""}
    for name, (a, b, _) in (sts or {}).items():
        held[f"{name} of {folder}"] = set(map(key, (*a, *b))) - {""}
    if not held:
        return
    every = set().union(*held.values())
    found, leaked = leaks(corpus, every)
    leaked = leaked[corpus.pairs].any(1)
    for report, (_, start, end) in zip(corpus.report, by_file(corpus)):
        report["leaks"] = int(leaked[start:end].sum())
    yield (
        f"  {len(found):,} of {len(every):,} sentences of --dev and --sts are in the training "
        "text, but for case, spaces and punctuation"
    )
    shares = {name: len(found & keys) / len(keys) for name, keys in held.items() if keys}
    if bad := {name: share for name, share in shares.items() if share >= 0.01}:
        counts = {f: r["leaks"] for f, r in zip(corpus.files, corpus.report) if r["leaks"]}
        worst = max(counts, key=counts.get)
        files = [*(dev.files if dev else ()), *([folder] if sts else ())]
        command = f"python -m checks.pairs {shlex.join(map(str, files))}"
        names = ", ".join(f"{share:.0%} of {name}" for name, share in bad.items())
        where = f"in {len(counts)} files such as this, and give the new ones in their place"
        fix = f"Drop them, {where}: {piped(worst, command)}"
        yield f"  warning: so are {names}. {fix}"


# -------------------------------------------------------------------------------------- the table
def by_file(corpus):
    """Yield (file, first pair, last pair + 1) of each file of a corpus."""
    end = 0
    for report, file in zip(corpus.report, corpus.files):
        start, end = end, end + report["kept"]
        yield file, start, end


def noted(corpus, start, end):
    """What the report of a file says of its sides: by spread lines, but for what is repeated."""
    blocks = look(corpus, start, end, spread=True)
    vote = np.concatenate([block["votes"] for block in blocks])
    judged = [block for block in blocks if "score" in block]
    mean = {k: np.mean([b[k] for b in judged or [{k: math.nan}]]) for k in ("score", "loose")}
    return {k: float(v) for k, v in mean.items()} | {
        "words": np.mean([block["words"] for block in blocks], axis=0).tolist(),
        "english": float(np.mean([block["english"] for block in blocks])),
        "english first": float((vote > 0).sum() / np.abs(vote).sum()) if vote.any() else math.nan,
        "repeated": int(
            (np.diff(np.sort(corpus.pairs[start:end].view(np.uint64)[:, 0])) == 0).sum()
        ),
    }


def table(reports):
    """The reports of files as lines, a file each."""
    heads = (
        "pairs too_long blank bad words_en words_xx English_1st fit loose repeated held_out file"
    )
    yield "".join(f"{head.replace('_', ' '):>12}" for head in heads.split())
    for r in reports:
        counts = r["kept"], r["long"], r["blank"], sum(r["bad"].values())
        sides = *(f"{n:.1f}" for n in r["words"]), f"{r['english first']:.1%}"
        fit = f"{r['score']:.0f}", f"{r['loose']:.0%}", r["repeated"], r.get("leaks", "")
        yield "".join(f"{cell:>12}" for cell in (*counts, *sides, *fit)) + f"  {r['file']}"


def check(corpus, dev=None, sts=None, folder=None):
    """Yield the lines of a report of the data, a file each, and note it in corpus.report.

    dev: a Corpus, or None; sts: sets, which lie in folder. Raises: InputError for a file whose
    sides are exchanged or do not translate each other.
    """
    told, seen = [*told_leaks(corpus, dev, sts, folder)], []
    for part in (corpus, dev) if dev else (corpus,):
        for report, (file, start, end) in zip(part.report, by_file(part)):
            if start < end:
                report |= noted(part, start, end)
                seen.append((report, part, file, start, end, look(part, start, end)))
    yield from table([report for report, *_ in seen])
    for report, *rest in seen:
        refuse(*rest)
        long = min(report["words"]) > 3  # names and labels have few words of SOME
        if report["english"] < SOME and report["kept"] >= BLOCK and long:
            yield f"  warning: {rest[1]}: English is on neither side"
        if report["english first"] < 1 - MIXED:
            yield f"  warning: {rest[1]}: English is second in {1 - report['english first']:.0%}"
        if report["loose"] > LOOSE:
            what = f"{report['loose']:.0%} of its lines fit no better than others"
            yield f"  warning: {rest[1]}: {what}"
    yield from told


def main():
    """Print those lines of standard input that have no sentence of the files, or folders, named."""
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    texts = "[!.]*.t[xs][tv]*"  # .txt, .tsv, .gz or not
    named = map(Path, sys.argv[1:])
    files = [f for a in named for f in (sorted(a.glob(texts)) if a.is_dir() else [a])]
    cells = (cell for f in files for line in read_lines(f) for cell in line.split("\t")[:2])
    keys = set(map(key, cells)) - {""}  # a third column holds scores
    for line in sys.stdin:
        if not any(key(cell) in keys for cell in line.split("\t")):
            print(line, end="")


if __name__ == "__main__":
    from tools.cli import run_cli  # only here: tools stand above checks

    run_cli(main)
