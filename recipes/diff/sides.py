"""What the two words of `smol diff A B` mean: git revisions, stages or mixture files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from recipes.diff.compare import Diff, Problem, RecipeDiff, diff_mixtures, diff_recipes, diff_stages
from recipes.diff.gitfiles import exported, renamed
from recipes.errors import UserError, shown
from recipes.loader import find_root, load, load_mixture, recipe_names
from recipes.plan import make_plan
from recipes.recipe import Mixture, Recipe

WORKING_TREE = "working tree"


def compare(a: str, b: str | None = None, root: Path | None = None, recipe: str | None = None) -> Diff:
    """What differs between two sides.

    Args:
        a: a git revision, a stage (`smollm2-1.7b:stage2`) or a mixture file.
        b: a revision if `a` is one, else a stage or a file; none with a revision: the files as they are now.
        root: the folder that holds stages/ and mixtures/; found if left out.
        recipe: whose stage a mixture file is for, where neither the files nor the other side say so.

    Raises:
        UserError: a side that is not there, two that cannot be compared, or a side that is wrong in itself. Recipes
            of a revision that cannot be loaded are `Diff.problems` instead: the others are still compared.
    """
    root = root or find_root()
    if named := next((word for word in (a, b) if word in recipe_names(root)), None):
        raise UserError(f"{named} is a recipe", f"name one of its stages, such as {named}:stage1, or a git revision")
    revisions = [word for word in (a, b) if word is not None and _kind(word) == "revision"]
    if b is None and not revisions:
        fix = f"name two, such as `smol diff smollm2-1.7b:stage2 {a}`; your own changes: `smol diff HEAD`"
        raise UserError(f"nothing to compare {a} with", fix)
    if b is not None and len(revisions) == 1:
        fix = "name two revisions, or two stages or files (a stage is written smollm2-1.7b:stage2)"
        raise UserError(f"{a} and {b} cannot be compared: {revisions[0]} is neither a file nor a stage", fix)
    return _revisions(a, b, root) if revisions else _mixtures(a, str(b), root, recipe)


def _kind(word: str) -> Literal["revision", "stage", "file"]:
    if word.endswith((".yaml", ".yml")):
        return "file"
    return "stage" if re.fullmatch(r"[\w.-]+:[\w.-]+", word) else "revision"


def _revisions(a: str, b: str | None, root: Path) -> Diff:
    """Every recipe of either side; those that are broken on one are problems."""
    with _tree(a, root) as before, _tree(b, root) as after:
        was, now = _Recipes(before, a, "before"), _Recipes(after, b, "after")
        skip = was.broken | now.broken | {name for name in was.loaded if was.content(name) == now.content(name)}
        names = [name for name in {**was.loaded, **now.loaded} if name not in skip]
        diffs = [diff_recipes(was.loaded.get(name), now.loaded.get(name)) for name in names]
    problems = dict.fromkeys(was.problems + now.problems)
    return Diff(a, b or WORKING_TREE, tuple(diff for diff in diffs if not diff.empty), problems=tuple(problems))


@contextmanager
def _tree(revision: str | None, root: Path) -> Iterator[Path]:
    if revision is None:
        yield root
    else:
        with exported(revision, root) as folder:
            yield folder


class _Recipes:
    """The recipes of one side."""

    def __init__(self, root: Path, revision: str | None, side: Literal["before", "after"]) -> None:
        self.root = root
        self.loaded: dict[str, Recipe] = {}
        self.broken: set[str] = set()
        self.problems: list[Problem] = []
        for name in recipe_names(root):
            try:
                self.loaded[name] = load(name, root)
            except UserError as error:
                self.broken.add(name)
                self.problems.append(Problem(side, str(renamed(error, root, revision))))

    def content(self, name: str) -> dict[str, bytes]:
        """Every file that the recipe was read from, by its path below the root; none if there is no such recipe."""
        files = self.loaded[name].files if name in self.loaded else ()
        return {os.path.relpath(file, self.root): file.read_bytes() for file in files}


@dataclass(frozen=True)
class _Side:
    """One word, as far as it says what it is for."""

    word: str
    recipe: Recipe | None = None
    stage: str | None = None
    path: Path | None = None
    """Of a file whose recipe and stage are not known from its place."""

    @property
    def mixture(self) -> Mixture:
        """Of the recipe's stage, or the file's own."""
        assert self.recipe
        if self.path is not None:
            return load_mixture(self.path, self.recipe.sources)
        assert self.stage
        return self.recipe.stage(self.stage).mixture


def _mixtures(a: str, b: str, root: Path, recipe: str | None) -> Diff:
    """Two mixtures: in one stage's place, of two stages, or on their own."""
    before, after = _side(a, root), _side(b, root)
    before, after = _filled(before, after, root, recipe), _filled(after, before, root, recipe)
    if before.recipe is None or after.recipe is None or not (before.stage and after.stage):
        registry = before.recipe or after.recipe or load(recipe_names(root)[0], root)
        was, now = (replace(side, recipe=side.recipe or registry).mixture for side in (before, after))
        note = (
            "shares only: tokens, epochs and later stages depend on whose stage it is. Name it on the other side "
            "(recipe:stage), or call the file after the stage and give the recipe"
        )
        return _diff(a, b, RecipeDiff("mixture", stages=(diff_mixtures(was, now),)), note)
    old = before.recipe.with_mixture(before.stage, before.mixture)
    if (before.recipe.name, before.stage) == (after.recipe.name, after.stage):
        other = after.recipe.root != before.recipe.root
        notes = [f"both counted in {before.recipe.name} below {shown(before.recipe.root)}"] if other else []
        return _diff(a, b, diff_recipes(old, before.recipe.with_mixture(after.stage, after.mixture)), *notes)
    new = after.recipe.with_mixture(after.stage, after.mixture)
    stages = diff_stages(make_plan(old).stage(before.stage), make_plan(new).stage(after.stage))
    name = old.name if old.name == new.name else f"{old.name} → {new.name}"
    return _diff(a, b, RecipeDiff(name, stages=(stages,)), "two stages: nothing follows for later ones")


def _diff(a: str, b: str, recipe: RecipeDiff, *notes: str) -> Diff:
    stages = tuple(stage for stage in recipe.stages if any(line.changed for line in stage.lines))
    recipe = replace(recipe, stages=stages)
    return Diff(a, b, () if recipe.empty else (recipe,), notes)


def _side(word: str, root: Path) -> _Side:
    """A stage, or a file; a file at mixtures/<recipe>/<stage>.yaml is that stage's."""
    if _kind(word) == "stage":
        name, stage = word.split(":")
        recipe = load(name, root)
        return _Side(word, recipe, recipe.stage(stage).name)
    path = next((p for p in (Path(word), root / word) if p.exists()), Path(word)).resolve()
    above = path.parents
    if len(above) > 2 and above[1].name == "stages":
        raise UserError("this file says when a stage ends, not its mixture", f"write {above[0].name}:{path.stem}", path)
    if len(above) > 2 and above[1].name == "mixtures" and (above[2] / "stages" / above[0].name).is_dir():
        recipe = load(above[0].name, above[2])
        stages = [s.name for s in recipe.stages + recipe.branches if s.mixture_file.resolve() == path]
        if stages:
            return _Side(word, recipe, stages[0])
    return _Side(word, path=path)


def _filled(side: _Side, other: _Side, root: Path, recipe: str | None) -> _Side:
    """A file's recipe from the other side, else `recipe`; its stage by the file's name, else from the other side."""
    if side.path is None:
        return side
    whose = other.recipe or (load(recipe, root) if recipe else None)
    if whose is None:
        return side
    stages = {stage.name for stage in whose.stages + whose.branches}
    guesses = [side.path.stem, other.stage, other.path.stem if other.path else None]
    return replace(side, recipe=whose, stage=next((guess for guess in guesses if guess in stages), None))
