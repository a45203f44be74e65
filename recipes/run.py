"""The run folder: one execution of a recipe, with everything it needs frozen inside."""

from __future__ import annotations

import json
import subprocess
from functools import cached_property
from pathlib import Path
from typing import Any

from recipes.errors import UserError
from recipes.files import checksum, read_lines, write_atomic, write_json
from recipes.lint import checked_plan
from recipes.loader import find_root, load, load_mixture
from recipes.plan import Plan
from recipes.recipe import Recipe

RUN_FILE = "run.json"
TOKENIZER = "recipe/tokenizer.json"
INITIAL_WEIGHTS = "initial"
"""The checkpoint of weights that a run was given to start from."""
ADOPTION = "adoption.json"
"""A mixture that is being put in another's place."""


class Run:
    """A run's folder; `docs/formats.md` draws it.

    `run.json` is written last when a run is created: a folder without it is not a run.
    """

    def __init__(self, folder: Path) -> None:
        """Use `load` or `create`."""
        self.folder = folder
        self.settings: dict[str, Any] = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))

    @classmethod
    def load(cls, folder: Path | str) -> Run:
        """Opens a run by its folder, or by its name below runs/.

        Raises:
            UserError: there is no run there, or its plan is not what this code makes of its recipe.
        """
        path = Path(folder)
        if not path.is_dir() and len(path.parts) == 1:
            path = runs_folder() / path
        if not (path / RUN_FILE).is_file():
            names = ", ".join(sorted(p.parent.name for p in runs_folder().glob(f"*/{RUN_FILE}"))[-8:])
            raise UserError(f"this is no run: it has no {RUN_FILE}", f"name one of: {names or '(no runs yet)'}", path)
        finish_adoption(path)
        run = cls(path)
        run.check_plan()
        return run

    @classmethod
    def create(cls, folder: Path, recipe: Recipe, data: Path, tokenizer: Path) -> Run:
        """Freezes `recipe` into `folder` and writes its plan.

        Args:
            data: folder of the tokenised sources, `<data>/<source>/manifest.json`.
            tokenizer: the tokenizer.json they were made with; copied.

        Raises:
            UserError: there is a run already, or lint finds an error.
        """
        if (folder / RUN_FILE).exists():
            raise UserError("there is a run here already", "choose another name, or resume it", folder)
        files = freeze(recipe, folder / "recipe")
        write_atomic(folder / TOKENIZER, tokenizer.read_bytes())
        frozen = load(folder / "recipe" / "stages" / recipe.name)
        write_json(folder / "plan.json", checked_plan(frozen).as_dict())
        settings = {"recipe": recipe.name, "data": _inside(data, folder), "code": code_revision(), "files": files}
        write_json(folder / RUN_FILE, settings)
        return cls(folder)

    @cached_property
    def recipe(self) -> Recipe:
        """The frozen recipe."""
        return load(self.folder / "recipe" / "stages" / self.settings["recipe"])

    @cached_property
    def plan(self) -> Plan:
        """The frozen recipe's plan, worked out anew."""
        return checked_plan(self.recipe)

    def check_plan(self) -> None:
        """Raises UserError if plan.json differs from what this code makes of the frozen recipe."""
        path = self.folder / "plan.json"
        if json.loads(path.read_text(encoding="utf-8")) != json.loads(json.dumps(self.plan.as_dict())):
            code = self.settings["code"]["revision"]
            fix = f"use the code the run was created with ({code}), or restore the recipe/ folder"
            raise UserError("the frozen recipe no longer gives this plan", fix, path)

    def has_begun(self, stage: str) -> bool:
        """Whether the stage has been trained on, if only for a step."""
        folder = self.stage_folder(stage)
        return bool(read_lines(folder / "ledger.jsonl")) or any(self.checkpoints(stage).glob("*/manifest.json"))

    def adopt(self, stage: str, mixture: Path) -> Run:
        """Puts a mixture file in the place of a stage's own, inside this run; returns the run with its new plan.

        Raises:
            UserError: the stage has begun, its file is another stage's too, or lint refuses the mixture.
        """
        target = self.recipe.stage(stage).mixture_file
        if self.has_begun(stage):
            fix = "let the run go on with the mixture it has, or start a new run"
            raise UserError(f"{stage} has begun: its mixture stays", fix, self.stage_folder(stage))
        users = [s.name for s in (*self.recipe.stages, *self.recipe.branches) if s.mixture_file == target]
        if users != [stage]:
            raise UserError(f"{' and '.join(users)} share this mixture file", "give each stage its own", target)
        checked_plan(self.recipe.with_mixture(stage, load_mixture(mixture, self.recipe.sources)))
        content = {"file": str(target.resolve().relative_to(self.folder.resolve())), "text": mixture.read_text("utf-8")}
        write_json(self.folder / ADOPTION, content)
        return Run.load(self.folder)

    @property
    def tokenizer(self) -> Path:
        """The tokenizer.json that the run's data must have been made with."""
        return self.folder / TOKENIZER

    @property
    def initial_weights(self) -> Path | None:
        """A converted model to start from, if the run was given one."""
        folder = self.folder / INITIAL_WEIGHTS
        return folder if (folder / "manifest.json").is_file() else None

    @property
    def data_folder(self) -> Path:
        """Where the tokenised folders are."""
        return self.folder / str(self.settings["data"])

    def data(self, source: str) -> Path:
        """A source's tokenised folder."""
        return self.data_folder / source

    def heldout(self, domain: str) -> Path:
        """The tokenised held-out text of a domain; absent if there is none."""
        return self.data_folder / "heldout" / domain

    def stage_folder(self, stage: str) -> Path:
        """Where a stage's config, logs, metrics, ledger and checkpoints are."""
        return self.folder / stage

    def checkpoints(self, stage: str) -> Path:
        """Where a stage's checkpoints are, one folder a step."""
        return self.stage_folder(stage) / "checkpoints"


def finish_adoption(folder: Path) -> None:
    """Carries out what `Run.adopt` has noted, also after a kill in the middle: the mixture, then the plan of it."""
    note = folder / ADOPTION
    if note.is_file():
        content = json.loads(note.read_text(encoding="utf-8"))
        write_atomic(folder / content["file"], content["text"])
        write_json(folder / "plan.json", checked_plan(Run(folder).recipe).as_dict())
        note.unlink()


def _inside(path: Path, folder: Path) -> str:
    """`path` relative to `folder` if it lies inside, so that a run can be moved; else absolute."""
    path, folder = path.resolve(), folder.resolve()
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def runs_folder() -> Path:
    """runs/ of the repository one stands in."""
    return find_root() / "runs"


def freeze(recipe: Recipe, folder: Path) -> dict[str, str]:
    """Copies every file the recipe was read from to its place below the recipe's root; returns their checksums."""
    files = {}
    for file in recipe.files:
        place = file.resolve().relative_to(recipe.root.resolve())
        write_atomic(folder / place, file.read_bytes())
        files[place.as_posix()] = checksum(folder / place)
    return files


def code_revision() -> dict[str, Any]:
    """The git revision of this code, and whether files differ from it; both null outside git."""
    here = Path(__file__).resolve().parent
    revision, changes = _git(here, "rev-parse", "HEAD"), _git(here, "status", "--porcelain")
    return {"revision": revision, "changed": bool(changes) if revision else None}


def _git(folder: Path, *command: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
