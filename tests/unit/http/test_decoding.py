"""Decoding of bodies and queries, and the error messages."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from jobd.api import admin_routes, worker_routes
from jobd.api.command_stream import line_decoders
from jobd.dashboard.pages import WorkersPageQuery
from jobd.dashboard.webhook_pages import WebhookPageQuery
from jobd.http.body_scanner import MANY_KEYS, excess_depth
from jobd.http.decoding import Limits, RequestDecoder, make_body_type, path_value, validation_error
from jobd.http.routing import Route
from jobd.model import commands as cmd
from jobd.model.errors import ApiError, ApiException
from jobd.model.job import BackoffOptions
from jobd.model.requests import BackupRequest, Deliveries, RowCheckRequest
from tests.support.virtual_engine import error_in

LIMITS = Limits()
DECODERS: dict[str, RequestDecoder] = {
    "create": RequestDecoder(cmd.Create, None, LIMITS),
    "bulk": RequestDecoder(cmd.Bulk, None, LIMITS),
    "claim": RequestDecoder(cmd.Claim, None, LIMITS),
    "start": RequestDecoder(cmd.Start, "id", LIMITS),
    "progress": RequestDecoder(cmd.Progress, "id", LIMITS),
    "complete": RequestDecoder(cmd.Complete, "id", LIMITS),
    "fail": RequestDecoder(cmd.Fail, "id", LIMITS),
    "transition": RequestDecoder(cmd.Transition, None, LIMITS),
    "import": RequestDecoder(cmd.Import, None, LIMITS),
}


def error_by(decode: Callable[..., object], *given: object) -> ApiError:
    with pytest.raises(ApiException) as caught:
        decode(*given)
    return caught.value.error


def error_of(decoder: RequestDecoder, body: bytes, value: str | None = None) -> ApiError:
    return error_by(decoder.from_body, body, value)


def outcome(decoder: RequestDecoder, body: bytes) -> cmd.Command | ApiError:
    try:
        return decoder.from_body(body, "a" if decoder.path_field else None)
    except ApiException as no:
        return no.error


def test_the_path_sets_the_id_and_the_body_may_have_the_same() -> None:
    decoder = DECODERS["progress"]
    for body in (b'{"lock_id":"x","progress":1.5}', b'{"id":"a","lock_id":"x","progress":1.5}'):
        assert decoder.from_body(body, "a") == cmd.Progress(id="a", lock_id="x", progress=1.5)
    no = error_of(decoder, b'{"id":"b","lock_id":"x","progress":1}', "a")
    assert (no.code, no.details) == ("invalid_request", {"field": "$.id"})


def test_the_path_sets_the_name_of_a_queue() -> None:
    assert RequestDecoder(cmd.Pause, "name", LIMITS).from_body(b"", "mail") == cmd.Pause(name="mail")


def test_an_empty_body_is_an_empty_object() -> None:
    assert RequestDecoder(cmd.Cancel, "id", LIMITS).from_body(b"", "a") == cmd.Cancel(id="a")
    assert DECODERS["create"].from_body(b"") == cmd.Create()
    assert error_of(DECODERS["progress"], b"", "a").details == {"field": "$.lock_id"}


def test_default_factories_survive_the_split() -> None:
    part = make_body_type(cmd.Claim, "worker")
    assert msgspec.json.decode(b"{}", type=part).queues == ["default"]


@pytest.mark.parametrize(
    ("decoder", "body", "field"),
    [
        ("progress", '{"lock_id":"x","progress":-0.1}', "$.progress"),
        ("progress", '{"lock_id":"x","progress":"50"}', "$.progress"),
        ("progress", '{"lock_id":"x","progress":1e999}', "$.progress"),
        ("progress", '{"lock_id":"x","progress":' + "9" * 6000 + "}", "$.progress"),
        ("progress", '{"progress":1}', "$.lock_id"),
        ("progress", '{"lock_id":"x","progres":1}', "$.progres"),
        ("create", '{"priority":1.5}', "$.priority"),
        ("create", '{"priority":99999999999999999999999}', "$.priority"),
        ("create", '{"id":"a b"}', "$.id"),
        ("create", '{"backoff":{"kind":"linear"}}', "$.backoff.kind"),
        ("create", "[]", "$"),
        ("create", "null", "$"),
        ("create", "3", "$"),
        ("bulk", '{"jobs":[{},{"queue":""}]}', "$.jobs[1].queue"),
        ("bulk", '{"jobs":[{"x":1}]}', "$.jobs[0].x"),
        ("claim", '{"worker":"w","queues":["a/b"]}', "$.queues[0]"),
        ("complete", '{"lock_id":"x","storage_key":"/etc/passwd"}', "$.storage_key"),
        ("complete", '{"lock_id":"x","storage_key":"a/../b"}', "$.storage_key"),
        ("complete", '{"lock_id":"x","storage_key":"a\\u0000"}', "$.storage_key"),
        ("fail", '{"lock_id":"x"}', "$.error_message"),
        ("transition", '{"from":"queued","to":"failed"}', "$.jobId"),
        ("transition", '{"jobId":"a","from":"gone","to":"failed"}', "$.from"),
        ("transition", '{"jobId":"a","from":"queued","to":"failed","updates":{"storage_key":"../x"}}',
         "$.updates.storage_key"),
        ("transition", '{"jobId":"a","from":"queued","to":"failed","updates":{"id":"b"}}', "$.updates.id"),
        ("import", '{"id":"a","storage_key":"/x"}', "$.storage_key"),
    ],
)  # fmt: skip
def test_an_invalid_field_is_named(decoder: str, body: str, field: str) -> None:
    given_id = "job-1" if DECODERS[decoder].path_field else None
    no = error_of(DECODERS[decoder], body.encode(), given_id)
    assert no.code == "invalid_request"
    assert no.details == {"field": field}
    assert field in no.message


def test_a_time_in_seconds_gets_a_hint() -> None:
    no = error_of(DECODERS["complete"], b'{"lock_id":"x","expires_at":1700000000}', "a")
    assert no.details == {"field": "$.expires_at"}
    assert "milliseconds" in no.message
    assert "1000" in no.message
    assert DECODERS["complete"].from_body(b'{"lock_id":"x","expires_at":100000000000}', "a")


def test_the_message_helps() -> None:
    assert "Did you mean `progress`?" in error_of(DECODERS["progress"], b'{"lock_id":"x","progres":1}', "a").message
    assert "queued, processing" in error_of(DECODERS["transition"], b'{"jobId":"a","from":"x","to":"failed"}').message
    assert "exponential, fixed" in error_of(DECODERS["create"], b'{"backoff":{"kind":"x"}}').message
    assert "A-Z a-z 0-9" in error_of(DECODERS["create"], b'{"id":"a b"}').message
    assert "control" in error_of(DECODERS["create"], b'{"kind":"a\\u0001"}').message
    assert "NUL" in error_of(DECODERS["complete"], b'{"lock_id":"x","file_path":"\\u0000"}', "a").message
    assert (
        "a whole number or null" in error_of(RequestDecoder(cmd.Update, "id", LIMITS), b'{"priority":"x"}', "a").message
    )
    assert "is missing" in error_of(DECODERS["progress"], b"{}", "a").message


def test_an_unknown_field_name_is_shown_short_and_printable() -> None:
    name = "\x1b[31m" + "x" * 500
    no = error_of(DECODERS["create"], json.dumps({name: 1}).encode())
    assert no.message.isprintable()
    assert len(no.message) < 600


@pytest.mark.parametrize("name", ["a" * 900_000, " - at `$" * 100_000, "x` - at `$.y", "x` - at `$." + "y" * 900_000])
def test_the_error_is_short_for_any_field_name(name: str) -> None:
    no = error_of(DECODERS["create"], json.dumps({name: 1}).encode())
    assert len(no.message) + len(no.details["field"]) < 900
    no = error_of(DECODERS["bulk"], json.dumps({"jobs": [{name: 1}]}).encode())
    assert no.details["field"].startswith("$.jobs[0].")
    assert len(no.message) + len(no.details["field"]) < 900


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"nonsense",
        b'{"payload":NaN}',
        b'{"payload":Infinity}',
        b'{"payload":01}',
        b"{'payload':1}",
        b'{"payload":1}{}',
        b'{"payload":1,}',
        b'\xef\xbb\xbf{"payload":1}',
        b'{"payload":"\xff"}',
        b'{"payload":"\xed\xa0\x80"}',
        b'{"kind":"\xff"}',
        b'{"payload":"\\ud800"}',
        b'{"kind":"\\ud800"}',
        b'{"payload":"\\x"}',
        b'{"payload":"a\x00b"}',
    ],
)
def test_malformed_json_is_a_400_about_the_whole_body(body: bytes) -> None:
    no = error_of(DECODERS["create"], body)
    assert (no.code, no.details) == ("invalid_request", {"field": "$"})
    assert no.message.startswith("The body is not valid JSON")


@pytest.mark.parametrize("text", [b"\\ud800", b"a\\uDBFFb", b"\\ud800\\u0041", b"\\udc00", b"\\\\\\ud800"])
def test_a_lone_surrogate_is_named(text: bytes) -> None:
    assert "a string contains a lone surrogate" in error_of(DECODERS["create"], b'{"payload":"%b"}' % text).message
    cut = error_of(DECODERS["create"], b'{"payload":"\\\\ud800 \\ud83d\\ude00')
    assert "truncated" in cut.message


@pytest.mark.parametrize("end", [b"", b"]" * 200_000 + b"}"])
def test_json_that_python_cannot_decode_is_a_400_with_the_limit(end: bytes) -> None:
    no = error_of(DECODERS["create"], b'{"payload":' + b"[" * 200_000 + end)
    assert (no.code, no.details) == ("invalid_request", {"field": "$"})
    assert "at most 128 levels" in no.message


def test_the_error_does_not_repeat_the_body() -> None:
    assert "canary" not in error_of(DECODERS["create"], b'{"payload": canary}').message
    assert "canary" not in error_of(DECODERS["progress"], b'{"lock_id":"canary","progress":"canary"}', "a").message


@given(st.binary(max_size=200))
def test_any_bytes_give_a_command_or_a_400(body: bytes) -> None:
    response = outcome(DECODERS["create"], body)
    code = response.code if isinstance(response, ApiError) else None
    assert code == "invalid_request" or isinstance(response, cmd.Create)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
_FIELDS = sorted(
    {info.encode_name for decoder in DECODERS.values() for info in msgspec.structs.fields(decoder.body_type)}
)


@pytest.mark.slow
@given(st.sampled_from(sorted(DECODERS)), st.dictionaries(st.sampled_from(_FIELDS) | st.text(max_size=8), _JSON))
def test_any_object_gives_a_command_or_a_400(name: str, fields: dict[str, Any]) -> None:
    decoder = DECODERS[name]
    response = outcome(decoder, json.dumps(fields).encode())
    if isinstance(response, ApiError):
        assert response.code == "invalid_request"
        assert response.details["field"].startswith("$")
    else:
        assert type(response) is decoder.command


def test_a_payload_at_its_limit_is_accepted_and_one_byte_more_is_not() -> None:
    decoder = RequestDecoder(cmd.Create, None, Limits(payload=10))
    assert decoder.from_body(b'{"payload":"12345678"}')
    no = error_of(decoder, b'{"payload":"123456789"}')
    assert (no.code, no.details) == ("too_large", {"field": "$.payload", "limit": 10})


@pytest.mark.parametrize(("command", "field"), [(cmd.Bulk, "$.jobs[1].payload"), (cmd.Import, "$.payload")])
def test_payloads_of_bulks_and_imports_have_the_same_limit(command: type[cmd.Command], field: str) -> None:
    decoder = RequestDecoder(command, None, Limits(payload=10))
    body = b'{"id":"a","payload":"123456789"}'
    no = error_of(decoder, b'{"jobs":[{},%b]}' % body if command is cmd.Bulk else body)
    assert (no.code, no.details["field"]) == ("too_large", field)


@pytest.mark.parametrize(
    ("command", "field", "body"),
    [
        (cmd.Complete, "$.metadata", b'{"id":"a","lock_id":"l","metadata":%b}'),
        (
            cmd.Transition,
            "$.updates.metadata",
            b'{"jobId":"a","from":"queued","to":"failed","updates":{"metadata":%b}}',
        ),
        (cmd.Import, "$.metadata", b'{"id":"a","metadata":%b}'),
    ],
)
def test_metadata_has_the_limit_of_payloads(command: type[cmd.Command], field: str, body: bytes) -> None:
    """Metadata is in every view of the job, in pages and in events."""
    decoder = RequestDecoder(command, None, Limits(payload=10))
    assert decoder.from_body(body % b'"12345678"')
    no = error_of(decoder, body % b'"123456789"')
    assert (no.code, no.details) == ("too_large", {"field": field, "limit": 10})


# Each body with a value at the place of %b, and the path of the value.
_WITH_VALUE: dict[str, tuple[bytes, str]] = {
    "create": (b'{"payload":%b}', "$.payload"),
    "bulk": (b'{"jobs":[{},{"payload":%b}]}', "$.jobs[1].payload"),
    "complete": (b'{"lock_id":"l","metadata":%b}', "$.metadata"),
    "transition": (b'{"jobId":"a","from":"queued","to":"failed","updates":{"metadata":%b}}', "$.updates.metadata"),
    "import": (b'{"id":"a","metadata":%b}', "$.metadata"),
}


def nested(depth: int, inner: bytes = b"1") -> bytes:
    pairs, odd = divmod(depth, 2)
    return b'[{"a":' * pairs + b"[" * odd + inner + b"]" * odd + b"}]" * pairs


@pytest.mark.parametrize("depth", [128, 127])
@pytest.mark.parametrize("decoder", _WITH_VALUE)
def test_a_value_may_be_nested_128_levels_deep(decoder: str, depth: int) -> None:
    """Records and views nest it deeper, and every node has to read them."""
    body, field = _WITH_VALUE[decoder]
    assert not isinstance(outcome(DECODERS[decoder], body % nested(depth)), ApiError)
    no = error_in(outcome(DECODERS[decoder], body % nested(depth + 2)))
    assert (no.code, no.details) == ("invalid_request", {"field": field})
    assert no.message.startswith(f"`{field}`: is nested {depth + 2} levels deep, the limit is 128.")


def test_lines_of_streams_have_the_limit_too() -> None:
    body, field = b'{"op":"complete","id":"a","lock_id":"l","metadata":%b}', "$.metadata"
    decoder = line_decoders(LIMITS)["complete"]
    assert decoder.from_body(body % nested(128))
    assert error_of(decoder, body % nested(129)).details == {"field": field}


@pytest.mark.parametrize("items", [["[{" * 200], ['"[', "\\[", '\\"[{', "]"] * 100, [{}, []] * 100])
def test_brackets_in_strings_and_side_by_side_are_not_levels(items: list[Any]) -> None:
    body = b'{"payload":%b}'
    inner = json.dumps([[], *items]).encode()
    assert DECODERS["create"].from_body(body % nested(126, inner))
    assert "is nested 129 levels deep" in error_of(DECODERS["create"], body % nested(127, inner)).message


_NESTED: Any = st.recursive(
    st.none() | st.text('[]{}"\\é:,a', max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('[]{}"\\', max_size=3), inner, max_size=3),
    max_leaves=20,
)


@given(_NESTED, st.booleans())
def test_the_depth_is_that_of_the_decoded_value(value: Any, is_ascii: bool) -> None:
    text = json.dumps([value], ensure_ascii=is_ascii).encode()
    assert excess_depth(nested(128, text)) == 129 + depth_of(value)


def depth_of(value: Any) -> int:
    if not isinstance(value, list | dict):
        return 0
    return 1 + max(map(depth_of, value.values() if isinstance(value, dict) else value), default=0)


ROUTES = [each for each in (*worker_routes.ROUTES, *admin_routes.ROUTES) if each.method != "GET"]


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
def test_only_payloads_and_metadata_can_be_nested(route: Route) -> None:
    """All other fields have types of a fixed depth, so the limit holds for whole bodies."""
    assert_fixed_depth(msgspec.inspect.type_info(route.request), ())


def assert_fixed_depth(type_: Any, parents: tuple[type, ...]) -> None:
    if isinstance(type_, msgspec.inspect.StructType):
        assert type_.cls not in parents
        for field in type_.fields:
            assert_fixed_depth(field.type, (*parents, type_.cls))
    elif isinstance(type_, msgspec.inspect.UnionType):
        for part in type_.types:
            assert_fixed_depth(part, parents)
    elif isinstance(type_, msgspec.inspect.ListType | msgspec.inspect.Metadata):
        assert_fixed_depth(type_.item_type if isinstance(type_, msgspec.inspect.ListType) else type_.type, parents)
    else:
        assert not isinstance(type_, msgspec.inspect.AnyType)
        if isinstance(type_, msgspec.inspect.DictType):
            assert_fixed_depth(type_.value_type, parents)


def test_a_bulk_at_its_limit_is_accepted_and_one_job_more_is_not() -> None:
    decoder = RequestDecoder(cmd.Bulk, None, Limits(bulk=3))
    assert decoder.from_body(b'{"jobs":[{},{},{}]}')
    no = error_of(decoder, b'{"jobs":[{},{},{},{}]}')
    assert (no.code, no.details) == ("too_large", {"field": "$.jobs", "limit": 3})


@pytest.mark.parametrize(
    ("decoder", "field", "one", "code"),
    [
        ("bulk", "jobs", "{}", "too_large"),
        ("claim", "queues", '"a"', "invalid_request"),
        ("claim", "kinds", '"a"', "invalid_request"),
    ],
)
def test_a_list_that_is_too_long_is_not_decoded_to_its_end(decoder: str, field: str, one: str, code: str) -> None:
    """Errors after the limit are not found, so the cost does not grow with the length."""
    body = f'{{"{field}":[' + ",".join([one] * 30_000) + ", nonsense"
    no = error_of(DECODERS[decoder], body.encode())
    assert (no.code, no.details["field"]) == (code, f"$.{field}")


def test_a_large_body_with_short_lists_is_accepted() -> None:
    jobs = [{"payload": "x" * 200} for _ in range(1000)]
    command = DECODERS["bulk"].from_body(json.dumps({"jobs": jobs}).encode())
    assert isinstance(command, cmd.Bulk)
    assert len(command.jobs) == 1000
    blank = b" " * 100_000
    assert error_of(DECODERS["bulk"], blank + b'{"jobs":1}').details["field"] == "$.jobs"
    assert error_of(DECODERS["bulk"], blank + b'{"jobs":[{}],').message.startswith("The body is not valid JSON")
    assert isinstance(DECODERS["claim"].from_body(blank + b'{"worker":"w"}'), cmd.Claim)


@pytest.mark.parametrize(
    ("decoder", "body"),
    [
        ("create", "{" + ",".join(['"queue":"a"'] * 50_000) + "}"),
        ("create", '{"backoff":{' + ",".join(['"jitter":true'] * 50_000) + "}}"),
        ("bulk", '{"jobs":[{' + ",".join(['"kind":"a"'] * 50_000) + "}]}"),
        ("transition", '{"jobId":"a","from":"queued","to":"failed",' + ",".join(['"reason":"a"'] * 50_000) + "}"),
    ],
)
def test_a_large_body_of_repeated_fields_is_rejected(decoder: str, body: str) -> None:
    no = error_of(DECODERS[decoder], body.encode())
    assert (no.code, no.details) == ("invalid_request", {"field": "$"})
    assert "repeated fields" in no.message


@pytest.mark.parametrize("indent", [None, 2])
def test_large_bodies_with_many_distinct_fields_are_accepted(indent: int | None) -> None:
    """A thousand jobs with all fields, and payloads of many small fields."""
    limits = Limits(body=4 << 20)
    every: dict[str, Any] = {info.encode_name: 1 for info in msgspec.structs.fields(cmd.Create)}
    every |= {"queue": "q", "kind": "k", "on_stall": "auto", "run_at": None, "expires_at": None, "delay_ms": None}
    every |= {"headers": {"h": "1"}, "payload": {f"f{n}": n for n in range(30)}}
    every |= {"backoff": {"kind": "fixed", "base_ms": 1}}
    jobs = [every | {"id": f"job-{number}"} for number in range(1000)]
    body = json.dumps({"jobs": jobs}, indent=indent).encode()
    assert body.count(b'":') > MANY_KEYS
    command = RequestDecoder(cmd.Bulk, None, limits).from_body(body)
    assert isinstance(command, cmd.Bulk)
    assert command.jobs[999].id == "job-999"
    large = {"lock_id": "l", "metadata": {str(number): {"a": number} for number in range(30_000)}}
    complete = RequestDecoder(cmd.Complete, "id", replace(limits, payload=4 << 20))
    assert isinstance(complete.from_body(json.dumps(large, indent=indent).encode(), "a"), cmd.Complete)


def test_the_payload_is_kept_unchanged() -> None:
    command = DECODERS["create"].from_body(b'{"payload": {"b": 1e5,  "a": [1.0]} }')
    assert isinstance(command, cmd.Create)
    assert bytes(command.payload) == b'{"b": 1e5,  "a": [1.0]}'


# -- queries -----------------------------------------------------------------------------------------------------------


def test_a_query_gives_a_command() -> None:
    decoder = RequestDecoder(cmd.ListJobs, None, LIMITS)
    assert decoder.from_query("") == cmd.ListJobs()
    query = "status=queued&queue=mail&limit=200&cursor=17&worker=w%201&kind="
    assert decoder.from_query(query) == cmd.ListJobs(
        status="queued", queue="mail", limit=200, cursor="17", worker="w 1", kind=""
    )


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=0", "$.limit"),
        ("limit=201", "$.limit"),
        ("limit=ten", "$.limit"),
        ("limit=", "$.limit"),
        ("limt=5", "$.limt"),
        ("status=gone", "$.status"),
        ("cursor=abc", "$.cursor"),
        ("queue=a&queue=b", "$.queue"),
        ("queue=a&queue=a", "$.queue"),
        ("queue=%ff", "$"),
        ("queue=a%00", "$.queue"),
        ("&".join(f"a{n}=1" for n in range(60)), "$"),
    ],
)
def test_an_unknown_parameter_is_named(query: str, field: str) -> None:
    no = error_by(RequestDecoder(cmd.ListJobs, None, LIMITS).from_query, query)
    assert (no.code, no.details) == ("invalid_request", {"field": field})


@pytest.mark.parametrize(
    ("command", "query", "words"),
    [
        (cmd.ListJobs, "cursor=zzz", "the `next_cursor` of the page before"),
        (cmd.AuditLog, "cursor=x", "the `next_cursor` of the page before"),
        (WorkersPageQuery, "seen=x", "the `next_cursor` of the page before"),
        (RowCheckRequest, "cursor=x", "the `next_cursor` of the page before"),
        (cmd.SearchJobs, "error=zz", "12 hexadecimal digits, as `jobctl failures` shows them"),
        (BackupRequest, "id=a/b", "1 to 64 characters of A-Z a-z 0-9 . _ -"),
        (Deliveries, "name=a/b", "1 to 100 characters of A-Z a-z 0-9 . _ : -"),
        (WebhookPageQuery, "name=a&state=sent", "one of waiting, delivered, dead-lettered"),
        (cmd.SearchJobs, "status=gone", "one of queued, processing, completed, failed, cancelled"),
    ],
)
def test_the_error_describes_the_pattern_of_a_parameter(command: type[cmd.Command], query: str, words: str) -> None:
    field = query.rpartition("&")[2].partition("=")[0]
    assert error_by(RequestDecoder(command, None, LIMITS).from_query, query).message == f"`$.{field}`: must be {words}."


def test_the_errors_of_a_plan_describe_its_filter_and_cursor() -> None:
    decoder = RequestDecoder(cmd.MakePlan, None, LIMITS)
    no = error_of(decoder, b'{"action":"retry","filter":{"error":"zz"}}')
    assert no.message == "`$.filter.error`: must be 12 hexadecimal digits, as `jobctl failures` shows them."
    no = error_of(decoder, b'{"action":"retry","cursor":"1"}')
    assert no.message == "`$.cursor`: must be the `next_cursor` of the plan before."


def _heirs(kind: type[Any]) -> set[type[Any]]:
    return {kind}.union(*(_heirs(heir) for heir in kind.__subclasses__()))


def test_every_pattern_has_a_description() -> None:
    commands: list[Any] = [*_heirs(cmd.Command), cmd.PlanFilter, cmd.Updates, BackoffOptions]
    seen = 0
    for command in commands:
        for info in msgspec.structs.fields(command):
            if "pattern=" in repr(info.type):
                fault = f"Expected `str` matching regex 'x' - at `$.{info.encode_name}`"
                assert "other text" not in validation_error(fault, command).error.message, (command, info.name)
                seen += 1
    assert seen > 60


def test_a_query_cannot_set_the_field_of_the_path() -> None:
    error_by(RequestDecoder(cmd.Extend, "id", LIMITS).from_query, "id=b&lock_id=x", "a")


@pytest.mark.parametrize("value", ["", "a b", "a/b", "a\n", "ä", "a" * 201, "\x00", "\udcff"])
def test_a_malformed_id_in_the_path_is_a_400(value: str) -> None:
    assert error_by(path_value, RequestDecoder(cmd.Extend, "id", LIMITS), value).details == {"field": "$.id"}


def test_a_long_form_is_not_decoded() -> None:
    no = error_by(RequestDecoder(cmd.Extend, "id", LIMITS).from_form, b"lock_id=" + b"%41" * 50_000)
    assert (no.code, no.details) == ("too_large", {"limit": 128 << 10})


@pytest.mark.parametrize(
    ("command", "field", "values"),
    [
        (cmd.Extend, "id", ["a", "A.b_c:d-9", "a" * 200, ".."]),
        (cmd.TakeBack, "name", ["a", "a b", "a/b", "ä", "a" * 200]),
    ],
)
def test_every_valid_id_and_worker_name_is_accepted_in_the_path(
    command: type[cmd.Command], field: str, values: list[str]
) -> None:
    assert [path_value(RequestDecoder(command, field, LIMITS), value) for value in values] == values


@pytest.mark.parametrize("value", ["", "a\n", "a" * 201, "\x00"])
def test_invalid_worker_names_are_rejected_in_the_path(value: str) -> None:
    no = error_by(path_value, RequestDecoder(cmd.TakeBack, "name", LIMITS), value)
    assert no.message == "`$.name`: the path must contain text without control characters here."


@pytest.mark.parametrize("value", ["null", "NULL", "Null"])
@pytest.mark.parametrize("field", ["limit", "status"])
def test_null_is_rejected_in_a_query(value: str, field: str) -> None:
    decode = RequestDecoder(cmd.ListJobs, None, LIMITS).from_query
    assert error_by(decode, f"{field}={value}").details == {"field": f"$.{field}"}
    assert decode(f"kind={value}") == cmd.ListJobs(kind=value), "it is a name like any other"
