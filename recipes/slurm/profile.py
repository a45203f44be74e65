"""A cluster's profile: what differs between sites. Reads slurm/clusters/*.yaml; docs/clusters.md lists the keys."""

from __future__ import annotations

import difflib
import os
import re
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer

from recipes.errors import UserError
from recipes.files import write_atomic
from recipes.recipe import Count, Steps, Strict
from recipes.yamlfile import Key, Places, YamlFile, places_of, read_yaml, typed, typed_error

CLUSTERS = Path(__file__).resolve().parents[2] / "slurm" / "clusters"
FROZEN = "cluster.yaml"
"""The profile in a run's folder, whole: nothing is extended any more."""
_UNITS = {"d": 1440, "h": 60, "m": 1}


def _minutes(value: object) -> int:
    """A time limit in minutes: 24h, 90m, 1d12h."""
    parts = re.findall(r"([0-9]+)([dhm])", str(value))
    minutes = sum(int(number) * _UNITS[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != str(value) or not minutes:
        raise ValueError("write days, hours or minutes, such as 24h, 90m or 1d12h")
    return minutes


def _word(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._&|*:,\[\]()@%+=/-]+", value) or value.startswith("-"):
        raise ValueError("write it as Slurm does, without spaces or quotes")
    return value


def _path(value: str) -> str:
    if not re.fullmatch(r"(/|\$[A-Za-z_]|\$\{[A-Za-z_])[A-Za-z0-9_./${}+:@=-]*", value):
        raise ValueError("write an absolute path, or one that starts with a variable such as $SCRATCH")
    return value


def _line(value: str) -> str:
    if not value.strip() or "\n" in value:
        raise ValueError("write one line of shell")
    return value


def _bare(value: str) -> str:
    if not re.fullmatch(r"[^\s'\"]+", value):
        raise ValueError("write it without spaces or quotes")
    return value


def _variable(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
        raise ValueError("write a variable's name: letters, digits and underscores, not beginning with a digit")
    return value


def _text(value: object) -> str:
    """A variable's value: numbers as they are written."""
    if isinstance(value, (bool, dict, list)) or value is None or "\n" in str(value):
        raise ValueError("write a word, a number or a quoted text")
    return str(value)


def _as_duration(minutes: int) -> str:
    return f"{minutes}m"


Minutes = Annotated[int, BeforeValidator(_minutes), PlainSerializer(_as_duration)]
Word = Annotated[str, AfterValidator(_word)]
SitePath = Annotated[str, AfterValidator(_path)]
ShellLine = Annotated[str, AfterValidator(_line)]
Bare = Annotated[str, AfterValidator(_bare)]
Variable = Annotated[str, AfterValidator(_variable)]


def _memory(value: object) -> str:
    text = str(value)
    if text != "all" and not re.fullmatch(r"[1-9][0-9]*[KMGT]", text):
        raise ValueError("write an amount a node, such as 1500G, or all")
    return text


class Container(Strict):
    """An image that srun starts tasks in (enroot and pyxis)."""

    image: Bare
    """A file, or registry#image:tag."""
    mounts: tuple[SitePath, ...] = ()
    """FROM:TO each; the repository, `shared` and `scratch` are mounted anyway."""


class Mail(Strict):
    """Whom Slurm writes to, and when."""

    user: Bare
    events: tuple[Literal["BEGIN", "END", "FAIL", "REQUEUE", "TIME_LIMIT_90", "ALL"], ...] = ("FAIL", "END")


class Sweep(Strict):
    """The jobs that evaluate between stages: one of an array a benchmark."""

    suite: str = "between-stages"
    gpus: Steps = 1
    """A task's."""
    cpus: Count = 8
    """A task's."""
    memory: Annotated[str, BeforeValidator(_memory)] = "64G"
    """A task's."""
    time_limit: Minutes = 240
    at_once: Count = 16
    """Tasks that run at a time."""
    partition: Word | None = None
    """If not the training's."""
    options: tuple[Bare, ...] = ()
    """Words that `smol eval` gets beside the suite and the benchmark, such as --allow-code."""


class Cluster(Strict):
    """One site."""

    name: str
    nodes: Count
    gpus_per_node: Count
    """Also the processes of a node."""
    gpu_type: Word | None = None
    """As in Slurm's gres, such as h100."""
    gpu_check: Literal["nvidia-smi", "slurm", "none"] = "nvidia-smi"
    """Where preflight counts GPUs: slurm is CUDA_VISIBLE_DEVICES as Slurm has set it; none where there are none."""
    cpus_per_node: Count
    memory: Annotated[str, BeforeValidator(_memory)] = "all"
    """Of a node."""
    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    reservation: Word | None = None
    exclude: Word | None = None
    """Nodes that are never used."""
    time_limit: Minutes
    """Of one training job."""
    signal_seconds: Annotated[int, Field(ge=30)] = 600
    """How long before the time limit the job is told to write its checkpoint; Slurm looks every 30 seconds or so."""
    modules: tuple[Word, ...] = ()
    """`module load`, in this order."""
    setup: tuple[ShellLine, ...] = ()
    """Lines of shell that every job runs first, such as `source .venv/bin/activate`."""
    container: Container | None = None
    shared: SitePath | None = None
    """A folder that all nodes see: caches go there, and data is looked for there."""
    scratch: SitePath | None = None
    """A folder of the node's own for temporary files; variables are the node's."""
    env: dict[Variable, Annotated[str, BeforeValidator(_text)]] = Field(default_factory=dict)
    """Environment variables of every job: the network's settings."""
    all_reduce: bool = True
    """Whether preflight ends with an all-reduce over all GPUs."""
    mail: Mail | None = None
    evaluation: Sweep = Field(default_factory=Sweep)

    @property
    def gpus(self) -> int:
        """Of all nodes."""
        return self.nodes * self.gpus_per_node

    @property
    def data(self) -> Path | None:
        """Where tokenised sources are, if the command line does not say it."""
        return Path(expand(self.shared, "shared", self.name)) / "data" if self.shared else None

    @property
    def text(self) -> str:
        """The profile as a YAML file that stands alone."""
        content = _plain(self.model_dump(exclude_defaults=True))
        return f"# Frozen by smol launch.\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True)}"

    def freeze(self, folder: Path) -> None:
        """Writes it into a run's folder, atomically."""
        write_atomic(folder / FROZEN, self.text)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def expand(value: str, key: str, profile: str) -> str:
    """A path with this machine's variables put in.

    Raises:
        UserError: a variable is not set.
    """
    path = os.path.expandvars(value)
    if "$" in path:
        name = re.findall(r"\$\{?(\w+)", path)[0]
        raise UserError(f"the variable {name} is not set", f"export {name}, or write another path", profile, key)
    return path


def cluster_names() -> list[str]:
    """The profiles below slurm/clusters."""
    return sorted(path.stem for path in CLUSTERS.glob("*.yaml"))


def load_cluster(name: str | Path) -> Cluster:
    """Reads a profile by its name below slurm/clusters, or by the path of its file.

    Raises:
        UserError: the first thing that is wrong, with its file, key, and what to write instead.
    """
    raw, places = _merged(_find(str(name), None))
    if "name" in raw:
        raise typed_error(places, ("name",), "a profile has no key 'name'", "remove it: the file's name is used")
    return typed(Cluster, {**raw, "name": Path(name).stem}, places)


def load_frozen(folder: Path) -> Cluster | None:
    """The profile that a run was launched with; none if it was not launched."""
    if not (folder / FROZEN).is_file():
        return None
    file = read_yaml(folder / FROZEN)
    return typed(Cluster, file.data, places_of(file))


def _find(name: str, beside: Path | None) -> Path:
    if name.endswith((".yaml", ".yml")) or "/" in name:
        return (beside or Path()) / name
    for folder in filter(None, (beside, CLUSTERS)):
        if (path := folder / f"{name}.yaml").is_file():
            return path
    near = difflib.get_close_matches(name, cluster_names(), 1)
    fix = f"did you mean {near[0]}" if near else f"name one of {', '.join(cluster_names())}, or a file"
    raise UserError(f"there is no cluster profile '{name}'", fix, CLUSTERS)


def _merged(path: Path) -> tuple[dict[str, Any], Places]:
    """A file over what it extends: mappings key by key, lists as a whole."""
    chain: list[YamlFile] = []
    found: Path | None = path
    while found is not None:
        chain.append(read_yaml(found))
        base = chain[-1].data.pop("extends", None)
        key: Key = ("extends",)
        if base is not None and not isinstance(base, str):
            raise typed_error(places_of(chain[-1]), key, f"found {base}", "write the name of one profile")
        found = _find(base, found.parent) if base else None
        if found is not None and found.resolve() in [file.path.resolve() for file in chain]:
            raise typed_error(places_of(chain[-1]), key, "the profiles extend one another", "remove one `extends`")
    raw: dict[str, Any] = {}
    places: Places = {}
    for file in reversed(chain):
        raw = _over(raw, file.data)
        places.update(places_of(file))
    return raw, places


def _over(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    def merged(key: str, value: Any) -> Any:
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        return _over(base[key], value) if both else value

    return {**base, **{key: merged(key, value) for key, value in over.items()}}


def hours(minutes: float) -> str:
    """Minutes as people read them: 24 h, 90 min."""
    whole = Fraction(Decimal(str(minutes))) / 60
    return f"{whole} h" if whole.denominator == 1 else f"{minutes:g} min"


def slurm_time(minutes: int) -> str:
    """Minutes as Slurm reads them: D-HH:MM:SS."""
    return f"{minutes // 1440}-{minutes % 1440 // 60:02d}:{minutes % 60:02d}:00"
