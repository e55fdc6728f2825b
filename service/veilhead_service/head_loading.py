"""A published version -> a head that may answer: decrypted in memory, checked and self-tested."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from veilhead_models.artifact import ENCRYPTED_HEAD_FILE, HeadArtifact
from veilhead_protocol.errors import (
    ArtifactError,
    HeadKeyError,
    ModelUnavailableError,
)
from veilhead_service.background import reason_of
from veilhead_service.encrypted_head import EncryptedHead
from veilhead_service.head_encryption import HeadKey
from veilhead_service.self_test import self_test

#: A version that could not be loaded is not tried again for so long: each try costs a self-test.
FAILURE_SECONDS: Final = 30.0

_MAX_FAILURES: Final = 256


class HeadLoader:
    """Loads heads of a store, with the key of those that are encrypted."""

    def __init__(
        self,
        head_key: HeadKey | None = None,
        *,
        memory_bytes: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make a loader.

        Args:
            head_key: the key of encrypted heads.
            memory_bytes: by how much a load may let the process grow; None for no limit.
            clock: seconds that only ever advance.
        """
        self._head_key = head_key
        self._memory_bytes = memory_bytes
        self._clock = clock
        self._failures: dict[Path, tuple[float, ModelUnavailableError]] = {}

    def load(self, directory: Path) -> EncryptedHead:
        """The head of a version's directory, once it has passed its self-test.

        Raises:
            ModelUnavailableError: when its files are damaged or cannot be read, its key is
                missing, it needs too much memory, it answers wrongly, or anything else fails. The
                same error is raised for half a minute before the next attempt.
        """
        failed = self._failures.get(directory)
        if failed is not None and self._clock() - failed[0] < FAILURE_SECONDS:
            # A new one: raising the same again would let its traceback grow.
            raise type(failed[1])(*failed[1].args)
        try:
            head = self._load(directory)
        except ModelUnavailableError as error:
            if len(self._failures) >= _MAX_FAILURES:
                self._failures.clear()
            self._failures[directory] = (self._clock(), error.with_traceback(None))
            raise
        self._failures.pop(directory, None)
        return head

    def _load(self, directory: Path) -> EncryptedHead:
        try:
            with _bounded_growth(self._memory_bytes):
                artifact = load_artifact(directory, self._head_key)
                head = EncryptedHead(artifact.manifest, artifact.weight, artifact.bias)
                self_test(head, artifact)
            return head
        except ModelUnavailableError:
            raise
        except MemoryError:
            raise ModelUnavailableError(
                f"loading {directory} takes more memory than there is, or than "
                f"worker_memory_bytes allows ({self._memory_bytes} bytes)"
            ) from None
        except Exception as error:  # whatever it is, only this model is without an answer
            raise ModelUnavailableError(
                f"{directory} cannot be loaded: {reason_of(error)}"
            ) from error


@contextmanager
def _bounded_growth(extra_bytes: int | None) -> Iterator[None]:
    """Let this process's data, setrlimit(2), grow by at most so much in this block.

    An allocation beyond that fails here, and no other process of the machine pays for it.
    """
    if extra_bytes is None:
        yield
        return
    pages = Path("/proc/self/statm").read_text("ascii").split()[5]
    wanted = int(pages) * resource.getpagesize() + extra_bytes
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    for limit in (soft, hard):
        if limit != resource.RLIM_INFINITY:
            wanted = min(wanted, limit)
    resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def load_artifact(directory: Path, head_key: HeadKey | None) -> HeadArtifact:
    """The artefact in a version's directory, its head in plaintext in memory only.

    Raises:
        ModelUnavailableError: when its files are damaged or its key is missing or wrong.
    """
    encrypted = directory / ENCRYPTED_HEAD_FILE

    def decrypt(manifest_digest: bytes) -> bytes:
        if head_key is None:
            raise HeadKeyError(
                f"{encrypted} is encrypted and no head key was given: "
                "set VEILHEAD_SERVER_HEAD_KEY_FILE"
            )
        try:
            content = encrypted.read_bytes()
        except OSError as error:
            raise ModelUnavailableError(f"{encrypted} cannot be read ({error.strerror})") from error
        try:
            return head_key.decrypt(content, manifest_digest)
        except HeadKeyError as error:
            raise HeadKeyError(f"{encrypted}: {error}") from error

    try:
        return HeadArtifact.load(
            directory,
            verify_backbone=False,
            decrypt_head=decrypt if encrypted.is_file() else None,
        )
    except ArtifactError as error:
        raise ModelUnavailableError(str(error)) from error
    except OSError as error:
        raise ModelUnavailableError(f"{directory} cannot be read ({error.strerror})") from error
