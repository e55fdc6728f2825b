"""The manifest: one canonical form, and nothing in it that is not what it must be."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veilhead_protocol import manifest as manifest_module
from veilhead_protocol.errors import ManifestError
from veilhead_protocol.manifest import MAX_MANIFEST_BYTES, Manifest, valid_name
from veilhead_protocol.parameters import STANDARD

VECTORS = Path(__file__).resolve().parent.parent / "vectors"
DATA = (VECTORS / "compact-384.manifest.json").read_bytes()
LARGE = (VECTORS / "compact-3000.manifest.json").read_bytes()  # served divided by 2^4


def document() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DATA)
    return found


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def changed(path: tuple[Any, ...], value: Any) -> bytes:
    edited = document()
    place: Any = edited
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    return canonical(edited)


def test_the_canonical_form_is_sorted_compact_utf8() -> None:
    manifest = Manifest.deserialize(DATA)
    assert manifest.serialize() == DATA == canonical(document())
    assert manifest.digest == hashlib.sha256(DATA).digest()
    assert "Ärzte".encode() in DATA
    assert Manifest.deserialize(changed(("name",), "other")).digest != manifest.digest


@pytest.mark.parametrize(
    "data",
    [
        DATA + b"\n",
        b" " + DATA,
        DATA.replace(b":", b": ", 1),
        DATA.replace("Ä".encode(), b"\\u00c4"),
        json.dumps(document(), separators=(",", ":"), ensure_ascii=False).encode()[:-1]
        + b',"name":"compact-384"}',  # a key twice
        canonical(dict(reversed(document().items())))[:1] + b'"zzz":0,' + DATA[1:],
        DATA.replace(b'"exponent":1,', b'"exponent":1.0,'),
        DATA.replace(b'"scale":1.0', b'"scale":1'),
        DATA.replace(b'"scale":1.0', b'"scale":1.00'),
        b"\xef\xbb\xbf" + DATA,
        DATA.decode().encode("utf-16"),
    ],
    ids=range(11),
)
def test_any_other_bytes_are_refused(data: bytes) -> None:
    assert data != DATA
    with pytest.raises(ManifestError):
        Manifest.deserialize(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"1",
        b'"a"',
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 50_000,
    ],
    ids=range(10),
)
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(ManifestError):
        Manifest.deserialize(data)


@given(st.binary(max_size=200))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(ManifestError):
        Manifest.deserialize(noise)


@given(st.integers(0, len(DATA) - 1), st.integers(1, 255))
def test_a_changed_byte_is_refused_or_another_manifest(position: int, flip: int) -> None:
    data = bytearray(DATA)
    data[position] ^= flip
    try:
        found = Manifest.deserialize(bytes(data))
    except ManifestError:
        return
    assert found.serialize() == data
    assert found.digest != Manifest.deserialize(DATA).digest


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


def paths(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a document but `about`, which holds anything."""
    if isinstance(value, dict):
        items: Any = ((key, inner) for key, inner in value.items() if key != "about")
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return [prefix]
    found = [prefix] if prefix else []
    for key, inner in items:
        found += paths(inner, (*prefix, key))
    return found


@given(st.sampled_from(paths(document())), JSON)
def test_any_value_anywhere_is_refused_or_kept(path: tuple[Any, ...], value: Any) -> None:
    try:
        data = changed(path, value)
    except UnicodeEncodeError:  # half of a surrogate pair
        return
    try:
        found = Manifest.deserialize(data)
    except ManifestError:
        return
    assert found.serialize() == data


@given(JSON)
def test_about_holds_whatever_json_can(value: Any) -> None:
    data = json.dumps(
        {"x": value}, sort_keys=True, separators=(",", ":"), ensure_ascii=False
    ).encode("utf-8", "surrogatepass")
    whole = DATA.replace(canonical(document()["about"]), data)
    try:
        found = Manifest.deserialize(whole)
    except ManifestError:
        # NaN, infinities and lone surrogates, which JSON has no form for
        assert any(bad in data for bad in (b"NaN", b"Infinity", b"\xed"))
    else:
        assert found.serialize() == whole


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "path", [("head", "error_bound"), ("embedding", "scale"), ("about", "note")], ids=".".join
)
def test_not_finite_numbers_are_refused(path: tuple[str, ...], value: float) -> None:
    with pytest.raises(ManifestError):
        Manifest.deserialize(changed(path, value))


@pytest.mark.parametrize(
    "place",
    [
        (),
        ("head",),
        ("embedding",),
        ("backbone",),
        ("backbone", "files", 0),
        ("backbone", "onnx"),
        ("policy",),
    ],
    ids=str,
)
def test_unknown_fields_are_refused_everywhere(place: tuple[Any, ...]) -> None:
    with pytest.raises(ManifestError, match="Extra inputs"):
        Manifest.deserialize(changed((*place, "extra"), 1))


@pytest.mark.parametrize(
    "path",
    [
        "..",
        "../x",
        "a/../b",
        "a/..",
        "/x",
        "//x",
        "a//b",
        "a/",
        "./a",
        "a/./b",
        ".",
        "",
        "a\\b",
        "..\\x",
        "C:x",
        "a b",
        "a\0b",
        "a\nb",
        "-rf",
        "a/-rf",
        "~x",
        "a?b",
        "a%2e",
        "é",
        "..." + "/x",
        "a/" + "b" * 70,
        "/".join(["abc"] * 90),
    ],
)
def test_paths_outside_the_directory_are_refused(path: str) -> None:
    with pytest.raises(ManifestError, match="path"):
        Manifest.deserialize(changed(("backbone", "files", 0, "path"), path))


@pytest.mark.parametrize("path", ["a", "a/b", ".hidden", "a.b/c-d_e.json", "1/2/3"])
def test_plain_paths_are_accepted(path: str) -> None:
    manifest = Manifest.deserialize(changed(("backbone", "files", 0, "path"), path))
    assert manifest.backbone is not None
    assert manifest.backbone.files[0].path == path


@pytest.mark.parametrize("name", ["", ".", "..", "-a", "_a", "a/b", "a b", "a" * 65, "é", "a\n"])
def test_names_that_cannot_stand_in_a_url(name: str) -> None:
    with pytest.raises(ManifestError):
        Manifest.deserialize(changed(("name",), name))
    with pytest.raises(ValueError, match="name"):
        valid_name(name)


@pytest.mark.parametrize("letter", ["\0", "\t", "\n", "\r", "\x1b", "\x7f", "\x80", "\x9b"])
def test_control_characters_in_labels(letter: str) -> None:
    with pytest.raises(ManifestError, match="control characters"):
        Manifest.deserialize(changed(("head", "labels"), ["fine", f"x{letter}y"]))


def test_labels() -> None:
    longest = document()
    longest["head"] |= {"labels": ["a" * 512, "", "心"], "private_parameters": 3 * 385}
    assert Manifest.deserialize(canonical(longest))
    for labels in (["a", "b", "a"], [], ["a" * 513], ["a", 1], "ab", None, ["a", None], {"a": 1}):
        with pytest.raises(ManifestError, match=r"head"):
            Manifest.deserialize(changed(("head", "labels"), labels))
    with pytest.raises(ManifestError, match="1 to 4096 labels"):
        Manifest.deserialize(changed(("head", "labels"), [str(i) for i in range(4097)]))


@pytest.mark.parametrize("field", ["scale_bits", "flood_bits", "reply_bits"])
@pytest.mark.parametrize("change", [-1, 1])
def test_derived_numbers_must_follow(field: str, change: int) -> None:
    value = document()["head"][field] + change
    with pytest.raises(ManifestError, match=f"head.{field} does not follow"):
        Manifest.deserialize(changed(("head", field), value))


def test_the_exponent_moves_everything() -> None:
    with pytest.raises(ManifestError, match="does not follow"):
        Manifest.deserialize(changed(("head", "exponent"), 2))
    with pytest.raises(ManifestError, match="does not follow"):
        Manifest.deserialize(changed(("head", "downscale_bits"), 1))


def test_weights_must_leave_room_for_the_query() -> None:
    """Whatever a manifest may state does: the largest scale of weights, the smallest of replies."""
    edited = document()
    head = edited["head"]
    head["exponent"], head["scale_bits"], head["flood_bits"], head["reply_bits"] = 6, 43, 32, 27
    head["weight_scale_bits"] = 30
    assert Manifest.deserialize(canonical(edited)).scales.query_scale_bits == 13
    for bits in (7, 31, 43):
        head["weight_scale_bits"] = bits
        with pytest.raises(ManifestError, match="weight_scale_bits"):
            Manifest.deserialize(canonical(edited))


# --- heads that are served divided ----------------------------------------------------------------


def large(**changes: Any) -> bytes:
    edited: dict[str, Any] = json.loads(LARGE)
    edited["head"] |= changes
    return canonical(edited)


def test_a_divided_head() -> None:
    scales = Manifest.deserialize(LARGE).scales
    assert (scales.exponent, scales.downscale_bits, scales.served_exponent) == (10, 4, 6)
    assert scales.logit_step == 2.0**-8
    assert Manifest.deserialize(LARGE).shape.exponent == 6


@pytest.mark.parametrize(("exponent", "downscale_bits"), [(24, 18), (24, 24), (6, 0), (0, 0)])
def test_what_a_head_may_be_divided_by(exponent: int, downscale_bits: int) -> None:
    served = exponent - downscale_bits
    found = Manifest.deserialize(
        large(
            exponent=exponent,
            downscale_bits=downscale_bits,
            scale_bits=49 - served,
            flood_bits=38 - served,
            reply_bits=21 + served,
            error_bound=2.0 ** (downscale_bits - 10),
        )
    )
    assert found.scales.served_exponent == served


@pytest.mark.parametrize(
    ("exponent", "downscale_bits"),
    [(7, 0), (10, 3), (10, 11), (24, 17), (25, 19), (24, 25), (-1, 0), (3, -1), (0, 1)],
)
def test_other_divisions_are_refused(exponent: int, downscale_bits: int) -> None:
    """Also where all the numbers that follow do follow."""
    with pytest.raises(ManifestError, match=r"head\.((exponent|downscale_bits):|downscale_bits m)"):
        Manifest.deserialize(large(exponent=exponent, downscale_bits=downscale_bits))
    served = exponent - downscale_bits
    with pytest.raises(ManifestError, match=r"head\.(exponent|downscale_bits|reply_bits)"):
        Manifest.deserialize(
            large(
                exponent=exponent,
                downscale_bits=downscale_bits,
                scale_bits=49 - served,
                flood_bits=38 - served,
                reply_bits=21 + served,
                error_bound=2.0 ** (downscale_bits - 10),
            )
        )


@pytest.mark.parametrize("limit", [0, -1, 3, 48, 96, 128, 256, 257, 512, 2**20])
def test_groups_must_be_powers_of_two_within_the_hints(limit: int) -> None:
    """At e = 1 there are 96 hints."""
    for good in (1, 2, 64):
        found = Manifest.deserialize(changed(("head", "group_limit"), good))
        assert found.shape.group_limit == found.scales.group_limit == good
    with pytest.raises(ManifestError, match="group_limit"):
        Manifest.deserialize(changed(("head", "group_limit"), limit))


def test_the_error_bound_has_the_grid_of_the_division() -> None:
    assert Manifest.deserialize(large(error_bound=2.0**-10 * 3)).scales.error_bound == 3 * 2.0**-10
    for bound in (2.0**-11, 2.0**-10 * 2.5, 0.0, -(2.0**-10), 2.0**24 * 2):
        with pytest.raises(ManifestError, match="error_bound"):
            Manifest.deserialize(large(error_bound=bound))
    assert Manifest.deserialize(changed(("head", "error_bound"), 2.0**-14))
    with pytest.raises(ManifestError, match=r"2\^\(downscale_bits - 14\)"):
        Manifest.deserialize(changed(("head", "error_bound"), 2.0**-15))


def test_parameters() -> None:
    with pytest.raises(ManifestError, match="parameters_id"):
        Manifest.deserialize(changed(("parameters_id",), STANDARD.id.hex()))
    with pytest.raises(ManifestError, match="parameters_id"):
        Manifest.deserialize(changed(("parameters",), "standard"))
    with pytest.raises(ManifestError, match="parameters"):
        Manifest.deserialize(changed(("parameters",), "strong"))
    with pytest.raises(ManifestError, match="below the policy's minimum"):
        Manifest.deserialize(changed(("policy", "minimum_parameters"), "standard"))
    standard = Manifest.deserialize((VECTORS / "standard-384.manifest.json").read_bytes())
    assert standard.policy.minimum_parameters == "standard"


@pytest.mark.parametrize(
    ("path", "least", "most"),
    [
        (("embedding", "scale"), 1e-9, 1e9),
        (("embedding", "calibration", "rows"), 1, 2**53),
        (("embedding", "calibration", "quantile"), 2.0**-1074, 1.0),
        (("embedding", "calibration", "margin"), 1.0, 100.0),
        (("head", "error_bound"), 2.0**-14, 0.5),
        (("head", "weight_scale_bits"), 8, 30),
        (("backbone", "public_parameters"), 1, 2**53),
        (("backbone", "max_tokens"), 2, 8192),
        (("backbone", "files", 0, "bytes"), 0, 2**33),
        (("policy", "query_budget", "units"), 0, 2**53),
        (("policy", "privacy", "max_epsilon"), 2.0**-1074, 1000.0),
        (("policy", "privacy", "max_delta"), 2.0**-1074, 1 - 2.0**-53),
    ],
    ids=str,
)
def test_every_number_has_bounds(path: tuple[Any, ...], least: float, most: float) -> None:
    edited = document()
    calibration = {"rows": 9, "quantile": 0.99, "margin": 1.0}
    edited["embedding"] |= {"scale_origin": "calibrated", "calibration": calibration}
    edited["policy"] |= {
        "query_budget": {"units": 5, "period": "day"},
        "privacy": {"max_epsilon": 2.0**-1074, "max_delta": 2.0**-1074},
    }
    edited["about"]["privacy"] = {"epsilon": 0, "delta": 0}
    place: Any = edited
    for part in path[:-1]:
        place = place[part]
    for good in (least, most):
        place[path[-1]] = good
        assert Manifest.deserialize(canonical(edited))
    if isinstance(least, int):
        beyond: list[Any] = [least - 1, 10**400, -(10**400), *([most + 1] if most < 2**33 else [])]
    else:
        beyond = [math.nextafter(least, -1), math.nextafter(most, 2e9), 1e308, -1.0, 10**400]
    for bad in beyond:
        place[path[-1]] = bad
        with pytest.raises(ManifestError, match=str(path[-1])):
            Manifest.deserialize(canonical(edited))


def test_whole_numbers_of_any_length_in_about_break_nothing() -> None:
    edited = document()
    edited["policy"]["privacy"] = {"max_epsilon": 4.0, "max_delta": 1e-5}
    edited["about"]["privacy"] = {"epsilon": 10**400, "delta": 0}
    with pytest.raises(ManifestError, match="this one has inf and 0"):
        Manifest.deserialize(canonical(edited))


def test_about_is_not_deeper_than_readers_recurse() -> None:
    inner: Any = 1
    for _ in range(31):
        inner = [inner]
    assert Manifest.deserialize(changed(("about",), {"x": inner}))
    for deeper in (1, 500, 50_000):
        data = canonical(document() | {"about": {"x": "DEEP"}})
        data = data.replace(b'"DEEP"', b"[" * (31 + deeper) + b"1" + b"]" * (31 + deeper))
        with pytest.raises(ManifestError):
            Manifest.deserialize(data)


def test_a_newer_format_is_named() -> None:
    with pytest.raises(ManifestError, match=r"veilhead-manifest/3.*upgrade"):
        Manifest.deserialize(changed(("format",), "veilhead-manifest/3"))
    newer = document() | {"format": "veilhead-manifest/3", "unknown": {"future": True}}
    with pytest.raises(ManifestError, match="upgrade"):  # before its unknown fields
        Manifest.deserialize(canonical(newer))
    with pytest.raises(ManifestError) as raised:
        Manifest.deserialize(changed(("format",), "x" * 10_000))
    assert len(str(raised.value)) < 200


def test_the_limit_comes_before_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(*_: Any) -> Any:
        raise AssertionError("parsed")

    monkeypatch.setattr(manifest_module.json, "loads", parse)
    with pytest.raises(ManifestError, match="at most"):
        Manifest.deserialize(b" " * (MAX_MANIFEST_BYTES + 1))
    with pytest.raises(AssertionError, match="parsed"):
        Manifest.deserialize(b" " * MAX_MANIFEST_BYTES)


def test_errors_do_not_quote_values() -> None:
    with pytest.raises(ManifestError) as raised:
        Manifest.deserialize(changed(("head", "commitment"), "canary-4711"))
    assert "canary" not in str(raised.value)
    assert "head.commitment" in str(raised.value)


def test_no_norm_of_the_head_is_published() -> None:
    """What the scales were derived from stays private."""
    assert set(document()["head"]) == {
        "commitment",
        "dimensions",
        "downscale_bits",
        "error_bound",
        "exponent",
        "flood_bits",
        "group_limit",  # to a factor of four, the largest norm of a run of rows
        "labels",
        "private_parameters",  # how many, which labels and dimensions tell
        "problem_type",
        "reply_bits",
        "scale_bits",
        "weight_scale_bits",
    }


def test_manifests_are_frozen() -> None:
    manifest = Manifest.deserialize(DATA)
    with pytest.raises(ValueError, match="frozen"):
        manifest.head.exponent = 2  # type: ignore[misc]
    assert copy.deepcopy(manifest) == manifest


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("head", "exponent"), "1"),
        (("head", "exponent"), True),
        (("head", "dimensions"), 384.0),
        (("policy", "bulk"), 0),
        (("policy", "deidentify"), 1),
        (("name",), b"head"),
        (("embedding", "scale"), "1.0"),
    ],
    ids=str,
)
def test_building_converts_nothing(path: tuple[str, ...], value: Any) -> None:
    """Not even before there are bytes to compare with."""
    edited = document()
    place = edited
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    with pytest.raises(ManifestError, match=path[-1]):
        Manifest.build(edited)


def test_a_policy_of_deidentification_is_in_the_bytes_only_where_there_is_one() -> None:
    without = Manifest.build(document())
    assert b"deidentify" not in without.serialize()
    edited = document()
    edited["policy"]["deidentify"] = True
    asked = Manifest.build(edited)
    assert b'"deidentify":true' in asked.serialize()
    assert Manifest.deserialize(asked.serialize()).policy.deidentify
    assert not Manifest.deserialize(without.serialize()).policy.deidentify
    said = without.serialize().replace(b'"bulk":false', b'"bulk":false,"deidentify":false')
    with pytest.raises(ManifestError, match="canonical"):
        Manifest.deserialize(said)
