"""The rehearsal's corpora: reproducible, each text once, held-out parts apart, in the Hub's columns."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from random import Random

import pyarrow.parquet as pq
import pytest

from recipes.data import corpus, lessons
from recipes.data.corpus import build_corpora, educational_score, iter_texts

KINDS = {
    "fineweb-edu": "web", "dclm": "web", "dolma-books": "web", "starcoderdata": "code", "stack-edu": "code",
    "infimm-webmath": "math", "auggsm8k": "math", "finemath-4plus": "math", "cosmopedia-v2": "synthetic",
    "unheard-of": "math",
}  # fmt: skip
SIZES = dict.fromkeys(KINDS, 15_000)
HELDOUT = {"web": 12_000, "code": 12_000, "math": 12_000, "synthetic": 6_000}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpora") / "corpora"
    build_corpora(out, SIZES, HELDOUT, 1, KINDS)
    return out


def documents(folder: Path) -> dict[str, list[str]]:
    """Every document by source; held-out ones by heldout/<domain>."""
    names = [*SIZES, *(f"heldout/{domain}" for domain in HELDOUT)]
    return {name: list(iter_texts(folder / name)) for name in names}


def letters(text: str) -> str:
    return re.sub(r"[\W_]+", " ", text).strip().lower()


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_and_another_does_not(built: Path, tmp_path: Path) -> None:
    build_corpora(tmp_path / "again", SIZES, HELDOUT, 1, KINDS)
    build_corpora(tmp_path / "other", SIZES, HELDOUT, 2, KINDS)
    files = sorted(p.relative_to(built) for p in built.rglob("*.parquet"))
    assert files == sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*.parquet"))
    assert all((built / f).read_bytes() == (tmp_path / "again" / f).read_bytes() for f in files)
    assert documents(built) != documents(tmp_path / "other")


@pytest.mark.slow
def test_every_document_is_used_once_and_held_out_text_is_nowhere_else(built: Path) -> None:
    parts = documents(built)
    everything = [letters(text) for texts in parts.values() for text in texts]
    assert len(set(everything)) == len(everything)
    assert len({text[: corpus.NEAR] for text in everything}) == len(everything)
    training = " \n ".join(letters(text) for name, texts in parts.items() if name in SIZES for text in texts)
    for domain in HELDOUT:
        for text in parts[f"heldout/{domain}"]:
            assert letters(text) not in training, (domain, text[:200])


@pytest.mark.slow
def test_amounts_and_columns(built: Path) -> None:
    for name, wanted in {**SIZES, **{f"heldout/{d}": n for d, n in HELDOUT.items()}}.items():
        characters = sum(map(len, iter_texts(built / name)))
        assert wanted <= characters <= wanted + 2 * corpus.LONGEST_DOCUMENT + corpus.LARGEST * (name == "dolma-books")
    columns = {name: pq.read_schema(next((built / name).rglob("*.parquet"))).names for name in SIZES}
    assert columns["starcoderdata"] == ["content"] and columns["infimm-webmath"] == ["text_list"]
    assert columns["fineweb-edu"] == ["text", "score"] and columns["auggsm8k"] == ["text"]
    images = pq.read_table(next((built / "infimm-webmath").rglob("*.parquet"))).column("text_list").to_pylist()
    assert any(part is None for document in images for part in document)


@pytest.mark.slow
def test_good_sources_keep_only_what_scores(built: Path) -> None:
    parts = documents(built)
    assert all(educational_score(text) >= 3 for text in parts["fineweb-edu"])
    assert any(educational_score(text) < 3 for text in parts["dclm"])
    assert all(len(text) >= corpus.LONG_DOCUMENT for text in parts["dolma-books"])
    here = str(Path.home())
    assert not any(here in text for texts in parts.values() for text in texts)


@pytest.mark.slow
def test_a_build_that_was_killed_is_made_again_and_a_finished_one_is_kept(built: Path, tmp_path: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in built.rglob("*")}
    counts = build_corpora(built, SIZES, HELDOUT, 1, KINDS)
    assert {p: p.stat().st_mtime_ns for p in built.rglob("*")} == before
    assert counts["dclm"] == sum(map(len, iter_texts(built / "dclm")))
    torn = tmp_path / "torn"
    (torn / "dclm.partial" / "data").mkdir(parents=True)
    (torn / "stack-edu" / "data").mkdir(parents=True)
    small = {"auggsm8k": 2000}
    assert build_corpora(torn, small, {}, 1, {"auggsm8k": "math"})["auggsm8k"] >= 2000
    assert sorted(p.name for p in torn.iterdir()) == ["auggsm8k", corpus.DONE]


def test_a_code_file_with_a_docstring_that_was_dealt_before_is_left_out() -> None:
    docstring = "Joins the parts of a path, which is what a program needs in order to name a file in a folder. " * 3
    seen: set[bytes] = set()
    assert corpus._is_new(corpus._Document("prose", docstring, True), seen)
    code = corpus._Document("code", f'"""{docstring}"""\nimport os\n', True, (docstring,))
    assert not corpus._is_new(code, seen)
    assert corpus._is_new(corpus._Document("code", "import os\n" * 40, True), seen)
    mined = corpus._mined(1, lambda pool: pool == "code")
    assert any(d.parts for d in itertools.islice((d for d in mined if d.pool == "code"), 40))


def test_word_problems_are_right() -> None:
    problems = lessons.word_problems(Random(3))
    for text in (next(problems) for _ in range(300)):
        *steps, answer = text.split("Answer:\n")[1].split("\n")
        for step in steps:
            left, right = re.fullmatch(r"\d+\. (.+) = (\d+)", step).groups()
            assert eval(left, {"__builtins__": {}}) == int(right), text
        assert answer == f"#### {right}"


def test_lessons_are_right_and_differ() -> None:
    source = lessons.lessons(Random(3))
    texts = [next(source) for _ in range(200)]
    assert len(set(texts)) == 200
    for text in texts:
        if match := re.search(r"divisors of (\d+) are ([\d, ]+);", text):
            n = int(match[1])
            assert [int(d) for d in match[2].split(",")] == [d for d in range(1, n + 1) if n % d == 0]
        if match := re.search(r"binary search needs a sorted list, for example (\[.*?\])", text, re.IGNORECASE):
            values = [int(v) for v in match[1][1:-1].split(",")]
            assert values == sorted(values)


def test_the_educational_score_separates() -> None:
    teaching = (
        "A stack is a container in which the element that was added last is removed first. It is used to keep track of "
        "calls, because the function that was called last returns first. For example, an editor keeps its changes on a "
        "stack, which means that undo removes the newest one. Note that a queue works the other way round."
    )
    listing = "x: int = 3\n--verbose | -v  [ON/OFF]\nfoo(bar)[0] -> {baz}\nSee #1234, @user.\nparam a\nparam b\n" * 3
    assert educational_score(teaching) == 5
    assert educational_score(listing) <= 2
