"""What every answer promises, whatever was asked."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any, Final

from veilhead_benchmarks.hostile.wire import Answer, Request
from veilhead_benchmarks.hostile.world import Caller, World
from veilhead_protocol.wire import REPLY_HEADER_BYTES
from veilhead_service.problems import MEDIA_TYPE, PROBLEM_TYPE
from veilhead_service.tenants import KeyScope

#: Bytes of a request in a row that no refusal may hold.
_LEAK_BYTES: Final = 8

#: (status, code, retryable) of the problems of docs/http-api.md.
PROBLEMS: Final = frozenset(
    {(400, code, False) for code in ("malformed-request", "malformed-range", "body-incomplete")}
    | {(401, "unauthenticated", False), (403, "forbidden", False)}
    | {(404, code, False) for code in ("not-found", "model-not-found", "file-not-found")}
    | {(404, "key-not-registered", False), (405, "method-not-allowed", False)}
    | {(408, "body-timeout", False), (409, "wrong-model", False), (410, "model-retired", False)}
    | {(413, "body-too-large", False), (415, "unsupported-media-type", False)}
    | {(416, "range-not-satisfiable", False)}
    | {
        (422, code, False)
        for code in (
            "malformed-digest", "invalid-request", "digest-mismatch", "wrong-length",
            "wrong-message-type", "unsupported-format-version", "wrong-parameters",
            "unknown-prng", "unknown-domain", "nonzero-padding", "wrong-layout", "seed-reused",
            "residue-out-of-range", "zero-polynomial",
        )
    }
    | {(429, code, True) for code in ("rate-limited", "budget-exhausted")}
    | {
        (503, code, True)
        for code in (
            "state-unavailable", "access-log-unavailable", "queue-full", "draining",
            "worker-unavailable",
        )
    }
)  # fmt: skip

#: What a good answer's status may be, by route and method. The routes are told apart in this order.
_ROUTES: Final[tuple[tuple[str, re.Pattern[str], dict[str, set[int]]], ...]] = tuple(
    (name, re.compile(pattern, re.DOTALL), answers)
    for name, pattern, answers in (
        ("/v1/models", r"/v1/models", {"GET": {200}}),
        ("/v1/models/{name}", r"/v1/models/[^/]+", {"GET": {200, 304}}),
        ("…/card", r"/v1/models/[^/]+/card", {"GET": {200}}),
        ("…/files/{path}", r"/v1/models/[^/]+/files/.*", {"GET": {200, 206, 304}}),
        ("…/infer", r"/v1/models/[^/]+/infer", {"POST": {200}}),
        (
            "/v1/keys/{id}",
            r"/v1/keys/[^/]+",
            {"PUT": {200, 201}, "HEAD": {200}, "DELETE": {204}},
        ),
        ("/v1/usage", r"/v1/usage", {"GET": {200}}),
        ("/metrics", r"/metrics", {"GET": {200}}),
        ("/livez", r"/livez", {"GET": {200}}),
        ("/readyz", r"/readyz", {"GET": {200}}),
        ("/version", r"/version", {"GET": {200}}),
        (
            "documentation",
            r"/openapi\.json|/docs|/docs/oauth2-redirect",
            {"GET": {200}, "HEAD": {200}},
        ),
    )
)
_OTHER: Final = "(no route)"

#: What a path without a route may be answered with.
_NOWHERE: Final = (401, 403, 404, 429, 503)
_OPEN_PATHS: Final = ("/livez", "/readyz")

#: Words of the documentation: a refusal may hold them although a request does, too.
_PUBLIC: Final = (
    b"GET /v1/models lists /v1/keys/{id} GET /v1/usage expected Content-Type "
    b"application/octet-stream application/problem+json Range: bytes=FIRST-LAST "
    b"expected Authorization: Bearer and an API key of this service the manifest lists no file "
    b"content-type content-length charset=utf-8 "
    b"expected a request of HTTP/1 that names one Host and can be read in one way"
)


def _route(path: str) -> tuple[str, dict[str, set[int]]]:
    for name, pattern, answers in _ROUTES:
        if pattern.fullmatch(path):
            return name, answers
    return _OTHER, {}


def caller_of(world: World, request: Request) -> Caller | None:
    """Whose API key a request carries; None when it is not exactly one good key."""
    found = [value for name, value in request.headers if name == b"authorization"]
    if len(found) != 1:
        return None
    # Space around a value is none of it: RFC 9112, 5.1.
    scheme, _, written = found[0].decode("latin-1").strip(" \t").partition(" ")
    good = {caller.written: caller for caller in world.callers}
    return good.get(written) if scheme.lower() == "bearer" else None


def _printed_runs(data: bytes) -> bytes:
    return b"\n".join(re.findall(rb"[\x20-\x7e]{%d,}" % _LEAK_BYTES, data))


def _holds_of_request(shown: bytes, request: Request) -> bool:
    """Whether eight bytes in a row of a request stand in a refusal, as they are or as digits.

    The refusal is ASCII: only what is printable in the request can stand there as it is.
    """
    raw = [request.body, request.query, request.target.encode(), request.path.encode()]
    raw += [value for _, value in request.headers]
    sent = b"\n".join(_printed_runs(part) for part in raw)
    for at in range(len(shown) - _LEAK_BYTES + 1 if sent else 0):
        window = shown[at : at + _LEAK_BYTES]
        if window in sent and window not in _PUBLIC:
            return True
    for digits in re.findall(rb"[0-9a-fA-F]{16,}", shown):
        if bytes.fromhex(digits[: len(digits) // 2 * 2].decode()) in request.body:
            return True
    return False


def _broken_problem(answer: Answer, request: Request) -> tuple[str, str | None]:
    """The code of a refusal, and what is wrong with it."""
    try:
        document: dict[str, Any] = json.loads(answer.body)
        code = str(document["type"]).removeprefix(PROBLEM_TYPE)
        found = (answer.status, code, document["retryable"])
        fields = {"type", "title", "status", "detail", "request_id", "retryable"}
        typed = set(document) == fields and document["status"] == answer.status
        request_id = str(document["request_id"])
    except (ValueError, KeyError, TypeError):
        return "", "the refusal is not a problem document"
    if answer.headers.get("content-type") != MEDIA_TYPE or not typed:
        return code, "the refusal is not a typed problem"
    if found not in PROBLEMS:
        return code, f"{found} is not documented"
    if request_id != answer.headers.get("x-request-id"):
        return code, "the problem's request id is not the answer's"
    if ("retry-after" in answer.headers) is not document["retryable"]:
        return code, "Retry-After and retryable disagree"
    if not answer.body.isascii():
        return code, "the refusal holds what is not ASCII"
    shown = answer.body.replace(request_id.encode(), b"")
    shown = shown.replace(str(document["type"]).encode(), b"")
    others = ("x-request-id", "content-type", "content-length", "date", "connection")
    values = [value for name, value in answer.headers.items() if name not in others]
    shown += b"\0" + "\0".join(values).encode("latin-1")
    if _holds_of_request(shown, request):
        return code, "the refusal holds bytes of the request"
    return code, None


def _needed(route: str) -> KeyScope | None:
    if route in ("…/infer", "/v1/keys/{id}"):
        return KeyScope.INFER
    if route.startswith(("/v1/models", "…/files")):
        return KeyScope.MODELS
    return {"/v1/usage": KeyScope.USAGE, "/metrics": KeyScope.METRICS}.get(route)


def _broken_success(
    request: Request, answer: Answer, route: str, caller: Caller | None
) -> str | None:
    """What is wrong with an answer that is none of the problems."""
    if caller is None:
        return None if request.path in _OPEN_PATHS else "answered without a good API key"
    scope = _needed(route)
    if scope is not None and scope not in caller.scopes:
        return f"answered without the scope {scope}"
    id_in_path = request.path.rpartition("/")[2]
    asks_for_key = route == "/v1/keys/{id}" and request.method in ("HEAD", "DELETE")
    if asks_for_key and id_in_path not in caller.key_ids:
        return "a key that is not the tenant's was found"
    if route == "…/infer":
        sent = request.body
        if (
            answer.body[REPLY_HEADER_BYTES - 32 : REPLY_HEADER_BYTES]
            != hashlib.sha256(sent).digest()
        ):
            return "the reply does not belong to the query"
        if sent[72:104].hex() not in caller.key_ids:
            return "a query under a key that is not the tenant's was answered"
    return None


def broken(world: World, request: Request, answer: Answer) -> tuple[str, str, str | None]:
    """The route and the code of an answer, and the first promise that it broke."""
    path = request.path
    route, successes = _route(path)
    if not re.fullmatch(r"[0-9a-f]{32}", answer.headers.get("x-request-id", "")):
        return route, "", "there is no request id"
    caller = caller_of(world, request)
    code = ""
    if answer.status < 400:
        if answer.status not in successes.get(request.method, ()):
            return route, code, f"{answer.status} is not documented for this route and method"
        wrong = _broken_success(request, answer, route, caller)
        if wrong is not None:
            return route, code, wrong
    else:
        code, wrong = "", None
        if request.method != "HEAD" or answer.body:  # whose answer has no body to read
            code, wrong = _broken_problem(answer, request)
        elif answer.headers.get("content-type") != MEDIA_TYPE:
            wrong = "the refusal is not a typed problem"
        if wrong is not None:
            return route, code, wrong
        if code == "malformed-request":
            wrong = "a request that is plain HTTP was called malformed"
            return route, code, wrong if request.is_plain else None
    if route == _OTHER and answer.status not in _NOWHERE:
        return route, code, f"got {answer.status} where no route is"
    if caller is None and path not in _OPEN_PATHS and answer.status != 401:
        return route, code, f"got {answer.status} without a good API key, expected 401"
    if route == "/metrics" and answer.status == 200:
        return route, code, None  # the operator's: they name all tenants
    shown = answer.body + "\n".join(answer.headers.values()).encode("latin-1")
    for other_caller in world.callers:
        words = {other_caller.name, other_caller.written[3:19]} | other_caller.key_ids
        words = {word for word in words if word not in path}  # an id that a client wrote itself
        if other_caller is not caller and any(word.encode() in shown for word in words):
            return route, code, "the answer tells of another tenant"
    return route, code, None
