"""What differs between two recipes besides the mixtures: every other key, before and after."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from recipes.recipe import Recipe, Source, Stage, Strict
from recipes.show import amount


@dataclass(frozen=True)
class Change:
    """Another key of the recipe or a stage with another value, as text."""

    key: str
    before: str
    after: str
    data: bool
    """Whether it decides which tokens are seen, or when."""


_ELSEWHERE = {"name", "stages", "branches", "sources", "root", "files"}
_STAGE_KEYS = ("branch", "sequence_length", "micro_batch", "accumulation", "rope_theta", "schedule")
_NOT_DATA = re.compile(
    r"(model|parallelism|optimizer|schedule|checkpoints|guard|scale|micro_batch|accumulation|rope_theta)\b|.*\.license$"
)
"""Keys that decide how the model is trained, not what it reads; a key that this list does not know counts as data."""


def changes_between(before: Recipe, after: Recipe) -> Iterator[Change]:
    """Every other key with another value; a stage's only where the recipe's own did not change alike."""
    names = _read(before) | _read(after)
    was, now = _figures(before, after, names), _figures(after, before, names)
    own = [(key, was.get(key, "–"), now.get(key, "–")) for key in {**was, **now} if was.get(key) != now.get(key)]
    for change in own:
        yield Change(*change, data=not _NOT_DATA.match(change[0]))
    alike: dict[tuple[str, str, str], list[str]] = {}
    old = {stage.name: stage for stage in before.stages + before.branches}
    for stage in after.stages + after.branches:
        if stage.name in old:
            for key, pair in _stage_changes(before, after, old[stage.name], stage).items():
                if (f"model.{key}", *pair) not in own and (key, *pair) not in own:
                    alike.setdefault((key, *pair), []).append(stage.name)
    for (key, was_text, now_text), stages in alike.items():
        yield Change(f"{', '.join(stages)}: {key}", was_text, now_text, data=not _NOT_DATA.match(key))


def _read(recipe: Recipe) -> set[str]:
    """The sources that some stage reads, and those that overlap with them."""
    read = {name for stage in recipe.stages + recipe.branches for name in stage.mixture.shares}
    families = {recipe.sources[name].family for name in read} - {None}
    return read | {name for name, source in recipe.sources.items() if source.family in families}


def _figures(recipe: Recipe, other: Recipe, sources: set[str]) -> dict[str, str]:
    raw: dict[str, Any] = {f.name: getattr(recipe, f.name) for f in fields(recipe) if f.name not in _ELSEWHERE}
    raw |= {key: ", ".join(stage.name for stage in getattr(recipe, key)) for key in ("stages", "branches")}
    listed = {name: recipe.sources[name] for name in sorted(sources & set(recipe.sources))}
    raw["sources"] = {name: source if name in other.sources else _described(source) for name, source in listed.items()}
    return {key: _text(value) for key, value in _flat(raw)}


def _described(source: Source) -> str:
    """A source that one side alone has, in one line."""
    return ", ".join(f"{key} {_text(value)}" for key, value in _flat(source) if value is not None)


def _stage_changes(before: Recipe, after: Recipe, was: Stage, now: Stage) -> dict[str, tuple[str, str]]:
    old, new = _stage_figures(before, was), _stage_figures(after, now)
    return {key: (old.get(key, "–"), new[key]) for key in new if old.get(key) != new[key]}


def _stage_figures(recipe: Recipe, stage: Stage) -> dict[str, str]:
    figures = {key: _text(value) for key, value in _flat({key: getattr(stage, key) for key in _STAGE_KEYS})}
    steps = {"start_step": stage.start_step} if stage.branch else {}
    for key, step in (steps | {"end_step": stage.end_step}).items():
        figures[key] = f"{step:,} ({amount(step * recipe.tokens_per_step)} tokens)"
    return figures


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings and models as dotted keys."""
    value = value.model_dump() if isinstance(value, Strict) else value
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _flat(part, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def _text(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)
