"""Nanotron's trainer with this project's data, learning rate, ledger, metrics, checkpoints and signals."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor

import recipes.engine.compat  # noqa: F401  before nanotron

# isort: split
from nanotron import distributed as dist
from nanotron.serialize import weights
from nanotron.serialize.metadata import save_meta
from nanotron.serialize.optimizer import save_lr_scheduler, save_optimizer
from nanotron.trainer import DistributedTrainer

from recipes.audit import stage_dataset
from recipes.engine.checkpoint import Topology, check_space, commit, partial_folder, prune
from recipes.engine.fault import injected_fault
from recipes.engine.feed import Feed, Place, heldout_batches, heldout_domains, ledger_line, micro_batch
from recipes.engine.guard import LossGuard
from recipes.engine.model import RopeLlama, RopeLlamaConfig
from recipes.engine.progress import ProgressLine, peak_flops
from recipes.engine.snapshot import Snapshot
from recipes.engine.tracker import Tracker, chosen_tracker
from recipes.engine.watchdog import Watchdog
from recipes.files import append_line, checksum, read_lines, sync_file, write_json
from recipes.plan import StagePlan, flops_per_token
from recipes.run import Run
from recipes.skips import read_skips
from recipes.upload import start_upload

T = TypeVar("T")

weights.tqdm = lambda items, **_: items  # no bar for every checkpoint


class WriteError(RuntimeError):
    """Something could not be written to disk, on some rank; raised on all of them."""


class Stopped(Exception):
    """Training ended before the stage did, on request, with a checkpoint of `step`."""

    def __init__(self, step: int) -> None:
        self.step = step
        super().__init__(f"stopped at step {step}")


class StageTrainer(DistributedTrainer):  # type: ignore[misc]
    """Trains one stage of a run, on one rank."""

    def __init__(
        self, run: Run, stage: StagePlan, config: Path, stop_requested: Callable[[], bool],
        watchdog: Watchdog | None = None,
    ) -> None:  # fmt: skip
        """Builds or loads the model; all ranks together.

        Args:
            config: Nanotron's configuration (engine/config.py), which says what to start from.
            stop_requested: asked after every step; one rank's yes stops all.
            watchdog: told of every step.
        """
        super().__init__(str(config), model_config_class=RopeLlamaConfig, model_class=RopeLlama)
        self.run, self.stage, self.stop_requested = run, stage, stop_requested
        self.watchdog = watchdog or Watchdog(run.recipe.guard, print)
        context, model = self.parallel_context, self.unwrapped_model
        self.topology = Topology(
            context.dp_pg.size(), context.tp_pg.size(), context.pp_pg.size(), self.config.optimizer.zero_stage
        )
        self.rank = dist.get_rank(context.world_pg)
        self.control = torch.distributed.new_group(backend="gloo")
        """All ranks, on CPU: what is agreed here waits for no GPU."""
        self.writers = torch.distributed.new_group(backend="gloo")
        """The same, for the threads that write checkpoints."""
        self.place = Place(dist.get_rank(context.pp_pg), model.input_pp_rank, model.output_pp_rank)
        if self.init_checkpoint_path is not None:
            restore_learning_rate(self.optimizer, self.lr_scheduler, stage.schedule.peak_lr)
        first = dist.get_rank(context.tp_pg) == 0 and self.place.rank == self.place.input
        self.feed = Feed(
            stage_dataset(run, stage), self.place, dp=self.topology.dp, dp_rank=dist.get_rank(context.dp_pg),
            counts=first,
        )  # fmt: skip
        self.folder = run.stage_folder(stage.name)
        self.ledger_step = self.start_iteration_step
        self.write_problem: str | None = None
        """What kept this rank from writing, for all to hear of at the next agreement."""
        self.snapshot, self.writer = Snapshot(), threading.Thread()
        self.progress = ProgressLine(stage)
        self.peak_flops = peak_flops(self.config.model.dtype)
        self.guard, self.owed = LossGuard(run.recipe.guard), False
        self.fault = injected_fault(run.recipe)
        self.skips = read_skips(run, stage.name)
        self.tracker = Tracker("none", run, stage.name)

    def fit(self) -> None:
        """Trains to the stage's end.

        Raises:
            Stopped: a stop was requested; a checkpoint is written.
            Diverged: a loss that is no number, or a spike that stays; no checkpoint is written of such steps.
            WriteError: the disk is full, say; the checkpoints written before are as they were.
        """
        if self.agree()[0]:
            raise Stopped(self.start_iteration_step)
        self.tracker = Tracker(chosen_tracker() if self.rank == 0 else "none", self.run, self.stage.name)
        if self.rank == 0:
            start_upload(self.run)
        if self.start_iteration_step == self.stage.start_step:
            self.write_heldout("start")
        self.guard.replay(self.together(self.last_losses)[0])
        try:
            self.train(self.feed.batches(self.start_iteration_step - self.stage.start_step))
        finally:
            self.wait_for_writer()

    # What Nanotron's loop calls

    def pre_training(self, *args: Any, **kwargs: Any) -> None:
        """Starts no wandb."""

    def training_step(self, dataloader: Any) -> Any:
        """One step of the optimizer; notes the learning rate it is done with."""
        self.feed.seconds = 0.0
        self.learning_rate = self.optimizer.get_base_optimizer().param_groups[0]["lr"]
        self.fault.strike(self.unwrapped_model, self.iteration_step, self.rank)
        return super().training_step(dataloader)

    def train_step_logs(self, outputs: Any, loss_avg: Tensor | None) -> None:
        """After every step: metrics, a checkpoint where one is due, and the end where one is asked for."""
        step, stage = self.iteration_step, self.stage
        self.watchdog.beat(time.time() - self.iteration_start_time)
        stop, loss, finite = self.agree(loss_avg, bool(self.grad_norm_unclipped.isfinite()))
        self.guard.judge(step, loss, finite)
        line = self.metrics(loss) if self.rank == 0 else {}
        if step == stage.end_step:
            self.write_heldout("end")
        self.owed |= step % self.config.checkpoints.checkpoint_interval == 0
        due = (self.owed and not self.guard.spikes) or step in stage.kept_steps
        last = stop or step == stage.end_step
        began = time.perf_counter()
        ledger = self.hold_checkpoint() if due or last else None
        if self.rank == 0:
            line["seconds"]["checkpoint"] = time.perf_counter() - began if ledger else 0.0
            self.append_metrics(line)
            self.progress.show(line, always=due or stop)
            self.tracker.log(line)
        if ledger is not None:
            self.start_writer(step, ledger)
        if last:
            self.wait_for_writer()
            self.agree()
        if stop and step < stage.end_step:
            raise Stopped(step)

    def save_checkpoint(self) -> None:
        """Called by Nanotron's loop at the interval; `train_step_logs` has written it."""

    def last_losses(self) -> list[float]:
        """Rank 0: the losses that the guard has to know."""
        lines = read_lines(self.folder / "metrics.jsonl")[-self.guard.memory :] if self.rank == 0 else []
        return [line["loss"] for line in lines]

    # What all ranks agree on

    def agree(self, loss: Tensor | None = None, finite: bool = True) -> tuple[bool, float, bool]:
        """Whether any rank wants to stop; the loss, which only the pipeline's last ranks know; if all are `finite`.

        Raises:
            WriteError: a rank could not write a line.
        """
        context = self.parallel_context
        speaks = loss is not None and dist.get_rank(context.dp_pg) == dist.get_rank(context.tp_pg) == 0
        said = loss.item() if speaks and loss is not None else 0.0
        words = [self.stop_requested(), self.write_problem is not None, said, not finite]
        word = torch.tensor(words, dtype=torch.float64)
        torch.distributed.all_reduce(word, group=self.control)
        if word[1]:
            self.wait_for_writer()  # its word is more than another's
            raise WriteError(self.write_problem or "another rank could not write")
        return bool(word[0]), float(word[2]), not word[3]

    def together(self, work: Callable[[], T], group: Any = None) -> list[T]:
        """Does `work` on every rank; returns all results, on all ranks. A thread of its own needs its own `group`.

        Raises:
            WriteError: it failed on some rank; raised on all of them.
        """
        result, problem = None, None
        try:
            result = work()
        except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises RuntimeError on a full disk
            problem = f"{error} ({type(error).__name__} on rank {self.rank})"
        answers: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(answers, (result, problem), group=group or self.control)
        if problems := [problem for _, problem in answers if problem]:
            raise WriteError(problems[0])
        return [result for result, _ in answers]

    # Metrics

    def metrics(self, loss: float) -> dict[str, Any]:
        """The step's line of metrics.jsonl."""
        seconds = time.time() - self.iteration_start_time
        rate = self.run.plan.tokens_per_step / seconds
        flops = rate * flops_per_token(self.run.recipe.model, self.stage.sequence_length)
        peak = self.peak_flops and self.peak_flops * torch.distributed.get_world_size()
        return {
            "step": self.iteration_step, "tokens": self.iteration_step * self.run.plan.tokens_per_step, "loss": loss,
            "lr": self.learning_rate, "grad_norm": self.grad_norm_unclipped.item(), "tokens_per_s": rate,
            "mfu": flops / peak if peak else None,
            "seconds": {"data": self.feed.seconds, "step": seconds - self.feed.seconds},
        }  # fmt: skip

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Rank 0: writes the step's line; a disk that is full ends training at the next step."""
        try:
            append_line(self.folder / "metrics.jsonl", line)
        except OSError as error:
            self.write_problem = f"metrics.jsonl: {error}; {self.room()}"

    def room(self) -> str:
        """Says how much room there is for the stage's files, after a failure to write one."""
        folders = [folder for folder in (self.folder, self.run.checkpoints(self.stage.name)) if folder.is_dir()]
        free = min(shutil.disk_usage(folder).free for folder in folders)
        return f"{free:,} bytes are free. Make room, then start again"

    # Checkpoints

    def hold_checkpoint(self) -> dict[str, Any]:
        """Takes the state of this step into host memory, once the checkpoint before is written: training stands still.

        Returns:
            The ledger's line, for `start_writer`.

        Raises:
            WriteError: on all ranks; nothing of the checkpoint is left.
        """
        step = self.iteration_step
        partial = partial_folder(self.run.checkpoints(self.stage.name), step)
        with self.watchdog.during("checkpoint"):
            self.wait_for_writer()
            self.agree()
            try:
                self.together(lambda: self.prepare_folder(partial))
                counts = self.together(lambda: self.hold_files(partial))
            except WriteError as error:
                raise WriteError(self.give_up(step, error)) from None
        line = ledger_line(
            self.ledger_step, step, list(self.stage.shares), self.stage.sequence_length, counts, self.skips
        )
        self.ledger_step, self.owed = step, False
        return line

    def prepare_folder(self, partial: Path) -> None:
        """Rank 0: the empty folder, if there is room for a checkpoint."""
        if self.rank == 0:
            partial.mkdir(parents=True)
            check_space(partial, self.run.plan.checkpoint_bytes)

    def hold_files(self, folder: Path) -> tuple[list[int], int]:
        """This rank's files, as DistributedTrainer.save_checkpoint writes them, without its collectives.

        They would wait for ever for a rank that fails to write. Random states are left out: 0.4 never loads them.
        Folders and small texts are written here and now.

        Returns:
            What this rank has fed since the last checkpoint.
        """
        self.config.general.step = self.iteration_step
        self.config.general.consumed_train_samples = self.consumed_train_samples
        if self.rank == 0:
            self.config.save_as_yaml(folder / "config.yaml")
            write_json(folder / "model_config.json", asdict(self.model_config))
        context, done = self.parallel_context, {"last_train_step": self.iteration_step}
        save_meta(context, folder, {**done, "consumed_train_samples": self.consumed_train_samples})
        with self.snapshot.take():
            if dist.get_rank(context.dp_pg) == 0:
                weights.save_weights(model=self.unwrapped_model, parallel_context=context, root_folder=folder)
            save_optimizer(optimizer=self.optimizer, parallel_context=context, root_folder=folder)
            save_lr_scheduler(self.lr_scheduler, context, folder)
        return self.feed.take_count()

    def start_writer(self, step: int, ledger: dict[str, Any]) -> None:
        """Lets a thread write what is held, while training goes on."""
        self.writer = threading.Thread(target=self.write_held, args=(step, ledger), name="checkpoint", daemon=True)
        self.writer.start()

    def wait_for_writer(self) -> None:
        """Until the last checkpoint is written, or could not be."""
        if self.writer.ident is not None:
            with self.watchdog.during("checkpoint"):
                self.writer.join()

    def write_held(self, step: int, ledger: dict[str, Any]) -> None:
        """The thread: writes the files that are held, and makes them a checkpoint; else notes what was in the way."""
        partial = partial_folder(self.run.checkpoints(self.stage.name), step)
        try:
            self.together(self.snapshot.write, self.writers)
            self.together(lambda: self.complete(partial, step, ledger), self.writers)
        except Exception as error:  # of another rank's end, too
            self.write_problem = self.give_up(step, error)

    def give_up(self, step: int, error: Exception) -> str:
        """Removes what there is of a checkpoint; returns what to say of it."""
        if self.rank == 0:
            shutil.rmtree(partial_folder(self.run.checkpoints(self.stage.name), step), ignore_errors=True)
        return f"the checkpoint of step {step}: {error}; {self.room()}"

    def complete(self, partial: Path, step: int, ledger: dict[str, Any]) -> None:
        """Rank 0: makes the checkpoint count, after the lines that must be there if it does."""
        if self.rank != 0:
            return
        if self.write_problem:
            raise OSError(self.write_problem)
        sync_file(self.folder / "metrics.jsonl")
        append_line(self.folder / "ledger.jsonl", ledger, sync=True)
        self.commit(partial, step)
        settings = self.run.recipe.checkpoints
        prune(partial.parent, settings.keep_last, settings.keep_every, self.stage.kept_steps)
        start_upload(self.run)

    def commit(self, partial: Path, step: int) -> None:
        """Rank 0: makes the files in `partial` a checkpoint."""
        commit(
            partial, recipe=self.run.recipe.name, stage=self.stage.name, step=step,
            plan=checksum(self.run.folder / "plan.json"), topology=self.topology,
        )  # fmt: skip

    # Held-out loss

    def write_heldout(self, when: str) -> None:
        """Adds the held-out losses of now to heldout.json under `when`; not with a pipeline, which has no such pass."""
        path = self.folder / "heldout.json"
        if self.topology.pp > 1:
            if self.rank == 0:
                print(f"no held-out loss: it needs pp 1, not {self.topology.pp}", flush=True)
            return
        with self.watchdog.during("held-out evaluation"):
            losses = {domain: self.heldout_loss(domain) for domain in heldout_domains(self.run)}
            before = json.loads(path.read_text(encoding="utf-8")) if when != "start" and path.is_file() else {}
            after = before | {when: {domain: loss for domain, loss in losses.items() if loss}}
            self.together(lambda: write_json(path, after) if self.rank == 0 else None)

    def heldout_loss(self, domain: str) -> dict[str, float] | None:
        """Mean loss in nats a token over a domain's held-out sequences, the same on any number of ranks."""
        batches = heldout_batches(self.run, domain, self.stage.sequence_length, self.stage.micro_batch)
        losses = {}
        for i in range(self.feed.dp_rank, len(batches), self.topology.dp):
            batch = {key: value.to("cuda") for key, value in micro_batch(batches[i], self.place).items()}
            with torch.no_grad():
                losses[i] = self.unwrapped_model(**batch)["loss"].item()
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, losses, group=self.control)
        losses = {i: loss for part in everyone for i, loss in part.items()}
        tokens = [batch.shape[0] * self.stage.sequence_length for batch in batches]
        total = sum(losses[i] * tokens[i] for i in range(len(batches)))
        return {"loss": total / sum(tokens), "tokens": sum(tokens)} if batches else None


def restore_learning_rate(optimizer: Any, scheduler: Any, peak_lr: float) -> None:
    """Sets the rate that the schedule has after the steps done so far.

    Building the scheduler leaves that of step 0 in the optimizer, and loading its state changes only the scheduler: the
    first step after a resume would have a rate of 0. The peak comes from the checkpoint, whatever the schedule says.
    """
    scheduler.base_lrs = [peak_lr for _ in scheduler.base_lrs]
    scheduler._last_lr = [peak_lr * factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
    for group, rate in zip(optimizer.get_base_optimizer().param_groups, scheduler._last_lr, strict=True):
        group["lr"] = rate


def write_step_zero(trainer: StageTrainer, folder: Path) -> None:
    """Makes a trainer's random weights a checkpoint of step 0 in `folder`, to be used with init_method.path.

    Only tp = pp = 1 draws them right: Nanotron 0.4 gives every tensor-parallel rank the same shard, and averages two
    draws of tied embeddings over a pipeline.
    """
    assert trainer.topology.tp == trainer.topology.pp == 1
    partial = partial_folder(folder, 0)
    partial.mkdir(parents=True)
    weights.save_weights(model=trainer.unwrapped_model, parallel_context=trainer.parallel_context, root_folder=partial)
    trainer.commit(partial, step=0)
