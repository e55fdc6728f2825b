"""Checkpoints of transformers classifiers: opened without code or pickle, and split in two.

The head is the last linear layer that runs, where its output is the logits. What comes before it is
left as it is, with the identity in the layer's place.
"""

from __future__ import annotations

import inspect
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from veilhead_models.backbone import CONFIG_FILE, TOKENIZER_FILES, read_json
from veilhead_protocol.errors import ArtifactError, CheckpointError
from veilhead_protocol.redaction import redacted

if TYPE_CHECKING:
    import torch

#: Texts that are made up where none are given.
GENERATED_TEXTS: Final = 128

#: Logits in float32 differ by this part of the largest one, from batches and sums in other order.
FLOAT_TOLERANCE: Final = 2e-4

_PROBLEMS: Final = {
    None: "single_label",
    "single_label_classification": "single_label",
    "multi_label_classification": "multi_label",
    "regression": "regression",
}

#: Where texts are cut when neither tokenizer nor transformer has a limit, and at most.
_USUAL_TOKENS: Final = 512
_MOST_TOKENS: Final = 8192

_SEED: Final = 20261101


@contextmanager
def open_checkpoint(source: Path) -> Iterator[Path]:
    """A directory that shows transformers the checkpoint's data, and nothing else of it.

    Raises:
        CheckpointError: when there is no checkpoint, or one that needs code or pickle.
    """
    config = read_json(source / CONFIG_FILE)
    if not config:
        raise CheckpointError(
            f"{source} has no {CONFIG_FILE}: expected the directory of a transformers checkpoint"
        )
    for file in (CONFIG_FILE, "tokenizer_config.json"):
        if "auto_map" in read_json(source / file):
            raise CheckpointError(
                f"{source / file} has an auto_map: the model wants code of its own to be run, "
                "which is never done; expected an architecture of transformers itself"
            )
    if (source / "adapter_config.json").exists():
        raise CheckpointError(
            f"{source} holds an adapter: merge it into its model first (in peft, "
            "`merge_and_unload`), and save the whole model"
        )
    weights = [path.name for path in source.glob("model*.safetensors*") if path.is_file()]
    if not weights:
        pickled = sorted(path.name for path in source.glob("*.bin"))
        hint = (
            f"it has {pickled[0]}, which is pickle and is never read. Where you trust the file, "
            "convert it: `AutoModelForSequenceClassification.from_pretrained(path)"
            ".save_pretrained(other_path)` (or ...TokenClassification), and the tokenizer likewise"
            if pickled
            else "expected a checkpoint that save_pretrained wrote"
        )
        raise CheckpointError(f"{source} has no model.safetensors: {hint}")
    with tempfile.TemporaryDirectory(prefix="veilhead-checkpoint-") as view:
        for file in (CONFIG_FILE, *weights, *TOKENIZER_FILES):
            if (source / file).is_file():
                (Path(view) / file).symlink_to(source / file)
        yield Path(view)


@dataclass(frozen=True)
class Checkpoint:
    """A loaded classifier. `model` is split in place."""

    model: Any
    tokenizer: Any
    architecture: str
    task: str
    labels: list[str]
    problem_type: str
    max_tokens: int
    token_types: bool
    dtype: torch.dtype

    @classmethod
    def load(cls, view: Path, source: Path) -> Checkpoint:
        """The classifier of the files in `view`, for which messages say `source`.

        Raises:
            CheckpointError: when they are not a whole classifier of transformers' own.
            ArtifactError: when two of its labels are equal.
        """
        import transformers

        from veilhead_models.embedding_module import quiet

        raw = read_json(view / CONFIG_FILE)
        names = raw.get("architectures") or ["nothing"]
        architecture = str(names[0])
        if architecture.endswith("ForSequenceClassification"):
            task = "text-classification"
            loader: Any = transformers.AutoModelForSequenceClassification
        elif architecture.endswith("ForTokenClassification"):
            task = "token-classification"
            loader = transformers.AutoModelForTokenClassification
        else:
            raise CheckpointError(
                f"{source} holds {architecture[:80]}, expected a ...ForSequenceClassification or "
                "...ForTokenClassification. An encoder or a sentence transformer has no head: "
                "train one on it, `veilhead-server train DATA --backbone DIRECTORY --out DIRECTORY`"
            )
        try:
            with quiet():
                tokenizer = transformers.AutoTokenizer.from_pretrained(
                    view, local_files_only=True, trust_remote_code=False
                )
                # In the precision that it was saved in: it is published in that.
                model, found = loader.from_pretrained(
                    view,
                    local_files_only=True,
                    trust_remote_code=False,
                    use_safetensors=True,
                    dtype="auto",
                    output_loading_info=True,
                )
        except Exception as error:  # transformers raises whatever its parts raise
            raise CheckpointError(
                f"{source} cannot be loaded as {architecture[:80]}: {type(error).__name__}: "
                f"{redacted(error)}"
            ) from error
        if type(model).__name__ != architecture:
            raise CheckpointError(
                f"{source} says that it is {architecture[:80]}, transformers loads it as "
                f"{type(model).__name__}: expected an architecture of transformers itself"
            )
        absent = sorted(found["missing_keys"]) + [key for key, *_ in found["mismatched_keys"]]
        if absent:
            raise CheckpointError(
                f"{source} lacks {len(absent)} tensors of {architecture}, {absent[0]} for one: "
                "they would be random numbers; was the model trained, and saved whole?"
            )
        if not tokenizer.is_fast:
            raise CheckpointError(
                f"{source} has a tokenizer without a tokenizer.json: load it with AutoTokenizer, "
                "and save it again with save_pretrained"
            )
        config = model.config
        problem = _PROBLEMS.get(config.problem_type) if task == "text-classification" else None
        accepted = inspect.signature(model.forward).parameters
        return cls(
            model=model.eval(),
            tokenizer=tokenizer,
            architecture=architecture,
            task=task,
            # transformers gives numbers to all of them when one is missing.
            labels=_labels(raw.get("id2label") or config.id2label, config.num_labels),
            problem_type=problem or "single_label",
            max_tokens=_max_tokens(model, tokenizer),
            token_types="token_type_ids" in accepted and "token_type_ids" in tokenizer("a"),
            dtype=model.dtype,
        )

    def inputs(self, text: str) -> dict[str, torch.Tensor]:
        """What the transformer is given for one text, as transformers' pipelines would."""
        encoded = self._encoded(text)
        names = ["input_ids", "attention_mask", *(["token_type_ids"] if self.token_types else [])]
        return {name: encoded[name] for name in names if name in encoded}

    def are_of_text(self, text: str) -> NDArray[np.bool_]:
        """[tokens]: which of the text's tokens are its own, and not special ones."""
        mask: NDArray[np.bool_] = self._encoded(text)["special_tokens_mask"][0].numpy() == 0
        return mask

    def _encoded(self, text: str) -> Any:
        return self.tokenizer(
            text,
            truncation=True,
            max_length=self.max_tokens,
            return_special_tokens_mask=True,
            return_tensors="pt",
        )

    def generated_texts(self) -> list[str]:
        """Texts of random words of the vocabulary."""
        return generated_texts(self.tokenizer, self.max_tokens)


def generated_texts(tokenizer: Any, max_tokens: int) -> list[str]:
    """Texts of random words of a vocabulary, the same ones every time, the last one long."""
    generator = np.random.default_rng(_SEED)
    reserved = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    words = np.array([i for i in range(len(tokenizer)) if i not in reserved])
    longest = min(max_tokens, 256)
    lengths = np.exp(generator.uniform(0, math.log(longest), GENERATED_TEXTS - 1)).astype(int)
    return [
        tokenizer.decode(generator.choice(words, size).tolist())
        for size in (*lengths.tolist(), 2 * longest)
    ]


def _labels(names: Any, count: int) -> list[str]:
    """C labels in order; a missing one is numbered.

    Raises:
        CheckpointError: when they are not labels by number.
        ArtifactError: when two are equal.
    """
    try:
        by_index = {int(index): str(label) for index, label in names.items()}
    except (AttributeError, ValueError):
        raise CheckpointError(
            "id2label in config.json is not a table of labels by number: write "
            '{"0": "...", "1": "..."}'
        ) from None
    labels = [by_index.get(index, f"LABEL_{index}") for index in range(count)]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ArtifactError(
            f"the labels {', '.join(map(repr, twice[:5]))} stand for several rows of the head: "
            "give every entry of id2label in config.json a name of its own"
        )
    return labels


def _max_tokens(model: Any, tokenizer: Any) -> int:
    """What tokenizer and transformer can take, both of them."""
    import torch

    limits = [_MOST_TOKENS]
    if tokenizer.model_max_length <= _MOST_TOKENS:  # else a number that stands for "none"
        limits.append(tokenizer.model_max_length)
    positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        for path, module in model.named_modules():
            # RoBERTa and its kin number positions from behind that of padding.
            if path.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
                positions -= 0 if module.padding_idx is None else module.padding_idx + 1
        limits.append(positions)
    return min(limits) if len(limits) > 1 else _USUAL_TOKENS


@dataclass(frozen=True, eq=False)
class Head:
    """The last linear layer: what was taken out, and how large its input can get.

    `bound` is on the Euclidean norm of an input; None where none follows.
    """

    path: str
    weight: NDArray[np.float64]  # [C, d]
    bias: NDArray[np.float64] | None  # [C]
    bound: float | None
    bound_reason: str


def split_head(checkpoint: Checkpoint, text: str) -> Head:
    """Take the last linear layer out of the checkpoint's model.

    Raises:
        CheckpointError: naming what was found, when the layer does not make the logits.
    """
    import torch

    from veilhead_models.embedding_module import split
    from veilhead_models.norm_bound import norm_bound

    model = checkpoint.model.float()
    inputs = checkpoint.inputs(text)
    called: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, path=path: called.append(path))
        for path, module in model.named_modules()
        if not any(True for _ in module.children())
    ]
    try:
        with torch.inference_mode():
            expected = model(**inputs).logits  # [1, C] or [1, tokens, C]
    finally:
        for hook in hooks:
            hook.remove()
    linear = [path for path in called if isinstance(model.get_submodule(path), torch.nn.Linear)]
    last = ", ".join(f"{path} ({type(model.get_submodule(path)).__name__})" for path in called[-4:])
    cannot = f"{checkpoint.architecture} cannot be split; its last modules are {last}: "
    if not linear:
        raise CheckpointError(cannot + "there is no linear layer among them")
    path = linear[-1]
    bound, reason = norm_bound(model, path, inputs)
    layer = split(model, path)
    try:
        with torch.inference_mode():
            embedding = model(**inputs).logits
            difference = (layer(embedding) - expected).abs().max().item()
    except Exception as error:  # whatever the architecture does with what it is not made for
        raise CheckpointError(
            cannot + f"without {path} it fails ({type(error).__name__})"
        ) from error
    if not difference <= FLOAT_TOLERANCE * max(1.0, expected.abs().max().item()):
        raise CheckpointError(
            cannot + f"its logits are not the output of {path}, the last linear layer"
        )
    return Head(
        path=path,
        weight=layer.weight.detach().double().numpy(),
        bias=None if layer.bias is None else layer.bias.detach().double().numpy(),
        bound=bound,
        bound_reason=reason,
    )
