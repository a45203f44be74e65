from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from recipes.cli import app
from recipes.data.interleave import Interleave
from recipes.diff.compare import Diff, KnockOn, Line, RecipeDiff, StageDiff, Use, diff_mixtures, diff_recipes, worth
from recipes.diff.show import mixture_diff_markdown, show_diff, summary, to_markdown
from recipes.diff.sides import compare
from recipes.errors import UserError
from recipes.loader import load
from recipes.plan import make_plan
from recipes.recipe import Domain, Mixture

ROOT = Path(__file__).resolve().parents[2]
RECIPE = load("smollm2-1.7b", ROOT)
STAGE2, STAGE3 = "mixtures/smollm2-1.7b/stage2.yaml", "mixtures/smollm2-1.7b/stage3.yaml"


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True, text=True
    ).stdout


def commit(folder: Path, message: str = "x") -> None:
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", message)


def edit(path: Path, *changes: tuple[str, str]) -> None:
    text = path.read_text()
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    path.write_text(text)


@pytest.fixture
def repo(tree: Path) -> Path:
    """The recipes in a git repository, committed to `main`."""
    git(tree, "init", "-q", "-b", "main")
    commit(tree)
    return tree


def shown(diff: Diff, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO())
    show_diff(diff, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def line(stage: StageDiff, name: str) -> Line:
    return next(found for found in stage.lines if found.name == name)


# ---------------------------------------------------------------- the worth of repeated tokens


@pytest.mark.parametrize(("epochs", "percent"), [(0, 100), (0.5, 100), (1, 100), (4, 93), (5, 90), (8.3, 82)])
def test_worth_is_the_published_decay(epochs: float, percent: int) -> None:
    assert round(100 * worth(epochs)) == percent


@given(st.floats(1, 100), st.floats(0.01, 10))
def test_worth_falls_but_more_tokens_are_never_worth_less(epochs: float, more: float) -> None:
    assert worth(epochs + more) < worth(epochs) <= 1
    assert (epochs + more) * worth(epochs + more) >= epochs * worth(epochs)


def test_worth_is_the_formula() -> None:
    unique, epochs = 12e9, 8.33
    effective = unique + unique * 15.39 * (1 - math.exp(-(epochs - 1) / 15.39))
    assert worth(epochs) == pytest.approx(effective / (epochs * unique), rel=1e-12)


# ---------------------------------------------------------------- laws

T = TypeVar("T", Line, KnockOn)
SOURCES = {"web": ("fineweb-edu", "dclm"), "code": ("starcoderdata", "stack-edu"), "math": ("open-web-math",)}


SHORT = dataclasses.replace(RECIPE, branches=())
"""Without the branch, whose pattern of 25,000 samples takes time to build."""


@st.composite
def mixtures(draw: st.DrawFn) -> Mixture:
    """Shares in 1/20 of the stage and 1/4 of a domain."""
    code, math = draw(st.integers(0, 9)), draw(st.integers(0, 9))
    parts = {"web": 20 - code - math, "code": code, "math": math}
    domains = {}
    for name, part in parts.items():
        first = draw(st.integers(1, 3))
        shares = [Fraction(first, 4), Fraction(4 - first, 4)] if len(SOURCES[name]) == 2 else [Fraction(1)]
        if part:
            sources = dict(zip(SOURCES[name], shares, strict=True))
            domains[name] = Domain(share=Fraction(part, 20), sources=sources)
    return Mixture(domains=domains)


@settings(max_examples=30, deadline=None)
@given(mixtures(), mixtures())
def test_points_sum_to_zero_and_the_other_way_round_is_the_opposite(one: Mixture, two: Mixture) -> None:
    a, b = SHORT.with_mixture("stage2", one), SHORT.with_mixture("stage2", two)
    there, back = diff_recipes(a, b), diff_recipes(b, a)
    for stage in there.stages:
        assert (
            sum(found.points for found in stage.of("domain")) == sum(found.points for found in stage.of("source")) == 0
        )
        assert stage.moved <= 100
    assert {turned(found) for stage in there.stages for found in stage.lines} == {
        found for stage in back.stages for found in stage.lines
    }
    assert {turned(found) for found in there.knock_on} == set(back.knock_on)
    assert [stage.moved for stage in there.stages] == [stage.moved for stage in back.stages]
    assert there.changes_data == (one.shares != two.shares)


def turned(found: T) -> T:
    """The same with before and after exchanged."""
    pairs = [f.name.removesuffix("before") for f in dataclasses.fields(found) if f.name.endswith("before")]
    values = {f"{p}before": getattr(found, f"{p}after") for p in pairs}
    return dataclasses.replace(found, **values, **{f"{p}after": getattr(found, f"{p}before") for p in pairs})


@settings(max_examples=10, deadline=None)
@given(mixtures())
def test_a_recipe_does_not_differ_from_itself(mixture: Mixture) -> None:
    recipe = SHORT.with_mixture("stage3", mixture)
    assert diff_recipes(recipe, recipe) == RecipeDiff("smollm2-1.7b")
    assert diff_recipes(recipe, recipe).empty
    assert not any(found.changed for found in diff_mixtures(mixture, mixture).lines)


# ---------------------------------------------------------------- what one change comes to


@pytest.fixture
def more_math(repo: Path) -> Path:
    """Stage 2 with 5 points moved from web to math, not committed."""
    edit(repo / STAGE2, ("0.75", "0.70"), ("0.05", "0.10"))
    return repo


def test_a_share_moves_tokens_epochs_and_worth(more_math: Path) -> None:
    diff = compare("main", root=more_math)
    [recipe] = diff.recipes
    [stage] = recipe.stages
    before, after = make_plan(RECIPE).stage("stage2"), make_plan(load("smollm2-1.7b", more_math)).stage("stage2")
    math_line, web, fineweb = line(stage, "open-web-math"), line(stage, "web"), line(stage, "fineweb-edu")
    assert (math_line.points, web.points, fineweb.points, stage.moved) == (5, -5, -3, 5)
    assert math_line.before and math_line.after and web.before and fineweb.after
    uses = {use.name: use for use in before.sources}
    assert math_line.before.tokens == uses["open-web-math"].tokens
    assert math_line.before.epochs == math_line.before.epochs_run == uses["open-web-math"].epochs
    assert web.before.tokens == uses["fineweb-edu"].tokens + uses["dclm"].tokens and web.before.epochs is None
    assert math_line.after.epochs == pytest.approx(2 * math_line.before.epochs or 0, rel=1e-6)
    assert (round(math_line.before.worth or 0, 2), round(math_line.after.worth or 0, 2)) == (0.82, 0.65)
    assert fineweb.after.epochs_run == {use.name: use for use in after.sources}["fineweb-edu"].epochs_run
    assert fineweb.after.worth == worth(fineweb.after.epochs_run or 0) < 1, (
        "of all that was read so far, not in the stage"
    )
    assert (stage.tokens_before, stage.tokens_after) == (before.tokens, after.tokens)


def test_later_stages_follow(more_math: Path) -> None:
    [recipe] = compare("main", root=more_math).recipes
    follows = {(k.stage, k.name): k for k in recipe.knock_on}
    assert {stage for stage, _ in follows} == {"stage3", "stage4", "long-context"}
    k = follows["stage3", "open-web-math"]
    old, new = make_plan(RECIPE), make_plan(load("smollm2-1.7b", more_math))
    assert (k.offset_before, k.offset_after) == tuple(p.stage("stage3").offsets["open-web-math"] for p in (old, new))
    assert k.offset_after == pytest.approx(2 * (k.offset_before or 0), rel=1e-6)
    assert (round(k.epochs_run_before or 0, 2), round(k.epochs_run_after or 0, 2)) == (11.67, 20.0)
    assert ("stage3", "stack-edu") not in follows and ("stage4", "cosmopedia-v2") not in follows
    assert ("long-context", "fineweb-edu") in follows


@pytest.mark.parametrize("forward", [True, False])
def test_a_limit_crossed_is_a_line_either_way(repo: Path, forward: bool) -> None:
    edit(repo / STAGE3, ("0.74", "0.70"), ("0.16", "0.20"))
    commit(repo)
    [recipe] = compare(*(("HEAD~1", "HEAD") if forward else ("HEAD", "HEAD~1")), root=repo).recipes
    [limit] = recipe.limits
    if forward:
        expected = "stack-edu: 4.33 → 4.94 epochs over the run, now above 4.5 (from stage4 on)"
        assert (limit.kind, limit.text) == ("warning", expected)
    else:
        assert (limit.kind, limit.text) == ("gone", "stack-edu: 4.94 → 4.33 epochs over the run, back below 4.5")


def test_what_is_above_a_limit_already_and_rises_is_said(more_math: Path) -> None:
    [limit] = compare("main", root=more_math).recipes[0].limits
    assert limit.text == "open-web-math: 11.73 → 20.07 epochs over the run, further above 4.5"


def test_a_family_passes_its_limit_where_no_source_does() -> None:
    small = {"web": "0.70", "math": "0.06", "code": "0.24"}
    sources = {"web": {"dclm": 1}, "math": {"infimm-webmath": 1}, "code": {"stack-edu": 1}}
    domains = {name: {"share": share, "sources": sources[name]} for name, share in small.items()}
    before = RECIPE.with_mixture("stage3", Mixture.model_validate({"domains": domains}))
    fewer = {**domains, "math": {"share": "0.06", "sources": {"open-web-math": 1}}}
    found = [
        limit.text
        for limit in diff_recipes(
            RECIPE.with_mixture("stage3", Mixture.model_validate({"domains": fewer})), before
        ).limits
    ]
    assert any(
        text.startswith("the family infimm-webmath: 2.35 → 5.35 epochs") and "now above" in text for text in found
    )
    assert not any(text.startswith("the family fineweb-edu") for text in found)


def test_lint_errors_that_appear_and_go(repo: Path) -> None:
    edit(repo / "stages/smollm2-1.7b/recipe.yaml", ("dp: 256 ", "dp: 128 "))
    diff = compare("main", root=repo)
    limits = {limit.kind for recipe in diff.recipes for limit in recipe.limits}
    assert limits == {"error"} and "dp 128 × micro_batch 4" in diff.recipes[0].limits[0].text
    commit(repo)
    back = compare("HEAD", "HEAD~1", repo)
    assert {limit.kind for recipe in back.recipes for limit in recipe.limits} == {"gone"}


def test_a_warning_with_other_numbers_is_not_a_new_one(repo: Path) -> None:
    changes = ("decay_start_step: 4_716_000", "decay_start_step: 4_717_000"), ("_steps: 524_000", "_steps: 523_000")
    edit(repo / "stages/smollm2-1.7b/recipe.yaml", *changes)
    [recipe] = compare("main", root=repo).recipes
    assert recipe.limits == () and len(recipe.changes) == 2


# ---------------------------------------------------------------- what does not change the data


def test_a_comment_changes_nothing(repo: Path) -> None:
    path = repo / STAGE2
    path.write_text("# another reason\n" + path.read_text().replace("0.75", "0.750").replace("  sources", "  sources"))
    diff = compare("main", root=repo)
    assert (diff.recipes, diff.changes_data, summary(diff)) == ((), False, "no change in the data")
    assert "no change in the data" in shown(diff) and "no change in the data" in to_markdown(diff)


def test_another_order_of_sources_is_no_change_in_the_data_and_is_said_where_it_matters(repo: Path) -> None:
    path = repo / "mixtures/smollm2-1.7b/stage1.yaml"
    web, code = path.read_text().split("  code:\n")
    head, web = web.split("domains:\n")
    path.write_text(f"{head}domains:\n  code:\n{code}{web}")
    diff = compare("main", root=repo)
    assert not diff.changes_data and summary(diff).endswith("no change in the data")
    assert not any((r.stages, r.knock_on, r.limits, r.changes) != ((), (), (), ()) for r in diff.recipes)
    now = load("smollm2-1.7b", repo).stage("stage1").mixture
    if sequence(now) != sequence(RECIPE.stage("stage1").mixture):
        assert diff.recipes[0].reordered == ("stage1",) and "another order" in shown(diff)
    else:
        assert diff.recipes == ()


def sequence(mixture: Mixture) -> list[str]:
    """The sources of a stage's first samples."""
    interleave, names = Interleave(mixture.shares), list(mixture.shares)
    return [names[interleave.locate(n)[0]] for n in range(interleave.period)]


@pytest.mark.parametrize(
    ("change", "key", "data"),
    [
        (("peak_lr: 5.0e-4", "peak_lr: 6.0e-4"), "schedule.peak_lr 0.0005 → 0.0006", False),
        (("keep_last: 3", "keep_last: 4"), "checkpoints.keep_last 3 → 4", False),
        (("  rope_theta: 10_000", "  rope_theta: 20_000"), "model.rope_theta 10000 → 20000", False),
        (("seed: 42", "seed: 43"), "seed 42 → 43", True),
        (("block_tokens: 8192", "block_tokens: 16384"), "block_tokens 8,192 → 16,384", True),
    ],
)
def test_other_keys_are_listed_once(repo: Path, change: tuple[str, str], key: str, data: bool) -> None:
    edit(repo / "stages/smollm2-1.7b/recipe.yaml", change)
    recipe = next(found for found in compare("main", root=repo).recipes if found.name == "smollm2-1.7b")
    [changed] = recipe.changes
    assert f"{changed.key} {changed.before} → {changed.after}" == key
    assert changed.data is recipe.changes_data is data
    assert ("no change in the data" in summary(Diff("a", "b", (recipe,)))) is not data


def test_a_stage_end_and_a_sources_size_change_tokens_and_epochs(repo: Path) -> None:
    edit(repo / "stages/smollm2-1.7b/stage2.yaml", ("8T", "8.2T"))
    edit(repo / "mixtures/sources.yaml", ("tokens: 28B", "tokens: 14B"))
    found = {recipe.name: recipe for recipe in compare("main", root=repo).recipes}
    assert set(found) == {"smollm2-1.7b", "smollm2-360m", "smollm2-135m"}
    keys = {change.key: change for change in found["smollm2-1.7b"].changes}
    assert set(keys) == {"stage2: end_step", "sources.cosmopedia-v2.tokens"}
    assert keys["stage2: end_step"].after == "3,910,064 (8.2T tokens)"
    stages = {stage.after: stage for stage in found["smollm2-1.7b"].stages}
    assert stages["stage2"].moved == 0 and "stage2 2T → 2.2T tokens" in summary(Diff("a", "b", tuple(found.values())))
    cosmopedia = line(stages["stage4"], "cosmopedia-v2")
    assert cosmopedia.before and cosmopedia.after and cosmopedia.before.epochs
    assert cosmopedia.after.epochs == pytest.approx(2 * cosmopedia.before.epochs)
    assert "stage1 other epochs" in summary(Diff("a", "b", (found["smollm2-360m"],)))


def test_a_source_that_one_side_alone_has_is_one_line(repo: Path) -> None:
    registry = repo / "mixtures/sources.yaml"
    registry.write_text(
        registry.read_text() + "  mine:\n    domain: web\n    hub: a/b\n    text: text\n    tokens: 50B\n"
    )
    edit(repo / STAGE2, ("fineweb-edu: 0.60", "fineweb-edu: 0.50\n      mine: 0.10"))
    [change] = compare("main", root=repo).recipes[0].changes
    assert (change.key, change.before, change.data) == ("sources.mine", "–", True)
    assert change.after == "domain web, hub a/b, text text, tokens 50,000,000,000"
    commit(repo)
    [back] = compare("HEAD", "HEAD~1", repo).recipes[0].changes
    assert (back.before, back.after) == (change.after, change.before)


def test_what_follows_invisibly_in_later_stages_is_left_out(repo: Path) -> None:
    edit(repo / STAGE3, ("0.74", "0.739"), ("share: 0.10", "share: 0.101"))
    diff = compare("main", root=repo)
    families = [k.name for k in diff.recipes[0].knock_on if k.kind == "family" and k.stage == "long-context"]
    rows = [row for row in to_markdown(diff).splitlines() if "long-context | family" in row]
    assert len(rows) < len(families) and all("→" in row for row in rows)
    assert "family dclm" not in shown(diff)


# ---------------------------------------------------------------- revisions


def test_a_revision_is_read_from_git_not_from_the_files(more_math: Path) -> None:
    commit(more_math)
    assert not compare("HEAD", root=more_math).recipes
    assert compare("HEAD~1", "HEAD", more_math).recipes == compare("HEAD~1", root=more_math).recipes != ()
    git(more_math, "tag", "v1", "HEAD~1")
    assert compare("v1", "main", more_math).before == "v1"
    assert git(more_math, "status", "--short") == ""


def test_a_repository_that_holds_more_than_recipes(tree: Path, tmp_path: Path) -> None:
    below = tmp_path / "all" / "training"
    for folder in ("stages", "mixtures"):
        shutil.copytree(tree / folder, below / folder)
    git(below.parent, "init", "-q", "-b", "main")
    commit(below.parent)
    edit(below / STAGE2, ("0.75", "0.70"), ("0.05", "0.10"))
    assert [recipe.name for recipe in compare("main", root=below).recipes] == ["smollm2-1.7b"]


def test_recipes_come_and_go(repo: Path) -> None:
    shutil.rmtree(repo / "stages" / "smollm2-360m")
    diff = compare("main", root=repo)
    assert [(r.name, r.status) for r in diff.recipes] == [("smollm2-360m", "removed")] and diff.changes_data
    commit(repo)
    diff = compare("HEAD", "HEAD~1", repo)
    [recipe] = diff.recipes
    assert (recipe.name, recipe.status, recipe.stages[0].before) == ("smollm2-360m", "new", None)
    assert "smollm2-360m stage1 (new), 4.09T tokens" in shown(diff) and "– →" not in shown(diff)


@pytest.mark.parametrize("side", ["before", "after"])
def test_a_broken_recipe_is_named_with_its_side_and_revision(repo: Path, side: str) -> None:
    edit(repo / STAGE2, ("0.75", "0.70"))
    commit(repo)
    edit(repo / "mixtures/smollm2-135m/stage1.yaml", ("0.80", "0.79"), ("0.12", "0.13"))
    commit(repo)
    git(repo, "tag", "good", "HEAD~2")
    diff = compare(*(("HEAD", "good") if side == "before" else ("good", "HEAD")), root=repo)
    [problem] = diff.problems
    assert problem.side == side
    assert problem.text.startswith(f"HEAD:{STAGE2}:2: domains: the domains' shares sum to 0.95. Change one by +0.05")
    assert [recipe.name for recipe in diff.recipes] == ["smollm2-135m"]
    assert f"{side}: HEAD:{STAGE2}:2" in shown(diff) and problem.text in to_markdown(diff)


def test_a_missing_file_of_a_revision_shows_no_temporary_folder(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (repo / STAGE2).unlink()
    commit(repo)
    [problem] = compare("HEAD~1", "HEAD", repo).problems
    monkeypatch.chdir(repo)
    codes = [CliRunner().invoke(app, ["diff", *words]).exit_code for words in (("HEAD~1", "HEAD"), ("HEAD", "HEAD~1"))]
    assert codes == [2, 0], "what is wrong after the change is an error, what it mends is none"
    assert problem.text.startswith(f"HEAD:{STAGE2}: there is no such file. HEAD:mixtures/smollm2-1.7b holds:")


@pytest.mark.parametrize("word", ["--output=hacked", "-h", "HEAD; touch hacked", "main:stages/x", "@{-1}"])
def test_odd_revisions_are_refused_and_do_nothing(repo: Path, word: str) -> None:
    with pytest.raises(UserError, match="no git revision"):
        compare(word, root=repo)
    assert not (repo / "hacked").exists()


def test_a_revision_with_a_link_to_the_outside_is_refused(repo: Path) -> None:
    (repo / STAGE2).unlink()
    (repo / STAGE2).symlink_to("/etc/hostname")
    commit(repo)
    with pytest.raises(UserError, match="HEAD holds an unsafe path"):
        compare("HEAD", root=repo)


def test_outside_git_and_without_recipes(tree: Path, repo: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    bare = tmp_path_factory.mktemp("plain")
    shutil.copytree(tree / "stages", bare / "stages")
    (bare / "mixtures").mkdir()
    with pytest.raises(UserError, match="git rev-parse failed"):
        compare("main", root=bare)
    git(repo, "checkout", "-q", "--orphan", "empty")
    git(repo, "rm", "-rq", "--cached", "mixtures")
    git(repo, "commit", "-qm", "no mixtures")
    with pytest.raises(UserError, match="the revision empty lacks stages/ or mixtures/"):
        compare("empty", root=repo)


# ---------------------------------------------------------------- stages and files


def test_two_stages_have_no_knock_on(tree: Path) -> None:
    diff = compare("smollm2-1.7b:stage2", "smollm2-1.7b:stage3", tree)
    [recipe] = diff.recipes
    [stage] = recipe.stages
    assert (recipe.knock_on, recipe.limits, stage.before, stage.after) == ((), (), "stage2", "stage3")
    owm = line(stage, "open-web-math")
    assert owm.points == -3 and owm.before and round(owm.before.epochs_run or 0, 2) == 8.33
    starcoder, jupyter = line(stage, "starcoderdata"), line(stage, "jupyter")
    assert starcoder.after is None and starcoder.points == -20
    assert jupyter.before is None and jupyter.after and jupyter.after.epochs is None
    assert compare("smollm2-1.7b:stage2", "smollm2-1.7b:stage2", tree).recipes == ()


def test_a_proposal_stands_in_its_stages_place(tree: Path, tmp_path: Path) -> None:
    proposal = tmp_path / "proposals" / "stage3.yaml"
    proposal.parent.mkdir()
    shutil.copy(tree / STAGE3, proposal)
    edit(proposal, ("0.74", "0.70"), ("0.16", "0.20"))
    by_stage = compare("smollm2-1.7b:stage3", str(proposal), tree).recipes
    assert by_stage and {k.stage for k in by_stage[0].knock_on} == {"stage4", "long-context"}
    assert by_stage == compare(str(tree / STAGE3), str(proposal), tree).recipes
    between = compare("smollm2-1.7b:stage2", str(proposal), tree)
    assert between.recipes[0].stages[0].after == "stage3", "the file's name says whose it is"
    renamed = proposal.rename(proposal.with_name("other.yaml"))
    assert by_stage == compare("smollm2-1.7b:stage3", str(renamed), tree).recipes
    back = compare(str(renamed), "smollm2-1.7b:stage3", tree).recipes
    assert [line.points for line in by_stage[0].stages[0].of("domain")] == [-4, 4, 0]
    assert [line.points for line in back[0].stages[0].of("domain")] == [4, -4, 0]
    edit(tree / STAGE3, ("0.74", "0.70"), ("0.16", "0.20"))
    same = compare(str(tree / STAGE3), str(renamed), tree)
    assert summary(same) == "no change in the data"
    assert (
        mixture_diff_markdown(load("smollm2-1.7b", tree), "stage3", RECIPE.stage("stage3").mixture).count("stack-edu")
        > 2
    )


def test_a_file_of_no_known_stage_is_compared_by_shares_only(tree: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "stage3.yaml", tmp_path / "new.yaml"
    for path in (one, two):
        shutil.copy(tree / STAGE3, path)
    edit(two, ("0.74", "0.70"), ("0.16", "0.20"))
    diff = compare(str(one), str(two), tree)
    [recipe] = diff.recipes
    domain = line(recipe.stages[0], "code")
    assert domain.points == 4 and domain.after == Use(Fraction(1, 5)) and recipe.knock_on == ()
    assert "shares only" in diff.notes[0] and "shares only" in shown(diff) and "tokens read so far" not in shown(diff)
    placed = compare(str(one), str(two), tree, recipe="smollm2-1.7b")
    assert placed.recipes == compare("smollm2-1.7b:stage3", str(two), tree).recipes and placed.notes == ()


def test_the_frozen_recipe_of_a_run_is_known_by_its_place(tree: Path, tmp_path: Path) -> None:
    frozen = tmp_path / "runs" / "x" / "recipe"
    for folder in ("stages", "mixtures"):
        shutil.copytree(tree / folder, frozen / folder)
    edit(tree / STAGE2, ("0.75", "0.70"), ("0.05", "0.10"))
    diff = compare(str(frozen / STAGE2), str(tree / STAGE2), tree)
    assert diff.recipes[0].stages[0].moved == 5 and "both counted in smollm2-1.7b" in diff.notes[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("HAED", None), "there is no git revision 'HAED'. Name one of main, HEAD"),
        (("maim", None), "no git revision 'maim'. Write main"),
        (("smollm2-1.7b", None), "name one of its stages, such as smollm2-1.7b:stage1"),
        ((STAGE2, None), "nothing to compare mixtures/smollm2-1.7b/stage2.yaml with"),
        (("main", STAGE2), "main is neither a file nor a stage"),
        (("smollm2-1.7b:stage2", "main"), "main is neither a file nor a stage"),
        (("smollm2-1.7:stage1", "smollm2-1.7b:stage1"), "did you mean smollm2-1.7b"),
        (("smollm2-1.7b:stage9", "smollm2-1.7b:stage1"), "no stage 'stage9'. Name one of stage1, stage2"),
        (("mixtures/smollm2-1.7b/stage9.yaml", "smollm2-1.7b:stage1"), "there is no such file"),
        (("stages/smollm2-1.7b/stage2.yaml", STAGE2), "write smollm2-1.7b:stage2"),
    ],
)
def test_wrong_words(repo: Path, words: tuple[str, str | None], message: str) -> None:
    with pytest.raises(UserError) as error:
        compare(*words, root=repo)
    assert message.lower() in str(error.value).lower()


# ---------------------------------------------------------------- how it is shown


def everything(repo: Path) -> Diff:
    """A diff with long names, every kind of line and wide figures."""
    shutil.copy(repo / STAGE3, repo / "mixtures/smollm2-1.7b/stage4.yaml")
    edit(repo / "stages/smollm2-1.7b/recipe.yaml", ("peak_lr: 5.0e-4", "peak_lr: 6.0e-4"))
    return compare("main", root=repo)


def test_tables_fit_100_columns_and_cut_nothing(repo: Path) -> None:
    text = shown(everything(repo))
    assert max(map(len, text.splitlines())) <= 100 and "…" not in text
    for part in ("family infimm-webmath", "infiwebmath-3plus", "4.53! →     –", "long-context", "schedule.peak_lr"):
        assert part in text
    rows = [row for row in text.splitlines() if row.startswith((" fineweb-edu ", " stack-edu ", " cosmopedia-v2 "))]
    assert len({row.index("→") for row in rows}) == 1, "before and after stand under one another"


def test_colours_and_bars(more_math: Path) -> None:
    console = Console(width=100, file=io.StringIO(), force_terminal=True, color_system="standard")
    show_diff(compare("main", root=more_math), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[32m+5.00" in text and "\x1b[31m−5.00" in text, "green up, red down"
    assert "\x1b[33m 8.33! → 16.7!" in text or "\x1b[33m8.33! → 16.7!" in text, "yellow above the limit"
    assert "\x1b[31m░░" in text and "\x1b[32m██" in text


def test_the_smallest_change_is_seen_in_its_bar(repo: Path) -> None:
    edit(repo / STAGE2, ("0.75", "0.749"), ("0.05", "0.051"))
    assert re.search(r" web +█+░ +75\.00 → 74\.90 +−0\.10 ", shown(compare("main", root=repo)))


def test_markdown_has_a_summary_first_then_tables(more_math: Path) -> None:
    lines = to_markdown(compare("main", root=more_math)).splitlines()
    assert lines[0] == (
        "`main` → `working tree`: **smollm2-1.7b: stage2 moves 5.00 points, "
        "knock-on in stage3, stage4, long-context, 1 warning**"
    )
    assert "#### smollm2-1.7b stage2, 2T tokens" in lines
    assert "| **math** | **5.00 → 10.00** | **+5.00** | **100B → 200B** | **–** | **–** | **–** |" in lines
    assert "| open-web-math | 5.00 → 10.00 | +5.00 | 100B → 200B | 8.33 → 16.7 | 8.33! → 16.7! | 82 → 65 |" in lines
    assert "| stage3 | open-web-math | 100B → 200B | 11.7! → 20.0! |" in lines
    assert "- ⚠️ open-web-math: 11.73 → 20.07 epochs over the run, further above 4.5" in lines
    widths = {row.count("|") for row in lines if row.startswith("|")}
    assert widths == {5, 8}


def test_names_from_files_cannot_break_the_markdown() -> None:
    name = "a|b<script>@someone`**x\n# y"
    use = Use(Fraction(1))
    stage = StageDiff("s", "s", 1, 1, (Line("domain", name, name, None, use), Line("source", name, name, None, use)))
    text = to_markdown(Diff("x`\n# y", "b", (RecipeDiff(name, stages=(stage,)),)))
    assert "<script>" not in text and "@someone" not in text and "\n# y" not in text
    assert all(row.count("|") == 8 for row in text.splitlines() if row.startswith("|"))
    assert name.split("\n")[0] not in shown(Diff("a", "b", ())) and "[red]" not in shown(Diff("[red]", "b")).replace(
        "[red] →", ""
    )


def test_json_has_stable_keys(repo: Path) -> None:
    diff = everything(repo)
    data = json.loads(json.dumps(diff.as_dict()))
    assert list(data) == ["before", "after", "recipes", "notes", "problems", "changes_data"]
    [recipe] = data["recipes"]
    assert list(recipe) == [
        *("name", "status", "stages", "knock_on", "limits", "changes", "reordered", "changes_data"),
    ]
    [stage] = recipe["stages"]
    assert list(stage) == ["before", "after", "tokens_before", "tokens_after", "lines", "moved"]
    assert list(stage["lines"][0]) == ["kind", "name", "domain", "before", "after", "points"]
    assert list(stage["lines"][0]["after"]) == ["share", "tokens", "epochs", "epochs_run", "worth"]
    assert (stage["lines"][0]["after"]["share"], stage["lines"][0]["points"]) == ("37/50", 16.0)
    assert list(recipe["limits"][0]) == ["kind", "text"] and list(recipe["changes"][0]) == [
        "key",
        "before",
        "after",
        "data",
    ]
    assert list(recipe["knock_on"][0]) == [
        *("stage", "kind", "name", "offset_before", "offset_after", "epochs_run_before", "epochs_run_after"),
    ]


def test_neither_torch_nor_nanotron(repo: Path) -> None:
    code = (
        "import sys; from recipes.diff.sides import compare; from recipes.diff.show import to_markdown\n"
        "to_markdown(compare('main'))\n"
        "heavy = {'torch', 'nanotron', 'transformers', 'datatrove', 'lighteval', 'pyarrow', 'matplotlib'}\n"
        "print(heavy & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=repo,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "set()\n", done.stderr
