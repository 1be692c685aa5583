"""Plain tasks: retries, options before the call, errors of the result."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from jobd import App, Backoff, JobCancelled, JobFailed, Retry, Snooze

app = App("mail")


@app.task(queue="mail", max_attempts=8, backoff=Backoff.fixed(timedelta(minutes=1)))
def receipt(order_id: int, customer: str, *, copy_to: str | None = None) -> None:
    if customer == "busy":
        raise Snooze(timedelta(minutes=5))  # uses no attempt
    if customer == "down":
        raise Retry(after=timedelta(minutes=5))


@app.task(discard_on=(KeyError,))
def size(account: str) -> int:
    return {"acme": 4}[account]


def main() -> None:
    receipt.enqueue(42, "acme").result(timeout=60)
    later = receipt.using(delay=timedelta(minutes=5), priority=-10).enqueue(42, customer="acme", copy_to="x")
    print(later.status(), later.cancel())
    new_year = size.using(run_at=datetime(2100, 1, 1, tzinfo=UTC), queue="slow").enqueue("acme")
    print(new_year.cancel("tested"))
    again = size.job(size.enqueue("acme").id)
    print(again.result(timeout=timedelta(seconds=60)) + size("acme"))
    for job in (size.enqueue("nobody"), new_year):
        try:
            job.result(timeout=60)
        except (JobFailed, JobCancelled, TimeoutError) as error:
            print(type(error).__name__)


if __name__ == "__main__":
    main()
