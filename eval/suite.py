"""A suite: which benchmarks are run, with how many shots and items. Reads eval/suites/*.yaml; nothing else does."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from recipes.errors import UserError
from recipes.recipe import Count, Steps, Strict
from recipes.yamlfile import Places, places_of, read_yaml, typed, typed_error

SUITES = Path(__file__).resolve().parent / "suites"
Metric = Literal["acc", "acc_norm", "bits_per_byte", "extractive_match", "qem", "exact_match", "pass@1"]
"""Fixed names: accuracy, accuracy normalised by characters, bits a byte of the right answer (lower is better), the last
number of the answer, the answer after ####, exact match, unit tests passed at the first try."""


class Benchmark(Strict):
    """One benchmark as a suite runs it."""

    metric: Metric
    """The one that counts; all that the task has are kept."""
    shots: Steps
    limit: Count | None = None
    """Items of each subtask, drawn with a fixed seed; all of them if left out."""
    items: Count
    """Of the whole test set."""
    chance: float
    """What guessing reaches, in the metric's unit."""
    domains: Annotated[tuple[str, ...], Field(min_length=1)]
    """The domains of a mixture that it speaks about."""


class _SuiteFile(Strict):
    extends: str | None = None
    only: tuple[str, ...] | None = None
    limit: Count | None = None
    benchmarks: dict[str, Benchmark] = Field(default_factory=dict)


class Suite(Strict):
    """Benchmarks that are run together, in the file's order."""

    name: str
    benchmarks: dict[str, Benchmark]


def suite_names() -> list[str]:
    """The suites there are."""
    return sorted(path.stem for path in SUITES.glob("*.yaml"))


def load_suite(name: str) -> Suite:
    """Reads a suite by its name, or by its file's path.

    Raises:
        UserError: there is none of that name, or its file is wrong.
    """
    path = Path(name) if name.endswith(".yaml") else SUITES / f"{name}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(name, suite_names(), 1)
        fix = f"did you mean {near[0]}" if near else f"name one of {', '.join(suite_names())}"
        raise UserError(f"there is no suite '{name}'", fix, path.parent)
    read = read_yaml(path)
    places = places_of(read)
    file = typed(_SuiteFile, read.data, places)
    base = load_suite(file.extends) if file.extends else None
    benchmarks = _chosen({**(base.benchmarks if base else {}), **file.benchmarks}, file, places)
    return Suite(name=path.stem, benchmarks=benchmarks)


def _chosen(benchmarks: dict[str, Benchmark], file: _SuiteFile, places: Places) -> dict[str, Benchmark]:
    """Those that `only` names, with the file's limit where they have none of their own."""
    for i, name in enumerate(file.only or ()):
        if name not in benchmarks:
            fix = f"name one of {', '.join(benchmarks)}"
            raise typed_error(places, ("only", i), f"there is no benchmark '{name}'", fix)
    chosen = {name: benchmarks[name] for name in file.only or benchmarks}
    if not chosen:
        raise typed_error(places, (), "the suite has no benchmarks", "add `benchmarks:` or `extends:`")
    update = {"limit": file.limit}
    return {n: b.model_copy(update=update) if b.limit is None and file.limit else b for n, b in chosen.items()}
