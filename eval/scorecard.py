"""A scorecard: what one checkpoint scored, with errors and all that the figures depend on. Neither torch nor lighteval.

Scores are in percent (accuracies) or in bits (bits per byte); standard errors in the same unit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from recipes.errors import UserError
from recipes.files import write_json

FORMAT = 1


@dataclass(frozen=True)
class Score:
    """One metric's value."""

    value: float
    stderr: float
    items: int


@dataclass(frozen=True)
class Result:
    """One benchmark's scores."""

    metric: str
    """The one that counts."""
    scores: dict[str, Score]
    """By metric; over several subtasks their plain mean."""
    subtasks: dict[str, dict[str, Score]]
    """By subtask, then metric."""
    shots: int
    limit: int | None
    """Items of each subtask that were drawn; none: all."""
    version: int
    """Of the task's definition."""
    data: str
    """`<hub id>@<revision>`, or `local:<xxh3-128 of the files>`."""

    @property
    def score(self) -> Score:
        """Of the metric that counts."""
        return self.scores[self.metric]


@dataclass(frozen=True)
class Scorecard:
    """What one checkpoint scored in one suite."""

    recipe: str
    stage: str
    step: int
    tokens: int
    """Trained until `step`."""
    suite: str
    seed: int
    checkpoint: str
    """xxh3-128 of the checkpoint's manifest."""
    task_file: str
    """xxh3-128 of eval/tasks.py and what it is made of."""
    benchmarks: dict[str, Result]
    versions: dict[str, str] = field(default_factory=dict)
    """Of the packages that decide a score, and of this code."""
    date: str = ""
    """Of the newest result, ISO 8601, UTC."""

    @property
    def name(self) -> str:
        """`<stage>-<step>`."""
        return f"{self.stage}-{self.step}"

    @classmethod
    def load(cls, path: Path) -> Scorecard:
        """Reads a scorecard.

        Raises:
            UserError: there is none, it is damaged, or it is not what `save` wrote.
        """
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            written, made = content.pop("hash"), content.pop("format")
            if made != FORMAT:
                raise UserError(f"a scorecard of format {made}, not {FORMAT}", "evaluate the checkpoint again", path)
            if written != _hash(content):
                fix = "restore it from git, or evaluate the checkpoint again"
                raise UserError("the scorecard was changed after it was written: its hash differs", fix, path)
            return cls(**{**content, "benchmarks": {k: _result(v) for k, v in content["benchmarks"].items()}})
        except FileNotFoundError:
            raise UserError("there is no such scorecard", "evaluate the checkpoint with `smol eval`", path) from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"a damaged scorecard ({error})", "evaluate the checkpoint again", path) from None

    def save(self, path: Path) -> None:
        """Writes the scorecard with its hash, atomically."""
        content = json.loads(json.dumps(asdict(self)))
        write_json(path, {"format": FORMAT, **content, "hash": _hash(content)})


def _hash(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def _result(content: dict[str, Any]) -> Result:
    scores = {metric: Score(**score) for metric, score in content["scores"].items()}
    subtasks = {t: {m: Score(**s) for m, s in by_metric.items()} for t, by_metric in content["subtasks"].items()}
    return Result(**{**content, "scores": scores, "subtasks": subtasks})


def mean(scores: Iterable[Score]) -> Score:
    """The plain mean of K independent scores; its standard error is sqrt(sum of squares) / K.

    lighteval's own average has the mean of the standard errors, about sqrt(K) too large.
    """
    parts = list(scores)
    assert parts, "a mean of nothing"
    value = math.fsum(score.value for score in parts) / len(parts)
    stderr = math.sqrt(math.fsum(score.stderr**2 for score in parts)) / len(parts)
    return Score(value, stderr, sum(score.items for score in parts))


def z_of(after: Score, before: Score) -> float:
    """The difference of two independent scores in its own standard errors; 0 where both are equal."""
    error = math.hypot(after.stderr, before.stderr)
    difference = after.value - before.value
    return difference / error if error else math.copysign(math.inf, difference) if difference else 0.0


def scorecards(path: Path) -> list[Scorecard]:
    """All scorecards of a folder, by step and name; or the one of a file."""
    files = [path] if path.is_file() else path.glob("*.json")
    return sorted((Scorecard.load(file) for file in files), key=lambda card: (card.step, card.stage))
