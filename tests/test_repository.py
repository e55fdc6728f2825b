"""The repository itself: what is tracked, and whether the documents say what the code does."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from functools import cache
from http import HTTPStatus
from pathlib import Path

import anyio
import httpx2
import pytest
from fastapi.routing import APIRoute
from starlette.routing import Route

from veilhead_protocol import errors
from veilhead_protocol.wire import MAX_KEY_BYTES, MAX_QUERY_BYTES
from veilhead_service import problems
from veilhead_service.app import create_app
from veilhead_service.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
VECTORS = Path("tests/vectors")
HTTP_API = Path("docs/http-api.md")
THREAT_MODEL = Path("docs/threat-model.md")
ATTACKS = (
    Path("tests/service/test_head_attacks.py"),
    Path("tests/client_sdk/test_key_attacks.py"),
)

MAX_FILE_BYTES = 512 * 2**10

#: What a source archive or a working copy may hold besides the project's own files.
MADE_BY_TOOLS = frozenset(
    {"__pycache__", "artifacts", "build", "demo-report.json", "dist", "results", "store"}
)

DATA_SUFFIXES = frozenset(
    {".arrow", ".bin", ".bz2", ".csv", ".feather", ".gguf", ".gz", ".h5", ".joblib", ".jsonl"}
    | {".ndjson", ".npy", ".npz", ".onnx", ".parquet", ".pb", ".pickle", ".pkl", ".pt", ".pth"}
    | {".safetensors", ".tar", ".tsv", ".whl", ".xz", ".zip", ".zst"}
)

#: Names of machines and places that a user's own configuration decides on.
HOSTS = re.compile(
    r"(?<![\w-])("
    r"(files\.)?pythonhosted\.org|(test\.)?pypi\.(org|python\.org)|huggingface\.co|hf\.co|"
    r"hf-mirror\.com|anaconda\.(org|com)|registry\.npmjs\.org|crates\.io|proxy\.golang\.org|"
    r"docker\.io|hub\.docker\.com|ghcr\.io|quay\.io|gcr\.io|conda\.io|modelscope\.cn|"
    r"download\.pytorch\.org"
    r")\b"
)
LOCAL_PLACES = re.compile(r"(?<![\w.])/(work|opt/pypi|opt/wheels)/")


def repository_files():
    """Tracked files, relative to the project; in a source archive, all files of the project."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        tracked = (
            done.stdout.split("\0") if done.returncode == 0 and (ROOT / ".git").exists() else []
        )
    except OSError:  # no git
        tracked = []
    if any(tracked):
        return [Path(name) for name in tracked if name and (ROOT / name).is_file()]
    found = [path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file()]
    return [path for path in found if not is_made_by_tools(path)]


def is_made_by_tools(path):
    return any(
        part in MADE_BY_TOOLS or part.endswith(".egg-info") or part.startswith(".venv")
        for part in path.parts
    ) or any(part.startswith(".") for part in path.parts[:-1])


@pytest.fixture(scope="module")
def files():
    found = repository_files()
    assert Path("pyproject.toml") in found
    return found


def read(path):
    return (ROOT / path).read_text("utf-8")


# --- what is tracked ------------------------------------------------------------------------------


def test_no_data_and_no_weights_outside_the_vectors(files):
    outside = [path for path in files if not path.is_relative_to(VECTORS)]
    assert [str(path) for path in outside if DATA_SUFFIXES & set(path.suffixes)] == []


def test_all_else_is_text(files):
    def is_text(path):
        content = (ROOT / path).read_bytes()
        try:
            return "\0" not in content.decode("utf-8")
        except UnicodeDecodeError:
            return False

    outside = [path for path in files if not path.is_relative_to(VECTORS)]
    assert [str(path) for path in outside if not is_text(path)] == []


def test_files_are_small(files):
    sizes = {str(path): (ROOT / path).stat().st_size for path in files}
    assert {path: size for path, size in sizes.items() if size > MAX_FILE_BYTES} == {}


def test_no_registry_and_no_place_of_one_machine_is_named(files):
    found = []
    for path in files:
        if path.is_relative_to(VECTORS) and path.suffix == ".bin":
            continue
        for number, line in enumerate(read(path).splitlines(), 1):
            if HOSTS.search(line) or LOCAL_PLACES.search(line):
                found.append(f"{path}:{number}")
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "https://hugging" + "face.co/models",
        "see py" + "pi.org",
        "https://files.python" + "hosted.org/x",
        "FROM gh" + "cr.io/a/b",
        "cd /wo" + "rk/main",
    ],
)
def test_such_names_would_be_found(line):
    assert HOSTS.search(line) or LOCAL_PLACES.search(line)


# --- documents ------------------------------------------------------------------------------------


def documents():
    found = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("tests/vectors/*.md")]
    return [path.relative_to(ROOT) for path in sorted(found)]


def prose(path):
    """A document without its code blocks."""
    return re.sub(r"^```.*?^```$", "", read(path), flags=re.M | re.S)


@cache
def anchors(path):
    """The anchors of a document's headings, as they are derived on the usual sites."""
    found = []
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", prose(path), flags=re.M):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        anchor = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        found.append(anchor)
    assert len(set(found)) == len(found), f"{path} has two headings of one name"
    return frozenset(found)


def broken_links(path):
    broken = []
    for target in re.findall(r"\]\(<?([^)\s>]+)>?\)", prose(path)):
        if re.match(r"[a-z][a-z0-9+.-]*:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = (ROOT / path.parent / name).resolve() if name else ROOT / path
        if not linked.exists() or not linked.is_relative_to(ROOT):
            broken.append(f"{path}: {target}")
        elif anchor and anchor not in anchors(linked.relative_to(ROOT)):
            broken.append(f"{path}: {target} (no such heading)")
    return broken


def test_links_between_documents_resolve():
    assert [line for path in documents() for line in broken_links(path)] == []


def test_pages_that_the_code_names_exist(files):
    named = {
        (str(path), name)
        for path in files
        if path.suffix == ".py"
        for name in re.findall(r"\bdocs/[\w-]+\.md\b", read(path))
    }
    assert named
    assert {item for item in named if not (ROOT / item[1]).is_file()} == set()


@cache
def functions_of(path):
    return {
        node.name
        for node in ast.walk(ast.parse(read(path)))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def named_tests(document):
    """The test files (or folders) that a document names, and the functions in backquotes."""
    text = read(document)
    paths = {Path(name) for name in re.findall(r"`(tests/[\w/.-]+)`", text)}
    return paths, set(re.findall(r"`(test_\w+)`", text))


@pytest.mark.parametrize("document", documents(), ids=str)
def test_tests_that_a_document_names_exist(document):
    """A guarantee that names its test has one."""
    paths, functions = named_tests(document)
    assert {str(path) for path in paths if not (ROOT / path).exists()} == set()
    files = [path for path in paths if path.suffix == ".py"]
    assert functions - set().union(*(functions_of(path) for path in files)) == set()


def test_the_threat_model_names_every_attack():
    paths, functions = named_tests(THREAT_MODEL)
    for path in ATTACKS:
        assert path in paths
        attacks = {name for name in functions_of(path) if name.startswith("test_")}
        assert attacks
        assert attacks - functions == set()


# --- SECURITY.md against the package's metadata ---------------------------------------------------


def contacts_of_the_package():
    """The maintainers, as they are written where an address stands behind a name."""
    project = tomllib.loads(read(Path("pyproject.toml")))["project"]
    urls = project.get("urls", {})
    people = {
        f"{person['name']} <{person['email']}>" if "email" in person else person["name"]
        for person in project["maintainers"]
    }
    return people | {urls[name] for name in urls if name.lower() == "security"}


def contacts_in(page):
    (section,) = re.findall(r"^## Reporting a vulnerability$(.*?)(?=^## |\Z)", page, re.M | re.S)
    return set(re.findall(r"^- Contact: (.+)$", section, re.M)), section


def unfounded(page, contacts):
    """Ways to report that a page names and the package does not, or that cannot be."""
    named, section = contacts_in(page)
    addresses = set(re.findall(r"[\w.+-]+@[\w.-]+|https?://[^\s)>]+", section))
    return (
        (named ^ contacts)
        | {found for found in addresses if not any(found in contact for contact in contacts)}
        | {found for found in addresses if re.search(r"noreply|\.(example|invalid|test)\b", found)}
        | set(re.findall(r"advisor\w+|issue tracker|open an? \w* ?issue", section, re.I))
    )


def test_reports_go_to_who_the_package_names():
    page, contacts = read(Path("SECURITY.md")), contacts_of_the_package()
    assert contacts
    assert unfounded(page, contacts) == set()
    for wrong in (
        page.replace("- Contact:", "Contact"),
        page.replace("- Contact: ", "- Contact: Somebody "),
        page.replace("They are the", "Write to security@veilhead.invalid. They are the"),
        page.replace("They are the", "Open a private security advisory. They are the"),
    ):
        assert unfounded(wrong, contacts)


# --- docs/http-api.md against the service ---------------------------------------------------------


def problems_in_the_code():
    """Every problem code that the service can name: {code: (status or None, retryable)}."""
    found = {}
    service = Path(problems.__file__).parent
    for file in service.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "Problem"):
                continue
            status, code = node.args[:2]
            if isinstance(code, ast.Constant):
                retryable = any(
                    keyword.arg == "retryable" and ast.unparse(keyword.value) == "True"
                    for keyword in node.keywords
                )
                known = isinstance(status, ast.Attribute)  # else the status is computed
                found[code.value] = (HTTPStatus[status.attr].value if known else None, retryable)
    for kind in errors.WireError.__subclasses__():
        found[kind.code] = _of_error(kind)
    for kind in (errors.WorkerError, *errors.WorkerError.__subclasses__()):
        found[kind.code] = _of_error(kind)
    return found | generic_problems()


def _of_error(kind):
    problem = problems.of_error(kind("..."))
    assert problem.code == kind.code
    return problem.status.value, problem.retryable


def generic_problems():
    """What the framework itself refuses."""

    async def ask(app):
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return [await client.get("/nowhere"), await client.post("/livez")]

    answers = anyio.run(ask, create_app(Settings(workers=1, insecure_no_tenants=True)))
    bodies = [answer.json() for answer in answers]
    return {
        body["type"].removeprefix(problems.PROBLEM_TYPE): (body["status"], body["retryable"])
        for body in bodies
    }


def problems_in_the_document():
    rows = re.findall(r"^\| `([a-z-]+)` \| (\d{3}) \| (yes|no) \|", read(HTTP_API), flags=re.M)
    assert len({code for code, _, _ in rows}) == len(rows)
    return {code: (int(status), retryable == "yes") for code, status, retryable in rows}


def test_every_problem_is_documented_with_its_status():
    in_code = problems_in_the_code()
    assert {"key-not-registered", "wrong-length", "worker-unavailable", "internal"} <= set(in_code)
    documented = problems_in_the_document()
    assert documented.keys() == in_code.keys()
    for code, (status, retryable) in in_code.items():
        assert documented[code] == (documented[code][0] if status is None else status, retryable)


def test_every_route_is_documented_and_no_other():
    app = create_app(Settings(workers=1, insecure_no_tenants=True))
    routes = {
        (method.upper(), path)
        for path, methods in app.openapi()["paths"].items()
        for method in methods
    }
    pages = [route for route in app.routes if isinstance(route, Route)]  # of the framework
    routes |= {("GET", route.path) for route in pages if not isinstance(route, APIRoute)}
    assert ("POST", "/v1/models/{name}/infer") in routes
    assert ("GET", "/docs") in routes
    pattern = r"^\| `(GET|HEAD|PUT|POST|DELETE|PATCH)` \| `(/[^`]*)` \|"
    assert set(re.findall(pattern, read(HTTP_API), flags=re.M)) == routes


def test_the_documented_limits_are_the_codes():
    text = read(HTTP_API)
    assert f"{MAX_KEY_BYTES:,} bytes" in text
    assert f"{MAX_QUERY_BYTES:,} bytes" in text


def test_every_setting_is_documented_with_its_default():
    rows = re.findall(r"^\| `VEILHEAD_SERVER_([A-Z_]+)` \| `?([^`|]+?)`? \|", read(HTTP_API), re.M)
    documented = {name.lower(): default for name, default in rows}
    assert documented.keys() == Settings.model_fields.keys()
    for name, field in Settings.model_fields.items():
        if field.default_factory is None:
            kind = type(field.default)
            shown = documented[name].replace(",", "")
            if kind in (bool, type(None)):  # whose constructors read no text
                assert shown == str(field.default).lower(), name
            else:
                assert kind(shown) == field.default, name
