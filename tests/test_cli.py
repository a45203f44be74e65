from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from recipes.cli import app
from recipes.run import Run

VERBS = [
    [],
    ["lint"],
    ["plan"],
    ["tokenize"],
    ["create"],
    ["verify"],
    ["audit"],
    ["report"],
    ["rehearse"],
    ["bench"],
    ["bench", "data"],
    ["convert"],
    ["eval"],
    ["scores"],
    ["propose"],
    ["diff"],
]


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_every_verb_has_help_with_an_example(verb: list[str]) -> None:
    done = CliRunner().invoke(app, [*verb, "--help"])
    assert done.exit_code == 0
    assert f"Example: smol {' '.join(verb)}".rstrip() in done.output


def smol(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-m", "recipes.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd or root, env=environment)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "smollm2-1.7"], "Did you mean smollm2-1.7b"),
        (["plan", "--mfu", "40"], "--mfu 40 is no share"),
        (["plan", "--gpu-hour-price", "-1"], "--gpu-hour-price -1 is negative"),
        (["audit", "nothing"], "this is no run: it has no run.json"),
        (["verify", "stages"], "manifest.json"),
        (["rehearse", "--nproc", "3"], "--nproc 3"),
        (["rehearse", "--minutes", "0"], "--minutes 0"),
        (["rehearse", "--resume", "nothing"], "no rehearsal nothing"),
    ],
)
def test_wrong_arguments_are_one_message_and_code_2(arguments: list[str], message: str) -> None:
    done = smol(*arguments)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error:") and message in done.stderr and "Traceback" not in done.stderr


def test_lint_of_all_recipes_is_clean() -> None:
    done = smol("lint")
    assert done.returncode == 0
    for name in ("smollm2-1.7b", "smollm2-360m", "smollm2-135m"):
        assert f"{name}: 0 errors" in done.stdout


def test_create_freezes_a_recipe(tree: Path) -> None:
    (tree / "tokenizer.json").write_text('{"model": {"vocab": {}}, "added_tokens": []}')
    done = smol("create", "first", "smollm2-135m", "--tokenizer", "tokenizer.json", cwd=tree)
    assert done.returncode == 0, done.stderr
    assert "-m recipes.train" in done.stdout and "stage1 (64 processes in all)" in done.stdout
    run = Run.load(tree / "runs" / "first")
    assert run.plan.parameters == 134_515_008 and run.data("dclm-edu") == (tree / "data" / "dclm-edu")
    again = smol("create", "first", "smollm2-135m", "--tokenizer", "tokenizer.json", cwd=tree)
    assert again.returncode == 2 and "there is a run here already" in again.stderr
