"""Check digits of cards, accounts and national numbers. Arguments have no separators."""

from __future__ import annotations

from datetime import date
from typing import Final

#: Length of an IBAN by country, from the SWIFT IBAN registry, release 99 (December 2024).
IBAN_LENGTHS: Final = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22,
    "BI": 27, "BR": 29, "BY": 28, "CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DJ": 27,
    "DK": 18, "DO": 28, "EE": 20, "EG": 29, "ES": 24, "FI": 18, "FK": 18, "FO": 18, "FR": 27,
    "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28, "HR": 21, "HU": 28, "IE": 22,
    "IL": 23, "IQ": 23, "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LC": 32,
    "LI": 21, "LT": 20, "LU": 20, "LV": 21, "LY": 25, "MC": 27, "MD": 24, "ME": 22, "MK": 19,
    "MN": 20, "MR": 27, "MT": 31, "MU": 30, "NI": 28, "NL": 18, "NO": 15, "OM": 23, "PK": 24,
    "PL": 28, "PS": 29, "PT": 25, "QA": 29, "RO": 24, "RS": 22, "RU": 33, "SA": 24, "SC": 31,
    "SD": 18, "SE": 24, "SI": 19, "SK": 24, "SM": 27, "SO": 23, "ST": 25, "SV": 28, "TL": 23,
    "TN": 24, "TR": 26, "UA": 29, "VA": 22, "VG": 24, "XK": 20, "YE": 30,
}  # fmt: skip

_CN_WEIGHTS: Final = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
_CN_CHECKS: Final = "10X98765432"
_DNI_LETTERS: Final = "TRWAGMYFPDXBNJZSQVHLCKE"

# Codice fiscale: what a character counts for at an odd place (from one), and the letters that
# stand for digits where two people would have the same code.
_FISCALE_ODD: Final = {
    letter: (1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10)[place]
    for places in ("0123456789", "ABCDEFGHIJKLMNOPQRSTUV")
    for place, letter in enumerate(places)
} | {"W": 22, "X": 25, "Y": 24, "Z": 23}

_PESEL_WEIGHTS: Final = (1, 3, 7, 9, 1, 3, 7, 9, 1, 3)
_PESEL_CENTURIES: Final = {0: 1900, 20: 2000, 40: 2100, 60: 2200, 80: 1800}


def is_date(year: int, month: int, day: int) -> bool:
    """Whether there is such a day."""
    try:
        date(year, month, day)
    except ValueError:
        return False
    return True


def is_card_number(digits: str) -> bool:
    """A payment card: an issuer's prefix with one of its lengths, and Luhn's check digit."""
    return _has_issuer(digits) and luhn(digits)


def luhn(digits: str) -> bool:
    """Luhn's check (ISO/IEC 7812-1, annex B)."""
    doubled = (sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (sum(map(int, digits[-1::-2])) + sum(doubled)) % 10 == 0


def _has_issuer(digits: str) -> bool:
    length = len(digits)
    two, three, four = int(digits[:2]), int(digits[:3]), int(digits[:4])
    return (
        (digits[0] == "4" and length in (13, 16, 19))  # Visa
        or ((51 <= two <= 55 or 2221 <= four <= 2720) and length == 16)  # Mastercard
        or (two in (34, 37) and length == 15)  # American Express
        or ((two == 65 or four == 6011 or 644 <= three <= 649) and 16 <= length <= 19)  # Discover
        or ((two in (36, 38, 39) or 300 <= three <= 305) and length == 14)  # Diners Club
        or (3528 <= four <= 3589 and 16 <= length <= 19)  # JCB
        or (two == 62 and 16 <= length <= 19)  # UnionPay
        or ((two == 50 or 56 <= two <= 69) and length == 16)  # Maestro, as it is mostly issued
    )


def is_iban(text: str) -> bool:
    """An IBAN (ISO 13616) in capitals: its country's length, and a remainder of one modulo 97."""
    if len(text) != IBAN_LENGTHS.get(text[:2]):
        return False
    return int("".join(str(int(letter, 36)) for letter in text[4:] + text[:4])) % 97 == 1


def is_us_ssn(digits: str) -> bool:
    """Nine digits in the ranges that are assigned; there is no check digit."""
    area, group, serial = digits[:3], digits[3:5], digits[5:]
    return area not in ("000", "666") and area < "900" and group != "00" and serial != "0000"


def is_uk_nhs(digits: str) -> bool:
    """Ten digits with a check modulo 11 (NHS data dictionary)."""
    total = sum(
        weight * int(digit) for weight, digit in zip(range(10, 1, -1), digits, strict=False)
    )
    return (11 - total % 11) % 11 == int(digits[9])


def is_cn_id(text: str) -> bool:
    """Eighteen characters (GB 11643): a province, a day of birth, ISO 7064 MOD 11-2."""
    total = sum(weight * int(digit) for weight, digit in zip(_CN_WEIGHTS, text, strict=False))
    year, month, day = int(text[6:10]), int(text[10:12]), int(text[12:14])
    return (
        text[0] in "12345678"
        and 1800 <= year <= 2100
        and is_date(year, month, day)
        and _CN_CHECKS[total % 11] == text[17]
    )


def is_es_dni(text: str) -> bool:
    """DNI or NIE, in capitals: eight digits (the first one X, Y or Z of a NIE), and a letter."""
    digits = text[:8].translate(str.maketrans("XYZ", "012"))
    return _DNI_LETTERS[int(digits) % 23] == text[8]


def is_fr_nir(text: str) -> bool:
    """Fifteen characters, in capitals: sex, year, month, commune, order, a check modulo 97."""
    month = int(text[3:5])
    if not (1 <= month <= 12 or 20 <= month <= 42 or 50 <= month <= 99):
        return False
    department = text[5:7].replace("2A", "19").replace("2B", "18")
    return 97 - int(text[:5] + department + text[7:13]) % 97 == int(text[13:])


def is_it_codice_fiscale(text: str) -> bool:
    """Sixteen characters, in capitals, the last of them a check (decree of 12 March 1974)."""
    total = sum(
        _FISCALE_ODD[letter] if place % 2 == 0 else _fiscale_even(letter)
        for place, letter in enumerate(text[:15])
    )
    return chr(ord("A") + total % 26) == text[15]


def _fiscale_even(letter: str) -> int:
    return int(letter) if letter.isdigit() else ord(letter) - ord("A")


def is_de_tax_id(digits: str) -> bool:
    """Eleven digits: one of the first ten comes twice or thrice, ISO 7064 MOD 11,10."""
    counts = sorted(digits[:10].count(digit) for digit in set(digits[:10]))
    if digits[0] == "0" or counts[-1] not in (2, 3) or counts[-2] != 1:
        return False
    product = 10
    for digit in digits[:10]:
        product = 2 * ((int(digit) + product) % 10 or 10) % 11
    return (11 - product) % 10 == int(digits[10])


def is_nl_bsn(digits: str) -> bool:
    """Nine digits with the eleven test."""
    weights = (9, 8, 7, 6, 5, 4, 3, 2, -1)
    total = sum(weight * int(digit) for weight, digit in zip(weights, digits, strict=False))
    return total % 11 == 0 and digits.strip("0") != ""


def is_pl_pesel(digits: str) -> bool:
    """Eleven digits: a day of birth whose month tells the century, and a check modulo 10."""
    months = int(digits[2:4])
    century = _PESEL_CENTURIES[months // 20 * 20]
    if not is_date(century + int(digits[:2]), months % 20, int(digits[4:6])):
        return False
    total = sum(weight * int(digit) for weight, digit in zip(_PESEL_WEIGHTS, digits, strict=False))
    return -total % 10 == int(digits[10])
