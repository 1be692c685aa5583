// A jobd worker in TypeScript without any package: node 22.18 or later runs this file as it is.
//
//   node docs/examples/worker.mts                          over the Unix socket (JOBD_SOCKET, /run/jobd/worker.sock)
//   JOBD_URL=http://127.0.0.1:8771 JOBD_WORKER_TOKEN_FILE=…  node docs/examples/worker.mts     over TCP, by plain fetch
//
// It takes jobs of the queue `default`, one at a time. SIGTERM lets the job in hand end, then stops (within 5 s
// where it is idle). ONCE=1 ends after one job. What to copy: the lock is extended while the work runs, and a lost lock stops the work.

import { randomUUID } from "node:crypto";
import { readFileSync } from "node:fs";
import { request } from "node:http";
import { hostname } from "node:os";

type Json = null | boolean | number | string | Json[] | { [key: string]: Json };
type Job = { id: string; queue: string; kind: string; payload: Json; attempt: number };
type Grant = { job: Job; lock_id: string; fencing_token: number; ttl_ms: number };

const socketPath = process.env.JOBD_SOCKET ?? "/run/jobd/worker.sock";
const url = process.env.JOBD_URL;
const tokenFile = process.env.JOBD_WORKER_TOKEN_FILE;
const token = tokenFile && readFileSync(tokenFile, "utf8").trim().split("\n")[0];
const worker = `${hostname()}-${process.pid}`;

/** What the daemon refused. `code` is stable (`lock_lost`, `already_locked`, …), the message is for people. */
class Refused extends Error {
  code: string;
  constructor(code: string, message: string) {
    super(message);
    this.code = code;
  }
}

/** One call. Rejects with Refused where the daemon said no, with anything else where it was not reached. */
async function call<T>(path: string, body: object, headers: Record<string, string> = {}): Promise<T> {
  headers = { "content-type": "application/json", ...headers };
  if (token) headers.authorization = `Bearer ${token}`;
  const text = JSON.stringify(body);
  const answer = JSON.parse(url ? await overTcp(path, text, headers) : await overSocket(path, text, headers));
  if (!answer.success) throw new Refused(answer.error, answer.message);
  return answer.data as T;
}

async function overTcp(path: string, body: string, headers: Record<string, string>): Promise<string> {
  return (await fetch(new URL(path, url), { method: "POST", body, headers })).text();
}

function overSocket(path: string, body: string, headers: Record<string, string>): Promise<string> {
  return new Promise((resolve, reject) => {
    const sent = request({ socketPath, path, method: "POST", headers }, (response) => {
      let text = "";
      response.setEncoding("utf8");
      response.on("data", (part) => (text += part));
      response.on("end", () => resolve(text));
      response.on("error", reject);
    });
    sent.on("error", reject);
    sent.end(body);
  });
}

/** Calls until there is an answer: at-least-once is safe here, because a repeated ending gets the same answer. */
async function untilAnswered<T>(path: string, body: object): Promise<T> {
  for (let pause = 100; ; pause = Math.min(pause * 2, 5_000)) {
    try {
      return await call<T>(path, body);
    } catch (error) {
      if (error instanceof Refused && error.code !== "overloaded" && error.code !== "shutting_down") throw error;
      await new Promise((resume) => setTimeout(resume, pause));
    }
  }
}

const said = (error: unknown) => (error instanceof Error && error.message) || String(error);

/** Your work. `report` tells how far it is; `lost` fires when the job is no longer ours: stop, write nothing more. */
async function work(job: Job, report: (percent: number, message?: string) => Promise<void>, lost: AbortSignal) {
  const numbers = Array.isArray(job.payload) ? job.payload.map(Number) : [];
  let sum = 0;
  for (const [index, number] of numbers.entries()) {
    if (lost.aborted) throw lost.reason;
    sum += number;
    await report(Math.floor((100 * (index + 1)) / numbers.length), `added ${number}`);
  }
  return { metadata: { sum, count: numbers.length } };
}

async function run(grant: Grant) {
  const { job, lock_id, ttl_ms } = grant;
  const at = `/v1/jobs/${encodeURIComponent(job.id)}`;
  const lost = new AbortController();
  const alive = async (verb: string, body: object) => {
    try {
      await call(`${at}/${verb}`, { lock_id, ...body });
    } catch (error) {
      if (!(error instanceof Refused)) return; // not reached: the lock lives on, the next call may get through
      lost.abort(error);
    }
  };
  const timer = setInterval(() => void alive("extend", {}), ttl_ms / 3);
  try {
    const result = await work(job, (progress, message) => alive("progress", { progress, message }), lost.signal);
    await untilAnswered(`${at}/complete`, { lock_id, ...result });
    console.log(`${job.id} completed`);
  } catch (error) {
    if (lost.signal.aborted || (error instanceof Refused && error.code === "lock_lost")) {
      console.error(`${job.id} is no longer ours: ${said(error)}`);
      return;
    }
    await untilAnswered(`${at}/fail`, { lock_id, error_message: said(error).slice(0, 4096) });
    console.error(`${job.id} failed: ${said(error)}`);
  } finally {
    clearInterval(timer);
  }
}

let key = randomUUID(); // of the claim: where its answer got lost, the repeat gets the same grants
let stopping = false;
process.on("SIGTERM", () => (stopping = true));
process.on("SIGINT", () => (stopping = true));

while (!stopping) {
  try {
    // stuck_after_ms 0: we extend by ourselves, so an expired lock means that this process is dead.
    // max_processing_ms 0: no ceiling, so work without a progress report may take long.
    const ask = { worker, lock_ttl_ms: 60_000, stuck_after_ms: 0, max_processing_ms: 0, wait_ms: 5_000 };
    const { grants } = await call<{ grants: Grant[] }>("/v1/claim", ask, { "idempotency-key": key });
    key = randomUUID();
    for (const grant of grants) await run(grant);
    if (process.env.ONCE && grants.length) break;
  } catch (error) {
    console.error(`cannot claim: ${said(error)}`);
    await new Promise((resume) => setTimeout(resume, 1_000));
  }
}
