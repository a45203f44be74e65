"""The verbs of the closed loop: convert, eval, scores, propose, diff."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from recipes.errors import UserError


def convert(
    source: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A run's checkpoint, or a transformers folder.")],
    out: Annotated[Path, typer.Argument(help="The new folder.")],
    to: Annotated[str, typer.Option(help="transformers, or nanotron.")] = "transformers",
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer.json; the run's if left out.")] = None,
) -> None:
    """Turn a checkpoint into transformers' format, or a published Llama into a checkpoint to start from.

    Example: smol convert runs/x/stage4/checkpoints/5240000 model;   smol convert model start --to nanotron
    """
    from recipes.engine.convert import to_nanotron, to_transformers

    if to not in ("transformers", "nanotron"):
        raise UserError(f"--to {to} is no format", "write transformers or nanotron")
    progress = Console(stderr=True)
    if to == "nanotron":
        print(to_nanotron(source, out, progress=progress))
    else:
        print(to_transformers(source, out, tokenizer, progress=progress))


def eval_(
    targets: Annotated[list[str], typer.Argument(help="Runs, checkpoints, model folders, or quoted patterns.")],
    suite: Annotated[str, typer.Option(help="One of eval/suites/, or a file.")] = "between-stages",
    every: Annotated[str, typer.Option(help="Of a run: stage (each one's newest) or checkpoint (all).")] = "stage",
    limit: Annotated[int | None, typer.Option(min=1, help="Items of each subtask at most.")] = None,
    data_root: Annotated[Path | None, typer.Option(help="Folder of local datasets, instead of the Hub.")] = None,
    allow_code: Annotated[bool, typer.Option("--allow-code", help="Let HumanEval run what the model wrote.")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes, where there is no GPU.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at once on a device.")] = 8,
    scores: Annotated[Path | None, typer.Option(help="Folder of the scorecards.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Run this benchmark and no other; may be repeated.")] = None,
) -> None:
    """Evaluate checkpoints with lighteval and write scorecards. Interrupted, it goes on where it was.

    Exit code 0: all scorecards are written; 1: a benchmark crashed; 2: see the message. The others' results are kept,
    and of several checkpoints the others are evaluated.

    Example: smol eval runs/first-try --every stage;   smol eval 'runs/x/stage1/checkpoints/*' --suite quick
    """
    from eval import harness
    from eval.suite import load_suite
    from eval.sweep import checkpoints_of, picture, scores_tables
    from recipes.show import wide_console

    if every not in ("stage", "checkpoint"):
        raise UserError(f"--every {every} is unknown", "write stage or checkpoint")
    chosen = load_suite(suite) if limit is None else harness.with_limit(load_suite(suite), limit)
    options = harness.Options(data_root, allow_code, harness.devices(jobs), batch_size, scores)
    subjects = [harness.subject_of(path) for path in checkpoints_of(targets, every)]
    harness.check(chosen, only or list(chosen.benchmarks), options)
    console, cards, written, code = wide_console(), [], [], 0
    for subject in subjects:
        try:
            if card := harness.evaluate(subject, chosen, options, console, only or ()):
                cards.append(card)
                written.append(harness.scorecard_path(subject, chosen.name, options))
        except (harness.Incomplete, UserError) as error:
            if len(subjects) == 1 and isinstance(error, UserError):
                raise
            Console(stderr=True, soft_wrap=True).print("[red]incomplete:[/]", escape(f"{subject.name}: {error}"))
            code = max(code, 2 if isinstance(error, UserError) else 1)
    for table in scores_tables(cards, width=console.width):
        console.print(table)
    for path in written:
        print(path)
    if len({card.tokens for card in cards}) > 1:
        print(picture(cards, harness.scores_folder(subjects[0], options) / f"{chosen.name}.png"))
    raise typer.Exit(code)


def scores(
    of: Annotated[
        list[str] | None, typer.Argument(help="Recipes, runs, scorecards or folders of them; none: published.")
    ] = None,
    suite: Annotated[str | None, typer.Option(help="Only this suite's scorecards.")] = None,
) -> None:
    """Show scorecards beside the published scores of SmolLM2 by stage and of its peers.

    Example: smol scores smollm2-1.7b
    """
    from eval.sweep import published_beside, scorecards_of, scores_tables
    from recipes.show import wide_console

    console, found = wide_console(), [card for name in of or () for card in scorecards_of(name)]
    cards = [card for card in found if suite in (None, card.suite)]
    if found and not cards:
        raise UserError(f"no scorecard is of the suite '{suite}'", f"name one of {', '.join({c.suite for c in found})}")
    for table in scores_tables(cards, published_beside(cards), console.width):
        console.print(table)


def propose(
    recipe: Annotated[str, typer.Argument(help="A recipe, or a run's folder or name.")] = "smollm2-1.7b",
    after: Annotated[str | None, typer.Option(help="The stage that has been trained and evaluated.")] = None,
    scores: Annotated[Path | None, typer.Option(help="Folder of the scorecards, or one of them.")] = None,
    policy: Annotated[Path | None, typer.Option(help="Another policy than eval/policy.yaml.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the proposal; proposals/ if left out.")] = None,
    backtest: Annotated[bool, typer.Option("--backtest", help="Replay the policy on the published scores.")] = False,
) -> None:
    """Propose the next stage's mixture from the scores after a stage; a person approves it.

    Example: smol propose smollm2-1.7b --after stage2;   smol propose --backtest
    """
    from eval import proposal
    from eval.backtest import backtest as replay
    from eval.backtest import show_backtest
    from eval.benchmarks import task_file_hash
    from eval.feedback import POLICY, load_policy
    from eval.soundness import scores_of
    from recipes.diff.show import mixture_diff_markdown
    from recipes.loader import find_root, load
    from recipes.run import RUN_FILE, Run, runs_folder
    from recipes.show import wide_console

    console, rules = wide_console(), load_policy(policy or POLICY)
    folder = next((p for p in (Path(recipe), runs_folder() / recipe) if (p / RUN_FILE).is_file()), None)
    run = Run.load(folder) if folder else None
    loaded = run.recipe if run else load(recipe)
    if backtest:
        show_backtest(replay(loaded, rules), console)
        return
    if after is None:
        names = ", ".join(stage.name for stage in loaded.stages[:-1])
        raise UserError("--after is missing", f"name the stage that was trained: {names}")
    cards = proposal.find_scorecards(loaded, scores or (scores_of(run) if run else None))
    runs = [run.folder] if run else [p for p in runs_folder().glob("*") if (p / RUN_FILE).is_file()]
    made = proposal.propose(loaded, after, cards, rules, task_file=task_file_hash(), runs=runs)
    target = out or (run.folder if run else find_root()) / "proposals"
    paths = proposal.write(made, target, mixture_diff_markdown(loaded, made.stage, made.mixture))
    proposal.show_proposal(made, console)
    for path in paths:
        print(path)


def diff(
    before: Annotated[str, typer.Argument(metavar="A", help="A mixture file, <recipe>:<stage>, or a git revision.")],
    after: Annotated[
        str | None, typer.Argument(metavar="[B]", help="What to compare it with; else what is here.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="The recipe of mixture files that lie elsewhere.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="For a pull request.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead (keys: docs/formats.md).")] = False,
) -> None:
    """Show what a change of mixtures means: shares, tokens, epochs, later stages, limits.

    Exit code 0, whatever differs; 2: a recipe of B cannot be read, the others are shown.

    Example: smol diff main;   smol diff smollm2-1.7b:stage2 proposals/stage3.yaml
    """
    from recipes.diff.show import show_diff, to_markdown
    from recipes.diff.sides import compare
    from recipes.show import wide_console

    found = compare(before, after, recipe=recipe)
    if as_json:
        print(json.dumps(found.as_dict(), indent=2))
    elif markdown:
        print(to_markdown(found))
    else:
        show_diff(found, wide_console())
    raise typer.Exit(2 if any(problem.side == "after" for problem in found.problems) else 0)


VERBS = (convert, eval_, scores, propose, diff)
