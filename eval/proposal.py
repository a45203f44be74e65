"""The proposal: a stage's scorecards and the recipe -> the next stage's mixture with its evidence.

`eval/feedback.py` has the rules, `eval/soundness.py` what is refused, `eval/proposal_text.py` what people read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from eval.feedback import (
    PARTS,
    Advice,
    Cap,
    Past,
    Situation,
    advise,
    distance,
    repetition_cap,
    rounded,
    total_variation,
)
from eval.policy import Policy
from eval.proposal_text import markdown, show_proposal, yaml_text
from eval.scorecard import Score, Scorecard
from eval.soundness import check_cards, choose, find_scorecards, neighbours, refuse_trained
from recipes.data.interleave import MAX_PERIOD
from recipes.errors import UserError
from recipes.files import write_atomic
from recipes.loader import load_mixture
from recipes.plan import Plan, make_plan
from recipes.recipe import Domain, Mixture, Recipe, Stage

__all__ = ["DomainLine", "Proposal", "find_scorecards", "propose", "show_proposal", "write"]


@dataclass(frozen=True)
class DomainLine:
    """What is proposed for one domain."""

    name: str
    before: Fraction
    """Share of the stage just trained; 0 if it had none of it."""
    proposed: Fraction
    pull: float
    """0 to 1: the mean deficit of its benchmarks."""
    bound_by: str
    """The last rule that changed its share; `none` where only the scores did."""
    benchmarks: tuple[str, ...]
    """That speak about it."""
    cap: Cap
    """What repetition allows."""


@dataclass(frozen=True)
class Proposal:
    """The next mixture as the policy would have it, with its evidence."""

    recipe: Recipe
    after: str
    stage: str
    """The one it is for."""
    before: Mixture
    """Of the stage just trained."""
    existing: Mixture
    """The next stage's own."""
    mixture: Mixture
    """The proposed one."""
    domains: tuple[DomainLine, ...]
    advice: Advice
    tau: float
    tokens: int
    """Of the next stage."""
    not_moved: tuple[str, ...]
    warnings: tuple[str, ...]
    cards: tuple[Scorecard, ...]
    """The stage's own, then the previous stage's if there is one."""
    policy: Policy

    @property
    def tv(self) -> float:
        """Total variation between the stage just trained and the proposal: the part of the tokens that moves."""
        return total_variation({d.name: d.before for d in self.domains}, {d.name: d.proposed for d in self.domains})


def propose(
    recipe: Recipe, after: str, cards: Sequence[Scorecard], policy: Policy, *, task_file: str | None = None,
    runs: Iterable[Path] = (),
) -> Proposal:  # fmt: skip
    """What the policy makes of the scores after stage `after` for the stage that follows.

    Args:
        cards: scorecards of the recipe; those of `after` and of the stage before it are used.
        task_file: hash of the tasks as they are now; scores of other tasks are refused.
        runs: run folders; the next stage must not have begun in one of this recipe.

    Raises:
        UserError: there is no next stage, or it has been trained; scorecards that do not belong together or here,
            that lack benchmarks, or whose limit of items hides what is asked.
    """
    now, following, previous = neighbours(recipe, after)
    refuse_trained(recipe, following.name, runs)
    used, told = choose(recipe, now, previous, cards, policy)
    check_cards(used, policy, task_file)
    past = Past(scores_of(used[1], policy), previous.mixture) if previous and len(used) > 1 else None
    plan = make_plan(recipe)
    s = situation(recipe, plan, policy, now, following, scores_of(used[0], policy), past)
    advice = advise(policy, s)
    mixture, rounding = mixture_of(advice.shares, following.mixture)
    changed = make_plan(recipe.with_mixture(following.name, mixture))
    return Proposal(
        recipe=recipe, after=after, stage=following.name, before=now.mixture, existing=following.mixture,
        mixture=mixture, domains=tuple(_lines(policy, s, advice, mixture)), advice=advice, tau=s.tau,
        tokens=plan.stage(following.name).tokens, not_moved=tuple(_not_moved(policy, s, advice)),
        warnings=(*told, *rounding, *_repetition_warnings(policy, s, changed, following.name)),
        cards=tuple(used), policy=policy,
    )  # fmt: skip


def scores_of(card: Scorecard, policy: Policy) -> dict[str, Score]:
    """The scores that the policy counts, in its metrics."""
    return {name: card.benchmarks[name].scores[goal.metric] for name, goal in policy.benchmarks.items()}


def situation(
    recipe: Recipe, plan: Plan, policy: Policy, now: Stage, following: Stage, scores: dict[str, Score],
    past: Past | None,
) -> Situation:  # fmt: skip
    """What the rules look at between two stages.

    Raises:
        UserError: the next stage has nothing of the policy's web domain.
    """
    if policy.web not in following.mixture.domains:
        fix = "name in the policy's `web` a domain that every stage has"
        raise UserError(f"{following.name} has no domain '{policy.web}'", fix, following.mixture_file)
    tau = policy.step_decay if is_decay(following) else policy.step_stable
    caps = domain_caps(recipe, plan, policy, now, following)
    return Situation(scores, now.mixture, following.mixture, caps, tau, past)


def is_decay(stage: Stage) -> bool:
    """Whether the learning rate decays in more than half of the stage."""
    return 2 * stage.schedule.decay_start_step < stage.start_step + stage.end_step


def domain_caps(recipe: Recipe, plan: Plan, policy: Policy, now: Stage, following: Stage) -> dict[str, Cap]:
    """By domain of the next stage, the share at which its sources would have been read as often as they may be."""
    names = [stage.name for stage in recipe.stages]
    consumed: dict[str, int] = {}
    for stage in plan.stages[: names.index(now.name) + 1]:
        for use in stage.sources:
            consumed[use.name] = consumed.get(use.name, 0) + use.tokens
    later = names[names.index(following.name) + 1 :]
    kept = {n: r for n, r in policy.repetition.reserves.items() if r.until in later}
    reserved = {name: math.floor(reserve.tokens * recipe.scale) for name, reserve in kept.items()}
    tokens = plan.stage(following.name).tokens
    return {
        name: repetition_cap(policy.repetition, recipe.sources, domain.sources, consumed, reserved, tokens)
        for name, domain in following.mixture.domains.items()
    }


def mixture_of(shares: dict[str, Fraction], existing: Mixture) -> tuple[Mixture, list[str]]:
    """The mixture with these domain shares and the existing one's shares inside each domain, in its order.

    Where the pattern of shares would repeat too late to be laid out, the shares inside are rounded; and a word on it.
    """
    order = [name for name in existing.domains if name in shares]
    mixture = Mixture(domains={g: Domain(share=shares[g], sources=existing.domains[g].sources) for g in order})
    period = math.lcm(*(share.denominator for share in mixture.shares.values()))
    if period <= MAX_PERIOD:
        return mixture, []
    whole = rounded({g: float(shares[g]) for g in order}, {}, order[0], 0)
    domains = {g: Domain(share=whole[g], sources=coarse(existing.domains[g].sources)) for g in order if g in whole}
    said = (
        f"shares, also inside the domains, are rounded to 1/{PARTS:,}: exact ones repeat only after {period:,} samples"
    )
    return Mixture(domains=domains), [said]


def coarse(sources: dict[str, Fraction]) -> dict[str, Fraction]:
    """Shares in multiples of one part in `PARTS` that sum to exactly 1; none of them becomes 0."""
    parts = {name: max(1, math.floor(share * PARTS)) for name, share in sources.items()}
    largest = max(parts, key=lambda name: parts[name])
    parts[largest] += PARTS - sum(parts.values())
    return {name: Fraction(n, PARTS) for name, n in parts.items()}


def _lines(policy: Policy, s: Situation, advice: Advice, mixture: Mixture) -> Iterable[DomainLine]:
    for name, pull in advice.pull.items():
        before, proposed = (m.domains[name].share if name in m.domains else Fraction(0) for m in (s.mixture, mixture))
        cap = s.caps.get(name, Cap(0.0, {}, ()))
        yield DomainLine(name, before, proposed, pull, advice.bound_by[name], tuple(policy.of(name)), cap)


def _not_moved(policy: Policy, s: Situation, advice: Advice) -> Iterable[str]:
    """What the scores did not move, and why."""
    for name, pull in advice.pull.items():
        now = s.mixture.domains[name].share if name in s.mixture.domains else 0
        if pull and advice.shares.get(name, 0) <= now:
            rule = advice.bound_by[name]
            why = "others are pulled harder" if rule in ("none", "overflow", "step (τ)") else f"bound by: {rule}"
            yield f"{name}: pulled by {pull:.3f}, yet not raised: {why}"
        elif not policy.of(name):
            yield f"{name}: no benchmark speaks about it; its share follows from the others'"
        elif not pull:
            yield f"{name}: no benchmark of it is {policy.noise:g} standard errors or more from its target"
    for e in advice.evidence:
        if not e.deficit and distance(e.score, e.goal) > 0:
            yield f"{e.name}: {distance(e.score, e.goal):.3g} from its target, {e.z:.1f} standard errors: noise"
    for source, why in advice.stalled.items():
        yield f"{source}: was raised, and its benchmarks did not gain ({why}); {_instead(source, policy, s)}"
    for name in advice.regressed:
        moved = next(e.moved for e in advice.evidence if e.name == name)
        yield f"{name}: fell (z {moved:+.1f}) while other domains were raised: half the step"
    yield "sources inside the domains: scores do not say which source, ablations do"


def _instead(source: str, policy: Policy, s: Situation) -> str:
    """What becomes of a source that was raised without effect."""
    domain = next((name for name, d in s.following.domains.items() if source in d.sources), None)
    if domain is None:
        return "the next stage has none of it"
    held = f"{domain} takes what others leave all the same" if domain == policy.web else "it is not raised again"
    return f"{held}: run an ablation, or bring a new source"


def _repetition_warnings(policy: Policy, s: Situation, plan: Plan, stage: str) -> Iterable[str]:
    """Sources and families that the proposal would read too often, and those whose size nobody knows."""
    most = policy.repetition.epochs
    uses, families = plan.stage(stage).sources, plan.stage(stage).families
    for use in uses:
        if use.epochs_run is not None and use.epochs_run > most:
            why = f"the cap holds for all of {use.domain}, whose split is {stage}'s own"
            yield f"{use.name} would come to {use.epochs_run:.2f} epochs, above {most:g}: {why}"
    for family in families:
        alone = max(use.epochs_run or 0 for use in uses if use.name in family.sources)
        if family.epochs_run > max(most, alone):
            yield f"the family {family.name} would come to {family.epochs_run:.2f} epochs, above {most:g}"
    for domain, cap in s.caps.items():
        if cap.unknown:
            rest = "the cap counts the others" if cap.room else "no cap"
            yield f"{domain}: size not known of {', '.join(cap.unknown)}: {rest}"


def write(proposal: Proposal, folder: Path, diff_markdown: str = "") -> tuple[Path, Path]:
    """Writes `<folder>/<stage>.yaml`, a valid mixture file, and `<stage>.md`, its reasons; returns both paths.

    Args:
        diff_markdown: the diff between the stage's own mixture and the proposal, source by source.
    """
    mixture, reasons = folder / f"{proposal.stage}.yaml", folder / f"{proposal.stage}.md"
    write_atomic(mixture, yaml_text(proposal))
    written = load_mixture(mixture, proposal.recipe.sources)
    assert written == proposal.mixture, "the file is not what was proposed"
    write_atomic(reasons, markdown(proposal, diff_markdown))
    return mixture, reasons
