"""What `jobctl output` prints of the daemon's responses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobd.cli.ctl import output
from jobd.cli.ctl.main import main
from jobd.model.responses import GrantOutput
from tests.support.scripted_server import ScriptedServer, ok, rejected, serving


def grant(token: int, offset: int, text: str) -> dict[str, Any]:
    of = {"attempt": token, "worker": f"w-{token}", "fencing_token": token, "begins_at": 0}
    return {**of, "offset": offset, "end": offset + len(text.encode()), "text": text}


def view(status: str, *grants: dict[str, Any], position: str = "1.1") -> Any:
    body = {"id": "a", "status": status, "finished": status == "completed", "position": position, "grants": grants}
    return ok(body)


def printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], *script: Any, argv: tuple[str, ...] = ()
) -> tuple[int, str, str, list[str]]:
    server = ScriptedServer(*script)
    with serving(server, tmp_path / "p"):
        code = main(["output", "a", *argv, "--socket", str(tmp_path / "p")])
    return code, *capsys.readouterr(), [each.path for each in server.received]


def test_output_is_followed_through_retries_to_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = (
        view("processing", grant(1, 0, "one\n"), position="1.4"),
        view("processing", grant(1, 4, "tw"), position="1.6"),
        view("queued", position="1.6"),
        view("processing", grant(2, 0, "again\n"), position="2.6"),
        view("completed", grant(2, 10, "end"), position="2.13"),
    )
    code, out, err, paths = printed(tmp_path, capsys, *script, argv=("-f",))
    divider = "==> attempt 2 by w-2, 1970-01-01 00:00:00 UTC <=="
    assert (code, err) == (0, "")
    assert out == f"one\ntw\n{divider}\nagain\n… 4 bytes are no longer kept\nend\n"
    assert paths[0] == "/v1/jobs/a/output"
    assert [each.partition("?")[2] for each in paths[1:]] == [
        f"after={position}&wait_ms=30000" for position in ("1.4", "1.6", "1.6", "2.6")
    ]


def test_several_grants_have_headers_and_json_has_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = view("processing", grant(1, 0, "one\x1b[1m\n"), grant(2, 0, "two\n"))
    code, out, err, _ = printed(tmp_path, capsys, both)
    assert (code, err) == (0, "")
    assert [line[:15] for line in out.splitlines()] == ["==> attempt 1 b", "one\x1b[1m", "==> attempt 2 b", "two"]
    assert '"text":"two\\n"' in printed(tmp_path, capsys, both, argv=("--json",))[1]


def test_a_terminal_gets_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    printer = output._Printer(is_terminal=True)
    text = "10 %\r20 %\r\n\x1b[31mred\ttab\u202e\n"
    printer._print(output_of(text))
    assert capsys.readouterr().out == "10 %\n20 %\n\\x1b[31mred    tab\\u202e\n"


def output_of(text: str) -> GrantOutput:
    return GrantOutput(**grant(1, 0, text))


@pytest.mark.parametrize(
    ("response", "code", "text"),
    [
        (view("queued"), 0, "no output of job a (queued) is kept; to follow it: jobctl output -f a"),
        (view("completed"), 0, "it printed nothing, or the text was removed"),
        (rejected("job_not_found", 404, "No job has the id a."), 4, "No job has the id a"),
        (rejected("output_off", 409, "No output is kept. Set limits.output_bytes"), 4, "limits.output_bytes"),
    ],
)
def test_without_output_a_sentence_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], response: Any, code: int, text: str
) -> None:
    found, out, err, _ = printed(tmp_path, capsys, response)
    assert (found, out, len(err.splitlines())) == (code, "", 1)
    assert text in err
