"""Plain checks on a reply's text: exact, similarity, pattern, length, language, repetition.

One [[reward]] makes one check; weights and gates put several together.
"""

import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import jsonschema_rs
from rapidfuzz import fuzz
from rapidfuzz.distance import JaroWinkler, Levenshtein

from rlpost.errors import JobError, RowError
from rlpost.types import Rollout, Score, Task
from rlpost_rewards.language import LANGUAGES, language_share
from rlpost_rewards.strict_json import StrictJSONError, strip_thinking

MAX_CHARACTERS = 20_000  # compared or measured of one reply: similarity is quadratic
NGRAM = 4

METRICS: dict[str, Callable[[str, str], float]] = {
    "ratio": lambda a, b: fuzz.ratio(a, b) / 100,
    "token_sort": lambda a, b: fuzz.token_sort_ratio(a, b) / 100,
    "levenshtein": Levenshtein.normalized_similarity,
    "jaro_winkler": JaroWinkler.normalized_similarity,
}


def text(
    task: Task,
    rollout: Rollout,
    *,
    check: str = "exact",
    fold: bool = True,
    metric: str = "ratio",
    threshold: float = 0.0,
    pattern: str | None = None,
    least: int = 0,
    most: int | None = None,
    unit: str = "words",
    language: str | None = None,
    thinking: str = "strip",
) -> Score:
    """One check of the reply, in [0, 1].

    exact: equals `task.answer` (a text, or a list of accepted ones). similarity: the best rapidfuzz
    `metric` to it, 0 below `threshold`. Both compare without case and with white space folded,
    unless `fold` is false. pattern: `pattern` (ECMA 262, no look-around or back-reference) matches
    the whole reply, in linear time. length: 1 from `least` to `most` words or characters (`unit`),
    falling in proportion outside. language: the share of letters in the script of `language`, and
    for en, de, fr, es, it, pt and nl that times the share of its function words that are that
    language's (0.5 where none tells). repetition: the share of different runs of 4 words
    (characters in scripts without spaces).

    The part is named after the check. Reason: ok, below, too_long, empty or open_thinking. Raises
    JobError for bad arguments, RowError for a row without answer where one is needed.
    """
    try:
        reply = strip_thinking(rollout.reply, thinking=thinking)
    except StrictJSONError as error:
        return Score(value=0.0, parts={check: 0.0}, reason=error.reason)
    if check == "exact":
        value = exact(reply, _accepted(task), fold=fold)
    elif check == "similarity":
        if len(reply) > MAX_CHARACTERS:
            return Score(value=0.0, parts={check: 0.0}, reason="too_long")
        value = similarity(reply, _accepted(task), metric=metric, fold=fold)
        value = value if value >= threshold else 0.0
    elif check == "pattern":
        value = matches(reply, pattern)
    elif check == "length":
        value = length(reply, least=least, most=most, unit=unit)
    elif check == "language":
        value = spoken(reply[:MAX_CHARACTERS], language)
    elif check == "repetition":
        value = distinct_share(reply[:MAX_CHARACTERS])
    else:
        known = "exact, similarity, pattern, length, language, repetition"
        raise JobError(f"text: check = {check!r} is not known", cure=f"one of {known}")
    reason = "ok" if value >= 1.0 else "below" if reply else "empty"
    return Score(value=value, parts={check: value}, reason=reason)


def exact(reply: str, accepted: Sequence[str], *, fold: bool = True) -> float:
    """1 if the reply is one of the accepted texts, else 0."""
    return float(_folded(reply, fold) in {_folded(each, fold) for each in accepted})


def similarity(
    reply: str, accepted: Sequence[str], *, metric: str = "ratio", fold: bool = True
) -> float:
    """The largest similarity to an accepted text, in [0, 1]; 1 only for equal texts under "ratio"
    and "levenshtein". A lone surrogate counts as the replacement character."""
    if metric not in METRICS:
        raise JobError(
            f"text: metric = {metric!r} is not known", cure=f"one of {', '.join(METRICS)}"
        )
    own = _folded(reply, fold)
    return max(METRICS[metric](own, _folded(each, fold)) for each in accepted)


def matches(reply: str, pattern: str | None) -> float:
    """1 if `pattern` matches the whole reply, else 0."""
    if not isinstance(pattern, str):
        raise JobError('text: check = "pattern" needs `pattern`')
    return float(_pattern(pattern).is_valid(_encodable(reply)))


def length(reply: str, *, least: int = 0, most: int | None = None, unit: str = "words") -> float:
    """1 from `least` to `most`; below, the share of `least`; above, 1 minus the excess over
    `most`."""
    if unit not in ("words", "characters"):
        raise JobError(f"text: unit = {unit!r} is not known", cure='one of "words", "characters"')
    if least < 0 or (most is not None and (most < 1 or most < least)):
        raise JobError(
            f"text: least = {least}, most = {most} leave no length", cure="least <= most"
        )
    count = len(reply.split()) if unit == "words" else len(reply)
    if count < least:
        return count / least
    if most is not None and count > most:
        return max(0.0, 1.0 - (count - most) / most)
    return 1.0


def spoken(reply: str, language: str | None) -> float:
    """How much of the reply is in `language`, in [0, 1]; 0 without any letter."""
    if language not in LANGUAGES:
        raise JobError(
            f"text: language = {language!r} cannot be told",
            cure=f"one of {', '.join(LANGUAGES)}",
        )
    return language_share(reply, language)


def distinct_share(reply: str) -> float:
    """Different runs of 4 words over all of them, in (0, 1]; 0 for an empty reply. Where words are
    longer than 30 characters on average (no spaces are written), runs of 4 characters count."""
    words: Sequence[Any] = reply.split()
    if not words:
        return 0.0
    if len(reply) > 30 * len(words):
        words = [character for character in reply if not character.isspace()]
    runs = [tuple(words[start : start + NGRAM]) for start in range(max(1, len(words) - NGRAM + 1))]
    return len(set(runs)) / len(runs)


def _accepted(task: Task) -> list[str]:
    answers = task.answer if isinstance(task.answer, list | tuple) else [task.answer]
    texts = [
        str(a) for a in answers if isinstance(a, str | int | float) and not isinstance(a, bool)
    ]
    if not texts or len(texts) < len(answers):
        raise RowError(
            f"row {task.id}: answer is not a text or a list of texts",
            cure="this check of `text` needs the column `answer`",
        )
    return texts


def _folded(value: str, fold: bool) -> str:
    value = unicodedata.normalize("NFC", _encodable(value))
    return " ".join(value.casefold().split()) if fold else value.strip()


def _encodable(value: str) -> str:
    return value if value.isascii() else value.encode("utf-8", "replace").decode()


@lru_cache(maxsize=64)
def _pattern(pattern: str) -> jsonschema_rs.Validator:
    """A linear-time matcher: the regex engine of jsonschema-rs that has no backtracking."""
    try:
        return jsonschema_rs.Draft202012Validator(
            {"pattern": f"^(?:{pattern})$"}, pattern_options=jsonschema_rs.RegexOptions()
        )
    except ValueError:
        raise JobError(
            f"text: pattern {pattern!r} is not a regular expression of linear time",
            cure="leave out look-around and back-references",
        ) from None
