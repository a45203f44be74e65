"""The policy against the one published run: what it would have proposed after stages 1, 2 and 3, and what was done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from eval.feedback import Advice, Cap, Past, Situation, advise, total_variation
from eval.policy import Policy
from eval.proposal import situation
from eval.published import Published, load_published
from eval.scorecard import Score
from recipes.errors import UserError
from recipes.plan import make_plan
from recipes.recipe import Recipe

VARIANTS = ("policy", "no change", "caps only", "no caps", "families once")
CAVEATS = (
    "Three stages of one run: a small test. Chance could do it, and no other published run has scores by stage.",
    "Parameters chosen with hindsight: the targets, K and the reserve were set knowing these mixtures.",
    "Scores are before the decay, their errors binomial (ARC's from the average of its parts); synthetic has none.",
    "The sources each stage may use, and so the caps, are those that the authors chose for it.",
)


@dataclass(frozen=True)
class Replay:
    """One published stage's scores, what the policy makes of them, and the mixture that followed."""

    after: str
    stage: str
    before: dict[str, Fraction]
    """Domain shares of the stage that the scores are of."""
    advice: Advice
    published: dict[str, Fraction]
    """Domain shares of the stage that followed."""
    variations: dict[str, float]
    """By variant, total variation from the published mixture."""
    missing: tuple[str, ...]
    """Benchmarks of the policy that were not published."""

    @property
    def directions(self) -> dict[str, bool]:
        """By domain that the published run moved, whether the policy moves it the same way."""
        names = dict.fromkeys([*self.before, *self.published])
        theirs = {g: self.published.get(g, Fraction(0)) - self.before.get(g, Fraction(0)) for g in names}
        ours = {g: self.advice.shares.get(g, Fraction(0)) - self.before.get(g, Fraction(0)) for g in names}
        return {g: theirs[g] * ours[g] > 0 for g in names if theirs[g]}


def backtest(recipe: Recipe, policy: Policy, published: Sequence[Published] | None = None) -> list[Replay]:
    """Applies the policy after each published stage but the last.

    Args:
        recipe: with the published mixtures, normally smollm2-1.7b.
        published: scores by stage; eval/published.yaml if none.

    Raises:
        UserError: the recipe's stages are not those that scores were published of.
    """
    found = load_published() if published is None else published
    scores = {p.stage: p.scores for p in found if p.stage is not None}
    names = [stage.name for stage in recipe.stages]
    if len(names) < 2 or any(name not in scores for name in names):
        fix = f"name a recipe with the stages {', '.join(scores)}, such as smollm2-1.7b"
        raise UserError(f"{recipe.name} has other stages than the published run", fix)
    return [_replay(recipe, policy, scores, i) for i in range(len(names) - 1)]


def _replay(recipe: Recipe, policy: Policy, scores: dict[str, dict[str, Score]], i: int) -> Replay:
    now, following = recipe.stages[i], recipe.stages[i + 1]
    known = policy.only(scores[now.name])
    past = Past(scores[recipe.stages[i - 1].name], recipe.stages[i - 1].mixture) if i else None
    plan = make_plan(recipe)

    def of(policy: Policy) -> Situation:
        return situation(recipe, plan, policy, now, following, scores[now.name], past)

    once = known.model_copy(update={"repetition": known.repetition.model_copy(update={"families": "once"})})
    advice = advise(known, of(known))
    theirs = {g: d.share for g, d in following.mixture.domains.items()}
    before = {g: d.share for g, d in now.mixture.domains.items()}
    shares = {
        "policy": advice.shares,
        "no change": before,
        "caps only": advise(known, _without_pull(of(known), known)).shares,
        "no caps": advise(known, _without_caps(of(known))).shares,
        "families once": advise(once, of(once)).shares,
    }
    variations = {name: total_variation(x, theirs) for name, x in shares.items()}
    missing = tuple(name for name in policy.benchmarks if name not in known.benchmarks)
    return Replay(now.name, following.name, before, advice, theirs, variations, missing)


def _without_pull(s: Situation, policy: Policy) -> Situation:
    """Every score at its target."""
    at_target = {name: Score(goal.target, 0.0, 1) for name, goal in policy.benchmarks.items()}
    return Situation(at_target, s.mixture, s.following, s.caps, s.tau)


def _without_caps(s: Situation) -> Situation:
    caps = {g: Cap(None, {}, ()) for g in s.caps}
    return Situation(s.scores, s.mixture, s.following, caps, s.tau, s.past)


def show_backtest(replays: Sequence[Replay], console: Console) -> None:
    """Prints, per stage, proposed against published shares and the total variations, and the caveats."""
    console.print(shares_table(replays))
    console.print(variations_table(replays))
    right = [same for replay in replays for same in replay.directions.values()]
    console.print(f"directions of the published changes: {sum(right)} of {len(right)} right", highlight=False)
    if missing := dict.fromkeys(name for replay in replays for name in replay.missing):
        console.print(f"not published by stage, so left out: {', '.join(missing)}", highlight=False)
    for text in CAVEATS:
        console.print(f"[yellow]caveat:[/] {text}", highlight=False, soft_wrap=True)


def shares_table(replays: Sequence[Replay]) -> Table:
    """A line a domain and stage: before, proposed, published, and what bound the proposal."""
    table = _table("back-test: shares in %")
    for name in ("stage", "domain", "before", "proposed", "published", "differs", "direction"):
        table.add_column(name, justify="left" if name in ("stage", "domain") else "right", no_wrap=True)
    table.add_column("bound by", no_wrap=True)
    for replay in replays:
        for i, domain in enumerate(dict.fromkeys([*replay.before, *replay.published])):
            before, ours, theirs = (
                x.get(domain, Fraction(0)) for x in (replay.before, replay.advice.shares, replay.published)
            )
            same = replay.directions.get(domain)
            shares = f"{float(100 * before):.1f}", f"{float(100 * ours):.1f}", f"{float(100 * theirs):.1f}"
            verdict = "–" if same is None else "right" if same else "wrong"
            last = f"{float(100 * (ours - theirs)):+.1f}", verdict, replay.advice.bound_by[domain]
            table.add_row(f"{replay.after} → {replay.stage}" if i == 0 else "", domain, *shares, *last)
        table.add_section()
    return table


def variations_table(replays: Sequence[Replay]) -> Table:
    """Total variation from the published mixture, in points, by stage and variant."""
    table = _table("total variation from what was published, in points")
    table.add_column("stage", no_wrap=True)
    for name in VARIANTS:
        table.add_column(name, justify="right", no_wrap=True)
    for replay in replays:
        table.add_row(f"after {replay.after}", *(f"{100 * replay.variations[name]:.1f}" for name in VARIANTS))
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
