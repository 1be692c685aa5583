// Create, claim and complete with BullMQ, one connection pair for each of the loops: bullmq.mjs MODULES SOCKET LOOPS SECONDS
import { createRequire } from "node:module";

const [modules, path, loops, seconds] = process.argv.slice(2);
const { Queue, Worker } = createRequire(`${modules}/`)("bullmq");
const payload = "x".repeat(198);
const connection = { path, maxRetriesPerRequest: null };
const pairs = [];
for (let n = 0; n < Number(loops); n++) {
  const queue = new Queue("jobs", { connection });
  const worker = new Worker("jobs", null, { connection, autorun: false });
  await Promise.all([queue.waitUntilReady(), worker.waitUntilReady()]);
  pairs.push([queue, worker, `w-${n}`]);
}
const began = performance.now();
let done = 0;
await Promise.all(
  pairs.map(async ([queue, worker, token]) => {
    while (performance.now() - began < Number(seconds) * 1000) {
      await queue.add("job", payload);
      let job;
      while (!(job = await worker.getNextJob(token, { block: false })));
      await job.moveToCompleted(1, token, false);
      done++;
    }
  }),
);
console.log(JSON.stringify({ lifecycles_per_s: done / ((performance.now() - began) / 1000) }));
process.exit(0);
