"""Declarations of calls."""

from __future__ import annotations

from jobd.model.api_call import ApiCall, CallGroup, calls_of
from jobd.model.commands import Get
from jobd.model.responses import JobView


class Group(CallGroup, tag="Jobs", base="/base", auth="admin"):
    get = ApiCall(Get, JobView, "GET", "/jobs/{id}", secret=True)
    status = get.then(lambda job: job.status)


class Client(Group):
    """A class with the calls of a group does not declare them again."""


def test_the_calls_of_a_group_share_its_tag_path_and_token() -> None:
    calls = list(calls_of(Group))
    assert [(call.name, call.path, call.tag, call.auth) for call in calls] == [
        ("get", "/base/jobs/{id}", "Jobs", "admin"),
        ("status", "/base/jobs/{id}", "Jobs", "admin"),
    ]
    assert [call.options for call in calls] == [{"secret": True}, {"secret": True}]
    assert list(calls_of(Client)) == []
    assert Client.get is calls[0]
