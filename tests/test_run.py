from __future__ import annotations

import contextlib
import json
import shutil
from fractions import Fraction
from pathlib import Path

import pytest

from recipes.errors import UserError
from recipes.files import append_line
from recipes.run import ADOPTION, Run
from tests.test_loader import change


def test_a_run_is_frozen_and_can_be_moved(tiny_run: Run, tree: Path, tmp_path: Path) -> None:
    before = tiny_run.plan
    shutil.rmtree(tree / "stages")
    shutil.rmtree(tree / "mixtures")
    moved = tmp_path / "elsewhere"
    shutil.move(tiny_run.folder, moved)
    again = Run.load(moved)
    assert again.plan.as_dict() == before.as_dict() == json.loads((moved / "plan.json").read_text())
    assert [s.steps for s in again.plan.stages] == [23, 8, 8, 3]
    assert again.data("dclm") == moved / "data" / "dclm" and again.data("dclm").is_dir()
    assert again.tokenizer.is_file()


def test_a_changed_recipe_is_noticed(tiny_run: Run) -> None:
    change(tiny_run.folder / "recipe", "mixtures/smollm2-1.7b/stage2.yaml", "fineweb-edu: 0.60", "fineweb-edu: 0.59")
    change(tiny_run.folder / "recipe", "mixtures/smollm2-1.7b/stage2.yaml", "dclm: 0.40", "dclm: 0.41")
    with pytest.raises(UserError, match=r"plan\.json: the frozen recipe no longer gives this plan"):
        Run.load(tiny_run.folder)


def test_no_second_run_in_the_same_folder(tiny_run: Run) -> None:
    with pytest.raises(UserError, match="there is a run here already"):
        Run.create(tiny_run.folder, tiny_run.recipe, tiny_run.folder / "data", tiny_run.tokenizer)


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"this is no run: it has no run\.json"):
        Run.load(tmp_path)


def _closer(run: Run, tmp_path: Path) -> Path:
    """Stage 2's mixture with five points moved from web to math."""
    text = run.recipe.stage("stage2").mixture_file.read_text()
    path = tmp_path / "proposal.yaml"
    path.write_text(text.replace("share: 0.75", "share: 0.70").replace("share: 0.05", "share: 0.10"))
    return path


def test_a_stage_that_has_not_begun_can_adopt_another_mixture(tiny_run: Run, tmp_path: Path) -> None:
    before = tiny_run.plan
    run = tiny_run.adopt("stage2", _closer(tiny_run, tmp_path))
    assert str(run.recipe.stage("stage2").mixture.domains["math"].share) == "1/10"
    assert run.plan.stage("stage1") == before.stage("stage1")
    assert run.plan.stage("stage2").shares["open-web-math"] * 20 == 2
    assert run.plan.stage("stage3").offsets["open-web-math"] > before.stage("stage3").offsets["open-web-math"]
    assert Run.load(run.folder).plan == run.plan
    assert not (run.folder / ADOPTION).exists()


@pytest.mark.parametrize("written", ["file", "nothing"])
def test_an_adoption_that_was_killed_is_carried_out_at_the_next_start(
    tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    monkeypatch.setattr("recipes.run.finish_adoption", lambda folder: None)
    with contextlib.suppress(UserError):
        tiny_run.adopt("stage2", _closer(tiny_run, tmp_path))
    monkeypatch.undo()
    if written == "file":
        note = json.loads((tiny_run.folder / ADOPTION).read_text())
        (tiny_run.folder / note["file"]).write_text(note["text"])
        with pytest.raises(UserError, match="no longer gives this plan"):
            Run(tiny_run.folder).check_plan()
    run = Run.load(tiny_run.folder)
    assert run.recipe.stage("stage2").mixture.domains["math"].share == Fraction(1, 10)


def test_a_stage_that_has_begun_keeps_its_mixture(tiny_run: Run, tmp_path: Path) -> None:
    tiny_run.stage_folder("stage2").mkdir()
    append_line(tiny_run.stage_folder("stage2") / "ledger.jsonl", {"from_step": 23, "to_step": 24, "tokens": {}})
    plan = (tiny_run.folder / "plan.json").read_bytes()
    with pytest.raises(UserError, match="stage2 has begun"):
        tiny_run.adopt("stage2", _closer(tiny_run, tmp_path))
    assert (tiny_run.folder / "plan.json").read_bytes() == plan


def test_a_mixture_that_does_not_fit_changes_nothing(tiny_run: Run, tmp_path: Path) -> None:
    path = _closer(tiny_run, tmp_path)
    path.write_text(path.read_text().replace("0.70", "0.71"))
    with pytest.raises(UserError, match=r"sum to 1\.01"):
        tiny_run.adopt("stage2", path)
    assert Run.load(tiny_run.folder).plan == tiny_run.plan
