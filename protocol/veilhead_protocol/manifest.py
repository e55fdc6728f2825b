"""The manifest: what a client must know about a model, and all that it is told.

Its canonical bytes are UTF-8 JSON with sorted keys and no white space. Their SHA-256 is the
model's digest: clients pin it, queries name it, and any other bytes are refused.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from functools import cached_property
from pathlib import PurePosixPath
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    Field,
    ValidationError,
    model_validator,
)

from veilhead_protocol.errors import ManifestError, ParameterError, ScaleError
from veilhead_protocol.layout import MAX_CLASSES, MAX_DIMENSIONS, HeadShape, Layout
from veilhead_protocol.parameters import MAX_SERVED_EXPONENT, PARAMETER_SETS, ParameterSet
from veilhead_protocol.policy import PolicySection as PolicySection
from veilhead_protocol.policy import Section
from veilhead_protocol.scales import (
    BOUND_STEP,
    FEWEST_WEIGHT_BITS,
    MAX_EXPONENT,
    MOST_WEIGHT_BITS,
    HeadScales,
)

FORMAT: Final = "veilhead-manifest/2"

#: A manifest is refused above this size before it is parsed.
MAX_MANIFEST_BYTES: Final = 4 * 2**20

#: A client fetches no backbone that is larger in all.
MAX_BACKBONE_BYTES: Final = 16 * 2**30

#: What an embedding may be divided by. No backbone's come near either end; beyond, a division by it
#: could overflow, or leave nothing.
MIN_EMBEDDING_SCALE: Final = 1e-9
MAX_EMBEDDING_SCALE: Final = 1e9

#: The largest whole number that every reader of JSON holds exactly.
_MAX_COUNT: Final = 2**53

#: How deep lists and objects of `about` may be in each other: no reader recurses further.
_MAX_ABOUT_DEPTH: Final = 32

#: Embeddings, overrides and isolates of the Unicode bidirectional algorithm.
_BIDIRECTIONAL_CONTROLS: Final = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")

NAME_PATTERN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

_HexDigest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_ParameterName = Literal["standard", "compact"]


def valid_name(name: str) -> str:
    """A model's name: it stands in URLs and in directory names.

    Raises:
        ValueError: when it cannot.
    """
    if not NAME_PATTERN.fullmatch(name):
        raise ValueError(
            "a model's name has 1 to 64 letters, digits, dots, underscores and hyphens, "
            "the first a letter or a digit"
        )
    return name


def _safe_path(path: str) -> str:
    parts = PurePosixPath(path).parts
    if (
        not parts
        or path.startswith("/")
        or str(PurePosixPath(path)) != path
        or any(not NAME_PATTERN.fullmatch(part.removeprefix(".")) or part == ".." for part in parts)
    ):
        raise ValueError("a file's path must be relative, normalised and of plain names")
    return path


def _shallow(about: dict[str, Any]) -> dict[str, Any]:
    found: list[Any] = [about]
    for _ in range(_MAX_ABOUT_DEPTH):
        inner = [
            list(value.values()) if isinstance(value, dict) else value
            for value in found
            if isinstance(value, dict | list)
        ]
        found = [item for items in inner for item in items]
    if any(isinstance(value, dict | list) for value in found):
        raise ValueError(f"expected at most {_MAX_ABOUT_DEPTH} levels of lists and objects")
    return about


class HeadSection(Section):
    """The head's public numbers; `scales` holds what each of them means.

    `problem_type` says what the logits of a text are: `single_label` (their softmax gives the
    labels' probabilities; the sigmoid where there is one label only), `multi_label` (the sigmoid of
    each is its label's probability) or `regression` (they are the values themselves).
    `private_parameters` counts the numbers of weight and bias, which nobody is shown.
    """

    dimensions: Annotated[int, Field(ge=1, le=MAX_DIMENSIONS)]
    labels: Annotated[tuple[Annotated[str, Field(max_length=512)], ...], Field(strict=False)]
    problem_type: Literal["single_label", "multi_label", "regression"]
    private_parameters: Annotated[int, Field(ge=2, le=MAX_CLASSES * (MAX_DIMENSIONS + 1))]
    exponent: Annotated[int, Field(ge=0, le=MAX_EXPONENT)]
    downscale_bits: Annotated[int, Field(ge=0, le=MAX_EXPONENT)]
    scale_bits: Annotated[int, Field(ge=1, le=53)]
    weight_scale_bits: Annotated[int, Field(ge=FEWEST_WEIGHT_BITS, le=MOST_WEIGHT_BITS)]
    flood_bits: Annotated[int, Field(ge=1, le=53)]
    reply_bits: Annotated[int, Field(ge=21, le=27)]
    group_limit: Annotated[int, Field(ge=1, le=256)]
    error_bound: Annotated[float, Field(gt=0, le=2.0**MAX_EXPONENT)]
    commitment: _HexDigest

    @model_validator(mode="after")
    def _labels_are_distinct(self) -> HeadSection:
        if not 1 <= len(self.labels) <= MAX_CLASSES:
            raise ValueError(f"expected 1 to {MAX_CLASSES} labels")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels must be distinct")
        # Clients print labels: these would let a service drive or deceive their terminals.
        if any(
            unicodedata.category(letter) == "Cc" or letter in _BIDIRECTIONAL_CONTROLS
            for label in self.labels
            for letter in label
        ):
            raise ValueError("labels must not contain control characters")
        if self.private_parameters != len(self.labels) * (self.dimensions + 1):
            raise ValueError("private_parameters is not what weight and bias have")
        return self


class CalibrationSection(Section):
    """How a scale was measured: `margin` times the `quantile` of the norms of `rows` embeddings."""

    rows: Annotated[int, Field(ge=1, le=_MAX_COUNT)]
    quantile: Annotated[float, Field(gt=0, le=1)]
    margin: Annotated[float, Field(ge=1, le=100)]


class EmbeddingSection(Section):
    """What the client divides an embedding by before it projects it onto the unit ball.

    `scale_origin` says where the scale comes from: `normalised` (the backbone's output has norm
    one), `derived` (a bound on the norm that follows from the backbone's last operation),
    `calibrated` (measured as `calibration` says) or `given` (set by whoever made the artefact).
    """

    scale: Annotated[float, Field(ge=MIN_EMBEDDING_SCALE, le=MAX_EMBEDDING_SCALE)]
    scale_origin: Literal["normalised", "derived", "calibrated", "given"]
    calibration: CalibrationSection | None = None

    @model_validator(mode="after")
    def _calibration_is_told(self) -> EmbeddingSection:
        if (self.calibration is not None) != (self.scale_origin == "calibrated"):
            raise ValueError("a calibrated scale, and no other, says how it was calibrated")
        return self


class FileEntry(Section):
    """One public file, by content."""

    path: Annotated[str, Field(max_length=256), AfterValidator(_safe_path)]
    bytes: Annotated[int, Field(ge=0, le=MAX_BACKBONE_BYTES)]
    sha256: _HexDigest


class DenseSection(Section):
    """A public linear layer after the pooling, and the function of its output."""

    file: Annotated[str, Field(max_length=256), AfterValidator(_safe_path)]
    activation: Literal["identity", "tanh", "relu", "gelu", "sigmoid"]


class OnnxSection(Section):
    """A backbone in a second form, for ONNX Runtime: nothing else of it is then needed.

    `tokenizer` is a file of the tokenizers library that cuts and pads as the backbone wants it. The
    graph takes `input_ids`, `attention_mask` and, where the backbone has token types,
    `token_type_ids`, and gives the embeddings, in single precision either way: `fp16` only stores
    its weights in half precision.
    """

    tokenizer: FileEntry
    fp32: FileEntry | None = None
    fp16: FileEntry | None = None

    @model_validator(mode="after")
    def _has_a_graph(self) -> OnnxSection:
        if self.fp32 is None and self.fp16 is None:
            raise ValueError("expected a graph of fp32, of fp16, or both")
        return self

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """The tokenizer and the graphs that there are."""
        return tuple(entry for entry in (self.tokenizer, self.fp32, self.fp16) if entry is not None)


class BackboneSection(Section):
    """The public transformer: its files, and how a text becomes an embedding.

    The files are a transformers checkpoint and its tokenizer. Where `pooling` is `architecture`,
    they are those of a text classifier, and where it is `tokens`, those of a token classifier, in
    both cases without the last linear layer: the embedding is what the classifier would hand to the
    module named `split`, its own pooling and activations included. Otherwise they are those of an
    encoder, whose last hidden states are pooled: `mean`, `max`, the first token (`cls`) or the last
    (`last`), each over the attention mask; then come the layers of `dense`, and, with `normalise`,
    the embedding is divided by its norm.

    Texts are cut to `max_tokens` tokens. `token_types` says whether the transformer is given the
    tokenizer's token types (where these are all zero it is not). `public_parameters` counts the
    numbers that everybody who fetches the files gets. `onnx` is the same computation once more.
    """

    kind: Literal["transformers"]
    name: Annotated[str, Field(min_length=1, max_length=128)]
    pooling: Literal["mean", "max", "cls", "last", "architecture", "tokens"]
    split: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.]{0,127}$")] | None = None
    dense: Annotated[tuple[DenseSection, ...], Field(strict=False, max_length=8)] = ()
    normalise: bool
    max_tokens: Annotated[int, Field(ge=2, le=8192)]
    token_types: bool = False
    public_parameters: Annotated[int, Field(ge=1, le=_MAX_COUNT)]
    files: Annotated[tuple[FileEntry, ...], Field(strict=False, min_length=1, max_length=64)]
    onnx: OnnxSection | None = None

    @property
    def all_files(self) -> tuple[FileEntry, ...]:
        """`files`, and those of `onnx`: what is published. No client needs all of them."""
        return self.files if self.onnx is None else self.files + self.onnx.files

    @model_validator(mode="after")
    def _paths_are_distinct(self) -> BackboneSection:
        if len({entry.path for entry in self.all_files}) != len(self.all_files):
            raise ValueError("the backbone's file paths must be distinct")
        if sum(entry.bytes for entry in self.all_files) > MAX_BACKBONE_BYTES:
            raise ValueError(f"the backbone has more than {MAX_BACKBONE_BYTES} bytes in all")
        return self

    @model_validator(mode="after")
    def _computation_is_consistent(self) -> BackboneSection:
        classifier = self.pooling in ("architecture", "tokens")
        if classifier != (self.split is not None):
            raise ValueError("a classifier without its last layer, and nothing else, has a split")
        if classifier and (self.dense or self.normalise):
            raise ValueError("only the pooled states of an encoder go through dense or normalise")
        paths = {entry.path for entry in self.files}
        if not all(layer.file in paths for layer in self.dense):
            raise ValueError("every file of dense must be among the files")
        return self


class Manifest(Section):
    """A model as the public sees it.

    `task` says whether an embedding stands for a text, or for a token of one.
    """

    format: Literal["veilhead-manifest/2"] = FORMAT
    name: Annotated[str, AfterValidator(valid_name)]
    task: Literal["text-classification", "token-classification"]
    parameters: _ParameterName
    parameters_id: _HexDigest
    head: HeadSection
    embedding: EmbeddingSection
    backbone: BackboneSection | None
    policy: PolicySection
    about: Annotated[dict[str, Any], AfterValidator(_shallow)]

    @model_validator(mode="after")
    def _is_consistent(self) -> Manifest:
        parameters = PARAMETER_SETS[self.parameters]
        if self.parameters_id != parameters.id.hex():
            raise ValueError("parameters_id is not the id of the named parameter set")
        for violation in self.policy.violations(self.parameters, self.about):
            raise ValueError(f"policy.{violation}")
        of_tokens = self.backbone is not None and self.backbone.pooling == "tokens"
        if of_tokens != (self.task == "token-classification"):
            raise ValueError("the task is not the one of the backbone's pooling")
        head = self.head
        if not 0 <= head.exponent - head.downscale_bits <= MAX_SERVED_EXPONENT:
            raise ValueError(
                f"head.downscale_bits must leave an exponent of 0 to {MAX_SERVED_EXPONENT}"
            )
        expected = self.scales
        for field in ("scale_bits", "flood_bits", "reply_bits"):
            if getattr(head, field) != getattr(expected, field):
                raise ValueError(f"head.{field} does not follow from head.exponent")
        if expected.query_scale_bits < 1:
            raise ValueError("head.weight_scale_bits leaves no scale for the query")
        if head.group_limit & (head.group_limit - 1):
            raise ValueError("head.group_limit is not a power of two")
        if head.group_limit > parameters.max_wanted(expected.served_exponent):
            raise ValueError("head.group_limit passes the hint limit of the parameter set")
        if head.error_bound % (BOUND_STEP * 2**head.downscale_bits) != 0:
            raise ValueError("head.error_bound is not a multiple of 2^(downscale_bits - 14)")
        return self

    @property
    def parameter_set(self) -> ParameterSet:
        """The parameter set that `parameters` names."""
        return PARAMETER_SETS[self.parameters]

    @property
    def scales(self) -> HeadScales:
        """The head's public numbers."""
        head = self.head
        return HeadScales.of_exponent(
            self.parameter_set,
            head.exponent,
            downscale_bits=head.downscale_bits,
            weight_scale_bits=head.weight_scale_bits,
            group_limit=head.group_limit,
            error_bound=head.error_bound,
        )

    @cached_property
    def shape(self) -> HeadShape:
        """What decides the layouts of its queries."""
        return HeadShape(
            parameters=self.parameter_set,
            dimensions=self.head.dimensions,
            classes=len(self.head.labels),
            exponent=self.scales.served_exponent,
            group_limit=self.head.group_limit,
            bulk=self.policy.bulk,
        )

    @cached_property
    def layout(self) -> Layout:
        """The canonical layout of a query of one text."""
        return self.layout_of(1)

    def layout_of(self, texts: int) -> Layout:
        """The canonical layout of a query of so many texts.

        Raises:
            LayoutError: when the model does not take so many at once.
        """
        return Layout.canonical(self.shape, texts)

    def serialize(self) -> bytes:
        """The canonical bytes."""
        text = json.dumps(
            self.model_dump(mode="json"),
            sort_keys=True,
            separators=(",", ":"),
            ensure_ascii=False,
            allow_nan=False,
        )
        return text.encode("utf-8")

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the canonical bytes: 32 bytes that name the model on the wire."""
        return hashlib.sha256(self.serialize()).digest()

    @classmethod
    def deserialize(cls, data: bytes) -> Manifest:
        """The manifest of these bytes.

        Raises:
            ManifestError: when they are too long, not canonical, inconsistent or of a newer format.
        """
        if len(data) > MAX_MANIFEST_BYTES:
            raise ManifestError(
                f"the manifest has {len(data)} bytes, expected at most {MAX_MANIFEST_BYTES}"
            )
        try:
            document = json.loads(data.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ManifestError("the manifest is not UTF-8 JSON") from error
        if not isinstance(document, dict):
            raise ManifestError("the manifest is not a JSON object")
        found = document.get("format")
        if found != FORMAT:
            raise ManifestError(
                f"the manifest's format is {str(found)[:40]!r}, expected {FORMAT!r}: "
                "upgrade the side that is older"
            )
        manifest = cls.build(document)
        try:
            canonical = manifest.serialize()
        except (ValueError, RecursionError) as error:  # NaN, infinity, lone surrogates
            raise ManifestError("the manifest holds a value that JSON cannot carry") from error
        if canonical != data:
            raise ManifestError(
                "the manifest is not in canonical form (sorted keys, no white space, UTF-8)"
            )
        return manifest

    @classmethod
    def build(cls, document: dict[str, Any]) -> Manifest:
        """A manifest from its fields.

        Raises:
            ManifestError: naming the first field that is wrong.
        """
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "manifest"
            message = first["msg"].removeprefix("Value error, ")
            raise ManifestError(f"{where}: {message}") from None
        except (ScaleError, ParameterError) as error:
            raise ManifestError(str(error)) from error
