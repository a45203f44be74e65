"""For benchmarks: trains the first stage of a run as recipes.train does, and times the parts of a step.

    torchrun --nproc-per-node 2 -m recipes.engine.timed RUN OUT

After `WARMUP` steps the first half is timed as it is; in the second half a GPU is waited for after every part, which
tells the parts apart and costs some time; the last step but one is profiled, to see the collectives.
The first checkpoint is waited for, as if training wrote it itself; the others are written beside training.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from recipes import train
from recipes.bench.data import memory
from recipes.engine.trainer import StageTrainer
from recipes.files import write_json
from recipes.run import Run

# isort: split
import nanotron.trainer

WARMUP = 3
LOADERS = ("load_weights", "load_optimizer", "load_lr_scheduler", "load_meta")
COLLECTIVES = ("gloo:", "ncclDevKernel")
"""How the profiler's names of them begin: gloo's work and NCCL's kernels."""


class TimedTrainer(StageTrainer):
    """Notes the seconds of everything."""

    def __init__(self, *args: Any) -> None:
        """As StageTrainer."""
        self.parts: dict[str, float] = {}
        self.load_seconds = 0.0
        self.steps: list[dict[str, Any]] = []
        self.checkpoints: list[dict[str, float]] = []
        self.collectives: dict[str, float] = {}
        self.split = self.writing = False
        for name in LOADERS:
            setattr(nanotron.trainer, name, self._loading(getattr(nanotron.trainer, name)))
        super().__init__(*args)

    def training_step(self, dataloader: Any) -> Any:
        """One step; its parts go to `parts`."""
        step = self.iteration_step - self.start_iteration_step
        if step == 1:
            self._time("forward", self.pipeline_engine)
            self._time("backward", self.pipeline_engine)
            self._time("step", self.optimizer)
        total = self.stage.end_step - self.start_iteration_step
        self.split = step > WARMUP + (total - WARMUP) // 2
        self.parts, self.writing = {}, self.writer.is_alive()
        self._began = self._now()
        if step == total - 1:
            return self._profiled(lambda: super(TimedTrainer, self).training_step(dataloader))
        return super().training_step(dataloader)

    def train_step_logs(self, outputs: Any, loss_avg: Any) -> None:
        """Notes the step, which ends when its loss is known."""
        if loss_avg is not None:
            loss_avg.item()
        line = {"seconds": self._now() - self._began, "split": self.split, "data": self.feed.seconds, **self.parts}
        self.steps.append(line | {"writing": self.writing})
        super().train_step_logs(outputs, loss_avg)

    def hold_checkpoint(self) -> dict[str, Any]:
        """Notes for how long training stands still."""
        began, waited = self._now(), self._wait()
        ledger = super().hold_checkpoint()
        self.checkpoints.append({"hold": self._now() - began - waited, "waited": waited})
        return ledger

    def start_writer(self, step: int, ledger: dict[str, Any]) -> None:
        """Waits for the first."""
        super().start_writer(step, ledger)
        if len(self.checkpoints) == 1:
            self.wait_for_writer()

    def write_held(self, step: int, ledger: dict[str, Any]) -> None:
        """Notes for how long the thread is at work."""
        began, note = time.perf_counter(), self.checkpoints[-1]
        super().write_held(step, ledger)
        note["write"] = time.perf_counter() - began

    def figures(self) -> dict[str, Any]:
        """What was measured, of this rank; bytes and seconds."""
        cuda = torch.cuda.is_available()
        return {
            "steps": self.steps, "checkpoints": self.checkpoints, "collectives": self.collectives,
            "load_seconds": self.load_seconds, "snapshot_bytes": self.snapshot.nbytes,
            "tokens_per_step": self.run.plan.tokens_per_step, "peak_flops": self.peak_flops,
            "device": torch.cuda.get_device_name() if cuda else "cpu", "threads": torch.get_num_threads(),
            "memory": memory("VmHWM"), "device_memory": torch.cuda.max_memory_allocated() if cuda else None,
        }  # fmt: skip

    def _now(self) -> float:
        if self.split and torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def _wait(self) -> float:
        began = time.perf_counter()
        self.wait_for_writer()
        return time.perf_counter() - began

    def _time(self, name: str, owner: Any) -> None:
        work = getattr(owner, name)

        def timed(*args: Any, **options: Any) -> Any:
            began = self._now()
            try:
                return work(*args, **options)
            finally:
                self.parts[name] = self.parts.get(name, 0.0) + self._now() - began

        setattr(owner, name, timed)

    def _loading(self, load: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return load(*args, **options)
            finally:
                self.load_seconds += time.perf_counter() - began

        return timed

    def _profiled(self, work: Callable[[], Any]) -> Any:
        with torch.profiler.profile() as profile:
            result = work()
        for event in profile.key_averages():
            if event.key.startswith(COLLECTIVES):
                seconds = (event.self_device_time_total or event.cpu_time_total) / 1e6
                self.collectives[event.key] = self.collectives.get(event.key, 0.0) + seconds
        return result


def main() -> int:
    """Trains and writes rank 0's figures."""
    parser = argparse.ArgumentParser(prog="recipes.engine.timed", description="Time a run's first stage.")
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    train.become_single_process()
    stop = train.StopRequest()
    train.end_with_torchrun()
    run = Run.load(arguments.run)
    stage = run.plan.stages[0]
    word = train.first_word(run.folder, stage.name)
    if word["exit_code"] is not None:
        return int(word["exit_code"])
    train.set_threads()
    trainer = TimedTrainer(run, stage, Path(word["config"]), stop)
    trainer.fit()
    if trainer.rank == 0:
        write_json(arguments.out, trainer.figures())
    torch.distributed.barrier(trainer.control)
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
