"""A diff as people read it: tables on a terminal of 100 columns, Markdown for a pull request."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from fractions import Fraction

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from recipes.diff.compare import Diff, KnockOn, Line, RecipeDiff, StageDiff, Use, diff_recipes
from recipes.plan import REPETITION_LIMIT
from recipes.recipe import Mixture, Recipe
from recipes.show import amount, epochs_of

NO_CHANGE = "no change in the data"
BAR = 44
"""Columns of a bar that stands for the whole stage."""
HEAD = ("share %", "Δ pts", "tokens", "epochs", "so far", "worth %")
EXPLAINED = (
    "epochs: in the stage · so far: from the run's beginning to the stage's end · worth: of all tokens read so far, "
    f"against as many fresh ones (Muennighoff et al., 2305.16264) · !: above {REPETITION_LIMIT} epochs"
)
_WORDS = {"error": ("error", "errors"), "warning": ("warning", "warnings"), "gone": ("resolved", "resolved")}
_NONE = Use(Fraction(0))
Pair = tuple[str, str]


def mixture_diff_markdown(recipe: Recipe, stage: str, mixture: Mixture) -> str:
    """What another mixture in one stage of the recipe changes, as Markdown."""
    changed = diff_recipes(recipe, recipe.with_mixture(stage, mixture))
    return to_markdown(Diff(f"{recipe.name}:{stage}", "proposal", () if changed.empty else (changed,)))


def summary(diff: Diff) -> str:
    """The diff in one line of plain text."""
    parts = []
    for recipe in diff.recipes:
        kinds = [str(limit.kind) for limit in recipe.limits]
        counts = [_count(kinds.count(kind), *names) for kind, names in _WORDS.items()]
        counts.append(_count(len(recipe.changes), "other change", "other changes"))
        parts.append(", ".join([f"{recipe.name}: {_data(recipe)}", *(text for text in counts if text)]))
    if problems := _count(len(diff.problems), "recipe cannot be read", "recipes cannot be read"):
        parts.append(problems)
    return "; ".join(parts) or NO_CHANGE


def _data(recipe: RecipeDiff) -> str:
    if recipe.status != "changed":
        return f"{recipe.status} recipe"
    if not recipe.changes_data:
        return NO_CHANGE
    parts = [_moved(stage) for stage in recipe.stages]
    if later := ", ".join(dict.fromkeys(k.stage for k in _seen(recipe.knock_on))):
        parts.append(f"knock-on in {later}")
    return ", ".join(parts) or "the data changes"


def _moved(stage: StageDiff) -> str:
    if stage.moved:
        return f"{_stage_name(stage)} moves {_points(stage.moved)} points".strip()
    tokens = _amount(stage.tokens_before), _amount(stage.tokens_after)
    return f"{_stage_name(stage)} " + ("other epochs" if tokens[0] == tokens[1] else f"{_arrow(tokens)} tokens")


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}" if number else ""


def _stage_name(stage: StageDiff) -> str:
    names = dict.fromkeys(name for name in (stage.before, stage.after) if name)
    return " → ".join(names)


def _title(recipe: RecipeDiff, stage: StageDiff) -> str:
    name = f"{recipe.name} {_stage_name(stage)}".strip()
    if stage.tokens_before is None and stage.tokens_after is None:
        return name
    if stage.before and stage.after:
        return f"{name}, {_arrow((_amount(stage.tokens_before), _amount(stage.tokens_after)))} tokens"
    return f"{name} (new), {_amount(stage.tokens_after)} tokens" if stage.after else f"{name} (removed)"


def _points(value: Fraction | float, signed: bool = False) -> str:
    """Percentage points to two decimals, to one figure where that would be nothing."""
    number = float(value)
    text = f"{abs(number):.2f}" if number == 0 or abs(number) >= 0.005 else f"{abs(number):.1g}"
    sign = "−" if number < 0 else "+" if signed and number > 0 else ""
    return sign + text


def _amount(tokens: int | None) -> str:
    """Three figures: two of these and an arrow fit a column."""
    return "–" if tokens is None else amount(float(f"{tokens:.3g}"))


def _pairs(line: Line, stage: StageDiff) -> list[Pair]:
    """A line's figures before and after: share, tokens, epochs in the stage, epochs so far, worth."""
    before, after = _figures(line, line.before), _figures(line, line.after)
    if stage.tokens_before is None and stage.tokens_after is not None:
        before = after  # a new stage
    if stage.tokens_after is None and stage.tokens_before is not None:
        after = before  # a removed one
    return list(zip(before, after, strict=True))


def _figures(line: Line, use: Use | None) -> tuple[str, ...]:
    share = "" if line.kind == "family" else "–" if use is None else _points(100 * use.share)
    if use is None:
        return (share, *("–",) * 4)
    unknown = "–" if line.kind == "domain" or use.tokens is None else "?"
    known = use.epochs is not None and use.epochs_run is not None
    epochs = (_epochs(use.epochs), _limited(use.epochs_run)) if known else (unknown, unknown)
    return share, _amount(use.tokens), *epochs, unknown if use.worth is None else f"{100 * use.worth:.0f}"


def _epochs(epochs: float | None) -> str:
    """Three figures, but never more than two decimals."""
    return f"{epochs:.1f}" if epochs is not None and epochs >= 9.995 else epochs_of(epochs)


def _limited(epochs: float | None) -> str:
    """With a mark above the limit, and its place kept free below, so that figures stand under one another."""
    return _epochs(epochs) + ("!" if (epochs or 0) > REPETITION_LIMIT else " ")


def _arrow(pair: Pair) -> str:
    before, after = (text.strip() for text in pair)
    return before if before == after else f"{before} → {after}"


# ---------------------------------------------------------------- terminal


def show_diff(diff: Diff, console: Console) -> None:
    """Prints the diff; made for 100 columns."""
    console.print(f"[bold]{escape(diff.before)} → {escape(diff.after)}[/]", highlight=False, soft_wrap=True)
    console.print(escape(summary(diff)), highlight=False)
    for problem in diff.problems:
        _say(console, "red", f"{problem.side}: {problem.text}")
    for recipe in diff.recipes:
        for stage in recipe.stages:
            console.print(_domains(recipe, stage))
            console.print(_sources(stage))
        if _seen(recipe.knock_on):
            console.print(_knock_on(recipe))
        for colour, text in _lines(recipe):
            _say(console, colour, f"{recipe.name}: {text}")
    for note in diff.notes:
        _say(console, "dim", note)
    if _explains(diff):
        console.print(f"[dim]{EXPLAINED}[/]", highlight=False)


def _say(console: Console, colour: str, text: str) -> None:
    console.print(f"[{colour}]{escape(text)}[/]", highlight=False)


def _lines(recipe: RecipeDiff) -> Iterator[tuple[str, str]]:
    """Limits, other keys and reorderings, a line and a colour each."""
    colours = {"error": "red", "warning": "yellow", "gone": "green"}
    for limit in recipe.limits:
        yield colours[limit.kind], limit.text
    for change in recipe.changes:
        yield "none", f"{change.key} {change.before} → {change.after}{'' if change.data else ' (not the data)'}"
    if recipe.reordered:
        yield "dim", _reordered(recipe)


def _reordered(recipe: RecipeDiff) -> str:
    return (
        f"{', '.join(recipe.reordered)}: the same shares, but the sources stand in another order, which decides ties: "
        "the same samples in another order, and up to one sample of a source more or less by the stage's end"
    )


def _explains(diff: Diff) -> bool:
    return any(_head(stage) == HEAD for recipe in diff.recipes for stage in recipe.stages)


def _domains(recipe: RecipeDiff, stage: StageDiff) -> Table:
    table = Table(title=_title(recipe, stage), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("domain", no_wrap=True)
    table.add_column("", no_wrap=True)
    head = _head(stage)[:3]
    for name in head:
        table.add_column(name, justify="right", no_wrap=True)
    lines = stage.of("domain")
    cells = _aligned([_pairs(line, stage)[:2] for line in lines])
    for line, (share, tokens) in zip(lines, cells, strict=True):
        figures: list[str | Text] = [share, _delta(line), tokens]
        table.add_row(Text(line.name), _bar(line), *figures[: len(head)])
    return table


def _bar(line: Line) -> Text:
    """What stays, then what is gained (green) or lost (red); a change is at least one column."""
    before, after = ((use or _NONE).share for use in (line.before, line.after))
    stays, larger = (round(BAR * float(share)) for share in (min(before, after), max(before, after)))
    moves = max(larger - stays, 1) if before != after else 0
    style, block = ("green", "█") if after > before else ("red", "░")
    return Text("█" * stays, "blue") + Text(block * moves, style)


def _sources(stage: StageDiff) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("source", no_wrap=True, overflow="ellipsis", max_width=21)
    head = _head(stage)
    for name in head:
        table.add_column(name, justify="right", no_wrap=True)
    lines = _grouped(stage)
    cells = _aligned([_pairs(line, stage) for line in lines])
    for line, (share, *others, so_far, worth) in zip(lines, cells, strict=True):
        what = Text(f"family {line.name}", "italic") if line.kind == "family" else Text(line.name)
        marked = Text(so_far, "yellow" if "!" in so_far else "")
        figures: list[str | Text] = [share, _delta(line), *others, marked, worth]
        table.add_row(what, *figures[: len(head)])
    return table


def _head(stage: StageDiff) -> Sequence[str]:
    """All columns, or shares alone where no recipe is known."""
    return HEAD[:2] if stage.tokens_before is None and stage.tokens_after is None else HEAD


def _grouped(stage: StageDiff) -> list[Line]:
    """Sources and families, domain by domain."""
    below = stage.of("source") + stage.of("family")
    return [line for domain in stage.of("domain") for line in below if line.domain == domain.name]


def _delta(line: Line) -> Text:
    if line.kind == "family":
        return Text("")
    return Text(_points(line.points, signed=True), "green" if line.points > 0 else "red" if line.points < 0 else "")


def _aligned(rows: Sequence[Sequence[Pair]]) -> list[list[str]]:
    """Before and after of each column under one another; one figure where both are the same."""
    columns = list(zip(*rows, strict=True))
    widths = [tuple(max((len(pair[i]) for pair in column), default=0) for i in (0, 1)) for column in columns]

    def cell(pair: Pair, width: tuple[int, ...]) -> str:
        return pair[0] if pair[0] == pair[1] else f"{pair[0]:>{width[0]}} → {pair[1]:>{width[1]}}"

    return [[cell(pair, width) for pair, width in zip(row, widths, strict=True)] for row in rows]


def _seen(knock_on: Sequence[KnockOn]) -> list[KnockOn]:
    """Those whose figures differ as they are shown."""
    return [k for k in knock_on if any(before != after for before, after in _knock_on_pairs(k))]


def _knock_on(recipe: RecipeDiff) -> Table:
    table = Table(
        title=f"{recipe.name}: knock-on in later stages", title_justify="left", box=SIMPLE_HEAD, pad_edge=False
    )
    for i, name in enumerate(("stage", "source", "starts at token", "epochs so far")):
        table.add_column(name, justify="left" if i < 2 else "right", no_wrap=True)
    seen = _seen(recipe.knock_on)
    cells = _aligned([_knock_on_pairs(k) for k in seen])
    for k, (starts, so_far) in zip(seen, cells, strict=True):
        what = Text(k.name if k.kind == "source" else f"family {k.name}")
        table.add_row(Text(k.stage), what, starts, Text(so_far, "yellow" if "!" in so_far else ""))
    return table


def _knock_on_pairs(k: KnockOn) -> list[Pair]:
    starts = _amount(k.offset_before), _amount(k.offset_after)
    return [starts, (_limited(k.epochs_run_before), _limited(k.epochs_run_after))]


# ---------------------------------------------------------------- markdown


def to_markdown(diff: Diff) -> str:
    """The diff for a pull request: a summary line, then tables."""
    blocks = [f"{_code(diff.before)} → {_code(diff.after)}: **{_safe(summary(diff))}**"]
    blocks += [f"{problem.side}:\n{fenced(problem.text)}" for problem in diff.problems]
    for recipe in diff.recipes:
        for stage in recipe.stages:
            blocks += [f"#### {_safe(_title(recipe, stage))}", _stage_markdown(stage)]
        if _seen(recipe.knock_on):
            blocks += [f"Knock-on in later stages of {_safe(recipe.name)}:", _knock_on_markdown(recipe)]
        marks = {"red": "❌ ", "yellow": "⚠️ ", "green": "✅ "}
        if lines := [f"- {marks.get(colour, '')}{_safe(text)}" for colour, text in _lines(recipe)]:
            blocks += [f"{_safe(recipe.name)}:", "\n".join(lines)]
    blocks += [f"_{_safe(note)}_" for note in diff.notes]
    if _explains(diff):
        blocks.append(f"<sub>{EXPLAINED}</sub>")
    return "\n\n".join(blocks) + "\n"


def fenced(text: str) -> str:
    """Text as a block in which Markdown has no meaning."""
    return f"```text\n{text.replace('`', chr(39))}\n```"


def _safe(text: str) -> str:
    """Text that Markdown shows as it is, also inside a table, and that calls nobody by @name."""
    safe = html.escape(" ".join(text.split()), quote=False)
    for character in "\\|`*[@":
        safe = safe.replace(character, f"&#{ord(character)};")
    return safe


def _code(text: str) -> str:
    return f"`{' '.join(text.split()).replace('`', chr(39))}`"


def _stage_markdown(stage: StageDiff) -> str:
    head = _head(stage)

    def row(line: Line, name: str) -> list[str]:
        share, *others = [_arrow(pair) for pair in _pairs(line, stage)]
        points = "" if line.kind == "family" else _points(line.points, signed=True)
        return [name, share, points, *others][: 1 + len(head)]

    rows = []
    for domain in stage.of("domain"):
        rows.append([cell and f"**{cell}**" for cell in row(domain, _safe(domain.name))])
        for line in (line for line in _grouped(stage) if line.domain == domain.name):
            rows.append(row(line, _safe(f"family {line.name}" if line.kind == "family" else line.name)))
    return _table(("", *head), rows, words=1)


def _knock_on_markdown(recipe: RecipeDiff) -> str:
    rows = [
        [_safe(k.stage), _safe(k.name if k.kind == "source" else f"family {k.name}"), *map(_arrow, _knock_on_pairs(k))]
        for k in _seen(recipe.knock_on)
    ]
    return _table(("stage", "source", "starts at token", "epochs so far"), rows, words=2)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> str:
    rule = ["---" if i < words else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))
