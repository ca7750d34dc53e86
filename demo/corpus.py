"""The built-in corpus: what demo/*.txt say about eight languages, made into ordinary files.

A meaning (who does what to whom, where) is drawn at random and put into words by a template of each
language; two sentences are as similar as the parts of their meanings that they share. The format
of the lexicons is explained at the top of demo/de.txt, for speakers to correct.
"""

import random
import re
import zlib
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import data
import msd
from model import Config, Encoder, InputError, put

DEMO = Path(__file__).parent
LANGUAGES = ("de", "es", "it", "fr", "ar", "tr", "nl")  # the paper's target languages
STS_PAIRS = ("en-en", "ar-ar", "es-es", *(f"en-{x}" for x in LANGUAGES))  # those it reports
# What a sentence says; trait: the adjective of an object that is a person.
Meaning = namedtuple("Meaning", "number noun adjective verb object trait place")
WEIGHTS = Meaning(0.5, 1, 0.5, 1, 1, 0.5, 0.5)  # points out of 5 for each part shared


def read_lexicon(path):
    """A file of demo/: {section: {key: {column: cell}}}."""
    sections, section, columns = {}, None, []
    for number, line in enumerate(Path(path).read_text("utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        if line.startswith("["):
            name, *columns = line.strip("[] ").split()
            section = sections.setdefault(name, {})
            continue
        key, _, rest = line.partition(": ")
        cells, n = [c.strip() for c in rest.split(" | ")], max(1, len(columns))
        if section is None or len(cells) != n or not all(cells) or key in section:
            expected = f"expected a new 'key: ' and {n} cells between ' | '"
            raise InputError(f"{path}:{number}: {line!r}: {expected}")
        section[key] = dict(zip(columns or [""], cells))
    return sections


def read_lexicons():
    return {x: read_lexicon(DEMO / f"{x}.txt") for x in ("en", *LANGUAGES)}


# ------------------------------------------------------------------------------ meanings to words
def inflect(row, which, the, number, gender):
    """The cell of a row that agrees with a subject; the most exact column wins."""
    for a in (which, ""):
        for b in (f"{the}.{gender}", the, f"{number}.{gender}", number, gender, ""):
            if (column := ".".join(filter(None, (a, b)))) in row:
                return row[column]
    raise InputError(f"demo/: {row} has no form {which!r} for {the}, {gender}")


def say(language, lexicon, meaning, template, definite=False):
    """One sentence: a meaning in a template of one language. definite: "the" instead of "a"."""
    noun = lexicon["noun"][meaning.noun]
    gender, number = noun["gender"], meaning.number
    the = "two" if number == "two" else "the" if definite else "a"

    def person(noun, form, adjective, which, *agreement):
        if adjective == "-":
            return noun[form].replace("*", "")
        row = lexicon["adjective"][adjective]
        return noun[form].replace("*", inflect(row, which, *agreement, noun["gender"]))

    def fill(match):
        slot, which, form = re.fullmatch(r"(\w+)(?:\.(\w+))?(?:@(\w+))?", match[1]).groups()
        if slot == "subject":
            return person(noun, the, meaning.adjective, "", the, number)
        if slot == "object" and (whom := lexicon["noun"].get(meaning.object)):
            return person(
                whom, "whom" if "whom" in whom else "a", meaning.trait, "whom", "a", "one"
            )
        section, key = ("word", slot)
        if slot in Meaning._fields:
            section, key = slot, getattr(meaning, slot)
        number_ = "one" if form else number
        return inflect(lexicon[section][key], which or "", form or the, number_, gender)

    text = re.sub(r"\{(.*?)\}", fill, lexicon["template"][template][""])
    text = re.sub(r"\s+([,.])", r"\1", " ".join(text.split()))
    return ("İ" if language == "tr" and text[0] == "i" else text[0].upper()) + text[1:]


# ---------------------------------------------------------------------------------------- meanings
def similarity(a, b):
    """Score 0 to 5: the points of the parts that two meanings share."""
    return float(sum(w for w, x, y in zip(WEIGHTS, a, b) if x == y))


def split_of(meaning):
    """train, dev or test: by the meaning alone, so no paraphrase or translation crosses over."""
    return ("test", "dev", *["train"] * 3)[zlib.crc32(" ".join(meaning).encode()) % 5]


class Meanings:
    """Random meanings, always in the same order."""

    def __init__(self, english):
        self.rng = random.Random(0)  # the corpus is the same whatever the seed of a run
        rows = read_lexicon(DEMO / "meanings.txt")["meaning"]
        self.verbs = {
            v: row[""].split() for v, row in rows.items()
        }  # verb: its objects, * a person
        self.english, self.nouns = english, [*english["noun"]]
        self.traits = ["-", *english["adjective"]]
        takes_person = [v for v in self.verbs if "*" in self.verbs[v]]
        takes_thing = [v for v in self.verbs if self.verbs[v] != ["*"]]
        self.takes = {True: takes_person, False: takes_thing}

    def is_valid(self, m):
        objects, person = self.verbs[m.verb], m.object in self.nouns
        return (m.object in objects or person and "*" in objects) and (person or m.trait == "-")

    def draw_any(self):
        rng = self.rng
        person = rng.random() < 0.6
        verb = rng.choice(self.takes[person])
        return Meaning(
            rng.choice(["one", "two"]),
            rng.choice(self.nouns),
            rng.choice(self.traits),
            verb,
            rng.choice(self.nouns if person else [o for o in self.verbs[verb] if o != "*"]),
            rng.choice(self.traits) if person else "-",
            rng.choice([*self.english["place"]]),
        )

    def draw(self, split, like=None):
        """A meaning of one split; with `like`, a relative of it.

        Some parts are kept, or who does it to whom is exchanged.
        """
        rng = self.rng
        keep = rng.randrange(len(Meaning._fields) + 1)
        exchange = like and like.object in self.nouns and rng.random() < 0.4
        while True:
            m = self.draw_any()
            if exchange and rng.random() < 0.5:
                traits = {"adjective": like.trait, "trait": like.adjective}
                m = like._replace(number=m.number, place=m.place, **traits)
                if rng.random() < 0.7:
                    m = m._replace(noun=like.object, object=like.noun)
            elif like:
                for part in rng.sample(Meaning._fields, keep):
                    m = m._replace(**{part: getattr(like, part)})
            if self.is_valid(m) and split_of(m) == split:
                return m

    def phrase(self):
        """(template, definite) to say a meaning by."""
        template = self.rng.choice([*self.english["template"]])
        return template, template != "there" and self.rng.random() < 0.3  # not "there is the man"


# ------------------------------------------------------------------------------------------- files
def write_demo(folder, sentences=20000, dev=500, scored=400, teacher=24000):
    """Write the corpus: train/ and dev/en-XX.tsv, sts-train/, sts-dev/ and sts/STS.A-B.txt.

    sentences: distinct English sentences in train/, each with a translation into every language;
    dev: the same in dev/; scored: pairs of a similarity set; teacher: of the demo teacher's.
    """
    words = read_lexicons()
    meanings = Meanings(words["en"])
    for split, n in (("train", sentences), ("dev", dev)):
        (folder / split).mkdir(parents=True)
        chosen, m = {}, None
        while len(chosen) < n:  # every second sentence is close to its neighbour: hard
            m, how = meanings.draw(split, m if len(chosen) % 2 else None), meanings.phrase()
            chosen.setdefault(say("en", words["en"], m, *how), (m, how))
        for x in LANGUAGES:
            lines = (f"{s}\t{say(x, words[x], m, *how)}\n" for s, (m, how) in chosen.items())
            (folder / split / f"en-{x}.tsv").write_text("".join(lines), "utf-8")
    for name, split, n, which in (
        ("sts-train", "train", teacher, ["en-en"]),
        ("sts-dev", "dev", scored, STS_PAIRS),
        ("sts", "test", scored, STS_PAIRS),
    ):
        (folder / name).mkdir()
        for pair in which:
            rows = (scored_pair(words, meanings, split, *pair.split("-")) for _ in range(n))
            (folder / name / f"STS.{pair}.txt").write_text("".join(rows), "utf-8")


def corpus_files(run):
    """The built-in corpus in a run's folder: (files of train, extra and dev; folder of sts)."""
    made = run.fill(run.out / "data", write_demo)
    return {x: sorted(made.glob(f"{x}/*.tsv")) for x in ("train", "extra", "dev")}, made / "sts"


def scored_pair(words, meanings, split, a, b):
    """A line of a similarity set: sentence<TAB>sentence<TAB>score."""
    m = meanings.draw(split)
    other = meanings.draw(split, m)
    first = say(a, words[a], m, *meanings.phrase())
    second = say(b, words[b], other, *meanings.phrase())
    return f"{first}\t{second}\t{similarity(m, other)}\n"


# ------------------------------------------------------------------------------------ the teacher
TEACHER = Config(0, 128, 4, 4, 512, 64, pad_token_id=1, max_seq_length=64)
TEACHER_STEPS, TEACHER_LR, TEACHER_BATCH = 450, 2e-3, 128


def make_teacher(run, fit):
    """The folder of a run's teacher: a small English encoder, the stand-in for a real one, which
    train.fit trains on the scored pairs of the built-in corpus."""
    folder = run.out / "teacher"
    if not (run.trained or run.has(folder)):
        args = run.args
        scored = data.read_sts(run.out / "data" / "sts-train")["en-en"]
        model, loss_at = teacher(scored, args.seed, getattr(torch, args.dtype), args.device)
        fit(run, "teacher", model, TEACHER_STEPS, TEACHER_LR, loss_at)
        run.build(folder, lambda: model)
    return folder


def teacher(scored, seed, dtype, device):
    """(model, loss_at) for train.fit of the teacher before its first step.

    scored: sentences, sentences, scores; the cosine of two is to be their score / 5.
    """
    a, b, scores = scored
    tokenizer = data.train_tokenizer([*a, *b], 600, lower_case=True)
    config = replace(TEACHER, vocab_size=tokenizer.get_vocab_size())
    model = Encoder(config, tokenizer, dtype)
    msd.init_weights(model, torch.Generator().manual_seed(seed)).to(device)
    flat, starts = model.tokenize([*a, *b])
    sizes, n = np.diff(starts), len(a)
    gold = torch.tensor(scores / 5, dtype=torch.float32, device=device)

    def vectors(rows):
        return model(*model.batch(flat, starts, rows))

    def loss_at(step):
        rows = np.random.default_rng([seed, step]).choice(n, TEACHER_BATCH, replace=False)
        cos = torch.nn.functional.cosine_similarity(vectors(rows), vectors(rows + n))
        tokens = int((sizes[rows] + sizes[rows + n]).sum())
        return {"score": msd.mse(cos, gold[put(rows, device)])}, tokens

    return model, loss_at
