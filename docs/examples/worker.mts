// A jobd worker in TypeScript without dependencies. Node.js 22.18 or newer runs this file unchanged.
//
//   node docs/examples/worker.mts                          over the Unix socket (JOBD_SOCKET, /run/jobd/worker.sock)
//   JOBD_URL=http://127.0.0.1:8771 JOBD_WORKER_TOKEN_FILE=…  node docs/examples/worker.mts     over TCP, with fetch
//
// JOBD_URL may have the URLs of all nodes of a cluster, separated by commas. Calls then go to the node that leads.
// It works on jobs of the queue `default`, one at a time, and continues a job where its last attempt stopped. On SIGTERM it
// finishes the current job, then exits (within 5 s if it is idle). With ONCE=1 it exits after one job. It extends the lock
// while it works, and stops working if the lock is lost.

import { randomUUID } from "node:crypto";
import { readFileSync } from "node:fs";
import { request } from "node:http";
import { hostname } from "node:os";

type Json = null | boolean | number | string | Json[] | { [key: string]: Json };
type Job = {
  id: string; queue: string; kind: string; payload: Json; attempt: number;
  headers?: Record<string, string>; // what the creator sent, such as a trace
  checkpoint?: Json; // of an earlier attempt
};
type Grant = { job: Job; lock_id: string; fencing_token: number; ttl_ms: number };

const socketPath = process.env.JOBD_SOCKET ?? "/run/jobd/worker.sock";
const urls = (process.env.JOBD_URL ?? "").split(",").filter(Boolean).map((url) => new URL(url.trim()).origin);
let current = 0; // index of the node that served the last call
const tokenFile = process.env.JOBD_WORKER_TOKEN_FILE;
const token = tokenFile && readFileSync(tokenFile, "utf8").trim().split("\n")[0];
const worker = `${hostname()}-${process.pid}`;

/** An error response. `code` is stable (`lock_lost`, `already_locked`, …); the message is for people. */
class ApiError extends Error {
  code: string;
  leader?: string; // URL of the node that leads, after `not_leader`
  constructor(code: string, message: string, details?: { leader?: string }) {
    super(message);
    this.code = code;
    this.leader = details?.leader;
  }
}

/** Whether the call may succeed later, or on another node. */
const isTemporary = (error: unknown) =>
  !(error instanceof ApiError) || ["not_leader", "overloaded", "shutting_down", "outcome_unknown"].includes(error.code);

/**
 * Make one call. Rejects with ApiError for an error response, and with another error if the daemon is not reachable.
 * With several URLs, the other nodes are tried first. This is safe: repeated endings and claims get the same response.
 */
async function call<T>(path: string, body: object, headers: Record<string, string> = {}): Promise<T> {
  headers = { "content-type": "application/json", ...headers };
  if (token) headers.authorization = `Bearer ${token}`;
  for (let left = urls.length; ; left--) {
    const node = current;
    try {
      const text = JSON.stringify(body);
      const response = JSON.parse(urls.length ? await overTcp(node, path, text, headers) : await overSocket(path, text, headers));
      if (!response.success) throw new ApiError(response.error, response.message, response.details);
      return response.data as T;
    } catch (error) {
      if (urls.length > 1 && isTemporary(error) && node === current) current = nodeAfter(node, error);
      if (left < 1 || urls.length < 2 || !isTemporary(error)) throw error;
    }
  }
}

/** The node to try next: the leader that the response names if its URL is in the list, else the next of the list. */
function nodeAfter(node: number, error: unknown): number {
  const leader = error instanceof ApiError && error.leader ? urls.indexOf(new URL(error.leader).origin) : -1;
  return leader >= 0 ? leader : (node + 1) % urls.length;
}

async function overTcp(node: number, path: string, body: string, headers: Record<string, string>): Promise<string> {
  const signal = AbortSignal.timeout(15_000); // a claim waits 5 s
  return (await fetch(new URL(path, urls[node]), { method: "POST", body, headers, signal })).text();
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

/** Repeat a call until there is a response. This is safe: a repeated ending gets the same response. */
async function callWithRetry<T>(path: string, body: object): Promise<T> {
  for (let pause = 100; ; pause = Math.min(pause * 2, 5_000)) {
    try {
      return await call<T>(path, body);
    } catch (error) {
      if (!isTemporary(error)) throw error;
      await new Promise((resume) => setTimeout(resume, pause));
    }
  }
}

const messageOf = (error: unknown) => (error instanceof Error && error.message) || String(error);

/** The work itself. It continues at the checkpoint. `report` reports progress. `lost` fires when the lock is lost: stop, and write nothing more. */
async function work(job: Job, report: (percent: number, message: string, checkpoint: Json) => Promise<void>, lost: AbortSignal) {
  const numbers = Array.isArray(job.payload) ? job.payload.map(Number) : [];
  let { done, sum } = (job.checkpoint ?? { done: 0, sum: 0 }) as { done: number; sum: number };
  while (done < numbers.length) {
    if (lost.aborted) throw lost.reason;
    const number = numbers[done++];
    sum += number;
    await report(Math.floor((100 * done) / numbers.length), `added ${number}`, { done, sum });
  }
  return { metadata: { sum, count: numbers.length } };
}

async function run(grant: Grant) {
  const { job, lock_id, ttl_ms } = grant;
  const at = `/v1/jobs/${encodeURIComponent(job.id)}`;
  const lost = new AbortController();
  const renew = async (verb: string, body: object) => {
    try {
      await call(`${at}/${verb}`, { lock_id, ...body });
    } catch (error) {
      if (isTemporary(error)) return; // the lock is still live, and the next call may succeed
      lost.abort(error);
    }
  };
  const timer = setInterval(() => void renew("extend", {}), ttl_ms / 3);
  try {
    const report = (progress: number, message: string, checkpoint: Json) => renew("progress", { progress, message, checkpoint });
    const result = await work(job, report, lost.signal);
    await callWithRetry(`${at}/complete`, { lock_id, ...result });
    console.log(`${job.id} completed ${job.headers?.trace ?? ""}`);
  } catch (error) {
    if (lost.signal.aborted || (error instanceof ApiError && error.code === "lock_lost")) {
      console.error(`${job.id} lost its lock: ${messageOf(error)}`);
      return;
    }
    await callWithRetry(`${at}/fail`, { lock_id, error_message: messageOf(error).slice(0, 4096) });
    console.error(`${job.id} failed: ${messageOf(error)}`);
  } finally {
    clearInterval(timer);
  }
}

let key = randomUUID(); // idempotency key of the claim: if the response is lost, the repeat gets the same grants
let stopping = false;
process.on("SIGTERM", () => (stopping = true));
process.on("SIGINT", () => (stopping = true));

while (!stopping) {
  try {
    // stall_after_ms 0: this worker extends its locks, so an expired lock means that it is dead.
    // progress_timeout_ms 0: no progress timeout, so work without progress reports can take long.
    const ask = { worker, lock_ttl_ms: 60_000, stall_after_ms: 0, progress_timeout_ms: 0, wait_ms: 5_000 };
    const { grants } = await call<{ grants: Grant[] }>("/v1/claim", ask, { "idempotency-key": key });
    key = randomUUID();
    for (const grant of grants) await run(grant);
    if (process.env.ONCE && grants.length) break;
  } catch (error) {
    console.error(`cannot claim: ${messageOf(error)}`);
    await new Promise((resume) => setTimeout(resume, 1_000));
  }
}
