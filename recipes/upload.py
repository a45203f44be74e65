"""Copies complete checkpoints elsewhere, in the background.

    python -m recipes.upload RUN [STAGE]         one pass; without a stage over all of them

SMOL_UPLOAD says where to: an fsspec address such as s3://bucket/folder, gs://…, hf://user/repository or file:///…,
which gets <run>/<stage>/<step>/. It is in the environment (a cluster profile's `env`) and not in the recipe: a place,
and the right to write there, belong to a site. Rank 0 starts a pass, as a process of its own that training does not
wait for, when training starts and after every checkpoint.

Checkpoints that are to be kept for ever go first, then each stage's newest other one. A file that is there with the
same size is not sent again; manifest.json goes last: a folder without it is no checkpoint there either.
A pass that fails says so in RUN/logs/upload.log; the next one does the rest. No checkpoint is deleted here or there:
local copies go by the retention rule alone (recipe.yaml, checkpoints), which never touches those kept for ever.

Exit code: 0 all is there, or another pass is at work; 1 something could not be sent; 2 wrong input.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from recipes.engine.checkpoint import MANIFEST, Checkpoint, steps
from recipes.errors import UserError
from recipes.files import FileEntry
from recipes.plan import StagePlan
from recipes.run import Run
from recipes.state import lock

VARIABLE = "SMOL_UPLOAD"
BEGUN = "upload.json"
"""The manifest of the checkpoint whose files are being sent; written first."""
NICE = 10
"""What the uploading process adds to its niceness: training comes first."""


def target() -> str | None:
    """The address that the environment names, without a final slash."""
    return (os.environ.get(VARIABLE) or "").rstrip("/") or None


def check_target() -> None:
    """Raises UserError for an address of an unknown kind, or one that needs a package that is missing."""
    if target():
        file_system(str(target()))


def file_system(address: str) -> tuple[Any, str]:
    """fsspec's file system of an address, and the path in it.

    Raises:
        UserError: unknown, or not installed.
    """
    import fsspec

    fix = f"write {VARIABLE} as s3://…, gs://…, hf://… or file:///…, and install the package that it names"
    if "://" not in address:
        raise UserError(f"'{address}' is no address", fix)
    try:
        system, path = fsspec.core.url_to_fs(address, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise UserError(f"{address} cannot be used: {error}", fix) from None
    return system, path


def start_upload(run: Run) -> None:
    """Starts a pass over the run, if there is an address; never raises and does not wait."""
    if not target():
        return
    try:
        log = run.folder / "logs" / "upload.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "recipes.upload", str(run.folder.resolve())]
        with open(log, "a", encoding="utf-8") as file:
            subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True, cwd=_home()
            )
    except OSError as error:
        print(f"the upload could not be started: {error}", file=sys.stderr, flush=True)


def _home() -> Path:
    return Path(__file__).resolve().parent.parent


def upload(run: Run, stages: list[StagePlan], address: str) -> int:
    """Sends what is missing; returns how many checkpoints could not be sent. Each line printed says when and what."""
    system, root = file_system(address)
    tried: set[tuple[str, int]] = set()
    failed = 0
    while todo := next((item for item in _wanted(run, stages, system, root) if item not in tried), None):
        tried.add(todo)
        (stage, step), folder = todo, run.checkpoints(todo[0]) / str(todo[1])
        try:
            sent = send(folder, system, f"{root}/{run.folder.name}/{stage}/{step}")
            _say(f"{stage} step {step}: {sent:,} bytes sent")
        except Exception as error:  # each file system has its own
            if folder.exists():  # else retention has taken it meanwhile
                failed += 1
                text = " ".join(f"{type(error).__name__}: {error}".split())
                _say(f"{stage} step {step}: failed, the next pass tries again: {text}")
    return failed


def _wanted(run: Run, stages: list[StagePlan], system: Any, root: str) -> Iterator[tuple[str, int]]:
    """Checkpoints that are not there yet: those to be kept for ever, then each stage's newest other one."""
    every = run.recipe.checkpoints.keep_every
    later = []
    for stage in stages:
        there = steps(run.checkpoints(stage.name))
        kept = [step for step in there if step in stage.kept_steps or (every and step % every == 0)]
        yield from ((stage.name, step) for step in kept if not _is_there(run, stage.name, step, system, root))
        if there and there[-1] not in kept:
            later.append((stage.name, there[-1]))
    yield from ((stage, step) for stage, step in later if not _is_there(run, stage, step, system, root))


def _is_there(run: Run, stage: str, step: int, system: Any, root: str) -> bool:
    """Whether this very checkpoint is there: after a rollback another one of its step may be."""
    manifest = run.checkpoints(stage) / str(step) / MANIFEST
    try:
        return _content(system, f"{root}/{run.folder.name}/{stage}/{step}/{MANIFEST}") == manifest.read_bytes()
    except Exception:
        return False  # sending it will say why


def send(folder: Path, system: Any, to: str) -> int:
    """Sends a checkpoint's files, the manifest last; returns the bytes sent, on the Hub those of all files.

    BEGUN there says which checkpoint the files are of: those of another one are not taken for this one's.
    """
    manifest = (folder / MANIFEST).read_bytes()
    files = Checkpoint.load(folder).files
    begun = _content(system, f"{to}/{BEGUN}") == manifest
    if not begun:
        system.makedirs(to, exist_ok=True)
        if system.exists(f"{to}/{MANIFEST}"):
            system.rm_file(f"{to}/{MANIFEST}")
        system.pipe_file(f"{to}/{BEGUN}", manifest)
    if system.protocol == "hf" and not to.startswith("buckets/"):
        _commit(folder, system, to)
        sent = sum(entry.bytes for entry in files)
    else:
        sent = sum(_put(folder, entry, system, f"{to}/{entry.name}", begun) for entry in files)
    system.pipe_file(f"{to}/{MANIFEST}", manifest)
    return sent


def _put(folder: Path, entry: FileEntry, system: Any, path: str, begun: bool) -> int:
    """Sends a file, unless an earlier pass has; returns the bytes sent."""
    if begun and _same_size(system, path, entry.bytes):
        return 0
    system.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    system.put_file(str(folder / entry.name), path)
    return entry.bytes


def _commit(folder: Path, system: Any, to: str) -> None:
    """Sends all files to a repository on the Hub, which takes 128 commits an hour, and would take one for each file.

    What an earlier pass has sent is recognised by its hash. Several commits are made of many files: the manifest, which
    has to come last, is left to the caller.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    place = system.resolve_path(to)
    HfApi(system.endpoint, system.token).upload_folder(
        repo_id=place.repo_id, repo_type=place.repo_type, revision=place.revision, path_in_repo=place.path_in_repo,
        folder_path=folder, ignore_patterns=MANIFEST, commit_message=place.path_in_repo,
    )  # fmt: skip


def _content(system: Any, path: str) -> bytes | None:
    try:
        content: bytes = system.cat_file(path)
    except FileNotFoundError:
        return None
    return content


def _same_size(system: Any, path: str, size: int) -> bool:
    try:
        return bool(system.info(path)["size"] == size)
    except FileNotFoundError:
        return False


def _say(text: str) -> None:
    print(f"{datetime.now(timezone.utc).isoformat(timespec='seconds')} {text}", flush=True)


def main() -> int:
    """One pass; see the top of this file."""
    parser = argparse.ArgumentParser(prog="recipes.upload", description="Copy a run's checkpoints to $SMOL_UPLOAD.")
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("stage", nargs="?", help="only this stage")
    arguments = parser.parse_args()
    try:
        run = Run.load(arguments.run)
        address = target()
        if address is None:
            raise UserError(f"{VARIABLE} is not set", f"write {VARIABLE}=s3://bucket/folder before the command")
        stages = [*run.plan.stages, *run.plan.branches]
        if arguments.stage:
            stages = [run.plan.stage(run.recipe.stage(arguments.stage).name)]
        os.nice(NICE)
        return 1 if upload_alone(run, stages, address) else 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


def upload_alone(run: Run, stages: list[StagePlan], address: str) -> int:
    """`upload`, unless another process is at it: that one looks for new checkpoints until there are none."""
    try:
        lock(run.folder / "logs", seconds=0)
    except UserError:
        _say("another upload of this run is at work")
        return 0
    return upload(run, stages, address)


if __name__ == "__main__":
    sys.exit(main())
