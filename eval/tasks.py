"""The benchmarks for lighteval 0.13: a custom task module, made from eval/benchmarks.py.

`EVAL_DATA_ROOT` names the folder of local datasets; without it the Hub's are read, at pinned revisions.
Without shots the prompts are those of SmolLM2's public task file (text/evaluation/smollm2 of huggingface/smollm), but
for what docs/decisions.md lists; lighteval joins instruction, shots and query by blank lines.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from lighteval.metrics.utils.metric_utils import Metric
from lighteval.tasks.lighteval_task import LightevalTaskConfig
from lighteval.tasks.requests import Doc

from eval.benchmarks import DATASETS, lighteval_names, local_folder
from eval.metrics import (
    BITS_PER_BYTE,
    CHOICE,
    EXACT_MATCH,
    LATEX_MATCH,
    NUMBER_MATCH,
    PASS_AT_ONE,
    QEM,
    STOPS,
)

Row = dict[str, Any]
Prompt = Callable[[Row, str], Doc]


def cloze(query: str, options: list[str], gold: int, name: str) -> Doc:
    """The options themselves are scored as continuations, after one space."""
    return Doc(task_name=name, query=query.rstrip(), choices=[f" {option}" for option in options], gold_index=gold)


def letters(question: str, options: list[str], gold: int, name: str, topic: str, space: str = " ") -> Doc:
    """The options stand in the question, and their letters are scored."""
    header = f"The following are multiple choice questions (with answers) about {topic.replace('_', ' ')}."
    listed = "".join(f"{letter}. {option}\n" for letter, option in zip(ascii_uppercase, options, strict=False))
    choices = [space + letter for letter in ascii_uppercase[: len(options)]]
    query = f"{header}\n\n{question}\n{listed}Answer:"
    return Doc(task_name=name, query=query, choices=choices, gold_index=gold, instruction=header)


def mmlu_cloze(row: Row, name: str) -> Doc:
    """MMLU by the answers' texts."""
    header = f"The following are questions about {row['subject'].replace('_', ' ')}."
    return cloze(f"{header}\nQuestion: {row['question']}\nAnswer:", row["choices"], int(row["answer"]), name)


def mmlu_mc(row: Row, name: str) -> Doc:
    """MMLU by letters, as in the paper's Table 8."""
    return letters(row["question"], row["choices"], int(row["answer"]), name, row["subject"])


def mmlu_pro(row: Row, name: str) -> Doc:
    """Up to ten options, by letter; the public task file has no space before it."""
    return letters(row["question"], row["options"], int(row["answer_index"]), name, row["category"], space="")


def hellaswag(row: Row, name: str) -> Doc:
    """What happens next."""
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return cloze(_plain(context), [_plain(ending) for ending in row["endings"]], int(row["label"]), name)


def _plain(text: str) -> str:
    """Without the marks that WikiHow's pages left in HellaSwag, such as [title] and [step]."""
    return re.sub(r"\[.*?\]", "", text.replace(" [title]", ". ")).replace("  ", " ")


def answer_key(question: str, form: str = "{}") -> Prompt:
    """A dataset with `choices.text`, `choices.label` and `answerKey`; the column `question` goes into `form`."""

    def prompt(row: Row, name: str) -> Doc:
        options = row["choices"]
        gold = options["label"].index(row["answerKey"])
        return cloze(form.format(row[question]), options["text"], gold, name)

    return prompt


def piqa(row: Row, name: str) -> Doc:
    """How to reach a goal."""
    query = f"Question: {row['goal']}\nAnswer:"
    return cloze(query, [row["sol1"], row["sol2"]], int(row["label"]), name)


def winogrande(row: Row, name: str) -> Doc:
    """The sentence from the gap on, with either option in it."""
    before, _, after = row["sentence"].partition("_")
    options = [f"{row[option]} {after.strip()}" for option in ("option1", "option2")]
    return cloze(before, options, int(row["answer"]) - 1, name)


def question_answer(question: str, answer: str) -> Prompt:
    """A worked answer to be written; `question` and `answer` are columns."""

    def prompt(row: Row, name: str) -> Doc:
        query = f"Question: {row[question]}\nAnswer:"
        return Doc(task_name=name, query=query, choices=[f" {row[answer]}"], gold_index=0)

    return prompt


def word_problem(row: Row, name: str) -> Doc:
    """The rehearsal's problems, whose steps begin on a line of their own."""
    query = f"Question: {row['question']}\nAnswer:"
    return Doc(task_name=name, query=query, choices=[f"\n{row['answer']}"], gold_index=0)


def triviaqa(row: Row, name: str) -> Doc:
    """No context; every alias is right."""
    aliases = list(dict.fromkeys([row["answer"]["value"], *row["answer"]["aliases"]]))
    query = f"Question: {row['question']}\nAnswer:"
    return Doc(task_name=name, query=query, choices=aliases, gold_index=list(range(len(aliases))))


def humaneval(row: Row, name: str) -> Doc:
    """A function to be completed from the end of its docstring, and the program that tests it."""
    test = f"{row['test']}\ncheck({row['entry_point']})\n"
    solution = f"\n{row['canonical_solution']}"
    return Doc(task_name=name, query=row["prompt"].strip(), choices=[solution], gold_index=0, specific={"test": test})


def choice(row: Row, name: str) -> Doc:
    """The rehearsal's multiple choice: what follows a text."""
    return cloze(row["context"], row["choices"], int(row["label"]), name)


def code_choice(row: Row, name: str) -> Doc:
    """What follows some lines of code: the line's break and indentation are scored with it."""
    query = row["context"].rstrip()
    between = row["context"][len(query) :]
    choices = [between + line for line in row["choices"]]
    return Doc(task_name=name, query=query, choices=choices, gold_index=int(row["label"]))


Definition = tuple[Prompt, tuple[Metric, ...], int, tuple[str, ...]]
"""The prompt, the metrics, tokens to generate at most, and what ends an answer."""
DEFINITIONS: dict[str, Definition] = {
    "mmlu-mc": (mmlu_mc, CHOICE, 1, ()),
    "mmlu-cloze": (mmlu_cloze, CHOICE, 1, ()),
    "mmlu-pro": (mmlu_pro, CHOICE, 1, ()),
    "gsm8k": (question_answer("question", "answer"), (QEM, NUMBER_MATCH, BITS_PER_BYTE), 256, ("Question:",)),
    "math": (question_answer("problem", "solution"), (LATEX_MATCH, BITS_PER_BYTE), 1024, ("Question:",)),
    "hellaswag": (hellaswag, CHOICE, 1, ()),
    "arc": (answer_key("question", "Question: {}\nAnswer:"), CHOICE, 1, ()),
    "piqa": (piqa, CHOICE, 1, ()),
    "winogrande": (winogrande, CHOICE, 1, ()),
    "openbookqa": (answer_key("question_stem"), CHOICE, 1, ()),
    "commonsenseqa": (answer_key("question"), CHOICE, 1, ()),
    "triviaqa": (triviaqa, (EXACT_MATCH,), 20, ("Question",)),
    "humaneval": (humaneval, (PASS_AT_ONE, BITS_PER_BYTE), 512, STOPS),
    "docs-choice": (choice, CHOICE, 1, ()),
    "code-choice": (code_choice, CHOICE, 1, ()),
    "word-problems": (word_problem, (QEM, NUMBER_MATCH, BITS_PER_BYTE), 96, ("Question:",)),
}


def config(benchmark: str, name: str, data_root: Path | None) -> LightevalTaskConfig:
    """lighteval's configuration of one subtask."""
    dataset = DATASETS[benchmark]
    prompt, metrics, tokens, stops = DEFINITIONS[benchmark]
    subset = dict(dataset.subtasks).get(name.partition(":")[2], dataset.subset)
    splits = [dataset.split, *([dataset.shots_split] if dataset.shots_split else [])]
    local = None if data_root is None else str(local_folder(name, data_root))
    return LightevalTaskConfig(
        name=name, prompt_function=prompt, hf_repo=local or str(dataset.hub), hf_subset=subset,
        hf_revision=None if local else dataset.revision, hf_avail_splits=splits, evaluation_splits=[dataset.split],
        few_shots_split=dataset.shots_split, few_shots_select="sequential", metrics=list(metrics),
        generation_size=tokens, stop_sequence=list(stops), version=dataset.version,
    )  # fmt: skip


def tasks_of(benchmark: str, data_root: Path | None) -> list[LightevalTaskConfig]:
    """A benchmark's subtasks, in a fixed order."""
    return [config(benchmark, name, data_root) for name in lighteval_names(benchmark, data_root)]


_ROOT = Path(os.environ["EVAL_DATA_ROOT"]) if os.environ.get("EVAL_DATA_ROOT") else None
_ONLY = os.environ.get("EVAL_BENCHMARK")
TASKS_TABLE = [task for name in DATASETS if name == _ONLY for task in tasks_of(name, _ROOT)]
