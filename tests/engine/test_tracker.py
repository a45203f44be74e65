from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from recipes.engine.tracker import VARIABLE, Tracker, chosen_tracker, numbers
from recipes.errors import UserError
from recipes.run import Run

LINE = {"step": 3, "loss": 2.5, "mfu": None, "seconds": {"data": 0.1, "step": 1}}


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wandb whose content the test writes."""
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv(VARIABLE, "wandb")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    yield folder / "wandb.py"
    sys.modules.pop("wandb", None)


WORKS = """
sent = []
class Run:
    def log(self, values, step): sent.append((step, values))
    def finish(self): sent.append("finished")
def init(**options):
    sent.append(options)
    return Run()
"""


def test_every_line_gets_there_in_order(tiny_run: Run, stand_in: Path) -> None:
    stand_in.write_text(WORKS)
    tracker = Tracker(chosen_tracker(), tiny_run, "stage1")
    for step in range(3):
        tracker.log(LINE | {"step": step})
    tracker.close()
    import wandb  # type: ignore[import-not-found]

    options, *lines, last = wandb.sent
    assert options["project"] == "tiny" and options["id"] == "tiny-stage1" and options["resume"] == "allow"
    assert [step for step, _ in lines] == [0, 1, 2] and last == "finished"


@pytest.mark.parametrize("fails_in", ["init", "log"])
def test_one_that_raises_says_so_once(
    tiny_run: Run, stand_in: Path, fails_in: str, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = WORKS.replace("sent.append(options)" if fails_in == "init" else "sent.append((step, values))", "1 / 0")
    stand_in.write_text(broken)
    tracker = Tracker(chosen_tracker(), tiny_run, "stage1")
    for step in range(20):
        tracker.log(LINE | {"step": step})
        time.sleep(0.005)
    tracker.close()
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "wandb failed and is left alone; training goes on: ZeroDivisionError" in err


def test_one_that_hangs_or_exits_keeps_nobody(
    tiny_run: Run, stand_in: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("recipes.engine.tracker.FAREWELL_SECONDS", 0.2)
    stand_in.write_text("import time\ndef init(**options): time.sleep(3)\n")
    began = time.monotonic()
    tracker = Tracker(chosen_tracker(), tiny_run, "stage1")
    for _ in range(11_000):
        tracker.log(LINE)
    tracker.close()
    assert time.monotonic() - began < 1.5
    sys.modules.pop("wandb")
    stand_in.write_text("import sys\ndef init(**options): sys.exit(3)\n#" + "x" * 100)
    Tracker("wandb", tiny_run, "stage1").close()
    assert "SystemExit: 3" in capsys.readouterr().err


def test_wrong_choices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert chosen_tracker() == "none"
    monkeypatch.setenv(VARIABLE, "wandbb")
    with pytest.raises(UserError, match="Write one of none, trackio, wandb, tensorboard"):
        chosen_tracker()
    monkeypatch.setenv(VARIABLE, "trackio")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="SMOL_TRACKER is trackio, which is not installed"):
        chosen_tracker()


def test_a_line_is_flattened_to_its_numbers() -> None:
    assert numbers(LINE) == {"train/loss": 2.5, "train/seconds/data": 0.1, "train/seconds/step": 1}


@pytest.mark.slow
def test_tensorboard_writes_its_files(tiny_run: Run) -> None:
    pytest.importorskip("tensorboard")
    tracker = Tracker("tensorboard", tiny_run, "stage1")
    tracker.log(LINE)
    tracker.close()
    assert list((tiny_run.stage_folder("stage1") / "tensorboard").glob("events.*"))
