"""Keeps a store, and the artefacts that it was published from, as the code of today writes them.

    python tests/vectors/stores/keep.py

writes `tests/vectors/stores/<formats>.json`, which is named by the numbers of the formats in it,
and refuses to write over one that is there: what was released stays as it was. All is made up.
`tests/service/test_formats.py` reads every file here, and says when one is missing.
"""

from __future__ import annotations

import base64
import json
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from veilhead_models.artifact import HeadArtifact
from veilhead_protocol.files import describe_file
from veilhead_protocol.manifest import BackboneSection, OnnxSection
from veilhead_service.head_encryption import HeadKey
from veilhead_service.model_store import publish
from veilhead_service.retirement import Retirement
from veilhead_service.signing import SigningKey

HERE = Path(__file__).parent

#: What the encrypted head of every sample is under: public, as all of it.
KEY = HeadKey(bytes(range(32)))


def head(name: str, *, classes: int, dimensions: int) -> HeadArtifact:
    """A made-up head."""
    generator = np.random.default_rng(len(name))
    return HeadArtifact.from_weights(
        generator.normal(scale=0.5, size=(classes, dimensions)),
        generator.normal(size=classes),
        [f"label {index}" for index in range(classes)],
        name=name,
    )


def with_backbone(artifact: HeadArtifact, directory: Path) -> HeadArtifact:
    """The head, with files that only look like those of a backbone."""
    contents = {
        "config.json": b'{"hidden_size": 8}\n',
        "1_Pooling/config.json": b"{}\n",
        "onnx/tokenizer.json": b"{}\n",
        "onnx/model.onnx": b"not a graph",
    }
    for path, content in contents.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(content)
    section = BackboneSection(
        kind="transformers",
        name="made-up",
        pooling="mean",
        normalise=True,
        max_tokens=16,
        public_parameters=1,
        files=tuple(describe_file(directory, path) for path in list(contents)[:2]),
        onnx=OnnxSection(
            tokenizer=describe_file(directory, "onnx/tokenizer.json"),
            fp32=describe_file(directory, "onnx/model.onnx"),
        ),
    )
    return artifact.with_backbone(directory, section)


def make(root: Path) -> None:
    """`artifacts/` and `store/` below `root`: every kind of file that either can hold."""
    artifacts, store = root / "artifacts", root / "store"
    plain = with_backbone(head("plain", classes=3, dimensions=8), root / "backbone")
    plain.save(artifacts / "plain", report={"accuracy": 0.5})
    head("quiet", classes=2, dimensions=4).save(artifacts / "quiet")
    signing = SigningKey.create(root / "signing.pem")
    until = Retirement(datetime(2999, 1, 1, tzinfo=UTC))
    publish(artifacts / "plain", store, signing_key=signing, card="# A made-up head\n")
    publish(artifacts / "plain", store, retire_previous=until, allow_bulk=True)
    publish(artifacts / "quiet", store, head_key=KEY)


def keep(root: Path) -> dict[str, str]:
    """Every file of `artifacts/` and `store/` below `root`, in Base64."""
    files = [path for part in ("artifacts", "store") for path in (root / part).rglob("*")]
    return {
        path.relative_to(root).as_posix(): base64.b64encode(path.read_bytes()).decode()
        for path in sorted(files)
        if path.is_file()
    }


def unpack(sample: Path, root: Path) -> Path:
    """Write a sample's files below `root`, which is returned."""
    for name, content in json.loads(sample.read_text("utf-8")).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(content))
    return root


def current_sample() -> Path:
    """Where the sample of the formats of today is, or belongs."""
    from veilhead_models.artifact import ARTIFACT_FORMAT
    from veilhead_protocol.manifest import FORMAT as MANIFEST_FORMAT
    from veilhead_service.store_versions import STORE_FORMAT

    formats = (STORE_FORMAT, ARTIFACT_FORMAT, MANIFEST_FORMAT)
    numbers = (name.removeprefix("veilhead-").replace("/", "-") for name in formats)
    return HERE / f"{'_'.join(numbers)}.json"


def main() -> None:
    """Keep the sample of the formats of this code."""
    target = current_sample()
    if target.exists():
        sys.exit(f"{target} is kept already: raise the number of the format that changed")
    with tempfile.TemporaryDirectory() as root:
        make(Path(root))
        target.write_text(json.dumps(keep(Path(root)), indent=1) + "\n", "utf-8")
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
