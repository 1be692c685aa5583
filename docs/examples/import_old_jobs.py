#!/usr/bin/env python3
"""Turn an old, hand-written job table (a SQLite file or a CSV dump) into lines for `jobctl import`.

    python3 import_old_jobs.py old.db --table jobs | jobctl import -
    python3 import_old_jobs.py jobs.csv --map kind=type --status running=processing --timezone local | jobctl import -

Nothing is changed in the old table. Lines go to stdout; rows that cannot be read are named on stderr and left out
(the exit code is 1 then). Run it as often as you like: an id that exists in jobd already is skipped by the import.

Uses the standard library alone, so that you can copy it and bend it to your table.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sqlite3
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# What old tables call a field of jobd; the first column that exists is taken. --map FIELD=COLUMN overrides.
COLUMNS = {
    "id": ["id", "job_id", "jobId", "uuid"],
    "queue": ["queue", "queue_name"],
    "kind": ["kind", "type", "job_type", "jobType", "name"],
    "payload": ["payload", "data", "params", "input"],
    "status": ["status", "state"],
    "progress": ["progress", "percent"],
    "progress_message": ["progress_message", "message"],
    "attempt": ["attempt", "attempts", "tries"],
    "max_attempts": ["max_attempts", "maxAttempts"],
    "priority": ["priority"],
    "created_at": ["created_at", "createdAt", "created"],
    "updated_at": ["updated_at", "updatedAt", "updated"],
    "run_at": ["run_at", "scheduled_at", "runAt"],
    "started_at": ["started_at", "startedAt", "processing_started_at"],
    "finished_at": ["finished_at", "completed_at", "completedAt", "finishedAt"],
    "expires_at": ["expires_at", "expiresAt"],
    "worker": ["worker", "locked_by", "lockedBy", "worker_id"],
    "download_url": ["download_url", "downloadUrl", "result_url"],
    "file_path": ["file_path", "filePath", "output_path"],
    "storage_key": ["storage_key", "storageKey"],
    "metadata": ["metadata", "meta", "result"],
    "error_message": ["error_message", "errorMessage", "error"],
    "error_code": ["error_code", "errorCode"],
}
STATUSES = {
    "queued": "queued",
    "pending": "queued",
    "waiting": "queued",
    "new": "queued",
    "processing": "processing",
    "running": "processing",
    "in_progress": "processing",
    "active": "processing",
    "completed": "completed",
    "complete": "completed",
    "done": "completed",
    "success": "completed",
    "failed": "failed",
    "error": "failed",
    "cancelled": "cancelled",
    "canceled": "cancelled",
}
JSON_FIELDS = {"payload", "metadata"}
WHOLE_NUMBERS = {"attempt", "max_attempts", "priority"}


def read_sqlite(path: Path, table: str) -> Iterator[dict[str, Any]]:
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as db:
        db.row_factory = sqlite3.Row
        quoted = table.replace('"', '""')
        for row in db.execute(f'SELECT * FROM "{quoted}"'):  # an identifier cannot be a parameter
            yield dict(row)


def read_csv(path: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(1 << 24)
    with path.open(newline="", encoding="utf-8-sig") as file:
        yield from csv.DictReader(file)


def to_ms(value: Any, zone: str) -> int:
    """Unix milliseconds from a number (seconds or milliseconds) or an ISO text; `zone` where the text has none."""
    text = str(value).strip()
    if re.fullmatch(r"\d+(\.\d+)?", text):
        number = float(text)
        return round(number if number >= 1e11 else number * 1000)  # 10^11 ms is 1973: below that it is seconds
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC) if zone == "utc" else moment.astimezone()
    return round(moment.timestamp() * 1000)


def to_json(value: Any) -> Any:
    """JSON text as its value; any other text stays a text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def convert(row: Mapping[str, Any], columns: Mapping[str, list[str]], statuses: Mapping[str, str], zone: str) -> dict:
    """One old row as one line of an import. ValueError says what is wrong with it."""
    job: dict[str, Any] = {}
    for field, names in columns.items():
        value = next((row[name] for name in names if name in row), None)
        if value is None or value == "":
            continue
        try:
            job[field] = _value(field, value, zone)
        except ValueError as error:
            raise ValueError(f"{field}: {value!r} cannot be read ({error})") from None
    if "id" not in job:
        raise ValueError("no id: name its column with --map id=COLUMN")
    old = str(job.get("status", "queued"))
    if old.lower() not in statuses:
        raise ValueError(f"unknown status {old!r}: add --status {old}=queued (or what it means)")
    job["status"] = statuses[old.lower()]
    return job


def _value(field: str, value: Any, zone: str) -> Any:
    if field.endswith("_at"):
        return to_ms(value, zone)
    if field in WHOLE_NUMBERS:
        return int(value)
    if field == "progress":
        return float(value)
    if field in JSON_FIELDS:
        return to_json(value)
    return str(value)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a SQLite file, or a CSV file with a line of column names")
    parser.add_argument("--table", default="jobs", help="table of the SQLite file (default: jobs)")
    parser.add_argument("--map", action="append", default=[], metavar="FIELD=COLUMN", help="may be repeated")
    parser.add_argument("--status", action="append", default=[], metavar="OLD=NEW", help="may be repeated")
    parser.add_argument("--timezone", choices=["utc", "local"], default="utc", help="of times without one")
    return parser.parse_args(argv)


def split_pairs(pairs: list[str]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            sys.exit(f"import_old_jobs: {pair!r} is no NAME=NAME")
    return dict(pair.split("=", 1) for pair in pairs)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    columns = {**COLUMNS, **{field: [column] for field, column in split_pairs(args.map).items()}}
    unknown = set(columns) - set(COLUMNS)
    if unknown:
        sys.exit(f"import_old_jobs: jobd has no field {', '.join(sorted(unknown))}; it has {', '.join(COLUMNS)}")
    statuses = {**STATUSES, **{old.lower(): new for old, new in split_pairs(args.status).items()}}
    rows = read_csv(args.source) if args.source.suffix.lower() == ".csv" else read_sqlite(args.source, args.table)
    left_out = 0
    try:
        for number, row in enumerate(rows, start=1):
            try:
                print(json.dumps(convert(row, columns, statuses, args.timezone)))
            except ValueError as error:
                left_out += 1
                print(f"row {number} is left out: {error}", file=sys.stderr)
    except (OSError, sqlite3.Error, csv.Error) as error:
        sys.exit(f"import_old_jobs: cannot read {args.source}: {error}")
    return 1 if left_out else 0


if __name__ == "__main__":
    sys.exit(main())
