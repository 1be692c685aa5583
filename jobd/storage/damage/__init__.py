"""Damaged rows: find them, move them to quarantine, and prove damage of the write-ahead log."""
