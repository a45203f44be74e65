"""What the scripts below slurm/ ask: `python -m recipes.slurm.jobs WORD …` prints one answer a line.

facts RUN STAGE SUITE NUMBER      the suite's benchmark of that number, and the stage's last step
next RUN STAGE                    how to approve the proposal that follows the stage
source RECIPE OUT FOLDER NUMBER   the recipe's source of that number, and the arguments of `smol tokenize`
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from recipes.errors import UserError


def facts(run: str, stage: str, suite: str, number: str) -> list[str]:
    """A benchmark's name and the stage's last step."""
    from eval.suite import load_suite
    from recipes.run import Run

    opened = Run.load(run)
    opened.recipe.stage(stage)
    return [_pick(list(load_suite(suite).benchmarks), number), str(opened.plan.stage(stage).end_step)]


def next_step(run: str, stage: str) -> list[str]:
    """What a person does now."""
    from recipes.run import Run
    from recipes.slurm.chain import stage_after

    opened = Run.load(run)
    following = stage_after(opened.plan, stage)
    if following is None:
        return [f"{stage} is the last stage: nothing is to be approved"]
    name, proposal = opened.folder.name, opened.folder / "proposals" / following
    return [
        f"{following} waits for a person. Read {proposal}.md, then one of:",
        f"  smol approve {name} {following} --proposal         train on the proposal",
        f"  smol approve {name} {following} --keep             train on the recipe's own mixture",
        f"  smol approve {name} {following} --mixture FILE     train on another",
    ]


def source(recipe: str, out: str, folder: str, number: str) -> list[str]:
    """A source's name, and what `smol tokenize` has to be told to make its tokenised folder."""
    from recipes.loader import load

    loaded = load(recipe)
    names = list(dict.fromkeys(name for s in (*loaded.stages, *loaded.branches) for name in s.mixture.shares))
    name = _pick(names, number)
    entry = loaded.sources[name]
    local = Path(folder) / name
    if not local.is_dir() and entry.hub is None:
        raise UserError(f"{name} is on no Hub", f"put its files into {local}", folder)
    data = str(local) if local.is_dir() else f"hf://datasets/{entry.hub}"
    words = [data, str(Path(out) / name), "--tokenizer", loaded.tokenizer.name, "--text", entry.text,
             "--end-of-text", loaded.tokenizer.end_of_text]  # fmt: skip
    if not local.is_dir() and entry.config:
        words += ["--glob", f"{entry.config}/*"]
    return [name, *words]


def _pick(names: list[str], number: str) -> str:
    if not number.isdecimal() or int(number) >= len(names):
        found = f"there is no number {number} among {len(names)}: {', '.join(names)}"
        raise UserError(found, f"submit the array with --array=0-{len(names) - 1}")
    return names[int(number)]


def main(arguments: list[str]) -> int:
    """Answers; exit code 2 and one message where it cannot."""
    questions: dict[str, Callable[..., list[str]]] = {"facts": facts, "next": next_step, "source": source}
    try:
        print("\n".join(questions[arguments[0]](*arguments[1:])))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
