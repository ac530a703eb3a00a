"""Figures that compare replies with references: texts in, numbers out.

ROUGE is taken over characters (blanks left out), which needs no word segmentation and reads Chinese and English alike.
"""

import functools
from collections.abc import Sequence

from rouge_score.rouge_scorer import RougeScorer


class _Characters:
    """rouge_score's own tokenizer knows only words of Latin letters."""

    def tokenize(self, text: str) -> list[str]:
        return list("".join(text.lower().split()))


@functools.cache
def _scorer() -> RougeScorer:
    return RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=_Characters())


def rouge(reply: str, reference: str) -> dict[str, float]:
    """F1 of character unigrams, bigrams and longest common subsequence, 0 to 1 (Lin 2004, W04-1013)."""
    scores = _scorer().score(reference, reply)
    return {
        "rouge_1": scores["rouge1"].fmeasure,
        "rouge_2": scores["rouge2"].fmeasure,
        "rouge_l": scores["rougeL"].fmeasure,
    }


def names_one_of(reply: str, names: Sequence[str]) -> bool:
    """Whether the reply holds one of the names, in any case."""
    return any(name.lower() in reply.lower() for name in names)


def repetition_rate(text: str, n: int = 4) -> float:
    """Share of the text's runs of `n` characters that occurred in it before; 0 for a shorter text."""
    text = "".join(text.split())
    runs = [text[start : start + n] for start in range(len(text) - n + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
