"""The verbs of a run on a cluster: launch, approve, status, cancel."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RunArgument = Annotated[str, typer.Argument(help="A run's folder, or its name below runs/.")]


def launch(
    recipe: Annotated[str, typer.Argument(help="A recipe below stages/, or the path of a recipe.yaml.")],
    cluster: Annotated[str, typer.Option(help="A profile below slurm/clusters/, or a file.")],
    stages: Annotated[str | None, typer.Option(help="stage2, stage1..stage3, stage3.. or a branch; all.")] = None,
    run: Annotated[str | None, typer.Option(help="The run's name; the recipe's if left out.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print scripts, chain and cost; submit nothing.")] = False,
    data: Annotated[Path | None, typer.Option(help="Folder of the tokenised sources; the profile's.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="A tokenizer.json; the recipe's if left out.")] = None,
    verify_data: Annotated[bool, typer.Option("--verify-data", help="Compare every byte of the data.")] = False,
    from_step: Annotated[int | None, typer.Option(min=0, help="Go back to this step's checkpoint.")] = None,
    skip_tokens: Annotated[int, typer.Option(min=0, help="With --from-step: leave out so many tokens.")] = 0,
) -> None:
    """Submit a run to Slurm, stage by stage: train, evaluate, propose, wait for approval, go on.

    Example: smol launch smollm2-1.7b --cluster h100-32x8 --dry-run
    """
    from recipes.show import wide_console
    from recipes.slurm.launch import launch as submit

    code = submit(
        recipe, cluster, stages, run, dry_run, data, tokenizer, wide_console(), from_step, skip_tokens, verify_data
    )
    raise typer.Exit(code)


def approve(
    run: RunArgument,
    stage: Annotated[str, typer.Argument(help="The stage whose mixture is approved.")],
    proposal: Annotated[bool, typer.Option("--proposal", help="Adopt and approve what was proposed.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Approve the recipe's own mixture against a proposal.")] = False,
    mixture: Annotated[Path | None, typer.Option(help="Adopt and approve this file.")] = None,
    who: Annotated[str | None, typer.Option(help="Who approves; the user's name if left out.")] = None,
) -> None:
    """Record which mixture a stage may start with, and release its job.

    Example: smol approve first-try stage2 --proposal
    """
    from recipes.slurm.gate import approve as record

    made = record(run, stage, mixture, proposal, who, keep)
    print(f"{made['stage']}: {made['mixture']} ({made['hash']}), approved by {made['who']}")
    if made["note"]:
        print(made["note"])


def status(
    run: Annotated[str | None, typer.Argument(help="A run's folder, or its name below runs/; all of them.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again and again, until Ctrl-C.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead (keys: docs/formats.md).")] = False,
) -> None:
    """Show how runs stand: steps, loss, speed, time left, jobs, restarts, goodput.

    Example: smol status first-try --watch
    """
    from recipes.show import wide_console
    from recipes.slurm import status as module

    if watch:
        module.watch(run, wide_console())
    else:
        module.show(run, wide_console(), as_json)


def cancel(run: RunArgument) -> None:
    """Cancel a run's jobs; what is trained stays, and `smol launch` goes on with it.

    Example: smol cancel first-try
    """
    from recipes.show import wide_console
    from recipes.slurm.status import cancel as end

    end(run, wide_console())


VERBS = (launch, approve, status, cancel)
