"""Export of a backbone for ONNX Runtime, so that clients need neither torch nor transformers.

The graph is that of the module which torch runs, pooling and activations included; the tokenizer
cuts and pads as the backbone does. What comes out is held against the original before it counts.
"""

from __future__ import annotations

import logging
import math
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from veilhead_models.artifact import REPORT_FILE, HeadArtifact
from veilhead_models.backbone import Backbone, padding_id, read_json
from veilhead_models.embedder import Embedder
from veilhead_models.onnx_backbone import OnnxBackbone
from veilhead_models.plain_tokenizer import PlainTokenizer
from veilhead_protocol.errors import BackboneError
from veilhead_protocol.files import describe_file
from veilhead_protocol.manifest import BackboneSection, FileEntry, Manifest, OnnxSection

if TYPE_CHECKING:
    import onnx

TOKENIZER_FILE: Final = "onnx/tokenizer.json"
GRAPH_FILES: Final = {"fp32": "onnx/model.onnx", "fp16": "onnx/model.fp16.onnx"}

#: Largest difference of an embedding's values from torch's, as a part of the largest value.
TOLERANCE: Final = {"fp32": 1e-4, "fp16": 2e-2}

#: Texts whose tokens and embeddings must be those of the original: empty, short, cut, of several
#: scripts, decomposed, with what looks like special tokens.
PROBES: Final = (
    "",
    " ",
    "a",
    "The patient reports chest pain since 3 a.m., radiating to the left arm.",
    "[CLS] <s> [MASK] </s> ##ing \u2581",
    "Cafe\u0301 na\u00efve \u00dcbergr\u00f6\u00dfe \u00c5 \ufb01ne",
    "\u60a3\u8005\u6709\u80f8\u75db \u0431\u043e\u043b\u044c \u0623\u0644\u0645 \U0001f600\u200d",
    "line\r\nbreak\tand\u00a0spaces   in a row\x00\x07",
    "supercalifragilistic" * 20,
    "Invoice 10-22/7: $1,234.56 (+5%) <b>now</b> https://example.org/?a=b&c=d " * 300,
)

#: Weights of fewer values stay in single precision: they are no size, and masks may be among them.
_SMALLEST_HALVED: Final = 256

_HALF_LIMIT: Final = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class OnnxParity:
    """How far an export is from the original, on the probes.

    Attributes:
        precision: `fp32` or `fp16`.
        bytes: size of the graph's file.
        embedding_difference: largest difference of a value of an embedding.
        embedding_scale: largest value of an embedding.
        logit_difference: largest difference of a logit, in plaintext.
        same_labels: whether every probe, or token of one, has the same top label.
    """

    precision: str
    bytes: int
    embedding_difference: float
    embedding_scale: float
    logit_difference: float
    same_labels: bool

    def render(self) -> str:
        """All of it on a line."""
        return (
            f"{self.precision}: {self.bytes / 1e6:.1f} MB; embeddings differ by at most "
            f"{self.embedding_difference:.1e} (values up to {self.embedding_scale:.2g}), "
            f"logits by {self.logit_difference:.1e}; top labels "
            f"{'are the same' if self.same_labels else 'DIFFER on some texts'}"
        )


def export_onnx(
    directory: str | Path, *, precisions: Sequence[str] = ("fp32",)
) -> tuple[Manifest, list[OnnxParity]]:
    """Give the artefact in a directory an ONNX form of its backbone, or another one.

    The manifest changes, and its digest with it; the head does not.

    Args:
        directory: the artefact.
        precisions: `fp32`, `fp16` (weights stored in half precision, computed in single) or both.

    Returns:
        The new manifest, and how near each precision is to the original.

    Raises:
        ArtifactError: when the directory is not an artefact.
        BackboneError: when it has no backbone, the backbone cannot be exported, its tokenizer is
            not one of the tokenizers library, or an export differs from the original by more than
            `TOLERANCE`.
    """
    artifact = HeadArtifact.load(directory)
    section, source = artifact.backbone, artifact.backbone_directory
    if section is None or source is None:
        raise BackboneError("the artefact has no backbone: there is nothing to export")
    report = read_json(Path(directory) / REPORT_FILE) or None
    with tempfile.TemporaryDirectory(prefix="veilhead-onnx-") as made:
        target = Path(made)
        original = Backbone.load(source, section, device="cpu")
        exported = convert(original, target, precisions)
        expected = _embeddings(original)
        parities = [_parity(artifact, expected, target, exported, name) for name in precisions]
        for entry in section.files:
            (target / entry.path).parent.mkdir(parents=True, exist_ok=True)
            (target / entry.path).symlink_to(source / entry.path)
        new = replace(artifact, backbone=exported, backbone_directory=target)
        return new.save(directory, report=report), parities


def convert(original: Backbone, target: Path, precisions: Sequence[str]) -> BackboneSection:
    """Write the ONNX form of a loaded backbone below `target`; its section with that form.

    Raises:
        BackboneError: when it cannot be exported.
    """
    if not precisions or not set(precisions) <= set(GRAPH_FILES):
        raise BackboneError(f"got the precisions {list(precisions)}, expected fp32, fp16 or both")
    (target / TOKENIZER_FILE).parent.mkdir(parents=True)
    (target / TOKENIZER_FILE).write_bytes(_tokenizer(original))
    graph = _graph(original)
    graphs: dict[str, FileEntry] = {}
    for precision in precisions:
        (target / GRAPH_FILES[precision]).write_bytes(
            _serialized(graph if precision == "fp32" else halved(graph), original.section)
        )
        graphs[precision] = describe_file(target, GRAPH_FILES[precision])
    onnx = OnnxSection(tokenizer=describe_file(target, TOKENIZER_FILE), **graphs)
    return original.section.model_copy(update={"onnx": onnx})


def halved(graph: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with its weights in half precision, each followed by a cast to single.

    Weights that half precision cannot hold, and small ones, stay as they are.
    """
    import onnx

    made = onnx.ModelProto()
    made.CopyFrom(graph)
    casts = []
    for weight in made.graph.initializer:
        if weight.data_type != onnx.TensorProto.FLOAT or math.prod(weight.dims) < _SMALLEST_HALVED:
            continue
        values = onnx.numpy_helper.to_array(weight)
        if not (np.abs(values) <= _HALF_LIMIT).all():  # infinity and NaN are not either
            continue
        name = weight.name
        half = onnx.numpy_helper.from_array(values.astype(np.float16), f"{name}.half")
        weight.CopyFrom(half)
        casts.append(onnx.helper.make_node("Cast", [half.name], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *made.graph.node]
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    return made


def _tokenizer(original: Backbone) -> bytes:
    """A file of the tokenizers library that makes the same tokens, and cuts and pads the same way.

    Raises:
        BackboneError: when there is none.
    """
    from tokenizers import Tokenizer

    tokenizer, section = original.tokenizer, original.section
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise BackboneError(
            f"the tokenizer of {section.name!r}, a {type(tokenizer).__name__}, is not one of the "
            "tokenizers library, and cannot be used without transformers"
        )
    plain = Tokenizer.from_str(backend.to_str())
    plain.enable_truncation(section.max_tokens, direction=tokenizer.truncation_side)
    plain.enable_padding(
        direction=tokenizer.padding_side,
        pad_id=padding_id(original.module, tokenizer),
        pad_type_id=tokenizer.pad_token_type_id,
        pad_token=tokenizer.pad_token or "[PAD]",
    )
    content: bytes = plain.to_str().encode("utf-8")
    found = PlainTokenizer(content)
    for probe in PROBES:
        expected = tokenizer([probe], truncation=True, max_length=section.max_tokens)["input_ids"]
        if found([probe], max_length=section.max_tokens)["input_ids"] != expected:
            raise BackboneError(
                f"the tokenizer of {section.name!r} gives other tokens without transformers"
            )
    return content


def _graph(original: Backbone) -> onnx.ModelProto:
    """The module of a backbone as a graph, for batches and texts of any size.

    Raises:
        BackboneError: when torch cannot export it.
    """
    import torch

    # Two texts of different lengths: a size of one would be taken for a constant.
    inputs = original.batch(["a b c", "a b c d e f"])
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    try:
        with _quiet():
            program: Any = torch.onnx.export(
                original.module,
                kwargs={name: torch.from_numpy(values) for name, values in inputs.items()},
                dynamo=True,
                dynamic_shapes=dict.fromkeys(inputs, axes),
                input_names=list(inputs),
                output_names=["embeddings"],
                verbose=False,
            )
            made: onnx.ModelProto = program.model_proto
    except Exception as error:  # torch raises whatever its parts raise
        raise BackboneError(
            f"the backbone {original.section.name!r} cannot be exported: {type(error).__name__}; "
            "torch cannot trace its architecture for texts of any length"
        ) from error
    _anonymise(made)
    return made


def _anonymise(model: onnx.ModelProto) -> None:
    """Remove what torch writes beside the computation: the paths of this machine's files, too."""
    model.ClearField("doc_string")
    model.ClearField("metadata_props")
    model.graph.ClearField("doc_string")
    model.graph.ClearField("metadata_props")
    model.graph.ClearField("value_info")
    for function in model.functions:
        function.ClearField("doc_string")
        function.ClearField("metadata_props")
        function.ClearField("value_info")
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    for item in (*nodes, *model.graph.initializer, *model.graph.input, *model.graph.output):
        item.ClearField("doc_string")
        item.ClearField("metadata_props")


def _serialized(model: onnx.ModelProto, section: BackboneSection) -> bytes:
    import onnx

    try:
        onnx.checker.check_model(model)
        content: bytes = model.SerializeToString(deterministic=True)
    except Exception as error:  # of protobuf, when it has 2 GiB or more
        raise BackboneError(
            f"the graph of {section.name!r} cannot be one file: {type(error).__name__}; with "
            f"{section.public_parameters} weights it may exceed the 2 GiB that ONNX allows"
        ) from error
    return content


def _parity(
    artifact: HeadArtifact,
    expected: NDArray[np.float64],
    directory: Path,
    section: BackboneSection,
    precision: str,
) -> OnnxParity:
    """How far one precision is from torch, whose embeddings are `expected`: [rows, d].

    Raises:
        BackboneError: when that is too far.
    """
    backbone = OnnxBackbone.load(directory, section, precision=precision, device="cpu")
    got = _embeddings(backbone)  # [rows, d]
    difference = float(np.abs(got - expected).max())
    scale = float(np.abs(expected).max())
    if not difference <= TOLERANCE[precision] * scale:  # NaN is not, either
        raise BackboneError(
            f"the {precision} export of {section.name!r} gives other embeddings: they differ by "
            f"{difference:.2g}, with values up to {scale:.2g}"
        )
    wanted, found = artifact.logits(expected), artifact.logits(got)  # [rows, C]
    return OnnxParity(
        precision=precision,
        bytes=(directory / GRAPH_FILES[precision]).stat().st_size,
        embedding_difference=difference,
        embedding_scale=scale,
        logit_difference=float(np.abs(found - wanted).max()),
        same_labels=bool((found.argmax(axis=1) == wanted.argmax(axis=1)).all()),
    )


def _embeddings(backbone: Embedder) -> NDArray[np.float64]:
    """Of the probes, or of all of their tokens: [rows, d]."""
    if backbone.section.pooling != "tokens":
        return backbone.embed(PROBES)
    windows = [window.embeddings for text in backbone.embed_tokens(PROBES) for window in text]
    return np.concatenate(windows)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporter says to its own developers."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
