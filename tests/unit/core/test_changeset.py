"""A draft: rising numbers, ordered times, and secrets that depend only on the seed."""

from __future__ import annotations

from functools import reduce
from operator import and_, or_
from uuid import UUID

from msgspec.structs import replace

from jobd.core.changeset import Draft
from jobd.core.state import Book
from jobd.model.commands import Call, Moment, Ping
from jobd.model.job import COUNTER_MASK, DAY_MS, TOKEN_COUNTER_BITS, Job, Options, Policy, new_epoch
from jobd.model.storage import Numbers
from tests.support.rule_harness import NOW, SEED

AT = Moment(NOW, 1_000, NOW - 1_000)
JOB = Job(1, "a", Options(), "queued", NOW, NOW, NOW)
MANY = range(1, 500)


def draft(seed: bytes = SEED, at: Moment = AT) -> Draft:
    return Draft(Book(), Call(Ping(), "client", seed), at, Policy())


def test_numbers_go_up_by_one() -> None:
    drafted = draft()
    assert [drafted.job_number() for _ in range(3)] == [1, 2, 3]
    tokens = [drafted.token() for _ in range(3)]
    assert [token - tokens[0] for token in tokens] == [0, 1, 2]
    for _ in range(3):
        drafted.step(JOB, "updated")
    drafted.queue("q", "queue_paused")
    assert [change.event.seq for change in drafted.changes] == [1, 2, 3, 4]
    assert (drafted.changes[-1].event.job_seq, drafted.changes[-1].event.job_id) == (0, "")


def test_a_full_counter_begins_an_epoch_of_the_trusted_time() -> None:
    for trusted, believed in ((None, NOW), (NOW - DAY_MS, NOW - DAY_MS)):
        book = Book(Numbers(epoch=3, next_token=COUNTER_MASK))
        drafted = Draft(book, Call(Ping(), "client", SEED), Moment(NOW, 0, NOW, trusted), Policy())
        epoch = new_epoch(3, believed)
        assert epoch > 4
        tokens = [drafted.token() for _ in range(3)]
        assert tokens == [
            (3 << TOKEN_COUNTER_BITS) + COUNTER_MASK,
            (epoch << TOKEN_COUNTER_BITS) + 1,
            (epoch << TOKEN_COUNTER_BITS) + 2,
        ]
        assert (book.epoch, book.next_token) == (3, COUNTER_MASK)  # a draft only reads the book


def test_updated_at_is_the_latest_time_of_a_row() -> None:
    """Also if the wall clock stepped back, or a repaired row has later times."""
    drafted = draft()
    assert drafted.step(replace(JOB, created_at=NOW - 9), "updated").updated_at == NOW
    assert drafted.step(replace(JOB, created_at=NOW + 1), "updated").updated_at == NOW + 1
    ahead = replace(JOB, started_at=NOW + 2)
    assert drafted.step(ahead, "updated").updated_at == NOW + 2
    assert drafted.step(ahead, "updated", started_at=NOW + 3).updated_at == NOW + 3
    assert drafted.step(ahead, "updated", started_at=None).updated_at == NOW
    ended = replace(JOB, finished_at=NOW + 4)
    assert drafted.step(ended, "updated").updated_at == NOW + 4
    assert drafted.step(ended, "updated", finished_at=NOW + 5, updated_at=NOW + 1).updated_at == NOW + 5
    assert drafted.step(ended, "updated", finished_at=None).updated_at == NOW


def test_a_lock_id_cannot_be_guessed() -> None:
    """Its number is public; the secret is in the seed. The same seed gives the same id."""
    secret = draft().secret(7)
    assert len(bytes.fromhex(secret)) == 16
    assert secret == draft().secret(7)
    assert secret not in {draft(b"another seed").secret(7), draft().secret(8)}
    assert len(draft().secret(2**64 - 1)) == 32  # the greatest possible token


def test_a_job_id_is_a_uuid_of_its_time_and_otherwise_random() -> None:
    made = [UUID(draft().job_id(number)) for number in MANY]
    assert len(set(made)) == len(made)
    assert {(each.version, each.variant) for each in made} == {(7, "specified in RFC 4122")}
    assert {each.int >> 80 for each in made} == {NOW}
    fixed = 0xF << 76 | 0x3 << 62
    random = (1 << 80) - 1 & ~fixed
    assert reduce(or_, (each.int for each in made)) & random == random
    assert reduce(and_, (each.int for each in made)) & random == 0
    assert draft().job_id(1) == str(made[0]) == "018bcfe5-6800-74bc-bc40-bbfcea251b17"  # no id is issued twice
    assert draft(b"another seed").job_id(1) != str(made[0])
    assert UUID(draft().job_id(2**64 - 1)).version == 7


def test_a_job_id_is_valid_at_any_time() -> None:
    for now, shown in ((2**48 - 1, 2**48 - 1), (2**48 + 5, 5)):
        assert UUID(draft(at=replace(AT, now=now)).job_id(1)).int >> 80 == shown


def test_the_random_fraction_is_uniform_and_depends_on_the_seed() -> None:
    thrown = [draft().fraction(number) for number in MANY]
    assert 0 <= min(thrown) < 0.05
    assert 0.95 < max(thrown) < 1
    assert 0.4 < sum(thrown) / len(thrown) < 0.6
    assert draft().fraction(1) == thrown[0] != draft(b"another seed").fraction(1)
    assert 0 <= draft().fraction(2**64 - 1) < 1
