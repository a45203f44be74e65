"""The real lighteval on a few rows of every benchmark, beside transformers alone, and its silent errors shut out."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eval.benchmarks import DATASETS
from eval.suite import load_suite
from tests.eval.fixtures import OPTIONS, datasets, write_datasets, write_model

ROOT = Path(__file__).resolve().parent.parent.parent
CHAT = "{% for m in messages %}<chat>{{ m.content }}</chat>{% endfor %}"
pytestmark = pytest.mark.slow


Started = subprocess.Popen[str]


def start_workers(file: Path, lists: list[list[str]], hash_seed: int) -> Started:
    """Starts workers that run one after the other in one process; `file` takes their arguments."""
    file.write_text(json.dumps(lists))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": str(hash_seed)}
    command = [sys.executable, "-m", "tests.eval.run_workers", str(file)]
    return subprocess.Popen(command, env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ended(process: Started) -> tuple[list[int], str]:
    """The workers' exit codes, and what they said."""
    out, said = process.communicate()
    assert process.returncode == 0, said
    return json.loads(out.splitlines()[-1]), said


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, models and every benchmark's result; `codes.json` and `said.txt` of the workers."""
    folder = tmp_path_factory.mktemp("workers")
    data = write_datasets(folder / "data")
    write_model(folder / "model")
    write_model(folder / "other", seed=1)
    write_model(folder / "chatty", chat_template=CHAT)
    write_model(folder / "broken", nan=True)

    def worker(out: str, benchmark: str, model: str = "model", *more: str) -> list[str]:
        return ["--model", str(folder / model), "--benchmark", benchmark, "--out", str(folder / f"{out}.json"),
                "--data-root", str(data), *more]  # fmt: skip

    shots = {"gsm8k": ["--shots", "5"], "math": ["--shots", "4"], "humaneval": ["--allow-code"]}
    runs = {name: worker(name, name, "model", *shots.get(name, [])) for name in DATASETS}
    runs["again"] = worker("again", "hellaswag")
    runs["drawn"] = worker("drawn", "gsm8k", "model", "--shots", "5", "--limit", "3")
    runs["drawn-again"] = worker("drawn-again", "gsm8k", "model", "--shots", "5", "--limit", "3")
    runs["chatty"] = worker("chatty", "arc", "chatty")
    runs["nan"] = worker("nan", "hellaswag", "broken")
    runs["no-code"] = worker("no-code", "humaneval")
    (folder / "cases.json").write_text(json.dumps([case[:3] for case in READINGS]))
    runs["read"] = ["read", str(folder / "cases.json"), str(folder / "readings.json")]
    runs["definitions"] = ["definitions", str(folder / "definitions.json")]
    runs["cp"] = ["cp", str(folder / "other"), str(folder / "model")]  # new weights at the same path
    runs["new-weights"] = worker("new-weights", "hellaswag")
    other = start_workers(folder / "other-order.txt", [worker("other-order", "arc", "chatty")], hash_seed=2)
    codes, said = ended(start_workers(folder / "all.txt", list(runs.values()), hash_seed=1))
    assert ended(other)[0] == [0]
    (folder / "codes.json").write_text(json.dumps(dict(zip(runs, codes, strict=True))))
    (folder / "said.txt").write_text(said)
    write_model(folder / "model")
    return folder


def codes(folder: Path) -> dict[str, int]:
    return json.loads((folder / "codes.json").read_text())


def result(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.parametrize("name", list(DATASETS))
def test_every_benchmark_runs_and_gives_its_suites_metric(folder: Path, name: str) -> None:
    assert codes(folder)[name] == 0, (folder / "said.txt").read_text()[-3000:]
    subtasks = result(folder, name)["subtasks"]
    suite = load_suite("rehearsal" if DATASETS[name].hub is None else "final-base")
    metric = suite.benchmarks[name].metric
    rows = {key: len(value) for key, value in datasets().items()}
    place = DATASETS[name].folder or name
    for subtask, scores in subtasks.items():
        inside = f"{place}/{subtask}" if DATASETS[name].subtasks else place
        assert scores[metric]["items"] == rows[f"{inside}/{DATASETS[name].split}"]
        assert set(scores) <= {"acc", "acc_norm", "bits_per_byte", "extractive_match", "qem", "exact_match", "pass@1"}
    expected = {"arc": {"easy", "challenge"}, "mmlu-mc": {"anatomy", "virology"}, "mmlu-cloze": {"anatomy", "virology"}}
    assert set(subtasks) == expected.get(name, {"algebra"} if name == "math" else {name})


def log_probability(tokenizer: Any, model: Any, context: str, continuation: str) -> float:
    """By transformers alone: nats of a continuation after a context; bytes are tokens here."""
    import torch

    first = tokenizer(context, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([first + tokenizer(continuation, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        table = model(ids).logits[0].log_softmax(-1)
    return sum(table[i - 1, ids[0, i]].item() for i in range(len(first), ids.shape[1]))


def test_scores_are_those_of_transformers_alone(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    contexts = ["Cooking: A man cuts bread. He"] * 2 + ["How to cut: How to cut. Take a knife. Hold it."]
    endings = [*OPTIONS[:2], [f"Cut {option}.. Eat" for option in OPTIONS[2]]]
    right, right_by_character, bits = [], [], []
    for gold, (context, texts) in enumerate(zip(contexts, endings, strict=True)):
        nats = [log_probability(tokenizer, model, context, f" {text}") for text in texts]
        by_character = [n / len(text) for n, text in zip(nats, texts, strict=True)]
        right.append(nats.index(max(nats)) == gold)
        right_by_character.append(by_character.index(max(by_character)) == gold)
        bits.append(-nats[gold] / math.log(2) / len(texts[gold].encode()))
    found = result(folder, "hellaswag")["subtasks"]["hellaswag"]
    assert found["acc"]["value"] == pytest.approx(100 * sum(right) / 3)
    assert found["acc_norm"]["value"] == pytest.approx(100 * sum(right_by_character) / 3)
    assert found["bits_per_byte"]["value"] == pytest.approx(sum(bits) / 3, abs=1e-4)
    spread = math.sqrt(sum((b - sum(bits) / 3) ** 2 for b in bits) / 2 / 3)
    assert found["bits_per_byte"]["stderr"] == pytest.approx(spread, abs=1e-4)
    lines = [json.loads(line) for line in (folder / "hellaswag.items.jsonl").read_text().splitlines()]
    assert {line["id"]: line["scores"]["bits_per_byte"] for line in lines} == pytest.approx(
        {str(i): value for i, value in enumerate(bits)}, abs=1e-4
    )


def test_a_line_of_code_is_scored_with_its_break_and_indentation(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    lines = [f"\n    {options[i]}()" for i, options in enumerate(OPTIONS)]
    bits = [-log_probability(tokenizer, model, "def f():\n    x = 1", line) / math.log(2) for line in lines]
    mean = sum(b / len(line.encode()) for b, line in zip(bits, lines, strict=True)) / 3
    found = result(folder, "code-choice")["subtasks"]["code-choice"]["bits_per_byte"]["value"]
    assert found == pytest.approx(mean, abs=1e-4)


ASKED = {
    "mmlu-mc": "The following are multiple choice questions (with answers) about anatomy.\n\nWhat is 0?\n"
               "A. a red stone\nB. water\nC. nothing at all\nD. two birds\nAnswer:",
    "mmlu-cloze": "The following are questions about anatomy.\nQuestion: What is 0?\nAnswer:",
    "mmlu-pro": "The following are multiple choice questions (with answers) about computer science.\n\nWhich?\n"
                "A. a red stone\nB. water\nC. nothing at all\nD. two birds\nE. none\nAnswer:",
    "hellaswag": "Cooking: A man cuts bread. He",
    "arc": "Question: What is thing 0?\nAnswer:",
    "piqa": "Question: Open it\nAnswer:",
    "winogrande": "The cup did not fit the box because the",
    "openbookqa": "What is thing 0?",
    "commonsenseqa": "What is thing 0?",
    "triviaqa": "Question: Who is number 0?\nAnswer:",
    "humaneval": 'def add_0(x):\n    """One more than x."""',
    "docs-choice": "It was a dark and stormy",
    "code-choice": "def f():\n    x = 1",
    "word-problems": "Question: Ann has 40 coins and finds 41. How many?\nAnswer:",
}  # fmt: skip
"""What the model reads for each benchmark's first item, without shots: SmolLM2's public task file, text for text."""
RIGHT = {
    "mmlu-mc": " A", "mmlu-pro": "A", "piqa": " pull", "winogrande": " cup was too big.", "mmlu-cloze": " a red stone",
    "humaneval": "\n    return x + 1\n", "code-choice": "\n    a red stone()",
}  # fmt: skip


def first_item(folder: Path, name: str) -> dict[str, Any]:
    lines = [json.loads(line) for line in (folder / f"{name}.items.jsonl").read_text().splitlines()]
    return next(line for line in lines if line["id"] == "0")


@pytest.mark.parametrize("name", ASKED)
def test_what_the_model_is_asked(folder: Path, name: str) -> None:
    first = first_item(folder, name)
    assert first["asked"] == ASKED[name]
    assert first["right"][0] == RIGHT.get(name, first["right"][0])


def test_shots_are_the_first_of_their_split(folder: Path) -> None:
    rows = datasets()
    shots = "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in rows["gsm8k/train"][:5])
    assert first_item(folder, "gsm8k")["asked"] == f"{shots}Question: {rows['gsm8k/test'][0]['question']}\nAnswer:"
    worked = rows["math/algebra/train"][:4]
    shots = "".join(f"Question: {row['problem']}\nAnswer: {row['solution']}\n\n" for row in worked)
    assert first_item(folder, "math")["asked"] == f"{shots}Question: Compute $3 + 3$.\nAnswer:"


def test_how_long_answers_may_be_and_what_ends_them(folder: Path) -> None:
    found = json.loads((folder / "definitions.json").read_text())
    choice = {name for name, (_, _, metrics) in found.items() if metrics == ["acc", "acc_norm", "bits_per_byte"]}
    generative = {name: (tokens, stops[0]) for name, (tokens, stops, _) in found.items() if name not in choice}
    assert generative == {
        "gsm8k": (256, "Question:"), "math": (1024, "Question:"), "triviaqa": (20, "Question"),
        "humaneval": (512, "\nclass"), "word-problems": (96, "Question:"),
    }  # fmt: skip
    assert all("bits_per_byte" in metrics for name, (_, _, metrics) in found.items() if name != "triviaqa")


COINS = {"question": "How many?", "answer": "3 * 411 = <<3*411=1233>>1233, and 1.\n#### 1,234"}
HALF = {"problem": "Half?", "solution": "It is $\\boxed{\\frac{1}{2}}$."}
ANN = {"question": "Who?", "answer": {"value": "Ann Lee", "aliases": ["Anna", "The Queen"]}}
ADD = {"prompt": 'def add(x):\n    """One more."""\n', "canonical_solution": "", "entry_point": "add",
       "test": "def check(candidate):\n    assert candidate(2) == 3\n"}  # fmt: skip
GOAL = {"goal": "Go", "sol1": "a", "sol2": "b\u00e9c", "label": 1}
READINGS = [
    ("gsm8k", COINS, " It is 1234.\n#### 1234", {"qem": 1, "extractive_match": 1}),
    ("gsm8k", COINS, " So\n#### 1,234\n\nAnother has 7 coins.", {"qem": 1, "extractive_match": 0}),
    ("gsm8k", COINS, " The answer is 1234.", {"qem": 0, "extractive_match": 1}),
    ("gsm8k", COINS, " So\n#### 7\n#### 1234", {"qem": 0, "extractive_match": 1}),
    ("gsm8k", COINS, "", {"qem": 0, "extractive_match": 0}),
    ("math", HALF, " So $\\boxed{0.5}$.", {"extractive_match": 1}),
    ("math", HALF, " From 3 and 4, $\\boxed{\\frac12}$, not 7.", {"extractive_match": 1}),
    ("math", HALF, " It is $\\boxed{2}$, or 1/2.", {"extractive_match": 0}),
    ("triviaqa", ANN, " anna.\n", {"exact_match": 1}),
    ("triviaqa", ANN, " the queen", {"exact_match": 1}),
    ("triviaqa", ANN, " Ann", {"exact_match": 0}),
    ("humaneval", ADD, "\n    return x + 1\n\nprint(add('x'))\n", {"pass@1": 1}),
    ("humaneval", ADD, "\n    return x + 1\n@unknown\ndef more(): pass", {"pass@1": 1}),
    ("humaneval", ADD, "\n    return x\n", {"pass@1": 0}),
    ("piqa", GOAL, [-1.0, -2.7], {"acc": 0, "acc_norm": 1, "bits_per_byte": 2.7 / math.log(2) / 4}),
]


@pytest.mark.parametrize("n", range(len(READINGS)))
def test_how_answers_are_read(folder: Path, n: int) -> None:
    """qem takes the first number after ####, extractive_match the last number: run-on text after it misleads that.

    acc_norm divides by characters, bits_per_byte by bytes, both without the space before an option.
    """
    assert json.loads((folder / "readings.json").read_text())[n] == pytest.approx(READINGS[n][3])


def test_the_same_checkpoint_twice_gives_the_same_scores(folder: Path) -> None:
    assert result(folder, "again")["subtasks"] == result(folder, "hellaswag")["subtasks"]
    assert (folder / "drawn.items.jsonl").read_bytes() == (folder / "drawn-again.items.jsonl").read_bytes()
    assert result(folder, "drawn")["subtasks"]["gsm8k"]["qem"]["items"] == 3


def test_new_weights_at_the_same_path_give_new_scores(folder: Path) -> None:
    """lighteval's cache knows a model by its path."""
    before, after = (
        result(folder, n)["subtasks"]["hellaswag"]["bits_per_byte"]["value"] for n in ("again", "new-weights")
    )
    assert before != after


def test_a_chat_template_changes_nothing(folder: Path) -> None:
    """lighteval formats as a chat what it finds a template for."""
    assert result(folder, "chatty")["subtasks"] == result(folder, "arc")["subtasks"]


def test_a_model_that_yields_nan_is_refused(folder: Path) -> None:
    assert codes(folder)["nan"] == 2
    assert "error: hellaswag: the model yields NaN or infinity" in (folder / "said.txt").read_text()
    assert not (folder / "nan.json").exists()


def test_code_runs_only_when_it_is_allowed(folder: Path) -> None:
    assert codes(folder)["no-code"] != 0 and not (folder / "no-code.json").exists()
    assert codes(folder)["humaneval"] == 0


def test_the_order_of_tasks_does_not_depend_on_hashing(folder: Path) -> None:
    """lighteval orders tasks by a set of their names: each start of Python its own way."""
    assert result(folder, "other-order")["subtasks"] == result(folder, "chatty")["subtasks"]
    assert (folder / "other-order.items.jsonl").read_bytes() == (folder / "chatty.items.jsonl").read_bytes()
