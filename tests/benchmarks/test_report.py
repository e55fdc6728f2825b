"""The report of a run, from figures that are made up."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

from veilhead_benchmarks.claims import claims
from veilhead_benchmarks.cli import app
from veilhead_benchmarks.plots import plots
from veilhead_benchmarks.report import to_html
from veilhead_benchmarks.rows import Results, Row
from veilhead_benchmarks.tables import size, tables, to_markdown

OWN = Row(
    "single", "veilhead", "standard", 384, 77, 1,
    server_ms=4.0, encrypt_ms=1.0, decrypt_ms=0.4, total_ms=5.4, bytes_keys=13672,
    bytes_up=13764, bytes_down=103000, max_error=5e-4,
)  # fmt: skip
LOAD = {
    "classes": 22, "load": "closed", "workers": 1, "offered_per_second": None,
    "texts_per_second": 400.0, "texts_per_worker_core": 410.0, "two_against_one": None,
    "p50_ms": None, "p95_ms": None, "p99_ms": None, "generator_cores": 0.1, "service_cores": 0.4,
    "worker_cores": 0.9, "max_error": 5e-4,
}  # fmt: skip
OPEN = LOAD | {
    "load": "open", "offered_per_second": 200.0, "p50_ms": 3.0, "p95_ms": 8.0, "p99_ms": 12.0
}  # fmt: skip
MEMORY = {
    "what": "key <in use>", "parameters": "standard", "count": 100, "bytes_each": 41000.0,
    "expected_bytes": 32768.0, "bound_bytes": 1e7, "bounded_by": "256 keys a worker",
}  # fmt: skip


def single(system, classes, server_ms, parameters="p", **changes):
    return replace(
        OWN, system=system, classes=classes, server_ms=server_ms, parameters=parameters, **changes
    )


def whole_run():
    """A run with something of every subject."""
    rows = [
        Row("primitives/product", "veilhead", "standard", None, None, None, server_ms=0.01),
        OWN,
        replace(OWN, classes=2, server_ms=0.5),
        replace(OWN, classes=2, parameters="compact", server_ms=1.5),
        *(replace(OWN, d=d, classes=20) for d in (64, 384, 1024)),
        single("plaintext", 77, 0.01, max_error=0.0),
        single("tenseal-mm", 77, 2000.0),
        single("tenseal-bsgs", 77, 3.0),
        single("concrete-ml-logreg", 77, 20.0),
        single("concrete-ml-glwe", 77, 900.0),
        Row("floor", "veilhead", "standard", 384, 77, 1, server_ms=2.0),
        replace(OWN, subject="batch", batch=64, server_ms=30.0, bytes_up=163720, bytes_down=508372),
        replace(OWN, subject="batch", batch=2048, server_ms=100.0, bytes_up=5234824,
                bytes_down=985772),
        replace(OWN, subject="batch", system="tenseal-batched", classes=20, batch=2048,
                server_ms=1700.0),
        *(replace(OWN, subject="end-to-end", classes=8, batch=batch, total_ms=21.0 * batch)
          for batch in (1, 32, 2048)),
        *(replace(OWN, subject="end-to-end", system="plaintext", classes=8, batch=batch,
                  parameters="p", total_ms=20.0 * batch, server_ms=None)
          for batch in (1, 32, 2048)),
        Row("fidelity/cfpb", "veilhead", "standard", 384, 8, 100, max_error=4e-4,
            note="100 of 100"),
    ]  # fmt: skip
    two = LOAD | {"workers": 2, "texts_per_second": 720.0, "two_against_one": 1.8}
    return Results(
        {"date": "2026-11-23T01:00:00+00:00", "cores": 2, "left_out": ["a peer: <no network>"]},
        tuple(rows),
        {"throughput": [LOAD, two, OPEN], "memory": [MEMORY]},
    )


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.images, self.links, self.headings = [], [], [], []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.links += [attributes[name] for name in ("href", "src") if name in attributes]
        if tag == "img":
            self.images.append(attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


@pytest.fixture(scope="module")
def page():
    parser = _Page()
    parser.text = to_html(whole_run())
    parser.feed(parser.text)
    return parser


def test_the_page_is_whole_and_fetches_nothing(page):
    assert page.open == []
    assert all(link.startswith("data:image/svg+xml;base64,") for link in page.links)


def test_every_plot_is_in_the_page_with_a_text(page):
    titles = [plot.title for plot in plots(whole_run())]
    assert len(titles) == len(page.images) == 9
    assert set(titles) <= set(page.headings)
    for image in page.images:
        assert len(image["alt"]) > 20
        drawn = base64.b64decode(image["src"].partition(",")[2])
        assert drawn.startswith(b"<?xml")
        assert drawn.count(b"<path") > 5


def test_every_table_is_in_the_page(page):
    assert {table.title for table in tables(whole_run())} <= set(page.headings)
    assert "key &lt;in use&gt;" in page.text
    assert "a peer: &lt;no network&gt;" in page.text


def test_a_run_of_nothing_has_a_page():
    parser = _Page()
    parser.feed(to_html(Results({}, (), {})))
    assert parser.open == []
    assert parser.images == []


def test_a_part_of_a_run_has_its_plots():
    for row in whole_run().rows:
        for plot in plots(Results({}, (row,), {})):
            assert plot.figure.axes


def test_claims_follow_from_the_figures():
    found = {claim.name: (claim.value, claim.met) for claim in claims(whole_run())}
    mm = "single query, 77 classes: server time of tenseal-mm over ours"
    assert found[mm] == (500.0, True)
    concrete = "single query, 77 classes: server time of concrete-ml-logreg over ours"
    assert found[concrete] == (5.0, False)
    assert found["block, 64 texts, 77 classes: server time of 64 single queries over it"] == (
        pytest.approx(64 * 4 / 30),
        True,
    )
    bulk = "bulk, 2,048 texts, 77 classes"
    assert found[f"{bulk}: server time a text"] == (pytest.approx(1e5 / 2048), True)
    assert found[f"{bulk}: up a text"] == (pytest.approx(5234824 / 2048), True)
    other = "server time a text of TenSEAL's batched tensor at 20 classes over ours"
    assert found[f"{bulk}: {other}"] == (pytest.approx(17.0), True)
    end = "end to end, texts in a call: {}, 8 classes: encrypted over plaintext"
    assert found[end.format(1)] == (pytest.approx(1.05), True)
    assert found[end.format("2,048")] == (pytest.approx(1.05), False)
    assert found["texts a second, 22 classes: two workers over one"] == (1.8, True)


def test_markdown_has_every_table_with_even_rows():
    text = to_markdown(whole_run())
    assert text.startswith("Measured on 2026-11-23 on 2 cores")
    for table in tables(whole_run()):
        assert f"### {table.title}\n" in text
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


@pytest.mark.parametrize(
    ("value", "text"), [(None, ""), (308, "308 B"), (13672, "13.7 KB"), (134217808, "134.2 MB")]
)
def test_sizes_are_short(value, text):
    assert size(value) == text


def test_the_command_writes_the_page_beside_the_results(tmp_path):
    results = tmp_path / "latest.json"
    replace(whole_run(), rows=(), extra={"memory": [MEMORY]}).save(results)
    call = CliRunner().invoke
    assert call(app, ["report", str(results)]).exit_code == 0
    assert (tmp_path / "latest.html").read_text("utf-8").startswith("<!doctype html>")
    printed = call(app, ["report", str(results), "--markdown"])
    assert "### Memory of the service" in printed.output
    assert call(app, ["report", str(tmp_path / "none.json")]).exit_code == 2
