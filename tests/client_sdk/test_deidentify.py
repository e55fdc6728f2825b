"""What is replaced, where, and by what; numbers that fail their check stay."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veilhead.deidentify import Deidentifier, Finding, default_detectors
from veilhead.deidentify.folding import fold
from veilhead_protocol.errors import ClientError, DeidentifyError

PAGE = Path(__file__).parents[2] / "docs" / "deidentify.md"


@pytest.fixture(scope="module")
def deidentify():
    return Deidentifier()


#: Published examples: of the standards, of Wikipedia's articles, of the issuers' test pages.
VALUES = {
    "EMAIL": [
        "jane.doe@example.com",
        "o'neil+x@mail.example.co.uk",
        "jürgen@example.de",
        "x_1@sub-domain.example.museum",
        "x" * 80 + "@example.com",
    ],
    "URL": [
        "https://example.com/a?b=c#d",
        "http://[2001:db8::1]:8080/x",
        "www.example.com/x_(y)",
        "FTP://example.com",
    ],
    "IP": ["192.168.0.1", "2001:db8::1", "::ffff:192.0.2.1", "fe80::1%eth0"],
    "CARD": [
        "4111 1111 1111 1111",
        "4111-1111-1111-1111",
        "4111.1111.1111.1111",
        "5555555555554444",
        "2223003122003222",
        "3782 822463 10005",
        "30569309025904",
        "6011111111111117",
        "3530111333300000",
        "6200000000000005",
    ],
    "IBAN": [
        "GB82 WEST 1234 5698 7654 32",
        "DE89370400440532013000",
        "FR14 2004 1010 0505 0001 3M02 606",
        "NO93 8601 1117 947",
        "MT84MALT011000012345MTLCAST001S",
        "nl91abna0417164300",
    ],
    "CN_ID": ["11010519491231002X", "110105 19491231 002x", "440524188001010014"],
    "FR_NIR": ["2 55 08 14 168 025 38", "255081416802538"],
    "IT_CODICE_FISCALE": ["RSSMRA85T10A562S", "mrtmtt91d08f205j"],
    "ES_DNI": ["12345678Z", "12.345.678-Z", "X1234567L", "y-1234567-x", "Z1234567R"],
    "UK_NINO": ["AB 12 34 56 C", "AB123456C"],
    "DE_TAX_ID": ["86095742719", "86 095 742 719", "47036892816", "65929970489"],
    "PL_PESEL": ["44051401359", "02070803628"],
    "UK_NHS": ["943 476 5919", "401 023 2137"],
    "US_SSN": ["219-09-9990", "899-12-3456"],
    "PHONE": [
        "+44 20 7946 0958",
        "(202) 555-0143",
        "202.555.0143",
        "+1-202-555-0143",
        "020 7946 0958",
        "+86 138 0013 8000",
        "+4930231251",
    ],
}

#: Where the words around a number make it one.
NEEDS_WORDS = {
    "UK_NHS": [("NHS number: {}", "9434765919"), ("nhs no {}", "943-476-5919")],
    "US_SSN": [("his SSN is {}", "219099990"), ("Social Security {}", "219 09 9990")],
    "NL_BSN": [
        ("BSN {}", "111222333"),
        ("burgerservicenummer: {}", "1234.56.782".replace(".", " ")),
    ],
    "PHONE": [("call me at {}", "2025550143"), ("tel. {}", "5550143")],
    "MEDICAL_RECORD": [
        ("MRN: {}", "00123456"),
        ("M.R.N. #{}", "A-1234-56"),
        ("medical record number is {}", "12345"),
        ("Patient ID {}", "PT/2024/0042"),
        ("chart no. {}", "12 34 56"),
        ("病历号\uff1a{}", "20240042"),
    ],
    "BIRTH_DATE": [
        ("DOB: {}", "03/12/1984"),
        ("D.O.B. {}", "1984-03-12"),
        ("she was born on {} in Leeds", "12 March 1984"),
        ("born in Leeds on {}", "March 12th, 1984"),
        ("date of birth\n{}", "12-Mar-84"),
        ("geb. {}", "12.3.84"),
        ("fecha de nacimiento: {}", "12 de marzo de 1984"),
        ("née le {}", "1er août 1984"),
        ("Geburtsdatum {}", "12. März 1984"),
        ("{} (DOB)", "03/12/1984"),
        ("birth date {}", "19840312"),
        ("出生日期\uff1a{}", "1984年3月12日"),
    ],
}

#: What looks like a value and is none.
NEAR_MISSES = [
    "order 4111 1111 1111 1112",  # Luhn
    "parcel 1234567890123452",  # passes Luhn; no issuer has such a number
    "ref 4111 1111 1111 11112",
    "GB83 WEST 1234 5698 7654 32",
    "DE8937040044053201300",  # a digit short
    "ZZ89370400440532013000",
    "000-12-3456 666-12-3456 900-12-3456 123-00-4567 123-45-0000",
    "invoice 219-09-99901",
    "219099990",  # nothing says what it is
    "9434765919",
    "111222333",
    "11010519491231003X",
    "11010519491331002X",  # month 13
    "2 55 08 14 168 025 39",
    "RSSMRA85T10A562T",
    "12345678A",
    "BG 12 34 56 C",
    "AB 12 34 56 E",
    "86095742718",
    "44051401358",
    "44953201359",
    "256.1.1.1",
    "1.2.3.4.5 v1.2.3.4",
    "at 12:30:45, std::size, a::b",
    "firmware version 1.2.3.4, build 10.2.3.4",
    "I will call back. Seen on 3.10.1973",
    "call: commit 3e359f0bac1866a47",
    "my SSN is on file. Order 219099990",
    "00:1b:44:11:3a:b7",
    "@mention me@ @example.com me@localhost",
    "example.com",
    "admitted on 03/04/2020, seen 12 March 2021",
    "born at 03:15, weight 3250 g",
    "DOB unknown; admitted 03/04/2020",
    "DOB 45/45/1984",
    "MRN pending review",
    "the medical record of the visit",
    "blood pressure 120/80, pulse 72, Na 139, ICD E11.9",
    "order 2025550143",
    "12345678901234567890123456789012345678901234567890",
    "",
]


@pytest.mark.parametrize(
    ("kind", "value"), [(kind, value) for kind, values in VALUES.items() for value in values]
)
@pytest.mark.parametrize("frame", ["{}", "Note: {}, seen.", "号码{}。", "({})"])
def test_a_value_is_found_whole(deidentify, kind, value, frame):
    answer = deidentify(frame.format(value))
    assert answer.text == frame.format(f"[{kind}_1]")
    (span,) = answer.spans
    assert frame.format(value)[span.start : span.end] == value
    assert (span.kind, span.placeholder) == (kind, f"[{kind}_1]")


@pytest.mark.parametrize(
    ("kind", "frame", "value"),
    [(kind, *pair) for kind, pairs in NEEDS_WORDS.items() for pair in pairs],
)
def test_words_say_what_a_value_is(deidentify, kind, frame, value):
    assert deidentify(frame.format(value)).text == frame.format(f"[{kind}_1]")
    assert kind not in {span.kind for span in deidentify(value).spans}


@pytest.mark.parametrize("text", NEAR_MISSES)
def test_a_near_miss_stays(deidentify, text):
    assert deidentify(text).text == text


def test_the_same_value_has_the_same_placeholder(deidentify):
    answer = deidentify(
        "a@example.com B@example.com A@EXAMPLE.COM; (202) 555-0143 +1 202-555-0143; "
        "4111111111111111 4111 1111 1111 1111"
    )
    assert answer.text == "[EMAIL_1] [EMAIL_2] [EMAIL_1]; [PHONE_1] [PHONE_1]; [CARD_1] [CARD_1]"


def test_a_text_does_not_depend_on_those_before_it(deidentify):
    first = deidentify("a@example.com")
    deidentify("b@example.com c@example.com")
    assert deidentify("a@example.com") == first


def test_parts_of_a_record_share_their_placeholders(deidentify):
    parts = deidentify.together(["a@example.com", "b@example.com, a@example.com"])
    assert [part.text for part in parts] == ["[EMAIL_1]", "[EMAIL_2], [EMAIL_1]"]


def test_digits_and_letters_of_other_forms_are_the_same(deidentify):
    wide = "4111 1111 1111 1111".translate({ord("1"): "\uff11", ord("4"): "\uff14"})
    arabic = "".join(chr(0x660 + int(digit)) for digit in "2025550143")
    arabic = f"{arabic[:3]}-{arabic[3:6]}-{arabic[6:]}"
    dashes = "219\u201109\u20139990"
    hidden = "ja\u200bne@exam\u00adple.com"
    text = f"{wide} | {arabic} | {dashes} | {hidden} | 219\u00a009\u202f9990 is my SSN"
    answer = deidentify(text)
    assert answer.text.startswith("[CARD_1] | [PHONE_1] | [US_SSN_1] | [EMAIL_1] | ")
    assert text[answer.spans[3].start : answer.spans[3].end] == hidden


@given(st.text(max_size=60))
@settings(deadline=None, max_examples=200)
def test_folding_keeps_places(text):
    folded = fold(text)
    assert len(folded.origins) == len(folded.text)
    assert list(folded.origins) == sorted(folded.origins)
    for place, letter in enumerate(folded.text):
        start, end = folded.span(place, place + 1)
        assert end == start + 1
        assert text[start] == letter or not text[start].isascii()


class Marks:
    """A detector of given words."""

    def __init__(self, kind, *words):
        self.kind, self.words = kind, words

    def find(self, text):
        for word in self.words:
            start = text.find(word)
            if start >= 0:
                yield Finding(start, start + len(word), self.kind, word)


def test_other_detectors_can_be_plugged_in():
    deidentify = Deidentifier([*default_detectors(), Marks("NAME", "Jane Doe")])
    answer = deidentify("Jane Doe, jane@example.com")
    assert answer.text == "[NAME_1], [EMAIL_1]"


@pytest.mark.parametrize(
    ("detectors", "expected"),
    [
        ([Marks("SHORT", "bc"), Marks("LONG", "abcd")], "[LONG_1]ef"),
        ([Marks("LONG", "abcd"), Marks("SHORT", "bc")], "[LONG_1]ef"),
        ([Marks("FIRST", "abc"), Marks("SECOND", "abc")], "[FIRST_1]def"),
        ([Marks("SECOND", "abc"), Marks("FIRST", "abc")], "[SECOND_1]def"),
        # All that either covers goes, under the longer one's name.
        ([Marks("LEFT", "abc"), Marks("RIGHT", "cdef")], "[RIGHT_1]"),
        ([Marks("A", "ab"), Marks("B", "bcd"), Marks("C", "de")], "[B_1]f"),
        ([Marks("A", "abc"), Marks("B", "def")], "[A_1][B_1]"),
    ],
)
def test_overlaps_leave_nothing_behind(detectors, expected):
    assert Deidentifier(detectors)("abcdef").text == expected


def test_findings_within_one_original_letter_replace_it_once():
    """㏂ folds to a.m.: two findings in it have the same place."""
    answer = Deidentifier([Marks("A", "a."), Marks("M", "m.")])("at 9 \u33c2 sharp")
    assert answer.text == "at 9 [A_1] sharp"


@given(st.lists(st.tuples(st.integers(0, 29), st.integers(1, 12)), max_size=8))
@settings(deadline=None, max_examples=200)
def test_everything_that_was_found_is_replaced(places):
    class Given:
        def find(self, text):
            for number, (start, length) in enumerate(places):
                yield Finding(start, min(len(text), start + length), f"K{number}", str(number))

    text = "abcdefghijklmnopqrstuvwxyzäöüß"
    answer = Deidentifier([Given()])(text)
    covered = {
        place for start, length in places for place in range(start, min(len(text), start + length))
    }
    assert {place for span in answer.spans for place in range(span.start, span.end)} == covered
    ends = [0, *(place for span in answer.spans for place in (span.start, span.end))]
    assert ends == sorted(ends)
    rebuilt, done = "", 0
    for span in answer.spans:
        rebuilt += text[done : span.start] + span.placeholder
        done = span.end
    assert answer.text == rebuilt + text[done:]

    for place in range(len(answer.text)):
        start, end = answer.in_original(place, place + 1)
        inside = [span for span in answer.spans if span.start < end and start < span.end]
        if inside:  # a character of a placeholder stands for all of what it replaced
            assert [(span.start, span.end) for span in inside] == [(start, end)]
        else:
            assert text[start:end] == answer.text[place : place + 1]


def test_neither_texts_nor_values_are_shown(deidentify):
    answer = deidentify("secret words and jane@example.com")
    finding = next(iter(default_detectors()[0].find("jane@example.com")))
    shown = repr(answer) + repr(answer.spans) + repr(finding) + repr(deidentify)
    assert "secret" not in shown
    assert "jane" not in shown


def failing(error):
    class Fails:
        def find(self, text):
            raise error(text)

    return Fails()


@pytest.mark.parametrize(
    "detector",
    [
        failing(ValueError),
        failing(MemoryError),
        Marks("lower case", "secret"),
        Marks("A]B", "secret"),
        Marks("KIND", ""),
    ],
)
def test_a_detector_that_fails_says_nothing_of_the_text(detector):
    with pytest.raises(DeidentifyError) as caught:
        Deidentifier([detector])("a secret text")
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_without_phonenumbers_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "phonenumbers", None)
    with pytest.raises(ClientError, match=r"veilhead\[deidentify\]"):
        Deidentifier()


def test_a_country_that_is_unknown():
    with pytest.raises(ClientError, match="country"):
        default_detectors(["XX"])


def test_countries_decide_which_local_numbers_are_found():
    text = "Sekretariat 030 23125000"
    assert Deidentifier(default_detectors(["DE"]))(text).text == "Sekretariat [PHONE_1]"
    assert Deidentifier(default_detectors([]))(text).text == text
    assert Deidentifier(default_detectors([]))("+49 30 23125000").text == "[PHONE_1]"


EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def test_the_examples_of_the_page_print_what_they_say(capsys):
    connecting, audit, own = EXAMPLES
    compile(connecting, str(PAGE), "exec")  # its service does not exist
    exec(audit, {})  # noqa: S102
    said = re.findall(r"^print\(.*?  # (.*)$", audit, re.MULTILINE)
    assert len(said) == 2
    assert capsys.readouterr().out.splitlines() == said
    exec(own, {})  # noqa: S102
    assert capsys.readouterr().out == "seen by [STAFF_1], mail [EMAIL_1]\n"


def test_the_page_names_every_kind():
    _, _, table = PAGE.read_text("utf-8").partition("## What is found")
    table, _, _ = table.partition("## What is not")
    listed = re.findall(r"^\| `([A-Z_]+)` \|", table, re.MULTILINE)
    assert sorted(listed) == sorted(set(VALUES) | set(NEEDS_WORDS))


HOSTILE = {
    "letters": "a",
    "signs": "a@",
    "domains": "@aaa.aaa.",
    "digits": "1",
    "groups": "1 ",
    "dashes": "12-",
    "dots": "1.",
    "slashes": "1/2/",
    "colons": "a:",
    "addresses": "http://",
    "brackets": "http://a)",
    "births": "born ",
    "records": "mrn no no ",
    "accounts": "GB82 ",
    "phones": "(202) ",
    "calls": "call 1234567 ",
    "hidden": "1\u200b",
}


@pytest.mark.parametrize(
    "unit", [*HOSTILE.values(), "http://a" + ")" * 50_000], ids=[*HOSTILE, "url"]
)
def test_time_grows_no_faster_than_the_text(deidentify, unit):
    """Four times the text takes about four times as long: quadratic time would take sixteen."""

    def seconds(size):
        text = (unit * (size // len(unit) + 1))[:size]
        best = 1e9
        for _ in range(2):
            started = time.process_time()
            deidentify(text)
            best = min(best, time.process_time() - started)
        return best

    assert seconds(12_000) < 9 * seconds(3_000) + 0.05
