"""Authentication: tokens, Host, Origin, content types, idempotency keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobd.api import admin_routes, worker_routes
from jobd.http.auth import Authenticator, accepted_hosts, check_content_type, host_name, token_digest
from jobd.model.api_call import JSON, LINES
from jobd.model.errors import ApiException
from tests.support.http_harness import HttpHarness, request_bytes, wrong_tokens

GOOD = "good-token-0123456789abcdef"
OTHER = "other-token-0123456789abcdef"


def code(check: object, *arguments: object) -> str | None:
    assert callable(check)
    try:
        check(*arguments)
    except ApiException as no:
        return no.error.code
    return None


def headers(**fields: str) -> dict[str, bytes]:
    return {name.replace("_", "-").lower(): value.encode("utf-8", "surrogateescape") for name, value in fields.items()}


WRONG = [
    "", "Bearer", "Bearer ", GOOD, f"Basic {GOOD}", f"Bearer {GOOD}x", f"Bearer {GOOD[:-1]}", f"Bearer {GOOD} {OTHER}",
    "Bearer töken", "Bearer \udcff\udcfe", "Bearer " + "x" * 8000,
]  # fmt: skip


def test_only_valid_tokens_are_accepted() -> None:
    authenticator = Authenticator("admin", tokens=[GOOD, OTHER])
    for given in (f"Bearer {GOOD}", f"Bearer {OTHER}", f"bearer {GOOD}", f"Bearer  {GOOD} "):
        assert code(authenticator.authenticate, headers(Authorization=given)) is None, given
    for given in WRONG:
        assert code(authenticator.authenticate, headers(Authorization=given)) == "unauthorized", given


@pytest.mark.slow
@pytest.mark.parametrize("name", ["worker", "admin"])
async def test_neither_api_accepts_a_wrong_token(name: str, tmp_path: Path) -> None:
    """Over TCP both APIs need a token. The valid one is tried last, on the same connection."""
    authenticator = Authenticator(
        name, tokens=[GOOD], read_only_tokens=[OTHER] if name == "admin" else [], hosts=["localhost"]
    )
    routes, call = {
        "worker": (worker_routes.ROUTES, "/v1/jobs"),
        "admin": (admin_routes.ROUTES, "/admin/job-management/jobs"),
    }[name]
    wrong = wrong_tokens(GOOD) + wrong_tokens(OTHER, 0)
    async with HttpHarness(routes, tmp_path, authenticator=authenticator, admin=name == "admin") as harness:
        client = await harness.connect()
        for at in range(0, len(wrong), 50):
            given = wrong[at : at + 50]
            client.send(
                b"".join(request_bytes("GET", call, headers={"Authorization": f"Bearer {each}"}) for each in given)
            )
            taken = [each for each in given if (await client.receive()).status != 401]
            assert taken == []
        assert harness.actor.received == []
        assert (await client.request("GET", call, headers={"Authorization": f"Bearer {GOOD}"})).status == 200


def test_a_read_only_token_has_its_own_permission() -> None:
    authenticator = Authenticator("admin", tokens=[GOOD], read_only_tokens=[OTHER])
    assert authenticator.authenticate(headers(Authorization=f"Bearer {GOOD}")) == "full"
    assert authenticator.authenticate(headers(Authorization=f"Bearer {OTHER}")) == "read"
    assert authenticator.permission_of(token_digest(OTHER)) == "read"
    assert authenticator.permission_of(token_digest("x")) is None
    authenticator.replace_tokens([GOOD])
    assert code(authenticator.authenticate, headers(Authorization=f"Bearer {OTHER}")) == "unauthorized"


def test_tokens_can_be_replaced_while_running() -> None:
    authenticator = Authenticator("admin", tokens=[GOOD])
    authenticator.replace_tokens([OTHER])
    assert code(authenticator.authenticate, headers(Authorization=f"Bearer {GOOD}")) == "unauthorized"
    assert code(authenticator.authenticate, headers(Authorization=f"Bearer {OTHER}")) is None


def test_an_empty_list_of_tokens_accepts_no_token() -> None:
    assert code(Authenticator("admin", tokens=[]).authenticate, headers(Authorization="Bearer x")) == "unauthorized"


def test_a_listener_without_tokens_accepts_every_request() -> None:
    assert code(Authenticator("worker").authenticate, headers()) is None


def test_tokens_are_not_stored_in_the_clear() -> None:
    assert GOOD not in repr(vars(Authenticator("admin", tokens=[GOOD])))


OWN_HOSTS = "localhost:8770 LOCALHOST localhost.:8770 127.0.0.1:8770 [::1]:8770 ops.example:443 10.0.0.7:8770"
OTHER_HOSTS = "10.0.0.8:8770 evil.example localhost.evil.example evil.example@localhost localhost/evil [::1"


@pytest.mark.parametrize(
    ("host", "origin", "wanted"),
    [
        *((host, None, None) for host in OWN_HOSTS.split()),  # the last is the address of the socket itself
        *((host, None, "forbidden") for host in ["", *OTHER_HOSTS.split()]),
        ("localhost:8770", "http://localhost:8770", None),
        ("localhost:8770", "HTTP://LocalHost:8770", None),
        ("localhost:8770", "http://localhost:3000", "forbidden"),
        ("localhost:8770", "http://evil.example", "forbidden"),
        ("localhost:8770", "null", "forbidden"),
        ("localhost:8770", "", "forbidden"),
        ("localhost:8770", "file://localhost:8770", "forbidden"),
        ("127.0.0.1:8770", "https://ops.example", None),  # a reverse proxy that rewrites Host
        ("localhost:8770", "https://ops.example.evil", "forbidden"),
    ],
)
def test_host_and_origin_are_checked(host: str, origin: str | None, wanted: str | None) -> None:
    authenticator = Authenticator("admin", hosts=accepted_hosts("127.0.0.1", ["Ops.example"]))
    given = headers(Host=host) if origin is None else headers(Host=host, Origin=origin)
    assert code(authenticator.check_origin, given, ("10.0.0.7", 8770)) == wanted


def test_a_missing_host_is_rejected_on_tcp_only() -> None:
    assert code(Authenticator("admin", hosts=["localhost"]).check_origin, headers(), None) == "forbidden"
    assert code(Authenticator("worker").check_origin, headers(), "") is None


@pytest.mark.parametrize(
    ("listen", "hosts", "names"),
    [
        ("127.0.0.1", [], {"localhost", "127.0.0.1", "::1"}),
        ("localhost", ["a.example"], {"localhost", "127.0.0.1", "::1", "a.example"}),
        ("0.0.0.0", [], {"localhost", "127.0.0.1", "::1"}),
        ("::", ["A.example"], {"localhost", "127.0.0.1", "::1", "a.example"}),
        ("10.0.0.7", [], {"10.0.0.7"}),
        ("Jobs.example", ["other"], {"jobs.example", "other"}),
        ("127.0.0.1:8770", [], {"localhost", "127.0.0.1", "::1"}),
        ("[::1]:8770", [], {"localhost", "127.0.0.1", "::1"}),
        ("[::]:8770", [], {"localhost", "127.0.0.1", "::1"}),
        ("", [], {"localhost", "127.0.0.1", "::1"}),
        ("10.0.0.7:8770", ["a"], {"10.0.0.7", "a"}),
        ("10.9.9.9", ["Jobs.Example."], {"10.9.9.9", "jobs.example"}),
        ("10.9.9.9", ["[2001:DB8:0:0::7]"], {"10.9.9.9", "2001:db8::7"}),
        ("10.9.9.9", ["2001:db8::7"], {"10.9.9.9", "2001:db8::7"}),
    ],
)
def test_a_listener_knows_its_host_names(listen: str, hosts: list[str], names: set[str]) -> None:
    assert accepted_hosts(listen, hosts) == names


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("a:1", "a"),
        ("[FE80::1]:8", "fe80::1"),
        ("a:b", ""),
        ("a:1:2", ""),
        ("a b", ""),
        ("a\r\n", ""),
        ("a.", "a"),
        ("", ""),
    ],
)
def test_the_name_in_a_host_header_is_normalized(host: str, name: str) -> None:
    assert host_name(host) == name


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("application/json", None),
        ("application/json; charset=utf-8", None),
        ('Application/JSON;Charset="UTF-8"', None),
        ("application/json; profile=x", None),
        ("application/json;", None),
        ("application/json; charset=latin-1", "unsupported_media_type"),
        ("application/json; charset=utf-16", "unsupported_media_type"),
        ("application/x-ndjson", "unsupported_media_type"),
        ("text/plain", "unsupported_media_type"),
        ("application/x-www-form-urlencoded", "unsupported_media_type"),
        ("application/jsonp", "unsupported_media_type"),
        ("", "unsupported_media_type"),
    ],
)
def test_the_content_type_must_be_json_in_utf_8(given: str, wanted: str | None) -> None:
    assert code(check_content_type, headers(Content_Type=given), JSON) == wanted


def test_a_stream_has_its_own_content_type() -> None:
    assert code(check_content_type, headers(Content_Type="application/x-ndjson; charset=utf-8"), LINES) is None
    assert code(check_content_type, headers(Content_Type="application/json"), LINES) == "unsupported_media_type"


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd", "identity, gzip", "x"])
def test_compressed_bodies_are_rejected(coding: str) -> None:
    given = headers(Content_Type="application/json", Content_Encoding=coding)
    assert code(check_content_type, given, JSON) == "unsupported_media_type"
    assert code(check_content_type, headers(Content_Type="application/json", Content_Encoding="Identity"), JSON) is None
    on_its_way = headers(Content_Type="application/json", Transfer_Encoding=f"{coding}, chunked")
    assert code(check_content_type, on_its_way, JSON) == "unsupported_media_type"
    assert code(check_content_type, headers(Content_Type="application/json", Transfer_Encoding="Chunked"), JSON) is None


def test_a_key_is_scoped_to_listener_method_and_path() -> None:
    authenticator = Authenticator("worker")
    first = authenticator.idempotency_key("k", "POST", "/v1/jobs", b"{}")
    assert authenticator.idempotency_key("k", "POST", "/v1/jobs", b"{}") == first
    others = [
        authenticator.idempotency_key("l", "POST", "/v1/jobs", b"{}"),
        authenticator.idempotency_key("k", "PUT", "/v1/jobs", b"{}"),
        authenticator.idempotency_key("k", "POST", "/v1/claim", b"{}"),
        Authenticator("admin").idempotency_key("k", "POST", "/v1/jobs", b"{}"),
    ]
    assert len({first.digest, *(other.digest for other in others)}) == 5


@pytest.mark.parametrize("size", [3, 100, 1 << 20])
def test_a_key_is_bound_to_the_whole_body(size: int) -> None:
    body = b"0" * size
    others = [body + b" ", *(body[:at] + b"1" + body[at + 1 :] for at in (0, size // 2, size - 1))]
    keys = [Authenticator("worker").idempotency_key("k", "POST", "/v1/jobs", each) for each in (body, *others)]
    assert len({key.digest for key in keys}) == 1
    assert len({key.body_hash for key in keys}) == 5


def test_a_valid_key_is_accepted_and_a_bad_one_is_a_400() -> None:
    for keys, wanted in (
        (["a", "a b", "~" * 200, "!"], None),
        (["", "a" * 201, "a\tb", "a\x7f", "ä", "\udcff", "a\nb"], "invalid_request"),
    ):
        for key in keys:
            assert code(Authenticator("worker").idempotency_key, key, "POST", "/", b"") == wanted, key


@pytest.mark.parametrize("sent", ["[2001:DB8:0:0::7]:8770", "[2001:db8::7]", "[2001:db8:0:0:0:0:0:7]:1"])
def test_an_address_matches_in_every_notation(sent: str) -> None:
    """Both the configured address and the header are normalized."""
    for names in (accepted_hosts("[2001:db8:0:0::7]:8770"), accepted_hosts("10.9.9.9", ["2001:DB8::7"])):
        Authenticator("admin", hosts=names).check_origin(headers(Host=sent), None)
