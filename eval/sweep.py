"""Many checkpoints: which ones, their scores side by side with the changes marked, and a picture over tokens."""

from __future__ import annotations

import glob
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

from eval.published import Published, load_published
from eval.scorecard import Result, Scorecard, scorecards, z_of
from eval.soundness import scores_of
from recipes.engine.checkpoint import steps
from recipes.errors import UserError
from recipes.files import write_atomic
from recipes.loader import find_root
from recipes.run import RUN_FILE, Run, runs_folder
from recipes.show import amount

SIGNIFICANT = 2.0
"""Changes below so many standard errors of the difference are noise."""
GAP = 2
"""Characters between two columns."""


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


def scorecards_of(name: str) -> list[Scorecard]:
    """The scorecards of a recipe, of a run, of a folder, or the one of a file.

    Raises:
        UserError: there are none, or one of them is damaged or was edited.
    """
    run = next((p for p in (Path(name), runs_folder() / name) if (p / RUN_FILE).is_file()), None)
    of_recipe = find_root() / "eval" / "scores" / name
    path = scores_of(Run.load(run)) if run else Path(name) if Path(name).exists() else of_recipe
    if cards := scorecards(path):
        return cards
    raise UserError("there are no scorecards", "evaluate a checkpoint with `smol eval`", path)


def _of_run(run: Run, every: str) -> list[Path]:
    paths = []
    for stage in run.plan.stages:
        there = [step for step in steps(run.checkpoints(stage.name)) if step > 0]
        chosen = there if every == "checkpoint" else there[-1:]
        paths += [run.checkpoints(stage.name) / str(step) for step in chosen]
    if not paths:
        raise UserError("this run has no checkpoints yet", "train its first stage", run.folder)
    return paths


@dataclass(frozen=True)
class Column:
    """One checkpoint's or publication's scores as they are shown, by benchmark."""

    head: str
    """One or more lines."""
    cells: dict[str, str]

    @property
    def width(self) -> int:
        """Characters, and what keeps it apart from the next column."""
        return max(map(len, [*self.head.splitlines(), *self.cells.values()]), default=0) + GAP


def scores_tables(cards: Sequence[Scorecard], published: Sequence[Published] = (), width: int = 100) -> list[Table]:
    """A line a benchmark, a column a checkpoint: score ± standard error; ▲ and ▼ where it moved against the one before.

    `published` scores follow, without errors where none can be computed. As many tables as `width` characters ask for.
    """
    own, theirs = _own_columns(cards), [Column(p.name.replace(" ", "\n").replace("-", "\n"), _rounded(p))
                                        for p in published]  # fmt: skip
    names = {name: _metric(cards, name) for column in (*own, *theirs) for name in column.cells}
    room = width - sum(max(map(len, words)) + GAP for words in ([*names, "benchmark"], [*names.values(), "metric"]))
    parts = _packed([*own, *theirs], room)
    if len(parts) > 1:
        parts = [*_packed(own, room), *_packed(theirs, room)]
    title = _title(cards) + (f" (▲ ▼: > {SIGNIFICANT:g} SE)" if len(cards) > 1 else "")
    return [_table(title if part[0] in own else "published", part, names) for part in parts]


def _title(cards: Sequence[Scorecard]) -> str:
    """The recipes and the suites, each once."""
    return ": ".join(", ".join(dict.fromkeys(getattr(card, what) for card in cards)) for what in ("recipe", "suite"))


def _metric(cards: Sequence[Scorecard], name: str) -> str:
    """The metric that counts, and its limit of items if it has one; nothing where no card has the benchmark."""
    results = [card.benchmarks[name] for card in cards if name in card.benchmarks]
    limited = {f" ≤{result.limit}" for result in results if result.limit}
    return results[0].metric + "".join(limited if len(limited) == 1 else ()) if results else ""


def _rounded(column: Published) -> dict[str, str]:
    return {name: f"{score.value:.1f}" for name, score in column.scores.items()}


def _own_columns(cards: Sequence[Scorecard]) -> list[Column]:
    """The recipe and the suite are in the head only where they differ."""
    differ = [what for what in ("recipe", "suite") if len({getattr(card, what) for card in cards}) > 1]
    columns = []
    for i, card in enumerate(cards):
        head = dict.fromkeys([*(getattr(card, what) for what in differ), card.stage])
        cells = {name: _cell(result, _before(cards[:i], card, name)) for name, result in card.benchmarks.items()}
        columns.append(Column("\n".join([*head, *([amount(card.tokens)] if card.tokens else [])]), cells))
    return columns


def _before(cards: Sequence[Scorecard], card: Scorecard, name: str) -> Result | None:
    """The newest earlier result that can be compared: of the same recipe, suite and metric."""
    metric = card.benchmarks[name].metric
    alike = [c for c in cards if (c.recipe, c.suite) == (card.recipe, card.suite) and name in c.benchmarks]
    return next((c.benchmarks[name] for c in reversed(alike) if c.benchmarks[name].metric == metric), None)


def _cell(result: Result, before: Result | None) -> str:
    z = z_of(result.score, before.score) if before else 0.0
    mark = "▲ " if z > SIGNIFICANT else "▼ " if z < -SIGNIFICANT else ""
    return f"{mark}{result.score.value:.2f} ±{result.score.stderr:.2f}"


def _packed(columns: Sequence[Column], room: int) -> list[list[Column]]:
    """The columns in as few groups as fit into `room` characters."""
    groups: list[list[Column]] = []
    for column in columns:
        if groups and sum(c.width for c in groups[-1]) + column.width <= room:
            groups[-1].append(column)
        else:
            groups.append([column])
    return groups


def _table(title: str, columns: Sequence[Column], names: Mapping[str, str]) -> Table:
    """The benchmarks, of those in `names`, that one of the columns has; with their metrics if any are known."""
    rows = [name for name in names if any(name in column.cells for column in columns)]
    words = [["benchmark", *rows], *([["metric", *(names[name] for name in rows)]] if any(names.values()) else [])]
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for head, *_ in words:
        table.add_column(head, no_wrap=True)
    for column in columns:
        table.add_column(column.head, justify="right", no_wrap=True)
    for i, name in enumerate(rows, 1):
        table.add_row(*(column[i] for column in words), *(column.cells.get(name, "") for column in columns))
    return table


def draw_scores(cards: Sequence[Scorecard]) -> Figure:
    """Every benchmark's score over tokens with twice its standard error, a line a recipe."""
    names = list(dict.fromkeys(name for card in cards for name in card.benchmarks))
    recipes = list(dict.fromkeys(card.recipe for card in cards))
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(9.5, 2.3 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    for name, axes in zip(names, grid.flat, strict=False):
        for recipe in recipes:
            have = [card for card in cards if name in card.benchmarks and card.recipe == recipe]
            scores = [card.benchmarks[name].score for card in have]
            axes.errorbar(
                [card.tokens for card in have], [score.value for score in scores],
                [SIGNIFICANT * score.stderr for score in scores], marker="o", markersize=3, capsize=2, linewidth=1,
            )  # fmt: skip
        axes.set_title(f"{name} ({_metric(cards, name)})", fontsize=9)
        axes.xaxis.set_major_formatter(lambda tokens, _: amount(tokens))
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("tokens trained; bars are two standard errors", fontsize=8)
    if len(recipes) > 1:
        figure.legend(recipes, loc="outside upper right", fontsize=8, ncols=len(recipes))
    return figure


def picture(cards: Sequence[Scorecard], path: Path) -> Path:
    """Writes `draw_scores` as a PNG, with a title."""
    buffer, figure = io.BytesIO(), draw_scores(cards)
    figure.suptitle(_title(cards), fontsize=10)
    figure.savefig(buffer, format="png", dpi=150)
    write_atomic(path, buffer.getvalue())
    return path


def published_beside(cards: Sequence[Scorecard]) -> list[Published]:
    """The published columns that say something about these scorecards: all that share a benchmark."""
    names = {name for card in cards for name in card.benchmarks}
    return [column for column in load_published() if not cards or names & set(column.scores)]
