"""Bad input: one clear message with the file, the key or line, what was found and what to write; exit code 2."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from recipes.errors import UserError
from recipes.loader import load

BASE = "smollm2-1.7b"
STAGE2 = "mixtures/smollm2-1.7b/stage2.yaml"
RECIPE = "stages/smollm2-1.7b/recipe.yaml"
BRANCH = "stages/smollm2-1.7b/long-context.yaml"
END1, END2 = "stages/smollm2-1.7b/stage1.yaml", "stages/smollm2-1.7b/stage2.yaml"


def change(tree: Path, file: str, old: str, new: str) -> None:
    path = tree / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


BAD = {
    "unknown key": (RECIPE, "  layers:", "  layer:", ["recipe.yaml:", "model.layer", "unknown", "Write 'layers'"]),
    "unknown key on top": (RECIPE, "seed:", "sed:", ["sed", "unknown", "Write 'seed'"]),
    "negative share": (STAGE2, "share: 0.05", "share: -0.1", ["stage2.yaml:", "domains.math.share", "-0.1", "above 0"]),
    "share in words": (STAGE2, "share: 0.05", "share: ten", ["domains.math.share", "'ten'", "such as 0.6"]),
    "share of zero": (STAGE2, "share: 0.05", "share: 0", ["domains.math.share", "found 0", "above 0"]),
    "sum above 1": (STAGE2, "share: 0.05", "share: 0.05005", ["stage2.yaml", "1.00005", "-0.00005", "nothing is norm"]),
    "sum inside": (STAGE2, "dclm: 0.40", "dclm: 0.30", ["domains.web.sources", "0.9", "+0.1"]),
    "unknown source": (STAGE2, "open-web-math: 1", "open-web-meth: 1", ["open-web-meth", "registry", "open-web-math"]),
    "wrong domain": (STAGE2, "starcoderdata: 1", "dclm: 1", ["'dclm' belongs to the domain web", "code"]),
    "long period": (STAGE2, "fineweb-edu: 0.60", "fineweb-edu: 0.60000001", None),
    "backwards": (END2, "end_tokens: 8T", "end_tokens: 5T", ["stage2.yaml:", "end_tokens", "2,384,185", "2,861,022"]),
    "half a step": (END2, "end_tokens: 8T", "end_step: 10.5", ["end_step", "10.5"]),
    "two ends": (END2, "end_tokens: 8T", "end_tokens: 8T\nend_step: 5", ["one of end_tokens and end_step"]),
    "no unit": (END2, "end_tokens: 8T", "end_tokens: 8X", ["end_tokens", "'8X'", "75B or 1.3T"]),
    "syntax": (STAGE2, "domains:", "domains: [", ["stage2.yaml: line", "not valid YAML"]),
    "object": (STAGE2, "share: 0.75", "share: !!python/name:os.system", ["line", "!!python/name", "object"]),
    "own tag": (STAGE2, "share: 0.75", "share: !secret x", ["line", "!secret", "plain values only"]),
    "duplicate": (STAGE2, "dclm: 0.40", "fineweb-edu: 0.40", ["line 7", "'fineweb-edu'", "twice", "line 6"]),
    "alias": (STAGE2, "share: 0.75", "share: &a 0.75\n    x: *a", ["alias", "Write the value out"]),
    "infinity": (STAGE2, "share: 0.75", "share: .inf", ["line", ".inf", "not a finite number"]),
    "octal": (RECIPE, "layers: 24", "layers: 030", ["line", "030", "not decimal"]),
    "list on top": (END1, "end_tokens: 6T", "- 6T", ["stage1.yaml", "not a mapping"]),
    "missing key": (RECIPE, "seed: 42", "# seed", ["the key 'seed' is missing"]),
    "wrong type": (RECIPE, "layers: 24", "layers: many", ["model.layers", "'many'", "integer"]),
    "other name": (RECIPE, "name: smollm2-1.7b", "name: smollm3", ["name", "'smollm3' is not the folder's name"]),
    "missing stage": (RECIPE, "[stage1,", "[stage0,", ["stage0.yaml", "no such file", "stage1.yaml"]),
    "extends itself": (RECIPE, "seed: 42", "seed: 42\nextends: smollm2-1.7b", ["extends", "cannot be extended"]),
    "scale alone": (RECIPE, "seed: 42", "seed: 42\nscale: 1/5", ["scale", "extends"]),
    "branch of nothing": (BRANCH, "stage: stage4", "stage: stage5", ["stage5", "stage4"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_file_key_found_and_fix(case: str, tree: Path) -> None:
    file, old, new, expected = BAD[case]
    change(tree, file, old, new)
    if case == "long period":
        change(tree, file, "dclm: 0.40", "dclm: 0.39999999")
        expected = ["stage2.yaml", "400,000,000 samples", "1,048,576", "fewer decimals"]
    with pytest.raises(UserError) as error:
        load(BASE, tree)
    assert expected
    for part in expected:
        assert part in str(error.value), str(error.value)


def test_empty_and_missing_files(tree: Path) -> None:
    (tree / STAGE2).write_text("# nothing\n")
    with pytest.raises(UserError, match=r"stage2\.yaml: the file is empty"):
        load(BASE, tree)
    (tree / STAGE2).unlink()
    with pytest.raises(UserError, match=r"stage2\.yaml: there is no such file\. .*stage1\.yaml"):
        load(BASE, tree)
    with pytest.raises(UserError, match=r"no recipe 'smollm2-1\.7'\. Did you mean smollm2-1\.7b"):
        load("smollm2-1.7", tree)


@pytest.mark.parametrize("case", ["negative share", "object", "duplicate", "syntax"])
def test_command_line_ends_with_code_2_and_no_traceback(case: str, tree: Path) -> None:
    change(tree, *BAD[case][:3])
    for verb in ("lint", "plan"):
        command = [sys.executable, "-m", "recipes.cli", verb, str(tree / "stages" / BASE)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.startswith("error:") and "Traceback" not in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_not_utf8(tree: Path) -> None:
    (tree / END1).write_bytes(b"end_tokens: \xff")
    with pytest.raises(UserError, match="not UTF-8"):
        load(BASE, tree)


def test_shares_stay_exact(tree: Path) -> None:
    shares = load(BASE, tree).stage("stage4").mixture.shares
    assert shares["open-web-math"] == Fraction(8, 10_000)
    assert shares["auggsm8k"] == Fraction(2, 10_000)
    assert shares["dclm"] == Fraction(348, 1000)
    assert sum(shares.values()) == 1


def test_overlay_changes_only_what_it_names(tree: Path) -> None:
    big, small = load(BASE, tree), load("smollm2-360m", tree)
    assert small.optimizer == big.optimizer and small.model.kv_heads == 5
    assert (small.model.parameters, load("smollm2-135m", tree).model.parameters) == (361_821_120, 134_515_008)


def test_scale_is_one_factor_on_tokens_warmup_and_decay(tree: Path) -> None:
    folder = tree / "stages" / "small"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(
        "name: small\nextends: smollm2-1.7b\nscale: 1/1000\nbatch: {tokens_per_step: 4096}\nbranches: []\n"
    )
    small, big = load("small", tree), load(BASE, tree)
    factor = Fraction(big.tokens_per_step, 1000 * 4096)
    assert [s.end_step for s in small.stages][:3] == [int(t * 10**12 // 1000 // 4096) for t in (6, 8, 10)]
    assert small.stages[-1].end_step == int(5_240_000 * factor)
    assert small.schedule.decay_start_step == int(4_716_000 * factor)
    assert small.schedule.decay_start_step + small.schedule.decay_steps == small.stages[-1].end_step
    assert small.schedule.warmup_steps == 1024
