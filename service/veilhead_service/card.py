"""Model cards: what can be said of an artefact, as Markdown and as HTML.

Everything in a card comes from the files that it is made of: the manifest, which is public, and
what the vendor chooses to add: the training report, the results of attacks, a measurement of the
encrypted path. A part that is missing says so.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from markdown_it import MarkdownIt

from veilhead_protocol.errors import ArtifactError
from veilhead_protocol.manifest import Manifest
from veilhead_protocol.policy import GUARDS
from veilhead_protocol.signatures import VendorKey, VendorSignature, signed_message

#: What the parameter sets' security rests on. Sources, versions and dates as in `parameters.py`.
_SOURCES: Final = (
    "Estimate: lattice-estimator 27a581b (2026-06-06), least of usvp, bdd, dual hybrid and primal "
    "hybrid, ternary secret, error 3.2, unlimited samples. Moduli are within the tables of Bossuat "
    "et al., Security Guidelines for Implementing Homomorphic Encryption (IACR ePrint 2024/463)."
)

_LIMITS: Final = (
    "A linear head can be copied from its answers, here as behind any service that returns logits.",
    "Of d values, d + 1 chosen answers or a few hundred ordinary ones are enough for that.",
    "Answers are not authenticated beyond TLS. Keep texts of your own whose answers you know.",
    "The service sees how many texts are sent and when, not what is in them.",
    "Scores are of the held-out rows of the training data. Other texts may be answered worse.",
)

_STYLE: Final = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2330; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem }
h1 { margin-bottom: 0 } h2 { margin-top: 2.2rem; border-bottom: 1px solid #d5dae3 }
table { border-collapse: collapse; font-size: 0.9rem; margin: 0.8rem 0 }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid #e4e8ef; text-align: left }
th { background: #f3f5f9 } td { font-variant-numeric: tabular-nums; overflow-wrap: break-word }
code { font-size: 0.85em; overflow-wrap: anywhere }
""".strip()

#: The line of a card that says which version it is of.
_VERSION: Final = re.compile(r"^Version `([0-9a-f]{64})`$", re.MULTILINE)

_MARKS: Final = re.compile(r"([\\`*_{}\[\]<>|~&])")


@dataclass(frozen=True)
class Fidelity:
    """How near the encrypted path came to the plaintext one.

    Attributes:
        rows: embeddings that were asked.
        largest_error: of any logit.
        same_label: rows whose highest logit was the same.
    """

    rows: int
    largest_error: float
    same_label: int


@dataclass(frozen=True)
class CardSources:
    """What a card is made of; only the manifest has to be there.

    Attributes:
        manifest: the public manifest.
        report: what `train` wrote as report.json, for texts or for tokens.
        without_privacy: the report of a head that was trained the same way without privacy.
        attacks: the figures of `veilhead-bench attack`.
        fidelity: what was measured of the encrypted path.
        signatures: who signed the manifest.
        vendor_keys: the vendor's public keys, to check these with.
    """

    manifest: Manifest
    report: Mapping[str, Any] | None = None
    without_privacy: Mapping[str, Any] | None = None
    attacks: Sequence[Mapping[str, Any]] = ()
    fidelity: Fidelity | None = None
    signatures: tuple[VendorSignature, ...] = ()
    vendor_keys: tuple[VendorKey, ...] = ()


def to_markdown(sources: CardSources) -> str:
    """The card as Markdown.

    Raises:
        ArtifactError: when a report or the attacks' results are not what their tools write.
    """
    try:
        return "\n".join(_lines(sources)).rstrip() + "\n"
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            "a report or the results of attacks are not what `train` and `veilhead-bench attack` "
            f"write ({type(error).__name__}): make them again"
        ) from error


def to_html(markdown: str, title: str) -> str:
    """A card's Markdown as one page, without scripts, links to other places, or HTML of its own."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table").disable(["link", "image"])
    parser.disable(["autolink"])
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n<title>{html.escape(title)}</title>'
        f"\n<style>\n{_STYLE}\n</style>\n</head>\n<body>\n{parser.render(markdown)}</body>\n</html>\n"
    )


def named_version(markdown: str) -> str | None:
    """The digest of the version that a card says it is of; None when it says none."""
    found = _VERSION.search(markdown)
    return None if found is None else found[1]


def read_json_file(path: Path) -> Any:
    """The content of a JSON file that one of the project's commands wrote.

    Raises:
        ArtifactError: when it cannot be read.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read as JSON") from error


def _lines(sources: CardSources) -> Iterator[str]:
    manifest = sources.manifest
    yield f"# Model card: {_text(manifest.name)}"
    yield ""
    yield f"Version `{manifest.digest.hex()}`"
    yield ""
    yield (
        f"A private linear head for {manifest.task.replace('-', ' ')}: "
        f"{manifest.head.problem_type.replace('_', ' ')}, {len(manifest.head.labels)} labels, on "
        f"embeddings of {manifest.head.dimensions} values. Texts are embedded and encrypted by "
        "the client; the service sees ciphertexts only."
    )
    yield ""
    for title, part in (
        ("Data", _data(manifest)),
        ("Quality", _quality(sources)),
        ("Differential privacy", _privacy(sources)),
        ("Attacks", _attacks(sources.attacks)),
        ("Encryption", _encryption(sources)),
        ("Parameters", _parameters(manifest)),
        ("Policy", _policy(manifest)),
        ("Limits", (f"- {limit}" for limit in _LIMITS)),
        ("Signature", _signature(sources)),
    ):
        yield f"## {title}"
        yield ""
        yield from part
        yield ""


def _data(manifest: Manifest) -> Iterator[str]:
    found = manifest.about.get("dataset")
    if not isinstance(found, dict):
        yield "The vendor does not say what the head was trained on."
        return
    yield from _table(
        ("what", "value"),
        [(name.replace("_", " "), _plain(value)) for name, value in sorted(found.items())],
    )


def _quality(sources: CardSources) -> Iterator[str]:
    report, other = sources.report, sources.without_privacy
    if report is None:
        yield "The vendor does not publish scores."
        return
    if "entities" in report:
        yield from _entity_quality(report, other)
        return
    yield f"On {report['test_rows']} held-out rows:"
    yield ""
    heads = [("this head", report)]
    if other is not None:
        heads.append(("without differential privacy", other))
    scores = (
        ("accuracy", "accuracy"),
        ("macro F1", "macro_f1"),
        ("negative log-likelihood", "negative_log_likelihood"),
        ("Brier score", "brier"),
        ("expected calibration error", "calibration_error"),
    )
    yield from _table(
        ("score", *(name for name, _ in heads)),
        [(name, *(_score(head[field]) for _, head in heads)) for name, field in scores],
    )
    yield ""
    yield (
        ("By class" if other is None else "By class, those that pay most for the noise first")
        + "; recall is the accuracy on the rows of a class:"
    )
    yield ""
    if other is None:
        yield from _table(
            ("class", "precision", "recall", "F1", "rows"),
            [
                (one["label"], *map(_score, _scores_of(one)), str(one["support"]))
                for one in report["classes"]
            ],
        )
    else:
        before = {one["label"]: one for one in other["classes"]}
        pairs = [(one, before[one["label"]]) for one in report["classes"]]
        pairs.sort(key=lambda pair: pair[0]["f1"] - pair[1]["f1"])
        yield from _table(
            ("class", "recall", "recall without", "F1", "F1 without", "F1 lost", "rows"),
            [
                (
                    one["label"],
                    _score(one["recall"]),
                    _score(old["recall"]),
                    _score(one["f1"]),
                    _score(old["f1"]),
                    _score(old["f1"] - one["f1"]),
                    str(one["support"]),
                )
                for one, old in pairs
            ],
        )
    yield ""
    yield "Calibration: answers by the probability that they were given with."
    yield ""
    yield from _table(
        ("probability", "answers", "mean probability", "share right"),
        [
            (
                f"{one['lower']:.2f} to {one['upper']:.2f}",
                str(one["rows"]),
                _score(one["confidence"]),
                _score(one["accuracy"]),
            )
            for one in report["reliability"]
            if one["rows"]
        ],
    )


def _entity_quality(report: Mapping[str, Any], other: Mapping[str, Any] | None) -> Iterator[str]:
    """What a token head finds, by kind of entity."""
    yield f"Entities of {report['test_records']} held-out records, as clients would get them:"
    yield ""
    heads = [("this head", report)]
    if other is not None:
        heads.append(("without differential privacy", other))
    sums = (
        ("over all entities, place and kind right", "micro"),
        ("mean over kinds, place and kind right", "macro"),
        ("over all entities, kind right and places overlap", "micro_relaxed"),
        ("mean over kinds, kind right and places overlap", "macro_relaxed"),
    )
    yield from _table(
        ("precision, recall, F1", *(name for name, _ in heads)),
        [
            (name, *(", ".join(map(_score, _scores_of(head[field]))) for _, head in heads))
            for name, field in sums
        ],
    )
    yield ""
    before = {} if other is None else {one["label"]: one for one in other["entities"]}
    pairs = [(one, before.get(one["label"])) for one in report["entities"]]
    if other is None:
        yield "By kind, place and kind right; the last score is by overlapping places:"
    else:
        yield "By kind, place and kind right, those that pay most for the noise first:"
        pairs.sort(key=lambda pair: _f1(pair[0]) - _f1(pair[1]))
    yield ""
    yield from _table(
        ("kind", "precision", "recall", "F1", "F1 without", "F1, overlapping", "entities"),
        [
            (
                one["label"],
                *map(_score, _scores_of(one["scores"])),
                "" if old is None else _score(_f1(old)),
                _score(one["relaxed"]["f1"]),
                str(one["support"]),
            )
            for one, old in pairs
        ],
    )


def _f1(kind: Mapping[str, Any] | None) -> float:
    """F1 of a kind of entity, and 0 for one that a report does not have."""
    return 0.0 if kind is None else float(kind["scores"]["f1"])


def _scores_of(one: Mapping[str, Any]) -> tuple[float, float, float]:
    return one["precision"], one["recall"], one["f1"]


def _privacy(sources: CardSources) -> Iterator[str]:
    stated = sources.manifest.about.get("privacy")
    if not isinstance(stated, dict):
        yield (
            "None. What the head tells of its training rows is bounded by nothing but its size "
            "and its regularisation."
        )
        return
    yield from _table(
        ("what", "value"),
        [
            ("epsilon", f"{float(stated['epsilon']):g}"),
            ("delta", f"{float(stated['delta']):g}"),
            ("neighbouring data sets", f"{stated['adjacency']}: {stated['unit']}"),
            ("mechanism", stated["mechanism"]),
            *(
                (f"epsilon by {name}", f"{float(epsilon):.4f}")
                for name, epsilon in stated["accountants"].items()
            ),
        ],
    )
    yield ""
    bounds = [one for one in sources.attacks if one["attack"] == "dp-audit"]
    if bounds:
        yield "An audit planted canaries in runs of the same training (a lower bound on epsilon):"
        yield ""
        yield from _table(
            ("run", "figure", "value"),
            [(one["target"], one["metric"], _number(one["value"])) for one in bounds],
        )
    else:
        yield "No audit bound was given."
    yield ""
    yield "Not covered:"
    yield ""
    for item in stated["not_covered"]:
        yield f"- {_text(str(item))}"
    if sources.report is not None:
        yield "- the scores on this card, which are those of held-out rows without any noise"


def _attacks(attacks: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not attacks:
        yield "No results were given. `veilhead-bench attack` makes them."
        return
    yield (
        "Measured by `veilhead-bench attack`, on heads and data of its own where a row does not "
        "say otherwise; of a curve its end stands here. A system other than veilhead, or one that "
        "lacks a protection, is there to show that the attack works."
    )
    yield ""
    words = {True: "holds", False: "**broken**", None: ""}
    yield from _table(
        ("attack", "system", "target", "figure", "value", "expected", ""),
        [
            (
                one["attack"],
                one["system"],
                one["target"],
                one["metric"],
                _number(one["value"]),
                one["expected"],
                words[one["holds"]],
            )
            for one in _ends_of_curves([one for one in attacks if one["expected"]])
        ],
    )


def _ends_of_curves(attacks: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Of the figures that are points of one curve, the last; and whatever does not hold."""

    def curve(one: Mapping[str, Any]) -> tuple[Any, ...]:
        return one["attack"], one["system"], one.get("curve"), one["metric"]

    last = {curve(one): one for one in attacks}  # in the order that they were measured in
    for one in attacks:
        if not one.get("curve") or last[curve(one)] is one or not one["holds"]:
            yield one


def _encryption(sources: CardSources) -> Iterator[str]:
    manifest = sources.manifest
    found = manifest.parameter_set
    classical, quantum = found.core_svp_bits
    yield from _table(
        ("what", "value"),
        [
            ("scheme", "CKKS (RLWE), no evaluation keys"),
            ("parameter set", found.name),
            ("polynomial degree", str(found.poly_modulus_degree)),
            ("modulus", f"{found.residue_bits} bits"),
            ("cheapest known attack", f"2^{found.estimated_bits:g}"),
            ("the same by core-SVP", f"2^{classical:g}, with a quantum computer 2^{quantum:g}"),
            ("promised error of a logit", f"{manifest.head.error_bound:.6f}"),
        ],
    )
    yield ""
    yield _SOURCES
    yield ""
    if found.name == "compact":
        yield (
            "`compact` has no margin against quantum computers and is not meant for ciphertexts "
            "that are archived for decades; `standard` is."
        )
        yield ""
    measured = sources.fidelity
    if measured is None:
        yield "The encrypted path was not measured for this card."
    else:
        yield (
            f"Measured: {measured.rows} random embeddings went through encryption, the encrypted "
            f"head and decryption. The largest error of a logit was {measured.largest_error:.6f}; "
            f"{measured.same_label} of {measured.rows} kept their top label."
        )


def _parameters(manifest: Manifest) -> Iterator[str]:
    backbone = manifest.backbone
    public = 0 if backbone is None else backbone.public_parameters
    yield from _table(
        ("part", "numbers", "who has them"),
        [
            ("head: weights and biases", f"{manifest.head.private_parameters:,}", "the vendor"),
            (
                "backbone: "
                + ("none, embeddings are given" if backbone is None else backbone.name),
                f"{public:,}",
                "everybody who may use the model",
            ),
        ],
    )


def _policy(manifest: Manifest) -> Iterator[str]:
    policy = manifest.policy
    if policy.preset is not None:
        yield f"The policy meets the preset `{policy.preset}`."
        yield ""
    stated = policy.model_dump(mode="json", exclude={"preset"})
    yield from _table(
        ("clause", "value", "who sees to it"),
        [(name, _plain(value), GUARDS[name].value) for name, value in stated.items()],
    )


def _signature(sources: CardSources) -> Iterator[str]:
    if sources.signatures:
        yield from _table(
            ("signature of the manifest, Ed25519", "vendor key", "checked when this card was made"),
            [_signed_by(one, sources) for one in sources.signatures],
        )
    else:
        yield "The manifest was not signed when this card was made."
    yield ""
    yield (
        "What stands here proves nothing by itself: whoever changes a card can change this, too. "
        "`veilhead card --vendor-key KEY` checks the signatures of the manifest and of this card, "
        "with a key that the vendor gave by another way."
    )


def _signed_by(signature: VendorSignature, sources: CardSources) -> tuple[str, str, str]:
    message = signed_message(sources.manifest.digest)
    for key in sources.vendor_keys:
        if key.id == signature.key_id:
            fingerprint = hashlib.sha256(key.data).hexdigest()
            found = "valid" if signature.verifies(key, message) else "not valid"
            return f"key {key.id.hex()}", f"{key} (SHA-256 {fingerprint})", found
    return f"key {signature.key_id.hex()}", "not given", "no: it takes the vendor's public key"


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {_plain(one)}" for name, one in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _score(value: float) -> str:
    return f"{float(value):.3f}"


def _number(value: float) -> str:
    """A figure of any size."""
    return f"{float(value):.4g}"


def _text(text: str) -> str:
    """Text of others, as Markdown that shows it and does nothing else; one line."""
    return _MARKS.sub(r"\\\1", " ".join(text.split()))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        cells = (cell if cell == "**broken**" else _text(str(cell)) for cell in row)
        yield f"| {' | '.join(cells)} |"
