"""Shapes of answers: those of the transformers pipeline, of scikit-learn and of pandas."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from veilhead import BatchError, InputError, Prediction
from veilhead.predictions import Shape
from veilhead_models.artifact import HeadArtifact

NOISE = 2e-3

#: The names of problem types: ours, and those of transformers.
PROBLEMS = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}


@pytest.mark.parametrize("top_k", [1, 2, None])
@pytest.mark.parametrize("function", [None, "softmax", "sigmoid", "none"])
@pytest.mark.parametrize("problem_type", PROBLEMS)
@pytest.mark.parametrize("classes", [1, 3])
def test_predictions_are_those_of_the_transformers_pipeline(top_k, function, problem_type, classes):
    import torch
    from transformers import TextClassificationPipeline
    from transformers.pipelines.text_classification import ClassificationFunction

    logits = np.array([0.5, -3.0, 2.25])[:classes]
    labels = [f"label {index}" for index in range(classes)]
    config = SimpleNamespace(
        problem_type=PROBLEMS[problem_type], num_labels=classes, id2label=dict(enumerate(labels))
    )
    expected = TextClassificationPipeline.postprocess(
        SimpleNamespace(model=SimpleNamespace(config=config)),
        {"logits": torch.tensor(logits[np.newaxis])},
        function_to_apply=None if function is None else ClassificationFunction[function.upper()],
        top_k=top_k,
        _legacy=False,
    )
    head = HeadArtifact.from_weights(
        np.eye(classes, 4), None, labels, name="model", problem_type=problem_type
    ).manifest.head
    found = [item.to_dict() for item in Shape.of(head, top_k, function).predictions(logits)]
    assert [item["label"] for item in found] == [item["label"] for item in expected]
    assert [item["score"] for item in found] == pytest.approx(
        [item["score"] for item in expected], abs=1e-6
    )


def test_predictions_compare_and_become_dictionaries():
    assert Prediction("red", 0.5) == Prediction("red", 0.5) != Prediction("red", 0.6)
    assert Prediction("red", 0.5).to_dict() == {"label": "red", "score": 0.5}


def test_labels_that_do_not_exclude_each_other_have_scores_of_their_own(
    connect, problem_artifacts, texts
):
    client, _ = connect(problem_artifacts["multi_label"])
    logits = HeadArtifact.load(problem_artifacts["multi_label"]).logits(client.embed(texts[:9]))
    expected = 1 / (1 + np.exp(-logits))
    assert client.predict_proba(texts[:9]) == pytest.approx(expected, abs=NOISE)
    for row, scores in zip(client.classify(texts[:9], top_k=None), expected, strict=True):
        assert sorted(item.score for item in row) == pytest.approx(sorted(scores), abs=NOISE)
    one, other = client.classify(texts[0], top_k=2, function_to_apply="softmax")
    assert one.score + other.score < 1


def test_numbers_are_the_logits(connect, problem_artifacts, texts):
    client, _ = connect(problem_artifacts["regression"])
    found = [row[0].score for row in client.classify(texts[:9])]
    logits = HeadArtifact.load(problem_artifacts["regression"]).logits(client.embed(texts[:9]))
    assert found == pytest.approx(logits[:, 0], abs=NOISE)
    with pytest.raises(InputError, match="numbers"):
        client.predict_proba(texts)


def test_scikit_learn_can_judge_it(connect, text_artifact, texts):
    from sklearn.metrics import accuracy_score, log_loss, roc_auc_score

    client, _ = connect(text_artifact)
    plain = HeadArtifact.load(text_artifact).logits(client.embed(texts))
    shifted = np.exp(plain - plain.max(axis=1, keepdims=True))
    expected = shifted / shifted.sum(axis=1, keepdims=True)
    truth = [client.labels[place] for place in plain.argmax(axis=1)]
    probabilities = client.predict_proba(texts)
    assert probabilities == pytest.approx(expected, abs=NOISE)
    assert probabilities.dtype == np.float64
    assert accuracy_score(truth, client.predict(texts)) >= 0.97
    # scikit-learn wants columns in the order of the sorted labels.
    order = np.argsort(client.labels)
    labels = sorted(client.labels)
    loss = log_loss(truth, probabilities[:, order], labels=labels)
    assert loss == pytest.approx(log_loss(truth, expected[:, order], labels=labels), abs=NOISE)
    is_first = [label == client.labels[0] for label in truth]
    assert roc_auc_score(is_first, probabilities[:, 0]) == pytest.approx(
        roc_auc_score(is_first, expected[:, 0]), abs=0.02
    )


def test_predictions_that_fail_keep_the_others(connect, text_artifact):
    client, _ = connect(text_artifact)
    for method in (client.predict, client.predict_proba):
        with pytest.raises(BatchError) as caught:
            method(["pain", None, "fever"])
        assert list(caught.value.errors) == [1]


def test_a_series_gives_a_frame_of_the_same_index(connect, text_artifact, texts):
    client, _ = connect(text_artifact)
    series = pd.Series([*texts[:3], None, texts[3]], index=list("vwxyz"), name="note")
    frame = client.classify_frame(series, top_k=2)
    assert list(frame.columns) == ["label", "score", "label_2", "score_2", "error"]
    assert frame.index.equals(series.index)
    expected = client.classify(texts[:4], top_k=2)
    answered = frame.drop(index="y")
    assert answered["score"].tolist() == pytest.approx(
        [row[0].score for row in expected], abs=NOISE
    )
    assert set(answered["label"]) | set(answered["label_2"]) <= set(client.labels)
    assert answered["error"].isna().all()
    assert frame.loc["y"].drop("error").isna().all()
    assert "expected a string" in frame.loc["y", "error"]
    assert frame["score"].dtype == np.float64
    joined = series.to_frame().join(client.classify_frame(series))
    assert list(joined.columns) == ["note", "label", "score", "error"]


def test_an_empty_series_gives_an_empty_frame(connect, text_artifact):
    client, _ = connect(text_artifact)
    frame = client.classify_frame(pd.Series([], dtype=object))
    assert (len(frame), list(frame.columns)) == (0, ["label", "score", "error"])


def test_a_series_is_a_list_of_texts_elsewhere(connect, text_artifact, texts):
    client, _ = connect(text_artifact)
    assert len(client.classify(pd.Series(texts[:3], index=[7, 8, 9]))) == 3
    assert client.predict(np.array(texts[:3])) == client.predict(texts[:3])
