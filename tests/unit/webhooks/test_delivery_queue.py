"""The delivery queue: order per subject, independence of subjects, and a comparison with a simple model."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from jobd.webhooks.delivery_queue import DeliveryQueue, QueuedDelivery


def queue_of(*waiting: tuple[int, str, int]) -> DeliveryQueue:
    made = DeliveryQueue()
    for id_, subject, due in waiting:
        made.add(QueuedDelivery(id_, subject, due))
    return made


def take_all(made: DeliveryQueue, now: int = 0) -> list[int]:
    found = []
    while (waiting := made.take(now)) is not None:
        found.append(waiting.id)
    return found


def test_only_the_first_delivery_of_each_subject_starts() -> None:
    made = queue_of((1, "a", 0), (2, "a", 0), (3, "b", 0), (4, "a", 0))
    assert take_all(made) == [1, 3]
    assert len(made) == 4
    assert list(made.ids()) == [2, 4]
    made.remove(1)
    assert take_all(made) == [2]
    made.postpone(2, 50)
    assert take_all(made, 49) == []
    assert take_all(made, 50) == [2]
    made.remove(2)
    made.remove(3)
    assert take_all(made, 50) == [4]
    assert 4 in made
    made.remove(4)
    assert len(made) == 0
    assert made.next_due() is None
    assert 4 not in made
    assert vars(made) == vars(DeliveryQueue()) | {"_now": 50}, "a removed delivery leaves nothing"


def test_a_delivery_waits_for_the_earlier_ones_of_its_subject() -> None:
    made = queue_of((1, "a", 0), (2, "b", 0), (3, "a", 0), (4, "a", 0))
    assert made.up_to(3) == [1, 3]


def test_next_due_is_the_time_of_the_next_delivery() -> None:
    made = queue_of((1, "a", 30), (2, "b", 20))
    assert made.next_due() == 20
    assert take_all(made, 10) == []
    assert made.next_due() == 20
    assert take_all(made, 25) == [2]
    assert made.next_due() == 30
    made.add(QueuedDelivery(3, "c", 0))
    assert made.next_due() == 0
    assert take_all(made, 25) == [3]
    made.postpone(2, 40)
    made.remove(1)
    assert made.next_due() == 40


def test_a_retried_delivery_stays_the_first_of_its_subject() -> None:
    made = queue_of((5, "a", 0), (6, "a", 0))
    made.add(QueuedDelivery(2, "a", 0))
    assert take_all(made) == [2]
    made.add(QueuedDelivery(1, "a", 0))
    assert take_all(made) == []
    made.remove(2)
    assert take_all(made) == [1]
    made.requeue(1)
    assert take_all(made) == [1]


def test_a_probe_takes_the_delivery_with_the_fewest_failures() -> None:
    made = DeliveryQueue()
    assert made.take_probe(9) is None
    made.add(QueuedDelivery(1, "a", 0, 7))
    made.add(QueuedDelivery(2, "b", 0, 0))
    made.add(QueuedDelivery(3, "c", 0, 0))
    assert made.take_probe(9) == QueuedDelivery(2, "b", 0, 0)
    made.remove(2)
    assert take_all(made, 9) == [1, 3]


def test_a_stale_entry_starts_no_delivery_early() -> None:
    made = queue_of((2, "a", 0), (1, "a", 0))
    assert made.take(0) == QueuedDelivery(1, "a", 0)
    made.remove(1)  # 2 has two entries in the heap now
    assert made.take(0) == QueuedDelivery(2, "a", 0)
    made.postpone(2, 99)
    assert take_all(made, 98) == []
    made.expedite()
    assert take_all(made, 98) == [2]
    made.postpone(2, 200)
    assert made.next_due() == 200


def test_each_failure_is_counted() -> None:
    made = queue_of((1, "a", 0))
    for tries in range(3):
        assert made.take(tries) == QueuedDelivery(1, "a", tries, tries)
        made.postpone(1, tries + 1)


def test_expedite_makes_all_deliveries_due() -> None:
    made = queue_of((1, "a", 90), (2, "b", 80), (3, "b", 70))
    made.expedite(2)
    assert take_all(made, 5) == [2]
    made.expedite()
    assert take_all(made, 5) == [1]
    made.remove(2)
    assert take_all(made, 5) == [3]


def test_a_delivery_expedited_while_running_is_due_at_once_after_a_failure() -> None:
    made = queue_of((1, "a", 0), (2, "b", 0), (3, "c", 0))
    assert take_all(made) == [1, 2, 3]
    made.expedite(1)
    made.expedite(3)
    made.postpone(1, 10)
    made.postpone(2, 10)
    made.requeue(3)
    assert take_all(made) == [1, 3]
    made.postpone(1, 10)  # once
    made.postpone(3, 10)
    assert (take_all(made), made.next_due()) == ([], 10)
    assert take_all(made, 10) == [1, 2, 3]
    made.expedite(2)
    made.remove(2)
    made.add(QueuedDelivery(2, "b", 0))
    assert take_all(made, 10) == [2]
    made.postpone(2, 20)
    assert take_all(made, 10) == []


def test_a_delivery_expedited_before_it_starts_waits_after_a_failure() -> None:
    made = queue_of((1, "a", 50))
    made.expedite(1)
    assert take_all(made) == [1]
    made.postpone(1, 60)
    assert (take_all(made), made.next_due()) == ([], 60)


def test_a_delivery_expedited_behind_another_starts_right_after_it() -> None:
    made = queue_of((1, "a", 0), (2, "a", 50))
    assert take_all(made) == [1]
    made.expedite(2)
    made.remove(1)
    assert made.next_due() == 0
    made.expedite(2)
    assert take_all(made) == [2]
    made.expedite(2)
    made.postpone(2, 90)
    assert made.next_due() == 0, "it was expedited while it was running"
    assert take_all(made) == [2]


def test_expediting_all_does_not_expedite_running_deliveries() -> None:
    made = queue_of((1, "a", 0))
    assert take_all(made) == [1]
    made.expedite()
    made.postpone(1, 10)
    assert (take_all(made), made.next_due()) == ([], 10)


def test_a_delivery_with_two_ready_entries_does_not_start_early() -> None:
    made = queue_of((1, "a", 10), (2, "b", 10))
    assert take_all(made, 10) == [1, 2]
    made.requeue(1)
    made.requeue(2)
    made.expedite()
    assert take_all(made, 10) == [1, 2]
    made.postpone(1, 99)
    assert take_all(made, 50) == []
    assert made.next_due() == 99
    assert made.take_probe(50) is None


@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                ("add", "add", "take", "probe", "remove", "postpone", "requeue", "expedite all", "expedite", "again")
            ),
            st.integers(0, 9),
        ),
        max_size=60,
    )
)
def test_the_queue_behaves_like_a_plain_list(steps: list[tuple[str, int]]) -> None:
    made, model, now, next_id = DeliveryQueue(), NaiveDeliveryQueue(), 0, 100
    for step, number in steps:
        now += number
        if step in ("add", "again"):
            next_id += 1
            id_ = next_id if step == "add" else 200 - next_id
            if id_ not in model.waiting:
                waiting = QueuedDelivery(id_, "abc"[number % 3], now + number if number % 2 else 0)
                model.waiting[id_] = replace(waiting)
                made.add(waiting)
        elif step == "expedite all":
            made.expedite()
            for each in model.waiting.values():
                each.due = 0
        elif step == "expedite":
            if model.waiting:
                id_ = sorted(model.waiting)[number % len(model.waiting)]
                made.expedite(id_)
                model.waiting[id_].due = 0
                model.expedited |= {id_} & model.running
        elif step in ("take", "probe"):
            free = [each for each in model.firsts() if each.due <= now]
            found = made.take(now) if step == "take" else made.take_probe(now)
            best = min(free, key=lambda each: (each.tries if step == "probe" else 0, each.id), default=None)
            assert found == best
            model.running |= set() if best is None else {best.id}
        elif model.running:
            id_ = sorted(model.running)[number % len(model.running)]
            model.running.remove(id_)
            was_expedited = id_ in model.expedited
            model.expedited.discard(id_)
            if step == "remove":
                del model.waiting[id_]
                made.remove(id_)
            elif step == "postpone":
                due_then = 0 if was_expedited else now + number
                model.waiting[id_].due, model.waiting[id_].tries = due_then, model.waiting[id_].tries + 1
                made.postpone(id_, now + number)
            else:
                made.requeue(id_)
        assert len(made) == len(model.waiting)
        assert list(made.ids()) == sorted(set(model.waiting) - model.running)
        dues, due = [each.due for each in model.firsts()], made.next_due()
        if due:
            assert due == min(dues)
        else:
            assert (min(dues) <= now) if due == 0 else not dues


class NaiveDeliveryQueue:
    """A delivery queue in the simplest form."""

    def __init__(self) -> None:
        self.waiting: dict[int, QueuedDelivery] = {}
        self.running: set[int] = set()
        self.expedited: set[int] = set()  # running deliveries that were expedited

    def firsts(self) -> list[QueuedDelivery]:
        """Return the first delivery of each subject that has none running."""
        found: dict[str, QueuedDelivery] = {}
        for id_ in sorted(self.waiting):
            found.setdefault(self.waiting[id_].subject, self.waiting[id_])
        busy = {self.waiting[id_].subject for id_ in self.running}
        return [each for subject, each in found.items() if subject not in busy]


def test_has_subject_covers_waiting_and_running_deliveries() -> None:
    made = queue_of((1, "a", 0), (2, "b", 0))
    assert take_all(made) == [1, 2]
    assert (made.has_subject("a"), made.has_subject("b"), made.has_subject("c")) == (True, True, False)
    made.remove(1)
    assert (made.has_subject("a"), made.has_subject("b")) == (False, True)


def test_removing_a_waiting_delivery_starts_nothing_while_another_of_its_subject_runs() -> None:
    made = queue_of((1, "a", 0), (2, "a", 0), (3, "a", 0))
    assert take_all(made) == [1]
    made.remove(2)
    assert take_all(made) == []
    made.remove(1)
    assert take_all(made) == [3]
