"""What sentence-transformers writes beside a transformer: its pooling and the layers after it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Self

from veilhead_protocol.errors import BackboneError
from veilhead_protocol.manifest import DenseSection

#: Ours by theirs.
_POOLINGS: Final[dict[str, Literal["mean", "max", "cls", "last"]]] = {
    "mean": "mean",
    "max": "max",
    "cls": "cls",
    "lasttoken": "last",
}

#: Their older files have a truth value for each.
_OLDER_POOLINGS: Final = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}

_ACTIVATIONS: Final[dict[str, Literal["identity", "tanh", "relu", "gelu", "sigmoid"]]] = {
    "Identity": "identity",
    "Tanh": "tanh",
    "ReLU": "relu",
    "GELU": "gelu",
    "Sigmoid": "sigmoid",
}

_ORDER: Final = ("Transformer", "Pooling", "Dense", "Normalize")


@dataclass(frozen=True)
class SentenceTransformer:
    """What comes after the last hidden states; without a `modules.json`, mean and normalisation."""

    pooling: Literal["mean", "max", "cls", "last"] = "mean"
    dense: tuple[DenseSection, ...] = ()
    normalise: bool = True
    max_tokens: int | None = None

    @classmethod
    def read(cls, directory: Path) -> Self:
        """What the files in `directory` say.

        Raises:
            BackboneError: when they say something that a backbone cannot do.
        """
        settings = _json(directory / "sentence_bert_config.json")
        if settings.get("do_lower_case") is True:
            raise BackboneError(
                f"{directory} has its texts lower-cased outside its tokenizer (do_lower_case in "
                "sentence_bert_config.json): put the lower-casing into the tokenizer"
            )
        if _json(directory / "config_sentence_transformers.json").get("default_prompt_name"):
            raise BackboneError(
                f"{directory} puts a prompt before every text, which a backbone does not: clear "
                "default_prompt_name in config_sentence_transformers.json if it is not needed"
            )
        limit = settings.get("max_seq_length")
        max_tokens = limit if isinstance(limit, int) else None
        try:
            listed = json.loads((directory / "modules.json").read_text("utf-8"))
            modules = [(entry["type"].rsplit(".", 1)[-1], entry["path"]) for entry in listed]
        except FileNotFoundError:
            pooling = directory / "1_Pooling"
            return cls(
                pooling=_pooling(pooling) if pooling.is_dir() else "mean", max_tokens=max_tokens
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BackboneError(f"{directory / 'modules.json'} cannot be read") from error
        kinds = [kind for kind, _ in modules]
        if (
            kinds != sorted(kinds, key=lambda kind: (*_ORDER, kind).index(kind))
            or kinds[:2] != ["Transformer", "Pooling"]
            or not set(kinds) <= set(_ORDER)
            or kinds.count("Transformer") + kinds.count("Pooling") != 2
        ):
            raise BackboneError(
                f"{directory} consists of {', '.join(kinds)}: expected {', '.join(_ORDER)}, in "
                "this order, of which the last two may be absent"
            )
        if modules[0][1]:
            raise BackboneError(
                f"{directory} has its transformer in {modules[0][1]!r}, expected the files of the "
                "transformer in the directory itself: save it again with sentence-transformers 2 "
                "or newer"
            )
        return cls(
            pooling=_pooling(directory / modules[1][1]),
            dense=tuple(_dense(directory, path) for kind, path in modules if kind == "Dense"),
            normalise="Normalize" in kinds,
            max_tokens=max_tokens,
        )


def _pooling(directory: Path) -> Literal["mean", "max", "cls", "last"]:
    config = _json(directory / "config.json")
    found = config.get("pooling_mode")
    if found is None:
        found = [theirs for older, theirs in _OLDER_POOLINGS.items() if config.get(older) is True]
    modes = [found] if isinstance(found, str) else list(found)
    if len(modes) == 1 and modes[0] in _POOLINGS:
        return _POOLINGS[modes[0]]
    raise BackboneError(
        f"{directory} asks for the pooling {' and '.join(map(str, modes)) or 'of nothing'}, "
        f"expected one of {', '.join(_POOLINGS)}"
    )


def _dense(directory: Path, path: str) -> DenseSection:
    file = f"{path}/model.safetensors"
    if not (directory / file).is_file():
        raise BackboneError(
            f"{directory} has no {file}: expected every dense layer as safetensors (a "
            "pytorch_model.bin is pickle, which is never read: save the model again)"
        )
    config = _json(directory / path / "config.json")
    if config.get("use_residual"):
        raise BackboneError(f"{directory / path} adds its input to its output: not supported")
    given = str(config.get("activation_function"))
    name = given.rsplit(".", 1)[-1]
    if not given.startswith("torch.nn.") or name not in _ACTIVATIONS:
        raise BackboneError(
            f"{directory / path} has the activation {given[:80]!r}, expected one of torch.nn's "
            f"{', '.join(_ACTIVATIONS)}"
        )
    return DenseSection(file=file, activation=_ACTIVATIONS[name])


def _json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, empty where there is none."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
