"""What the rehearsal does between two stages: evaluate the checkpoint, propose the next mixture, perhaps adopt it."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

from rich.console import Console

from eval.feedback import Policy, load_policy
from eval.harness import Options, devices, evaluate, subject_of
from eval.proposal import propose, write
from eval.scorecard import Scorecard, scorecards
from eval.suite import load_suite
from recipes.diff.show import mixture_diff_markdown
from recipes.files import append_line
from recipes.plan import Plan, StagePlan
from recipes.run import Run

SUITE = "rehearsal"
SHARE_PARTS = 10_000
"""A static mixture's shares are multiples of one part in so many."""


def policy() -> Policy:
    """The rehearsal's targets and affinities."""
    return load_policy(Path(__file__).resolve().parent.parent / "eval" / "policy-rehearsal.yaml")


def evaluate_stage(run: Run, stage: StagePlan, console: Console) -> Scorecard:
    """Evaluates the stage's last checkpoint on the run's own benchmarks; what has a result is not run again."""
    subject = subject_of(run.checkpoints(stage.name) / str(stage.end_step))
    card = evaluate(subject, load_suite(SUITE), options(run), console)
    assert card is not None
    return card


def options(run: Run) -> Options:
    """Data, devices and the folder of the scorecards."""
    return Options(data_root=run.folder / "eval" / "data", devices=devices(), scores=scores_folder(run))


def scores_folder(run: Run) -> Path:
    """The run's scorecards."""
    return run.folder / "eval" / "scores"


def propose_next(run: Run, after: StagePlan, console: Console, *, adopt: bool) -> Run:
    """Writes the proposal for the stage after `after`; with `adopt` the run goes on with it. Returns the run."""
    names = [stage.name for stage in run.plan.stages]
    number = names.index(after.name) + 1
    if number == len(names):
        return run
    following = names[number]
    mixture = run.folder / "proposals" / f"{following}.yaml"
    if run.has_begun(following) and mixture.exists():
        return run
    cards = [card for card in scorecards(scores_folder(run)) if card.step <= after.end_step]
    proposal = propose(run.recipe, after.name, cards, policy())
    mixture, _ = write(proposal, mixture.parent, mixture_diff_markdown(run.recipe, following, proposal.mixture))
    shares = ", ".join(f"{d.name} {float(d.before):.1%} → {float(d.proposed):.1%}" for d in proposal.domains)
    console.print(f"  proposed for {following}: {shares}", highlight=False, soft_wrap=True)
    if not adopt:
        return run
    append_line(run.folder / "events.jsonl", {"event": "adopted", "stage": following, "mixture": shares}, sync=True)
    return run.adopt(following, mixture)


def static_mixture(plan: Plan) -> dict[str, dict[str, object]]:
    """The one mixture that takes from each source what the plan's stages take together, as a mixture file's domains.

    Rounded to `SHARE_PARTS` by the largest remainders; what comes to less than half a part is left out.
    """
    tokens: dict[str, int] = {}
    domain = {use.name: use.domain for stage in plan.stages for use in stage.sources}
    for use in (use for stage in plan.stages for use in stage.sources):
        tokens[use.name] = tokens.get(use.name, 0) + use.tokens
    parts = rounded(tokens, SHARE_PARTS)
    domains: dict[str, dict[str, object]] = {}
    for name in dict.fromkeys(domain[source] for source in parts):
        inside = {source: n for source, n in parts.items() if domain[source] == name}
        total = sum(inside.values())
        sources = {source: f"{Fraction(n, total)}" for source, n in inside.items()}
        domains[name] = {"share": f"{Fraction(total, SHARE_PARTS)}", "sources": sources}
    return domains


def rounded(weights: dict[str, int], parts: int) -> dict[str, int]:
    """`parts` whole parts in proportion to `weights`, by the largest remainders; what gets none is left out."""
    total = sum(weights.values())
    exact = {name: Fraction(weight * parts, total) for name, weight in weights.items()}
    whole = {name: int(part) for name, part in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (whole[name] - exact[name], name))
    for name in by_remainder[: parts - sum(whole.values())]:
        whole[name] += 1
    return {name: n for name, n in whole.items() if n}
