"""Limits that one side of a diff crosses and the other does not, and what lint says of one side only."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from recipes.lint import Finding
from recipes.plan import REPETITION_LIMIT, Plan


@dataclass(frozen=True)
class Limit:
    """A limit crossed, or something that lint says on one side only."""

    kind: Literal["error", "warning", "gone"]
    """gone: it no longer holds."""
    text: str


def crossed(before: Plan | None, after: Plan) -> Iterator[Limit]:
    """The sources and families that pass the repetition limit over the run, or come back below it."""
    was, now = (_highest(before) if before else {}), _highest(after)
    several = {f"the family {name}" for plan in (before, after) if plan for name in _families(plan)}
    for what in {**was, **now}:
        if what.startswith("the family ") and what not in several:
            continue  # its one source says the same
        (old, _), (new, stage) = was.get(what, (0.0, "")), now.get(what, (0.0, ""))
        figures = f"{what}: {old:.2f} → {new:.2f} epochs over the run"
        if old <= REPETITION_LIMIT < new:
            yield Limit("warning", f"{figures}, now above {REPETITION_LIMIT} (from {stage} on)")
        elif old > REPETITION_LIMIT and round(new, 2) > round(old, 2):
            yield Limit("warning", f"{figures}, further above {REPETITION_LIMIT}")
        elif new <= REPETITION_LIMIT < old:
            yield Limit("gone", f"{figures}, back below {REPETITION_LIMIT}")


def _families(plan: Plan) -> set[str]:
    """The families of which several sources are read."""
    members: dict[str, set[str]] = {}
    for family in (family for stage in plan.stages + plan.branches for family in stage.families):
        members.setdefault(family.name, set()).update(family.sources)
    return {name for name, sources in members.items() if len(sources) > 1}


def _highest(plan: Plan) -> dict[str, tuple[float, str]]:
    """By source and by family: the most epochs over the run, and the stage that passes the limit."""
    counts: dict[str, list[tuple[float, str]]] = {}
    for stage in plan.stages + plan.branches:
        for use in stage.sources:
            if use.epochs_run is not None:
                counts.setdefault(use.name, []).append((use.epochs_run, stage.name))
        for family in stage.families:
            counts.setdefault(f"the family {family.name}", []).append((family.epochs_run, stage.name))
    over = {what: [stage for epochs, stage in seen if epochs > REPETITION_LIMIT] for what, seen in counts.items()}
    return {what: (max(seen)[0], over[what][0] if over[what] else "") for what, seen in counts.items()}


def findings(before: list[Finding], after: list[Finding]) -> Iterator[Limit]:
    """What lint says on one side only, whatever the numbers in it; repetition is `crossed`'s."""
    if any(finding.level == "error" for finding in before + after):  # lint stops at errors: its warnings say nothing
        before, after = ([f for f in found if f.level == "error"] for found in (before, after))
    was, now = _told(before), _told(after)
    for key in [key for key in now if key not in was]:
        yield Limit(now[key].level, f"new: {now[key].text}")
    for key in [key for key in was if key not in now]:
        yield Limit("gone", f"gone: {was[key].text}")


def _told(findings: list[Finding]) -> dict[str, Finding]:
    numbers = re.compile(r"(?<![\w.-])\d[\d.,e-]*")
    told = (f for f in findings if not f.text.endswith(f"above {REPETITION_LIMIT} epochs"))
    return {f.level + numbers.sub("#", f.text): f for f in told}
