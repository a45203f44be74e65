"""Scorecards: what is written is what is read, changes by hand are noticed, averages have the right error."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.scorecard import Result, Score, Scorecard, mean, scorecards, z_of
from recipes.errors import UserError

SUBTASKS = {"a": {"acc": Score(30.0, 1.5, 300)}, "b": {"acc": Score(31.0, 2.0, 100)}}
SCORES = {"acc": Score(30.5, 1.2, 400), "bits_per_byte": Score(1.1, 0.02, 400)}
RESULT = Result("acc", SCORES, SUBTASKS, 0, None, 1, "x/y@abc")
CARD = Scorecard("smollm2-1.7b", "stage2", 3_814_697, 7_999_999_508_480, "between-stages", 42, "ab", "cd",
                 {"mmlu-mc": RESULT}, {"torch": "2.13.0"}, "2026-01-01T00:00:00+00:00")  # fmt: skip


def test_a_scorecard_comes_back_as_it_was(tmp_path: Path) -> None:
    CARD.save(tmp_path / "stage2-3814697.json")
    replace(CARD, stage="stage1", step=7).save(tmp_path / "stage1-7.json")
    assert Scorecard.load(tmp_path / "stage2-3814697.json") == CARD
    assert [card.stage for card in scorecards(tmp_path)] == ["stage1", "stage2"]
    assert scorecards(tmp_path / "stage2-3814697.json") == [CARD]
    assert CARD.benchmarks["mmlu-mc"].score == Score(30.5, 1.2, 400)


def _edited(path: Path, edit: str) -> str:
    CARD.save(path)
    text = path.read_text()
    assert edit.split(">")[0] in text
    path.write_text(text.replace(*edit.split(">"), 1))
    with pytest.raises(UserError) as error:
        Scorecard.load(path)
    return str(error.value)


@pytest.mark.parametrize("edit", ["30.5>35.5", "stage2>stage3", '"seed": 42>"seed": 43', "2.13.0>2.12.0"])
def test_a_scorecard_edited_by_hand_is_refused(tmp_path: Path, edit: str) -> None:
    assert "changed after it was written" in _edited(tmp_path / "card.json", edit)


@pytest.mark.parametrize("edit", ["{>", '"hash">"hush"', '"format": 1>"format": 2'])
def test_what_is_no_scorecard_is_refused(tmp_path: Path, edit: str) -> None:
    assert "card.json" in _edited(tmp_path / "card.json", edit)


def test_a_scorecard_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="smol eval"):
        Scorecard.load(tmp_path / "none.json")


def test_a_list_where_a_scorecard_was_expected(tmp_path: Path) -> None:
    (tmp_path / "card.json").write_text(json.dumps([1]))
    with pytest.raises(UserError, match="damaged"):
        Scorecard.load(tmp_path / "card.json")


def test_the_error_of_an_average_is_that_of_simulated_averages() -> None:
    """lighteval's own figure, the mean of the errors, is sqrt(57) too large for MMLU's 57 subjects."""
    rng, items, subjects = np.random.default_rng(0), 100, 57
    chances = rng.uniform(0.2, 0.6, subjects)
    averages = rng.binomial(items, chances, (20_000, subjects)).mean(1) / items
    parts = [Score(100 * p, 100 * math.sqrt(p * (1 - p) / items), items) for p in chances]
    average = mean(parts)
    assert average.stderr == pytest.approx(100 * averages.std(), rel=0.02)
    assert average.stderr * math.sqrt(subjects) == pytest.approx(np.mean([s.stderr for s in parts]), rel=0.01)
    assert average.items == items * subjects


@given(st.lists(st.floats(0, 100), min_size=1, max_size=60), st.floats(0.01, 5))
def test_equal_errors_shrink_by_the_root_of_the_number(values: list[float], stderr: float) -> None:
    average = mean(Score(value, stderr, 10) for value in values)
    assert average.value == pytest.approx(sum(values) / len(values))
    assert average.stderr == pytest.approx(stderr / math.sqrt(len(values)))


def test_z_is_the_difference_in_its_own_errors() -> None:
    assert z_of(Score(37.96, 0.41, 14042), Score(29.62, 0.385, 14042)) == pytest.approx(14.8, abs=0.05)  # facts §4
    assert z_of(Score(1, 0, 1), Score(1, 0, 1)) == 0
    assert z_of(Score(1, 0, 1), Score(2, 0, 1)) == -math.inf
