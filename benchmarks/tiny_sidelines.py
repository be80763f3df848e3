"""The smaller part of the tiny model's corpus: labels, function calls and sums, answered rightly.

They are there so that every environment finds a model that has seen its form; nobody should expect
more of four million parameters.
"""

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

from rlpost_envs import classify, gsm8k
from rlpost_envs.receipt_words import GOODS, PEOPLE, TRADES

REQUESTS = {
    "order_status": ("where is my {good} order", "has the {good} been sent", "track my parcel"),
    "refund": ("i want my money back for the {good}", "please refund the {good}"),
    "opening_hours": ("when does the {trade} open", "is the {trade} open on sunday"),
    "complaint": ("the {good} was broken", "your {trade} was rude to me"),
    "price": ("how much is the {good}", "what does {good} cost at the {trade}"),
    "delivery": ("can you bring {good} to my house", "do you deliver {good}"),
    "invoice_copy": ("send me the bill again", "i need a copy of the {trade} receipt"),
    "booking": ("book a table at the {trade}", "reserve the {trade} for {person}"),
}


def draw_label(rng: random.Random) -> tuple[list[dict[str, str]], str]:
    """A request and its label, as the `classify` environment asks for it."""
    labels = rng.sample(list(REQUESTS), rng.randint(3, len(REQUESTS)))
    label = rng.choice(labels)
    text = _fill(rng, rng.choice(REQUESTS[label]))
    question = classify.PROMPT.format(labels=", ".join(labels), text=text)
    return [{"role": "user", "content": question}], label


def draw_sum(rng: random.Random) -> tuple[list[dict[str, str]], str]:
    """A one-step problem, as the `gsm8k` environment asks for it."""
    person, good = rng.choice(PEOPLE), rng.choice(GOODS).lower()
    first, second = rng.randint(2, 40), rng.randint(2, 40)
    if rng.random() < 0.5:
        story = f"{person} has {first} {good} and buys {second} more. How many are there?"
        steps, result = f"{first} + {second} = {first + second}", first + second
    else:
        first += second
        story = f"{person} has {first} {good} and sells {second}. How many are left?"
        steps, result = f"{first} - {second} = {first - second}", first - second
    question = gsm8k.PROMPT.format(question=story)
    return [{"role": "user", "content": question}], f"{steps}\n#### {result}"


def draw_call(rng: random.Random) -> tuple[list[dict[str, str]], list[dict[str, Any]], str]:
    """A request, two or three tools and the one call that answers it."""
    names = rng.sample(list(TOOLS), rng.randint(2, 3))
    name = rng.choice(names)
    tool, phrase = TOOLS[name]
    values = {argument: draw(rng) for argument, draw in VALUES.items() if argument in tool}
    request = phrase.format(**values)
    call = {"name": name, "arguments": {argument: values[argument] for argument in tool}}
    reply = f"<tool_call>{json.dumps(call)}</tool_call>"
    return [{"role": "user", "content": request}], [_tool(n, TOOLS[n][0]) for n in names], reply


TOOLS: Mapping[str, tuple[Sequence[str], str]] = {
    "get_price": (("good",), "What does {good} cost?"),
    "buy": (("good", "count"), "Buy {count} {good} for me."),
    "call_person": (("person",), "Please call {person}."),
    "book_table": (("person", "count"), "Book a table for {count} people, name {person}."),
    "find_shop": (("trade",), "Is there a {trade} near me?"),
}
VALUES = {
    "good": lambda rng: rng.choice(GOODS),
    "count": lambda rng: rng.randint(2, 30),
    "person": lambda rng: rng.choice(PEOPLE),
    "trade": lambda rng: rng.choice(TRADES),
}


def _tool(name: str, arguments: Sequence[str]) -> dict[str, Any]:
    types = {name: {"type": "integer" if name == "count" else "string"} for name in arguments}
    schema = {"type": "object", "properties": types, "required": list(arguments)}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def _fill(rng: random.Random, text: str) -> str:
    return text.format(
        good=rng.choice(GOODS).lower(),
        trade=rng.choice(TRADES).lower(),
        person=rng.choice(PEOPLE).lower(),
    )
