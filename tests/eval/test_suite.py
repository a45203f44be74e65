"""Suites: what they say, what they extend, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from eval.benchmarks import DATASETS
from eval.feedback import POLICY, load_policy
from eval.suite import load_suite, suite_names
from recipes.errors import UserError


def test_every_suite_names_benchmarks_there_are() -> None:
    assert suite_names() == ["between-stages", "final-base", "quick", "rehearsal"]
    for name in suite_names():
        assert set(load_suite(name).benchmarks) <= set(DATASETS)
    assert set(load_suite("final-base").benchmarks) | set(load_suite("rehearsal").benchmarks) == set(DATASETS)


def test_shots_and_items_are_the_published_ones() -> None:
    suite = load_suite("final-base").benchmarks
    assert {name: b.shots for name, b in suite.items() if b.shots} == {"gsm8k": 5, "math": 4}
    items = yaml.safe_load(POLICY.with_name("published.yaml").read_text())["items"]
    assert {name: b.items for name, b in suite.items() if name in items} == {n: sum(i) for n, i in items.items()}
    assert {n for n, b in suite.items() if b.chance == 50} == {"piqa", "winogrande"}
    assert load_suite("quick").benchmarks["gsm8k"].limit == 200


@pytest.mark.parametrize(
    ("suite", "policy"), [("between-stages", POLICY), ("rehearsal", POLICY.with_name("policy-rehearsal.yaml"))]
)
def test_the_policy_reads_what_the_suite_measures(suite: str, policy: Path) -> None:
    measured, wanted = load_suite(suite).benchmarks, load_policy(policy).benchmarks
    assert set(wanted) <= set(measured)
    for name, target in wanted.items():
        assert (target.metric, target.chance) == (measured[name].metric, measured[name].chance)
        assert set(target.domains) == set(measured[name].domains)


def _suite(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


def test_a_limit_fills_in_where_a_benchmark_has_none(tmp_path: Path) -> None:
    suite = load_suite(_suite(tmp_path, "extends: final-base\nlimit: 20\nonly: [gsm8k, arc]\n"))
    assert {name: b.limit for name, b in suite.benchmarks.items()} == {"gsm8k": 20, "arc": 20}
    assert suite.benchmarks["gsm8k"].shots == 5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("extends: final-base\nonly: [gsm9k]\n", "there is no benchmark 'gsm9k'"),
        ("limit: 3\n", "the suite has no benchmarks"),
        ("extends: finl-base\n", "id you mean final-base"),
        ("extends: final-base\nlimit: 0\n", "limit"),
        ("extends: final-base\nlimits: 1\n", "limits"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said.replace("(", "[(]")):
        load_suite(_suite(tmp_path, text))
