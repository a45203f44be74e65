"""Benchmarks: what the data plan costs, beside an index built up front."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import sys
import time
from array import array
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from recipes.data.dataset import MixtureDataset, rank_samples
from recipes.data.interleave import Interleave
from recipes.data.manifest import Manifest, TokenFile
from recipes.data.stream import SourceStream
from recipes.files import FileEntry, write_json
from recipes.loader import load
from recipes.plan import Plan, make_plan
from recipes.recipe import Recipe
from recipes.run import code_revision
from recipes.show import amount, bytes_of, wide_console

FILE_TOKENS = 1_000_000_000
"""Tokens per file of the sources that only seem to be there."""
LOCATED = 1 << 24
CHUNK = 1 << 16
PACKAGES = ("numpy", "torch", "nanotron", "datatrove", "tokenizers", "transformers", "flash-attn", "triton")
INDEX_SECONDS = 60
"""After so long the index that is built for comparison stays shorter."""


@dataclass(frozen=True)
class Figure:
    """One measurement."""

    what: str
    value: float
    unit: str
    target: float
    least: bool
    """Whether the target is the least that is wanted; else the most."""

    @property
    def met(self) -> bool:
        """Whether the value is on the right side of the target."""
        return self.value >= self.target if self.least else self.value <= self.target


@dataclass(frozen=True)
class IndexCost:
    """What an index of (source, sample) pairs costs, built up front by the greedy rule."""

    samples: int
    seconds: float
    bytes: int
    measured: bool
    """Whether it was built; else it is extrapolated from the one that was."""


def bench_data(
    json_path: Path | None = None, recipe: str = "smollm2-1.7b", stage: str | None = None,
    read_tokens: int = 200_000_000, index_samples: int = 20_000_000,
) -> dict[str, Any]:  # fmt: skip
    """Measures the data plan of a stage and prints it; in about a minute, with 400 MB of temporary files.

    Args:
        json_path: where to write the same as JSON, if anywhere.
        stage: the recipe's last one if none.
        read_tokens: random tokens that are written and read.
        index_samples: entries of the index that is built for comparison.

    Returns:
        What is written as JSON: recipe, stage, figures, index, interleave, machine, load, versions, code.

    Raises:
        UserError: there is no such recipe or stage.
    """
    console = wide_console()
    loaded = load(recipe)
    plan, name = make_plan(loaded), loaded.stage(stage).name if stage else loaded.stages[-1].name
    with TemporaryDirectory(prefix="smol-bench-") as folder, console.status("opening a stage of sparse files"):
        pretend_sources(plan, name, loaded, Path(folder))
        figures = [*opening(recipe, name, Path(folder)), *locating(plan, name, Path(folder))]
    with TemporaryDirectory(prefix="smol-bench-") as folder, console.status("reading random tokens"):
        figures += reading(plan, name, random_sources(plan, name, loaded, read_tokens, Path(folder)))
    index, interleave = indexing(plan, name, index_samples), building(plan, name)
    result = {
        "recipe": plan.recipe, "stage": name, "figures": [{**asdict(f), "met": f.met} for f in figures],
        "index": [asdict(cost) for cost in index], "interleave": interleave, **surroundings(),
    }  # fmt: skip
    show(result, figures, index, console)
    if json_path is not None:
        write_json(json_path, result)
    return result


def pretend_sources(plan: Plan, stage: str, recipe: Recipe, folder: Path) -> None:
    """Makes a tokenised folder for each source of a stage: of its real size, but sparse, so on no disk."""
    for use in plan.stage(stage).sources:
        tokens = recipe.sources[use.name].tokens or use.offset + use.tokens
        sizes = [min(FILE_TOKENS, tokens - begin) for begin in range(0, tokens, FILE_TOKENS)]
        manifest = _manifest(recipe, folder / use.name, use.name, sizes)
        for file in manifest.files:
            manifest.path(file).touch()
            os.truncate(manifest.path(file), file.tokens * manifest.token_bytes)
        manifest.save()


def random_sources(plan: Plan, stage: str, recipe: Recipe, tokens: int, folder: Path) -> dict[str, SourceStream]:
    """Writes random tokens for each source of a stage, by its share but at least four blocks, in two files."""
    random = np.random.default_rng(plan.seed)
    streams = {}
    for use in plan.stage(stage).sources:
        sizes = [max(int(tokens * use.share) // 2, 2 * plan.block_tokens + 1)] * 2
        manifest = _manifest(recipe, folder / use.name, use.name, sizes)
        for file in manifest.files:
            random.integers(0, manifest.vocab_size, file.tokens, dtype=manifest.dtype).tofile(manifest.path(file))
        streams[use.name] = SourceStream(manifest, plan.seed, plan.block_tokens)
    return streams


def _manifest(recipe: Recipe, folder: Path, source: str, sizes: list[int]) -> Manifest:
    folder.mkdir()
    width = 2 if recipe.tokenizer.vocab_size <= 1 << 16 else 4
    files = tuple(TokenFile(f"{n:05}.ds", tokens, documents=1) for n, tokens in enumerate(sizes))
    entries = [FileEntry(file.name, file.tokens * width, "0" * 32) for file in files]
    entries += [FileEntry(file.name + ".index", 8, "0" * 32) for file in files]
    return Manifest(
        folder, source, "0" * 64, recipe.tokenizer.vocab_size, 0, width, sum(sizes), len(sizes), files, {},
        tuple(entries),
    )  # fmt: skip


def open_stage(plan: Plan, stage: str, folder: Path) -> MixtureDataset:
    """Opens a stage from a folder with one tokenised folder for each source."""
    names = plan.stage(stage).shares
    streams = {name: SourceStream(Manifest.load(folder / name), plan.seed, plan.block_tokens) for name in names}
    return MixtureDataset(plan, stage, streams)


def open_last(recipe: str, stage: str, folder: Path) -> tuple[float, int]:
    """Reads a recipe, opens a stage and reads its last sample: seconds, and the growth of this process in bytes."""
    before, started = memory("VmRSS"), time.perf_counter()
    dataset = open_stage(make_plan(load(recipe)), stage, folder)
    dataset[len(dataset) - 1]
    return time.perf_counter() - started, memory("VmHWM") - before


def memory(what: str) -> int:
    """This process's memory in bytes: VmRSS now, VmHWM at its highest. Outside Linux always the highest."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def opening(recipe: str, stage: str, folder: Path) -> list[Figure]:
    """Opens the stage at its last sample in a fresh process that has imported everything."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        seconds, grown = pool.submit(open_last, recipe, stage, folder).result()
    return [
        Figure(f"open {stage} at its last sample", seconds, "s", 1, least=False),
        Figure("memory for that, beyond the imports", grown, "B", 50e6, least=False),
    ]


def locating(plan: Plan, stage: str, folder: Path) -> list[Figure]:
    """Locates the last samples of the stage, first as (source, offset), then down to the token in the file."""
    dataset = open_stage(plan, stage, folder)
    first = max(0, len(dataset) - LOCATED)
    chunks = [np.arange(n, min(n + CHUNK, len(dataset))) for n in range(first, len(dataset), CHUNK)]

    def find(numbers: np.ndarray[Any, np.dtype[np.int64]]) -> int:
        sources, offsets = dataset.locate(numbers)
        for number, stream in enumerate(dataset.streams):
            stream.locate(offsets[sources == number])
        return len(numbers)

    plain = per_second(len(dataset.locate(numbers)[0]) for numbers in chunks)
    whole = per_second(find(numbers) for numbers in chunks)
    return [
        Figure("samples located, to the source and its offset", plain, "/s", 1e6, least=True),
        Figure("samples located, to the file and the token", whole, "/s", 1e6, least=True),
    ]


def reading(plan: Plan, stage: str, streams: dict[str, SourceStream]) -> list[Figure]:
    """Reads about as much as there is, three ways, once all of it is in the page cache."""
    dataset, planned = MixtureDataset(plan, stage, streams), plan.stage(stage)
    length, step, size = planned.sequence_length, planned.samples_per_step, planned.micro_batch
    dp = step // (size * planned.accumulation)
    samples = min(len(dataset), sum(stream.epoch_tokens for stream in streams.values()) // length)
    first = len(dataset) - samples
    slices = [slice(n, min(n + step, len(dataset))) for n in range(first, len(dataset), step)]
    batches = (
        rows
        for number in range(planned.steps)[-max(1, samples // step) :]
        for rank in range(dp)
        for rows in rank_samples(number, step, dp, rank, size)
    )
    ways = {
        f"slices of {step:,} samples": (len(dataset[numbers]) for numbers in slices),
        f"micro-batches of {size}, all {dp} ranks in turn": (len(dataset[rows]) for rows in batches),
        "one sample at a time": (len(dataset[n]) // length for n in range(first, len(dataset))),
    }
    for stream in streams.values():
        stream.read(0, stream.epoch_tokens)
    sample_bytes = length * dataset.streams[0].manifest.token_bytes
    return [
        Figure(f"read, {way}", per_second(counts) * sample_bytes / 1e6, "MB/s", 200, least=True)
        for way, counts in ways.items()
    ]


def per_second(counts: Iterable[int]) -> float:
    """Walks through the work; returns the sum of its counts divided by the seconds."""
    started = time.perf_counter()
    total = sum(counts)
    return total / (time.perf_counter() - started)


def greedy_index(weights: list[float], samples: int, seconds: float) -> tuple[bytearray, array[int]]:
    """The usual index: each sample goes to the source that is furthest behind its weight, the first of equals.

    Entry n is the source of sample n, and how many samples that source has had. Sequential by nature: each choice
    depends on all before it. Stops early after so many seconds.
    """
    sources, numbers, counts = bytearray(), array("q"), [0] * len(weights)
    started = time.perf_counter()
    for begin in track(range(0, samples, CHUNK), "building the usual index", transient=True):
        if time.perf_counter() - started > seconds:
            break
        for n in range(begin, min(begin + CHUNK, samples)):
            errors = [weight * (n or 1) - count for weight, count in zip(weights, counts, strict=True)]
            source = errors.index(max(errors))
            sources.append(source)
            numbers.append(counts[source])
            counts[source] += 1
    return sources, numbers


def indexing(plan: Plan, stage: str, samples: int) -> list[IndexCost]:
    """Builds the usual index for a stage's first samples; then the same for the stage and the run, in proportion."""
    planned = plan.stage(stage)
    started = time.perf_counter()
    sources, numbers = greedy_index([float(share) for share in planned.shares.values()], samples, INDEX_SECONDS)
    seconds, built = time.perf_counter() - started, len(sources)
    entry = 1 + numbers.itemsize
    whole = [planned.samples, sum(s.samples for s in plan.stages)]
    return [
        IndexCost(built, seconds, built * entry, measured=True),
        *(IndexCost(n, seconds * n / built, n * entry, measured=False) for n in whole),
    ]


def building(plan: Plan, stage: str) -> dict[str, Any]:
    """Builds the interleaving of a stage, whatever the number of samples: period, seconds, bytes."""
    shares = plan.stage(stage).shares
    started = time.perf_counter()
    interleave = Interleave(shares)
    seconds = time.perf_counter() - started
    return {"period": interleave.period, "seconds": seconds, "bytes": interleave.nbytes}


def surroundings() -> dict[str, Any]:
    """The machine and its load (processes that ran in the last minute), versions and code of a measurement."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "memory": pages, "system": platform.platform()},
        "load": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "code": code_revision(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def show(result: dict[str, Any], figures: list[Figure], index: list[IndexCost], console: Console) -> None:
    """Prints the figures against their targets, and the usual index beside the plan."""
    table = Table("", "measured", "wanted", "", title=f"{result['recipe']}, {result['stage']}", box=SIMPLE_HEAD)
    for figure in figures:
        wanted = f"{'≥' if figure.least else '≤'} {_value(figure.target, figure.unit)}"
        met = "[green]met[/]" if figure.met else "[red]missed[/]"
        table.add_row(figure.what, _value(figure.value, figure.unit), wanted, met)
    console.print(table)
    plan = result["interleave"]
    usual = Table("samples", "seconds", "bytes", "", title="an index built up front", box=SIMPLE_HEAD)
    for cost in index:
        built = "built" if cost.seconds < INDEX_SECONDS else f"built until {INDEX_SECONDS} s were over"
        usual.add_row(
            f"{cost.samples:,}",
            f"{cost.seconds:,.1f}",
            bytes_of(cost.bytes),
            built if cost.measured else "extrapolated",
        )
    usual.add_row("any number", f"{plan['seconds']:.3f}", bytes_of(plan["bytes"]), "the plan's interleaving, built")
    console.print(usual)
    versions, code = result["versions"], result["code"]
    changed = ", with changes" if code["changed"] else ""
    console.print(
        "The index: the greedy largest-error rule, in pure Python on one core. A compiled helper, as Megatron-LM has, "
        f"takes less time and as many bytes.\n{result['machine']['processor']}, one thread, load {result['load']:.1f}; "
        f"Python {versions['python']}, NumPy {versions['numpy']}; code {code['revision'] or 'outside git'}{changed}.",
        highlight=False,
    )


def _value(value: float, unit: str) -> str:
    if unit == "B":
        return bytes_of(value)
    if unit == "/s":
        return f"{amount(value)} a second"
    return f"{value:.2g} {unit}" if value < 10 else f"{value:,.0f} {unit}"
