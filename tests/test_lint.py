from __future__ import annotations

from pathlib import Path

import pytest

from recipes.errors import UserError
from recipes.lint import checked_plan, lint
from recipes.loader import load
from tests.test_loader import BASE, END2, RECIPE, change

ROOT = Path(__file__).resolve().parent.parent


def test_the_published_1_7b_has_warnings_only() -> None:
    findings = lint(load(BASE, ROOT))
    text = "\n".join(map(str, findings))
    assert all(f.level == "warning" for f in findings)
    assert "decays from step 4,716,000, 52,371 steps before stage4 starts (step 4,768,371)" in text
    assert "open-web-math is repeated 11.73 times over the run, above 4.5 epochs" in text
    assert "family infimm-webmath (infimm-webmath, infiwebmath-3plus) comes to 6.35 epochs" in text
    assert "unknown: jupyter, auggsm8k" in text
    assert "fineweb-edu is" not in text and "stack-edu is" not in text


@pytest.mark.parametrize(
    ("file", "old", "new", "level", "expected"),
    [
        (RECIPE, "dp: 256", "dp: 255", "error", "dp 255 × micro_batch 4 × accumulation 1 × sequence 2048 = 2,088,960"),
        (RECIPE, "  tp: 1 ", "  tp: 3 ", "error", "model.heads 32 cannot be split over tp 3"),
        (RECIPE, "async_communication: false", "async_communication: true", "error", "wrong gradients"),
        (RECIPE, "zero_stage: 0", "zero_stage: 1", "warning", "cannot resume on another number of GPUs"),
        (RECIPE, "vocab_size: 49_152            # C\n  end", "vocab_size: 50_000\n  end", "error", "49,152 is smaller"),
        (RECIPE, "dtype: bfloat16", "dtype: float32", "error", "refused by Nanotron 0.4"),
        (RECIPE, "keep_every: 250_000", "keep_every: 249_999", "error", "no multiple of the interval 5,000"),
        (
            RECIPE,
            "block_tokens: 8192",
            "block_tokens: 4096",
            "error",
            "long-context: block_tokens 4,096 is no multiple",
        ),
        (RECIPE, "decay_steps: 524_000", "decay_steps: 500_000", "warning", "decay ends at step 5,216,000"),
        (RECIPE, "kv_heads: 32", "kv_heads: 5", "error", "kv_heads 5 the heads"),
    ],
)
def test_findings(tree: Path, file: str, old: str, new: str, level: str, expected: str) -> None:
    change(tree, file, old, new)
    found = [f for f in lint(load(BASE, tree)) if expected in f.text]
    assert [f.level for f in found][:1] == [level]


SCHEDULE = """
schedule: {peak_lr: PEAK, min_lr: 0, warmup_steps: 2_000, decay_start_step: START, decay_steps: 524_000}
"""


@pytest.mark.parametrize(
    ("peak", "start", "expected"),
    [
        ("5.0e-4", "4_716_000", None),
        ("5.0e-4", "3_000_000", "stage3: the learning rate jumps from stage2's"),
        ("4.0e-4", "4_716_000", "stage2: the learning rate jumps from stage1's 0.0005 to 0.0004"),
    ],
)
def test_learning_rate_is_continuous_across_stages(tree: Path, peak: str, start: str, expected: str | None) -> None:
    with (tree / END2).open("a") as file:
        file.write(SCHEDULE.replace("PEAK", peak).replace("START", start))
    errors = [f.text for f in lint(load(BASE, tree)) if f.level == "error"]
    assert (not errors) if expected is None else any(expected in text for text in errors)


def test_errors_stop_the_plan(tree: Path) -> None:
    change(tree, RECIPE, "dp: 256", "dp: 255")
    with pytest.raises(UserError, match="dp 255"):
        checked_plan(load(BASE, tree))


def test_a_local_tokenizer_is_counted(tree: Path) -> None:
    (tree / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"content": "c"}]}')
    change(tree, RECIPE, "HuggingFaceTB/cosmo2-tokenizer", "tokenizer.json")
    assert any("tokenizer.json has 3 entries" in f.text for f in lint(load(BASE, tree)))


@pytest.mark.parametrize("content", ["{", "[]", '{"model": {"vocab": {}}}', '{"model": null, "added_tokens": []}'])
def test_a_local_tokenizer_that_is_none_is_named(tree: Path, content: str) -> None:
    (tree / "tokenizer.json").write_text(content)
    change(tree, RECIPE, "HuggingFaceTB/cosmo2-tokenizer", "tokenizer.json")
    assert any("tokenizer.json is no tokenizer.json" in f.text for f in lint(load(BASE, tree)))
