"""Errors that differ only in details of the job have the same fingerprint, in every version."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobd.model.fingerprints import MAX_NORMALIZED, fingerprint, fingerprint_of_bytes, normalize


@pytest.mark.parametrize(
    ("message", "marked"),
    [
        ("No space left on device", "No space left on device"),
        ("exit 3 after 12.5 s (try 2 of 3)", "exit <n> after <n> s (try <n> of <n>)"),
        ("silent for 3 h 5 min, 15 min, 1 min 1 s, 2.5 s, 7 ms", "silent for <n> s, <n> s, <n> s, <n> s, <n> s"),
        ("at 12:30:07,123 worker-7 died", "at <n> worker-<n> died"),
        ('no such file: "/srv/in/a b.mov"', "no such file: <text>"),
        ("can't open 'movie.mov', it isn't there", "can't open <text>, it isn't there"),
        ("can't read `x`", "can't read <text>"),
        ("open /srv/in/4711/x.mov: permission denied", "open <path>: permission denied"),
        ("open ./a/b.txt and ~/c failed", "open <path> and <path> failed"),
        (r"open C:\data\x.doc failed", "open <path> failed"),
        ("and/or is no path, 10/20 neither", "and/or is no path, <n>/<n> neither"),
        ("GET https://example.org/a?b=1 gave 503", "GET <url> gave <n>"),
        ("job 018bcff4-ab6d-764b-96ff-6a4154d27e6b is gone", "job <uuid> is gone"),
        ("at 0x7ffee4c0: bad", "at <hex>: bad"),
        ("commit deadbeef12 is missing", "commit <hex> is missing"),
        ("the decade and the facade", "the decade and the facade"),
        ("  several\n\tlines   of\r\ntext ", "several lines of text"),
        ('an open "quote', 'an open "quote'),
        ("", ""),
    ],
)
def test_details_are_replaced_by_placeholders(message: str, marked: str) -> None:
    assert normalize(message) == marked


def test_fingerprints_do_not_change_between_versions() -> None:
    """People note fingerprints. If this fails, they have changed, which is a breaking change."""
    assert fingerprint("exit 3 after 12 s", "exit:3") == "ed978b8234f6"
    assert fingerprint("open /srv/a: no such file", None) == "45d321dbe617"
    assert fingerprint(None, "stalled") == "659fd8535150"


def test_errors_with_the_same_code_and_words_have_the_same_fingerprint() -> None:
    assert fingerprint("took 12 s", "E") == fingerprint("took  40 s", "E")
    assert fingerprint("took 12 s", "E") != fingerprint("took 12 s", None)
    assert fingerprint("took 12 s", "E") != fingerprint("lost 12 s", "E")
    assert fingerprint(None, None) is None
    assert fingerprint("", None) is not None


@pytest.mark.parametrize(
    ("message", "job_id", "marked"),
    [
        ("order-abc: customer is gone", "order-abc", "<id>: customer is gone"),
        ("cannot bill invoice-7f-a (order-abc)", "invoice-7f-a", "cannot bill <id> (order-abc)"),
        ("k3f9z has no picture", "k3f9z", "<id> has no picture"),
        ("a disk is full", "disk", "a <id> is full"),
        ("order-abc.tmp of reorder-abc", "order-abc", "<id>.tmp of reorder-abc"),
        ("nothing of it", "order-abc", "nothing of it"),
        ("n of 17", "n", "<id> of <n>"),
        ("17 of 20 are left", "17", "<n> of <n> are left"),
        ("018bcff4-ab6d-764b-96ff-6a4154d27e6b is gone", "018bcff4-ab6d-764b-96ff-6a4154d27e6b", "<uuid> is gone"),
        ('"order-abc" is gone', "order-abc", "<text> is gone"),
    ],
)
def test_the_id_of_the_job_is_replaced_too(message: str, job_id: str, marked: str) -> None:
    assert normalize(message, job_id) == marked


def test_the_fingerprint_does_not_depend_on_the_id_of_the_job() -> None:
    trace = "\nTraceback (most recent call last):\n" + '  File "/srv/app.py", line 12, in work\n    call()\n' * 30
    names = {
        fingerprint(f"LookupError: no customer for {job_id}, try {n}{trace}", "LookupError", job_id)
        for n, job_id in enumerate(("order-a", "order-bcdef", "x9k2", "j", "018bcff4-ab6d-764b-96ff-6a4154d27e6b"), 8)
    }
    assert len(names) == 2, "a UUID is marked as one, as before"
    assert len({fingerprint(f"E: {'y' * 900} {n} {trace}", "E", f"j{n}") for n in (9, 10, 100_000)}) == 1


def test_the_traceback_does_not_count() -> None:
    trace = 'Traceback (most recent call last):\n  File "/srv/app.py", line 12, in work\n    call()\n'
    group = trace.replace("Trace", "  + Exception Group Trace").replace("  File", "  |   File")
    chain = f"{trace}KeyError: 1\n\nDuring handling of the above exception, another exception occurred:\n\n{trace}"
    bare = "LookupError: no customer 7\nwith this name"
    messages = [bare, f"{bare}\n{trace}", f"{bare}\n{group}", f"{bare}\n{chain}", trace + bare, chain + bare]
    assert len({fingerprint(each, "LookupError") for each in messages}) == 1
    assert fingerprint(trace + "ValueError: x", None) != fingerprint(trace + "KeyError: x", None)
    assert normalize(trace) == "Traceback (most recent call last): File <text>, line <n>, in work call()", "no error"


@pytest.mark.parametrize("label", ["Job failed: ", "Job failed:\n", "Exit status 1.\nLast lines of stderr:\n"])
def test_an_error_after_a_label_and_its_traceback_counts(label: str) -> None:
    trace = "Traceback (most recent call last):\n" + '  File "/srv/app.py", line 12, in work\n    call()\n' * 30
    chain = f"{trace}OSError\n\nDuring handling of the above exception, another exception occurred:\n\n{trace}"
    for error in ("ValueError: x", "KeyError: x"):
        for frames in (trace, chain, f"{trace}[...]\nll()\n{chain}"):
            assert normalize(label + frames + error) == normalize(label + error)
            assert normalize(f"{label}{error}\n{frames}{error}") == normalize(label + error)
            assert normalize(f"x\n{frames}{error}") == "x"


def test_an_error_in_an_exception_group_counts_after_a_label() -> None:
    group = (
        "Failed:\n  + Exception Group Traceback (most recent call last):\n  |   File 'a.py', line 1, in f\n"
        "  | ExceptionGroup: all (1 sub-exception)\n  +-+---------------- 1 ----------------\n    | {}\n"
        "    +------------------------------------\n"
    )
    assert normalize(group.format("KeyError: x")) == "Failed: ExceptionGroup: all (<n> sub-exception) KeyError: x"


def test_only_the_beginning_of_a_message_counts() -> None:
    """The bound is a part of the fingerprints: with another one, long messages would get other fingerprints."""
    assert MAX_NORMALIZED == 1_000
    begin = "x" * 999
    assert fingerprint(begin + "aa", None) == fingerprint(begin + "ab", None)
    assert fingerprint(begin + "aa", None) != fingerprint(begin + "ba", None)


def test_a_lone_surrogate_is_accepted() -> None:
    assert fingerprint("\ud83d", None) not in (None, fingerprint("", None), fingerprint("?", None))


def test_a_damaged_row_has_a_fingerprint() -> None:
    assert fingerprint_of_bytes(b"took 12 s", None, None) == fingerprint("took 12 s", None)
    assert fingerprint_of_bytes(b"\xff\xfe", b"\x80", b"\x80") is not None
    assert fingerprint_of_bytes(None, None, b"j1") is None


@given(st.text(), st.none() | st.text())
def test_every_message_has_a_fingerprint_and_normalizing_is_idempotent(message: str, code: str | None) -> None:
    name = fingerprint(message, code)
    assert name is not None
    assert len(name) == 12
    assert set(name) <= set("0123456789abcdef")
    assert "\n" not in normalize(message)


@pytest.mark.parametrize(
    "nasty",
    [
        '"' * 5_000,
        "'" * 5_000,
        " '" * 5_000,
        "a" * 5_000,
        "0" * 5_000,
        "1," * 5_000,
        "/a" * 5_000,
        "../" * 5_000,
        "a:" * 5_000,
    ],
)
def test_no_message_takes_long_to_normalize(nasty: str) -> None:
    begin = time.process_time()
    normalize(nasty)
    assert time.process_time() - begin < 0.5
