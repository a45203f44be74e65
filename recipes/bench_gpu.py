"""`smol bench gpu`: is training right on this GPU, how fast is it, and what does each fused part give.

Every measurement is a process of its own (engine/gpu_case.py), so that a GPU that is full ends one of them only.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from recipes.bench import surroundings
from recipes.bench_engine import write_random
from recipes.engine.checkpoint import Topology, remove
from recipes.engine.config import nanotron_config
from recipes.engine.convert import to_transformers
from recipes.engine.gpu_case import Case
from recipes.errors import UserError
from recipes.files import read_lines, write_atomic, write_json
from recipes.loader import load
from recipes.plan import H100_FLOPS, flops_per_token, make_plan
from recipes.recipe import Recipe
from recipes.run import Run, freeze
from recipes.show import bytes_of, wide_console

ROUNDING = 2.0**-8
"""Relative, of bf16: half of the distance between neighbours."""
LARGEST_MICRO_BATCH = 64
GOAL_MFU, GOAL_GAIN = 0.5, 1.25
SHIPPED, PLAIN, ALL = "Nanotron as shipped", "this repository, nothing fused", "all"
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
    "model": {"layers": 2, "hidden": 64, "ffn": 128, "heads": 4, "kv_heads": 2, "vocab_size": 512, "init_std": 0.05},
    "tokenizer": {"vocab_size": 512}, "batch": {"tokens_per_step": 256, "sequence_length": 64, "micro_batch": 4},
    "parallelism": {"dp": 1}, "schedule": {"peak_lr": 3.0e-3},
}  # fmt: skip
"""Laid over a recipe, for what is about being right and not about being fast."""
DETERMINISTIC = """
import sys, torch
torch.use_deterministic_algorithms(True, warn_only=True)
sys.modules["flash_attn"] = None  # its backward pass adds in no fixed order
from recipes.train import main
sys.exit(main())
"""
Result = dict[str, Any]


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

    def case(self, name: str, kind: str = "repository", micro_batch: int = 0, **fields: Any) -> Case:
        """A measurement of speed: the recipe's first stage with one micro-batch a step, on one GPU."""
        steps = fields.pop("steps", max(self.steps, self.loss_steps))
        config = config_of(self.recipe, micro_batch or self.recipe.stages[0].micro_batch, self.loss_steps, self.folder)
        return Case(name, kind, config, steps=steps, **fields)

    def tiny_case(self, name: str, **fields: Any) -> Case:
        """Ten steps of the tiny model, from weights that are the same on every device."""
        return Case(name, "repository", config_of(self.tiny, 4, 8, self.folder), steps=5, weights="cpu", **fields)

    def run(self, *cases: Case, on_cpu: bool = False) -> list[Result]:
        """What each gives, or why not in `failed`, in the order of the cases."""
        groups = [list(cases)] if self.dry else [[case] for case in cases]
        return [result for group in groups for result in self.run_together(group, on_cpu)]

    def run_together(self, cases: list[Case], on_cpu: bool) -> list[Result]:
        """The same in one process."""
        given, out = self.folder / "cases.json", self.folder / "results.jsonl"
        out.unlink(missing_ok=True)
        write_json(given, [asdict(case) for case in cases])
        with self.console.status(cases[0].name if len(cases) == 1 else f"{len(cases)} cases in one process"):
            said = python("-m", "recipes.engine.gpu_case", str(given), str(out), on_cpu=on_cpu)
        results = read_lines(out)
        lines = said.stderr.strip().splitlines() or ["it said nothing"]
        reason = f"exit code {said.returncode}: {lines[-1][:300]}"
        return results + [{**asdict(case), "failed": reason} for case in cases[len(results) :]]


def python(*arguments: str, on_cpu: bool = False) -> subprocess.CompletedProcess[str]:
    """Runs Python with this repository's modules."""
    root = Path(__file__).resolve().parent.parent
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    variables |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} | ({"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {})
    return subprocess.run([sys.executable, *arguments], env=variables, capture_output=True, text=True)


def config_of(recipe: Recipe, micro_batch: int, steps: int, folder: Path) -> Result:
    """Nanotron's configuration of the first stage on one GPU; its learning rate is at its peak after half the steps."""
    stage = replace(make_plan(recipe).stages[0], micro_batch=micro_batch, samples_per_step=micro_batch)
    config = nanotron_config(recipe, stage, Topology(1, 1, 1, 0), folder)
    config["optimizer"]["learning_rate_scheduler"]["lr_warmup_steps"] = max(2, steps // 2)
    return config


def bench_gpu(
    json_path: Path | None = None, recipe: str = "smollm2-1.7b", steps: int = 20, tiny: bool = False,
    loss_steps: int = 200, only: str | None = None,
) -> Result:  # fmt: skip
    """Measures training on this machine's GPU and prints it.

    Args:
        json_path: where to write the same as JSON, if anywhere; also what there is so far, after every part.
        steps: that are timed at least, after the warm-up.
        tiny: take a tiny model, which also a CPU trains in a minute or two: a dry run of all of it.
        loss_steps: over which losses are compared.
        only: "correctness" or "speed" for that part alone.

    Raises:
        UserError: there is no such recipe; there is no GPU, and the model is not tiny.
    """
    base, console = load(recipe), wide_console()
    with TemporaryDirectory(prefix="smol-bench-") as name:
        small = tiny_recipe(base, Path(name))
        bench = Bench(small if tiny else base, small, Path(name), console, tiny, steps, loss_steps)
        machine = bench.run(Case("matrix products", "products", steps=steps))[0]
        if not tiny and machine.get("device", "cpu") == "cpu":
            reason = machine.get("failed", "PyTorch finds no GPU on this machine")
            raise UserError(reason, "run it where there is one, or try the whole of it with --tiny")
        result = {"recipe": recipe, "tiny": tiny, "products": machine, **surroundings()}
        result["versions"] |= versions()
        for part, measure in {"correctness": correctness, "speed": speed}.items():
            if only in (None, part):
                result[part] = measure(bench, machine)
                show(part, result, console)
                if json_path is not None:
                    write_json(json_path, result)
    return result


def versions() -> dict[str, str | None]:
    """Of the packages that count; None where one is missing."""
    found: dict[str, str | None] = {}
    for name in ("torch", "nanotron", "transformers", "flash-attn", "triton"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


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


def correctness(bench: Bench, machine: Result) -> list[Result]:
    """Each comparison: what, found (relative), allowed, note. A dry run compares a CPU with itself."""
    flash = machine.get("flash_attn") is not None and machine.get("device") != "cpu"
    return [
        {**row, "met": row["found"] is not None and row["found"] <= row["allowed"]}
        for row in (*parts(bench, flash), *ten_steps(bench, flash), *resuming(bench))
    ]


def parts(bench: Bench, flash: bool) -> Iterator[Result]:
    """What flash-attn or its stand-ins compute in bf16, against fp32."""
    for with_flash in (True, False) if flash else (False,):
        found = bench.run(Case("parts", "parts", flash_attn=with_flash))[0]
        name = "flash-attn" if with_flash else "its stand-ins"
        for part in ("attention", "rotary", "norm"):
            error = found["errors"][part] if "errors" in found else None
            note = found.get("failed", "bf16 against fp32")
            yield {"what": f"{part}, {name}", "found": error, "allowed": 2 * ROUNDING, "note": note}
    if not flash:
        yield {"what": "flash-attn", "found": 0, "allowed": 0, "note": "skipped: it is not installed, or no GPU here"}


def ten_steps(bench: Bench, flash: bool) -> Iterator[Result]:
    """Losses of the tiny model's ten steps against the CPU's."""
    cpu = bench.run(bench.tiny_case("CPU", flash_attn=False), on_cpu=True)[0]
    cases = [bench.tiny_case("stand-ins", flash_attn=False), bench.tiny_case("all", flash_attn=False, fused=FUSED[ALL])]
    cases += [bench.tiny_case("flash-attn")] if flash else []
    for found in bench.run(*cases):
        error = loss_difference(found, cpu)
        note = found.get("failed") or f"CPU's losses {cpu['losses'][0]:.4f} to {cpu['losses'][-1]:.4f}"
        yield {"what": f"ten steps, {found['name']}", "found": error, "allowed": ROUNDING, "note": note}


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
            said = python("-c", DETERMINISTIC, str(run.folder), stage)
        if said.returncode:
            yield {"what": "resume", "found": None, "allowed": 0, "note": said.stderr.strip()[-300:]}
            return
        losses = [line["loss"] for line in read_lines(run.stage_folder(stage) / "metrics.jsonl")]
        seen.append((state(checkpoint), losses))
        if part == "ten steps":
            shutil.copytree(checkpoint, bench.folder / "alone")
            remove(checkpoint)
    (first, losses), (second, losses_again) = seen
    note = f"{len(first)} files and {len(losses)} losses, deterministic algorithms, without flash-attn"
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
    found = bench.run(Case("logits", "logits", paths=paths))[0]
    note = found.get("failed", "Nanotron's against transformers', both bf16")
    return {"what": "conversion's logits", "found": found.get("error"), "allowed": 4 * ROUNDING, "note": note}


# How fast is it?


def speed(bench: Bench, machine: Result) -> list[Result]:
    """Every variant at the recipe's micro-batch, others beside them, then larger ones until one is too much."""
    results = bench.run(
        bench.case(SHIPPED, "nanotron"),
        bench.case(PLAIN),
        *(bench.case(name, fused=fused) for name, fused in FUSED.items()),
        bench.case("all, loss not read", fused=FUSED[ALL], read_loss=False, steps=bench.steps),
        bench.case("transformers, compiled", "transformers", steps=bench.steps),
    )
    size = 2 * bench.recipe.stages[0].micro_batch
    while size <= (8 if bench.dry else LARGEST_MICRO_BATCH):
        name = f"all, micro-batch {size}"
        results += bench.run(bench.case(name, micro_batch=size, fused=FUSED[ALL], steps=bench.steps))
        if "failed" in results[-1]:
            break
        size *= 2
    return [{**result, **rates(result, results, bench, machine)} for result in results]


def rates(result: Result, results: list[Result], bench: Bench, machine: Result) -> Result:
    """Tokens a second, shares of two peaks, the gain over Nanotron as shipped, and how far losses are from PLAIN's."""
    if "failed" in result:
        return {}
    rate = tokens_per_second(result)
    flops = rate * flops_per_token(bench.recipe.model, bench.recipe.stages[0].sequence_length)
    shipped, plain = (next(r for r in results if r["name"] == name) for name in (SHIPPED, PLAIN))
    comparable = result["kind"] != "transformers" and result["config"]["tokens"] == plain["config"]["tokens"]
    return {
        "tokens_per_second": rate, "flops_per_second": flops,
        "mfu": flops / H100_FLOPS if machine.get("device") != "cpu" else None,
        "of_products": flops / machine["flops_per_second"] if "flops_per_second" in machine else None,
        "gain": rate / tokens_per_second(shipped) if "step_seconds" in shipped else None,
        "loss_difference": loss_difference(result, plain) if comparable else None,
    }  # fmt: skip


def tokens_per_second(result: Result) -> float:
    """Of one GPU."""
    tokens = result["config"]["tokens"]
    rate: float = tokens["micro_batch_size"] * tokens["sequence_length"] / result["step_seconds"]
    return rate


# What is printed


def show(part: str, result: Result, console: Console) -> None:
    """Prints one part's table and where it was measured."""
    rows = result[part]
    if part == "correctness":
        table = Table("", "found", "allowed", "", "", title="Is training right here?", box=SIMPLE_HEAD)
        for row in rows:
            found = "nothing" if row["found"] is None else f"{row['found']:.2g}"
            met = "[green]met[/]" if row["met"] else "[red]missed[/]"
            table.add_row(row["what"], found, f"{row['allowed']:.2g}", met, row["note"])
    else:
        names = ("", "ms a step", "tokens/s", "MFU", "of products", "gain", "loss, rel.", "peak memory")
        table = Table(*names, title=f"{result['recipe']}, one GPU", box=SIMPLE_HEAD)
        for row in rows:
            table.add_row(row["name"], *cells(row))
    console.print(table)
    if part == "speed":
        console.print(verdict(rows), highlight=False)
    console.print(place(result), highlight=False)


def cells(row: Result) -> list[str]:
    """A row of the table of speed."""
    if "failed" in row:
        return [row["failed"], *[""] * 6]

    def of(key: str, form: str) -> str:
        return "–" if row[key] is None else format(row[key], form)

    spread = f"{1000 * row['step_seconds']:.1f} ({1000 * row['fastest']:.1f}–{1000 * row['slowest']:.1f})"
    shares = [of("mfu", ".1%"), of("of_products", ".1%"), of("gain", ".2f"), of("loss_difference", ".1e")]
    return [spread, f"{row['tokens_per_second']:,.0f}", *shares, bytes_of(row["memory"])]


def verdict(rows: list[Result]) -> str:
    """The best row against the goals."""
    good = [row for row in rows if "failed" not in row and row["kind"] == "repository" and row["mfu"] is not None]
    if not good:
        return "No GPU here: a dry run, its speeds mean nothing."
    best = max(good, key=lambda row: row["tokens_per_second"])
    same = max((row for row in good if row["loss_difference"] is not None), key=lambda row: row["tokens_per_second"])
    mfu = f"{best['mfu']:.1%} MFU with “{best['name']}”; the goal is {GOAL_MFU:.0%}"
    gain = f"{same['gain'] or 0:.2f} times Nanotron's own model with “{same['name']}”; the goal is {GOAL_GAIN}"
    return f"{mfu}. At the recipe's micro-batch {gain}."


def place(result: Result) -> str:
    """Machine, versions, code."""
    machine, code, found = result["products"], result["code"], result["versions"]
    changed = ", with changes" if code["changed"] else ""
    rate = f"{machine.get('flops_per_second', 0) / 1e12:.3g} TFLOP/s in bf16 matrix products"
    said = ", ".join(f"{name} {version or 'not installed'}" for name, version in found.items())
    return f"{machine.get('device')}, {rate}; {said}; code {code['revision'] or 'outside git'}{changed}."
