"""`smol launch`: everything is checked, then frozen into the run's folder, then submitted; torch is not imported."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

from rich.console import Console

from recipes.errors import UserError
from recipes.files import append_line, read_lines, write_atomic
from recipes.run import Run
from recipes.slurm import commands
from recipes.slurm.chain import SCRIPT, Link, draw_tree
from recipes.slurm.dry_run import Check, head, show, test_all, title
from recipes.slurm.existing import (
    check_queue,
    check_start,
    done,
    every_link,
    job_words,
    lacking,
    queued,
    stage_to_go_back_in,
)
from recipes.slurm.gate import job_name, record, user
from recipes.slurm.order import Order, check_data, check_suite, find_tokenizer, prepare
from recipes.slurm.rollback import rollback


def launch(
    recipe_name: str, cluster: str, stages: str | None, run_name: str | None, dry_run: bool, data: Path | None,
    tokenizer: str | None, console: Console, from_step: int | None = None, skip_tokens: int = 0,
    verify_data: bool = False,
) -> int:  # fmt: skip
    """Checks, freezes, renders and submits a run's chain of jobs; or goes on with a run that is there.

    Args:
        recipe_name: below stages/, or a path.
        cluster: a profile's name below slurm/clusters, or its file.
        stages: such as stage2, or stage1..stage3; the whole main line if none.
        run_name: below runs/; the recipe's name if none.
        dry_run: only show it all; nothing is written.
        data: folder of the tokenised sources; the run's, the profile's or data/ if none.
        tokenizer: what `smol tokenize` takes; the recipe's if none. Used when the run is created.
        from_step: go back to the checkpoint of this step first.
        skip_tokens: with `from_step`, of data, from there on.
        verify_data: compare every byte of the data with the manifests, not sizes only.

    Returns:
        0, or 2 if a dry run found something that a launch would refuse.

    Raises:
        UserError: something is wrong; nothing was submitted, and no run was made.
    """
    order = prepare(recipe_name, cluster, stages, run_name, data)
    if skip_tokens and from_step is None:
        raise UserError("--skip-tokens without --from-step", "name the step from which data is to be skipped")
    checks: list[Check] = [
        check_suite,
        partial(check_data, tokenizer=tokenizer, checksums=verify_data, console=console),
    ]
    if dry_run:
        return show(order, checks, from_step, skip_tokens, console)
    if not commands.installed():
        commands.call(["sbatch"])
    with locked(order.folder):
        order = prepare(recipe_name, cluster, stages, run_name, data)
        jobs = queued(order)
        check_queue(order, jobs)
        back = from_step is not None and stage_to_go_back_in(order, jobs, from_step)
        wanted = [link for link in order.chain if (back or not done(order, link)) and lacking(order, link, jobs)]
        if wanted:
            check_start(order, jobs)
            for check in checks:
                check(order)
            test(order, wanted)
        if back and order.run and from_step is not None:
            rollback(order.run, back, from_step, skip_tokens)
        missing = [link for link in wanted if not done(order, link)]
        run = freeze(order, tokenizer)
        note_unknown(order, jobs)
        submitted = submit(order, run, jobs, missing)
    tell(order, jobs, submitted, console)
    return 0


def test(order: Order, links: Sequence[Link]) -> None:
    """Raises UserError for the first script that Slurm would refuse."""
    for link, (accepted, answer) in zip(links, test_all(order, links), strict=True):
        if not accepted:
            there, asked = commands.partitions(), (order.cluster.partition, order.cluster.evaluation.partition)
            wrong = [name for names in asked if names for name in names.split(",") if name not in there]
            fix = f"name one of the partitions {', '.join(there)}" if wrong else "correct the profile"
            raise UserError(f"Slurm refuses {link.stage}'s {link.kind} job: {answer}", fix, order.cluster.name)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a second launch of the same run out.

    Raises:
        UserError: there is one.
    """
    path = folder.with_name(f".{folder.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        found = f"another launch of {folder.name} is going on"
        busy = UserError(found, "wait for it to end; this one submitted nothing", folder)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise  # else a file system without locks
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise busy  # it has just ended, and taken its file away
        try:
            yield
        finally:
            path.unlink()


# From here on things are written, and submitted


def freeze(order: Order, tokenizer: str | None) -> Run:
    """The run, made if need be, with this profile and the scripts of the chosen stages."""
    run = order.run
    if run is None:
        run = Run.create(order.folder, order.recipe, order.data, find_tokenizer(order.recipe, tokenizer))
    if order.plan.stages[0].name in [stage.name for stage in order.stages]:
        record(run, order.plan.stages[0].name, user())
    order.cluster.freeze(run.folder)
    for path, text in order.scripts().items():
        write_atomic(run.folder / path, text)
        (run.folder / path).parent.joinpath("logs").mkdir(exist_ok=True)
    return run


def note_unknown(order: Order, jobs: dict[str, list[int]]) -> None:
    """Enters live jobs that a kill, right after their submission, has kept out of jobs.jsonl."""
    known = {line["id"] for line in read_lines(order.folder / "jobs.jsonl")}
    links = every_link(order)
    for name, ids in jobs.items():
        for job in ids:
            if job not in known:
                _note(order.folder, job, links[name])


def submit(order: Order, run: Run, jobs: dict[str, list[int]], missing: Sequence[Link]) -> dict[str, list[int]]:
    """Submits what the links lack; returns the new jobs' ids by name."""
    ids, new = {name: list(known) for name, known in jobs.items()}, dict[str, list[int]]()
    for link in missing:
        first = len(jobs.get(link.name, []))
        for number in range(first, first + lacking(order, link, jobs)):
            try:
                job = commands.submit(run.folder / link.stage / SCRIPT[link.kind], options(order, link, ids, number))
            except UserError as error:
                raise _stopped(error, order, new) from error
            _note(run.folder, job, link)
            for known in (ids, new):
                known.setdefault(link.name, []).append(job)
    return new


def _stopped(error: UserError, order: Order, new: dict[str, list[int]]) -> UserError:
    """The error that a submission ended with, and what is in the queue by then."""
    if not new:
        return error
    there = job_words([job for ids in new.values() for job in ids])
    fix = f"{error.fix}: that submits the rest; or take these back: smol cancel {order.name}"
    return UserError(f"{error.found}; {there} had been submitted", fix, order.folder)


def options(order: Order, link: Link, ids: dict[str, list[int]], number: int) -> list[str]:
    """sbatch's options for the `number`-th job of a link: what it waits for, and whether it is held."""
    before = ids.get(job_name(order.name, link.after[1], link.after[0]), []) if link.after else []
    waits = ["?".join(f"afterok:{job}" for job in before)] if before else []
    if link.jobs > 1 and (len(before) <= 1 or number):  # Slurm cannot join `?`, any of these, with other conditions
        waits = ["singleton"] if len(before) > 1 else [*waits, "singleton"]
    chosen = [f"--dependency={','.join(waits)}", "--kill-on-invalid-dep=yes"] if waits else []
    return chosen + (["--hold"] if link.gate else [])


def _note(folder: Path, job: int, link: Link) -> None:
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    line = {"id": job, "kind": link.kind, "stage": link.stage, "name": link.name, "submitted": now}
    append_line(folder / "jobs.jsonl", line, sync=True)


def tell(order: Order, jobs: dict[str, list[int]], submitted: dict[str, list[int]], console: Console) -> None:
    """Prints the chain with its jobs' ids."""
    console.print(head(order), highlight=False)
    notes = {link.name: "done" for link in order.chain}
    notes |= {name: f"{job_words(ids)}, queued" for name, ids in jobs.items()}
    notes |= {name: job_words([*jobs.get(name, []), *ids]) for name, ids in submitted.items()}
    console.print(draw_tree(order.name, title(order), order.chain, order.plan, order.cluster, notes))
    if not submitted:
        live = sorted(i for ids in jobs.values() for i in ids)
        are = "is" if len(live) == 1 else "are"
        console.print(f"nothing submitted: {f'{job_words(live)} {are} queued already' if live else 'all is done'}")
    console.print(f"smol status {order.name} shows how it goes", highlight=False)
