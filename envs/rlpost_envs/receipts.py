"""Synthetic receipts of many layouts with exact labels, the same everywhere for the same seed.

    Receipts(count=400, seed=1)                              # all sixteen layouts, four fields
    Receipts(count=50, seed=2, layouts=["till", "fuel"], fields=["company", "total"])

Each task asks for one JSON object. `answer` holds the gold in the schema's own form: dates in ISO
form, the total as a number. Everything is drawn by `random.Random` from words and syllables in
this file; no real receipt, person or company is behind any of it.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rlpost.env import SingleTurnEpisode
from rlpost.errors import JobError
from rlpost.types import Task
from rlpost_envs.prompts import read_prompt
from rlpost_envs.receipt_layouts import LAYOUTS, Layout, print_date
from rlpost_envs.receipt_words import (
    CURRENCIES,
    ENDINGS,
    GOODS,
    GREETINGS,
    NAMES,
    PEOPLE,
    STREETS,
    SYLLABLES,
    TRADES,
)

FIELDS: dict[str, dict[str, Any]] = {
    "company": {"type": "string", "minLength": 1},
    "address": {"type": "string", "minLength": 1},
    "date": {"type": "string", "pattern": r"^\d{4}-\d{2}-\d{2}$"},
    "invoice": {"type": "string", "minLength": 1},
    "total": {"type": "number"},
}
"""The fields that can be asked for, with their schemas."""

DEFAULT_FIELDS = ("company", "date", "invoice", "total")

HINTS = {"date": "date (YYYY-MM-DD)", "total": "total (number)"}

PROMPT = "Read this receipt. Answer with one JSON object only: {fields}.\n\n{text}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """One receipt: `text` as printed, `values` the gold of every field of FIELDS, and `printed`,
    what the page may show of it (the date in its own style, amounts as text, decoys such as
    "cash" or "table"). `other_date` is the decoy date in ISO form."""

    layout: str
    text: str
    values: Mapping[str, Any]
    printed: Mapping[str, str]
    other_date: str


class Receipts:
    """The environment of `count` receipts. Vendors come back about `per_vendor` times each and
    stand in `meta.vendor`, so that `split_by = "vendor"` keeps one vendor on one side.

    `prompt` is a file with {text} and, if it likes, {fields} in it. A wrong argument raises
    JobError, naming it.
    """

    def __init__(
        self,
        count: int = 400,
        seed: int = 0,
        *,
        layouts: Sequence[str] | None = None,
        fields: Sequence[str] = DEFAULT_FIELDS,
        per_vendor: int = 4,
        prompt: str | None = None,
    ):
        for name, number in (("count", count), ("per_vendor", per_vendor)):
            if not isinstance(number, int) or number < 1:
                raise JobError(f"environment.{name} is {number!r}", cure="write a number from 1 on")
        self.count, self.seed, self.per_vendor = count, seed, per_vendor
        self.layouts = choose_layouts(layouts)
        self.fields = _known("fields", fields, FIELDS)
        self.template = read_prompt(prompt, PROMPT, columns=("text", "fields"), needed="text")

    def tasks(self) -> list[Task]:
        """The same tasks in the same order each time."""
        return self._tasks

    def episode(self, task: Task) -> SingleTurnEpisode:
        return SingleTurnEpisode(task)

    @cached_property
    def _tasks(self) -> list[Task]:
        return [self._task(index) for index in range(self.count)]

    def _task(self, index: int) -> Task:
        receipt = draw_receipt(
            self.seed,
            index,
            layouts=self.layouts,
            vendors=max(1, self.count // self.per_vendor),
            with_address="address" in self.fields,
        )
        columns = {"text": receipt.text, "fields": name_fields(self.fields)}
        return Task(
            id=f"receipt-{self.seed}-{index}",
            messages=[{"role": "user", "content": self.template.render(columns)}],
            answer={field: receipt.values[field] for field in self.fields},
            schema=schema_of(self.fields),
            meta={"layout": receipt.layout, "vendor": receipt.printed["company"]},
        )


def name_fields(fields: Sequence[str]) -> str:
    """The fields as a prompt asks for them, each with its form."""
    return ", ".join(HINTS.get(field, field) for field in fields)


def schema_of(fields: Sequence[str]) -> dict[str, Any]:
    """The JSON Schema of an answer: every field required, nothing else allowed."""
    return {
        "type": "object",
        "properties": {field: FIELDS[field] for field in fields},
        "required": list(fields),
        "additionalProperties": False,
    }


def draw_receipt(
    seed: int | str,
    index: int,
    *,
    layouts: Sequence[Layout] = LAYOUTS,
    vendors: int = 1000,
    with_address: bool = False,
    lines: int | None = None,
) -> Receipt:
    """Receipt number `index` of a stream, a function of the arguments alone. Without
    `with_address` the address is printed on every second page only; `lines` fixes the number of
    items, which is one to three otherwise."""
    rng = random.Random(f"receipt/{seed}/{index}")
    layout = rng.choice(layouts)
    vendor = random.Random(f"vendor/{seed}/{rng.randrange(vendors)}")
    company, address = _company(vendor), _address(vendor)
    code = vendor.choice(list(CURRENCIES))
    items = [
        (rng.choice(GOODS), rng.randint(1, 4), rng.randint(20, 2500))
        for _ in range(lines or _few(rng))
    ]
    amounts = _amounts(rng, sum(qty * price for _, qty, price in items), layout)
    date, other_date = _dates(rng)
    printed = {
        "company": company,
        "COMPANY": company.upper(),
        "address": address,
        "invoice": _invoice(rng),
        "date": print_date(*date, layout.date),
        "other_date": print_date(*other_date, layout.date),
        "time": f"{rng.randint(7, 22):02}:{rng.randint(0, 59):02}",
        "code": code,
        "mark": CURRENCIES[code],
        "phone": f"{rng.randint(2, 9)}{rng.randint(0, 999):03}",
        "cashier": rng.choice(PEOPLE),
        "table": str(rng.randint(1, 40)),
        "points": str(rng.randint(100, 9999)),
        "greeting": rng.choice(GREETINGS),
        "count": str(len(items)),
        **{name: f"{cents / 100:.2f}" for name, cents in amounts.items()},
    }
    text = _print_page(rng, layout, printed, items, with_address)
    values = {
        "company": company.upper() if "{COMPANY}" in layout.page else company,
        "address": address,
        "date": _iso(date),
        "invoice": printed["invoice"],
        "total": amounts["total"] / 100,
    }
    return Receipt(
        layout=layout.name, text=text, values=values, printed=printed, other_date=_iso(other_date)
    )


def choose_layouts(names: Sequence[str] | None) -> tuple[Layout, ...]:
    """The named layouts in the given order, or all of them."""
    if names is None:
        return LAYOUTS
    known = {layout.name: layout for layout in LAYOUTS}
    return tuple(known[name] for name in _known("layouts", names, known))


def _known(argument: str, names: Sequence[str], known: Mapping[str, Any]) -> tuple[str, ...]:
    if isinstance(names, str) or not names:
        raise JobError(f"environment.{argument} is {names!r}", cure="write a list of names")
    for name in names:
        if name not in known:
            raise JobError(
                f"environment.{argument} has no {name!r}", cure=f"known are {', '.join(known)}"
            )
    return tuple(dict.fromkeys(names))


def _few(rng: random.Random) -> int:
    return rng.choice((1, 1, 2, 2, 3))


def _company(rng: random.Random) -> str:
    words = [rng.choice(NAMES) if rng.random() < 0.5 else _invent(rng)]
    if rng.random() < 0.2:
        words.append(_invent(rng))
    words += [rng.choice(TRADES), rng.choice(ENDINGS)]
    return " ".join(word for word in words if word)


def _invent(rng: random.Random) -> str:
    """A name that no tokenizer has whole, so that copying has to be learned."""
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.choice((2, 2, 3)))).capitalize()


def _address(rng: random.Random) -> str:
    return f"{rng.randint(1, 99)} {_invent(rng)} {rng.choice(STREETS)}"


def _invoice(rng: random.Random) -> str:
    letters = rng.choice(("", "A", "B", "INV", "R", "S", "T", "X"))
    return f"{letters}{rng.randint(100, 99999)}"


def _dates(rng: random.Random) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """The receipt's date, and a later one to be mistaken for it."""
    year, month, day = rng.randint(2018, 2026), rng.randint(1, 12), rng.randint(1, 28)
    later = (year + month // 12, month % 12 + 1, day) if day == 28 or rng.random() < 0.5 else None
    return (year, month, day), later or (year, month, day + 1)


def _iso(date: tuple[int, int, int]) -> str:
    return "{:04}-{:02}-{:02}".format(*date)


def _amounts(rng: random.Random, goods: int, layout: Layout) -> dict[str, int]:
    """Cents: the lines add up to the subtotal; tax is added to it or a discount taken off."""
    tax = (goods * layout.tax + 50) // 100
    discount = rng.randint(1, max(1, goods // 4)) if "{discount}" in layout.page else 0
    total = goods + tax - discount
    cash = total if rng.random() < 0.2 else -(-total // 500) * 500 + rng.choice((0, 500, 1000))
    return {
        "subtotal": goods,
        "tax": tax,
        "discount": discount,
        "total": total,
        "cash": cash,
        "change": cash - total,
    }


def _print_page(
    rng: random.Random,
    layout: Layout,
    printed: Mapping[str, str],
    items: Sequence[tuple[str, int, int]],
    with_address: bool,
) -> str:
    mark = printed["mark"]
    rows = [
        layout.item.format(name=name, qty=qty, amount=f"{qty * price / 100:.2f}", mark=mark)
        for name, qty, price in items
    ]
    lines = []
    for line in layout.page.strip("\n").split("\n"):
        if line.startswith("? ") and rng.random() < 0.5:
            continue
        if line == "{address}" and rng.random() < 0.5 and not with_address:
            continue
        lines.append(line.removeprefix("? ").format(**printed, items="\n".join(rows)))
    return "\n".join(lines)
