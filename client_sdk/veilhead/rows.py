"""Texts -> embeddings, row by row: a bad row is sent like the others, and fails by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from veilhead.deidentify import Deidentified, Deidentifier
from veilhead_protocol.errors import BackboneError, BatchError, InputError, VeilheadError

if TYPE_CHECKING:
    from veilhead_models.embedder import Embedder, Token, TokenWindow


@dataclass(frozen=True)
class EmbeddedRow:
    """A text's embedding.

    Attributes:
        place: the text's place among all of them.
        embedding: [d]; NaN when there is none: a decoy is sent, and the service sees no difference.
        error: why there is none.
    """

    place: int
    embedding: NDArray[np.float64] = field(repr=False)
    error: VeilheadError | None = None


def embedded_rows(
    backbone: Embedder, texts: Sequence[Any], deidentifier: Deidentifier | None = None
) -> Iterator[EmbeddedRow]:
    """Every text's embedding, or the error: the longest texts first, as they are asked for."""
    usable: dict[int, str] = {}
    for place, text in enumerate(texts):
        try:
            checked = _checked(text)
            usable[place] = checked if deidentifier is None else deidentifier(checked).text
        except VeilheadError as error:
            yield EmbeddedRow(place, np.full(backbone.dimensions, np.nan), error)
    yield from _embedded(backbone, usable)


def _embedded(backbone: Embedder, texts: dict[int, str]) -> Iterator[EmbeddedRow]:
    left = dict(texts)
    try:
        order = list(texts)
        for rows, embeddings in backbone.embed_batches(list(texts.values())):
            for row, embedding in zip(rows, embeddings.astype(np.float64), strict=True):
                del left[order[row]]
                yield EmbeddedRow(order[row], embedding)
    except Exception as error:  # out of memory, say: whatever torch raises
        rest = list(left.items())
        if len(rest) == 1:
            failure = BackboneError(f"the backbone failed on the text: {type(error).__name__}")
            yield EmbeddedRow(rest[0][0], np.full(backbone.dimensions, np.nan), failure)
            return
        # In halves: those that can be embedded are, and less memory is needed.
        yield from _embedded(backbone, dict(rest[: len(rest) // 2]))
        yield from _embedded(backbone, dict(rest[len(rest) // 2 :]))


@dataclass(frozen=True)
class TokenRows:
    """A text's tokens, and their embeddings.

    Attributes:
        windows: the tokens of each of its windows; none when there is an error.
        embeddings: [tokens of all windows, d]; NaN where there are none: decoys are sent.
        error: why there are none.
    """

    windows: list[tuple[Token, ...]] = field(repr=False)
    embeddings: NDArray[np.float64] = field(repr=False)
    error: VeilheadError | None = None


def embed_token_rows(
    backbone: Embedder,
    text: Any,
    row: int,
    stride: int | None,
    deidentifier: Deidentifier | None = None,
) -> TokenRows:
    """The tokens of one text, or the error. `row` is its number, for messages.

    The places of tokens are those in the text as it was given, de-identified or not. A backbone
    that fails on a text is the vendor's: there are then as many decoys as the text has tokens, and
    one where not even these can be counted.
    """
    count = 1
    error: VeilheadError
    try:
        checked = _checked(text)
        safe = None if deidentifier is None else deidentifier(checked)
        clean = checked if safe is None else safe.text
        count = backbone.count_tokens(clean, stride=stride)
        windows = backbone.embed_tokens([clean], stride=stride)[0]
        if safe is not None:
            windows = [_in_original(window, safe) for window in windows]
        nothing = np.zeros((0, backbone.dimensions))
        return TokenRows(
            [window.tokens for window in windows],
            np.concatenate([nothing, *(window.embeddings for window in windows)]),
        )
    except VeilheadError as found:  # no text, a detector that failed, or a stride that is none
        error = found
    except Exception as failure:  # out of memory, say: whatever torch raises
        error = BackboneError(
            f"the backbone failed on the text of row {row}: {type(failure).__name__}"
        )
    return TokenRows([], np.full((count, backbone.dimensions), np.nan), error)


def _in_original(window: TokenWindow, safe: Deidentified) -> TokenWindow:
    tokens = []
    for token in window.tokens:
        start, end = safe.in_original(token.start, token.end)
        tokens.append(replace(token, start=start, end=end))
    return replace(window, tokens=tuple(tokens))


def _checked(text: Any) -> str:
    """A row, when it is a text.

    Raises:
        InputError: when it is not.
    """
    if not isinstance(text, str):
        raise InputError(f"expected a string, got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(
            "the text holds half of a surrogate pair: decode it as UTF-8 again"
        ) from None
    return text


def as_rows(embeddings: ArrayLike, dimensions: int) -> NDArray[np.float64]:
    """Embeddings as float64 [batch, d].

    Raises:
        InputError: when they are not.
    """
    array = np.asarray(embeddings)
    if array.ndim != 2 or array.shape[1] != dimensions or array.dtype.kind not in "fiub":
        raise InputError(
            f"got an array of shape {list(array.shape)} and type {array.dtype}, "
            f"expected real numbers of shape [batch, {dimensions}]"
        )
    with np.errstate(over="ignore"):  # of longer floats: infinity is sent as a decoy
        return array.astype(np.float64)


def named(error: VeilheadError, row: int) -> VeilheadError:
    """The error of one row of a stream, whose message names it; several rows may share `error`."""
    copied = type(error).__new__(type(error), f"row {row}: {error}")
    vars(copied).update(vars(error))
    copied.__cause__ = error.__cause__
    return copied


def raise_errors(rows: Sequence[Any]) -> None:
    """Nothing, when none of the rows is an error.

    Raises:
        BatchError: when any is; it holds the others.
    """
    errors = {index: row for index, row in enumerate(rows) if isinstance(row, VeilheadError)}
    if errors:
        raise BatchError(
            [None if index in errors else row for index, row in enumerate(rows)], errors
        )
