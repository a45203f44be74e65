"""A few rows of every dataset, in its real columns, and a tiny model with a tokenizer of bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LETTERS = ["A", "B", "C", "D"]
OPTIONS = [
    ["a red stone", "water", "nothing at all", "two birds"],
    ["Paris", "the moon", "seven", "a long,\u2028cold night"],  # a line's end, but not of the file's
    ["iron", "a tree", "light", "the number nine"],
]


def _keyed(question: str) -> list[dict[str, Any]]:
    return [
        {"id": str(i), question: f"What is thing {i}?", "choices": {"text": options, "label": LETTERS},
         "answerKey": LETTERS[i]}
        for i, options in enumerate(OPTIONS)
    ]  # fmt: skip


def _gsm8k(first: int) -> list[dict[str, Any]]:
    return [
        {"question": f"Ann has {n} coins and finds {n + 1}. How many?",
         "answer": f"She has {n} + {n + 1} = <<{n}+{n + 1}={2 * n + 1}>>{2 * n + 1} coins.\n#### {2 * n + 1}"}
        for n in range(first, first + 6)
    ]  # fmt: skip


def _math(n: int) -> dict[str, Any]:
    return {"problem": f"Compute ${n} + {n}$.", "level": "Level 1", "type": "Algebra",
            "solution": f"We get $\\boxed{{{2 * n}}}$."}  # fmt: skip


def _humaneval() -> list[dict[str, Any]]:
    test = "def check(candidate):\n    assert candidate(2) == 3\n    assert candidate(0) == 1\n"
    return [
        {"task_id": f"HumanEval/{i}", "prompt": f'def add_{i}(x):\n    """One more than x."""\n',
         "canonical_solution": "    return x + 1\n", "test": test, "entry_point": f"add_{i}"}
        for i in range(2)
    ]  # fmt: skip


def datasets() -> dict[str, list[dict[str, Any]]]:
    """Rows by `<folder>/<split>`."""
    mmlu = [
        {"question": f"What is {i}?", "subject": "anatomy", "choices": o, "answer": i} for i, o in enumerate(OPTIONS)
    ]
    choice = [{"context": "It was a dark and stormy", "choices": o, "label": i} for i, o in enumerate(OPTIONS)]
    code = [
        {"context": "def f():\n    x = 1\n", "choices": [f"    {o}()" for o in options], "label": i}
        for i, options in enumerate(OPTIONS)
    ]
    swag = [
        {"ind": i, "activity_label": "Cooking", "ctx_a": "A man cuts bread.", "ctx_b": "he",
         "endings": options, "label": str(i)}
        for i, options in enumerate(OPTIONS[:2])
    ]  # fmt: skip
    swag.append(
        {"ind": 2, "activity_label": "How to cut", "ctx_a": "[header] How to cut [title] Take a knife. [step] Hold it.",
         "ctx_b": "", "endings": [f"Cut {o}. [title] Eat" for o in OPTIONS[2]], "label": "2"}
    )  # fmt: skip
    winogrande = [
        {"sentence": "The cup did not fit the box because the _ was too big.", "option1": "cup", "option2": "box",
         "answer": answer}
        for answer in ("1", "2", "1")
    ]  # fmt: skip
    trivia = [
        {"question": f"Who is number {i}?", "answer": {"value": "Ann", "aliases": ["Ann", "Anna"]}} for i in range(3)
    ]
    pro = [{"question": "Which?", "options": [*OPTIONS[i], "none"], "answer": "ABC"[i], "answer_index": i,
            "category": "computer science"} for i in range(3)]  # fmt: skip
    return {
        "mmlu/anatomy/test": mmlu, "mmlu/virology/test": mmlu, "mmlu-pro/test": pro,
        "gsm8k/test": _gsm8k(1), "gsm8k/train": _gsm8k(20),
        "math/algebra/test": [_math(n) for n in (3, 4)], "math/algebra/train": [_math(n) for n in range(10, 15)],
        "hellaswag/validation": swag, "arc/easy/test": _keyed("question"), "arc/challenge/test": _keyed("question"),
        "piqa/validation": [{"goal": "Open it", "sol1": "pull", "sol2": "wait for it", "label": i} for i in (0, 1, 1)],
        "winogrande/validation": winogrande, "openbookqa/test": _keyed("question_stem"),
        "commonsenseqa/validation": _keyed("question"), "triviaqa/validation": trivia, "humaneval/test": _humaneval(),
        "docs-choice/test": choice, "code-choice/test": code, "word-problems/test": _gsm8k(40),
    }  # fmt: skip


def write_datasets(root: Path) -> Path:
    """Writes them all below `root`, as JSON lines; returns it."""
    for name, rows in datasets().items():
        path = root / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return root


def write_model(folder: Path, seed: int = 0, chat_template: str | None = None, nan: bool = False) -> Path:
    """A random Llama of two layers in transformers' format; returns its folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocab = {token: i for i, token in enumerate(["<|endoftext|>", *sorted(alphabet)])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    begin = "<|endoftext|>"  # what a tokenizer may add, and SmolLM2 was not trained with
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    fast.chat_template = chat_template
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocab), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=0, eos_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if nan:
        model.model.norm.weight.data.fill_(float("nan"))
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder
