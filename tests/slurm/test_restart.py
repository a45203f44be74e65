from __future__ import annotations

import json
import os
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from recipes.files import append_line, read_lines
from recipes.run import Run
from recipes.slurm.restart import cause_of, failures, main, open_start, productive_seconds, verdict
from recipes.state import read_state, write_state
from tests.checkpoints import write_checkpoint


@pytest.mark.parametrize(
    ("state", "complete", "code", "signal", "cause"),
    [
        (("finished", 0, None), True, 0, "none", "finished"),
        (("finished", 0, None), True, 1, "USR1", "finished"),
        (("stopped", 75, "SIGUSR1"), False, 1, "USR1", "time-limit"),
        (("stopped", 75, "SIGUSR1"), False, 1, "TERM", "preempted"),
        (("stopped", 75, "SIGTERM"), False, 1, "CANCEL", "cancelled"),
        (("stopped", 75, "SIGTERM"), False, 143, "none", "preempted"),
        (("failed", 2, "no data"), False, 1, "none", "user-error"),
        (("failed", 2, "no data"), False, 1, "TERM", "user-error"),
        (("failed", 74, "full"), False, 1, "none", "disk-full"),
        (("failed", 1, "RuntimeError: peer"), False, 1, "none", "crash"),
        (("failed", 1, "RuntimeError: peer"), False, 1, "TERM", "preempted"),
        (("diverged", 76, "the loss is nan at step 7"), False, 1, "none", "diverged"),
        (("hung", 77, "no step"), False, 1, "none", "hang"),
        (("training", None, None), False, 137, "none", "crash"),
        (("starting", None, None), False, 1, "none", "crash"),
        (("starting", None, None), False, 3, "none", "bad-node"),
        (("training", None, None), False, 3, "none", "crash"),
        (("starting", None, None), False, 1, "TERM", "preempted"),
        (("finished", 0, None), False, 1, "none", "crash"),
    ],
)
def test_the_cause_is_told_by_state_code_and_signal(
    state: tuple[str, int | None, str | None], complete: bool, code: int, signal: str, cause: str
) -> None:
    content = dict(zip(("state", "exit_code", "reason"), state, strict=True))
    found, detail = cause_of(content, complete, code, signal)
    assert found == cause
    assert "\n" not in detail and bool(detail) == (cause != "finished")
    if state[2]:
        assert cause == "finished" or state[2] in detail


def test_a_detail_is_one_line() -> None:
    _, detail = cause_of({"state": "failed", "exit_code": 1, "reason": "\nRuntimeError: a\nb\n"}, False, 1, "none")
    assert detail == "RuntimeError: a"


@pytest.mark.parametrize(
    ("log", "detail"),
    [
        ("warning\n[rank1]: ValueError: a\nRuntimeError: b\n", "ValueError: a"),
        ("RuntimeError: peer\n  traceback : Signal 9 (SIGKILL) received by PID 7",
         "Signal 9 (SIGKILL) received by PID 7"),
        ("torch.OutOfMemoryError: CUDA\n traceback : Signal 15 (SIGTERM) received by PID 7\n",
         "torch.OutOfMemoryError: CUDA"),
        ("x.errors.ChildFailedError: \n", "ended with exit code 1"),
        ("slurmstepd: error: Detected 1 oom_kill event in StepId=7.0.\n", "oom_kill event in StepId=7.0."),
    ],
)  # fmt: skip
def test_a_crash_without_a_reason_says_the_logs_first_error(log: str, detail: str) -> None:
    assert cause_of({"state": "training"}, False, 1, "none", log) == ("crash", detail)


def ended(cause: str, step: int, from_step: int | None = None, **more: Any) -> dict[str, Any]:
    return {"event": "end", "stage": "stage1", "cause": cause, "step": step,
            "from_step": step if from_step is None else from_step, **more}  # fmt: skip


def test_failures_count_from_the_newest_checkpoint() -> None:
    crash = ended("crash", 10)
    assert len(failures([crash, crash, crash], "stage1", 10)) == 3
    assert failures([crash, crash], "stage1", 20) == []
    assert len(failures([ended("crash", 10, 0), crash], "stage1", 10)) == 1  # the first one made progress
    assert failures([crash, crash], "stage2", 10) == []
    assert (
        len(failures([crash, ended("preempted", 10), ended("bad-node", 10, detail="n1: no GPUs"), crash], "stage1", 10))
        == 2
    )
    assert len(failures([crash, ended("time-limit", 10), ended("hang", 10)], "stage1", 10)) == 3
    one, other = ({**ended("bad-node", 10), "detail": f"{node}: no GPUs"} for node in ("n1", "n2"))
    assert failures([one, other], "stage1", 10) == []
    assert len(failures([one, {**one, "detail": "n1: 1 GPUs"}, other], "stage1", 10)) == 1, "it was not excluded"


def test_a_person_who_starts_again_after_a_stop_has_all_restarts_again() -> None:
    crash, stop = ended("crash", 10), ended("crash", 10, verdict="stop")
    assert len(failures([crash, crash, crash, stop, crash], "stage1", 10)) == 1
    back = {"event": "rollback", "stage": "stage1", "to_step": 10}
    assert len(failures([crash, crash, back, crash], "stage1", 10)) == 1


@pytest.mark.parametrize(
    ("cause", "failed", "code", "words"),
    [
        ("finished", 0, 0, "finished at step 1,200"),
        ("time-limit", 0, 10, "time-limit at step 1,200; requeued: why"),
        ("crash", 1, 10, "requeued, restart 1 of 3 without a new checkpoint: why"),
        ("crash", 3, 10, "restart 3 of 3"),
        ("crash", 4, 1, "failed 4 times without a checkpoint after step 1,200; stopped. The last error: crash: why"),
        ("bad-node", 0, 10, "requeued"),
        ("preempted", 0, 10, "requeued"),
        ("diverged", 0, 1, "diverged at step 1,200; stopped: why"),
        ("disk-full", 0, 1, "stopped"),
        ("user-error", 0, 1, "stopped"),
        ("cancelled", 0, 1, "stopped"),
    ],
)
def test_the_verdict_follows_from_the_cause(cause: str, failed: int, code: int, words: str) -> None:
    answer = verdict(cause, "why", [ended(cause, 1200)] * failed, 1200)
    assert answer.code == code and words in answer.text and "\n" not in answer.text


def test_too_few_nodes_stop_it() -> None:
    answer = verdict("bad-node", "n1: no GPUs", [], 7, "2 nodes are needed, 1 are left without n1")
    assert answer.code == 1
    assert answer.text == "bad-node at step 7; stopped: 2 nodes are needed, 1 are left without n1: n1: no GPUs"


def test_productive_seconds_are_those_of_steps_that_were_kept() -> None:
    lines = [{"step": n, "seconds": {"data": 0.5, "step": 1.0, "checkpoint": 9.0}} for n in range(1, 11)]
    assert productive_seconds(lines, 4, 8) == 6.0
    assert productive_seconds(lines, 8, 8) == 0


def test_an_open_start_is_one_without_an_end() -> None:
    start = {"event": "start", "stage": "stage1"}
    assert open_start([start, {"event": "start", "stage": "stage2"}, {"event": "gate", "stage": "stage1"}], "stage1")
    assert open_start([start, ended("crash", 1)], "stage1") is None
    assert open_start([], "stage1") is None


# With a run's folder


def ask(run: Run, *words: str) -> int:
    return main([words[0], str(run.folder), "stage1", *words[1:]])


def events(run: Run) -> list[dict[str, Any]]:
    return read_lines(run.folder / "events.jsonl")


def trained(run: Run, *steps: int) -> None:
    for step in steps:
        line = {"step": step, "loss": 1.0, "seconds": {"data": 0.25, "step": 0.75, "checkpoint": 1.0}}
        append_line(run.stage_folder("stage1") / "metrics.jsonl", line)


def test_a_start_a_crash_and_the_next_start(
    tiny_run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    write_state(tiny_run, "stage1", "stopped", 0, 75, "of an older start")
    assert ask(tiny_run, "begin") == 0
    assert capsys.readouterr().out == "stage1: attempt 1, after step 0 of 23\n"
    (start,) = events(tiny_run)
    assert datetime.fromisoformat(start.pop("time")).tzinfo
    assert start == {"event": "start", "stage": "stage1", "job": 17, "restart": 2, "step": 0}
    assert read_state(tiny_run, "stage1")["state"] == "starting"
    trained(tiny_run, *range(1, 13))
    write_checkpoint(tiny_run, "stage1", 10)
    time.sleep(0.05)
    assert ask(tiny_run, "end", "--code", "137") == 10
    assert capsys.readouterr().out == "stage1: crash at step 10; requeued: ended with exit code 137\n"
    end = events(tiny_run)[-1]
    assert (end["cause"], end["step"], end["job"], end["verdict"]) == ("crash", 10, 17, "requeue")
    assert end["productive_s"] == 10.0 and 0.05 <= end["allocated_s"] < 60
    assert ask(tiny_run, "begin") == 0
    assert capsys.readouterr().out == "stage1: attempt 2, after step 10 of 23\n"


def test_the_fourth_failure_in_a_row_stops(tiny_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for expected in (10, 10, 10, 1):
        assert ask(tiny_run, "begin") == 0
        write_state(tiny_run, "stage1", "failed", 0, 1, "RuntimeError: the cable is out\nTraceback")
        capsys.readouterr()
        assert ask(tiny_run, "end", "--code", "1") == expected
    out = capsys.readouterr().out
    assert "failed 4 times" in out and out.endswith("crash: RuntimeError: the cable is out\n") and out.count("\n") == 1
    assert ask(tiny_run, "begin") == 0  # a person tries again
    write_state(tiny_run, "stage1", "failed", 0, 1, "again")
    assert ask(tiny_run, "end", "--code", "1") == 10


def test_a_start_without_an_end_was_a_lost_node(tiny_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for attempt in range(4):
        assert ask(tiny_run, "begin") == 0, attempt
    assert ask(tiny_run, "begin") == 1
    assert "failed 4 times without a checkpoint after step 0; stopped" in capsys.readouterr().out
    assert [e["event"] for e in events(tiny_run)] == ["start", "end"] * 4
    lost = events(tiny_run)[1]
    assert lost["cause"] == "node-failure" and lost["verdict"] == "requeue" and lost["allocated_s"] >= 0


def test_a_lost_node_had_the_job_until_its_files_last_changed(tiny_run: Run) -> None:
    assert ask(tiny_run, "begin") == 0
    began = datetime.fromisoformat(events(tiny_run)[0]["time"]).timestamp()
    os.utime(tiny_run.stage_folder("stage1") / "state.json", (began + 500, began + 500))
    assert ask(tiny_run, "begin") == 0
    assert events(tiny_run)[1]["allocated_s"] == pytest.approx(500, abs=1)


def test_the_end_names_bad_nodes_and_errors_and_a_stop_is_the_stages_state(
    tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOK", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    (tmp_path / "reasons").write_text('{"n1": "no report", "n2": "1 GPUs"}')
    assert ask(tiny_run, "begin") == 0
    assert ask(tiny_run, "end", "--code", "3", "--few", "") == 10
    end = events(tiny_run)[-1]
    assert (end["cause"], end["detail"], end["verdict"]) == ("bad-node", "n1: no report; n2: 1 GPUs", "requeue")
    assert ask(tiny_run, "begin") == 0
    assert ask(tiny_run, "end", "--code", "3", "--few", "3 are needed") == 1
    state = read_state(tiny_run, "stage1")
    assert state["state"] == "failed" and "stopped: 3 are needed: n1: no report" in state["reason"]
    log = tiny_run.folder / "stage1/logs/train-17.log"
    log.parent.mkdir()
    log.write_text("== before\nValueError: a\n== now\nImportError: b\nValueError: c\n")
    assert ask(tiny_run, "begin") == 0
    assert ask(tiny_run, "end", "--code", "1") == 10
    assert events(tiny_run)[-1]["detail"] == "ImportError: b"


def test_a_complete_stage_and_one_that_diverged(tiny_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(tiny_run, "begin") == 0
    write_state(tiny_run, "stage1", "diverged", 10, 76, "the loss is nan at step 12; the last good checkpoint is x/10")
    assert ask(tiny_run, "end", "--code", "1") == 1
    assert "diverged at step 0; stopped: the loss is nan at step 12" in capsys.readouterr().out
    assert read_state(tiny_run, "stage1")["state"] == "diverged"
    assert ask(tiny_run, "begin") == 0
    write_checkpoint(tiny_run, "stage1", 23)
    write_state(tiny_run, "stage1", "finished", 23, 0)
    assert ask(tiny_run, "end", "--code", "0") == 0
    assert events(tiny_run)[-1]["verdict"] == "complete"


def test_what_may_not_start(tiny_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    (tiny_run.folder / "cluster.yaml").write_text("{}")  # launched, so that it has gates
    assert ask(tiny_run, "begin") == 3
    assert "may not start: " in capsys.readouterr().out and not events(tiny_run)
    (tiny_run.folder / "cluster.yaml").unlink()
    assert ask(tiny_run, "end", "--code", "1") == 1
    assert "its start was not recorded" in capsys.readouterr().out
    assert ask(tiny_run, "begin") == 0
    plan = json.loads((tiny_run.folder / "plan.json").read_text())
    (tiny_run.folder / "plan.json").write_text(json.dumps({**plan, "seed": 1}))
    assert ask(tiny_run, "begin") == 3
    assert ask(tiny_run, "end", "--code", "1") == 1
