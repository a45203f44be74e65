from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.audit import audit, stage_dataset
from recipes.engine.checkpoint import latest, steps
from recipes.engine.feed import ledger_line
from recipes.errors import UserError
from recipes.files import append_line, read_lines
from recipes.plan import make_plan
from recipes.recipe import Recipe
from recipes.run import Run
from recipes.skips import Skip, counts, jumps, read_skips
from recipes.slurm.rollback import rollback
from recipes.state import lock, read_state
from tests.checkpoints import write_checkpoint
from tests.test_audit import feed


def test_later_checkpoints_are_set_aside_and_none_is_deleted(tiny_run: Run) -> None:
    for step in (10, 20, 23):
        write_checkpoint(tiny_run, "stage1", step)
    rollback(tiny_run, "stage1", 10)
    folder = tiny_run.checkpoints("stage1")
    assert steps(folder) == [10] and sorted(p.name for p in folder.iterdir()) == [
        "10", "20.rolled-back", "23.rolled-back",
    ]  # fmt: skip
    assert read_state(tiny_run, "stage1")["step"] == 10 and not read_skips(tiny_run, "stage1")
    write_checkpoint(tiny_run, "stage1", 20)
    rollback(tiny_run, "stage1", 0, skip_tokens=1)
    assert steps(folder) == [] and latest(folder) == (None, [])
    assert len(list(folder.glob("*/manifest.json"))) == 4 and (folder / "20.rolled-back-2").is_dir()
    events = read_lines(tiny_run.folder / "events.jsonl")
    assert [(e["to_step"], e["skip_tokens"]) for e in events] == [(10, 0), (0, 256)]  # whole steps


def test_the_last_rollback_to_a_step_says_what_is_left_out_after_it(tiny_run: Run) -> None:
    for step in (10, 20):
        write_checkpoint(tiny_run, "stage1", step)
    rollback(tiny_run, "stage1", 20, 256)
    assert read_skips(tiny_run, "stage1") == [Skip("stage1", 20, 8)]
    rollback(tiny_run, "stage1", 20, 257)
    assert read_skips(tiny_run, "stage1") == [Skip("stage1", 20, 16)]
    rollback(tiny_run, "stage1", 10, 512)
    assert read_skips(tiny_run, "stage1") == [Skip("stage1", 10, 16)]
    rollback(tiny_run, "stage1", 10)
    assert read_skips(tiny_run, "stage1") == []


def test_what_cannot_be_rolled_back_is_refused_and_nothing_changes(tiny_run: Run) -> None:
    for step in (10, 20, 23):
        write_checkpoint(tiny_run, "stage1", step)

    def refused(found: str, stage: str, step: int, skip: int = 0) -> None:
        with pytest.raises(UserError, match=found):
            rollback(tiny_run, stage, step, skip)
        assert steps(tiny_run.checkpoints("stage1")) == [10, 20, 23] and not read_skips(tiny_run, "stage1")

    refused("has no stage", "stage9", 10)
    refused("no checkpoint of step 11", "stage1", 11)
    refused("are to be left out", "stage1", 10, -1)
    refused("are to be left out", "stage1", 10, 10**9)
    refused("stage1 ends at step 23", "stage1", 23, 256)
    held = lock(tiny_run.stage_folder("stage1"))
    refused("another process trains this stage", "stage1", 10)
    assert held is not None
    import os

    os.close(held)
    path = tiny_run.checkpoints("stage1") / "10" / "config.yaml"
    content = path.read_bytes()
    path.write_bytes(content.replace(b".", b",", 1))
    refused("checksum", "stage1", 10)
    path.write_bytes(content)
    write_checkpoint(tiny_run, "stage2", 30)
    refused("stage2 has begun", "stage1", 10)
    rollback(tiny_run, "stage2", 23)
    assert steps(tiny_run.checkpoints("stage2")) == []


def test_samples_after_a_skip_are_those_that_lie_further_on(tiny_run: Run) -> None:
    stage = tiny_run.plan.stage("stage1")
    before = stage_dataset(tiny_run, stage)
    write_checkpoint(tiny_run, "stage1", 10)
    rollback(tiny_run, "stage1", 10, 3 * 256)
    after = stage_dataset(tiny_run, tiny_run.plan.stage("stage1"))
    assert len(after) == len(before)
    assert np.array_equal(after[:80], before[:80]) and np.array_equal(after[80:160], before[104:184])
    assert all(np.array_equal(after[n], after[n : n + 1][0]) for n in (79, 80, 183))
    assert np.array_equal(after.sources(np.arange(80, 160)), before.sources(np.arange(104, 184)))


@pytest.mark.slow
@settings(deadline=None)
@given(data=st.data())
def test_counts_are_those_of_every_sample_one_by_one(recipe: Recipe, data: st.DataObject) -> None:
    stage = make_plan(recipe).stages[0]
    ends = sorted(data.draw(st.lists(st.integers(0, 30), max_size=3, unique=True)))
    skips = [Skip(stage.name, end, data.draw(st.integers(1, 5000)) * stage.samples_per_step) for end in ends]
    samples = data.draw(st.integers(0, 31)) * stage.samples_per_step
    from recipes.data.interleave import Interleave

    interleave, sizes = Interleave(stage.shares), len(stage.shares)
    numbers = np.arange(samples, dtype=np.int64)
    moved = numbers + sum((k * (numbers >= n) for n, k in jumps(stage, skips)), np.zeros_like(numbers))
    read, left_out = counts(stage, skips, samples)
    assert read.tolist() == np.bincount(interleave.locate(moved)[0], minlength=sizes).tolist()
    end = int(moved[-1]) + 1 if samples else 0
    assert (read + left_out).tolist() == interleave.counts(end).tolist()


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    from recipes.loader import load

    return load("smollm2-1.7b").with_mixture("stage1", load("smollm2-1.7b").stage("stage4").mixture)


def test_the_audit_accounts_for_a_skip(tiny_run: Run) -> None:
    write_checkpoint(tiny_run, "stage1", 10)
    feed(tiny_run, "stage1", [10])
    rollback(tiny_run, "stage1", 10, 256)
    (found,) = audit(tiny_run, digests=True)
    assert not found.problems and not found.notes  # nothing is left out as long as nothing behind it was read
    stage = tiny_run.plan.stage("stage1")
    scratch = tiny_run.stage_folder("stage1") / "ledger.jsonl"
    scratch.unlink()
    feed(tiny_run, "stage1", [10, 23])
    (found,) = audit(tiny_run)
    assert "0 samples were left out in steps 10–23, 8 by skips.json" in found.problems[0]
    lines = read_lines(scratch)
    scratch.unlink()
    empty = [([0] * len(stage.shares), 0)]
    skipped = ledger_line(10, 23, list(stage.shares), 32, empty, read_skips(tiny_run, "stage1"))["skipped_samples"]
    for line in (lines[0], lines[1] | {"skipped_samples": skipped}):
        append_line(scratch, line)
    (found,) = audit(tiny_run, digests=True)
    assert found.complete and not found.problems and found.planned == found.realised
    assert sum(found.skipped.values()) == 256 == sum(found.read_again.values())
    assert len(found.notes) == 2 and "which later stages read again" in found.notes[1]


def test_an_audit_sees_data_that_was_not_left_out_as_decided(tiny_run: Run) -> None:
    feed(tiny_run, "stage1", [10, 23])
    (tiny_run.stage_folder("stage1") / "skips.json").write_text('[{"stage": "stage1", "after_step": 10, "samples": 8}]')
    (found,) = audit(tiny_run, digests=True)
    assert any("by skips.json" in text for text in found.problems)
