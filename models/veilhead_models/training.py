"""Training: a linear head on the embeddings of a frozen backbone, and what it scores.

The head is a multinomial logistic regression. Its report is made on the held-out split, from the
plaintext logits that the encrypted ones approach.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from veilhead_models.artifact import HeadArtifact
from veilhead_models.backbone import Backbone
from veilhead_models.datasets import Dataset
from veilhead_models.dp_training import fit_private_head
from veilhead_models.privacy import PrivacyBudget, PrivacyStatement
from veilhead_protocol.errors import DatasetError, ManifestError, ModelError, PrivacyError
from veilhead_protocol.manifest import BackboneSection
from veilhead_protocol.policy import PolicySection
from veilhead_protocol.scales import project

#: Inverse strength of the L2 penalty (scikit-learn's C), for embeddings in the unit ball. Chosen on
#: the training split of icd10-chapters, three folds by category: accuracy 0.690, 0.691, 0.687,
#: 0.682, 0.662 and negative log-likelihood 1.12, 1.10, 1.11, 1.14, 1.41 at 1, 2, 3, 5, 30. Balanced
#: class weights gained less than 0.006, and spoil the probabilities of unbalanced data.
INVERSE_PENALTY: Final = 2.0

#: Bins of equal width for the calibration error.
CALIBRATION_BINS: Final = 15

#: For a backbone whose output is not normalised: the scale is this times the largest training norm.
SCALE_MARGIN: Final = 1.1

_MAX_ITERATIONS: Final = 2000

#: Called with texts embedded so far, and texts to embed.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ClassScores:
    """Scores of one class; a score with nothing to divide by is 0."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class ReliabilityBin:
    """Answers whose highest probability is above `lower` and at most `upper`.

    `confidence` is the mean of that probability and `accuracy` the share that is right; both are 0
    in an empty bin.
    """

    lower: float
    upper: float
    rows: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class TrainingReport:
    """What a head scores on rows that it was not trained on.

    Attributes:
        train_rows: rows it was trained on.
        test_rows: rows it is judged by.
        accuracy: share of these whose highest logit is the right one.
        macro_f1: mean of the classes' F1.
        negative_log_likelihood: mean of -ln(probability of the right class).
        brier: mean over rows of the squared distance between probabilities and the right class.
        calibration_error: expected calibration error over `reliability`.
        reliability: `CALIBRATION_BINS` bins.
        classes: scores by class, in the order of the labels.
    """

    train_rows: int
    test_rows: int
    accuracy: float
    macro_f1: float
    negative_log_likelihood: float
    brier: float
    calibration_error: float
    reliability: tuple[ReliabilityBin, ...]
    classes: tuple[ClassScores, ...]

    @classmethod
    def of_logits(
        cls,
        logits: NDArray[np.float64],
        targets: NDArray[np.intp],
        labels: Sequence[str],
        *,
        train_rows: int,
    ) -> TrainingReport:
        """The report of logits [rows, C] whose right classes are targets [rows].

        Raises:
            DatasetError: when there are no rows, or the shapes do not fit together.
        """
        rows = len(targets)
        if rows == 0 or logits.shape != (rows, len(labels)):
            raise DatasetError(
                f"got logits of shape {list(logits.shape)} for {rows} rows and {len(labels)} "
                "labels, expected [rows, labels] and at least one row"
            )
        shifted = logits - logits.max(axis=1, keepdims=True)  # [rows, C]
        logarithms = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))  # [rows, C]
        probabilities = np.exp(logarithms)  # [rows, C]
        answers = logits.argmax(axis=1)  # [rows]
        right = answers == targets  # [rows]
        distances = probabilities - np.eye(len(labels))[targets]  # [rows, C]
        reliability = _reliability(probabilities.max(axis=1), right)
        classes = tuple(
            _class_scores(label, answers == index, targets == index)
            for index, label in enumerate(labels)
        )
        return cls(
            train_rows=train_rows,
            test_rows=rows,
            accuracy=float(right.mean()),
            macro_f1=float(np.mean([scores.f1 for scores in classes])),
            negative_log_likelihood=float(-logarithms[np.arange(rows), targets].mean()),
            brier=float((distances**2).sum(axis=1).mean()),
            calibration_error=sum(
                found.rows / rows * abs(found.accuracy - found.confidence) for found in reliability
            ),
            reliability=reliability,
            classes=classes,
        )

    def to_json(self) -> dict[str, Any]:
        """The report as something that JSON can carry."""
        return asdict(self)

    def render(self) -> str:
        """The report as a table for a terminal, without a newline at its end."""
        width = min(46, max(len(scores.label) for scores in self.classes))
        lines = [
            f"accuracy {self.accuracy:.4f} on {self.test_rows} held-out rows",
            f"trained on {self.train_rows} rows",
            f"macro F1 {self.macro_f1:.4f}, calibration error {self.calibration_error:.4f}",
            f"negative log-likelihood {self.negative_log_likelihood:.4f}, Brier {self.brier:.4f}",
            "",
            f"{'class':<{width}}  precision  recall      f1  rows",
        ]
        for scores in self.classes:
            label = scores.label
            if len(label) > width:
                label = label[: width - 3] + "..."
            lines.append(
                f"{label:<{width}}  {scores.precision:9.3f}  {scores.recall:6.3f}  "
                f"{scores.f1:6.3f}  {scores.support:4d}"
            )
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class TrainedHead:
    """A trained head, for embeddings as the backbone makes them.

    Attributes:
        weight: [C, d], private.
        bias: [C], private.
        embedding_scale: what embeddings are divided by before they are projected.
        report: what it scores.
        privacy: what is guaranteed to whoever was trained on; None without a privacy budget.
    """

    weight: NDArray[np.float64]
    bias: NDArray[np.float64]
    embedding_scale: float
    report: TrainingReport
    privacy: PrivacyStatement | None = None

    def __repr__(self) -> str:
        classes, dimensions = self.weight.shape
        return f"TrainedHead(classes={classes}, dimensions={dimensions})"


def train_head(
    dataset: Dataset,
    backbone: Backbone,
    *,
    privacy: PrivacyBudget | None = None,
    progress: Progress | None = None,
) -> TrainedHead:
    """Train a linear head on a data set's training split and judge it by its test split.

    The same data, backbone and machine give the same head, unless there is a privacy budget.

    Args:
        dataset: every label must occur in its training split.
        backbone: makes the embeddings, and stays as it is.
        privacy: train under this budget of differential privacy (`dp_training`).
        progress: called with the texts embedded so far, and the texts of both splits.

    Raises:
        DatasetError: when a label has no row to be trained on.
        PrivacyError: when the data or the backbone cannot be trained on under the budget.
        ModelError: when a package of the `train` extra is not installed.
    """
    classes = len(dataset.labels)
    missing = sorted(set(range(classes)) - set(dataset.train.targets.tolist()))
    if classes < 2 or missing:
        raise DatasetError(
            f"{len(missing)} of {classes} labels have no row in the training split, "
            "expected at least two labels and a row for each"
        )
    rows = len(dataset.train.texts)
    total = rows + len(dataset.test.texts)
    if privacy is not None:
        privacy.check_rows(rows, classes)
        if not backbone.section.normalise:
            raise PrivacyError(
                "the backbone's embeddings are not normalised, and their scale would be read off "
                "the private rows: differential privacy needs a backbone that normalises"
            )

    def embed(texts: Sequence[str], before: int) -> NDArray[np.float64]:
        report = None if progress is None else lambda done: progress(before + done, total)
        return backbone.embed(texts, progress=report)

    train = embed(dataset.train.texts, 0)  # [rows, d]
    test = embed(dataset.test.texts, rows)  # [test rows, d]
    scale = 1.0
    if not backbone.section.normalise:
        scale = SCALE_MARGIN * float(np.linalg.norm(train, axis=1).max())
    statement = None
    if privacy is None:
        weight, bias = fit_head(project(train, scale), dataset.train.targets, classes)
    else:
        fit = fit_private_head(train, dataset.train.targets, classes, privacy)
        weight, bias, statement = fit.weight, fit.bias, fit.statement
    logits = project(test, scale) @ weight.T + bias  # [test rows, C]
    report = TrainingReport.of_logits(logits, dataset.test.targets, dataset.labels, train_rows=rows)
    return TrainedHead(
        weight=weight / scale,
        bias=bias,
        embedding_scale=scale,
        report=report,
        privacy=statement,
    )


def fit_head(
    embeddings: NDArray[np.floating[Any]], targets: NDArray[np.intp], classes: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weight [C, d] and bias [C] of the head of embeddings [rows, d] in the unit ball.

    Every class must occur in targets [rows].

    Raises:
        ModelError: when scikit-learn is not installed.
    """
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ModelError(
            "training needs scikit-learn, which is not installed: pip install 'veilhead[train]'"
        ) from error
    model = LogisticRegression(C=INVERSE_PENALTY, max_iter=_MAX_ITERATIONS)
    with warnings.catch_warnings():
        # The penalty keeps the problem well-conditioned; what is left after so many iterations is
        # far below the differences between data splits, and the report judges the result anyway.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(embeddings, targets)
    weight = np.asarray(model.coef_, dtype=np.float64)  # [C, d], or [1, d] for two classes
    bias = np.asarray(model.intercept_, dtype=np.float64)
    if classes == 2:
        # One row stands for the difference of two logits; halved, it gives the same softmax.
        weight = np.concatenate([-weight, weight]) / 2  # [2, d]
        bias = np.concatenate([-bias, bias]) / 2  # [2]
    return weight, bias


def train_artifact(
    dataset: Dataset,
    backbone_directory: str | Path,
    section: BackboneSection,
    *,
    name: str | None = None,
    parameters: str = "standard",
    device: str = "auto",
    privacy: PrivacyBudget | None = None,
    policy: PolicySection | None = None,
    progress: Progress | None = None,
) -> tuple[HeadArtifact, TrainingReport]:
    """Train a head on a data set and make it an artefact, backbone included.

    What a published data set is called, where it comes from and how many rows it has goes into the
    manifest; of a table of one's own, nothing does. Scores never do. Under a privacy budget the
    manifest says what is guaranteed, in `about.privacy`, and not how many rows there were.

    Raises:
        BackboneError: when the backbone cannot be loaded.
        DatasetError: when a label has no row to be trained on.
        PrivacyError: when the data or the backbone cannot be trained on under the budget.
        ModelError: when a package of the `train` extra is not installed.
        ParameterError: when there is no such parameter set.
        ScaleError: when the parameter set cannot carry the head.
        ManifestError: when labels or name are not what a manifest may hold, or the head would
            break the policy; the clause is named.
    """
    check_promises(dataset.labels, name, parameters, privacy, policy)
    backbone = Backbone.load(backbone_directory, section, device=device)
    head = train_head(dataset, backbone, privacy=privacy, progress=progress)
    about: dict[str, Any] = {}
    if dataset.license is not None:
        about["dataset"] = {
            "name": dataset.name,
            "source": dataset.source,
            "license": dataset.license,
        }
        if head.privacy is None:
            about["dataset"] |= {
                "train_rows": head.report.train_rows,
                "test_rows": head.report.test_rows,
            }
    if head.privacy is not None:
        about["privacy"] = head.privacy.to_json()
    artifact = HeadArtifact.from_weights(
        head.weight,
        head.bias,
        dataset.labels,
        name=name,
        parameters=parameters,
        policy=policy,
        embedding_scale=head.embedding_scale,
        about=about,
    )
    return artifact.with_backbone(Path(backbone_directory), section), head.report


def check_promises(
    labels: Sequence[str],
    name: str | None,
    parameters: str,
    privacy: PrivacyBudget | None,
    policy: PolicySection | None,
) -> None:
    """Refuse what no artefact could be made of, before the long work and not after it.

    Raises:
        ArtifactError: when the labels are wrong.
        ParameterError: when there is no such parameter set.
        ManifestError: as `train_artifact` does.
    """
    HeadArtifact.from_weights(  # a head of zeros
        np.zeros((len(labels), 1)), None, labels, name=name, parameters=parameters
    )
    promised = None if privacy is None else {"epsilon": privacy.epsilon, "delta": privacy.delta}
    for violation in (policy or PolicySection()).violations(parameters, {"privacy": promised}):
        raise ManifestError(f"policy.{violation}")


def _class_scores(
    label: str, answered: NDArray[np.bool_], actual: NDArray[np.bool_]
) -> ClassScores:
    hits = int((answered & actual).sum())
    answers, support = int(answered.sum()), int(actual.sum())
    return ClassScores(
        label=label,
        precision=hits / answers if answers else 0.0,
        recall=hits / support if support else 0.0,
        f1=2 * hits / (answers + support) if answers + support else 0.0,
        support=support,
    )


def _reliability(
    confidence: NDArray[np.float64], right: NDArray[np.bool_]
) -> tuple[ReliabilityBin, ...]:
    """Confidence [rows] and correctness [rows] in bins of equal width."""
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
    places = np.clip(np.ceil(confidence * CALIBRATION_BINS), 1, CALIBRATION_BINS) - 1  # [rows]
    bins: list[ReliabilityBin] = []
    for index in range(CALIBRATION_BINS):
        inside = places == index  # [rows]
        rows = int(inside.sum())
        bins.append(
            ReliabilityBin(
                lower=float(edges[index]),
                upper=float(edges[index + 1]),
                rows=rows,
                confidence=float(confidence[inside].mean()) if rows else 0.0,
                accuracy=float(right[inside].mean()) if rows else 0.0,
            )
        )
    return tuple(bins)
