"""Check the documents against the code: tables match, examples run, links and commands exist.

In a document `<!-- run -->` marks a shell block that is run, `<!-- shows -->` what it prints (… stands for any text,
alone on a line for any number of lines), `<!-- file: NAME -->` a block that is saved as NAME first. `<!-- node -->`
marks a block that needs Node.js, `<!-- clean -->` one that removes what the others have created. A comment that begins
with a line `<!-- setup` has commands that a reader does not see and the tests run, so that the next block has its jobs.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Final, NamedTuple, get_args

import click
import pytest
from msgspec import inspect, structs

import jobd
from jobd import config
from jobd.api import admin_routes, worker_routes
from jobd.cli import exit_codes
from jobd.cli.ctl.main import jobctl as jobctl_program
from jobd.cli.daemon.main import jobd as jobd_program
from jobd.client.worker.command_worker import FIELDS, PREFIX
from jobd.model import commands, errors, events, responses
from jobd.model.commands import STREAMED_COMMANDS
from jobd.monitoring.problems.catalogue import CONDITIONS
from tests import ROOT
from tests.conftest import tool_missing
from tests.support import api_reference, config_reference, python_reference
from tests.support.api_reference import SHAPES
from tests.support.cli_harness import commands_of, node_program
from tests.support.daemon_process import TOKEN, die_with_us, free_port
from tests.support.django_project import settings
from tests.support.forked_process import ForkedDaemon
from tests.support.scripted_server import ScriptedServer, rejected, serving

PACKAGE: Final = Path(jobd.__file__).parent
DOCUMENTS: Final = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "systemd" / "README.md"]
README, API, OPERATIONS = ROOT / "README.md", ROOT / "docs/api.md", ROOT / "docs/operations.md"
QUICKSTART, WORKERS, MIGRATION = ROOT / "docs/quickstart.md", ROOT / "docs/workers.md", ROOT / "docs/migration.md"
PYTHON, TROUBLESHOOTING = ROOT / "docs/python.md", ROOT / "docs/troubleshooting.md"
CONFIGURATION, CLI, CLUSTER = ROOT / "docs/configuration.md", ROOT / "docs/cli.md", ROOT / "docs/cluster.md"
DJANGO = ROOT / "docs/django.md"
PROGRAMS: Final = {"jobd": jobd_program, "jobctl": jobctl_program}


# ---------------------------------------------------------------------------------------------------------------------
# Reading Markdown.


class CodeBlock(NamedTuple):
    """A fenced block: its language, the mark in the comment before it (run, shows, file: NAME or empty), its text.

    The commands in a comment are a block with the mark `setup`.
    """

    language: str
    mark: str
    text: str


_BLOCK: Final = re.compile(
    r"^<!-- setup\n(?P<setup>.*?)^-->$|(?:^<!-- (?P<mark>[^>]+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.M | re.S,
)


def blocks(document: Path) -> list[CodeBlock]:
    found = _BLOCK.finditer(document.read_text(encoding="utf-8"))
    return [
        CodeBlock("sh", "setup", each["setup"])
        if each["setup"]
        else CodeBlock(each["language"], each["mark"] or "", each["text"])
        for each in found
    ]


def prose(document: Path) -> str:
    """Return the text without its fenced blocks."""
    return _BLOCK.sub("", document.read_text(encoding="utf-8"))


def rows(document: Path, *header: str) -> list[list[str]]:
    """Return the rows of every table in `document` whose first columns are `header`. There must be at least one."""
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
    """Return the text under the heading `title`, up to the next heading of any level."""
    match = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", document.read_text(encoding="utf-8"), re.M | re.S)
    assert match, f"{document.name} has no heading {title}"
    return match[1]


# ---------------------------------------------------------------------------------------------------------------------
# Tables against code.


@pytest.mark.parametrize(
    "generator", [api_reference, config_reference, python_reference], ids=lambda module: module.__name__
)
def test_generated_documents_are_up_to_date(generator: ModuleType) -> None:
    for file, text in generator.generated().items():
        assert file.read_text(encoding="utf-8") == text, (
            f"{file.name} is out of date. Regenerate it with: {generator.COMMAND}"
        )


def test_variables_of_keys_are_documented_as_read_by_the_daemon() -> None:
    keys = {f"JOBD_{key.replace('.', '_').upper()}" for key in config.KEYS}
    readers = {name: who for names, who, _ in rows(CONFIGURATION, "variable", "read by") for name in ticked(names)}
    assert keys & set(readers) == {"JOBD_WORKER_TOKEN_FILE"}
    for name in keys & set(readers):
        assert "daemon" in readers[name], name


def test_every_error_code_is_documented_with_its_status() -> None:
    assert {ticked(code)[0]: int(status) for code, status, *_ in rows(API, "code", "status")} == errors.ERROR_STATUS


def body_fields(shape: Any) -> list[str]:
    """Return the fields of a body as a table lists them, with `?` if they are optional."""
    fields = structs.fields(shape)
    return sorted(f"{each.encode_name}{'' if each.required else '?'}" for each in fields)


def test_every_stream_operation_is_documented() -> None:
    documented = {ticked(op)[0]: ticked(call)[0].split() for op, call, *_ in rows(API, "op", "call")}
    routes = {route.request: route for route in worker_routes.ROUTES}
    calls = {op: routes[command] for op, command in STREAMED_COMMANDS.items()}
    expected = {op: [route.method, route.path] for op, route in calls.items()}
    assert documented == expected, "docs/api.md: each command in STREAMED_COMMANDS has a row in the table of `op`"


def test_every_audit_action_is_documented() -> None:
    listed = re.search(r"\*\*Action\*\* \(`action`\): ([^.]*)\.", section(API, "Audit log"))
    assert listed is not None
    different = set(ticked(listed[1])) ^ set(commands.AUDITED_ACTIONS)
    assert not different, f"docs/api.md, Audit log: {different} must be in the list of actions and in AUDITED_ACTIONS"


def test_every_response_shape_is_documented_with_its_fields() -> None:
    documented = {name: ticked(fields) for name, fields, _ in rows(API, "shape", "fields")}
    assert documented == {name: [each.encode_name for each in structs.fields(shape)] for name, shape in SHAPES.items()}


def test_every_health_status_is_documented() -> None:
    (documented,) = [ticked(meaning) for shape, _, meaning in rows(API, "shape", "fields") if shape == "health"]
    assert tuple(documented[1:4]) == get_args(responses.HealthStatus)


def test_fields_of_create_import_and_updates_are_documented() -> None:
    created = [name for row in rows(API, "field", "default") for name in ticked(row[0])]
    assert sorted(created) == sorted(each.encode_name for each in structs.fields(commands.Create))
    fields = section(API, "Import").partition("Fields: ")[2].partition(".")[0]
    own = {*body_fields(commands.Import)}.difference(body_fields(commands.Create))
    assert sorted(ticked(fields)) == sorted(own)
    line = next(line for line in API.read_text().splitlines() if line.startswith("`updates` of a transition"))
    assert sorted(ticked(line)[1:]) == body_fields(commands.Updates)


CALLS: Final[dict[str, type[commands.Command]]] = {
    op: command for op, command in STREAMED_COMMANDS.items() if op not in ("create", "bulk", "get")
} | {"list": commands.ListJobs}


DESCRIBED_WITH_THE_CALL: Final = {"id", "retry", "expires_at", "status", "queue", "kind"}


def test_every_worker_argument_is_documented_with_its_bounds() -> None:
    documented: dict[str, dict[str, list[int]]] = {name: {} for name in CALLS}
    for argument, calls, bounds, *_ in rows(API, "argument", "calls"):
        for call in calls.split(", "):
            documented[call][argument.strip("`")] = documented_bounds(bounds)
    assert documented["claim"]["limit"] == [100]
    for call, made in CALLS.items():
        left_out = DESCRIBED_WITH_THE_CALL | ({"worker"} if call == "list" else set())
        (shape,) = inspect.multi_type_info([made])
        assert isinstance(shape, inspect.StructType)
        assert documented[call] == {
            each.name: bounds_of(each.type) for each in shape.fields if each.name not in left_out
        }, call


def bounds_of(kind: Any) -> list[int]:
    """Return the minimum and maximum of a number or of a length, if there are any."""
    if isinstance(kind, inspect.Metadata):
        return bounds_of(kind.type)
    if isinstance(kind, inspect.UnionType):
        return bounds_of(next(each for each in kind.types if not isinstance(each, inspect.NoneType)))
    names = ("ge", "le") if hasattr(kind, "ge") else ("min_length", "max_length")
    return [int(bound) for name in names if (bound := getattr(kind, name, None))]


def documented_bounds(text: str) -> list[int]:
    """Return the bounds in `1 to 200 …` or `up to 200 …`. A minimum of 0 is left out."""
    found = re.match(r"(?:(\d+)|up) to (\d+)", text)
    return [int(each) for each in found.groups() if each and int(each)] if found else []


def test_every_event_type_is_documented() -> None:
    assert [ticked(name)[0] for name, _ in rows(API, "type", "what happened")] == list(get_args(events.EventType))


def test_every_condition_is_documented_with_its_threshold() -> None:
    table = {
        ticked(name)[0]: (severity, ticked(alert), ticked(threshold))
        for name, _, _, threshold, severity, alert in rows(OPERATIONS, "condition", "subject", "opens when")
    }
    declared = {each.name: (each.severity, [each.alert] if each.alert else []) for each in CONDITIONS}
    assert {name: row[:2] for name, row in table.items()} == declared
    assert list(table) == list(declared), "docs/operations.md: each condition has a row, in the order of CONDITIONS"
    thresholds = {key for row in table.values() for key in row[2]}
    assert thresholds == {key for key in config.KEYS if key.startswith("alerts.")}


def test_messages_about_postgresql_exist() -> None:
    files = [*(ROOT / "jobd/journal/postgres").glob("*.py"), ROOT / "jobd/cluster/node_registry.py"]
    files += [ROOT / "jobd/cli/daemon/cluster.py", ROOT / "jobd/storage/cluster/membership.py"]
    source = " ".join(file.read_text(encoding="utf-8") for file in files)
    source = re.sub(r'"\s+f?"', "", source)  # literals in several lines
    messages = [message for message, *_ in rows(ROOT / "docs/cluster.md", "message", "exit code")]
    fragments = [
        part.strip() for text in messages for each in re.findall(r"\*([^*]+)\*", text) for part in each.split("…")
    ]
    assert len(fragments) > 20
    for fragment in fragments:
        assert fragment.removesuffix(" N") in source, fragment


def test_the_path_of_a_request_names_functions_that_exist() -> None:
    path = rows(ROOT / "docs/architecture.md", "function", "module")
    assert len(path) == 12
    for function, module, _ in path:
        place = ticked(module)[0].removesuffix(".py").replace("/", ".")
        found: object = importlib.import_module(f"jobd.{place}")
        for name in ticked(function)[0].split("."):
            found = getattr(found, name)
        assert callable(found)


def test_every_package_is_documented() -> None:
    packages = {f"{path.name}/" for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    documented = {ticked(name)[0] for name, _ in rows(ROOT / "docs/architecture.md", "package", "role") if "`" in name}
    assert documented == packages


def test_every_exit_code_is_documented() -> None:
    codes = {value for name, value in vars(exit_codes).items() if name.isupper() and isinstance(value, int)}
    assert [int(code) for code, _ in rows(CLI, "exit code", "meaning")] == sorted(codes)


def test_every_command_of_a_program_is_documented() -> None:
    documented = {
        name: {command for names, _ in rows(CLI, f"`{name}` command") for command in ticked(names)} for name in PROGRAMS
    }
    for name, program in PROGRAMS.items():
        different = documented[name] ^ set(program.commands)
        assert not different, f"docs/cli.md: each command of {name} has a row: {different}"


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


def test_every_old_call_has_a_replacement() -> None:
    assert [ticked(row[0])[0].partition("(")[0] for row in rows(MIGRATION, "old call")] == OLD_CALLS


def test_documented_calls_exist() -> None:
    routes = {(route.method, route.path) for table in (worker_routes.ROUTES, admin_routes.ROUTES) for route in table}
    from jobd.client import AdminClient, AsyncJobClient, JobClient

    clients: dict[str, Any] = {"client": (JobClient, AsyncJobClient), "admin": (AdminClient,)}
    for document in (README, QUICKSTART, WORKERS, MIGRATION, PYTHON):
        text = document.read_text(encoding="utf-8")
        for method, path in re.findall(r"\b(GET|POST|DELETE) `?(/(?:v1|admin)[\w/{}-]+)`?", text):
            assert (method, path) in routes, f"{document.name}: {method} {path}"
        for client, name in re.findall(r"\b(client|admin)\.(\w+)\(", text):
            assert any(hasattr(each, name) for each in clients[client]), f"{document.name}: {client}.{name}"


# ---------------------------------------------------------------------------------------------------------------------
# Links, commands, variables.


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (document.parent / path).resolve() if path else document
        assert there.exists(), f"{document.name}: {target}"
        if anchor:
            assert anchor in anchors(there), f"{document.name}: {target}"


def anchors(document: Path) -> set[str]:
    """Return the anchors that repository hosts make of the headings."""
    titles = re.findall(r"^#+ (.+)$", prose(document), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def mentioned(document: Path) -> Iterator[list[str]]:
    """Yield every call of jobd and jobctl in shell blocks and in backticks, as its words up to the next operator."""
    lines = [line for block in blocks(document) if block.language == "sh" for line in block.text.splitlines()]
    for text in [*lines, *ticked(prose(document))]:
        for found in re.finditer(r"(?:^|[\s/|(`])(?<!-u )(?<!USR1 )(jobd|jobctl) ([a-z-][^|;&`]*)", text):
            try:
                words = shlex.split(found[2], comments=True)
            except ValueError:  # a quote that ends on another line
                words = found[2].split()
            yield [found[1], *words]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_and_options_exist(document: Path) -> None:
    for program, *words in mentioned(document):
        verb = next((word for word in words if not word.startswith("-")), None)
        known = commands_of(PROGRAMS[program])
        if verb is None:
            continue
        assert verb in known, f"{document.name}: {program} {' '.join(words)}"
        command = known[verb]
        if isinstance(command, click.Group):
            nested = words[words.index(verb) + 1 :]
            command = command.commands.get(next((word for word in nested if not word.startswith("-")), ""), command)
        options = {name for each in command.params if isinstance(each, click.Option) for name in each.opts}
        for word in words[: words.index("--") if "--" in words else None]:
            name = word.partition("=")[0]
            if name.startswith("-") and name != "-" and name != "--help":
                assert name in options, f"{document.name}: {program} {verb} has no {name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_make_targets_files_and_variables_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    commands_of_make = re.findall(r"(?:^|`)(?:time )?make ([a-z-]+)", text, re.M)
    assert set(commands_of_make) <= targets, document.name
    for name in re.findall(
        r"(?<![\w/.-])(?:tests/|jobd/|docs/|systemd/)[\w/.-]+\.(?:py|md|sh|mts|service|socket|sysusers)\b", text
    ):
        assert (ROOT / name).exists(), f"{document.name}: {name}"
    known = {f"JOBD_{key.replace('.', '_').upper()}" for key in config.KEYS}
    known |= {
        "JOBD_CONFIG",
        "JOBD_SOCKET",
        "JOBD_URL",
        "JOBD_ADMIN_URL",
        "JOBD_WORKER_TOKEN_FILE",
        "JOBD_WORKER_VERSION",
    }
    known |= {
        PREFIX,
        *(PREFIX + field.upper() for field in (*FIELDS, "fencing_token", "worker", "headers", "checkpoint")),
    }
    assert set(re.findall(r"\bJOBD_\w+", text)) <= known, document.name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_comments_in_shell_blocks_can_be_pasted_into_zsh(document: Path) -> None:
    """An interactive zsh has no comments: it passes the words on as arguments, and acts on operators and quotes."""
    pasted = [block for block in blocks(document) if block.language == "sh" and not block.mark.startswith("file: ")]
    for line in (line for block in pasted for line in block.text.splitlines()):
        comment = re.search(r"(?:^|\s)# .*", line)
        assert not comment or not re.search(r"""[;()&|<>?*'"`]""", comment[0]), f"{document.name}: {line}"


def test_what_is_shown_follows_what_is_run() -> None:
    for document in DOCUMENTS:
        marks = [block.mark for block in blocks(document)]
        for number, mark in enumerate(marks):
            assert mark in ("", "setup", "run", "shows", "node", "clean") or mark.startswith("file: "), (
                f"{document.name}: {mark}"
            )
            assert mark != "shows" or marks[number - 1] == "run", f"{document.name}: block {number}"


def test_troubleshooting_creates_no_jobs_and_asks_before_it_changes_one() -> None:
    """Its commands are pasted into the shell of a production machine."""
    for block in blocks(TROUBLESHOOTING):
        if block.language == "sh" and block.mark != "setup":
            assert not re.search(r"jobctl (submit|import)|/v1/|--yes", block.text), block.text


_OTHER_NAMES: Final = {"jobd_token", "jobd_journal", "jobd_journals"}  # a file, and tables


def test_metrics_and_keys_in_the_prose_exist() -> None:
    metrics = {ticked(row[0])[0] for row in rows(OPERATIONS, "metric", "type")}
    sections = "|".join(config.Config.__struct_fields__)
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for name in re.findall(r"\b(jobd_[a-z_]+)\b", text):
            assert name in metrics | _OTHER_NAMES, f"{document.name}: {name}"
        for key in re.findall(rf"`((?:{sections})\.[a-z_]+)`", text):
            if not key.endswith((".py", ".mjs", ".sock", ".log")):  # files
                assert key in config.KEYS, f"{document.name}: {key}"


# ---------------------------------------------------------------------------------------------------------------------
# Examples, run.


class DocumentEnvironment(NamedTuple):
    """The directory and environment in which the blocks of a document run."""

    directory: Path
    environ: Mapping[str, str]


@pytest.fixture
def context(tmp_path: Path) -> DocumentEnvironment:
    """Provide a home directory, and programs on the PATH that run this Python with this jobd."""
    for name in ("curl", "jq"):
        if shutil.which(name) is None:
            tool_missing(name, name)
    tools = tmp_path / "bin"
    tools.mkdir()
    # The daemon of a document is a child of its shell. It ends with the shell, and the shell ends with the test.
    die_with_parent = "setpriv --pdeathsig KILL -- " if shutil.which("setpriv") else ""
    for name, started in (("jobd", "-m jobd"), ("jobctl", "-m jobd.cli.ctl.main"), ("python3", "")):
        tool = tools / name
        tool.write_text(f'#!/bin/sh\nexec {die_with_parent}{shlex.quote(sys.executable)} {started} "$@"\n')
        tool.chmod(0o755)
    home = tmp_path / "home"
    home.mkdir()
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("JOBD_", "ADMIN_", "XDG_"))}
    environ = {
        **inherited,
        "HOME": str(home),
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SOURCE": str(ROOT),
        "NO_COLOR": "1",
    }
    return DocumentEnvironment(home, environ)


def run(document: Path, context: DocumentEnvironment, directory: Path, *, cleanup: str = "") -> None:
    """Run the marked blocks of `document` in one shell, and compare what each prints with the documented output.

    Files are saved in `directory`. `cleanup` is a shell command that always runs at the end.
    """
    script = [f"trap {shlex.quote(cleanup)} EXIT" if cleanup else "", "set -euo pipefail"]
    shown: list[str | None] = []
    marked = blocks(document)
    directory.mkdir(exist_ok=True)
    for number, block in enumerate(marked):
        if block.mark.startswith("file: "):
            (directory / block.mark.removeprefix("file: ")).write_text(block.text)
        elif block.mark == "setup":
            script.append(f"{{\n{block.text}}} >/dev/null")
        elif block.mark == "run":
            follows = marked[number + 1 : number + 2]
            shown.append(follows[0].text if follows and follows[0].mark == "shows" else None)
            script += [block.text, f"echo; echo '{_END}'"]
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        cwd=context.directory, env=dict(context.environ), capture_output=True, text=True, timeout=150,
        preexec_fn=die_with_us,
    )  # fmt: skip
    output = f"{done.stdout}\n--- stderr:\n{done.stderr}"
    assert done.returncode == 0, output
    printed = done.stdout.split(f"\n{_END}\n")[:-1]
    assert len(printed) == len(shown) > 0, output
    for documented, got in zip(shown, printed, strict=True):
        assert documented is None or matches(documented, got), (
            f"documented:\n{documented}\nprinted:\n{got}\n--- stderr:\n{done.stderr}"
        )


_END: Final = "end of the block"


_REST: Final = r"[^\n]*"


def matches(documented: str, got: str) -> bool:
    """Return whether `got` matches `documented`. … is any text, alone on a line any lines; runs of blanks are equal."""
    pattern = ""
    for line in documented.splitlines():
        parts = (
            r"\s+".join(re.escape(word) for word in part.split(" "))
            for part in re.split(r" *… *", " ".join(line.split()))
        )
        pattern += r"(?:[^\n]*\n)*" if line.strip() == "…" else f" *{_REST.join(parts)} *\n"
    return re.fullmatch(pattern, f"{got.rstrip()}\n") is not None


def test_an_ellipsis_matches_any_text() -> None:
    assert matches("a … c\n", "a   b  c\n")
    assert matches("a\n…\nz", "a\nb\nc\nz\n")
    assert matches("a\n…\nz", "a\nz\n")
    assert not matches("a … c\n", "a b d\n")
    assert not matches("a\n", "a\nb\n")
    assert not matches("a\n…\nz", "a\nb\n")


@pytest.mark.slow
def test_the_readme_from_top_to_bottom(context: DocumentEnvironment, tmp_path: Path) -> None:
    """Run the examples of the README against the daemon that it starts itself."""
    directory = context.directory / "jobd-try"
    run(README, context, directory, cleanup="kill $(jobs -p) 2>/dev/null || true")
    assert "greet" in (directory / "worker.log").read_text()
    assert (directory / "jobd.db").exists()


@pytest.mark.slow
def test_the_quickstart_from_top_to_bottom(context: DocumentEnvironment) -> None:
    """Run the quickstart, with a daemon that it starts and stops itself."""
    directory = context.directory / "jobd-try"
    run(QUICKSTART, context, directory, cleanup='kill $(cat "$HOME"/jobd-try/*.pid) 2>/dev/null || true')
    [clean] = (block.text for block in blocks(QUICKSTART) if block.mark == "clean")
    subprocess.run(["bash", "-euc", clean], cwd=directory, env=dict(context.environ), check=True, timeout=150)
    assert not directory.exists()


def free_address() -> str:
    return f"127.0.0.1:{free_port()}"


STOP_WORKER: Final = "kill $(cat worker_routes.pid 2>/dev/null) 2>/dev/null || true"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["troubleshooting.md", "migration.md", "workers.md", "python.md", "testing.md"])
def test_the_examples_of_a_page_against_a_daemon(name: str, context: DocumentEnvironment) -> None:
    token = context.directory / "admin_token"
    token.write_text(TOKEN)
    with ForkedDaemon(context.directory) as daemon:
        environ = {
            **context.environ,
            "JOBD_SOCKET": daemon.socket,
            "JOBD_ADMIN_URL": f"unix:{daemon.admin_socket}",
            "JOBD_STORE_PATH": str(daemon.store),
            "ADMIN_TOKEN_FILE": str(token),
        }
        run(
            ROOT / "docs" / name,
            DocumentEnvironment(context.directory, environ),
            context.directory,
            cleanup=STOP_WORKER,
        )
        script = "".join(block.text for block in blocks(ROOT / "docs" / name) if block.mark == "run")
        examples = [block for block in blocks(ROOT / "docs" / name) if block.language == "python"]
        for block in examples:
            if block.mark.removeprefix("file: ").removesuffix(".py") in script:
                continue
            file = context.directory / block.mark.removeprefix("file: ")
            done = subprocess.run(
                [sys.executable, str(file)], env=environ, capture_output=True, text=True, timeout=150, check=True
            )
            assert done.stdout == "completed\n"
        assert daemon.stop() == 0


def test_the_curl_example_finds_the_leader(context: DocumentEnvironment) -> None:
    [example] = (block for block in blocks(CLUSTER) if block.mark == "file: jobd-call.sh")
    script = context.directory / "jobd-call.sh"
    script.write_text(example.text.replace("SECONDS + 30", "SECONDS + 1"))
    (context.directory / "token").write_text(TOKEN)
    address, server = free_address(), ScriptedServer()
    server.always = lambda received: rejected("not_leader", 503, leader=f"http://{address}")
    settings = {"JOBD_WORKER_LISTEN": address, "JOBD_WORKER_TOKEN_FILE": str(context.directory / "token")}
    with ForkedDaemon(context.directory, **settings) as daemon, serving(server) as standby:
        urls = [f"http://{free_address()}", standby, f"http://{address}"]
        environ = {**context.environ, **settings, "JOBD_URL": ",".join(urls)}
        tried = f"{urls[0]} (000) {urls[1]} (503) {urls[2]} (000)"

        def call(*arguments: str) -> tuple[int, str]:
            command = ["bash", str(script), *arguments]
            done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
            return done.returncode, done.stdout + done.stderr

        code, text = call("POST", "/v1/jobs", '{"id": "j1"}')
        assert (code, json.loads(text)["data"]["id"]) == (0, "j1")
        code, text = call("GET", "/v1/jobs/j2")
        assert (code, json.loads(text)["error"]) == (1, "job_not_found")
        assert {each.headers["Authorization"] for each in server.received} == {f"Bearer {TOKEN}"}
        assert len({each.headers["Idempotency-Key"] for each in server.received}) == 2
        assert daemon.stop() == 0
        assert call("GET", "/v1/jobs/j1") == (75, f"no node served the request: {tried}\n")


def test_every_python_example_is_run() -> None:
    """A block without a name would not be run."""
    for document in DOCUMENTS:
        for block in blocks(document):
            if block.language in ("python", "ts"):
                assert block.mark.startswith("file: "), f"{document.name}: {block.text[:60]}"
    for document in (README, QUICKSTART, WORKERS, PYTHON):
        script = "".join(block.text for block in blocks(document) if block.mark == "run")
        for block in blocks(document):
            if block.language == "python":
                name = block.mark.removeprefix("file: ").removesuffix(".py")  # `jobctl worker NAME:app` runs it too
                assert name in script, f"{document.name}: {block.mark}"


def test_the_django_example_is_accepted_by_the_backend(context: DocumentEnvironment) -> None:
    for block in blocks(DJANGO):
        if block.language == "python":
            file = context.directory / block.mark.removeprefix("file: ")
            file.parent.mkdir(exist_ok=True)
            file.write_text(block.text.replace("django.tasks", settings.PACKAGE))
    code = (
        "import django, shop_settings as own; from django.conf import settings; settings.configure(TASKS=own.TASKS, "
        "DATABASES={'default': {'ENGINE': 'django.db.backends.sqlite3', 'NAME': ':memory:'}}); django.setup(); "
        "from shop.tasks import receipt; print(receipt.module_path, receipt.get_backend().check())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=context.directory, capture_output=True, text=True, preexec_fn=die_with_us
    )
    assert (done.stdout, done.stderr) == ("shop.tasks.receipt []\n", "")


def test_the_typescript_example(context: DocumentEnvironment) -> None:
    example = next(block for block in blocks(WORKERS) if block.language == "ts")
    file = context.directory / example.mark.removeprefix("file: ")
    file.write_text(example.text)
    address = free_address()
    [steps] = (block.text for block in blocks(WORKERS) if block.mark == "node")
    assert "127.0.0.1:8771" in steps
    script = "trap 'kill $(cat sums.pid) 2>/dev/null || true' EXIT\n" + steps.replace("127.0.0.1:8771", address)
    environ = {**context.environ, "JOBD_URL": f"http://{address}", "ADMIN_TOKEN": TOKEN}
    environ["PATH"] = f"{node_program().parent}:{environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=context.directory, env=environ,
        capture_output=True, text=True, timeout=150, preexec_fn=die_with_us,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ready, _, printed = done.stdout.partition("\n")
    assert ready == '{"success":true,"data":{"status":"ok"}}'
    assert (context.directory / "worker_token").stat().st_mode & 0o777 == 0o600
    documented = re.search(r"It prints `(.+?)` and then `(.+?)`", WORKERS.read_text(encoding="utf-8"))
    assert documented is not None
    assert f"{documented[1]}\n{documented[2]}\n" == printed == "sum-1 completed 6.5\ninvalid_transition\n"


@pytest.mark.parametrize("name", ["worker.mjs", "worker.mts"])
def test_a_typescript_worker_finds_the_leader(context: DocumentEnvironment, name: str) -> None:
    file = ROOT / "docs/examples/worker.mts"
    if name == "worker.mjs":
        file = context.directory / name
        file.write_text(next(block.text for block in blocks(WORKERS) if block.language == "ts"))
    (context.directory / "token").write_text(TOKEN)
    address, server = free_address(), ScriptedServer()
    server.always = lambda received: rejected("not_leader", 503, leader=f"http://{address}")
    settings = {"JOBD_WORKER_LISTEN": address, "JOBD_WORKER_TOKEN_FILE": str(context.directory / "token")}
    with ForkedDaemon(context.directory, **settings) as daemon, serving(server) as standby:
        urls = f"http://{free_address()},{standby},http://{free_address()},http://{address}"
        environ = {**context.environ, **settings, "JOBD_URL": urls, "ONCE": "1"}
        assert daemon.post("/v1/jobs", {"id": "sum-2", "payload": [1, 2, 3.5]}).status == 201
        done = subprocess.run([node_program(), file], env=environ, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        job = daemon.get("/v1/jobs/sum-1" if name == "worker.mjs" else "/v1/jobs/sum-2").data
        assert (job["status"], job["metadata"]["sum"]) == ("completed", 6.5)
        assert len(server.received) == 1, "the next calls go to the leader"


def test_the_readme_fits_on_two_screens() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 180
