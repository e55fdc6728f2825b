"""Generated records with values that point at nobody, and where they stand.

Medical notes, complaints, support mail, alerts and forms are made of sentences. Some hold a value
of one kind in one of the ways in which people write it; about one in ten is written in a way that
the detectors are not made for, since a generator that knows only what is found would measure
nothing. Other sentences hold what looks like a value and is none. Names and addresses stand in
them too: they have no kind here, and nothing finds them.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from veilhead.deidentify import checksums

_Writer = Callable[[random.Random], str]


@dataclass(frozen=True)
class Truth:
    """A value that stands in a record: its place and kind."""

    start: int
    end: int
    kind: str


@dataclass(frozen=True)
class Record:
    """A generated text, and every value in it."""

    text: str
    truths: tuple[Truth, ...]


def records(
    count: int, seed: int = 1, *, unseen: bool | None = None, kinds: Sequence[str] | None = None
) -> Iterator[Record]:
    """So many records; the same ones for the same seed.

    Args:
        count: how many.
        seed: what they follow from.
        unseen: with True, of every third sentence alone, and with False of the others, so that
            the two have no sentence in common; of all when it is None.
        kinds: kinds of values, of `KINDS`; all when it is None.
    """
    generator = random.Random(seed)  # noqa: S311  (not a secret)
    kinds = list(_VALUES) if kinds is None else list(kinds)
    others = _part((*_FILLERS, *_NEAR_MISSES), unseen)
    for number in range(count):
        # Every kind comes up as often as any other, beside others.
        chosen = [kinds[number % len(kinds)], *generator.sample(kinds, generator.randint(0, 2))]
        sentences: list[tuple[str, Truth | None]] = [
            _sentence(generator, kind, unseen) for kind in chosen
        ]
        for _ in range(generator.randint(2, 4)):
            sentences.append((_filled(generator, generator.choice(others)), None))
        generator.shuffle(sentences)
        yield _joined(sentences)


def near_misses(count: int, seed: int = 1) -> Iterator[str]:
    """Sentences without any value, but with what looks like one."""
    generator = random.Random(seed)  # noqa: S311
    for number in range(count):
        yield _filled(generator, _NEAR_MISSES[number % len(_NEAR_MISSES)])


def _joined(sentences: Sequence[tuple[str, Truth | None]]) -> Record:
    text, truths = "", []
    for sentence, truth in sentences:
        if text:
            text += " "
        if truth is not None:
            truths.append(Truth(len(text) + truth.start, len(text) + truth.end, truth.kind))
        text += sentence
    return Record(text, tuple(truths))


def _part(sentences: Sequence[str], unseen: bool | None) -> Sequence[str]:
    """Every third sentence, the others, or all."""
    if unseen is None:
        return sentences
    return [sentence for place, sentence in enumerate(sentences) if (place % 3 == 2) == unseen]


def _sentence(generator: random.Random, kind: str, unseen: bool | None) -> tuple[str, Truth]:
    """A sentence with a value of this kind, and where in it the value stands."""
    frames, writers = _VALUES[kind]
    frames = _part(frames, unseen)
    weights = [weight for _, weight in writers]
    ((writer, _),) = generator.choices(writers, weights)
    value = writer(generator)
    before, after = _filled(generator, generator.choice(frames)).split("{}")
    return f"{before}{value}{after}", Truth(len(before), len(before) + len(value), kind)


def _filled(generator: random.Random, template: str) -> str:
    """A template with its <names> written out; `{}` stays."""
    for name, writer in _PARTS.items():
        while f"<{name}>" in template:
            template = template.replace(f"<{name}>", writer(generator), 1)
    return template


def _digits(generator: random.Random, count: int) -> str:
    return "".join(generator.choices(string.digits, k=count))


def _grouped(text: str, *sizes: int, by: str = " ") -> str:
    pieces, start = [], 0
    for size in sizes:
        pieces.append(text[start : start + size])
        start += size
    return by.join([*pieces, text[start:]]) if text[start:] else by.join(pieces)


def _until(is_valid: Callable[[str], bool], make: Callable[[], str]) -> str:
    """The first made value that passes its check."""
    while not is_valid(value := make()):
        pass
    return value


def _fail(is_valid: Callable[[str], bool], value: str) -> str:
    """The value with its last digit changed to one that fails the check."""
    for digit in string.digits:
        changed = value[:-1] + digit
        if not is_valid(changed):
            return changed
    raise AssertionError("a check digit has more than one value")


# --- values ---------------------------------------------------------------------------------------

# fmt: off
_GIVEN: Final = (
    "Maria", "James", "Wei", "Fatima", "Jonas", "Aisha", "Pedro", "Olga", "Ken", "Chloe", "Noah",
    "Priya", "Lars", "Zofia",
)
_FAMILY: Final = (
    "Doe", "Smith", "Zhang", "Rossi", "Novak", "Garcia", "Dubois", "Jansen", "Khan", "Weber",
    "Okafor", "Kowalska",
)
_HOSTS: Final = (
    "example.com", "mail.example.org", "example.co.uk", "klinik.example.de", "example.io",
)
_AREAS: Final = (
    "201", "202", "212", "213", "305", "312", "404", "415", "503", "512", "602", "617", "702",
    "713", "805", "808", "917", "972",
)
_CITIES: Final = (
    "Leeds", "Austin", "Lyon", "Hamburg", "Porto", "Utrecht", "Boston", "Gdansk", "Turin",
    "Bristol",
)
_MONTHS: Final = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)
# fmt: on


def _name(generator: random.Random) -> str:
    return f"{generator.choice(_GIVEN)} {generator.choice(_FAMILY)}"


def _email(generator: random.Random) -> str:
    given, family = _name(generator).lower().split()
    local = generator.choice(
        [
            f"{given}.{family}",
            f"{given[0]}{family}",
            f"{given}_{family}{_digits(generator, 2)}",
            f"{given}+{family}",
            family.upper(),
        ]
    )
    return f"{local}@{generator.choice(_HOSTS)}"


def _spelled_email(generator: random.Random) -> str:
    local, _, host = _email(generator).partition("@")
    return generator.choice([f"{local} (at) {host}", f"{local} at {host.replace('.', ' dot ')}"])


def _url(generator: random.Random) -> str:
    path = "".join(generator.choices(string.ascii_lowercase + string.digits, k=8))
    return generator.choice(
        [
            f"https://portal.example.com/u/{path}",
            f"http://example.org/{path}?id={path}#top",
            f"www.example.co.uk/{path}",
            f"https://192.0.2.{generator.randint(1, 254)}:8443/{path}",
        ]
    )


def _bare_url(generator: random.Random) -> str:
    return f"portal.example.com/u/{_digits(generator, 6)}"


def _ipv4(generator: random.Random) -> str:
    return ".".join(str(generator.randint(1, 254)) for _ in range(4))


def _ipv6(generator: random.Random) -> str:
    groups = [f"{generator.randrange(65536):x}" for _ in range(4)]
    return generator.choice([f"2001:db8::{groups[0]}:{groups[1]}", f"fe80::{':'.join(groups)}"])


def _defanged_ip(generator: random.Random) -> str:
    return _ipv4(generator).replace(".", "[.]")


def _us_phone(generator: random.Random) -> str:
    area, exchange = (
        generator.choice(_AREAS),
        f"{generator.choice('23456789')}{_digits(generator, 2)}",
    )
    line = _digits(generator, 4)
    return generator.choice(
        [
            f"({area}) {exchange}-{line}",
            f"{area}-{exchange}-{line}",
            f"{area}.{exchange}.{line}",
            f"+1 {area} {exchange} {line}",
            f"{area}{exchange}{line}",
            f"1-{area}-{exchange}-{line}",
        ]
    )


def _other_phone(generator: random.Random) -> str:
    return generator.choice(
        [
            f"+44 7700 900{_digits(generator, 3)}",
            f"07700 900{_digits(generator, 3)}",
            f"020 7946 0{_digits(generator, 3)}",
            f"+49 30 23125{_digits(generator, 3)}",
            f"+33 1 99 00 {_digits(generator, 2)} {_digits(generator, 2)}",
            f"+86 138 {_digits(generator, 4)} {_digits(generator, 4)}",
            f"+91 98765 4{_digits(generator, 4)}",
        ]
    )


def _local_phone(generator: random.Random) -> str:
    return f"555-{_digits(generator, 4)}"


def _card_number(generator: random.Random) -> str:
    prefix, length = generator.choice(
        [
            ("4", 16),
            ("51", 16),
            ("55", 16),
            ("2221", 16),
            ("34", 15),
            ("37", 15),
            ("6011", 16),
            ("36", 14),
            ("3530", 16),
            ("62", 16),
        ]
    )
    return _until(
        checksums.is_card_number, lambda: prefix + _digits(generator, length - len(prefix))
    )


def _card(generator: random.Random) -> str:
    digits = _card_number(generator)
    sizes = {16: (4, 4, 4, 4), 15: (4, 6, 5), 14: (4, 6, 4)}[len(digits)]
    return generator.choice([digits, _grouped(digits, *sizes), _grouped(digits, *sizes, by="-")])


def _dotted_card(generator: random.Random) -> str:
    return _grouped(_card_number(generator), 4, 4, 4, 4, by=".")


def _iban_value(generator: random.Random) -> str:
    country = generator.choice(["DE", "GB", "FR", "NL", "ES", "IT", "PL", "NO", "CH", "BE"])
    bank = {"GB": "NWBK", "NL": "ABNA", "IT": "X"}.get(country, "")
    length = checksums.IBAN_LENGTHS[country] - 4 - len(bank)
    body = bank + _digits(generator, length)
    for check in range(2, 99):
        if checksums.is_iban(value := f"{country}{check:02}{body}"):
            return value
    raise AssertionError("one of the checks fits")


def _iban(generator: random.Random) -> str:
    value = _iban_value(generator)
    return generator.choice([value, _grouped(value, *[4] * (len(value) // 4)), value.lower()])


def _masked_iban(generator: random.Random) -> str:
    value = _iban_value(generator)
    return value[:2] + " " + _grouped(value[2:], 2, 6, by=" / ")


def _ssn_value(generator: random.Random) -> str:
    return _until(checksums.is_us_ssn, lambda: _digits(generator, 9))


def _ssn(generator: random.Random) -> str:
    value = _ssn_value(generator)
    return generator.choice([_grouped(value, 3, 2, 4, by="-"), _grouped(value, 3, 2, 4), value])


def _nhs_value(generator: random.Random) -> str:
    return _until(checksums.is_uk_nhs, lambda: "4" + _digits(generator, 9))


def _nhs(generator: random.Random) -> str:
    value = _nhs_value(generator)
    return generator.choice([_grouped(value, 3, 3, 4), value, _grouped(value, 3, 3, 4, by="-")])


def _nino(generator: random.Random) -> str:
    value = (
        generator.choice(["AB", "JM", "PK", "SR", "WE", "YZ"])
        + _digits(generator, 6)
        + generator.choice("ABCD")
    )
    return generator.choice([value, _grouped(value, 2, 2, 2, 2), value.lower()])


def _birthday(generator: random.Random) -> tuple[int, int, int]:
    return generator.randint(1931, 2012), generator.randint(1, 12), generator.randint(1, 28)


def _cn_id(generator: random.Random) -> str:
    year, month, day = _birthday(generator)
    return _until(
        checksums.is_cn_id,
        lambda: (
            generator.choice(["110105", "310104", "440524", "510107"])
            + f"{year}{month:02}{day:02}"
            + _digits(generator, 3)
            + generator.choice("0123456789X")
        ),
    )


def _dni(generator: random.Random) -> str:
    value = _until(
        checksums.is_es_dni,
        lambda: (
            generator.choice(string.digits + "XYZ")
            + _digits(generator, 7)
            + generator.choice(string.ascii_uppercase)
        ),
    )
    return generator.choice([value, f"{value[:-1]}-{value[-1]}", value.lower()])


def _nir(generator: random.Random) -> str:
    year, month, _ = _birthday(generator)
    body = f"{generator.choice('12')}{year % 100:02}{month:02}75" + _digits(generator, 6)
    value = _until(checksums.is_fr_nir, lambda: body + _digits(generator, 2))
    return generator.choice([value, _grouped(value, 1, 2, 2, 2, 3, 3, 2)])


def _fiscale(generator: random.Random) -> str:
    year, _, day = _birthday(generator)
    body = (
        "".join(generator.choices("BCDFGLMNPRSTVZ", k=6))
        + f"{year % 100:02}{generator.choice('ABCDEHLMPRST')}{day:02}"
        + f"H{_digits(generator, 3)}"
    )
    value = _until(
        checksums.is_it_codice_fiscale, lambda: body + generator.choice(string.ascii_uppercase)
    )
    return generator.choice([value, value.lower()])


def _tax_id(generator: random.Random) -> str:
    def make() -> str:
        ten = generator.sample(string.digits, 9)
        ten.insert(generator.randrange(10), generator.choice(ten))
        return "".join(ten) + _digits(generator, 1)

    value = _until(checksums.is_de_tax_id, make)
    return generator.choice([value, _grouped(value, 2, 3, 3, 3)])


def _bsn(generator: random.Random) -> str:
    return _until(checksums.is_nl_bsn, lambda: _digits(generator, 9))


def _pesel(generator: random.Random) -> str:
    year, month, day = _birthday(generator)
    month += 20 if year >= 2000 else 0
    body = f"{year % 100:02}{month:02}{day:02}" + _digits(generator, 4)
    return _until(checksums.is_pl_pesel, lambda: body + _digits(generator, 1))


def _date(generator: random.Random) -> str:
    year, month, day = _birthday(generator)
    word = _MONTHS[month - 1]
    return generator.choice(
        [
            f"{month:02}/{day:02}/{year}",
            f"{day}.{month}.{year}",
            f"{year}-{month:02}-{day:02}",
            f"{day} {word} {year}",
            f"{word} {day}, {year}",
            f"{day}-{word[:3]}-{year % 100:02}",
            f"{month}/{day}/{year % 100:02}",
            f"{year}{month:02}{day:02}",
        ]
    )


def _worded_date(generator: random.Random) -> str:
    year, month, _ = _birthday(generator)
    return generator.choice([f"the spring of {year}", f"{_MONTHS[month - 1]} {year}"])


def _record_number(generator: random.Random) -> str:
    return generator.choice(
        [
            _digits(generator, 8),
            _digits(generator, 6),
            f"A{_digits(generator, 7)}",
            f"{_digits(generator, 3)}-{_digits(generator, 2)}-{_digits(generator, 3)}",
            f"MR{_digits(generator, 6)}",
        ]
    )


def _spaced_record_number(generator: random.Random) -> str:
    return f"{_digits(generator, 2)} {_digits(generator, 2)} {_digits(generator, 2)}"


#: Kind -> sentences around a value, and ways to write it, of which the last ones are the hard ones.
_VALUES: Final[Mapping[str, tuple[Sequence[str], Sequence[tuple[_Writer, float]]]]] = {
    "EMAIL": (
        (
            "Please write to {} about the refund.",
            "<name> <{}> wrote on Monday:",
            "E-mail: {}",
            "My address is {}, thanks.",
            "from={} status=rejected",
        ),
        ((_email, 0.9), (_spelled_email, 0.1)),
    ),
    "URL": (
        (
            "The message linked to {} and asked for a password.",
            "See {}.",
            "(details: {})",
            "Blocked download from {} at 09:14.",
        ),
        ((_url, 0.9), (_bare_url, 0.1)),
    ),
    "IP": (
        (
            "Failed login from {} for user <given>.",
            "src={} dst=gateway action=deny",
            "The host {} scanned 40 ports.",
            "Connection reset by {}.",
        ),
        ((_ipv4, 0.6), (_ipv6, 0.3), (_defanged_ip, 0.1)),
    ),
    "PHONE": (
        (
            "Call me at {} after six.",
            "Tel: {}",
            "Next of kin: <name>, {}.",
            "You can reach <given> on {}.",
            "They kept ringing from {} all week.",
        ),
        ((_us_phone, 0.6), (_other_phone, 0.3), (_local_phone, 0.1)),
    ),
    "CARD": (
        (
            "They charged my card {} twice.",
            "Card number: {}",
            "Visa {} exp 04/29.",
            "I paid with {} in the shop.",
        ),
        ((_card, 0.9), (_dotted_card, 0.1)),
    ),
    "IBAN": (
        ("Transfer it to {} please.", "IBAN: {}", "The account {} was closed without notice."),
        ((_iban, 0.9), (_masked_iban, 0.1)),
    ),
    "US_SSN": (
        (
            "My SSN is {}.",
            "Social Security number: {}",
            "SSN {} was used to open the account.",
            "They have {} on file for me.",
        ),
        ((_ssn, 1.0),),
    ),
    "UK_NHS": (
        ("NHS number: {}", "Referred with NHS no. {}.", "Patient <name>, {}, attended clinic."),
        ((_nhs, 1.0),),
    ),
    "UK_NINO": (
        ("National Insurance number {}.", "NI no: {}", "His NINO is {}."),
        ((_nino, 1.0),),
    ),
    "CN_ID": (("ID card {} presented.", "身份证号{}。", "Resident identity: {}"), ((_cn_id, 1.0),)),
    "ES_DNI": (("DNI {}", "Paciente con DNI {}.", "NIE/DNI: {}, Valencia."), ((_dni, 1.0),)),
    "FR_NIR": (("NIR {}", "No de sécurité sociale : {}", "Assuré {}, Lyon."), ((_nir, 1.0),)),
    "IT_CODICE_FISCALE": (("Codice fiscale {}", "C.F.: {}", "Cliente {}."), ((_fiscale, 1.0),)),
    "DE_TAX_ID": (("Steuer-ID {}", "IdNr. {}", "Tax number {} as stated."), ((_tax_id, 1.0),)),
    "NL_BSN": (("BSN {}", "Burgerservicenummer: {}", "Patiënt met nummer {}."), ((_bsn, 1.0),)),
    "PL_PESEL": (("PESEL {}", "Nr PESEL: {}", "Pacjent {}, Gdańsk."), ((_pesel, 1.0),)),
    "BIRTH_DATE": (
        (
            "DOB: {}",
            "Date of birth {}.",
            "<name>, born {}, was seen today.",
            "D.O.B. {}",
            "Born in <city> on {}.",
            "Birthday: {}",
        ),
        ((_date, 0.9), (_worded_date, 0.1)),
    ),
    "MEDICAL_RECORD": (
        (
            "MRN: {}",
            "Medical record number {}.",
            "Patient ID: {}",
            "Med rec #{}",
            "Chart no. {}",
            "Please pull file {} for review.",
        ),
        ((_record_number, 0.9), (_spaced_record_number, 0.1)),
    ),
}

#: The kinds of values.
KINDS: Final = tuple(_VALUES)

_PARTS: Final[Mapping[str, _Writer]] = {
    "name": _name,
    "given": lambda generator: generator.choice(_GIVEN),
    "city": lambda generator: generator.choice(_CITIES),
    "date": _date,
    "n1": lambda generator: str(generator.randint(1, 9)),
    "n2": lambda generator: str(generator.randint(10, 99)),
    "n3": lambda generator: str(generator.randint(100, 999)),
    "d6": lambda generator: _digits(generator, 6),
    "d9": lambda generator: _digits(generator, 9),
    "d10": lambda generator: _digits(generator, 10),
    "d12": lambda generator: _digits(generator, 12),
    "d16": lambda generator: _digits(generator, 16),
    "hex": lambda generator: f"{generator.getrandbits(128):032x}",
    "bad-card": lambda generator: _grouped(
        _fail(checksums.luhn, "4" + _digits(generator, 15)), 4, 4, 4, 4
    ),
    "bad-iban": lambda generator: _fail(checksums.is_iban, _iban_value(generator)),
    "bad-nhs": lambda generator: _fail(checksums.is_uk_nhs, _nhs_value(generator)),
    "bad-pesel": lambda generator: _fail(checksums.is_pl_pesel, _pesel(generator)),
}

_FILLERS: Final = (
    "<name> of 12 Mill Lane, <city>, was not available.",
    "The patient reports chest pain since yesterday, no fever.",
    "Nobody answered my letters for three months.",
    "The charge of $1,<n3>.50 was never explained.",
    "Thank you for looking into this.",
    "Spindle vibration rose after the bearing was replaced.",
)

_NEAR_MISSES: Final = (
    "Your order <d10> has shipped.",
    "Tracking number <d12>.",
    "Ticket #<d6> was closed, see ticket #<d9>.",
    "The test card <bad-card> was refused.",
    "The IBAN <bad-iban> has a typo.",
    "Reference <bad-nhs> is not a patient.",
    "Reference <bad-pesel> is not a person.",
    "Serial <d16>, batch <d9>.",
    "Admitted on <date>, discharged two days later.",
    "Next appointment: <date> at 10:45.",
    "Invoice dated <date> for $<n3>.00.",
    "Upgrade to version <n1>.<n2>.<n1>.<n1> of the firmware.",
    "Build v<n1>.<n2>.<n1>.<n1> fails at 12:30:<n2>.",
    "Blood pressure 1<n2>/8<n1>, pulse <n2>, Na 13<n1>, K 4.<n1>.",
    "Commit <hex> broke the parser in std::vector.",
    "MAC 00:1b:44:11:3a:b<n1> was quarantined.",
    "Part AB-<n3>-<d6> replaced, torque <n2> Nm.",
    "ISBN 978-0-306-40615-<n1> cites section <n1>.<n2>.",
    "Follow @<given> for updates, or the #<d6> tag.",
    "Case 000-<n2>-<n3><n1> was born of a misunderstanding.",
    "Room <n3>, extension <n3><n1>, ask for <given>.",
    "Parts <d9> and <d9> are out of stock.",
)
