"""The `smol` command: one thin function a verb. Heavy modules are imported where they are used."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from recipes.errors import UserError

app = typer.Typer(
    name="smol", no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False,
    help="SmolLM2 on Nanotron: recipes, their data plan, and a rehearsal of the whole run.",
)  # fmt: skip
bench = typer.Typer(no_args_is_help=True, help="Benchmarks: they print what they measure.")
app.add_typer(bench, name="bench")

RecipeArgument = Annotated[str, typer.Argument(help="A recipe below stages/, or the path of a recipe.yaml.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead (keys: docs/formats.md).")]


def main() -> None:
    """Runs the command; what a user did wrong ends in one message and exit code 2."""
    try:
        app(standalone_mode=True)
    except UserError as error:
        Console(stderr=True, soft_wrap=True).print("[bold red]error:[/]", escape(str(error)), highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; nothing half-written counts", file=sys.stderr)
        sys.exit(130)


@app.command()
def lint(recipe: Annotated[str | None, typer.Argument(help="A recipe; all of them if left out.")] = None) -> None:
    """Check recipes: shares, sources, steps, batch sizes, learning rate, repetition.

    Exit code 0: fine, perhaps with warnings; 2: an error.   Example: smol lint smollm2-1.7b
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


if __name__ == "__main__":
    main()
