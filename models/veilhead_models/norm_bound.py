"""A bound on the norm of what a layer is given, where the operation that makes it has one."""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode

#: Operations whose values are at most one in magnitude.
_SQUASHING: Final = {"aten::tanh": "tanh", "aten::sigmoid": "sigmoid"}

#: Operations that pick or copy whole rows of their first argument.
_MOVING: Final = ("aten::index", "aten::index_select", "aten::clone", "aten::_to_copy")

#: What an operation was called with, by its name.
_Made = tuple[str, tuple[Any, ...]]


class _Makers(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Remembers which operation made each tensor, by the memory that it lies in.

    Views share memory, so what holds of every value, or of every row, holds of them.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._made: dict[int, _Made] = {}
        self._kept: list[torch.Tensor] = []  # memory that is not freed is not used again

    def maker_of(self, tensor: torch.Tensor) -> _Made | None:
        return self._made.get(tensor.untyped_storage().data_ptr())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = {
            value.untyped_storage().data_ptr() for value in args if isinstance(value, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        made = result[0] if isinstance(result, tuple) and result else result
        if not isinstance(made, torch.Tensor):
            return result
        place, name = made.untyped_storage().data_ptr(), func._schema.name
        if func._schema.is_mutable:
            self._made.pop(place, None)  # written over, by whatever it was
        elif place not in given:
            source = self.maker_of(args[0]) if name in _MOVING else (name, args)
            if source is not None:
                self._made[place] = source
            self._kept.append(made)
        return result


def norm_bound(model: torch.nn.Module, path: str, inputs: Any) -> tuple[float | None, str]:
    """A bound on the Euclidean norm of the rows that the module at `path` is given, and why.

    It follows from the operation that makes them: d values of a tanh have a norm of at most
    sqrt(d); what a layer normalisation with factors g and shifts b makes of d values has one of at
    most max |g| sqrt(d) + ||b||. None where another operation makes them.
    """
    found: list[tuple[_Made | None, torch.Tensor]] = []
    with torch.no_grad(), _Makers() as makers:  # in inference mode operations stay composed
        hook = model.get_submodule(path).register_forward_pre_hook(
            lambda _, arguments: found.append((makers.maker_of(arguments[0]), arguments[0]))
        )
        try:
            model(**inputs)
        finally:
            hook.remove()
    made, rows = found[-1]
    dimensions = rows.shape[-1]
    if made is None:
        return None, ""
    name, arguments = made
    if name in _SQUASHING:
        return math.sqrt(dimensions), (
            f"{dimensions} values of a {_SQUASHING[name]} have a norm of at most "
            f"{math.sqrt(dimensions):.4g}"
        )
    if name == "aten::native_layer_norm" and list(arguments[1]) == [dimensions]:
        factors, shifts = arguments[2], arguments[3]
        largest = 1.0 if factors is None else factors.abs().max().item()
        shift = 0.0 if shifts is None else shifts.norm().item()
        bound = largest * math.sqrt(dimensions) + shift
        return bound, (
            f"the layer normalisation before the split makes norms of at most {bound:.4g}"
        )
    return None, ""
