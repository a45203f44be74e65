"""`smol launch`: everything is checked, then frozen into the run's folder, then submitted; torch is not imported."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from recipes.errors import UserError, shown
from recipes.files import append_line, read_lines, write_atomic
from recipes.plan import StagePlan
from recipes.run import Run, code_revision
from recipes.slurm import commands
from recipes.slurm.chain import MARGIN, SCRIPT, Link, cost_table, draw_tree, make_chain, stage_after
from recipes.slurm.gate import job_name, record, user
from recipes.slurm.order import Order, check_data, check_suite, find_tokenizer, prepare
from recipes.slurm.profile import load_frozen
from recipes.slurm.rollback import check_step, rollback

Check = Callable[[Order], None]
"""Raises UserError for what a launch refuses."""


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


def test_all(order: Order, links: Sequence[Link]) -> Iterator[tuple[bool, str]]:
    """What sbatch --test-only says to each link's script; the scripts are in a folder of their own meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        for link in links:
            script = Path(folder) / SCRIPT[link.kind]
            script.write_text(order.script(link), encoding="utf-8")
            yield commands.test_only(script)


# A dry run


def show(order: Order, checks: Sequence[Check], from_step: int | None, skip_tokens: int, console: Console) -> int:
    """Prints the scripts, the chain, its cost, and what would be refused; writes nothing."""
    show_scripts(order, console)
    jobs, notes, problems = ask_slurm(order)
    console.print(head(order), highlight=False)
    console.print(draw_tree(order.name, title(order), order.chain, order.plan, order.cluster, notes))
    if any(link.jobs > 1 for link in order.chain):
        console.print(f"jobs in turn: for {MARGIN} × the planned time; a stage's end takes those left out of the queue")
    console.print(cost_table(order.chain, order.plan))
    first: list[Check] = [] if jobs is None and order.run else [partial(check_start, jobs=jobs or {})]
    if from_step is not None:
        first.append(partial(show_rollback, jobs=jobs or {}, step=from_step, skip_tokens=skip_tokens, console=console))
    for check in (*first, *checks):
        try:
            check(order)
        except UserError as error:
            problems.append(str(error))
    for warning in order.plan.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False, soft_wrap=True)
    for problem in problems:
        console.print(f"[red]a launch would stop here:[/] {escape(problem)}", highlight=False, soft_wrap=True)
    console.print("dry run: nothing was written or submitted")
    return 2 if problems else 0


def ask_slurm(order: Order) -> tuple[dict[str, list[int]] | None, dict[str, str], list[str]]:
    """The run's jobs, None where Slurm does not say; a note for each link's line; what Slurm would refuse."""
    notes = {link.name: "done" for link in order.chain if done(order, link)}
    if not commands.installed():
        return None, notes, []
    try:
        jobs, problems = queued(order), []
        notes |= {name: f"{_jobs(ids)}, queued" for name, ids in jobs.items()}
        links = [link for link in order.chain if link.name not in notes]
        for link, (accepted, answer) in zip(links, test_all(order, links), strict=True):
            notes[link.name] = "Slurm accepts it" if accepted else "[red]Slurm refuses it[/]"
            refused = f"Slurm refuses the {link.kind} job: {answer}"
            problems += [refused] if not accepted and refused not in problems else []
        check_queue(order, jobs)
    except UserError as error:
        return None, notes, [str(error)]
    return jobs, notes, problems


def show_rollback(order: Order, jobs: dict[str, list[int]], step: int, skip_tokens: int, console: Console) -> None:
    """Says where --from-step would go back to; raises UserError if it cannot."""
    stage = stage_to_go_back_in(order, jobs, step)
    assert order.run is not None
    check_step(order.run, order.plan.stage(stage), step, skip_tokens)
    skipped = f", and leaves out the next {skip_tokens:,} tokens" if skip_tokens else ""
    console.print(f"a launch goes back to step {step:,} of {stage} first{skipped}", highlight=False)


def head(order: Order) -> Table:
    """Where the run is, with which code and data."""
    table = Table.grid(padding=(0, 2))
    table.add_row("run", f"{shown(order.folder)}, {'continued' if order.run else 'new'}")
    table.add_row("data", shown(order.data))
    table.add_row("code", code_text(order.run))
    if not commands.installed():
        table.add_row("Slurm", "[yellow]not on this machine: sbatch --test-only was left out[/]")
    return table


def code_text(run: Run | None) -> str:
    """The revision that jobs will run, as far as git knows it, and the run's own if that is another."""
    now = code_revision()
    before = run.settings["code"]["revision"] if run else now["revision"]
    text = f"revision {str(now['revision'])[:12]}" if now["revision"] else "not in git"
    text += ", [yellow]changes not committed[/]" if now["changed"] else ""
    return text + (f"; [yellow]the run was created with {str(before)[:12]}[/]" if before != now["revision"] else "")


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
    name = "" if order.name == order.recipe.name else f"{order.name}: "
    return f"{name}{order.recipe.name} on {where}"


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
    """The run's live jobs by name, oldest first, whoever has submitted them."""
    jobs: dict[str, list[int]] = {}
    for job in sorted(commands.queue(every_link(order), order.folder, everyone=True), key=lambda job: job.id):
        if job.live and job.id not in jobs.setdefault(job.name, []):
            jobs[job.name].append(job.id)
    return {name: ids for name, ids in jobs.items() if ids}


def lacking(order: Order, link: Link, jobs: dict[str, list[int]]) -> int:
    """How many of a link's jobs are to be submitted: those that a killed launch has left out, or all, or none."""
    there = len(jobs.get(link.name, []))
    cut_off = link.kind == "train" and not jobs.get(job_name(order.name, link.stage, "eval"))
    return max(0, link.jobs - there) if cut_off or not there else 0


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


def check_queue(order: Order, jobs: dict[str, list[int]]) -> None:
    """Raises UserError if the run's queued jobs were made for another profile, or another run's have their names."""
    before = load_frozen(order.folder)
    if before is not None and before != order.cluster and jobs:
        live = _jobs([job for ids in jobs.values() for job in ids])
        found = f"the profile {order.cluster.name} is not the one that {live} of this run were made for"
        raise UserError(found, f"give the old one, or end them first: smol cancel {order.name}", order.folder)
    for job in commands.queue(every_link(order)):
        if job.live and job.comment != str(order.folder.resolve()):
            found = f"job {job.id}, {job.name}, belongs to another run of this name: {job.comment}"
            raise UserError(found, "choose another name with --run: Slurm knows jobs by their names", order.folder)


def check_start(order: Order, jobs: dict[str, list[int]]) -> None:
    """Raises UserError for a stage that starts from weights which nothing has made, or is going to."""
    from recipes.engine.checkpoint import steps

    chosen = [stage.name for stage in order.stages]
    for stage, before in ((order.plan.stage(link.stage), link.after) for link in order.chain if link.kind == "train"):
        if before is None or before[1] in chosen or jobs.get(job_name(order.name, before[1], "train")):
            continue
        run, name = order.run, before[1]
        if not (run and (run.has_begun(stage.name) or stage.start_step in steps(run.checkpoints(name)))):
            found = f"{stage.name} starts from step {stage.start_step:,} of {name}, which is neither trained nor queued"
            raise UserError(found, f"launch {name}, too: --stages says which", order.folder)


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
    there = _jobs([job for ids in new.values() for job in ids])
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
    notes |= {name: f"{_jobs(ids)}, queued" for name, ids in jobs.items()}
    notes |= {name: _jobs([*jobs.get(name, []), *ids]) for name, ids in submitted.items()}
    console.print(draw_tree(order.name, title(order), order.chain, order.plan, order.cluster, notes))
    if not submitted:
        live = sorted(i for ids in jobs.values() for i in ids)
        are = "is" if len(live) == 1 else "are"
        console.print(f"nothing submitted: {f'{_jobs(live)} {are} queued already' if live else 'all is done'}")
    console.print(f"smol status {order.name} shows how it goes", highlight=False)


def _jobs(ids: Sequence[int]) -> str:
    return f"job {ids[0]}" if len(ids) == 1 else f"jobs {min(ids)} to {max(ids)}"
