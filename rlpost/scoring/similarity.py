"""How alike two texts are, in [0, 1]: the metrics that OpenAI's text_similarity grader names.

fuzzy_match is rapidfuzz's ratio; BLEU (Papineni et al. 2002, up to 4-grams, add-one smoothing above
unigrams), GLEU (Wu et al. 2016), ROUGE-N and ROUGE-L (Lin 2004, F1). Words are lower-cased runs of
letters and digits.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

_WORD = re.compile(r"\w+")


def fuzzy_match(text: str, reference: str) -> float:
    """Normalised edit similarity over characters."""
    from rapidfuzz.fuzz import ratio

    return ratio(text, reference) / 100.0


def bleu(text: str, reference: str) -> float:
    """Geometric mean of the clipped n-gram precisions times the brevity penalty."""
    words, gold = _words(text), _words(reference)
    if not words or not gold:
        return float(words == gold)
    logs = 0.0
    for n in range(1, 5):
        found, wanted = _grams(words, n), _grams(gold, n)
        hits, total = (found & wanted).total(), found.total()
        smooth = 0 if n == 1 else 1
        if hits + smooth == 0 or total + smooth == 0:
            return 0.0
        logs += math.log((hits + smooth) / (total + smooth)) / 4
    brevity = min(0.0, 1.0 - len(gold) / len(words))
    return min(1.0, math.exp(logs + brevity))


def gleu(text: str, reference: str) -> float:
    """The smaller of precision and recall over all 1- to 4-grams."""
    words, gold = _words(text), _words(reference)
    found, wanted = Counter[tuple[str, ...]](), Counter[tuple[str, ...]]()
    for n in range(1, 5):
        found += _grams(words, n)
        wanted += _grams(gold, n)
    most = max(found.total(), wanted.total())
    return (found & wanted).total() / most if most else 1.0


def rouge(text: str, reference: str, *, n: int) -> float:
    """F1 over n-grams."""
    found, wanted = _grams(_words(text), n), _grams(_words(reference), n)
    total = found.total() + wanted.total()
    return 2 * (found & wanted).total() / total if total else float(text == reference)


def rouge_l(text: str, reference: str) -> float:
    """F1 over the longest common subsequence of words."""
    from rapidfuzz.distance import LCSseq

    words, gold = _words(text), _words(reference)
    total = len(words) + len(gold)
    return 2 * LCSseq.similarity(words, gold) / total if total else 1.0


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _grams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[start:] for start in range(n)), strict=False))


METRICS: dict[str, Callable[[str, str], float]] = {
    "fuzzy_match": fuzzy_match,
    "bleu": bleu,
    "gleu": gleu,
    **{f"rouge_{n}": partial(rouge, n=n) for n in range(1, 6)},
    "rouge_l": rouge_l,
}
