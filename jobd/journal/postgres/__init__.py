"""The shared journal in PostgreSQL. It needs asyncpg, the extra `postgres`."""
