"""Where settings come from, which one wins, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import SecretStr
from typer.testing import CliRunner

from veilhead_protocol.errors import ConfigurationError
from veilhead_service.cli import app
from veilhead_service.settings import Settings, load_settings, printed


@pytest.fixture(autouse=True)
def no_environment(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("CONFIG", "PORT", "WORKERS", "ACCESS_LOG", "TOKEN"):
        monkeypatch.delenv(f"VEILHEAD_SERVER_{name}", raising=False)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "veilhead.toml"
    path.write_text('port = 9001\nworkers = 3\naccess_log = "required"\n')
    return path


def run(*arguments, **options):
    return CliRunner().invoke(app, ["settings", *map(str, arguments)], **options)


def shown(*arguments, **options):
    result = run(*arguments, "--json", **options)
    assert result.exit_code == 0, result.output
    return {name: (row["value"], row["origin"]) for name, row in json.loads(result.stdout).items()}


def test_flags_come_before_the_environment_before_the_file_before_defaults(file):
    found = shown("--config", file)
    assert found["port"] == ("9001", "file")
    assert found["workers"] == ("3", "file")
    assert found["host"] == ("127.0.0.1", "default")
    env = {"VEILHEAD_SERVER_PORT": "9002", "VEILHEAD_SERVER_WORKERS": "4"}
    found = shown("--config", file, "--set", "port=9003", env=env)
    assert found["port"] == ("9003", "flag")
    assert found["workers"] == ("4", "environment")
    assert found["access_log"] == ("required", "file")


def test_the_environment_names_the_file(file):
    env = {"VEILHEAD_SERVER_CONFIG": str(file)}
    assert shown(env=env)["port"] == ("9001", "file")


def test_a_given_file_replaces_the_environments(file, tmp_path):
    other = tmp_path / "other.toml"
    other.write_text("workers = 7\n")
    found = shown("--config", other, env={"VEILHEAD_SERVER_CONFIG": str(file)})
    assert (found["workers"], found["port"]) == (("7", "file"), ("8000", "default"))


def test_the_class_reads_the_same_sources(file, monkeypatch):
    monkeypatch.setenv("VEILHEAD_SERVER_CONFIG", str(file))
    assert (Settings().port, Settings(port=9).port) == (9001, 9)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nonsense = 1", "there is no setting 'nonsense'"),
        ("ports = 1\nstores = 2", "'ports'.*'stores'"),
        ("port = 99999", "port: "),
        ("port = 'zqxjkmarker'", "port: "),
        ("log_format = 'xml'", "log_format: "),
        ("workers = 0", "workers: "),
        ("[table]\nport = 1", "'table'"),
        ("port = = zqxjkmarker", "not TOML"),
        ("tracing_endpoint = 'http://localhost:4318'", "needs tracing"),
        ("store = 'x'\nstate_directory = 'x/state'", "within each other"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name_and_not_by_value(file, content, message):
    file.write_text(content)
    with pytest.raises(ConfigurationError, match=message) as caught:
        load_settings(config=file)
    assert "zqxjkmarker" not in str(caught.value)
    result = run("--config", file)
    assert result.exit_code == 1
    assert "zqxjkmarker" not in result.output


def test_a_bad_variable_is_refused_by_name_and_not_by_value(monkeypatch):
    monkeypatch.setenv("VEILHEAD_SERVER_PORT", "zqxjkmarker")
    with pytest.raises(ConfigurationError, match="port") as caught:
        load_settings()
    assert "zqxjkmarker" not in str(caught.value)


def test_an_absent_file_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"absent\.toml cannot be read"):
        load_settings(config=tmp_path / "absent.toml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "port"], "NAME=VALUE"),
        (["--set", "port=1", "--set", "port=2"], "given twice"),
        (["--set", "nonsense=2"], "no setting 'nonsense'"),
    ],
)
def test_a_bad_assignment_is_refused(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 1
    assert message in result.stderr


class WithSecret(Settings):
    """Settings with a secret, as a head key in the environment would be."""

    token: SecretStr = SecretStr("")


@pytest.mark.parametrize("origin", ["flag", "environment", "file"])
def test_secrets_are_masked(origin, monkeypatch, file):
    secret = "zqxjkmarker"
    given, config = {}, None
    if origin == "flag":
        given = {"token": secret}
    elif origin == "environment":
        monkeypatch.setenv("VEILHEAD_SERVER_TOKEN", secret)
    else:
        file.write_text(f"token = '{secret}'\n")
        config = file
    settings = load_settings(given, config=config, kind=WithSecret)
    assert settings.token.get_secret_value() == secret
    rows = {name: (value, where) for name, value, where in printed(settings, given)}
    assert rows["token"] == ("**********", origin)
    assert secret not in repr(rows) + repr(settings) + str(settings)


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Settings().port = 1


def test_the_access_log_follows_tenants():
    assert Settings(access_log="required").access_log_mode == "required"
    assert Settings(insecure_no_tenants=True).access_log_mode == "off"
    assert Settings().access_log_mode == "on"


def test_plain_text_shows_the_same(file):
    result = run("--config", file)
    assert "9001  (file)" in result.stdout
    assert Path(file).exists()


def test_connections_follow_from_the_limit_of_open_files():
    settings = Settings(workers=2, max_downloads=64)
    assert settings.connections(2**20) == 4096
    assert settings.connections(1024) == 1024 - 256 - 16 - 64
    assert Settings(workers=2, max_connections=10).connections(1024) == 10
    with pytest.raises(ConfigurationError, match=r"is 399.*leaves 63.*raise it to 400"):
        settings.connections(399)
    with pytest.raises(ConfigurationError, match="expected 900"):
        Settings(workers=2, max_connections=900).connections(1024)
