"""Texts -> embeddings, row by row: a bad row is sent like the others, and fails by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from veilhead_protocol.errors import BackboneError, BatchError, InputError, VeilheadError

if TYPE_CHECKING:
    from veilhead_models.embedder import Embedder, TokenWindow


def embed_rows(
    backbone: Embedder, texts: Sequence[Any], first: int
) -> tuple[NDArray[np.float64], dict[int, VeilheadError]]:
    """Embeddings [len(texts), d], and the errors of the rows that have none, by place in `texts`.

    A text that cannot be embedded becomes zeros, so that the service sees no difference. `first` is
    the number of the first row, for messages.
    """
    errors: dict[int, VeilheadError] = {
        place: error for place, text in enumerate(texts) if (error := _unusable(text)) is not None
    }
    usable = ["" if place in errors else text for place, text in enumerate(texts)]
    try:
        embeddings = backbone.embed(usable)
    except Exception as error:  # out of memory, say: whatever torch raises
        for place in range(len(texts)):
            failure = BackboneError(
                f"the backbone failed on the texts of rows {first} to {first + len(texts) - 1}: "
                f"{type(error).__name__}"
            )
            errors.setdefault(place, failure)
        embeddings = np.zeros((len(texts), backbone.dimensions))
    embeddings[list(errors)] = 0.0
    return embeddings, errors


def embed_token_rows(
    backbone: Embedder, text: Any, row: int, stride: int | None
) -> tuple[list[TokenWindow], VeilheadError | None]:
    """The windows of one text, or none and the error. `row` is its number, for messages."""
    error: VeilheadError | None = _unusable(text)
    if error is not None:
        return [], error
    try:
        return backbone.embed_tokens([text], stride=stride)[0], None
    except BackboneError as refused:  # a stride that is none
        return [], refused
    except Exception as failure:  # out of memory, say: whatever torch raises
        return [], BackboneError(
            f"the backbone failed on the text of row {row}: {type(failure).__name__}"
        )


def _unusable(text: Any) -> InputError | None:
    """Why a row is not a text, or None when it is one."""
    if not isinstance(text, str):
        return InputError(f"expected a string, got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return InputError("the text holds half of a surrogate pair: decode it as UTF-8 again")
    return None


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
    return array.astype(np.float64)


def named(error: VeilheadError, row: int) -> VeilheadError:
    """The same error, whose message says which row of a stream it is about."""
    error.args = (f"row {row}: {error}",)
    return error


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
