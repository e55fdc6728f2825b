"""A file of the tokenizers library, called as transformers would: for clients without it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class PlainTokenizer:
    """What an `Embedder` uses of a tokenizer of transformers, with the same answers.

    Attributes:
        backend_tokenizer: the tokenizer itself.
        padding_side: where padding goes: `left` or `right`.
        pad_token_id: what padding is.
        pad_token_type_id: the token type of padding.
    """

    def __init__(self, content: bytes) -> None:
        """Read a tokenizer that says how texts are cut and padded.

        Raises:
            ValueError: when it does not say so.
            Exception: when it is no tokenizer.
        """
        from tokenizers import Tokenizer

        self._content = content
        self.backend_tokenizer: Tokenizer = Tokenizer.from_buffer(content)
        padding: dict[str, Any] | None = self.backend_tokenizer.padding
        truncation: dict[str, Any] | None = self.backend_tokenizer.truncation
        if padding is None or truncation is None:
            raise ValueError("the tokenizer does not say how texts are cut and padded")
        self.padding_side: str = padding["direction"]
        self.pad_token_id: int = padding["pad_id"]
        self.pad_token_type_id: int = padding["pad_type_id"]
        self._truncation_side: str = truncation["direction"]
        self.backend_tokenizer.no_padding()  # done by the embedder, of texts of like length

    def __call__(
        self,
        texts: Sequence[str],
        *,
        max_length: int,
        stride: int = 0,
        return_overflowing_tokens: bool = False,
        **_: bool,
    ) -> dict[str, list[Any]]:
        """Texts as token ids, and what else is known of the tokens. Not for two threads at once.

        Args:
            texts: the texts.
            max_length: where they are cut, special tokens counted.
            stride: how many tokens the pieces of a cut text have in common.
            return_overflowing_tokens: whether what was cut off follows, as rows of its own.
        """
        self.backend_tokenizer.enable_truncation(
            max_length, stride=stride, direction=self._truncation_side
        )
        found = [
            (row, part)
            for row, encoding in enumerate(self.backend_tokenizer.encode_batch(list(texts)))
            for part in [encoding, *(encoding.overflowing if return_overflowing_tokens else ())]
        ]
        return {
            "input_ids": [part.ids for _, part in found],
            "token_type_ids": [part.type_ids for _, part in found],
            "special_tokens_mask": [part.special_tokens_mask for _, part in found],
            "offset_mapping": [part.offsets for _, part in found],
            "overflow_to_sample_mapping": [row for row, _ in found],
        }

    def num_special_tokens_to_add(self) -> int:
        """Special tokens that a text gets."""
        count: int = self.backend_tokenizer.num_special_tokens_to_add(is_pair=False)
        return count

    def convert_ids_to_tokens(self, token_id: int) -> str | None:
        """How the vocabulary spells a token."""
        spelling: str | None = self.backend_tokenizer.id_to_token(token_id)
        return spelling

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens."""
        decoder = self.backend_tokenizer.decoder
        text: str = " ".join(tokens) if decoder is None else decoder.decode(tokens)
        return text

    @cached_property
    def unk_token_id(self) -> int | None:
        """What stands for text that the vocabulary cannot spell."""
        model: dict[str, Any] = json.loads(self._content)["model"]  # not all models tell by code
        found: int | None = model.get("unk_id")
        if found is None and model.get("unk_token") is not None:
            found = self.backend_tokenizer.token_to_id(model["unk_token"])
        return found
