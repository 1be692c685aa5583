"""What the documents say is what the code does: tables against code, examples really run, links and commands exist.

In a document `<!-- run -->` marks a shell block that is run, `<!-- shows -->` what it prints (… stands for any text,
alone on a line for any number of lines), `<!-- file: NAME -->` a block that is saved as NAME first. `<!-- node -->`
marks a block that needs Node.js, `<!-- clean -->` one that removes what the others have created.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, get_args

import click
import pytest
from msgspec import inspect, structs
from prometheus_client.parser import text_string_to_metric_families

import jobd
from jobd import config
from jobd.api import admin, worker
from jobd.api.import_preview import ImportPreview
from jobd.api.imports import ImportReport
from jobd.api.stream_lines import OPS, StreamedAnswer
from jobd.cli import exit_codes
from jobd.cli.ctl.main import jobctl as jobctl_program
from jobd.cli.daemon.main import jobd as jobd_program
from jobd.client.worker.command_worker import FIELDS, PREFIX
from jobd.core.pace import SAMPLES_NEEDED
from jobd.http.routing import Route
from jobd.model import commands, errors, events, responses
from jobd.monitoring import alerts
from tests import ROOT
from tests.conftest import tool_missing
from tests.support import config_reference
from tests.support.daemon_process import TOKEN, Daemon, die_with_us

PACKAGE: Final = Path(jobd.__file__).parent
DOCUMENTS: Final = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "systemd" / "README.md"]
README, API, OPERATIONS = ROOT / "README.md", ROOT / "docs/api.md", ROOT / "docs/operations.md"
QUICKSTART, WORKERS, MIGRATION = ROOT / "docs/quickstart.md", ROOT / "docs/workers.md", ROOT / "docs/migration.md"
CONFIGURATION, CLI = ROOT / "docs/configuration.md", ROOT / "docs/cli.md"
PROGRAMS: Final = {"jobd": jobd_program, "jobctl": jobctl_program}


# ---------------------------------------------------------------------------------------------------------------------
# Reading Markdown.


class Block(NamedTuple):
    """A fenced block: its language, the mark in the comment before it (run, shows, file: NAME or empty), its text."""

    language: str
    mark: str
    text: str


_BLOCK: Final = re.compile(r"(?:^<!-- (?P<mark>[^>]+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)


def blocks(document: Path) -> list[Block]:
    found = _BLOCK.finditer(document.read_text(encoding="utf-8"))
    return [Block(each["language"], each["mark"] or "", each["text"]) for each in found]


def prose(document: Path) -> str:
    """The text without its fenced blocks."""
    return _BLOCK.sub("", document.read_text(encoding="utf-8"))


def rows(document: Path, *header: str) -> list[list[str]]:
    """The rows of every table in `document` whose first columns are `header`. There is one such table at least."""
    found: list[list[str]] = []
    is_in, tables = False, 0
    for line in document.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not line.startswith("|"):
            is_in = False
        elif cells[: len(header)] == list(header):
            is_in, tables = True, tables + 1
        elif is_in and not set(line) <= set("|- "):
            found.append(cells)
    assert tables, f"{document.name} has no table {header}"
    return found


def ticked(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def section(document: Path, title: str) -> str:
    """The text under the heading `title`, up to the next heading of any level."""
    match = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", document.read_text(encoding="utf-8"), re.M | re.S)
    assert match, f"{document.name} has no heading {title}"
    return match[1]


# ---------------------------------------------------------------------------------------------------------------------
# Tables against code.


def test_every_config_key_with_its_default() -> None:
    said = {ticked(key)[0]: (ticked(default)[0], live == "yes") for key, default, live, _ in _config_rows()}
    defaults = config.Config()
    meant = {}
    for key in config.KEYS:
        part, _, name = key.partition(".")
        meant[key] = (config.show(getattr(getattr(defaults, part), name)), key in config.RELOADABLE)
    assert said == meant


def _config_rows() -> list[list[str]]:
    return rows(CONFIGURATION, "key", "default", "live")


@pytest.mark.parametrize("file", config_reference.generated(), ids=lambda file: file.name)
def test_generated_documents_are_up_to_date(file: Path) -> None:
    assert file.read_text(encoding="utf-8") == config_reference.generated()[file], (
        f"{file.name} is out of date. Regenerate it with: {config_reference.COMMAND}"
    )


def test_a_variable_that_means_a_key_is_said_to_be_read_by_the_daemon() -> None:
    keys = {f"JOBD_{key.replace('.', '_').upper()}" for key in config.KEYS}
    readers = {name: who for names, who, _ in rows(CONFIGURATION, "variable", "read by") for name in ticked(names)}
    assert keys & set(readers) == {"JOBD_WORKER_TOKEN_FILE"}
    for name in keys & set(readers):
        assert "daemon" in readers[name], name


def test_every_refusal_code_with_its_status() -> None:
    assert {ticked(code)[0]: int(status) for code, status, *_ in rows(API, "code", "status")} == errors.REFUSALS


@pytest.mark.parametrize(
    ("title", "table"),
    [("Worker API", worker.ROUTES), ("Admin API", admin.ROUTES)],
    ids=["worker", "admin"],
)
def test_every_call_with_its_fields(title: str, table: Sequence[Route]) -> None:
    said = {}
    for line in section(API, title).splitlines():
        if match := re.match(r"\| ([A-Z]+) `([^`]+)` \|([^|]*)\|([^|]*)\|([^|]*)\|", line):
            method, path, body, gives, key = (part.strip() for part in match.groups())
            said[method, path] = (sorted(ticked(body)), gives, key == "yes")
    assert said == {(route.method, route.path): _meant(route) for route in table}


def _meant(route: Route) -> tuple[list[str], str, bool]:
    body = [] if route.reads == "lines" else asked(route.asks, route.given)
    names = [name for name, shape in SHAPES.items() if shape is route.gives]
    return body, names[0] if names else {"Probe": "probe", "bytes": "bytes"}[route.gives.__name__], route.key


def asked(shape: Any, given: str | None = None) -> list[str]:
    """The fields of a body as a table says them, `?` where they may be left out."""
    fields = structs.fields(shape)
    return sorted(f"{each.encode_name}{'' if each.required else '?'}" for each in fields if each.name != given)


def test_every_kind_of_line() -> None:
    said = {ticked(op)[0]: ticked(call)[0].split() for op, call, *_ in rows(API, "op", "call")}
    assert said == {name: [op.method, op.path] for name, op in OPS.items()}


SHAPES: Final[dict[str, Any]] = {
    "job": responses.JobView,
    "lock": responses.LockView,
    "grant": responses.GrantView,
    "lock state": responses.LockState,
    "jobs": responses.JobList,
    "page": responses.JobPage,
    "grants": responses.Grants,
    "timeline": responses.TimelineView,
    "late results": responses.LateResultList,
    "late result": responses.LateResultView,
    "event": events.EventView,
    "streamed event": events.StreamedEvent,
    "streamed response": StreamedAnswer,
    "why": responses.WhyView,
    "next": responses.Next,
    "validation": responses.Validation,
    "issue": responses.Issue,
    "queues": responses.QueueList,
    "queue": responses.QueueView,
    "workers": responses.WorkerList,
    "worker": responses.WorkerView,
    "stats": responses.StatsView,
    "health": responses.HealthView,
    "report": responses.CleanupReport,
    "cleanup state": responses.CleanupState,
    "recovered": responses.RecoverStuckView,
    "taken back": responses.TakenBack,
    "recovery": responses.Recovery,
    "validated job": responses.ValidateJobView,
    "forced": responses.Forced,
    "admin lock": responses.AdminLock,
    "import report": ImportReport,
    "import preview": ImportPreview,
    "failures": responses.FailuresView,
    "failure group": responses.FailureGroup,
    "preview": responses.PreviewView,
    "plan": responses.PlanView,
    "planned job": responses.PlannedJob,
    "skipped job": responses.SkippedJob,
    "plan result": responses.PlanResult,
    "changed job": responses.ChangedJob,
    "audit page": responses.AuditPage,
    "audit entry": responses.AuditView,
    "export page": responses.ExportPage,
    "locks": responses.LockList,
    "locked job": responses.LockedJob,
    "reports": responses.ReportList,
    "alerts": responses.AlertList,
    "alert": responses.AlertView,
    "webhooks": responses.WebhookList,
    "webhook": responses.WebhookView,
    "deliveries": responses.DeliveryPage,
    "delivery": responses.DeliveryView,
    "resent": responses.Resent,
    "clock": responses.ClockView,
    "quarantine": responses.QuarantineList,
    "checked rows": responses.CheckedRows,
    "backups": responses.BackupList,
    "backup": responses.BackupView,
    "paused": responses.PausedView,
}


def test_every_answer_with_its_fields() -> None:
    said = {name: ticked(fields) for name, fields, _ in rows(API, "shape", "fields")}
    assert said == {name: [each.encode_name for each in structs.fields(shape)] for name, shape in SHAPES.items()}


def test_every_state_of_health() -> None:
    (said,) = [ticked(meaning) for shape, _, meaning in rows(API, "shape", "fields") if shape == "health"]
    assert tuple(said[1:4]) == get_args(responses.HealthStatus)


def test_fields_of_creation_import_and_updates() -> None:
    created = [name for row in rows(API, "field", "default") for name in ticked(row[0])]
    assert sorted(created) == sorted(each.encode_name for each in structs.fields(commands.Create))
    fields = section(API, "Import").partition("Fields: ")[2].partition(".")[0]
    assert sorted(ticked(fields)) == asked(commands.Import)
    line = next(line for line in API.read_text().splitlines() if line.startswith("`updates` of a transition"))
    assert sorted(ticked(line)[1:]) == asked(commands.Updates)


CALLS: Final[dict[str, type[commands.Command]]] = {
    "start": commands.Start,
    "claim": commands.Claim,
    "progress": commands.Progress,
    "extend": commands.Extend,
    "complete": commands.Complete,
    "fail": commands.Fail,
    "release": commands.Release,
    "cancel": commands.Cancel,
    "list": commands.List,
}


TOLD_WITH_THE_CALL: Final = {"id", "retry", "expires_at", "status", "queue", "kind"}


def test_every_argument_of_a_worker_with_its_bounds() -> None:
    said: dict[str, dict[str, list[int]]] = {name: {} for name in CALLS}
    for argument, calls, bounds, *_ in rows(API, "argument", "calls"):
        for call in calls.split(", "):
            said[call][argument.strip("`")] = told_bounds(bounds)
    assert said["claim"]["limit"] == [1, 100]
    for call, made in CALLS.items():
        left_out = TOLD_WITH_THE_CALL | ({"worker"} if call == "list" else set())
        (shape,) = inspect.multi_type_info([made])
        assert isinstance(shape, inspect.StructType)
        assert said[call] == {each.name: bounds_of(each.type) for each in shape.fields if each.name not in left_out}, (
            call
        )


def bounds_of(kind: Any) -> list[int]:
    """The least and the greatest of a number, of the length of a text or of a list, as far as there are any."""
    if isinstance(kind, inspect.Metadata):
        return bounds_of(kind.type)
    if isinstance(kind, inspect.UnionType):
        return bounds_of(next(each for each in kind.types if not isinstance(each, inspect.NoneType)))
    names = ("ge", "le") if hasattr(kind, "ge") else ("min_length", "max_length")
    return [int(bound) for name in names if (bound := getattr(kind, name, None))]


def told_bounds(text: str) -> list[int]:
    """`1 to 200 …` or `up to 200 …`; a least that is 0 is none."""
    found = re.match(r"(?:(\d+)|up) to (\d+)", text)
    return [int(each) for each in found.groups() if each and int(each)] if found else []


def test_every_event() -> None:
    assert [ticked(name)[0] for name, _ in rows(API, "type", "what happened")] == list(get_args(events.EventType))


def test_every_alert_with_its_threshold() -> None:
    table = {ticked(name)[0]: ticked(threshold) for name, _, threshold, _ in rows(OPERATIONS, "alert", "fires when")}
    assert tuple(table) == alerts.NAMES
    severities = {ticked(name)[0]: severity for name, _, _, severity in rows(OPERATIONS, "alert", "fires when")}
    assert severities == alerts.SEVERITIES
    thresholds = {key for keys in table.values() for key in keys}
    assert thresholds == {key for key in config.KEYS if key.startswith("alerts.")}


NOBODY: Final = f"""
[[webhooks]]
name = "nobody"
url = "http://127.0.0.1:9/"
allow_private = true
events = ["alert.*"]
secret = "whsec_{"c2VjcmV0" * 4}"
"""


def test_every_metric(tmp_path: Path) -> None:
    """Names, types and labels as a daemon gives them that has seen as many jobs as a pace is made of."""
    said = {
        ticked(name)[0]: (kind, set(ticked(labels)))
        for name, kind, labels, _ in rows(OPERATIONS, "metric", "type", "labels")
    }
    with Daemon(tmp_path, NOBODY) as daemon:
        complete_some(daemon, SAMPLES_NEEDED)
        text = daemon.admin("GET", "/metrics").body.decode()
    given: dict[str, tuple[str, set[str]]] = {}
    for family in text_string_to_metric_families(text):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        given[name] = (family.type, labels)
    assert said == given


def complete_some(daemon: Daemon, count: int) -> None:
    daemon.post("/v1/jobs/bulk", {"jobs": [{"id": f"m{number}"} for number in range(count)]})
    for grant in daemon.post("/v1/claim", {"worker": "w", "limit": count}).data["grants"]:
        done = {"lock_id": grant["lock_id"], "metadata": 1}
        daemon.post(f"/v1/jobs/{grant['job']['id']}/complete", done)


def test_every_module_has_its_line() -> None:
    modules = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")}
    said = [ticked(name)[0] for name, _ in rows(ROOT / "docs/architecture.md", "module", "role")]
    assert sorted(said) == sorted(modules)


def test_every_exit_code() -> None:
    codes = {value for name, value in vars(exit_codes).items() if name.isupper() and isinstance(value, int)}
    assert [int(code) for code, _ in rows(CLI, "exit code", "meaning")] == sorted(codes)


def test_every_verb() -> None:
    said = {name: {verb for verbs, _ in rows(CLI, f"`{name}` verb") for verb in ticked(verbs)} for name in PROGRAMS}
    assert said == {name: set(program.commands) for name, program in PROGRAMS.items()}


OLD_CALLS: Final = [
    "startProcessing",
    "updateProgress",
    "extendJobLock",
    "completeJob",
    "failJob",
    "detectAndRecoverStuckJobs",
    "validateJobState",
    "transitionJobState",
    "updateJob",
    "forceCleanup",
    "startScheduler",
    "createJobManagementRoutes",
]


def test_every_old_call_is_answered() -> None:
    assert [ticked(row[0])[0].partition("(")[0] for row in rows(MIGRATION, "old call")] == OLD_CALLS


def test_calls_that_the_migration_names_exist() -> None:
    routes = {(route.method, route.path) for table in (worker.ROUTES, admin.ROUTES) for route in table}
    from jobd.client import AdminClient, AsyncJobClient, JobClient

    clients: dict[str, Any] = {"client": (JobClient, AsyncJobClient), "admin": (AdminClient,)}
    for document in (README, QUICKSTART, WORKERS, MIGRATION):
        text = document.read_text(encoding="utf-8")
        for method, path in re.findall(r"\b(GET|POST|DELETE) `?(/(?:v1|admin)[\w/{}-]+)`?", text):
            assert (method, path) in routes, f"{document.name}: {method} {path}"
        for client, name in re.findall(r"\b(client|admin)\.(\w+)\(", text):
            assert any(hasattr(each, name) for each in clients[client]), f"{document.name}: {client}.{name}"


# ---------------------------------------------------------------------------------------------------------------------
# Links, commands, variables.


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (document.parent / path).resolve() if path else document
        assert there.exists(), f"{document.name}: {target}"
        if anchor:
            assert anchor in anchors(there), f"{document.name}: {target}"


def anchors(document: Path) -> set[str]:
    """Headings as the hosts of repositories turn them into anchors."""
    titles = re.findall(r"^#+ (.+)$", prose(document), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def mentioned(document: Path) -> Iterator[list[str]]:
    """Every call of jobd and jobctl in shell blocks and in backticks, as its words up to the next operator."""
    lines = [line for block in blocks(document) if block.language == "sh" for line in block.text.splitlines()]
    for text in [*lines, *ticked(prose(document))]:
        for found in re.finditer(r"(?:^|[\s/|(`])(?<!-u )(?<!USR1 )(jobd|jobctl) ([a-z-][^|;&`]*)", text):
            try:
                words = shlex.split(found[2], comments=True)
            except ValueError:  # a quote that ends in another line
                words = found[2].split()
            yield [found[1], *words]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_and_options_exist(document: Path) -> None:
    for program, *words in mentioned(document):
        verb = next((word for word in words if not word.startswith("-")), None)
        known = PROGRAMS[program].commands
        if verb is None:
            continue
        assert verb in known, f"{document.name}: {program} {' '.join(words)}"
        options = {name for each in known[verb].params if isinstance(each, click.Option) for name in each.opts}
        for word in words[: words.index("--") if "--" in words else None]:
            name = word.partition("=")[0]
            if name.startswith("-") and name != "-" and name != "--help":
                assert name in options, f"{document.name}: {program} {verb} has no {name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_make_targets_files_and_variables_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    commands_of_make = re.findall(r"(?:^|`)(?:time )?make ([a-z]+)", text, re.M)
    assert set(commands_of_make) <= targets, document.name
    for name in re.findall(
        r"(?<![\w/.-])(?:tests/|jobd/|docs/|systemd/)[\w/.-]+\.(?:py|md|sh|mts|service|socket|sysusers)\b", text
    ):
        assert (ROOT / name).exists(), f"{document.name}: {name}"
    known = {f"JOBD_{key.replace('.', '_').upper()}" for key in config.KEYS}
    known |= {"JOBD_CONFIG", "JOBD_SOCKET", "JOBD_URL", "JOBD_ADMIN_URL", "JOBD_WORKER_TOKEN_FILE"}
    known |= {PREFIX, *(PREFIX + field.upper() for field in (*FIELDS, "fencing_token", "worker"))}
    assert set(re.findall(r"\bJOBD_\w+", text)) <= known, document.name


def test_the_readme_installs_as_the_page_beside_the_units_does() -> None:
    steps = next(block.text for block in blocks(README) if "systemd-sysusers" in block.text)
    there = (ROOT / "systemd/README.md").read_text(encoding="utf-8")
    for line in steps.splitlines():
        command = re.split(r" {2,}#", line)[0].strip()
        assert command in there or command.startswith("usermod"), command


def test_what_is_shown_follows_what_is_run() -> None:
    for document in DOCUMENTS:
        marks = [block.mark for block in blocks(document)]
        for number, mark in enumerate(marks):
            assert mark in ("", "run", "shows", "node", "clean") or mark.startswith("file: "), (
                f"{document.name}: {mark}"
            )
            assert mark != "shows" or marks[number - 1] == "run", f"{document.name}: block {number}"


def test_metrics_and_keys_in_the_prose_exist() -> None:
    metrics = {ticked(row[0])[0] for row in rows(OPERATIONS, "metric", "type")}
    sections = "|".join(config.Config.__struct_fields__)
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for name in re.findall(r"\b(jobd_[a-z_]+)\b", text):
            assert name in metrics or name == "jobd_token", f"{document.name}: {name}"
        for key in re.findall(rf"`((?:{sections})\.[a-z_]+)`", text):
            if not key.endswith((".py", ".mjs", ".sock", ".log")):  # files
                assert key in config.KEYS, f"{document.name}: {key}"


# ---------------------------------------------------------------------------------------------------------------------
# Examples, run.


class Told(NamedTuple):
    """What the blocks of a document are run with."""

    directory: Path
    environ: Mapping[str, str]


@pytest.fixture
def place(tmp_path: Path) -> Told:
    """A home of its own, and programs on the path that are this Python with this jobd."""
    for name in ("curl", "jq"):
        if shutil.which(name) is None:
            tool_missing(name, name)
    tools = tmp_path / "bin"
    tools.mkdir()
    # The daemon of a document is a child of its shell: it goes with it, and that with us.
    mortal = "setpriv --pdeathsig KILL -- " if shutil.which("setpriv") else ""
    for name, started in (("jobd", "-m jobd"), ("jobctl", "-m jobd.cli.ctl.main"), ("python3", "")):
        tool = tools / name
        tool.write_text(f'#!/bin/sh\nexec {mortal}{shlex.quote(sys.executable)} {started} "$@"\n')
        tool.chmod(0o755)
    home = tmp_path / "home"
    home.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JOBD_", "ADMIN_", "XDG_"))}
    environ = {
        **kept,
        "HOME": str(home),
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SOURCE": str(ROOT),
        "NO_COLOR": "1",
    }
    return Told(home, environ)


def run(document: Path, told: Told, directory: Path, *, cleanup: str = "") -> None:
    """Run the marked blocks of `document` in one shell, and compare what each prints with what it is said to print.

    `directory` is where files are saved, `cleanup` a shell command for the end, whatever happens.
    """
    script = [f"trap {shlex.quote(cleanup)} EXIT" if cleanup else "", "set -euo pipefail"]
    shown: list[str | None] = []
    marked = blocks(document)
    directory.mkdir(exist_ok=True)
    for number, block in enumerate(marked):
        if block.mark.startswith("file: "):
            (directory / block.mark.removeprefix("file: ")).write_text(block.text)
        elif block.mark == "run":
            follows = marked[number + 1 : number + 2]
            shown.append(follows[0].text if follows and follows[0].mark == "shows" else None)
            script += [block.text, f"echo; echo '{_END}'"]
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        cwd=told.directory, env=dict(told.environ), capture_output=True, text=True, timeout=55, preexec_fn=die_with_us,
    )  # fmt: skip
    story = f"{done.stdout}\n--- stderr:\n{done.stderr}"
    assert done.returncode == 0, story
    printed = done.stdout.split(f"\n{_END}\n")[:-1]
    assert len(printed) == len(shown) > 0, story
    for said, got in zip(shown, printed, strict=True):
        assert said is None or matches(said, got), f"documented:\n{said}\nprinted:\n{got}\n--- stderr:\n{done.stderr}"


_END: Final = "end of the block"


_REST: Final = r"[^\n]*"


def matches(said: str, got: str) -> bool:
    """Whether `got` is what `said` documents, blanks taken as one: … is anything, alone on a line any lines."""
    pattern = ""
    for line in said.splitlines():
        parts = (
            r"\s+".join(re.escape(word) for word in part.split(" "))
            for part in re.split(r" *… *", " ".join(line.split()))
        )
        pattern += r"(?:[^\n]*\n)*" if line.strip() == "…" else f" *{_REST.join(parts)} *\n"
    return re.fullmatch(pattern, f"{got.rstrip()}\n") is not None


def test_what_matches() -> None:
    assert matches("a … c\n", "a   b  c\n")
    assert matches("a\n…\nz", "a\nb\nc\nz\n")
    assert matches("a\n…\nz", "a\nz\n")
    assert not matches("a … c\n", "a b d\n")
    assert not matches("a\n", "a\nb\n")
    assert not matches("a\n…\nz", "a\nb\n")


def test_the_readme_from_top_to_bottom(place: Told, tmp_path: Path) -> None:
    """Run the examples of the README against the daemon that it starts itself."""
    address = free_address()
    text = README.read_text(encoding="utf-8")
    assert "http://127.0.0.1:8770/" in text
    copy = tmp_path / "README.md"
    copy.write_text(text.replace("127.0.0.1:8770", address), encoding="utf-8")
    environ = {**place.environ, "JOBD_ADMIN_LISTEN": address}
    directory = place.directory / "jobd-try"
    run(copy, Told(place.directory, environ), directory, cleanup="kill $(jobs -p) 2>/dev/null || true")
    assert "event=stopped" in (directory / "jobd.log").read_text()


def test_the_quickstart_from_top_to_bottom(place: Told) -> None:
    """Run the quickstart, with a daemon that it starts and stops itself."""
    directory = place.directory / "jobd-try"
    run(QUICKSTART, place, directory, cleanup='kill $(cat "$HOME"/jobd-try/*.pid) 2>/dev/null || true')
    assert "event=stopped" in (directory / "jobd.log").read_text()
    [clean] = (block.text for block in blocks(QUICKSTART) if block.mark == "clean")
    subprocess.run(["bash", "-euc", clean], cwd=directory, env=dict(place.environ), check=True, timeout=30)
    assert not directory.exists()


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"127.0.0.1:{free.getsockname()[1]}"


STOP_WORKER: Final = "kill $(cat worker.pid 2>/dev/null) 2>/dev/null || true"


@pytest.mark.parametrize("name", ["troubleshooting.md", "migration.md", "workers.md"])
def test_a_page_against_a_daemon(name: str, place: Told) -> None:
    token = place.directory / "admin_token"
    token.write_text(TOKEN)
    with Daemon(place.directory) as daemon:
        environ = {
            **place.environ,
            "JOBD_SOCKET": daemon.socket,
            "JOBD_ADMIN_URL": f"unix:{daemon.admin_socket}",
            "JOBD_STORE_PATH": str(daemon.store),
            "ADMIN_TOKEN_FILE": str(token),
        }
        run(ROOT / "docs" / name, Told(place.directory, environ), place.directory, cleanup=STOP_WORKER)
        script = "".join(block.text for block in blocks(ROOT / "docs" / name) if block.mark == "run")
        examples = [block for block in blocks(ROOT / "docs" / name) if block.language == "python"]
        for block in examples:
            if block.mark.removeprefix("file: ") in script:
                continue
            file = place.directory / block.mark.removeprefix("file: ")
            done = subprocess.run(
                [sys.executable, str(file)], env=environ, capture_output=True, text=True, timeout=30, check=True
            )
            assert done.stdout == "completed\n"
        assert daemon.stop() == 0


def test_every_python_example_is_run() -> None:
    """A block without a name would not be run."""
    for document in DOCUMENTS:
        for block in blocks(document):
            if block.language in ("python", "ts"):
                assert block.mark.startswith("file: "), f"{document.name}: {block.text[:60]}"
    for document in (README, QUICKSTART, WORKERS):
        script = "".join(block.text for block in blocks(document) if block.mark == "run")
        for block in blocks(document):
            if block.language == "python":
                assert block.mark.removeprefix("file: ") in script, f"{document.name}: {block.mark}"


def test_the_typescript_example(place: Told) -> None:
    if shutil.which("node") is None:
        tool_missing("node", "nodejs")
    example = next(block for block in blocks(WORKERS) if block.language == "ts")
    file = place.directory / example.mark.removeprefix("file: ")
    file.write_text(example.text)
    address = free_address()
    [steps] = (block.text for block in blocks(WORKERS) if block.mark == "node")
    assert "127.0.0.1:8771" in steps
    script = "trap 'kill $(cat sums.pid) 2>/dev/null || true' EXIT\n" + steps.replace("127.0.0.1:8771", address)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=place.directory, env={**place.environ, "JOBD_URL": f"http://{address}", "ADMIN_TOKEN": TOKEN},
        capture_output=True, text=True, timeout=55, preexec_fn=die_with_us,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ready, _, printed = done.stdout.partition("\n")
    assert ready == '{"success":true,"data":{"status":"ok"}}'
    assert (place.directory / "worker_token").stat().st_mode & 0o777 == 0o600
    said = re.search(r"It prints `(.+?)` and then `(.+?)`", WORKERS.read_text(encoding="utf-8"))
    assert said is not None
    assert f"{said[1]}\n{said[2]}\n" == printed == "sum-1 completed 6.5\ninvalid_transition\n"


def test_the_documents_do_not_speak_of_where_they_were_written() -> None:
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for word in ("/work/", "/tmp/v/", "SPEC.md", "HOUSE.md", "RELIABILITY section"):
            assert word not in text, f"{document.name}: {word}"
