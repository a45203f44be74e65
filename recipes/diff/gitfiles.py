"""The stages/ and mixtures/ of a git revision, in a folder of their own for as long as they are read."""

from __future__ import annotations

import difflib
import io
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from recipes.errors import UserError

FOLDERS = ("stages", "mixtures")


def commit_of(revision: str, root: Path) -> str:
    """The full hash of the commit that a branch, tag or hash means.

    Raises:
        UserError: there is none, or `root` is in no git repository.
    """
    _git(root, "rev-parse", "--git-dir")
    try:
        name = f"{revision}^{{commit}}"
        return _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", name).decode().strip()
    except UserError:
        listed = _git(root, "for-each-ref", "--format=%(refname:short)", "refs/heads", "refs/tags", "refs/remotes")
        names = listed.decode().split()
        near = difflib.get_close_matches(revision, names, 3, cutoff=0.5)
        fix = f"write {' or '.join(near)}" if near else f"name one of {', '.join([*names[:8], 'HEAD'])}"
        raise UserError(f"there is no git revision '{revision}'", fix) from None


@contextmanager
def exported(revision: str, root: Path) -> Iterator[Path]:
    """A temporary folder with the revision's stages/ and mixtures/; errors in it are named `<revision>:<path>`.

    Raises:
        UserError: no such revision, it lacks these folders, or what the block raises, renamed.
    """
    commit = commit_of(revision, root)
    try:
        packed = _git(root, "archive", "--format=tar", commit, "--", *FOLDERS)
    except UserError:
        fix = "name a revision of a repository with recipes"
        raise UserError(f"the revision {revision} lacks stages/ or mixtures/", fix, root) from None
    with tempfile.TemporaryDirectory(prefix="smol-diff-") as name:
        folder = Path(name)
        try:
            with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
                archive.extractall(folder, filter="data")
        except tarfile.FilterError as error:
            raise UserError(f"the revision {revision} holds an unsafe path: {error}", "remove that link") from None
        try:
            yield folder
        except UserError as error:
            raise _renamed(error, folder, revision) from None


def renamed(error: UserError, root: Path, revision: str | None) -> UserError:
    """The error with the files below `root` named `<revision>:<path>`; unchanged in the working tree."""
    return _renamed(error, root, revision) if revision else error


def _renamed(error: UserError, folder: Path, revision: str) -> UserError:
    def named(text: str) -> str:
        return text.replace(f"{folder}/", f"{revision}:").replace(str(folder), revision)

    file = named(str(error.file)) if error.file else None
    return UserError(named(error.found), named(error.fix), file, error.where)


def _git(root: Path, *arguments: str) -> bytes:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, check=False)
    except FileNotFoundError:
        raise UserError("git is not installed", "install it, or compare two files or stages") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        fix = "compare two files or stages, or go to a clone of the repository"
        raise UserError(f"git {arguments[0]} failed: {said[0] if said else 'no such thing'}", fix, root)
    return done.stdout
