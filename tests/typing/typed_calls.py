"""What mypy and pyright accept and reject: each line with a comment is an error in both, and no other line is one.

Only the type checkers read this module. mypy checks the kind of an error too. A comment that is not needed is an error.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import timedelta

from jobd import App, JobContext, JobHandle, NewJob, Retry, current_job

app = App("typed")


@dataclass
class Thumbnail:
    path: str
    size: int


@app.task(queue="images", max_attempts=5, backoff=timedelta(seconds=10))
async def resize(path: str, width: int = 320) -> Thumbnail:
    return Thumbnail(path, width)


@app.task(queue="mail", discard_on=(ValueError,))
def receipt(order_id: int, customer: str, *, copy_to: str | None = None) -> None: ...


@app.task
def tidy() -> int:
    return 3


@app.schedule("0 3 * * *", timezone="Europe/Berlin")
@app.task
def sweep(days: int = 30) -> int:
    start: int = current_job().checkpoint or 0
    current_job().progress(50, checkpoint=start)
    raise Retry("later", after=timedelta(minutes=1), days=days - 1)


app.schedule(timedelta(minutes=5), overlap="skip")(resize.call("a.png"))
app.schedule("0 6 * * 1", id="weekly")(sweep.using(queue="slow").call(days=7))


@app.middleware
def log_run(job: JobContext) -> Iterator[None]:
    yield


@app.middleware
async def session(job: JobContext) -> AsyncIterator[None]:
    yield


@app.on_enqueue
def trace(job: NewJob) -> None:
    job.headers["traceparent"] = "00"


class Service:
    def __init__(self) -> None:
        self.charge = app.task(name="charge")(self._charge)

    def _charge(self, cents: int) -> bool:
        return cents > 0


async def right() -> None:
    job: JobHandle[Thumbnail] = await resize.aenqueue("a.png", width=640)
    size: int = (await job.aresult(timeout=60)).size
    path: str = (await resize("b.png")).path
    receipt.using(delay=timedelta(minutes=5), priority=-10).enqueue(42, customer=path, copy_to="x")
    count: int = tidy.enqueue().result(timedelta(seconds=size)) + tidy() + tidy.job("id").result()
    handles: list[JobHandle[int]] = app.enqueue_many([tidy.call(), tidy.using(id="t").call()])
    paid: bool = Service().charge.enqueue(count).result()
    print(handles, paid)


async def wrong() -> None:
    await resize.aenqueue(1)  # type: ignore[arg-type]
    await resize.aenqueue("a", heigth=2)  # type: ignore[call-arg]
    await resize.aenqueue()  # type: ignore[call-arg]
    int(await (await resize.aenqueue("a")).aresult())  # type: ignore[call-overload]
    print(resize("a").path)  # type: ignore[attr-defined]
    resize.enqueue("a", delay=timedelta(seconds=1))  # type: ignore[call-arg]
    receipt.enqueue("42", "acme")  # type: ignore[arg-type]
    receipt.using(delay=5)  # type: ignore[arg-type]
    receipt.using(colour="red")  # type: ignore[call-arg]
    "".join(tidy.enqueue().result())  # type: ignore[arg-type]
    tidy.enqueue(1)  # type: ignore[call-arg]
    "".join(app.enqueue_many([tidy.call()]))  # type: ignore[arg-type]
    app.task(quue="x")  # type: ignore[call-overload]
    app.schedule("0 3 * * *", zone="Europe/Berlin")  # type: ignore[call-arg]
    app.schedule("0 3 * * *")(len)  # type: ignore[type-var]
    receipt.enqueue(tidy.call(), "acme")  # type: ignore[arg-type]
    receipt.enqueue(tidy.enqueue(), "acme")  # type: ignore[arg-type]
