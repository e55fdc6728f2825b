"""The client against the real service, in process."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime, timedelta

import httpx2
import numpy as np
import pytest
from support.heads import unit_rows
from support.services import problem

from veilhead import (
    BatchError,
    ClientError,
    InputError,
    InsecureTransportError,
    NoBackboneError,
    NotFiniteError,
    NotSentError,
    Prediction,
    ReplyError,
    ServiceResponseError,
    TransportError,
)
from veilhead.session import Session
from veilhead_models.artifact import HeadArtifact
from veilhead_protocol.errors import BackboneError, ManifestError, ParameterError


class TestClassify:
    def test_one_text_gives_a_list_of_predictions(self, connect, text_artifact):
        client, _ = connect(text_artifact)
        (answer,) = client.classify("acute chest pain")
        assert isinstance(answer, Prediction)
        assert answer.label in client.labels
        assert 0.25 <= answer.score <= 1

    def test_a_list_gives_a_list_of_lists_in_order(self, connect, text_artifact, texts):
        client, _ = connect(text_artifact)
        answers = client.classify(texts, top_k=3)
        assert [len(row) for row in answers] == [3] * len(texts)
        plain = HeadArtifact.load(text_artifact).logits(client.embed(texts))
        for row, logits in zip(answers, plain, strict=True):
            best = np.sort(logits)
            if best[-1] - best[-2] > 2 * client.manifest.head.error_bound:
                assert row[0].label == client.labels[logits.argmax()]
            assert row[0].score >= row[1].score >= row[2].score

    def test_scores_are_a_softmax_over_all_labels(self, connect, text_artifact):
        client, _ = connect(text_artifact)
        answer = client.classify("acute fever", top_k=None)
        assert len(answer) == 4
        assert sum(item.score for item in answer) == pytest.approx(1)
        assert len(client.classify("acute fever", top_k=99)) == 4

    def test_lists_of_any_length_work(self, connect, text_artifact):
        client, _ = connect(text_artifact)
        assert client.classify([]) == []
        assert len(client.classify(["pain"])) == 1
        assert len(client.classify(("pain", "fever"))) == 2
        assert len(client.classify(["pain"] * 70)) == 70

    def test_an_empty_text_is_a_text(self, connect, text_artifact):
        client, _ = connect(text_artifact)
        assert len(client.classify("")) == 1

    @pytest.mark.parametrize("bad", [None, 7, float("nan"), b"pain", "\ud800"])
    def test_a_bad_row_keeps_the_others_and_is_sent_like_them(self, connect, text_artifact, bad):
        client, service = connect(text_artifact)
        with pytest.raises(BatchError) as caught:
            client.classify(["pain", bad, "fever"])
        assert list(caught.value.errors) == [1]
        assert isinstance(caught.value.errors[1], InputError)
        assert caught.value.results[1] is None
        assert [len(row) for row in (caught.value.results[0], caught.value.results[2])] == [1, 1]
        assert len(service.seen("infer")) == len(client._engine.session.plan(3))

    def test_a_bad_single_text_is_its_own_error(self, connect, text_artifact):
        client, _ = connect(text_artifact)
        with pytest.raises(InputError, match="surrogate"):
            client.classify("\ud800")

    @pytest.mark.parametrize("top_k", [0, -1])
    def test_top_k_is_checked(self, connect, text_artifact, top_k):
        client, _ = connect(text_artifact)
        with pytest.raises(ValueError, match="top_k"):
            client.classify("pain", top_k=top_k)

    def test_a_model_without_backbone_takes_embeddings_only(self, connect, head_artifact):
        client, _ = connect(head_artifact)
        with pytest.raises(NoBackboneError, match="32 values"):
            client.classify("pain")
        with pytest.raises(NoBackboneError):
            client.embed(["pain"])

    def test_a_closed_client_says_so(self, connect, text_artifact):
        client, _ = connect(text_artifact)
        client.close()
        for use in (client.classify, client.predict, client.embed):
            with pytest.raises((ClientError, RuntimeError), match=r"closed|not running"):
                use(["pain"])

    def test_many_threads_share_a_client(self, connect, text_artifact, texts):
        client, _ = connect(text_artifact)
        expected = [row[0].label for row in client.classify(texts)]
        found = {}

        def work(number):
            found[number] = [row[0].label for row in client.classify(texts[number::4])]

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        near = sum(found[n][i] != expected[n::4][i] for n in range(4) for i in range(25))
        assert near <= 1  # two logits nearer than the error bound may swap


class TestLogits:
    def test_they_are_within_the_bound(self, connect, head_artifact):
        client, _ = connect(head_artifact)
        rows = unit_rows(75, 32)
        logits = client.logits(rows)
        assert logits.shape == (75, 5)
        assert logits.dtype == np.float64
        error = np.abs(logits - HeadArtifact.load(head_artifact).logits(rows)).max()
        assert error <= client.manifest.head.error_bound

    def test_no_rows_give_no_rows(self, connect, head_artifact):
        client, service = connect(head_artifact)
        assert client.logits(np.zeros((0, 32))).shape == (0, 5)
        assert service.seen("infer") == []

    @pytest.mark.parametrize(
        "embeddings", [np.zeros(32), np.zeros((2, 31)), np.zeros((1, 1, 32)), [["a"] * 32]]
    )
    def test_the_shape_is_checked_before_anything_is_sent(self, connect, head_artifact, embeddings):
        client, service = connect(head_artifact)
        with pytest.raises(InputError, match=r"\[batch, 32\]"):
            client.logits(embeddings)
        assert service.seen("infer") == []

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_a_row_that_is_not_finite_is_sent_like_the_others(self, connect, head_artifact, value):
        client, service = connect(head_artifact)
        rows = unit_rows(40, 32)
        rows[33, 5] = value
        with pytest.raises(BatchError) as caught:
            client.logits(rows)
        assert isinstance(caught.value.errors[33], NotFiniteError)
        assert sum(row is not None for row in caught.value.results) == 39
        # Their order is left to chance: several are under way at once.
        sent = sorted(len(body) for body in service.seen("infer"))
        service.requests.clear()
        client.logits(unit_rows(40, 32))
        assert sent == sorted(len(body) for body in service.seen("infer"))

    def test_float32_and_long_embeddings_are_projected_as_in_plaintext(
        self, connect, head_artifact
    ):
        client, _ = connect(head_artifact)
        rows = (3 * unit_rows(3, 32)).astype(np.float32)
        expected = HeadArtifact.load(head_artifact).logits(rows)
        assert np.abs(client.logits(rows) - expected).max() <= client.manifest.head.error_bound


class TestKeys:
    def test_one_registration_serves_many_queries(self, connect, head_artifact):
        client, service = connect(head_artifact)
        for _ in range(9):
            client.logits(unit_rows(1, 32))
        assert len(service.seen("key")) == 1

    def test_a_key_is_replaced_after_a_hundred_queries(self, connect, head_artifact):
        client, service = connect(head_artifact)
        for _ in range(101):
            client.logits(unit_rows(1, 32))
        assert len(set(service.seen("key"))) == 2

    def test_a_key_that_the_service_lost_is_registered_again_and_the_query_is_the_same(
        self, connect, head_artifact
    ):
        client, service = connect(head_artifact)
        client.logits(unit_rows(1, 32))
        service.requests.clear()
        service.on("infer", problem(404, "key-not-registered"))
        assert client.logits(unit_rows(1, 32)).shape == (1, 5)
        first, second = service.seen("infer")
        assert first == second
        assert len(service.seen("key")) == 1

    def test_a_service_that_keeps_no_key_is_an_error_and_not_a_loop(self, connect, head_artifact):
        client, service = connect(head_artifact)
        service.on("infer", *[problem(404, "key-not-registered") for _ in range(9)])
        with pytest.raises(BatchError) as caught:
            client.logits(unit_rows(1, 32))
        assert caught.value.errors[0].problem == "key-not-registered"
        assert len(service.seen("infer")) == 3

    def test_keys_of_earlier_calls_are_forgotten_at_the_service(self, connect, head_artifact):
        client, service = connect(head_artifact)
        for _ in range(3):
            client.logits(unit_rows(8, 32))  # one request, which carries a key of its own
        assert (len(service.seen("key")), len(service.seen("forget"))) == (0, 0)
        for _ in range(202):
            client.logits(unit_rows(1, 32))
        assert (len(service.seen("key")), len(service.seen("forget"))) == (3, 2)
        assert len(service.seen("infer")) == 205  # no key was missed

    def test_a_service_that_does_not_hear_a_goodbye_changes_nothing(
        self, connect, head_artifact, monkeypatch
    ):
        client, service = connect(head_artifact)
        monkeypatch.setattr("veilhead.session.MAX_QUERIES_PER_KEY", 1)
        service.on("forget", httpx2.ConnectError("gone"), httpx2.ReadTimeout("slow"))
        for _ in range(3):
            assert client.logits(unit_rows(1, 32)).shape == (1, 5)
        assert service.seen("forget")

    def test_a_key_is_forgotten_once(self, connect, head_artifact, monkeypatch):
        client, service = connect(head_artifact)
        monkeypatch.setattr("veilhead.session.MAX_QUERIES_PER_KEY", 1)
        for _ in range(10):
            client.logits(unit_rows(3, 32))  # a block, and one under the session's key
        client.close()
        assert len(service.seen("key")) == 10
        assert len(service.seen("forget")) == len(service.seen("key"))

    def test_closing_forgets_the_key_at_the_service(self, connect, head_artifact):
        client, service = connect(head_artifact)
        client.logits(unit_rows(1, 32))
        client.close()
        client.close()
        assert len(service.seen("forget")) == 1


class TestRetries:
    @pytest.mark.parametrize(
        "failure",
        [
            httpx2.ConnectError("refused"),
            httpx2.ReadError("reset"),
            httpx2.ReadTimeout("slow"),
            httpx2.RemoteProtocolError("cut off"),
            problem(503, "worker-unavailable"),
            problem(429, "quota"),
            httpx2.Response(502, text="<html>"),
        ],
        ids=lambda failure: type(failure).__name__ + str(getattr(failure, "status_code", "")),
    )
    def test_a_retry_sends_the_same_bytes(self, connect, head_artifact, quick, failure):
        client, service = connect(head_artifact)
        service.on("infer", failure, failure)
        assert client.logits(unit_rows(1, 32)).shape == (1, 5)
        bodies = service.seen("infer")
        assert len(bodies) == 3
        assert len(set(bodies)) == 1
        assert len(quick) == 2

    @pytest.mark.parametrize("status", [429, 502, 503, 504])
    def test_retry_after_is_slept_up_to_a_bound(self, connect, head_artifact, quick, status):
        client, service = connect(head_artifact)
        for asked in ("7", "30", "0000000000007"):
            service.on("infer", problem(status, "x", **{"Retry-After": asked}))
        client.logits(unit_rows(1, 32))
        assert quick == [7, 30, 7]

    @pytest.mark.parametrize(
        ("asked", "seconds"),
        [
            ("31", 31),
            ("99999999", 99_999_999),
            ("9" * 9, 99_999_999),
            ("9" * 5000, 99_999_999),
            ("Fri, 31 Dec 9999 23:59:59 GMT", 99_999_999),
        ],
        ids=lambda value: str(value)[:20],
    )
    @pytest.mark.parametrize("status", [429, 503])
    def test_beyond_it_the_error_is_raised_at_once_and_says_how_long(
        self, connect, head_artifact, quick, status, asked, seconds
    ):
        client, service = connect(head_artifact)
        service.on("infer", problem(status, "x", **{"Retry-After": asked}))
        with pytest.raises(BatchError) as caught:
            client.logits(unit_rows(1, 32))
        error = caught.value.errors[0]
        assert isinstance(error, ServiceResponseError)
        assert (error.status, error.retry_after) == (status, seconds)
        assert str(seconds) in str(error)
        assert (len(service.seen("infer")), quick) == (1, [])

    @pytest.mark.parametrize(
        "asked",
        [
            "",
            "0",
            "-5",
            "1.5",
            "1e9",
            "inf",
            "nan",
            "7, 7",
            "soon",
            "\u0667",
            "Sat, 01 Jan 2000 00:00:00 GMT",
            "Fri, 31 Dec 99999 23:59:59 GMT",
            "Sat, 01 Jan 2000 00:00:00 +9999",
        ],
        ids=ascii,
    )
    def test_what_asks_for_no_pause_gets_the_usual_one(self, connect, head_artifact, quick, asked):
        client, service = connect(head_artifact)
        answer = problem(503, "x")
        answer.headers = httpx2.Headers([(b"Retry-After", asked.encode())])
        service.on("infer", answer)
        client.logits(unit_rows(1, 32))
        (pause,) = quick
        assert 0.05 <= pause <= 0.15

    @pytest.mark.parametrize("zone", ["GMT", "-0000", ""])
    def test_retry_after_may_be_a_date(self, connect, head_artifact, quick, zone):
        client, service = connect(head_artifact)
        then = datetime.now(UTC) + timedelta(seconds=20)
        asked = f"{then:%a, %d %b %Y %H:%M:%S} {zone}".strip()
        service.on("infer", problem(503, "x", **{"Retry-After": asked}))
        client.logits(unit_rows(1, 32))
        (pause,) = quick
        assert 15 <= pause <= 20 if zone == "GMT" else pause < 1

    def test_the_last_refusal_says_how_long_to_wait(self, connect, head_artifact, quick):
        client, service = connect(head_artifact)
        service.on("infer", *[problem(503, "x", **{"Retry-After": "9"}) for _ in range(5)])
        with pytest.raises(BatchError) as caught:
            client.logits(unit_rows(1, 32))
        assert caught.value.errors[0].retry_after == 9
        assert quick == [9, 9, 9, 9]

    def test_it_gives_up_after_five_attempts(self, connect, head_artifact, quick):
        client, service = connect(head_artifact)
        service.on("infer", *[httpx2.ConnectError("refused")] * 9)
        with pytest.raises(BatchError) as caught:
            client.logits(unit_rows(1, 32))
        assert isinstance(caught.value.errors[0], TransportError)
        assert len(service.seen("infer")) == 5

    @pytest.mark.parametrize("status", [400, 401, 404, 409, 410, 422, 500])
    def test_a_refusal_is_final(self, connect, head_artifact, quick, status):
        client, service = connect(head_artifact)
        service.on("infer", problem(status, "some-code"))
        with pytest.raises(BatchError) as caught:
            client.logits(unit_rows(1, 32))
        error = caught.value.errors[0]
        assert isinstance(error, ServiceResponseError)
        assert (error.status, error.problem, error.request_id) == (status, "some-code", "r1")
        assert len(service.seen("infer")) == 1
        assert quick == []

    @pytest.mark.parametrize("change", [lambda body: body[:-1], lambda body: body + b"\0"])
    def test_a_whole_answer_of_the_wrong_length_is_never_asked_for_again(
        self, connect, head_artifact, quick, change
    ):
        async def answer(inner, request):
            response = await inner.handle_async_request(request)
            return httpx2.Response(200, content=change(await response.aread()))

        client, service = connect(head_artifact)
        service.on("infer", answer)
        with pytest.raises(BatchError) as caught:
            client.logits(unit_rows(1, 32))
        assert isinstance(caught.value.errors[0], ReplyError)
        assert len(service.seen("infer")) == 1

    def test_a_hopeless_row_spares_the_rest_and_keeps_what_was_answered(
        self, connect, head_artifact
    ):
        client, service = connect(head_artifact, concurrency=1)
        service.on("infer", None, problem(410, "retired"))
        first, second, *others = client._engine.session.plan(201)
        third = sum(others)
        with pytest.raises(BatchError) as caught:
            client.logits(unit_rows(201, 32))
        kinds = [type(caught.value.errors.get(row)) for row in range(201)]
        assert kinds == (
            [type(None)] * first + [ServiceResponseError] * second + [NotSentError] * third
        )
        assert len(service.seen("infer")) == 2
        assert client.logits(unit_rows(1, 32)).shape == (1, 5)  # the next call tries again

    def test_a_bad_reply_does_not_keep_the_others_from_being_sent(self, connect, head_artifact):
        client, service = connect(head_artifact, concurrency=1)
        service.on("infer", httpx2.Response(200, content=b"short"))
        with pytest.raises(BatchError) as caught:
            client.logits(unit_rows(201, 32))
        first, *others = client._engine.session.plan(201)
        assert list(caught.value.errors) == list(range(first))
        assert len(service.seen("infer")) == 1 + len(others)

    def test_a_compressed_answer_is_refused(self, connect, head_artifact):
        client, service = connect(head_artifact)
        service.on("infer", httpx2.Response(200, headers={"Content-Encoding": "br"}))
        with pytest.raises(BatchError) as caught:
            client.logits(unit_rows(1, 32))
        assert isinstance(caught.value.errors[0], ReplyError)

    def test_what_a_service_says_cannot_drive_a_terminal(self, connect, head_artifact):
        client, service = connect(head_artifact)
        body = {"type": "urn:veilhead:problem:x", "detail": "\x1b[2J" + "long" * 999}
        service.on("infer", httpx2.Response(400, json=body))
        with pytest.raises(BatchError) as caught:
            client.logits(unit_rows(1, 32))
        message = str(caught.value.errors[0])
        assert message.isprintable()
        assert len(message) < 1000


class TestOpening:
    @pytest.mark.parametrize(
        "url", ["http://example.org", "http://10.0.0.1:8000", "ftp://127.0.0.1", "nonsense", ""]
    )
    def test_plain_http_is_for_loopback_only(self, make_client, url):
        with pytest.raises(InsecureTransportError):
            make_client(url, "model")

    def test_an_unknown_model_is_named(self, connect, head_artifact):
        with pytest.raises(ServiceResponseError, match="model-not-found"):
            connect(head_artifact, model="absent")

    def test_the_manifest_is_pinned(self, connect, head_artifact):
        client, _ = connect(head_artifact)
        digest = client.manifest.digest.hex()
        pinned, _ = connect(head_artifact, digest=digest)
        assert pinned.manifest.digest.hex() == digest

    def test_another_version_than_the_pinned_one_is_refused(self, make_client, head_artifact):
        served = (head_artifact / "manifest.json").read_bytes()

        class Liar(httpx2.AsyncBaseTransport):
            async def handle_async_request(self, request):
                return httpx2.Response(200, content=served)

        with pytest.raises(ManifestError, match="pinned"):
            make_client("http://127.0.0.1", "model", digest="0" * 64, transport=Liar())
        with pytest.raises(ManifestError, match="another model"):
            make_client("http://127.0.0.1", "other", transport=Liar())

    @pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"format":"x/9"}'])
    def test_a_manifest_that_is_none_is_refused(self, make_client, content):
        class Broken(httpx2.AsyncBaseTransport):
            async def handle_async_request(self, request):
                return httpx2.Response(200, content=content)

        with pytest.raises(ManifestError):
            make_client("http://127.0.0.1", "model", transport=Broken())

    def test_a_minimum_of_parameters_is_kept(self, connect, head_artifact, compact_artifact):
        with pytest.raises(ParameterError, match="standard at least"):
            connect(compact_artifact)
        client, _ = connect(compact_artifact, minimum_parameters="compact")
        assert client.logits(unit_rows(1, 32)).shape == (1, 5)
        with pytest.raises(ParameterError, match="unknown"):
            connect(head_artifact, minimum_parameters="weak")

    def test_nobody_there_is_a_transport_error(self, make_client, quick):
        with pytest.raises(TransportError, match="5 attempts"):
            make_client("http://127.0.0.1:9", "model")


class TestBackbone:
    def test_it_is_fetched_once_by_digest(self, connect, text_artifact, tmp_path, monkeypatch):
        monkeypatch.setenv("VEILHEAD_CACHE", str(tmp_path))
        seen = []
        client, service = connect(text_artifact, on_download=lambda path, size: seen.append(path))
        client.classify("pain")
        files = {entry.path for entry in client.manifest.backbone.files}
        assert set(seen) == files
        again, service = connect(text_artifact)
        again.classify("pain")
        assert service.seen("file") == []
        assert not list(tmp_path.rglob(".partial*"))

    def test_other_bytes_than_the_manifest_says_are_refused_and_not_kept(
        self, connect, text_artifact, tmp_path, monkeypatch
    ):
        monkeypatch.setenv("VEILHEAD_CACHE", str(tmp_path))

        async def tampered(inner, request):
            response = await inner.handle_async_request(request)
            body = bytearray(await response.aread())
            body[len(body) // 2] ^= 1
            return httpx2.Response(200, content=bytes(body))

        client, service = connect(text_artifact)
        service.on("file", tampered)
        with pytest.raises(BackboneError, match="SHA-256"):
            client.classify("pain")
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
        assert len(client.classify("pain")) == 1  # the next call fetches it again

    def test_a_damaged_cache_is_fetched_again(self, connect, text_artifact, tmp_path, monkeypatch):
        monkeypatch.setenv("VEILHEAD_CACHE", str(tmp_path))
        client, _ = connect(text_artifact)
        client.classify("pain")
        (damaged,) = tmp_path.rglob("config.json")
        damaged.write_text("{}")
        again, service = connect(text_artifact)
        again.classify("pain")
        assert len(service.seen("file")) == 1

    def test_a_local_path_is_checked_too(self, connect, text_artifact, tmp_path):
        client, service = connect(text_artifact, backbone=tmp_path)
        with pytest.raises(BackboneError):
            client.classify("pain")
        assert service.seen("file") == []


def test_padding_hides_the_number_of_texts_and_changes_no_answer(connect, head_artifact):
    rows = unit_rows(64, 32)
    plain, _ = connect(head_artifact)
    for count in (1, 33, 50, 64):
        traces = []
        padded, _ = connect(head_artifact, pad_batches=True, on_query=traces.append)
        found = padded.logits(rows[:count])
        assert found.shape == (count, 5)
        assert np.abs(found - plain.logits(rows[:count])).max() < 2e-3
        assert sum(trace.texts for trace in traces) == (1 if count == 1 else 64)


def test_the_next_query_is_prepared_once_an_answer_is_there_and_never_after_the_end(
    connect, head_artifact, monkeypatch
):
    prepared = []
    prepare = Session.prepare

    def watched(session):
        prepare(session)
        prepared.append(session.current_key_id)

    monkeypatch.setattr(Session, "prepare", watched)
    client, _ = connect(head_artifact)
    session = client._engine.session
    rows = unit_rows(40, client.manifest.head.dimensions)
    client.logits(rows)  # a request of several texts has a key of its own
    assert not prepared
    client.logits(rows[:1])
    deadline = time.monotonic() + 10
    while not prepared and time.monotonic() < deadline:
        time.sleep(0.005)
    assert prepared == [session.current_key_id]
    client.logits(rows[:1])
    client.close()
    time.sleep(0.05)
    assert None not in prepared
    assert session.current_key_id is None


def test_traces_hold_times_and_sizes(connect, head_artifact):
    traces = []
    client, _ = connect(head_artifact, on_query=traces.append)
    client.logits(unit_rows(3, 32))
    client.logits(unit_rows(9, 32))
    assert sorted(trace.texts for trace in traces) == [1, 1, 2, 8]
    for trace in traces:
        assert 0 < trace.evaluate_seconds < trace.round_trip_seconds
        assert (trace.key_bytes, trace.query_bytes) == (27240, 27336)


def test_a_text_that_the_backbone_fails_on_fails_alone(connect, text_artifact, texts, monkeypatch):
    from veilhead_models.backbone import Backbone

    embed = Backbone.embed_batches

    def fails_on_a_word(self, chunk, **_):
        for rows, embeddings in embed(self, chunk):
            if "poison" in {chunk[row] for row in rows}:
                raise RuntimeError("out of memory")
            yield rows, embeddings

    client, service = connect(text_artifact)
    client.classify(texts)
    sent = [len(body) for body in service.seen("infer")]
    service.requests.clear()
    monkeypatch.setattr(Backbone, "embed_batches", fails_on_a_word)
    with pytest.raises(BatchError) as caught:
        client.classify([*texts[:40], "poison", *texts[41:]])
    assert list(caught.value.errors) == [40]
    assert isinstance(caught.value.errors[40], BackboneError)
    assert "RuntimeError" in str(caught.value.errors[40])
    assert [len(body) for body in service.seen("infer")] == sent


def test_a_list_is_embedded_longest_first_and_sent_meanwhile(connect, text_artifact, monkeypatch):
    from veilhead_models.backbone import Backbone

    embed, lengths, asked = Backbone.embed_batches, [], threading.Event()

    def recorded(self, chunk, **_):
        for rows, embeddings in embed(self, chunk):
            lengths.extend(len(chunk[row]) for row in rows)
            if len(lengths) == len(chunk):
                assert asked.wait(10), "nothing was sent before the last batch"
            yield rows, embeddings

    async def noted(inner, request):
        asked.set()
        return await inner.handle_async_request(request)

    monkeypatch.setattr(Backbone, "embed_batches", recorded)
    client, service = connect(text_artifact)
    service.on("infer", noted)
    count = 4 * client._engine.chunk
    client.classify(["pain " * (1 + number % 7) for number in range(count)])
    assert lengths == sorted(lengths, reverse=True)
    assert len(lengths) == count
