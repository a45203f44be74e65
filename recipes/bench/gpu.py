"""`smol bench gpu`: is training right on this GPU, how fast is it, and what does each fused part give.

Measurements are processes of their own (engine/gpu_case.py), so that a GPU that is full ends one of them only; what
is small shares one. What counts most comes first, and every row is written as soon as it is there: a run that is cut
short loses none.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from recipes.bench.data import surroundings
from recipes.bench.engine import write_random
from recipes.bench.gpu_show import ROUNDING, Result, show
from recipes.engine.checkpoint import Topology, remove
from recipes.engine.config import nanotron_config
from recipes.engine.convert import to_transformers
from recipes.engine.gpu_case import OUT_OF_MEMORY, WARMUP, Case
from recipes.errors import UserError
from recipes.files import read_lines, write_atomic, write_json
from recipes.loader import load
from recipes.plan import H100_FLOPS, flops_per_token, make_plan
from recipes.recipe import Recipe
from recipes.run import Run, freeze
from recipes.show import wide_console

STATE_BYTES = 18
"""A parameter's, while activations are largest: bf16 weight, fp32 weight, gradient and two moments."""
ROOM = 0.93
"""chosen: of a GPU's memory, for tensors; the rest is CUDA's, NCCL's and the allocator's."""
TRIES = 3
CALM_LR = 5e-4
"""The 1.7B's peak, for long comparisons: at the tiny model's 3e-3 rounding alone grows to 2.2e-3 in 200 steps."""
LOOK = 0.2
"""Seconds between two looks at a process."""
LEAST_SECONDS = 20.0
"""In less no measurement is begun: it takes half of that to import everything."""
OVER = "not measured: the time was over"
SHIPPED, PLAIN, ALL = "Nanotron as shipped", "nothing fused", "all"
OTHERS = "transformers, compiled, bf16"
LATE = "all, loss read a step late"
LOSS_ROWS = 2048
POINTWISE = {"norm": True, "rotary": True, "swiglu": True}
FUSED: dict[str, dict[str, Any]] = {
    "norm": {"norm": True},
    "rotary": {"rotary": True},
    "SwiGLU": {"swiglu": True},
    "loss": {"loss_rows": LOSS_ROWS},
    "attention, flash": {"attention": "flash"},
    "attention, cuDNN": {"attention": "cudnn"},
    "all, layers not compiled": {**POINTWISE, "attention": "flash", "loss_rows": LOSS_ROWS},
    ALL: {**POINTWISE, "attention": "flash", "loss_rows": LOSS_ROWS, "layer": True},
    "all, cuDNN": {**POINTWISE, "attention": "cudnn", "loss_rows": LOSS_ROWS, "layer": True},
}
"""The variants: fields of engine/fused.py's Fused."""
TINY: dict[str, Any] = {
    "name": "tiny", "block_tokens": 256, "branches": [], "checkpoints": {"interval": 5, "keep_every": 0},
    "model": {"layers": 2, "hidden": 128, "ffn": 256, "heads": 2, "kv_heads": 1, "vocab_size": 512, "init_std": 0.05},
    "tokenizer": {"vocab_size": 512}, "batch": {"tokens_per_step": 256, "sequence_length": 64, "micro_batch": 4},
    "parallelism": {"dp": 1}, "schedule": {"peak_lr": 3.0e-3},
}  # fmt: skip
"""Laid over a recipe, for what is about being right and not about being fast: heads of 64 as in the real ones."""
DETERMINISTIC = """
import sys, torch
torch.use_deterministic_algorithms(True)  # with warn_only PyTorch's attention would stay as it is
sys.modules["flash_attn"] = None  # its backward pass adds in no fixed order
"""
TRAIN = "from recipes.train import main; sys.exit(main())"


@dataclass(frozen=True)
class Bench:
    """What the measurements share."""

    recipe: Recipe
    """Whose speed is measured."""
    tiny: Recipe
    """Whose results are compared."""
    folder: Path
    console: Console
    dry: bool
    """Whether `recipe` is tiny, too, and several measurements share a process."""
    steps: int
    loss_steps: int
    ends: float
    """On time.monotonic(): what runs is stopped then."""

    def case(self, name: str, kind: str = "repository", micro_batch: int = 0, **fields: Any) -> Case:
        """A measurement of speed: the recipe's first stage with one micro-batch a step, on one GPU."""
        config = config_of(self.recipe, micro_batch or self.micro_batch, self.loss_steps, self.folder)
        return Case(name, kind, config, **{"steps": self.steps, **fields})

    @property
    def micro_batch(self) -> int:
        """The recipe's."""
        return self.recipe.stages[0].micro_batch

    def tiny_case(self, name: str, steps: int = 10, **fields: Any) -> Case:
        """Steps of the tiny model, from weights that are the same on every device."""
        config = config_of(self.tiny, 4, steps, self.folder)
        return Case(name, "repository", config, steps=max(1, steps - WARMUP), weights="cpu", **fields)

    def run(self, *cases: Case, on_cpu: bool = False, together: bool = False) -> Iterator[Result]:
        """What each gives, or why not in `failed`, in the order of the cases; as soon as it is known."""
        for group in [list(cases)] if self.dry or together else [[case] for case in cases]:
            with self.console.status(", ".join(case.name for case in group)):
                yield from self.run_together(group, on_cpu)

    def run_together(self, cases: list[Case], on_cpu: bool) -> Iterator[Result]:
        """The same in one process."""
        given, out = self.folder / "cases.json", self.folder / "results.jsonl"
        out.unlink(missing_ok=True)
        write_json(given, [asdict(case) for case in cases])
        problem, told = None, 0
        for word in self.python("-m", "recipes.engine.gpu_case", str(given), str(out), on_cpu=on_cpu):
            problem = word
            for result in read_lines(out)[told:]:
                told += 1
                yield result
        for case in cases[told:]:
            yield {**asdict(case), "failed": problem or "it gave nothing"}

    def python(self, *arguments: str, on_cpu: bool = False) -> Iterator[str | None]:
        """Runs Python with this repository's modules while there is time; yields None now and then while it runs.

        The last that it yields is why it failed, or None.
        """
        said = self.folder / "said.txt"
        if self.ends - time.monotonic() < LEAST_SECONDS:
            yield OVER
            return
        with open(said, "w", encoding="utf-8") as file:
            process = subprocess.Popen(
                [sys.executable, *arguments], env=variables(on_cpu), stdout=file, stderr=file, start_new_session=True
            )
        try:
            while process.poll() is None and time.monotonic() < self.ends:
                yield None
                time.sleep(LOOK)
        finally:
            code = process.poll()
            if code is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        lines = said.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing"]
        yield OVER if code is None else f"exit code {code}: {lines[-1][:300]}" if code else None


def variables(on_cpu: bool) -> dict[str, str]:
    """The environment of a measurement; what cuBLAS is told there is what it does on these GPUs anyway."""
    root = Path(__file__).resolve().parents[2]
    found = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    return found | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} | ({"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {})


def config_of(recipe: Recipe, micro_batch: int, steps: int, folder: Path) -> Result:
    """Nanotron's configuration of the first stage on one GPU; its learning rate is at its peak after half the steps."""
    stage = replace(make_plan(recipe).stages[0], micro_batch=micro_batch, samples_per_step=micro_batch)
    config = nanotron_config(recipe, stage, Topology(1, 1, 1, 0), folder)
    config["optimizer"]["learning_rate_scheduler"]["lr_warmup_steps"] = max(2, steps // 2)
    return config


def bench_gpu(
    json_path: Path | None = None, recipe: str = "smollm2-1.7b", steps: int = 20, tiny: bool = False,
    loss_steps: int = 200, only: str | None = None, minutes: float = 9,
) -> Result:  # fmt: skip
    """Measures training on this machine's GPU and prints it.

    Args:
        json_path: where to write the same as JSON, if anywhere; also what there is so far, after every row.
        steps: that are timed at least, after the warm-up.
        tiny: take a tiny model, which also a CPU trains in a minute or two: a dry run of all of it.
        loss_steps: over which losses are compared.
        only: "correctness" or "speed" for that part alone.
        minutes: that it takes at most; rows for which no time is left say so.

    Raises:
        UserError: there is no such recipe; there is no GPU, and the model is not tiny.
    """
    base, console, ends = load(recipe), wide_console(), time.monotonic() + 60 * minutes
    with TemporaryDirectory(prefix="smol-bench-", ignore_cleanup_errors=True) as name:
        small = tiny_recipe(base, Path(name))
        bench = Bench(small if tiny else base, small, Path(name), console, tiny, steps, loss_steps, ends)
        (machine,) = bench.run(Case("matrix products", "products", steps=steps))
        if not tiny and machine.get("device", "cpu") == "cpu":
            reason = machine.get("failed", "PyTorch finds no GPU on this machine")
            raise UserError(reason, "run it where there is one, or try the whole of it with --tiny")
        result = {"recipe": recipe, "tiny": tiny, "products": machine, **surroundings()}
        for part, measure in {"correctness": correctness, "speed": speed}.items():
            if only in (None, part):
                collect(part, measure(bench, machine), result, bench, json_path)
                show(part, result, console)
    return result


def collect(part: str, found: Iterator[Result], result: Result, bench: Bench, json_path: Path | None) -> None:
    """Puts rows into the result one by one; writes and tells each."""
    rows: list[Result] = []
    for row in found:
        rows.append(row)
        result[part] = rated(rows, bench, result["products"]) if part == "speed" else rows
        if json_path is not None:
            write_json(json_path, result)
        left = max(0.0, bench.ends - time.monotonic())
        bench.console.print(f"{left / 60:4.1f} min left  {in_short(row)}", style="dim", highlight=False, markup=False)


def in_short(row: Result) -> str:
    """A row, while the others are not there yet."""
    if "failed" in row:
        return f"{row['name']}: {row['failed']}"
    if "what" in row:
        return f"{row['what']}: {row['note'] if row['found'] is None else format(row['found'], '.2g')}"
    return f"{row['name']}: {1000 * row['step_seconds']:.1f} ms a step"


# Is it right?


def tiny_recipe(base: Recipe, folder: Path) -> Recipe:
    """The recipe with a tiny model, and of its stages the first at ten steps."""
    freeze(base, folder / "tree")
    path, stage = folder / "tree" / "stages" / TINY["name"] / "recipe.yaml", base.stages[0]
    tokens = stage.end_step * base.tokens_per_step
    scale = f"{10 * TINY['batch']['tokens_per_step']}/{tokens}"
    overlay = {**TINY, "extends": base.name, "stages": [stage.name], "scale": scale}
    write_atomic(path, yaml.safe_dump(overlay, sort_keys=False))
    return load(path.parent)


def tiny_run(recipe: Recipe, folder: Path) -> Run:
    """A run of the tiny recipe with random tokens."""
    words = {"<|endoftext|>": 0} | {f"word{i}": i for i in range(1, recipe.model.vocab_size)}
    tokenizer = folder / "tokenizer.json"
    Tokenizer(WordLevel(words, unk_token="word1")).save(str(tokenizer))
    for source in recipe.stages[0].mixture.shares:
        write_random(folder / "run" / "data" / source, source, tokenizer, recipe.model.vocab_size, 5000)
    return Run.create(folder / "run", recipe, folder / "run" / "data", tokenizer)


def correctness(bench: Bench, machine: Result) -> Iterator[Result]:
    """Each comparison: what, found (relative; None: nothing), allowed, note. A dry run compares a CPU with itself."""
    flash = machine.get("flash_attn") is not None and machine.get("device") != "cpu"
    for row in chain(ten_steps(bench, flash), many_steps(bench), resuming(bench)):
        yield {**row, "met": row["found"] is not None and row["found"] <= row["allowed"]}
    if not flash:
        note = "not installed here" if machine.get("flash_attn") is None else "no GPU here"
        yield {"what": "flash-attn", "found": None, "allowed": 0, "note": note, "met": None}


def ten_steps(bench: Bench, flash: bool) -> Iterator[Result]:
    """With and without flash-attn: its parts in bf16 against fp32, and the tiny model's losses against the CPU's."""
    (cpu,) = bench.run(bench.tiny_case("CPU", flash_attn=False), on_cpu=True)
    for with_flash, name in [(False, "its stand-ins"), *([(True, "flash-attn")] if flash else [])]:
        more = [] if with_flash else [bench.tiny_case(ALL, flash_attn=False, fused=FUSED[ALL])]
        cases = [Case("parts", "parts", flash_attn=with_flash), bench.tiny_case(name, flash_attn=with_flash), *more]
        parts, *steps = bench.run(*cases, together=True)
        for part in ("attention", "rotary", "norm"):
            error = parts["errors"][part] if "errors" in parts else None
            note = parts.get("failed", "bf16 against fp32")
            yield {"what": f"{part}, {name}", "found": error, "allowed": 2 * ROUNDING, "note": note}
        for found in steps:
            yield compared(f"ten steps, {found['name']}", found, cpu, "CPU")


def many_steps(bench: Bench) -> Iterator[Result]:
    """Losses of the tiny model with each fused part against those with none, on the same device."""
    parts = {PLAIN: {}, **FUSED}
    cases = [bench.tiny_case(name, bench.loss_steps, fused=fused) for name, fused in parts.items()]
    for case in cases:
        case.config["optimizer"]["learning_rate_scheduler"]["learning_rate"] = CALM_LR
    plain, *others = bench.run(*cases, together=True)
    for found in others:
        yield compared(f"{bench.loss_steps} steps, {found['name']}", found, plain, "nothing fused")


def compared(what: str, found: Result, with_: Result, whose: str) -> Result:
    """A row: how far losses are from another's."""
    problem = found.get("failed") or with_.get("failed")
    note = problem or f"{whose}: {with_['losses'][0]:.3f} to {with_['losses'][-1]:.3f}"
    return {"what": what, "found": loss_difference(found, with_), "allowed": ROUNDING, "note": note}


def loss_difference(ours: Result, theirs: Result) -> float | None:
    """The largest relative one of any step."""
    if "losses" not in ours or "losses" not in theirs:
        return None
    pairs: list[tuple[float, float]] = list(zip(ours["losses"], theirs["losses"], strict=False))
    return max(abs(a - b) / b for a, b in pairs)


def resuming(bench: Bench) -> Iterator[Result]:
    """A stage in one go against the same resumed in its middle, to the bit; then the conversion's logits."""
    run = tiny_run(bench.tiny, bench.folder)
    stage = run.plan.stages[0].name
    checkpoint = run.checkpoints(stage) / "10"
    seen = []
    for part in ("ten steps", "the last five again"):
        with bench.console.status(f"resume: {part}"):
            *_, problem = bench.python("-c", DETERMINISTIC + TRAIN, str(run.folder), stage)
        if problem:
            yield {"what": "resume", "found": None, "allowed": 0, "note": problem}
            return
        losses = [line["loss"] for line in read_lines(run.stage_folder(stage) / "metrics.jsonl")]
        seen.append((state(checkpoint), losses))
        if part == "ten steps":
            shutil.copytree(checkpoint, bench.folder / "alone")
            remove(checkpoint)
    (first, losses), (second, losses_again) = seen
    note = f"{len(first)} files, {len(losses)} losses"
    changed = sum(first[name] != second[name] for name in first) + (losses != losses_again)
    yield {"what": "resume: what differs", "found": changed, "allowed": 0, "note": note}
    yield conversion(bench, run)


def state(checkpoint: Path) -> dict[str, bytes]:
    """The weights and the optimizer's state by file, without safetensors' headers, whose order is by chance."""
    folders = (checkpoint / "model", checkpoint / "optimizer")
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(checkpoint)): payload(file) for file in files}


def payload(file: Path) -> bytes:
    """A file's bytes; of a safetensors file, those after the header, whose length stands in the first eight."""
    data = file.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :] if file.suffix == ".safetensors" else data


def conversion(bench: Bench, run: Run) -> Result:
    """Logits of the checkpoint that was set aside, beside those of its conversion."""
    out = to_transformers(bench.folder / "alone", bench.folder / "converted", bench.folder / "tokenizer.json")
    paths = {"run": str(run.folder), "checkpoint": str(bench.folder / "alone"), "conversion": str(out)}
    (found,) = bench.run(Case("logits", "logits", paths=paths))
    note = found.get("failed", "both in bf16")
    return {"what": "conversion's logits", "found": found.get("error"), "allowed": 4 * ROUNDING, "note": note}


# How fast is it?


def speed(bench: Bench, machine: Result) -> Iterator[Result]:
    """Ours beside the others at the recipe's micro-batch, then the largest that fits, then each fused part alone."""
    many = max(bench.steps, bench.loss_steps)
    others = [bench.case(SHIPPED, "nanotron"), bench.case(OTHERS, "transformers")]
    ours = [bench.case(PLAIN, steps=many), bench.case(ALL, steps=many, fused=FUSED[ALL])]
    seen = {}
    for row in bench.run(*others, *ours):
        seen[row["name"]] = row
        yield row
    for name, fused in ((ALL, FUSED[ALL]), (PLAIN, {})):
        yield from largest(bench, machine, seen[name], fused)
    alone = [bench.case(name, fused=fused) for name, fused in FUSED.items() if name != ALL]
    yield from bench.run(bench.case(LATE, fused=FUSED[ALL], read_loss=False), *alone, together=True)


def largest(bench: Bench, machine: Result, row: Result, fused: Result) -> Iterator[Result]:
    """The row again with the largest micro-batch that fits by its memory; with smaller ones where that is wrong."""
    size = 0 if "failed" in row else fitting(row["memory"], bench, machine)
    for _ in range(TRIES):
        if size <= bench.micro_batch:
            return
        (found,) = bench.run(bench.case(f"{row['name']}, micro-batch {size}", micro_batch=size, fused=fused))
        yield found
        if found.get("failed") != OUT_OF_MEMORY:
            return
        size -= max(1, size // 8)


def fitting(memory: float, bench: Bench, machine: Result) -> int:
    """Sequences that fit, if those of the recipe's micro-batch take `memory` bytes; twice as many without a GPU."""
    if "memory" not in machine:
        return 2 * bench.micro_batch
    state = STATE_BYTES * bench.recipe.model.parameters
    return int((ROOM * machine["memory"] - state) / (memory - state) * bench.micro_batch)


def rated(rows: list[Result], bench: Bench, machine: Result) -> list[Result]:
    """Rows with their rates."""
    return [{**row, **rates(row, rows, bench, machine)} for row in rows]


def rates(result: Result, results: list[Result], bench: Bench, machine: Result) -> Result:
    """Tokens a second, shares of two peaks, the gain over Nanotron as shipped, and how far losses are from PLAIN's."""
    if "failed" in result:
        return {}
    rate = tokens_per_second(result)
    flops = rate * flops_per_token(bench.recipe.model, bench.recipe.stages[0].sequence_length)
    shipped, plain = (next((r for r in results if r["name"] == name), {}) for name in (SHIPPED, PLAIN))
    same_data = result["config"]["tokens"]["micro_batch_size"] == bench.micro_batch
    comparable = result["kind"] != "transformers" and same_data
    return {
        "tokens_per_second": rate, "flops_per_second": flops,
        "mfu": flops / H100_FLOPS if machine.get("device") != "cpu" else None,
        "of_products": flops / machine["flops_per_second"] if "flops_per_second" in machine else None,
        "gain": rate / tokens_per_second(shipped) if "step_seconds" in shipped else None,
        "loss_difference": loss_difference(result, plain) if comparable else None,
        "losses_compared": min(len(result["losses"]), len(plain.get("losses", []))) if comparable else 0,
    }  # fmt: skip


def tokens_per_second(result: Result) -> float:
    """Of one GPU."""
    tokens = result["config"]["tokens"]
    rate: float = tokens["micro_batch_size"] * tokens["sequence_length"] / result["step_seconds"]
    return rate
