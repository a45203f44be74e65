"""A stage's samples: the same by number, by slice and by walking, whatever the number of GPUs."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.data.dataset import MixtureDataset, rank_samples
from recipes.data.interleave import Interleave
from recipes.data.stream import SourceStream
from recipes.errors import UserError
from recipes.loader import load
from recipes.plan import Plan, make_plan
from recipes.recipe import Mixture
from tests.conftest import ROOT
from tests.data.test_stream import write_tokens

BLOCK = 32
SIZES = {"web": (500, 801), "code": (330,), "math": (70, 70)}
"""Tokens per file: 40, 10 and 4 blocks of 32."""


def plan_of(*stages: tuple[int, int, dict[str, str]]) -> Plan:
    """The 1.7B's plan with small stages of 1,024 tokens a step: (steps, sequence length, shares)."""
    base, made, start = load("smollm2-1.7b", ROOT), [], 0
    for number, (steps, length, shares) in enumerate(stages, 1):
        mixture = Mixture.model_validate({"domains": {"web": {"share": 1, "sources": shares}}})
        stage = replace(
            base.stages[0], name=f"stage{number}", start_step=start, end_step=start + steps, sequence_length=length,
            mixture=mixture,
        )  # fmt: skip
        made.append(stage)
        start += steps
    sources = dict.fromkeys(SIZES, next(iter(base.sources.values())))
    return make_plan(
        replace(base, tokens_per_step=1024, block_tokens=BLOCK, stages=tuple(made), branches=(), sources=sources)
    )


FIRST = {"web": "0.7", "code": "0.25", "math": "0.05"}
PLAN = plan_of((3, 16, FIRST), (2, 32, {"math": "0.5", "web": "0.5"}), (5, 8, {"code": "0.1", "web": "0.9"}))
"""192, 64 and 640 samples."""


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SourceStream]:
    """A stream for each source."""
    root = tmp_path_factory.mktemp("sources")
    return {
        name: SourceStream(write_tokens(root / name, sizes, source=name), PLAN.seed, BLOCK)
        for name, sizes in SIZES.items()
    }


@pytest.fixture(scope="module")
def dataset(streams: dict[str, SourceStream]) -> MixtureDataset:
    """The first stage."""
    return MixtureDataset(PLAN, "stage1", streams)


@pytest.mark.parametrize("name", ["stage1", "stage2", "stage3"])
def test_a_sample_is_its_sources_next(streams: dict[str, SourceStream], name: str) -> None:
    stage, dataset = PLAN.stage(name), MixtureDataset(PLAN, name, streams)
    position = dict(stage.offsets)
    names, interleave = list(stage.shares), Interleave(stage.shares)
    assert len(dataset) == stage.samples
    for n, tokens in enumerate(dataset):
        source = names[interleave.locate(n)[0]]
        assert np.array_equal(tokens, streams[source].sample(position[source], stage.sequence_length))
        assert dataset.locate(n) == (names.index(source), position[source])
        position[source] += stage.sequence_length
    assert {use.name: use.offset + use.tokens for use in stage.sources} == position
    assert np.array_equal(dataset[:], list(dataset))


def test_no_token_is_a_target_twice_in_an_epoch_of_the_run(streams: dict[str, SourceStream]) -> None:
    targets: dict[tuple[str, int], list[int]] = defaultdict(list)
    for stage in PLAN.stages:
        dataset, names = MixtureDataset(PLAN, stage.name, streams), list(stage.shares)
        for n, tokens in enumerate(dataset):
            source, offset = dataset.locate(n)
            stream = streams[names[source]]
            targets[names[source], offset // stream.epoch_tokens] += tokens[1:].tolist()
    for (name, epoch), seen in targets.items():
        assert len(set(seen)) == len(seen)
        if (name, epoch + 1) in targets:  # A whole epoch: stages 1 and 3 may leave part of a block out.
            assert 0 <= streams[name].epoch_tokens - len(seen) < 2 * BLOCK
    assert {name: max(e for n, e in targets if n == name) for name in SIZES} == {"web": 6, "code": 3, "math": 9}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 191), max_size=80))
def test_any_samples_at_once_are_those_one_by_one(dataset: MixtureDataset, numbers: list[int]) -> None:
    chosen = np.array(numbers, dtype=np.int64)
    tokens, sources = dataset[chosen], dataset.sources(chosen)
    assert (tokens.shape, tokens.dtype) == ((len(numbers), 17), np.dtype("<u2"))
    assert (sources.shape, sources.dtype) == ((len(numbers),), np.int64)
    assert all(np.array_equal(row, dataset[n]) for row, n in zip(tokens, numbers, strict=True))
    assert sources.tolist() == [dataset.locate(n)[0] for n in numbers]


@pytest.mark.parametrize("part", [slice(None), slice(5, 6), slice(100, 180), slice(7, 7), slice(3, 150, 7)])
def test_slices(dataset: MixtureDataset, part: slice) -> None:
    assert np.array_equal(dataset[part], dataset[np.arange(len(dataset))[part]])


def test_starting_at_a_sample_equals_walking_to_it(streams: dict[str, SourceStream], dataset: MixtureDataset) -> None:
    walked = list(dataset)
    for n in (0, 1, 77, 191):
        fresh = {s: SourceStream(stream.manifest, PLAN.seed, BLOCK) for s, stream in streams.items()}
        assert np.array_equal(MixtureDataset(PLAN, "stage1", fresh)[n:], walked[n:])


@pytest.mark.parametrize(
    "n", [-1, 192, slice(190, 193), slice(-1, 3), slice(192, 190, -1), slice(0, 10**15), np.array([192])]
)
def test_samples_outside_the_stage_are_refused(dataset: MixtureDataset, n: int | slice | np.ndarray) -> None:
    with pytest.raises(IndexError, match=r"outside stage1's \[0, 192\)"):
        dataset[n]


def test_locating_outside_the_stage_is_refused(dataset: MixtureDataset) -> None:
    for locate in (lambda: dataset.locate(192), lambda: dataset.sources(np.array([-1]))):
        with pytest.raises(IndexError):
            locate()


@pytest.mark.parametrize("dp", [1, 2, 4, 8])
@pytest.mark.parametrize("micro_batch", [1, 2, 4, 8, 16, 32, 64])
def test_every_split_sees_the_same_global_batches(dataset: MixtureDataset, dp: int, micro_batch: int) -> None:
    if 64 % (dp * micro_batch):
        with pytest.raises(UserError, match="do not divide"):
            rank_samples(0, 64, dp, 0, micro_batch)
        return
    for step in range(3):
        ranks = [rank_samples(step, 64, dp, rank, micro_batch) for rank in range(dp)]
        assert all(numbers.shape == (64 // (dp * micro_batch), micro_batch) for numbers in ranks)
        # Micro-batch after micro-batch, rank after rank: the batch in order, whatever the split.
        fed = np.concatenate([dataset[numbers] for row in zip(*ranks, strict=True) for numbers in row])
        assert np.array_equal(fed, dataset[step * 64 : (step + 1) * 64])


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**7), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.data())
def test_rank_samples_by_the_formula(step: int, dp: int, micro: int, groups: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, dp - 1))
    total = dp * micro * groups
    numbers = rank_samples(step, total, dp, rank, micro)
    expected = [[step * total + (a * dp + rank) * micro + j for j in range(micro)] for a in range(groups)]
    assert (numbers.dtype, numbers.tolist()) == (np.int64, expected)


@pytest.mark.parametrize("rank", [-1, 4])
def test_a_rank_that_is_not_there(rank: int) -> None:
    with pytest.raises(UserError, match=f"no rank {rank} among 4"):
        rank_samples(0, 64, 4, rank, 4)


def test_shares_are_exact_in_what_is_fed(dataset: MixtureDataset) -> None:
    fed = np.bincount(dataset.sources(np.arange(len(dataset))), minlength=3).tolist()
    assert fed == [use.samples for use in PLAN.stage("stage1").sources]
    assert all(abs(f - 192 * Fraction(share)) < 1 for f, share in zip(fed, FIRST.values(), strict=True))


def test_a_source_without_tokens_is_named(streams: dict[str, SourceStream]) -> None:
    with pytest.raises(UserError, match="stage1 has no tokens of code, math"):
        MixtureDataset(PLAN, "stage1", {"web": streams["web"]})


@pytest.mark.parametrize("other", [{"sha256": "1" * 64}, {"token_bytes": 4}])
def test_sources_of_another_tokenizer_are_refused(
    tmp_path: Path, streams: dict[str, SourceStream], other: dict[str, str]
) -> None:
    code = SourceStream(write_tokens(tmp_path / "code", (330,), source="code", **other), PLAN.seed, BLOCK)
    with pytest.raises(UserError, match="'code' and 'web' are of different tokenizers"):
        MixtureDataset(PLAN, "stage1", {**streams, "code": code})


def test_blocks_must_hold_whole_samples(streams: dict[str, SourceStream]) -> None:
    short = {name: SourceStream(stream.manifest, PLAN.seed, 24) for name, stream in streams.items()}
    with pytest.raises(UserError, match="block_tokens 24 is no multiple of the sequence length 16"):
        MixtureDataset(PLAN, "stage1", short)
