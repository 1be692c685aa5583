"""What a problem is about: its id, and which other problems share its subject."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from jobd.model.problems import Problem, Subject


def test_a_subject_is_identified_by_its_parts() -> None:
    assert Subject(type="queue", queue="mail", kind="receipt").parts == ("mail", "receipt")
    assert Subject(type="disk").parts == ("disk",)
    group = Subject(type="group", host="web-1", version="2.4")
    problem = Problem(id="p", condition="workers_die", severity="warning", subject=group, since=1)
    assert problem.name == "2.4 / web-1"
    assert (problem.sentence, replace(problem, title="T.", cause="C.", over_since=60_000).sentence) == (
        "",
        "T. C. Over since 00:01 UTC: closes within a minute.",
    )
    assert Subject(type="worker", queue="q", worker="w-1").parts == ("w-1",)


@pytest.mark.parametrize(
    ("other", "overlaps"),
    [
        (Subject(type="queue", queue="mail"), True),
        (Subject(type="queue", queue="mail", kind="bounce"), False),
        (Subject(type="queue", queue="push"), False),
        (Subject(type="disk"), True),
    ],
)
def test_subjects_overlap_unless_a_part_of_both_differs(other: Subject, overlaps: bool) -> None:
    assert Subject(type="queue", queue="mail", kind="receipt").overlaps(other) is overlaps


@pytest.mark.parametrize(
    ("subject", "expected"),
    [
        (Subject(type="pair", queue="mail", kind="receipt"), True),
        (Subject(type="pair", queue="mail", kind=""), False),
        (Subject(type="queue", queue="mail"), True),
        (Subject(type="worker", worker="w-2", host="web-1"), False),
        (Subject(type="disk"), False),
        (Subject(type="node", node="n-1", queue="mail"), False),
    ],
)
def test_a_subject_is_part_of_one_that_has_all_its_parts(subject: Subject, expected: bool) -> None:
    job = Subject(type="job", job="a", queue="mail", kind="receipt", worker="w-1", host="web-1")
    assert subject.is_part_of(job) == expected
