"""A token head from a file of records to encrypted entities, through the real service."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from veilhead import Client
from veilhead_benchmarks.pii_tags import tagged_records
from veilhead_models.artifact import HeadArtifact
from veilhead_models.backbone import Backbone
from veilhead_models.records import tagged_entities, write_records
from veilhead_service.cli import app

KINDS = ("EMAIL", "IP")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command makes of generated records, privately, with MiniLM."""
    directory = tmp_path_factory.mktemp("tags")
    write_records(directory / "pii.jsonl", tagged_records(160, 1, kinds=KINDS))
    arguments = ["train", str(directory / "pii.jsonl"), "--task", "token-classification"]
    arguments += ["--out", str(directory / "pii"), "--dp-epsilon", "12", "--device", "cpu"]
    cache = {"VEILHEAD_CACHE": str(directory / "cache")}
    done = CliRunner().invoke(app, arguments, env=cache)
    assert done.exit_code == 0, done.output
    return directory / "pii"


def test_clients_get_the_entities_of_the_plaintext_head(artifact: Path) -> None:
    texts = [record.text for record in tagged_records(8, 2, kinds=KINDS)]
    head = HeadArtifact.load(artifact)
    assert head.backbone is not None
    backbone = Backbone.load(artifact / "backbone", head.backbone, device="cpu")
    with Client.local(artifact, device="cpu") as client:
        found = client.classify_tokens(texts, aggregation_strategy="average")
    some = 0
    for entities, [window] in zip(found, backbone.embed_tokens(texts), strict=True):
        logits = head.logits(window.embeddings)  # [tokens, C]
        tagged = tagged_entities(window.tokens, logits, head.labels)
        expected = [(one.start, one.end, one.label) for one in tagged]
        assert [(one["start"], one["end"], one["entity_group"]) for one in entities] == expected
        some += len(expected)
    assert some > 8, "a head that finds nothing would show nothing"


def test_the_report_is_by_entity_and_the_manifest_says_what_is_guaranteed(artifact: Path) -> None:
    report = json.loads((artifact / "report.json").read_text())
    assert {one["label"] for one in report["entities"]} == set(KINDS)
    assert 0 < report["micro"]["f1"] <= report["micro_relaxed"]["f1"]
    privacy = HeadArtifact.load(artifact).manifest.about["privacy"]
    assert privacy["epsilon"] == 12.0
    assert all(11.9 < found <= 12 for found in privacy["accountants"].values())
