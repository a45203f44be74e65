"""The whole chain, for real: interrupted by Ctrl-C in stage 1, killed in stage 2, resumed, audited."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eval.scorecard import scorecards
from recipes.audit import audit
from recipes.files import read_lines
from recipes.loader import load_mixture
from recipes.report import heldout_losses
from recipes.run import Run

ROOT = Path(__file__).resolve().parent.parent


def start(tree: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "recipes.cli", "rehearse", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=tree, env=environment, text=True, **pipes)


@pytest.mark.slow
def test_a_rehearsal_survives_ctrl_c_and_a_kill(tree: Path) -> None:
    process = start(tree, "--minutes", "0.6", "--closed-loop")
    folder = tree / "runs" / "rehearsal-smollm2-1.7b-1"
    metrics = folder / "stage1" / "metrics.jsonl"
    while process.poll() is None and len(read_lines(metrics)) < 4:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode == 130, output
    assert "smol rehearse --resume rehearsal-smollm2-1.7b-1" in output and "Traceback" not in output
    steps = len(read_lines(metrics))
    state = json.loads((folder / "stage1" / "state.json").read_text())
    assert (state["state"], state["step"], state["exit_code"]) == ("stopped", steps, 75)

    resumed = start(tree, "--resume")
    output, _ = resumed.communicate()
    assert resumed.returncode in (0, 1), output  # 1: this few steps need not lower every held-out loss
    run = Run.load(folder)
    assert [line["step"] for line in read_lines(metrics)] == list(range(1, run.plan.stages[0].end_step + 1))
    events = [event["event"] for event in read_lines(folder / "events.jsonl")]
    assert events == ["adopted", "killed", "adopted", "adopted", "finished"]
    check_loop(run, tree)
    found = audit(run, digests=True)
    assert [a.stage for a in found] == ["stage1", "stage2", "stage3", "stage4"]
    assert all(a.complete and not a.problems for a in found)
    fell = all(after < before for _, _, before, after in heldout_losses(run))
    assert resumed.returncode == (0 if fell else 1)
    last = {domain for stage, domain, *_ in heldout_losses(run) if stage == "stage4"}
    assert last == {"web", "code", "math", "synthetic"}
    assert "killed with SIGKILL" in (folder / "report.html").read_text()
    assert not (folder / "corpora").exists()
    checkpoints = sorted(p.name for p in folder.glob("stage*/checkpoints/*"))
    assert checkpoints == sorted(str(s.end_step) for s in run.plan.stages)


def check_loop(run: Run, tree: Path) -> None:
    """Every stage was evaluated, and each one after the first was trained on what was proposed for it."""
    cards = scorecards(run.folder / "eval" / "scores")
    assert [(card.stage, card.step) for card in cards] == [(s.name, s.end_step) for s in run.plan.stages]
    assert all(set(card.benchmarks) == {"docs-choice", "code-choice", "word-problems"} for card in cards)
    assert all(result.score.stderr > 0 for card in cards for result in card.benchmarks.values())
    before = run.recipe.stages[0].mixture
    for stage in run.recipe.stages[1:]:
        proposed = load_mixture(run.folder / "proposals" / f"{stage.name}.yaml", run.recipe.sources)
        assert stage.mixture == proposed != before
        assert "## Scores that pulled" in (run.folder / "proposals" / f"{stage.name}.md").read_text()
        before = proposed
    for stage_file in (tree / "mixtures").rglob("*.yaml"):  # never in mixtures/
        assert stage_file.read_bytes() == (ROOT / stage_file.relative_to(tree)).read_bytes()
    report = (run.folder / "report.html").read_text()
    assert f"{cards[-1].benchmarks['docs-choice'].score.value:.2f} ±" in report
    assert "trained on the proposal" in report


def test_folders_are_numbered(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from recipes.rehearse import new_folder

    monkeypatch.chdir(tree)
    assert [new_folder("x").name for _ in range(3)] == ["rehearsal-x-1", "rehearsal-x-2", "rehearsal-x-3"]
