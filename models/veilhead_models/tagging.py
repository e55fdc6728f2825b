"""Training of a token head: a linear head on the embeddings of single tokens, and what it finds.

The head is a multinomial logistic regression, as in `training`. Its report counts entities that
clients would get, from the plaintext logits that the encrypted ones approach.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from veilhead_models.artifact import HeadArtifact
from veilhead_models.backbone import Backbone, token_backbone
from veilhead_models.checkpoint import generated_texts
from veilhead_models.dp_records import fit_private_tagger
from veilhead_models.dp_training import Noise
from veilhead_models.embedder import Token
from veilhead_models.entity_report import EntityReport
from veilhead_models.privacy import PrivacyBudget, PrivacyStatement
from veilhead_models.records import (
    Entity,
    Record,
    RecordDataset,
    tag_tokens,
    tagged_entities,
    tags_of,
)
from veilhead_models.training import Progress, check_promises, fit_head
from veilhead_protocol.errors import DatasetError
from veilhead_protocol.manifest import BackboneSection, CalibrationSection, EmbeddingSection
from veilhead_protocol.policy import PolicySection
from veilhead_protocol.scales import project

#: The embedding scale is this quantile of the norms of tokens of random words, so that it says
#: nothing of the records. What is longer is shortened: a head is trained on what clients will send.
SCALE_QUANTILE: Final = 0.5


@dataclass(frozen=True, eq=False)
class EmbeddedRecord:
    """A record's tokens, their embeddings [tokens, d] in the unit ball, and its entities."""

    tokens: tuple[Token, ...]
    embeddings: NDArray[np.float32]
    entities: tuple[Entity, ...]

    def __repr__(self) -> str:  # tokens are the text
        return f"EmbeddedRecord(tokens={len(self.tokens)})"


@dataclass(frozen=True, eq=False)
class Tagger:
    """A trained head for tokens.

    Attributes:
        weight: [C, d], private, for embeddings in the unit ball.
        bias: [C], private.
        tags: the C tags.
        privacy: what is guaranteed to whoever was trained on; None without a privacy budget.
    """

    weight: NDArray[np.float64]
    bias: NDArray[np.float64]
    tags: tuple[str, ...]
    privacy: PrivacyStatement | None = None

    def __repr__(self) -> str:
        classes, dimensions = self.weight.shape
        return f"Tagger(classes={classes}, dimensions={dimensions})"

    def entities(self, record: EmbeddedRecord) -> list[Entity]:
        """What clients would get for a record, from plaintext logits."""
        logits = record.embeddings @ self.weight.T + self.bias  # [tokens, C]
        return list(tagged_entities(record.tokens, logits, self.tags))

    def report(
        self, records: Sequence[EmbeddedRecord], labels: Sequence[str], *, train_records: int
    ) -> EntityReport:
        """What it scores on records that it was not trained on."""
        return EntityReport.of_entities(
            [record.entities for record in records],
            [self.entities(record) for record in records],
            labels,
            train_records=train_records,
        )

    def artifact(
        self,
        embedding: EmbeddingSection,
        backbone_directory: str | Path,
        section: BackboneSection,
        *,
        name: str | None = None,
        parameters: str = "standard",
        policy: PolicySection | None = None,
    ) -> HeadArtifact:
        """The head with the backbone of tokens that it was trained on, at this embedding scale.

        Raises:
            ArtifactError, BackboneError, ParameterError, ScaleError, ManifestError: as
                `HeadArtifact.from_weights` and `HeadArtifact.with_backbone` do.
        """
        artifact = HeadArtifact.from_weights(
            self.weight / embedding.scale,
            self.bias,
            self.tags,
            name=name,
            parameters=parameters,
            policy=policy,
            embedding_scale=embedding,
            about={} if self.privacy is None else {"privacy": self.privacy.to_json()},
        )
        return artifact.with_backbone(Path(backbone_directory), section)


def embed_records(
    records: Sequence[Record],
    backbone: Backbone,
    scale: float,
    *,
    progress: Callable[[int], None] | None = None,
) -> list[EmbeddedRecord]:
    """Records with the embeddings of their tokens; texts are cut at the backbone's `max_tokens`.

    Raises:
        BackboneError: when the backbone embeds whole texts.
    """
    found = []
    for place, record in enumerate(records, start=1):
        [[window]] = backbone.embed_tokens([record.text])
        embeddings = project(window.embeddings, scale).astype(np.float32)  # [tokens, d]
        found.append(EmbeddedRecord(window.tokens, embeddings, record.entities))
        if progress is not None:
            progress(place)
    return found


def fit_tagger(
    records: Sequence[EmbeddedRecord],
    labels: Sequence[str],
    privacy: PrivacyBudget | None = None,
    *,
    insecure_noise: Noise | None = None,
) -> Tagger:
    """Train a head on the tokens of records.

    Args:
        records: what it is trained on.
        labels: every kind of entity, public.
        privacy: a budget of differential privacy, for records (`dp_records`).
        insecure_noise: as in `fit_private_tagger`.

    Raises:
        DatasetError: when a kind has no entity to be trained on.
        PrivacyError: when there are too few records for the budget.
        ModelError: when a package of the `train` extra is not installed.
    """
    _check_trainable(records, labels, privacy)
    tags = tags_of(labels)
    targets = [tag_tokens(one.tokens, one.entities, tags) for one in records]  # [tokens] each
    if privacy is not None:
        pairs = [(one.embeddings, found) for one, found in zip(records, targets, strict=True)]
        fit = fit_private_tagger(pairs, len(tags), privacy, insecure_noise=insecure_noise)
        return Tagger(fit.weight, fit.bias, tags, fit.statement)
    # A kind that stands only beyond where texts are cut has no token.
    present, numbers = np.unique(np.concatenate(targets), return_inverse=True)
    embeddings = np.concatenate([one.embeddings for one in records])  # [tokens, d]
    weight, bias = fit_head(embeddings, numbers.astype(np.intp), len(present))
    return Tagger(weight, bias, tuple(tags[number] for number in present))


def calibrated_scale(backbone: Backbone) -> EmbeddingSection:
    """The embedding scale for the tokens of a backbone: it depends on nothing else.

    Raises:
        DatasetError: when all embeddings of random words are zero, or one is not finite.
    """
    texts = generated_texts(backbone.tokenizer, backbone.section.max_tokens)
    norms = np.concatenate(
        [
            np.linalg.norm(window.embeddings, axis=1)
            for windows in backbone.embed_tokens(texts)
            for window in windows
        ]
    )  # [tokens]
    exact = float(np.quantile(norms, SCALE_QUANTILE))
    if not 0 < exact < math.inf:
        raise DatasetError("the backbone's embeddings of random words are zero or not finite")
    step = 10.0 ** (math.floor(math.log10(exact)) - 2)
    return EmbeddingSection(
        scale=math.ceil(exact / step) * step,
        scale_origin="calibrated",
        calibration=CalibrationSection(rows=len(norms), quantile=SCALE_QUANTILE, margin=1.0),
    )


def train_tagger_artifact(
    dataset: RecordDataset,
    backbone_directory: str | Path,
    section: BackboneSection,
    *,
    name: str | None = None,
    parameters: str = "standard",
    device: str = "auto",
    privacy: PrivacyBudget | None = None,
    policy: PolicySection | None = None,
    progress: Progress | None = None,
) -> tuple[HeadArtifact, EntityReport]:
    """Train a head for the tokens of a training split and make it an artefact, backbone included.

    The report is of the test split. Entities behind the backbone's `max_tokens` count as missed.
    The same data, backbone and machine give the same head, unless there is a privacy budget; then
    the manifest says what is guaranteed, in `about.privacy`. It says nothing else of the records.

    Args:
        dataset: every kind of entity must occur in its training split.
        backbone_directory: holds the files of the backbone.
        section: of an encoder, whose tokens are embedded (`token_backbone`).
        name: the model's name; by default the directory's it is saved to.
        parameters: `standard` or `compact`.
        device: where the backbone runs.
        privacy: train under this budget of differential privacy, for records (`dp_records`).
        policy: what the vendor asks of both sides.
        progress: called with the texts embedded so far, and the texts of both splits.

    Raises:
        BackboneError: when the backbone cannot be loaded, or embeds no tokens.
        DatasetError: when a kind has no entity to be trained on.
        PrivacyError: when there are too few records for the budget.
        ModelError: when a package of the `train` extra is not installed.
        ParameterError: when there is no such parameter set.
        ScaleError: when the parameter set cannot carry the head.
        ManifestError: when labels or name are not what a manifest may hold, or the head would
            break the policy; the clause is named.
    """
    check_promises(tags_of(dataset.labels), name, parameters, privacy, policy)
    _check_trainable(dataset.train, dataset.labels, privacy)
    directory, of_tokens = token_backbone(backbone_directory, section)
    backbone = Backbone.load(directory, of_tokens, device=device)
    embedding = calibrated_scale(backbone)
    rows = len(dataset.train)
    total = rows + len(dataset.test)

    def embed(records: Sequence[Record], before: int) -> list[EmbeddedRecord]:
        report = None if progress is None else lambda done: progress(before + done, total)
        return embed_records(records, backbone, embedding.scale, progress=report)

    head = fit_tagger(embed(dataset.train, 0), dataset.labels, privacy)
    report = head.report(embed(dataset.test, rows), dataset.labels, train_records=rows)
    artifact = head.artifact(
        embedding, directory, of_tokens, name=name, parameters=parameters, policy=policy
    )
    return artifact, report


def _check_trainable(
    records: Sequence[Record] | Sequence[EmbeddedRecord],
    labels: Sequence[str],
    privacy: PrivacyBudget | None,
) -> None:
    missing = set(labels) - {entity.label for record in records for entity in record.entities}
    if missing:
        raise DatasetError(
            f"{len(missing)} of {len(labels)} kinds of entities have none in the training split, "
            "expected one of each"
        )
    if privacy is not None:
        privacy.check_rows(len(records), len(tags_of(labels)))
