"""How runs stand, from folders in any state."""

from __future__ import annotations

import io
import json
import os
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from recipes.errors import UserError
from recipes.files import append_line, write_json
from recipes.slurm import commands, standing, status

STEP_TOKENS, GPUS = 1000, 4
FILES = ("plan.json", "run.json", "events.jsonl", "jobs.jsonl", "cluster.yaml", "stage1/metrics.jsonl",
         "stage1/state.json", "approvals/stage2.json")  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run at step 60 of 100 of its first of two stages, and no Slurm."""
    for name in ("stages", "mixtures"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    return make_run(tmp_path / "runs" / "first")


def make_run(folder: Path) -> Path:
    stages = [
        {"name": "stage1", "start_step": 0, "end_step": 100},
        {"name": "stage2", "start_step": 100, "end_step": 300},
    ]
    write_json(folder / "plan.json", {"stages": stages, "branches": [], "tokens_per_step": STEP_TOKENS, "gpus": GPUS})
    write_json(folder / "run.json", {"recipe": "tiny"})
    write_json(folder / "stage1/state.json", {"stage": "stage1", "state": "training", "step": 50, "reason": None})
    (folder / "cluster.yaml").write_text("name: virtual\nnodes: 2\n")
    for step in range(1, 61):
        slow = step % 10 == 0  # a checkpoint, or a slow file: the median is not moved by it
        append_line(folder / "stage1/metrics.jsonl", {
            "step": step, "tokens": step * STEP_TOKENS, "loss": 6 - step / 20, "lr": 1e-3, "mfu": 0.4,
            "tokens_per_s": 10.0 if slow else 2000.0, "seconds": {"data": 0.1, "step": 0.4, "checkpoint": 0.0},
        })  # fmt: skip
    append_line(folder / "jobs.jsonl", {"id": 17, "kind": "train", "stage": "stage1", "name": "first-stage1-train"})
    for event in (
        start("2030-01-01T00:00:00+00:00", 0), end("preempted", 100, 50), start("2030-01-01T00:05:00+00:00", 30),
        end("preempted", 100, 70), start("2030-01-01T00:10:00+00:00", 40),
    ):  # fmt: skip
        append_line(folder / "events.jsonl", event)
    return folder


def start(time: str, step: int) -> dict[str, Any]:
    return {"event": "start", "stage": "stage1", "job": 17, "restart": 0, "step": step, "time": time}


def end(cause: str, allocated: float, productive: float) -> dict[str, Any]:
    return {"event": "end", "stage": "stage1", "cause": cause, "allocated_s": allocated, "productive_s": productive}


def printed(run: str | None, **more: Any) -> str:
    out = io.StringIO()
    status.show(run, Console(file=out, width=100), **more)
    return out.getvalue()


def test_a_stage_in_progress(run: Path) -> None:
    stage = standing.read(run).stages[0]
    assert (stage.state, stage.step, stage.end_step) == ("training", 60, 100)
    assert (stage.tokens, stage.tokens_planned) == (60 * STEP_TOKENS, 100 * STEP_TOKENS)
    assert (stage.loss, stage.lr, stage.mfu) == (3.0, 1e-3, 0.4)
    assert stage.tokens_per_s_per_gpu == 2000 / GPUS
    assert stage.seconds_left == 40 * STEP_TOKENS / 2000


def test_time_to_the_runs_end_counts_all_stages(run: Path) -> None:
    assert standing.read(run).seconds_left == (40 + 200) * STEP_TOKENS / 2000
    (run / "stage2").mkdir()
    append_line(run / "stage2/metrics.jsonl", {"step": 101, "tokens_per_s": 1000})
    assert standing.read(run).seconds_left == (40 + 199) * STEP_TOKENS / 1000  # at the newest stage's rate


def test_the_state_outlives_its_metrics(run: Path) -> None:
    (run / "stage1/metrics.jsonl").unlink()
    assert standing.read(run).stages[0].step == 50


def test_restarts_by_cause(run: Path) -> None:
    append_line(run / "events.jsonl", end("hang", 10, 0))
    append_line(run / "events.jsonl", end("finished", 10, 10))
    append_line(run / "events.jsonl", {**end("cancelled", 10, 0), "verdict": "stop"})
    assert standing.read(run).restarts == {"preempted": 2, "hang": 1}
    assert standing.read(run).stops == {"cancelled": 1}


def test_goodput_counts_ended_starts_and_the_one_that_is_on(run: Path) -> None:
    now = standing.seconds_of("2030-01-01T00:11:40+00:00")  # 100 s on, 20 steps of half a second
    assert standing.read(run, now).goodput == pytest.approx((50 + 70 + 20 * 0.5) / 300)


def test_goodput_of_ended_starts_alone(run: Path) -> None:
    write_json(run / "stage1/state.json", {"stage": "stage1", "state": "failed", "step": 50})
    assert standing.read(run).goodput == pytest.approx(120 / 200)  # the start that is on is not: its end was not noted
    append_line(run / "events.jsonl", end("crash", 300, 0))
    assert standing.read(run).goodput == pytest.approx(120 / 500)


def test_disk_use_is_every_file_below(run: Path) -> None:
    before = standing.read(run).disk_bytes
    (run / "stage1/checkpoints/50").mkdir(parents=True)
    (run / "stage1/checkpoints/50/weights").write_bytes(bytes(12345))
    assert standing.read(run).disk_bytes == before + 12345


def test_disk_use_takes_a_checkpoints_manifest_at_its_word(run: Path) -> None:
    before = standing.read(run).disk_bytes
    checkpoint = run / "stage1/checkpoints/50"
    write_json(checkpoint / "manifest.json", {"files": [{"name": "a/b", "bytes": 10**9}, {"name": "c", "bytes": 5}]})
    (checkpoint / "a").mkdir()
    (checkpoint / "a/b").write_bytes(b"x")
    assert standing.read(run).disk_bytes == before + 10**9 + 5


def test_the_gate_waits_for_a_proposal_then_for_a_person_then_is_open(run: Path) -> None:
    assert standing.read(run).next_gate == "stage2, once stage1 is trained and a mixture is proposed"
    (run / "proposals").mkdir()
    (run / "proposals/stage2.yaml").write_text("domains: {}")
    assert "smol approve first stage2" in (standing.read(run).next_gate or "")
    write_json(run / "approvals/stage2.json", {"stage": "stage2"})
    assert standing.read(run).next_gate is None


def test_a_stage_that_has_begun_waits_for_no_gate(run: Path) -> None:
    write_json(run / "stage2/state.json", {"stage": "stage2", "state": "training", "step": 100})
    assert standing.read(run).next_gate is None


def test_the_picture_of_a_run_without_slurm(run: Path) -> None:
    text = printed("first")
    for word in ("stage1", "60/100", "60k/100k", "3.000", "1.00e-03", "500 tokens/s/GPU", "40%", "20 s", "2 min",
                 "2 × preempted", "no Slurm on this machine", "█▇", "17", "virtual", "last step"):  # fmt: skip
        assert word in text, word


def test_the_figures_of_11_trillion_tokens_fit_100_columns(run: Path) -> None:
    stages = [("stage1", 0, 2861022), ("stage2", 2861022, 3814697), ("stage4", 4768371, 5240000)]
    names = [{"name": name, "start_step": start, "end_step": end} for name, start, end in [*stages, stages[-1]]]
    names[-1]["name"] = "long-context"
    write_json(run / "plan.json", {"stages": names, "tokens_per_step": 2097152, "gpus": 256})
    for name, _, end in [stages[0], ("long-context", *stages[-1][1:])]:
        write_json(run / name / "state.json", {"stage": name, "state": "interrupted", "step": end - 1})
        line = {"step": end - 1, "loss": 12.345, "lr": 5e-4, "tokens_per_s": 2097152 / 0.9, "mfu": 0.41}
        (run / name / "metrics.jsonl").write_text("")
        append_line(run / name / "metrics.jsonl", line)
    text = printed("first")
    for word in ("long-context", "interrupted", "2,861,021/2,861,022", "5,239,999/5,240,000", "6T/6T", "989.1B/989.1B",
                 "12.345", "9,102 tokens/s/GPU, MFU 41%"):  # fmt: skip
        assert word in text, word
    assert "…" not in text and max(map(len, text.splitlines())) <= 100
    assert "…" not in (text := printed(None)) and max(map(len, text.splitlines())) <= 100


def test_a_run_that_never_started_and_one_that_is_complete(run: Path) -> None:
    (run / "stage1/metrics.jsonl").unlink()
    (run / "stage1/state.json").unlink()
    assert "unknown until a step is done" in (text := printed("first")) and "learning rate" not in text
    for name, end in (("stage1", 100), ("stage2", 300)):
        write_json(run / name / "state.json", {"stage": name, "state": "finished", "step": end})
    append_line(run / "stage2/metrics.jsonl", {"step": 300, "tokens_per_s": 10.0})
    assert "trained to its end" in (text := printed("first")) and "last step" not in text


def test_jobs_that_are_alike_share_a_line(run: Path) -> None:
    for job in (18, 19):
        append_line(run / "jobs.jsonl", {"id": job, "kind": "train", "stage": "stage1"})
    append_line(run / "jobs.jsonl", {"id": 20, "kind": "eval", "stage": "stage1"})
    jobs = printed("first").rpartition("jobs ")[2].splitlines()
    assert jobs[0].split() == ["kind", "stage", "state"]  # what is empty in all lines has no column
    assert [line.split() for line in jobs[2:4]] == [
        ["17", "…", "19", "(3)", "train", "stage1", "?"], ["20", "eval", "stage1", "?"],
    ]  # fmt: skip


def test_all_runs_a_line_each_and_what_needs_a_person(run: Path) -> None:
    second = make_run(run.parent / "second")
    assert [line.split()[0] for line in printed(None).splitlines() if "60%" in line] == ["first", "second"]
    assert "smol approve" not in printed(None)
    (second / "proposals").mkdir()
    (second / "proposals/stage2.yaml").write_text("domains: {}")
    write_json(run / "stage1/state.json", {"stage": "stage1", "state": "diverged", "step": 50, "reason": "NaN"})
    assert "first: stage1 diverged: NaN\nsecond: stage2 waits for you" in printed(None)


def test_what_the_upload_said_last(run: Path) -> None:
    assert standing.read(run).upload is None
    (run / "logs").mkdir()
    (run / "logs/upload.log").write_text("stage1 step 10: 300 bytes sent\nstage1 step 20: failed: no network\n\n")
    assert "stage1 step 20: failed: no network" in printed("first")


def test_how_long_ago_the_last_step_was(run: Path) -> None:
    os.utime(run / "stage1/metrics.jsonl", (0, 1000))
    first, second = standing.read(run, now=1090.0).stages
    assert (first.idle_seconds, second.idle_seconds) == (90, None)


def test_no_runs_and_an_unknown_run(run: Path) -> None:
    with pytest.raises(UserError, match="Name one of: first"):
        status.show("nope", Console())
    shutil.rmtree(run)
    assert "no runs yet" in printed(None)


def test_json_is_what_the_picture_shows(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status.show("first", Console(), as_json=True)
    content = json.loads(capsys.readouterr().out)
    assert content["stages"][0]["step"] == 60
    assert content["slurm"].startswith("there is no Slurm")
    assert content["jobs"] == [
        {"id": 17, "kind": "train", "stage": "stage1", "name": "first-stage1-train", "state": "?"}
    ]


def test_watch_shows_it_again(run: Path) -> None:
    out = io.StringIO()
    status.watch("first", Console(file=out, width=160), seconds=0, rounds=2)
    assert out.getvalue().count("60/100") == 2


def test_squeues_jobs_and_a_stage_without_one(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [[commands.Job(17, "", "RUNNING", 2, "1:00", "9:00", "None", "first-stage1-train", str(run))], []]
    monkeypatch.setattr(commands, "queue", lambda: answers.pop(0))
    found = standing.read(run)
    assert (found.slurm, found.stages[0].state) == (None, "training")
    assert (found.jobs[0]["state"], found.jobs[0]["reason"]) == ("RUNNING", "")
    assert standing.read(run).stages[0].state == "interrupted"
    write_json(run / "stage1/state.json", {"stage": "stage1", "state": "starting", "step": 50})
    monkeypatch.setattr(commands, "queue", list)
    assert standing.read(run).stages[0].state == "interrupted"


def test_cancel_without_slurm_changes_nothing(run: Path) -> None:
    before = (run / "events.jsonl").read_text()
    with pytest.raises(UserError, match="no Slurm"):
        status.cancel("first", Console())
    assert (run / "events.jsonl").read_text() == before


def test_cancel_ends_what_may_still_run_and_notes_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = ((17, "COMPLETED"), (18, "RUNNING"), (19, "PENDING"))
    jobs = [commands.Job(id, "", state, 2, "1:00", "9:00", "None", "name", str(run)) for id, state in states]
    monkeypatch.setattr(commands, "queue", lambda **_: jobs)
    ended: list[list[int]] = []
    monkeypatch.setattr(commands, "cancel", ended.append)
    out = io.StringIO()
    status.cancel("first", Console(file=out, width=100))
    assert ended == [[18, 19]] and "first: cancelled 18, 19; smol launch goes on" in out.getvalue()
    event = standing.tail(run / "events.jsonl")[-1]
    assert (event["event"], event["jobs"]) == ("cancel", [18, 19])
    assert "17" not in printed("first").rpartition("jobs ")[2]  # an ended job is in no line
    del jobs[1:]
    status.cancel("first", Console(file=out, width=100))
    assert len(ended) == 1 and "first: no job is queued or running" in out.getvalue()


def test_a_long_file_is_read_at_its_end_and_at_even_distances(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": n, "loss": float(n)}) + "\n" for n in range(1, 100_001)))
    lines = standing.tail(path)
    assert (lines[-1]["step"], len(lines) < 3000) == (100_000, True)
    points = standing.spread(path, "loss")
    assert len(points) == standing.POINTS
    distances = [b - a for a, b in pairwise(points)]
    assert max(distances) < 1.3 * min(distances)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_the_files_hold_it_answers(run: Path, data: st.DataObject) -> None:
    """Cut short, replaced by garbage, of other types, or absent."""
    shutil.rmtree(run.parent / "broken", ignore_errors=True)
    folder = make_run(run.parent / "broken")
    (folder / "approvals").mkdir()
    for name in data.draw(st.sets(st.sampled_from(FILES), min_size=1)):
        path = folder / name
        whole = path.read_bytes() if path.is_file() else b""
        odd = st.sampled_from(
            [b"{}\n", b"[]\n", b"null\n", b'{"step": null, "stages": 3}\n', b'{"step": "x"}\n', b"\xff\xfe"]
        )
        what = data.draw(
            st.one_of(st.integers(0, len(whole)).map(lambda n, w=whole: w[:n]), odd, st.binary(max_size=40))
        )
        path.write_bytes(what)
    if data.draw(st.booleans()):
        (folder / "stage1/metrics.jsonl").unlink()
    printed(str(folder)) if (folder / "run.json").is_file() else None
    printed(None)
