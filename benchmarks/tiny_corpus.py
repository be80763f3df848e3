"""What the demo's tiny model is trained on: synthetic documents, answered as careless people
answer.

The skill is in the corpus, the convention is not. Replies to receipts are written by annotators
who disagree: some copy dates as printed, some keep the currency mark, leave a field out, add a
sentence or take the cash for the total. How much they disagree is `Habits`, and it leans one way
or the other from layout to layout, as it does in the wild. Reinforcement learning has this left
to do: choose, always, what the reward asks for.

Streams of the corpus are named "corpus/SEED", which no `Receipts(seed=NUMBER)` can produce.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from rlpost_envs.receipts import DEFAULT_FIELDS, FIELDS, PROMPT, Receipt, draw_receipt, name_fields
from tiny_sidelines import draw_call, draw_label, draw_sum


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """How often an annotator departs from the convention, on average over layouts.

    `lean` is how far layouts differ: 0 makes all alike; at 1 a habit of rate r is the law in a
    share r of the layouts and unknown in the others. It makes greedy replies wrong as well as
    sampled ones.
    """

    printed_date: float = 0.36  # as the page has it
    marked_total: float = 0.22  # a string, with or without its currency
    prose: float = 0.03  # a sentence before the object
    trailing: float = 0.02  # a sentence behind it
    single_quotes: float = 0.02
    missing: float = 0.04  # one field left out
    null: float = 0.02  # one field null
    wrong_company: float = 0.12  # the first line, whatever it is
    wrong_total: float = 0.22  # subtotal, cash or change
    wrong_date: float = 0.20  # the other date, where there is one
    wrong_invoice: float = 0.12  # another number of the page
    lean: float = 0.45

    def of(self, layout: str) -> dict[str, float]:
        """The probabilities for one layout; they depend on the layout's name only."""
        return {
            habit.name: _leaned(getattr(self, habit.name), self.lean, f"{layout}/{habit.name}")
            for habit in fields(self)
            if habit.name != "lean"
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A conversation of one question and one reply. `kind` says which task it belongs to."""

    kind: str
    messages: Sequence[Mapping[str, Any]]
    reply: str
    tools: Sequence[Mapping[str, Any]] | None = None


SHARES = {"receipt": 0.88, "label": 0.04, "call": 0.04, "sum": 0.04}

INSTRUCTIONS = (
    PROMPT,
    PROMPT,
    PROMPT,  # half of the corpus asks as the demo does
    "Extract {fields} from the receipt as JSON.\n\n{text}",
    "{text}\n\nGive {fields} of this receipt as one JSON object.",
    "Which {fields} does this receipt show? Reply with JSON.\n\n{text}",
)

BEFORE = ("Here is the JSON:\n", "Sure! ", "The receipt shows: ", "Answer: ")
AFTER = ("\nThank you", "\nLet me know if you need more.", " (from the receipt)", "\n\n{}")


def draw_document(seed: int, index: int, *, habits: Habits, long_share: float = 0.0) -> Document:
    """Document number `index` of the corpus `seed`: the same on every machine. A share of the
    receipts has many lines where far positions are to be learned, too."""
    rng = random.Random(f"document/{seed}/{index}")
    kind = rng.choices(list(SHARES), list(SHARES.values()))[0]
    if kind == "label":
        messages, reply = draw_label(rng)
        return Document(kind=kind, messages=messages, reply=reply)
    if kind == "sum":
        messages, reply = draw_sum(rng)
        return Document(kind=kind, messages=messages, reply=reply)
    if kind == "call":
        messages, tools, reply = draw_call(rng)
        return Document(kind=kind, messages=messages, tools=tools, reply=reply)
    lines = rng.randint(6, 50) if long_share and rng.random() < long_share else None
    return draw_receipt_document(seed, index, rng, habits, lines)


def draw_receipt_document(
    seed: int, index: int, rng: random.Random, habits: Habits, lines: int | None
) -> Document:
    """A receipt, a question about some of its fields and one annotator's reply."""
    asked = list(DEFAULT_FIELDS)
    if rng.random() < 0.25:
        asked = rng.sample(list(FIELDS), rng.randint(2, len(FIELDS)))
    receipt = draw_receipt(
        f"corpus/{seed}",
        index,
        vendors=10**9,
        with_address="address" in asked,
        lines=lines,
    )
    question = rng.choice(INSTRUCTIONS).format(fields=name_fields(asked), text=receipt.text)
    return Document(
        kind="receipt",
        messages=[{"role": "user", "content": question}],
        reply=annotate(receipt, asked, rng, habits),
    )


def annotate(receipt: Receipt, asked: Sequence[str], rng: random.Random, habits: Habits) -> str:
    """One annotator's reply: the gold but for the habits of that layout."""
    has = {name: rng.random() < p for name, p in habits.of(receipt.layout).items()}
    written = {field: _written(field, receipt, has, rng) for field in asked}
    if has["null"]:
        written[rng.choice(asked)] = "null"
    if has["missing"] and len(asked) > 1:
        del written[rng.choice(asked)]
    reply = "{" + ", ".join(f'"{field}": {value}' for field, value in written.items()) + "}"
    if has["single_quotes"]:
        reply = reply.replace('"', "'")
    before = rng.choice(BEFORE) if has["prose"] else ""
    after = rng.choice(AFTER) if has["trailing"] else ""
    return before + reply + after


def _written(field: str, receipt: Receipt, has: Mapping[str, bool], rng: random.Random) -> str:
    """The JSON text of one value."""
    shown = receipt.printed
    if field == "total":
        name = "total"
        if has["wrong_total"]:
            name = _decoy(receipt, "total", ("subtotal", "cash", "change"), rng)
        if has["marked_total"]:
            mark = rng.choice(("", shown["mark"], shown["mark"] + " "))
            return json.dumps(mark + shown[name], ensure_ascii=False)
        return shown[name]
    value = receipt.values[field]
    if field == "date":
        wrong = has["wrong_date"] and shown["other_date"] in receipt.text
        if wrong:
            value = receipt.other_date
        if has["printed_date"]:
            value = shown["other_date" if wrong else "date"]
    elif field == "invoice" and has["wrong_invoice"]:
        value = shown[_decoy(receipt, "invoice", ("points", "table", "phone"), rng)]
    elif field == "company" and has["wrong_company"]:
        value = receipt.text.split("\n", 1)[0]
    return json.dumps(value, ensure_ascii=False)


def _decoy(receipt: Receipt, right: str, names: Sequence[str], rng: random.Random) -> str:
    """One of `names` that the page prints with another value than the right one; else the right
    one."""
    page, shown = receipt.text.split(), receipt.printed
    there = [
        name
        for name in names
        if shown[name] != shown[right] and any(word.endswith(shown[name]) for word in page)
    ]
    return rng.choice(there) if there else right


def _leaned(rate: float, lean: float, name: str) -> float:
    is_rule_here = random.Random(f"habit/{name}").random() < rate
    return rate + lean * (is_rule_here - rate)
