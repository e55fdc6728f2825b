"""The computation of a backbone, as one torch module: token ids in, embeddings out.

Everything between a tokenizer and the embedding is in here, for whoever runs or exports it. Unlike
its neighbours this file imports torch at once: they import it when a backbone is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self

import torch
import transformers
from safetensors.torch import load_file

from veilhead_protocol.errors import BackboneError
from veilhead_protocol.manifest import BackboneSection

_ACTIVATIONS: Final = {
    "identity": torch.nn.Identity,
    "tanh": torch.nn.Tanh,
    "relu": torch.nn.ReLU,
    "gelu": torch.nn.GELU,
    "sigmoid": torch.nn.Sigmoid,
}

#: What loads the files, by pooling; an encoder where the pooling is ours.
_CLASSIFIERS: Final[dict[str, Any]] = {
    "architecture": transformers.AutoModelForSequenceClassification,
    "tokens": transformers.AutoModelForTokenClassification,
}

#: Parts of encoders that checkpoints of other tasks lack, and that no pooling of ours uses.
_UNUSED: Final = ("pooler.",)


class EmbeddingModule(torch.nn.Module):
    """What makes a backbone's embeddings. Make one with `backbone.embedding_module`.

    Attributes:
        config: the transformer's configuration.
        dimensions: d, values in an embedding.
        padding: the token id that the architecture takes for padding, when it knows one.
    """

    def __init__(
        self,
        transformer: Any,
        dense: torch.nn.Module,
        section: BackboneSection,
        dimensions: int,
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.dense = dense
        self.config = transformer.config
        self.dimensions = dimensions
        self.padding: int | None = getattr(self.config, "pad_token_id", None)
        self._section = section

    @classmethod
    def load(
        cls, directory: Path, section: BackboneSection, *, dtype: torch.dtype = torch.float32
    ) -> Self:
        """The module of a backbone, on the CPU and in evaluation mode.

        Args:
            directory: holds the section's files, checked, and nothing else.
            section: the manifest's account of the backbone.
            dtype: what the transformer computes in.

        Raises:
            BackboneError: when the files do not hold what the section says. Whatever transformers
                raises passes through.
        """
        loader = _CLASSIFIERS.get(section.pooling, transformers.AutoModel)
        with quiet():
            transformer, found = loader.from_pretrained(
                directory,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=dtype,
                output_loading_info=True,
            )
        absent = _UNUSED if section.split is None else (f"{section.split}.",)
        # transformers goes on with random numbers in their place.
        missing = [
            name
            for name in (*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"]))
            if not name.startswith(absent)
        ]
        if missing:
            raise BackboneError(
                f"the backbone's files lack {len(missing)} of the tensors of a "
                f"{type(transformer).__name__}, {min(missing)} for one"
            )
        if section.split is not None:
            dimensions = split(transformer, section.split).in_features
        else:
            dimensions = transformer.config.hidden_size
        dense = torch.nn.Sequential()
        for layer in section.dense:
            linear = _linear(directory / layer.file)
            dimensions = linear.out_features
            dense.extend((linear, _ACTIVATIONS[layer.activation]()))
        return cls(transformer, dense, section, dimensions).eval()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embeddings, float32: [batch, d], or [batch, tokens, d] where the pooling is `tokens`.

        Args:
            input_ids: [batch, tokens], padded on the side that the tokenizer pads.
            attention_mask: [batch, tokens], 1 for a token and 0 for padding.
            token_type_ids: [batch, tokens] where the section says so, and else not looked at.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self._section.token_types and token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        output = self.transformer(**inputs)
        embeddings: torch.Tensor
        if self._section.split is not None:
            # The identity stands where the last layer was: its input comes out as the logits.
            embeddings = output.logits.float()  # [batch, d] or [batch, tokens, d]
            return embeddings
        hidden = output.last_hidden_state.float()  # [batch, tokens, hidden]
        embeddings = self.dense(_pool(hidden, attention_mask, self._section.pooling))  # [batch, d]
        if self._section.normalise:
            embeddings = torch.nn.functional.normalize(embeddings, dim=1)
        return embeddings


def split(transformer: torch.nn.Module, path: str) -> torch.nn.Linear:
    """Put the identity in the place of the linear layer at `path`, and return the layer.

    Raises:
        BackboneError: when there is no linear layer.
    """
    try:
        last = transformer.get_submodule(path)
    except AttributeError:
        last = None
    if not isinstance(last, torch.nn.Linear):
        raise BackboneError(f"a {type(transformer).__name__} has no linear layer {path!r}")
    transformer.set_submodule(path, torch.nn.Identity())
    return last


def _pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """One row of hidden [batch, tokens, d] for each text: [batch, d]."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)  # [batch, tokens, 1]
    if pooling == "mean":
        return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)
    if pooling == "max":
        return hidden.masked_fill(weights == 0, torch.finfo(hidden.dtype).min).amax(dim=1)
    # The places of tokens count up, those of padding are zero.
    places = mask * torch.arange(1, hidden.shape[1] + 1, device=mask.device)  # [batch, tokens]
    place = mask.argmax(dim=1) if pooling == "cls" else places.argmax(dim=1)  # [batch]
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), place]


def _linear(file: Path) -> torch.nn.Linear:
    tensors = {
        name.removeprefix("linear."): tensor.float() for name, tensor in load_file(file).items()
    }
    if not {"weight"} <= set(tensors) <= {"weight", "bias"} or tensors["weight"].ndim != 2:
        raise BackboneError(f"the backbone's file {file.name} is not one linear layer")
    outputs, inputs = tensors["weight"].shape
    linear = torch.nn.Linear(inputs, outputs, bias="bias" in tensors)
    linear.load_state_dict(tensors)
    return linear


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and log lines, which are then as they were."""
    logging: Any = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
