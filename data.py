"""Text in, batches and targets out.

    reading files  |  the disk store: corpus, tokens, targets  |  vocabulary  |  batches

Everything that is computed once is kept in a cache folder, as files named by a hash of what they
were made from; all of it is safe to delete.
"""

import contextlib
import functools
import glob
import gzip
import hashlib
import itertools
import json
import math
import os
import platform
import re
import shutil
import sys
import time
import unicodedata
from array import array
from collections import Counter
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from checks import forms
from model import InputError, need, read_json, reading


# ------------------------------------------------------------------------------- the user is told
@functools.cache
def note(text):
    """Say on stderr, once, what is worth knowing but stops nothing."""
    print(f"note: {text}", file=sys.stderr, flush=True)


def meter(what):
    """A callback (done, all) that tells stderr of long work, at most every five seconds."""
    begun = shown = time.monotonic()

    def show(done, total):
        nonlocal shown
        now = time.monotonic()
        if now - shown > 5:
            rate = done / (now - begun)
            m, s = divmod((total - done) / rate, 60)
            left = f"{m:.0f}:{s:02.0f} left"
            print(f"{what}  {done:,}/{total:,}  {rate:,.0f}/s  {left}", file=sys.stderr, flush=True)
            shown = now

    return show


# ---------------------------------------------------------------------------------- reading files
LINE_LIMIT = 1 << 20  # bytes; a file with a longer one holds no sentence pairs
ODD = {  # of the pairs kept: from which share of a file on to warn, what it is, what mends it
    "same": (0.03, "both sides are equal", None),
    "quoted": (0.03, "both sides are in quotes", None),
    "entities": (0.01, "HTML entities", forms.MEND),
    "twice": (0.01, "text that was decoded twice", forms.MEND),
}
COUNTS = ("lines", "kept", "long", "blank", "header", *ODD)


def expand(patterns, flag):
    """Files of a list of glob patterns. Raises: InputError for a pattern that matches nothing."""
    files = set()
    for pattern in patterns:
        found = {pattern, *glob.glob(pattern, recursive=True)}  # a name may hold a bracket
        found = {f for f in found if os.path.isfile(f)}
        what = "it is a folder; name its files, as 'DIR/*.tsv'"
        need(found, f"{flag} {pattern}: {what if os.path.isdir(pattern) else 'no such file'}")
        files |= found
    return [Path(f) for f in sorted(files)]


def read_lines(path):
    """Yield the lines of a plain or gzipped UTF-8 file, without their ends, in Unicode's form NFC.

    A byte that is not UTF-8 becomes half of a surrogate pair, which no right line has.
    Raises: InputError for a file that is missing, unreadable, truncated or of another format.
    """
    with reading(path, "plain or whole gzipped UTF-8 text"), open(path, "rb") as raw:
        lines = gzip.open(raw) if raw.peek(2)[:2] == forms.GZIP else raw
        forms.refuse_formats(path, lines.peek(4096)[:4096])
        while line := lines.readline(LINE_LIMIT):
            whole = len(line) < LINE_LIMIT or line.endswith(b"\n")
            need(whole, f"it has a line of more than {LINE_LIMIT} bytes")
            text = line.decode("utf-8", "surrogateescape").rstrip("\r\n")
            text = text.replace("\ufeff", "")  # joined files have more than one BOM
            # A letter and its accent may come as one character or as two: the same sentence twice.
            yield text if text.isascii() else unicodedata.normalize("NFC", text)


def read_pairs(path, report, max_chars=250, max_lines=None):
    """Yield (line number, english, translation) of a file, counting every line in `report`.

    report: lines = kept + long (over max_chars, the paper's rule) + blank + header + the sum of
    bad by reason; of those kept, how many are untranslated, quoted or damaged; examples.
    Raises: InputError at the end if more than 1 % of the lines are bad, or a side is no text.
    """
    name, first = Path(path).name, []
    report |= {"file": name, "bad": Counter(), "examples": {}} | dict.fromkeys(COUNTS, 0)

    def count(what, number, text):
        report[what] += 1
        report["examples"].setdefault(what, f"{name}:{number}: {text[:60]!r}")

    for number, text in enumerate(itertools.islice(read_lines(path), max_lines), 1):
        report["lines"] += 1
        sides = [s.strip() for s in text.split("\t")]
        if not any(sides):
            report["blank"] += 1
        elif fault := forms.fault_of(text, sides):
            kind = fault.split(" (")[0]
            report["bad"][kind] += 1
            expected = f"expected english<TAB>translation, found {text[:60]!r}"
            report["examples"].setdefault(kind, f"{name}:{number}: {fault}; {expected}")
        elif number == 1 and forms.is_header(sides):
            count("header", number, text)
        elif max(map(len, sides)) > max_chars:
            report["long"] += 1
        else:
            report["kept"] += 1
            for what in forms.suspicions(text, *sides):
                count(what, number, text)
            if len(first) < forms.SAMPLE:
                first.append(sides)
            yield number, *sides
    refuse_bad(path, report, first)


def refuse_bad(path, report, first):
    """Raises: InputError where more than 1 % of the lines of a file are bad, cells are quoted, or
    the first pairs have scores or ids on one side; with the command that makes pairs of it."""
    bad, lines = sum(report["bad"].values()), report["lines"]
    scores = [sum(map(forms.is_score, side)) for side in zip(*first)]
    cells = [cell for sides in first for cell in sides]
    if bad > lines / 100:
        what = f"{bad} of {lines} lines are bad, more than 1 %: {dict(report['bad'])}. First: "
        what += "; ".join(report["examples"][kind] for kind in report["bad"])
    elif report["quoted"] > report["kept"] / 2:
        what = f"most lines are in quotes, such as {report['examples']['quoted']}"
    elif forms.in_quotes(cells):
        example = next(cell for cell in cells if cell[:1] == '"')
        what = f"cells are in quotes, such as {example[:60]}"
    elif max(scores, default=0) > len(first) / 2:
        side = scores.index(max(scores))
        found = "english<TAB>translation, found scores or ids"
        what = f"column {side + 1}: expected {found}, such as {first[0][side][:60]!r}"
    else:
        return
    head = list(itertools.islice(read_lines(path), 10**5))  # enough to tell by
    raise InputError(f"{path}: {what}.{forms.fix_of(path, head)}")


def sts_files(folder):
    """{"en-de": file} of a folder of similarity sets, *.A-B.txt or .tsv. Raises: InputError."""
    sets, others = {}, []
    need(Path(folder).is_dir(), f"{folder}: no such folder; expected one of similarity sets")
    named = re.compile(r"(?:^|[._])([a-z]{2,3}-[a-z]{2,3})\.(txt|tsv)(\.gz)?$")
    for path in sorted(Path(folder).glob("[!.]*")):
        if m := named.search(path.name):
            need(m[1] not in sets, f"{path}: a second file for {m[1]} in {folder}; keep one")
            sets[m[1]] = path
        else:
            others.append(path.name)
    if others:
        note(f"{folder}: not read, as not named like STS.en-de.txt: {', '.join(others):.300}")
    need(sets, f"{folder}: no similarity sets; expected files named like STS.en-de.txt")
    return sets


def read_sts(folder):
    """{"en-de": (sentences, sentences, scores)} of a folder of similarity sets, see sts_files().

    Lines are sentence<TAB>sentence<TAB>score from 0 to 5. Raises: InputError at any bad line.
    """
    sets = {}
    for name, path in sts_files(folder).items():
        rows = []
        for number, text in enumerate(read_lines(path), 1):
            try:
                a, b, score = (c.strip() for c in text.split("\t"))
                ok = a and b and 0 <= float(score) <= 5 and not forms.NOT_UTF8.search(text)
            except ValueError:  # not three cells, or the third is no number
                ok = False
            expected = "expected UTF-8, sentence<TAB>sentence<TAB>score from 0 to 5"
            need(ok, f"{path}:{number}: {text[:80]!r}: {expected}")
            rows.append((a, b, float(score)))
        differ = len({score for *_, score in rows}) > 1
        need(differ, f"{path}: {len(rows)} lines of one score; a correlation needs two scores")
        a, b, scores = zip(*rows)
        sets[name] = list(a), list(b), np.array(scores)
    return sets


# ---------------------------------------------------------------------------------- the disk store
def delete(path):
    """Delete a file or a folder, if it is there."""
    with contextlib.suppress(FileNotFoundError):  # another process may do the same
        remove = shutil.rmtree if path.is_dir() and not path.is_symlink() else os.unlink
        remove(path)


@functools.cache
def place():
    """Names where process ids mean what they do here: a machine since its start, a container."""
    files = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    with contextlib.suppress(OSError):  # Linux alone has them
        return digest(platform.node(), files[0].read_text("utf-8"), os.readlink(files[1]))
    return digest(platform.node())


@contextlib.contextmanager
def atomic(path):
    """Yield a temporary name beside `path`, for a file or a new folder; success renames it.

    On failure it goes. A kill at any moment leaves the old content or the new, never a part.
    Raises: InputError where it cannot be written, naming the path.
    """
    path = Path(path)
    prefix = f".{path.name}.tmp-"
    tmp = path.with_name(f"{prefix}{place()}@{os.getpid()}")  # machines may share a folder
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in (f for f in path.parent.iterdir() if f.name.startswith(prefix)):
            where, _, process = old.name.removeprefix(prefix).partition("@")
            process = process.removesuffix(".new")  # of model.write_safetensors
            ours = where == place() and Path("/proc/self").exists()
            killed = ours and not Path("/proc", process).exists()  # in a save
            if killed or old == tmp:  # of our number, before a restart
                delete(old)
        try:
            yield tmp
            for file in (f for f in [tmp, *tmp.rglob("*")] if f.is_file()):
                with open(file, "rb+") as f:
                    os.fsync(f.fileno())  # a rename must not reach the disk before the content
            try:
                os.replace(tmp, path)
            except OSError:
                if not (tmp.is_dir() and path.is_dir()):  # two folders: another process was first
                    raise
        finally:
            delete(tmp)
            delete(tmp.with_name(f"{tmp.name}.new"))
    except BrokenPipeError:  # of what was printed meanwhile
        raise
    except OSError as e:
        fix = "nothing there was changed. Free some space or choose another folder, then repeat"
        raise InputError(f"{path}: cannot write ({e.strerror or e}); {fix}") from e


def digest(*parts):
    """A short hex digest of files (Path) and values: names what was made of them."""
    h = hashlib.blake2b(digest_size=10)
    for part in parts:
        if isinstance(part, Path):
            with reading(part, "readable"), open(part, "rb") as f:
                part = hashlib.file_digest(f, "blake2b").hexdigest()
        h.update(repr(part).encode() + b"\0")
    return h.hexdigest()


def open_array(path):
    """A memory-mapped array of the cache. Raises: InputError if it is damaged."""
    entry = path if path.name.startswith("vectors-") else path.parent
    with reading(path, "a whole cache entry", f"; delete {entry} and run again"):
        return np.load(path, mmap_mode="r")


class Corpus:
    """Sentence pairs, memory-mapped once they are built.

    pairs (n, 2): numbers of distinct sentences, english and translation. group (n,): 0 for files of
    all stages, 1 for those of stages 2 and 3 alone. line (n,): a pair's line in its file.
    text: all sides, in UTF-8; starts: where each begins. first: of each distinct sentence, its row
    of starts. report: a dict a file; files: where they lie.
    """

    def __init__(self, folder, files=()):
        self.folder, self.files = Path(folder), files
        self.key = self.folder.name
        for name in ("text", "starts", "pairs", "group", "line", "first"):
            setattr(self, name, open_array(self.folder / f"{name}.npy"))
        with reading(self.folder, "a whole cache entry", "; delete it and run again"):
            self.report = read_json(self.folder / "report.json")["files"]

    def texts(self, ids):
        """The sentences with these numbers."""
        rows, text = self.first[ids], memoryview(self.text)  # slices faster than an array
        spans = zip(self.starts[rows].tolist(), self.starts[rows + 1].tolist())
        return [str(text[a:b], "utf-8") for a, b in spans]

    def by_language(self):
        """{language: (english, translations)} by the names of the files, en-XX."""
        pairs, end = {}, 0
        for r in self.report:
            m = re.search("(?<![a-z])en-([a-z]{2,3})(?![a-z])", r["file"])
            start, end = end, end + r["kept"]
            sides = pairs.setdefault(m[1] if m else r["file"], ([], []))
            for side, ids in zip(sides, self.pairs[start:end].T):
                side.extend(self.texts(ids))
        return {k: v for k, v in pairs.items() if v[0]}

    def describe(self, max_lines):
        """What was read and what was dropped, line by line, with totals that add up."""
        n = {k: sum(r[k] for r in self.report) for k in COUNTS}
        bad = sum(sum(r["bad"].values()) for r in self.report)
        repeated = 1 - len(np.unique(self.pairs.view(np.uint64))) / n["kept"]
        yield (
            f"data: {len(self.report)} files, {n['lines']:,} lines = {n['kept']:,} pairs + "
            f"{n['long']:,} too long + {n['blank']:,} blank + {n['header']:,} headers + "
            f"{bad:,} malformed; {len(self.first):,} distinct sentences, {repeated:.1%} of the "
            "pairs are repeated"
        )
        if cut := sum(r["lines"] >= max_lines for r in self.report):
            yield f"  {cut} files reach --max-lines {max_lines:,}; lines beyond it are not read"
        # Reversed, so that the example of the first file stays.
        examples = {k: v for r in reversed(self.report) for k, v in r["examples"].items()}
        for kind, (limit, what, mend) in ODD.items():
            if n[kind]:
                shares = [r[kind] / (r["kept"] or 1) for r in self.report]
                i = shares.index(max(shares))  # the file that has most
                mended = "mend it and give the new file in its place"
                fix = f"; {mended}: {forms.piped(self.files[i], mend)}" if mend else ""
                warning, fix = ("warning: ", fix) if shares[i] > limit else ("", "")
                of_file = f" ({shares[i]:.1%} of {self.files[i]})" * (len(shares) > 1)
                example = f"{what}{of_file}, such as {examples.pop(kind)}"
                yield f"  {warning}{n[kind] / n['kept']:.1%}: {example}{fix}"
        yield from (f"  dropped {example}" for example in list(examples.values())[:3])


@contextlib.contextmanager
def array_file(path, dtype, *row):
    """Yield a file for the rows of an array, one after another; it becomes a .npy. row: its shape.

    What is larger than memory is written so.
    """
    with open(path, "wb") as f:
        f.write(bytes(128))  # the header, once the number of rows is known
        yield f
        size = np.dtype(dtype).itemsize * math.prod(row)
        shape = (f.tell() - 128) // size, *row
        f.seek(0)
        header = {"descr": dtype, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(f, header)
        assert f.tell() == 128


# The first value of a key is the version of what is stored: raise it when that changes.
def build_corpus(files, cache, extra=(), max_chars=250, max_lines=None):
    """The Corpus of english<TAB>translation files, read once and then found by its content.

    extra: files for stages 2 and 3 alone. Raises: InputError if nothing is left to use.
    """
    once = {Path(f).resolve(): (f, group) for group, some in ((1, extra), (0, files)) for f in some}
    files = sorted((Path(f).name, digest(Path(f)), group, str(f)) for f, group in once.values())
    key = digest(4, [f[:3] for f in files], max_chars, max_lines)  # in whatever order they came
    folder = Path(cache) / f"corpus-{key}"
    if not folder.exists():
        with atomic(folder) as tmp:
            tmp.mkdir()
            _write_corpus(tmp, files, max_chars, max_lines)
    return Corpus(folder, [f[3] for f in files])


def _write_corpus(tmp, files, max_chars, max_lines):
    """The arrays of a Corpus and its report. Equal sentences get one number, so each is tokenised
    and encoded once; 64-bit hashes stand for the text."""
    hashes, sizes, lines, groups = array("Q"), array("I"), array("I"), array("B")
    reports = []
    sizes_of_files = np.cumsum([os.path.getsize(f[3]) for f in files])
    progress = meter("bytes")
    with array_file(tmp / "text.npy", "|u1") as text:
        for done, (_, _, group, path) in zip(sizes_of_files, files):
            reports.append({})
            for number, *sides in read_pairs(path, reports[-1], max_chars, max_lines):
                for side in map(str.encode, sides):
                    key = hashlib.blake2b(side, digest_size=8).digest()
                    hashes.append(int.from_bytes(key, "little"))
                    sizes.append(len(side))
                    text.write(side)
                lines.append(number)
                groups.append(group)
            progress(done, sizes_of_files[-1])
    names = ", ".join(f[3] for f in files) or "no files"
    expected = f"english<TAB>translation lines, {max_chars} characters a side at most"
    need(lines, f"{names}: no usable sentence pairs; expected {expected}")
    np.save(tmp / "starts.npy", np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]))
    np.save(tmp / "group.npy", np.frombuffer(groups, np.uint8))
    np.save(tmp / "line.npy", np.frombuffer(lines, np.uint32))
    del sizes, groups, lines
    _, first, ids = np.unique(np.frombuffer(hashes, np.uint64), True, True)
    np.save(tmp / "first.npy", first)
    np.save(tmp / "pairs.npy", ids.astype(np.uint32).reshape(-1, 2))
    (tmp / "report.json").write_text(json.dumps({"files": reports}), "utf-8")


def tokens(corpus, encoder, cache, chunk=20000):
    """(flat ids, starts) of all distinct sentences in an encoder's vocabulary, made once."""
    c = encoder.config
    key = digest(2, corpus.key, encoder.tokenizer.to_str(), c.max_seq_length, c.prompt)
    folder = Path(cache) / f"tokens-{key}"
    if not folder.exists():
        with atomic(folder) as tmp:
            tmp.mkdir()
            begun, n = 0, len(corpus.first)
            progress = meter("tokens")
            ids, all_starts = tmp / "ids.npy", tmp / "starts.npy"
            with array_file(ids, "<u4") as f, array_file(all_starts, "<i8") as g:
                g.write(bytes(8))
                for i in range(0, n, chunk):
                    flat, starts = encoder.tokenize(corpus.texts(slice(i, i + chunk)))
                    f.write(flat.tobytes())
                    g.write((begun + starts[1:]).tobytes())
                    begun += len(flat)
                    progress(min(i + chunk, n), n)
    return open_array(folder / "ids.npy"), open_array(folder / "starts.npy")


def piece_counts(corpus, encoder, cache, most=None):
    """How often the distinct sentences of a corpus, or their first `most` tokens, use each piece of
    an encoder: (V,). They are in no order: the first ones are a fair sample."""
    ids, _ = tokens(corpus, encoder, cache)
    parts = np.split(ids[:most], range(10**7, len(ids[:most]), 10**7))  # it makes int64 of each
    return sum(np.bincount(part, minlength=encoder.config.vocab_size) for part in parts)


def vectors(corpus, ids, encoder, fingerprint, cache, embeddings_only=False, chunk=8192):
    """The targets: an encoder's vectors (len(ids), width) of the sentences numbered `ids`.

    A memory-mapped float16 file, made once. They are those before a final Normalize, as in the
    paper. fingerprint: names the encoder's weights. embeddings_only: as in Encoder.forward.
    """
    c = encoder.config
    shape = len(ids), c.hidden_size if embeddings_only else c.width
    key = (fingerprint, str(encoder.dtype), c.max_seq_length, c.prompt, embeddings_only)
    path = Path(cache) / f"vectors-{digest(3, corpus.key, ids.tobytes(), *key)}.npy"
    if not path.exists():
        with atomic(path) as tmp, array_file(tmp, "<f2", shape[1]) as f:
            f.flush()
            if hasattr(os, "posix_fallocate"):  # a full disk is an error now, not hours later
                os.posix_fallocate(f.fileno(), 0, f.tell() + 2 * shape[0] * shape[1])
            progress = meter("targets")
            for i in range(0, len(ids), chunk):
                texts = corpus.texts(ids[i : i + chunk])
                v = encoder.embed(*encoder.tokenize(texts), embeddings_only).astype(np.float16)
                finite = "its vectors are not finite in float16; is this a trained encoder?"
                need(np.isfinite(v).all(), f"the source of {path.name}: {finite}")
                f.write(v.tobytes())
                progress(min(i + chunk, len(ids)), len(ids))
    return open_array(path)


# -------------------------------------------------------------------------------------- vocabulary
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]  # XLM-R's ids 0 to 3
FAIR_SAMPLE = 1_000_000  # sentences are numbered by their hash: the first ones are a fair sample
UNSPACED = 4_000_000  # characters of text without spaces, whose sentences are one word to BPE


def vocabulary(corpus, size, lower_case, cache):
    """The tokenizer that train_tokenizer learns from a corpus, made once."""
    path = Path(cache) / f"vocabulary-{digest(5, corpus.key, size, lower_case)}.json"
    if not path.exists():
        tokenizer = train_tokenizer(corpus.texts(slice(FAIR_SAMPLE)), size, lower_case)
        with atomic(path) as tmp:
            tmp.write_text(tokenizer.to_str(), "utf-8")
    with reading(path, "a whole cache entry", "; delete it and run again"):
        return Tokenizer.from_file(str(path))


def spaced(texts):
    """Yield texts; of those without spaces, as Chinese and Thai, no more than UNSPACED characters.

    A vocabulary learns words once, however often they are there: of such text each sentence costs.
    """
    left = UNSPACED
    for text in texts:
        if len(text) > 15 * (1 + text.count(" ")):
            left -= len(text)
            if left < 0:
                continue
        yield text


def train_tokenizer(texts, size, lower_case):
    """A BPE tokenizer of `size` pieces learnt from text, with XLM-R's special tokens; of more if
    the text has more characters than that, of fewer if it has too few words.

    XLM-R's own kind is Unigram, but its trainer in the library gives another vocabulary each time,
    by the order of a hash table, and a run must repeat.
    """
    steps = [normalizers.NFKC(), normalizers.Lowercase()]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(steps if lower_case else steps[:1])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    bars = sys.stderr.isatty()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=bars)
    tokenizer.train_from_iterator(spaced(texts), trainer)
    ends = [("<s>", 0), ("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=ends)
    return tokenizer


def always_kept(tokenizer, size):
    """The pieces that a smaller vocabulary keeps whatever their use: special ones, characters.

    Raises: InputError where they or the whole vocabulary do not go with `size`, or the tokenizer is
    of a kind that cannot be cut.
    """
    raw, ids = json.loads(tokenizer.to_str()), tokenizer.get_vocab()
    model, kind = raw["model"], raw["model"]["type"]
    known = kind in ("Unigram", "BPE", "WordPiece")
    need(known, f"--keep-vocab: a {kind} tokenizer; only Unigram, BPE and WordPiece can be cut")
    kept = {model.get("unk_token"), *(t["content"] for t in raw["added_tokens"])}
    alone = re.compile(r"(##)?.|<0x[0-9A-F]{2}>", re.DOTALL)  # characters, bytes that stand in
    unknown = model.get("unk_id")  # as Unigram names it
    kept = {p for p, i in ids.items() if p in kept or i == unknown or alone.fullmatch(p)}
    limits = f"{len(kept):,} (special tokens, single characters) to {len(ids):,} (all pieces)"
    need(len(kept) <= size <= len(ids), f"--keep-vocab {size:,}: expected {limits}")
    return kept


def cut_vocabulary(tokenizer, counts, size):
    """(tokenizer, ids): the `size` pieces that a text uses most, and their old ids (size,).

    counts (V,): how often the text uses each piece. Of BPE the parts of what stays stay, too. Ids
    are renumbered in their old order, and a text whose pieces all stay is cut as before.
    Raises: InputError, see always_kept().
    """
    kept, ids = always_kept(tokenizer, size), tokenizer.get_vocab()
    raw = json.loads(tokenizer.to_str())
    model = raw["model"]
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model.get("merges", ())]
    parts = {}  # of a piece of BPE: all that it may be merged from
    for a, b in merges:
        parts.setdefault(a + b, set()).update((a, b))
    for piece in sorted(ids, key=lambda p: (-counts[ids[p]], ids[p])):
        wanted, more = set(), {piece}
        while more := more - kept - wanted:
            wanted |= more
            more = set().union(*(parts.get(p, ()) for p in more))
        if len(kept) + len(wanted) <= size:
            kept |= wanted
    order = sorted(kept, key=ids.get)
    new = {p: i for i, p in enumerate(order)}
    if model["type"] == "Unigram":
        model["unk_id"] = next((new[p] for p in order if ids[p] == model["unk_id"]), None)
        model["vocab"] = [entry for entry in model["vocab"] if entry[0] in kept]
    else:
        model["vocab"] = {p: new[p] for p in model["vocab"] if p in kept}
    if model["type"] == "BPE":
        model["merges"] = [[a, b] for a, b in merges if {a, b, a + b} <= kept]
    _renumber([raw["added_tokens"], raw["post_processor"]], new)
    return Tokenizer.from_str(json.dumps(raw)), np.array([ids[p] for p in order])


def _renumber(value, new):
    """Give the special tokens in a part of a tokenizer.json their new ids, in place."""
    if isinstance(value, dict) and "content" in value:
        value["id"] = new[value["content"]]
    elif isinstance(value, dict) and "tokens" in value:
        value["ids"] = [new[token] for token in value["tokens"]]
    elif isinstance(value, list) and list(map(type, value)) == [str, int]:
        value[1] = new[value[0]]
    else:
        for part in value.values() if isinstance(value, dict) else value:
            if isinstance(part, (dict, list)):
                _renumber(part, new)


# ----------------------------------------------------------------------------------------- batches
def batch_order(lengths, batch, seed):
    """The batches of one pass over the pairs: arrays of pair numbers, a pure function of these.

    lengths (n,): of the longer side of each pair. Shuffled, sorted by length within stretches of
    256 batches to save padding, cut, and the batches shuffled.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths))
    stretch = np.arange(len(order)) // (256 * batch)
    order = order[np.lexsort((lengths[order], stretch))]
    cuts = np.split(order, range(batch, len(order), batch))
    return [cuts[i] for i in rng.permutation(len(cuts))]
