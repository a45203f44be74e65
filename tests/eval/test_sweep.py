"""Many scorecards side by side, and which checkpoints a sweep takes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from eval.scorecard import Result, Score, Scorecard
from eval.sweep import checkpoints_of, picture, published_beside, scores_table
from recipes.errors import UserError
from recipes.run import Run


def card(stage: str, step: int, **values: tuple[float, float]) -> Scorecard:
    results = {
        name.replace("_", "-"): Result("acc", {"acc": Score(*value, 100)}, {}, 0, None, 1, "local:0")
        for name, value in values.items()
    }
    return Scorecard("smollm2-1.7b", stage, step, step * 2_097_152, "between-stages", 42, "c", "t", results)


CARDS = [
    card("stage1", 100, mmlu_mc=(29.6, 0.4), gsm8k=(4.3, 0.6), piqa=(76.0, 1.0)),
    card("stage2", 200, mmlu_mc=(38.0, 0.4), gsm8k=(4.6, 0.6), piqa=(70.0, 1.0)),
]


def text(*arguments: object) -> str:
    console = Console(width=140, record=True)
    console.print(scores_table(*arguments))  # type: ignore[arg-type]
    return console.export_text()


def line(shown: str, name: str) -> str:
    return next(part for part in shown.splitlines() if name in part)


def test_changes_above_two_standard_errors_are_marked() -> None:
    shown = text(CARDS)
    assert "38.00 ±0.40 ▲" in line(shown, "mmlu-mc")
    assert "70.00 ±1.00 ▼" in line(shown, "piqa")
    assert "▲" not in line(shown, "gsm8k") and "▼" not in line(shown, "gsm8k")


def test_a_benchmark_that_one_card_lacks_leaves_a_gap() -> None:
    fewer = replace(CARDS[1], benchmarks={"mmlu-mc": CARDS[1].benchmarks["mmlu-mc"]})
    assert "76.00" in line(text([CARDS[0], fewer]), "piqa")


def test_published_scores_stand_beside() -> None:
    shown = text(CARDS, published_beside(CARDS))
    assert "29.6" in line(shown, "mmlu-mc") and "48.9" in line(shown, "mmlu-mc")  # facts §4, S1 and S4
    assert "61.7" in line(shown, "gsm8k")  # Qwen2.5-1.5B
    assert "HumanEval" not in shown or "humaneval" in shown


def test_a_picture_is_written(tmp_path: Path) -> None:
    path = picture(CARDS, tmp_path / "scores.png")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def _commit(run: Run, stage: str, *steps: int) -> None:
    for step in steps:
        folder = run.checkpoints(stage) / str(step)
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps({}))


def test_a_sweep_takes_stages_checkpoints_or_a_pattern(tiny_run: Run) -> None:
    with pytest.raises(UserError, match="no checkpoints yet"):
        checkpoints_of([str(tiny_run.folder)], "stage")
    _commit(tiny_run, "stage1", 10, 20, 23)
    _commit(tiny_run, "stage2", 30)
    (tiny_run.checkpoints("stage2") / "31.partial").mkdir()

    def names(*arguments: str, every: str = "stage") -> list[str]:
        return [path.name for path in checkpoints_of(arguments, every)]

    assert names(str(tiny_run.folder)) == ["23", "30"]
    assert names(str(tiny_run.folder), every="checkpoint") == ["10", "20", "23", "30"]
    assert names(f"{tiny_run.folder}/*/checkpoints/*") == ["10", "20", "23", "30"]
    assert names(str(tiny_run.checkpoints("stage1") / "10"), str(tiny_run.folder)) == ["10", "23", "30"]
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoints_of([str(tiny_run.folder), "nowhere/*"], "stage")
