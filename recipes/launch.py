"""`smol launch`: everything is checked, then frozen into the run's folder, then submitted; torch is not imported."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from recipes import slurm
from recipes.chain import SCRIPT, Link, cost_table, draw_tree, make_chain, stage_after
from recipes.cluster import load_frozen
from recipes.errors import UserError, shown
from recipes.files import append_line, read_lines, write_atomic
from recipes.gate import job_name, record, user
from recipes.order import Order, check_data, check_suite, find_tokenizer, prepare
from recipes.plan import StagePlan
from recipes.rollback import rollback
from recipes.run import Run


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
    if dry_run:
        return show(order, tokenizer, verify_data, console)
    if not slurm.installed():
        slurm.call(["sbatch"])
    with locked(order.folder):
        order = prepare(recipe_name, cluster, stages, run_name, data)
        jobs = queued(order)
        check_profile(order, jobs)
        back = from_step is not None and stage_to_go_back_in(order, jobs, from_step)
        wanted = [link for link in order.chain if (back or not done(order, link)) and not jobs.get(link.name)]
        if wanted:
            check_suite(order)
            check_data(order, tokenizer, verify_data, console)
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
            there = slurm.partitions()
            wrong = order.cluster.partition and order.cluster.partition not in there
            fix = f"name one of the partitions {', '.join(there)}" if wrong else "correct the profile"
            raise UserError(f"Slurm refuses {link.stage}'s {link.kind} job: {answer}", fix, order.cluster.name)


def test_all(order: Order, links: Sequence[Link]) -> Iterator[tuple[bool, str]]:
    """What sbatch --test-only says to each link's script; the scripts are in a folder of their own meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        for link in links:
            script = Path(folder) / SCRIPT[link.kind]
            script.write_text(order.script(link), encoding="utf-8")
            yield slurm.test_only(script)


# A dry run


def show(order: Order, tokenizer: str | None, checksums: bool, console: Console) -> int:
    """Prints the scripts, the chain, its cost, and what would be refused; writes nothing."""
    show_scripts(order, console)
    links = order.chain
    problems, notes = [], {}
    if slurm.installed():
        try:
            for link, (accepted, answer) in zip(links, test_all(order, links), strict=True):
                notes[link.name] = "Slurm accepts it" if accepted else "[red]Slurm refuses it[/]"
                refused = f"Slurm refuses the {link.kind} job: {answer}"
                problems += [refused] if not accepted and refused not in problems else []
        except slurm.Unreachable as error:
            problems.append(str(error))
    else:
        console.print("no Slurm on this machine: sbatch --test-only was left out", style="yellow")
    console.print(draw_tree(title(order), links, order.plan, order.cluster, notes))
    console.print(cost_table(links, order.plan))
    for check in (check_suite, lambda order: check_data(order, tokenizer, checksums, console)):
        try:
            check(order)
        except UserError as error:
            problems.append(str(error))
    for problem in problems:
        console.print(f"[red]a launch would stop here:[/] {escape(problem)}", highlight=False, soft_wrap=True)
    console.print("dry run: nothing was written or submitted")
    return 2 if problems else 0


def show_scripts(order: Order, console: Console) -> None:
    """Prints each script that says something new; the others differ from a stage's before in its name only."""
    first: dict[str, tuple[str, str]] = {}
    for path, text in order.scripts().items():
        stage, _, name = path.partition("/")
        other, before = first.setdefault(name, (stage, text))
        either = re.compile(rf"\b({re.escape(other)}|{re.escape(stage)})\b")
        same = other != stage and either.sub("", before) == either.sub("", text)
        console.rule(f"{order.name}/{path}", align="left")
        said = f"as {other}/{name}, with {stage} for {other}\n" if same else text
        console.print(said, highlight=False, markup=False, soft_wrap=True, end="")
    console.rule()


def title(order: Order) -> str:
    """The run, its recipe and its cluster."""
    where = f"{order.cluster.name}, {order.cluster.nodes} × {order.cluster.gpus_per_node} GPUs"
    return f"{order.name}: {order.recipe.name} on {where}"


# What is there already


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


def queued(order: Order) -> dict[str, list[int]]:
    """The run's live jobs by name, oldest first."""
    jobs: dict[str, list[int]] = {}
    for job in sorted(slurm.queue(every_link(order), order.folder), key=lambda job: job.id):
        if job.live and job.id not in jobs.setdefault(job.name, []):
            jobs[job.name].append(job.id)
    return {name: ids for name, ids in jobs.items() if ids}


def every_link(order: Order) -> dict[str, Link]:
    """All jobs that the run could have, by name; not of the chosen stages only."""
    plan, count = order.plan, len(order.suite.benchmarks)
    links = make_chain(order.name, plan, plan.stages + plan.branches, order.cluster, count)
    return {link.name: link for link in links}


def note_unknown(order: Order, jobs: dict[str, list[int]]) -> None:
    """Enters live jobs that a kill, right after their submission, has kept out of jobs.jsonl."""
    known = {line["id"] for line in read_lines(order.folder / "jobs.jsonl")}
    links = every_link(order)
    for name, ids in jobs.items():
        for job in ids:
            if job not in known:
                _note(order.folder, job, links[name])


def done(order: Order, link: Link) -> bool:
    """Whether the files that a link is there for exist."""
    from recipes.engine.checkpoint import steps

    run, stage = order.run, order.plan.stage(link.stage)
    if run is None or stage.end_step not in steps(run.checkpoints(stage.name)):
        return False
    following = stage_after(order.plan, stage.name)
    proposed = following and ((run.folder / "proposals" / f"{following}.yaml").is_file() or run.has_begun(following))
    return link.kind == "train" or bool(proposed) or (link.kind == "eval" and evaluated(order, run, stage))


def evaluated(order: Order, run: Run, stage: StagePlan) -> bool:
    """Whether the scorecard of a stage's last checkpoint is written."""
    from eval.harness import Options, scorecard_path, subject_of

    subject = subject_of(run.checkpoints(stage.name) / str(stage.end_step))
    return scorecard_path(subject, order.suite.name, Options()).is_file()


def stage_to_go_back_in(order: Order, jobs: dict[str, list[int]], step: int) -> str:
    """The stage whose checkpoint --from-step means: the one chosen, or the newest that has begun before that step.

    Raises:
        UserError: no run, a job that may be training, or no stage that has got so far.
    """
    if order.run is None:
        raise UserError("there is no run to go back in", "leave --from-step out", order.folder)
    training = [job for name, link in every_link(order).items() if link.kind == "train" for job in jobs.get(name, [])]
    if training:
        fix = f"end it first: smol cancel {order.name}"
        raise UserError(f"job {training[0]} of this run is queued or running", fix, order.folder)
    stages = order.stages if len(order.stages) == 1 else order.plan.stages
    begun = [s.name for s in stages if s.start_step <= step and order.run.has_begun(s.name)]
    if not begun:
        raise UserError(f"no stage has been trained at step {step}", "name the step of a checkpoint", order.folder)
    return begun[-1]


def check_profile(order: Order, jobs: dict[str, list[int]]) -> None:
    """Raises UserError if the run's jobs that are queued were made for another profile."""
    before = load_frozen(order.folder)
    if before is not None and before != order.cluster and jobs:
        live = ", ".join(str(job) for ids in jobs.values() for job in ids)
        found = f"the profile {order.cluster.name} is not the one that the queued jobs {live} were made for"
        raise UserError(found, f"give the old one, or end them first: smol cancel {order.name}", order.folder)


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


def submit(order: Order, run: Run, jobs: dict[str, list[int]], missing: Sequence[Link]) -> dict[str, list[int]]:
    """Submits the links that are neither done nor queued; returns the new jobs' ids by name."""
    ids, new = dict(jobs), dict[str, list[int]]()
    for link in missing:
        for number in range(link.jobs):
            job = slurm.submit(run.folder / link.stage / SCRIPT[link.kind], options(order, link, ids, number))
            _note(run.folder, job, link)
            new.setdefault(link.name, []).append(job)
            ids[link.name] = new[link.name]
    return new


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
    notes = {name: f"job {_span(ids)}, queued already" for name, ids in jobs.items() if ids}
    notes |= {name: f"job {_span(ids)}" for name, ids in submitted.items()}
    links = order.chain
    notes = {link.name: notes.get(link.name, "done") for link in links}
    console.print(draw_tree(title(order), links, order.plan, order.cluster, notes))
    if not submitted:
        live = sorted(i for ids in jobs.values() for i in ids)
        there = f"job {_span(live)} is queued already" if len(live) == 1 else f"jobs {_span(live)} are queued already"
        console.print(f"nothing submitted: {there if live else 'all is done'}")
    console.print(f"{shown(order.folder)}: smol status {order.name} shows how it goes", highlight=False)


def _span(ids: Sequence[int]) -> str:
    return str(ids[0]) if len(ids) == 1 else f"{ids[0]} to {ids[-1]}"
