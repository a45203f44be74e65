"""Sends each step's metrics to where a person likes to look at them, beside metrics.jsonl, which stays the record.

SMOL_TRACKER chooses: none (the default), trackio, wandb or tensorboard. It is in the environment and not in the recipe,
since it is a person's taste and a site's network, and no run's result depends on it. None of the packages is installed
with this one. All that a tracker does happens in a thread of its own, on rank 0: if it fails, it says so once and is
left alone; if it hangs, nothing waits for it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import queue
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from recipes.errors import UserError
from recipes.run import Run

VARIABLE = "SMOL_TRACKER"
PACKAGES = {"trackio": "trackio", "wandb": "wandb", "tensorboard": "tensorboard"}
WAITING = 10_000
"""Lines that may wait to be sent; more are dropped."""
FAREWELL_SECONDS = 10.0
"""For which the end of training waits for the last lines."""

Send = Callable[[int, dict[str, float]], None]


def chosen_tracker() -> str:
    """The tracker that the environment asks for.

    Raises:
        UserError: it is none of those known, or its package is not installed.
    """
    name = os.environ.get(VARIABLE) or "none"
    if name == "none":
        return name
    if name not in PACKAGES:
        raise UserError(f"{VARIABLE} is '{name}'", f"write one of none, {', '.join(PACKAGES)}")
    if importlib.util.find_spec(PACKAGES[name]) is None:
        raise UserError(f"{VARIABLE} is {name}, which is not installed", f"pip install {PACKAGES[name]}, or unset it")
    return name


class Tracker:
    """Takes metrics lines; never raises and never waits."""

    def __init__(self, name: str, run: Run, stage: str) -> None:
        self.name = name
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue(WAITING)
        self._thread: threading.Thread | None = None
        if name != "none":
            self._thread = threading.Thread(target=self._work, args=(run, stage), name="tracker", daemon=True)
            self._thread.start()

    def log(self, line: dict[str, Any]) -> None:
        """Hands over a line of metrics.jsonl."""
        self._put(line)

    def close(self) -> None:
        """Waits up to ten seconds for the last lines to be sent."""
        self._put(None)
        if self._thread:
            self._thread.join(FAREWELL_SECONDS)

    def _put(self, line: dict[str, Any] | None) -> None:
        if self._thread and self._thread.is_alive():
            with suppress(queue.Full):
                self._lines.put_nowait(line)

    def _work(self, run: Run, stage: str) -> None:
        try:
            send, finish = OPENERS[self.name](run, stage)
            while (line := self._lines.get()) is not None:
                send(line["step"], numbers(line))
            finish()
        except BaseException as error:  # a package may even call sys.exit
            text = f"{self.name} failed and is left alone; training goes on: {type(error).__name__}: {error}"
            print(text, file=sys.stderr, flush=True)


def numbers(line: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a metrics line, flat, as "train/loss" or "train/seconds/data"."""
    flat: dict[str, float] = {}
    for key, value in line.items():
        name = f"{prefix or 'train'}/{key}"
        if isinstance(value, dict):
            flat |= numbers(value, name)
        elif isinstance(value, (int, float)) and name != "train/step":
            flat[name] = value
    return flat


def _tensorboard(run: Run, stage: str) -> tuple[Send, Callable[[], None]]:
    writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(_folder(run, stage, "tensorboard")))

    def send(step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)

    return send, writer.close


def _wandb(run: Run, stage: str) -> tuple[Send, Callable[[], None]]:
    wandb = importlib.import_module("wandb")
    name = f"{run.folder.name}-{stage}"
    open_run = wandb.init(
        project=run.recipe.name, name=name, id=name, resume="allow", dir=str(_folder(run, stage, "wandb"))
    )
    return lambda step, values: open_run.log(values, step=step), open_run.finish


def _trackio(run: Run, stage: str) -> tuple[Send, Callable[[], None]]:
    trackio = importlib.import_module("trackio")
    trackio.init(project=run.recipe.name, name=f"{run.folder.name}-{stage}", resume="allow")
    return lambda step, values: trackio.log(values, step=step), trackio.finish


def _folder(run: Run, stage: str, name: str) -> Path:
    folder = run.stage_folder(stage) / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


OPENERS: dict[str, Callable[[Run, str], tuple[Send, Callable[[], None]]]] = {
    "tensorboard": _tensorboard, "trackio": _trackio, "wandb": _wandb,
}  # fmt: skip
