"""What a launch is asked for, read and checked: nothing is written here, and torch is not imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from recipes.errors import UserError, shown
from recipes.files import checksum
from recipes.lint import checked_plan
from recipes.loader import find_root, load
from recipes.plan import Plan, StagePlan
from recipes.recipe import Recipe
from recipes.run import RUN_FILE, Run, runs_folder
from recipes.slurm.chain import SCRIPT, Kind, Link, choose_stages, make_chain
from recipes.slurm.gate import approval, approved_text, changes, open_run
from recipes.slurm.profile import Cluster, cluster_names, load_cluster
from recipes.slurm.render import (
    SCRIPTS,
    check_folder,
    check_word,
    common_header,
    environment,
    eval_header,
    render,
    train_header,
)

if TYPE_CHECKING:
    from eval.suite import Suite

SOURCE_SCRIPT: dict[Kind, str] = {"train": "train.slurm", "eval": "eval.slurm", "propose": "propose.slurm"}


@dataclass(frozen=True)
class Order:
    """What is to be launched; nothing of it is on disk yet."""

    name: str
    folder: Path
    recipe: Recipe
    plan: Plan
    stages: list[StagePlan]
    cluster: Cluster
    suite: Suite
    data: Path
    root: Path
    """The folder that jobs run in: the clone."""
    run: Run | None
    """If there is one already: it is continued."""

    @property
    def chain(self) -> list[Link]:
        """The jobs, whether they are queued already or not."""
        approved = [s.name for s in self.stages if self.run and approval(self.run.folder, s.name)]
        return make_chain(self.name, self.plan, self.stages, self.cluster, len(self.suite.benchmarks), approved)

    def scripts(self) -> dict[str, str]:
        """The rendered scripts by their path below the run's folder."""
        return {f"{link.stage}/{SCRIPT[link.kind]}": self.script(link) for link in self.chain}

    def script(self, link: Link) -> str:
        """A link's rendered script."""
        source, log = SOURCE_SCRIPT[link.kind], "%A_%a" if link.kind == "eval" else "%j"
        header = common_header(
            self.cluster, name=link.name, root=self.root, folder=self.folder, minutes=link.minutes,
            log=f"{link.stage}/logs/{link.kind}-{log}.log",
        )  # fmt: skip
        header |= train_header(self.cluster) if link.kind == "train" else {}
        header |= eval_header(self.cluster, link.tasks) if link.kind == "eval" else {}
        words = [str(self.folder), link.stage]
        if link.kind != "train":
            here = ["--data-root", str(self.folder / "eval" / "data")]
            local = here if (self.folder / "eval" / "data").is_dir() else []
            words += [self.cluster.evaluation.suite, *self.cluster.evaluation.options, *local]
        block = environment(self.cluster, source, link.name, self.root, words)
        return render((SCRIPTS / source).read_text(encoding="utf-8"), header, block)


def prepare(recipe_name: str, cluster: str, stages: str | None, run_name: str | None, data: Path | None) -> Order:
    """Reads everything that the command line names and checks what can be checked without Slurm and data.

    Raises:
        UserError: a recipe, profile, stage or name that is wrong, another number of GPUs, a run of another recipe.
    """
    from eval.suite import load_suite

    recipe, profile = load(recipe_name), load_cluster(cluster)
    plan = checked_plan(recipe)
    check_gpus(recipe, profile)
    name = check_word(run_name or recipe.name, "the run")
    folder, root = check_folder(runs_folder() / name), check_folder(find_root())
    run = open_run(folder) if (folder / RUN_FILE).is_file() else None
    if run is not None:
        check_same(run, recipe)
        plan = run.plan
    if run is not None and data is not None and data.resolve() != run.data_folder.resolve():
        found = f"the run's data is in {run.data_folder}, not in {data}"
        raise UserError(found, "leave --data out, or start another run with --run", folder / RUN_FILE)
    place = run.data_folder if run else data or profile.data or Path("data")
    suite = load_suite(profile.evaluation.suite)
    return Order(name, folder, recipe, plan, choose_stages(plan, stages), profile, suite, place, root, run)


def check_gpus(recipe: Recipe, cluster: Cluster) -> None:
    """Raises UserError if the cluster's GPUs are not as many as the recipe's parallelism needs: fewer or more."""
    needed, per_node = recipe.parallelism.gpus, cluster.gpus_per_node
    if cluster.gpus == needed:
        return
    p = recipe.parallelism
    found = f"{recipe.name} needs {needed} GPUs (dp {p.dp} × tp {p.tp} × pp {p.pp}), but the profile gives "
    found += f"{cluster.nodes} nodes × {per_node} = {cluster.gpus}"
    if needed % per_node == 0:
        fix = f"write `nodes: {needed // per_node}` in a profile that extends it, or change the recipe's dp"
    else:
        fix = f"change the recipe's dp: its GPUs must be a multiple of a node's {per_node}"
    fitting = [name for name in cluster_names() if load_cluster(name).gpus == needed]
    fix = f"take {' or '.join(fitting)}, {fix}" if fitting else fix
    raise UserError(found, fix, f"profile {cluster.name}")


def check_same(run: Run, recipe: Recipe) -> None:
    """Raises UserError if a run is of another recipe, or one of the recipe's files was edited since, with the edit.

    A mixture may also be the one that was approved: that is what approving is for.
    """
    if run.settings["recipe"] != recipe.name:
        found = f"this folder holds a run of {run.settings['recipe']}, not of {recipe.name}"
        raise UserError(found, "launch under another name with --run", run.folder)
    mixtures = {stage.mixture_file.resolve(): stage.name for stage in (*run.recipe.stages, *run.recipe.branches)}
    for file in recipe.files:
        place = file.resolve().relative_to(recipe.root.resolve())
        frozen = (run.folder / "recipe" / place).resolve()
        stage = mixtures.get(frozen, "")
        made = approval(run.folder, stage)
        known = {run.settings["files"].get(place.as_posix()), made and made["hash"]}
        for edited, whole in ((file, frozen), (frozen, file)):
            if checksum(edited) not in known:
                raise _edited(run, stage, edited, approved_text(run.folder, stage) if made else whole)


def _edited(run: Run, stage: str, edited: Path, whole: Path) -> UserError:
    """What is wrong with a file of the recipe, `stage` being the one whose mixture it is, if it is one."""
    name, lines = run.folder.name, changes(whole, edited, (shown(whole), shown(edited)))
    fix = f"restore it from {shown(whole)}, or launch under another name with --run"
    if stage and not run.has_begun(stage):
        fix += f". To train {stage} on it instead: smol approve {name} {stage} --mixture {shown(edited)}"
    return UserError(f"this file is no longer what the run {name} was launched with:\n{lines}", fix, edited)


def check_data(order: Order, tokenizer: str | None, checksums: bool, console: Console) -> None:
    """Raises UserError for a tokenised folder of the chosen stages that is missing, damaged, or of another tokenizer.

    Args:
        checksums: read every byte; else names and sizes.
    """
    from recipes.data.manifest import Manifest, tokenizer_sha256

    recipe = order.recipe
    if not order.data.is_dir():
        fix = "name it with --data or with the profile's `shared`, or make it with slurm/tokenize.slurm"
        raise UserError("there is no such folder of tokenised sources", fix, order.data)
    path = order.run.tokenizer if order.run else find_tokenizer(recipe, tokenizer)
    sha256 = tokenizer_sha256(path)
    sources = dict.fromkeys(source for stage in order.stages for source in stage.shares)
    with console.status("data") as status:
        for number, source in enumerate(sources, 1):
            status.update(f"data: {source}, {number} of {len(sources)}")
            manifest = Manifest.load(order.data / source)
            manifest.verify(checksums=checksums)
            manifest.check_tokenizer(sha256, recipe.tokenizer.name)


def check_suite(order: Order) -> None:
    """Raises UserError for words that `smol eval` does not take, or programs of the model that they do not allow."""
    from typer import Typer
    from typer.exceptions import TyperException
    from typer.main import get_command

    from recipes.cli_evaluation import eval_

    sweep, app = order.cluster.evaluation, Typer()
    app.command()(eval_)
    try:
        get_command(app).make_context("eval", ["CHECKPOINT", "--suite", sweep.suite, *sweep.options])
    except TyperException as error:
        found = f"evaluation.options are not what `smol eval` takes: {error.format_message()}"
        raise UserError(found, "correct them; smol eval --help lists them", order.cluster.name) from None
    if "humaneval" in order.suite.benchmarks and "--allow-code" not in sweep.options:
        fix = "write `evaluation: {options: [--allow-code]}` in the profile, or name a suite without it"
        raise UserError(f"{sweep.suite}'s humaneval runs programs that the model has written", fix, order.cluster.name)


def find_tokenizer(recipe: Recipe, tokenizer: str | None) -> Path:
    """The tokenizer.json: the one named, else the recipe's, below its root or from the Hub."""
    from recipes.data.tokenize import resolve_tokenizer

    inside = recipe.root / recipe.tokenizer.name
    return resolve_tokenizer(tokenizer or (str(inside) if inside.exists() else recipe.tokenizer.name))
