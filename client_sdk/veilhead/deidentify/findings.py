"""What a detector is: text in, findings out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class Finding:
    """One value that a detector found.

    Attributes:
        start: its first character in the text that the detector was given.
        end: one past its last.
        kind: what it is, in capitals, digits and underscores: `EMAIL`.
        value: what makes two findings the same value, however they are written; never shown.
    """

    start: int
    end: int
    kind: str
    value: str = field(repr=False)


class Detector(Protocol):
    """Finds values of one or more kinds; any object with this method can be plugged in."""

    def find(self, text: str) -> Iterable[Finding]:
        """Findings in a text whose digits, spaces and full-width letters are folded to ASCII.

        Findings may overlap, and come in any order.
        """
        ...
