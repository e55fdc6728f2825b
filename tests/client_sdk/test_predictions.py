from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit, softmax

from veilhead import Prediction
from veilhead.evaluation import evaluate
from veilhead.predictions import predictions, scores


def test_scores_are_softmax_even_of_large_logits():
    logits = np.array([[1.0, 2.0, 3.0], [4000.0, -4000.0, 3999.0]])
    assert scores(logits, "softmax") == pytest.approx(softmax(logits, axis=1))


def test_a_single_logit_is_a_sigmoid():
    assert scores(np.array([0.3]), "sigmoid")[0] == pytest.approx(expit(0.3))


@pytest.mark.parametrize("function", ["softmax", "sigmoid"])
def test_no_score_is_subnormal(function):
    """They are slow, and the service chooses what a reply decrypts to."""
    logits = (
        np.linspace(-1500, 0, 4096) if function == "softmax" else np.linspace(-1500, 1500, 4096)
    )
    with np.errstate(all="raise"):
        found = scores(logits, function)
    assert (found == 0).any()
    assert found[found > 0].min() >= np.finfo(np.float64).smallest_normal
    expected = softmax(logits) if function == "softmax" else expit(logits)
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-290)


@pytest.mark.parametrize("seed", range(5))
def test_the_best_label_is_the_first_of_all_of_them_sorted(seed):
    logits = np.random.default_rng(seed).integers(-3, 4, size=50).astype(np.float64)  # with ties
    labels = [f"{number}" for number in range(50)]
    assert predictions(logits, labels, 1) == predictions(logits, labels, None)[:1]


def test_predictions_come_best_first_and_ties_in_label_order():
    found = predictions(np.array([1.0, 5.0, 1.0]), ["a", "b", "c"], None)
    assert [item.label for item in found] == ["b", "a", "c"]
    assert predictions(np.array([1.0, 5.0, 1.0]), ["a", "b", "c"], 1) == found[:1]


def test_a_prediction_is_frozen():
    prediction = Prediction("a", 0.5)
    with pytest.raises(AttributeError):
        prediction.label = "b"


def test_evaluation_agrees_with_scikit_learn():
    from sklearn.metrics import precision_recall_fscore_support

    generator = np.random.default_rng(0)
    truth = [str(value) for value in generator.integers(0, 4, size=200)]
    answers = [str(value) for value in generator.integers(0, 5, size=200)]
    found = evaluate(truth, answers)
    labels = sorted(set(truth) | set(answers))
    expected = precision_recall_fscore_support(truth, answers, labels=labels, zero_division=0)
    for column, name in enumerate(("precision", "recall", "f1", "support")):
        assert [getattr(item, name) for item in found.labels] == pytest.approx(expected[column])
    assert found.accuracy == np.mean(np.array(truth) == np.array(answers))


def test_evaluation_counts_what_failed_apart():
    found = evaluate(["a", "b", "a"], ["a", None, "b"])
    assert (found.answered, found.failed, found.accuracy) == (2, 1, 0.5)
    assert evaluate(["a"], [None]).accuracy == 0
