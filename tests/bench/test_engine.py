"""The engine's benchmarks train the real thing, and their figures add up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes.bench.engine import bench_checkpoint, bench_step
from recipes.bench.tokenize import bench_tokenize
from recipes.engine.fault import VARIABLE
from recipes.errors import UserError
from tests.engine.tiny_run import make_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A recipe that trains in a moment."""
    folder = tmp_path_factory.mktemp("recipe")
    make_run(folder)
    return str(folder / "tree" / "stages" / "tiny")


def test_a_steps_parts_add_up_to_the_step(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = bench_step(recipe, processes=2, count=4, json_path=tmp_path / "step.json")
    assert json.loads((tmp_path / "step.json").read_text()) == result
    assert (result["micro_batch"], result["sequence_length"], result["steps"]) == (4, 32, 4)
    assert result["tokens_per_second"] == pytest.approx(2 * 4 * 32 / result["step_seconds"])
    parts = result["parts"]
    assert sum(parts.values()) == pytest.approx(result["split_seconds"])
    assert all(parts[name] > 0 for name in ("data", "forward", "backward", "step"))
    assert result["collectives"] > 0 and result["mfu"] is None and result["memory"] > 100e6
    shown = capsys.readouterr().out
    assert "backward" in shown and "MFU unknown" in shown


def test_a_checkpoint_is_written_beside_training(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = bench_checkpoint(recipe, micro_batch=2)
    assert 0 < result["stall"] < result["stall_before"] and result["write_beside"] > 0
    assert 0.8 < result["snapshot_bytes"] / result["bytes"] < 1.1 and result["files"] > 14
    assert result["verify_seconds"] > 0 and result["load_seconds"] > 0
    assert "written by a thread" in capsys.readouterr().out


def test_training_that_fails_is_said_with_its_reason(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "nan:step=2:rank=0")
    with pytest.raises(UserError, match=r"training failed: .*the loss is nan at step 2"):
        bench_step(recipe, count=2, micro_batch=1)


def test_both_ways_of_tokenising_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    result = bench_tokenize(characters=400_000)
    assert result["ratio"] > 0 and result["tokens"] > 50_000
    for speed in result["ways"].values():
        assert speed["tokens_per_second"] == pytest.approx(result["tokens"] / speed["seconds"])
    assert "datatrove alone" in capsys.readouterr().out
