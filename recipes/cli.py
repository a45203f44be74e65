"""The `smol` command: one thin function a verb. Heavy modules are imported where they are used."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape

from recipes import cli_cluster, cli_evaluation
from recipes.errors import UserError

app = typer.Typer(
    name="smol", no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False,
    help="SmolLM2 on Nanotron: recipes, their data plan, and a rehearsal of the whole run.\n\n"
         "Example: smol plan smollm2-1.7b",
)  # fmt: skip
bench = typer.Typer(no_args_is_help=True, help="Benchmarks: they print what they measure.\n\nExample: smol bench data")
app.add_typer(bench, name="bench")
Json = Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")]

RecipeArgument = Annotated[str, typer.Argument(help="A recipe below stages/, or the path of a recipe.yaml.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead (keys: docs/formats.md).")]


def main() -> None:
    """Runs the command; what a user did wrong ends in one message and exit code 2."""
    try:
        app(standalone_mode=True)
    except UserError as error:
        Console(stderr=True, soft_wrap=True).print("[bold red]error:[/]", escape(str(error)), highlight=False)
        sys.exit(2)
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        Console(stderr=True, soft_wrap=True).print("[bold red]error:[/]", escape(str(error)), highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\ninterrupted; nothing half-written counts", file=sys.stderr)
        sys.exit(130)


@app.command()
def lint(recipe: Annotated[str | None, typer.Argument(help="A recipe; all of them if left out.")] = None) -> None:
    """Check recipes: shares, sources, steps, batch sizes, learning rate, repetition.

    Exit code 0: fine, perhaps with warnings; 2: an error.

    Example: smol lint smollm2-1.7b
    """
    from recipes.lint import lint as check
    from recipes.loader import find_root, load, recipe_names

    errors = 0
    for name in [recipe] if recipe else recipe_names(find_root()):
        loaded = load(name)
        findings = check(loaded)
        for finding in findings:
            colour = "red" if finding.level == "error" else "yellow"
            Console(soft_wrap=True).print(f"[{colour}]{finding.level}:[/]", escape(str(finding)), highlight=False)
        errors += (bad := sum(f.level == "error" for f in findings))
        print(f"{loaded.name}: {bad} errors, {len(findings) - bad} warnings")
    if errors:
        raise typer.Exit(2)


@app.command()
def plan(
    recipe: RecipeArgument = "smollm2-1.7b",
    as_json: JsonFlag = False,
    mfu: Annotated[float, typer.Option(help="Share of a GPU's peak that training reaches.")] = 0.40,
    gpu_hour_price: Annotated[float, typer.Option(help="Price of one GPU for one hour.")] = 2.8,
) -> None:
    """Show what a recipe comes to: steps, tokens, epochs, GPU-hours, cost, bytes.

    Example: smol plan smollm2-1.7b --mfu 0.35 --gpu-hour-price 2
    """
    from recipes.lint import checked_plan
    from recipes.loader import load
    from recipes.show import show_plan, wide_console

    if not 0 < mfu <= 1:
        raise UserError(f"--mfu {mfu:g} is no share", "write a number above 0 and at most 1, such as 0.4")
    if gpu_hour_price < 0:
        raise UserError(f"--gpu-hour-price {gpu_hour_price:g} is negative", "write a price such as 2.8")
    worked_out = checked_plan(load(recipe), mfu=mfu, gpu_hour_price=gpu_hour_price)
    if as_json:
        print(json.dumps(worked_out.as_dict(), indent=2))
    else:
        show_plan(worked_out, wide_console())


RunArgument = Annotated[str, typer.Argument(help="A run's folder, or its name below runs/.")]


@app.command()
def tokenize(
    data: Annotated[str, typer.Argument(help="Folder of parquet or JSONL files, or hf://datasets/<id>/<folder>.")],
    out: Annotated[Path, typer.Argument(help="Where the tokenised folder goes; its name is the source's.")],
    tokenizer: Annotated[str, typer.Option(help="A tokenizer.json, its folder, or a Hub id.")],
    text: Annotated[str, typer.Option(help="Column of the text; a list of texts is joined.")] = "text",
    end_of_text: Annotated[str, typer.Option(help="Token that ends every document.")] = "<|endoftext|>",
    workers: Annotated[int, typer.Option(min=1, help="Processes; the result does not depend on them.")] = 1,
    glob: Annotated[str | None, typer.Option(help="Only input files whose path below DATA matches.")] = None,
    max_tokens_per_file: Annotated[int | None, typer.Option(min=1, help="Start a new file after this many.")] = None,
) -> None:
    """Turn documents into token files and a manifest. Interrupted, it goes on where it was.

    Example: smol tokenize downloads/open-web-math data/open-web-math --tokenizer HuggingFaceTB/cosmo2-tokenizer
    """
    from recipes.data.tokenize import resolve_tokenizer
    from recipes.data.tokenize import tokenize as run
    from recipes.show import amount, bytes_of

    path = resolve_tokenizer(tokenizer)
    made = run(out.name, data, out, path, end_of_text, text, workers, max_tokens_per_file, glob=glob)
    size = made.tokens * made.token_bytes
    print(f"{out}: {made.documents:,} documents, {amount(made.tokens)} tokens, {bytes_of(size)}")


@app.command()
def create(
    run: Annotated[str, typer.Argument(help="The new run's name below runs/, or its folder.")],
    recipe: RecipeArgument = "smollm2-1.7b",
    data: Annotated[Path, typer.Option(help="Folder of the tokenised sources, a folder each.")] = Path("data"),
    tokenizer: Annotated[str | None, typer.Option(help="A tokenizer.json; the recipe's if left out.")] = None,
    weights: Annotated[Path | None, typer.Option(help="A Llama in transformers' format to start from.")] = None,
) -> None:
    """Freeze a recipe, its tokenizer and its plan into a run folder, ready for torchrun.

    Example: smol create first-try smollm2-135m --data data
    """
    from recipes.data.tokenize import resolve_tokenizer
    from recipes.loader import load
    from recipes.run import Run, runs_folder

    loaded = load(recipe)
    folder = runs_folder() / run if len(Path(run).parts) == 1 else Path(run)
    if weights is not None:
        give_weights(weights, folder)
    made = Run.create(folder, loaded, data, resolve_tokenizer(tokenizer or loaded.tokenizer.name))
    ranks = f"{loaded.parallelism.gpus} processes in all"
    print(f"{made.folder}: start with torchrun … -m recipes.train {made.folder} {loaded.stages[0].name} ({ranks})")


def give_weights(model: Path, folder: Path) -> None:
    """Converts a model into the run folder's initial weights; training compares them with the recipe."""
    from recipes.engine.convert import to_nanotron
    from recipes.run import INITIAL_WEIGHTS, RUN_FILE

    if (folder / RUN_FILE).exists():
        raise UserError("there is a run here already", "choose another name", folder)
    to_nanotron(model, folder / INITIAL_WEIGHTS, progress=Console(stderr=True))


@app.command()
def verify(folders: Annotated[list[Path], typer.Argument(help="Tokenised folders or checkpoints.")]) -> None:
    """Compare every byte of tokenised folders and checkpoints with their manifests.

    Exit code 0: all agree; 2: the first difference is named.

    Example: smol verify data/* runs/x/stage1/checkpoints/*
    """
    from recipes.data.manifest import Manifest
    from recipes.engine.checkpoint import Checkpoint

    for folder in folders:
        if (folder / "model_config.json").exists():
            Checkpoint.load(folder).verify()
        else:
            Manifest.load(folder).verify(checksums=True)
        print(f"{folder}: whole")


@app.command()
def audit(
    run: RunArgument,
    digests: Annotated[bool, typer.Option(help="Read every sample again and compare its content.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Prove that the data seen is the data planned, to the token.

    Exit code 0: equal; 1: not.

    Example: smol audit rehearsal-smollm2-1.7b-1 --digests
    """
    from dataclasses import asdict

    from recipes.audit import audit as check
    from recipes.run import Run
    from recipes.show import show_audits, wide_console

    opened = Run.load(run)
    audits = check(opened, digests=digests)
    if as_json:
        print(json.dumps([asdict(a) for a in audits], indent=2))
    else:
        show_audits(opened.plan, audits, wide_console())
    raise typer.Exit(any(a.problems for a in audits))


@app.command()
def report(run: RunArgument) -> None:
    """Write a run's report.html again.

    Example: smol report rehearsal-smollm2-1.7b-1
    """
    from recipes.audit import audit as check
    from recipes.report import write_report
    from recipes.run import Run

    opened = Run.load(run)
    print(write_report(opened, check(opened)))


@app.command()
def rehearse(
    recipe: RecipeArgument = "smollm2-1.7b",
    minutes: Annotated[float, typer.Option(help="About how long it takes on two cores; sets the tokens.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the corpora, the weights and the data's order.")] = 42,
    nproc: Annotated[int, typer.Option(help="Data-parallel processes: 1, 2, 4, 8 or 16.")] = 2,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the corpora and all checkpoints.")] = False,
    closed_loop: Annotated[
        bool, typer.Option("--closed-loop", help="Train each next stage on the proposal, not on the recipe's mixture.")
    ] = False,
    static: Annotated[
        bool, typer.Option("--static", help="Train every stage on one mixture of the same tokens, to compare with.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the newest rehearsal, or with the one named.")
    ] = False,
) -> None:
    """Run the whole recipe, small, on this machine: data, four stages, a kill, a resume, scores, proposals, a report.

    Exit code 0: the data seen is the data planned and every held-out loss fell; 1: not; 2: see the message.

    Example: smol rehearse --minutes 5;   after Ctrl-C: smol rehearse --resume
    """
    from recipes.rehearse import Mixtures, Settings, resumable
    from recipes.rehearse import rehearse as run
    from recipes.show import wide_console

    if closed_loop and static:
        raise UserError("--closed-loop and --static are two different rehearsals", "choose one of them")
    mixtures: Mixtures = "closed-loop" if closed_loop else "static" if static else "staged"
    folder, settings = None, Settings(recipe, minutes, seed, nproc, keep, mixtures)
    if resume:
        folder, settings = resumable(None if recipe == "smollm2-1.7b" else recipe)
    raise typer.Exit(0 if run(settings, wide_console(), folder) else 1)


@bench.command()
def data(json_path: Json = None) -> None:
    """Measure the data plan beside an index that is built up front.

    Example: smol bench data --json bench.json
    """
    from recipes.bench.data import bench_data

    bench_data(json_path)


@bench.command("tokenize")
def tokenize_speed(
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer.json; one of 4,096 entries if none.")] = None,
    characters: Annotated[int, typer.Option(min=100_000, help="Text to tokenise.")] = 8_000_000,
    json_path: Json = None,
) -> None:
    """Measure tokenising, beside datatrove's own pipeline.

    Example: smol bench tokenize --tokenizer tokenizer.json
    """
    from recipes.bench.tokenize import bench_tokenize

    bench_tokenize(tokenizer, characters, json_path)


@bench.command()
def step(
    recipe: Annotated[str, typer.Argument(help="A recipe's name.")] = "smollm2-135m",
    processes: Annotated[int, typer.Option(min=1, help="One a device.")] = 1,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="Sequences a process; the recipe's if none.")] = None,
    steps: Annotated[int, typer.Option(min=2, help="Steps to time.")] = 10,
    json_path: Json = None,
) -> None:
    """Measure a recipe's training step on this machine, and where its time goes.

    Example: smol bench step smollm2-135m --micro-batch 1 --steps 3
    """
    from recipes.bench.engine import bench_step

    bench_step(recipe, processes, micro_batch, steps, json_path)


@bench.command()
def checkpoint(
    recipe: Annotated[str, typer.Argument(help="A recipe's name.")] = "smollm2-135m",
    processes: Annotated[int, typer.Option(min=1, help="One a device.")] = 1,
    micro_batch: Annotated[int, typer.Option(min=1, help="Sequences a process.")] = 1,
    json_path: Json = None,
) -> None:
    """Measure writing, verifying and loading checkpoints, and for how long training stands still.

    Example: smol bench checkpoint smollm2-135m
    """
    from recipes.bench.engine import bench_checkpoint

    bench_checkpoint(recipe, processes, micro_batch, json_path)


@bench.command()
def gpu(
    recipe: Annotated[str, typer.Argument(help="A recipe's name.")] = "smollm2-1.7b",
    steps: Annotated[int, typer.Option(min=2, help="Steps to time.")] = 20,
    loss_steps: Annotated[int, typer.Option(min=2, help="Steps over which losses are compared.")] = 200,
    only: Annotated[Literal["correctness", "speed"] | None, typer.Option(help="One part alone.")] = None,
    minutes: Annotated[float, typer.Option(min=1, help="It takes no longer: rows may be missing then.")] = 9,
    tiny: Annotated[bool, typer.Option("--tiny", help="A dry run with a tiny model, on a CPU too.")] = False,
    json_path: Json = None,
) -> None:
    """Measure training on this GPU: is it right, how fast is it, what does each fused part give.

    Example: smol bench gpu smollm2-1.7b --json gpu.json
    """
    from recipes.bench.gpu import bench_gpu

    bench_gpu(json_path, recipe, steps, tiny, loss_steps, only, minutes)


@bench.command("all-reduce")
def all_reduce(
    recipe: Annotated[str, typer.Argument(help="A recipe's name.")] = "smollm2-1.7b",
    gpus: Annotated[int, typer.Option(min=2, help="That share a step.")] = 256,
    mfu: Annotated[float, typer.Option(min=0.01, max=1, help="What the rest of the step reaches by itself.")] = 0.5,
    json_path: Json = None,
) -> None:
    """Work out, on paper, how much of the gradients' all-reduce the backward pass can hide.

    Example: smol bench all-reduce smollm2-1.7b --mfu 0.4
    """
    from recipes.bench.allreduce import bench_allreduce

    bench_allreduce(recipe, gpus, mfu, json_path)


for verb in (*cli_evaluation.VERBS, *cli_cluster.VERBS):
    app.command(verb.__name__.rstrip("_"))(verb)

if __name__ == "__main__":
    main()
