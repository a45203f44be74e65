"""A proposal as people read it: the mixture file, the text of a pull request, tables on a console."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import xxhash
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from eval.feedback import Evidence
from eval.scorecard import Scorecard
from recipes.recipe import decimal
from recipes.show import amount

if TYPE_CHECKING:
    from eval.proposal import DomainLine, Proposal

DOMAIN_HEAD = ("domain", "before %", "proposed %", "Δ points", "tokens", "cap %", "pull", "bound by")
SCORE_HEAD = ("benchmark", "domains", "score", "± SE", "target", "deficit", "z", "moved z")
CAVEATS = (
    "Scores say how much per domain, not which source; they do not say that a benchmark follows its domain.",
    "Only the last stages' learning-rate decay shows what data is worth: scores before it understate math and code.",
    "The policy was written knowing one published run; `smol propose --backtest` shows how well it follows that run.",
)


def card_hash(card: Scorecard) -> str:
    """The hash that the scorecard's file ends with."""
    content = json.loads(json.dumps(dataclasses.asdict(card)))
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def place_of(p: Proposal) -> str:
    """The mixture file that the proposal would replace."""
    return str(p.recipe.stage(p.stage).mixture_file.resolve().relative_to(p.recipe.root.resolve()))


def yaml_text(p: Proposal) -> str:
    """The proposed mixture as a file, with where it comes from."""
    cards = ", ".join(f"{card.name} {card_hash(card)}" for card in p.cards)
    lines = [
        f"# Proposed for {p.recipe.name} {p.stage} from the scores after {p.after}, to be approved by a person,",
        f"# who puts it in the place of {place_of(p)}. Reasons: {p.stage}.md.",
        f"# scorecards: {cards}",
        f"# policy: {p.policy.digest}",
        "domains:",
    ]
    before = {d.name: d for d in p.domains}
    for name, domain in p.mixture.domains.items():
        line = before[name]
        lines += [
            f"  {name}:",
            f"    share: {decimal(domain.share)}  # {decimal(line.before)} in {p.after}; bound by: {line.bound_by}",
            "    sources:",
            *(f"      {source}: {decimal(share)}" for source, share in domain.sources.items()),
        ]
    return "\n".join(lines) + "\n"


def markdown(p: Proposal, diff_markdown: str = "") -> str:
    """The reasons, as a pull request shows them."""
    bound = [f"**{d.name}**: {bound_text(d, p)}" for d in p.domains]
    provenance = [
        *(f"scorecard {c.name}, suite {c.suite}, seed {c.seed}, hash `{card_hash(c)}`, checkpoint `{c.checkpoint}`, "
          f"tasks `{c.task_file}`" for c in p.cards),
        f"policy `{p.policy.digest}`",
    ]  # fmt: skip
    sections = [
        f"# {p.recipe.name}: proposed mixture of {p.stage}",
        f"From the scores after {p.after}. A person approves it, and puts `{p.stage}.yaml` in the place of "
        f"`{place_of(p)}`.",
        _markdown_table(DOMAIN_HEAD, [domain_row(d, p) for d in p.domains], words=1),
        f"Total variation {100 * p.tv:.1f} points of at most {100 * p.tau:.0f}; η = {p.advice.eta:.3g} of at most "
        f"{p.policy.eta:g}. `before` is {p.after}'s mixture; {p.stage} has {amount(p.tokens)} tokens.",
        *(["## Diff", f"Against `{place_of(p)}` as it is, not against {p.after} as above.", diff_markdown.strip()]
          if diff_markdown else []),
        "## Scores that pulled",
        _markdown_table(SCORE_HEAD, [score_row(e) for e in p.advice.evidence], words=2),
        "deficit: the part of the way from chance to the target that is missing, 0 below "
        f"{p.policy.noise:g} standard errors; z: distance to the target in standard errors; moved: gain since the "
        "stage before, in standard errors of the difference.",
        "## What bound", _bullets(bound),
        "## What was not moved, and why", _bullets(p.not_moved),
        *(["## Warnings", _bullets(p.warnings)] if p.warnings else []),
        "## Caveats", _bullets(CAVEATS),
        "## Provenance", _bullets(provenance),
    ]  # fmt: skip
    return "\n\n".join(sections) + "\n"


def show_proposal(p: Proposal, console: Console) -> None:
    """Prints the domains, the scores and what there is to say about them."""
    title = f"{p.recipe.name}: {p.stage} after {p.after}, total variation {100 * p.tv:.1f} points, η {p.advice.eta:.3g}"
    console.print(_table(title, DOMAIN_HEAD, [domain_row(d, p) for d in p.domains], words=1))
    console.print(_table("scores", SCORE_HEAD, [score_row(e) for e in p.advice.evidence], words=2))
    for text in p.not_moved:
        console.print(f"not moved: {text}", highlight=False, soft_wrap=True)
    for text in p.warnings:
        console.print(f"[yellow]warning:[/] {text}", highlight=False, soft_wrap=True)


def domain_row(d: DomainLine, p: Proposal) -> tuple[str, ...]:
    """A line of `DOMAIN_HEAD`."""
    shares = (
        f"{float(100 * d.before):.4g}",
        f"{float(100 * d.proposed):.4g}",
        f"{float(100 * (d.proposed - d.before)):+.1f}",
    )
    limit = d.cap.limit
    cap = "–" if limit is None else f"{100 * limit:.1f}" if limit < 1 else "≥ 100"
    return d.name, *shares, amount(float(d.proposed * p.tokens)), cap, f"{d.pull:.3f}", d.bound_by


def score_row(e: Evidence) -> tuple[str, ...]:
    """A line of `SCORE_HEAD`."""
    domains = ", ".join(g if a == 1 else f"{g} × {a:g}" for g, a in e.goal.domains.items())
    moved = "–" if e.moved is None else f"{e.moved:+.1f}"
    numbers = f"{e.score.value:.2f}", f"{e.score.stderr:.2f}", f"{e.goal.target:g}", f"{e.deficit:.3f}"
    return e.name, domains, *numbers, f"{e.z:+.1f}", moved


def bound_text(d: DomainLine, p: Proposal) -> str:
    """What the rule that bound a domain means here."""
    kept = {name: f" ({amount(n)} more are kept for a later stage)" for name, n in d.cap.kept.items()}
    room = ", ".join(f"{amount(n)} tokens of {name}{kept.get(name, '')}" for name, n in d.cap.room.items())
    texts = {
        "none": "nothing: the scores alone",
        "floor": f"floor: it started from {p.policy.floor:.0%}",
        "step (τ)": f"step: before the caps all together may move {p.tau:.0%} at most, which took η down to "
                    f"{p.advice.eta:.3g}",
        "regression": f"regression: half the step, because {', '.join(p.advice.regressed)} fell",
        "stall": "stall: a source of it was raised before without effect, and is not raised again",
        "cap": f"cap: at {p.policy.repetition.epochs:g} epochs over the run there are left {room or 'no sources'}",
        "overflow": f"overflow: took {100 * p.advice.overflow:.1f} points that other domains' limits left over",
    }  # fmt: skip
    return texts.get(d.bound_by, d.bound_by)


def _bullets(texts: Sequence[str]) -> str:
    return "\n".join(f"- {text}" for text in texts)


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> str:
    """A table whose first `words` columns, and last if it holds words, are left-aligned."""
    rule = ["---" if i < words or name == "bound by" else "---:" for i, name in enumerate(head)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(head):
        table.add_column(name, justify="left" if i < words or name == "bound by" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table
