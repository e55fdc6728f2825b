"""The API reference is made of docstrings: each public name of the client has one that renders."""

from __future__ import annotations

import pdoc
import pdoc.doc
import pdoc.render

import veilhead


def test_every_public_name_is_documented() -> None:
    module = pdoc.doc.Module(veilhead)
    members = {member.name: member for member in module.own_members}
    assert set(veilhead.__all__) <= set(members)
    undocumented = [
        f"{name}.{part.name}" if part is not member else name
        for name, member in members.items()
        for part in (member, *getattr(member, "own_members", ()))
        if isinstance(part, pdoc.doc.Class | pdoc.doc.Function)
        and not part.name.startswith("_")
        and not part.docstring
    ]
    assert undocumented == []


def test_the_reference_renders() -> None:
    pdoc.render.configure(docformat="google", show_source=False)
    module = pdoc.doc.Module(veilhead)
    page = pdoc.render.html_module(module, all_modules={"veilhead": module})
    assert all(f'id="{name}"' in page for name in veilhead.__all__)
