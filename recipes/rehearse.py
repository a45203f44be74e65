"""The whole chain, small: the recipe's own files, scaled down, trained on this machine, killed, resumed, audited."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from recipes import loop
from recipes.audit import StageAudit, audit
from recipes.data.corpus import build_corpora, iter_texts
from recipes.data.manifest import Manifest
from recipes.data.questions import write_questions
from recipes.data.tokenize import tokenize, train_tokenizer
from recipes.engine.checkpoint import prune, steps
from recipes.errors import UserError
from recipes.files import append_line, read_lines, write_atomic, write_json
from recipes.lint import checked_plan
from recipes.loader import load
from recipes.plan import StagePlan
from recipes.recipe import Recipe
from recipes.report import heldout_losses, write_report
from recipes.run import RUN_FILE, TOKENIZER, Run, freeze, runs_folder
from recipes.show import show_audits, stages_table

TOKENS_PER_MINUTE = 200_000
"""Training tokens for each minute of `--minutes`: a constant, so that the same arguments give the same run on any
machine. Chosen for two cores, of whose ten minutes training gets about half."""
SEQUENCE_LENGTH, MICRO_BATCH, SEQUENCES_PER_STEP = 256, 8, 16
VOCAB_SIZE = 4096
BLOCK_TOKENS = 4 * SEQUENCE_LENGTH
"""As in the real recipe: four sequences."""
CHECKPOINTS_PER_STAGE = 3
"""In the shortest one."""
CHARACTERS_PER_TOKEN = 3.3
"""Of the 4,096-entry tokenizer, about; it only sets how much text is gathered."""
LEAST_CHARACTERS = 400_000
"""Scaled down as far as the tokens, the smallest sources would not fill one block; with 160,000 the held-out loss of
code no longer fell in stage 3."""
HELDOUT_CHARACTERS = 240_000
MODEL = {"layers": 4, "hidden": 128, "ffn": 512, "vocab_size": VOCAB_SIZE}
HEAD_DIM = 32

Mixtures = Literal["staged", "static", "closed-loop"]


@dataclass(frozen=True)
class Settings:
    """What a rehearsal was asked for; kept in its folder, so that `--resume` asks for the same."""

    recipe: str
    minutes: float
    seed: int
    nproc: int
    keep: bool
    mixtures: Mixtures = "staged"
    """The recipe's own; one mixture of the same tokens in every stage; after stage 1 what the feedback proposes."""


def rehearse(settings: Settings, console: Console, folder: Path | None = None) -> bool:
    """Runs the whole chain in a new folder below runs/, or goes on in `folder`; True if everything agreed.

    Raises:
        UserError: something about the arguments, the recipe or the machine, with what to do.
        KeyboardInterrupt: after a checkpoint was asked for; the run can be resumed.
    """
    started = time.time()
    check(settings)
    base = load(settings.recipe)
    folder = folder or new_folder(base.name)
    write_json(folder / "rehearsal.json", asdict(settings))
    show_recipe(base, console)
    try:
        run = prepare(settings, base, folder, console)
        console.print(stages_table(run.plan))
        stages = run.plan.stages
        for number, stage in enumerate(stages):
            train_stage(run, run.plan.stage(stage.name), settings, console, kill=number == min(1, len(stages) - 1))
            loop.evaluate_stage(run, stage, console)
            run = loop.propose_next(run, stage, console, adopt=settings.mixtures == "closed-loop")
        audits = audit(run, digests=True)
    except KeyboardInterrupt:
        console.print(f"go on with: smol rehearse --resume {folder.name}", highlight=False)
        raise
    if not settings.keep:
        clean_up(run)
    append_line(folder / "events.jsonl", {"event": "finished", "seconds": time.time() - started})
    report = write_report(run, audits)
    show_result(run, audits, console)
    console.print(f"report: [bold]{report}[/]", highlight=False, soft_wrap=True)
    return all(a.complete and not a.problems for a in audits) and all(
        after < before for _, _, before, after in heldout_losses(run)
    )


def check(settings: Settings) -> None:
    """Raises UserError for settings that make no rehearsal."""
    if not settings.minutes > 0:
        raise UserError(f"--minutes {settings.minutes:g} leaves no time", "write a number above 0, such as 10")
    if settings.nproc < 1 or SEQUENCES_PER_STEP % settings.nproc:
        fix = f"write a divisor of {SEQUENCES_PER_STEP}, the sequences of a step"
        raise UserError(f"--nproc {settings.nproc} does not divide the batch", fix)


def show_recipe(recipe: Recipe, console: Console) -> None:
    """Prints what lint says of the real recipe; its errors end the rehearsal."""
    plan = checked_plan(recipe)
    console.print(
        f"{recipe.name}: {plan.steps:,} steps of {plan.tokens_per_step:,} tokens, {len(plan.warnings)} warnings"
    )
    for warning in plan.warnings:
        console.print(f"  [yellow]warning:[/] {warning}", highlight=False, soft_wrap=True)


def clean_up(run: Run) -> None:
    """Removes what only a closer look needs: the corpora, converted models, every checkpoint but the stages' last."""
    for folder in (run.folder / "corpora", *run.folder.glob("eval/*/model")):
        shutil.rmtree(folder, ignore_errors=True)
    for stage in run.plan.stages:
        prune(run.checkpoints(stage.name), 1, 0, set(stage.kept_steps))


def new_folder(recipe: str) -> Path:
    """A folder for a new rehearsal, numbered after those there are."""
    runs = runs_folder()
    stem = f"rehearsal-{recipe}"
    number = next(n for n in range(1, 10_000) if not (runs / f"{stem}-{n}").exists())
    folder = runs / f"{stem}-{number}"
    folder.mkdir(parents=True)
    return folder


def resumable(name: str | None) -> tuple[Path, Settings]:
    """The named rehearsal, or the newest one, with its settings.

    Raises:
        UserError: there is none.
    """
    found = sorted(runs_folder().glob("*/rehearsal.json"), key=lambda p: p.stat().st_mtime)
    files = [p for p in found if name in (None, p.parent.name, str(p.parent))]
    if not files:
        names = ", ".join(p.parent.name for p in found) or "(none yet)"
        raise UserError(f"no rehearsal {name or 'to resume'}", f"name one of {names}", runs_folder())
    return files[-1].parent, Settings(**json.loads(files[-1].read_text(encoding="utf-8")))


def prepare(settings: Settings, base: Recipe, folder: Path, console: Console) -> Run:
    """Corpora, tokenizer, tokenised data and the frozen, scaled-down recipe; what is there already is kept."""
    if (folder / RUN_FILE).exists():
        return Run.load(folder)
    scale = settings.minutes * TOKENS_PER_MINUTE / (base.stages[-1].end_step * base.tokens_per_step)
    sources = {use: base.sources[use] for stage in base.stages for use in stage.mixture.shares}
    kinds = {name: source.domain for name, source in sources.items()}
    sizes = {
        name: max(LEAST_CHARACTERS, int((source.tokens or 0) * scale * CHARACTERS_PER_TOKEN))
        for name, source in sources.items()
    }
    heldout = dict.fromkeys(sorted(set(kinds.values())), HELDOUT_CHARACTERS)
    corpora = folder / "corpora"
    with progress(console) as bars:
        bar = bars.add_task("gathering text", total=sum(sizes.values()) + sum(heldout.values()))
        build_corpora(corpora, sizes, heldout, settings.seed, kinds, lambda n: bars.update(bar, advance=n))
    tokenizer = folder / TOKENIZER
    if not tokenizer.exists():
        with console.status(f"training a tokenizer of {VOCAB_SIZE:,} entries"):
            texts = (text for name in sizes for text in iter_texts(corpora / name))
            train_tokenizer(texts, VOCAB_SIZE, base.tokenizer.end_of_text, tokenizer)
    questions = folder / "eval" / "data"
    if not questions.is_dir():
        write_questions(corpora / "heldout", questions, settings.seed)
    manifests = tokenize_all(sources, heldout, folder, base.tokenizer.end_of_text, console)
    write_overlay(settings, base, folder, manifests)
    frozen = load(folder / "recipe" / "stages" / overlay_name(base))
    return Run.create(folder, frozen, folder / "data", tokenizer)


def tokenize_all(
    sources: dict[str, Any], heldout: dict[str, int], folder: Path, end_of_text: str, console: Console
) -> dict[str, Manifest]:
    """Tokenises every corpus with the code that tokenises the real ones; returns the sources' manifests."""
    manifests = {}
    with progress(console) as bars:
        for name in bars.track([*sources, *(f"heldout/{d}" for d in heldout)], description="tokenising"):
            text = sources[name].text if name in sources else "text"
            done = tokenize(
                source=name, data=str(folder / "corpora" / name), out=folder / "data" / name,
                tokenizer=folder / TOKENIZER, end_of_text=end_of_text, text=text,
                show_progress=False,
            )  # fmt: skip
            manifests[name] = done
    return {name: manifests[name] for name in sources}


def overlay_name(base: Recipe) -> str:
    """The scaled-down recipe's name."""
    return f"{base.name}-rehearsal"


def write_overlay(settings: Settings, base: Recipe, folder: Path, manifests: dict[str, Manifest]) -> None:
    """Freezes the real files and puts the overlay beside them: one factor on tokens, a small model, local sources."""
    tokens = int(settings.minutes * TOKENS_PER_MINUTE)
    total = base.stages[-1].end_step * base.tokens_per_step
    per_step = SEQUENCE_LENGTH * SEQUENCES_PER_STEP
    micro_batch = min(MICRO_BATCH, SEQUENCES_PER_STEP // settings.nproc)
    heads = MODEL["hidden"] // HEAD_DIM
    shortest = min(stage.end_step - stage.start_step for stage in base.stages) * base.tokens_per_step
    interval = max(1, shortest * tokens // total // per_step // CHECKPOINTS_PER_STAGE)
    kv_heads = max(1, heads * base.model.kv_heads // base.model.heads)
    overlay: dict[str, Any] = {
        "name": overlay_name(base), "extends": base.name, "scale": f"{tokens}/{total}", "seed": settings.seed,
        "model": MODEL | {"heads": heads, "kv_heads": kv_heads},
        "tokenizer": {"name": "tokenizer.json", "vocab_size": VOCAB_SIZE},
        "batch": {
            "tokens_per_step": per_step, "sequence_length": SEQUENCE_LENGTH, "micro_batch": micro_batch,
            "accumulation": SEQUENCES_PER_STEP // settings.nproc // micro_batch,
        },
        "parallelism": {"dp": settings.nproc, "tp": 1, "pp": 1},
        "schedule": {"peak_lr": 3.0e-3},  # the published rate of the smallest model
        "checkpoints": {"interval": interval, "keep_last": 2, "keep_every": interval if settings.keep else 0},
        "block_tokens": BLOCK_TOKENS, "sources": "mixtures/sources-rehearsal.yaml", "branches": [],
    }  # fmt: skip
    registry = {
        name: {"domain": base.sources[name].domain, "hub": None, "text": base.sources[name].text,
               "tokens": manifest.tokens}
        for name, manifest in manifests.items()
    }  # fmt: skip
    recipe = folder / "recipe"
    freeze(base, recipe)
    _write_yaml(recipe / overlay["sources"], {"sources": registry})
    _write_yaml(recipe / "stages" / overlay_name(base) / "recipe.yaml", overlay)
    if settings.mixtures == "static":
        domains = {"domains": loop.static_mixture(checked_plan(base))}
        for stage in base.stages:
            _write_yaml(recipe / stage.mixture_file.relative_to(base.root), domains)


def _write_yaml(path: Path, data: dict[str, Any]) -> None:
    write_atomic(path, "# Written by `smol rehearse`.\n" + yaml.safe_dump(data, sort_keys=False))


def train_stage(run: Run, stage: StagePlan, settings: Settings, console: Console, *, kill: bool) -> None:
    """Trains one stage to its end; with `kill`, SIGKILLs it once in the middle and starts it again.

    Raises:
        UserError: training failed; says why and where its log is.
    """
    middle = (stage.start_step + stage.end_step) // 2
    events = run.folder / "events.jsonl"
    if kill and not any(e["event"] == "killed" for e in read_lines(events)) and last_step(run, stage.name) < middle:
        step = launch(run, stage, settings, console, stop_at=middle)
        saved = max([stage.start_step, *steps(run.checkpoints(stage.name))])
        append_line(events, {"event": "killed", "stage": stage.name, "step": step, "checkpoint": saved}, sync=True)
        console.print(f"  SIGKILL after step {step}; starting again from step {saved}", style="yellow", highlight=False)
    if finished(run, stage):
        return
    launch(run, stage, settings, console)
    if not finished(run, stage):
        log = run.stage_folder(stage.name) / "logs" / "train.log"
        said = [line for line in log.read_text(encoding="utf-8").splitlines() if line.startswith("error:")]
        found = f"{stage.name} did not reach its end ({(said or ['the log says why'])[-1]})"
        raise UserError(found, f"put that right, then `smol rehearse --resume {run.folder.name}`", log)


def finished(run: Run, stage: StagePlan) -> bool:
    """True if the checkpoint of the stage's last step is complete."""
    return (run.checkpoints(stage.name) / str(stage.end_step) / "manifest.json").is_file()


def last_step(run: Run, stage: str) -> int:
    """The newest step in the stage's metrics, 0 if there is none."""
    lines = read_lines(run.stage_folder(stage) / "metrics.jsonl")
    return int(lines[-1]["step"]) if lines else 0


def launch(run: Run, stage: StagePlan, settings: Settings, console: Console, stop_at: int | None = None) -> int:
    """Starts torchrun and shows its progress until it ends, or kills it at `stop_at`; returns the last step seen."""
    logs = run.stage_folder(stage.name) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(settings.nproc),
               "-m", "recipes.train", str(run.folder), stage.name]  # fmt: skip
    with open(logs / "train.log", "ab") as log, progress(console) as bars:
        bar = bars.add_task(stage.name, total=stage.steps)
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while process.poll() is None:
                step = show_step(run, stage, bars, bar)
                if stop_at is not None and step >= stop_at:
                    kill(process.pid)
                    process.wait()
                time.sleep(0.3)
        except KeyboardInterrupt:
            console.print("  asking for a checkpoint …")
            process.send_signal(signal.SIGTERM)
            process.wait()
            raise
        return show_step(run, stage, bars, bar)


def kill(pid: int) -> None:
    """SIGKILLs a process and all below it at once; torchrun's workers are in sessions of their own."""
    torchrun = psutil.Process(pid)
    for process in (torchrun, *torchrun.children(recursive=True)):
        process.kill()


def show_step(run: Run, stage: StagePlan, bars: Progress, bar: TaskID) -> int:
    """Moves the bar to the newest step of the metrics."""
    lines = read_lines(run.stage_folder(stage.name) / "metrics.jsonl")
    if not lines:
        return 0
    last = lines[-1]
    description = f"{stage.name} loss {last['loss']:.3f}"
    bars.update(bar, completed=last["step"] - stage.start_step, description=description)
    return int(last["step"])


def progress(console: Console) -> Progress:
    """The progress bars of every long step."""
    columns = TextColumn("  {task.description:16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=console)


def show_result(run: Run, audits: list[StageAudit], console: Console) -> None:
    """Prints what the report shows: realised against planned, and the held-out loss by stage."""
    show_audits(run.plan, audits, console)
    table = Table(title="held-out loss, nats a token", title_justify="left")
    for name in ("stage", "domain", "before", "after", ""):
        table.add_column(name, justify="right" if name in ("before", "after") else "left")
    for stage, domain, before, after in heldout_losses(run):
        verdict = "[green]fell" if after < before else "[red]did not fall"
        table.add_row(stage, domain, f"{before:.3f}", f"{after:.3f}", verdict)
    console.print(table)
