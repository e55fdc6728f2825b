"""Bad bytes through HTTP: always a typed refusal, and the service goes on."""

from __future__ import annotations

import base64
import hashlib
import os
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.heads import unit_rows

from veilhead.session import Session
from veilhead_protocol.parameters import COMPACT, PARAMETER_SETS, STANDARD
from veilhead_protocol.wire import MAX_KEY_BYTES, MAX_QUERY_BYTES
from veilhead_service.app import create_app
from veilhead_service.settings import Settings

SLOW = os.environ.get("VEILHEAD_PROPERTY_TESTS") == "slow"

# Offsets of docs/wire-format.md.
MAGIC, VERSION, TYPE, PRNG, DOMAIN, PARAMETERS = 0, 4, 5, 6, 7, 8
MODEL, KEY, LAYOUT, RESERVED, COUNTS = 40, 72, 104, 105, 108
KEY_HEADER, QUERY_HEADER = 40, 136
BODY_BYTES = 4096 * 53 // 8  # of a polynomial, standard
QUERY_BYTES = QUERY_HEADER + BODY_BYTES + 64  # one piece, standard
COUNT_NAMES = (
    "texts", "dimensions", "classes", "block_length", "pieces", "group", "polynomials"
)  # fmt: skip


def replaced(data, offset, content):
    assert offset + len(content) <= len(data)
    return data[:offset] + content + data[offset + len(content) :]


def residue_row(start, parameters):
    """(prime, width, first byte) of a packed polynomial, and where it ends."""
    width = parameters.prime.bit_length()
    return (parameters.prime, width, start), start + parameters.poly_modulus_degree * width // 8


def with_residue(data, row, degree, index, value):
    """`data` with another residue at `index` of a packed row."""
    _, width, start = row
    length = degree * width // 8
    packed = int.from_bytes(data[start : start + length], "little")
    mask = ((1 << width) - 1) << (index * width)
    packed = packed & ~mask | value << (index * width)
    return replaced(data, start, packed.to_bytes(length, "little"))


def residues_of(data, row, degree):
    _, width, start = row
    packed = int.from_bytes(data[start : start + degree * width // 8], "little")
    mask = (1 << width) - 1
    digits = packed.to_bytes(degree * width // 8, "little")
    # Bits, little-endian, then words of `width` of them: no code of the product's.
    bits = np.unpackbits(np.frombuffer(digits, dtype=np.uint8), bitorder="little")
    weights = np.left_shift(np.uint64(1), np.arange(width, dtype=np.uint64))
    found = bits.reshape(degree, width).astype(np.uint64) @ weights
    assert int(found[0]) == packed & mask
    return found


def spread(degree):
    return (0, degree // 2, degree - 1)


class Messages(dict):
    """Messages by name; Hypothesis writes its arguments down, so it is brief."""

    def __repr__(self):
        return f"Messages({', '.join(map(str, self))})"


@pytest.fixture(scope="module")
def queries(service):
    """One good query for each model, under a registered key."""
    return Messages({name: service.query(name) for name in service.artifacts})


# --- good bytes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chapters", "compact", "long", "digits"])
def test_good_queries_are_answered(service, queries, name):
    service.check_answers(name)
    response = service.infer(name, queries[name].data)
    manifest = service.artifacts[name].manifest
    assert response.headers["content-type"] == "application/octet-stream"
    assert response.headers["x-veilhead-model"] == manifest.digest.hex()
    assert response.headers["cache-control"] == "no-store"
    name, _, duration = response.headers["server-timing"].partition(";dur=")
    assert name == "evaluate"
    assert float(duration) > 0
    assert response.content[140:172] == hashlib.sha256(queries[manifest.name].data).digest()


@pytest.mark.parametrize(
    "media_type",
    ["application/octet-stream", "Application/Octet-Stream", "application/octet-stream; v=1"],
)
def test_the_content_type_is_read_as_http_says(service, queries, media_type):
    response = service.infer("digits", queries["digits"].data, headers={"Content-Type": media_type})
    assert response.status_code == 200


@pytest.mark.parametrize("name", ["digits", "compact"])
def test_the_largest_residue_is_still_in_range(service, queries, name):
    """So that the refusals of residues below are about the prime, and not about the bytes."""
    manifest = service.artifacts[name].manifest
    degree = manifest.layout.degree
    row, _ = residue_row(QUERY_HEADER, manifest.parameter_set)
    for index in spread(degree):
        body = with_residue(queries[name].data, row, degree, index, row[0] - 1)
        assert service.infer(name, body).status_code == 200


# --- bad queries --------------------------------------------------------------------------------


def u32(value):
    return struct.pack("<I", value)


BAD_QUERIES = {
    "empty": (lambda q: b"", "wrong-length"),
    "one byte": (lambda q: b"V", "wrong-length"),
    "half a header": (lambda q: q[:64], "wrong-length"),
    "header less a byte": (lambda q: q[: QUERY_HEADER - 1], "wrong-length"),
    "header alone": (lambda q: q[:QUERY_HEADER], "wrong-length"),
    "truncated by one": (lambda q: q[:-1], "wrong-length"),
    "truncated by a seed": (lambda q: q[:-64], "wrong-length"),
    "first byte lost": (lambda q: q[1:], "wrong-message-type"),
    "extended by one": (lambda q: q + b"\0", "wrong-length"),
    "twice": (lambda q: q + q, "wrong-length"),
    "a megabyte long": (lambda q: q + bytes(2**20), "wrong-length"),
    "magic": (lambda q: replaced(q, MAGIC, b"veil"), "wrong-message-type"),
    "version 0": (lambda q: replaced(q, VERSION, b"\0"), "unsupported-format-version"),
    "version 1": (lambda q: replaced(q, VERSION, b"\1"), "unsupported-format-version"),
    "version 3": (lambda q: replaced(q, VERSION, b"\3"), "unsupported-format-version"),
    "type 0": (lambda q: replaced(q, TYPE, b"\0"), "wrong-message-type"),
    "type key": (lambda q: replaced(q, TYPE, b"\1"), "wrong-message-type"),
    "type reply": (lambda q: replaced(q, TYPE, b"\3"), "wrong-message-type"),
    "type with a key": (lambda q: replaced(q, TYPE, b"\4"), "wrong-length"),
    "type 255": (lambda q: replaced(q, TYPE, b"\xff"), "wrong-message-type"),
    "prng none": (lambda q: replaced(q, PRNG, b"\0"), "unknown-prng"),
    "prng 3": (lambda q: replaced(q, PRNG, b"\3"), "unknown-prng"),
    "domain 2": (lambda q: replaced(q, DOMAIN, b"\2"), "unknown-domain"),
    "domain 255": (lambda q: replaced(q, DOMAIN, b"\xff"), "unknown-domain"),
    "unknown parameters": (lambda q: replaced(q, PARAMETERS, bytes(32)), "wrong-parameters"),
    "one bit of the parameters": (
        lambda q: replaced(q, PARAMETERS + 31, bytes([q[PARAMETERS + 31] ^ 1])),
        "wrong-parameters",
    ),
    "parameters of the other set": (
        lambda q: replaced(
            q,
            PARAMETERS,
            {STANDARD.id: COMPACT, COMPACT.id: STANDARD}[q[PARAMETERS : PARAMETERS + 32]].id,
        ),
        "wrong-parameters",
    ),
    "layout 0": (lambda q: replaced(q, LAYOUT, b"\0"), "wrong-layout"),
    "layout 2": (lambda q: replaced(q, LAYOUT, b"\2"), "wrong-layout"),
    "reserved 0": (lambda q: replaced(q, RESERVED, b"\1"), "nonzero-padding"),
    "reserved 2": (lambda q: replaced(q, RESERVED + 2, b"\x80"), "nonzero-padding"),
    "c0 zero": (lambda q: replaced(q, QUERY_HEADER, bytes(BODY_BYTES)), "zero-polynomial"),
    "all ones": (
        lambda q: q[:QUERY_HEADER] + b"\xff" * (len(q) - QUERY_HEADER),
        "residue-out-of-range",
    ),
}
for place, count in enumerate(COUNT_NAMES):
    for change, value in {
        "0": lambda old: 0,
        "one more": lambda old: old + 1,
        "2^32 - 1": lambda old: 2**32 - 1,
    }.items():
        BAD_QUERIES[f"{count} {change}"] = (
            lambda q, at=COUNTS + 4 * place, value=value: replaced(
                q, at, u32(value(*struct.unpack_from("<I", q, at)))
            ),
            "wrong-layout",
        )


@pytest.mark.parametrize(("break_it", "code"), BAD_QUERIES.values(), ids=BAD_QUERIES)
def test_a_bad_query_is_refused(service, queries, problem, break_it, code):
    body = break_it(queries["digits"].data)
    problem(service.infer("digits", body), 422, code, sent=body)
    service.check_answers("digits")


@pytest.mark.parametrize("name", ["compact", "long"])
@pytest.mark.parametrize(
    "case",
    ["truncated by one", "extended by one", "prng 3", "parameters of the other set", "pieces 0"],
)
def test_a_bad_query_to_other_models_is_refused(service, queries, problem, name, case):
    break_it, code = BAD_QUERIES[case]
    body = break_it(queries[name].data)
    if len(body) > MAX_QUERY_BYTES:
        problem(service.infer(name, body), 413, "body-too-large", sent=body)
    else:
        problem(service.infer(name, body), 422, code, sent=body)
    service.check_answers(name)


@pytest.mark.parametrize("name", ["digits", "compact", "long"])
@pytest.mark.parametrize("excess", [0, 1, None], ids=["prime", "prime+1", "largest"])
def test_a_residue_at_or_above_its_prime_is_refused(service, queries, problem, name, excess):
    manifest = service.artifacts[name].manifest
    degree = manifest.layout.degree
    rows, start = [], QUERY_HEADER
    for _ in range(manifest.layout.pieces):
        row, end = residue_row(start, manifest.parameter_set)
        rows.append(row)
        start = end + 64
    for row in rows:
        value = (1 << row[1]) - 1 if excess is None else row[0] + excess
        for index in spread(degree):
            body = with_residue(queries[name].data, row, degree, index, value)
            problem(service.infer(name, body), 422, "residue-out-of-range", sent=body)
    service.check_answers(name)


def test_either_piece_may_not_be_zero(service, queries, problem):
    good = queries["long"].data
    for piece in range(service.artifacts["long"].manifest.layout.pieces):
        body = replaced(good, QUERY_HEADER + piece * (BODY_BYTES + 64), bytes(BODY_BYTES))
        problem(service.infer("long", body), 422, "zero-polynomial", sent=body)
    service.check_answers("long")


def test_equal_seeds_within_a_query_are_refused(service, queries, problem):
    good = queries["long"].data
    first = QUERY_HEADER + BODY_BYTES
    body = good[:-64] + good[first : first + 64]
    problem(service.infer("long", body), 422, "seed-reused", sent=body)
    service.check_answers("long")


@pytest.mark.parametrize("name", ["digits", "compact", "long"])
def test_the_keys_seed_in_a_query_is_refused(service, queries, problem, name):
    query = queries[name]
    body = query.data[:-64] + query.key.message[-64:]
    problem(service.infer(name, body), 422, "seed-reused", sent=body)
    service.check_answers(name)


def test_the_same_bytes_may_be_sent_again(service, queries):
    """A retry is no reuse of a seed."""
    for _ in range(2):
        assert service.infer("long", queries["long"].data).status_code == 200


def test_an_unknown_key_is_named_as_such(service, queries, problem):
    body = replaced(queries["digits"].data, KEY, hashlib.sha256(b"nobody").digest())
    problem(service.infer("digits", body), 404, "key-not-registered", sent=body)
    service.check_answers()


@pytest.mark.parametrize(("name", "other"), [("digits", "compact"), ("compact", "digits")])
def test_a_key_of_the_other_set_is_refused(service, queries, problem, name, other):
    body = replaced(queries[name].data, KEY, queries[other].key.id)
    problem(service.infer(name, body), 422, "wrong-parameters", sent=body)
    service.check_answers(name)
    service.check_answers(other)


def test_an_unknown_version_of_the_model_is_a_conflict(service, queries, problem):
    body = replaced(queries["digits"].data, MODEL, hashlib.sha256(b"no manifest").digest())
    problem(service.infer("digits", body), 409, "wrong-model", sent=body)
    service.check_answers()


@pytest.mark.parametrize("other", ["chapters", "compact", "long"])
def test_a_query_to_another_model_is_a_conflict(service, queries, problem, other):
    body = queries["digits"].data
    problem(service.infer(other, body), 409, "wrong-model", sent=body)


def test_a_query_that_only_names_the_other_model_is_refused(service, queries, problem):
    """The right digest for the address, over the body of another model's query."""
    body = replaced(queries["digits"].data, MODEL, service.artifacts["chapters"].manifest.digest)
    problem(service.infer("chapters", body), 422, "wrong-layout", sent=body)
    body = replaced(queries["digits"].data, MODEL, service.artifacts["long"].manifest.digest)
    problem(service.infer("long", body), 422, "wrong-length", sent=body)


def test_an_unknown_model_is_not_found(service, queries, problem):
    body = queries["digits"].data
    for name in ("nothing", "digits2", "DIGITS", "a%00b", "x" * 300, "%2e%2e%2e", "-", "current"):
        problem(service.infer(name, body), 404, "model-not-found", sent=body)


def test_a_key_message_is_no_query_and_a_query_no_key(service, queries, problem):
    query = queries["digits"]
    sent = query.key.message
    problem(service.infer("digits", sent), 422, "wrong-message-type", sent=sent)
    short = queries["compact"].data  # than the longest key
    problem(service.put(short), 422, "wrong-message-type", sent=short)
    reply = service.infer("digits", query.data).content
    problem(service.infer("digits", reply), 422, "wrong-message-type", sent=reply)


# --- bad keys -----------------------------------------------------------------------------------

BAD_KEYS = {
    "empty": (lambda k: b"", "wrong-length"),
    "half a header": (lambda k: k[:20], "wrong-length"),
    "header less a byte": (lambda k: k[: KEY_HEADER - 1], "wrong-length"),
    "header alone": (lambda k: k[:KEY_HEADER], "wrong-length"),
    "truncated": (lambda k: k[:-1], "wrong-length"),
    "without a seed": (lambda k: k[:-64], "wrong-length"),
    "extended": (lambda k: k + b"\0", "wrong-length"),
    "magic": (lambda k: replaced(k, MAGIC, b"VEIN"), "wrong-message-type"),
    "version": (lambda k: replaced(k, VERSION, b"\1"), "unsupported-format-version"),
    "type query": (lambda k: replaced(k, TYPE, b"\2"), "wrong-message-type"),
    "type reply": (lambda k: replaced(k, TYPE, b"\3"), "wrong-message-type"),
    "prng none": (lambda k: replaced(k, PRNG, b"\0"), "unknown-prng"),
    "prng 3": (lambda k: replaced(k, PRNG, b"\3"), "unknown-prng"),
    "domain 2": (lambda k: replaced(k, DOMAIN, b"\2"), "unknown-domain"),
    "unknown parameters": (lambda k: replaced(k, PARAMETERS, b"\1" * 32), "wrong-parameters"),
    "parameters of the other set": (
        lambda k: replaced(
            k,
            PARAMETERS,
            {STANDARD.id: COMPACT, COMPACT.id: STANDARD}[k[PARAMETERS : PARAMETERS + 32]].id,
        ),
        "wrong-length",
    ),
    "b zero": (
        lambda k: k[:KEY_HEADER] + bytes(len(k) - KEY_HEADER - 64) + k[-64:],
        "zero-polynomial",
    ),
    "all ones": (
        lambda k: k[:KEY_HEADER] + b"\xff" * (len(k) - KEY_HEADER),
        "residue-out-of-range",
    ),
}


@pytest.mark.parametrize("name", ["digits", "compact"])
@pytest.mark.parametrize(("break_it", "code"), BAD_KEYS.values(), ids=BAD_KEYS)
def test_a_bad_key_is_refused(service, queries, problem, name, break_it, code):
    body = break_it(queries[name].key.message)
    if len(body) > MAX_KEY_BYTES:
        problem(service.put(body), 413, "body-too-large", sent=body)
    else:
        problem(service.put(body), 422, code, sent=body)
    assert service.client.head(f"/v1/keys/{hashlib.sha256(body).hexdigest()}").status_code == 404


@pytest.mark.parametrize("name", ["digits", "compact"])
def test_a_key_residue_at_or_above_its_prime_is_refused(service, queries, problem, name):
    manifest = service.artifacts[name].manifest
    degree = manifest.layout.degree
    row, end = residue_row(KEY_HEADER, manifest.parameter_set)
    good = queries[name].key.message
    assert end + 64 == len(good)
    for index in spread(degree):
        for value in (row[0], (1 << row[1]) - 1):
            body = with_residue(good, row, degree, index, value)
            problem(service.put(body), 422, "residue-out-of-range", sent=body)
        largest = service.put(with_residue(good, row, degree, index, row[0] - 1))
        assert largest.status_code in (200, 201)
    service.check_answers(name)


# --- queries that carry their key -----------------------------------------------------------------


@pytest.fixture(params=["digits", "compact", "long"])
def carried(request, service):
    """A model's name and a query that carries its key, which nobody registered."""
    name = request.param
    session = Session(service.artifacts[name].manifest, fresh_keys=True)
    dimensions = service.artifacts[name].manifest.head.dimensions
    query = session.encrypt(unit_rows(1, dimensions)[0])
    assert query.carries_key
    return name, session, query


def test_a_query_that_carries_its_key_is_answered_and_the_key_is_not_kept(service, carried):
    name, session, query = carried
    row = unit_rows(1, service.artifacts[name].manifest.head.dimensions)
    for _ in range(2):  # a retry sends the same bytes
        response = service.infer(name, query.data)
        assert response.status_code == 200, response.text
        expected = service.artifacts[name].logits(row)[0]
        bound = service.artifacts[name].manifest.head.error_bound
        assert np.abs(session.decrypt(query, response.content) - expected).max() <= bound
        assert service.client.head(f"/v1/keys/{query.key.id.hex()}").status_code == 404


KEY_START, KEY_SEED = QUERY_HEADER, -64

BAD_CARRIED = {
    "without the key": (
        lambda q, size: q[:QUERY_HEADER] + q[QUERY_HEADER + size :],
        "wrong-length",
    ),
    "another id": (lambda q, size: replaced(q, KEY, bytes(32)), "wrong-key"),
    "one bit of the key": (
        lambda q, size: replaced(q, KEY_START + 100, bytes([q[KEY_START + 100] ^ 1])),
        "wrong-key",
    ),
    "truncated by one": (lambda q, size: q[:-1], "wrong-length"),
    "said to be without": (lambda q, size: replaced(q, TYPE, b"\2"), "wrong-length"),
    "the key's seed": (
        lambda q, size: q[:-64] + q[KEY_START + size - 64 : KEY_START + size],
        "seed-reused",
    ),
}
for case, part, code in (
    ("version", (VERSION, b"\1"), "unsupported-format-version"),
    ("type", (TYPE, b"\2"), "wrong-message-type"),
    ("prng", (PRNG, b"\3"), "unknown-prng"),
    ("set", (PARAMETERS, bytes(32)), "wrong-parameters"),
    ("residues", (KEY_HEADER, b"\xff" * 64), "residue-out-of-range"),
):

    def with_other_key(q, size, part=part):
        """The key is bad in itself, and its id is right."""
        key = replaced(q[KEY_START : KEY_START + size], *part)
        named = replaced(q, KEY, hashlib.sha256(key).digest())
        return replaced(named, KEY_START, key)

    BAD_CARRIED[f"a key of another {case}"] = (with_other_key, code)


@pytest.mark.parametrize(("break_it", "code"), BAD_CARRIED.values(), ids=BAD_CARRIED)
def test_a_bad_query_with_its_key_is_refused(service, carried, problem, break_it, code):
    name, _, query = carried
    body = break_it(query.data, len(query.key.message))
    problem(service.infer(name, body), 422, code, sent=body)
    service.check_answers(name)


# --- bad requests -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "media_type",
    [
        "application/json",
        "text/plain",
        "multipart/form-data; boundary=x",
        "",
        "octet-stream",
        "*/*",
    ],
)
def test_another_content_type_is_refused(service, queries, problem, media_type):
    headers = {"Content-Type": media_type}
    query = queries["digits"]
    for body, response in (
        (query.data, service.infer("digits", query.data, headers=headers)),
        (query.key.message, service.put(query.key.message, headers=headers)),
    ):
        problem(response, 415, "unsupported-media-type", sent=body)
    service.check_answers()


def test_a_missing_content_type_is_refused(service, queries, problem):
    query = queries["digits"]
    for body, response in (
        (query.data, service.infer("digits", query.data, headers={})),
        (query.key.message, service.put(query.key.message, headers={})),
    ):
        assert "content-type" not in response.request.headers
        problem(response, 415, "unsupported-media-type", sent=body)


def test_json_and_base64_are_no_messages(service, queries, problem):
    good = queries["digits"].data
    for body in (base64.b64encode(good), good.hex().encode(), b'{"query": "' + good + b'"}'):
        problem(service.infer("digits", body), 422, "wrong-message-type", sent=body)


def pieces_of(body, size=4000):
    for start in range(0, len(body), size):
        yield body[start : start + size]


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_an_oversized_body_is_refused(service, problem, chunked):
    for limit, send in (
        (MAX_QUERY_BYTES, lambda body: service.infer("digits", body)),
        (MAX_KEY_BYTES, lambda body: service.put(body, "0" * 64)),
    ):
        if limit == MAX_QUERY_BYTES and chunked:
            continue  # refused by its header, whatever follows
        body = bytes(limit + 1)
        response = send(pieces_of(body) if chunked else body)
        assert ("transfer-encoding" in response.request.headers) is chunked
        problem(response, 413, "body-too-large", sent=b"")
    service.check_answers()


def test_a_chunked_query_is_answered(service, queries):
    response = service.infer("digits", pieces_of(queries["digits"].data))
    assert response.status_code == 200


@pytest.mark.parametrize(
    "declared", [str(MAX_QUERY_BYTES + 1), "9" * 19, "9" * 400], ids=["one", "19", "400"]
)
def test_a_body_that_declares_too_much_is_not_read(store, request_raw, declared):
    async def receive():
        raise AssertionError("the body was read")

    headers = {"content-type": "application/octet-stream", "content-length": declared}
    status, found, _ = request_raw(
        create_app(Settings(store=store, insecure_no_tenants=True)),
        "POST",
        "/v1/models/digits/infer",
        headers=headers,
        receive=receive,
    )
    assert status == 413
    assert found["content-type"] == "application/problem+json"


@pytest.mark.parametrize("declared", [None, "10", "-5", "a lot"])
@pytest.mark.parametrize(
    ("method", "path", "start", "limit", "refusal"),
    [
        # What is no header ends it there; a good one says how much may follow.
        ("POST", "/v1/models/digits/infer", 0, QUERY_HEADER, 422),
        ("POST", "/v1/models/digits/infer", QUERY_HEADER, QUERY_BYTES, 422),
        ("PUT", "/v1/keys/" + "0" * 64, 0, MAX_KEY_BYTES, 413),
    ],
    ids=["infer", "header", "key"],
)
def test_a_body_without_end_is_read_up_to_the_limit(
    store, request_raw, queries, declared, method, path, start, limit, refusal
):
    given_out = 0
    header = queries["digits"].data[:start]

    async def receive():
        nonlocal given_out
        given_out += 1000
        assert given_out <= limit + 2000, "the service reads on"
        piece = header.ljust(1000, b"\0") if given_out == 1000 else bytes(1000)
        return {"type": "http.request", "body": piece, "more_body": True}

    headers = {"content-type": "application/octet-stream"}
    if declared is not None:
        headers["content-length"] = declared
    status, found, _ = request_raw(
        create_app(Settings(store=store, insecure_no_tenants=True)),
        method,
        path,
        headers=headers,
        receive=receive,
    )
    assert status == refusal
    assert found["content-type"] == "application/problem+json"
    assert given_out > limit


def test_random_bytes_are_refused(service, problem, queries):
    random = np.random.default_rng(4)
    for size in (1, 39, 40, 135, 136, 137, 1000, len(queries["digits"].data), MAX_QUERY_BYTES):
        body = random.bytes(size)
        code = "wrong-length" if size < QUERY_HEADER else "wrong-message-type"
        problem(service.infer("digits", body), 422, code, sent=body)
    for size in (1, 39, 40, 12904, MAX_KEY_BYTES):
        body = random.bytes(size)
        code = "wrong-length" if size < KEY_HEADER else "wrong-message-type"
        problem(service.put(body), 422, code, sent=body)
    service.check_answers()


def test_random_residues_under_a_good_header_are_answered_or_refused(service, queries):
    """They are a ciphertext of noise: a client that sends it reads noise."""
    good = queries["digits"].data
    random = np.random.default_rng(5)
    statuses = set()
    for _ in range(4):
        body = good[:QUERY_HEADER] + random.bytes(len(good) - QUERY_HEADER)
        statuses.add(service.infer("digits", body).status_code)
    assert statuses <= {200, 422}
    service.check_answers()


# --- properties ---------------------------------------------------------------------------------

CODES = {
    404: {"key-not-registered"},
    409: {"wrong-model"},
    413: {"body-too-large"},
    422: {
        "wrong-length",
        "wrong-message-type",
        "unsupported-format-version",
        "wrong-parameters",
        "unknown-prng",
        "unknown-domain",
        "wrong-layout",
        "residue-out-of-range",
        "zero-polynomial",
        "nonzero-padding",
        "seed-reused",
    },
}

#: Places as shares of the length, the header (where all the fields are) as often as the rest.
PLACES = st.one_of(st.integers(0, 140), st.floats(0, 1), st.integers(-70, -1))

MUTATIONS = st.one_of(
    st.tuples(st.just("flip"), PLACES, st.integers(1, 255)),
    st.tuples(st.just("set"), PLACES, st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("set"), PLACES, st.integers(7, 40).map(lambda size: b"\xff" * size)),
    st.tuples(st.just("truncate"), PLACES, st.just(None)),
    st.tuples(st.just("extend"), st.just(0), st.binary(min_size=1, max_size=80)),
    st.tuples(st.just("cut out"), PLACES, st.integers(1, 200)),
    st.tuples(st.just("splice"), PLACES, st.integers(0, 5)),
    st.tuples(
        st.just("swap"),
        st.sampled_from(["prefix", "parameters", "model", "key", "counts", "body", "seed"]),
        st.integers(0, 5),
    ),
)

FIELDS = {
    "prefix": slice(0, 8),
    "parameters": slice(8, 40),
    "model": slice(40, 72),
    "key": slice(72, 104),
    "counts": slice(104, 136),
    "body": slice(136, -64),
    "seed": slice(-64, None),
}


def mutate(data, mutation, others):
    """One mutation; `others` are messages to take parts from."""
    kind, place, argument = mutation
    if kind == "extend":
        return data + argument
    if kind == "swap":
        span, other = FIELDS[place], others[argument % len(others)]
        start, stop, _ = span.indices(len(data))
        return data[:start] + other[span] + data[max(start, stop) :]
    at = int(place * len(data)) if isinstance(place, float) else place % (len(data) or 1)
    if kind == "flip":
        return data[:at] + bytes(byte ^ argument for byte in data[at : at + 1]) + data[at + 1 :]
    if kind == "set":
        return data[:at] + argument[: len(data) - at] + data[at + len(argument) :]
    if kind == "truncate":
        return data[:at]
    if kind == "cut out":
        return data[:at] + data[at + argument :]
    return data[:at] + others[argument % len(others)][at:]


def has_valid_residues(data, start, parameters):
    row, _ = residue_row(start, parameters)
    found = residues_of(data, row, parameters.poly_modulus_degree)
    return int(found.max()) < parameters.prime and bool(found.any())


def is_valid_key(data):
    """What the specification says of a key message, in other words than the product's."""
    if len(data) < KEY_HEADER or data[:6] != b"VEIL\2\1":
        return False
    if data[PRNG] not in (1, 2) or data[DOMAIN] not in (0, 1):
        return False
    for parameters in PARAMETER_SETS.values():
        if data[PARAMETERS:KEY_HEADER] == parameters.id:
            _, end = residue_row(KEY_HEADER, parameters)
            return len(data) == end + 64 and has_valid_residues(data, KEY_HEADER, parameters)
    return False


def is_valid_query(data, good, keys):
    """The same of a query of one polynomial; `good` is one, `keys` are those of its set by id."""
    same = (slice(0, 6), slice(8, 72), slice(104, 136))
    if len(data) != len(good) or any(data[span] != good[span] for span in same):
        return False
    if data[PRNG] not in (1, 2) or data[DOMAIN] not in (0, 1):
        return False
    key = keys.get(data[KEY : KEY + 32])
    if key is None or key[-64:] == data[-64:]:
        return False
    (parameters,) = (p for p in PARAMETER_SETS.values() if p.id == data[8:40])
    return has_valid_residues(data, QUERY_HEADER, parameters)


def assert_refused(response, problem, sent):
    code = response.json()["type"].rpartition(":")[2]
    assert code in CODES.get(response.status_code, ()), (response.status_code, response.text)
    problem(response, response.status_code, code, sent=sent)


@pytest.fixture(scope="module")
def corpus(service, queries):
    """Queries and keys to take parts from, of either set, two of each for the model `digits`."""
    second = service.query("digits", row=1)
    sources = [queries["digits"], second, queries["chapters"], queries["compact"], queries["long"]]
    keys = {query.key.id: query.key.message for query in sources if query is not queries["compact"]}
    return Messages(parts=[query.data for query in sources] + [second.key.message], keys=keys)


@pytest.mark.parametrize("name", ["digits", "compact"])
@settings(max_examples=4000 if SLOW else 200, derandomize=True, deadline=None, database=None)
@given(mutations=st.lists(MUTATIONS, min_size=1, max_size=3))
def test_mutated_queries_are_answered_when_valid_and_refused_when_not(
    service, queries, corpus, problem, name, mutations
):
    others, standard_keys = corpus["parts"], corpus["keys"]
    good = queries[name].data
    compact_keys = {queries["compact"].key.id: queries["compact"].key.message}
    keys = standard_keys if name == "digits" else compact_keys
    body = good
    for mutation in mutations:
        body = mutate(body, mutation, [*others, queries[name].key.message])
    response = service.infer(name, body)
    if is_valid_query(body, good, keys):
        assert response.status_code == 200, response.text
        assert len(response.content) == service.session(name).reply_bytes
        assert response.content[140:172] == hashlib.sha256(body).digest()
    else:
        assert_refused(response, problem, body)


@pytest.mark.parametrize("name", ["digits", "compact"])
@settings(max_examples=3000 if SLOW else 150, derandomize=True, deadline=None, database=None)
@given(mutations=st.lists(MUTATIONS, min_size=1, max_size=3))
def test_mutated_keys_are_registered_when_valid_and_refused_when_not(
    service, queries, corpus, problem, name, mutations
):
    others = corpus["parts"]
    body = queries[name].key.message
    for mutation in mutations:
        body = mutate(body, mutation, [others[-1], queries["compact"].key.message, *others[:-1]])
    response = service.put(body)
    if not is_valid_key(body):
        assert_refused(response, problem, body)
        return
    assert response.status_code in (200, 201), response.text
    # Whatever its numbers are, a query under it is answered: only its owner reads nonsense.
    target = "digits" if body[PARAMETERS:KEY_HEADER] == STANDARD.id else "compact"
    query = replaced(queries[target].data, KEY, hashlib.sha256(body).digest())
    response = service.infer(target, query)
    if query[-64:] == body[-64:]:
        assert response.status_code == 422
    else:
        assert response.status_code == 200, response.text


def test_after_all_that_the_service_answers(service):
    for name in service.artifacts:
        service.check_answers(name)
