"""Findings -> placeholders."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from veilhead.deidentify.detectors import default_detectors
from veilhead.deidentify.findings import Detector, Finding
from veilhead.deidentify.folding import FoldedText, fold
from veilhead_protocol.errors import DeidentifyError
from veilhead_protocol.manifest import Manifest

_logger = logging.getLogger("veilhead")

_KIND: Final = re.compile(r"[A-Z][A-Z0-9_]{0,63}")


@dataclass(frozen=True)
class Span:
    """What was replaced: where it stood in the original text, and never what it was.

    Attributes:
        start: its first character in the original text.
        end: one past its last.
        kind: what it was taken for: `EMAIL`.
        placeholder: what stands in its place: `[EMAIL_1]`.
    """

    start: int
    end: int
    kind: str
    placeholder: str


@dataclass(frozen=True)
class Deidentified:
    """A text without the values that were found, and the audit of what was replaced.

    Attributes:
        text: the text with placeholders; not shown, since not everything is found.
        spans: what was replaced, in order, without overlaps.
    """

    text: str = field(repr=False)
    spans: tuple[Span, ...]

    def in_original(self, start: int, end: int) -> tuple[int, int]:
        """Where the characters start to end - 1 of `text` come from; placeholders count whole."""
        return self._place(start, is_end=False), self._place(end, is_end=True)

    def _place(self, place: int, *, is_end: bool) -> int:
        behind = 0  # how far the original is ahead of `text`
        for span in self.spans:
            start = span.start - behind
            end = start + len(span.placeholder)
            if place < start + is_end:
                break
            if place < end + is_end:
                return span.end if is_end else span.start
            behind = span.end - end
        return place + behind


class Deidentifier:
    """Replaces what detectors find by placeholders, the same value by the same one.

    Where findings overlap, all that they cover is replaced, under the kind of the longest (where
    several are as long, the first in the text, then that of the earlier detector). It keeps
    nothing between calls, and may be used from several threads if its detectors may.
    """

    def __init__(self, detectors: Sequence[Detector] | None = None) -> None:
        """Use these detectors, or the built-in ones.

        Raises:
            ClientError: when the built-in ones lack `phonenumbers`.
        """
        self.detectors = default_detectors() if detectors is None else tuple(detectors)

    def __repr__(self) -> str:
        return f"Deidentifier(detectors={len(self.detectors)})"

    def __call__(self, text: str) -> Deidentified:
        """The text with placeholders, and what was replaced.

        The answer depends on this text alone, so that a text's labels do not depend on the texts
        that are classified beside it.

        Raises:
            DeidentifyError: when a detector fails, or its finding is not one.
        """
        return self.together([text])[0]

    def together(self, parts: Sequence[str]) -> list[Deidentified]:
        """Parts of one record: the same value has the same placeholder in all of them.

        Raises:
            DeidentifyError: when a detector fails, or its finding is not one.
        """
        placeholders: dict[tuple[str, str], str] = {}
        counts: dict[str, int] = {}
        results: list[Deidentified] = []
        for part in parts:
            folded = fold(part)
            pieces: list[str] = []
            spans: list[Span] = []
            done = 0
            for finding in _merged(self._findings(folded)):
                key = (finding.kind, finding.value)
                if key not in placeholders:
                    counts[finding.kind] = counts.get(finding.kind, 0) + 1
                    placeholders[key] = f"[{finding.kind}_{counts[finding.kind]}]"
                pieces += [part[done : finding.start], placeholders[key]]
                spans.append(Span(finding.start, finding.end, finding.kind, placeholders[key]))
                done = finding.end
            pieces.append(part[done:])
            results.append(Deidentified("".join(pieces), tuple(spans)))
        return results

    def _findings(self, folded: FoldedText) -> list[Finding]:
        """Findings at their places in the original text."""
        text = folded.text
        findings: list[Finding] = []
        for detector in self.detectors:
            name = type(detector).__name__
            try:
                found = list(detector.find(text))
            except Exception as error:
                # Its message may hold text, and so may its traceback's locals.
                raise DeidentifyError(
                    f"the detector {name} failed with {type(error).__name__}"
                ) from None
            for finding in found:
                if not 0 <= finding.start < finding.end <= len(text):
                    raise DeidentifyError(
                        f"the detector {name} found characters {finding.start} to {finding.end} "
                        f"of a text of {len(text)}"
                    )
                if not _KIND.fullmatch(finding.kind):
                    raise DeidentifyError(
                        f"the detector {name} found a kind that is not of the form EMAIL"
                    )
                start, end = folded.span(finding.start, finding.end)
                findings.append(replace(finding, start=start, end=end))
        return findings


def chosen_deidentifier(
    given: bool | Deidentifier | None, manifest: Manifest
) -> Deidentifier | None:
    """What was asked for, else what the model's policy asks for; the log says when it does.

    Raises:
        ClientError: when the built-in detectors lack `phonenumbers`.
    """
    if isinstance(given, Deidentifier):
        return given
    if given is None and manifest.policy.deidentify:
        _logger.info("texts for the model %s are de-identified, as its policy asks", manifest.name)
        return Deidentifier()
    return Deidentifier() if given else None


def _merged(findings: Iterable[Finding]) -> list[Finding]:
    """Findings without overlaps, in order; together they cover what the given ones cover.

    Those that overlap become one, with the kind and value of the longest. Sorting is stable, so
    that of equals the one of the earlier detector stays first.
    """
    merged: list[Finding] = []
    best: list[Finding] = []  # for each of them, the longest of those that it was made of
    for finding in sorted(findings, key=lambda finding: finding.start):
        if merged and finding.start < merged[-1].end:
            if finding.end - finding.start > best[-1].end - best[-1].start:
                best[-1] = finding
            merged[-1] = Finding(
                merged[-1].start,
                max(merged[-1].end, finding.end),
                best[-1].kind,
                best[-1].value,
            )
        else:
            merged.append(finding)
            best.append(finding)
    return merged
