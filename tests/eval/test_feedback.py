"""The policy's rules one by one, and what holds for any scores."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from eval import feedback as f
from eval.policy import Goal, Policy, Repetition, Reserve, load_policy
from eval.published import load_published
from eval.scorecard import Score
from recipes.errors import UserError
from recipes.recipe import Domain, Mixture, Source

POLICY = load_policy()
SMALL = load_policy(Path(f.__file__).parent / "policy-rehearsal.yaml")
UP = Goal(metric="acc", target=60, chance=20, domains={"web": 1})
DOWN = Goal(metric="bits_per_byte", target=1.6, chance=3.6, domains={"web": 1})
DOMAINS = ("web", "code", "math", "synthetic")


def mixture(**shares: str) -> Mixture:
    """Two sources a domain, a and b, half each; a share of 0 leaves the domain out."""
    parts = {g: Fraction(share) for g, share in shares.items() if Fraction(share)}
    half = Fraction(1, 2)
    return Mixture(domains={g: Domain(share=x, sources={f"{g}-a": half, f"{g}-b": half}) for g, x in parts.items()})


# ------------------------------------------------------------------ rule 1
@pytest.mark.parametrize(("value", "stderr", "expected"), [
    (20, 1, 1), (10, 1, 1), (40, 1, 0.5), (60, 1, 0), (75, 1, 0), (58, 1, 0.05), (58, 1.01, 0), (58.5, 1, 0),
])  # fmt: skip
def test_deficit_where_higher_is_better(value: float, stderr: float, expected: float) -> None:
    assert f.deficit(Score(value, stderr, 100), UP, 2) == pytest.approx(expected)


@pytest.mark.parametrize(("value", "stderr", "expected"), [
    (3.6, 0.1, 1), (5, 0.1, 1), (2.6, 0.1, 0.5), (1.6, 0.1, 0), (1.2, 0.1, 0), (1.8, 0.099, 0.1), (1.8, 0.101, 0),
])  # fmt: skip
def test_deficit_where_lower_is_better(value: float, stderr: float, expected: float) -> None:
    assert f.deficit(Score(value, stderr, 100), DOWN, 2) == pytest.approx(expected)


def test_a_score_without_error_counts_in_full_and_at_the_target_not_at_all() -> None:
    assert f.deficit(Score(59, 0, 1), UP, 2) == pytest.approx(0.025)
    assert f.deficit(Score(60, 0, 1), UP, 2) == 0


# ------------------------------------------------------------------ rule 2
def evidence(deficits: dict[str, float], goals: dict[str, Goal]) -> list[f.Evidence]:
    return [f.Evidence(n, goals[n], Score(0, 1, 1), d, 9.0, None) for n, d in deficits.items()]


def test_pull_is_the_mean_deficit_by_weight_and_affinity() -> None:
    both = Goal(metric="acc", target=60, chance=20, weight=3, domains={"math": 0.5, "code": 1})
    alone = Goal(metric="acc", target=60, chance=20, domains={"math": 1})
    found = f.pulls(evidence({"both": 0.8, "alone": 0.2}, {"both": both, "alone": alone}), DOMAINS)
    assert found == pytest.approx({"web": 0, "code": 0.8, "math": (3 * 0.5 * 0.8 + 0.2) / 2.5, "synthetic": 0})


@given(st.permutations(list(POLICY.benchmarks)), st.lists(st.floats(0, 1), min_size=9, max_size=9))
def test_the_order_of_benchmarks_changes_nothing(order: list[str], deficits: list[float]) -> None:
    by_name = dict(zip(POLICY.benchmarks, deficits, strict=True))
    shuffled = f.pulls(evidence({n: by_name[n] for n in order}, POLICY.benchmarks), DOMAINS)
    assert shuffled == f.pulls(evidence(by_name, POLICY.benchmarks), DOMAINS)


# ------------------------------------------------------------------ rule 3
def test_a_domain_that_is_new_starts_from_the_floor_and_one_that_nobody_allows_does_not() -> None:
    start = f.start_shares({"web": 0.99, "code": 0.01}, ["web", "math"], 0.02)
    assert start == {"web": 0.99, "code": 0.01, "math": 0.02}
    assert f.start_shares({"web": 0.99, "code": 0.01}, ["web", "code"], 0.02) == {"web": 0.99, "code": 0.02}


def test_a_pull_of_one_grows_by_e_against_none() -> None:
    x = f.tilt({"web": 0.8, "math": 0.2}, {"web": 0.0, "math": 1.0}, 1.0)
    assert x["math"] / x["web"] == pytest.approx(math.e / 4)


parts = st.lists(st.integers(1, 1000), min_size=4, max_size=4)
pull4 = st.lists(st.floats(0, 1), min_size=4, max_size=4)


def shares_of(weights: list[int]) -> f.Shares:
    return {g: n / sum(weights) for g, n in zip(DOMAINS, weights, strict=True)}


@given(parts, pull4, st.floats(0.01, 0.3), st.floats(0.1, 1))
def test_the_step_is_within_tau_and_the_largest_that_is(w: list[int], u: list[float], tau: float, most: float) -> None:
    now, pull = shares_of(w), dict(zip(DOMAINS, u, strict=True))
    eta, x = f.step(now, now, pull, tau, most)
    assert math.fsum(x.values()) == pytest.approx(1)
    assert f.total_variation(x, now) <= tau + 1e-9
    assert eta == most or f.total_variation(f.tilt(now, pull, eta + 1e-6), now) > tau - 1e-9


@given(parts, pull4, st.sampled_from(DOMAINS), st.floats(0.01, 1), st.floats(0.01, 0.3))
def test_more_deficit_never_lowers_a_domain(w: list[int], u: list[float], g: str, more: float, tau: float) -> None:
    now, pull = shares_of(w), dict(zip(DOMAINS, u, strict=True))
    higher = pull | {g: min(1.0, pull[g] + more)}
    assert f.step(now, now, higher, tau, 1)[1][g] >= f.step(now, now, pull, tau, 1)[1][g] - 1e-9


# ------------------------------------------------------------------ rule 4
def source(tokens: int | None, family: str | None = None) -> Source:
    return Source(domain="math", hub=None, text="text", tokens=tokens, family=family)


SOURCES = {"big": source(400, "kin"), "part": source(100, "kin"), "own": source(50), "unknown": source(None)}


def cap(names: list[str], *, families: str = "apart", epochs: float = 4, **tokens: dict[str, int]) -> f.Cap:
    rule = Repetition.model_validate({"epochs": epochs, "families": families})
    return f.repetition_cap(rule, SOURCES, names, tokens.get("consumed", {}), tokens.get("reserved", {}), 1000)


def test_a_cap_is_what_is_left_of_each_source() -> None:
    assert cap(["own"], consumed={"own": 40}).limit == 0.16
    assert cap(["own"], consumed={"own": 500}).limit == 0
    assert cap(["own", "part"], consumed={"own": 500, "part": 100}).limit == 0.3
    assert cap(["own", "part"], consumed={"part": 100}, reserved={"part": 250}).room == {"own": 200, "part": 50}


def test_sources_of_a_family_count_together_and_never_twice() -> None:
    assert cap(["big", "part"], consumed={"part": 300, "big": 300}).limit == 1.0
    assert cap(["big", "part"], reserved={"kin": 1000}).room == {"big+part": 600}


def test_what_was_read_of_a_family_before_counts_only_if_the_policy_says_so() -> None:
    read = {"big": 1500}
    assert cap(["part"], consumed=read).limit == 0.4
    assert cap(["part"], consumed=read, families="once").limit == 0.1
    assert cap(["part"], consumed={"part": 380}, families="once").limit == 0.02  # its own size still binds


def test_a_source_of_unknown_size_puts_no_cap_and_adds_none() -> None:
    assert cap(["unknown"]) == f.Cap(None, {}, ("unknown",))
    assert cap(["own", "unknown"]) == f.Cap(0.2, {"own": 200}, ("unknown",))


def test_what_overflows_goes_to_web() -> None:
    x = f.overflow({"web": 0.6, "code": 0.3, "math": 0.1}, {"code": 0.2, "math": 0.2, "web": 0.1}, "web")
    assert x == pytest.approx({"web": 0.7, "code": 0.2, "math": 0.1})


def test_web_keeps_half_and_the_others_give_in_proportion() -> None:
    x = f.keep_web({"web": 0.4, "code": 0.4, "math": 0.2}, "web", 0.5)
    assert x == pytest.approx({"web": 0.5, "code": 1 / 3, "math": 1 / 6})
    assert f.keep_web({"web": 0.6, "code": 0.4}, "web", 0.5) == {"web": 0.6, "code": 0.4}


# ------------------------------------------------------------------ rules 5 and 6
def moved(**z: float) -> list[f.Evidence]:
    names = {"web": "docs-choice", "math": "word-problems", "code": "code-choice"}
    goals = SMALL.benchmarks
    return [f.Evidence(names[g], goals[names[g]], Score(2, 0.1, 1), 0.5, 9, value) for g, value in z.items()]


BEFORE, NOW = mixture(web="0.9", code="0.1"), mixture(web="0.7", code="0.2", math="0.1")


@pytest.mark.parametrize(("code", "math", "stalled"), [
    (1.9, 5, {"code-a", "code-b"}), (2.1, 5, set()), (2.1, 0, {"math-a", "math-b"}),
    (-7, 5, {"code-a", "code-b"}),
])  # fmt: skip
def test_what_was_raised_without_a_gain_is_stalled(code: float, math: float, stalled: set[str]) -> None:
    found = f.stalled(SMALL, moved(web=0, code=code, math=math), BEFORE, NOW)
    assert set(found) == stalled
    assert f.stalled(SMALL, moved(web=0, code=0, math=0), NOW, NOW) == {}


def test_one_benchmark_that_gains_is_enough() -> None:
    goals = {n: Goal(metric="acc", target=50, chance=0, domains={"code": 1}) for n in ("code-choice", "other")}
    policy = SMALL.model_copy(update={"benchmarks": goals})
    two = [f.Evidence(n, g, Score(2, 0.1, 1), 0.5, 9, z) for (n, g), z in zip(goals.items(), (0, 3), strict=True)]
    assert f.stalled(policy, two, BEFORE, NOW) == {}


def test_a_stalled_source_is_not_raised_by_raising_its_domain() -> None:
    third = Fraction(1, 3)
    following = Mixture(domains={
        "web": Domain(share=Fraction(1, 2), sources={"web-a": Fraction(1)}),
        "code": Domain(share=Fraction(1, 4), sources={"code-a": third, "new": 1 - third}),
        "math": Domain(share=Fraction(1, 4), sources={"math-a": Fraction(1)}),
    })  # fmt: skip
    limits = f.stall_limits(["code-a", "code-b", "math-a"], NOW, following)
    assert limits == pytest.approx({"code": 0.3, "math": 0.1})  # math-a has all of math now: held, but not lowered
    assert f.stall_limits([], NOW, following) == {}


@pytest.mark.parametrize(("web", "code", "fell"), [(-2.1, 0, ["docs-choice"]), (-1.9, 0, []), (0, -9, [])])
def test_a_fall_of_a_domain_that_was_not_raised_is_a_regression(web: float, code: float, fell: list[str]) -> None:
    assert f.regressed(SMALL, moved(web=web, code=code, math=0), BEFORE, NOW) == fell
    assert f.regressed(SMALL, moved(web=web, code=code), NOW, NOW) == []


# ------------------------------------------------------------------ all together
def situation(
    now: Mixture, following: Mixture, scores: dict[str, float], stderr: float = 0.01, **more: object
) -> f.Situation:
    found = {n: Score(scores.get(n, g.target), stderr, 200) for n, g in SMALL.benchmarks.items()}
    caps = {g: f.Cap(None, {}, ()) for g in following.domains}
    return f.Situation(found, now, following, **{"caps": caps, "tau": 0.15, **more})  # type: ignore[arg-type]


def past(now: Mixture, **scores: float) -> f.Past:
    names = {"web": "docs-choice", "math": "word-problems", "code": "code-choice"}
    return f.Past({names[g]: Score(value, 0.01, 200) for g, value in scores.items()}, now)


def test_every_rule_that_binds_is_named() -> None:
    poor = {"word-problems": 2.5, "code-choice": 2.5}
    assert f.advise(SMALL, situation(NOW, NOW, poor, tau=0.5)).bound_by == dict.fromkeys(
        ("web", "code", "math"), "none"
    )
    assert set(f.advise(SMALL, situation(NOW, NOW, poor, tau=0.05)).bound_by.values()) == {"step (τ)"}
    limit = {"web": f.Cap(None, {}, ()), "code": f.Cap(0.22, {}, ()), "math": f.Cap(0.5, {}, ())}
    capped = f.advise(SMALL, situation(NOW, NOW, poor, tau=0.5, caps=limit))
    assert capped.bound_by == {"web": "overflow", "code": "cap", "math": "none"}
    assert capped.shares["code"] == Fraction(22, 100)
    assert f.advise(SMALL, situation(BEFORE, NOW, {})).bound_by["math"] == "floor"
    low = mixture(web="0.5", code="0.4", math="0.1")
    webby = f.advise(SMALL, situation(low, low, {"word-problems": 3.6, "code-choice": 3.6}))
    assert webby.shares["web"] == Fraction(1, 2)
    assert webby.bound_by["code"] == "web ≥ 0.50"


def test_a_stall_holds_its_domain_and_the_rest_goes_to_web() -> None:
    poor = {"word-problems": 3.0, "code-choice": 3.0}
    found = f.advise(SMALL, situation(NOW, NOW, poor, past=past(BEFORE, web=1.6, code=3.0, math=3.5)))
    assert set(found.stalled) == {"code-a", "code-b"}
    assert found.shares["code"] == NOW.domains["code"].share
    assert found.bound_by["code"] == "stall"
    assert found.shares["math"] > NOW.domains["math"].share


def test_a_regression_halves_the_step() -> None:
    poor = {"word-problems": 3.0, "code-choice": 3.0}
    full = f.advise(SMALL, situation(NOW, NOW, poor, past=past(BEFORE, web=1.6, code=3.5, math=3.5)))
    half = f.advise(SMALL, situation(NOW, NOW, poor, past=past(BEFORE, web=1.5, code=3.5, math=3.5)))
    assert half.regressed == ("docs-choice",)
    for g in full.shares:
        now = NOW.domains[g].share
        assert abs(2 * (half.shares[g] - now) - (full.shares[g] - now)) <= Fraction(3, 1000)
        assert half.bound_by[g] == "regression"


def test_a_domain_that_the_next_stage_has_not_is_left_out() -> None:
    found = f.advise(SMALL, situation(NOW, BEFORE, {}))
    assert found.shares == {"web": Fraction(8, 10), "code": Fraction(2, 10)}
    assert found.bound_by["math"] == "cap"


share_sets = st.tuples(st.integers(500, 900), st.integers(0, 200), st.integers(0, 150)).map(
    lambda n: mixture(web=f"{1000 - n[1] - n[2] - 50}/1000", code=f"{n[1]}/1000", math=f"{n[2]}/1000", synthetic="0.05")
)
values = st.fixed_dictionaries({n: st.floats(0.3, 4) for n in SMALL.benchmarks})
limit3 = st.lists(st.none() | st.floats(0, 0.5), min_size=3, max_size=3)


@given(share_sets, values, limit3, st.floats(0, 0.3))
def test_laws_of_any_proposal(now: Mixture, scores: dict[str, float], limits: list[float | None], tau: float) -> None:
    following = mixture(web="0.55", code="0.2", math="0.2", synthetic="0.05")
    caps = {g: f.Cap(x, {}, ()) for g, x in zip(("code", "math", "synthetic"), limits, strict=True)}
    found = f.advise(SMALL, situation(now, following, scores, caps=caps, tau=tau))
    assert sum(found.shares.values()) == 1
    assert found.shares["web"] >= Fraction(1, 2)
    assert all(0 < share <= 1 and (share * f.PARTS).denominator == 1 for share in found.shares.values())
    for g, limit in caps.items():
        assert limit.limit is None or found.shares.get(g, 0) <= limit.limit
    before = {g: d.share for g, d in now.domains.items()}
    if all(c.limit is None or c.limit >= max(before.get(g, 0), 0.02) for g, c in caps.items()):
        floors = 0.02 * sum(before.get(g, 0) < 0.02 for g in following.domains)
        assert f.total_variation(found.shares, before) <= max(tau, floors) + 4 / f.PARTS


@given(share_sets, st.floats(0.01, 0.3))
def test_no_deficit_no_change(now: Mixture, tau: float) -> None:
    assume(all(d.share >= Fraction(2, 100) for d in now.domains.values()))
    found = f.advise(SMALL, situation(now, now, {}, tau=tau))
    assert found.shares == {g: d.share for g, d in now.domains.items()}
    assert set(found.bound_by.values()) == {"none"}


def test_shares_finer_than_the_parts_stay_when_nothing_pulls() -> None:
    fine = mixture(web="7123/10000", code="2877/10000")
    assert f.advise(SMALL, situation(fine, fine, {})).shares["web"] == Fraction(7123, 10000)


@given(parts, st.integers(0, 3), st.floats(0, 1))
def test_rounding_is_exact_and_close(w: list[int], i: int, limit: float) -> None:
    x = shares_of(w)
    g = DOMAINS[i]
    limits = {} if g == "web" else {g: max(limit, x[g])}
    found = f.rounded(x, limits, "web", 0.0)
    assert sum(found.values()) == 1
    assert all(found.get(d, 0) <= limits.get(d, 1) for d in DOMAINS)
    assert all(abs(found.get(d, 0) - x[d]) < 2 / f.PARTS for d in DOMAINS)


# ------------------------------------------------------------------ the policy's file
def test_targets_are_the_best_peers() -> None:
    peers = [p.scores for p in load_published() if p.stage is None]
    assert len(peers) == 2
    assert {n: g.target for n, g in POLICY.benchmarks.items()} == {
        n: max(p[n].value for p in peers) for n in POLICY.benchmarks
    }
    assert not {"mmlu-mc", "mmlu-cloze", "mmlu-pro"} & set(POLICY.benchmarks)


def test_published_errors_are_binomial_and_unknown_without_items() -> None:
    published = {p.name: p.scores for p in load_published()}
    stage1 = published["paper stage1"]
    assert stage1["humaneval"].stderr == pytest.approx(100 * math.sqrt(0.1097 * 0.8903 / 164))
    assert stage1["arc"].stderr == pytest.approx(50 * math.sqrt(0.5995 * 0.4005 * (1 / 2376 + 1 / 1172)))
    assert math.isnan(published["Qwen2.5-1.5B"]["commonsenseqa"].stderr)


@pytest.mark.parametrize(("old", "new", "told"), [
    ("chance: 3.6, domains: {web: 1}", "chance: 1.6, domains: {web: 1}", "equals chance"),
    ("domains: {math: 1}", "domains: {math: 0}", "greater than 0"),
    ("domains: {math: 1}", "domains: {}", "at least 1"),
    ("domains: {web: 1}", "domains: {math: 1}", "no benchmark speaks about web"),
    ("floor:", "flor:", "Write 'floor'"),
    ("web_least: 0.50", "web_least: 50", "less than or equal to 1"),
    ("metric: bits_per_byte, target: 1.6", "metric: bits, target: 1.6", "bits_per_byte"),
    ("families: apart", "families: never", "'apart' or 'once'"),
])  # fmt: skip
def test_a_wrong_policy_is_refused_with_its_line(tmp_path: Path, old: str, new: str, told: str) -> None:
    text = (Path(f.__file__).parent / "policy-rehearsal.yaml").read_text(encoding="utf-8")
    assert old in text
    (tmp_path / "policy.yaml").write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(UserError, match=r"policy.yaml:[0-9]+") as error:
        load_policy(tmp_path / "policy.yaml")
    assert told in str(error.value)


def test_the_digest_follows_the_values_not_the_comments(tmp_path: Path) -> None:
    text = (Path(f.__file__).parent / "policy.yaml").read_text(encoding="utf-8")
    path = tmp_path / "p.yaml"
    path.write_text(text + "# more\n", encoding="utf-8")
    assert load_policy(path).digest == POLICY.digest
    path.write_text(text.replace("noise: 2", "noise: 3"), encoding="utf-8")
    assert load_policy(path).digest != POLICY.digest


def test_reserve_and_only() -> None:
    assert POLICY.repetition.reserves == {"stack-edu": Reserve(tokens=240 * 10**9, until="stage4")}
    assert list(POLICY.only(["math", "arc", "other"]).benchmarks) == ["arc", "math"]
    assert isinstance(POLICY, Policy)


def test_the_policy_needs_no_torch_and_answers_within_a_second() -> None:
    code = (
        "import sys, eval.feedback, eval.proposal, eval.backtest; assert not {'torch', 'nanotron'} & set(sys.modules)"
    )
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    assert time.perf_counter() - started < 5  # 0.5 s on a quiet machine; others may be busy
