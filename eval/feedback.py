"""Scores -> the next mixture: the policy's rules, each a small pure function. Neither torch nor files.

Scores decide how much per domain, ablations decide which source, a person approves. `eval/policy.yaml` holds what is
fixed before the run; docs/formats.md says what its keys mean. Shares are parts of a stage's tokens, scores as in a
scorecard: percent, or bits a byte.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from eval.policy import POLICY, Goal, Policy, Repetition, load_policy
from eval.scorecard import Score, z_of
from recipes.recipe import Mixture, Source

__all__ = ["POLICY", "Advice", "Policy", "Situation", "advise", "load_policy"]

Shares = dict[str, float]
PARTS = 1000
"""A proposed share is a multiple of one part in so many: 0.1 points, far below what scores can tell."""


# ------------------------------------------------------------------ rules 1 and 2: what the scores pull at
@dataclass(frozen=True)
class Evidence:
    """What one benchmark says."""

    name: str
    goal: Goal
    score: Score
    deficit: float
    """Part of the way from chance to the target that is missing, 0 to 1; 0 within the noise."""
    z: float
    """Distance to the target in standard errors; negative where it is passed."""
    moved: float | None
    """Standard errors of the difference by which it got better since the previous stage; none without its score."""


def distance(score: Score, goal: Goal) -> float:
    """How far the score is from the target, in the metric's unit; negative where it is passed."""
    return goal.sign * (goal.target - score.value)


def z_to_target(score: Score, goal: Goal) -> float:
    """The distance to the target in the score's standard errors."""
    far = distance(score, goal)
    return far / score.stderr if score.stderr else math.copysign(math.inf, far) if far else 0.0


def deficit(score: Score, goal: Goal, noise: float) -> float:
    """Rule 1: clip((T − a)/(T − chance), 0, 1), and 0 within `noise` standard errors of the target."""
    if z_to_target(score, goal) < noise:
        return 0.0
    return min(1.0, max(0.0, (goal.target - score.value) / (goal.target - goal.chance)))


def weigh(policy: Policy, scores: Mapping[str, Score], before: Mapping[str, Score]) -> list[Evidence]:
    """Every benchmark's evidence, in the policy's order; `before` are the previous stage's scores."""
    found = []
    for name, goal in policy.benchmarks.items():
        score = scores[name]
        moved = goal.sign * z_of(score, before[name]) if name in before else None
        found.append(Evidence(name, goal, score, deficit(score, goal, policy.noise), z_to_target(score, goal), moved))
    return found


def pulls(evidence: Iterable[Evidence], domains: Iterable[str]) -> dict[str, float]:
    """Rule 2: u_g = Σ v A d / Σ v A over the benchmarks; 0 for a domain that none speaks about."""
    evidence = list(evidence)

    def pull(domain: str) -> float:
        said = [(e.goal.weight * e.goal.domains[domain], e.deficit) for e in evidence if domain in e.goal.domains]
        return math.fsum(w * d for w, d in said) / math.fsum(w for w, _ in said) if said else 0.0

    return {domain: pull(domain) for domain in domains}


# ------------------------------------------------------------------ rule 3: one step of limited size
def total_variation(a: Mapping[str, float | Fraction], b: Mapping[str, float | Fraction]) -> float:
    """Half the sum of the absolute differences: the part of the tokens that goes elsewhere."""
    return math.fsum(abs(float(a.get(g, 0)) - float(b.get(g, 0))) for g in {*a, *b}) / 2


def start_shares(shares: Shares, allowed: Iterable[str], floor: float) -> Shares:
    """max(w, floor) for the domains of which the next stage allows a source, w for the others."""
    allowed = list(allowed)
    lifted = {g: max(shares.get(g, 0.0), floor) for g in allowed}
    return {g: lifted.get(g, shares.get(g, 0.0)) for g in dict.fromkeys([*shares, *allowed])}


def tilt(start: Shares, pull: Mapping[str, float], eta: float) -> Shares:
    """x_g ∝ start_g · exp(η u_g), summing to 1."""
    raw = {g: share * math.exp(eta * pull[g]) for g, share in start.items()}
    total = math.fsum(raw.values())
    return {g: share / total for g, share in raw.items()}


def step(shares: Shares, start: Shares, pull: Mapping[str, float], tau: float, eta_most: float) -> tuple[float, Shares]:
    """Rule 3: the largest η ≤ `eta_most` that moves at most `tau` (total variation) from `shares`, and its shares."""
    low, high = 0.0, eta_most
    if total_variation(tilt(start, pull, high), shares) <= tau:
        return high, tilt(start, pull, high)
    for _ in range(60):
        middle = (low + high) / 2
        inside = total_variation(tilt(start, pull, middle), shares) <= tau
        low, high = (middle, high) if inside else (low, middle)
    return low, tilt(start, pull, low)


# ------------------------------------------------------------------ rule 4: repetition, and enough web
@dataclass(frozen=True)
class Cap:
    """The largest share of a domain that repetition allows."""

    limit: float | None
    """None where no source's size is known."""
    room: dict[str, int]
    """Tokens left, by source or family of known size."""
    unknown: tuple[str, ...]
    """Sources of unknown size: they put no cap and add none."""
    kept: dict[str, int] = field(default_factory=dict)
    """Tokens that later stages are to have, by source or family; not in `room`."""


def repetition_cap(
    rule: Repetition, sources: Mapping[str, Source], allowed: Iterable[str], consumed: Mapping[str, int],
    reserved: Mapping[str, int], tokens: int,
) -> Cap:  # fmt: skip
    """Rule 4: Σ max(0, K·U − consumed − reserve)/tokens over a domain's sources; those of a family count together.

    Args:
        consumed: tokens by source from the run's beginning.
        reserved: tokens by source or family that later stages are to have.
        tokens: of the next stage.
    """
    groups: dict[str, list[str]] = {}
    for name in allowed:
        groups.setdefault(sources[name].family or name, []).append(name)
    room: dict[str, int] = {}
    unknown: list[str] = []
    held: dict[str, int] = {}
    for group, listed in groups.items():
        family = [name for name, source in sources.items() if source.family == group]
        counted = [listed, family] if family and rule.families == "once" else [listed]
        kept = sum(reserved.get(name, 0) for name in {group, *listed})
        left = []
        for members in counted:
            if unique := max(sources[name].tokens or 0 for name in members):
                used = sum(consumed.get(name, 0) for name in members)
                left.append(max(0, math.floor(rule.epochs * unique) - used - kept))
        if left:
            room["+".join(listed)] = min(left)
            held |= {"+".join(listed): kept} if kept else {}
        else:
            unknown += listed
    return Cap(sum(room.values()) / tokens if room else None, room, tuple(unknown), held)


def overflow(shares: Shares, limits: Mapping[str, float], web: str) -> Shares:
    """Shares above their limit come down to it; what is left over goes to web, which has no limit."""
    held = {g: min(share, limits.get(g, math.inf)) for g, share in shares.items() if g != web}
    return {g: held.get(g, 1 - math.fsum(held.values())) for g in shares}


def keep_web(shares: Shares, web: str, least: float) -> Shares:
    """Web at `least` or more; the others give in proportion to their shares."""
    if shares[web] >= least:
        return shares
    factor = (1 - least) / (1 - shares[web])
    return {g: least if g == web else share * factor for g, share in shares.items()}


# ------------------------------------------------------------------ rules 5 and 6: what the last step has shown
@dataclass(frozen=True)
class Past:
    """The stage before the one that was just trained."""

    scores: dict[str, Score]
    mixture: Mixture


def stalled(policy: Policy, evidence: Iterable[Evidence], before: Mixture, now: Mixture) -> dict[str, str]:
    """Rule 5: sources whose share was raised while none of their domain's benchmarks gained, and what those did.

    A benchmark that got worse has not gained either. Empty for domains that no benchmark speaks about.
    """
    moved = {e.name: e.moved for e in evidence}
    found: dict[str, str] = {}
    for domain, part in now.domains.items():
        about = {name: moved[name] or 0.0 for name in policy.of(domain) if moved.get(name) is not None}
        if about and all(z < policy.noise for z in about.values()):
            raised = [s for s in part.sources if now.shares[s] > before.shares.get(s, 0)]
            found |= dict.fromkeys(raised, ", ".join(f"{name} z {z:+.1f}" for name, z in about.items()))
    return found


def stall_limits(names: Iterable[str], now: Mixture, following: Mixture) -> Shares:
    """The largest share of each domain that raises none of its stalled sources; never below what it has now."""
    limits: Shares = {}
    for domain, part in following.domains.items():
        has = float(now.domains[domain].share) if domain in now.domains else 0.0
        held = [float(now.shares[s] / part.sources[s]) for s in names if s in part.sources]
        if held:
            limits[domain] = max(has, min(held))
    return limits


def regressed(policy: Policy, evidence: Iterable[Evidence], before: Mixture, now: Mixture) -> list[str]:
    """Rule 6: benchmarks that fell although none of their domains was raised, while another one was."""
    raised = {g for g, d in now.domains.items() if g not in before.domains or d.share > before.domains[g].share}
    fell = [e for e in evidence if e.moved is not None and e.moved < -policy.noise]
    return [e.name for e in fell if raised and not raised & set(e.goal.domains)]


def half(shares: Shares, moved: Shares) -> Shares:
    """The middle between two mixtures."""
    return {g: (shares.get(g, 0.0) + x) / 2 for g, x in moved.items()}


# ------------------------------------------------------------------ all together
@dataclass(frozen=True)
class Situation:
    """What the rules look at."""

    scores: dict[str, Score]
    mixture: Mixture
    """That the stage was trained with."""
    following: Mixture
    """The next stage's own: which sources it allows, and in what order."""
    caps: dict[str, Cap]
    tau: float
    past: Past | None = None


@dataclass(frozen=True)
class Advice:
    """What the rules make of it."""

    shares: dict[str, Fraction]
    pull: dict[str, float]
    bound_by: dict[str, str]
    """By domain the last rule that changed its share; `none` where only the scores did."""
    eta: float
    evidence: tuple[Evidence, ...]
    stalled: dict[str, str] = field(default_factory=dict)
    regressed: tuple[str, ...] = ()
    overflow: float = 0.0
    """Share that went to web because a limit stopped the others."""


def advise(policy: Policy, s: Situation) -> Advice:
    """Applies the rules in turn: deficits, pulls, the step, half of it, the stall, the caps, enough web, rounding."""
    now = {g: float(d.share) for g, d in s.mixture.domains.items()}
    evidence = weigh(policy, s.scores, s.past.scores if s.past else {})
    before = s.past.mixture if s.past else s.mixture
    stall, fell = stalled(policy, evidence, before, s.mixture), regressed(policy, evidence, before, s.mixture)
    start = start_shares(now, s.following.domains, policy.floor)
    pull = pulls(evidence, start)
    bound = {g: "floor" if start[g] > now.get(g, 0.0) else "none" for g in start}
    eta, stepped = step(now, start, pull, s.tau, policy.eta)
    bound |= _changed(tilt(start, pull, policy.eta), stepped, "step (τ)")
    halved = half(now, stepped) if fell else stepped
    bound |= _changed(stepped, halved, "regression")
    unstalled = overflow(halved, stall_limits(stall, s.mixture, s.following), policy.web)
    limits = {g: 0.0 for g in start if g not in s.following.domains}
    limits |= {g: cap.limit for g, cap in s.caps.items() if cap.limit is not None}
    capped = overflow(unstalled, limits, policy.web)
    bound |= _changed(halved, unstalled, "stall") | _changed(unstalled, capped, "cap")
    spilled = capped[policy.web] - halved[policy.web]
    if spilled > 1e-12:
        bound[policy.web] = "overflow"
    x = keep_web(capped, policy.web, policy.web_least)
    bound |= _changed(capped, x, f"web ≥ {policy.web_least:.2f}")
    exact = {g: d.share for g, d in s.mixture.domains.items()}
    shares = rounded(x, limits, policy.web, policy.web_least) if _changed(now, x, "") else exact
    return Advice(shares, pull, bound, eta, tuple(evidence), stall, tuple(fell), spilled)


def _changed(before: Shares, after: Shares, rule: str) -> dict[str, str]:
    """`rule` for each domain whose share it changed."""
    return {g: rule for g, share in after.items() if abs(share - before.get(g, 0.0)) > 1e-9}


def rounded(
    shares: Shares, limits: Mapping[str, float], web: str, least: float, parts: int = PARTS
) -> dict[str, Fraction]:
    """Multiples of 1/parts that sum to exactly 1, by the largest remainders; above no limit, and web not below `least`.

    A domain that comes to nothing is left out.
    """
    whole = {g: math.floor(Fraction(share) * parts) for g, share in shares.items()}
    left = parts - sum(whole.values())
    if (missing := min(left, math.ceil(Fraction(str(least)) * parts) - whole[web])) > 0:
        whole[web] += missing
        left -= missing
    by_remainder = sorted(shares, key=lambda g: (whole[g] - Fraction(shares[g]) * parts, g))
    free = [g for g in by_remainder if g == web or Fraction(whole[g] + 1, parts) <= limits.get(g, math.inf)]
    for g in free[:left]:
        whole[g] += 1
    whole[web] += parts - sum(whole.values())
    return {g: Fraction(n, parts) for g, n in whole.items() if n}
