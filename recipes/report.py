"""report.html: what a run planned and what it did, in one file with its pictures inside."""

from __future__ import annotations

import html
import io
import itertools
import json
import platform
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.scorecard import scorecards, z_of
from eval.sweep import draw_scores
from recipes.audit import StageAudit
from recipes.files import read_lines, write_atomic
from recipes.loader import load_mixture
from recipes.plan import Plan
from recipes.recipe import Mixture
from recipes.run import Run
from recipes.show import amount, epochs_of

DOMAIN_COLOURS = {"web": "Blues", "code": "Greens", "math": "Oranges", "synthetic": "Purples"}
"""Matplotlib's colour map for each domain's sources."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem } svg { width: 100%; height: auto }
table { border-collapse: collapse; margin: .6rem 0 } th { text-align: left; font-weight: 600 }
td, th { padding: .15rem .9rem .15rem 0; border-bottom: 1px solid #e3e3e3 } td.n, th.n { text-align: right }
pre { font-size: 12px; overflow-x: auto }
.good { color: #137333 } .bad { color: #b3261e; font-weight: 600 } .note { color: #666 }
"""


def write_report(run: Run, audits: list[StageAudit]) -> Path:
    """Writes the run's report.html, atomically; returns its path."""
    metrics = {stage.name: _metrics(run, stage.name) for stage in run.plan.stages}
    sections = [
        f"<h1>{html.escape(run.plan.recipe)}</h1>", _summary(run, audits, metrics),
        "<h2>Loss</h2>", _picture(lambda axes: _draw_loss(axes, run, metrics), 3.6),
        "<h2>Learning rate</h2>", _picture(lambda axes: _draw_rate(axes, run.plan, metrics), 2.0),
        "<h2>Held-out loss</h2>", _heldout_table(run),
        "<h2>Scores</h2>", _scores(run),
        "<h2>Proposals</h2>", _proposals(run),
        "<h2>Planned mixture</h2>", _picture(lambda axes: _draw_mixture(axes, run.plan), 3.4),
        "<h2>Realised = planned</h2>", _audit_table(run, audits),
        "<h2>Speed</h2>", _picture(lambda axes: _draw_speed(axes, run.plan, metrics), 2.0), _speed_table(metrics),
        "<h2>Events</h2>", _events(run), "<h2>Warnings of the plan</h2>", _warnings(run.plan),
    ]  # fmt: skip
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(run.plan.recipe)}</title>"
    path = run.folder / "report.html"
    write_atomic(path, f"{page}<style>{STYLE}</style>\n" + "\n".join(sections) + "\n</html>\n")
    return path


def heldout_losses(run: Run) -> Iterator[tuple[str, str, float, float]]:
    """(stage, domain, loss before, loss after) for each domain that a finished stage trains on; nats a token."""
    for stage in run.plan.stages:
        path = run.stage_folder(stage.name) / "heldout.json"
        losses = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for domain in dict.fromkeys(use.domain for use in stage.sources):
            if domain in losses.get("start", {}) and domain in losses.get("end", {}):
                yield stage.name, domain, losses["start"][domain]["loss"], losses["end"][domain]["loss"]


def _metrics(run: Run, stage: str) -> list[dict[str, Any]]:
    return read_lines(run.stage_folder(stage) / "metrics.jsonl")


def _events_of(run: Run) -> list[dict[str, Any]]:
    return read_lines(run.folder / "events.jsonl")


# ------------------------------------------------------------------ tables
def _table(head: list[str], rows: list[list[str]]) -> str:
    """An HTML table; cells that look like numbers are set to the right. Cells are HTML."""

    def cell(tag: str, text: str) -> str:
        number = text.replace(",", "").replace(".", "").replace("%", "").replace("-", "").strip().isdigit()
        return f"<{tag}{' class=n' if number else ''}>{text}</{tag}>"

    lines = ["".join(cell("th", text) for text in head)]
    lines += ["".join(cell("td", text) for text in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _verdict(good: bool, yes: str, no: str) -> str:
    return f"<span class={'good' if good else 'bad'}>{yes if good else no}</span>"


def _summary(run: Run, audits: list[StageAudit], metrics: dict[str, list[dict[str, Any]]]) -> str:
    plan, losses = run.plan, list(heldout_losses(run))
    exact = bool(audits) and not any(a.problems for a in audits)
    fell = bool(losses) and all(after < before for _, _, before, after in losses)
    done = sum(len(lines) for lines in metrics.values())
    rows = [
        ["steps", f"{done:,} of {plan.steps:,}, {amount(done * plan.tokens_per_step)} tokens"],
        ["model", f"{plan.parameters:,} parameters"],
        ["data seen is the data planned", _verdict(exact, "yes, to the token", "no: see below")],
        ["held-out loss fell in every stage", _verdict(fell, "yes", "no: see below")],
        ["scale", f"every number of tokens of the recipe × {float(run.recipe.scale):.3g}"],
        ["code", html.escape(str(run.settings["code"]["revision"]))],
        ["machine", html.escape(f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}")],
    ]
    return _table(["", ""], rows)


def _heldout_table(run: Run) -> str:
    rows = [
        [stage, domain, f"{before:.3f}", f"{after:.3f}", _verdict(after < before, "fell", "did not fall")]
        for stage, domain, before, after in heldout_losses(run)
    ]
    note = "<p class=note>Nats a token, on text that no source contains; the domains that a stage trains on.</p>"
    return note + _table(["stage", "domain", "before", "after", ""], rows)


def _scores(run: Run) -> str:
    cards = scorecards(run.folder / "eval" / "scores")
    if not cards:
        return "<p class=note>none yet</p>"
    rows = []
    for name, first in cards[0].benchmarks.items():
        results = [card.benchmarks[name].score for card in cards]
        moved = [z_of(after, before) for before, after in itertools.pairwise(results)]
        marks = ["", *(" ▲" if z > 2 else " ▼" if z < -2 else "" for z in moved)]
        cells = [f"{r.value:.2f} ± {r.stderr:.2f}{mark}" for r, mark in zip(results, marks, strict=True)]
        rows.append([name, first.metric, str(first.score.items), *cells])
    note = (
        "<p class=note>± one standard error; ▲ ▼: moved by more than two since the stage before. Bits a byte fall as a "
        "model learns. The questions are made from held-out text.</p>"
    )
    table = _table(["benchmark", "metric", "items", *(card.stage for card in cards)], rows)
    return note + table + _svg(draw_scores(cards))


def _proposals(run: Run) -> str:
    """Each proposal beside the mixture before it and the one that was used."""
    parts = []
    for before, after in itertools.pairwise(run.recipe.stages):
        path = run.folder / "proposals" / f"{after.name}.yaml"
        if path.is_file():
            proposed = load_mixture(path, run.recipe.sources)
            names = dict.fromkeys([*before.mixture.domains, *proposed.domains, *after.mixture.domains])
            rows = [[name, *(_share(m, name) for m in (before.mixture, proposed, after.mixture))] for name in names]
            why = html.escape(path.with_suffix(".md").read_text(encoding="utf-8"))
            table = _table([f"{after.name}: domain", f"used in {before.name}", "proposed", "used"], rows)
            parts.append(f"{table}<details><summary>why</summary><pre>{why}</pre></details>")
    return "".join(parts) or "<p class=note>none yet</p>"


def _share(mixture: Mixture, domain: str) -> str:
    return f"{float(mixture.domains[domain].share):.1%}" if domain in mixture.domains else "–"


def _audit_table(run: Run, audits: list[StageAudit]) -> str:
    rows = []
    for found in audits:
        uses = {use.name: use for use in run.plan.stage(found.stage).sources}
        for name, tokens in found.planned.items():
            read, use = found.realised[name], uses[name]
            verdict = _verdict(read == tokens, "equal", f"{read - tokens:+,}")
            numbers = f"{float(use.share):.2%}", f"{tokens:,}", f"{read:,}", epochs_of(use.epochs_run)
            rows.append([found.stage, use.domain, name, *numbers, verdict])
    problems = "".join(f"<p class=bad>{html.escape(text)}</p>" for a in audits for text in a.problems)
    problems += "".join(f"<p class=note>{html.escape(text)}</p>" for a in audits for text in a.notes)
    head = ["stage", "domain", "source", "share", "planned", "realised", "epochs so far", ""]
    return problems + _table(head, rows)


def _speed_table(metrics: dict[str, list[dict[str, Any]]]) -> str:
    rows = []
    for stage, lines in metrics.items():
        if lines:
            seconds = {key: sum(line["seconds"][key] for line in lines) for key in ("data", "step", "checkpoint")}
            rate = statistics.median(line["tokens_per_s"] for line in lines)
            rows.append([stage, f"{rate:,.0f}", *(f"{seconds[key]:.1f}" for key in seconds)])
    return _table(["stage", "tokens/s, median", "seconds in data", "in steps", "in checkpoints"], rows)


def _events(run: Run) -> str:
    lines = []
    for event in _events_of(run):
        if event["event"] == "killed":
            steps = f"after step {event['step']}, resumed from step {event['checkpoint']}"
            text = f"{event['stage']}: killed with SIGKILL {steps}"
        elif event["event"] == "adopted":
            text = f"{event['stage']}: trained on the proposal: {event['mixture']}"
        else:
            text = f"finished after {event['seconds']:.0f} s"
        lines.append(f"<li>{html.escape(text)}</li>")
    return f"<ul>{''.join(lines)}</ul>"


def _warnings(plan: Plan) -> str:
    return f"<ul>{''.join(f'<li>{html.escape(text)}</li>' for text in plan.warnings)}</ul>" if plan.warnings else "none"


# ------------------------------------------------------------------ pictures
def _picture(draw: Callable[[Axes], None], height: float) -> str:
    """What `draw` draws, as SVG inside the page; `height` in inches at a width of 9.5."""
    figure = Figure(figsize=(9.5, height), layout="constrained")
    draw(figure.subplots())
    return _svg(figure)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def _stages(axes: Axes, plan: Plan) -> None:
    """Names the stages along the top and draws their ends."""
    axes.set_xlim(0, plan.steps)
    axes.spines[["top", "right"]].set_visible(False)
    for stage in plan.stages:
        axes.axvline(stage.end_step, color="0.85", linewidth=1)
        middle = (stage.start_step + stage.end_step) / 2
        axes.text(middle, 1.01, stage.name, ha="center", va="bottom", color="0.4", transform=axes.get_xaxis_transform())


def _draw_loss(axes: Axes, run: Run, metrics: dict[str, list[dict[str, Any]]]) -> None:
    for lines in metrics.values():
        axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], linewidth=1)
    for event in _events_of(run):
        if event["event"] == "killed":
            axes.axvline(event["step"], color="tab:red", linestyle="--", linewidth=1)
            axes.text(event["step"], 0.98, " SIGKILL, resumed", color="tab:red", va="top",
                      transform=axes.get_xaxis_transform())  # fmt: skip
    axes.set_ylabel("training loss, nats")
    axes.set_xlabel("step")
    _stages(axes, run.plan)


def _draw_rate(axes: Axes, plan: Plan, metrics: dict[str, list[dict[str, Any]]]) -> None:
    lines = [line for stage in metrics.values() for line in stage]
    axes.plot([line["step"] for line in lines], [line["lr"] for line in lines], linewidth=1.5)
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)
    _stages(axes, plan)


def _draw_speed(axes: Axes, plan: Plan, metrics: dict[str, list[dict[str, Any]]]) -> None:
    lines = [line for stage in metrics.values() for line in stage]
    axes.plot([line["step"] for line in lines], [line["tokens_per_s"] for line in lines], linewidth=1, color="0.4")
    axes.set_ylabel("tokens/s")
    axes.set_ylim(bottom=0)
    _stages(axes, plan)


def _draw_mixture(axes: Axes, plan: Plan) -> None:
    """One column a stage; heights are shares; one colour a domain, one shade a source."""
    for column, stage in enumerate(plan.stages):
        bottom, shade = 0.0, dict.fromkeys(DOMAIN_COLOURS, 0.75)
        for use in stage.sources:
            height = float(use.share)
            colour = _shade(use.domain, shade.get(use.domain, 0.75))
            shade[use.domain] = shade.get(use.domain, 0.75) - 0.18
            axes.bar(column, height, 0.94, bottom, color=colour, edgecolor="white")
            if height > 0.03:
                text = f"{use.name} {height:.1%}"
                axes.text(column, bottom + height / 2, text, ha="center", va="center", fontsize=7)
            bottom += height
    names = [f"{s.name}\n{amount(s.tokens)} tokens" for s in plan.stages]
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("share of the tokens")
    axes.set_ylim(0, 1)
    axes.spines[["top", "right"]].set_visible(False)


def _shade(domain: str, depth: float) -> Any:
    return matplotlib.colormaps[DOMAIN_COLOURS.get(domain, "Greys")](max(depth, 0.2) * 0.6)
