"""Job scripts: the file below slurm/, with the cluster's header and environment put in. Nothing is run here."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

from recipes.errors import UserError
from recipes.slurm.profile import Cluster, Minutes, expand, slurm_time

SCRIPTS = Path(__file__).resolve().parents[2] / "slurm"
MARK = re.compile(r"^# --- site: .*$", re.MULTILINE)
_HEADER = re.compile(r"^#SBATCH --([a-z-]+)(?:=(.*))?$")
Header = dict[str, str | None]
"""sbatch's long options; None for one without a value."""


def render(script: str, header: Header, block: list[str]) -> str:
    """A script of slurm/ with `header` laid over its own #SBATCH lines and `block` in the place of the site's mark."""
    lines = script.splitlines()
    own: Header = {m[1]: m[2] for line in lines if (m := _HEADER.match(line))}
    first = next(i for i, line in enumerate(lines) if _HEADER.match(line))
    merged = {**own, **header}
    options = [f"#SBATCH --{key}" + (f"={value}" if value is not None else "") for key, value in merged.items()]
    rest = [line for line in lines[first:] if not _HEADER.match(line)]
    text = "\n".join([*lines[:first], *options, *rest]) + "\n"
    assert len(MARK.findall(text)) == 1
    return MARK.sub(lambda _: "\n".join(block), text)


def check_word(value: str, what: str) -> str:
    """`value`, if it may stand in a job's name or path without quotes.

    Raises:
        UserError: it may not.
    """
    if not re.fullmatch(r"[A-Za-z0-9._-]+", value) or value[0] in ".-":
        fix = "use letters, digits, points, dashes and underscores; begin with a letter or a digit"
        raise UserError(f"{what} '{value}' cannot stand in a job's name", fix)
    return value


def check_folder(path: Path) -> Path:
    """The folder, absolute, if Slurm's header can hold it: there, % and spaces mean something.

    Raises:
        UserError: it cannot.
    """
    path = path.resolve()
    if not re.fullmatch(r"[A-Za-z0-9._/+@=,:-]+", str(path)):
        raise UserError("Slurm cannot be given this path", "move the clone to one without spaces, quotes or %", path)
    return path


def common_header(cluster: Cluster, *, name: str, root: Path, folder: Path, log: str, minutes: Minutes) -> Header:
    """What every job of a run has.

    Args:
        root: the folder that jobs run in.
        folder: the run's; it is the job's comment, by which the run's jobs are found again.
        log: the log's name below the run's folder, with Slurm's patterns.
    """
    site = {key: getattr(cluster, key) for key in ("partition", "account", "qos", "constraint", "reservation")}
    header: Header = {
        "job-name": name, "chdir": str(root), "comment": str(folder), "output": f"{folder}/{log}",
        "time": slurm_time(minutes), **{key: value for key, value in site.items() if value},
    }  # fmt: skip
    if cluster.exclude:
        header["exclude"] = cluster.exclude
    if cluster.mail:
        header |= {"mail-user": cluster.mail.user, "mail-type": ",".join(cluster.mail.events)}
    return header


def train_header(cluster: Cluster) -> Header:
    """What a training job asks for."""
    header: Header = {
        "nodes": str(cluster.nodes), "cpus-per-task": str(cluster.cpus_per_node), "mem": memory(cluster.memory),
        "signal": f"B:USR1@{cluster.signal_seconds}",
    }  # fmt: skip
    if cluster.gpu_check != "none":
        header["gres"] = gres(cluster, cluster.gpus_per_node)
    return header


def eval_header(cluster: Cluster, benchmarks: int) -> Header:
    """What an array of evaluations asks for."""
    sweep = cluster.evaluation
    header: Header = {
        "array": f"0-{benchmarks - 1}%{sweep.at_once}", "cpus-per-task": str(sweep.cpus), "mem": memory(sweep.memory),
        "gres": gres(cluster, sweep.gpus) if sweep.gpus else "none",
    }  # fmt: skip
    return header | ({"partition": sweep.partition} if sweep.partition else {})


def gres(cluster: Cluster, gpus: int) -> str:
    """GPUs as --gres wants them."""
    return f"gpu:{cluster.gpu_type}:{gpus}" if cluster.gpu_type else f"gpu:{gpus}"


def memory(amount: str) -> str:
    """A node's memory as --mem wants it; 0 is all of it."""
    return "0" if amount == "all" else amount


def environment(cluster: Cluster, script: str, name: str, root: Path, arguments: list[str]) -> list[str]:
    """The lines that stand in the place of the site's mark; `name` is the job's."""
    lines = [
        f"# Rendered by `smol launch` from slurm/{script} for the cluster {cluster.name}. To submit it again by hand:",
        "# sbatch THIS_FILE",
        f"set -- {shlex.join(arguments)}",
    ]
    if script == "train.slurm":
        lines.append(
            f"export GPUS={cluster.gpus_per_node} SIGNAL_SECONDS={cluster.signal_seconds} "
            f"ALL_REDUCE={int(cluster.all_reduce)} SPARES={name}"
        )
    if cluster.container is None and sys.prefix != sys.base_prefix:
        lines.append(f"export PATH={shlex.quote(sys.prefix + '/bin')}:$PATH  # the Python that launched this")
    lines += [f"module load {shlex.join(cluster.modules)} || exit"] if cluster.modules else []
    lines += cluster.setup
    if cluster.shared:
        lines.append(f"export HF_HOME={shlex.quote(expand(cluster.shared, 'shared', cluster.name) + '/huggingface')}")
    if cluster.scratch:
        lines.append(f'export TMPDIR="{cluster.scratch}"')
    lines += [f"export {name}={shlex.quote(value)}" for name, value in cluster.env.items()]
    return lines + container(cluster, root)


def container(cluster: Cluster, root: Path) -> list[str]:
    """srun's options for the image: the repository and the site's folders are at their own places inside."""
    if cluster.container is None:
        return []
    shared = [expand(cluster.shared, "shared", cluster.name)] if cluster.shared else []
    asked = [expand(mount, "container.mounts", cluster.name) for mount in cluster.container.mounts]
    places = [f"{place}:{place}" for place in (str(root), *shared)]
    scratch = f',"{cluster.scratch}:{cluster.scratch}"' if cluster.scratch else ""
    mounts = shlex.quote(",".join([*places, *asked])) + scratch
    image = shlex.quote(cluster.container.image)
    return [f"CONTAINER=(--container-image={image} --container-workdir={shlex.quote(str(root))} "
            f"--container-mounts={mounts})"]  # fmt: skip
