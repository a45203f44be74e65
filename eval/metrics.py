"""Metrics with fixed names. lighteval's own factories put their parameters, even memory addresses, into the name."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from lighteval.metrics.dynamic_metrics import MultilingualExtractiveMatchMetric
from lighteval.metrics.metrics_sample import ExactMatches, LoglikelihoodAcc, SampleLevelComputation
from lighteval.metrics.normalizations import LogProbCharNorm, gsm8k_normalizer, harness_triviaqa_normalizer
from lighteval.metrics.utils.extractive_match_utils import ExprExtractionConfig, LatexExtractionConfig
from lighteval.metrics.utils.metric_utils import Metric
from lighteval.models.model_output import ModelResponse
from lighteval.tasks.requests import Doc, SamplingMethod
from lighteval.utils.utils import as_list

from eval.sandbox import CODE_BYTES, CODE_SECONDS, run_code

STOPS = ("\nclass", "\ndef", "\n#", "\n@", "\nif", "\nprint", "\nassert", "\n```")
"""Where a completed function ends: the next thing at the margin."""


class BitsPerByte(SampleLevelComputation):  # type: ignore[misc]
    """-log2 of the right answer's probability, over its UTF-8 bytes without the space before it; lower is better."""

    def compute(self, doc: Doc, model_response: ModelResponse, **_: Any) -> float:
        """The mean over the right answers, if there are several."""
        bits = [
            -model_response.logprobs[i] / math.log(2) / len(doc.choices[i].removeprefix(" ").encode())
            for i in as_list(doc.gold_index)
        ]
        return float(np.mean(bits))


class PassAtOne(SampleLevelComputation):  # type: ignore[misc]
    """Whether the function that the model has completed passes its unit tests, in a process of its own."""

    def compute(self, doc: Doc, model_response: ModelResponse, **_: Any) -> float:
        """1 or 0. Raises PermissionError if running code was not allowed."""
        if os.environ.get("EVAL_ALLOW_CODE") != "1":
            raise PermissionError("code that a model has written runs only with --allow-code")
        completion = model_response.text[0]
        ends = [match.start() for stop in STOPS if (match := re.search(re.escape(stop), completion))]
        program = doc.query + completion[: min(ends, default=len(completion))] + "\n" + doc.specific["test"]
        return float(run_code(program, seconds=CODE_SECONDS, memory=CODE_BYTES).passed)


def _metric(name: str, compute: Any, category: SamplingMethod, higher: bool = True) -> Metric:
    return Metric(
        metric_name=name, higher_is_better=higher, category=category, sample_level_fn=compute, corpus_level_fn=np.mean
    )


def _exact(normal: Callable[[str], str]) -> ExactMatches:
    return ExactMatches(normalize_gold=normal, normalize_pred=normal, strip_strings=True)


ACC = _metric("acc", LoglikelihoodAcc(), SamplingMethod.LOGPROBS)
ACC_NORM = _metric(
    "acc_norm", LoglikelihoodAcc(LogProbCharNorm("norm", ignore_first_space=True)), SamplingMethod.LOGPROBS
)
BITS_PER_BYTE = _metric("bits_per_byte", BitsPerByte(), SamplingMethod.LOGPROBS, higher=False)
QEM = _metric("qem", _exact(gsm8k_normalizer), SamplingMethod.GENERATIVE)
EXACT_MATCH = _metric("exact_match", _exact(harness_triviaqa_normalizer), SamplingMethod.GENERATIVE)
_BOXED = LatexExtractionConfig(boxed_match_priority=0)
NUMBER_MATCH = _metric(
    "extractive_match",
    MultilingualExtractiveMatchMetric(
        gold_extraction_target=(ExprExtractionConfig(),), pred_extraction_target=(ExprExtractionConfig(), _BOXED),
        precision=5,
    ),
    SamplingMethod.GENERATIVE,
)  # fmt: skip
LATEX_MATCH = _metric(
    "extractive_match",
    MultilingualExtractiveMatchMetric(
        gold_extraction_target=(_BOXED,), pred_extraction_target=(_BOXED, ExprExtractionConfig())
    ),
    SamplingMethod.GENERATIVE,
)
PASS_AT_ONE = _metric("pass@1", PassAtOne(), SamplingMethod.GENERATIVE)
CHOICE = (ACC, ACC_NORM, BITS_PER_BYTE)
