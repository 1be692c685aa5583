"""When a call is retried, on which node, and which error is raised if no node serves it."""

from __future__ import annotations

import pytest

from jobd import client
from jobd.client.api_request import request_for
from jobd.client.apis import AdminApi, WorkerApi
from jobd.client.retries import RETRIED, NodeList, RetryState

READ = request_for(WorkerApi.queues)
ONE = NodeList([client.Endpoint(path="/one")])
A, B, C, ELSEWHERE = (
    client.parse_endpoint(f"http://{name}:1", token="secret") for name in ("a", "b", "c", "elsewhere")
)


def test_the_delay_doubles_up_to_its_limit_and_is_random_below_it() -> None:
    tries = RetryState(client.RetryOptions(total_s=None, base_s=1, max_s=5), READ, ONE, 0)
    assert [tries.wait_s(client.Unreachable("x"), 0, chance) for chance in (1, 1, 1, 1, 0.5, 0)] == [1, 2, 4, 5, 2.5, 0]


def test_retry_after_is_added_to_the_delay() -> None:
    tries = RetryState(client.RetryOptions(total_s=None, base_s=1), READ, ONE, 0)
    assert tries.wait_s(client.Overloaded("x", retry_after_ms=2000), 0, 0.5) == 2.5


def test_there_is_no_retry_after_the_deadline() -> None:
    tries = RetryState(client.RetryOptions(total_s=10, base_s=4, max_s=4), READ, ONE, 100)
    assert tries.wait_s(client.Unreachable("x"), 105, 1) == 4
    with pytest.raises(client.Unreachable):
        tries.wait_s(client.Unreachable("x"), 106, 1)


def test_a_call_that_may_have_been_applied_says_so_even_if_the_daemon_is_gone_afterwards() -> None:
    call = RetryState(client.RetryOptions(total_s=10, base_s=4), READ, ONE, 0)
    call.wait_s(client.OutcomeUnknown("The outcome is unknown.", details={"outcome": "unknown"}), 1, 1)
    with pytest.raises(client.OutcomeUnknown) as caught:
        call.wait_s(client.Unreachable("The daemon at /one cannot be reached."), 9, 1)
    assert caught.value.message == ("The outcome is unknown. The latest attempt: The daemon at /one cannot be reached.")
    assert caught.value.details == {"outcome": "unknown"}


def test_a_call_that_is_not_repeatable_follows_the_leader() -> None:
    state = RetryState(client.RetryOptions(), request_for(AdminApi.step_down), NodeList([A, B]), 0)
    assert state.wait_s(standby(B), 0, 0) == 0
    assert state.endpoint == B
    with pytest.raises(client.Unreachable, match="rejected"):
        state.wait_s(rejected(B), 0, 0)


def test_no_retries_means_one_attempt() -> None:
    with pytest.raises(client.Unreachable):
        RetryState(client.RetryOptions(total_s=0), READ, ONE, 0).wait_s(client.Unreachable("x"), 0, 0)


@pytest.mark.parametrize("code", sorted(set(client.ERRORS) - RETRIED))
def test_a_final_error_is_not_retried(code: str) -> None:
    with pytest.raises(client.ERRORS[code]):
        RetryState(client.RetryOptions(total_s=None), READ, ONE, 0).wait_s(client.ERRORS[code]("No."), 0, 0)


def test_a_call_that_is_not_repeatable_is_not_retried() -> None:
    with pytest.raises(client.Unreachable):
        RetryState(client.RetryOptions(total_s=None), request_for(AdminApi.step_down), ONE, 0).wait_s(
            client.Unreachable("x"), 0, 0
        )


def test_the_timeout_includes_the_delay_of_the_daemon() -> None:
    request = client.requests.claim("w", wait_ms=60_000)
    tries = RetryState(client.RetryOptions(total_s=30, timeout_s=10), request, ONE, 0)
    assert tries.timeout_s(0) == 70
    tries.wait_s(client.Unreachable("x"), 20, 0)
    assert tries.timeout_s(25) == 5
    assert tries.timeout_s(31) == 0.1


# ---------------------------------------------------------------------------------------------------------------------
# Several nodes.


def standby(leader: client.Endpoint | str | None = None) -> client.NotLeader:
    return client.NotLeader("A standby.", details={"leader": None if leader is None else str(leader)})


def rejected(node: client.Endpoint) -> client.Unreachable:
    return client.Unreachable(f"The daemon at {node} cannot be reached: rejected.")


def slow(node: client.Endpoint) -> client.Unreachable:
    error = client.Unreachable(f"The daemon at {node} cannot be reached: no response in time.")
    error.is_slow = True
    return error


class Attempts:
    """A call to several nodes whose time is given by the test."""

    def __init__(self, *nodes: client.Endpoint, follows_unlisted: bool = True, **retry: float | None) -> None:
        self.nodes = NodeList(nodes or (A, B, C), follows_unlisted=follows_unlisted)
        self.now_s = 0.0
        self._options = client.RetryOptions(**retry)  # type: ignore[arg-type]
        self.new_call()

    def new_call(self) -> None:
        self._state = RetryState(self._options, READ, self.nodes, self.now_s)

    @property
    def timeout_s(self) -> float:
        return self._state.timeout_s(self.now_s)

    @property
    def node(self) -> client.Endpoint:
        return self._state.endpoint

    def fail(self, error: client.JobdError, after_s: float = 0.0) -> tuple[client.Endpoint, float]:
        """End the attempt with `error`. Return the next node and the delay before it."""
        self.now_s += after_s
        wait_s = self._state.wait_s(error, self.now_s, 1)
        self.now_s += wait_s
        return self._state.endpoint, wait_s

    def serve(self) -> None:
        self._state.served()


def test_the_leader_that_a_standby_names_is_next() -> None:
    call = Attempts()
    assert call.node == A
    assert call.fail(standby(C)) == (C, 0)
    call.serve()
    call.new_call()
    assert call.node == C


def test_without_a_leader_the_nodes_are_tried_in_turn_then_again_after_a_delay() -> None:
    call = Attempts()
    assert call.fail(standby()) == (B, 0)
    assert call.fail(rejected(B)) == (C, 0)
    assert call.fail(standby()) == (A, 0.1)
    assert call.fail(client.ShuttingDown("x")) == (B, 0)
    assert call.fail(client.OutcomeUnknown("x")) == (C, 0)
    assert call.fail(standby()) == (A, 0.2)


def test_standbys_that_name_each_other_or_themselves_end_the_round() -> None:
    call = Attempts(A, B)
    assert call.fail(standby(B)) == (B, 0)
    assert call.fail(standby(A)) == (A, 0.1)
    assert call.fail(standby(A)) == (B, 0)
    assert call.fail(standby(B)) == (A, 0.2)


def test_the_delay_between_rounds_is_at_most_two_seconds() -> None:
    call = Attempts(A, B, total_s=None)
    waits = []
    for _ in range(10):
        call.fail(standby())
        waits.append(call.fail(client.ShuttingDown("x", retry_after_ms=60_000))[1])
    assert waits == [0.1, 0.2, 0.4, 0.8, 1.6, 2, 2, 2, 2, 2]


def test_a_leader_that_refused_the_connection_is_not_tried_again_in_the_round() -> None:
    call = Attempts()
    assert call.fail(rejected(A)) == (B, 0)
    assert call.fail(standby(A)) == (C, 0)
    assert call.fail(standby(A))[1] > 0


def test_a_slow_node_gets_its_share_of_the_time_and_a_slow_leader_what_is_left() -> None:
    call = Attempts(total_s=0, timeout_s=30)
    assert call.timeout_s == 10
    assert call.fail(slow(A), after_s=10) == (B, 0)
    assert call.timeout_s == 10
    assert call.fail(standby(A)) == (A, 0)
    assert call.timeout_s == 20
    assert call.fail(slow(A), after_s=15) == (C, 0)
    assert call.timeout_s == 5
    with pytest.raises(client.Unreachable):
        call.fail(standby(A))


def test_a_share_is_at_least_three_seconds_if_there_is_the_time() -> None:
    assert Attempts(timeout_s=4).timeout_s == 3
    assert Attempts(timeout_s=2).timeout_s == 2


def test_a_share_includes_the_delay_of_the_daemon() -> None:
    state = RetryState(
        client.RetryOptions(timeout_s=10), client.requests.claim("w", wait_ms=10_000), NodeList([A, B]), 0
    )
    assert state.timeout_s(0) == 15


def test_the_next_call_does_not_begin_with_a_node_that_was_unreachable() -> None:
    call = Attempts(total_s=0)
    call.fail(rejected(A))
    call.fail(standby())
    with pytest.raises(client.Unreachable):
        call.fail(standby())
    call.new_call()
    assert call.node == B


def test_a_busy_leader_is_tried_again_and_no_other_node() -> None:
    call = Attempts()
    assert call.fail(standby(C)) == (C, 0)
    assert call.fail(client.Overloaded("x", retry_after_ms=1000)) == (C, 1.1)


def test_a_final_error_is_that_of_the_leader() -> None:
    call = Attempts()
    call.fail(standby(C))
    with pytest.raises(client.AlreadyLocked, match=r"^Taken\. "):
        call.fail(client.AlreadyLocked("Taken."))
    call.new_call()
    assert call.node == C


def test_another_program_at_a_url_is_not_the_leader() -> None:
    call = Attempts()
    call.fail(rejected(A))
    with pytest.raises(client.BadResponse):
        call.fail(client.BadResponse("x"))
    assert call.nodes.first == B
    call.new_call()
    call.fail(rejected(B))
    with pytest.raises(client.BadResponse):
        call.fail(client.BadResponse("x"))
    assert call.nodes.first == C


def test_without_retries_there_is_one_round() -> None:
    call = Attempts(total_s=0)
    assert call.fail(standby()) == (B, 0)
    assert call.fail(standby()) == (C, 0)
    with pytest.raises(client.NotLeader):
        call.fail(standby())


def test_the_error_of_the_call_names_every_node_with_its_outcome() -> None:
    call = Attempts(total_s=0)
    call.fail(rejected(A))
    call.fail(client.ShuttingDown("The daemon is stopping."))
    with pytest.raises(client.Unreachable) as caught:
        call.fail(client.NotLeader("This node is a standby.", details={"leader": "http://a:1"}, status=503))
    assert caught.value.message == (
        "No node served the request: http://a:1: rejected; http://b:1: The daemon is stopping; "
        "http://c:1: This node is a standby."
    )
    assert caught.value.details["tried"] == [
        {"url": "http://a:1", "error": "unreachable", "message": "rejected."},
        {"url": "http://b:1", "error": "shutting_down", "message": "The daemon is stopping."},
        {"url": "http://c:1", "error": "not_leader", "message": "This node is a standby."},
    ]
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("errors", "code"),
    [
        ([standby(), standby()], "not_leader"),
        ([standby(), rejected(B)], "unreachable"),
        ([rejected(A), standby()], "unreachable"),
        ([client.OutcomeUnknown("x"), rejected(B)], "outcome_unknown"),
        ([client.OutcomeUnknown("x"), standby()], "outcome_unknown"),
    ],
)
def test_the_error_of_the_call_says_whether_it_may_have_been_applied(errors: list[client.JobdError], code: str) -> None:
    call = Attempts(A, B, total_s=0)
    call.fail(errors[0])
    with pytest.raises(client.ERRORS[code]) as caught:
        call.fail(errors[1])
    assert caught.value.code == code


def test_rounds_end_at_the_deadline() -> None:
    call = Attempts(A, B, total_s=5, timeout_s=1)
    for _ in range(100):
        try:
            call.fail(rejected(A))
        except client.Unreachable:
            break
    assert 3 < call.now_s <= 5


# ---------------------------------------------------------------------------------------------------------------------
# Where a request and its token may go.


def test_a_leader_outside_the_list_is_followed_over_the_same_scheme_with_the_token() -> None:
    call = Attempts()
    assert call.fail(standby(ELSEWHERE)) == (ELSEWHERE, 0)
    assert call.node.token == "secret"


def test_a_node_outside_the_list_cannot_name_another_one() -> None:
    call = Attempts()
    call.fail(standby(ELSEWHERE))
    assert call.fail(standby("http://further:1")) == (B, 0)
    call.fail(standby(ELSEWHERE))
    assert call.nodes.leader("http://b:1", ELSEWHERE) == B


def test_after_a_lost_leader_outside_the_list_the_list_is_tried() -> None:
    call = Attempts()
    call.fail(standby(ELSEWHERE))
    call.serve()
    call.new_call()
    assert call.node == ELSEWHERE
    assert call.fail(rejected(ELSEWHERE)) == (A, 0)
    assert call.nodes.first == A


@pytest.mark.parametrize(
    "url", ["https://elsewhere:1", "unix:/elsewhere", "ftp://x", "http://user@x:1", "elsewhere", "", None, 5, ["x"]]
)
def test_a_leader_at_another_kind_of_address_is_not_followed(url: object) -> None:
    nodes = NodeList([A, B], follows_unlisted=True)
    assert nodes.leader(url, A) is None
    assert nodes.leader("http://elsewhere:1", client.parse_endpoint("https://a:1")) is None


def test_a_socket_outside_the_list_is_followed_from_a_socket() -> None:
    nodes = NodeList([client.Endpoint(path="/a"), B], follows_unlisted=True)
    assert nodes.leader("unix:/c", nodes.endpoints[0]) == client.Endpoint(path="/c")
    assert nodes.leader("unix:/c", B) is None
    assert nodes.leader("http://elsewhere:1", nodes.endpoints[0]) is None


def test_the_leader_on_the_host_of_a_listed_url_is_that_url() -> None:
    admin = [client.parse_endpoint(f"http://{name}:8770") for name in ("a", "b")]
    assert NodeList(admin).leader("http://b:8771", admin[0]) == admin[1]
    one_machine = [client.parse_endpoint(f"http://127.0.0.1:{port}") for port in (1, 2)]
    assert NodeList(one_machine).leader("http://127.0.0.1:3", one_machine[0]) is None


def test_the_admin_token_goes_only_to_listed_urls() -> None:
    call = Attempts(follows_unlisted=False)
    assert call.fail(standby(ELSEWHERE)) == (B, 0)


def test_a_single_url_may_be_a_load_balancer_so_no_other_node_is_contacted() -> None:
    call = Attempts(A, total_s=1)
    assert call.fail(standby(B)) == (A, 0.1)
    assert call.fail(client.NotLeader("x", retry_after_ms=250))[1] == 0.45
    call.now_s = 0.9
    with pytest.raises(client.NotLeader, match=r"^A standby\. "):
        call.fail(standby(B))
