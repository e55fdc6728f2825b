"""Private training: the sums and their sensitivity, the noise, and what the manifest says."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.backbones import WORDS
from typer.testing import CliRunner

from veilhead_models.artifact import HeadArtifact
from veilhead_models.backbone import Backbone, describe
from veilhead_models.datasets import Dataset, Split
from veilhead_models.dp_training import (
    BIAS_INPUT,
    CLIP_NORM,
    STEPS,
    ClippedSums,
    discrete_gaussian,
    fit_private_head,
    step_size,
)
from veilhead_models.privacy import PrivacyBudget, Release, closed_form_epsilon
from veilhead_models.training import train_artifact, train_head
from veilhead_protocol.errors import DatasetError, PrivacyError
from veilhead_service.cli import app

GRID = 2**36


def rows_of(
    classes: int, rows: int, dimensions: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Unit embeddings around one centre a class, and the classes."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(1).normal(size=(classes, dimensions))
    targets = generator.integers(0, classes, rows).astype(np.intp)
    embeddings = centres[targets] + generator.normal(size=(rows, dimensions))
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True), targets


class TestSums:
    def test_they_are_the_clipped_gradients_of_torch(self) -> None:
        embeddings, targets = rows_of(5, 40, 12)
        embeddings[::3] *= 0.2  # some gradients within the clip norm, some beyond
        parameters = np.random.default_rng(2).normal(size=(5, 13))
        inputs = np.concatenate([embeddings, np.full((40, 1), BIAS_INPUT)], axis=1)

        def loss(weights: torch.Tensor, row: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.cross_entropy((weights @ row)[None], target[None])

        gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(
            torch.tensor(parameters), torch.tensor(inputs), torch.tensor(targets)
        )
        norms = gradients.flatten(1).norm(dim=1)
        assert 0 < (norms > CLIP_NORM).sum() < 40
        clipped = gradients * (CLIP_NORM / norms).clamp(max=1)[:, None, None]
        sums = ClippedSums(embeddings, targets, 5).at(parameters)
        np.testing.assert_allclose(sums / GRID, clipped.sum(0).numpy(), atol=40 * 2e-5)

    @settings(max_examples=40, deadline=None)
    @given(
        seed=st.integers(0, 2**32 - 1),
        rows=st.integers(1, 30),
        spread=st.sampled_from([0.0, 1.0, 1e3, 1e300]),
        length=st.sampled_from([0.0, 1e-3, 1.0, 50.0]),
    )
    def test_no_row_changes_them_by_more_than_the_clip_norm(
        self, seed: int, rows: int, spread: float, length: float
    ) -> None:
        generator = np.random.default_rng(seed)
        embeddings, targets = rows_of(4, rows, 6, seed)
        embeddings[-1] *= length
        parameters = spread * generator.normal(size=(4, 7))
        whole = ClippedSums(embeddings, targets, 4).at(parameters)
        without = ClippedSums(embeddings[:-1], targets[:-1], 4).at(parameters)
        # In whole numbers: no rounding hides anything.
        squared = sum(int(value) ** 2 for value in (whole - without).ravel())
        assert squared <= int(CLIP_NORM * GRID) ** 2
        alone = ClippedSums(embeddings[-1:], targets[-1:], 4).at(parameters)
        assert (whole - without == alone).all()

    def test_they_do_not_depend_on_the_order_of_rows_not_even_in_the_last_bit(self) -> None:
        embeddings, targets = rows_of(7, 3000, 48)
        order = np.random.default_rng(3).permutation(3000)
        parameters = np.random.default_rng(4).normal(size=(7, 49))
        one = ClippedSums(embeddings, targets, 7).at(parameters)
        other = ClippedSums(embeddings[order], targets[order], 7).at(parameters)
        assert (one == other).all()

    def test_logits_are_exact_since_parameters_are_on_a_grid(self) -> None:
        embeddings, targets = rows_of(7, 3000, 48)
        generator = np.random.default_rng(5)
        whole = generator.integers(1, 2**17, (7, 49)).astype(np.float64)
        sums = ClippedSums(embeddings, targets, 7)
        on_grid = sums.at(whole / 2**16)
        assert (sums.at((whole + 0.9 * generator.random((7, 49))) / 2**16) == on_grid).all()
        assert (sums.at((whole + generator.integers(0, 2, (7, 49))) / 2**16) != on_grid).any()


class TestNoise:
    @pytest.mark.parametrize("scale", [1.5, 2.0**38])
    def test_the_sampler_has_the_scale_it_is_asked_for(self, scale: float) -> None:
        draws = discrete_gaussian(scale, 4000) / scale
        # Six standard errors: one run in 10^8 fails.
        assert abs(draws.mean()) < 6 / math.sqrt(4000)
        assert abs(draws.std() - 1) < 6 / math.sqrt(2 * 4000)
        assert abs((draws**4).mean() - 3) < 6 * math.sqrt(96 / 4000)

    def test_two_runs_never_draw_the_same(self) -> None:
        assert (discrete_gaussian(2.0**38, 50) != discrete_gaussian(2.0**38, 50)).all()

    @pytest.mark.parametrize("epsilon", [0.5, 4.0])
    def test_the_noise_that_is_drawn_is_worth_the_epsilon_that_is_claimed(
        self, epsilon: float
    ) -> None:
        drawn: list[tuple[float, int]] = []

        def listen(scale: float, count: int) -> np.ndarray:
            drawn.append((scale, count))
            return np.zeros(count, dtype=np.int64)

        embeddings, targets = rows_of(3, 500, 8)
        fit = fit_private_head(
            embeddings, targets, 3, PrivacyBudget(epsilon), insecure_noise=listen
        )
        (count_scale, one), *steps = drawn
        assert one == 1
        assert [count for _, count in steps] == [3 * 9] * STEPS
        releases = [Release(count_scale / GRID)]  # one row changes the count by one
        releases += [Release(scale / (CLIP_NORM * GRID)) for scale, _ in steps]
        assert closed_form_epsilon(tuple(releases), 1e-5) == pytest.approx(epsilon, rel=1e-4)
        assert fit.statement.epsilon == epsilon
        assert all(
            epsilon * 0.999 < found <= epsilon for found in fit.statement.accountants.values()
        )

    def test_every_step_is_noised_and_so_is_the_number_of_rows(self) -> None:
        embeddings, targets = rows_of(3, 500, 8)
        budget = PrivacyBudget(12.0)  # where the step does not follow the number of rows

        def fit(call: int) -> np.ndarray:
            """The head, with a large number in place of one of the noises."""
            calls = iter(range(STEPS + 1))

            def noise(scale: float, count: int) -> np.ndarray:
                return np.full(count, int(scale) if next(calls) == call else 0, dtype=np.int64)

            found = fit_private_head(embeddings, targets, 3, budget, insecure_noise=noise)
            return np.concatenate([found.weight.ravel(), found.bias])

        quiet = fit(-1)
        assert all(not np.allclose(fit(call), quiet, atol=1e-6) for call in (0, 1, 20, STEPS))


class TestFit:
    def test_a_private_head_learns(self) -> None:
        embeddings, targets = rows_of(3, 1500, 16)
        fit = fit_private_head(embeddings[:1000], targets[:1000], 3, PrivacyBudget(4.0))
        answers = (embeddings[1000:] @ fit.weight.T + fit.bias).argmax(axis=1)
        assert (answers == targets[1000:]).mean() > 0.9

    def test_two_runs_give_two_heads(self) -> None:
        embeddings, targets = rows_of(2, 300, 4)
        one, other = (
            fit_private_head(embeddings, targets, 2, PrivacyBudget(4.0)) for _ in range(2)
        )
        assert (one.weight != other.weight).all()
        assert (one.bias != other.bias).all()

    def test_an_embedding_that_is_not_finite_is_refused(self) -> None:
        embeddings, targets = rows_of(2, 300, 4)
        embeddings[7, 1] = np.nan
        with pytest.raises(DatasetError, match="NaN or infinity"):
            fit_private_head(embeddings, targets, 2, PrivacyBudget(4.0))

    def test_the_step_bounds_the_noise_of_a_logit(self) -> None:
        assert step_size(22, 14518, PrivacyBudget(4.0).mu) == 88
        mu = PrivacyBudget(1.0).mu
        step = step_size(22, 3000, mu)
        assert STEPS * step * CLIP_NORM / (mu * 3000) == pytest.approx(0.5)


def dataset_of(rows: int, *, terms: str | None) -> Dataset:
    generator = np.random.default_rng(0)

    def split(count: int) -> Split:
        targets = generator.integers(0, 2, count)
        texts = [
            " ".join([WORDS[target], *generator.choice(WORDS, 3)]) for target in targets.tolist()
        ]
        return Split(texts=tuple(texts), targets=targets.astype(np.intp))

    return Dataset("made-up", split(rows), split(30), ("no", "yes"), "here", terms)


class TestArtifact:
    def test_the_manifest_says_what_is_guaranteed_and_not_how_many_rows_there_were(
        self, tiny_directory: Path, tmp_path: Path
    ) -> None:
        artifact, report = train_artifact(
            dataset_of(300, terms="MIT"),
            tiny_directory,
            describe(tiny_directory),
            name="private",
            device="cpu",
            privacy=PrivacyBudget(4.0, 1e-6),
        )
        artifact.save(tmp_path / "private")
        about = HeadArtifact.load(tmp_path / "private").manifest.about
        assert about["dataset"] == {"name": "made-up", "source": "here", "license": "MIT"}
        privacy = about["privacy"]
        assert (privacy["epsilon"], privacy["delta"]) == (4.0, 1e-6)
        assert privacy["adjacency"] == "add-remove"
        assert len(privacy["accountants"]) == 2
        assert any("backbone" in what for what in privacy["not_covered"])
        assert any("constants" in what for what in privacy["not_covered"])
        assert "300" not in str(about)
        assert report.train_rows == 300

    def test_without_a_budget_nothing_is_claimed(self, tiny: Backbone) -> None:
        assert train_head(dataset_of(60, terms=None), tiny).privacy is None

    def test_few_rows_are_refused_before_anything_is_embedded(self, tiny: Backbone) -> None:
        called: list[int] = []
        with pytest.raises(PrivacyError, match="mostly noise"):
            train_head(
                dataset_of(20, terms=None),
                tiny,
                privacy=PrivacyBudget(4.0),
                progress=lambda done, total: called.append(done),
            )
        assert not called

    def test_a_backbone_whose_scale_would_come_from_the_rows_is_refused(
        self, tiny_directory: Path
    ) -> None:
        section = replace_normalise(describe(tiny_directory))
        with pytest.raises(PrivacyError, match="not normalised"):
            train_head(
                dataset_of(300, terms=None),
                Backbone.load(tiny_directory, section, device="cpu"),
                privacy=PrivacyBudget(4.0),
            )


def replace_normalise(section):
    return section.model_copy(update={"normalise": False})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dp-epsilon", "25"], "expected at most 20"),
        (["--dp-epsilon", "1", "--dp-delta", "2"], "got delta 2.0"),
        (["--dp-delta", "1e-6"], "need --dp-epsilon"),
    ],
)
def test_the_command_refuses_nonsense_at_once(
    tmp_path: Path, options: list[str], message: str
) -> None:
    result = CliRunner().invoke(app, ["train", "cfpb", "--out", str(tmp_path / "x"), *options])
    assert result.exit_code == 1
    assert message in result.output
