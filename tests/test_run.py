from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from recipes.errors import UserError
from recipes.run import Run
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
