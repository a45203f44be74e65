"""Slurm's commands. The only module that calls them: lists of arguments, a time limit on each, one clear error."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from recipes.errors import UserError

TIMEOUT = 60
"""Seconds that a command may take; a busy controller answers within a few."""
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}
"""States that nothing follows; slurm.conf(5) MinJobAge says for how long squeue still knows them."""
_FIELDS = "%F|%K|%T|%D|%M|%L|%r|%j|%k"
"""Array job id, array index, state, nodes, time used, time left, reason, name, comment: squeue(1)."""
_SILENT = re.compile(r"contact slurm controller|Connection refused|connect failure", re.IGNORECASE)
_NO_CLUSTER = re.compile(r"configuration (source|file)|slurm\.conf", re.IGNORECASE)


class Unreachable(UserError):
    """Slurm is not installed here, or does not answer."""


@dataclass(frozen=True)
class Job:
    """One line of squeue."""

    id: int
    """Of an array, the id of the whole."""
    index: str
    """Of an array's task; several where tasks are pending together, empty where there is no array."""
    state: str
    """PENDING, RUNNING, COMPLETING, …: squeue(1), JOB STATE CODES."""
    nodes: int
    time_used: str
    time_left: str
    reason: str
    """Why it waits, such as JobHeldUser, Dependency or Resources."""
    name: str
    comment: str
    """The run's folder, for jobs of `smol launch`."""

    @property
    def live(self) -> bool:
        """Whether it runs or may still run."""
        return self.state not in ENDED and self.reason != "DependencyNeverSatisfied"


def installed() -> bool:
    """Whether Slurm's commands are on this machine."""
    return shutil.which("sbatch") is not None


def call(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Runs one of Slurm's commands; its exit code is the caller's to look at.

    Raises:
        Unreachable: the command is missing, or the controller does not answer.
    """
    if shutil.which(command[0]) is None:
        fix = "run this on a login node of the cluster"
        raise Unreachable(f"there is no Slurm on this machine: {command[0]} is not on the PATH", fix)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        raise Unreachable(f"{command[0]} did not answer within {TIMEOUT} seconds", "try again later") from None
    if done.returncode and _NO_CLUSTER.search(done.stderr):
        found = f"{command[0]} is installed on this machine, but belongs to no cluster: there is no slurm.conf"
        raise Unreachable(found, "run this on a login node of the cluster, or export SLURM_CONF")
    if done.returncode and _SILENT.search(done.stderr):
        raise Unreachable(f"Slurm's controller does not answer: {one_line(done.stderr)}", "try again later")
    return done


def one_line(text: str) -> str:
    """The lines of a message, joined."""
    lines = [re.sub(r"^\w+: (error: )?", "", line).strip() for line in text.strip().splitlines()]
    return "; ".join(dict.fromkeys(filter(None, lines)))


def ask(command: Sequence[str], fix: str) -> str:
    """What one of Slurm's commands prints.

    Raises:
        UserError: it failed; Unreachable where there is no Slurm.
    """
    done = call(command)
    if done.returncode:
        raise UserError(f"{command[0]}: {one_line(done.stderr) or f'exit code {done.returncode}'}", fix)
    return done.stdout


def submit(script: Path, options: Iterable[str] = ()) -> int:
    """Submits a script; returns the job's id.

    Raises:
        UserError: Slurm refuses it.
    """
    fix = f"correct what Slurm names, in the profile or in {script.name}, and launch again"
    printed = ask(["sbatch", "--parsable", *options, str(script)], fix)
    return int(printed.split(";")[0])


def test_only(script: Path, options: Iterable[str] = ()) -> tuple[bool, str]:
    """Whether Slurm would accept a script, and what it says: when and where it would start, or what is wrong."""
    done = call(["sbatch", "--test-only", *options, str(script)])
    return done.returncode == 0, one_line(done.stderr or done.stdout)


def queue(names: Iterable[str] = (), folder: Path | None = None, everyone: bool = False) -> list[Job]:
    """The user's jobs that squeue knows.

    Args:
        names: only jobs of these names.
        folder: only jobs of the run in this folder.
        everyone: jobs of all users, as far as the site shows them.
    """
    chosen = ["--name", ",".join(names)] if (names := list(names)) else []
    chosen += [] if everyone else ["--me"]
    printed = ask(["squeue", "--noheader", "--format", _FIELDS, *chosen], "try again later")
    jobs = [parse_job(line) for line in printed.splitlines() if line.strip()]
    return [job for job in jobs if folder is None or job.comment == str(folder.resolve())]


def parse_job(line: str) -> Job:
    """A line that squeue printed; the comment comes last and may hold anything."""
    id, index, state, nodes, used, left, reason, name, comment = line.split("|", 8)
    return Job(int(id), "" if index == "N/A" else index, state, int(nodes), used, left, reason, name, comment)


def release(jobs: Iterable[int]) -> None:
    """Lets held jobs go."""
    for job in jobs:
        ask(["scontrol", "release", str(job)], f"release it by hand: scontrol release {job}")


def cancel(jobs: Iterable[int]) -> None:
    """Ends jobs, or takes them out of the queue; those that have ended already are no error."""
    if ids := [str(job) for job in jobs]:
        ask(["scancel", *ids], "cancel them by hand with scancel")


def partitions() -> list[str]:
    """The partitions there are."""
    return sorted(set(ask(["sinfo", "--noheader", "--format", "%R"], "try again later").split()))
