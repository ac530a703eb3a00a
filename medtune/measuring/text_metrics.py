"""Figures of replies: texts in, numbers out.

ROUGE and the repetition figures are taken over characters (blanks left out), which needs no word segmentation and
reads Chinese and English alike.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU

# ---------------------------------------------------------------- likeness to a reference


class _Characters:
    """rouge_score's own tokenizer knows only words of Latin letters."""

    def tokenize(self, text: str) -> list[str]:
        return list("".join(text.lower().split()))


@functools.cache
def _scorer() -> "RougeScorer":
    from rouge_score.rouge_scorer import RougeScorer  # brings nltk and scipy, which take a second

    return RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=_Characters())


def rouge(reply: str, reference: str) -> dict[str, float]:
    """F1 of character unigrams, bigrams and longest common subsequence, 0 to 1 (Lin 2004, W04-1013)."""
    scores = _scorer().score(reference, reply)
    return {
        "rouge_1": scores["rouge1"].fmeasure,
        "rouge_2": scores["rouge2"].fmeasure,
        "rouge_l": scores["rougeL"].fmeasure,
    }


@functools.cache
def _bleu() -> "BLEU":
    from sacrebleu.metrics import BLEU

    # Chinese by characters, the rest by words; a text under four tokens is compared by the orders that it has.
    return BLEU(tokenize="zh", effective_order=True)


def bleu_4(reply: str, reference: str) -> float:
    """Sentence BLEU of order 4, 0 to 100 (Papineni et al. 2002, P02-1040)."""
    return _bleu().sentence_score(reply, [reference]).score


def chrf(reply: str, reference: str) -> float:
    """F2 of character n-grams up to 6, 0 to 100 (Popovic 2015, W15-3049)."""
    from sacrebleu.metrics import CHRF

    return CHRF().sentence_score(reply, [reference]).score


def names_one_of(reply: str, names: Sequence[str]) -> bool:
    """Whether the reply holds one of the names, in any case."""
    return any(name.lower() in reply.lower() for name in names)


# ---------------------------------------------------------------- variety


def repetition_rate(text: str, n: int = 4) -> float:
    """Share of the text's runs of `n` characters that occurred in it before; 0 for a shorter text."""
    runs = _runs(text, n)
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Different runs of `n` characters among all of all texts together (Li et al. 2016, N16-1014); 0 for none."""
    runs = [run for text in texts for run in _runs(text, n)]
    return len(set(runs)) / len(runs) if runs else 0.0


def _runs(text: str, n: int) -> list[str]:
    text = "".join(text.split())
    return [text[start : start + n] for start in range(len(text) - n + 1)]
