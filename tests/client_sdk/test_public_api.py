"""The public names and signatures are those of public_api.txt: a change of them is on purpose.

Run this file to write them down again.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import get_overloads

import pytest

import veilhead
from veilhead import AsyncClient, Client, VeilheadError

WRITTEN = Path(__file__).with_name("public_api.txt")


def described():
    """Every public name with its signature, a line each."""
    for name in sorted(veilhead.__all__):
        found = getattr(veilhead, name)
        if not inspect.isclass(found):
            yield f"{name} = {found}"
            continue
        bases = ", ".join(base.__name__ for base in found.__bases__)
        if issubclass(found, VeilheadError):
            yield f"class {name}({bases}), code {found.code!r}"
            if "__init__" in vars(found):
                yield f"    __init__{inspect.signature(found.__init__)}"
            continue
        yield f"class {name}{inspect.signature(found)}"
        for member in sorted(vars(found)):
            if not member.startswith("_"):
                yield from members(member, inspect.getattr_static(found, member))


def members(name, found):
    if isinstance(found, property):
        yield f"    {name}: {found.fget.__annotations__['return']}"
    elif isinstance(found, classmethod):
        yield f"    classmethod {name}{inspect.signature(found.__func__)}"
    elif inspect.isfunction(found):
        prefix = "async " if inspect.iscoroutinefunction(found) else ""
        for shape in get_overloads(found) or [found]:
            yield f"    {prefix}{name}{inspect.signature(shape)}"


def text():
    return "\n".join(described()) + "\n"


def test_it_is_what_is_written_down():
    assert text() == WRITTEN.read_text("utf-8"), f"run {Path(__file__).name} if this is meant"


def test_every_public_class_is_exported():
    classes = {name for name, found in vars(veilhead).items() if inspect.isclass(found)}
    assert classes <= set(veilhead.__all__)
    assert set(veilhead.__all__) <= set(dir(veilhead))


def methods(client):
    return {
        name: inspect.unwrap(found)
        for name, found in inspect.getmembers(client, inspect.isroutine)
        if not name.startswith("_") or name == "__init__"
    }


def test_both_clients_have_the_same_methods():
    assert methods(Client).keys() == methods(AsyncClient).keys()


@pytest.mark.parametrize("name", sorted(methods(Client)))
def test_both_clients_take_the_same_arguments(name):
    one, other = (
        [(found.name, found.kind, found.default) for found in signature.parameters.values()]
        for signature in map(inspect.signature, (methods(Client)[name], methods(AsyncClient)[name]))
    )
    assert one == other


if __name__ == "__main__":
    WRITTEN.write_text(text(), "utf-8")
