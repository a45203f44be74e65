"""The one exception for what a user did: shown as a single message, exit code 2, no traceback."""

from __future__ import annotations

from pathlib import Path


def shown(path: Path | str) -> str:
    """A path as a message shows it: relative where it lies below the current folder."""
    if "://" in str(path):
        return str(path)
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


class UserError(ValueError):
    """Wrong input: where it is, what was found, and what to write or do instead."""

    def __init__(self, found: str, fix: str, file: Path | str | None = None, where: str | None = None) -> None:
        """`where` is a key path or a line inside `file`; `found` ends without a stop, `fix` too."""
        self.found, self.fix, self.file, self.where = found, fix, file, where
        place = ": ".join(part for part in (file and shown(file), where) if part)
        end = "" if found.endswith("\n") else ". "
        super().__init__(f"{place + ': ' if place else ''}{found}{end}{fix[:1].upper()}{fix[1:]}.")

    def __reduce__(self) -> tuple[type[UserError], tuple[object, ...]]:
        """Survives the way from a worker process."""
        return type(self), (self.found, self.fix, self.file, self.where)
