from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save_file

from veilhead_models.artifact import (
    BACKBONE_DIRECTORY,
    FORMAT_FILE,
    HEAD_FILE,
    MANIFEST_FILE,
    REPORT_FILE,
    HeadArtifact,
    head_commitment,
)
from veilhead_protocol.errors import (
    ArtifactError,
    BackboneError,
    ManifestError,
    ParameterError,
    ScaleError,
)
from veilhead_protocol.files import describe_file, verify
from veilhead_protocol.manifest import BackboneSection, Manifest, PolicySection

Floats = NDArray[np.float64]


def random_head(classes: int = 5, dimensions: int = 16, seed: int = 0) -> tuple[Floats, Floats]:
    generator = np.random.default_rng(seed)
    return generator.normal(size=(classes, dimensions)), generator.normal(size=classes)


def labels(count: int) -> list[str]:
    return [f"label {number}" for number in range(count)]


def random_artifact(classes: int = 5, dimensions: int = 16, **options: Any) -> HeadArtifact:
    return HeadArtifact.from_weights(*random_head(classes, dimensions), labels(classes), **options)


def public_backbone(directory: Path, *, normalise: bool = True) -> BackboneSection:
    (directory / "nested").mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "nested" / "model.safetensors").write_bytes(bytes(1000))
    return BackboneSection(
        kind="transformers",
        name="stand-in",
        pooling="mean",
        normalise=normalise,
        max_tokens=16,
        public_parameters=1000,
        files=tuple(
            describe_file(directory, path) for path in ("config.json", "nested/model.safetensors")
        ),
    )


def content(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def rewrite_manifest(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads((directory / MANIFEST_FILE).read_bytes())
    change(document)
    (directory / MANIFEST_FILE).write_bytes(Manifest.build(document).serialize())


class TestFromWeights:
    def test_takes_lists_and_defaults_to_no_bias(self) -> None:
        artifact = HeadArtifact.from_weights([[1, 2], [3, 4]], None, ["a", "b"])
        assert artifact.weight.tolist() == [[1, 2], [3, 4]]
        assert artifact.bias.tolist() == [0, 0]
        assert artifact.weight.dtype == artifact.bias.dtype == np.float64

    def test_later_changes_to_the_callers_arrays_do_not_matter(self) -> None:
        weight, bias = random_head()
        about = {"notes": ["first"]}
        artifact = HeadArtifact.from_weights(weight, bias, labels(5), name="m", about=about)
        before = artifact.manifest.digest, artifact.weight.copy()
        weight[:] = 0
        about["notes"].append("second")
        assert artifact.manifest.digest == before[0]
        assert (artifact.weight == before[1]).all()
        with pytest.raises(ValueError, match="read-only"):
            artifact.weight[0, 0] = 1

    @pytest.mark.parametrize(
        ("weight", "bias", "names"),
        [
            ([1.0, 2.0], [1.0], ["a"]),
            (np.zeros((2, 3)), [1.0], ["a", "b"]),
            (np.zeros((2, 3)), [[1.0, 2.0]], ["a", "b"]),
            (np.zeros((2, 3)), None, ["a"]),
            (np.zeros((2, 3)), None, "ab"),
            (np.zeros((2, 3)), None, ["a", 2]),
            (np.zeros((0, 3)), None, []),
            (np.zeros((2, 0)), None, ["a", "b"]),
            (np.zeros((1, 4097)), None, ["a"]),
            (np.zeros((4097, 1)), None, labels(4097)),
            ([[np.nan, 1.0]], None, ["a"]),
            ([[1.0, 1.0]], [np.inf], ["a"]),
            ([[1.0 + 2.0j]], None, ["a"]),
            ([["secret"]], None, ["a"]),
            ([[1.0], [1.0, 2.0]], None, ["a", "b"]),
        ],
    )
    def test_wrong_shapes_and_values_are_refused(self, weight: Any, bias: Any, names: Any) -> None:
        with pytest.raises(ArtifactError) as caught:
            HeadArtifact.from_weights(weight, bias, names)
        assert "secret" not in str(caught.value)

    @pytest.mark.parametrize("scale", [0.0, -1.0, 9e-10, float("nan"), float("inf"), 2e9])
    def test_a_scale_that_cannot_be_divided_by_is_refused(self, scale: float) -> None:
        with pytest.raises(ArtifactError, match="embedding_scale"):
            random_artifact(embedding_scale=scale)

    @pytest.mark.parametrize("size", [1e8, 1e30, 1e308])
    def test_a_head_that_cannot_be_carried_fails_at_once(self, size: float) -> None:
        with pytest.raises(ScaleError, match="divide"):
            HeadArtifact.from_weights([[size]], None, ["a"])
        with pytest.raises(ScaleError, match="divide"):
            HeadArtifact.from_weights([[0.0]], [-size], ["a"])

    @pytest.mark.parametrize(
        "names", [["same", "same"], ["bell\a", "b"], ["x" * 513, "b"]], ids=str
    )
    def test_labels_that_no_manifest_holds_fail_at_once(self, names: list[str]) -> None:
        with pytest.raises(ManifestError, match="labels"):
            HeadArtifact.from_weights(np.ones((2, 3)), None, names)

    def test_names_sets_and_policies_are_checked_at_once(self) -> None:
        with pytest.raises(ManifestError, match="name"):
            random_artifact(name="no/slashes")
        with pytest.raises(ParameterError, match="unknown parameter set"):
            random_artifact(parameters="tiny")
        with pytest.raises(ManifestError, match="minimum"):
            random_artifact(
                policy=PolicySection(minimum_parameters="standard"), parameters="compact"
            )

    @pytest.mark.parametrize("about", [{"x": float("nan")}, {"x": object()}, {"x": "\ud800"}])
    def test_facts_that_json_cannot_carry_are_refused(self, about: dict[str, Any]) -> None:
        with pytest.raises(ArtifactError):
            random_artifact(about=about)

    def test_without_a_name_there_is_no_manifest(self) -> None:
        with pytest.raises(ArtifactError, match="name"):
            _ = random_artifact().manifest

    @pytest.mark.slow
    @pytest.mark.parametrize("parameters", ["standard", "compact"])
    def test_the_largest_head_goes_through(self, tmp_path: Path, parameters: str) -> None:
        generator = np.random.default_rng(0)
        weight = generator.normal(size=(4096, 4096)) / 64
        artifact = HeadArtifact.from_weights(weight, None, labels(4096), parameters=parameters)
        artifact.save(tmp_path / "largest")
        assert (HeadArtifact.load(tmp_path / "largest").weight == weight).all()


class TestLogits:
    @settings(max_examples=50, deadline=None)
    @given(scale=st.floats(1e-3, 50), seed=st.integers(0, 2**32 - 1))
    def test_the_scale_cancels_out(self, scale: float, seed: int) -> None:
        generator = np.random.default_rng(seed)
        weight, bias = random_head(seed=seed)
        embeddings = generator.normal(size=(7, 16))
        embeddings *= scale / np.linalg.norm(embeddings, axis=1, keepdims=True)
        artifact = HeadArtifact.from_weights(
            weight, bias, labels(5), parameters="standard", embedding_scale=scale
        )
        assert artifact.embedding.scale == scale
        np.testing.assert_allclose(
            artifact.logits(embeddings), embeddings @ weight.T + bias, rtol=0, atol=1e-9
        )

    def test_longer_embeddings_are_shortened_to_the_scale(self) -> None:
        weight, bias = random_head()
        artifact = HeadArtifact.from_weights(weight, bias, labels(5), embedding_scale=2.0)
        unit = np.ones(16) / 4
        np.testing.assert_allclose(
            artifact.logits([10 * unit]), artifact.logits([2 * unit]), atol=1e-12
        )

    @pytest.mark.parametrize("shape", [(16,), (2, 15), (1, 2, 16)])
    def test_other_shapes_are_refused(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ArtifactError, match=r"expected \[batch, 16\]"):
            random_artifact().logits(np.zeros(shape))


class TestSaveAndLoad:
    @settings(max_examples=25, deadline=None)
    @given(
        classes=st.integers(1, 40),
        dimensions=st.integers(1, 60),
        parameters=st.sampled_from(["standard", "compact"]),
        scale=st.sampled_from([0.5, 1.0, 3.0]),
        seed=st.integers(0, 1000),
    )
    def test_what_is_loaded_is_what_was_saved(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        classes: int,
        dimensions: int,
        parameters: str,
        scale: float,
        seed: int,
    ) -> None:
        target = tmp_path_factory.mktemp("artefacts") / "head"
        saved = HeadArtifact.from_weights(
            *random_head(classes, dimensions, seed),
            labels(classes),
            parameters=parameters,
            embedding_scale=scale,
            about={"pair": (1, "two"), "none": None},
        )
        manifest = saved.save(target)
        loaded = HeadArtifact.load(target)
        assert loaded.manifest == manifest
        assert loaded.manifest.digest == manifest.digest
        assert (loaded.weight == saved.weight).all()
        assert (loaded.bias == saved.bias).all()
        assert (loaded.labels, loaded.salt) == (saved.labels, saved.salt)
        assert (target / MANIFEST_FILE).read_bytes() == manifest.serialize()

    def test_the_name_is_the_directorys(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert random_artifact().save("artifacts/icd10-chapters").name == "icd10-chapters"
        assert random_artifact().save("artifacts/../trailing/").name == "trailing"
        assert random_artifact(name="given").save("other").name == "given"
        assert HeadArtifact.load("other").name == "given"

    def test_the_current_directory_can_be_the_target(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        for _ in range(2):
            assert random_artifact().save(".").name == "here"
            assert HeadArtifact.load(".").name == "here"
            assert Path.cwd() == tmp_path / "here"

    def test_a_directory_that_cannot_name_a_model_asks_for_a_name(self, tmp_path: Path) -> None:
        with pytest.raises(ArtifactError, match="pass name="):
            random_artifact().save(tmp_path / "a model")
        assert list(tmp_path.iterdir()) == []
        random_artifact(name="m").save(tmp_path / "a model")

    def test_private_files_are_for_their_owner_alone(self, tmp_path: Path) -> None:
        random_artifact().save(tmp_path / "m", report={"accuracy": 0.5})
        for private in (HEAD_FILE, REPORT_FILE):
            assert stat.S_IMODE((tmp_path / "m" / private).stat().st_mode) == 0o600
        assert json.loads((tmp_path / "m" / REPORT_FILE).read_bytes()) == {"accuracy": 0.5}

    def test_the_manifest_tells_nothing_of_the_report(self, tmp_path: Path) -> None:
        random_artifact().save(tmp_path / "m", report={"accuracy": 0.123456})
        assert b"0.123456" not in (tmp_path / "m" / MANIFEST_FILE).read_bytes()

    def test_equal_heads_have_different_commitments(self) -> None:
        one, two = random_artifact(name="m"), random_artifact(name="m")
        assert one.manifest.head.commitment != two.manifest.head.commitment

    def test_the_commitment_is_as_documented(self) -> None:
        # Computed once by hand from the docstring's words.
        weight, bias = np.array([[1.0, -2.0]]), np.array([0.5])
        expected = (
            b"veilhead-head 1\n" + bytes(range(32)) + b"\x01\0\0\0\x02\0\0\0"
            b"\0\0\0\0\0\0\xf0\x3f" + b"\0\0\0\0\0\0\0\xc0" + b"\0\0\0\0\0\0\xe0\x3f"
        )
        digest = hashlib.sha256(expected).hexdigest()
        assert head_commitment(weight, bias, bytes(range(32))) == digest
        assert head_commitment(np.asfortranarray(weight), bias, bytes(range(32))) == digest


class TestReplacing:
    def test_an_artefact_is_replaced_whole(self, tmp_path: Path) -> None:
        target = tmp_path / "m"
        random_artifact(classes=3).save(target, report={})
        manifest = random_artifact(classes=4).save(target)
        assert HeadArtifact.load(target).manifest == manifest
        assert sorted(content(target)) == [FORMAT_FILE, HEAD_FILE, MANIFEST_FILE]
        assert [path.name for path in tmp_path.iterdir()] == ["m"]

    @pytest.mark.parametrize("foreign", ["notes.txt", MANIFEST_FILE, HEAD_FILE])
    def test_what_is_not_an_artefact_is_left_alone(self, tmp_path: Path, foreign: str) -> None:
        (tmp_path / "m").mkdir()
        (tmp_path / "m" / foreign).write_text("mine")
        with pytest.raises(ArtifactError, match="not empty"):
            random_artifact().save(tmp_path / "m")
        assert content(tmp_path) == {f"m/{foreign}": b"mine"}

    def test_an_artefact_with_other_files_in_it_is_left_alone(self, tmp_path: Path) -> None:
        random_artifact().save(tmp_path / "m")
        (tmp_path / "m" / "notes.txt").write_text("mine")
        with pytest.raises(ArtifactError, match="other files"):
            random_artifact().save(tmp_path / "m")
        assert (tmp_path / "m" / "notes.txt").read_text() == "mine"

    def test_a_file_is_refused_as_a_target(self, tmp_path: Path) -> None:
        (tmp_path / "m").write_text("mine")
        with pytest.raises(ArtifactError, match="not a directory"):
            random_artifact().save(tmp_path / "m")
        with pytest.raises(ArtifactError, match="cannot be written"):
            random_artifact().save(tmp_path / "m" / "below")

    @pytest.mark.parametrize(
        ("step", "failing"),
        [("rename", 0), ("rename", 1), ("fsync", 0), ("fsync", 1), ("fsync", 2)],
    )
    def test_a_failure_anywhere_leaves_the_old_artefact(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, failing: int
    ) -> None:
        target = tmp_path / "m"
        random_artifact(classes=3).save(target)
        before = content(tmp_path)
        owner: Any = Path if step == "rename" else os
        original = getattr(owner, step)
        calls = iter(range(100))

        def fail_once(*arguments: Any) -> Any:
            if next(calls) == failing:
                raise OSError(28, "No space left on device")
            return original(*arguments)

        monkeypatch.setattr(owner, step, fail_once)
        with pytest.raises(ArtifactError, match="No space left"):
            random_artifact(classes=4).save(target)
        monkeypatch.undo()
        assert content(tmp_path) == before
        assert [path.name for path in tmp_path.iterdir()] == ["m"]
        assert len(HeadArtifact.load(target).labels) == 3

    def test_a_killed_process_leaves_the_old_artefact(self, tmp_path: Path) -> None:
        target = tmp_path / "m"
        random_artifact(classes=3).save(target)
        script = (
            "import os, sys\n"
            "from veilhead_models.artifact import HeadArtifact\n"
            "os.fsync = lambda descriptor: os._exit(9)\n"
            "HeadArtifact.from_weights([[1.0]], None, ['a']).save(sys.argv[1])\n"
        )
        done = subprocess.run([sys.executable, "-c", script, str(target)], check=False)
        assert done.returncode == 9
        assert len(HeadArtifact.load(target).labels) == 3

    def test_a_report_that_json_cannot_carry_leaves_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(ArtifactError, match="report"):
            random_artifact().save(tmp_path / "m", report={"x": object()})
        assert list(tmp_path.iterdir()) == []


class TestTampering:
    def test_a_missing_directory_or_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ArtifactError, match=r"manifest\.json cannot be read"):
            HeadArtifact.load(tmp_path / "nowhere")
        random_artifact().save(tmp_path / "m")
        (tmp_path / "m" / HEAD_FILE).unlink()
        with pytest.raises(ArtifactError, match=r"head\.safetensors cannot be read"):
            HeadArtifact.load(tmp_path / "m")

    def test_every_changed_byte_of_the_head_is_noticed(self, tmp_path: Path) -> None:
        random_artifact(classes=1, dimensions=2).save(tmp_path / "m")
        path = tmp_path / "m" / HEAD_FILE
        original = path.read_bytes()
        start = 8 + int.from_bytes(original[:8], "little")  # the tensors; before them, the header
        for place in range(start, len(original)):
            path.write_bytes(
                original[:place] + bytes([original[place] ^ 1]) + original[place + 1 :]
            )
            with pytest.raises(ArtifactError, match="not the head"):
                HeadArtifact.load(tmp_path / "m")

    def test_a_cut_head_is_refused(self, tmp_path: Path) -> None:
        random_artifact().save(tmp_path / "m")
        path = tmp_path / "m" / HEAD_FILE
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(ArtifactError, match="cannot be read"):
            HeadArtifact.load(tmp_path / "m")

    @pytest.mark.parametrize(
        ("tensors", "metadata"),
        [
            ({"weight": np.ones((5, 16)), "bias": np.ones(5)}, {}),
            ({"weight": np.ones((5, 16)), "bias": np.ones(5)}, {"salt": "zz"}),
            ({"weight": np.ones((5, 16))}, None),
            ({"weight": np.ones((5, 16), np.float32), "bias": np.ones(5)}, None),
            ({"weight": np.ones((5, 15)), "bias": np.ones(5)}, None),
            ({"weight": np.ones((5, 16)), "bias": np.ones(4)}, None),
            ({"weight": np.ones((5, 16)), "bias": np.ones(5), "more": np.ones(1)}, None),
            ({"weight": np.ones(5), "bias": np.ones(5)}, None),
        ],
    )
    def test_another_kind_of_file_is_refused(
        self, tmp_path: Path, tensors: dict[str, Any], metadata: dict[str, str] | None
    ) -> None:
        random_artifact().save(tmp_path / "m")
        if metadata is None:
            metadata = {"format": "veilhead-head/1", "salt": "00" * 32}
        save_file(tensors, tmp_path / "m" / HEAD_FILE, metadata)
        with pytest.raises(ArtifactError):
            HeadArtifact.load(tmp_path / "m")

    def test_another_artefacts_head_is_refused(self, tmp_path: Path) -> None:
        for name in ("one", "two"):
            random_artifact().save(tmp_path / name)
        (tmp_path / "one" / HEAD_FILE).replace(tmp_path / "two" / HEAD_FILE)
        with pytest.raises(ArtifactError, match="commits to"):
            HeadArtifact.load(tmp_path / "two")

    @pytest.mark.parametrize("change", [b" ", b"{", b"\xff"])
    def test_a_manifest_that_is_not_canonical_is_refused(
        self, tmp_path: Path, change: bytes
    ) -> None:
        random_artifact().save(tmp_path / "m")
        path = tmp_path / "m" / MANIFEST_FILE
        path.write_bytes(change + path.read_bytes())
        with pytest.raises(ArtifactError, match=r"manifest\.json"):
            HeadArtifact.load(tmp_path / "m")

    def test_a_manifest_with_other_scales_is_refused(self, tmp_path: Path) -> None:
        random_artifact().save(tmp_path / "m")
        rewrite_manifest(
            tmp_path / "m", lambda document: document["head"].update(error_bound=2.0**-14)
        )
        with pytest.raises(ArtifactError, match="other scales"):
            HeadArtifact.load(tmp_path / "m")

    def test_a_manifest_with_a_label_more_is_refused(self, tmp_path: Path) -> None:
        random_artifact().save(tmp_path / "m")

        def add_label(document: dict[str, Any]) -> None:
            document["head"]["labels"].append("more")
            document["head"]["private_parameters"] += 17

        rewrite_manifest(tmp_path / "m", add_label)
        with pytest.raises(ArtifactError, match=r"shape \[5, 16\]"):
            HeadArtifact.load(tmp_path / "m")


class TestBackboneFiles:
    def test_they_are_copied_and_found_again(self, tmp_path: Path) -> None:
        section = public_backbone(tmp_path / "source")
        artifact = random_artifact().with_backbone(tmp_path / "source", section)
        artifact.save(tmp_path / "m")
        loaded = HeadArtifact.load(tmp_path / "m")
        assert loaded.backbone == section
        assert loaded.backbone_directory == tmp_path / "m" / BACKBONE_DIRECTORY
        assert content(tmp_path / "m" / BACKBONE_DIRECTORY) == content(tmp_path / "source")

    def test_a_loaded_artefact_can_be_saved_over_itself(self, tmp_path: Path) -> None:
        section = public_backbone(tmp_path / "source")
        random_artifact().with_backbone(tmp_path / "source", section).save(tmp_path / "m")
        before = HeadArtifact.load(tmp_path / "m")
        before.save(tmp_path / "m")
        again = HeadArtifact.load(tmp_path / "m")
        assert again.manifest == before.manifest
        assert (again.weight == before.weight).all()

    @pytest.mark.parametrize(
        ("normalise", "scale", "origin"),
        [(True, 1.0, "normalised"), (True, 2.0, "given"), (False, 1.0, "given")],
    )
    def test_the_scales_origin_follows(
        self, tmp_path: Path, normalise: bool, scale: float, origin: str
    ) -> None:
        section = public_backbone(tmp_path / "source", normalise=normalise)
        artifact = random_artifact(embedding_scale=scale)
        assert artifact.embedding.scale_origin == "given"
        assert artifact.with_backbone(tmp_path / "source", section).embedding.scale_origin == origin

    @pytest.mark.parametrize("change", ["grow", "flip", "remove"])
    def test_a_changed_file_is_named(self, tmp_path: Path, change: str) -> None:
        section = public_backbone(tmp_path / "source")
        artifact = random_artifact().with_backbone(tmp_path / "source", section)
        artifact.save(tmp_path / "m")

        def damage(directory: Path) -> None:
            file = directory / "nested" / "model.safetensors"
            if change == "remove":
                file.unlink()
            else:
                file.write_bytes(bytes(1001) if change == "grow" else bytes(999) + b"\1")

        damage(tmp_path / "m" / BACKBONE_DIRECTORY)
        with pytest.raises(ArtifactError, match=r"nested/model\.safetensors"):
            HeadArtifact.load(tmp_path / "m")
        damage(tmp_path / "source")
        with pytest.raises(BackboneError, match=r"nested/model\.safetensors"):
            verify(tmp_path / "source", section.files)
        with pytest.raises(BackboneError):
            random_artifact().with_backbone(tmp_path / "source", section)
        with pytest.raises((ArtifactError, BackboneError)):
            artifact.save(tmp_path / "again")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "source"]

    def test_a_wrong_digest_is_told_with_the_expected_one(self, tmp_path: Path) -> None:
        section = public_backbone(tmp_path / "source")
        (tmp_path / "source" / "config.json").write_text("[]")
        got = describe_file(tmp_path / "source", "config.json").sha256
        with pytest.raises(BackboneError, match=f"{got}, expected {section.files[0].sha256}"):
            verify(tmp_path / "source", section.files)


class TestSecrecy:
    def test_repr_shows_no_weights_and_no_salt(self) -> None:
        artifact = HeadArtifact.from_weights([[0.734512]], [0.918273], ["a"], name="m")
        shown = f"{artifact!r} {artifact}"
        assert shown.startswith("HeadArtifact(name='m', classes=1, dimensions=1")
        for secret in ("734512", "918273", artifact.salt.hex(), repr(artifact.salt)):
            assert secret not in shown

    def test_the_manifest_holds_no_weights_and_no_salt(self) -> None:
        artifact = HeadArtifact.from_weights([[0.734512]], [0.918273], ["a"], name="m")
        public = artifact.manifest.serialize()
        for secret in (b"734512", b"918273", artifact.salt.hex().encode()):
            assert secret not in public

    def test_importing_it_does_not_import_torch(self) -> None:
        script = (
            "import sys, veilhead_models.artifact\n"
            "heavy = {'torch', 'transformers', 'sklearn', 'veilhead'} & set(sys.modules)\n"
            "sys.exit(f'imported {heavy}' if heavy else 0)"
        )
        subprocess.run([sys.executable, "-c", script], check=True)
