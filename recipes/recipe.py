"""The typed recipe: one training run's description.

`loader.load` reads it; `docs/formats.md` describes the files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from recipes.errors import UserError

_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_tokens(value: object) -> int:
    """A number of tokens: 2097152, 1.3T, 75B; K, M, B and T are powers of a thousand."""
    if isinstance(value, bool) or not isinstance(value, (int, str, Decimal)):
        raise ValueError("write a number of tokens such as 75B or 1.3T")
    match = re.fullmatch(r"([0-9][0-9_]*\.?[0-9]*)\s*([KMBT]?)", str(value).strip())
    number = Fraction(match[1].replace("_", "")) * _UNITS.get(match[2], 1) if match else Fraction(1, 2)
    if number.denominator != 1:
        raise ValueError("write a whole number of tokens such as 75B or 1.3T")
    return int(number)


def parse_share(value: object) -> Fraction:
    """An exact share in (0, 1]: a decimal such as 0.60, or a fraction of whole numbers such as 1/175."""
    fix = "write a share above 0 and at most 1, such as 0.6 or 1/175"
    if isinstance(value, (bool, float)) or not isinstance(value, (int, str, Decimal, Fraction)):
        raise ValueError(fix)
    try:
        share = Fraction(value)
    except (ValueError, ZeroDivisionError):
        raise ValueError(fix) from None
    if not 0 < share <= 1:
        raise ValueError(fix)
    return share


def _parse_scale(value: object) -> Fraction:
    try:
        scale = Fraction(str(value).replace("_", ""))
    except (ValueError, ZeroDivisionError):
        raise ValueError("write a factor such as 1/5_000_000") from None
    if scale <= 0:
        raise ValueError("write a factor above 0 such as 1/5_000_000")
    return scale


Tokens = Annotated[int, BeforeValidator(parse_tokens)]
Share = Annotated[Fraction, BeforeValidator(parse_share)]
Scale = Annotated[Fraction, BeforeValidator(_parse_scale)]
Count = Annotated[int, Field(ge=1)]
Steps = Annotated[int, Field(ge=0)]


class Strict(BaseModel):
    """Refuses unknown keys; never changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, protected_namespaces=())


class Model(Strict):
    """A Llama model's shape."""

    layers: Count
    hidden: Count
    ffn: Count
    """Width of the SwiGLU layer."""
    heads: Count
    kv_heads: Count
    vocab_size: Count
    tied_embeddings: bool
    norm_eps: float
    init_std: float
    rope_theta: float
    rope_interleaved: bool
    dtype: Literal["bfloat16", "float32"]

    @property
    def parameters(self) -> int:
        """Number of trained weights, embeddings included."""
        kv_width = self.hidden // self.heads * self.kv_heads
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * kv_width
        layer = attention + 3 * self.hidden * self.ffn + 2 * self.hidden
        embeddings = self.vocab_size * self.hidden * (1 if self.tied_embeddings else 2)
        return embeddings + self.layers * layer + self.hidden


class Tokenizer(Strict):
    """What turns text into tokens."""

    name: str
    """Hub id, or the path of a folder with tokenizer.json."""
    vocab_size: Count
    end_of_text: str
    """The token that ends every document."""


class Batch(Strict):
    """How a step's tokens are cut; a stage may cut them otherwise."""

    tokens_per_step: Tokens
    sequence_length: Count
    micro_batch: Count
    """Sequences that one GPU takes at once."""
    accumulation: Count
    """Micro-batches that one GPU takes per step."""


class Parallelism(Strict):
    """How the model and the batch are spread over GPUs."""

    dp: Count
    tp: Count
    pp: Count
    tp_mode: Literal["ALL_REDUCE", "REDUCE_SCATTER"]
    tp_linear_async_communication: bool
    pp_engine: Literal["1f1b", "afab"]

    @property
    def gpus(self) -> int:
        """GPUs of the whole run."""
        return self.dp * self.tp * self.pp


class Optimizer(Strict):
    """AdamW."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip: float
    """Largest norm of the gradients."""
    zero_stage: Literal[0, 1]
    accumulate_grad_in_fp32: bool


class Schedule(Strict):
    """Learning rate: linear warm-up, constant, linear decay (WSD)."""

    peak_lr: float
    min_lr: float
    warmup_steps: Steps
    decay_start_step: Steps
    decay_steps: Count


class Checkpoints(Strict):
    """When checkpoints are written and which are kept; stage ends and branch points always are."""

    interval: Count
    """Steps between checkpoints."""
    keep_last: Count
    keep_every: Steps
    """Checkpoints at multiples of this many steps are kept for ever; 0 keeps none."""


class Guard(Strict):
    """When training stops by itself. All defaults are chosen; stages/smollm2-1.7b/recipe.yaml says why."""

    window: Count = 256
    """Steps whose losses a step's loss is compared with; nothing is judged before there are as many in the stage."""
    z: Annotated[float, Field(gt=0)] = 10.0
    """A loss is a spike at this many robust standard deviations above the window's median."""
    patience: Count = 64
    """Spikes in a row after which training stops; at most half the window, so that its median stays clean."""
    hang_factor: Annotated[float, Field(gt=1)] = 30.0
    """A step is a hang at this many times the median step's seconds, ..."""
    hang_seconds: Annotated[float, Field(gt=0)] = 300.0
    """... but not before this many seconds."""

    @model_validator(mode="after")
    def _patience_fits(self) -> Guard:
        if 2 * self.patience > self.window:
            raise ValueError(f"write a patience of at most half the window, {self.window // 2}")
        return self


class Source(Strict):
    """One dataset: where it comes from and how much there is."""

    domain: str
    hub: str | None
    """Hub dataset id; none for what is on no Hub."""
    config: str | None = None
    """The dataset's configuration, or the folder inside it."""
    text: str
    """Column that holds the text."""
    license: str | None = None
    tokens: Tokens | None
    """Unique tokens; none where nobody published them."""
    family: str | None = None
    """Sources of one family overlap: the largest contains the others."""


class Domain(Strict):
    """A domain's part of a mixture."""

    share: Share
    sources: Annotated[dict[str, Share], Field(min_length=1)]


class Mixture(Strict):
    """The shares of a stage's tokens by domain, and of a domain by source."""

    domains: Annotated[dict[str, Domain], Field(min_length=1)]

    @property
    def shares(self) -> dict[str, Fraction]:
        """Each source's share of the stage, in the order of the file; sums to exactly 1."""
        return {s: d.share * share for d in self.domains.values() for s, share in d.sources.items()}


class Branch(Strict):
    """A stage that leaves another one before its end."""

    stage: str
    tokens_before_end: Tokens


@dataclass(frozen=True)
class Stage:
    """A span of tokens trained with one mixture; ends after `end_step` steps of the run."""

    name: str
    start_step: int
    end_step: int
    branch: str | None
    """The stage this one leaves at `start_step`; none in the main line."""
    sequence_length: int
    micro_batch: int
    accumulation: int
    rope_theta: float
    schedule: Schedule
    mixture: Mixture
    file: Path
    mixture_file: Path


@dataclass(frozen=True)
class Recipe:
    """One training run's description, complete and consistent in itself."""

    name: str
    seed: int
    scale: Fraction
    """What every number of tokens of the extended recipe was multiplied by: 1 for a real run."""
    model: Model
    tokenizer: Tokenizer
    tokens_per_step: int
    parallelism: Parallelism
    optimizer: Optimizer
    schedule: Schedule
    checkpoints: Checkpoints
    guard: Guard
    block_tokens: int
    stages: tuple[Stage, ...]
    branches: tuple[Stage, ...]
    sources: dict[str, Source]
    root: Path
    """The folder that holds stages/ and mixtures/."""
    files: tuple[Path, ...]
    """Every file the recipe was read from."""

    def stage(self, name: str) -> Stage:
        """The stage or branch of that name.

        Raises:
            UserError: there is none; names those there are.
        """
        stages = self.stages + self.branches
        for stage in stages:
            if stage.name == name:
                return stage
        raise UserError(f"{self.name} has no stage '{name}'", f"name one of {', '.join(s.name for s in stages)}")

    def with_mixture(self, stage: str, mixture: Mixture) -> Recipe:
        """The recipe with another mixture in one stage.

        Raises:
            UserError: there is no such stage.
        """
        self.stage(stage)

        def changed(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
            return tuple(replace(s, mixture=mixture) if s.name == stage else s for s in stages)

        return replace(self, stages=changed(self.stages), branches=changed(self.branches))


def decimal(number: Fraction, signed: bool = False) -> str:
    """A fraction as people write it: a decimal where it ends within 12 places, else a/b."""
    places = next((n for n in range(13) if 10**n % number.denominator == 0), None)
    exact = f"{number.numerator}/{number.denominator}"
    text = exact if places is None else f"{Decimal(number.numerator) / number.denominator:.{places}f}"
    return f"+{text}" if signed and number > 0 else text
