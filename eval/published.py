"""Published scores, of SmolLM2 after each stage and of its peers. Reads eval/published.yaml; nothing else does."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from eval.scorecard import Score, mean
from recipes.recipe import Count, Strict
from recipes.yamlfile import places_of, read_yaml, typed

PUBLISHED = Path(__file__).resolve().parent / "published.yaml"


class _File(Strict):
    stages: dict[str, dict[str, float]]
    items: dict[str, tuple[Count, ...]]
    peers: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Published:
    """One model's scores, in percent."""

    name: str
    stage: str | None
    """Of SmolLM2-1.7B; none for a peer."""
    scores: dict[str, Score]
    """With binomial errors, which the publications leave out; not a number where the items are not known."""


def load_published(path: Path = PUBLISHED) -> list[Published]:
    """SmolLM2-1.7B after each stage, then its peers.

    Raises:
        UserError: the file is missing or wrong.
    """
    read = read_yaml(path)
    file = typed(_File, read.data, places_of(read))
    named: list[tuple[str, str | None, dict[str, float]]]
    named = [(f"paper {stage}", stage, values) for stage, values in file.stages.items()]
    named += [(peer, None, values) for peer, values in file.peers.items()]
    return [
        Published(name, stage, {b: binomial(value, file.items.get(b, ())) for b, value in values.items()})
        for name, stage, values in named
    ]


def binomial(percent: float, items: tuple[int, ...]) -> Score:
    """The score with its standard error √(p(1 − p)/n), in percent.

    Of several subtasks, whose own scores are not published, each is taken to have the average's: √Σσ² / K.
    """
    if not items:
        return Score(percent, math.nan, 0)
    p = percent / 100
    return mean(Score(percent, 100 * math.sqrt(p * (1 - p) / n), n) for n in items)
