"""What a launch finds there: the run's jobs in the queue, what is done, and whether the rest can start."""

from __future__ import annotations

from collections.abc import Sequence

from recipes.errors import UserError
from recipes.plan import StagePlan
from recipes.run import Run
from recipes.slurm import commands
from recipes.slurm.chain import Link, make_chain, stage_after
from recipes.slurm.gate import job_name
from recipes.slurm.order import Order
from recipes.slurm.profile import load_frozen


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
        live = job_words([job for ids in jobs.values() for job in ids])
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


def job_words(ids: Sequence[int]) -> str:
    """Jobs as a message names them."""
    return f"job {ids[0]}" if len(ids) == 1 else f"jobs {min(ids)} to {max(ids)}"
