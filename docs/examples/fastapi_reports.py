"""FastAPI: an endpoint creates a job, another one returns its result. Run it with `uvicorn fastapi_reports:api`.

`jobctl worker fastapi_reports:app` runs the jobs.
"""

from __future__ import annotations

from fastapi import FastAPI, HTTPException
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from jobd import App, JobCancelled, JobFailed
from jobd.client.errors import JobNotFound

app = App("reports")
api = FastAPI(lifespan=app.lifespan)  # closes the connections to the daemon at the end


class Report(BaseModel):
    customer: int
    total: float


@app.task(queue="reports")
async def report(customer: int, year: int) -> Report:
    if year < 2000:
        raise ValueError(f"no sales in {year}")
    return Report(customer=customer, total=customer * 1.5)


@api.post("/reports/{customer}", status_code=202)
async def start(customer: int, year: int) -> dict[str, str]:
    job = await report.aenqueue(customer, year)
    return {"id": job.id}


@api.get("/reports/{job_id}", response_model=Report)
async def fetch(job_id: str, wait_s: float = 0) -> Report | JSONResponse:
    job = report.job(job_id)
    try:
        return await job.aresult(timeout=min(wait_s, 20))
    except TimeoutError:
        return JSONResponse({"status": await job.astatus()}, 202)
    except JobNotFound:
        raise HTTPException(404, f"no report {job_id}") from None
    except (JobFailed, JobCancelled) as error:
        raise HTTPException(500, str(error).splitlines()[0]) from None
