"""`veilhead doctor`: whether this machine can classify, and whether a service can be reached."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import anyio
import httpx2
import numpy as np
from anyio.from_thread import start_blocking_portal

from veilhead.api_key import find_api_key, read_api_key_file
from veilhead.session import SecretKey
from veilhead.transport import check_url
from veilhead_protocol.checks import (
    Check,
    Outcome,
    check_not_writable_by_others,
    check_packages,
    check_parameters,
    check_python,
    installed,
    passed,
)
from veilhead_protocol.errors import InputError, ManifestError, VeilheadError
from veilhead_protocol.files import cache_directory
from veilhead_protocol.loopback import is_loopback
from veilhead_protocol.manifest import FORMAT as MANIFEST_FORMAT
from veilhead_protocol.manifest import MAX_MANIFEST_BYTES, NAME_PATTERN, Manifest
from veilhead_protocol.parameters import PARAMETER_SETS, ParameterSet
from veilhead_protocol.wire import FORMAT_VERSION, KeyMessage

_PACKAGES: Final = ("veilhead", "tenseal", "numpy", "httpx2", "zstandard")
#: What can run a backbone; one of these sets is enough. The first is what the advice names.
_BACKBONE_PACKAGES: Final = (
    ("torch", "transformers", "tokenizers", "safetensors"),
    ("onnxruntime", "tokenizers"),
    ("onnxruntime-gpu", "tokenizers"),
)

_TIMEOUT_SECONDS: Final = 10.0
#: A clock that is further off breaks TLS certificates and the dates of retirements.
_SKEW_SECONDS: Final = 60.0
_SCALE_BITS: Final = 40

#: What an API key may do, and a request that shows it and changes nothing.
_SCOPES: Final = (
    ("models", "GET", "/v1/models"),
    ("infer", "HEAD", "/v1/keys/" + "0" * 64),
    ("usage", "GET", "/v1/usage"),
)
#: The scopes without which nothing can be classified.
_NEEDED_SCOPES: Final = frozenset({"models", "infer"})


def examine(
    url: str | None = None,
    model: str | None = None,
    *,
    api_key_file: Path | None = None,
    transport: httpx2.AsyncBaseTransport | None = None,
) -> list[Check]:
    """Every check of this machine, and of a service when its URL is given.

    Args:
        url: the service's base URL.
        model: a model whose manifest is read.
        api_key_file: where the vendor's API key is; VEILHEAD_API_KEY when it is None.
        transport: what carries requests, instead of the network.
    """
    checks = [check_python(), *check_packages(_PACKAGES, "veilhead"), *_check_backbone_packages()]
    checks += check_parameters()
    checks += [_check_encryption(parameters) for parameters in PARAMETER_SETS.values()]
    checks.append(_check_cache())
    api_key = None
    try:
        given = None if api_key_file is None else read_api_key_file(api_key_file)
        api_key = find_api_key(given)
    except InputError as error:
        advice = "ask the vendor for a key, in a file that is yours alone"
        checks.append(Check("API key", Outcome.FAIL, str(error), advice))
    if url is not None:
        with start_blocking_portal() as portal:
            checks += portal.call(_check_service, url, model, api_key, transport)
    elif model is not None:
        checks.append(Check("model", Outcome.FAIL, "no URL", "give --url with --model"))
    return checks


def _check_backbone_packages() -> list[Check]:
    """The first runtime that is whole; `Client` takes it too."""
    for packages in _BACKBONE_PACKAGES:
        if all(installed(package) for package in packages):
            found = ", ".join(f"{package} {version(package)}" for package in packages)
            return [passed("backbone", found)]
    missing = [package for package in _BACKBONE_PACKAGES[0] if installed(package) is None]
    found = f"not installed: {', '.join(missing)}"
    advice = (
        "pip install 'veilhead[torch]', or 'veilhead[onnx]' where the vendor's models have an ONNX "
        "form, unless you bring embeddings of your own"
    )
    return [Check("backbone", Outcome.WARN, found, advice)]


def _check_encryption(parameters: ParameterSet) -> Check:
    """A fresh key, its message read back, and an encryption of the right size. All in memory."""
    name = f"encryption {parameters.name}"
    try:
        key = SecretKey(parameters)
        read = KeyMessage.deserialize(key.message)
        encrypted = key.encrypt(np.ones(parameters.poly_modulus_degree), _SCALE_BITS)
        degree = parameters.poly_modulus_degree
        if read.parameters is not parameters or len(encrypted.c0) != degree:
            raise AssertionError("SEAL made something else than it was asked for")
    except (AssertionError, RuntimeError, ValueError, VeilheadError) as error:
        advice = "install a tenseal that this version was tested with: 0.3.18"
        return Check(name, Outcome.FAIL, type(error).__name__, advice)
    return passed(name, f"a key message of {len(key.message)} bytes")


def _check_cache() -> Check:
    directory = cache_directory()
    if not directory.exists():
        return passed("cache", f"{directory} is not there yet")
    if not os.access(directory, os.W_OK):
        advice = "let your user write there, or set VEILHEAD_CACHE"
        return Check("cache", Outcome.FAIL, f"{directory} cannot be written", advice)
    return check_not_writable_by_others(
        "cache", directory, advice=f"chmod o-w {directory}: it holds what runs on your texts"
    )


class _Service:
    """A service that is asked a few things, each answered in bounded time and bytes or failed."""

    def __init__(self, http: httpx2.AsyncClient) -> None:
        self._http = http

    async def ask(self, method: str, path: str) -> httpx2.Response:
        """The answer; of a body that is too long, the beginning and one byte too many.

        Raises:
            httpx2.HTTPError: when there is none in time.
        """
        with anyio.move_on_after(_TIMEOUT_SECONDS):
            async with self._http.stream(method, path) as response:
                # The stream itself: a compressed answer could grow without bound.
                if not isinstance(response.stream, httpx2.AsyncByteStream):
                    raise TypeError("the transport's answer cannot be read asynchronously")
                body = b""
                async for piece in response.stream:
                    body += piece[: MAX_MANIFEST_BYTES + 1 - len(body)]
                    if len(body) > MAX_MANIFEST_BYTES:
                        break
                headers = {"Date": date} if (date := response.headers.get("date")) else {}
                return httpx2.Response(response.status_code, headers=headers, content=body)
        raise httpx2.ReadTimeout(f"no whole answer within {_TIMEOUT_SECONDS:g} s")


async def _check_service(
    url: str,
    model: str | None,
    api_key: str | None,
    transport: httpx2.AsyncBaseTransport | None,
) -> list[Check]:
    try:
        base = check_url(url)
    except VeilheadError as error:
        return [Check("url", Outcome.FAIL, str(error), "use https://, or a service on loopback")]
    secured = "TLS" if base.scheme == "https" else "plain HTTP on loopback"
    checks = [passed("url", secured)]
    async with httpx2.AsyncClient(
        base_url=base,
        timeout=_TIMEOUT_SECONDS,
        transport=transport,
        trust_env=not is_loopback(base.host),
        follow_redirects=False,
        headers={"Accept-Encoding": "identity"}
        | ({} if api_key is None else {"Authorization": f"Bearer {api_key}"}),
    ) as http:
        service = _Service(http)
        try:
            ready = await service.ask("GET", "/readyz")
        except httpx2.HTTPError as error:
            advice = "check the URL, the name, the network, and that the service runs"
            return [*checks, Check("service", Outcome.FAIL, type(error).__name__, advice)]
        checks.append(_check_ready(ready))
        checks.append(_check_skew(ready.headers.get("date"), datetime.now(UTC)))
        try:
            versions = await service.ask("GET", "/version")
            checks.append(await _check_api_key(service, versions, given=api_key is not None))
            if versions.status_code != 401:
                checks.append(_check_formats(versions))
            if model is not None:
                checks.append(await _check_model(service, model))
        except httpx2.HTTPError as error:
            advice = "the service stopped answering; try again"
            checks.append(Check("service", Outcome.FAIL, type(error).__name__, advice))
    return checks


def _check_ready(answer: httpx2.Response) -> Check:
    if answer.is_success:
        return passed("service", "it is ready")
    advice = "the vendor's log says why; it may be starting or draining"
    return Check("service", Outcome.FAIL, f"it answers {answer.status_code} to /readyz", advice)


def _check_skew(date: str | None, now: datetime) -> Check:
    try:
        theirs = parsedate_to_datetime(date or "")
        skew = abs((now - theirs.astimezone(UTC)).total_seconds())
    except (TypeError, ValueError, OverflowError):
        return Check("clock", Outcome.WARN, "the service sends no date", "check your own clock")
    if skew > _SKEW_SECONDS:
        found = f"{skew:.0f} s from the service's"
        return Check("clock", Outcome.WARN, found, "keep both clocks by NTP")
    return passed("clock", f"{skew:.0f} s from the service's")


async def _check_api_key(service: _Service, versions: httpx2.Response, *, given: bool) -> Check:
    """Whether the service accepts the key, and what it lets the key do; the key is not shown.

    Args:
        service: is asked with the key.
        versions: the answer to /version, which any good key opens.
        given: whether there is a key.
    """
    name = "API key"
    if versions.status_code == 401:
        if not given:
            advice = "give the vendor's key: VEILHEAD_API_KEY or --api-key-file"
            return Check(name, Outcome.FAIL, "none given, and the service wants one", advice)
        found = "the service does not accept it: unknown, expired or revoked"
        return Check(name, Outcome.FAIL, found, "ask the vendor for another")
    if not given:
        return passed(name, "none given, and none is asked for")
    refused = {401, 403}
    may = [
        scope
        for scope, method, path in _SCOPES
        if (await service.ask(method, path)).status_code not in refused
    ]
    found = f"accepted, for: {', '.join(may) or 'nothing of this'}"
    missing = sorted(_NEEDED_SCOPES - set(may))
    if missing:
        advice = f"ask the vendor for one with the scopes {', '.join(missing)}"
        return Check(name, Outcome.FAIL, found, advice)
    return passed(name, found)


def _check_formats(answer: httpx2.Response) -> Check:
    name = "formats"
    theirs: Any = None
    if answer.is_success and len(answer.content) <= MAX_MANIFEST_BYTES:
        try:
            theirs = answer.json()
        except ValueError:
            theirs = None
    if not isinstance(theirs, dict):
        advice = "it may be no Veilhead service: check the URL"
        return Check(name, Outcome.WARN, f"{answer.status_code} from /version", advice)
    if (theirs.get("wire_format"), theirs.get("manifest_format")) != (
        FORMAT_VERSION,
        MANIFEST_FORMAT,
    ):
        return Check(
            name,
            Outcome.FAIL,
            f"the service speaks others than wire {FORMAT_VERSION}, {MANIFEST_FORMAT}",
            "install the version of veilhead that the vendor names",
        )
    return passed(name, f"wire {FORMAT_VERSION}, {MANIFEST_FORMAT}")


async def _check_model(service: _Service, model: str) -> Check:
    name = "model"
    if not NAME_PATTERN.fullmatch(model):
        return Check(name, Outcome.FAIL, "not a model's name", "ask the vendor for the name")
    answer = await service.ask("GET", f"/v1/models/{model}")
    if not answer.is_success:
        advice = {
            401: "give a key: VEILHEAD_API_KEY or --api-key-file",
            403: "the key may not use this model: ask the vendor",
            404: "no such model: ask the vendor for the name",
            410: "it was retired: ask the vendor for its successor",
        }.get(answer.status_code, "ask the vendor")
        return Check(name, Outcome.FAIL, f"{answer.status_code} for {model}", advice)
    try:
        if len(answer.content) > MAX_MANIFEST_BYTES:
            raise ManifestError("too long")
        manifest = Manifest.deserialize(answer.content)
    except VeilheadError as error:
        advice = "install the version of veilhead that the vendor names"
        return Check(name, Outcome.FAIL, f"its manifest is refused: {error}", advice)
    return passed(name, f"{manifest.parameters}, digest {manifest.digest.hex()}")
