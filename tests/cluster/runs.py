"""Runs on the virtual cluster: launched with the project's own command, and read from their folders."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipes.files import read_lines
from tests.cluster.lab import Lab

Wait = tuple[Callable[[], bool], float, str]
"""What a story waits for, for how many seconds at most, and what it is called."""


@dataclass
class Site:
    """A clone that runs are launched from, and the cluster it is on."""

    lab: Lab
    root: Path
    """Holds stages/, mixtures/ and runs/."""
    data: Path
    tokenizer: Path
    profile: Path
    more: dict[str, str] = field(default_factory=dict)
    """Environment variables of the jobs."""

    def launching(self, recipe: str, run: str, *options: str) -> list[str]:
        """The words of `smol launch`."""
        words = ["--cluster", str(self.profile), "--data", str(self.data), "--tokenizer", str(self.tokenizer)]
        return ["launch", recipe, "--run", run, *words, *options]

    def launch(self, recipe: str, run: str, *options: str) -> str:
        """`smol launch`; returns what it prints."""
        return self.smol(*self.launching(recipe, run, *options))

    def train(self, run: str, stage: str, *options: str, recipe: str = "tiny") -> Generator[Wait, None, Live]:
        """`smol launch` of a stage, while other stories go on; the jobs that would evaluate it are cancelled."""
        command = self.command(*self.launching(recipe, run, "--stages", stage, *options))
        with tempfile.TemporaryFile("w+") as out:
            process = subprocess.Popen(command, env=self.lab.environment, cwd=self.root, stdout=out, stderr=out)
            yield lambda: process.poll() is not None, 120, f"{run} is launched"
            out.seek(0)
            assert process.returncode == 0, f"{' '.join(command)}: {out.read()}"
        live = self.run(run)
        self.lab.command("scancel", *map(str, live.jobs("eval", stage) + live.jobs("propose", stage)))
        return live

    def smol(self, *words: str) -> str:
        """The `smol` command, as a user gives it who stands in the clone; returns what it prints."""
        done = self.try_smol(*words)
        assert done.returncode == 0, f"smol {' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout

    def try_smol(self, *words: str) -> subprocess.CompletedProcess[str]:
        """The same, whether it works or not."""
        return self.lab.run(self.command(*words), 120, self.root)

    def command(self, *words: str) -> list[str]:
        """The command line of `smol`, with the jobs' environment and the nodes' view of disks."""
        variables = ["COLUMNS=160", *(f"{key}={value}" for key, value in self.more.items())]
        return self.lab.there("env", f"--chdir={self.root}", *variables, sys.executable, "-m", "recipes.cli", *words)

    def run(self, name: str) -> Live:
        """A run that was launched here."""
        return Live(self.lab, self.root / "runs" / name)


@dataclass
class Live:
    """A run's folder while its jobs run."""

    lab: Lab
    folder: Path

    def jobs(self, kind: str, stage: str) -> list[int]:
        """The ids of its jobs, oldest first."""
        lines = read_lines(self.folder / "jobs.jsonl")
        return [line["id"] for line in lines if (line["kind"], line["stage"]) == (kind, stage)]

    def events(self, kind: str, stage: str) -> list[dict[str, Any]]:
        """Its events of a kind, such as start, end or gate."""
        lines = read_lines(self.folder / "events.jsonl")
        return [line for line in lines if (line["event"], line.get("stage")) == (kind, stage)]

    def causes(self, stage: str) -> list[str]:
        """Why the stage's starts have ended."""
        return [line["cause"] for line in self.events("end", stage)]

    def losses(self, stage: str) -> dict[int, float]:
        """Loss by step."""
        return {line["step"]: line["loss"] for line in read_lines(self.folder / stage / "metrics.jsonl")}

    def step(self, stage: str) -> int:
        """The last step done."""
        return max(self.losses(stage), default=0)

    def ledger(self, stage: str) -> tuple[dict[str, int], int]:
        """Tokens by source over the whole stage, and the digests' sum: neither depends on where it was interrupted."""
        lines = read_lines(self.folder / stage / "ledger.jsonl")
        total: dict[str, int] = {}
        for line in lines:
            for source, tokens in line["tokens"].items():
                total[source] = total.get(source, 0) + tokens
        return total, sum(int(line["digest"], 16) if isinstance(line["digest"], str) else line["digest"]
                          for line in lines) % 2**64  # fmt: skip

    def state(self, stage: str) -> dict[str, Any]:
        """The stage's state.json; empty as long as there is none."""
        path = self.folder / stage / "state.json"
        content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        return content

    def log(self, stage: str) -> str:
        """What the stage's jobs have printed."""
        return "\n".join(path.read_text() for path in sorted((self.folder / stage / "logs").glob("*.log")))

    def until(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Waits; raises TimeoutError with the end of the stages' logs."""
        try:
            self.lab.until(condition, seconds, what)
        except TimeoutError as error:
            logs = [line for p in sorted(self.folder.glob("stage*")) for line in self.log(p.name).splitlines()[-60:]]
            raise TimeoutError("\n".join([str(error), *logs])) from None
