"""Imports point one way: proved from the source, lazy imports included, and by running it.

The service cannot decrypt because it cannot reach the client; the client is light because torch
is imported only when a backbone is loaded.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]

#: Source root -> the one import package in it.
PACKAGES = {
    "protocol": "veilhead_protocol",
    "client_sdk": "veilhead",
    "models": "veilhead_models",
    "service": "veilhead_service",
    "benchmarks": "veilhead_benchmarks",
}

LEARNING = frozenset(
    {"torch", "transformers", "sklearn", "tokenizers", "onnx", "onnxruntime", "onnxscript"}
)
SERVING = frozenset({"fastapi", "starlette", "uvicorn", "pydantic_settings"})

COMPUTED = "<a computed name>"


@dataclass(frozen=True)
class Import:
    """One imported name, and whether importing the file already imports it."""

    name: str
    lazy: bool
    line: int


@dataclass(frozen=True)
class Rule:
    """What a file may import besides its own package and what no rule speaks of.

    `always` at the top of the file too, `lazily` inside a function or for type checking only.
    """

    always: tuple[str, ...] = ()
    lazily: tuple[str, ...] = ()


EVERYTHING = Rule(always=(*PACKAGES.values(), *LEARNING, *SERVING))

#: The rule of a file is the one of the longest path that it begins with.
RULES = {
    "protocol": Rule(),
    "models": Rule(always=("veilhead_protocol",), lazily=tuple(LEARNING)),
    "models/veilhead_models/artifact.py": Rule(always=("veilhead_protocol",)),
    # Torch code, which its neighbours import lazily as they do torch.
    "models/veilhead_models/embedding_module.py": Rule(always=("veilhead_protocol", *LEARNING)),
    "models/veilhead_models/norm_bound.py": Rule(always=("veilhead_protocol", *LEARNING)),
    "client_sdk": Rule(
        always=("veilhead_protocol",),
        lazily=(
            "veilhead_models.backbone",
            "veilhead_models.embedder",
            "veilhead_models.onnx_backbone",
        ),
    ),
    # The gateway serves HTTP; the command imports it lazily, and nothing else does.
    "client_sdk/veilhead/gateway": Rule(always=("veilhead_protocol", *SERVING)),
    "client_sdk/veilhead/local.py": Rule(
        always=("veilhead_protocol",),
        lazily=("veilhead_models.artifact", "veilhead_service"),
    ),
    "service": Rule(always=("veilhead_protocol", "veilhead_models.artifact", *SERVING)),
    "service/veilhead_service/cli.py": Rule(
        always=("veilhead_protocol", "veilhead_models.artifact"),
        lazily=("veilhead_models", *SERVING),
    ),
    "benchmarks": EVERYTHING,
}


def is_within(name, prefix):
    return name == prefix or name.startswith(f"{prefix}.")


class _Imports(ast.NodeVisitor):
    def __init__(self, package):
        self.package = package  # of the file, for relative imports
        self.lazy = False
        self.found = []

    def _add(self, name, node):
        self.found.append(Import(name, self.lazy, node.lineno))

    def _visit_lazily(self, nodes):
        before, self.lazy = self.lazy, True
        for node in nodes:
            self.visit(node)
        self.lazy = before

    def visit_FunctionDef(self, node):
        # Decorators and defaults run when the file is imported.
        for part in (*node.decorator_list, node.args):
            self.visit(part)
        self._visit_lazily(node.body)

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815  (the name that ast calls)

    def visit_Lambda(self, node):
        self.visit(node.args)
        self._visit_lazily([node.body])

    def visit_If(self, node):
        if ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            self._visit_lazily(node.body)
            for part in node.orelse:
                self.visit(part)
        else:
            self.generic_visit(node)

    def visit_Import(self, node):
        for alias in node.names:
            self._add(alias.name, node)

    def visit_ImportFrom(self, node):
        base = node.module or ""
        if node.level:
            parents = self.package.split(".")
            kept = parents[: len(parents) - node.level + 1]
            base = ".".join([*kept, base] if base else kept)
        # `from a import b` may import the module a.b: it counts as a.b either way.
        for alias in node.names:
            self._add(f"{base}.{alias.name}", node)

    def visit_Call(self, node):
        called = ast.unparse(node.func)
        if called in ("__import__", "import_module", "importlib.import_module"):
            name = node.args[0] if node.args else None
            constant = isinstance(name, ast.Constant) and isinstance(name.value, str)
            self._add(name.value if constant else COMPUTED, node)
        self.generic_visit(node)


def imports_of(path, source):
    """Every import of a file, with its absolute name; `path` is relative to the project."""
    visitor = _Imports(".".join(path.parts[1:-1]))
    visitor.visit(ast.parse(source))
    return visitor.found


def rule_of(path):
    matching = [prefix for prefix in RULES if path.is_relative_to(prefix)]
    return RULES[max(matching, key=len)]


def violations(path, source):
    """What a file imports and may not, as one line each."""
    rule, own = rule_of(path), PACKAGES[path.parts[0]]
    ruled = {*PACKAGES.values(), *LEARNING, *SERVING, COMPUTED} - {own}
    found = []
    for item in imports_of(path, source):
        if not any(is_within(item.name, name) for name in ruled):
            continue
        allowed = rule.always + (rule.lazily if item.lazy else ())
        if not any(is_within(item.name, name) for name in allowed):
            when = "lazily" if item.lazy else "at import"
            found.append(f"{path}:{item.line} imports {item.name} {when}")
    return found


def source_files():
    return [
        PurePosixPath(file.relative_to(ROOT).as_posix())
        for root, package in PACKAGES.items()
        for file in sorted((ROOT / root / package).rglob("*.py"))
    ]


def read(path):
    return (ROOT / path).read_text("utf-8")


@pytest.mark.parametrize("root", PACKAGES)
def test_every_import_points_the_right_way(root):
    files = [path for path in source_files() if path.parts[0] == root]
    assert files
    assert [line for path in files for line in violations(path, read(path))] == []


def test_a_source_root_holds_one_package():
    for root, package in PACKAGES.items():
        python = {file.relative_to(ROOT / root).parts[0] for file in (ROOT / root).rglob("*.py")}
        assert python == {package}


def test_lazy_imports_are_seen():
    """The product's own: were they not found, the rules for them would hold of nothing."""

    def of(path):
        return {(item.name, item.lazy) for item in imports_of(PurePosixPath(path), read(path))}

    runtimes = of("client_sdk/veilhead/runtimes.py")
    assert ("veilhead_models.backbone.Backbone", True) in runtimes
    assert ("veilhead_models.onnx_backbone.OnnxBackbone", True) in runtimes
    assert ("veilhead_service.app.create_app", True) in of("client_sdk/veilhead/local.py")
    assert ("veilhead_models.backbone.minilm", True) in of("service/veilhead_service/cli.py")
    assert ("veilhead_service.model_store.ModelSource", False) in of(
        "service/veilhead_service/routes.py"
    )


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("protocol/veilhead_protocol/x.py", "import veilhead"),
        ("protocol/veilhead_protocol/x.py", "def f():\n    import torch"),
        ("models/veilhead_models/x.py", "from veilhead_service import app"),
        ("models/veilhead_models/x.py", "import torch"),
        ("models/veilhead_models/x.py", "def f(x=__import__('torch')): pass"),
        ("models/veilhead_models/artifact.py", "def f():\n    import torch"),
        ("client_sdk/veilhead/x.py", "from veilhead_models.backbone import Backbone"),
        ("client_sdk/veilhead/x.py", "from veilhead_models import backbone"),
        ("client_sdk/veilhead/x.py", "def f():\n    from veilhead_models import artifact"),
        ("client_sdk/veilhead/x.py", "def f():\n    import veilhead_service.app"),
        ("client_sdk/veilhead/x.py", "class A:\n    from veilhead_models import backbone"),
        ("client_sdk/veilhead/x.py", "try:\n    import fastapi\nexcept ImportError: pass"),
        ("client_sdk/veilhead/local.py", "from veilhead_service.app import create_app"),
        ("client_sdk/veilhead/gateway/x.py", "def f():\n    from veilhead_service import app"),
        ("service/veilhead_service/x.py", "import veilhead"),
        ("service/veilhead_service/x.py", "import veilhead.session as s"),
        ("service/veilhead_service/x.py", "async def f():\n    from veilhead import session"),
        ("service/veilhead_service/x.py", "if TYPE_CHECKING:\n    from veilhead import Client"),
        ("service/veilhead_service/x.py", "f = lambda: __import__('veilhead')"),
        ("service/veilhead_service/x.py", "import importlib\nimportlib.import_module('torch')"),
        ("service/veilhead_service/x.py", "def f(name):\n    return __import__(name)"),
        ("service/veilhead_service/x.py", "def f():\n    from veilhead_models import training"),
        ("service/veilhead_service/x.py", "from veilhead_models import *"),
        ("service/veilhead_service/deep/x.py", "from ...veilhead_models import training"),
        ("service/veilhead_service/cli.py", "from veilhead_models.backbone import minilm"),
        ("service/veilhead_service/cli.py", "def f():\n    import veilhead"),
    ],
)
def test_what_is_forbidden_is_found(path, source):
    assert len(violations(PurePosixPath(path), source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("protocol/veilhead_protocol/x.py", "from . import wire\nimport numpy, veilhead_protocol"),
        ("models/veilhead_models/x.py", "def f():\n    import torch"),
        ("client_sdk/veilhead/x.py", "if TYPE_CHECKING:\n    from veilhead_models import backbone"),
        ("client_sdk/veilhead/x.py", "from veilhead.session import Session"),
        ("client_sdk/veilhead/local.py", "def f():\n    import veilhead_service.app"),
        ("service/veilhead_service/x.py", "from veilhead_models.artifact import HeadArtifact"),
        ("service/veilhead_service/deep/x.py", "from ..app import create_app"),
        ("service/veilhead_service/cli.py", "def f():\n    from veilhead_models import training"),
        ("benchmarks/veilhead_benchmarks/x.py", "import torch, veilhead, veilhead_service.app"),
    ],
)
def test_what_is_allowed_is_not(path, source):
    assert violations(PurePosixPath(path), source) == []


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("veilhead", {*LEARNING, *SERVING, "veilhead_models", "veilhead_service"}),
        ("veilhead.cli", {*LEARNING, *SERVING, "veilhead_models", "veilhead_service"}),
        ("veilhead_protocol.wire", {*LEARNING, *SERVING, "veilhead", "veilhead_models"}),
        ("veilhead_models.artifact", {*LEARNING, *SERVING, "veilhead", "veilhead_service"}),
        ("veilhead_models.backbone", {*LEARNING, *SERVING, "veilhead", "veilhead_service"}),
        ("veilhead_models.onnx_backbone", {*LEARNING, *SERVING, "veilhead", "veilhead_service"}),
        ("veilhead_models.onnx_export", {*LEARNING, *SERVING, "veilhead", "veilhead_service"}),
        ("veilhead_service.app", {*LEARNING, "veilhead"}),
        ("veilhead_service.worker", {*LEARNING, *SERVING, "veilhead"}),
        ("veilhead_service.cli", {*LEARNING, "veilhead"}),
    ],
)
def test_importing_it_does_not_import(module, absent):
    script = f"import json, sys, {module}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    loaded = {name.partition(".")[0] for name in json.loads(done.stdout)}
    assert module.partition(".")[0] in loaded
    assert loaded & absent == set()
