"""Text in, batches and targets out: the built-in corpus, parallel files, similarity sets, vocabulary, the disk store."""
import gzip
import hashlib
import itertools
import json
import math
import os
import random
import re
import struct
import zlib
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from model import InputError, atomic, need, read_json, unit

# ------------------------------------------------------------------------------------------------- the built-in corpus
DEMO = Path(__file__).parent / "demo"
LANGUAGES = ("de", "es", "it", "fr", "ar", "tr", "nl")                           # the paper's target languages
STS_PAIRS = ("en-en", "ar-ar", "es-es") + tuple(f"en-{x}" for x in LANGUAGES)    # the pairs that the paper reports
Meaning = namedtuple("Meaning", "number noun adjective verb object trait place")   # what a sentence says; trait: a person object's adjective
WEIGHTS = Meaning(0.5, 1, 0.5, 1, 1, 0.5, 0.5)                                   # points out of 5 for each part shared


def read_lexicon(path):
    """A file of demo/: {section: {key: {column: cell}}}. The format is explained at the top of demo/de.txt."""
    sections, section, columns = {}, None, []
    for number, line in enumerate(Path(path).read_text("utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        if line.startswith("["):
            name, *columns = line.strip("[] ").split()
            section = sections.setdefault(name, {})
            continue
        key, _, rest = line.partition(": ")
        cells = [c.strip() for c in rest.split(" | ")]
        if section is None or len(cells) != max(1, len(columns)) or not all(cells) or key in section:
            raise InputError(f"{path}:{number}: {line!r}: expected a new 'key: ' and {max(1, len(columns))} cells between ' | '")
        section[key] = dict(zip(columns or [""], cells))
    return sections


def inflect(row, which, the, number, gender):
    """The cell of a row that agrees with a subject; the most exact column wins."""
    for a in (which, ""):
        for b in (f"{the}.{gender}", the, f"{number}.{gender}", number, gender, ""):
            if (column := ".".join(filter(None, (a, b)))) in row:
                return row[column]
    raise InputError(f"demo/: {row} has no form {which!r} for {the}, {gender}")


def say(language, lexicon, meaning, template, definite=False):
    """One sentence: a meaning put into words by a template of one language. definite: "the" instead of "a"."""
    noun = lexicon["noun"][meaning.noun]
    gender, number = noun["gender"], meaning.number
    the = "two" if number == "two" else "the" if definite else "a"

    def person(noun, form, adjective, which, *agreement):
        return noun[form].replace("*", "" if adjective == "-" else inflect(lexicon["adjective"][adjective], which, *agreement, noun["gender"]))

    def fill(match):
        slot, which, form = re.fullmatch(r"(\w+)(?:\.(\w+))?(?:@(\w+))?", match[1]).groups()
        if slot == "subject":
            return person(noun, the, meaning.adjective, "", the, number)
        if slot == "object" and (whom := lexicon["noun"].get(meaning.object)):
            return person(whom, "whom" if "whom" in whom else "a", meaning.trait, "whom", "a", "one")
        section, key = (slot, getattr(meaning, slot)) if slot in Meaning._fields else ("word", slot)
        return inflect(lexicon[section][key], which or "", form or the, "one" if form else number, gender)

    text = re.sub(r"\{(.*?)\}", fill, lexicon["template"][template][""])
    text = re.sub(r"\s+([,.])", r"\1", " ".join(text.split()))
    return ("İ" if language == "tr" and text[0] == "i" else text[0].upper()) + text[1:]


def similarity(a, b):
    """Score 0 to 5: the points of the parts that two meanings share."""
    return float(sum(w for w, x, y in zip(WEIGHTS, a, b) if x == y))


def split_of(meaning):
    """train, dev or test: a function of the meaning alone, so no paraphrase or translation crosses over."""
    return ("test", "dev", *["train"] * 3)[zlib.crc32(" ".join(meaning).encode()) % 5]


def write_demo(folder, sentences=20000, dev=500, scored=400, teacher=24000):
    """Write the built-in corpus as ordinary files: train/ and dev/en-XX.tsv, sts-train/, sts-dev/ and sts/STS.A-B.txt.

    sentences: distinct English sentences in train/, each with a translation into every language."""
    rng = random.Random(0)                                  # the corpus is the same whatever the seed of the run
    words = {x: read_lexicon(DEMO / f"{x}.txt") for x in ("en", *LANGUAGES)}
    verbs = {v: row[""].split() for v, row in read_lexicon(DEMO / "meanings.txt")["meaning"].items()}
    en = words["en"]
    nouns, traits = [*en["noun"]], ["-", *en["adjective"]]
    takes = {True: [v for v in verbs if "*" in verbs[v]], False: [v for v in verbs if verbs[v] != ["*"]]}

    def valid(m):
        person = m.object in en["noun"]
        return (m.object in verbs[m.verb] or person and "*" in verbs[m.verb]) and (person or m.trait == "-")

    def draw(split, like=None):
        """A meaning of one split; with `like`, a relative of it: some parts kept, or who does it to whom exchanged."""
        keep, exchange = rng.randrange(len(Meaning._fields) + 1), like and like.object in nouns and rng.random() < 0.4
        while True:
            person = rng.random() < 0.6
            verb = rng.choice(takes[person])
            m = Meaning(rng.choice(["one", "two"]), rng.choice(nouns), rng.choice(traits), verb,
                        rng.choice(nouns if person else [o for o in verbs[verb] if o != "*"]),
                        rng.choice(traits) if person else "-", rng.choice([*en["place"]]))
            if exchange and rng.random() < 0.5:
                m = like._replace(number=m.number, place=m.place, adjective=like.trait, trait=like.adjective)
                m = m._replace(noun=like.object, object=like.noun) if rng.random() < 0.7 else m
            elif like:
                for part in rng.sample(Meaning._fields, keep):
                    m = m._replace(**{part: getattr(like, part)})
            if valid(m) and split_of(m) == split:
                return m

    def phrase():
        template = rng.choice([*en["template"]])
        return template, template != "there" and rng.random() < 0.3      # "there is the man" would not do

    def pairs(split, n):
        seen, m = {}, None
        while len(seen) < n:                                # every second sentence is close to its neighbour: hard to tell apart
            m, how = draw(split, m if len(seen) % 2 else None), phrase()
            seen.setdefault(say("en", en, m, *how), (m, how))
        return seen

    with atomic(folder) as tmp:
        for split, n in (("train", sentences), ("dev", dev)):
            (tmp / split).mkdir(parents=True)
            chosen = pairs(split, n)
            for x in LANGUAGES:
                text = "".join(f"{s}\t{say(x, words[x], m, *how)}\n" for s, (m, how) in chosen.items())
                (tmp / split / f"en-{x}.tsv").write_text(text, "utf-8")
        for name, split, n, which in (("sts-train", "train", teacher, ["en-en"]), ("sts-dev", "dev", scored, STS_PAIRS),
                                      ("sts", "test", scored, STS_PAIRS)):
            (tmp / name).mkdir()
            for pair in which:
                a, b = pair.split("-")
                rows = []
                for _ in range(n):
                    m = draw(split)
                    other = draw(split, m)
                    rows.append(f"{say(a, words[a], m, *phrase())}\t{say(b, words[b], other, *phrase())}\t{similarity(m, other)}\n")
                (tmp / name / f"STS.{pair}.txt").write_text("".join(rows), "utf-8")


# ------------------------------------------------------------------------------------------------------ reading files
LINE_LIMIT = 1 << 20                                        # bytes; a longer line is no sentence pair


def read_lines(path):
    """Yield (line number, text, fault) of a plain or gzipped UTF-8 file; exactly one of text and fault is None.

    CRLF and a BOM are taken off. Raises: InputError for a missing, unreadable, truncated or corrupt file."""
    number = 0
    try:
        with open(path, "rb") as raw, (gzip.open(raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw) as f:
            while line := f.readline(LINE_LIMIT):
                number += 1
                if len(line) == LINE_LIMIT and not line.endswith(b"\n"):
                    while (rest := f.readline(LINE_LIMIT)) and not rest.endswith(b"\n"):
                        pass
                    yield number, None, f"longer than {LINE_LIMIT} bytes"
                    continue
                try:
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n"), None
                except UnicodeDecodeError as e:
                    yield number, None, f"not UTF-8 ({e.reason} at byte {e.start})"
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise InputError(f"{path}: the gzip stream is truncated or corrupt after line {number} ({e}); fetch the file again") from None
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: cannot read ({e})") from None


def read_pairs(path, report, strict=False, max_chars=250, max_lines=None):
    """Yield (line number, english, translation) of a file of english<TAB>translation lines, counting every line in `report`.

    report gets: lines = kept + long (over max_chars, the paper's rule) + blank + the sum of bad by reason; examples.
    Raises: InputError at the first bad line if strict, at the end if more than 1 % of the lines are bad."""
    report.update(file=Path(path).name, lines=0, kept=0, long=0, blank=0, bad=Counter(), examples=[])
    for number, text, fault in itertools.islice(read_lines(path), max_lines):
        report["lines"] += 1
        if text is not None and not text.strip():
            report["blank"] += 1
            continue
        sides = [s.strip() for s in (text or "").split("\t")]
        fault = fault or {1: "no tab", 2: "" if all(sides) else "an empty side"}.get(len(sides), f"too many tabs ({len(sides) - 1})")
        if fault:
            report["bad"][fault.split(" (")[0]] += 1
            place = f"{path}:{number}: {fault}; expected english<TAB>translation" + (f", found {text[:60]!r}" if text is not None else "")
            if strict:
                raise InputError(f"{place}. Mend the line, or leave out --strict to drop up to 1 % of such lines")
            report["examples"] = (report["examples"] + [place])[:3]
        elif max(map(len, sides)) > max_chars:
            report["long"] += 1
        else:
            report["kept"] += 1
            yield number, *sides
    bad = sum(report["bad"].values())
    if bad > 0.01 * report["lines"]:
        raise InputError(f"{path}: {bad} of {report['lines']} lines are bad, more than 1 %: {dict(report['bad'])}. "
                         f"First: {'; '.join(report['examples'])}")


def read_sts(folder):
    """{"en-de": (sentences, sentences, scores)} of a folder of *.A-B.txt files, sentence1<TAB>sentence2<TAB>score 0..5.
    Raises: InputError at any bad line, with file, number and value."""
    sets, folder = {}, Path(folder)
    for path in sorted(folder.glob("*")) if folder.is_dir() else []:
        if not (m := re.search(r"(?:^|[._])([a-z]{2,3})-([a-z]{2,3})\.(txt|tsv)(\.gz)?$", path.name)):
            continue
        rows, name = [], f"{m[1]}-{m[2]}"
        for number, text, fault in read_lines(path):
            try:
                a, b, score = (c.strip() for c in (text or "").split("\t"))
                ok = a and b and 0 <= float(score) <= 5
            except ValueError:                                   # not three cells, or the third is no number
                ok = False
            need(ok, f"{path}:{number}: {fault or repr(text[:80])}: expected sentence<TAB>sentence<TAB>score from 0 to 5")
            rows.append((a, b, float(score)))
        need(len(rows) >= 2, f"{path}: {len(rows)} lines; a correlation needs two or more")
        need(name not in sets, f"{path}: a second file for {name} in {folder}; keep one")
        a, b, scores = zip(*rows)
        sets[name] = list(a), list(b), np.array(scores)
    need(sets, f"{folder}: no similarity sets; expected files named like STS.en-de.txt")
    return sets


# ------------------------------------------------------------------------------------------------------- the disk store
def digest(*parts):
    """A short hex digest of files (Path) and values, the key of everything in the cache."""
    h = hashlib.blake2b(digest_size=10)
    for part in parts:
        if isinstance(part, Path):
            with open(part, "rb") as f:
                part = hashlib.file_digest(f, "blake2b").hexdigest()
        h.update(repr(part).encode() + b"\0")
    return h.hexdigest()


def open_array(path):
    """A memory-mapped array of the cache. Raises: InputError if it is damaged."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        entry = path.parent if path.parent.name.startswith(("corpus-", "tokens-")) else path
        raise InputError(f"{path}: damaged cache entry ({e}); delete {entry} and run again") from None


class Corpus:
    """Sentence pairs, memory-mapped once they are built.

    pairs (n, 2): numbers of distinct sentences, english and translation; group (n,): 0 for files of all stages, 1 for
    those of stages 2 and 3 alone; line (n,): a pair's line in its file; first: where each distinct sentence stands in the
    text; report: a dict a file."""
    def __init__(self, folder):
        self.folder, self.key = Path(folder), Path(folder).name
        self.text, self.starts, self.pairs, self.group, self.line, self.first = (
            open_array(self.folder / f"{n}.npy") for n in ("text", "starts", "pairs", "group", "line", "first"))
        self.report = read_json(self.folder / "report.json")["files"]

    def texts(self, ids):
        rows = self.first[ids]
        return [bytes(self.text[a:b]).decode() for a, b in zip(self.starts[rows].tolist(), self.starts[rows + 1].tolist())]


# The first value of a key is the version of what is stored, where the code that makes it may change.
def build_corpus(files, cache, extra=(), strict=False, max_chars=250, max_lines=None):
    """The Corpus of english<TAB>translation files, read once into the cache and found there by its content afterwards.

    extra: files for stages 2 and 3 alone. File order does not matter. Raises: InputError if nothing is left to use."""
    files = sorted({(Path(f).name, digest(Path(f)), group, str(f)) for group, names in enumerate((files, extra)) for f in names})
    folder = Path(cache) / f"corpus-{digest(2, [f[:3] for f in files], max_chars, max_lines)}"
    if not folder.exists():
        reports, pair = [], np.dtype([("hash", "<u8", 2), ("size", "<u4", 2), ("line", "<u4"), ("group", "u1")])
        with atomic(folder) as tmp:
            tmp.mkdir()
            with open(tmp / "raw", "wb") as raw, open(tmp / "pairs", "wb") as out:
                for name, _, g, path in files:
                    reports.append(report := {})
                    for number, *sides in read_pairs(path, report, strict, max_chars, max_lines):
                        s, t = (x.encode() for x in sides)
                        raw.write(s + t)
                        out.write(b"".join(hashlib.blake2b(x, digest_size=8).digest() for x in (s, t)))
                        out.write(struct.pack("<3IB", len(s), len(t), number, g))
                n = out.tell() // pair.itemsize
            need(n, f"{', '.join(f[3] for f in files) or 'no files'}: no usable sentence pairs; "
                 f"expected english<TAB>translation lines of at most {max_chars} characters a side")
            np.save(tmp / "text.npy", np.memmap(tmp / "raw", np.uint8, "r"))
            read = np.memmap(tmp / "pairs", pair, "r")
            np.save(tmp / "starts.npy", np.concatenate([[0], np.cumsum(read["size"].reshape(-1), dtype=np.int64)]))
            # Equal sentences get one number, so each is tokenised and encoded once; 64-bit hashes stand for the text,
            # one sixteenth of their range at a time, which sorts in a sixteenth of the memory.
            hashes, ids, first = read["hash"].reshape(-1), np.empty(2 * n, np.uint32), [np.zeros(0, np.int64)]
            for part in range(16):
                rows = np.flatnonzero(hashes >> np.uint64(60) == part)
                _, where, number = np.unique(hashes[rows], return_index=True, return_inverse=True)
                ids[rows] = sum(map(len, first)) + number
                first.append(rows[where])
            for name, array in (("pairs", ids.reshape(-1, 2)), ("first", np.concatenate(first)), ("group", read["group"]), ("line", read["line"])):
                np.save(tmp / f"{name}.npy", array)
            (tmp / "report.json").write_text(json.dumps({"files": reports}))
            (tmp / "raw").unlink()
            (tmp / "pairs").unlink()
    corpus = Corpus(folder)
    if strict and (bad := [e for r in corpus.report for e in r["examples"]]):
        raise InputError(f"{bad[0]}. Mend the line, or leave out --strict to drop up to 1 % of such lines")
    return corpus


def vocabulary(corpus, size, lower_case, cache, say=print):
    """The tokenizer that train_tokenizer learns from a corpus, made once. Sentences are numbered by their hash, so the
    first two millions are a fair sample of a larger one, and time and memory stay bounded."""
    path, n = Path(cache) / f"vocabulary-{digest(1, corpus.key, size, lower_case)}.json", min(len(corpus.first), 2_000_000)
    if not path.exists():
        say(f"vocabulary: learning {size:,} pieces from {n:,} sentences")
        tokenizer = train_tokenizer((t for i in range(0, n, 10000) for t in corpus.texts(slice(i, i + 10000))), size, lower_case)
        with atomic(path) as tmp:
            tmp.write_text(tokenizer.to_str(), "utf-8")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as e:                                  # tokenizers raises bare Exception; this re-raises with the name
        raise InputError(f"{path}: damaged cache entry ({e}); delete it and run again") from None


def tokens(corpus, encoder, cache, chunk=20000):
    """(flat ids, starts) of all distinct sentences in an encoder's vocabulary, memory-mapped, made once."""
    folder = Path(cache) / f"tokens-{digest(corpus.key, encoder.tokenizer.to_str(), encoder.config.max_seq_length, encoder.config.do_lower_case)}"
    if not folder.exists():
        with atomic(folder) as tmp:
            tmp.mkdir()
            starts = [np.zeros(1, np.int64)]
            with open(tmp / "raw", "wb") as raw:
                for i in range(0, len(corpus.first), chunk):
                    flat, s = encoder.tokenize(corpus.texts(slice(i, i + chunk)))
                    raw.write(flat.tobytes())
                    starts.append(s[1:] + starts[-1][-1])
            np.save(tmp / "ids.npy", np.memmap(tmp / "raw", np.uint32, "r"))
            (tmp / "raw").unlink()
            np.save(tmp / "starts.npy", np.concatenate(starts))
    return open_array(folder / "ids.npy"), open_array(folder / "starts.npy")


def as_targets(v, form):
    """An encoder's vectors (n, H) as targets: raw, unit, or scaled, which is unit times the root of the width.

    Raw is the paper's. Unit vectors have a variance of 1/H a dimension, so their MSE drowns beside the contrastive term:
    10 points lost on the demo. Scaled to variance 1 they end near raw. Figures in the README."""
    return v if form == "raw" else unit(v) * (v.shape[1] ** 0.5 if form == "scaled" else 1)


def vectors(corpus, ids, encoder, fingerprint, cache, layers=True, form="raw", progress=None, chunk=8192):
    """An encoder's vectors (len(ids), H) of the sentences numbered `ids`, a memory-mapped float16 file made once.

    fingerprint: names the encoder's weights. form: as_targets. progress: called with (done, all)."""
    key = digest(corpus.key, ids.tobytes(), fingerprint, str(encoder.dtype), encoder.config.max_seq_length, layers, form)
    path = Path(cache) / f"vectors-{key}.npy"
    if not path.exists():
        with atomic(path) as tmp, open(tmp, "wb") as f:
            np.lib.format.write_array_header_1_0(f, {"descr": "<f2", "fortran_order": False, "shape": (len(ids), encoder.config.hidden_size)})
            f.flush()                                       # a full disk is an error now, not after hours of encoding
            os.posix_fallocate(f.fileno(), 0, f.tell() + 2 * len(ids) * encoder.config.hidden_size)
            for i in range(0, len(ids), chunk):
                v = encoder.embed(*encoder.tokenize(corpus.texts(ids[i:i + chunk])), layers=layers)
                v = as_targets(v, form).astype(np.float16)
                need(np.isfinite(v).all(), f"the source of {path.name}: its vectors are not finite in float16; is this a trained sentence encoder?")
                f.write(v)
                if progress:
                    progress(min(i + chunk, len(ids)), len(ids))
    out = open_array(path)
    need(out.shape == (len(ids), encoder.config.hidden_size) and out.dtype == np.float16,
         f"{path}: damaged cache entry ({out.dtype} {out.shape}); delete it and run again")
    return out


# ------------------------------------------------------------------------------------------------------------- batches
def batch_order(lengths, batch, seed):
    """The batches of one pass over the pairs: arrays of pair numbers, a pure function of its arguments.

    Shuffled, sorted by length within stretches of 256 batches to save padding, cut, and the batches shuffled. lengths (n,):
    of the longer side of each pair; of real text nine tenths of a batch are then no padding, eight by the sum of both."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths))
    stretch = np.arange(len(order)) // (256 * batch)
    order = order[np.lexsort((lengths[order], stretch))]
    cuts = np.split(order, range(batch, len(order), batch))
    return [cuts[i] for i in rng.permutation(len(cuts))]


# ---------------------------------------------------------------------------------------------------------- vocabulary
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]                                      # XLM-R's ids 0 to 3


def train_tokenizer(texts, size, lower_case, max_chars=10 ** 6):
    """A Unigram tokenizer of about `size` pieces learnt from text, with XLM-R's special tokens.

    Pieces come from byte-pair merges, their scores from counting the best segmentations twice (hard EM): the library's
    own Unigram trainer gives another vocabulary each time, for the order of a hash table, and a run must repeat."""
    normalizer = normalizers.Sequence([normalizers.NFKC()] + ([normalizers.Lowercase()] if lower_case else []))
    split = pre_tokenizers.Metaspace()
    bpe = Tokenizer(models.BPE())
    bpe.normalizer, bpe.pre_tokenizer = normalizer, split
    words = Counter()
    for text in texts:
        words.update(w for w, _ in split.pre_tokenize_str(normalizer.normalize_str(text[:max_chars])))
    words = sorted(words.items())
    bpe.train_from_iterator((w.replace("▁", " ") for w, n in words for _ in range(min(n, 1000))),
                            trainers.BpeTrainer(vocab_size=size - len(SPECIAL), show_progress=False))
    pieces = sorted(set(bpe.get_vocab()) - set(SPECIAL))
    scores = {p: -math.log(len(pieces)) - 0.1 * (p == "▁") for p in pieces}
    for count in (True, True, False):
        unigram = models.Unigram([(p, 0.0) for p in SPECIAL] + sorted(scores.items(), key=lambda x: (-x[1], x[0])), unk_id=3)
        if not count:                                                            # the last one is what we came for
            break
        counts = Counter(dict.fromkeys(pieces, 0.5))                             # half a count keeps unused pieces finite
        for word, n in words:
            for token in unigram.tokenize(word):
                counts[token.value] += n * (token.value in scores)
        total = sum(counts.values())
        scores = {p: math.log(counts[p] / total) for p in pieces}
    tokenizer = Tokenizer(unigram)
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizer, split, decoders.Metaspace()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    return tokenizer
