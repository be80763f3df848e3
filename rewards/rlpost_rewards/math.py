"""Is the answer of a worked solution right?

Numbers are compared as numbers, at tens of thousands a second; all else goes to math-verify, at
some tens. math-verify can hang past any time-out of its own (power towers), so this reward belongs
into a process that can be killed, which is where the pool runs it; the worst towers are refused
before. Model text is never given to sympify: LaTeX is parsed by a grammar, plain arithmetic holds
digits and operators only.
"""

import logging
import re
from decimal import Decimal, localcontext
from functools import lru_cache
from math import log10
from typing import Any

from rlpost.errors import JobError, RowError
from rlpost.types import Rollout, Score, Task
from rlpost_rewards.numbers import last_number, read_quantity
from rlpost_rewards.strict_json import StrictJSONError, strip_thinking

DEFAULT_PRECISION = 6  # decimals, math-verify's own default
MAX_CHARACTERS = 8_000  # of the reply's end: math-verify's patterns are slower than linear
_DELIMITERS = ("$", "\\(", "\\[", "\\boxed")
_POWER = r"(?:\^|(?<=[0-9)])\s*\*\*(?=\s*[0-9(]))[\s{(]*"
_TOWER = re.compile(rf"{_POWER}([0-9]+)\s*{_POWER}([0-9]+)")
_LONG_TOWER = re.compile(rf"(?:{_POWER}[0-9]+\s*){{4,}}")
_MIXED = re.compile(r"(-?)([0-9]{1,9}) +([0-9]{1,9})/([0-9]{1,9})")
_ARITHMETIC = re.compile(r"-?[0-9][0-9.\s+*/^()-]*%?|-?[0-9]+,[0-9]+|\([0-9.\s+*/^()-]+\)")
_CLOSING = re.compile(r"(?i:final answer is)[:\s]*([^\n]{1,200}?)\.?\s*I hope it is correct")
_LARGE = re.compile(
    rf"{_POWER}[0-9]{{6,}}|(?:{_POWER}[0-9]+|[0-9]{{5,}})[\s)}}]*!|[0-9)}}][\s)}}]*![\s)}}]*!"
)


def math(task: Task, rollout: Rollout, *, precision: int | None = None) -> Score:
    """1 if the reply's answer equals `task.answer` (what follows `####` in it, if anything), else
    0.

    Read are the last `\\boxed{}`, else the text after the last `####`, else the last number.
    Numbers are equal if they are after rounding to `precision` decimals (the row's, else the
    argument's, else 6). Parts: extracted, correct. Reason: ok, wrong, no_answer, open_thinking, or
    too_large for a number that nobody could compute. Raises RowError for a row without answer.
    """
    gold = _gold_text(task)
    digits = _precision(task, precision)
    try:
        reply = strip_thinking(rollout.reply)
    except StrictJSONError as error:
        return _score(extracted=False, correct=False, reason=error.reason)
    answer = _marked_answer(reply)
    verdict = _compare_directly(gold, reply, answer, digits)
    if verdict is not None:
        return _score(extracted=True, correct=verdict)
    text = _relevant(reply, answer)
    if not text:
        return _score(extracted=False, correct=False, reason="no_answer")
    if _explodes(text):
        return _score(extracted=True, correct=False, reason="too_large")
    relations = bool(task.meta.get("allow_set_relation_comp", False))
    extracted, correct = _verify(gold, text, digits, relations)
    return _score(extracted, correct, reason="" if extracted else "no_answer")


def _gold_text(task: Task) -> str:
    if task.answer is None or isinstance(task.answer, bool | dict | list):
        raise RowError(
            f"row {task.id}: answer is {type(task.answer).__name__}, not a number or a text",
            cure="math needs the column `answer`",
        )
    gold = str(task.answer).rpartition("####")[2].strip()
    if not gold:
        raise RowError(f"row {task.id}: answer is empty", cure="math needs the column `answer`")
    return gold


def _precision(task: Task, argument: int | None) -> int:
    """Decimals: the row's, else the argument's, else 6."""
    row = task.meta.get("precision")
    digits = argument if row is None else row
    if digits is None:
        return DEFAULT_PRECISION
    if isinstance(digits, bool) or not isinstance(digits, int) or not 0 <= digits <= 100:
        problem = f"math: precision = {digits!r} is not a number of decimals from 0 to 100"
        raise JobError(problem) if row is None else RowError(f"row {task.id}: {problem}")
    return digits


def _marked_answer(reply: str) -> str | None:
    """What the reply itself marks as its answer: the last box, else the text after `####`.
    Minerva's closing sentence ("The final answer is X. I hope it is correct.") goes before a box
    above it."""
    if closing := _closing(reply):
        return _boxed(closing) or closing
    answer = _boxed(reply)
    if answer is None and "####" in reply:
        answer = reply.rpartition("####")[2].strip()
    return answer


def _closing(reply: str) -> str:
    """The X of "The final answer is X. I hope it is correct.", "" without that sentence."""
    if "I hope it is correct" not in reply:
        return ""
    found = _CLOSING.findall(reply[-MAX_CHARACTERS:])
    return found[-1].strip() if found else ""


def _boxed(text: str) -> str | None:
    """What the last `\\boxed{…}` holds, braces balanced; None without one that closes."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    level = 0
    for position in range(start + len("\\boxed"), min(len(text), start + MAX_CHARACTERS)):
        if text[position] == "{":
            level += 1
        elif text[position] == "}":
            level -= 1
            if level == 0:
                return text[start + len("\\boxed{") : position].strip()
    return None


def _compare_directly(gold: str, reply: str, answer: str | None, digits: int) -> bool | None:
    """The verdict where both sides are plain numbers or the same text; None where they are not."""
    if answer is not None and answer == gold.strip("$"):
        return True
    gold_number = read_quantity(gold)
    if gold_number is None:
        return None
    if answer is not None:
        number = read_quantity(answer)
        if number is None and "\\" not in answer and "####" in reply:
            number = last_number(answer)
    else:
        number = last_number(reply)
    if number is None:
        return None
    if numbers_equal(gold_number, number, digits):
        return True
    # a solution in LaTeX may well end on a number that is not its answer: math-verify looks for it
    return None if answer is None and ("$" in reply or "\\" in reply) else False


def numbers_equal(one: Decimal, other: Decimal, digits: int) -> bool:
    """Whether two numbers agree after rounding to `digits` decimals."""
    if one == other:
        return True
    if abs(one - other) >= 1:
        return False
    with localcontext(prec=2_000):  # or rounding a long number raises
        return round(one, digits) == round(other, digits)


def _relevant(reply: str, answer: str | None) -> str:
    """The part of the reply that math-verify shall read."""
    if answer is not None and ("\\boxed{" not in reply or _closing(reply)):
        return answer[-MAX_CHARACTERS:]
    return reply[-MAX_CHARACTERS:]  # with all its boxes: "\boxed{1} and \boxed{2}" is one answer


def _explodes(text: str) -> bool:
    """Whether a power tower or a factorial in `text` is beyond computing. The deadline of the
    process is the real defence; this spares it the plain cases."""
    if _LARGE.search(text) or _LONG_TOWER.search(text):
        return True
    return any(
        int(exponent) * log10(max(2, int(base))) > 5
        for base, exponent in _TOWER.findall(text[:MAX_CHARACTERS])
        if len(base) < 300 and len(exponent) < 300
    )


def _verify(gold: str, text: str, digits: int, relations: bool) -> tuple[bool, bool]:
    """(extracted, correct) by math-verify, in the order (gold, prediction): it is not symmetric."""
    parsed_gold = _parsed_gold(gold)
    text = _unmixed(text.strip())
    readings = [text]
    bare = not any(mark in text for mark in _DELIMITERS)
    if bare and read_quantity(gold) is None and "\n" not in text and len(text) <= 200:
        readings.append(f"${text}$")  # an expression written without delimiters
    extracted = False
    for reading in readings:
        prediction = _parse(reading)
        extracted = extracted or bool(prediction)
        if prediction and _equal(parsed_gold, prediction, digits, relations):
            return True, True
    return extracted, False


@lru_cache(maxsize=256)
def _parsed_gold(gold: str) -> list[Any]:
    if any(mark in gold for mark in _DELIMITERS):
        return _parse(gold)
    if (number := read_quantity(gold)) is not None:
        return _parse(f"{number:f}")
    gold = _unmixed(gold)
    if _ARITHMETIC.fullmatch(gold):
        return _parse(gold)
    # undelimited, all of it is the answer: raw, only the 12 of "12:30" would be read
    return _parse(f"${gold}$") or _parse(gold)


def _unmixed(text: str) -> str:
    """A mixed number as a sum: "2 1/2" is (2+1/2), where the parser would multiply."""
    return _MIXED.sub(r"\1(\2+\3/\4)", text) if _MIXED.fullmatch(text) else text


def _parse(text: str) -> list[Any]:
    # none of its time-outs: their alarms need the main thread, and power towers ignore them
    return _math_verify().parse(text, parsing_timeout=None)


def _equal(gold: list[Any], prediction: list[Any], digits: int, relations: bool) -> bool:
    return _math_verify().verify(
        gold,
        prediction,
        float_rounding=digits,
        allow_set_relation_comp=relations,
        timeout_seconds=None,
    )


@lru_cache(maxsize=1)
def _math_verify() -> Any:
    import math_verify  # takes a second, and most numeric jobs never need it

    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.ERROR)  # it warns that no time-out is set
    return math_verify


def _score(extracted: bool, correct: bool, reason: str = "") -> Score:
    parts = {"extracted": float(extracted), "correct": float(correct)}
    return Score(value=float(correct), parts=parts, reason=reason or ("ok" if correct else "wrong"))
