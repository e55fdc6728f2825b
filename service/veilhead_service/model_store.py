"""Published models on disk.

    STORE/<name>/<digest>/              one version: manifest.json, backbone/, and the head:
                                        head.safetensors, or encrypted head.safetensors.enc
    STORE/<name>/<digest>.signatures    who signed its manifest, a line each
    STORE/<name>/<digest>.retired       when it stops being served
    STORE/<name>/<digest>.card.md       what its vendor says of it
    STORE/<name>/<digest>.card.signatures   who signed that, a line each
    STORE/<name>/current                the digest that the name stands for
    STORE/.lock                         held by whoever publishes or retires
    STORE/.format                       the number of this format
    STORE/.encrypted                    there when the store takes encrypted heads only

Versions never change: a directory is named by the digest of its manifest and renamed into place
whole. What may change about a version stands beside it, in small files that are replaced whole.
They and `current` are looked at with every look-up, so a running service notices what is published,
signed and retired.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Protocol

from veilhead_models.artifact import (
    ENCRYPTED_HEAD_FILE,
    HeadArtifact,
    read_manifest,
)
from veilhead_protocol.errors import (
    ArtifactError,
    HeadKeyError,
    ManifestError,
    ModelRetiredError,
    ModelUnavailableError,
    StoreError,
)
from veilhead_protocol.formats import read_regular
from veilhead_protocol.manifest import NAME_PATTERN, Manifest
from veilhead_protocol.policy import PolicySection
from veilhead_protocol.signatures import (
    MAX_SIGNATURES,
    VendorSignature,
    read_signatures,
)
from veilhead_service.card import CardSources, named_version, to_markdown
from veilhead_service.head_encryption import HEADER_BYTES, HeadKey, key_id_of
from veilhead_service.retirement import Retirement
from veilhead_service.signing import SigningKey
from veilhead_service.store_files import sync_directory, write_atomically
from veilhead_service.store_versions import check_store_format, claim, put_version

_CURRENT = "current"
_SIGNATURES = ".signatures"
_RETIRED = ".retired"
_CARD = ".card.md"
_CARD_SIGNATURES = ".card.signatures"
_LOCK = ".lock"
_DIGEST_PATTERN = re.compile(r"[0-9a-f]{64}")

#: Time, inode and size of a file, or None when it is absent: what tells that it was replaced.
_Stamp = tuple[int, int, int] | None


@dataclass(frozen=True)
class ServedCard:
    """A model card as it is handed out.

    Attributes:
        markdown: the card.
        signatures: the vendor's, of the card; none of one that the service made itself.
    """

    markdown: str
    signatures: tuple[VendorSignature, ...] = ()


@dataclass(frozen=True)
class StoredModel:
    """One version of a model, ready to be served.

    Attributes:
        manifest: what clients are told.
        directory: where its files are.
        signatures: the vendor's, of the manifest.
        retirement: when it stops being served; None when no end is known.
    """

    manifest: Manifest
    directory: Path
    signatures: tuple[VendorSignature, ...] = ()
    retirement: Retirement | None = None

    @cached_property
    def manifest_bytes(self) -> bytes:
        """The canonical bytes that clients pin."""
        return self.manifest.serialize()

    def card(self) -> ServedCard:
        """The card that the vendor published with it, or else one of the manifest alone.

        Raises:
            StoreError: when the card or its signatures cannot be read.
        """
        content = _read_beside(self.directory, _CARD)
        if content is None:
            sources = CardSources(self.manifest, signatures=self.signatures)
            return ServedCard(to_markdown(sources))
        try:
            return ServedCard(
                content.decode("utf-8"), _read_signatures(self.directory, _CARD_SIGNATURES)
            )
        except UnicodeDecodeError as error:
            raise StoreError(f"{self.directory}{_CARD} is not UTF-8: publish it again") from error

    @property
    def is_encrypted(self) -> bool:
        """Whether the head is encrypted at rest."""
        return (self.directory / ENCRYPTED_HEAD_FILE).is_file()

    @classmethod
    def open(cls, directory: Path) -> StoredModel:
        """The version in this directory.

        Raises:
            StoreError: when its manifest cannot be read.
        """
        try:
            return cls(read_manifest(directory), directory)
        except ArtifactError as error:
            raise StoreError(f"this version cannot be served: {error}") from error


class ModelSource(Protocol):
    """Where the app finds models."""

    def names(self) -> list[str]:
        """The names of all models."""

    def current(self, name: str) -> StoredModel | None:
        """The version that a name stands for, or None.

        Raises:
            ModelRetiredError: when it is retired.
        """

    def version(self, name: str, digest: bytes) -> StoredModel | None:
        """The version of this digest, or None.

        Raises:
            ModelRetiredError: when it is retired.
        """


def _now() -> datetime:
    return datetime.now(UTC)


class ModelStore:
    """A directory of published models.

    Args:
        root: the directory.
        head_key_id: the id of the key that encrypted heads are under; versions under another one
            are refused here, before a client makes a query for them.
        require_encrypted_heads: whether versions with a plaintext head are refused.
        check_heads: whether any of that is looked at; not where nothing is served.
        clock: the time that retirements are held against.
    """

    def __init__(
        self,
        root: Path,
        *,
        head_key_id: bytes | None = None,
        require_encrypted_heads: bool = False,
        check_heads: bool = True,
        clock: Callable[[], datetime] = _now,
    ) -> None:
        self._root = root
        self._head_key_id = head_key_id
        self._require_encrypted_heads = require_encrypted_heads
        self._check_heads = check_heads
        self._clock = clock
        self._opened: dict[tuple[str, str], tuple[tuple[_Stamp, ...], StoredModel]] = {}

    def names(self) -> list[str]:
        """The names of all models, sorted; those of models that cannot be read, too.

        Raises:
            StoreError: when the store itself cannot be read.
        """
        try:
            entries = os.listdir(self._root)  # noqa: PTH208
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StoreError(f"{self._root} cannot be read: {error.strerror}") from error
        return sorted(name for name in entries if self._is_model(name))

    def _is_model(self, name: str) -> bool:
        if not NAME_PATTERN.fullmatch(name):
            return False
        try:
            os.stat(self._root / name / _CURRENT)  # noqa: PTH116
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            return True  # whoever asks for it is told why it cannot be read
        return True

    def current(self, name: str) -> StoredModel | None:
        """The version that a name stands for, or None when nothing is published under it.

        Raises:
            ModelRetiredError: when that version is retired.
            StoreError: when it cannot be served.
        """
        digest = self.current_digest(name)
        model = None if digest is None else self._open(name, digest)
        if model is None or not self._is_retired(model):
            return model
        raise ModelRetiredError(
            f"this model was retired on {model.retirement} and has no current version: "
            "ask its vendor for another"
        )

    def version(self, name: str, digest: bytes) -> StoredModel | None:
        """The version of this digest under this name, or None.

        Raises:
            ModelRetiredError: when it is retired.
            StoreError: when it cannot be served.
        """
        if not NAME_PATTERN.fullmatch(name):
            return None
        model = self._open(name, digest.hex())
        if model is None or not self._is_retired(model):
            return model
        try:
            current = self.current(name)
        except StoreError:
            current = None
        advice = (
            "the name has no current version: ask its vendor for another"
            if current is None
            else f"the current one is {current.manifest.digest.hex()}: read the manifest again"
        )
        raise ModelRetiredError(f"this version was retired on {model.retirement}; {advice}")

    def versions(self, name: str) -> Iterator[tuple[str, StoredModel | StoreError]]:
        """Every version of a name by its digest, the retired ones too, and why one is unusable.

        Raises:
            StoreError: when the name's directory cannot be read.
        """
        try:
            entries = sorted((self._root / name).iterdir())
        except OSError as error:
            raise StoreError(f"{self._root / name} cannot be read: {error.strerror}") from error
        for entry in entries:
            if not _DIGEST_PATTERN.fullmatch(entry.name):
                continue
            try:
                model = self._open(name, entry.name)
            except StoreError as error:
                yield entry.name, error
            else:
                if model is not None:
                    yield entry.name, model

    def current_digest(self, name: str) -> str | None:
        """The digest that a name stands for, in hexadecimal, whatever became of that version.

        Raises:
            StoreError: when it cannot be read.
        """
        if not NAME_PATTERN.fullmatch(name):
            return None
        try:
            digest = read_regular(self._root / name / _CURRENT).decode("ascii").strip()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise StoreError(f"{self._root / name / _CURRENT} cannot be read: {error}") from error
        if not _DIGEST_PATTERN.fullmatch(digest):
            raise StoreError(f"{self._root / name / _CURRENT} does not hold a digest")
        return digest

    def _is_retired(self, model: StoredModel) -> bool:
        return model.retirement is not None and model.retirement.is_over(self._clock())

    def _open(self, name: str, digest: str) -> StoredModel | None:
        # Every query comes by here: strings, since a path takes longer to make than to look up.
        path = f"{self._root}/{name}/{digest}"
        stamps = (_stamp(path), _stamp(path + _SIGNATURES), _stamp(path + _RETIRED))
        known = self._opened.get((name, digest))
        if known is not None and known[0] == stamps:
            return known[1]
        self._opened.pop((name, digest), None)
        try:
            model = self._read(name, digest)
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error.strerror}") from error
        if model is not None:
            self._opened[name, digest] = (stamps, model)
        return model

    def _read(self, name: str, digest: str) -> StoredModel | None:
        directory = self._root / name / digest
        try:
            if not stat.S_ISDIR(directory.stat().st_mode):
                return None
        except (FileNotFoundError, NotADirectoryError):
            return None
        check_store_format(self._root)
        opened = StoredModel.open(directory)
        if opened.manifest.digest.hex() != digest or opened.manifest.name != name:
            raise StoreError(f"{directory} holds another model than its name says")
        if self._check_heads:
            self._check_head(opened)
        return StoredModel(
            opened.manifest, directory, _read_signatures(directory), _read_retirement(directory)
        )

    def _check_head(self, model: StoredModel) -> None:
        """Refuse what no worker could load; only the first bytes of the head are read."""
        encrypted = model.directory / ENCRYPTED_HEAD_FILE
        if not model.is_encrypted:
            if self._require_encrypted_heads:
                raise ModelUnavailableError(
                    f"{model.directory} holds a plaintext head, and only encrypted ones are "
                    "allowed: publish it again with a head key"
                )
            return
        if self._head_key_id is None:
            raise HeadKeyError(
                f"{encrypted} is encrypted and no head key was given: "
                "set VEILHEAD_SERVER_HEAD_KEY_FILE"
            )
        try:
            with encrypted.open("rb") as file:
                found = key_id_of(file.read(HEADER_BYTES))
        except (OSError, HeadKeyError) as error:
            raise HeadKeyError(f"{encrypted} is not readable: {error}") from error
        if found != self._head_key_id:
            raise HeadKeyError(
                f"{encrypted} is encrypted under the key {found.hex()}, "
                f"got the key {self._head_key_id.hex()}"
            )


def _stamp(path: str) -> _Stamp:
    try:
        status = os.stat(path)  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}") from error
    return status.st_mtime_ns, status.st_ino, status.st_size


def _read_beside(directory: Path, suffix: str) -> bytes | None:
    path = directory.with_name(directory.name + suffix)
    try:
        return read_regular(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}") from error


def _read_signatures(directory: Path, suffix: str = _SIGNATURES) -> tuple[VendorSignature, ...]:
    content = _read_beside(directory, suffix)
    if content is None:
        return ()
    try:
        return read_signatures(",".join(content.decode("ascii").splitlines()))
    except (ValueError, ManifestError) as error:
        raise StoreError(
            f"{directory}{suffix} does not hold signatures: remove it and sign again"
        ) from error


def _read_retirement(directory: Path) -> Retirement | None:
    content = _read_beside(directory, _RETIRED)
    try:
        return None if content is None else Retirement.deserialize(content)
    except StoreError as error:
        raise StoreError(f"{directory}{_RETIRED}: {error}") from error


class SingleModel:
    """One artefact directory, served as it lies."""

    def __init__(self, directory: Path) -> None:
        self._model = StoredModel.open(directory)

    def names(self) -> list[str]:
        """The artefact's name."""
        return [self._model.manifest.name]

    def current(self, name: str) -> StoredModel | None:
        """The artefact, when it has this name."""
        return self._model if name == self._model.manifest.name else None

    def version(self, name: str, digest: bytes) -> StoredModel | None:
        """The artefact, when it has this name and digest."""
        return self.current(name) if digest == self._model.manifest.digest else None


def publish(
    directory: Path,
    store: Path,
    *,
    signing_key: SigningKey | None = None,
    head_key: HeadKey | None = None,
    retire_previous: Retirement | None = None,
    card: str | None = None,
    policy: PolicySection | None = None,
    allow_bulk: bool = False,
    deidentify: bool = False,
) -> Manifest:
    """Copy a verified artefact into a store and let its name stand for it.

    Publishing the same artefact again changes nothing in a whole version, but adds the signature,
    and puts the head under `head_key`. A damaged version is written anew. Once a head was encrypted
    in a store, it takes no plaintext one.

    One publishes at a time: another process that publishes or retires is waited for.

    Args:
        directory: the artefact.
        store: the store; it is made when it is absent.
        signing_key: signs the manifest, and the card where one is given.
        head_key: encrypts the head, which is then never in the store in plaintext.
        retire_previous: when the version that the name stood for stops being served; an earlier
            date that it already has stays.
        card: Markdown that anybody who may use the model is shown; replaces an earlier one.
        policy: replaces the artefact's.
        allow_bulk: let the manifest's policy allow bulk requests, which pass the limit of hints:
            another version than the artefact's own.
        deidentify: let the policy ask clients to de-identify texts: another version, too.

    Raises:
        ArtifactError: when the directory is not a whole, consistent artefact.
        ManifestError: when the head breaks the policy; the clause is named.
        SelfTestError: when the encrypted head does not answer as the plaintext one.
        StoreError: when the store cannot be written or is of another format, its heads are
            encrypted and no key was given, the version was retired, its signatures cannot be read,
            or the card is of another version.
    """
    # Lazily: they load SEAL, and the process that answers HTTP keeps clear of it.
    from veilhead_service.encrypted_head import EncryptedHead
    from veilhead_service.self_test import self_test

    artifact = HeadArtifact.load(directory)
    if policy is not None:
        artifact = replace(artifact, policy=policy)
    asked = {"bulk": allow_bulk, "deidentify": deidentify}
    if any(asked.values()):
        changed = artifact.policy.changed(**{name: True for name, on in asked.items() if on})
        artifact = replace(artifact, policy=changed)
    manifest = artifact.manifest
    self_test(EncryptedHead(manifest, artifact.weight, artifact.bias), artifact)
    home = store / manifest.name
    version = home / manifest.digest.hex()
    if card is not None and named_version(card) not in (None, version.name):
        raise StoreError(
            f"the card is of the version {named_version(card)}, this one is {version.name}: "
            "make it again, of what is published (a policy is part of the version)"
        )
    with _changing(store):
        if _read_retirement(version) is not None:
            raise StoreError(
                f"this version of {manifest.name} was retired: withdraw that first, with "
                f"`veilhead-server retire {manifest.name} {version.name} --withdraw`"
            )
        previous = None
        if retire_previous is not None:
            previous = ModelStore(store).current_digest(manifest.name)
        put_version(store, artifact, head_key)
        if card is not None:
            _put_card(version, card.encode("utf-8"), manifest, signing_key)
        if signing_key is not None:
            _add_signature(version, signing_key.sign(manifest.digest))
        for suffix in (_SIGNATURES, _CARD_SIGNATURES):
            _read_signatures(version, suffix)  # the name must not come to stand for what is refused
        write_atomically(home / _CURRENT, f"{version.name}\n".encode())
        if retire_previous is not None and previous not in (None, version.name):
            _retire_no_later(home / str(previous), retire_previous)
    return manifest


@contextmanager
def _changing(store: Path) -> Iterator[None]:
    """Change a store, which is made when it is absent, in this block, and nobody else meanwhile.

    The kernel lets go of the lock when the process ends, however it does.

    Raises:
        StoreError: for every OSError of the block, and when the store is of another format.
    """
    try:
        store.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(store / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            claim(store)
            yield
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StoreError(f"the store {store} cannot be written: {error}") from error


def retire(store: Path, name: str, digest: str | None, retirement: Retirement | None) -> str:
    """Set when a version stops being served, or withdraw that with None; returns its digest.

    Args:
        store: the store.
        name: the model's name.
        digest: the version, in hexadecimal; the current one when it is None.
        retirement: the moment.

    Raises:
        StoreError: when there is no such version, or the store cannot be written.
    """
    if not store.is_dir():
        raise StoreError(f"there is no store {store}")
    with _changing(store):
        if digest is None:
            digest = ModelStore(store).current_digest(name)
            if digest is None:
                raise StoreError(f"no model {name[:64]!r} is published in {store}")
        valid = NAME_PATTERN.fullmatch(name) and _DIGEST_PATTERN.fullmatch(digest)
        version = store / name / digest
        if not valid or not version.is_dir():
            raise StoreError(
                f"{store} has no such version of {name[:64]!r}: `veilhead-server models list` "
                "shows the digests, 64 hexadecimal digits each"
            )
        record = version.with_name(digest + _RETIRED)
        if retirement is None:
            record.unlink(missing_ok=True)
            sync_directory(record.parent)
        else:
            write_atomically(record, retirement.serialize())
    return digest


def _retire_no_later(version: Path, retirement: Retirement) -> None:
    known = _read_retirement(version)
    if known is None or retirement.after < known.after:
        write_atomically(version.with_name(version.name + _RETIRED), retirement.serialize())


def _put_card(
    version: Path, card: bytes, manifest: Manifest, signing_key: SigningKey | None
) -> None:
    """Put a card beside its version, signed where there is a key."""
    if _read_beside(version, _CARD) != card:
        # First: what signed another card must never stand beside this one.
        version.with_name(version.name + _CARD_SIGNATURES).unlink(missing_ok=True)
        write_atomically(version.with_name(version.name + _CARD), card)
    if signing_key is not None:
        _add_signature(version, signing_key.sign_card(manifest.digest, card), _CARD_SIGNATURES)


def _add_signature(version: Path, signature: VendorSignature, suffix: str = _SIGNATURES) -> None:
    others = [item for item in _read_signatures(version, suffix) if item.key_id != signature.key_id]
    if len(others) >= MAX_SIGNATURES:
        raise StoreError(f"a version has at most {MAX_SIGNATURES} signatures")
    lines = "".join(f"{item}\n" for item in (*others, signature))
    write_atomically(version.with_name(version.name + suffix), lines.encode())
