"""The built-in corpus."""

import math
import os
import re
from pathlib import Path

import numpy as np
import pytest

import data
import model as M
from demo import corpus as demo
from test_msd import HERE
from tools import evaluation

GOLDEN = {  # meaning, template, definite -> sentences, checked by speakers
    (demo.Meaning("two", "queen", "famous", "cook", "soup", "-", "beach"), "there", False): {
        "en": "There are two famous queens cooking soup on the beach.",
        "de": "Da sind zwei berühmte Königinnen, die am Strand Suppe kochen.",
        "nl": "Er zijn twee beroemde koninginnen die op het strand soep koken.",
        "fr": "Il y a deux reines célèbres qui préparent de la soupe sur la plage.",
        "es": "Hay dos reinas famosas cocinando sopa en la playa.",
        "it": "Ci sono due regine famose che cucinano la zuppa in spiaggia.",
        "tr": "Plajda çorba pişiren iki ünlü kraliçe var.",
        "ar": "هناك ملكتان مشهورتان تطبخان الحساء على الشاطئ.",
    },
    (demo.Meaning("one", "child", "tired", "wake", "man", "happy", "park"), "front", True): {
        "en": "In the park, the tired child is waking a happy man.",
        "de": "Im Park weckt das müde Kind gerade einen glücklichen Mann.",
        "nl": "In het park is het vermoeide kind een gelukkige man aan het wekken.",
        "fr": "Dans le parc, l'enfant fatigué est en train de réveiller un homme heureux.",
        "es": "En el parque, el niño cansado está despertando a un hombre feliz.",
        "it": "Nel parco il bambino stanco sta svegliando un uomo felice.",
        "tr": "Parkta yorgun çocuk mutlu bir adamı uyandırıyor.",
        "ar": "في المتنزه يوقظ الطفل المتعب رجلا سعيدا.",
    },
    (demo.Meaning("one", "girl", "shy", "read", "book", "-", "school"), "simple", False): {
        "en": "A shy girl reads a book at school.",
        "de": "Ein schüchternes Mädchen liest in der Schule ein Buch.",
        "nl": "Een verlegen meisje leest een boek op school.",
        "fr": "Une fille timide lit un livre à l'école.",
        "es": "Una chica tímida lee un libro en la escuela.",
        "it": "Una ragazza timida legge un libro a scuola.",
        "tr": "Utangaç bir kız okulda bir kitap okur.",
        "ar": "تقرأ فتاة خجولة كتابا في المدرسة.",
    },
}


@pytest.fixture(scope="session")
def lexicons():
    return {x: demo.read_lexicon(demo.DEMO / f"{x}.txt") for x in ("en", *demo.LANGUAGES)}


@pytest.mark.parametrize("language", ["en", *demo.LANGUAGES])
def test_translate_by_golden_samples(lexicons, language):
    for how, sentences in GOLDEN.items():
        assert demo.say(language, lexicons[language], *how) == sentences[language]


def test_lexicons_say_the_same_things(lexicons):
    for x, words in lexicons.items():
        for section in ("noun", "adjective", "verb", "object", "place", "template"):
            assert set(words[section]) == set(lexicons["en"][section]), (x, section)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "data"
    demo.write_demo(folder, sentences=1500, dev=60, scored=80, teacher=600)
    return folder


def test_write_demo_corpus(corpus, lexicons):
    """Distinct sentences, all languages, all sets; and the split by meaning, re-derived from the
    sentences."""
    nouns, adjectives, verbs = (lexicons["en"][s] for s in ("noun", "adjective", "verb"))

    def understand(sentence):  # an independent reader of the English grammar
        words = " " + sentence.lower().replace(",", "").replace(".", "") + " "
        find = lambda table, col: [
            (words.index(f" {f} "), k)
            for k, row in table.items()
            for f in {v.replace("*", "").split()[-1] for c, v in row.items() if c in col}
            if f" {f} " in words
        ]
        people = [k for _, k in sorted(find(nouns, ("a", "two")))]
        place = next(k for k, row in lexicons["en"]["place"].items() if f" {row['']} " in words)
        thing = [k for k, row in lexicons["en"]["object"].items() if f" {row['']} " in words]
        return (
            "two " in words,
            tuple(people),
            tuple(k for _, k in sorted(find(adjectives, ("",)))),
            tuple(k for _, k in sorted(find(verbs, ("one", "two", "ing"))))[:2],
            tuple(thing),
            place,
        )

    seen = {}
    for split, pattern in (
        ("train", "train/en-*.tsv"),
        ("dev", "dev/en-*.tsv"),
        ("train", "sts-train/*"),
        ("dev", "sts-dev/*en-en*"),
        ("test", "sts/*en-en*"),
    ):
        for file in corpus.glob(pattern):
            for line in file.read_text("utf-8").splitlines():
                for sentence in line.split("\t")[: 1 if "tsv" in file.name else 2]:
                    assert seen.setdefault(understand(sentence), split) == split, sentence
    assert {p.name for p in (corpus / "sts").iterdir()} == {f"STS.{p}.txt" for p in demo.STS_PAIRS}
    english = [
        l.split("\t")[0] for l in (corpus / "train" / "en-de.tsv").read_text("utf-8").splitlines()
    ]
    assert len(set(english)) == len(english) == 1500
    scores = np.concatenate([s for _, _, s in data.read_sts(corpus / "sts").values()])
    assert scores.min() < 1 and scores.max() == 5 and len(np.unique(scores)) == 11


@pytest.mark.skipif("MSD_DEMO" not in os.environ, reason="MSD_DEMO names no finished demo")
def test_the_demo_gives_the_table_of_the_readme():
    """The same models, to the unit, and within a point, as bits differ by processor."""
    out = Path(os.environ["MSD_DEMO"])
    left = {"teacher", "data", "assistant", "student", "results.json", "log.jsonl", "run.json"}
    assert {p.name for p in out.iterdir()} == left
    rows = M.read_json(out / "results.json")["rows"]
    text = (HERE / "README.md").read_text("utf-8").replace("**", "")
    for label, name in {
        "teacher": "teacher (English only)",
        "assistant": "assistant, after stage 1",
        "student, stage 2": "after stage 2",
        "student, stage 3": "after stage 3",
        "student, stage 4": "student, after stage 4",
    }.items():
        cells = re.search(rf"^\| {re.escape(name)} \| ([\d,]+) \| (.*) \|$", text, re.MULTILINE)
        assert int(cells[1].replace(",", "")) == rows[label]["sizes"]["total"], label
        both = np.mean(list(rows[label]["accuracy"].values()) or [[math.nan] * 2], axis=0)
        given = [*evaluation.mean_spearman(rows[label]["spearman"])[1:], *both]
        shown = [math.nan if x == "-" else float(x) for x in cells[2].split(" | ")]
        assert given == pytest.approx(shown, abs=1.05, nan_ok=True), label
