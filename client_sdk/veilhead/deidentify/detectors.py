"""The detectors that are built in.

All of them take time that grows with the text and no faster: a pattern either consumes what it
reads or has bounded length, and a number's groups are looked at in windows of bounded size.
Characters beside a number count as part of it only when they are ASCII, since scripts without
spaces put letters right beside it.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from veilhead.deidentify import checksums
from veilhead.deidentify.findings import Detector, Finding
from veilhead_protocol.errors import ClientError

#: How far before a value the words are looked for that say what it is.
_CONTEXT: Final = 40

#: What may stand between such words and the value: neither digits nor the end of a sentence.
_GAP: Final = r"\.?(?:\b(?:no|nr|num)\.|[^.!?;\n\d]){0,30}\Z"

#: What stands before a version, which looks like an address.
_VERSION: Final = re.compile(r"\b(?:version|release|firmware|build|ver\.?) {0,2}\Z", re.I)

#: Letters of e-mail addresses and host names. Scripts that write no spaces are left out: the
#: address would swallow the sentence before it.
_LETTER: Final = r"[^\W\u0600-\U0010ffff]"

_LOCAL: Final = re.compile(rf"(?:{_LETTER}|[.!#$%&'*+/=?^`{{|}}~-])")
_DOMAIN: Final = re.compile(rf"(?:(?:{_LETTER}|-){{1,63}}\.){{1,8}}[^\W\d_]{{2,63}}")

_URL: Final = re.compile(
    r"(?<![A-Za-z0-9])(?:(?:https?|ftps?|sftp|wss?)://|www\d?\.)[^\s<>\"`{}|\\^\u3000-\u303f]+",
    re.I,
)
_URL_TAIL: Final = ".,;:!?'*_"

_IPV4: Final = re.compile(r"(?<![A-Za-z0-9_.])\d{1,3}(?:\.\d{1,3}){3}(?![A-Za-z0-9_]|\.\d)")
_IPV6: Final = re.compile(
    r"(?<![A-Za-z0-9_:.])[0-9A-Fa-f:][0-9A-Fa-f:.]{1,44}(?:%[A-Za-z0-9]{1,16})?(?![A-Za-z0-9_:])"
)

_RUN: Final = re.compile(r"\d+(?:[ .-]\d+)*")

# Looked at without being consumed: what follows the account may be the next one.
_IBAN: Final = re.compile(r"(?<![A-Za-z0-9_])(?=([A-Za-z]{2}\d{2}(?:[ -]?[A-Za-z0-9]){11,30}))")

_MONTH: Final = (
    r"(?:jan|f[eé]b|m[aä]r|apr|avr|abr|ma[iyg]|jui?n|jui?l|lug|giu|aug|ao[uû]|ago|sep|set|o[ck]t|"
    r"ott|nov|d[eé][cz]|dic|ene|gen)[^\W\d_]{0,7}\.?"
)
_DATE: Final = (
    r"(?:\d{4}[-/.]\d{1,2}[-/.]\d{1,2}"
    r"|\d{1,2}[-/.] ?\d{1,2}[-/.] ?(?:\d{4}|\d{2})"
    rf"|\d{{1,2}}(?:st|nd|rd|th|er|\.)?[ -](?:(?:of|de) )?{_MONTH},?[ -](?:(?:de|del) )?"
    r"(?:\d{4}|\d{2})"
    rf"|{_MONTH} \d{{1,2}}(?:st|nd|rd|th)?,? (?:\d{{4}}|\d{{2}})"
    r"|\d{4}年\d{1,2}月\d{1,2}日"
    r"|\d{8})(?![A-Za-z0-9])"
)
_DOTTED_DATE: Final = re.compile(r"(?:[0-3]?\d\.[01]?\d\.\d{2,4}|\d{4}\.[01]?\d\.[0-3]?\d)")
_BORN: Final = (
    r"(?:\bd\.? ?o\.? ?b\b|\bdate of birth\b|\bbirth ?dates?\b|\bbirthday\b|\bborn\b|\bgeb\b|"
    r"\bgeboren\b|\bgeburtsdatum\b|\bnée?\b|\bdate de naissance\b|\bnacid[oa]\b|"
    r"\bfecha de nacimiento\b|\bnat[oa] il\b|\bdata di nascita\b|\bgeboortedatum\b|"
    r"\bdata urodzenia\b|出生日期|出生|生日)"
)
_BIRTH: Final = (
    re.compile(rf"{_BORN}[^\d;]{{0,24}}?(?P<value>{_DATE})", re.I),
    re.compile(
        rf"(?<![\d/.-])(?P<value>{_DATE}) ?\(?(?:d\.?o\.?b\b|date of birth\b|birth ?date\b)", re.I
    ),
)

_RECORD: Final = re.compile(
    r"(?:\bm\.?r\.?n\b|\bmedical record\b|\bmed\.? rec\b|\bpatient (?:id|no|num|number|identifier)"
    r"\b|\b(?:hospital|chart|unit) (?:id|no|num|number)\b|\bpatientennummer\b|\bfallnummer\b|"
    r"病历号|病案号|住院号)"
    r"[ .:#=-]{0,3}(?:(?:id|is|no|num|number)\b[ .:#=-]{0,3}){0,2}"
    r"(?P<value>\d{2,4}(?: \d{2,4}){1,3}|[A-Za-z0-9](?:[-/]?[A-Za-z0-9]){3,19})(?![A-Za-z0-9])",
    re.I,
)

_PHONE_WORDS: Final = re.compile(
    r"\b(?:tel|telephone|phone|ph|mobile|mob|cell|call|fax|whatsapp|sms|dial|reach|contact|telefon|handy|"
    r"téléphone|teléfono|telefono|móvil)\b|电话|手机",
    re.I,
)
_PHONE_FOLLOWS: Final = re.compile(rf"(?:{_PHONE_WORDS.pattern}){_GAP}", re.I)


def default_detectors(phone_regions: Sequence[str] = ("US", "GB")) -> tuple[Detector, ...]:
    """The detectors that are built in; where two find as much, the earlier one's kind is used.

    Args:
        phone_regions: countries (ISO 3166, two letters) whose phone numbers are found as they are
            dialled at home; numbers that begin with + are found whatever their country.

    Raises:
        ClientError: when `phonenumbers` is not installed, or knows no such country.
    """
    return (
        _Email(),
        _Url(),
        _IpAddress(),
        _Iban(),
        _Digits(
            "CARD",
            # 16, 15 and 14 digits as they are printed, and in one piece
            frozenset({(4, 4, 4, 4), (4, 4, 4, 4, 3), (4, 6, 5), (4, 6, 4)})
            | {(length,) for length in range(13, 20)},
            checksums.is_card_number,
            separators=" .-",
        ),
        _Pattern(
            "CN_ID",
            r"\d{6} ?\d{8} ?\d{3}[\dXx]",
            checksums.is_cn_id,
        ),
        _Pattern(
            "FR_NIR",
            r"[12] ?\d{2} ?\d{2} ?(?:\d{2}|2[ABab]) ?\d{3} ?\d{3} ?\d{2}",
            checksums.is_fr_nir,
        ),
        _Pattern(
            "IT_CODICE_FISCALE",
            r"[A-Za-z]{6} ?[\dL-NP-Vl-np-v]{2}[A-EHLMPR-Ta-ehlmpr-t][\dL-NP-Vl-np-v]{2} ?"
            r"[A-Za-z][\dL-NP-Vl-np-v]{3}[A-Za-z]",
            checksums.is_it_codice_fiscale,
        ),
        _Pattern(
            "ES_DNI",
            r"(?:\d{8}|\d{2}\.\d{3}\.\d{3}|[XYZxyz][ -]?\d{7})(?:[ -]?[A-Z]|-?[a-z])",
            checksums.is_es_dni,
        ),
        _Pattern(
            "UK_NINO",
            r"(?!(?i:BG|GB|NK|KN|TN|NT|ZZ))"
            r"[A-CEGHJ-PR-TW-Za-ceghj-pr-tw-z][A-CEGHJ-NPR-TW-Za-ceghj-npr-tw-z]"
            r"[ -]?\d{2}[ -]?\d{2}[ -]?\d{2}[ -]?[A-Da-d]",
        ),
        _Digits("DE_TAX_ID", frozenset({(11,), (2, 3, 3, 3)}), checksums.is_de_tax_id),
        _Digits("PL_PESEL", frozenset({(11,)}), checksums.is_pl_pesel),
        _Digits(
            "UK_NHS",
            frozenset({(10,), (3, 3, 4)}),
            checksums.is_uk_nhs,
            certain=frozenset({((3, 3, 4), " ")}),
            words=re.compile(rf"\bNHS\b{_GAP}", re.I),
        ),
        _Digits(
            "US_SSN",
            frozenset({(9,), (3, 2, 4)}),
            checksums.is_us_ssn,
            certain=frozenset({((3, 2, 4), "-")}),
            words=re.compile(rf"\b(?:ssn|social security|soc\.? sec)\b{_GAP}", re.I),
        ),
        _Digits(
            "NL_BSN",
            frozenset({(9,), (4, 2, 3), (3, 3, 3)}),
            checksums.is_nl_bsn,
            certain=frozenset(),
            words=re.compile(rf"\b(?:bsn|burgerservicenummer|sofi){_GAP}", re.I),
        ),
        _Birth(),
        _Record(),
        _phone_detector(tuple(phone_regions)),
    )


class _Email:
    """Addresses, found by their @: reading on from every letter would take quadratic time."""

    def find(self, text: str) -> Iterator[Finding]:
        for sign in re.finditer("@", text):
            start = sign.start()
            # No further than to the @ before it: every letter is looked at once.
            while start > 0 and _LOCAL.match(text, start - 1):
                start -= 1
            while start < sign.start() and text[start] in ".'`/=|":
                start += 1  # quotes and separators in front of an address
            domain = _DOMAIN.match(text, sign.end())
            if domain is not None and start < sign.start():
                yield Finding(start, domain.end(), "EMAIL", text[start : domain.end()].casefold())


class _Url:
    def find(self, text: str) -> Iterator[Finding]:
        for match in _URL.finditer(text):
            url = match[0]
            # A bracket belongs to the text around it unless the address has opened it.
            unopened = {
                closing: url.count(closing) - url.count(opening)
                for opening, closing in ("()", "[]")
            }
            end = len(url)
            while end and (url[end - 1] in _URL_TAIL or unopened.get(url[end - 1], 0) > 0):
                end -= 1
                if url[end] in unopened:
                    unopened[url[end]] -= 1
            url = url[:end]
            yield Finding(match.start(), match.start() + len(url), "URL", url)


class _IpAddress:
    def find(self, text: str) -> Iterator[Finding]:
        for pattern, tails in ((_IPV4, ("",)), (_IPV6, ("", ".", ":"))):
            for match in pattern.finditer(text):
                for tail in tails:
                    found = match[0].removesuffix(tail)
                    try:
                        address = ipaddress.ip_address(found)
                    except ValueError:
                        continue
                    # std::size and a::b are code.
                    is_code = not any(letter.isdigit() for letter in found)
                    if not is_code and not _follows(_VERSION, text, match.start()):
                        end = match.start() + len(found)
                        yield Finding(match.start(), end, "IP", address.compressed)
                    break


class _Iban:
    def find(self, text: str) -> Iterator[Finding]:
        for match in _IBAN.finditer(text):
            candidate = match[1]
            length = checksums.IBAN_LENGTHS.get(candidate[:2].upper(), 0)
            places = [place for place, letter in enumerate(candidate) if letter.isalnum()][:length]
            if len(places) != length or not places:
                continue
            end = match.start() + places[-1] + 1
            value = "".join(candidate[place] for place in places).upper()
            if not _continues(text, end) and checksums.is_iban(value):
                yield Finding(match.start(), end, "IBAN", value)


@dataclass(frozen=True)
class _Pattern:
    """Numbers with letters or of fixed form: `pattern` has bounded length."""

    kind: str
    pattern: str
    is_valid: Callable[[str], bool] | None = None

    def find(self, text: str) -> Iterator[Finding]:
        compiled = re.compile(rf"(?<![A-Za-z0-9_])(?:{self.pattern})(?![A-Za-z0-9_])")
        for match in compiled.finditer(text):
            value = re.sub(r"[ .-]", "", match[0]).upper()
            if self.is_valid is None or self.is_valid(value):
                yield Finding(match.start(), match.end(), self.kind, value)


@dataclass(frozen=True)
class _Digits:
    """Numbers of digits alone, in groups.

    Attributes:
        kind: what they are.
        shapes: lengths of their groups.
        is_valid: whether digits are such a number.
        certain: shapes and separators that need no word before them; None for all of them.
        words: what says that such a number follows.
        separators: what may stand between groups, the same one between all of them.
    """

    kind: str
    shapes: frozenset[tuple[int, ...]]
    is_valid: Callable[[str], bool]
    certain: frozenset[tuple[tuple[int, ...], str]] | None = None
    words: re.Pattern[str] | None = None
    separators: str = " -"

    def find(self, text: str) -> Iterator[Finding]:
        most = max(map(len, self.shapes))
        for run in _RUN.finditer(text):
            groups = [match.span() for match in re.finditer(r"\d+", run[0])]
            for first in range(len(groups)):
                for count in range(1, min(most, len(groups) - first) + 1):
                    window = groups[first : first + count]
                    start, end = run.start() + window[0][0], run.start() + window[-1][1]
                    shape = tuple(end - start for start, end in window)
                    if shape in self.shapes and self._is_one(text, start, end, shape):
                        digits = re.sub(r"\D", "", text[start:end])
                        yield Finding(start, end, self.kind, digits)

    def _is_one(self, text: str, start: int, end: int, shape: tuple[int, ...]) -> bool:
        found = text[start:end]
        separators = set(re.sub(r"\d", "", found))
        if len(separators) > 1 or not separators <= set(self.separators):
            return False
        if not _stands_alone(text, start, end):
            return False
        if not self.is_valid(re.sub(r"\D", "", found)):
            return False
        separator = separators.pop() if separators else ""
        if self.certain is None or (shape, separator) in self.certain:
            return True
        return self.words is not None and _follows(self.words, text, start)


class _Birth:
    """Dates that the words beside them call a birthday; other dates stay."""

    def find(self, text: str) -> Iterator[Finding]:
        for pattern in _BIRTH:
            for match in pattern.finditer(text):
                value = match["value"]
                if _is_plausible_date(value):
                    yield Finding(*match.span("value"), "BIRTH_DATE", value.casefold())


def _is_plausible_date(text: str) -> bool:
    """Whether the numbers could be a day, a month and a year, in whatever order."""
    numbers = [int(found) for found in re.findall(r"\d+", text)]
    if len(numbers) == 1:
        number = numbers[0]
        if not 18000000 <= number <= 21991231:  # 19840312; otherwise 12031984
            number = number % 10000 * 10000 + number // 10000
        return checksums.is_date(number // 10000, number // 100 % 100, number % 100) or (
            checksums.is_date(number // 10000, number % 100, number // 100 % 100)
        )
    if len(numbers) == 2:  # the month is a word
        return 1 <= numbers[0] <= 31
    first, second = numbers[1:] if numbers[0] > 31 else numbers[:2]  # beside the year
    return 1 <= min(first, second) <= 12 and 1 <= max(first, second) <= 31


class _Record:
    """Medical record numbers: they have no form of their own, the words before them tell."""

    def find(self, text: str) -> Iterator[Finding]:
        for match in _RECORD.finditer(text):
            value = match["value"]
            if sum(letter.isdigit() for letter in value) >= 3:
                key = re.sub(r"[-/ ]", "", value).upper()
                yield Finding(*match.span("value"), "MEDICAL_RECORD", key)


@dataclass(frozen=True)
class _Phone:
    """Numbers of a country's plan that are written as phone numbers, or called so.

    Digits in one piece count only with a + before them or a word for phone shortly before; after
    such a word, every number of a possible length counts.
    """

    library: Any  # the module phonenumbers
    regions: tuple[str, ...]

    def find(self, text: str) -> Iterator[Finding]:
        leniency = self.library.Leniency
        levels = [leniency.VALID]
        if _PHONE_WORDS.search(text):
            levels.append(leniency.POSSIBLE)
        seen: set[tuple[int, int]] = set()
        for level in levels:
            for region in self.regions or (None,):
                for match in self.library.PhoneNumberMatcher(text, region, level):
                    # A bracket that it does not close belongs to the text around it.
                    unclosed = match.raw_string[0] in "([" and ")" not in match.raw_string
                    span = (match.start + unclosed, match.end)
                    is_written_as_one = level == leniency.VALID and not match.raw_string.isdigit()
                    if span in seen or not _stands_alone(text, *span):
                        continue
                    if _DOTTED_DATE.fullmatch(match.raw_string):
                        continue  # the library knows those with slashes only
                    if not (is_written_as_one or _follows(_PHONE_FOLLOWS, text, span[0])):
                        continue
                    seen.add(span)
                    number = self.library.format_number(
                        match.number, self.library.PhoneNumberFormat.E164
                    )
                    yield Finding(*span, "PHONE", number)


def _phone_detector(regions: tuple[str, ...]) -> _Phone:
    try:
        import phonenumbers
    except ModuleNotFoundError:
        raise ClientError(
            "de-identification finds phone numbers with the package phonenumbers, which is not "
            "installed: pip install 'veilhead[deidentify]'"
        ) from None
    unknown = [region for region in regions if region not in phonenumbers.SUPPORTED_REGIONS]
    if unknown:
        raise ClientError(
            f"got {unknown[0]!r} as a country of phone numbers, expected two letters as in US or GB"
        )
    return _Phone(phonenumbers, regions)


def _is_word(letter: str) -> bool:
    return letter.isascii() and (letter.isalnum() or letter == "_")


def _continues(text: str, end: int) -> bool:
    """Whether what ends before `end` goes on there."""
    return end < len(text) and _is_word(text[end])


def _stands_alone(text: str, start: int, end: int) -> bool:
    """Whether no letter, digit or underscore is right beside it."""
    return not _continues(text, end) and not (start > 0 and _is_word(text[start - 1]))


def _follows(words: re.Pattern[str], text: str, start: int) -> bool:
    """Whether one of the words stands shortly before `start`."""
    return words.search(text, max(0, start - _CONTEXT), start) is not None
