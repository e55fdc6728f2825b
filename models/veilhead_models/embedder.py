"""Texts in, embeddings out, whatever runs the transformer."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from veilhead_protocol.errors import BackboneError
from veilhead_protocol.manifest import BackboneSection

#: Tokens, padding included, and texts that go through the transformer together on a CPU. More of
#: them no longer fit its caches: MiniLM embeds 128 texts of 256 tokens in 3.0 s four at a time and
#: in 3.7 s by 32, and 1,024 phrases of 13 tokens in 2.4 s by 8 and in 1.8 s by 64 (two cores of an
#: AMD EPYC, 2026-11-29).
_CPU_BATCH_TOKENS: Final = 1024
_CPU_BATCH: Final = 64

#: Texts that go together elsewhere.
_DEVICE_BATCH: Final = 32


@dataclass(frozen=True)
class Token:
    """A token of a text: where it is, and what it is called.

    Attributes:
        piece: as the vocabulary spells it; what stands in the text where it has no spelling.
        index: its place among the tokens of its window, special ones counted.
        start: where it begins in the text, in characters.
        end: where it ends.
        continues: whether it goes on with the word of the token before it.
    """

    piece: str
    index: int
    start: int
    end: int
    continues: bool


@dataclass(frozen=True, eq=False)
class TokenWindow:
    """Tokens that went through the transformer together, and their embeddings [tokens, d]."""

    embeddings: NDArray[np.float64]
    tokens: tuple[Token, ...]

    def __repr__(self) -> str:  # tokens are the text
        return f"TokenWindow(tokens={len(self.tokens)})"


class Embedder(ABC):
    """A loaded backbone: texts in, embeddings out.

    Attributes:
        section: what the manifest says of it.
        device: where it runs: `cuda`, `mps` or `cpu`.
        dimensions: d, values in an embedding.
        tokenizer: what makes tokens of texts.
    """

    def __init__(
        self,
        section: BackboneSection,
        tokenizer: Any,
        device: str,
        *,
        dimensions: int,
        padding: int,
        one_by_one: bool = False,
    ) -> None:
        """Keep what embedding needs.

        Args:
            section: what the manifest says of the backbone.
            tokenizer: a tokenizer of transformers, or a `PlainTokenizer`.
            device: where it runs.
            dimensions: d, values in an embedding.
            padding: the token id that texts are padded with.
            one_by_one: whether texts of different lengths may not go together.
        """
        self.section = section
        self.device = device
        self.dimensions = dimensions
        # Tokenizers keep their truncation in themselves, and break when two threads set it.
        self._lock = threading.Lock()
        self.tokenizer = tokenizer
        self._padding = padding
        self._one_by_one = one_by_one

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(name={self.section.name!r}, dimensions={self.dimensions}, "
            f"device={self.device!r})"
        )

    @abstractmethod
    def _run(self, inputs: Mapping[str, NDArray[np.int64]]) -> NDArray[np.float32]:
        """A batch through the transformer: [batch, d], or [batch, tokens, d] of tokens.

        `inputs` holds `input_ids`, `attention_mask` and, where the section has token types,
        `token_type_ids`, in this order, each [batch, tokens].
        """

    def embed(
        self,
        texts: Sequence[str],
        *,
        batch_size: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> NDArray[np.float64]:
        """Embeddings of texts, in their order: [len(texts), d].

        Args:
            texts: any number of texts; each is cut at the section's `max_tokens`.
            batch_size: texts that go through the transformer together; what is fastest when None.
            progress: called after every batch with the number of texts done so far.

        Raises:
            BackboneError: when `texts` is not a sequence of strings, or the backbone embeds tokens.
        """
        embeddings = np.zeros((len(texts), self.dimensions))  # [texts, d]
        done = 0
        for rows, batch in self.embed_batches(texts, batch_size=batch_size):
            embeddings[rows] = batch
            done += len(rows)
            if progress is not None:
                progress(done)
        return embeddings

    def embed_batches(
        self, texts: Sequence[str], *, batch_size: int | None = None
    ) -> Iterator[tuple[list[int], NDArray[np.float32]]]:
        """As `embed`, batch by batch, the longest texts first.

        Yields:
            The places of a batch in `texts`, and its embeddings [batch, d].

        Raises:
            BackboneError: as `embed`.
        """
        if self.section.pooling == "tokens":
            raise BackboneError(
                f"the backbone {self.section.name!r} embeds the tokens of a text, not the text"
            )
        clean = _clean(texts)
        if not clean:
            return
        tokens, types = self._tokens(clean)
        # Texts of like length go together, or padding would be most of the work.
        order = sorted(range(len(tokens)), key=lambda row: len(tokens[row]), reverse=True)
        start = 0
        while start < len(order):
            size = batch_size or self._fastest(len(tokens[order[start]]))
            rows = order[start : start + (1 if self._one_by_one else size)]
            start += len(rows)
            padded = self._padded(
                [tokens[row] for row in rows],
                None if types is None else [types[row] for row in rows],
            )
            yield rows, self._checked(self._run(padded), (len(rows), self.dimensions))

    def _fastest(self, longest: int) -> int:
        """How many texts go together best, of which the longest has so many tokens."""
        if self.device != "cpu":
            return _DEVICE_BATCH
        fitting = _CPU_BATCH_TOKENS // max(1, longest)
        return max(1, min(fitting, _CPU_BATCH))

    def embed_tokens(
        self, texts: Sequence[str], *, stride: int | None = None
    ) -> list[list[TokenWindow]]:
        """Embeddings of the tokens of texts, special tokens left out.

        Args:
            texts: any number of texts.
            stride: None cuts each text at the section's `max_tokens`; otherwise a longer text
                becomes several windows, which overlap by so many tokens.

        Returns:
            The windows of each text, in order.

        Raises:
            BackboneError: when `texts` is not a sequence of strings, the backbone embeds whole
                texts, or the stride leaves nothing to advance by.
        """
        clean = _clean(texts)
        encoded = self._token_windows(clean, stride)
        if not clean:
            return []
        windows: list[list[TokenWindow]] = [[] for _ in clean]
        for index, text in enumerate(encoded["overflow_to_sample_mapping"]):
            if stride is None and windows[text]:
                continue
            ids: list[int] = encoded["input_ids"][index]
            types = encoded["token_type_ids"][index] if self.section.token_types else None
            padded = self._padded([ids], None if types is None else [types])
            (made,) = self._checked(self._run(padded), (1, len(ids), self.dimensions))
            special = encoded["special_tokens_mask"][index]
            kept = [place for place in range(len(ids)) if not special[place]]
            spans = encoded["offset_mapping"][index]
            windows[text].append(
                TokenWindow(
                    embeddings=made[kept].astype(np.float64),
                    tokens=tuple(
                        self._token(clean[text], ids[place], place, *spans[place]) for place in kept
                    ),
                )
            )
        return windows

    def _checked(self, made: NDArray[np.float32], expected: tuple[int, ...]) -> NDArray[np.float32]:
        """What the backbone made, when it has the shape that it said.

        A graph of the vendor's could make another one of chosen texts: whatever that breaks later
        would tell them from the others.

        Raises:
            BackboneError: when it has not.
        """
        if made.shape != expected or made.dtype.kind != "f":
            raise BackboneError(
                f"the backbone {self.section.name!r} made another shape than it declares: got "
                f"{list(made.shape)} of {made.dtype}, expected {list(expected)}"
            )
        return made

    def count_tokens(self, text: str, *, stride: int | None = None) -> int:
        """How many tokens `embed_tokens` would embed of a text, in all its windows.

        Raises:
            BackboneError: as `embed_tokens`.
        """
        masks: list[list[int]] = self._token_windows(_clean([text]), stride)["special_tokens_mask"]
        return sum(mask.count(0) for mask in (masks[:1] if stride is None else masks))

    def _token_windows(self, clean: list[str], stride: int | None) -> Any:
        """What the tokenizer says of the windows of texts; nothing when there are no texts."""
        if self.section.pooling != "tokens":
            raise BackboneError(
                f"the backbone {self.section.name!r} embeds whole texts, not their tokens"
            )
        fixed = self.tokenizer.num_special_tokens_to_add()
        if stride is not None and not 0 <= stride < self.section.max_tokens - fixed:
            raise BackboneError(
                f"got a stride of {stride}, expected 0 to {self.section.max_tokens - fixed - 1}"
            )
        if not clean:
            return None
        with self._lock:
            return self.tokenizer(
                clean,
                truncation=True,
                max_length=self.section.max_tokens,
                padding=False,
                return_token_type_ids=self.section.token_types,
                return_special_tokens_mask=True,
                return_offsets_mapping=True,
                return_overflowing_tokens=True,
                stride=0 if stride is None else stride,
            )

    def join(self, pieces: Sequence[str]) -> str:
        """The text of pieces of the vocabulary."""
        joined: str = self.tokenizer.convert_tokens_to_string(list(pieces))
        return joined

    def _token(self, text: str, token_id: int, index: int, start: int, end: int) -> Token:
        piece: str = self.tokenizer.convert_ids_to_tokens(token_id)
        if token_id == self.tokenizer.unk_token_id:
            return Token(text[start:end], index, start, end, continues=False)
        if getattr(self.tokenizer.backend_tokenizer.model, "continuing_subword_prefix", None):
            continues = len(piece) != end - start
        else:
            continues = start > 0 and " " not in text[start - 1 : start + 1]
        return Token(piece, index, start, end, continues)

    def batch(self, texts: Sequence[str]) -> dict[str, NDArray[np.int64]]:
        """What goes into the transformer for these texts, all at once: arrays [batch, tokens]."""
        return self._padded(*self._tokens(_clean(texts)))

    def _tokens(self, texts: list[str]) -> tuple[list[list[int]], list[list[int]] | None]:
        """Token ids of texts, and the tokens' types where the transformer wants them."""
        with self._lock:
            encoded = self.tokenizer(
                texts,
                truncation=True,
                max_length=self.section.max_tokens,
                padding=False,
                return_attention_mask=False,
                return_token_type_ids=self.section.token_types,
            )
        return encoded["input_ids"], encoded["token_type_ids"] if self.section.token_types else None

    def _padded(
        self, tokens: list[list[int]], types: list[list[int]] | None
    ) -> dict[str, NDArray[np.int64]]:
        """Token ids and types of texts, made equally long: what `_run` takes."""
        longest = max(1, *(len(row) for row in tokens))
        left = self.tokenizer.padding_side == "left"

        def padded(rows: list[list[int]], filling: int) -> NDArray[np.int64]:
            """[batch, tokens]"""
            whole = np.full((len(rows), longest), filling, dtype=np.int64)
            for row, values in enumerate(rows):
                start = longest - len(values) if left else 0
                whole[row, start : start + len(values)] = values
            return whole

        inputs = {
            "input_ids": padded(tokens, self._padding),
            "attention_mask": padded([[1] * len(row) for row in tokens], 0),
        }
        if types is not None:
            inputs["token_type_ids"] = padded(types, self.tokenizer.pad_token_type_id)
        return inputs


def _clean(texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise BackboneError("got something other than a sequence of strings to embed")
    # Lone surrogates, which JSON can smuggle into a str, have no UTF-8 form.
    return [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
