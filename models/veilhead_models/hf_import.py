"""Import: a transformers classifier becomes an artefact, split at its last linear layer.

Everything before that layer is published as the backbone, the layer itself is the private head.
Only local files are read, as safetensors and JSON: no code that comes with a checkpoint is run,
and no pickle is opened. What comes out is compared with the checkpoint's own logits.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from veilhead_models.artifact import HeadArtifact
from veilhead_models.backbone import (
    CONFIG_FILE,
    TOKENIZER_FILES,
    Backbone,
    describe_files,
    read_json,
)
from veilhead_models.checkpoint import (
    FLOAT_TOLERANCE,
    Checkpoint,
    Head,
    open_checkpoint,
    split_head,
)
from veilhead_protocol.errors import ArtifactError, CheckpointError, ScaleError
from veilhead_protocol.manifest import (
    BackboneSection,
    CalibrationSection,
    EmbeddingSection,
    Manifest,
    PolicySection,
)
from veilhead_protocol.scales import project, served_weight

if TYPE_CHECKING:
    pass

#: Digests (see `_weights_digest`) of what anybody may have without us.
PUBLIC_BACKBONES: Final = {
    "737c3eb1bd449f92330e70b593bf5ea35edd8af0dc242f118410179b4bf86d05": "all-MiniLM-L6-v2",
}

#: A calibrated scale is this times the quantile of the norms. Generated texts are less like the
#: ones that clients have: the margin for them is wider. It costs a bit of exponent, no precision.
CALIBRATION_QUANTILE: Final = 0.999
MARGIN_GIVEN: Final = 1.25
MARGIN_GENERATED: Final = 2.0

#: Texts whose logits are compared at most.
PARITY_TEXTS: Final = 200

#: What of a configuration tells of the head or of the machine that it was trained on.
_HEAD_SETTINGS: Final = (
    "_name_or_path",
    "finetuning_task",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "task_specific_params",
)


@dataclass(frozen=True)
class Parity:
    """How an artefact's logits compare with the checkpoint's own, row by row.

    Rows are texts, or tokens of a token classifier.

    Attributes:
        rows: rows compared.
        shortened: of these, rows whose embedding was longer than the scale, and was shortened.
            The other numbers leave them out.
        largest_error: of a logit.
        error_bound: what the manifest promises for the encrypted answer.
        decided: rows whose label is further from a tie than the bound.
        labels_equal: of these, rows with the same label or labels.
    """

    rows: int
    shortened: int
    largest_error: float
    error_bound: float
    decided: int
    labels_equal: int


@dataclass(frozen=True)
class ImportReport:
    """What was found in a checkpoint, and how the artefact compares with it.

    Attributes:
        architecture: the checkpoint's class in transformers.
        split: the module that became the head.
        task: as in the manifest.
        problem_type: as in the manifest.
        classes: C.
        dimensions: d.
        public_parameters: numbers that are published with the backbone.
        private_parameters: numbers in the head.
        public_backbone: what the backbone is, where it is a public one, bit by bit.
        embedding_scale: as in the manifest.
        scale_origin: as in the manifest.
        scale_reason: where the scale comes from, in words.
        texts: texts that the scale and the comparison were made with.
        texts_generated: whether they were made up.
        calibration_rows: their embeddings: as many, or one a token.
        shortened_rows: of these, such as are longer than the scale and lose length.
        parity: the comparison.
    """

    architecture: str
    split: str
    task: str
    problem_type: str
    classes: int
    dimensions: int
    public_parameters: int
    private_parameters: int
    public_backbone: str | None
    embedding_scale: float
    scale_origin: str
    scale_reason: str
    texts: int
    texts_generated: bool
    calibration_rows: int
    shortened_rows: int
    parity: Parity

    def to_json(self) -> dict[str, Any]:
        """The report as something that JSON can carry."""
        return asdict(self)

    def render(self) -> str:
        """The report for a terminal, without a newline at its end."""
        parity = self.parity
        texts = f"{self.texts} {'generated' if self.texts_generated else 'given'} texts"
        rows = "tokens" if self.task == "token-classification" else "texts"
        lines = [
            f"{self.architecture}, split at {self.split} ({self.dimensions} to {self.classes})",
            f"{self.task}, {self.problem_type}",
            f"public   {self.public_parameters:>13,} parameters, everything before that layer",
            f"private  {self.private_parameters:>13,} parameters, that layer",
        ]
        if self.public_backbone is not None:
            lines.append(
                f"the backbone is {self.public_backbone}, bit by bit: it is public already"
            )
        else:
            lines.append(
                "WARNING: this backbone is none that we know to be public. If it was fine-tuned, "
                "publishing the model discloses what it learned: every client gets all of it."
            )
        lines += [
            f"embedding scale {self.embedding_scale:.6g}, {self.scale_origin}: {self.scale_reason}",
            f"{texts}: {self.shortened_rows} of {self.calibration_rows} {rows} are longer than it",
            f"logits of {parity.rows} {rows} against the checkpoint's own:",
            f"  largest error {parity.largest_error:.2g}, bound {parity.error_bound:.2g}",
        ]
        if self.problem_type != "regression":
            lines.append(
                f"  labels equal for {parity.labels_equal} of {parity.decided} {rows} (ties within "
                "the bound left out)"
            )
        return "\n".join(lines)


def import_hf(
    source: str | Path,
    out: str | Path,
    *,
    name: str | None = None,
    parameters: str = "standard",
    texts: Sequence[str] | None = None,
    embedding_scale: float | None = None,
    policy: PolicySection | None = None,
) -> tuple[Manifest, ImportReport]:
    """Make an artefact of a local checkpoint of a text or token classifier.

    Args:
        source: directory of a checkpoint that `AutoModelForSequenceClassification` or
            `AutoModelForTokenClassification` loads, with its tokenizer.
        out: the artefact's directory.
        name: the model's name, which is its backbone's too; by default the last component of
            `out`.
        parameters: `standard` or `compact`.
        texts: texts such as clients will have, to measure the embedding scale with and to compare
            logits on; generated when it is None.
        embedding_scale: what embeddings are divided by; found when it is None.
        policy: what the vendor asks of both sides.

    Returns:
        The manifest, and what was found.

    Raises:
        CheckpointError: when the checkpoint cannot be read safely, cannot be split, or its parts
            do not give its logits.
        ArtifactError: when the artefact cannot be written, or labels or name are wrong.
        ScaleError: when the parameter set cannot carry the head.
        ManifestError: when labels or name are not what a manifest may hold.
    """
    target, source = Path(out).resolve(), Path(source).resolve()
    with (
        open_checkpoint(source) as view,
        tempfile.TemporaryDirectory(prefix="veilhead-import-") as made,
    ):
        checkpoint = Checkpoint.load(view, source)
        given = checkpoint.generated_texts() if texts is None else list(texts)
        if not given:
            raise CheckpointError("got no text to measure the embedding scale with")
        head = split_head(checkpoint, given[0])
        section = _publish(checkpoint, head, Path(made), name=target.name if name is None else name)
        backbone = Backbone.load(made, section, device="cpu")
        embeddings = _embeddings(backbone, given)  # [rows, d]
        scale, reason = _scale(
            embeddings, embedding_scale, head.bound, head.bound_reason, given=texts is not None
        )

        def artifact(section_of_scale: EmbeddingSection) -> HeadArtifact:
            return HeadArtifact.from_weights(
                head.weight,
                head.bias,
                checkpoint.labels,
                problem_type=checkpoint.problem_type,
                name=name,
                parameters=parameters,
                embedding_scale=section_of_scale,
                policy=policy,
            ).with_backbone(made, section)

        try:
            found = artifact(scale)
            too_wide = found.scales.downscale_bits > 0
        except ScaleError:
            if scale.scale_origin != "derived":
                raise
            too_wide = True
        if too_wide and scale.scale_origin == "derived":
            # A bound that always holds may be far above what occurs, and cost precision.
            scale, reason = _scale(embeddings, None, None, "", given=texts is not None)
            found = artifact(scale)
        parity = _parity(found, backbone, view, given[:PARITY_TEXTS])
        report = ImportReport(
            architecture=checkpoint.architecture,
            split=head.path,
            task=checkpoint.task,
            problem_type=checkpoint.problem_type,
            classes=len(checkpoint.labels),
            dimensions=backbone.dimensions,
            public_parameters=section.public_parameters,
            private_parameters=found.weight.size + found.bias.size,
            public_backbone=PUBLIC_BACKBONES.get(_weights_digest(Path(made))),
            embedding_scale=scale.scale,
            scale_origin=scale.scale_origin,
            scale_reason=reason,
            texts=len(given),
            texts_generated=texts is None,
            calibration_rows=len(embeddings),
            shortened_rows=_longer(embeddings, scale.scale),
            parity=parity,
        )
        manifest = found.save(target, report=report.to_json())
    return manifest, report


def read_texts(file: Path) -> list[str]:
    """The lines of a file that are not empty.

    Raises:
        CheckpointError: when it cannot be read, or is not UTF-8.
    """
    try:
        return [line for line in file.read_text("utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file} is not UTF-8") from error


def _publish(checkpoint: Checkpoint, head: Head, directory: Path, *, name: str) -> BackboneSection:
    """Write the files of the backbone, and describe them."""
    from safetensors.torch import load_file

    from veilhead_models.embedding_module import quiet

    with quiet():
        checkpoint.model.to(checkpoint.dtype).save_pretrained(directory)
        checkpoint.tokenizer.save_pretrained(directory)
    config = {
        key: value
        for key, value in read_json(directory / CONFIG_FILE).items()
        if key not in _HEAD_SETTINGS
    }
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    weights = sorted(path.name for path in directory.glob("model*.safetensors*"))
    for file in weights:
        if not file.endswith(".safetensors"):
            continue
        for key, tensor in load_file(directory / file).items():
            private = tuple(tensor.shape) == head.weight.shape
            if private and np.allclose(tensor.double().numpy(), head.weight):
                raise CheckpointError(
                    f"{checkpoint.architecture} cannot be split: {key}, which would be published, "
                    f"is the same as the private {head.path}"
                )
    tokenizer = [file for file in TOKENIZER_FILES if (directory / file).is_file()]
    of_tokens = checkpoint.task == "token-classification"
    return describe_files(
        directory,
        [CONFIG_FILE, *weights, *tokenizer],
        name=name,
        pooling="tokens" if of_tokens else "architecture",
        split=head.path,
        normalise=False,
        max_tokens=checkpoint.max_tokens,
        token_types=checkpoint.token_types,
    )


def _embeddings(backbone: Backbone, texts: Sequence[str]) -> NDArray[np.float64]:
    """[rows, d]: a row for each text, or for each of its tokens."""
    if backbone.section.pooling != "tokens":
        return backbone.embed(texts)
    windows = [window.embeddings for text in backbone.embed_tokens(texts) for window in text]
    return np.concatenate(windows)


def _longer(embeddings: NDArray[np.float64], scale: float) -> int:
    # A derived bound can be met to the last bit of a float32.
    return int((np.linalg.norm(embeddings, axis=1) > scale * (1 + 1e-6)).sum())


def _scale(
    embeddings: NDArray[np.float64],
    given_scale: float | None,
    bound: float | None,
    bound_reason: str,
    *,
    given: bool,
) -> tuple[EmbeddingSection, str]:
    """The embedding scale with its origin, and that in words."""
    if given_scale is not None:
        if not 1e-9 <= given_scale <= 1e9:
            raise ArtifactError(f"got an embedding scale of {given_scale}, expected 1e-9 to 1e9")
        return EmbeddingSection(scale=given_scale, scale_origin="given"), "by whoever imported it"
    if bound is not None:
        return EmbeddingSection(scale=bound, scale_origin="derived"), bound_reason
    norms = np.linalg.norm(embeddings, axis=1)  # [rows]
    if not (np.isfinite(norms).all() and norms.any()):
        raise CheckpointError(
            "the embeddings of some text are not finite, or all of them are zero: give other "
            "texts, or an embedding scale"
        )
    calibration = CalibrationSection(
        rows=len(norms),
        quantile=CALIBRATION_QUANTILE,
        margin=MARGIN_GIVEN if given else MARGIN_GENERATED,
    )
    # Rounded up to a few digits: the exact norm of one text is nobody's business.
    exact = calibration.margin * float(np.quantile(norms, calibration.quantile))
    step = 10.0 ** (math.floor(math.log10(exact)) - 2)
    section = EmbeddingSection(
        scale=math.ceil(exact / step) * step, scale_origin="calibrated", calibration=calibration
    )
    return section, (
        f"{calibration.margin:g} times the {calibration.quantile:.1%} quantile of the norms of "
        f"{calibration.rows} embeddings"
    )


def _parity(artifact: HeadArtifact, backbone: Backbone, view: Path, texts: Sequence[str]) -> Parity:
    """The artefact's logits against those of the checkpoint as it was, loaded afresh.

    Raises:
        CheckpointError: when they differ by more than encryption and float32 explain.
    """
    import torch

    original = Checkpoint.load(view, view)
    model = original.model.float()
    rows: list[NDArray[np.float64]] = []
    for text in texts:
        inputs = original.inputs(text)
        with torch.inference_mode():
            logits = model(**inputs).logits[0].double().numpy()  # [C] or [tokens, C]
        if backbone.section.pooling == "tokens":
            logits = logits[original.are_of_text(text)]
        rows.append(np.atleast_2d(logits))
    expected = np.concatenate(rows)  # [rows, C]
    embeddings = _embeddings(backbone, texts)  # [rows, d]
    scales, scale = artifact.scales, artifact.embedding.scale
    # [C, d], as it is served, and as the client multiplies it back
    weight = np.ldexp(served_weight(artifact.weight, scales), scales.downscale_bits)
    found = project(embeddings, scale) @ weight.T + artifact.bias  # [rows, C]
    kept = np.linalg.norm(embeddings, axis=1) <= scale * (1 + 1e-6)  # [rows]
    expected, found = expected[kept], found[kept]
    error = float(np.abs(found - expected).max()) if len(found) else 0.0
    bound = scales.error_bound
    tolerance = FLOAT_TOLERANCE * max(1.0, float(np.abs(expected).max(initial=0.0)))
    if not error <= bound + tolerance:
        raise CheckpointError(
            f"the parts of {original.architecture} give logits that differ by up to {error:.3g} "
            f"from its own, expected at most {bound + tolerance:.3g}: it cannot be imported"
        )
    decided, equal = _labels_equal(expected, found, artifact.problem_type, 2 * bound + tolerance)
    return Parity(
        rows=len(kept),
        shortened=int((~kept).sum()),
        largest_error=error,
        error_bound=bound,
        decided=decided,
        labels_equal=equal,
    )


def _labels_equal(
    expected: NDArray[np.float64], found: NDArray[np.float64], problem_type: str, margin: float
) -> tuple[int, int]:
    """Rows of logits [rows, C] that are no tie, and of these those with the same labels."""
    if problem_type == "regression" or len(expected) == 0:
        return 0, 0
    if problem_type == "multi_label" or expected.shape[1] == 1:
        decided = np.abs(expected).min(axis=1) > margin
        same = ((expected > 0) == (found > 0)).all(axis=1)
    else:
        best = np.sort(expected, axis=1)
        decided = best[:, -1] - best[:, -2] > margin
        same = expected.argmax(axis=1) == found.argmax(axis=1)
    return int(decided.sum()), int((decided & same).sum())


def _weights_digest(directory: Path) -> str:
    """What the weights in a directory are, whatever they are called: a hexadecimal SHA-256.

    Of the sorted SHA-256 of every tensor's type, shape and bytes; integers do not count.
    """
    import torch
    from safetensors import safe_open

    found: list[bytes] = []
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  (not a mapping)
                tensor = tensors.get_tensor(key)
                if tensor.is_floating_point():
                    what = f"{tensor.dtype} {list(tensor.shape)}\n".encode()
                    content = tensor.contiguous().view(torch.uint8).numpy().tobytes()
                    found.append(hashlib.sha256(what + content).digest())
    return hashlib.sha256(b"".join(sorted(found))).hexdigest()
