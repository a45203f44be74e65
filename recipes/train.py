"""What torchrun starts: one stage of one run.

    torchrun --nproc-per-node 2 -m recipes.train RUN_DIR STAGE

It goes on from the stage's newest checkpoint that verifies, else from the last one of the stage before, else from
random weights. The number of processes may differ from the recipe's: each step's samples stay the same.

Exit code of every worker:
     0  the stage is complete (also if it was before)
     2  wrong input: one message says what and how to put it right
    74  a checkpoint could not be written (a full disk, say); the ones before it count
    75  stopped on request, with a checkpoint: the same command goes on from there
    76  diverged: a loss or gradient that is no number, or a spike that stays (`guard` in the recipe). It would do so
        again: go back to the checkpoint that the message names, and leave out some data (recipes/slurm/rollback.py)
    77  hung: no step for too long (`guard` again); every thread's stack is in STAGE/logs/stacks-<rank>-<time>.txt
     1  anything else
torchrun itself ends with 1 whatever its workers return, so `STAGE/state.json` says it too: `state` is "starting" (by
recipes/slurm/restart.py), "training", "finished", "stopped", "failed", "diverged" or "hung"; `step` the last step
trained that a checkpoint holds; `exit_code` and `reason`, null while training. "training" without a process means that
it was killed: start it again.

The environment: SMOL_TRACKER sends metrics elsewhere, too (engine/tracker.py), SMOL_UPLOAD checkpoints (upload.py).

SIGTERM, SIGINT and SIGUSR1, to one worker or all: the step is finished, a checkpoint written, and all exit with 75.
torchrun passes on SIGTERM and SIGINT, and SIGUSR1 only with `--signals-to-handle SIGTERM,SIGINT,SIGUSR1`; it then kills
the workers after 30 seconds, or `--shutdown-timeout`. Sent SIGUSR1 without that flag, or killed, torchrun is gone at
once; its workers notice, write their checkpoint and end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed
from torch.distributed.rendezvous import rendezvous

from recipes.data.manifest import Manifest
from recipes.engine.checkpoint import Start, Topology, clean, find_start, latest, set_aside, steps
from recipes.engine.config import nanotron_config, write_config
from recipes.engine.fault import injected_fault
from recipes.engine.guard import Diverged
from recipes.engine.tracker import chosen_tracker
from recipes.engine.watchdog import Watchdog, dump_stacks
from recipes.errors import UserError
from recipes.files import keep_lines
from recipes.plan import StagePlan
from recipes.run import Run
from recipes.state import (
    EXIT_DIVERGED,
    EXIT_HUNG,
    EXIT_NOT_WRITTEN,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    end_with_parent,
    last_saved,
    lock,
    read_state,
    write_state,
)
from recipes.upload import check_target

if TYPE_CHECKING:
    from recipes.engine.trainer import StageTrainer

INIT = "init"
"""In a stage's place: creates step 0, for topologies in which Nanotron 0.4 cannot draw the weights."""
PREPARATION_TIMEOUT = timedelta(hours=2)
"""For which ranks wait for the first: it reads whole checkpoints, and may have to create step 0."""


class StopRequest:
    """Notes the signals that ask for a stop, instead of dying of them."""

    def __init__(self) -> None:
        self.signal: str | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self.signal = signal.Signals(number).name

    def __call__(self) -> bool:
        """True once a signal has come."""
        return self.signal is not None


def main() -> int:
    """Trains the stage that the command line names; returns the exit code."""
    parser = argparse.ArgumentParser(prog="recipes.train", description="Train one stage of a run; torchrun starts it.")
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("stage", help=f"a stage of its recipe, or '{INIT}' to create step 0 alone")
    arguments = parser.parse_args()
    become_single_process()
    if arguments.stage == INIT:
        return code_of(lambda: create_step_zero(arguments.run))
    stop = StopRequest()
    end_with_torchrun()
    word = first_word(arguments.run, arguments.stage)
    if word["exit_code"] is not None:
        return int(word["exit_code"])
    run = Run.load(arguments.run)
    return train(run, run.plan.stage(arguments.stage), Path(word["config"]), stop)


def code_of(work: Callable[[], None]) -> int:
    """Does `work`; returns the exit code of what a user or a full disk did to it, after one message."""
    try:
        work()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_NOT_WRITTEN
    return 0


def become_single_process() -> None:
    """Without torchrun: the environment of one process."""
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in alone.items()}, MASTER_ADDR="127.0.0.1")


def end_with_torchrun() -> None:
    """Its workers would train on, beside those of the next start."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()


# Before training: the first rank looks at everything, and all do as it says


def first_word(folder: Path, stage: str) -> dict[str, Any]:
    """What rank 0 finds, on all ranks: `exit_code` if there is nothing to train, else `config`, Nanotron's file.

    It travels through torchrun's store, so that a refusal comes before any process group, and before Nanotron.
    """
    store, rank, processes = next(rendezvous("env://", timeout=PREPARATION_TIMEOUT))
    if rank != 0:
        word: dict[str, Any] = json.loads(store.get("recipes.train"))
        return word
    word = {"exit_code": 1, "config": None}
    try:
        code = code_of(lambda: word.update(prepare(folder, stage, processes)))
        word["exit_code"] = code or word["exit_code"]
    finally:
        store.set("recipes.train", json.dumps(word))
    return word


def prepare(folder: Path, name: str, processes: int) -> dict[str, Any]:
    """Checks the run, its data and its checkpoints, and clears up behind a kill; rank 0 only.

    Raises:
        UserError: something that has to be put right first.
    """
    run = Run.load(folder)
    run.recipe.stage(name)
    stage = run.plan.stage(name)
    lock(run.stage_folder(name))
    try:
        check_data(run, stage)
        check_environment(run)
        topology = Topology.of(run.recipe, processes)
        clean(run.checkpoints(name))
        start = find_start(run, stage, topology)
        if start.step == stage.end_step:
            print(f"{name} is complete: {start.checkpoint and start.checkpoint.folder}", flush=True)
            write_state(run, name, "finished", start.step, 0)
            return {"exit_code": 0, "config": None}
        config = configure(run, stage, topology, start)
    except UserError as error:
        write_state(run, name, "failed", None, EXIT_USER_ERROR, str(error))
        raise
    tell(stage, start, topology)
    write_state(run, name, "training", start.step)
    return {"exit_code": None, "config": str(config)}


def check_environment(run: Run) -> None:
    """Raises UserError for settings in the environment that would fail later."""
    chosen_tracker()
    check_target()
    injected_fault(run.recipe)


def check_data(run: Run, stage: StagePlan) -> None:
    """Raises UserError for token files that are missing, truncated, or made with another tokenizer."""
    sha256 = hashlib.sha256(run.tokenizer.read_bytes()).hexdigest()
    domains = sorted({source.domain for source in run.recipe.sources.values()})
    heldout = [run.heldout(domain) for domain in domains if run.heldout(domain).is_dir()]
    for folder in [*map(run.data, stage.shares), *heldout]:
        manifest = Manifest.load(folder)
        manifest.verify(checksums=False)
        manifest.check_tokenizer(sha256, run.recipe.tokenizer.name)
        if manifest.vocab_size > run.recipe.model.vocab_size:
            found = f"{manifest.vocab_size:,} token ids, but the model has {run.recipe.model.vocab_size:,} embeddings"
            raise UserError(found, "raise model.vocab_size in the recipe", folder)


def configure(run: Run, stage: StagePlan, topology: Topology, start: Start) -> Path:
    """Writes config.yaml, and takes away what metrics and ledger say of steps that are trained again."""
    weights = initial_weights(run, topology) if start.checkpoint is None else None
    resume = start.checkpoint.folder if start.checkpoint else None
    config = nanotron_config(
        run.recipe, stage, topology, run.checkpoints(stage.name), resume=resume, weights=weights
    )  # fmt: skip
    for damaged, _ in start.passed_over:
        set_aside(damaged)
    folder = run.stage_folder(stage.name)
    keep_lines(folder / "metrics.jsonl", lambda line: line["step"] <= start.step)
    keep_lines(folder / "ledger.jsonl", lambda line: line["to_step"] <= start.step)
    write_config(folder / "config.yaml", config)
    return folder / "config.yaml"


def initial_weights(run: Run, topology: Topology) -> Path | None:
    """The weights that the run was given, or step 0 where Nanotron 0.4 cannot draw them; else none.

    Raises:
        UserError: the weights given are damaged, or of another model.
    """
    given = run.initial_weights
    if given is not None:
        from recipes.engine.convert import check_start

        check_start(given, run)
        print(f"initial weights: {given}", flush=True)
        return given
    return step_zero(run) if topology.tp * topology.pp > 1 else None


def tell(stage: StagePlan, start: Start, topology: Topology) -> None:
    """Says where training starts from."""
    for folder, reason in start.passed_over:
        print(f"passed over, now {folder.name}.damaged: {reason}", flush=True)
    origin = f"after {start.checkpoint.folder}" if start.checkpoint else "from initial weights"
    ranks = f"dp {topology.dp}, tp {topology.tp}, pp {topology.pp}"
    print(f"{stage.name}: steps {start.step + 1:,} to {stage.end_step:,}, {origin}; {ranks}", flush=True)


# Step 0


def step_zero(run: Run) -> Path:
    """A checkpoint of random weights drawn at tp = pp = 1, by a process of its own if there is none yet."""
    folder = run.folder / INIT
    checkpoint, _ = latest(folder)
    if checkpoint is None:
        print("creating step 0 in one process", flush=True)
        torchrun = ("RANK", "LOCAL_", "WORLD_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "PET_")
        environment = {key: value for key, value in os.environ.items() if not key.startswith(torchrun)}
        command = [sys.executable, "-m", "recipes.train", str(run.folder), INIT]
        subprocess.run(command, env=environment, check=True)
        checkpoint, _ = latest(folder)
    assert checkpoint is not None
    return checkpoint.folder


def create_step_zero(run_folder: Path) -> None:
    """Creates step 0 in this process."""
    run = Run.load(run_folder)
    folder = run.folder / INIT
    lock(folder)
    clean(folder)
    if latest(folder)[0] is None:
        config = nanotron_config(run.recipe, run.plan.stages[0], Topology(1, 1, 1, 0), folder)
        write_config(folder / "config.yaml", config)
        from recipes.engine.trainer import StageTrainer, write_step_zero

        write_step_zero(StageTrainer(run, run.plan.stages[0], folder / "config.yaml", lambda: False), folder)


# Training: all ranks


def train(run: Run, stage: StagePlan, config: Path, stop: StopRequest) -> int:
    """Trains to the stage's end, or to a stop; returns the exit code."""
    set_threads()
    from recipes.engine.trainer import StageTrainer

    watchdog = Watchdog(run.recipe.guard, lambda problem: note_hang(run, stage, problem))
    watchdog.start()
    try:
        trainer = StageTrainer(run, stage, config, stop, watchdog)
        state, code, reason = fit(trainer, stop)
    except Exception as error:
        if os.environ["RANK"] == "0" and read_state(run, stage.name).get("state") != "hung":
            write_state(run, stage.name, "failed", last_saved(run, stage), 1, f"{type(error).__name__}: {error}")
        raise
    if trainer.rank == 0:
        step = last_saved(run, stage)
        write_state(run, stage.name, state, step, code, reason)
        text = f"{stage.name} {state} at step {step:,}" + (f": {reason}" if reason else "")
        print(text, file=sys.stderr if code else sys.stdout, flush=True)
    torch.distributed.barrier(trainer.control)  # torchrun ends the others as soon as one has failed
    torch.distributed.destroy_process_group()
    watchdog.stop()
    return code


def note_hang(run: Run, stage: StagePlan, problem: str) -> None:
    """Writes down where this rank stands, and that the stage hangs."""
    rank, step = int(os.environ["RANK"]), last_saved(run, stage)
    try:
        reason = f"rank {rank}: {problem}; stacks in {dump_stacks(run.stage_folder(stage.name) / 'logs', rank)}"
    except OSError as error:
        reason = f"rank {rank}: {problem}; its stacks could not be written: {error}"
    if read_state(run, stage.name).get("state") != "hung":  # the first rank's word is enough
        write_state(run, stage.name, "hung", step, EXIT_HUNG, reason)
    print(f"{stage.name} hung at step {step:,}: {reason}", file=sys.stderr, flush=True)


def fit(trainer: StageTrainer, stop: StopRequest) -> tuple[str, int, str | None]:
    """Trains; returns the state it ends in, the exit code, and the reason if it is not the stage's end."""
    from recipes.engine.trainer import Stopped, WriteError

    folder = trainer.run.checkpoints(trainer.stage.name)
    try:
        trainer.fit()
    except Stopped:
        return "stopped", EXIT_STOPPED, stop.signal or "another process was asked to"
    except WriteError as error:
        return "failed", EXIT_NOT_WRITTEN, f"could not write {error}"
    except Diverged as error:
        good = [step for step in steps(folder) if step < error.first_bad]
        where = (
            f"the last good checkpoint is {folder / str(good[-1])}" if good else "the stage has no checkpoint before"
        )
        return "diverged", EXIT_DIVERGED, f"{error}; {where}"
    finally:
        trainer.tracker.close()
    return "finished", 0, None


def set_threads() -> None:
    """Spreads the machine's cores over its workers, unless OMP_NUM_THREADS says otherwise.

    torchrun sets that to 1 itself; whether a person set it stands in the environment that torchrun was started with.
    """
    chosen = "OMP_NUM_THREADS" in os.environ
    if "TORCHELASTIC_RUN_ID" in os.environ:
        chosen = b"OMP_NUM_THREADS=" in Path(f"/proc/{os.getppid()}/environ").read_bytes()
    if not chosen:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ["LOCAL_WORLD_SIZE"])))


if __name__ == "__main__":
    sys.exit(main())
