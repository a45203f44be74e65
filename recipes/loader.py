"""Reads a recipe: stages/, mixtures/ and the source registry. Nothing else reads these YAML files."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from recipes.data.interleave import MAX_PERIOD
from recipes.errors import UserError
from recipes.recipe import (
    Batch,
    Branch,
    Checkpoints,
    Count,
    Guard,
    Mixture,
    Model,
    Optimizer,
    Parallelism,
    Recipe,
    Scale,
    Schedule,
    Source,
    Stage,
    Strict,
    Tokenizer,
    Tokens,
    decimal,
)
from recipes.yamlfile import Key, Places, YamlFile, places_of, read_yaml, typed, typed_error


class _StageFile(Strict):
    end_tokens: Tokens | None = None
    end_step: Count | None = None
    branch: Branch | None = None
    sequence_length: Count | None = None
    micro_batch: Count | None = None
    accumulation: Count | None = None
    rope_theta: float | None = None
    schedule: Schedule | None = None
    mixture: str | None = None


class _RecipeFile(Strict):
    name: str
    extends: str | None = None
    scale: Scale | None = None
    seed: int
    model: Model
    tokenizer: Tokenizer
    batch: Batch
    parallelism: Parallelism
    optimizer: Optimizer
    schedule: Schedule
    checkpoints: Checkpoints
    guard: Guard = Guard()
    block_tokens: Count
    sources: str = "mixtures/sources.yaml"
    stages: Annotated[tuple[str, ...], Field(min_length=1)]
    branches: tuple[str, ...] = ()


class _Registry(Strict):
    sources: dict[str, Source]


def find_root() -> Path:
    """The nearest folder upwards that holds stages/ and mixtures/, else this repository's own."""
    here = Path.cwd()
    for folder in (here, *here.parents, Path(__file__).resolve().parent.parent):
        if (folder / "stages").is_dir() and (folder / "mixtures").is_dir():
            return folder
    fix = "go to a clone of the repository, or give the path of a recipe.yaml"
    raise UserError("no folder with stages/ and mixtures/ from here upwards", fix, here)


def recipe_names(root: Path) -> list[str]:
    """The recipes below `root`/stages."""
    return sorted(p.parent.name for p in (root / "stages").glob("*/recipe.yaml"))


def load(recipe: str | Path, root: Path | None = None) -> Recipe:
    """Loads a recipe by its name below `root`/stages, or by the path of its folder or recipe.yaml.

    Raises:
        UserError: the first thing that is wrong, with its file, key, and what to write instead.
    """
    path = Path(recipe)
    if len(path.parts) == 1 and not path.exists():
        root = root or find_root()
        if not (root / "stages" / path / "recipe.yaml").is_file():
            names = recipe_names(root)
            near = difflib.get_close_matches(str(recipe), names, 1)
            fix = f"did you mean {near[0]}?" if near else f"name one of {', '.join(names)}"
            raise UserError(f"there is no recipe '{recipe}'", fix.rstrip("?"), root / "stages")
        path = root / "stages" / path
    folder = path.parent if path.suffix == ".yaml" else path
    return _Loader(root or folder.resolve().parent.parent).load(folder)


class _Loader:
    """Reads a recipe's files and joins them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files: list[Path] = []

    def read(self, path: Path) -> YamlFile:
        file = read_yaml(path)
        self.files.append(path)
        return file

    def load(self, folder: Path) -> Recipe:
        chain = self.chain(folder)
        raw, places = _merge(chain)
        file = typed(_RecipeFile, raw, places)
        if file.name != folder.resolve().name:
            fix = f"write {folder.resolve().name}, or rename the folder"
            raise typed_error(places, ("name",), f"'{file.name}' is not the folder's name", fix)
        registry = self.registry(file.sources)
        step_scale = Fraction(1)
        if file.scale is not None:
            step_scale = file.scale * _tokens_per_step(chain[1:], chain[0]) / file.batch.tokens_per_step
        scaled = _Scaler(file, file.scale or Fraction(1), step_scale)
        stages: list[Stage] = []
        for name in file.stages:
            stages.append(self.stage(name, chain, scaled, registry, stages))
        branches = tuple(self.stage(name, chain, scaled, registry, stages, branch=True) for name in file.branches)
        return Recipe(
            name=file.name, seed=file.seed, scale=scaled.tokens, model=file.model, tokenizer=file.tokenizer,
            tokens_per_step=file.batch.tokens_per_step, parallelism=file.parallelism, optimizer=file.optimizer,
            schedule=scaled.schedule(file.schedule), checkpoints=file.checkpoints, guard=file.guard,
            block_tokens=file.block_tokens, stages=tuple(stages), branches=branches, sources=registry, root=self.root,
            files=tuple(self.files),
        )  # fmt: skip

    def chain(self, folder: Path) -> list[YamlFile]:
        """The recipe's file, then what it extends, and so on."""
        chain = [self.read(folder / "recipe.yaml")]
        while base := chain[-1].data.get("extends"):
            if not isinstance(base, str) or any(base == f.path.parent.name for f in chain):
                where = f"line {chain[-1].lines[('extends',)]}: extends"
                raise UserError(f"{base!r} cannot be extended", "name another recipe", chain[-1].path, where)
            chain.append(self.read(self.root / "stages" / base / "recipe.yaml"))
        return chain

    def registry(self, name: str) -> dict[str, Source]:
        file = self.read(self.root / name)
        return typed(_Registry, file.data, places_of(file)).sources

    def stage(
        self, name: str, chain: list[YamlFile], scaled: _Scaler, registry: dict[str, Source],
        before: list[Stage], branch: bool = False,
    ) -> Stage:  # fmt: skip
        """Reads a stage's file, from the nearest recipe of the chain that has one, and its mixture."""
        folders = [file.path.parent for file in chain]
        folder = next((f for f in folders if (f / f"{name}.yaml").is_file()), folders[0])
        file = self.read(folder / f"{name}.yaml")
        data = typed(_StageFile, file.data, places_of(file))
        mixture_file = self.root / (data.mixture or f"mixtures/{folder.name}/{name}.yaml")
        start, end = scaled.span(file, data, before, branch)
        batch = scaled.file.batch
        return Stage(
            name=name, start_step=start, end_step=end, branch=data.branch.stage if data.branch else None,
            sequence_length=data.sequence_length or batch.sequence_length,
            micro_batch=data.micro_batch or batch.micro_batch,
            accumulation=data.accumulation or batch.accumulation,
            rope_theta=data.rope_theta or scaled.file.model.rope_theta,
            schedule=scaled.schedule(data.schedule or scaled.file.schedule),
            mixture=self.mixture(mixture_file, registry), file=file.path, mixture_file=mixture_file,
        )  # fmt: skip

    def mixture(self, path: Path, registry: dict[str, Source]) -> Mixture:
        file = self.read(path)
        return check_mixture(file, registry)


def load_mixture(path: Path, registry: dict[str, Source]) -> Mixture:
    """Reads one mixture file against a source registry.

    Raises:
        UserError: shares that do not sum to 1, a source that is unknown or of another domain, a period too long.
    """
    return check_mixture(read_yaml(path), registry)


def check_mixture(file: YamlFile, registry: dict[str, Source]) -> Mixture:
    """Types a mixture file's data and checks it; see `load_mixture`."""
    places = places_of(file)
    mixture = typed(Mixture, file.data, places)
    _check_sum("the domains' shares", (d.share for d in mixture.domains.values()), places, ("domains",))
    for name, domain in mixture.domains.items():
        key: Key = ("domains", name, "sources")
        _check_sum(f"the shares inside {name}", domain.sources.values(), places, key)
        for source in domain.sources:
            _check_source(source, name, registry, places, (*key, source))
    period = math.lcm(*(share.denominator for share in mixture.shares.values()))
    if period > MAX_PERIOD:
        found = f"the shares repeat only after {period:,} samples, above {MAX_PERIOD:,}"
        raise UserError(found, "write the shares with fewer decimals", file.path, "domains")
    if len(mixture.shares) != sum(len(d.sources) for d in mixture.domains.values()):
        raise UserError("a source stands in two domains", "keep it in one", file.path, "domains")
    return mixture


def _check_sum(what: str, shares: Iterable[Fraction], places: Places, key: Key) -> None:
    shares = list(shares)
    if (total := sum(shares, Fraction(0))) != 1:
        fix = f"change one by {decimal(1 - total, signed=True)} so that they sum to exactly 1; nothing is normalised"
        raise typed_error(places, key, f"{what} sum to {decimal(total)}", fix)


def _check_source(source: str, domain: str, registry: dict[str, Source], places: Places, key: Key) -> None:
    if source not in registry:
        near = difflib.get_close_matches(source, registry, 1)
        fix = f"write {near[0]}" if near else "add it to mixtures/sources.yaml"
        raise typed_error(places, key, f"the source '{source}' is not in the registry", fix)
    if registry[source].domain != domain:
        fix = f"move it to {registry[source].domain}, or correct its domain in the registry"
        raise typed_error(places, key, f"'{source}' belongs to the domain {registry[source].domain}, not {domain}", fix)


@dataclass(frozen=True)
class _Scaler:
    """Turns the files' tokens and steps into this recipe's steps."""

    file: _RecipeFile
    tokens: Fraction
    """Factor on tokens."""
    steps: Fraction
    """Factor on steps: of the extended recipe's step size, into this one's."""

    def to_step(self, tokens: int | None, step: int | None) -> int:
        """Whole steps that fit; tokens between two steps belong to the next stage."""
        if step is not None:
            return math.floor(step * self.steps)
        assert tokens is not None
        return math.floor(tokens * self.tokens / self.file.batch.tokens_per_step)

    def schedule(self, schedule: Schedule) -> Schedule:
        """The schedule with warm-up and decay scaled; both stay at least one step long."""
        if self.steps == 1:
            return schedule
        start = math.floor(schedule.decay_start_step * self.steps)
        end = math.floor((schedule.decay_start_step + schedule.decay_steps) * self.steps)
        warmup = math.ceil(schedule.warmup_steps * self.steps)
        update = {"warmup_steps": warmup, "decay_start_step": start, "decay_steps": max(1, end - start)}
        return schedule.model_copy(update=update)

    def span(self, file: YamlFile, data: _StageFile, before: list[Stage], branch: bool) -> tuple[int, int]:
        """The stage's first and last step.

        Raises:
            UserError: no end or two; an end that is not after the start; a branch of a stage that is not there.
        """
        places = places_of(file)
        if (data.end_tokens is None) == (data.end_step is None):
            raise UserError("needs one of end_tokens and end_step", "write the stage's end once", file.path)
        key: Key = ("end_tokens",) if data.end_step is None else ("end_step",)
        end = self.to_step(data.end_tokens, data.end_step)
        if branch != (data.branch is not None):
            found = (
                "listed under branches, but has no `branch`" if branch else "has a `branch`, but is listed under stages"
            )
            raise UserError(found, "list it under the other, or add or remove the key", file.path, "branch")
        start = before[-1].end_step if before else 0
        if data.branch is not None:
            start = self.branch_start(data.branch, before, places)
        if end <= start:
            found = f"ends at step {end:,}, but starts at step {start:,}"
            raise typed_error(places, key, found, "write an end after the start: stages go forward")
        return start, end

    def branch_start(self, branch: Branch, before: list[Stage], places: Places) -> int:
        trunk = next((s for s in before if s.name == branch.stage), None)
        if trunk is None:
            fix = f"name one of {', '.join(s.name for s in before)}"
            raise typed_error(places, ("branch", "stage"), f"there is no stage '{branch.stage}' to leave", fix)
        start = trunk.end_step - self.to_step(branch.tokens_before_end, None)
        if not trunk.start_step < start <= trunk.end_step:
            found = f"leaves {trunk.name} at step {start:,}, outside its {trunk.start_step:,}–{trunk.end_step:,}"
            raise typed_error(places, ("branch", "tokens_before_end"), found, "write fewer tokens")
        return start


def _merge(chain: list[YamlFile]) -> tuple[dict[str, Any], Places]:
    """The chain's mappings over one another, the first on top; `extends` and `scale` are the first's own."""
    raw: dict[str, Any] = {}
    places: Places = {}
    for file in reversed(chain):
        raw = _deep_update({k: v for k, v in raw.items() if k not in ("extends", "scale")}, file.data)
        places.update(places_of(file))
    return raw, places


def _deep_update(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    def merged(key: str, value: Any) -> Any:
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        return _deep_update(base[key], value) if both else value

    return {**base, **{key: merged(key, value) for key, value in over.items()}}


def _tokens_per_step(base: list[YamlFile], overlay: YamlFile) -> int:
    if not base:
        fix = "add `extends: <recipe>`, or remove `scale`"
        raise typed_error(places_of(overlay), ("scale",), "scale without a recipe to scale", fix)
    raw, places = _merge(base)
    inside = {key[1:]: place for key, place in places.items() if key[:1] in ((), ("batch",))}
    batch = typed(Batch, raw.get("batch", {}), inside)
    return batch.tokens_per_step
