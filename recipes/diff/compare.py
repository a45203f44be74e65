"""What differs between two recipes, in the data above all: shares, tokens, epochs, later stages, limits.

`diff_sides` finds what `smol diff A B` names, `diff_show` shows the result. Neither torch nor nanotron.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from recipes.data.interleave import Interleave
from recipes.diff.keys import Change, changes_between
from recipes.diff.limits import Limit, crossed, findings
from recipes.lint import lint
from recipes.plan import Plan, StagePlan, make_plan
from recipes.recipe import Mixture, Recipe

DECAY = 15.39
"""R*: epochs after which repeating a token has lost 63 % of its worth (Muennighoff et al., 2305.16264)."""
Kind = Literal["domain", "source", "family"]


def worth(epochs: float) -> float:
    """What all the tokens of `epochs` passes are worth, against as many fresh ones: 1 up to one epoch.

    D'/(e·U) with D' = U + U·R*·(1 − e^(−(e−1)/R*)) (Muennighoff et al., 2305.16264).
    """
    return 1.0 if epochs <= 1 else (1 - DECAY * math.expm1(-(epochs - 1) / DECAY)) / epochs


@dataclass(frozen=True)
class Use:
    """What a stage takes from a domain, a source or a family. All but the share is none where no recipe is known."""

    share: Fraction
    """Of the stage's tokens, exact."""
    tokens: int | None = None
    epochs: float | None = None
    """In the stage; none for a domain, and where the unique tokens are unknown."""
    epochs_run: float | None = None
    """From the run's beginning to the stage's end."""
    worth: float | None = None
    """Of all that was read of it until the stage's end, against as many fresh tokens: 0 to 1."""


@dataclass(frozen=True)
class Line:
    """One domain, source or family of a stage, on both sides; none where a side has none of it."""

    kind: Kind
    name: str
    domain: str
    before: Use | None
    after: Use | None

    @property
    def points(self) -> Fraction:
        """Change of the share, in percentage points, exact."""
        zero = Use(Fraction(0))
        return 100 * ((self.after or zero).share - (self.before or zero).share)

    @property
    def changed(self) -> bool:
        """Whether the stage itself takes something else: not for what only earlier stages changed."""
        if self.before is None or self.after is None:
            return True
        before, after = self.before, self.after
        return (before.share, before.tokens, before.epochs) != (after.share, after.tokens, after.epochs)


@dataclass(frozen=True)
class StageDiff:
    """One stage's mixture on both sides; its name is none where a side has no such stage."""

    before: str | None
    after: str | None
    tokens_before: int | None
    tokens_after: int | None
    lines: tuple[Line, ...]

    @property
    def moved(self) -> Fraction:
        """Percentage points of the stage's tokens that move to another source: the total variation."""
        return sum((abs(line.points) for line in self.lines if line.kind == "source"), Fraction(0)) / 2

    def of(self, kind: Kind) -> list[Line]:
        """The lines of that kind."""
        return [line for line in self.lines if line.kind == kind]


@dataclass(frozen=True)
class KnockOn:
    """What a change in an earlier stage does to a later one, for one source or family."""

    stage: str
    kind: Kind
    name: str
    offset_before: int | None
    """Token offset in the source's stream at which the stage begins; none for a family."""
    offset_after: int | None
    epochs_run_before: float | None
    """From the run's beginning to the stage's end."""
    epochs_run_after: float | None


@dataclass(frozen=True)
class RecipeDiff:
    """One recipe on both sides."""

    name: str
    status: Literal["changed", "new", "removed"] = "changed"
    stages: tuple[StageDiff, ...] = ()
    """Those that take something else, themselves."""
    knock_on: tuple[KnockOn, ...] = ()
    limits: tuple[Limit, ...] = ()
    changes: tuple[Change, ...] = ()
    reordered: tuple[str, ...] = ()
    """Stages with the same shares, but whose samples come in another order because their sources do."""

    @property
    def changes_data(self) -> bool:
        """Whether other tokens are seen; not for another order of the same sources."""
        parts = self.status != "changed", self.stages, self.knock_on, any(change.data for change in self.changes)
        return any(map(bool, parts))

    @property
    def empty(self) -> bool:
        """Whether there is nothing to say."""
        return not (self.changes_data or self.limits or self.changes or self.reordered)


@dataclass(frozen=True)
class Problem:
    """A recipe that cannot be read on one side."""

    side: Literal["before", "after"]
    text: str


@dataclass(frozen=True)
class Diff:
    """Everything that differs between two sides."""

    before: str
    """What the first side is called."""
    after: str
    recipes: tuple[RecipeDiff, ...] = ()
    """Those that differ."""
    notes: tuple[str, ...] = ()
    """What was left out, and why."""
    problems: tuple[Problem, ...] = ()

    @property
    def changes_data(self) -> bool:
        """Whether other tokens are seen in some recipe."""
        return any(recipe.changes_data for recipe in self.recipes)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, exact shares as text; `docs/formats.md` lists the keys."""
        data: dict[str, Any] = _plain(asdict(self))
        data["changes_data"] = self.changes_data
        for recipe, plain in zip(self.recipes, data["recipes"], strict=True):
            plain["changes_data"] = recipe.changes_data
            for stage, plain_stage in zip(recipe.stages, plain["stages"], strict=True):
                plain_stage["moved"] = float(stage.moved)
                for line, plain_line in zip(stage.lines, plain_stage["lines"], strict=True):
                    plain_line["points"] = float(line.points)
        return data


def _plain(value: Any) -> Any:
    if isinstance(value, Fraction):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def diff_recipes(before: Recipe | None, after: Recipe | None) -> RecipeDiff:
    """Two states of one recipe; none where a side has no such recipe."""
    if after is None:
        assert before is not None
        return RecipeDiff(before.name, "removed")
    reordered: tuple[str, ...] = ()
    if before is not None:
        after, reordered = _in_order_of(before, after)
    was, now = (make_plan(before) if before else None), make_plan(after)
    stages = _stages(was, now)
    changed = tuple(stage for stage in stages if any(line.changed for line in stage.lines))
    return RecipeDiff(
        name=after.name, status="changed" if before else "new", stages=changed,
        knock_on=tuple(_knock_on(was, now)) if was else (),
        limits=(*crossed(was, now), *findings(lint(before) if before else [], lint(after))),
        changes=tuple(changes_between(before, after)) if before else (), reordered=reordered,
    )  # fmt: skip


def diff_stages(before: StagePlan | None, after: StagePlan | None) -> StageDiff:
    """Two stages, of one recipe or of two, or one stage on two sides."""
    families = _telling(before) | _telling(after)
    was, now = (_uses(before, families) if before else {}), (_uses(after, families) if after else {})
    names = before.name if before else None, after.name if after else None
    return StageDiff(*names, before.tokens if before else None, after.tokens if after else None, _lines(was, now))


def diff_mixtures(before: Mixture, after: Mixture) -> StageDiff:
    """Two mixtures without a recipe: shares only."""
    return StageDiff(None, None, None, None, _lines(_shares(before), _shares(after)))


_Uses = dict[tuple[Kind, str], tuple[str, Use]]
"""Domain and use, by kind and name."""


def _lines(before: _Uses, after: _Uses) -> tuple[Line, ...]:
    """Both sides' lines: domains first, then sources, then families; a side's own order where both have it."""
    nothing: tuple[str, Use | None] = ("", None)
    keys = sorted({**after, **before}, key=lambda key: ("domain", "source", "family").index(key[0]))
    both = [(key, before.get(key, nothing), after.get(key, nothing)) for key in keys]
    return tuple(Line(*key, now[0] or was[0], was[1], now[1]) for key, was, now in both)


def _shares(mixture: Mixture) -> _Uses:
    uses: _Uses = {("domain", name): (name, Use(domain.share)) for name, domain in mixture.domains.items()}
    for name, domain in mixture.domains.items():
        uses |= {("source", s): (name, Use(domain.share * share)) for s, share in domain.sources.items()}
    return uses


def _telling(stage: StagePlan | None) -> set[str]:
    """The families that come to more epochs than any of their sources: the others say nothing of their own."""
    runs = {use.name: use.epochs_run or 0 for use in stage.sources} if stage else {}
    families = stage.families if stage else ()
    return {family.name for family in families if family.epochs_run > max(runs[name] for name in family.sources)}


def _uses(stage: StagePlan, families: set[str]) -> _Uses:
    uses: _Uses = {}
    for name in dict.fromkeys(use.domain for use in stage.sources):
        inside = [use for use in stage.sources if use.domain == name]
        total = sum((use.share for use in inside), Fraction(0))
        uses["domain", name] = name, Use(total, sum(use.tokens for use in inside))
    sources = {use.name: use for use in stage.sources}
    for use in sources.values():
        figures = use.epochs, use.epochs_run, None if use.epochs_run is None else worth(use.epochs_run)
        uses["source", use.name] = use.domain, Use(use.share, use.tokens, *figures)
    for family in stage.families:
        if family.name in families:
            inside = [sources[name] for name in family.sources]
            share = sum((use.share for use in inside), Fraction(0))
            figures = family.epochs, family.epochs_run, worth(family.epochs_run)
            uses["family", family.name] = inside[0].domain, Use(share, family.tokens, *figures)
    return uses


def _by_name(plan: Plan | None) -> dict[str, StagePlan]:
    return {stage.name: stage for stage in plan.stages + plan.branches} if plan else {}


def _stages(before: Plan | None, after: Plan) -> Iterator[StageDiff]:
    was, now = _by_name(before), _by_name(after)
    for name in {**was, **now}:
        yield diff_stages(was.get(name), now.get(name))


def _in_order_of(before: Recipe, after: Recipe) -> tuple[Recipe, tuple[str, ...]]:
    """`after` with `before`'s order of sources where a stage's shares are the same, and the stages that it matters for.

    The order decides ties, and so the order of samples and the last sample: not the content. See `Interleave`.
    """
    old = {stage.name: stage.mixture for stage in before.stages + before.branches}
    reordered = []
    for stage in after.stages + after.branches:
        mixture = old.get(stage.name)
        if mixture and mixture.shares == stage.mixture.shares and list(mixture.shares) != list(stage.mixture.shares):
            after = after.with_mixture(stage.name, mixture)
            if _pattern(mixture) != _pattern(stage.mixture):
                reordered.append(stage.name)
    return after, tuple(reordered)


def _pattern(mixture: Mixture) -> list[str]:
    """The source of every sample of one period."""
    interleave, names = Interleave(mixture.shares), list(mixture.shares)
    return [names[i] for i in interleave.locate(np.arange(interleave.period))[0].tolist()]


def _knock_on(before: Plan, after: Plan) -> Iterator[KnockOn]:
    """Sources that start elsewhere in a stage, and families with another count, by more than rounding.

    Each stage before may end one sample of a source earlier or later with the same share: that is rounding.
    """
    was = _by_name(before)
    for number, stage in enumerate(after.stages + after.branches):
        if (old := was.get(stage.name)) is None:
            continue
        rounding, uses = number * stage.sequence_length, {use.name: use for use in old.sources}
        for use in stage.sources:
            if (same := uses.get(use.name)) and abs(use.offset - same.offset) > rounding:
                runs = same.epochs_run, use.epochs_run
                yield KnockOn(stage.name, "source", use.name, same.offset, use.offset, *runs)
        families, telling = {family.name: family for family in old.families}, _telling(old) | _telling(stage)
        for family in stage.families:
            if family.name in telling and (earlier := families.get(family.name)):
                begins = [f.unique_tokens * (f.epochs_run - f.epochs) for f in (earlier, family)]
                if abs(begins[1] - begins[0]) > 2 * rounding + 1:
                    runs = earlier.epochs_run, family.epochs_run
                    yield KnockOn(stage.name, "family", family.name, None, None, *runs)
