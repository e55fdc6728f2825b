"""A backbone in its ONNX form: the same embeddings without torch and without transformers.

It needs `tokenizers` and `onnxruntime`, which are imported when a backbone is loaded, and two files
that the manifest pins: a tokenizer and a graph. `onnx_export.py` makes them.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from veilhead_protocol.errors import BackboneError
from veilhead_protocol.files import verify_file
from veilhead_protocol.manifest import BackboneSection, FileEntry

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from tokenizers import Encoding, Tokenizer

_CPU: Final = "CPUExecutionProvider"
_CUDA: Final = "CUDAExecutionProvider"

#: Of ONNX Runtime's log only what ends the process is shown; errors come as exceptions.
_LOG_FATAL: Final = 4


def onnx_files(section: BackboneSection, precision: str | None = None) -> tuple[FileEntry, ...]:
    """The tokenizer and the graph that `OnnxBackbone.load` needs.

    Args:
        section: the manifest's account of the backbone.
        precision: `fp32` or `fp16` as stored; when it is None, `fp32` where it is published.

    Raises:
        BackboneError: when the backbone is not published in this form.
    """
    onnx = section.onnx
    graph = None
    if onnx is not None:
        graph = (onnx.fp32 or onnx.fp16) if precision is None else getattr(onnx, precision)
    if onnx is None or graph is None:
        raise BackboneError(
            f"the backbone {section.name!r} is not published for ONNX Runtime"
            f"{'' if precision is None else f' in {precision}'}: pip install 'veilhead[torch]', or "
            "ask the vendor to run `veilhead-server export-onnx`"
        )
    return onnx.tokenizer, graph


class OnnxBackbone:
    """A loaded graph: texts in, embeddings out, as `Backbone` does. Make one with `load`.

    It may be used by several threads.

    Attributes:
        section: what the manifest says of it.
        device: where it runs: `cuda` or `cpu`, perhaps with a number.
        dimensions: d, values in an embedding.
    """

    def __init__(
        self, section: BackboneSection, session: InferenceSession, tokenizer: Tokenizer, device: str
    ) -> None:
        self.section = section
        self.device = device
        self.dimensions: int = session.get_outputs()[0].shape[-1]
        self._session = session
        padding: dict[str, Any] = tokenizer.padding
        tokenizer.no_padding()  # done here, of texts of like length
        self._tokenizer = tokenizer
        self._left = padding["direction"] == "left"
        self._fillings = {
            "input_ids": padding["pad_id"],
            "attention_mask": 0,
            "token_type_ids": padding["pad_type_id"],
        }
        self._inputs = [item.name for item in session.get_inputs()]

    def __repr__(self) -> str:
        return (
            f"OnnxBackbone(name={self.section.name!r}, dimensions={self.dimensions}, "
            f"device={self.device!r})"
        )

    @classmethod
    def load(
        cls,
        directory: str | Path,
        section: BackboneSection,
        *,
        precision: str | None = None,
        device: str = "auto",
    ) -> OnnxBackbone:
        """Load a backbone from local files, after checking them against `section`.

        Args:
            directory: holds the section's ONNX files; others in it are ignored.
            section: the manifest's account of the backbone.
            precision: `fp32` or `fp16` as stored; when it is None, `fp32` where it is published.
                Either is computed in single precision.
            device: `auto` (CUDA where `onnxruntime-gpu` finds it, else the CPU), `cpu`, `cuda` or
                `cuda:N`.

        Raises:
            BackboneError: when the section has no such form, a file is missing or differs,
                tokenizers or onnxruntime is not installed, the device does not exist, or the files
                are not a tokenizer and a graph of such a backbone.
        """
        source = Path(directory).resolve()
        files = onnx_files(section, precision)
        contents = []
        for entry in files:
            verify_file(source, entry)
            contents.append((source / entry.path).read_bytes())
        try:
            import onnxruntime
            from tokenizers import Tokenizer
        except ImportError as error:
            raise BackboneError(
                f"the backbone {section.name!r} needs {error.name or 'onnxruntime'}, which is not "
                "installed: pip install 'veilhead[onnx]'"
            ) from error
        chosen, providers = _providers(device, onnxruntime.get_available_providers())
        try:
            tokenizer = Tokenizer.from_buffer(contents[0])
            session = _session(contents[1], providers)
        except Exception as error:  # both raise whatever their parts raise
            raise BackboneError(
                f"the backbone {section.name!r} cannot be loaded from {source} on device "
                f"{chosen!r}: {type(error).__name__}; expected a tokenizer and an ONNX graph whose "
                "weights are in the file itself"
            ) from error
        used = session.get_providers()[0]
        if used != providers[0][0]:  # ONNX Runtime goes on without CUDA when it finds none
            if device != "auto":
                raise BackboneError(f"the device {chosen!r} cannot be used: got {used}")
            chosen = "cpu"
        _check_graph(section, session, tokenizer)
        return cls(section, session, tokenizer, chosen)

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
            BackboneError: when `texts` is not a sequence of strings, or the backbone embeds tokens.
        """
        if self.section.pooling == "tokens":
            raise BackboneError(
                f"the backbone {self.section.name!r} embeds the tokens of a text, not the text"
            )
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise BackboneError("got something other than a sequence of strings to embed")
        embeddings = np.zeros((len(texts), self.dimensions))  # [texts, d]
        if not texts:
            return embeddings
        # Lone surrogates, which JSON can smuggle into a str, have no UTF-8 form.
        clean = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
        encodings = self._tokenizer.encode_batch(clean)
        # Texts of like length go together, or padding would be most of the work.
        order = sorted(range(len(texts)), key=lambda row: len(encodings[row].ids), reverse=True)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            embeddings[rows] = self._run([encodings[row] for row in rows])
            if progress is not None:
                progress(start + len(rows))
        return embeddings

    def _run(self, encodings: list[Encoding]) -> NDArray[np.float32]:
        """A batch through the graph: [batch, d], or [batch, tokens, d] of a backbone of tokens."""
        longest = max(1, *(len(encoding.ids) for encoding in encodings))
        columns = {
            "input_ids": [encoding.ids for encoding in encodings],
            "attention_mask": [encoding.attention_mask for encoding in encodings],
            "token_type_ids": [encoding.type_ids for encoding in encodings],
        }
        inputs = {}
        for name in self._inputs:
            padded = np.full((len(encodings), longest), self._fillings[name])  # [batch, tokens]
            for row, values in enumerate(columns[name]):
                start = longest - len(values) if self._left else 0
                padded[row, start : start + len(values)] = values
            inputs[name] = padded
        (result,) = self._session.run(None, inputs)
        made: NDArray[np.float32] = result
        return made


def _providers(
    device: str, available: Sequence[str]
) -> tuple[str, list[tuple[str, dict[str, str]]]]:
    """A device by name, and what ONNX Runtime calls it.

    Raises:
        BackboneError: when there is no such device.
    """
    kind, _, number = device.partition(":")
    if device == "auto":
        kind = "cuda" if _CUDA in available else "cpu"
        device = kind
    if device == "cpu":
        return device, [(_CPU, {})]
    if kind == "cuda" and (not number or number.isdecimal()) and _CUDA in available:
        return device, [(_CUDA, {"device_id": number or "0"}), (_CPU, {})]
    raise BackboneError(
        f"ONNX Runtime has no device {device!r} here, expected auto, cpu, or, with onnxruntime-gpu "
        "in the place of onnxruntime, cuda or cuda:N"
    )


def _session(graph: bytes, providers: list[tuple[str, dict[str, str]]]) -> InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _LOG_FATAL
    # The cores that this process may use; ONNX Runtime would count and occupy those of the machine.
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    options.inter_op_num_threads = 1
    # Threads that wait by spinning would take the cores from the encryption.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with tempfile.TemporaryDirectory(prefix="veilhead-backbone-") as empty:
        # Where a graph would find weights outside its own file, of which nobody pinned a digest.
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", empty
        )
        return onnxruntime.InferenceSession(graph, options, providers=providers)


def _check_graph(section: BackboneSection, session: InferenceSession, tokenizer: Tokenizer) -> None:
    """Refuse what would fail, or mean something else, once it runs.

    Raises:
        BackboneError: saying what is wrong.
    """
    inputs = ["input_ids", "attention_mask", *(["token_type_ids"] if section.token_types else [])]
    rank = 3 if section.pooling == "tokens" else 2
    found = [item.name for item in session.get_inputs()]
    outputs = [item.shape for item in session.get_outputs()]
    if (
        found != inputs
        or len(outputs) != 1
        or len(outputs[0]) != rank
        or not isinstance(outputs[0][-1], int)
    ):
        raise BackboneError(
            f"the ONNX graph of {section.name!r} takes {found} and gives {outputs}, expected "
            f"{inputs} and one array of {rank} axes, the last of a fixed size"
        )
    cut = tokenizer.truncation
    if cut is None or cut["max_length"] > section.max_tokens or tokenizer.padding is None:
        raise BackboneError(
            f"the ONNX tokenizer of {section.name!r} does not cut texts at {section.max_tokens} "
            "tokens, or does not say how to pad them"
        )
