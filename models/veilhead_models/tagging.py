"""Training of a token head: a linear head on the embeddings of single tokens, and what it finds.

The head is a multinomial logistic regression, as in `training`. Its report counts entities that
clients would get, from the plaintext logits that the encrypted ones approach.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from veilhead_models.artifact import HeadArtifact
from veilhead_models.backbone import Backbone, token_section
from veilhead_models.checkpoint import generated_texts
from veilhead_models.dp_records import fit_private_tagger
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
class TrainedTagger:
    """A trained head for tokens.

    Attributes:
        weight: [C, d], private.
        bias: [C], private.
        tags: the C tags.
        embedding: what embeddings are divided by before they are projected.
        report: what it scores.
        privacy: what is guaranteed to whoever was trained on; None without a privacy budget.
    """

    weight: NDArray[np.float64]
    bias: NDArray[np.float64]
    tags: tuple[str, ...]
    embedding: EmbeddingSection
    report: EntityReport
    privacy: PrivacyStatement | None = None

    def __repr__(self) -> str:
        classes, dimensions = self.weight.shape
        return f"TrainedTagger(classes={classes}, dimensions={dimensions})"


@dataclass(frozen=True, eq=False)
class _Embedded:
    """A record's tokens, and their embeddings [tokens, d] in the unit ball."""

    tokens: tuple[Token, ...]
    embeddings: NDArray[np.float32]
    entities: tuple[Entity, ...]


def train_tagger(
    dataset: RecordDataset,
    backbone: Backbone,
    *,
    privacy: PrivacyBudget | None = None,
    progress: Progress | None = None,
) -> TrainedTagger:
    """Train a linear head on the tokens of a training split and judge it by the test split.

    Long texts are cut at the backbone's `max_tokens`; entities behind that count as missed. The
    same data, backbone and machine give the same head, unless there is a privacy budget.

    Args:
        dataset: every kind of entity must occur in its training split.
        backbone: embeds tokens, and stays as it is.
        privacy: train under this budget of differential privacy, for records (`dp_records`).
        progress: called with the texts embedded so far, and the texts of both splits.

    Raises:
        DatasetError: when a kind has no entity to be trained on.
        PrivacyError: when there are too few records for the budget.
        ModelError: when a package of the `train` extra is not installed.
    """
    seen = {entity.label for record in dataset.train for entity in record.entities}
    missing = set(dataset.labels) - seen
    if missing:
        raise DatasetError(
            f"{len(missing)} of {len(dataset.labels)} kinds of entities have none in the training "
            "split, expected one of each"
        )
    tags = tags_of(dataset.labels)
    if privacy is not None:
        privacy.check_rows(len(dataset.train), len(tags))
    embedding = calibrated_scale(backbone)
    total = len(dataset.train) + len(dataset.test)

    def embed(records: Sequence[Record], before: int) -> list[_Embedded]:
        found = []
        for place, record in enumerate(records, start=1):
            [[window]] = backbone.embed_tokens([record.text])
            embeddings = project(window.embeddings, embedding.scale).astype(np.float32)
            found.append(_Embedded(window.tokens, embeddings, record.entities))
            if progress is not None:
                progress(before + place, total)
        return found

    train = embed(dataset.train, 0)
    test = embed(dataset.test, len(train))
    targets = [tag_tokens(one.tokens, one.entities, tags) for one in train]  # [tokens] each
    statement = None
    if privacy is None:
        stacked = np.concatenate(targets)  # [tokens]
        # A kind whose entities are all of one token has no tag that goes on.
        present, numbers = np.unique(stacked, return_inverse=True)
        tags = tuple(tags[number] for number in present)
        embeddings = np.concatenate([one.embeddings for one in train])  # [tokens, d]
        weight, bias = fit_head(embeddings, numbers.astype(np.intp), len(tags))
    else:
        pairs = [(one.embeddings, found) for one, found in zip(train, targets, strict=True)]
        fit = fit_private_tagger(pairs, len(tags), privacy)
        weight, bias, statement = fit.weight, fit.bias, fit.statement
    answered = []
    for one in test:
        logits = one.embeddings @ weight.T + bias  # [tokens, C]
        answers = [tags[number] for number in logits.argmax(axis=1)]
        answered.append(list(tagged_entities(one.tokens, answers)))
    report = EntityReport.of_entities(
        [one.entities for one in test], answered, dataset.labels, train_records=len(train)
    )
    return TrainedTagger(
        weight=weight / embedding.scale,
        bias=bias,
        tags=tags,
        embedding=embedding,
        report=report,
        privacy=statement,
    )


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
    parameters: str = "compact",
    device: str = "auto",
    privacy: PrivacyBudget | None = None,
    policy: PolicySection | None = None,
    progress: Progress | None = None,
) -> tuple[HeadArtifact, EntityReport]:
    """Train a head for tokens and make it an artefact, backbone included.

    Under a privacy budget the manifest says what is guaranteed, in `about.privacy`. It never says
    anything else of the records.

    Args:
        dataset: as `train_tagger` takes it.
        backbone_directory: holds the files of the backbone.
        section: of an encoder, whose tokens are embedded (`token_section`).
        name: the model's name; by default the directory's it is saved to.
        parameters: `compact` or `strong`.
        device: where the backbone runs.
        privacy: as `train_tagger` takes it.
        policy: what the vendor asks of both sides.
        progress: as `train_tagger` calls it.

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
    of_tokens = token_section(backbone_directory, section)
    backbone = Backbone.load(backbone_directory, of_tokens, device=device)
    head = train_tagger(dataset, backbone, privacy=privacy, progress=progress)
    artifact = HeadArtifact.from_weights(
        head.weight,
        head.bias,
        head.tags,
        name=name,
        parameters=parameters,
        policy=policy,
        embedding_scale=head.embedding,
        about={} if head.privacy is None else {"privacy": head.privacy.to_json()},
    )
    return artifact.with_backbone(Path(backbone_directory), of_tokens), head.report
