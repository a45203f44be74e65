"""The gate before a stage: which mixture a person has approved, and whether it is still the one in the run.

`approvals/<stage>.json` says it; `approvals/<stage>.yaml` keeps the approved text, so that a later edit can be shown.
Neither torch nor nanotron is imported here.
"""

from __future__ import annotations

import difflib
import getpass
import json
import socket
from datetime import datetime, timezone
from fractions import Fraction
from pathlib import Path
from typing import Any

from recipes.errors import UserError, shown
from recipes.files import append_line, checksum, read_lines, write_atomic, write_json
from recipes.loader import load_mixture
from recipes.recipe import Mixture
from recipes.run import Run
from recipes.slurm import commands
from recipes.slurm.profile import FROZEN


def job_name(run: str, stage: str, kind: str) -> str:
    """The name of a run's jobs of one kind in Slurm: one for each run, stage and kind."""
    return f"{run}-{stage}-{kind}"


def approve(
    run: Run | Path | str, stage: str, mixture: Path | None = None, use_proposal: bool = False, who: str | None = None,
    keep: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Records which mixture a stage is to be trained on, puts it into the run, and lets the stage's held job go.

    Run again after a kill, it finishes what is missing; an approval that stands already keeps its date.

    Args:
        run: a run, its folder, or its name below runs/.
        mixture: another file to train on, instead of the run's own.
        use_proposal: train on proposals/<stage>.yaml.
        who: the user's name, if left out.
        keep: train on the run's own mixture although the proposal differs.

    Returns:
        The approval (docs/formats.md), with `released`, the ids of the jobs let go, and `note`, what the user should
        know.

    Raises:
        UserError: no such stage; no choice made where proposal and mixture differ, or two; the mixture was edited
            after its approval; another mixture for a stage that has begun.
    """
    if (mixture is not None) + use_proposal + keep > 1:
        raise UserError("more than one of --mixture, --proposal and --keep", "choose one of them")
    if not isinstance(run, Run):
        run = open_run(run)
    run.recipe.stage(stage)
    proposal = run.folder / "proposals" / f"{stage}.yaml"
    chosen = choose(run, stage, mixture, proposal, use_proposal, keep)
    if _text(chosen) != _text(run.recipe.stage(stage).mixture_file):
        run = run.adopt(stage, chosen)
    made = record(run, stage, who or user(), proposal)
    released, note = release(run, stage)
    return {**made, "released": released, "note": note}


def choose(run: Run, stage: str, mixture: Path | None, proposal: Path, use_proposal: bool, keep: bool) -> Path:
    """The file that the options mean.

    Raises:
        UserError: a file that is missing or wrong, or no choice where one is needed.
    """
    sources, frozen = run.recipe.sources, run.recipe.stage(stage).mixture_file
    if mixture is not None:
        load_mixture(mixture, sources)
        return mixture
    if use_proposal:
        if not proposal.is_file():
            fix = f"wait for the proposal, or approve the run's own mixture: smol approve {run.folder.name} {stage}"
            raise UserError(f"there is no proposal for {stage}", fix, proposal)
        return proposal
    approved = approval(run.folder, stage)
    if keep or not proposal.is_file() or (approved and approved["hash"] == checksum(frozen)):
        return frozen
    before, after = run.recipe.stage(stage).mixture, load_mixture(proposal, sources)
    if before.shares != after.shares:
        found = f"a proposal differs from the run's mixture for {stage}:\n{difference(before, after)}\n"
        fix = f"read {shown(proposal.with_suffix('.md'))}, then add --proposal to train on it, or --keep to override it"
        raise UserError(found, fix)
    return frozen


def difference(before: Mixture, after: Mixture) -> str:
    """Two mixtures' domains, a line each that differs, and the sources where only those do."""
    lines = []
    names = dict.fromkeys((*before.domains, *after.domains))
    for name in names:
        shares = [m.domains[name].share if name in m.domains else Fraction(0) for m in (before, after)]
        if shares[0] != shares[1]:
            lines.append(f"  {name}: {float(shares[0]):.2%} → {float(shares[1]):.2%}")
        elif before.domains[name].sources != after.domains[name].sources:
            lines.append(f"  {name}: {float(shares[0]):.2%} of other sources")
    return "\n".join(lines)


def record(run: Run, stage: str, who: str, proposal: Path | None = None) -> dict[str, Any]:
    """Writes the approval of the mixture that the run holds for a stage; one that says the same stays as it is."""
    file = run.recipe.stage(stage).mixture_file
    answered = checksum(proposal) if proposal and proposal.is_file() else None
    overridden = bool(answered and proposal) and not _same(run, file, proposal)
    known = approval(run.folder, stage)
    if known and (known["hash"], known["proposal"], known["overridden"]) == (checksum(file), answered, overridden):
        return known
    made = {
        "stage": stage, "mixture": str(file.resolve().relative_to(run.folder.resolve())), "hash": checksum(file),
        "who": who, "when": datetime.now(timezone.utc).isoformat(timespec="seconds"), "proposal": answered,
        "overridden": overridden,
    }  # fmt: skip
    write_atomic(approved_text(run.folder, stage), file.read_bytes())
    write_json(_json(run.folder, stage), made)
    told = {key: made[key] for key in ("who", "hash", "proposal", "overridden")}
    event = {"event": "gate", "stage": stage, **told, "time": made["when"]}
    append_line(run.folder / "events.jsonl", event, sync=True)
    return made


def release(run: Run, stage: str) -> tuple[list[int], str]:
    """Lets the stage's held jobs go; returns their ids, and what the user should know."""
    name = job_name(run.folder.name, stage, "train")
    if not any(line.get("name") == name for line in read_lines(run.folder / "jobs.jsonl")):
        return [], f"no job of {stage} has been submitted yet: smol launch does it"
    by_hand = f"release the job on a login node, as the user whose it is: smol approve {run.folder.name} {stage}"
    try:
        jobs = commands.queue([name], run.folder, everyone=True)
        held = sorted({job.id for job in jobs if job.state == "PENDING" and job.reason.startswith("JobHeld")})
        commands.release(held)
    except UserError as error:
        return [], f"{error.found}. The approval is recorded; {by_hand}"
    if held:
        return held, f"released {', '.join(map(str, held))}; Slurm starts it when what it depends on is done"
    live = sorted({job.id for job in jobs if job.live})
    return [], f"already released: {', '.join(map(str, live))}" if live else f"no job of {stage} is held or queued"


def check(run: Run | Path | str, stage: str) -> None:
    """Whether a stage may be trained, as far as its mixture goes. Give the folder: opening an edited run fails.

    A run that was not launched (it has no cluster.yaml) has no gates.

    Raises:
        UserError: nobody has approved the stage's mixture, or it was edited since; the difference is in the message.
    """
    folder = run.folder if isinstance(run, Run) else Path(run)
    if not (folder / FROZEN).is_file():
        return
    made = approval(folder, stage)
    if made is None:
        fix = f"look at proposals/{stage}.md, then: smol approve {folder.name} {stage}"
        raise UserError(f"nobody has approved a mixture for {stage}", fix, folder)
    _check_text(folder, stage, made)


def approval(folder: Path, stage: str) -> dict[str, Any] | None:
    """What was approved for a stage, if anything (docs/formats.md); `check` says whether that is still in the run."""
    path = _json(folder, stage)
    content: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return content


def approved_text(folder: Path, stage: str) -> Path:
    """The copy of the mixture as it was approved."""
    return _json(folder, stage).with_suffix(".yaml")


def changes(before: Path, after: Path, names: tuple[str, str]) -> str:
    """Two texts' lines that differ, as `diff -u` shows them; a file that is missing is empty."""
    old, new = (_text(path).splitlines() if path.is_file() else [] for path in (before, after))
    return "\n".join(difflib.unified_diff(old, new, *names, lineterm="")) + "\n"


def user() -> str:
    """Who is at the keyboard: name@machine."""
    return f"{getpass.getuser()}@{socket.gethostname()}"


def open_run(run: Path | str) -> Run:
    """The run by its folder or name; a mixture that was edited is shown before the plan that no longer fits it.

    Raises:
        UserError: there is no such run, or a mixture was edited after its approval.
    """
    folder = Path(run)
    if not folder.is_dir() and len(folder.parts) == 1:
        from recipes.run import runs_folder

        folder = runs_folder() / folder
    if (folder / "adoption.json").is_file():  # killed in the middle: opening the run carries it out
        return Run.load(folder)
    for path in sorted((folder / "approvals").glob("*.json")):
        _check_text(folder, path.stem, json.loads(path.read_text(encoding="utf-8")))
    return Run.load(folder)


def _check_text(folder: Path, stage: str, made: dict[str, Any]) -> None:
    file, approved = folder / made["mixture"], approved_text(folder, stage)
    if file.is_file() and checksum(file) == made["hash"]:
        return
    lines = changes(approved, file, ("approved", made["mixture"]))
    found = f"the mixture of {stage} was edited after {made['who']} approved it:\n{lines}"
    fix = f"put {shown(approved)} back in its place; another mixture comes in with smol approve … --mixture FILE"
    raise UserError(found, fix, file)


def _json(folder: Path, stage: str) -> Path:
    return folder / "approvals" / f"{stage}.json"


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _same(run: Run, file: Path, proposal: Path | None) -> bool:
    """Whether two files come to the same shares."""
    assert proposal is not None
    sources = run.recipe.sources
    return load_mixture(file, sources).shares == load_mixture(proposal, sources).shares
