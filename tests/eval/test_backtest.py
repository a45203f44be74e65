"""The back-test: the design's independent figures, the variants beside them, and the caveats."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from eval.backtest import CAVEATS, VARIANTS, Replay, backtest, show_backtest
from eval.policy import load_policy
from eval.published import load_published
from recipes.errors import UserError
from recipes.loader import load

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def replays() -> list[Replay]:
    return backtest(load("smollm2-1.7b", ROOT), load_policy())


def points(replays: list[Replay], variant: str) -> list[float]:
    return [round(100 * replay.variations[variant], 1) for replay in replays]


def test_the_figures_come_close_to_the_independent_ones(replays: list[Replay]) -> None:
    """4.8, 1.0 and 6.7, all without synthetic, of which the policy's floor proposes 1.6 of the 4 published points."""
    assert points(replays, "policy") == [4.8, 1.0, 5.4]
    assert [replay.after for replay in replays] == ["stage1", "stage2", "stage3"]


def test_beside_what_one_would_do_without_it(replays: list[Replay]) -> None:
    assert points(replays, "no change") == [15.0, 5.0, 16.0]
    assert points(replays, "caps only") == [13.2, 5.0, 14.5]
    assert points(replays, "no caps") == [3.0, 15.0, 5.0]
    assert points(replays, "families once") == [4.8, 1.0, 12.7]
    assert set(VARIANTS) == set(replays[0].variations)


def test_all_directions_are_right(replays: list[Replay]) -> None:
    found = [replay.directions for replay in replays]
    assert [len(by_domain) for by_domain in found] == [3, 3, 4]
    assert all(right for by_domain in found for right in by_domain.values())
    wrong = {**vars(replays[1]), "published": {**replays[1].published, "math": replays[1].before["math"] / 2}}
    assert Replay(**wrong).directions["math"] is False


def test_what_binds_is_the_reserve_the_step_and_repetition(replays: list[Replay]) -> None:
    bound = [(replay.advice.bound_by["code"], replay.advice.bound_by["math"]) for replay in replays]
    assert bound == [("none", "cap"), ("cap", "step (τ)"), ("none", "cap")]


def test_it_is_printed_in_a_hundred_columns_with_its_caveats(replays: list[Replay]) -> None:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show_backtest(replays, console)
    text = console.export_text()
    assert "10 of 10 right" in text
    assert "commonsenseqa" in text
    assert "…" not in text
    for caveat in CAVEATS:
        assert caveat in text
    assert "three stages" in text.lower()
    assert "hindsight" in text
    assert all(name in text for name in VARIANTS)
    tables = [line for line in text.splitlines() if not line.startswith("caveat")]
    assert max(len(line.rstrip()) for line in tables) <= 100


def test_another_recipe_has_nothing_to_compare_with() -> None:
    with pytest.raises(UserError, match=r"such as smollm2-1\.7b"):
        backtest(load("smollm2-360m", ROOT), load_policy())
    with pytest.raises(UserError, match="other stages"):
        backtest(load("smollm2-1.7b", ROOT), load_policy(), [p for p in load_published() if p.stage != "stage2"])
