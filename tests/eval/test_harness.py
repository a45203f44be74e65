"""`smol eval` on a real checkpoint: a crash keeps the others' results, the same command goes on, nothing runs twice."""

from __future__ import annotations

import fcntl
import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from eval.harness import (
    CONVERSION,
    Options,
    Subject,
    _file,
    _finished,
    _keep,
    _key,
    _result,
    evaluate,
    model_folder,
    scorecard_path,
    subject_of,
    with_limit,
)
from eval.scorecard import Score, Scorecard, scorecards
from eval.suite import load_suite
from recipes.cli import app
from recipes.engine.checkpoint import MANIFEST
from recipes.errors import UserError
from recipes.files import checksum, write_json
from recipes.run import Run
from tests.engine import tiny_run
from tests.eval.fixtures import write_datasets

pytestmark = pytest.mark.slow
SUITE = "extends: rehearsal\nonly: [docs-choice, code-choice]\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A tiny run, its first stage trained."""
    made = tiny_run.make_run(tmp_path_factory.mktemp("harness"), {"tokenizer": {"end_of_text": "word0"}})
    tiny_run.train(made, "stage1")
    return made


def smol(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "recipes.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=tiny_run.environment(), capture_output=True, text=True)


def checkpoint(run: Run) -> Path:
    return run.checkpoints("stage1") / str(run.plan.stage("stage1").end_step)


def test_a_crash_keeps_the_others_and_the_same_command_goes_on(run: Run, tmp_path: Path) -> None:
    data = write_datasets(tmp_path / "data")
    broken = data / "code-choice" / "test.jsonl"
    right = broken.read_text()
    broken.write_text(right.replace('"label": 2', '"label": 9'))
    (tmp_path / "mine.yaml").write_text(SUITE)
    command = ["eval", checkpoint(run), "--suite", "mine.yaml", "--data-root", data, "--scores", tmp_path / "scores"]

    crashed = smol(tmp_path, *command)
    results = run.folder / "eval" / subject_of(checkpoint(run)).name / "mine"
    assert crashed.returncode == 1, crashed.stderr
    assert "1 of 2 benchmarks crashed" in crashed.stderr and "code-choice: IndexError" in crashed.stderr
    assert (results / "docs-choice.json").is_file() and not (results / "code-choice.json").exists()
    assert len((results / "docs-choice.items.jsonl").read_text().splitlines()) == 3 and not list(
        results.glob("*.raw.*")
    )
    assert not list((tmp_path / "scores").glob("*"))

    kept = (results / "docs-choice.json").read_bytes()
    broken.write_text(right)
    done = smol(tmp_path, *command)
    assert done.returncode == 0, done.stderr
    assert (results / "docs-choice.json").read_bytes() == kept
    [path] = (tmp_path / "scores").glob("*.json")
    card = Scorecard.load(path)
    assert (card.recipe, card.stage, card.step) == ("tiny", "stage1", run.plan.stage("stage1").end_step)
    assert card.tokens == card.step * run.recipe.tokens_per_step
    assert card.checkpoint == checksum(checkpoint(run) / MANIFEST)
    assert card.benchmarks["code-choice"].data.startswith("local:") and card.versions["lighteval"] == "0.13.0"
    assert card.benchmarks["docs-choice"].score.items == 3
    assert "docs-choice" in done.stdout and f"{card.benchmarks['docs-choice'].score.value:.2f}" in done.stdout

    before = {p: p.stat().st_mtime_ns for p in results.iterdir() if p.suffix in (".json", ".log")}
    again = smol(tmp_path, *command)
    assert again.returncode == 0 and Scorecard.load(path) == card
    assert {p: p.stat().st_mtime_ns for p in results.iterdir() if p.suffix in (".json", ".log")} == before

    with open(results / "docs-choice.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        busy = smol(tmp_path, *command)
    assert busy.returncode == 2 and "docs-choice of this checkpoint is being evaluated already" in busy.stderr


def test_a_model_folder_is_evaluated_as_it_is(tmp_path: Path) -> None:
    model = tmp_path / "published"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    subject = subject_of(model)
    assert (subject.recipe, subject.name, subject.run) == ("published", "published-0", None)
    again = subject_of(model).hash
    (model / "model.safetensors").write_bytes(b"others.")
    assert again == subject.hash != subject_of(model).hash


def test_a_scorecard_is_written_when_no_result_is_missing(tmp_path: Path) -> None:
    """Results are written by hand here, so that nothing has to run."""
    subject, suite = Subject("m", "m", 0, 0, "h", tmp_path, tmp_path), load_suite("rehearsal")
    options = Options(data_root=write_datasets(tmp_path / "data"), scores=tmp_path / "scores")
    console = Console(file=io.StringIO(), width=200)
    for i, name in enumerate(suite.benchmarks):
        scores = {name: {suite.benchmarks[name].metric: {"value": 2.0, "stderr": 0.1, "items": 3}}}
        content = {"subtasks": scores, "version": 1, "versions": {}, "date": f"2026-01-0{i + 1}"}
        write_json(_file(subject, suite, name, ".json"), {**content, "key": _key(subject, suite, name, options)})
        card = evaluate(subject, suite, options, console, only=[name])
    assert card and card.date == "2026-01-03" and card.benchmarks["code-choice"].score == Score(2.0, 0.1, 3)
    assert scorecards(tmp_path / "scores") == [card]
    key = _key(subject, suite, "docs-choice", options)
    assert _finished(subject, suite, "docs-choice", key)
    for other in ({"checkpoint": "i"}, {"limit": 9}, {"data": "local:1"}, {"task_file": "t"}):
        assert _finished(subject, suite, "docs-choice", key | other) is None, "a result of something else"
    said = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert said == ["m-0: no scorecard yet, no result of code-choice, word-problems",
                    "m-0: no scorecard yet, no result of word-problems"]  # fmt: skip


def test_what_is_no_checkpoint_of_a_run_is_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="manifest is missing"):
        subject_of(tmp_path)
    lone = tmp_path / "a" / "b" / "c"
    lone.mkdir(parents=True)
    (lone / MANIFEST).write_bytes((checkpoint(run) / MANIFEST).read_bytes())
    with pytest.raises(UserError, match="lies in no run"):
        subject_of(lone)


def test_a_model_of_an_earlier_training_of_the_step_is_converted_again(run: Run) -> None:
    subject = subject_of(checkpoint(run))
    mark = model_folder(subject) / "mark"
    mark.touch()
    assert (model_folder(subject) / "mark").exists(), "converted once"
    note = mark.with_name(CONVERSION)
    note.write_text(note.read_text().replace(subject.hash, "0" * 32))
    assert not (model_folder(subject) / "mark").exists()


def test_bad_input_runs_nothing(run: Run, tmp_path: Path) -> None:
    data = write_datasets(tmp_path / "data")
    cases = {
        "humaneval runs programs": ["--suite", "final-base", "--data-root", data],
        "has no benchmark 'gsm9k'": ["--suite", "rehearsal", "--data-root", data, "--only", "gsm9k"],
        "there is no suite 'x'": ["--suite", "x"],
        "is on no Hub": ["--suite", "rehearsal"],
        "--every minute is unknown": ["--every", "minute"],
    }
    before = sorted(run.folder.rglob("*"))
    for said, arguments in cases.items():
        done = CliRunner().invoke(app, ["eval", str(checkpoint(run)), *map(str, arguments)])
        assert isinstance(done.exception, UserError) and said in str(done.exception)
    assert sorted(run.folder.rglob("*")) == before


def test_a_checkpoint_that_cannot_be_evaluated_does_not_end_a_sweep(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, asked = write_datasets(tmp_path / "data"), list[int]()

    def nan_at_8(subject: Subject, *_: object) -> None:
        asked.append(subject.step)
        if subject.step == 8:
            raise UserError("the model yields NaN", "look at the loss")

    monkeypatch.setattr("eval.harness.evaluate", nan_at_8)
    command = ["eval", "--suite", "rehearsal", "--data-root", str(data)]
    both = [str(run.checkpoints("stage1") / step) for step in ("8", "12")]
    done = CliRunner().invoke(app, [*command, *both])
    assert (asked, done.exit_code) == ([8, 12], 2)
    assert isinstance(CliRunner().invoke(app, [*command, both[0]]).exception, UserError), "a single one is an error"


def test_what_a_process_says_is_wrong_is_said_once_and_leaves_no_result(tmp_path: Path) -> None:
    subject, suite = Subject("m", "m", 0, 0, "h", tmp_path, tmp_path), load_suite("rehearsal")
    log = tmp_path / "rehearsal" / "docs-choice.log"
    log.parent.mkdir()
    log.write_text("loading\nerror: docs-choice: the model yields NaN or infinity (acc). Look at the loss.\n")
    with pytest.raises(UserError) as error:
        _keep(subject, suite, "docs-choice", {}, 2)
    assert str(error.value).count("docs-choice: the model yields NaN") == str(error.value).count("docs-choice: ") == 1
    assert list(log.parent.iterdir()) == [log]


def test_a_benchmark_of_several_subtasks_has_the_error_of_their_average() -> None:
    """lighteval's own is the mean of the errors: 2 here."""
    subtasks = {name: {"acc": {"value": 30.0 + i, "stderr": 2.0, "items": 10}} for i, name in enumerate("abcd")}
    content = {"subtasks": subtasks, "version": 1, "key": {"data": "local:0"}}
    found = _result(load_suite("final-base").benchmarks["mmlu-mc"], content)
    assert found.score == Score(31.5, 1.0, 40) and found.subtasks["c"]["acc"] == Score(32.0, 2.0, 10)


def test_scorecards_are_named_by_checkpoint_and_suite(run: Run) -> None:
    subject, options = subject_of(checkpoint(run)), Options(scores=Path("s"))
    assert scorecard_path(subject, "between-stages", options) == Path(f"s/stage1-{subject.step}.json")
    assert scorecard_path(subject, "quick", options) == Path(f"s/stage1-{subject.step}.quick.json")
    limited = with_limit(load_suite("quick"), 50)
    assert {b.limit for b in limited.benchmarks.values()} == {50}
    assert limited.name == "quick-50", "its results and scorecard replace none of the suite's own"
    assert with_limit(limited, 80) == limited
