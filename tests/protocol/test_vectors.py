"""The packages against the golden vectors, which are made without them."""

from __future__ import annotations

import hashlib
import json
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from veilhead_protocol import errors, seal_io, wire
from veilhead_protocol.decryption import rounded_logits
from veilhead_protocol.encoding import coefficients_to_slots, slots_to_coefficients
from veilhead_protocol.layout import block_sizes
from veilhead_protocol.manifest import Manifest
from veilhead_protocol.parameters import PARAMETER_SETS
from veilhead_protocol.wire import Domain, KeyMessage, Prng, QueryMessage, ReplyMessage
from veilhead_service.encrypted_head import ClientKey, EncryptedHead, truncate
from veilhead_service.limits import requested_layout

VECTORS = Path(__file__).resolve().parent.parent / "vectors"
NAMES = ("compact-384", "compact-3000", "standard-384", "compact-block", "compact-bulk")
TEXTS = {"compact-block": 16, "compact-bulk": 100}  # in a request; one in the others
FAILING: list[dict[str, Any]] = json.loads((VECTORS / "failing.json").read_text())


def read(name: str) -> bytes:
    return (VECTORS / name).read_bytes()


def listed(name: str) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads(read(name))
    return entries


def words_digest(residues: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(residues, dtype="<u8").tobytes()).hexdigest()


def read_reply(name: str, data: bytes) -> ReplyMessage:
    """The reply of a case, checked as a client checks it against the case's own query."""
    manifest = Manifest.deserialize(read(f"{name}.manifest.json"))
    return ReplyMessage.deserialize(
        data,
        manifest.parameter_set,
        manifest.layout_of(TEXTS.get(name, 1)),
        manifest.scales.reply_bits,
        model_digest=manifest.digest,
        key_id=hashlib.sha256(read(f"{name}.key.bin")).digest(),
        query_digest=hashlib.sha256(read(f"{name}.query.bin")).digest(),
    )


# --- the files -----------------------------------------------------------------------------------


def test_the_generator_writes_the_committed_files(generator) -> None:
    built = generator.build()
    committed = {path.name for path in VECTORS.iterdir() if path.suffix in (".json", ".bin")}
    assert set(built) == committed
    for name, data in built.items():
        assert read(name) == data, f"{name} is not what generate.py writes"


def test_they_stay_small() -> None:
    total = sum(path.stat().st_size for path in VECTORS.iterdir() if path.is_file())
    assert total < 600_000


# --- messages that are good ----------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
class TestMessages:
    def test_recorded_digests(self, name: str, cases) -> None:
        for kind, file in (
            ("manifest", f"{name}.manifest.json"),
            ("key", f"{name}.key.bin"),
            ("query", f"{name}.query.bin"),
            ("reply", f"{name}.reply.bin"),
        ):
            data, recorded = read(file), cases[name][kind]
            assert len(data) == recorded["bytes"]
            assert hashlib.sha256(data).hexdigest() == recorded["sha256"]
            assert data[:48].hex() == recorded["leading"]

    def test_manifest(self, name: str, cases) -> None:
        data, case = read(f"{name}.manifest.json"), cases[name]
        manifest = Manifest.deserialize(data)
        assert manifest.serialize() == data
        assert manifest.digest == hashlib.sha256(data).digest()
        assert manifest.parameters == case["parameters"]
        for field, value in case["scales"].items():
            assert getattr(manifest.scales, field) == value, field
        for field, value in case["layout"].items():
            assert getattr(manifest.layout_of(TEXTS.get(name, 1)), field) == value, field
        assert list(block_sizes(manifest.shape)) == case["block_sizes"]
        rebuilt = Manifest.build(json.loads(data))
        assert rebuilt.serialize() == data

    def test_key(self, name: str, cases) -> None:
        data, case = read(f"{name}.key.bin"), cases[name]
        message = KeyMessage.deserialize(data)
        assert message.parameters is PARAMETER_SETS[case["parameters"]]
        assert (message.prng, message.domain) == (case["prng"], case["domain"])
        assert message.seed.hex() == case["key"]["seed"]
        assert message.b.shape == (message.parameters.poly_modulus_degree,)
        assert words_digest(message.b) == case["key"]["b_sha256"]
        assert message.serialize() == data
        assert KeyMessage.size(message.parameters) == len(data)
        assert wire.key_id(data).hex() == case["key"]["sha256"]
        assert ClientKey.from_message(data).seed == message.seed

    def test_query(self, name: str, cases) -> None:
        data, case = read(f"{name}.query.bin"), cases[name]
        manifest = Manifest.deserialize(read(f"{name}.manifest.json"))
        key = KeyMessage.deserialize(read(f"{name}.key.bin"))
        message = QueryMessage.deserialize(
            data, manifest.parameter_set, manifest.layout_of(TEXTS.get(name, 1)), key_seed=key.seed
        )
        assert (message.prng, message.domain) == (case["prng"], case["domain"])
        assert message.model_digest == manifest.digest
        assert message.key_id.hex() == case["key"]["sha256"]
        recorded = case["query"]["polynomials"]
        assert len(message.polynomials) == len(recorded) == case["layout"]["pieces"]
        for polynomial, expected in zip(message.polynomials, recorded, strict=True):
            assert polynomial.seed.hex() == expected["seed"]
            assert words_digest(polynomial.c0) == expected["c0_sha256"]
        assert message.serialize() == data
        assert QueryMessage.size(manifest.parameter_set, message.layout) == len(data)
        header = wire.QueryHeader.deserialize(data)
        assert header.counts == wire.Counts.of(message.layout, case["layout"]["pieces"])

    def test_reply(self, name: str, cases) -> None:
        data, case = read(f"{name}.reply.bin"), cases[name]
        message = read_reply(name, data)
        recorded = case["reply"]["polynomials"]
        assert len(message.polynomials) == len(recorded) == case["layout"]["replies"]
        for polynomial, expected in zip(message.polynomials, recorded, strict=True):
            assert polynomial.c0.tolist() == expected["c0"]
            assert words_digest(polynomial.c1) == expected["c1_sha256"]
        assert message.serialize() == data
        assert ReplyMessage.size(message.layout, message.reply_bits) == len(data)

    def test_rounding(self, name: str, cases) -> None:
        case = cases[name]
        manifest = Manifest.deserialize(read(f"{name}.manifest.json"))
        rounded = rounded_logits(np.array(case["decrypted"]), manifest)
        assert rounded.tolist() == case["rounded_logits"]
        error = np.abs(rounded - case["plaintext_logits"]).max()
        assert error <= manifest.head.error_bound

    def test_the_service_answers_the_query(self, name: str, cases, independent) -> None:
        """The real evaluation of the recorded query, read with the recorded secret."""
        case = cases[name]
        manifest = Manifest.deserialize(read(f"{name}.manifest.json"))
        rng = np.random.default_rng(1)
        classes, dimensions = case["layout"]["classes"], case["layout"]["dimensions"]
        weight = rng.normal(size=(classes, dimensions))
        weight *= 0.4 / np.linalg.norm(weight, axis=1, keepdims=True)
        bias = rng.uniform(-0.4, 0.4, size=classes)
        larger = 2**manifest.scales.downscale_bits
        weight, bias = weight * larger, bias * larger
        key = ClientKey.from_message(read(f"{name}.key.bin"))
        query = read(f"{name}.query.bin")
        reply = EncryptedHead(manifest, weight, bias).evaluate(query, key)
        model = independent.Model.from_manifest(manifest.serialize(), TEXTS.get(name, 1))
        secret = np.array([int(digit) - 1 for digit in case["secret_plus_one"]])
        client = independent.Client(model, secret)
        client.key_id = key.id
        expected = np.array(case["embeddings_times_2_20"]) / 2**20 @ weight.T + bias
        # The recorded bound is not of this head, whose weights are quantised a little worse.
        assert np.abs(client.logits(query, reply) - expected.reshape(-1)).max() < 2e-3 * larger


def test_a_query_that_carries_its_key(cases, independent) -> None:
    """Read, written again, and answered under the key that it carries."""
    (name,) = [name for name, case in cases.items() if case["query_with_key"]]
    case, data = cases[name], read(f"{name}.query-with-key.bin")
    recorded = case["query_with_key"]
    assert (len(data), hashlib.sha256(data).hexdigest(), data[:48].hex()) == tuple(
        recorded[field] for field in ("bytes", "sha256", "leading")
    )
    manifest = Manifest.deserialize(read(f"{name}.manifest.json"))
    header = wire.QueryHeader.deserialize(data)
    assert header.has_key
    carried = wire.carried_key(data, header)
    assert carried == read(f"{name}.key.bin")
    message = QueryMessage.deserialize(data, manifest.parameter_set, manifest.layout)
    assert message.key_message == carried
    assert message.serialize() == data
    assert QueryMessage.size(manifest.parameter_set, manifest.layout, has_key=True) == len(data)

    rng = np.random.default_rng(2)
    weight = rng.normal(size=(case["layout"]["classes"], case["layout"]["dimensions"]))
    weight *= 0.4 / np.linalg.norm(weight, axis=1, keepdims=True)
    head = EncryptedHead(manifest, weight, weight[:, 0])
    reply = head.evaluate(data, ClientKey.from_message(carried))
    model = independent.Model.from_manifest(manifest.serialize())
    secret = np.array([int(digit) - 1 for digit in case["secret_plus_one"]])
    client = independent.Client(model, secret)
    client.key_id = hashlib.sha256(carried).digest()
    expected = np.array(case["embeddings_times_2_20"]) / 2**20 @ weight.T + weight[:, 0]
    assert np.abs(client.logits(data, reply) - expected.reshape(-1)).max() < 2e-3
    with pytest.raises(ValueError, match="not the reply"):
        client.logits(read(f"{name}.query.bin"), reply)  # the digest is of all of it


# --- messages that must fail ---------------------------------------------------------------------


def edit(data: bytes, edits: list[dict[str, Any]]) -> bytes:
    """What generate.py's `failing` describes."""
    result = bytearray(data)
    for step in edits:
        if "truncate" in step:
            del result[len(result) - step["truncate"] :]
        elif "append" in step:
            result += bytes.fromhex(step["append"])
        elif "hex" in step:
            written = bytes.fromhex(step["hex"])
            result[step["at"] : step["at"] + len(written)] = written
        elif "copy" in step:
            source, target, count = step["copy"]
            result[target : target + count] = result[source : source + count]
        elif "fill" in step:
            start, end, value = step["fill"]
            result[start:end] = bytes([value]) * (end - start)
        elif "sha256" in step:
            start, end, target = step["sha256"]
            result[target : target + 32] = hashlib.sha256(result[start:end]).digest()
        else:
            document = json.loads(result)
            *parents, last = step["path"]
            place = document
            for part in parents:
                place = place[part]
            if "value" in step:
                place[last] = step["value"]
            else:
                del place[last]
            result = bytearray(
                json.dumps(
                    document, sort_keys=True, separators=(",", ":"), ensure_ascii=False
                ).encode()
            )
    return bytes(result)


@pytest.fixture(scope="module")
def heads() -> dict[str, EncryptedHead]:
    """A head for the manifest of each case: what it holds does not matter."""
    made = {}
    for name in NAMES:
        manifest = Manifest.deserialize(read(f"{name}.manifest.json"))
        weight = np.zeros((len(manifest.head.labels), manifest.head.dimensions))
        made[name] = EncryptedHead(manifest, weight, weight[:, 0])
    return made


@pytest.fixture(scope="module")
def keys() -> dict[str, ClientKey]:
    return {name: ClientKey.from_message(read(f"{name}.key.bin")) for name in NAMES}


@pytest.mark.parametrize("case", FAILING, ids=lambda case: f"{case['base']}: {case['name']}")
def test_bad_messages_raise_what_is_declared(
    case: dict[str, Any], heads: dict[str, EncryptedHead], keys: dict[str, ClientKey]
) -> None:
    base: str = case["base"]
    original = read(base)
    data = edit(original, case["edits"])
    assert (data != original) is bool(case["edits"])
    with pytest.raises(errors.ProtocolError) as raised:
        receive(base, data, heads, keys)
    assert type(raised.value) is getattr(errors, case["error"])


def receive(
    base: str, data: bytes, heads: dict[str, EncryptedHead], keys: dict[str, ClientKey]
) -> None:
    """Let the side that reads such a file read these bytes."""
    name, kind, _ = base.removeprefix("version-1/").split(".")
    if kind == "manifest":
        Manifest.deserialize(data)
    elif kind == "key":
        ClientKey.from_message(data)
    elif kind == "query":
        heads[name].evaluate(data, keys[name])
    elif kind == "query-with-key":
        receive_with_key(data, heads[name], keys[name])
    else:
        read_reply(name, data)


def receive_with_key(data: bytes, head: EncryptedHead, registered: ClientKey) -> None:
    """In the order of the page: header, layout, length, the carried key, everything else."""
    header = wire.QueryHeader.deserialize(data)
    layout = requested_layout(header, head.manifest)
    if len(data) != QueryMessage.size(header.parameters, layout, has_key=header.has_key):
        raise errors.MessageLengthError("another length than the model's")
    carried = wire.carried_key(data, header)
    head.evaluate(data, ClientKey.from_message(carried) if carried else registered)


def test_evaluation_checks_carried_keys_by_itself(
    heads: dict[str, EncryptedHead], keys: dict[str, ClientKey]
) -> None:
    """Whatever was looked at before: length, digest and seeds hold of the message evaluated."""
    for case in FAILING:
        name, kind, _ = case["base"].split(".")
        if kind == "query-with-key":
            data = edit(read(case["base"]), case["edits"])
            with pytest.raises(errors.WireError):
                heads[name].evaluate(data, keys[name])


@pytest.mark.parametrize("kind", ["key", "query"])
def test_messages_of_version_1_are_refused_by_name(
    kind: str, heads: dict[str, EncryptedHead], keys: dict[str, ClientKey]
) -> None:
    base = f"version-1/compact-384.{kind}.bin"
    with pytest.raises(errors.FormatVersionError, match="format version 1, expected 2"):
        receive(base, read(base), heads, keys)


def test_a_manifest_of_version_1_is_refused_by_name() -> None:
    with pytest.raises(errors.ManifestError, match=r"'veilhead-manifest/1'.*upgrade"):
        Manifest.deserialize(read("version-1/compact-384.manifest.json"))


def test_unedited_messages_pass_the_same_checks(
    heads: dict[str, EncryptedHead], keys: dict[str, ClientKey]
) -> None:
    receive_with_key(
        read("compact-384.query-with-key.bin"), heads["compact-384"], keys["compact-384"]
    )
    for name in NAMES:
        assert heads[name].evaluate(read(f"{name}.query.bin"), keys[name])
        assert read_reply(name, read(f"{name}.reply.bin"))


def test_every_wire_error_has_a_vector() -> None:
    def below(error: type[Exception]) -> set[str]:
        found = {error.__name__}
        return found.union(*(below(child) for child in error.__subclasses__()))

    seen = Counter(case["error"] for case in FAILING)
    assert below(errors.WireError) - {"WireError"} <= set(seen)


# --- the smaller vectors -------------------------------------------------------------------------


def test_parameter_sets() -> None:
    recorded = listed("parameters.json")
    assert [entry["name"] for entry in recorded] == list(PARAMETER_SETS)
    for entry in recorded:
        parameters = PARAMETER_SETS[entry["name"]]
        assert parameters.canonical_form.decode() == entry["canonical_form"]
        assert parameters.id.hex() == entry["id"]
        assert parameters.poly_modulus_degree == entry["degree"]
        assert hex(parameters.prime) == entry["prime"]
        assert parameters.hint_bits == entry["hints"]


@pytest.mark.parametrize("case", listed("seed-expansion.json"))
def test_seal_expands_seeds_as_recorded(case: dict[str, Any]) -> None:
    """Through the very loaders that the service uses."""
    parameters = PARAMETER_SETS[case["parameters"]]
    seal = seal_io.runtime(parameters)
    c0 = np.ones(parameters.poly_modulus_degree, dtype=np.uint64)
    seed = bytes.fromhex(case["seed"])
    ciphertext = seal_io.load_seeded_ciphertext(
        seal, c0, seed, prng=case["prng"], ntt_form=True, scale_bits=30
    )
    key = seal_io.load_public_key(seal, c0, seed, prng=case["prng"], ntt_form=True)
    into = np.empty((2, len(c0)), dtype=np.uint64)
    seal_io.expand_residues(seal, c0, seed, prng=case["prng"], ntt_form=True, into=into)
    for expanded in (
        seal_io.save_ciphertext(seal, ciphertext)[1],
        seal_io.save_ciphertext(seal, key.data())[1],
        into[1],
    ):
        assert [hex(value) for value in expanded[:4].tolist()] == case["first"]
        assert [hex(value) for value in expanded[-4:].tolist()] == case["last"]
        assert words_digest(expanded) == case["sha256"]


def test_plain_python_expands_seeds_as_recorded(independent) -> None:
    for case in listed("seed-expansion.json"):
        if case["prng"] == Prng.SHAKE256:
            parameters = independent.PARAMETERS[case["parameters"]]
            expanded = independent.expand(
                bytes.fromhex(case["seed"]), parameters["degree"], parameters["prime"]
            )
            assert words_digest(expanded) == case["sha256"]


def test_a_seed_that_draws_again_is_among_them() -> None:
    assert any(case["redrawn"] for case in listed("seed-expansion.json"))


def test_the_first_blocks_of_both_generators(generator) -> None:
    for case in listed("seed-expansion.json"):
        seed = bytes.fromhex(case["seed"])
        block = {1: generator.blake2xb_block, 2: generator.shake256_block}[case["prng"]]
        assert block(seed, 0)[:32].hex() == case["block_0"]
        assert block(seed, 1)[:32].hex() == case["block_1"]
        assert len(block(seed, 0)) == 4096
        (word,) = struct.unpack_from("<Q", block(seed, 0))
        assert hex(word % PARAMETER_SETS[case["parameters"]].prime) == case["first"][0]


@pytest.mark.parametrize("case", listed("truncation.json"))
def test_truncation_is_as_recorded(case: dict[str, Any]) -> None:
    parameters = PARAMETER_SETS[case["parameters"]]
    residues = np.array([int(value, 16) for value in case["residues"]], dtype=np.uint64)
    found = truncate(residues, parameters, case["reply_bits"])
    assert found.tolist() == case["truncated"]
    # Double precision may miss the exact rounding by one unit, and only there.
    difference = (found.astype(np.int64) - np.array(case["exact"])) % (1 << case["reply_bits"])
    assert set(difference.tolist()) <= {0, 1, (1 << case["reply_bits"]) - 1}
    assert residues.max() < parameters.prime


@pytest.mark.parametrize("case", listed("encoding.json"))
def test_slots_are_as_recorded(case: dict[str, Any]) -> None:
    coefficients = np.zeros(case["degree"])
    for at, value in case["coefficients"]:
        coefficients[at] = value
    slots = coefficients_to_slots(coefficients)
    expected = np.array([complex(*value) for value in case["values"]])
    assert np.abs(slots[case["slots"]] - expected).max() < 1e-8
    assert np.abs(slots_to_coefficients(slots) - coefficients).max() < 1e-12


def test_prng_and_domain_numbers() -> None:
    assert [(item.name, item.value) for item in Prng] == [
        ("NONE", 0),
        ("BLAKE2XB", 1),
        ("SHAKE256", 2),
    ]
    assert [(item.name, item.value) for item in Domain] == [("COEFFICIENT", 0), ("NTT", 1)]
    assert (wire.MAGIC, wire.FORMAT_VERSION) == (b"VEIL", 2)
    assert (wire.KEY_HEADER_BYTES, wire.QUERY_HEADER_BYTES, wire.REPLY_HEADER_BYTES) == (
        40,
        136,
        172,
    )
