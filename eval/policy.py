"""The feedback policy's file: targets, affinities and limits, fixed before a run. Reads eval/policy*.yaml."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import xxhash
from pydantic import Field, field_validator

from eval.suite import Metric
from recipes.recipe import Count, Strict, Tokens
from recipes.yamlfile import places_of, read_yaml, typed, typed_error

POLICY = Path(__file__).resolve().parent / "policy.yaml"
Positive = Annotated[float, Field(gt=0)]
Part = Annotated[float, Field(ge=0, le=1)]


class Goal(Strict):
    """What one benchmark should reach, and whom it speaks about."""

    metric: Metric
    target: float
    """In the metric's unit; below `chance` where lower is better."""
    chance: float
    """What guessing reaches."""
    items: Count | None = None
    """Of the whole test set, where it is known."""
    weight: Positive = 1.0
    domains: Annotated[dict[str, Positive], Field(min_length=1)]
    """Affinity to each domain it speaks about."""

    @property
    def sign(self) -> float:
        """+1 where higher is better, −1 where lower is."""
        return math.copysign(1.0, self.target - self.chance)


class Reserve(Strict):
    """Tokens of a source or family that are kept for a later stage."""

    tokens: Tokens
    """Of the full-size recipe; a scaled one's are scaled with it."""
    until: str
    """The stage that may use them."""


class Repetition(Strict):
    """How often a source may be read over the whole run."""

    epochs: Positive
    families: Literal["apart", "once"]
    """What counts as read before: `apart`, of the sources that the next stage lists, against the largest of a family's;
    `once`, also of all members of the family, against its largest."""
    reserves: dict[str, Reserve] = Field(default_factory=dict)


class Policy(Strict):
    """Everything that is fixed before the run."""

    web: str
    """The domain that takes what overflows."""
    web_least: Part
    floor: Part
    """A domain with less starts from here, if the next stage allows one of its sources."""
    step_stable: Part
    """Largest total variation from one stage to the next."""
    step_decay: Part
    """The same into a stage that is mostly learning-rate decay."""
    eta: Positive
    """Largest exponent of the pull."""
    noise: Positive
    """Standard errors below which a difference is none."""
    repetition: Repetition
    benchmarks: Annotated[dict[str, Goal], Field(min_length=1)]
    """All are required of a scorecard."""

    @field_validator("benchmarks")
    @classmethod
    def _apart(cls, goals: dict[str, Goal]) -> dict[str, Goal]:
        for name, goal in goals.items():
            if goal.target == goal.chance:
                raise ValueError(f"write another target for {name}: it equals chance")
        return goals

    @property
    def digest(self) -> str:
        """xxh3-128 of the values; comments do not count."""
        return xxhash.xxh3_128_hexdigest(self.model_dump_json().encode())

    def of(self, domain: str) -> dict[str, Goal]:
        """The benchmarks that speak about a domain."""
        return {name: goal for name, goal in self.benchmarks.items() if domain in goal.domains}

    def only(self, names: Iterable[str]) -> Policy:
        """The policy with these of its benchmarks."""
        kept = set(names)
        return self.model_copy(update={"benchmarks": {n: g for n, g in self.benchmarks.items() if n in kept}})


def load_policy(path: Path = POLICY) -> Policy:
    """Reads a policy file.

    Raises:
        UserError: it is missing or something in it is wrong.
    """
    file = read_yaml(path)
    policy = typed(Policy, file.data, places_of(file))
    if not any(policy.web in goal.domains for goal in policy.benchmarks.values()):
        fix = f"add one with `domains: {{{policy.web}: 1}}`: what takes the overflow must be measured too"
        raise typed_error(places_of(file), ("web",), f"no benchmark speaks about {policy.web}", fix)
    return policy
