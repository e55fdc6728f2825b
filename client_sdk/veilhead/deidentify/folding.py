"""One form for characters that look or mean the same, without losing where they were.

Digits of every script become ASCII digits, full-width and mathematical letters plain ones (NFKC),
every dash a hyphen and every space a space; characters that do not show (zero-width spaces, soft
hyphens) are left out. Letters that merely look like others (a Cyrillic а) stay what they are.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, repr=False)
class FoldedText:
    """A folded text, and where each of its characters comes from.

    Attributes:
        text: the folded text.
        origins: for each of its characters, its position in the original.
    """

    text: str
    origins: Sequence[int]

    def span(self, start: int, end: int) -> tuple[int, int]:
        """The place in the original of the folded characters start to end - 1 (at least one)."""
        return self.origins[start], self.origins[end - 1] + 1


def fold(text: str) -> FoldedText:
    """The folded text; the text itself where it is ASCII."""
    if text.isascii():
        return FoldedText(text, range(len(text)))
    pieces: list[str] = []
    origins: list[int] = []
    for position, letter in enumerate(text):
        folded = letter if letter.isascii() else _fold_letter(letter)
        pieces.append(folded)
        origins.extend([position] * len(folded))
    return FoldedText("".join(pieces), origins)


@lru_cache(maxsize=4096)
def _fold_letter(letter: str) -> str:
    category = unicodedata.category(letter)
    if category == "Cf":
        return ""
    if category == "Nd":
        return str(unicodedata.decimal(letter))
    if category == "Pd" or letter == "\N{MINUS SIGN}":
        return "-"
    if category == "Zs":
        return " "
    return unicodedata.normalize("NFKC", letter)
