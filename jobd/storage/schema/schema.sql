-- The tables of a store at the current VERSION of migrations.py.
-- There are no rules about jobs here, so that invalid rows stay readable: core/validation.py checks values.
--
-- `crc` is the CRC-32 of all other columns of its row (codec.py). Times named *_at are Unix milliseconds, those named
-- *_lock_ms are lock time (engine/clock.py). To edit a row: stop the daemon, then run `jobd doctor --accept ID`.

CREATE TABLE meta (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    schema_version INTEGER NOT NULL,
    epoch INTEGER NOT NULL,            -- the upper part of fencing tokens; 0: no epoch yet
    next_token INTEGER NOT NULL,       -- the counter (24 bits) of the next fencing token; next_*: the next number to assign
    next_job INTEGER NOT NULL,
    next_event INTEGER NOT NULL,
    lock_ms INTEGER NOT NULL,
    wall_ms INTEGER NOT NULL,
    clock_suspect INTEGER NOT NULL,    -- 1: the wall clock has jumped ahead; wall_ms is the expected time
    expected_ms INTEGER NOT NULL,      -- the expected wall time, which a clock that was set back is behind
    step_since INTEGER NOT NULL,       -- while the clock is suspect: the last trusted time (Unix ms) before its step
    step_ms INTEGER NOT NULL,          -- and by how much it was set ahead then
    live_count INTEGER NOT NULL,       -- queued and processing jobs, and the XOR of their crc
    live_xor INTEGER NOT NULL,
    finished_count INTEGER NOT NULL,   -- all others
    finished_xor INTEGER NOT NULL,
    marked INTEGER NOT NULL,           -- of a backup the first record that may remove the mark, else 0. The daemon
                                       -- that opens it begins a new epoch and ends its grants
    events_gone_to INTEGER NOT NULL,   -- events up to this one may be missing; above it the journal is complete
    projected_to INTEGER NOT NULL,     -- the tables have the records of the journal up to this number
    crc INTEGER NOT NULL
) STRICT;

-- Committed batches that the tables lack. A slice that writes the tables deletes its records.
CREATE TABLE journal (
    number INTEGER PRIMARY KEY,
    first_event INTEGER NOT NULL,
    last_event INTEGER NOT NULL,
    epoch INTEGER NOT NULL,
    at INTEGER NOT NULL,
    body BLOB NOT NULL,                -- journal/record.py
    crc INTEGER NOT NULL
) STRICT;

-- The columns that are searched, and all other fields in `body`, which is JSON text (codec.JobBody).
CREATE TABLE jobs (
    seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL,
    status TEXT NOT NULL,
    expires_at INTEGER,
    finished_at INTEGER,
    worker TEXT,                       -- of the latest grant, which is in `body`
    storage_key TEXT,
    error_message TEXT,
    error_code TEXT,
    created_at INTEGER NOT NULL,
    queue TEXT NOT NULL,
    kind TEXT NOT NULL,
    body TEXT NOT NULL,
    crc INTEGER NOT NULL
) STRICT;
CREATE UNIQUE INDEX jobs_id ON jobs (id);
CREATE INDEX jobs_live ON jobs (status) WHERE status IN ('queued', 'processing');
-- For searches by operators. Completed jobs are not in it.
CREATE INDEX jobs_failed ON jobs (status) WHERE status IN ('failed', 'cancelled');
-- NOT IN these two, because SQLite builds a temporary table for each row for a list of three.
CREATE INDEX jobs_expiry ON jobs (expires_at) WHERE expires_at IS NOT NULL AND status NOT IN ('queued', 'processing');
-- For lists of finished jobs, which are in the order of their ends. Edited rows may have none.
CREATE INDEX jobs_finished ON jobs (status, ifnull(finished_at, 0)) WHERE status NOT IN ('queued', 'processing');
-- For jobs that name an artifact. Other jobs are not in it.
CREATE INDEX jobs_storage_key ON jobs (storage_key) WHERE storage_key IS NOT NULL;

CREATE TABLE payloads (
    job_seq INTEGER PRIMARY KEY,
    body BLOB NOT NULL,                -- JSON text
    request_hash TEXT NOT NULL,
    crc INTEGER NOT NULL
) STRICT;

-- Of the jobs whose `extra` says that they have some. JSON text.
CREATE TABLE headers (job_seq INTEGER PRIMARY KEY, body BLOB NOT NULL, crc INTEGER NOT NULL) STRICT;
CREATE TABLE checkpoints (job_seq INTEGER PRIMARY KEY, body BLOB NOT NULL, crc INTEGER NOT NULL) STRICT;

-- Results submitted after their grant had ended: one per grant, a few per job. seq is that of the event.
CREATE TABLE late_results (
    seq INTEGER PRIMARY KEY,
    job_seq INTEGER NOT NULL,
    at INTEGER NOT NULL,
    worker TEXT NOT NULL,
    fencing_token INTEGER NOT NULL,
    body_hash TEXT NOT NULL,
    expires_at INTEGER,                -- as asked for
    download_url TEXT,
    file_path TEXT,
    storage_key TEXT,
    metadata BLOB,                     -- JSON text
    crc INTEGER NOT NULL
) STRICT;
CREATE INDEX late_results_job ON late_results (job_seq);
CREATE INDEX late_results_storage_key ON late_results (storage_key) WHERE storage_key IS NOT NULL;

-- Events of one job whose numbers are less than 1,000 apart: several of one slice, or one that is large.
CREATE TABLE events (
    seq INTEGER PRIMARY KEY,           -- the numbers of its first and last event
    last INTEGER NOT NULL,
    job_seq INTEGER NOT NULL,          -- 0: one event that concerns a queue
    at INTEGER NOT NULL,               -- of the first event
    body BLOB NOT NULL,                -- the events: event_rows.py
    crc INTEGER NOT NULL
) STRICT;
CREATE INDEX events_job ON events (job_seq);

-- crc covers response_crc instead of response, so that keys can be verified without reading the stored responses.
CREATE TABLE keys (
    digest TEXT PRIMARY KEY NOT NULL,
    body_hash TEXT NOT NULL,
    at INTEGER NOT NULL,
    status INTEGER NOT NULL,
    grants BLOB,                       -- JSON text: pairs of job id and lock id
    response_crc INTEGER,
    crc INTEGER NOT NULL,
    response BLOB
) STRICT;

CREATE TABLE queues (
    name TEXT PRIMARY KEY NOT NULL,
    paused INTEGER NOT NULL,
    completed INTEGER NOT NULL,
    failed INTEGER NOT NULL,
    cancelled INTEGER NOT NULL,
    paused_at INTEGER,                 -- the pause: start, operator, reason, end
    paused_by TEXT,
    pause_reason TEXT,
    paused_until INTEGER,
    crc INTEGER NOT NULL
) STRICT;

-- Workers that get no jobs: those that match host, version and queue (null: any).
CREATE TABLE quiet_rules (
    id TEXT PRIMARY KEY NOT NULL,
    host TEXT,
    version TEXT,
    queue TEXT,
    reason TEXT NOT NULL,
    author TEXT NOT NULL,
    at INTEGER NOT NULL,
    until INTEGER,
    crc INTEGER NOT NULL
) STRICT;

CREATE TABLE schedules (
    id TEXT PRIMARY KEY NOT NULL,
    body BLOB NOT NULL,
    crc INTEGER NOT NULL
) STRICT;

CREATE TABLE reports (
    seq INTEGER PRIMARY KEY,
    body BLOB NOT NULL,
    crc INTEGER NOT NULL
) STRICT;

CREATE TABLE figures (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    body BLOB NOT NULL,
    crc INTEGER NOT NULL
) STRICT;

-- Jobs with imported or edited rows that are not validated yet.
CREATE TABLE suspects (job_seq INTEGER PRIMARY KEY) STRICT;

-- Deleted jobs whose journal is still kept.
CREATE TABLE deleted_jobs (
    job_seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL,
    at INTEGER NOT NULL
) STRICT;
CREATE INDEX deleted_jobs_at ON deleted_jobs (at);

-- Artifacts of deleted jobs and late results: to be deleted unless another job names the key.
CREATE TABLE tombstones (
    job_seq INTEGER PRIMARY KEY,       -- for a late result its own seq, negative
    job_id TEXT NOT NULL,
    key TEXT NOT NULL,                 -- the storage_key
    at INTEGER NOT NULL,               -- when the job or the late result was deleted
    due_at INTEGER NOT NULL,           -- when the next attempt is due
    tries INTEGER NOT NULL,            -- failed attempts
    crc INTEGER NOT NULL
) STRICT;
CREATE INDEX tombstones_due ON tombstones (due_at);

-- The audit log: actions of operators and their errors, limited by age and number.
CREATE TABLE audit (
    seq INTEGER PRIMARY KEY,
    at INTEGER NOT NULL,
    who TEXT NOT NULL,                 -- the name given by the operator, else admin
    address TEXT NOT NULL,             -- where the request came from
    what TEXT NOT NULL,
    job_id TEXT,
    queue TEXT,
    reason TEXT,
    outcome TEXT NOT NULL,             -- done, or the error code
    jobs INTEGER NOT NULL,             -- number of changed jobs
    details BLOB,                      -- JSON text
    part_of TEXT,                      -- the import or plan whose commands share this row
    crc INTEGER NOT NULL
) STRICT;
CREATE INDEX audit_job ON audit (job_id) WHERE job_id IS NOT NULL;

-- The changed jobs of actions on many jobs: a row for each job and action.
CREATE TABLE audit_jobs (
    seq INTEGER PRIMARY KEY,
    audit_seq INTEGER NOT NULL,        -- of the row in audit
    job_id TEXT NOT NULL,
    crc INTEGER NOT NULL
) STRICT;
CREATE INDEX audit_jobs_job ON audit_jobs (job_id);

-- The position of each webhook in the journal: deliveries exist for all wanted events up to `position`.
CREATE TABLE webhooks (
    name TEXT PRIMARY KEY NOT NULL,
    position INTEGER NOT NULL,
    gone_to INTEGER NOT NULL,          -- it got messages about all gaps up to this event
    next_delivery INTEGER NOT NULL,    -- the highest of all rows is the next delivery id
    alerts BLOB NOT NULL,              -- JSON text: firing alerts that were sent to it, and since when they fire
    updated_at INTEGER NOT NULL,
    crc INTEGER NOT NULL
) STRICT;

-- Messages waiting for delivery to a webhook, and the latest ones that were delivered or failed permanently.
CREATE TABLE deliveries (
    id INTEGER PRIMARY KEY,
    endpoint TEXT NOT NULL,            -- the name of the webhook
    state TEXT NOT NULL,
    subject TEXT NOT NULL,             -- messages of one subject are delivered in order
    type TEXT NOT NULL,
    message_id TEXT NOT NULL,
    seq INTEGER NOT NULL,              -- of the event in the journal; 0: not an event
    at INTEGER NOT NULL,
    due_at INTEGER NOT NULL,
    tries INTEGER NOT NULL,
    ended_at INTEGER,
    status INTEGER,                    -- HTTP status of the last response
    error TEXT,
    body BLOB NOT NULL,                -- JSON text as sent
    crc INTEGER NOT NULL
) STRICT;
CREATE INDEX deliveries_place ON deliveries (endpoint, state, id);

-- Damaged jobs: `row` is the row as JSON (column to value, with the fields of `body`; bytes as {"hex": ...}).
CREATE TABLE quarantined_jobs (
    seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL,
    reason TEXT NOT NULL,
    at INTEGER NOT NULL,
    row TEXT NOT NULL,
    payload BLOB,
    request_hash TEXT
) STRICT;

-- Damaged rows of other tables.
CREATE TABLE bad_rows (
    seq INTEGER PRIMARY KEY,
    place TEXT NOT NULL,
    what TEXT NOT NULL,
    at INTEGER NOT NULL,
    row TEXT NOT NULL
) STRICT;

-- For a store that belongs to a cluster: the id of its journal, the checksum of the last record in the tables, and the
-- highest timeline of PostgreSQL that the node has seen.
CREATE TABLE cluster (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    cluster_id TEXT NOT NULL,
    record_crc INTEGER,                -- null: none yet
    timeline INTEGER NOT NULL,
    crc INTEGER NOT NULL
) STRICT;

CREATE TABLE probes (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    value BLOB NOT NULL
) STRICT;
