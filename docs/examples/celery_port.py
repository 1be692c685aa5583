"""The port of a Celery application: beat, a group of downloads, a retry of the part that failed, results."""

from datetime import date, timedelta

from jobd import App, Retry, current_job

app = App("ingest")
DAYS = [date(2026, 1, day) for day in (1, 2, 3)]


@app.task(
    queue="fetch", max_attempts=5, backoff=timedelta(seconds=1), timeout=timedelta(minutes=10), discard_on=(KeyError,)
)
def fetch(force: str, days: list[date]) -> int:
    failed = [day for day in days if day.day == 2 and current_job().attempt == 1]  # the download of the application
    if failed:
        raise Retry(f"{len(failed)} of {len(days)} days failed", days=failed)
    return len(days)


@app.task(queue="plan")
def nightly(forces: list[str], days: list[date]) -> list[str]:
    return [job.id for job in app.enqueue_many([fetch.call(force, days) for force in forces])]


app.schedule("0 2 * * *", id="nightly", timezone="Europe/London")(nightly.call(["kent", "surrey"], DAYS))

if __name__ == "__main__":
    ids = nightly.enqueue(["kent", "surrey"], DAYS).result(timeout=60)
    print([fetch.job(id).result(timeout=60) for id in ids])
