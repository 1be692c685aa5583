"""Looks at the audit log: pages, newest first. Damaged rows met are set aside.

Changes nothing else. Plain calls, made from the store's thread.
"""

from __future__ import annotations

import sqlite3
from typing import Any, Final

from jobd.model.storage import AuditQuery, AuditRows
from jobd.storage import codec
from jobd.storage.audit_writer import AUDIT_SQL
from jobd.storage.codec import AUDIT_COLUMNS, fault
from jobd.storage.database import Tables, is_corrupt
from jobd.storage.quarantine import set_rows_aside

_NO_LIMIT: Final = 1 << 62


def read_audit(tables: Tables, query: AuditQuery) -> AuditRows:
    """See Storage.audit: at most `scan` rows are looked at."""
    tables.check()
    try:
        return _audit_page(tables, query)
    except sqlite3.DatabaseError as error:
        if not is_corrupt(error):
            raise
        tables.faults.append(f"the audit log cannot be read: {error}; run `jobd doctor`")
        return AuditRows([])


def _audit_page(tables: Tables, query: AuditQuery) -> AuditRows:
    scope_args: tuple[Any, ...] = ()
    scope = "NOT INDEXED WHERE true"
    if query.job_id is not None:
        scope, scope_args = "INDEXED BY audit_job WHERE job_id = ?", (query.job_id,)
    filters, args = _audit_conditions(query)
    begin = _NO_LIMIT if query.before is None else query.before
    edge_sql = f"SELECT seq FROM audit {scope} AND seq < ? ORDER BY seq DESC LIMIT 1 OFFSET ?"
    edge = tables.conn.execute(edge_sql, (*scope_args, begin, query.scan - 1)).fetchone()
    end = 0 if edge is None else edge[0]
    inner = f"SELECT seq AS found FROM audit {scope} AND seq < ? AND seq >= ? ORDER BY seq DESC"
    sql = (
        f"SELECT {AUDIT_SQL} FROM ({inner}) CROSS JOIN audit NOT INDEXED ON seq = found "
        f"WHERE true{filters} ORDER BY found DESC LIMIT ?"
    )
    matched = tables.rows(sql, (*scope_args, begin, end, *args, query.limit + 1))
    shown = matched[: query.limit]
    next_before = None
    if len(matched) > len(shown):
        next_before = shown[-1][0]
    elif edge is not None:
        more = tables.conn.execute(f"SELECT 1 FROM audit {scope} AND seq < ?", (*scope_args, end)).fetchone()
        next_before = None if more is None else end
    damaged = [(row[0], row, wrong) for row in shown if (wrong := fault(row)) is not None]
    set_rows_aside(tables, "audit", (*AUDIT_COLUMNS, "crc"), damaged)
    return AuditRows([(row[0], codec.audited(row)) for row in shown if fault(row) is None], next_before)


def _audit_conditions(query: AuditQuery) -> tuple[str, tuple[Any, ...]]:
    """Which rows match, as SQL and its values."""
    wanted = {"who = ?": query.who, "what = ?": query.what, "job_id = ?": query.job_id, "at >= ?": query.since}
    wanted = {condition: value for condition, value in wanted.items() if value is not None}
    return "".join(f" AND {condition}" for condition in wanted), tuple(wanted.values())
