"""The artefact: one trained head, ready to be published.

An artefact is a directory:

    head.safetensors   private: weight [C, d] and bias [C] as served, and the commitment's salt
                       (in a store it may be head.safetensors.enc, encrypted by whoever published)
    manifest.json      public: the manifest's canonical bytes
    report.json        private, optional: how the head was trained and what it scored
    backbone/          public, optional: the files of the transformer that makes the embeddings
    format             the number of this format

It is written whole or not at all, and every part of it is checked when it is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import struct
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as deserialize_tensors
from safetensors.numpy import save as serialize_tensors

from veilhead_protocol.errors import ArtifactError, BackboneError, ManifestError, ScaleError
from veilhead_protocol.files import verify
from veilhead_protocol.formats import format_complaint, format_line, read_format, read_regular
from veilhead_protocol.layout import MAX_CLASSES, MAX_DIMENSIONS
from veilhead_protocol.manifest import FORMAT as MANIFEST_FORMAT
from veilhead_protocol.manifest import (
    BackboneSection,
    EmbeddingSection,
    Manifest,
    PolicySection,
    valid_name,
)
from veilhead_protocol.parameters import ParameterSet, parameter_set
from veilhead_protocol.scales import MAX_EXPONENT, HeadScales, plan_scales, project

__all__ = [
    "ARTIFACT_FORMAT",
    "BACKBONE_DIRECTORY",
    "ENCRYPTED_HEAD_FILE",
    "FORMAT_FILE",
    "HEAD_FILE",
    "MANIFEST_FILE",
    "REPORT_FILE",
    "HeadArtifact",
    "head_commitment",
    "read_manifest",
]

HEAD_FILE: Final = "head.safetensors"
ENCRYPTED_HEAD_FILE: Final = "head.safetensors.enc"
MANIFEST_FILE: Final = "manifest.json"
REPORT_FILE: Final = "report.json"
BACKBONE_DIRECTORY: Final = "backbone"
FORMAT_FILE: Final = "format"

#: Rises with every change of what is above, or of a private file's content. Format 1 had no file.
ARTIFACT_FORMAT: Final = "veilhead-artifact/2"

_HEAD_FORMAT: Final = "veilhead-head/1"
_SALT_BYTES: Final = 32

#: Stands in the manifest that checks an artefact which has no name yet.
_PLACEHOLDER_NAME: Final = "unnamed"

_MAKE_AGAIN: Final = (
    "make and publish it again with this version (`veilhead-server train` or `import-hf`, or "
    "`HeadArtifact.from_weights`)"
)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of an artefact's directory; the head is not read.

    Raises:
        ArtifactError: when there is none, or it is not one; of another format than this version
            reads, it names both, and what to do.
    """
    file = directory / MANIFEST_FILE
    try:
        content = read_regular(file)
        found = read_format(directory / FORMAT_FILE)
    except OSError as error:
        raise ArtifactError(
            f"{error.filename} cannot be read ({error.strerror}): "
            "expected the directory of an artefact"
        ) from error
    complaint = format_complaint(found, ARTIFACT_FORMAT, if_older=_MAKE_AGAIN)
    if complaint is not None:
        raise ArtifactError(f"{directory} cannot be read as an artefact: {complaint}")
    try:
        return Manifest.deserialize(content)
    except ManifestError as error:
        complaint = _complaint_of_manifest(content)
        raise ArtifactError(f"{file}: {complaint or error}") from error


def _complaint_of_manifest(content: bytes) -> str | None:
    """What is to be said of a manifest's format, if anything."""
    try:
        found = json.loads(content)["format"]
    except (ValueError, RecursionError, KeyError, TypeError):
        return None
    return format_complaint(str(found), MANIFEST_FORMAT, if_older=_MAKE_AGAIN)


def head_commitment(weight: NDArray[np.float64], bias: NDArray[np.float64], salt: bytes) -> str:
    """The manifest's commitment to a head of weight [C, d] and bias [C], in hexadecimal.

    SHA-256 of `veilhead-head 1` and a newline, the 32 bytes of salt, C and d as little-endian
    32-bit integers, the weight row by row and the bias as little-endian 64-bit floats. Without the
    salt, whoever guesses a head could check the guess.
    """
    digest = hashlib.sha256(b"veilhead-head 1\n" + salt + struct.pack("<II", *weight.shape))
    digest.update(weight.astype("<f8").tobytes(order="C"))
    digest.update(bias.astype("<f8").tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, repr=False, eq=False)
class HeadArtifact:
    """A head that the protocol can carry, with what the public may know of it.

    Make one with `from_weights` or `load`.

    Attributes:
        weight: [C, d], private, as served: the embedding scale is already multiplied in.
        bias: [C], private.
        labels: C distinct labels, in the order of the rows.
        problem_type: what the logits mean: `single_label`, `multi_label` or `regression`.
        name: the model's name, or None while it has none.
        parameters: the parameter set that it is served with.
        embedding: what clients divide an embedding by.
        backbone: the transformer that makes the embeddings, or None: clients bring embeddings.
        backbone_directory: where the backbone's files are; None exactly when `backbone` is.
        policy: what the vendor asks of both sides.
        about: public facts of any form that JSON can carry.
        salt: 32 private bytes that hide the head in its commitment.

    Raises:
        ArtifactError: when shapes, counts or values are wrong.
        ScaleError: when the parameter set cannot carry the head.
        ManifestError: when labels, name or policy are not what a manifest may hold.
    """

    weight: NDArray[np.float64]
    bias: NDArray[np.float64]
    labels: tuple[str, ...]
    problem_type: str
    name: str | None
    parameters: ParameterSet
    embedding: EmbeddingSection
    backbone: BackboneSection | None
    backbone_directory: Path | None
    policy: PolicySection
    about: dict[str, Any]
    salt: bytes

    def __post_init__(self) -> None:
        if self.weight.ndim != 2 or self.bias.shape != self.weight.shape[:1]:
            raise ArtifactError(
                f"got a weight of shape {list(self.weight.shape)} and a bias of shape "
                f"{list(self.bias.shape)}, expected [C, d] and [C]"
            )
        classes, dimensions = self.weight.shape
        if not (1 <= classes <= MAX_CLASSES and 1 <= dimensions <= MAX_DIMENSIONS):
            raise ArtifactError(
                f"got {classes} classes and {dimensions} dimensions, expected 1 to "
                f"{MAX_CLASSES} and 1 to {MAX_DIMENSIONS}"
            )
        if len(self.labels) != classes:
            raise ArtifactError(
                f"got {len(self.labels)} labels for a weight of {classes} rows, expected one a row"
            )
        if not (np.isfinite(self.weight).all() and np.isfinite(self.bias).all()):
            raise ArtifactError("weight or bias holds NaN or infinity, expected finite numbers")
        if len(self.salt) != _SALT_BYTES:
            raise ArtifactError(f"got {len(self.salt)} bytes of salt, expected {_SALT_BYTES}")
        if (self.backbone is None) != (self.backbone_directory is None):
            raise ArtifactError("a backbone and its directory come together: use `with_backbone`")
        # Building the manifest checks everything else, before anybody relies on this head.
        manifest = self._manifest(self.name if self.name is not None else _PLACEHOLDER_NAME)
        try:
            Manifest.deserialize(manifest.serialize())
        except UnicodeEncodeError:
            raise ArtifactError("`about` or a label holds half of a surrogate pair") from None

    def __repr__(self) -> str:
        classes, dimensions = self.weight.shape
        return (
            f"HeadArtifact(name={self.name!r}, classes={classes}, dimensions={dimensions}, "
            f"parameters={self.parameters.name!r})"
        )

    @classmethod
    def from_weights(
        cls,
        weight: ArrayLike,
        bias: ArrayLike | None,
        labels: Sequence[str],
        *,
        problem_type: str = "single_label",
        name: str | None = None,
        parameters: str = "standard",
        embedding_scale: float | EmbeddingSection = 1.0,
        policy: PolicySection | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> HeadArtifact:
        """An artefact for a head that was trained anywhere.

        Args:
            weight: [C, d], for embeddings as they are (not divided by `embedding_scale`).
            bias: [C]; None for zeros.
            labels: C distinct labels.
            problem_type: `single_label` (probabilities by softmax), `multi_label` (by the sigmoid
                of each logit) or `regression` (the logits are the values).
            name: the model's name; by default the last component of the directory it is saved to.
            parameters: `standard` or `compact`.
            embedding_scale: a norm that embeddings hardly ever exceed. Clients divide by it, and
                shorten what is still longer than one; 1 is right for normalised embeddings. It is
                public. With a manifest's section, its origin is told too.
            policy: what the vendor asks of both sides.
            about: public facts of any form that JSON can carry.

        Raises:
            ArtifactError: when shapes, counts or values are wrong.
            ParameterError: when there is no such parameter set.
            ScaleError: when the parameter set cannot carry the head.
            ManifestError: when labels, name, scale or policy are not what a manifest may hold.
        """
        weights = _as_floats(weight, "weight")  # [C, d]
        biases = (
            np.zeros(weights.shape[:1], dtype=np.float64)
            if bias is None
            else _as_floats(bias, "bias")
        )  # [C]
        if isinstance(labels, str) or not all(isinstance(label, str) for label in labels):
            raise ArtifactError("labels must be a sequence of strings, one for every row of weight")
        if isinstance(embedding_scale, EmbeddingSection):
            embedding = embedding_scale
        # Written so that NaN is refused too. The limit is the manifest's.
        elif 1e-9 <= embedding_scale <= 1e9:
            embedding = EmbeddingSection(scale=float(embedding_scale), scale_origin="given")
        else:
            raise ArtifactError(
                f"got an embedding_scale of {embedding_scale}, expected 1e-9 to 1e9"
            )
        with np.errstate(over="ignore"):  # becomes infinite, and is refused as such
            weights = weights * embedding.scale
        return cls(
            weight=_read_only(weights),
            bias=_read_only(biases),
            labels=tuple(labels),
            problem_type=problem_type,
            name=name,
            parameters=parameter_set(parameters),
            embedding=embedding,
            backbone=None,
            backbone_directory=None,
            policy=PolicySection() if policy is None else policy,
            about={} if about is None else json.loads(_as_json(about, "about")),
            salt=secrets.token_bytes(_SALT_BYTES),
        )

    def with_backbone(self, directory: str | Path, section: BackboneSection) -> HeadArtifact:
        """The same head, with the transformer whose files are in `directory`.

        Raises:
            BackboneError: when the files are not what `section` says.
        """
        directory = Path(directory).resolve()
        verify(directory, section.all_files)
        embedding = self.embedding
        if section.normalise and embedding.scale == 1.0:
            embedding = EmbeddingSection(scale=1.0, scale_origin="normalised")
        return replace(
            self,
            backbone=section,
            backbone_directory=directory,
            embedding=embedding,
        )

    @cached_property
    def scales(self) -> HeadScales:
        """The head's public numbers.

        Raises:
            ScaleError: when the parameter set cannot carry the head.
        """
        # Larger numbers overflow on the way to the same refusal.
        largest = max(float(np.abs(self.weight).max()), float(np.abs(self.bias).max()))
        if largest > 2.0**MAX_EXPONENT:
            raise ScaleError(
                f"a logit of this head can exceed 2^{MAX_EXPONENT}; divide weight and bias by a "
                "power of two (the top label stays the same) or give a smaller embedding_scale"
            )
        return plan_scales(self.weight, self.bias, self.parameters)

    @cached_property
    def _commitment(self) -> str:
        return head_commitment(self.weight, self.bias, self.salt)

    @cached_property
    def manifest(self) -> Manifest:
        """The public manifest.

        Raises:
            ArtifactError: when the artefact has no name yet.
        """
        if self.name is None:
            raise ArtifactError("this artefact has no name: give one, or save it to a directory")
        return self._manifest(self.name)

    def logits(self, embeddings: ArrayLike) -> NDArray[np.float64]:
        """Logits [batch, C] of embeddings [batch, d], in plaintext: what encrypted ones approach.

        Embeddings are as their model made them; they are divided by the scale and projected here,
        as a client does.

        Raises:
            ArtifactError: when the shape is wrong.
        """
        values = _as_floats(embeddings, "embeddings")
        if values.ndim != 2 or values.shape[1] != self.weight.shape[1]:
            raise ArtifactError(
                f"got embeddings of shape {list(values.shape)}, "
                f"expected [batch, {self.weight.shape[1]}]"
            )
        projected = project(values, self.embedding.scale)  # [batch, d]
        result: NDArray[np.float64] = projected @ self.weight.T + self.bias  # [batch, C]
        return result

    def head_bytes(self) -> bytes:
        """What `head.safetensors` holds of this head: private."""
        return serialize_tensors(
            {"weight": np.ascontiguousarray(self.weight), "bias": np.ascontiguousarray(self.bias)},
            metadata={"format": _HEAD_FORMAT, "salt": self.salt.hex()},
        )

    def save(
        self,
        directory: str | Path,
        *,
        report: Mapping[str, Any] | None = None,
        encrypt_head: Callable[[bytes, bytes], bytes] | None = None,
    ) -> Manifest:
        """Write the artefact, whole or not at all, and return its manifest.

        Everything is written to a hidden directory beside the target and then renamed. An artefact
        that is already there is replaced (between two renames: a process killed just there leaves
        it beside the target, under a hidden name); anything else that is there is refused.

        Args:
            directory: the target; its last component is the name of a head that has none.
            report: anything JSON can carry, for `report.json`; private.
            encrypt_head: what makes the bytes of `head.safetensors.enc` of the head's bytes and
                the manifest's digest; the head is then never written in plaintext.

        Raises:
            ArtifactError: when the target is something else, its name cannot be the model's, or
                writing fails.
            BackboneError: when the backbone's files changed since `with_backbone`.
        """
        target = Path(directory).resolve()
        named = self if self.name is not None else replace(self, name=_name_for(target))
        manifest = named.manifest
        _refuse_foreign(target)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            # Made by mkdtemp, so that only this user can read it.
            staging = Path(tempfile.mkdtemp(prefix=".veilhead-new-", dir=target.parent))
        except OSError as error:
            raise _cannot_write(target, error) from error
        try:
            named._write(staging, manifest, report, encrypt_head)
            _swap(staging, target)
        except OSError as error:
            raise _cannot_write(target, error) from error
        finally:
            # Gone already unless something failed.
            shutil.rmtree(staging, ignore_errors=True)
        return manifest

    @classmethod
    def load(
        cls,
        directory: str | Path,
        *,
        verify_backbone: bool = True,
        decrypt_head: Callable[[bytes], bytes] | None = None,
    ) -> HeadArtifact:
        """Read an artefact and check every part of it against its manifest.

        Without `verify_backbone` the backbone's files, tens of megabytes that clients check
        themselves, are not read. With `decrypt_head` the head is what it makes, in memory, of the
        manifest's digest: `head.safetensors` is not read. Its errors pass through.

        Raises:
            ArtifactError: when a file is missing or is not what the manifest says.
        """
        source = Path(directory).resolve()
        manifest = read_manifest(source)
        if decrypt_head is None:
            head_file = source / HEAD_FILE
            try:
                content = head_file.read_bytes()
            except OSError as error:
                raise _unreadable_head(head_file) from error
        else:
            head_file = source / ENCRYPTED_HEAD_FILE
            content = decrypt_head(manifest.digest)
        weight, bias, salt = _read_head(content, head_file)
        expected = (len(manifest.head.labels), manifest.head.dimensions)
        if weight.shape != expected or bias.shape != expected[:1]:
            raise ArtifactError(
                f"{head_file} holds a weight of shape {list(weight.shape)} and a bias of "
                f"shape {list(bias.shape)}, the manifest says {list(expected)} and {[expected[0]]}"
            )
        if head_commitment(weight, bias, salt) != manifest.head.commitment:
            raise ArtifactError(
                f"{head_file} is not the head that the manifest commits to: "
                "one of them was changed or comes from another artefact; save the artefact again"
            )
        if manifest.backbone is not None and verify_backbone:
            try:
                verify(source / BACKBONE_DIRECTORY, manifest.backbone.all_files)
            except BackboneError as error:
                raise ArtifactError(f"{source}: {error}") from error
        try:
            artifact = cls(
                weight=_read_only(weight),
                bias=_read_only(bias),
                labels=manifest.head.labels,
                problem_type=manifest.head.problem_type,
                name=manifest.name,
                parameters=manifest.parameter_set,
                embedding=manifest.embedding,
                backbone=manifest.backbone,
                backbone_directory=(
                    None if manifest.backbone is None else source / BACKBONE_DIRECTORY
                ),
                policy=manifest.policy,
                about=manifest.about,
                salt=salt,
            )
        except (ManifestError, ScaleError) as error:
            raise ArtifactError(f"{source}: {error}") from error
        if artifact.manifest.digest != manifest.digest:
            raise ArtifactError(
                f"{source / MANIFEST_FILE} states other scales than follow from the head: "
                "save the artefact again"
            )
        return artifact

    def _manifest(self, name: str) -> Manifest:
        scales = self.scales
        of_tokens = self.backbone is not None and self.backbone.pooling == "tokens"
        return Manifest.build(
            {
                "name": name,
                "task": "token-classification" if of_tokens else "text-classification",
                "parameters": self.parameters.name,
                "parameters_id": self.parameters.id.hex(),
                "head": {
                    "dimensions": self.weight.shape[1],
                    "labels": self.labels,
                    "problem_type": self.problem_type,
                    "private_parameters": self.weight.size + self.bias.size,
                    "exponent": scales.exponent,
                    "downscale_bits": scales.downscale_bits,
                    "scale_bits": scales.scale_bits,
                    "weight_scale_bits": scales.weight_scale_bits,
                    "flood_bits": scales.flood_bits,
                    "reply_bits": scales.reply_bits,
                    "group_limit": scales.group_limit,
                    "error_bound": scales.error_bound,
                    "commitment": self._commitment,
                },
                "embedding": self.embedding,
                "backbone": self.backbone,
                "policy": self.policy,
                "about": self.about,
            }
        )

    def _write(
        self,
        directory: Path,
        manifest: Manifest,
        report: Mapping[str, Any] | None,
        encrypt_head: Callable[[bytes, bytes], bytes] | None,
    ) -> None:
        if encrypt_head is None:
            _write_file(directory / HEAD_FILE, self.head_bytes(), private=True)
        else:
            encrypted = encrypt_head(self.head_bytes(), manifest.digest)
            _write_file(directory / ENCRYPTED_HEAD_FILE, encrypted, private=True)
        _write_file(directory / MANIFEST_FILE, manifest.serialize(), private=False)
        _write_file(directory / FORMAT_FILE, format_line(ARTIFACT_FORMAT), private=False)
        if report is not None:
            content = _as_json(report, "report").encode("utf-8")
            _write_file(directory / REPORT_FILE, content, private=True)
        if self.backbone is not None and self.backbone_directory is not None:
            copies = directory / BACKBONE_DIRECTORY
            for entry in self.backbone.all_files:
                copy = copies / entry.path
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.backbone_directory / entry.path, copy)
                _fsync(copy)
            verify(copies, self.backbone.all_files)
        _fsync(directory)


def _as_floats(values: ArrayLike, what: str) -> NDArray[np.float64]:
    try:
        array = np.asarray(values)
        if np.iscomplexobj(array):
            raise TypeError
        return array.astype(np.float64)
    except (TypeError, ValueError, RuntimeError):
        # What numpy says may quote the values.
        raise ArtifactError(
            f"{what} is not an array of real numbers: pass nested lists or a numpy array "
            "(for a torch tensor, `tensor.detach().cpu().numpy()`)"
        ) from None


def _as_json(value: Mapping[str, Any], what: str) -> str:
    try:
        return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{what} is not something that JSON can carry ({error})") from error


def _read_only(array: NDArray[np.float64]) -> NDArray[np.float64]:
    array.flags.writeable = False
    return array


def _name_for(target: Path) -> str:
    try:
        return valid_name(target.name)
    except ValueError as error:
        raise ArtifactError(
            f"the directory's last component {target.name!r} cannot be the model's name "
            f"({error}): pass name=... or choose another directory"
        ) from error


def _refuse_foreign(target: Path) -> None:
    """Only an artefact, or nothing, may be replaced: replacing removes everything in there."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ArtifactError(f"{target} is not a directory: choose another target")
    entries = {entry.name for entry in target.iterdir()}
    parts = {HEAD_FILE, MANIFEST_FILE}
    if entries and not parts <= entries <= parts | {REPORT_FILE, BACKBONE_DIRECTORY, FORMAT_FILE}:
        raise ArtifactError(
            f"{target} is not empty, and is not an artefact or holds other files too: "
            "choose another target, or move its content away"
        )


def _cannot_write(target: Path, error: OSError) -> ArtifactError:
    return ArtifactError(f"the artefact cannot be written to {target} ({error.strerror or error})")


def _write_file(path: Path, content: bytes, *, private: bool) -> None:
    mode = 0o600 if private else 0o644
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap(staging: Path, target: Path) -> None:
    """Put `staging` in the place of `target`; what was there comes back if that fails."""
    is_current = target.exists() and target.samefile(Path.cwd())
    if not target.exists():
        staging.rename(target)
    else:
        aside = Path(tempfile.mkdtemp(prefix=".veilhead-old-", dir=target.parent))
        old = aside / target.name
        try:
            target.rename(old)
            try:
                staging.rename(target)
            except OSError:
                old.rename(target)
                raise
        finally:
            # If even putting it back failed, the old artefact stays in there.
            if target.exists():
                shutil.rmtree(aside, ignore_errors=True)
    if is_current:
        os.chdir(target)  # this process would otherwise stay in the removed directory
    _fsync(target.parent)


def _unreadable_head(path: Path) -> ArtifactError:
    return ArtifactError(
        f"{path} cannot be read as a safetensors file with a salt: save the artefact again"
    )


def _read_head(
    content: bytes, path: Path
) -> tuple[NDArray[np.float64], NDArray[np.float64], bytes]:
    """Weight, bias and salt of a head file's bytes, of whatever shapes it holds."""
    try:
        tensors = deserialize_tensors(content)  # checks the header before it allocates
        # The metadata is in the header, whose length comes first; safetensors reads it of files
        # only.
        (length,) = struct.unpack_from("<Q", content)
        metadata = json.loads(content[8 : 8 + length]).get("__metadata__", {})
        salt = bytes.fromhex(metadata.get("salt", ""))
    except (SafetensorError, ValueError, KeyError, struct.error) as error:
        raise _unreadable_head(path) from error
    found = metadata.get("format", "")
    complaint = format_complaint(found, _HEAD_FORMAT, if_older=_MAKE_AGAIN)
    if complaint is not None or len(salt) != _SALT_BYTES:
        raise ArtifactError(
            f"{path} is not a head that can be read: {complaint or 'its salt has a wrong length'}"
        )
    if set(tensors) != {"weight", "bias"} or any(
        tensor.dtype != np.float64 for tensor in tensors.values()
    ):
        raise ArtifactError(
            f"{path} holds the tensors {sorted(tensors)}, expected weight and bias as float64"
        )
    return tensors["weight"], tensors["bias"], salt
