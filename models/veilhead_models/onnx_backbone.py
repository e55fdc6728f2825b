"""A backbone in its ONNX form: the same embeddings without torch and without transformers.

It needs `tokenizers` and `onnxruntime`, which are imported when a backbone is loaded, and two files
that the manifest pins: a tokenizer and a graph. `onnx_export.py` makes them.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from veilhead_models.embedder import Embedder
from veilhead_models.plain_tokenizer import PlainTokenizer
from veilhead_protocol.errors import BackboneError
from veilhead_protocol.files import verify_file
from veilhead_protocol.manifest import BackboneSection, FileEntry

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

_CPU: Final = "CPUExecutionProvider"
_CUDA: Final = "CUDAExecutionProvider"

_FLOAT: Final = "tensor(float)"

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


class OnnxBackbone(Embedder):
    """A transformer that ONNX Runtime runs. Make one with `OnnxBackbone.load`."""

    def __init__(
        self,
        section: BackboneSection,
        session: InferenceSession,
        tokenizer: PlainTokenizer,
        device: str,
    ) -> None:
        super().__init__(
            section,
            tokenizer,
            device,
            dimensions=session.get_outputs()[0].shape[-1],
            padding=tokenizer.pad_token_id,
        )
        self._session = session

    @classmethod
    def load(
        cls,
        directory: str | Path,
        section: BackboneSection,
        *,
        precision: str | None = None,
        device: str = "auto",
        flush_subnormals: bool = False,
    ) -> OnnxBackbone:
        """Load a backbone from local files, after checking them against `section`.

        Args:
            directory: holds the section's ONNX files; others in it are ignored.
            section: the manifest's account of the backbone.
            precision: `fp32` or `fp16` as stored; when it is None, `fp32` where it is published.
                Either is computed in single precision.
            device: `auto` (CUDA where `onnxruntime-gpu` finds it, else the CPU), `cpu`, `cuda` or
                `cuda:N`.
            flush_subnormals: let ONNX Runtime take subnormal numbers for zero, on its own threads.

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
            import tokenizers  # noqa: F401
        except ImportError as error:
            raise BackboneError(
                f"the backbone {section.name!r} needs {error.name or 'onnxruntime'}, which is not "
                "installed: pip install 'veilhead[onnx]'"
            ) from error
        chosen, providers = _providers(device, onnxruntime.get_available_providers())
        try:
            tokenizer = PlainTokenizer(contents[0])
            session = _session(contents[1], providers, flush_subnormals=flush_subnormals)
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
        _check_graph(section, session)
        return cls(section, session, tokenizer, chosen)

    def _run(self, inputs: Mapping[str, NDArray[np.int64]]) -> NDArray[np.float32]:
        (made,) = self._session.run(None, dict(inputs))
        result: NDArray[np.float32] = made
        return result


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


def _session(
    graph: bytes, providers: list[tuple[str, dict[str, str]]], *, flush_subnormals: bool = False
) -> InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _LOG_FATAL
    # The cores that this process may use; ONNX Runtime would count and occupy those of the machine.
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    options.inter_op_num_threads = 1
    if flush_subnormals:
        # They take a hundred times as long: a backbone could tell by time what is in a text. This
        # is for the session's own threads, and of the calling one for a process's first session.
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
    # Threads that wait by spinning would take the cores from the encryption.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with tempfile.TemporaryDirectory(prefix="veilhead-backbone-") as empty:
        # Where a graph would find weights outside its own file, of which nobody pinned a digest.
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", empty
        )
        return onnxruntime.InferenceSession(graph, options, providers=providers)


def _check_graph(section: BackboneSection, session: InferenceSession) -> None:
    """Refuse what would fail, or mean something else, once it runs.

    Raises:
        BackboneError: saying what is wrong.
    """
    inputs = ["input_ids", "attention_mask", *(["token_type_ids"] if section.token_types else [])]
    rank = 3 if section.pooling == "tokens" else 2
    found = [item.name for item in session.get_inputs()]
    outputs = [(item.type, item.shape) for item in session.get_outputs()]
    fixed = [shape[-1] for kind, shape in outputs if kind == _FLOAT and len(shape) == rank]
    if found != inputs or len(outputs) != 1 or not fixed or not isinstance(fixed[0], int):
        raise BackboneError(
            f"the ONNX graph of {section.name!r} takes {found} and gives {outputs}, expected "
            f"{inputs} and one {_FLOAT} of {rank} axes, the last of a fixed size"
        )
