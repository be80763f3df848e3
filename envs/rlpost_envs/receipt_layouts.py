"""How synthetic receipts look: one `Layout` each, written as the page it prints.

A line that begins with "? " is printed half the time. Capitals in a placeholder ({COMPANY}) print
capitals. {items} becomes one to three lines, each by the layout's `item` pattern. Amounts are plain
decimals; {mark} is the currency mark and is written where the layout puts one.

Decoys are on purpose, since real receipts have them: subtotals that differ from the total, cash and
change, a second date, table and telephone numbers beside the invoice number.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """`date` is one of the styles of `DATE_STYLES`; `tax` in per cent is added to the subtotal."""

    name: str
    date: str
    item: str
    page: str
    tax: int = 0


DATE_STYLES = (
    "14/03/2025",
    "14-03-25",
    "14.03.2025",
    "2025-03-14",
    "2025/03/14",
    "14 Mar 2025",
    "Mar 14, 2025",
    "14MAR25",
)
"""Every style is day first, unless the month has a name or the year comes first."""

MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def print_date(year: int, month: int, day: int, style: str) -> str:
    """The date as `style` (one of DATE_STYLES) prints it; no locale is asked."""
    name = MONTHS[month - 1]
    return {
        "14/03/2025": f"{day:02}/{month:02}/{year}",
        "14-03-25": f"{day:02}-{month:02}-{year % 100:02}",
        "14.03.2025": f"{day:02}.{month:02}.{year}",
        "2025-03-14": f"{year}-{month:02}-{day:02}",
        "2025/03/14": f"{year}/{month:02}/{day:02}",
        "14 Mar 2025": f"{day} {name} {year}",
        "Mar 14, 2025": f"{name} {day}, {year}",
        "14MAR25": f"{day:02}{name.upper()}{year % 100:02}",
    }[style]


LAYOUTS = (
    Layout(
        name="counter",
        date="14/03/2025",
        item="{name}  {amount}",
        tax=6,
        page="""
{COMPANY}
{address}
? Tel: {phone}
Invoice No: {invoice}
Date: {date}
{items}
Subtotal {subtotal}
Tax 6% {tax}
Total {mark} {total}
? Cash {cash}
? Change {change}
Thank you""",
    ),
    Layout(
        name="slip",
        date="14-03-25",
        item="{qty} x {name} {amount}",
        page="""
{address}
{date} {time} #{invoice}
{company}
{items}
TOTAL {mark}{total}
CASH {mark}{cash}
CHANGE {mark}{change}
? {greeting}""",
    ),
    Layout(
        name="statement",
        date="14 Mar 2025",
        item="- {name} | {amount}",
        page="""
TAX INVOICE
{address}
Seller | {company}
Number | {invoice}
Issued | {date}
Due | {other_date}
{items}
Amount due | {total} {code}""",
    ),
    Layout(
        name="till",
        date="14.03.2025",
        item="{name} {amount} A",
        tax=19,
        page="""
{company}
{address}
Bon {invoice} Kasse {table}
{items}
Netto {subtotal}
MwSt 19% {tax}
SUMME {mark} {total}
BAR {cash}
{date} {time}""",
    ),
    Layout(
        name="diner",
        date="Mar 14, 2025",
        item="{name} .... {amount}",
        tax=10,
        page="""
*** {company} ***
{address}
? Server: {cashier}
Table {table}   Check {invoice}
{date}
{items}
Sub-total .... {subtotal}
Service 10% .... {tax}
Balance .... {mark}{total}
? {greeting}""",
    ),
    Layout(
        name="kiosk",
        date="2025-03-14",
        item="{name}={amount}",
        page="""
id={invoice};shop={company}
{address}
day={date};time={time}
{items}
? till={table}
paid={cash};sum={total};back={change}""",
    ),
    Layout(
        name="fuel",
        date="14MAR25",
        item="{name} L{qty} {amount}",
        page="""
{date} {time} PUMP {table}
{COMPANY}
{address}
RCPT {invoice}
{items}
SALE {mark} {total}
? TENDER {cash}
? POINTS {points}
DRIVE SAFELY""",
    ),
    Layout(
        name="parcel",
        date="2025/03/14",
        item="{name}: {mark}{amount}",
        page="""
Order {invoice}
Ordered: {date}
Ships: {other_date}
{items}
Voucher: -{mark}{discount}
You pay: {mark}{total}
Sold by {company}
{address}""",
    ),
    Layout(
        name="workshop",
        date="14 Mar 2025",
        item="{name} ({qty}) {amount}",
        tax=20,
        page="""
{company}, {cashier}
{address}
Job sheet {invoice} of {date}
{items}
Net {subtotal} VAT {tax}
To pay: {total} {code}
? Please pay by {other_date}""",
    ),
    Layout(
        name="market",
        date="14/03/2025",
        item="{qty}@{name} {amount}",
        page="""
welcome to
{company}
{address}
{items}
ITEMS {count}
GRAND TOTAL {total}
? VISA **{points} {total}
Trn {invoice} Op {cashier}
{date} {time}""",
    ),
    Layout(
        name="clinic",
        date="14-03-25",
        item="{name}; {amount}",
        page="""
Receipt {invoice} / visit {date}
Patient: {cashier}
{items}
Charged; {subtotal}
Rebate; {discount}
Received; {mark} {total}
{company}
{address}
? Next visit {other_date}""",
    ),
    Layout(
        name="hotel",
        date="Mar 14, 2025",
        item="{name} {amount}",
        tax=8,
        page="""
{COMPANY}
{address}
Guest {cashier} Room {table}
Folio: {invoice}
Departure: {date}
{items}
Room tax {tax}
Settled {code} {total}
? {greeting}""",
    ),
    Layout(
        name="printer",
        date="14.03.2025",
        item="{amount} {name}",
        page="""
----------------
{items}
---------------- {total}
GIVEN {cash} BACK {change}
{date} No.{invoice}
{company}
{address}
? call {phone}""",
    ),
    Layout(
        name="ticket",
        date="14MAR25",
        item="{name} {mark}{amount}",
        page="""
{company} / {cashier}
{address}
TICKET {invoice}
VALID {date} UNTIL {other_date}
{items}
? BOOKING FEE INCLUDED
FARE {mark}{total}""",
    ),
    Layout(
        name="ledger",
        date="2025-03-14",
        item="{amount}\t{name}",
        tax=5,
        page="""
date\t{date}
from\t{company}
{address}
{items}
{subtotal}\tbefore tax
{total}\ttotal {code}
ref\t{invoice}
? clerk\t{cashier}""",
    ),
    Layout(
        name="stall",
        date="2025/03/14",
        item="{name} {qty}pc {mark}{amount}",
        page="""
{greeting}
{company} stall {table}
{address}
{items}
all together {mark}{total}
? got {mark}{cash} gave {mark}{change}
{date} slip {invoice}""",
    ),
)
