"""`veilhead-server card`: the model card of an artefact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from veilhead_protocol.errors import ArtifactError
from veilhead_protocol.signatures import MAX_CARD_BYTES, VendorKey
from veilhead_service.card import CardSources, read_json_file, to_html, to_markdown
from veilhead_service.reporting import reported


def card(
    directory: Annotated[Path, typer.Argument(help="An artefact that `train` made.")],
    out: Annotated[
        Path | None, typer.Option(help="Write card.md and card.html into this directory.")
    ] = None,
    format: Annotated[  # noqa: A002
        Literal["md", "html"], typer.Option(help="What to print without --out.")
    ] = "md",
    attacks: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What `veilhead-bench attack` wrote.")
    ] = None,
    without_dp: Annotated[
        Path | None,
        typer.Option(
            metavar="ARTEFACT", help="The same head trained without privacy, to compare with."
        ),
    ] = None,
    store: Annotated[
        Path | None, typer.Option(help="A store that it is published in: who signed it.")
    ] = None,
    vendor_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY", help="ed25519:...: check these signatures with it; repeatable."
        ),
    ] = None,
    rows: Annotated[
        int, typer.Option(min=0, help="Embeddings that the encrypted path is measured on.")
    ] = 50,
) -> None:
    """Say what is known of a model: data, quality, privacy, attacks, encryption, limits.

    The card holds the scores of report.json, which is private: read it before you publish it
    (`publish --card FILE`). A service shows what the manifest says where no card was published.

    Example: veilhead-server card artifacts/icd10-chapters --out cards
    """
    with reported():
        from veilhead_models.artifact import REPORT_FILE, HeadArtifact
        from veilhead_service.encrypted_head import EncryptedHead
        from veilhead_service.model_store import ModelStore
        from veilhead_service.self_test import measured_fidelity

        artifact = HeadArtifact.load(directory)
        report = directory / REPORT_FILE
        results = [] if attacks is None else read_json_file(attacks)
        published = None
        if store is not None:
            found = ModelStore(store, check_heads=False)
            published = found.version(artifact.manifest.name, artifact.manifest.digest)
        fidelity = None
        if rows:
            head = EncryptedHead(artifact.manifest, artifact.weight, artifact.bias)
            fidelity = measured_fidelity(head, artifact, rows)
        markdown = to_markdown(
            CardSources(
                manifest=artifact.manifest,
                report=read_json_file(report) if report.is_file() else None,
                without_privacy=(
                    None if without_dp is None else read_json_file(without_dp / REPORT_FILE)
                ),
                attacks=results.get("attacks", []) if isinstance(results, dict) else [],
                fidelity=fidelity,
                signatures=() if published is None else published.signatures,
                vendor_keys=tuple(map(VendorKey.parse, vendor_key or ())),
            )
        )
        page = to_html(markdown, f"Model card: {artifact.manifest.name}")
        if out is None:
            typer.echo(markdown if format == "md" else page, nl=False)
            return
        try:
            out.mkdir(parents=True, exist_ok=True)
            for name, content in (("card.md", markdown), ("card.html", page)):
                (out / name).write_text(content, "utf-8")
                typer.echo(str(out / name))
        except OSError as error:
            raise ArtifactError(f"{out} cannot be written ({error.strerror})") from error


def read_card(path: Path) -> str:
    """A card to publish.

    Raises:
        ArtifactError: when it cannot be read, is too large or is not UTF-8.
    """
    try:
        content = path.read_bytes()
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} cannot be read as UTF-8 text") from error
    if len(content) > MAX_CARD_BYTES:
        raise ArtifactError(f"{path} has {len(content)} bytes, expected at most {MAX_CARD_BYTES}")
    return text
