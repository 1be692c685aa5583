"""Prometheus' rules and Grafana's dashboard: they are well-formed, use existing metrics, and every rule can fire.

promtool checks the PromQL. Names, labels and values are compared with a scrape of a real daemon.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from msgspec import Struct, field
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from jobd.cli.ctl.main import jobctl as jobctl_program
from jobd.cli.ctl.webhook_commands import STATES
from jobd.cli.daemon.main import RULES, main
from jobd.cli.daemon.main import jobd as jobd_program
from jobd.core.stats import HOURS_NEEDED, SAMPLES_NEEDED, Counters, DurationBaseline, Histogram
from jobd.engine.actor import COMMIT_BUCKETS_S
from jobd.model.responses import ClusterView
from jobd.monitoring.grafana import dashboard
from jobd.monitoring.metrics import cluster_metrics
from jobd.monitoring.problems.catalogue import ALERTS, OF_CLUSTER
from jobd.storage.store import Store
from tests.conftest import tool_missing
from tests.integration.test_docs import OPERATIONS, rows, ticked
from tests.support.cli_harness import commands_of
from tests.support.forked_process import ForkedDaemon

PROMETHEUS: Final = {"up"}  # metrics that Prometheus adds to every scrape
TARGET: Final = {"instance", "job"}  # labels that it adds to all of them
FREE: Final = {"queue", "kind", "webhook", *TARGET}  # labels with values of the user


UNREACHABLE_WEBHOOK: Final = f"""
[[webhooks]]
name = "nobody"
url = "http://127.0.0.1:9/"
allow_private = true
events = ["problem.*"]
secret = "whsec_{"c2VjcmV0" * 4}"
"""


class AlertRule(Struct, forbid_unknown_fields=True):
    alert: str
    expr: str
    labels: dict[str, str]
    annotations: dict[str, str]
    lasting: str | None = field(name="for", default=None)


class AlertRuleGroup(Struct, forbid_unknown_fields=True):
    name: str
    rules: list[AlertRule]


class AlertRuleFile(Struct, forbid_unknown_fields=True):
    groups: list[AlertRuleGroup]


def groups() -> list[AlertRuleGroup]:
    return msgspec.yaml.decode(RULES.read_bytes(), type=AlertRuleFile).groups


def rules() -> list[AlertRule]:
    return [rule for group in groups() for rule in group.rules]


def board() -> dict[str, Any]:
    read: dict[str, Any] = json.loads(dashboard())
    return read


def panels() -> list[dict[str, Any]]:
    return [panel for panel in board()["panels"] if panel["type"] != "row"]


def targets() -> Iterator[tuple[str, str, str]]:
    """Return the panel, expression and legend of each curve."""
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], target["expr"], target["legendFormat"]


async def save_usual(path: Path) -> None:
    """A store whose daemon has run for some hours."""
    counters = Counters()
    counters.baselines.kinds[""] = DurationBaseline(hours=[10] * HOURS_NEEDED)
    store, _ = await Store.open(str(path))
    async with store:
        await store.save_stats(msgspec.json.encode(counters))


def complete_some(daemon: ForkedDaemon, count: int) -> None:
    daemon.post("/v1/jobs/bulk", {"jobs": [{"id": f"m{number}"} for number in range(count)]})
    for grant in daemon.post("/v1/claim", {"worker": "w", "limit": count}).data["grants"]:
        done = {"lock_id": grant["lock_id"], "metadata": 1}
        daemon.post(f"/v1/jobs/{grant['job']['id']}/complete", done)


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> list[Metric]:
    """Return the metrics of a real scrape. The daemon knows usual durations."""
    directory = tmp_path_factory.mktemp("scraped")
    asyncio.run(save_usual(directory / "jobd.db"))
    with ForkedDaemon(directory, UNREACHABLE_WEBHOOK) as daemon:
        complete_some(daemon, SAMPLES_NEEDED)
        return list(text_string_to_metric_families(daemon.admin("GET", "/metrics").body.decode()))


@pytest.fixture(scope="module")
def scraped(families: list[Metric]) -> dict[str, list[dict[str, str]]]:
    """Return the sample names of a scrape of a leader, with their labels."""
    of_leader = cluster_metrics(ClusterView(role="leader"), Histogram.empty(COMMIT_BUCKETS_S))
    found: dict[str, list[dict[str, str]]] = {}
    for family in [*families, *(make() for make in of_leader)]:
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.labels)
    found["jobd_alert_firing"] += [{"alert": each.alert} for each in ALERTS.values() if each in OF_CLUSTER]
    return found


def test_every_metric_is_documented(families: list[Metric]) -> None:
    documented = {
        ticked(name)[0]: (kind, set(ticked(labels)))
        for name, kind, labels, _ in rows(OPERATIONS, "metric", "type", "labels")
    }
    given: dict[str, tuple[str, set[str]]] = {}
    for family in families:
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        given[name] = (family.type, labels)
    assert documented == given, "docs/operations.md: each metric has a row with its type and labels"


# ---------------------------------------------------------------------------------------------------------------------
# The verb that prints them.


def test_the_verb_prints_the_rules_and_the_dashboard(capsys: pytest.CaptureFixture[str]) -> None:
    for what, expected in (("rules", RULES.read_text("utf-8")), ("dashboard", f"{dashboard()}\n")):
        assert main(["monitoring", what]) == 0
        assert capsys.readouterr().out == expected


def test_an_unknown_file_is_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["monitoring", "everything"]) == 2
    assert "rules" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# The rules.


def test_every_rule_is_complete_and_has_a_unique_name() -> None:
    names = [rule.alert for rule in rules()]
    assert len(set(names)) == len(names)
    for rule in rules():
        assert re.fullmatch("Jobd([A-Z][a-z]+)+", rule.alert)
        assert re.fullmatch("[0-9]+[mh]", rule.lasting or "1m")
        assert rule.labels in [{"severity": severity} for severity in ("critical", "warning", "notice")]
        assert set(rule.annotations) == {"summary", "description"}
        assert all(text.endswith(".") for text in rule.annotations.values()), rule.alert


def test_every_rule_explains_its_threshold() -> None:
    lines = RULES.read_text("utf-8").splitlines()
    for number, line in enumerate(lines):
        if "- alert:" in line:
            assert re.match(r" +# .+\.$", lines[number - 1]), line


def test_every_alert_of_jobd_has_a_rule() -> None:
    meant = [re.findall(r'jobd_alert_firing\{alert="(\w+)"\} == 1', rule.expr) for rule in groups()[0].rules]
    assert meant == [[name] for name in ALERTS], "jobd.rules.yml: each alert has a rule, in the order of ALERTS"


def test_rules_use_metrics_that_a_daemon_exports(scraped: dict[str, list[dict[str, str]]]) -> None:
    for rule in rules():
        looked_at = check(rule.expr, scraped, rule.alert)
        labels = {label for text in rule.annotations.values() for label in re.findall(r"\$labels\.(\w+)", text)}
        assert labels <= looked_at | TARGET, rule.alert


def test_commands_in_the_rules_exist() -> None:
    commands = {"jobd": commands_of(jobd_program), "jobctl": commands_of(jobctl_program)}
    advised = 0
    for text in (rule.annotations["description"] for rule in rules()):
        assert set(re.findall("--state ([a-z_-]+)", text)) <= {*STATES}, text
        for program, rest in re.findall(r"\b(jobctl|(?<!-u )(?<!systemctl restart )jobd) ([a-z][^,.;)]*)", text):
            verb = rest.split()[0]
            if program == "jobd" and verb not in commands["jobd"]:
                continue  # the name of the daemon, in prose
            assert verb in commands[program], text
            options = {name for each in commands[program][verb].params for name in each.opts}
            assert set(re.findall("--[a-z-]+", rest)) <= options, text
            advised += 1
    assert advised > 20


JOBD: Final = '{instance="a", job="jobd"}'


def firing(name: str) -> tuple[str, dict[str, str], dict[str, str]]:
    series = f'jobd_alert_firing{{alert="{name}", instance="a", job="jobd"}}'
    return "12m", {series: "1x240"}, {series: "0x240"}


def gauge(name: str, high: float, low: float, labels: str = JOBD) -> tuple[str, dict[str, str], dict[str, str]]:
    return "20m", {f"{name}{labels}": f"{high}x240"}, {f"{name}{labels}": f"{low}x240"}


def counted(code: str) -> tuple[str, dict[str, str], dict[str, str]]:
    series = f'jobd_rejections_total{{code="{code}", instance="a", job="jobd"}}'
    return "20m", {series: "0+1x240"}, {series: "7x240"}


def queue(name: str, values: str) -> dict[str, str]:
    status = ', status="queued"' if name == "jobd_queue_jobs" else ""
    return {f'{name}{{instance="a", job="jobd", queue="film"{status}}}': values}


def commits(fast: int, slow: int) -> dict[str, str]:
    """Return commit buckets: commits per minute below a tenth of a second, and in total."""
    name = 'jobd_commit_seconds_bucket{instance="a", job="jobd", le='
    return {f'{name}"0.1"}}': f"0+{fast}x240", f'{name}"0.5"}}': f"0+{slow}x240", f'{name}"+Inf"}}': f"0+{slow}x240"}


def nodes(first: str, second: str) -> dict[str, str]:
    return {f'jobd_leader{{instance="{name}", job="jobd"}}': values for name, values in (("a", first), ("b", second))}


MIB: Final = 1 << 20

PROBLEM: Final = '{condition="no_workers", severity="critical", instance="a", job="jobd"}'
WARNING: Final = '{condition="waits", severity="warning", instance="a", job="jobd"}'
WEBHOOK: Final = 'jobd_webhook_deliveries_total{{outcome="{}", webhook="e", instance="a", job="jobd"}}'

# When to evaluate, series for which the rule fires (one value a minute), and series for which it does not. The rules of
# the alerts of jobd come before these.
SEEN: Final[dict[str, tuple[str, dict[str, str], dict[str, str]]]] = {
    "JobdCriticalProblem": gauge("jobd_problems", 1, 0, PROBLEM),
    "JobdNewProblem": (
        "20m",
        {f"jobd_problems_opened_total{WARNING}": "1x10 2x10"},
        {f"jobd_problems_opened_total{WARNING}": "2x240"},
    ),
    "JobdDown": gauge("up", 0, 1),
    "JobdAbsent": ("6m", {}, {f"jobd_build_info{JOBD}": "1x240"}),
    "JobdNoLeader": ("20m", nodes("0x240", "0x240"), nodes("0x240", "1x240")),
    "JobdLeaderChangesOften": (
        "60m",
        nodes("1 0 1 0x60", "0 1 0 1 0 1x60"),
        nodes("1 0 1 0x60", "0 1 0 1x60"),
    ),
    "JobdRestartsOften": (
        "60m",
        {f"jobd_commit_seconds_count{JOBD}": "9 2 9 2 9 2 9 2x50"},
        {f"jobd_commit_seconds_count{JOBD}": "9 2 9 2 9 2 9x50"},
    ),
    "JobdCleanupOverdue": (
        "20m",
        {f"jobd_cleanup_last_timestamp_seconds{JOBD}": "0x240"},
        {f"jobd_cleanup_last_timestamp_seconds{JOBD}": "0x7 300x240"},
    ),
    "JobdStorageFull": (
        "20m",
        {f"jobd_disk_full{JOBD}": "0x16 1 0x240"},
        {f"jobd_disk_full{JOBD}": "0x240", **counted("storage_full")[1]},  # of a backup
    ),
    "JobdDiskFilling": gauge("jobd_disk_free_bytes", 256 * MIB - 1, 256 * MIB),
    "JobdOverloaded": counted("overloaded"),
    "JobdMailboxFilling": (
        "20m",
        {f"jobd_mailbox_commands{JOBD}": "5001x240", f"jobd_mailbox_limit_commands{JOBD}": "10000x240"},
        {f"jobd_mailbox_commands{JOBD}": "5000x240", f"jobd_mailbox_limit_commands{JOBD}": "10000x240"},
    ),
    "JobdWorkWaitsLong": (
        "20m",
        queue("jobd_queue_oldest_due_seconds", "3601x240") | queue("jobd_queue_paused", "0x240"),
        queue("jobd_queue_oldest_due_seconds", "3601x240") | queue("jobd_queue_paused", "1x240"),
    ),
    "JobdQueueGrows": ("2h", queue("jobd_queue_jobs", "0+20x240"), queue("jobd_queue_jobs", "0x70 9000x240")),
    "JobdQueuePaused": ("242m", queue("jobd_queue_paused", "1x260"), queue("jobd_queue_paused", "1x200 0 1x50")),
    "JobdWalGrows": gauge("jobd_wal_bytes", 256 * MIB + 1, 256 * MIB),
    "JobdLoopLag": gauge("jobd_loop_lag_seconds", 0.6, 0.5),
    "JobdCommitsSlow": ("30m", commits(90, 100), commits(100, 100)),
    "JobdArtifactsBehind": gauge("jobd_artifact_sweep_behind_seconds", 901, 900),
    "JobdClockSuspect": gauge("jobd_clock_suspect", 1, 0),
    "JobdQuarantine": gauge("jobd_quarantined_jobs", 1, 0),
    "JobdWebhookLostMessages": (
        "20m",
        {WEBHOOK.format("dead-lettered"): "0x10 3x240"},
        {WEBHOOK.format("failed"): "0+5x240", WEBHOOK.format("dead-lettered"): "3x240"},
    ),
}


def promtool(*arguments: str) -> str:
    if shutil.which("promtool") is None:
        tool_missing("promtool", "promtool")
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_prometheus_accepts_the_rules() -> None:
    assert f"{len(rules())} rules found" in promtool("check", "rules", "--lint=all", "--lint-fatal", str(RULES))


@pytest.mark.slow
def test_every_rule_fires_when_it_should_and_only_then(tmp_path: Path) -> None:
    seen = {rule.alert: firing(name) for rule, name in zip(groups()[0].rules, ALERTS, strict=True)} | SEEN
    assert list(seen) == [rule.alert for rule in rules()]
    tests = []
    for name, (when, fires, quiet) in seen.items():
        expr = f'count(ALERTS{{alertname="{name}", alertstate="firing"}})'
        for series, expected in ((fires, [{"labels": "{}", "value": 1}]), (quiet, [])):
            given = [{"series": each, "values": values} for each, values in series.items()]
            query = [{"expr": expr, "eval_time": when, "exp_samples": expected}]
            tests.append({"interval": "1m", "input_series": given, "promql_expr_test": query, "name": name})
    asked_of = tmp_path / "tests.yml"
    asked_of.write_text(json.dumps({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": tests}))
    assert "SUCCESS" in promtool("test", "rules", str(asked_of))


# ---------------------------------------------------------------------------------------------------------------------
# The dashboard.


def test_every_panel_has_a_place_a_title_and_a_description() -> None:
    ids = [panel["id"] for panel in board()["panels"]]
    assert len(set(ids)) == len(ids)
    places: set[tuple[int, int]] = set()
    for panel in board()["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        mine = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not places & mine, f"{panel['title']} lies over another"
        places |= mine
    for panel in panels():
        assert panel["title"], panel["id"]
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"].get("unit") or panel["type"] == "state-timeline", panel["title"]
        refs = [target["refId"] for target in panel["targets"]]
        assert refs == sorted(set(refs)), panel["title"]


def test_the_dashboard_is_not_tied_to_an_installation() -> None:
    """The data source is chosen on the page: the dashboard contains no id of a Grafana installation."""
    variables = {each["name"]: each for each in board()["templating"]["list"]}
    assert list(variables) == ["datasource", "instance", "queue"]
    sources = [each["datasource"] for each in (*variables.values(), *panels()) if "datasource" in each]
    sources += [target["datasource"] for panel in panels() for target in panel["targets"]]
    assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)
    assert "id" not in board()
    used = set(re.findall(r"\$\{?(\w+)", dashboard())) - {"__rate_interval", "__all"}
    assert used == set(variables)


def test_the_dashboard_uses_metrics_that_a_daemon_exports(scraped: dict[str, list[dict[str, str]]]) -> None:
    for title, expr, legend in targets():
        looked_at = check(expr, scraped, title)
        assert set(re.findall(r"\{\{(\w+)\}\}", legend)) <= looked_at | TARGET, title
    for variable in board()["templating"]["list"][1:]:
        query = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
        assert query is not None
        assert query[2] in check(query[1], scraped, variable["name"]) | TARGET


def test_every_metric_has_a_panel(scraped: dict[str, list[dict[str, str]]]) -> None:
    shown = " ".join(expr for _, expr, _ in targets())
    families = {re.sub("_(bucket|count|sum|created)$", "", name) for name in scraped}
    missing = {name for name in families if name not in shown}
    assert not missing, f"grafana.py: each metric has a panel, except {missing}"


def test_prometheus_accepts_the_queries_of_the_dashboard(tmp_path: Path) -> None:
    """Return its expressions as recording rules, with the variables of the page replaced."""
    recorded = [
        {"record": f"panel:{number}", "expr": expr.replace("$__rate_interval", "5m")}
        for number, (_, expr, _) in enumerate(targets())
    ]
    query = tmp_path / "panels.yml"
    query.write_text(json.dumps({"groups": [{"name": "panels", "rules": recorded}]}))
    assert f"{len(recorded)} rules found" in promtool("check", "rules", str(query))


# ---------------------------------------------------------------------------------------------------------------------
# Checks of expressions.


def check(expr: str, scraped: dict[str, list[dict[str, str]]], where: str) -> set[str]:
    """Check that the scrape has every metric, label and value of `expr`. Return the labels of the metrics."""
    found = re.findall(r"\b(jobd_\w+|up)(?:\{([^}]*)\})?", re.sub(r'"[^"]*"', lambda text: text[0], expr))
    assert found, f"{where}: {expr}"
    labels: set[str] = set()
    for name, matchers in found:
        if name in PROMETHEUS:
            continue
        assert name in scraped, f"{where}: {name}"
        samples = scraped[name]
        known = {label for sample in samples for label in sample} | TARGET
        labels |= known
        for label, operator, value in re.findall(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"', matchers):
            assert label in known, f"{where}: {name} has no {label}"
            if label not in FREE:
                values = {value} if operator in ("=", "!=") else set(value.split("|"))
                assert values <= {sample.get(label) for sample in samples}, f"{where}: {name} {label} {value}"
    for grouped in re.findall(r"\b(?:by|on|without|ignoring) \(([^)]*)\)", expr):
        assert {label.strip() for label in grouped.split(",")} <= labels | TARGET, f"{where}: {grouped}"
    return labels


def test_missing_metrics_are_detected(scraped: dict[str, list[dict[str, str]]]) -> None:
    for wrong in (
        "jobd_nothing",
        'jobd_jobs{queue="a"}',
        'jobd_jobs{status="waiting"}',
        'jobd_jobs{status=~"queued|waiting"}',
        "sum by (queue) (jobd_jobs)",
        "1",
    ):
        with pytest.raises(AssertionError):
            check(wrong, scraped, "here")
    assert check('sum by (queue) (jobd_queue_jobs{status="queued"})', scraped, "here") >= {"queue", "status"}
