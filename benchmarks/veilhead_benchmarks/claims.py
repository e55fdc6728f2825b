"""What the project says of its speed and size, held against one run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from veilhead_benchmarks.rows import Results, Row

#: Classes: how many times less server time than `mm` and than Concrete ML's regression.
_AGAINST_MM: Final = {2: 1000.0, 20: 500.0, 77: 250.0}
_AGAINST_CONCRETE: Final = {2: 35.0, 20: 15.0, 77: 6.0}

#: Classes: our server time over that of slots and rotations.
_OF_BSGS: Final = {512: 0.75, 1024: 0.65, 2048: 0.70, 4096: 0.70}

#: Texts in one call: encrypted over plaintext, end to end.
_END_TO_END: Final = {1: 1.10, 32: 1.05, 2048: 1.02}
_TWO_WORKERS: Final = 1.7


@dataclass(frozen=True)
class Claim:
    """One figure of a run beside its target.

    Attributes:
        name: what is claimed.
        value: what was measured.
        target: what it is to be.
        at_least: whether the target is the least or the most.
        unit: of both; empty for a ratio.
    """

    name: str
    value: float
    target: float
    at_least: bool
    unit: str = ""

    @property
    def met(self) -> bool:
        """Whether the figure is as claimed."""
        return self.value >= self.target if self.at_least else self.value <= self.target


def claims(results: Results) -> list[Claim]:
    """The claims that this run has figures for."""
    return [
        *_single(results),
        *_client(results),
        *_bulk(results),
        *_block(results),
        *_end_to_end(results),
        *_workers(results),
    ]


def own(results: Results, classes: int, subject: str = "single", batch: int = 1) -> Row | None:
    """Veilhead's row under `standard` at 384 dimensions."""
    return results.one(
        subject=subject, system="veilhead", parameters="standard", d=384, classes=classes,
        batch=batch,
    )  # fmt: skip


def ratio(over: float | None, under: float | None) -> float | None:
    """One over the other; None when either is missing."""
    return None if over is None or not under else over / under


def _single(results: Results) -> Iterator[Claim]:
    for system, targets in (
        ("tenseal-mm", _AGAINST_MM),
        ("concrete-ml-logreg", _AGAINST_CONCRETE),
    ):
        for classes, target in targets.items():
            mine = own(results, classes)
            peer = results.one(subject="single", system=system, d=384, classes=classes, batch=1)
            if mine is not None and peer is not None:
                found = ratio(peer.server_ms, mine.server_ms)
                if found is not None:
                    name = f"single query, {classes} classes: server time of {system} over ours"
                    yield Claim(name, found, target, at_least=True)

    for classes, target in _OF_BSGS.items():
        mine = own(results, classes)
        peer = results.one(subject="single", system="tenseal-bsgs", d=384, classes=classes, batch=1)
        found = ratio(mine.server_ms, peer.server_ms) if mine and peer else None
        if found is not None:
            name = f"single query, {classes:,} classes: our server time over that of tenseal-bsgs"
            yield Claim(name, found, target, at_least=False)


def _client(results: Results) -> Iterator[Claim]:
    mine = own(results, 2)
    if mine is not None and mine.encrypt_ms is not None and mine.decrypt_ms is not None:
        name = "single query, one reply polynomial: the client's"
        yield Claim(f"{name} encryption", mine.encrypt_ms, 1.0, at_least=False, unit="ms")
        yield Claim(f"{name} decryption", mine.decrypt_ms, 0.5, at_least=False, unit="ms")


def _per_text(value: float | None, row: Row) -> float:
    return 0.0 if value is None or not row.batch else value / row.batch


def _bulk(results: Results) -> Iterator[Claim]:
    mine = own(results, 77, "batch", 2048)
    if mine is None:
        return
    name = "bulk, 2,048 texts, 77 classes"
    server = 1e3 * _per_text(mine.server_ms, mine)
    yield Claim(f"{name}: server time a text", server, 60, at_least=False, unit="µs")
    up, down = _per_text(mine.bytes_up, mine), _per_text(mine.bytes_down, mine)
    yield Claim(f"{name}: up a text", up, 2700, at_least=False, unit="B")
    yield Claim(f"{name}: down a text", down, 600, at_least=False, unit="B")
    peers = results.find(subject="batch", system="tenseal-batched", d=384, classes=20, batch=2048)
    for peer in peers:
        found = ratio(1e3 * _per_text(peer.server_ms, peer), server)
        if found is not None:
            other = "server time a text of TenSEAL's batched tensor at 20 classes over ours"
            yield Claim(f"{name}: {other}", found, 12, at_least=True)


def _block(results: Results) -> Iterator[Claim]:
    mine, single = own(results, 77, "batch", 64), own(results, 77)
    if mine is None:
        return
    name = "block, 64 texts, 77 classes"
    up, down = _per_text(mine.bytes_up, mine), _per_text(mine.bytes_down, mine)
    yield Claim(f"{name}: up a text", up, 3000, at_least=False, unit="B")
    yield Claim(f"{name}: down a text", down, 9000, at_least=False, unit="B")
    if single is not None and single.server_ms is not None:
        found = ratio(64 * single.server_ms, mine.server_ms)
        if found is not None:
            yield Claim(
                f"{name}: server time of 64 single queries over it", found, 8, at_least=True
            )


def _end_to_end(results: Results) -> Iterator[Claim]:
    for texts, target in _END_TO_END.items():
        mine = results.one(subject="end-to-end", system="veilhead", classes=8, batch=texts)
        plain = results.one(subject="end-to-end", system="plaintext", classes=8, batch=texts)
        if mine is not None and plain is not None:
            found = ratio(mine.total_ms, plain.total_ms)
            if found is not None:
                call = f"end to end, texts in a call: {texts:,}, 8 classes"
                yield Claim(f"{call}: encrypted over plaintext", found, target, at_least=False)


def _workers(results: Results) -> Iterator[Claim]:
    for entry in results.extra.get("throughput", ()):
        if entry["two_against_one"] is not None:
            name = f"texts a second, {entry['classes']:,} classes: two workers over one"
            yield Claim(name, float(entry["two_against_one"]), _TWO_WORKERS, at_least=True)
