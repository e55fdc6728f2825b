"""What runs the public backbone on this machine: torch, or ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from veilhead_protocol.errors import BackboneError
from veilhead_protocol.manifest import BackboneSection, FileEntry

if TYPE_CHECKING:
    from veilhead_models.embedder import Embedder

#: `auto` is torch where it is installed, and else ONNX Runtime. `onnx` takes the graph in single
#: precision where there is one; `onnx-fp16` the one that is half as large.
Runtime = Literal["auto", "torch", "onnx", "onnx-fp16"]


@dataclass(frozen=True)
class Plan:
    """The files that a runtime needs, and what loads the backbone from their directory."""

    files: tuple[FileEntry, ...]
    load: Callable[[Path], Embedder]


def check_runtime(runtime: str) -> None:
    """Refuse a runtime that there is not.

    Raises:
        ValueError: naming those that there are.
    """
    if runtime not in get_args(Runtime):
        known = ", ".join(get_args(Runtime))
        raise ValueError(f"got the backbone runtime {runtime!r}, expected one of {known}")


def plan_backbone(section: BackboneSection, runtime: Runtime, device: str) -> Plan:
    """How a backbone is run here. Nothing is fetched, or imported but what loads it.

    Raises:
        BackboneError: when nothing is installed that could, or the model is not published for it.
    """
    if runtime == "auto":
        runtime = _installed_runtime(section)
    if runtime == "torch":
        from veilhead_models.backbone import Backbone

        return Plan(
            section.files,
            lambda place: Backbone.load(place, section, device=device, flush_subnormals=True),
        )

    from veilhead_models.onnx_backbone import OnnxBackbone, onnx_files

    precision = "fp16" if runtime == "onnx-fp16" else None
    return Plan(
        onnx_files(section, precision),
        lambda place: OnnxBackbone.load(
            place, section, precision=precision, device=device, flush_subnormals=True
        ),
    )


def _installed_runtime(section: BackboneSection) -> Runtime:
    if find_spec("torch") and find_spec("transformers"):
        return "torch"
    if find_spec("onnxruntime") and find_spec("tokenizers"):
        return "onnx"
    lighter = "" if section.onnx is None else ", or, without torch, 'veilhead[onnx]'"
    raise BackboneError(
        f"nothing is installed that could run the backbone {section.name!r}: "
        f"pip install 'veilhead[torch]'{lighter}"
    )
