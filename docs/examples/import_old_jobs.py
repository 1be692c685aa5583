#!/usr/bin/env python3
"""Convert an old job table (a SQLite file or a CSV dump) into lines for `jobctl import`.

    python3 import_old_jobs.py old.db --table jobs | jobctl import -
    python3 import_old_jobs.py jobs.csv --map kind=task --status parked=queued --timezone local | jobctl import -
    python3 import_old_jobs.py old.db --map payload.url=source_url --map payload.size=width | jobctl import -

`--map payload.KEY=COLUMN` makes the payload an object and stores the column in it under KEY. Repeat it for more
columns. If there is a payload column too, it provides the other keys. `metadata.KEY` does the same for the metadata.
A column that contains JSON, such as a number in a CSV file, is read as JSON; any other text stays text.

The old table is not changed. Lines go to stdout. Columns that match no field are named on stderr. So are rows that
cannot be read; they are left out, and the exit code is 1. A BLOB that contains text is read as text; other bytes become
base64 in payload and metadata. You can run it repeatedly, because the import skips ids that jobd has already.

It uses the standard library only, so that you can copy it and adapt it to your table.
"""

from __future__ import annotations

import argparse
import base64
import csv
import json
import re
import signal
import sqlite3
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# Usual column names for each field of jobd; the first that exists is used. --map FIELD=COLUMN overrides them.
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
    "storage_key": ["storage_key", "storageKey", "r2Key", "r2_key"],
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


def read(source: Path, table: str) -> Iterator[Sequence[Any]]:
    """Yield the column names, then the values of each row. Exits if the source cannot be read."""
    try:
        yield from read_csv(source) if source.suffix.lower() == ".csv" else read_sqlite(source, table)
    except (OSError, sqlite3.Error, csv.Error, UnicodeError) as error:
        sys.exit(f"import_old_jobs: cannot read {source}: {error}")


def read_sqlite(path: Path, table: str) -> Iterator[Sequence[Any]]:
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as db:
        db.text_factory = bytes  # text that is not UTF-8 skips its row and does not end the run
        quoted = table.replace('"', '""')
        rows = db.execute(f'SELECT * FROM "{quoted}"')  # an identifier cannot be a parameter
        yield [column[0] for column in rows.description]
        yield from rows


def read_csv(path: Path) -> Iterator[Sequence[Any]]:
    csv.field_size_limit(1 << 24)
    with path.open(newline="", encoding="utf-8-sig") as file:
        yield from filter(None, csv.reader(file))  # without blank lines


def as_text(value: bytes) -> str | None:
    """Decode `value`. Returns None if it is not text."""
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


def to_ms(value: Any, zone: str) -> int:
    """Return Unix milliseconds of a number (seconds or milliseconds) or an ISO time; `zone` applies if it has none."""
    text = str(value).strip()
    if re.fullmatch(r"\d+(\.\d+)?", text):
        number = float(text)
        return round(number if number >= 1e11 else number * 1000)  # 10^11 ms is in 1973; smaller numbers are seconds
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC) if zone == "utc" else moment.astimezone()
    return round(moment.timestamp() * 1000)


def to_json(value: Any) -> Any:
    """Parse JSON text. Any other text stays text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, parse_constant=_no_json)
    except ValueError:
        return value


def _no_json(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def to_whole(value: Any) -> int:
    """Return an integer, also for a dump that writes it as 3.0."""
    try:
        return int(str(value))
    except ValueError:
        number = float(value)
    if not number.is_integer():
        raise ValueError("not an integer")
    return int(number)


def convert(row: Mapping[str, Any], taken: Mapping[str, str], statuses: Mapping[str, str], zone: str) -> dict[str, Any]:
    """Convert an old row into a job to import. Raises ValueError with the reason if it cannot be read."""
    job: dict[str, Any] = {}
    for target, column in taken.items():
        value = row.get(column)
        if isinstance(value, bytes):
            value = as_text(value) or value
        if value is None or value in ("", b""):
            continue
        field, _, key = target.partition(".")
        try:
            read_value = _value(field, value, zone)
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{target}: {value!r:.80} cannot be read ({error})") from None
        if not key:
            job[field] = read_value
        elif isinstance(into := job.setdefault(field, {}), dict):
            into[key] = read_value
        else:
            raise ValueError(f"{target}: the {field} column of this row is not a JSON object")
    if "id" not in job:
        raise ValueError("no id")
    old = str(job.get("status", "queued"))
    if old.lower() not in statuses:
        raise ValueError(f"unknown status {old!r}: add --status {old}=queued (or what it means)")
    job["status"] = statuses[old.lower()]
    return job


def _value(field: str, value: Any, zone: str) -> Any:
    if isinstance(value, bytes):
        if field not in JSON_FIELDS:
            raise ValueError("not text")
        return base64.b64encode(value).decode()
    if field.endswith("_at"):
        return to_ms(value, zone)
    if field in WHOLE_NUMBERS:
        return to_whole(value)
    if field == "progress":
        return float(value)
    if field in JSON_FIELDS:
        return to_json(value)
    return str(value)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a SQLite file, or a CSV file with a line of column names")
    parser.add_argument("--table", default="jobs", help="table of the SQLite file (default: jobs)")
    parser.add_argument(
        "--map",
        action="append",
        default=[],
        metavar="FIELD=COLUMN",
        help="may be repeated; payload.KEY=COLUMN and metadata.KEY=COLUMN put several columns into one field",
    )
    parser.add_argument("--status", action="append", default=[], metavar="OLD=NEW", help="may be repeated")
    parser.add_argument("--timezone", choices=["utc", "local"], default="utc", help="time zone of times without one")
    return parser.parse_args(argv)


def split_pairs(pairs: list[str]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            sys.exit(f"import_old_jobs: {pair!r} is not NAME=NAME")
    return dict(pair.split("=", 1) for pair in pairs)


def take(names: Sequence[str], mapped: dict[str, str]) -> dict[str, str]:
    """Return the column of each field. Names unused columns on stderr."""
    unknown = {name for name in mapped if not _is_known(name)}
    if unknown:
        known = ", ".join([*COLUMNS, *(f"{field}.KEY" for field in sorted(JSON_FIELDS))])
        sys.exit(f"import_old_jobs: jobd has no field {', '.join(sorted(unknown))}; it has {known}")
    absent = [column for column in mapped.values() if column not in names]
    if absent:
        sys.exit(f"import_old_jobs: there is no column {', '.join(absent)}; there are: {', '.join(names)}")
    # A column that is mapped to a key is not used for a field of the same name as well.
    keyed = {column for name, column in mapped.items() if "." in name}
    free = [name for name in names if name not in keyed]
    taken = {field: name for field, known in COLUMNS.items() for name in reversed(known) if name in free} | mapped
    taken = dict(sorted(taken.items(), key=lambda pair: "." in pair[0]))  # the payload column first, then its keys
    if "id" not in taken:
        sys.exit(f"import_old_jobs: no column is the id: add --map id=COLUMN; there are: {', '.join(names)}")
    ignored = [name for name in names if name not in taken.values()]
    if ignored:
        print(f"columns ignored: {', '.join(ignored)}", file=sys.stderr)
    return taken


def _is_known(name: str) -> bool:
    """Return whether the name before the `=` of --map is a field, or a key of a JSON field."""
    field, dot, key = name.partition(".")
    return field in COLUMNS and (not dot or (bool(key) and field in JSON_FIELDS))


def line_of(names: Sequence[str], values: Sequence[Any], *how: Any) -> str:
    """Convert a row to a line of JSON. Raises ValueError with the reason if it cannot be read."""
    if len(values) > len(names):
        raise ValueError("more values than columns")
    return json.dumps(convert(dict(zip(names, values, strict=False)), *how), allow_nan=False)


def shown_id(names: Sequence[str], values: Sequence[Any], column: str) -> str:
    value = dict(zip(names, values, strict=False)).get(column)
    if isinstance(value, bytes):
        value = as_text(value) or value.hex()
    return "no id" if value in (None, "") else f"id {value}"


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    mapped = split_pairs(args.map)
    statuses = {**STATUSES, **{old.lower(): new for old, new in split_pairs(args.status).items()}}
    rows = read(args.source, args.table)
    names = next(rows, [])
    taken = take(names, mapped)
    left_out = 0
    for number, values in enumerate(rows, start=1):
        try:
            print(line_of(names, values, taken, statuses, args.timezone))
        except ValueError as error:
            left_out += 1
            print(f"row {number} ({shown_id(names, values, taken['id'])}) is left out: {error}", file=sys.stderr)
    return 1 if left_out else 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # exit quietly in a pipe to `head`, as other tools do
    sys.exit(main())
