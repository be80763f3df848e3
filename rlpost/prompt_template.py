"""The prompt as text over the columns of a row: `{column}`, and `{{` or `}}` for a literal
brace."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from rlpost.errors import RowError
from rlpost.types import JSON

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}\n]*)\}|[{}]")


@dataclass(frozen=True, slots=True)
class Template:
    """A prompt over columns. `pieces` alternate text and column names, text first.

    The line break that ends a file is not part of the prompt.
    """

    pieces: tuple[str, ...]
    place: str = "the prompt template"

    @classmethod
    def parse(cls, text: str, *, place: str = "the prompt template") -> "Template":
        """Raises RowError, with the line, for a brace that neither names a column nor is
        doubled."""
        pieces, literal, end = [], "", 0
        for match in _PIECE.finditer(text.removesuffix("\n")):
            literal += text[end : match.start()]
            end = match.end()
            if match[0] in ("{{", "}}"):
                literal += match[0][0]
            elif match[1] is not None and match[1].strip():
                pieces += [literal, match[1].strip()]
                literal = ""
            else:
                line = text.count("\n", 0, match.start()) + 1
                raise RowError(
                    f"a lone {match[0]!r}",
                    place=place,
                    line=line,
                    cure="{column} names a column, {{ and }} are literal braces",
                )
        return cls((*pieces, literal + text.removesuffix("\n")[end:]), place)

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(self.pieces[1::2]))

    def render(self, columns: Mapping[str, JSON]) -> str:
        """The prompt of a row: text as it is, no value as nothing, everything else as JSON.
        KeyError if a column is missing."""
        return "".join(
            _shown(columns[piece]) if index % 2 else piece
            for index, piece in enumerate(self.pieces)
        )


def _shown(value: JSON) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
