"""What a language model answers, beside what it should have answered: exact match, F1, ROUGE-L, BLEU, chrF, pass@1.

Each answer has its own figures, so that two models are compared on the same resamples of the same records (a paired bootstrap).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groundup.data.chat_tokens import parse
from groundup.data.tokenizers import Tokenizer
from groundup.metrics.streamed import FEW, percentile_interval, poisson_weights
from groundup.models.generation import Sampling, generate
from groundup.models.language import LanguageModel

MOST, ROWS = 100, 16  # answers that are compared; prompts that are answered at once
SECONDS = 20.0  # what the answers before training may take
SHORT = 5  # words of an answer that is right or wrong as a whole (a label, a number, a name)
RUN_SECONDS, RUN_BYTES = 10, 2**30  # what the code of an answer may use
RUNNER = f"""import sys
try:
    import resource
    for what, most in ((resource.RLIMIT_CPU, {RUN_SECONDS}), (resource.RLIMIT_AS, {RUN_BYTES}), (resource.RLIMIT_FSIZE, {2**20})):
        resource.setrlimit(what, (most, most))
except ImportError:
    pass
exec(compile(sys.stdin.read(), "answer", "exec"), {{"__name__": "__main__"}})
"""


# -- one answer ----------------------------------------------------------------------------------------------------------------
def words(text: str) -> list[str]:
    """Words, lower case; of Chinese, Japanese and Korean each character."""
    return re.findall(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]+",
                      unicodedata.normalize("NFKC", text).lower())  # fmt: skip


def exact_match(said: str, right: str) -> float:
    """Whether the words are the same; case and punctuation do not count."""
    return float(words(said) == words(right) if words(right) else said.strip() == right.strip())


def f1(said: str, right: str) -> float:
    """Harmonic mean of precision and recall over the words of both, as bags (Rajpurkar et al., SQuAD, arXiv 1606.05250, 6.1)."""
    a, b = words(said), words(right)
    same = sum((Counter(a) & Counter(b)).values())
    return 2 * same / (len(a) + len(b)) if same else float(a == b)


def rouge_l(said: str, right: str) -> float:
    """F-measure of the longest common subsequence of words (Lin, ROUGE, 2004, 3.1)."""
    a, b = words(said), words(right)
    same = _common(a, b)
    return 2 * same / (len(a) + len(b)) if same else float(a == b)


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the table as the bits of one number (Hyyrö, 2004)."""
    where: dict[str, int] = {}
    for i, word in enumerate(a):
        where[word] = where.get(word, 0) | 1 << i
    whole = row = (1 << len(a)) - 1
    for word in b:
        hit = row & where.get(word, 0)
        row = ((row + hit) | (row - hit)) & whole
    return len(a) - row.bit_count()


def _bleu_counts(said: str, right: str) -> list[float]:
    """What BLEU is computed from: matches and n-grams of each order, lengths. 10 numbers."""
    from sacrebleu.metrics.bleu import BLEU

    chinese = sum("\u3400" <= c <= "\u9fff" for c in right) > len(right) / 4
    found = BLEU(tokenize="zh" if chinese else "13a", effective_order=True).sentence_score(said, [right])
    return [*found.counts, *found.totals, found.sys_len, found.ref_len]


def _bleu(sums: NDArray[np.float64]) -> float:
    """BLEU of a whole set, 0 to 1 (Papineni et al., 2002; Post, arXiv 1804.08771)."""
    from sacrebleu.metrics.bleu import BLEU

    numbers = [round(n) for n in sums.tolist()]
    counts, totals, (said, right) = numbers[:4], numbers[4:8], numbers[8:]
    return float(BLEU.compute_bleu(counts, totals, said, right, smooth_method="exp").score) / 100


def _chrf(said: str, right: str) -> float:
    """Character n-gram F-score of one answer (Popović, 2015); a set's is the mean."""
    from sacrebleu.metrics.chrf import CHRF

    return float(CHRF().sentence_score(said, [right]).score) / 100


def passes(said: str, tests: str) -> float:
    """Whether the tests run through after the code of an answer (pass@1: Chen et al., arXiv 2107.03374, 2.1). It is run, in a process of its own with
    limits of time and memory, in an empty folder: limits, not a prison. Only where `evaluate.run_code` asks for it."""
    fenced = re.search(r"```(?:python|py)?\n(.*?)```", said, re.DOTALL)
    code = (fenced.group(1) if fenced else said) + "\n\n" + tests + "\n"

    with tempfile.TemporaryDirectory(prefix="groundup-answer-") as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", RUNNER], input=code.encode("utf-8", "replace"), cwd=folder, env={"PATH": os.defpath},
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=RUN_SECONDS + 2,
            )  # fmt: skip
        except (subprocess.TimeoutExpired, OSError):
            return 0.0
        return float(done.returncode == 0)


SCORES: dict[str, Callable[[str, str], Any]] = {
    "exact_match": exact_match,
    "f1": f1,
    "rouge_l": rouge_l,
    "bleu": _bleu_counts,
    "chrf": _chrf,
}


# -- a set of them -------------------------------------------------------------------------------------------------------------
@dataclass
class Question:
    """The turns before an answer, the answer that is right, and tests that code must pass."""

    messages: list[dict[str, Any]]
    right: str
    tools: list[Any] | None = None
    tests: str = ""

    @property
    def asked(self) -> str:
        return str(self.messages[-1]["content"])


def questions(texts: Sequence[str]) -> list[Question]:
    """The questions in documents of a corpus: conversations whose last turn is the assistant's."""
    found = []
    for text in texts:
        conversation = parse(text)
        messages = conversation.get("messages", [])
        if "answers" in conversation:  # a preference: the best one
            messages = [*messages, {"role": "assistant", "content": conversation["answers"][0]}]
        if len(messages) > 1 and messages[-1]["role"] == "assistant" and messages[-1]["content"].strip():
            found.append(Question(messages[:-1], messages[-1]["content"], conversation.get("tools"), conversation.get("tests", "")))
    return found


def fitting(asked: Sequence[Question], run_code: bool) -> list[str]:
    """The metrics that say something about answers of this kind."""
    if not asked:
        return []
    short = sum(len(words(q.right)) <= SHORT for q in asked) >= 0.9 * len(asked)
    return (["pass_at_1"] if run_code and all(q.tests for q in asked) else []) + (
        ["exact_match", "f1"] if short else ["rouge_l", "bleu", "chrf"]
    )


@dataclass
class Answers:
    """The answers of one model.

    Args:
        scores: metric -> [n], or [n, 10] for BLEU, whose value is no mean.
    """

    said: list[str] = field(default_factory=list)
    scores: dict[str, Any] = field(default_factory=dict)

    def values(self, weights: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        """Each metric under each row of weights [k, n]."""
        total = weights.sum(1)
        found = {}
        for name, scores in self.scores.items():
            sums = weights @ np.asarray(scores, dtype=np.float64)
            with np.errstate(invalid="ignore", divide="ignore"):
                found[name] = np.array([_bleu(row) for row in sums]) if name == "bleu" else sums / total
        return found


def answer(
    model: LanguageModel,
    tokenizer: Tokenizer,
    template: str,
    asked: Sequence[Question],
    metrics: Sequence[str],
    context: int,
    seconds: float | None,
) -> Answers:
    """The greedy answers to questions, scored.

    Args:
        seconds: about how long it may take: then the first ones of `asked` only are answered. None: all of them.
    """
    rows = [tokenizer.encode_rendered(tokenizer.render(q.messages, tools=q.tools, template=template)) for q in asked]
    longest = max((len(tokenizer.encode(q.right)) for q in asked), default=1)
    how = Sampling(max_tokens=max(8, min(2 * longest, 128, context // 2)), temperature=0, stop_tokens=tokenizer.turn_ends())
    said: list[str] = []
    begin = time.monotonic()
    for start in range(0, len(rows), ROWS):
        part = [row[-(context - how.max_tokens) :] for row in rows[start : start + ROWS]]  # of a long prompt its end, where the question is
        said += [tokenizer.decode(ids).strip() for ids in generate(model, part, how)]
        if seconds is not None and time.monotonic() - begin > seconds:
            break
    found = Answers(said)
    for name in metrics:
        pairs = list(zip(said, asked))
        found.scores[name] = [passes(s, q.tests) for s, q in pairs] if name == "pass_at_1" else [SCORES[name](s, q.right) for s, q in pairs]
    return found


def differences(before: Answers, after: Answers) -> dict[str, dict[str, Any]]:
    """Each metric of both, with 95 % intervals, and of the difference over the same resamples."""
    n = len(after.said)
    weights = np.concatenate([np.ones((1, n)), poisson_weights(np.random.default_rng(0), n)])
    first, second = before.values(weights), after.values(weights)
    return {name: beside(first[name], second[name], n) for name in second}


def beside(first: NDArray[np.float64], second: NDArray[np.float64], records: int) -> dict[str, Any]:
    """Two models' values of one metric, then its values on the same resamples [1 + RESAMPLES] of so many records, as a row of the comparison."""
    if records < FEW:
        first, second = (np.where(np.arange(len(v)) == 0, v, np.nan) for v in (first, second))
    return {
        "before": float(first[0]),
        "before_interval": list(percentile_interval(first[1:])),
        "after": float(second[0]),
        "after_interval": list(percentile_interval(second[1:])),
        "difference": float(second[0] - first[0]),
        "difference_interval": list(percentile_interval(second[1:] - first[1:])),
    }
