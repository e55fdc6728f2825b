"""Every parser of bytes that somebody else wrote, what it may raise, and good inputs to begin with.

Frames between the service and its workers are not here: both ends are the project's own.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from veilhead_protocol.errors import (
    AccessLogError,
    ConfigurationError,
    HeadKeyError,
    ManifestError,
    SecretFileError,
    SignatureError,
    StoreError,
    WireError,
)
from veilhead_protocol.manifest import Manifest
from veilhead_protocol.signatures import VendorKey, VendorSignature, read_signatures
from veilhead_protocol.wire import (
    KeyMessage,
    QueryHeader,
    QueryMessage,
    ReplyMessage,
    carried_key,
)
from veilhead_service import access_log, access_log_chain
from veilhead_service.head_encryption import HeadKey
from veilhead_service.retirement import Retirement
from veilhead_service.settings import load_settings
from veilhead_service.tenants import key_id_of, opens

VECTORS = Path(__file__).resolve().parents[1] / "vectors"
SCRATCH = tempfile.TemporaryDirectory(prefix="veilhead-fuzz-")

SETS = ("compact-384", "standard-384", "compact-3000")


@dataclass(frozen=True)
class Target:
    """A parser.

    Attributes:
        parse: what is fuzzed.
        errors: what it may raise; anything else is a bug.
        seeds: inputs that it accepts, or nearly.
    """

    parse: Callable[[bytes], object]
    errors: tuple[type[Exception], ...]
    seeds: tuple[bytes, ...]

    def __call__(self, data: bytes) -> None:
        with contextlib.suppress(*self.errors):
            self.parse(data)


def vectors(kind: str) -> tuple[bytes, ...]:
    return tuple((VECTORS / f"{name}.{kind}").read_bytes() for name in SETS)


MANIFEST = Manifest.deserialize(vectors("manifest.json")[0])
KEY = vectors("key.bin")[0]
WITH_KEY = (VECTORS / "compact-384.query-with-key.bin").read_bytes()
RELEASED = VECTORS / "version-1"
REPLY = vectors("reply.bin")[0]
HEAD_KEY = HeadKey(bytes(range(32)))
SIGNATURE = VendorSignature(bytes(8), bytes(64))


def parse_query(data):
    return QueryMessage.deserialize(
        data, MANIFEST.parameter_set, MANIFEST.layout, key_seed=KEY[-64:]
    )


def parse_carried_key(data):
    return KeyMessage.deserialize(carried_key(data, QueryHeader.deserialize(data)))


def parse_reply(data):
    return ReplyMessage.deserialize(
        data,
        MANIFEST.parameter_set,
        MANIFEST.layout,
        MANIFEST.head.reply_bits,
        model_digest=MANIFEST.digest,
        key_id=REPLY[72:104],
        query_digest=REPLY[140:172],
    )


def scratch(name, data):
    path = Path(SCRATCH.name) / name
    path.write_bytes(data)
    return path


def parse_api_key(data):
    written = data.decode("latin-1")
    assert not opens(None, written, now=0.0)
    return key_id_of(written)


def log_lines():
    """Two records of a log, as it writes them."""
    log = access_log.AccessLog(Path(SCRATCH.name) / "good.log", sync_seconds=0, file_bytes=1 << 20)
    log.start()
    try:
        log.append(status=200).result(10)
        log.append(status=422).result(10)
    finally:
        log.stop()
    return (Path(SCRATCH.name) / "good.log").read_bytes()


SETTINGS = b'workers = 2\nhost = "127.0.0.1"\nbody_seconds = 10.0\nlog_format = "json"\n'

TARGETS = {
    "key-message": Target(
        KeyMessage.deserialize,
        (WireError,),
        (*vectors("key.bin"), (RELEASED / "compact-384.key.bin").read_bytes()),
    ),
    "carried-key": Target(parse_carried_key, (WireError,), (WITH_KEY,)),
    "query-header": Target(
        QueryHeader.deserialize, (WireError,), (*vectors("query.bin"), WITH_KEY)
    ),
    "query-message": Target(parse_query, (WireError,), (*vectors("query.bin"), WITH_KEY)),
    "reply-message": Target(parse_reply, (WireError,), vectors("reply.bin")),
    "manifest": Target(
        Manifest.deserialize,
        (ManifestError,),
        (*vectors("manifest.json"), (RELEASED / "compact-384.manifest.json").read_bytes()),
    ),
    "settings": Target(
        lambda data: load_settings(config=scratch("settings.toml", data)),
        (ConfigurationError,),
        (SETTINGS,),
    ),
    "signatures": Target(
        lambda data: read_signatures(data.decode("latin-1")),
        (SignatureError,),
        (str(SIGNATURE).encode(), f"{SIGNATURE}, {SIGNATURE}".encode()),
    ),
    "vendor-key": Target(
        lambda data: VendorKey.parse(data.decode("latin-1")),
        (SignatureError,),
        (str(VendorKey(bytes(32))).encode(),),
    ),
    "encrypted-head": Target(
        lambda data: HEAD_KEY.decrypt(data, bytes(32)),
        (HeadKeyError,),
        (HEAD_KEY.encrypt(b"a head", bytes(32)),),
    ),
    "head-key": Target(
        lambda data: HeadKey.parse(data.decode("ascii", "replace"), "here"),
        (SecretFileError,),
        (b"aes256gcm:" + b"A" * 43 + b"=",),
    ),
    "retirement": Target(
        Retirement.deserialize,
        (StoreError,),
        (
            Retirement.parse("2027-03-31").serialize(),
            json.dumps({"format": "x", "after": 1}).encode(),
        ),
    ),
    "access-log": Target(
        lambda data: access_log_chain.verify(scratch("access.log", data)),
        (AccessLogError,),
        (log_lines(),),
    ),
    "api-key": Target(parse_api_key, (), (b"vh_" + b"0" * 16 + b"_" + b"A" * 43,)),
}
