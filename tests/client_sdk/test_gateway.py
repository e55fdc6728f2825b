"""The real gateway in front of the real service: plaintext in, the right answers out."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from contextlib import asynccontextmanager

import httpx2
import numpy as np
import pytest
from support.backbones import WORDS
from support.services import ScriptedService, problem

from veilhead import AsyncClient, Client
from veilhead.deidentify import Deidentifier, Finding
from veilhead.gateway.app import Gateway, Limits, create_app
from veilhead.gateway.callers import Callers
from veilhead.gateway.logs import RedactingFormatter
from veilhead.gateway.metrics import Metrics
from veilhead.gateway.server import check_exposure
from veilhead.gateway.upstream import Upstream
from veilhead_protocol.errors import InputError, NoBackboneError

KEY = "vh_0123456789abcdef_" + "S" * 43
TOKEN, OTHER = "a" * 32, "b" * 32


class Caller:
    """A thin caller: what an application has of text-embeddings-inference."""

    def __init__(self, gateway, http):
        self.gateway, self.http = gateway, http

    async def post(self, document, **options):
        return await self.http.post("/predict", json=document, **options)

    async def predict(self, inputs, **options):
        answer = await self.post({"inputs": inputs, **options})
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def metrics(self):
        return (await self.http.get("/metrics")).text


@pytest.fixture
def gateway(served, text_artifact):
    """Runs a gateway on the served model, and lets a coroutine function of it ask."""

    def run(work, *, callers=None, limits=None, model="colours", deidentify=None, **options):
        upstream = ScriptedService(httpx2.AsyncHTTPTransport())

        @asynccontextmanager
        async def started():
            metrics = Metrics()
            client = AsyncClient(
                served,
                model,
                transport=upstream,
                backbone=text_artifact / "backbone",
                deidentify=deidentify,
                on_query=metrics.queried,
                **options,
            )
            gate = Gateway(client, callers, limits or Limits(), metrics)
            async with (
                gate.running(),
                httpx2.AsyncClient(
                    transport=httpx2.ASGITransport(create_app(gate)), base_url="http://gateway"
                ) as http,
            ):
                yield Caller(gate, http)

        async def drive():
            async with started() as caller:
                return await work(caller, upstream)

        return asyncio.run(drive())

    return run


@pytest.fixture
def quick(monkeypatch):
    """Retries without waiting."""

    async def sleep(seconds):
        await asyncio.sleep(0)

    monkeypatch.setattr("veilhead.transport.anyio.sleep", sleep)


@pytest.fixture(scope="module")
def expected(text_artifact):
    """What a client answers by itself, as the gateway writes it."""
    with Client.local(text_artifact) as client:

        def answer(texts, function=None):
            rows = client.classify(texts, top_k=None, function_to_apply=function)
            return [[(item.label, item.score) for item in row] for row in rows]

        yield answer


def same(got, wanted):
    """Same labels in the same order (unless scores tie within the error), same scores."""
    assert sorted(item["label"] for item in got) == sorted(label for label, _ in wanted)
    scores = dict(wanted)
    for item in got:
        assert item["score"] == pytest.approx(scores[item["label"]], abs=2e-3)
    values = [item["score"] for item in got]
    assert values == sorted(values, reverse=True)


def test_one_text_gives_a_list_and_a_batch_a_list_of_lists(gateway, expected, texts):
    async def work(caller, _):
        return (
            await caller.predict(texts[0]),
            await caller.predict(texts[:3]),
            await caller.predict([[text] for text in texts[:3]]),
            await caller.predict([texts[0]]),
            await caller.predict(texts[0], raw_scores=True, truncate=True),
        )

    single, batch, nested, one, raw = gateway(work)
    wanted = expected(texts[:3])
    same(single, wanted[0])
    assert sum(item["score"] for item in single) == pytest.approx(1)
    for got in (batch, nested):
        assert len(got) == 3
        for row, answer in zip(got, wanted, strict=True):
            same(row, answer)
    assert len(one) == 1
    same(one[0], wanted[0])
    same(raw, expected(texts[:1], "none")[0])


def test_many_callers_get_their_own_answers_in_few_batches(gateway, expected):
    generator = np.random.default_rng(8)
    texts = [" ".join(generator.choice(WORDS, size=1 + place % 7)) for place in range(64)]

    async def work(caller, _):
        sizes = []
        logits_of = caller.gateway.client._logits_of

        async def spy(rows):
            sizes.append(len(rows))
            return await logits_of(rows)

        caller.gateway.client._logits_of = spy
        answers = await asyncio.gather(
            *(caller.predict(text, raw_scores=place % 2 == 0) for place, text in enumerate(texts))
        )
        return answers, sizes

    answers, sizes = gateway(work, limits=Limits(max_batch=16, max_wait_seconds=0.05))
    plain, raw = expected(texts), expected(texts, "none")
    for place, answer in enumerate(answers):
        same(answer, raw[place] if place % 2 == 0 else plain[place])
    assert sum(sizes) == 64
    assert max(sizes) <= 16
    assert len(sizes) <= 16


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ({"inputs": [["acute", "pain"]]}, "pairs"),
        ({"inputs": []}, "empty"),
        ({"inputs": [[]]}, "string"),
        ({"inputs": [["a", "b", "c"]]}, "string"),
        ({"inputs": ["a", 1]}, "string"),
        ({"inputs": 1}, "string or a list"),
        ({"inputs": None}, "string or a list"),
        ({}, "inputs"),
        ([], "inputs"),
        ({"inputs": "a", "raw_scores": "yes"}, "raw_scores"),
        ({"inputs": "a", "truncate": 1}, "truncate"),
        ({"inputs": "a", "truncation_direction": "Left"}, "right"),
        ({"inputs": "\ud800"}, "surrogate"),
    ],
    ids=str,
)
def test_what_is_not_a_request_is_refused(gateway, document, says):
    async def work(caller, upstream):
        content = json.dumps(document).encode()
        answer = await caller.http.post(
            "/predict", content=content, headers={"Content-Type": "application/json"}
        )
        return answer, upstream.seen("infer")

    answer, sent = gateway(work)
    assert answer.status_code == 422
    assert answer.json()["error_type"] == "Validation"
    assert says in answer.json()["error"]
    if says != "surrogate":
        assert sent == []


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_what_a_web_page_could_post_is_refused(gateway, content_type):
    async def work(caller, _):
        return await caller.http.post(
            "/predict", content=b'{"inputs": "a"}', headers={"Content-Type": content_type}
        )

    assert gateway(work).status_code == 422


def test_bodies_and_batches_have_limits(gateway):
    async def work(caller, upstream):
        answers = [
            await caller.post({"inputs": ["a"] * 5}),
            await caller.post({"inputs": "a" * 200}),
        ]
        return answers, upstream.seen("infer"), await caller.predict(["a"] * 4)

    answers, sent, fitting = gateway(work, limits=Limits(max_texts=4, max_body_bytes=100))
    assert [answer.status_code for answer in answers] == [413, 413]
    assert {answer.json()["error_type"] for answer in answers} == {"Validation"}
    assert sent == []
    assert len(fitting) == 4


@pytest.mark.parametrize(
    "limits",
    [
        {"max_batch": 0},
        {"max_texts": 0},
        {"max_waiting": 0},
        {"max_body_bytes": 0},
        {"max_wait_seconds": -1},
        {"max_wait_seconds": float("nan")},
    ],
    ids=str,
)
def test_limits_are_checked(limits):
    with pytest.raises(InputError):
        Limits(**limits)


def test_a_full_gateway_says_so_and_recovers(gateway):
    async def work(caller, upstream):
        held = asyncio.Event()

        async def wait(inner, request):
            await held.wait()
            return await inner.handle_async_request(request)

        upstream.on("infer", *[wait] * 64)
        asked = [asyncio.create_task(caller.post({"inputs": "pain"})) for _ in range(40)]
        await asyncio.wait(asked, timeout=30, return_when=asyncio.FIRST_COMPLETED)
        held.set()
        answers = [await task for task in asked]
        return answers, await caller.predict("pain")

    limits = Limits(max_batch=1, max_wait_seconds=0.0, max_waiting=8)
    answers, after = gateway(work, limits=limits)
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.status_code for answer in answers} == {200, 429}
    assert all(answer.json()["error_type"] == "Overloaded" for answer in refused)
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert len(after) == 4


@pytest.mark.parametrize(
    ("events", "status", "kind"),
    [
        ([httpx2.ConnectError("refused")] * 5, 502, "Backend"),
        ([problem(503, "worker-unavailable")] * 5, 503, "Unhealthy"),
        ([problem(429, "rate")] * 5, 503, "Unhealthy"),
        ([problem(401, "unauthorized")], 502, "Backend"),
        ([problem(410, "model-retired")], 502, "Backend"),
        ([problem(429, "budget-exhausted", **{"Retry-After": "77"})], 429, "Overloaded"),
        ([httpx2.Response(200, content=b"short")], 502, "Backend"),
    ],
    ids=["down", "busy", "rate", "key", "retired", "budget", "nonsense"],
)
def test_what_the_vendor_does_is_named(gateway, quick, events, status, kind):
    async def work(caller, upstream):
        upstream.on("infer", *events)
        failed = await caller.post({"inputs": "pain"})
        upstream.script.clear()
        return failed, await caller.predict("pain")

    failed, after = gateway(work)
    assert (failed.status_code, failed.json()["error_type"]) == (status, kind)
    if status in (429, 503):
        assert int(failed.headers["retry-after"]) == (77 if kind == "Overloaded" else 1)
    assert len(after) == 4  # the next caller is answered


def test_a_vendor_that_never_answers_holds_no_caller(gateway):
    async def work(caller, upstream):
        async def hang(inner, request):
            await asyncio.Event().wait()

        upstream.on("infer", hang)
        async with asyncio.timeout(30):
            failed = await caller.post({"inputs": "pain"})
            return failed, await caller.predict("pain")

    failed, after = gateway(work, call_timeout=1.0)
    assert (failed.status_code, failed.json()["error_type"]) == (502, "Backend")
    assert "call_timeout" in failed.json()["error"]
    assert len(after) == 4


def test_a_vendor_that_asks_for_a_long_pause_is_passed_on(gateway):
    async def work(caller, upstream):
        upstream.on("infer", problem(503, "draining", **{"Retry-After": "120"}))
        return await caller.post({"inputs": "pain"})

    failed = gateway(work)
    assert (failed.status_code, failed.headers["retry-after"]) == (503, "120")


def test_all_callers_of_a_batch_hear_why_it_failed(gateway, quick):
    async def work(caller, upstream):
        upstream.on("infer", *[problem(503, "worker-unavailable")] * 500)
        return await asyncio.gather(*(caller.post({"inputs": "pain"}) for _ in range(30)))

    answers = gateway(work, limits=Limits(max_batch=30, max_wait_seconds=0.05))
    assert {answer.status_code for answer in answers} == {503}


def test_callers_show_a_token(gateway):
    async def work(caller, upstream):
        headers = [
            {},
            {"Authorization": "Bearer"},
            {"Authorization": f"Bearer {'c' * 32}"},
            {"Authorization": f"Bearer {TOKEN}x"},
            {"Authorization": f"Basic {TOKEN}"},
            {"Authorization": TOKEN},
        ]
        refused = [await caller.post({"inputs": "pain"}, headers=item) for item in headers]
        sent = list(upstream.seen("infer"))
        taken = [
            await caller.post({"inputs": "pain"}, headers={"Authorization": f"Bearer {token}"})
            for token in (TOKEN, OTHER)
        ]
        open_to_all = [
            (await caller.http.get(path)).status_code for path in ("/health", "/metrics")
        ]
        return refused, sent, taken, open_to_all

    refused, sent, taken, open_to_all = gateway(work, callers=Callers([TOKEN, OTHER]))
    assert [answer.status_code for answer in refused] == [401] * 6
    assert all(answer.headers["www-authenticate"] == "Bearer" for answer in refused)
    assert sent == []
    assert [answer.status_code for answer in taken] == [200, 200]
    assert open_to_all == [200, 200]


def test_tokens_come_from_a_file_of_ones_own(tmp_path):
    file = tmp_path / "callers"
    file.write_text(f"# application one\n{TOKEN}\n\n  {OTHER}  \n")
    file.chmod(0o644)
    with pytest.raises(InputError, match="chmod"):
        Callers.read(file)
    file.chmod(0o600)
    callers = Callers.read(file)
    assert callers.find(f"Bearer {TOKEN}") == 0
    assert callers.find(f"bearer {OTHER}") == 1
    assert callers.find("Bearer # application one") is None
    assert TOKEN not in repr(callers) + repr(vars(callers))
    with pytest.raises(InputError, match="cannot be read"):
        Callers.read(tmp_path / "absent")


@pytest.mark.parametrize(
    "content", ["", "# nobody\n", "short\n", f"{TOKEN}\nwith spaces in it {TOKEN}"]
)
def test_files_without_good_tokens_are_refused(tmp_path, content):
    file = tmp_path / "callers"
    file.write_text(content)
    file.chmod(0o600)
    with pytest.raises(InputError) as caught:
        Callers.read(file)
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "gateway.internal"])  # noqa: S104
def test_it_answers_nobody_unknown_beyond_loopback(host):
    def gate(callers):
        return Gateway(AsyncClient("http://127.0.0.1", "m"), callers, Limits(), Metrics())

    with pytest.raises(InputError, match="--callers"):
        check_exposure(gate(None), host)
    check_exposure(gate(None), "127.0.0.1")
    check_exposure(gate(Callers([TOKEN])), host)


def test_a_draining_gateway_answers_what_runs_and_takes_nothing_new(gateway):
    async def work(caller, upstream):
        held = asyncio.Event()

        async def wait(inner, request):
            await held.wait()
            return await inner.handle_async_request(request)

        upstream.on("infer", wait)
        running = asyncio.create_task(caller.post({"inputs": "pain"}))
        async with asyncio.timeout(30):
            while not upstream.seen("infer"):
                await asyncio.sleep(0.01)
        before = (await caller.http.get("/health")).status_code
        caller.gateway.stop()
        after = (await caller.http.get("/health")).status_code
        await asyncio.sleep(0)
        late = await caller.post({"inputs": "pain"})
        held.set()
        return before, after, late, await running

    before, after, late, running = gateway(work)
    assert (before, after) == (200, 503)
    assert (late.status_code, late.json()["error_type"]) == (503, "Unhealthy")
    assert running.status_code == 200


def test_a_caller_that_goes_away_leaves_the_others(gateway):
    async def work(caller, _):
        gone = asyncio.create_task(caller.gateway.batcher("").ask(["pain"]))
        stays = asyncio.create_task(caller.predict("pain"))
        await asyncio.sleep(0.01)
        gone.cancel()
        return await stays

    assert len(gateway(work, limits=Limits(max_wait_seconds=0.1))) == 4


CANARY = "canary severe jane@example.com"


class Fails:
    def find(self, text):
        if text:  # the gateway warms up with an empty one
            raise RuntimeError(text)
        return []


@pytest.mark.parametrize(
    "failing", [None, "upstream", "detector", "backbone", "body", "client", "batcher"]
)
def test_texts_reach_neither_logs_nor_metrics_nor_errors(
    gateway, quick, caplog, capfd, monkeypatch, failing
):
    async def work(caller, upstream):
        if failing == "upstream":
            upstream.on("infer", *[httpx2.ConnectError("refused")] * 5)
        document = {"inputs": [[CANARY, CANARY]]} if failing == "body" else {"inputs": CANARY}
        if failing == "backbone":

            def broken(rows, **_):
                raise RuntimeError(rows[0])

            monkeypatch.setattr(
                "veilhead_models.backbone.Backbone.embed_batches",
                lambda self, rows, **_: broken(rows),
            )

        async def leaking(rows, **_):
            raise RuntimeError(rows[0])

        if failing == "client":
            caller.gateway.client._logits_of = leaking
        if failing == "batcher":
            caller.gateway.batcher("").ask = leaking
        answer = await caller.post(document)
        assert answer.is_success == (failing is None)
        return answer.text + await caller.metrics()

    with caplog.at_level(logging.DEBUG):
        shown = gateway(work, deidentify=Deidentifier([Fails()]) if failing == "detector" else None)
    assert "canary" not in shown
    # httpx2 and asyncio log at their lowest level too: names and sizes.
    assert "canary" not in caplog.text
    assert "canary" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    "message",
    [
        "407, message='no', url='http://agent:pa55word@proxy.example:3128'",
        f"headers=<CIMultiDictProxy('Authorization': 'Bearer {KEY}')>",
    ],
)
def test_what_a_library_says_reaches_no_caller_with_its_secrets(gateway, quick, message, caplog):
    async def work(caller, upstream):
        upstream.on("infer", *[httpx2.ProxyError(message)] * 5)
        return await caller.post({"inputs": "red"})

    with caplog.at_level(logging.DEBUG, "veilhead"):
        answer = gateway(work)
    assert answer.status_code == 502
    assert "ProxyError" in answer.text
    for text in (answer.text, caplog.text):
        assert "pa55word" not in text
        assert KEY not in text


def test_what_a_service_repeats_reaches_no_caller_with_its_secrets(gateway, quick):
    async def work(caller, upstream):
        told = problem(403, "forbidden").json() | {"detail": f"not for Bearer {KEY}"}
        upstream.on("infer", httpx2.Response(403, json=told))
        return await caller.post({"inputs": "red"})

    answer = gateway(work)
    assert (answer.status_code, KEY in answer.text) == (502, False)


def test_a_log_line_holds_neither_a_traceback_nor_secrets():
    record = logging.LogRecord(
        "asyncio", logging.ERROR, "x", 1, "never retrieved http://a:pa55word@p\n%s", ("text",), None
    )
    try:
        raise ValueError("acute chest pain")
    except ValueError as error:
        record.exc_info = (ValueError, error, error.__traceback__)
    line = RedactingFormatter().format(record)
    assert "\n" not in line
    assert "ValueError at test_gateway.py" in line
    for hidden in ("pa55word", "chest", "text"):
        assert hidden not in line


async def hang(inner, request):
    await asyncio.sleep(600)


def test_a_request_ends_though_the_service_hangs(gateway):
    async def work(caller, upstream):
        upstream.on("infer", *[hang] * 5)
        first = await asyncio.gather(*(caller.post({"inputs": "red"}) for _ in range(5)))
        upstream.script.clear()
        return first, await caller.post({"inputs": "red"})

    first, after = gateway(work, limits=Limits(request_seconds=1.0, max_batch=1))
    assert [answer.status_code for answer in first] == [504] * 5
    assert first[0].json()["error_type"] == "Backend"
    assert after.status_code == 200


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        (hang, "timeout"),
        (httpx2.ConnectError(f"no http://agent:{KEY}@proxy"), "transport"),
        (problem(503, "draining"), "service-response"),
    ],
    ids=["hung", "gone", "draining"],
)
def test_health_tells_whether_the_service_answers(gateway, event, kind):
    async def work(caller, upstream):
        watched = Upstream(caller.gateway.client._probe, seconds=1.0)
        caller.gateway.upstream = watched
        answers = []
        for events in ([], [event], [event], []):
            upstream.on("manifest", *events)
            await watched._ask()
            answers.append(await caller.http.get("/health"))
        return answers, upstream.seen("infer")

    answers, queries = gateway(work)
    assert [answer.status_code for answer in answers] == [200, 200, 503, 200]
    told = answers[2].json()["upstream"]
    assert (told["failed_probes"], told["failure"], told["ready"]) == (2, kind, False)
    assert KEY not in answers[2].text
    assert queries == []  # nothing of a text was sent


def test_deidentification_is_the_clients(gateway, monkeypatch):
    seen = []

    class Spy:
        def find(self, text):
            seen.append(text)
            if text:
                yield Finding(0, 4, "SYMPTOM", "pain")

    async def work(caller, _):
        return await caller.predict("pain")

    gateway(work, deidentify=Deidentifier([Spy()]))
    assert "pain" in seen


def test_metrics_count_sizes_and_times(gateway, texts):
    async def work(caller, _):
        await caller.predict(texts[:5])
        await caller.post({})
        return await caller.metrics()

    found = gateway(work)
    assert 'veilhead_gateway_requests_total{status="200"} 1.0' in found
    assert 'veilhead_gateway_requests_total{status="422"} 1.0' in found
    assert "veilhead_gateway_batch_texts_sum 5.0" in found
    assert "veilhead_gateway_waiting_texts 0.0" in found
    assert re.search(r'veilhead_gateway_upstream_bytes_total\{direction="out"\} [1-9]', found)
    assert re.search(r"veilhead_gateway_round_trip_seconds_count [1-9]", found)


def test_a_model_without_a_backbone_is_refused_at_the_start(gateway):
    async def work(caller, _):
        raise AssertionError("it does not start")

    with pytest.raises(NoBackboneError):
        gateway(work, model="model")
