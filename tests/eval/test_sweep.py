"""Many scorecards side by side, and which checkpoints a sweep takes."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from eval.scorecard import Result, Score, Scorecard
from eval.sweep import checkpoints_of, draw_scores, picture, published_beside, scorecards_of, scores_tables
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


def text(*arguments: object, width: int = 140) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    for table in scores_tables(*arguments, width=width):  # type: ignore[arg-type]
        console.print(table)
    return console.export_text()


def line(shown: str, name: str) -> str:
    return next(part for part in shown.splitlines() if name in part)


def test_changes_above_two_standard_errors_are_marked() -> None:
    shown = text(CARDS)
    assert "▲ 38.00 ±0.40" in line(shown, "mmlu-mc")
    assert "▼ 70.00 ±1.00" in line(shown, "piqa")
    assert "▲" not in line(shown, "gsm8k") and "▼" not in line(shown, "gsm8k")
    assert "(▲ ▼: > 2 SE)" in shown


def test_a_benchmark_that_one_card_lacks_leaves_a_gap() -> None:
    fewer = replace(CARDS[1], benchmarks={"mmlu-mc": CARDS[1].benchmarks["mmlu-mc"]})
    assert "76.00" in line(text([CARDS[0], fewer]), "piqa")
    assert "▼ 70.00" in line(text([CARDS[0], fewer, CARDS[1]]), "piqa"), "against the newest that has it"


@pytest.mark.parametrize("change", [{"recipe": "other"}, {"suite": "quick"}])
def test_what_cannot_be_compared_is_not_marked_and_is_told_apart(change: dict[str, str]) -> None:
    shown = text([CARDS[0], replace(CARDS[1], **change)])  # type: ignore[arg-type]
    assert not re.search("[▲▼] [0-9]", shown)
    heads = " ".join(shown.split()).partition("SE)")[2].partition("metric")[0].split()
    assert next(iter(change.values())) in heads and {"stage1", "stage2"} < set(heads)
    other = replace(CARDS[1].benchmarks["piqa"], metric="acc_norm", scores={"acc_norm": Score(70, 1, 100)})
    assert "▼" not in line(text([CARDS[0], replace(CARDS[1], benchmarks={"piqa": other})]), "piqa")


def test_many_checkpoints_take_several_tables_of_a_hundred_columns_and_nothing_is_cut() -> None:
    cards = [replace(CARDS[i % 2], step=i, tokens=i * 10**12) for i in range(1, 10)]
    shown = text(cards, published_beside(cards), width=100)
    assert max(len(part.rstrip()) for part in shown.splitlines()) <= 100 and "…" not in shown
    assert sum(part.count("76.00 ±1.00") for part in shown.splitlines()) == 4
    assert sum(part.count("▼ 70.00") for part in shown.splitlines()) == 4, "also against the table before"
    titles = [part.split(" (")[0].strip() for part in shown.splitlines() if part.startswith(("smollm2", "published"))]
    assert titles == ["smollm2-1.7b: between-stages", "smollm2-1.7b: between-stages", "published"]
    beside = text(CARDS[:1], published_beside(CARDS), width=100)
    assert "published" not in beside and "Qwen2.5" in beside, "one checkpoint and all publications, side by side"


def test_published_scores_stand_beside() -> None:
    shown = text(CARDS, published_beside(CARDS))
    assert "29.6" in line(shown, "mmlu-mc") and "48.9" in line(shown, "mmlu-mc")  # facts §4, S1 and S4
    assert "61.7" in line(shown, "gsm8k")  # Qwen2.5-1.5B
    assert "HumanEval" not in shown or "humaneval" in shown


def test_a_picture_is_written(tmp_path: Path) -> None:
    path = picture(CARDS, tmp_path / "scores.png")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_each_recipe_has_a_line_of_its_own() -> None:
    figure = draw_scores([*CARDS, replace(CARDS[0], recipe="other")])
    assert [len(line.get_xdata()) for line in figure.axes[0].lines if line.get_marker() == "o"] == [2, 1]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["smollm2-1.7b", "other"]
    assert not draw_scores(CARDS).legends


def test_scorecards_are_found_by_recipe_run_folder_and_file(
    tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_run.recipe.root)
    monkeypatch.setattr("eval.sweep.find_root", lambda: tmp_path)
    for where in (tmp_path / "eval/scores/smollm2-1.7b", tiny_run.folder / "eval/scores"):
        CARDS[0].save(where / "stage1-100.json")
        for name in (where, where / "stage1-100.json", {"eval": tiny_run.folder}.get(where.parent.name, where.name)):
            assert scorecards_of(str(name)) == CARDS[:1]
    with pytest.raises(UserError, match="eval/scores/smollm2-360m: there are no scorecards"):
        scorecards_of("smollm2-360m")


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
