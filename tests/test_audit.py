from __future__ import annotations

import numpy as np
import pytest

from recipes.audit import audit, digest_of, sample_digest, stage_dataset
from recipes.data.dataset import rank_samples
from recipes.files import append_line, read_lines, write_atomic
from recipes.run import Run


def feed(run: Run, name: str, to_steps: list[int], dp: int = 2) -> None:
    """Writes the ledger of a training that goes through the stage, rank by rank."""
    stage = run.plan.stage(name)
    dataset, names = stage_dataset(run, stage), list(stage.shares)
    run.stage_folder(name).mkdir(exist_ok=True)
    start = stage.start_step
    for end in to_steps:
        tokens, digest = dict.fromkeys(names, 0), 0
        for step in range(start, end):
            for rank in range(dp):
                numbers = rank_samples(step - stage.start_step, stage.samples_per_step, dp, rank, 2).ravel()
                digest += sum(map(sample_digest, dataset[numbers], numbers.tolist()))
                for source in dataset.sources(numbers).tolist():
                    tokens[names[source]] += stage.sequence_length
        line = {"from_step": start, "to_step": end, "tokens": tokens, "digest": f"{digest % 2**64:016x}"}
        append_line(run.stage_folder(name) / "ledger.jsonl", line)
        start = end


def test_a_faithful_run_is_equal_in_counts_and_content(tiny_run: Run) -> None:
    feed(tiny_run, "stage1", [10, 23], dp=2)
    feed(tiny_run, "stage2", [29], dp=4)
    first, second = audit(tiny_run, digests=True)
    assert first.complete and not first.problems and first.realised == first.planned
    assert sum(first.planned.values()) == 23 * 256
    assert not second.complete and not second.problems and second.end_step == 29


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('"starcoderdata": ', '"starcoderdata": 1', "starcoderdata: "),
        ('"from_step": 10', '"from_step": 11', "the ledger goes from step 10 to 11"),
        ('"dclm"', '"dclm-edu"', "dclm-edu: tokens of a source that is not planned"),
    ],
)
def test_every_difference_is_named(tiny_run: Run, old: str, new: str, problem: str) -> None:
    feed(tiny_run, "stage1", [10, 23])
    path = tiny_run.stage_folder("stage1") / "ledger.jsonl"
    write_atomic(path, path.read_text().replace(old, new))
    (found,) = audit(tiny_run)
    assert any(problem in text for text in found.problems)


def test_digests_see_other_tokens_of_the_same_number(tiny_run: Run) -> None:
    feed(tiny_run, "stage1", [10, 23])
    path = tiny_run.data("dclm") / "00000.ds"
    ids = np.fromfile(path, dtype="<u2")
    ids[:] = ids[::-1]
    ids.tofile(path)
    assert not audit(tiny_run)[0].problems
    assert "not the planned ones" in audit(tiny_run, digests=True)[0].problems[0]


def test_a_digest_does_not_depend_on_the_order_but_on_the_place(tiny_run: Run) -> None:
    dataset = stage_dataset(tiny_run, tiny_run.plan.stage("stage1"))
    whole = int(digest_of(dataset, 0, 40), 16)
    assert (int(digest_of(dataset, 0, 7), 16) + int(digest_of(dataset, 7, 40), 16)) % 2**64 == whole
    assert sample_digest(dataset[3], 3) != sample_digest(dataset[3], 4)


def test_the_audit_command_ends_with_1_on_a_difference(tiny_run: Run) -> None:
    from typer.testing import CliRunner

    from recipes.cli import app

    feed(tiny_run, "stage1", [23])
    assert CliRunner().invoke(app, ["audit", str(tiny_run.folder)]).exit_code == 0
    path = tiny_run.stage_folder("stage1") / "ledger.jsonl"
    lines = read_lines(path)
    lines[0]["tokens"]["dclm"] -= 32
    path.unlink()
    append_line(path, lines[0])
    done = CliRunner().invoke(app, ["audit", str(tiny_run.folder)])
    assert done.exit_code == 1 and "dclm: " in done.output
