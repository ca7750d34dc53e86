"""Text in, batches and targets out.

    reading files  |  the disk store: corpus, tokens, targets  |  vocabulary  |  batches

Everything that is computed once is kept in a cache folder, as files named by a hash of what they
were made from; all of it is safe to delete.
"""

import contextlib
import functools
import gzip
import hashlib
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import sys
import time
from array import array
from collections import Counter
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

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
COUNTS = ("lines", "kept", "long", "blank", "header", "same", "quoted")  # in the report of a file
FORMATS = {  # what a file may be instead of text, by its first bytes, and what prints its text
    b"PAR1": (
        "parquet",  # two columns; line ends and tabs in a cell become spaces
        "python -c \"import pandas, sys; [print(*(' '.join(str(x).split()) for x in row[:2]), "
        "sep='\\t') for row in pandas.read_parquet(sys.argv[1]).values]\"",
    ),
    b"PK\x03\x04": (
        "zip",  # all that is in it
        'python -c "import sys, zipfile; z = zipfile.ZipFile(sys.argv[1]); '
        '[sys.stdout.buffer.write(z.read(n)) for n in z.namelist()]"',
    ),
    b"BZh": ("bzip2", "bzcat"),
    b"\xfd7zXZ": ("xz", "xzcat"),
    b"\x28\xb5\x2f\xfd": ("zstd", "zstdcat"),
    (b"\xff\xfe\0\0", b"\0\0\xfe\xff"): ("UTF-32", "iconv -f UTF-32 -t UTF-8"),
    (b"\xff\xfe", b"\xfe\xff"): ("UTF-16", "iconv -f UTF-16 -t UTF-8"),
}
NOT_TEXT = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd]")
NOT_UTF8 = re.compile("[\ud800-\udfff]")


def refuse_formats(path, head, packed):
    """Raises: InputError where the first bytes of a file are not those of UTF-8 text."""
    name, command = next((v for k, v in FORMATS.items() if head.startswith(k)), ("", ""))
    if not name and head.count(0) > len(head) / 5:  # no byte order mark, but every second byte
        name, order = "UTF-16", "BE" if head[0] == 0 else "LE"
        command = f"iconv -f UTF-16{order} -t UTF-8"
    new = Path(path).with_name(f"text-{Path(path).stem.removesuffix('.tsv')}.tsv")
    old, new = shlex.quote(str(path)), shlex.quote(str(new))
    text = f"zcat {old} | {command}" if packed else f"{command} {old}"
    need(not name, f"it is {name}. Convert it: {text} > {new}")


def read_lines(path):
    """Yield the lines of a plain or gzipped UTF-8 file, without their ends.

    A byte that is not UTF-8 becomes half of a surrogate pair, which no right line has.
    Raises: InputError for a file that is missing, unreadable, truncated or of another format.
    """
    with reading(path, "plain or whole gzipped UTF-8 text"), open(path, "rb") as raw:
        packed = raw.peek(2)[:2] == b"\x1f\x8b"
        lines = gzip.open(raw) if packed else raw
        refuse_formats(path, lines.peek(4096)[:4096], packed)
        while line := lines.readline(LINE_LIMIT):
            whole = len(line) < LINE_LIMIT or line.endswith(b"\n")
            need(whole, f"it has a line of more than {LINE_LIMIT} bytes")
            text = line.decode("utf-8", "surrogateescape").rstrip("\r\n")
            yield text.removeprefix("\ufeff")  # joined files have more than one BOM


def fault_of(text, sides):
    """Why a line is no pair, or None."""
    if found := NOT_UTF8.search(text):
        return f"not UTF-8 (at character {found.start() + 1})"
    if found := NOT_TEXT.search(text):
        return f"a character that is no text (U+{ord(found[0]):04X})"
    if len(sides) != 2:
        return "no tab" if len(sides) == 1 else f"too many columns ({len(sides)})"
    return None if all(sides) else "an empty side"


def is_header(sides):
    """Are these the names of two columns, such as english and non_english, or source and target?"""
    a, b = (re.sub("[^a-z]", "", side.lower()) for side in sides)
    first = re.fullmatch("en|eng|english|(source|src|original|input)[a-z]*|(sentence|text)(en)?", a)
    return bool(first and b and " " not in sides[0] + sides[1])


def read_pairs(path, report, max_chars=250, max_lines=None):
    """Yield (line number, english, translation) of a file, counting every line in `report`.

    report: lines = kept + long (over max_chars, the paper's rule) + blank + header + the sum of
    bad by reason; of those kept, how many are untranslated or quoted; examples.
    Raises: InputError at the end if more than 1 % of the lines are bad.
    """
    report |= {"file": Path(path).name, "bad": Counter(), "examples": {}} | dict.fromkeys(COUNTS, 0)

    def count(what, number, text):
        report[what] += 1
        report["examples"].setdefault(what, f"{path}:{number}: {text[:60]!r}")

    for number, text in enumerate(itertools.islice(read_lines(path), max_lines), 1):
        report["lines"] += 1
        sides = [s.strip() for s in text.split("\t")]
        if not any(sides):
            report["blank"] += 1
        elif fault := fault_of(text, sides):
            kind = fault.split(" (")[0]
            report["bad"][kind] += 1
            expected = f"expected english<TAB>translation, found {text[:60]!r}"
            report["examples"].setdefault(kind, f"{path}:{number}: {fault}; {expected}")
        elif number == 1 and is_header(sides):
            count("header", number, text)
        elif max(map(len, sides)) > max_chars:
            report["long"] += 1
        else:
            report["kept"] += 1
            if sides[0] == sides[1]:
                count("same", number, text)
            if all(len(s) > 1 and s[0] == s[-1] == '"' for s in sides):
                count("quoted", number, text)
            yield number, *sides
    refuse_bad(path, report)


def refuse_bad(path, report):
    """Raises: InputError where more than 1 % of the lines of a file are bad."""
    bad, lines = sum(report["bad"].values()), report["lines"]
    fix = ""
    if report["bad"]["too many columns"] > bad / 2:
        cat = "zcat" if str(path).endswith(".gz") else "cat"
        fix = f" Keep two columns: {cat} {shlex.quote(str(path))} | cut -f1,2 > en-xx.tsv."
    first = "; ".join(report["examples"][kind] for kind in report["bad"])
    share = f"{bad} of {lines} lines are bad, more than 1 %: {dict(report['bad'])}"
    need(bad <= lines / 100, f"{path}: {share}.{fix} First: {first}")


def read_sts(folder):
    """{"en-de": (sentences, sentences, scores)} of a folder of similarity sets, *.A-B.txt or .tsv.

    Lines are sentence<TAB>sentence<TAB>score from 0 to 5. Raises: InputError at any bad line.
    """
    sets = {}
    named = re.compile(r"(?:^|[._])([a-z]{2,3}-[a-z]{2,3})\.(txt|tsv)(\.gz)?$")
    for path in sorted(Path(folder).glob("[!.]*")):
        if not (m := named.search(path.name)):
            continue
        rows = []
        for number, text in enumerate(read_lines(path), 1):
            try:
                a, b, score = (c.strip() for c in text.split("\t"))
                ok = a and b and 0 <= float(score) <= 5 and not NOT_UTF8.search(text)
            except ValueError:  # not three cells, or the third is no number
                ok = False
            expected = "expected UTF-8, sentence<TAB>sentence<TAB>score from 0 to 5"
            need(ok, f"{path}:{number}: {text[:80]!r}: {expected}")
            rows.append((a, b, float(score)))
        differ = len({score for *_, score in rows}) > 1
        need(differ, f"{path}: {len(rows)} lines of one score; a correlation needs two scores")
        need(m[1] not in sets, f"{path}: a second file for {m[1]} in {folder}; keep one")
        a, b, scores = zip(*rows)
        sets[m[1]] = list(a), list(b), np.array(scores)
    need(sets, f"{folder}: no similarity sets; expected files named like STS.en-de.txt")
    return sets


# ---------------------------------------------------------------------------------- the disk store
def delete(path):
    """Delete a file or a folder, if it is there."""
    with contextlib.suppress(FileNotFoundError):  # another process may do the same
        remove = shutil.rmtree if path.is_dir() and not path.is_symlink() else os.unlink
        remove(path)


@contextlib.contextmanager
def atomic(path):
    """Yield a temporary name beside `path`, for a file or a new folder; success renames it.

    On failure it goes. A kill at any moment leaves the old content or the new, never a part.
    Raises: InputError where it cannot be written, naming the path.
    """
    path = Path(path)
    prefix = f".{path.name}.tmp-{platform.node()}@"  # machines may share a folder
    tmp = path.with_name(f"{prefix}{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in (f for f in path.parent.iterdir() if f.name.startswith(prefix)):
            process = Path("/proc", old.name.removeprefix(prefix))
            if Path("/proc/self").exists() and not process.exists():  # it was killed in a save
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
            delete(tmp.with_name(f"{tmp.name}.new"))  # of model.write_safetensors
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
    of starts. report: a dict a file.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
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
        for kind, what in (("same", "are equal"), ("quoted", "are in quotes")):
            if n[kind]:
                warning = "warning: " * (n[kind] > 0.03 * n["kept"])
                example = examples.pop(kind)
                yield f"  {warning}{n[kind] / n['kept']:.1%}: both sides {what}, such as {example}"
        yield from (f"  dropped {example}" for example in list(examples.values())[:3])


# The first value of a key is the version of what is stored; it moves when that changes.
def build_corpus(files, cache, extra=(), max_chars=250, max_lines=None):
    """The Corpus of english<TAB>translation files, read once and then found by its content.

    extra: files for stages 2 and 3 alone. Raises: InputError if nothing is left to use.
    """
    once = {Path(f).resolve(): (f, group) for group, some in ((1, extra), (0, files)) for f in some}
    files = sorted((Path(f).name, digest(Path(f)), group, str(f)) for f, group in once.values())
    key = digest(3, [f[:3] for f in files], max_chars, max_lines)  # in whatever order they came
    folder = Path(cache) / f"corpus-{key}"
    if not folder.exists():
        with atomic(folder) as tmp:
            tmp.mkdir()
            _write_corpus(tmp, files, max_chars, max_lines)
    return Corpus(folder)


def _write_corpus(tmp, files, max_chars, max_lines):
    """The arrays of a Corpus and its report. Equal sentences get one number, so each is tokenised
    and encoded once; 64-bit hashes stand for the text."""
    hashes, sizes, lines, groups = array("Q"), array("I"), array("I"), array("B")
    text, reports = bytearray(), []
    sizes_of_files = np.cumsum([os.path.getsize(f[3]) for f in files])
    progress = meter("bytes")
    for done, (_, _, group, path) in zip(sizes_of_files, files):
        reports.append({})
        for number, *sides in read_pairs(path, reports[-1], max_chars, max_lines):
            for side in map(str.encode, sides):
                key = hashlib.blake2b(side, digest_size=8).digest()
                hashes.append(int.from_bytes(key, "little"))
                sizes.append(len(side))
                text += side
            lines.append(number)
            groups.append(group)
        progress(done, sizes_of_files[-1])
    names = ", ".join(f[3] for f in files) or "no files"
    expected = f"english<TAB>translation lines, {max_chars} characters a side at most"
    need(lines, f"{names}: no usable sentence pairs; expected {expected}")
    _, first, ids = np.unique(np.array(hashes), return_index=True, return_inverse=True)
    np.save(tmp / "text.npy", np.frombuffer(text, np.uint8))
    np.save(tmp / "starts.npy", np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]))
    np.save(tmp / "pairs.npy", ids.astype(np.uint32).reshape(-1, 2))
    np.save(tmp / "group.npy", np.array(groups))
    np.save(tmp / "line.npy", np.array(lines))
    np.save(tmp / "first.npy", first)
    (tmp / "report.json").write_text(json.dumps({"files": reports}), "utf-8")


def tokens(corpus, encoder, cache, chunk=20000):
    """(flat ids, starts) of all distinct sentences in an encoder's vocabulary, made once."""
    c = encoder.config
    key = digest(2, corpus.key, encoder.tokenizer.to_str(), c.max_seq_length, c.prompt)
    folder = Path(cache) / f"tokens-{key}"
    if not folder.exists():
        with atomic(folder) as tmp:
            tmp.mkdir()
            parts, lengths, n = [], [[0]], len(corpus.first)
            progress = meter("tokens")
            for i in range(0, n, chunk):
                flat, starts = encoder.tokenize(corpus.texts(slice(i, i + chunk)))
                parts.append(flat)
                lengths.append(np.diff(starts))
                progress(min(i + chunk, n), n)
            np.save(tmp / "ids.npy", np.concatenate(parts))
            np.save(tmp / "starts.npy", np.cumsum(np.concatenate(lengths)))
    return open_array(folder / "ids.npy"), open_array(folder / "starts.npy")


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
        with atomic(path) as tmp, open(tmp, "wb") as f:
            header = {"descr": "<f2", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(f, header)
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


def vocabulary(corpus, size, lower_case, cache):
    """The tokenizer that train_tokenizer learns from a corpus, made once."""
    path = Path(cache) / f"vocabulary-{digest(4, corpus.key, size, lower_case)}.json"
    if not path.exists():
        tokenizer = train_tokenizer(corpus.texts(slice(FAIR_SAMPLE)), size, lower_case)
        with atomic(path) as tmp:
            tmp.write_text(tokenizer.to_str(), "utf-8")
    with reading(path, "a whole cache entry", "; delete it and run again"):
        return Tokenizer.from_file(str(path))


def train_tokenizer(texts, size, lower_case):
    """A BPE tokenizer of `size` pieces learnt from text, with XLM-R's special tokens; of more where
    there are more characters, of fewer where there are fewer words.

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
    tokenizer.train_from_iterator(texts, trainer)
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
