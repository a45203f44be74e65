"""A run that starts from a model in transformers' format: the weights are those, and another model is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes.engine.convert import to_nanotron, to_transformers
from recipes.run import INITIAL_WEIGHTS, Run
from tests.engine import tiny_run

pytestmark = pytest.mark.slow
WORDS = {"tokenizer": {"end_of_text": "word0"}}


def heldout(run: Run, when: str) -> dict[str, float]:
    content = json.loads((run.stage_folder("stage1") / "heldout.json").read_text())
    return {domain: loss["loss"] for domain, loss in content[when].items()}


def test_a_run_starts_from_a_published_model(tmp_path: Path) -> None:
    old = tiny_run.make_run(tmp_path / "old", WORDS)
    tiny_run.train(old, "stage1")
    checkpoint = old.checkpoints("stage1") / str(old.plan.stage("stage1").end_step)
    model = to_transformers(checkpoint, tmp_path / "model")

    new = tiny_run.make_run(tmp_path / "new", WORDS)
    to_nanotron(model, new.folder / INITIAL_WEIGHTS)
    out, _ = tiny_run.train(new, "stage1")
    assert f"initial weights: {new.folder / INITIAL_WEIGHTS}" in out
    assert heldout(new, "start") == heldout(old, "end")  # to the last bit
    assert heldout(new, "end") != heldout(old, "end")

    wider = tiny_run.make_run(tmp_path / "wider", {**WORDS, "model": {"ffn": 96}})
    (wider.folder / INITIAL_WEIGHTS).symlink_to(new.folder / INITIAL_WEIGHTS)
    _, said = tiny_run.train(wider, "stage1", code=2)
    assert "intermediate_size" in said and "Traceback" not in said


def test_checkpoints_can_be_read_by_colleagues(tmp_path: Path) -> None:
    run = tiny_run.make_run(tmp_path)
    tiny_run.train(run, "stage1")
    files = [p for p in run.checkpoints("stage1").rglob("*") if p.is_file()]
    modes = {p.stat().st_mode & 0o777 for p in files}
    assert len(files) > 10 and modes == {(run.folder / "run.json").stat().st_mode & 0o777}
