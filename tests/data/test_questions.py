"""The rehearsal's questions: well formed, answerable, from the held-out text alone, the same for the same seed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recipes.data.lessons import word_problems
from recipes.data.questions import CHOICES, CONTEXT, ITEMS, LONGEST, SHORTEST, write_questions

ROOT = Path(__file__).resolve().parent.parent.parent


def _write(folder: Path, texts: list[str], column: str = "text") -> None:
    folder.mkdir(parents=True)
    pq.write_table(pa.table({column: texts}), folder / "train-00000.parquet")


@pytest.fixture(scope="module")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out text: decisions and documentation for web, this project's code, generated problems."""
    folder = tmp_path_factory.mktemp("heldout")
    prose = [
        p.strip() for name in ("decisions.md", "formats.md") for p in (ROOT / "docs" / name).read_text().split("\n")
    ]
    _write(folder / "web", [p for p in prose if len(p) > 250])
    _write(folder / "code", [p.read_text() for p in sorted((ROOT / "recipes").rglob("*.py"))], "content")
    problems = word_problems(Random(1))
    _write(folder / "math", [next(problems) for _ in range(ITEMS + 30)] + ["No problem at all."])
    return folder


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def questions(heldout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The questions made of it."""
    out = tmp_path_factory.mktemp("questions")
    counts = write_questions(heldout, out, 7)
    assert {name: len(_rows(out / name / "test.jsonl")) for name in counts} == counts
    assert counts["word-problems"] == counts["code-choice"] == ITEMS
    return out


@pytest.mark.parametrize(("name", "domain"), [("docs-choice", "web"), ("code-choice", "code")])
def test_the_right_choice_is_what_follows_in_its_document(
    heldout: Path, questions: Path, name: str, domain: str
) -> None:
    texts = pq.read_table(heldout / domain).to_pandas().iloc[:, 0].tolist()
    plain = [" ".join(text.split()) for text in texts]
    rows = _rows(questions / name / "test.jsonl")
    assert len({(row["context"], row["choices"][row["label"]]) for row in rows}) == len(rows) > 20
    for row in rows:
        right = row["choices"][row["label"]]
        follows = " ".join(f"{row['context']} {right}".split())
        home = next(n for n, text in enumerate(plain) if follows in text)
        assert len(set(row["choices"])) == CHOICES
        assert len(row["context"]) <= CONTEXT
        assert all(SHORTEST <= len(choice) <= LONGEST for choice in row["choices"])
        for choice in row["choices"]:  # wrong choices come from elsewhere
            assert choice == right or any(" ".join(choice.split()) in t for n, t in enumerate(plain) if n != home)


def test_the_right_choice_stands_anywhere(questions: Path) -> None:
    places = Counter(row["label"] for row in _rows(questions / "code-choice" / "test.jsonl"))
    assert set(places) == set(range(CHOICES)) and min(places.values()) > ITEMS / CHOICES / 2


def test_problems_keep_their_answer(questions: Path) -> None:
    for row in _rows(questions / "word-problems" / "test.jsonl"):
        steps, _, answer = row["answer"].rpartition("\n#### ")
        assert steps.endswith(f"= {answer}") and "\n" not in row["question"]


def test_the_same_seed_gives_the_same_questions(heldout: Path, questions: Path, tmp_path: Path) -> None:
    write_questions(heldout, tmp_path / "again", 7)
    write_questions(heldout, tmp_path / "other", 8)
    same, again, other = (
        (f / "docs-choice" / "test.jsonl").read_bytes() for f in (questions, tmp_path / "again", tmp_path / "other")
    )
    assert same == again != other


def test_a_domain_without_held_out_text_gives_no_questions(heldout: Path, tmp_path: Path) -> None:
    (tmp_path / "heldout").mkdir()
    (tmp_path / "heldout" / "math").symlink_to(heldout / "math")
    assert list(write_questions(tmp_path / "heldout", tmp_path / "out", 1)) == ["word-problems"]
