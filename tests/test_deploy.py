"""What `deploy/` and compose.yaml say about the service is true of it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient
from typer.testing import CliRunner

from veilhead_protocol.wire import MAX_KEY_BYTES, MAX_QUERY_BYTES
from veilhead_service.access_log import AccessLog
from veilhead_service.app import create_app
from veilhead_service.cli import app as command
from veilhead_service.settings import ENVIRONMENT_PREFIX, Settings
from veilhead_service.telemetry import access_log_metrics, network_metrics, pool_metrics

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"


@dataclass(frozen=True)
class Pool:
    alive: int = 2
    busy: int = 1
    waiting: int = 3
    restarts: dict = field(default_factory=lambda: {"died": 5})
    failed_starts: int = 4
    unavailable: tuple = ()


@dataclass(frozen=True)
class Usage:
    tenant: str = "clinic"
    model: str = "digits"
    used: int = 7
    remaining: int | None = 93


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """The metrics of an app in which every part is there."""
    app = create_app(Settings(workers=1, insecure_no_tenants=True))
    telemetry = app.state.services.telemetry
    log = AccessLog(tmp_path_factory.mktemp("log") / "access.log", sync_seconds=0, file_bytes=4096)
    telemetry.watch(access_log_metrics(log))
    if not hasattr(app.state.services.pool, "stats"):
        pool = Pool()
        telemetry.watch(pool_metrics(lambda: pool))
    telemetry.watch(network_metrics(lambda: 5, 100, app.state.services.strangers))
    with_values = TestClient(app)
    with_values.get("/nowhere")
    return telemetry.expose([Usage()]).decode()


@pytest.fixture(scope="module")
def exposed(text):
    """Every name that a query may use."""
    names = set()
    for family in text_string_to_metric_families(text):
        names |= {sample.name for sample in family.samples} | {family.name}
        if family.type == "histogram":
            names |= {f"{family.name}_{end}" for end in ("bucket", "sum", "count")}
        if family.type == "counter":
            names.add(f"{family.name}_total")
    return names


def dashboard():
    return json.loads((DEPLOY / "grafana/veilhead.json").read_text())


def rules():
    (group,) = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())["groups"]
    return group["rules"]


def expressions():
    panels = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    return panels, [rule["expr"] for rule in rules()]


def metrics_in(expression):
    bare = re.sub(r'"[^"]*"', '""', expression)
    return set(re.findall(r"\b(?:veilhead|process)_[a-z_]+\b", bare))


def test_dashboard_and_alerts_use_metrics_that_exist(exposed):
    panels, alerts = expressions()
    for found in (panels, alerts):
        assert len(found) >= 10
        assert all(
            metrics_in(expression) or 'up{job="veilhead"}' in expression for expression in found
        )
        assert set().union(*map(metrics_in, found)) - exposed == set()
    assert metrics_in("rate(veilhead_absent_total[5m])") - exposed  # it would be noticed


def test_routes_and_reasons_in_queries_exist(text):
    panels, alerts = expressions()
    app = create_app(Settings(workers=1, insecure_no_tenants=True))
    paths = set(app.openapi()["paths"])
    for expression in (*panels, *alerts):
        assert set(re.findall(r'route="([^"]*)"', expression)) <= paths


def test_every_metric_of_ours_is_documented(exposed):
    page = (ROOT / "docs/operations.md").read_text()
    documented = set(re.findall(r"\bveilhead_[a-z_]+\b", page))
    families = {
        re.sub(r"_(created|bucket|sum|count)$", "", name)
        for name in exposed
        if name.startswith("veilhead_")
    }
    counters = {name.removesuffix("_total") for name in families if name.endswith("_total")}
    assert families - counters - documented == set()
    assert documented - families == set()


def test_every_alert_is_documented():
    page = (ROOT / "docs/operations.md").read_text()
    names = {rule["alert"] for rule in rules()}
    assert len(names) == len(rules())
    assert set(re.findall(r"`(Veilhead[A-Za-z]+)`", page)) == names
    assert all(rule["annotations"]["summary"] for rule in rules())


def test_panels_do_not_overlap_and_have_units():
    places = {(p["gridPos"]["x"], p["gridPos"]["y"]) for p in dashboard()["panels"]}
    assert len(places) == len(dashboard()["panels"])
    assert all(panel["fieldConfig"]["defaults"]["unit"] for panel in dashboard()["panels"])


# --- compose and Prometheus -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def compose():
    return yaml.safe_load((ROOT / "compose.yaml").read_text())


def test_compose_mounts_files_that_exist(compose):
    made = {"./store"}  # by `publish`
    for service in compose["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert source in made or (ROOT / source).exists(), source
            else:
                assert source in compose["volumes"]
        for secret in service.get("secrets", []):
            assert secret in compose["secrets"]


def test_compose_contains_its_services(compose):
    """Nothing of an image changes, no privileges, bounded logs, enough descriptors."""
    for name, service in compose["services"].items():
        assert service["read_only"] is True, name
        assert any(place.startswith("/tmp") for place in service["tmpfs"])  # noqa: S108
        assert service["cap_drop"] == ["ALL"]
        assert "no-new-privileges:true" in service["security_opt"]
        options = service["logging"]["options"]
        assert service["logging"]["driver"] == "json-file"
        assert options["max-size"] == "10m"
        assert int(options["max-file"]) > 1
        limits = service["ulimits"]
        assert limits["core"] == 0
        assert limits["nofile"]["soft"] == limits["nofile"]["hard"] >= 65536
        writable = {
            volume.split(":")[1] for volume in service["volumes"] if not volume.endswith(":ro")
        }
        assert len(writable) == 1  # its own data


def test_compose_and_the_image_ask_for_readiness(compose):
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    (check,) = re.findall(r"^HEALTHCHECK (.*)$", text, re.M)
    flags, _, command = check.partition(" CMD ")
    health = compose["services"]["veilhead"]["healthcheck"]
    assert health["test"] == ["CMD", *json.loads(command)]
    assert "/readyz" in health["test"][-1]
    given = dict(re.findall(r"--([a-z-]+)=(\S+)", flags))
    assert {name.replace("-", "_"): value for name, value in given.items()} == {
        name: str(value) for name, value in health.items() if name != "test"
    }


def test_compose_publishes_on_loopback_only(compose):
    for service in compose["services"].values():
        for port in service["ports"]:
            assert port.startswith("127.0.0.1:")


def test_composes_service_is_one_that_starts(compose):
    """Its flags and variables exist: what `run` is given, `settings` understands."""
    service = compose["services"]["veilhead"]
    first, *flags = service["command"]
    assert first == "run"
    shown = CliRunner().invoke(command, ["run", "--help"], env={"COLUMNS": "200"}).stdout
    assert {flag for flag in flags if flag.startswith("--")} <= set(re.findall(r"--[\w-]+", shown))
    for name, value in service["environment"].items():
        field = name.removeprefix(ENVIRONMENT_PREFIX).lower()
        assert field in Settings.model_fields
        assert Settings(**{field: value})


def test_prometheus_scrapes_what_compose_runs(compose):
    document = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    (job,) = document["scrape_configs"]
    host, port = job["static_configs"][0]["targets"][0].split(":")
    assert host in compose["services"]
    assert port in compose["services"][host]["command"]
    mounted = [volume.split(":")[1] for volume in compose["services"]["prometheus"]["volumes"]]
    assert set(document["rule_files"]) <= set(mounted)
    secret = Path(job["authorization"]["credentials_file"])
    assert secret.parent == Path("/run/secrets")
    assert secret.name in compose["secrets"]
    assert (
        job["metrics_path"]
        in create_app(Settings(workers=1, insecure_no_tenants=True)).openapi()["paths"]
    )


def test_grafana_reads_the_dashboard_where_compose_puts_it(compose):
    provisioning = DEPLOY / "grafana/provisioning"
    (provider,) = yaml.safe_load((provisioning / "dashboards/veilhead.yml").read_text())[
        "providers"
    ]
    mounted = [volume.split(":")[1] for volume in compose["services"]["grafana"]["volumes"]]
    assert f"{provider['options']['path']}/veilhead.json" in mounted
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    used = {panel["datasource"]["uid"] for panel in dashboard()["panels"]}
    assert used == {source["uid"]}


# --- TLS in front ---------------------------------------------------------------------------------


def test_proxies_let_the_longest_message_through():
    longest = max(MAX_KEY_BYTES, MAX_QUERY_BYTES)
    nginx = (DEPLOY / "nginx.conf").read_text()
    caddy = (DEPLOY / "Caddyfile").read_text()
    assert int(re.search(r"client_max_body_size (\d+)m;", nginx)[1]) * 2**20 >= longest
    assert int(re.search(r"max_size (\d+)MB", caddy)[1]) * 10**6 >= longest
    assert nginx.count("{") == nginx.count("}")
