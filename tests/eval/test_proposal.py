"""The proposal: what it writes from published scores, what it refuses, what it says."""

from __future__ import annotations

import json
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from eval.feedback import PARTS
from eval.policy import Policy, load_policy
from eval.proposal import Proposal, find_scorecards, mixture_of, propose, show_proposal, write
from eval.proposal_text import card_hash
from eval.published import load_published
from eval.scorecard import Result, Score, Scorecard
from eval.soundness import items_needed
from recipes.errors import UserError
from recipes.files import append_line
from recipes.loader import load, load_mixture
from recipes.plan import make_plan
from recipes.recipe import Domain, Mixture, Recipe
from recipes.run import Run

RECIPE = load("smollm2-1.7b", Path(__file__).resolve().parents[2])
POLICY = load_policy()
SMALL = load_policy(Path(__file__).resolve().parents[2] / "eval" / "policy-rehearsal.yaml")
PUBLISHED = {p.stage: p.scores for p in load_published()}
TASKS = "0123"


def card(stage: str, policy: Policy = POLICY, recipe: Recipe = RECIPE, **scores: Score) -> Scorecard:
    """The published scores after a stage, and what is given."""
    found = {"commonsenseqa": Score(42, 1.4, 1221), **PUBLISHED[stage], **scores}
    results = {
        name: Result(goal.metric, {goal.metric: found[name]}, {}, 0, None, 1, f"local:{name}")
        for name, goal in policy.benchmarks.items()
    }
    step = recipe.stage(stage).end_step
    return Scorecard(recipe.name, stage, step, step * recipe.tokens_per_step, "between-stages", 42, "c0", TASKS,
                     results, {"lighteval": "0.13.0"}, "2026-01-01T00:00:00+00:00")  # fmt: skip


def with_result(old: Scorecard, name: str, **changes: Any) -> Scorecard:
    return replace(old, benchmarks={**old.benchmarks, name: replace(old.benchmarks[name], **changes)})


CARDS = [card("stage1"), card("stage2"), card("stage3")]


def proposed(after: str = "stage2", cards: list[Scorecard] | None = None, **more: Any) -> Proposal:
    return propose(RECIPE, after, CARDS if cards is None else cards, POLICY, **more)


# ------------------------------------------------------------------ what is proposed
@pytest.mark.parametrize(("after", "web", "code", "math"), [
    ("stage1", 79.8, 17.5, 2.7), ("stage2", 74.9, 16.1, 9.0), ("stage3", 64.7, 21.7, 13.5),
])  # fmt: skip
def test_published_scores_give_the_design_s_figures(after: str, web: float, code: float, math: float) -> None:
    """Within 0.1 points; after stage 3 synthetic's 1.6, which the independent figures lack, comes from the others."""
    found = {d.name: float(100 * d.proposed) for d in proposed(after).domains}
    slack = 0.11 + found.get("synthetic", 0)
    assert found["web"] == pytest.approx(web, abs=slack)
    assert found["code"] == pytest.approx(code, abs=0.11 if after != "stage3" else 0.35)
    assert found["math"] == pytest.approx(math, abs=0.11)
    assert sum(found.values()) == pytest.approx(100)


def test_the_caps_are_what_repetition_leaves() -> None:
    caps = {d.name: d.cap for d in proposed().domains}
    read = make_plan(RECIPE).stage("stage2").sources[-1].tokens
    tokens = make_plan(RECIPE).stage("stage3").tokens
    assert caps["code"].room == {"stack-edu": int(4.5 * 125e9) - 240 * 10**9}
    assert caps["code"].unknown == ("jupyter",)
    assert caps["code"].kept == {"stack-edu": 240 * 10**9}
    assert caps["math"].limit == 180e9 / tokens  # of infimm-webmath; open-web-math has been read more than 4.5 times
    assert read > 4.5 * 12e9
    assert caps["math"].room["open-web-math"] == 0
    last = {d.name: d.cap for d in proposed("stage3").domains}
    assert last["code"].kept == {}  # the reserve is for this stage
    assert last["math"].limit == pytest.approx((4.5 * (9.6e9 + 20.5e9)) / make_plan(RECIPE).stage("stage4").tokens)


def test_the_last_stage_may_move_further() -> None:
    assert proposed("stage2").tau == 0.15
    assert proposed("stage3").tau == 0.20


def test_order_and_shares_inside_the_domains_stay() -> None:
    found = proposed("stage3")
    existing = RECIPE.stage("stage4").mixture
    assert list(found.mixture.domains) == list(existing.domains)
    for name, domain in found.mixture.domains.items():
        assert list(domain.sources.items()) == list(existing.domains[name].sources.items())


def test_scores_at_their_targets_change_nothing() -> None:
    at = {name: Score(goal.target, 0.5, 100) for name, goal in POLICY.benchmarks.items()}
    found = proposed("stage2", [card("stage2", **at)])
    assert {d.name: d.proposed for d in found.domains if d.name != "code"} == {
        "web": Fraction("0.789"),
        "math": Fraction("0.05"),
    }
    assert next(d.bound_by for d in found.domains if d.name == "code") == "cap"  # Stack-Edu's reserve


# ------------------------------------------------------------------ which scorecards
def test_the_card_of_the_last_step_counts_and_another_is_said() -> None:
    older = replace(CARDS[1], step=CARDS[1].step - 5)
    assert proposed(cards=[older, *CARDS]).cards == (CARDS[1], CARDS[0])
    oldest = replace(CARDS[1], step=CARDS[1].step - 9)
    found = proposed(cards=[CARDS[0], oldest, older])
    assert found.cards == (older, CARDS[0])
    assert any("is not of stage2's last step" in text for text in found.warnings)


def test_the_card_of_the_fuller_suite_counts() -> None:
    quick = replace(CARDS[1], suite="quick", benchmarks={"math": CARDS[1].benchmarks["math"]}, date="2027")
    assert proposed(cards=[quick, *CARDS]).cards[0] == CARDS[1]
    fewer = {n: replace(r, scores={m: replace(s, items=20) for m, s in r.scores.items()})
             for n, r in CARDS[1].benchmarks.items()}  # fmt: skip
    later = replace(quick, benchmarks=fewer)
    assert proposed(cards=[later, *CARDS]).cards[0] == CARDS[1], "a coarser one, although it is newer"


def test_the_stage_before_is_read_in_the_same_suite() -> None:
    final = replace(CARDS[0], suite="final-base", date="2027")
    assert proposed(cards=[final, *CARDS]).cards == (CARDS[1], CARDS[0])


def test_without_the_stage_before_two_rules_are_left_out_and_that_is_said() -> None:
    found = proposed(cards=[CARDS[1]])
    assert any("no scorecard of stage1" in text for text in found.warnings)
    assert found.advice.stalled == {}
    assert set(proposed().advice.stalled) == {"starcoderdata"}
    assert not any("no scorecard" in text for text in proposed("stage1").warnings)  # there is none to have


def test_scorecards_are_found_and_edited_ones_refused(tmp_path: Path) -> None:
    for one in CARDS:
        one.save(tmp_path / f"{one.name}.json")
    assert find_scorecards(RECIPE, tmp_path) == CARDS
    path = tmp_path / f"{CARDS[1].name}.json"
    assert card_hash(CARDS[1]) == json.loads(path.read_text())["hash"]
    path.write_text(path.read_text().replace("9.15", "29.15"))
    with pytest.raises(UserError, match="changed after it was written"):
        find_scorecards(RECIPE, tmp_path)
    with pytest.raises(UserError, match="smol eval"):
        find_scorecards(RECIPE, tmp_path / "none")


# ------------------------------------------------------------------ what is refused
def refused(told: str, cards: list[Scorecard] | None = None, after: str = "stage2", **more: Any) -> str:
    with pytest.raises(UserError) as error:
        proposed(after, cards, **more)
    assert told in str(error.value)
    return str(error.value)


def test_another_recipe_or_other_tasks_are_refused() -> None:
    refused("is of smollm2-360m, not of smollm2-1.7b", [*CARDS, replace(CARDS[2], recipe="smollm2-360m")])
    refused("other tasks", task_file="4567")
    refused("differ in their task_file", [replace(CARDS[0], task_file="4567"), CARDS[1]])
    refused("differ in their suite", [replace(CARDS[0], suite="quick"), CARDS[1]])
    refused("differ in their seed", [replace(CARDS[0], seed=43), CARDS[1]])
    assert proposed(task_file=TASKS)


@pytest.mark.parametrize("change", [{"version": 2}, {"shots": 5}, {"limit": 100}, {"data": "local:other"}])
def test_other_questions_than_the_stage_before_are_refused(change: dict[str, Any]) -> None:
    refused(f"differ in their {next(iter(change))}", [with_result(CARDS[0], "math", **change), CARDS[1]])


def test_all_missing_benchmarks_are_named() -> None:
    lacking = {n: r for n, r in CARDS[1].benchmarks.items() if n not in ("math", "humaneval")}
    refused("stage2-3814697 lacks math, humaneval", [replace(CARDS[1], benchmarks=lacking)])
    refused("stage1-2861022 lacks math, humaneval", [replace(CARDS[0], benchmarks=lacking), CARDS[1]])
    other = with_result(CARDS[1], "gsm8k", scores={"extractive_match": Score(4, 1, 9)}, metric="extractive_match")
    refused("gsm8k has no qem, only extractive_match", [other])
    refused("no finite score", [with_result(CARDS[1], "gsm8k", scores={"qem": Score(4, float("nan"), 1)})])


def test_a_limit_that_hides_the_deficit_is_refused_with_the_items_it_takes() -> None:
    def limited(value: float, stderr: float, limit: int | None, items: int = 200) -> list[Scorecard]:
        scores = {"acc_norm": Score(value, stderr, items)}
        return [with_result(CARDS[1], "hellaswag", scores=scores, limit=limit)]

    text = refused("only 200 items were asked", limited(64.4, 3.4, 200))
    assert "2 from its target with a standard error of 3.4" in text
    assert "Ask 578 or more" in text
    assert proposed(cards=limited(64.4, 3.4, None))  # the whole set: nothing to be done
    assert proposed(cards=limited(67.4, 3.4, 200))  # the target is reached
    assert proposed(cards=limited(60.4, 3.4, 200))  # 6 is more than 3.4
    assert proposed(cards=limited(66.3, 3.4, 200))  # not even all 10,042 would tell 0.1
    assert items_needed(Score(0, 3.4, 200), 2) == 578
    assert "--limit" in text


def test_a_stage_that_has_been_trained_is_refused(tiny_run: Run) -> None:
    recipe, tiny = tiny_run.recipe, [small("stage1", tiny_run.recipe)]
    runs = [tiny_run.folder, tiny_run.folder / "data"]
    assert propose(recipe, "stage1", tiny, SMALL, runs=runs)
    tiny_run.stage_folder("stage2").mkdir()
    append_line(tiny_run.stage_folder("stage2") / "ledger.jsonl", {"step": 24})
    with pytest.raises(UserError, match="stage2 has been trained already"):
        propose(recipe, "stage1", tiny, SMALL, runs=runs)
    assert propose(RECIPE, "stage1", CARDS, POLICY, runs=runs)  # another recipe's run


@pytest.mark.parametrize(("after", "told"), [
    ("stage4", "is the last stage"), ("long-context", "is a branch"), ("stage9", "name one of"),
])  # fmt: skip
def test_a_stage_that_nothing_follows_is_refused(after: str, told: str) -> None:
    with pytest.raises(UserError, match=f"(?i){told}"):
        proposed(after)


def test_a_stage_without_scores_is_refused() -> None:
    refused("there is no scorecard of stage3", CARDS[:2], "stage3")
    refused("scorecards of: none", [])


def test_a_mixture_without_web_is_refused() -> None:
    policy = POLICY.model_copy(update={"web": "prose"})
    with pytest.raises(UserError, match="no domain 'prose'"):
        propose(RECIPE, "stage2", CARDS, policy)


# ------------------------------------------------------------------ what is written
@pytest.mark.parametrize("after", ["stage1", "stage2", "stage3"])
def test_the_file_is_a_valid_mixture_and_says_where_it_is_from(tmp_path: Path, after: str) -> None:
    found = proposed(after)
    mixture, reasons = write(found, tmp_path / "proposals", diff_markdown="| the | diff |")
    assert mixture.name == f"{found.stage}.yaml"
    assert reasons.name == f"{found.stage}.md"
    assert load_mixture(mixture, RECIPE.sources) == found.mixture
    assert make_plan(RECIPE.with_mixture(found.stage, load_mixture(mixture, RECIPE.sources)))
    text, why = mixture.read_text(), reasons.read_text()
    for one in found.cards:
        assert card_hash(one) in text
        assert card_hash(one) in why
    assert "to be approved by a person" in text
    assert POLICY.digest in text
    assert POLICY.digest in why
    assert (
        f"`mixtures/smollm2-1.7b/{found.stage}.yaml` as it is, not against {after} as above.\n\n| the | diff |\n" in why
    )


def test_the_reasons_hold_scores_rules_and_what_was_not_moved(tmp_path: Path) -> None:
    why = write(proposed("stage2"), tmp_path)[1].read_text()
    assert "| code | 20 | 16.1 | -3.9 | 322B | 16.1 | 0.754 | cap |" in why
    assert "| humaneval | code | 9.15 | 2.25 | 37.2 | 0.754 | +12.5 | -0.5 |" in why
    assert "there are left 322.5B tokens of stack-edu (240B more are kept for a later stage)" in why
    assert "- code: pulled by 0.754, yet not raised: bound by: cap" in why
    assert "- winogrande: 0.97 from its target, 0.7 standard errors: noise" in why
    assert (
        "- starcoderdata: was raised, and its benchmarks did not gain (humaneval z -0.5); the next stage has none of it"
        in why
    )
    assert "- open-web-math would come to 11.33 epochs, above 4.5: the cap holds for all of math" in why
    assert "- code: size not known of jupyter: the cap counts the others" in why
    assert "## Diff" not in why
    assert "the family infimm-webmath would come to 6.28 epochs" in write(proposed("stage3"), tmp_path)[1].read_text()


def test_the_tables_fit_a_hundred_columns() -> None:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for after in ("stage1", "stage2", "stage3"):
        show_proposal(proposed(after), console)
    text = console.export_text()
    assert "stage3 after stage2" in text
    tables = [line for line in text.splitlines() if not line.startswith(("not moved", "warning"))]
    assert max(len(line.rstrip()) for line in tables) <= 100
    assert "…" not in text


def test_a_pattern_that_repeats_too_late_is_rounded_and_said() -> None:
    thirds = {f"s{i}": Fraction(n, 7123) for i, n in enumerate((1, 3000, 4122))}
    existing = Mixture(domains={"web": Domain(share=Fraction("0.7123"), sources=thirds),
                                "code": Domain(share=Fraction("0.2877"), sources={"c": Fraction(1)})})  # fmt: skip
    found, said = mixture_of({"web": Fraction("0.691"), "code": Fraction("0.309")}, existing)
    assert "repeat only after" in said[0]
    assert sum(found.shares.values()) == 1
    assert all(share > 0 and (share * PARTS**2).denominator == 1 for share in found.shares.values())
    for name, share in thirds.items():
        assert abs(found.domains["web"].sources[name] - share) <= Fraction(2, PARTS)
    exact = mixture_of({"web": Fraction("0.7123"), "code": Fraction("0.2877")}, existing)
    assert exact == (existing, [])


# ------------------------------------------------------------------ the rehearsal's loop
def small(stage: str, recipe: Recipe, **bits: float) -> Scorecard:
    scores = {name: Score(bits.get(name.replace("-", "_"), 2.5), 0.05, 200) for name in SMALL.benchmarks}
    return card(stage, SMALL, recipe, **scores)


def test_the_loop_closes_on_a_scaled_recipe(tiny_run: Run) -> None:
    """Propose, adopt, propose: with bits a byte, and tokens a thousand-millionth."""
    run = tiny_run
    assert run.recipe.scale == Fraction(1, 10**9)
    cards = []
    for stage, following in (("stage1", "stage2"), ("stage2", "stage3"), ("stage3", "stage4")):
        cards.append(small(stage, run.recipe, word_problems=3.0, docs_choice=2.0 if stage == "stage1" else 1.7))
        found = propose(run.recipe, stage, cards, SMALL, runs=[run.folder])
        assert found.tv <= found.tau + 4 / PARTS
        run = run.adopt(following, write(found, run.folder / "proposals")[0])
        assert run.recipe.stage(following).mixture == found.mixture
    assert all(e.deficit > 0 for e in found.advice.evidence if e.name == "word-problems")
    assert [d.name for d in found.domains] == ["web", "code", "math", "synthetic"]
    kept = propose(run.recipe, "stage2", cards[:2], SMALL).domains[1].cap.kept
    assert kept == {"stack-edu": 240}


def test_exact_decimals_are_written() -> None:
    shares = [domain.share for domain in proposed("stage3").mixture.domains.values()]
    assert all(Decimal(s.numerator) / s.denominator == Decimal(str(float(s))) for s in shares)
