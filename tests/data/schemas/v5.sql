-- The tables of a store, schema version 5: what every row holds.
-- No rule of a job is written here: which values make sense is judged by validation.py, so that a bad row can be read.
--
-- `crc` is the CRC-32 of all other columns of its row (rows.py). Times named *_at are Unix milliseconds,
-- those named *_lease_ms are lease time (clock.py). Editing a row by hand: stop the daemon, then `jobd doctor --accept ID`.

CREATE TABLE meta (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    schema_version INTEGER NOT NULL,
    epoch INTEGER NOT NULL,            -- the upper part of fencing tokens
    next_token INTEGER NOT NULL,       -- their counter; next_*: the next number to give
    next_job INTEGER NOT NULL,
    next_event INTEGER NOT NULL,
    lease_ms INTEGER NOT NULL,
    wall_ms INTEGER NOT NULL,
    live_count INTEGER NOT NULL,       -- jobs that are queued or processing, and the XOR of their crc
    live_xor INTEGER NOT NULL,
    finished_count INTEGER NOT NULL,   -- all others
    finished_xor INTEGER NOT NULL,
    marked INTEGER NOT NULL,           -- 1: a backup; who opens it takes a new epoch and ends all grants in it
    events_gone_to INTEGER NOT NULL,   -- events up to this one may be gone; above it the journal is whole
    crc INTEGER NOT NULL
) STRICT;

-- status and expires_at stand first: an update that leaves them alone touches no index.
CREATE TABLE jobs (
    seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL,
    status TEXT NOT NULL,
    expires_at INTEGER,
    queue TEXT NOT NULL,
    kind TEXT NOT NULL,
    priority INTEGER NOT NULL,
    max_attempts INTEGER NOT NULL,
    backoff_kind TEXT NOT NULL,
    backoff_base_ms INTEGER NOT NULL,
    backoff_max_ms INTEGER NOT NULL,
    backoff_jitter INTEGER NOT NULL,
    max_stalls INTEGER NOT NULL,
    on_stall TEXT NOT NULL,
    stuck_after_ms INTEGER,
    max_processing_ms INTEGER,
    created_at INTEGER NOT NULL,
    updated_at INTEGER NOT NULL,
    run_at INTEGER NOT NULL,
    progress REAL NOT NULL,
    progress_message TEXT,
    attempt INTEGER NOT NULL,
    stalls INTEGER NOT NULL,
    started_at INTEGER,
    finished_at INTEGER,
    lock_id TEXT,                      -- the grant: all of these or none
    fencing_token INTEGER,
    worker TEXT,
    acquired_at INTEGER,
    lock_ttl_ms INTEGER,
    lock_stuck_after_ms INTEGER,
    lock_max_processing_ms INTEGER,
    lock_expires_lease_ms INTEGER,     -- its deadlines: the first two and lock_cleared, or none
    silent_lease_ms INTEGER,
    ceiling_lease_ms INTEGER,
    lock_cleared INTEGER,
    ended_lock_id TEXT,                -- the last ended grant
    ended_fencing_token INTEGER,
    ended_worker TEXT,
    ended_at INTEGER,
    ended_rule TEXT,
    ended_reason TEXT,
    ended_verb TEXT,
    ended_body_hash TEXT,
    download_url TEXT,
    file_path TEXT,
    storage_key TEXT,
    metadata BLOB,                     -- JSON text
    error_message TEXT,
    error_code TEXT,
    crc INTEGER NOT NULL
) STRICT;
CREATE UNIQUE INDEX jobs_id ON jobs (id);
CREATE INDEX jobs_live ON jobs (status) WHERE status IN ('queued', 'processing');
CREATE INDEX jobs_expiry ON jobs (expires_at)
    WHERE expires_at IS NOT NULL AND status IN ('completed', 'failed', 'cancelled');
-- Whether any job names a stored object. A job that names none costs nothing here.
CREATE INDEX jobs_storage_key ON jobs (storage_key) WHERE storage_key IS NOT NULL;

CREATE TABLE payloads (
    job_seq INTEGER PRIMARY KEY,
    body BLOB NOT NULL,                -- JSON text
    request_hash TEXT NOT NULL,
    crc INTEGER NOT NULL
) STRICT;

-- What completes brought whose grants had ended: of each grant one, of each job a few. seq is that of its event.
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

CREATE TABLE events (
    seq INTEGER PRIMARY KEY,
    at INTEGER NOT NULL,
    type TEXT NOT NULL,
    job_seq INTEGER NOT NULL,          -- 0: the event concerns a queue
    job_id TEXT NOT NULL,
    queue TEXT NOT NULL,
    before TEXT,
    after TEXT,
    by TEXT NOT NULL,
    reason TEXT,
    details BLOB,                      -- JSON text, both
    changes BLOB,
    crc INTEGER NOT NULL
) STRICT;
CREATE INDEX events_job ON events (job_seq);

-- crc covers answer_crc in the place of answer, so that the keys can be checked without reading the answers.
CREATE TABLE keys (
    digest TEXT PRIMARY KEY NOT NULL,
    body_hash TEXT NOT NULL,
    at INTEGER NOT NULL,
    status INTEGER NOT NULL,
    grants BLOB,                       -- JSON text: pairs of job id and lock id
    answer_crc INTEGER,
    crc INTEGER NOT NULL,
    answer BLOB
) STRICT;

CREATE TABLE queues (
    name TEXT PRIMARY KEY NOT NULL,
    paused INTEGER NOT NULL,
    completed INTEGER NOT NULL,
    failed INTEGER NOT NULL,
    cancelled INTEGER NOT NULL,
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

-- Jobs whose rows were imported or edited: validation has not seen them yet.
CREATE TABLE suspects (job_seq INTEGER PRIMARY KEY) STRICT;

-- Jobs that are gone and whose journal is still kept.
CREATE TABLE deleted_jobs (
    job_seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL,
    at INTEGER NOT NULL
) STRICT;
CREATE INDEX deleted_jobs_at ON deleted_jobs (at);

-- Stored objects of jobs that are gone: to be deleted, unless another job names their key.
CREATE TABLE tombstones (
    job_seq INTEGER PRIMARY KEY,
    job_id TEXT NOT NULL,
    key TEXT NOT NULL,                 -- the storage_key of the job
    at INTEGER NOT NULL,               -- when the job was deleted
    due_at INTEGER NOT NULL,           -- when the object is looked at next
    tries INTEGER NOT NULL,            -- that have failed
    crc INTEGER NOT NULL
) STRICT;
CREATE INDEX tombstones_due ON tombstones (due_at);

-- What operators did, and what they were refused: kept for a time, and of it so many rows.
CREATE TABLE audit (
    seq INTEGER PRIMARY KEY,
    at INTEGER NOT NULL,
    who TEXT NOT NULL,                 -- the name that the operator gave, else admin
    address TEXT NOT NULL,             -- where the request came from
    what TEXT NOT NULL,
    job_id TEXT,
    queue TEXT,
    reason TEXT,
    outcome TEXT NOT NULL,             -- done, or the code of the refusal
    jobs INTEGER NOT NULL,             -- how many it changed
    details BLOB,                      -- JSON text
    part_of TEXT,                      -- what came in many commands is one row: the import, the plan
    crc INTEGER NOT NULL
) STRICT;
CREATE INDEX audit_job ON audit (job_id) WHERE job_id IS NOT NULL;

-- Jobs set aside: `row` is the job's row as JSON (column to value, bytes as {"hex": ...}).
CREATE TABLE quarantined_jobs (
    seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL,
    reason TEXT NOT NULL,
    at INTEGER NOT NULL,
    row TEXT NOT NULL,
    payload BLOB,
    request_hash TEXT
) STRICT;

-- Rows of other tables that were set aside.
CREATE TABLE bad_rows (
    seq INTEGER PRIMARY KEY,
    place TEXT NOT NULL,
    what TEXT NOT NULL,
    at INTEGER NOT NULL,
    row TEXT NOT NULL
) STRICT;

CREATE TABLE probes (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    value BLOB NOT NULL
) STRICT;
