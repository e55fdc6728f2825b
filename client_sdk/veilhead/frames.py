"""Answers as a pandas DataFrame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from veilhead.predictions import Prediction, Shape
from veilhead_protocol.errors import ClientError, VeilheadError

if TYPE_CHECKING:
    import pandas as pd


def columns(shape: Shape) -> list[str]:
    """`label`, `score`, `label_2`, `score_2`, ..., `error`: a flat row for each text."""
    count = len(shape.labels) if shape.top_k is None else min(shape.top_k, len(shape.labels))
    suffixes = ["", *(f"_{rank}" for rank in range(2, count + 1))]
    return [f"{name}{suffix}" for suffix in suffixes for name in ("label", "score")] + ["error"]


def flat(answer: list[Prediction] | VeilheadError, shape: Shape) -> list[Any]:
    """The values of a text's row, one for each of `columns`; None where there is none."""
    if isinstance(answer, VeilheadError):
        return [None] * (len(columns(shape)) - 1) + [str(answer)]
    return [value for item in answer for value in (item.label, item.score)] + [None]


def as_frame(
    index: Any, answers: Sequence[list[Prediction] | VeilheadError], shape: Shape
) -> pd.DataFrame:
    """A row for each answer, under the given index.

    Raises:
        ClientError: when pandas is not installed.
    """
    try:
        import pandas as pd
    except ModuleNotFoundError as error:
        raise ClientError("this needs pandas: pip install 'veilhead[tables]'") from error
    rows = [flat(answer, shape) for answer in answers]
    frame = pd.DataFrame(rows, index=index, columns=columns(shape))
    return frame.astype({name: "float64" for name in frame if name.startswith("score")})
