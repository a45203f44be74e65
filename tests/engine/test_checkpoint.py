"""Checkpoints on disk; no training."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.engine.checkpoint import (
    Checkpoint,
    Topology,
    check_space,
    clean,
    commit,
    find_start,
    latest,
    partial_folder,
    prune,
    remove,
    set_aside,
    steps,
)
from recipes.errors import UserError
from tests.engine.tiny_run import environment, make_run

TOPOLOGY = Topology(dp=2, tp=1, pp=1, zero_stage=0)


def write(folder: Path, *wanted: int, topology: Topology = TOPOLOGY) -> None:
    """Complete checkpoints of these steps."""
    for step in wanted:
        partial = partial_folder(folder, step)
        (partial / "model").mkdir(parents=True)
        (partial / "model" / "weights").write_bytes(bytes([step % 256]) * 1000)
        (partial / "config.yaml").write_text("a: 1\n")
        commit(partial, recipe="tiny", stage="stage1", step=step, plan="0", topology=topology)


def test_imports_neither_torch_nor_nanotron() -> None:
    code = (
        "import recipes.engine.checkpoint, recipes.engine.config, sys; print({'torch', 'nanotron'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert done.stdout == "set()\n", done.stderr


def test_a_committed_checkpoint_is_found_and_says_what_it_is(tmp_path: Path) -> None:
    write(tmp_path, 4, 8, 12)
    checkpoint, passed_over = latest(tmp_path)
    assert checkpoint == Checkpoint.load(tmp_path / "12") and not passed_over
    assert (checkpoint.step, checkpoint.stage, checkpoint.topology) == (12, "stage1", TOPOLOGY)
    assert [entry.name for entry in checkpoint.files] == ["config.yaml", "model/weights"]
    assert not list(tmp_path.glob("*.partial"))


def test_folders_without_a_manifest_do_not_count(tmp_path: Path) -> None:
    write(tmp_path, 4)
    (tmp_path / "8.partial").mkdir()
    (tmp_path / "12").mkdir()
    (tmp_path / "notes").mkdir()
    checkpoint, passed_over = latest(tmp_path)
    assert checkpoint is not None and checkpoint.step == 4 and not passed_over
    assert latest(tmp_path / "nowhere") == (None, [])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: (f / "model" / "weights").write_bytes(b"x" * 1000), "checksum"),
        (lambda f: (f / "model" / "weights").write_bytes(b"x" * 999), "999 bytes"),
        (lambda f: (f / "model" / "weights").unlink(), "missing"),
        (lambda f: (f / "manifest.json").write_text('{"step": 12'), "damaged manifest"),
        (lambda f: (f / "manifest.json").write_text('{"step": 12}'), "damaged manifest"),
        (lambda f: (f / "manifest.json").write_text("[]"), "damaged manifest"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_its_reason(tmp_path, damage, reason) -> None:  # type: ignore[no-untyped-def]
    write(tmp_path, 4, 8, 12)
    damage(tmp_path / "12")
    checkpoint, passed_over = latest(tmp_path)
    assert checkpoint is not None and checkpoint.step == 8
    assert [folder for folder, _ in passed_over] == [tmp_path / "12"]
    assert reason in passed_over[0][1]


def test_a_damaged_checkpoint_can_be_set_aside_and_its_step_written_again(tmp_path: Path) -> None:
    write(tmp_path, 4, 8)
    for _ in range(2):
        (tmp_path / "8" / "config.yaml").write_text("b: 1\n")
        assert set_aside(tmp_path / "8") == tmp_path / "8.damaged"
        assert steps(tmp_path) == [4]
        write(tmp_path, 8)
    assert steps(tmp_path) == [4, 8]
    assert (tmp_path / "8.damaged" / "config.yaml").read_text() == "b: 1\n"


def test_prune_keeps_the_last_ones_every_nth_and_those_named(tmp_path: Path) -> None:
    write(tmp_path, *range(4, 44, 4))
    assert prune(tmp_path, keep_last=2, keep_every=12, keep=[16]) == [4, 8, 20, 28, 32]
    assert steps(tmp_path) == [12, 16, 24, 36, 40]
    assert prune(tmp_path, keep_last=2, keep_every=0) == [12, 16, 24]
    assert prune(tmp_path, keep_last=5, keep_every=0) == []


def test_a_kill_while_deleting_leaves_only_what_clean_takes_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 4, 8)
    monkeypatch.setattr(shutil, "rmtree", lambda path: (path / "config.yaml").unlink())
    remove(tmp_path / "4")
    monkeypatch.undo()
    assert steps(tmp_path) == [8] and list(tmp_path.glob("*.partial"))
    clean(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["8"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tp": 2}, "tp 1, pp 1"),
        ({"pp": 2}, "Adam's moments"),
        ({"zero_stage": 1}, "zero_stage 0, to be resumed with 1"),
    ],
)
def test_another_topology_is_refused(tmp_path: Path, change: dict[str, int], words: str) -> None:
    write(tmp_path, 4)
    with pytest.raises(UserError, match=words):
        Checkpoint.load(tmp_path / "4").refuse(dataclasses.replace(TOPOLOGY, **change))


def test_another_dp_is_refused_under_zero_1_only(tmp_path: Path) -> None:
    write(tmp_path, 4)
    Checkpoint.load(tmp_path / "4").refuse(dataclasses.replace(TOPOLOGY, dp=4))
    zero = dataclasses.replace(TOPOLOGY, zero_stage=1)
    write(tmp_path, 8, topology=zero)
    Checkpoint.load(tmp_path / "8").refuse(zero)
    with pytest.raises(UserError, match="Start 2 processes"):
        Checkpoint.load(tmp_path / "8").refuse(dataclasses.replace(zero, dp=4))


def test_topology_follows_the_number_of_processes(tmp_path: Path) -> None:
    recipe = make_run(tmp_path, {"parallelism": {"tp": 2}}).recipe
    assert Topology.of(recipe, 6) == Topology(dp=3, tp=2, pp=1, zero_stage=0)
    with pytest.raises(UserError, match="Start a multiple of 2"):
        Topology.of(recipe, 3)


def test_a_stage_starts_from_its_own_newest_checkpoint_else_from_the_stage_before(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    stage1, stage2 = run.plan.stages
    assert find_start(run, stage1, TOPOLOGY).checkpoint is None
    with pytest.raises(UserError, match="starts from step 12 of stage1, but stage1 has no checkpoint"):
        find_start(run, stage2, TOPOLOGY)
    write(run.checkpoints("stage1"), 4, 8)
    with pytest.raises(UserError, match="stage1's last checkpoint is of step 8"):
        find_start(run, stage2, TOPOLOGY)
    write(run.checkpoints("stage1"), 12)
    assert find_start(run, stage2, TOPOLOGY).checkpoint == Checkpoint.load(run.checkpoints("stage1") / "12")
    write(run.checkpoints("stage2"), 16)
    assert find_start(run, stage2, TOPOLOGY).step == 16
    assert find_start(run, stage1, TOPOLOGY).step == 12


def test_damage_never_sends_a_stage_back_to_its_start(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    write(run.checkpoints("stage1"), 4, 8)
    for step in ("4", "8"):
        (run.checkpoints("stage1") / step / "config.yaml").unlink()
    with pytest.raises(UserError, match="none of stage1's 2 checkpoints is whole"):
        find_start(run, run.plan.stages[0], TOPOLOGY)


def test_a_damaged_checkpoint_of_the_stage_before_is_an_error(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    write(run.checkpoints("stage1"), 8, 12)
    (run.checkpoints("stage1") / "12" / "config.yaml").write_text("b: 2\n")
    with pytest.raises(UserError, match="checksum"):
        find_start(run, run.plan.stages[1], TOPOLOGY)


def test_a_branch_starts_where_it_leaves_its_stage(tmp_path: Path) -> None:
    branch = {"end_tokens": 6144, "branch": {"stage": "stage1", "tokens_before_end": 1024},
              "domains": {"code": {"share": 1, "sources": {"programs": 1}}}}  # fmt: skip
    run = make_run(tmp_path, {"branches": ["long"]}, long=branch)
    assert run.plan.stage("long").start_step == 8 and 8 in run.plan.stages[0].kept_steps
    write(run.checkpoints("stage1"), 8, 12)
    assert find_start(run, run.plan.stage("long"), TOPOLOGY).step == 8


def test_too_little_space_is_an_error_that_gives_both_numbers(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    check_space(tmp_path, free // 2)
    with pytest.raises(OSError, match=r"needs about [0-9,]+ bytes, [0-9,]+ are free"):
        check_space(tmp_path, free * 2)


def test_a_manifest_lists_every_file_with_its_size(tmp_path: Path) -> None:
    write(tmp_path, 4)
    content = json.loads((tmp_path / "4" / "manifest.json").read_text())
    assert {entry["name"]: entry["bytes"] for entry in content["files"]} == {"config.yaml": 5, "model/weights": 1000}
    assert content["topology"] == {"dp": 2, "tp": 1, "pp": 1, "zero_stage": 0}
