"""Serve the operator dashboard: HTML pages on the admin listener."""
