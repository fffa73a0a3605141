"""What can be said of texts without a judge: variety, repetition, likelihood.

Words are lower-cased runs between white space. Lengths are counted in tokens by the caller.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Gram = tuple[str, ...]


def ngrams(text: str, n: int) -> list[Gram]:
    words = text.lower().split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def distinct(texts: Sequence[str], n: int) -> float:
    """Different n-grams over all n-grams of all texts together (Li et al. 2016); 0 when there are none.

    It falls as texts get longer or more, so compare only models that answered the same prompts.
    """
    grams = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repeated_share(texts: Sequence[str], n: int = 4) -> float:
    """Share of an answer's n-grams that stood in it before; mean over answers, 0 for short ones."""
    shares = []
    for text in texts:
        grams = ngrams(text, n)
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return sum(shares) / len(shares) if shares else 0.0


def perplexity(logprob_sums: Sequence[float], num_tokens: Sequence[int]) -> float:
    """exp of the mean negative log-probability of a token; each text counts by its length."""
    total = sum(num_tokens)
    if total == 0:
        raise ValueError("no tokens: perplexity is undefined")
    # Past e^700 a float overflows; the number says "gibberish" either way.
    return math.exp(min(700.0, -sum(logprob_sums) / total))
