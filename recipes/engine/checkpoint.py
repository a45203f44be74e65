"""Checkpoints that are complete or absent: which count, which to start from, which to keep.

Nanotron writes into `<step>.partial/`; `commit` lists the files in `<step>.partial/manifest.json` and renames the
folder to `<step>/`. A kill at any moment leaves the older checkpoints and at most one `.partial` folder, which nothing
reads and the next start removes. Neither torch nor nanotron is imported here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recipes.errors import UserError
from recipes.files import PARTIAL, FileEntry, list_files, sync_file, sync_folder, verify_files, write_json
from recipes.plan import StagePlan
from recipes.recipe import Recipe
from recipes.run import Run

MANIFEST = "manifest.json"
DAMAGED = ".damaged"
"""Suffix of checkpoints that did not verify when a newer start passed them over."""


@dataclass(frozen=True)
class Topology:
    """What the files of a checkpoint depend on."""

    dp: int
    tp: int
    pp: int
    zero_stage: int

    @classmethod
    def of(cls, recipe: Recipe, processes: int) -> Topology:
        """The recipe's tp and pp, and as many data-parallel ranks as `processes` leave.

        Raises:
            UserError: the processes do not divide.
        """
        size = recipe.parallelism.tp * recipe.parallelism.pp
        if processes % size:
            found = f"{processes} processes do not divide by tp {recipe.parallelism.tp} × pp {recipe.parallelism.pp}"
            raise UserError(found, f"start a multiple of {size} processes")
        return cls(processes // size, recipe.parallelism.tp, recipe.parallelism.pp, recipe.optimizer.zero_stage)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's manifest.json."""

    folder: Path
    recipe: str
    stage: str
    step: int
    plan: str
    """xxh3-128 of the plan.json it was trained by."""
    topology: Topology
    files: tuple[FileEntry, ...]

    @classmethod
    def load(cls, folder: Path) -> Checkpoint:
        """Reads a checkpoint's manifest; `verify` compares it with the files.

        Raises:
            UserError: there is none, or it is damaged.
        """
        path = folder / MANIFEST
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            content["topology"] = Topology(**content["topology"])
            content["files"] = tuple(FileEntry(**entry) for entry in content["files"])
            return cls(folder, **content)
        except FileNotFoundError:
            raise UserError("no complete checkpoint: its manifest is missing", "name another step", path) from None
        except (ValueError, TypeError, KeyError) as error:
            fix = "delete the folder: the checkpoint before it then counts"
            raise UserError(f"a damaged manifest ({error})", fix, path) from None

    def verify(self) -> None:
        """Raises UserError for the first file that is missing, of another size or of another content."""
        verify_files(self.folder, self.files)

    def refuse(self, topology: Topology) -> None:
        """Raises UserError where Nanotron 0.4 cannot go on from this checkpoint in `topology`, or would go wrong."""
        there, fix = self.topology, "start it as before, or go on from a stage's weights in a new run"
        if (there.tp, there.pp) != (topology.tp, topology.pp):
            found = (
                f"written with tp {there.tp}, pp {there.pp}, to be resumed with tp {topology.tp}, pp {topology.pp}: "
            )
            raise UserError(f"{found}Nanotron 0.4 fails, or silently restarts Adam's moments", fix, self.folder)
        if there.zero_stage != topology.zero_stage:
            found = f"written with zero_stage {there.zero_stage}, to be resumed with {topology.zero_stage}: "
            raise UserError(f"{found}Nanotron 0.4 does not find its optimizer files", fix, self.folder)
        if there.zero_stage > 0 and there.dp != topology.dp:
            found = f"written by {there.dp} data-parallel ranks under ZeRO {there.zero_stage}, to be resumed by "
            fix = f"start {there.dp * there.tp * there.pp} processes; zero_stage 0 would allow any number"
            raise UserError(f"{found}{topology.dp}: Nanotron 0.4 cannot", fix, self.folder)


@dataclass(frozen=True)
class Start:
    """Where a stage's training starts from."""

    step: int
    """Steps already trained."""
    checkpoint: Checkpoint | None
    """None: random weights at step 0."""
    passed_over: tuple[tuple[Path, str], ...] = ()
    """The stage's own newer checkpoints that do not verify, and why."""


def find_start(run: Run, stage: StagePlan, topology: Topology) -> Start:
    """The stage's own newest checkpoint that verifies; the last one of the stage before if the stage has none.

    Raises:
        UserError: the stage has checkpoints but none verifies; the stage before has not got that far, or its
            checkpoint is damaged; `topology` cannot resume it.
    """
    own, passed_over = latest(run.checkpoints(stage.name))
    if own is None and passed_over:
        found = f"none of {stage.name}'s {len(passed_over)} checkpoints is whole; the newest: {passed_over[0][1]}"
        fix = "restore one, or delete the folder to train the stage from its start"
        raise UserError(found, fix, run.checkpoints(stage.name))
    checkpoint = own or _from_before(run, stage)
    if checkpoint is not None:
        checkpoint.refuse(topology)
    return Start(checkpoint.step if checkpoint else 0, checkpoint, tuple(passed_over))


def _from_before(run: Run, stage: StagePlan) -> Checkpoint | None:
    if stage.start_step == 0:
        return None
    names = [s.name for s in run.plan.stages]
    before = stage.branch or names[names.index(stage.name) - 1]
    folder = run.checkpoints(before) / str(stage.start_step)
    if not (folder / MANIFEST).is_file():
        there = steps(run.checkpoints(before))
        last = f"{before}'s last checkpoint is of step {there[-1]:,}" if there else f"{before} has no checkpoint"
        found = f"{stage.name} starts from step {stage.start_step:,} of {before}, but {last}"
        raise UserError(found, f"train {before} first", folder)
    checkpoint = Checkpoint.load(folder)
    checkpoint.verify()
    return checkpoint


def steps(folder: Path) -> list[int]:
    """The steps of the complete checkpoints in `folder`, ascending; their files are not looked at."""
    return sorted(int(p.parent.name) for p in folder.glob(f"*/{MANIFEST}") if p.parent.name.isdecimal())


def latest(folder: Path) -> tuple[Checkpoint | None, list[tuple[Path, str]]]:
    """The newest checkpoint in `folder` that verifies, and the newer ones that do not, each with the reason."""
    passed_over = []
    for step in reversed(steps(folder)):
        try:
            checkpoint = Checkpoint.load(folder / str(step))
            checkpoint.verify()
        except UserError as error:
            passed_over.append((folder / str(step), str(error)))
        else:
            return checkpoint, passed_over
    return None, passed_over


def partial_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` is written before it counts."""
    return folder / f"{step}{PARTIAL}"


def commit(partial: Path, *, recipe: str, stage: str, step: int, plan: str, topology: Topology) -> Path:
    """Makes the files in `partial` the checkpoint of `step`; returns its folder.

    Raises:
        OSError: the disk is full, or failed; the checkpoint then does not count.
    """
    files = list_files(partial)
    for entry in files:
        sync_file(partial / entry.name)
    content = {"recipe": recipe, "stage": stage, "step": step, "plan": plan, "topology": asdict(topology)}
    write_json(partial / MANIFEST, {**content, "files": [asdict(entry) for entry in files]})
    for entry in files:  # safetensors lets nobody but the owner read
        (partial / entry.name).chmod((partial / MANIFEST).stat().st_mode & 0o777)
    final = partial.with_name(str(step))
    partial.rename(final)
    sync_folder(final.parent)
    return final


def remove(folder: Path) -> None:
    """Deletes a checkpoint; killed in between, it is a leftover and not half a checkpoint."""
    doomed = folder.with_name(f"{folder.name}.removed{PARTIAL}")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def set_aside(folder: Path) -> Path:
    """Renames a damaged checkpoint to `<step>.damaged`, so that its step can be written again; returns the new path."""
    aside = folder.with_name(folder.name + DAMAGED)
    if aside.exists():
        remove(aside)
    return folder.rename(aside)


def clean(folder: Path) -> None:
    """Deletes what a kill has left; only while nobody writes checkpoints there."""
    for leftover in folder.glob(f"*{PARTIAL}"):
        shutil.rmtree(leftover)


def prune(folder: Path, keep_last: int, keep_every: int, keep: Iterable[int] = ()) -> list[int]:
    """Deletes checkpoints but the newest `keep_last`, multiples of `keep_every` steps (0: none) and those in `keep`.

    Returns:
        The steps deleted.
    """
    there, kept = steps(folder), set(keep)
    old = there[:-keep_last]
    doomed = [step for step in old if step not in kept and not (keep_every and step % keep_every == 0)]
    for step in doomed:
        remove(folder / str(step))
    return doomed


def check_space(folder: Path, needed: int) -> None:
    """Raises OSError if the disk that holds `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"the checkpoint needs about {needed:,} bytes, {free:,} are free on the disk of {folder}")
