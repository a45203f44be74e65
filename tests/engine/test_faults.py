"""The real training with things that go wrong in it: NaN, spikes, hangs, rollbacks, uploads and trackers that fail."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

from recipes.audit import audit
from recipes.engine.checkpoint import steps
from recipes.engine.fault import VARIABLE, InjectedFault, injected_fault
from recipes.engine.watchdog import ALLOWANCE
from recipes.errors import UserError
from recipes.files import read_lines
from recipes.loader import load
from recipes.run import Run
from recipes.slurm.rollback import rollback
from tests.engine.tiny_run import children, kill, losses, make_run, start, state, train, trained, wait_for

slow = pytest.mark.slow
TORCHRUN_SECONDS = 30
"""After which torchrun kills workers that do not end: PContext.close's own limit, which no option changes."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of the first stage on two processes."""
    run = make_run(tmp_path_factory.mktemp("undisturbed"))
    train(run, "stage1", 2)
    return losses(run, "stage1")


@slow
def test_nan_on_one_rank_stops_all_without_a_checkpoint_and_a_skip_goes_on(
    undisturbed: dict[int, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path)
    monkeypatch.setenv(VARIABLE, "nan:step=8:rank=1")  # a checkpoint would be due after step 8
    monkeypatch.setenv("SMOL_UPLOAD", f"file://{tmp_path}/there")
    monkeypatch.setenv("SMOL_TRACKER", "wandb")
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "wandb.py").write_text("def init(**_): raise RuntimeError('no network')")
    monkeypatch.setattr("tests.engine.tiny_run.ROOT", f"{Path(__file__).resolve().parents[2]}:{tmp_path}/packages")
    _, err = train(run, "stage1", 2, code=1)
    assert "exitcode  : 76" in err, err
    assert err.count("wandb failed and is left alone; training goes on: RuntimeError: no network") == 1
    good = run.checkpoints("stage1") / "4"
    assert state(run, "stage1") == {
        "stage": "stage1", "state": "diverged", "step": 4, "exit_code": 76,
        "reason": f"the loss is nan at step 8; the last good checkpoint is {good}",
    }  # fmt: skip
    assert steps(run.checkpoints("stage1")) == [4] and not list(run.checkpoints("stage1").glob("*.partial"))
    assert losses(run, "stage1") == {n: undisturbed[n] for n in range(1, 8)}
    monkeypatch.delenv(VARIABLE)
    rollback(run, "stage1", 4, 2 * 256)
    train(run, "stage1", 2)
    mine = losses(run, "stage1")
    assert [n for n in range(1, 13) if mine[n] == undisturbed[n]] == [1, 2, 3, 4]
    (found,) = audit(run, digests=True)
    assert found.complete and not found.problems and sum(found.skipped.values()) == 512
    line = read_lines(run.stage_folder("stage1") / "ledger.jsonl")[1]
    assert (line["from_step"], line["skipped_samples"]) == (4, 16)
    wait_for_files(tmp_path / "there" / "run" / "stage1" / "12" / "manifest.json")


def wait_for_files(path: Path) -> None:
    began = time.monotonic()
    while not path.exists():
        assert time.monotonic() - began < 20, path
        time.sleep(0.05)


@slow
def test_a_rank_that_hangs_is_ended_in_bounded_time_and_training_goes_on_the_same(
    undisturbed: dict[int, float], tmp_path: Path
) -> None:
    run = make_run(tmp_path, {"guard": {"hang_seconds": 3, "hang_factor": 5}})
    process = start(run, "stage1", 2)
    wait_for(trained(run, "stage1", 6), process)
    os.kill(children(process.pid)[1], signal.SIGSTOP)
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - began < TORCHRUN_SECONDS + 3 * ALLOWANCE + 5
    assert "exitcode  : 77" in err
    hung = state(run, "stage1")
    assert (hung["state"], hung["exit_code"]) == ("hung", 77) and hung["step"] in (4, 8)
    assert re.match(r"rank 0: no (step was finished in 3|checkpoint was finished in 18) seconds; ", hung["reason"])
    (stacks,) = (run.stage_folder("stage1") / "logs").glob("stacks-0-*.txt")
    assert str(stacks) in hung["reason"] and "recipes/engine/trainer.py" in stacks.read_text()
    train(run, "stage1", 2)
    assert losses(run, "stage1") == undisturbed


SENSITIVE = {"guard": {"window": 4, "z": 0.3, "patience": 2}, "schedule": {"peak_lr": 0.2, "warmup_steps": 8}}
"""A rate at which the tiny model's loss rises for some steps, and a guard that stops at that."""


@slow
def test_a_spike_stops_at_the_same_step_after_a_resume_and_no_checkpoint_is_of_a_bad_step(tmp_path: Path) -> None:
    reasons = []
    for name in ("undisturbed", "killed"):
        run = make_run(tmp_path / name, SENSITIVE | {"checkpoints": {"interval": 1, "keep_last": 100}})
        if name == "killed":
            at = int(first_bad(reasons[0]))
            process = start(run, "stage1")
            wait_for(trained(run, "stage1", at - 1), process)
            kill(process)
        train(run, "stage1", code=76)
        reasons.append(str(state(run, "stage1")["reason"]).replace(str(run.folder), "RUN"))
        first = int(first_bad(reasons[-1]))
        assert steps(run.checkpoints("stage1")) == list(range(1, first))
        assert f"the last good checkpoint is RUN/stage1/checkpoints/{first - 1}" in reasons[-1]
        assert max(losses(run, "stage1")) == first  # the steps under suspicion are in the metrics, the last is not
    assert reasons[0] == reasons[1]


def first_bad(reason: str) -> str:
    return reason.split("a spike since step ")[1].split(";")[0]


@slow
def test_a_wrong_setting_in_the_environment_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path)
    for variable, value, found in (
        ("SMOL_TRACKER", "comet", "SMOL_TRACKER is 'comet'"),
        ("SMOL_UPLOAD", "nowhere", "'nowhere' is no address"),
        (VARIABLE, "inf:step=7", f"{VARIABLE} is 'inf:step=7'"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            _, err = train(run, "stage1", code=2)
        assert err.count("\n") == 1 and err.startswith(f"error: {found}"), err


def test_the_injected_fault_is_for_small_models_only(monkeypatch: pytest.MonkeyPatch, tiny_run: Run) -> None:
    monkeypatch.setenv(VARIABLE, "nan:step=7:rank=1")
    assert injected_fault(tiny_run.recipe) == InjectedFault(nan_at=(7, 1))
    with pytest.raises(UserError, match="it is for tests"):
        injected_fault(load("smollm2-135m"))
