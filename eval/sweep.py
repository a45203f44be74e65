"""Many checkpoints: which ones, their scores side by side with the changes marked, and a picture over tokens."""

from __future__ import annotations

import glob
import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

from eval.published import Published, load_published
from eval.scorecard import Result, Scorecard, z_of
from recipes.engine.checkpoint import steps
from recipes.errors import UserError
from recipes.files import write_atomic
from recipes.run import RUN_FILE, Run, runs_folder
from recipes.show import amount

SIGNIFICANT = 2.0
"""Changes below so many standard errors of the difference are noise."""


def checkpoints_of(names: Sequence[str], every: str | None) -> list[Path]:
    """The checkpoints or model folders that the arguments name, in order.

    Args:
        names: runs, checkpoints, model folders, or patterns such as 'runs/x/*/checkpoints/*'.
        every: of a run: "stage" takes each stage's newest checkpoint, "checkpoint" all that are left.

    Raises:
        UserError: a name that matches nothing, or a run without checkpoints.
    """
    return list(dict.fromkeys(path for name in names for path in _matching(name, every or "stage")))


def _matching(name: str, every: str) -> list[Path]:
    run = next((p for p in (Path(name), runs_folder() / name) if (p / RUN_FILE).is_file()), None)
    if run is not None:
        return _of_run(Run.load(run), every)
    paths = [Path(p) for p in glob.glob(name)]  # noqa: PTH207  a pattern may be absolute
    found = [p for p in paths if p.is_dir() and not p.name.endswith((".partial", ".damaged"))]
    if not found:
        fix = "name a run, a checkpoint (runs/<run>/<stage>/checkpoints/<step>), or a model's folder"
        raise UserError("there is no checkpoint", fix, name)
    return sorted(found, key=lambda p: (p.parent, p.name.zfill(12)))


def _of_run(run: Run, every: str) -> list[Path]:
    paths = []
    for stage in run.plan.stages:
        there = [step for step in steps(run.checkpoints(stage.name)) if step > 0]
        chosen = there if every == "checkpoint" else there[-1:]
        paths += [run.checkpoints(stage.name) / str(step) for step in chosen]
    if not paths:
        raise UserError("this run has no checkpoints yet", "train its first stage", run.folder)
    return paths


def scores_table(cards: Sequence[Scorecard], published: Sequence[Published] = ()) -> Table:
    """A line a benchmark, a column a checkpoint: score ± standard error; ▲ and ▼ where it moved against the one before.

    `published` scores follow, without errors where none can be computed.
    """
    title = f"{cards[0].recipe}: {cards[0].suite}" if cards else "published"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("benchmark", no_wrap=True)
    table.add_column("metric", no_wrap=True)
    for card in cards:
        table.add_column(f"{card.stage}\n{amount(card.tokens)}", justify="right", no_wrap=True)
    for column in published:
        table.add_column(column.name.replace(" ", "\n"), justify="right", no_wrap=True)
    names = list(
        dict.fromkeys([n for card in cards for n in card.benchmarks] + [n for p in published for n in p.scores])
    )
    for name in names:
        results = [card.benchmarks.get(name) for card in cards]
        own = [_cell(result, results[i - 1] if i else None) for i, result in enumerate(results)]
        known = next((r for r in results if r is not None), None)
        theirs = [f"{p.scores[name].value:.1f}" if name in p.scores else "" for p in published]
        limited = f" ≤{known.limit}" if known and known.limit else ""
        table.add_row(name, (known.metric if known else "") + limited, *own, *theirs)
    return table


def _cell(result: Result | None, before: Result | None) -> str:
    if result is None:
        return ""
    text = f"{result.score.value:.2f} ±{result.score.stderr:.2f}"
    z = z_of(result.score, before.score) if before else 0.0
    return text + (" [bold]▲[/]" if z > SIGNIFICANT else " [bold]▼[/]" if z < -SIGNIFICANT else "  ")


def draw_scores(cards: Sequence[Scorecard]) -> Figure:
    """Every benchmark's score with twice its standard error over tokens, one small picture a benchmark."""
    names = list(dict.fromkeys(name for card in cards for name in card.benchmarks))
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(9.5, 2.3 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    for name, axes in zip(names, grid.flat, strict=False):
        have = [card for card in cards if name in card.benchmarks]
        results = [card.benchmarks[name] for card in have]
        axes.errorbar(
            [card.tokens for card in have], [r.score.value for r in results],
            [SIGNIFICANT * r.score.stderr for r in results], marker="o", markersize=3, capsize=2, linewidth=1,
        )  # fmt: skip
        axes.set_title(f"{name} ({results[0].metric})", fontsize=9)
        axes.xaxis.set_major_formatter(lambda tokens, _: amount(tokens))
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("tokens trained; bars are two standard errors", fontsize=8)
    return figure


def picture(cards: Sequence[Scorecard], path: Path) -> Path:
    """Writes `draw_scores` as a PNG."""
    buffer = io.BytesIO()
    draw_scores(cards).savefig(buffer, format="png", dpi=150)
    write_atomic(path, buffer.getvalue())
    return path


def published_beside(cards: Sequence[Scorecard]) -> list[Published]:
    """The published columns that say something about these scorecards: all that share a benchmark."""
    names = {name for card in cards for name in card.benchmarks}
    return [column for column in load_published() if not cards or names & set(column.scores)]
