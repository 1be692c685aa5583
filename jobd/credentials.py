"""Read and check the tokens of the listeners. No error message contains a token."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

MIN_TOKEN: Final = 24
MAKE_TOKEN: Final = "python3 -c 'import secrets; print(secrets.token_urlsafe(32))'"


class InvalidToken(Exception):
    """A token is invalid. The message is one line: source and reason."""


def admin_tokens(file: str, environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return the admin tokens, () if none is configured. `file` is [admin] token_file. Raises InvalidToken."""
    if environ.get("ADMIN_TOKEN"):
        return (check_token(environ["ADMIN_TOKEN"], "ADMIN_TOKEN"),)
    found = _configured_file(environ, "ADMIN_TOKEN_FILE", file, "[admin] token_file", "admin_token")
    return () if found is None else read_tokens(*found)


def read_only_tokens(file: str, environ: Mapping[str, str], admin_tokens: tuple[str, ...]) -> tuple[str, ...]:
    """Return the read-only tokens, () if none is configured. `file` is [admin] readonly_token_file.

    Raises InvalidToken if one cannot be read or is also an admin token.
    """
    key = "[admin] readonly_token_file"
    found = _configured_file(environ, "ADMIN_READONLY_TOKEN_FILE", file, key, "admin_readonly_token")
    if found is None:
        return ()
    path, source = found
    tokens = read_tokens(path, source)
    if set(tokens) & set(admin_tokens):
        raise InvalidToken(
            f"{source}: {path}: it contains the admin token, which allows everything. Create another token"
        )
    return tokens


def read_tokens(path: str, source: str) -> tuple[str, ...]:
    """Read one token per line. Two may be valid at the same time, for rotation. Raises InvalidToken."""
    try:
        lines = Path(path).read_text("ascii").splitlines()
    except UnicodeDecodeError:
        raise InvalidToken(f"{source}: {path}: a token must be printable ASCII") from None
    except OSError as error:
        raise InvalidToken(f"{source}: {path}: cannot be read: {error.strerror}") from None
    tokens = tuple(check_token(line.strip(), f"{source}: {path}") for line in lines if line.strip())
    if not 1 <= len(tokens) <= 2:
        raise InvalidToken(f"{source}: {path}: expected one token, or two during a rotation, one per line")
    return tokens


def check_token(token: str, source: str) -> str:
    """Check that a token has at least 24 printable ASCII characters and return it. Raises InvalidToken."""
    if len(token) < MIN_TOKEN:
        raise InvalidToken(f"{source}: the token is shorter than {MIN_TOKEN} characters. Create one with: {MAKE_TOKEN}")
    if not re.fullmatch(r"[!-~]+", token):
        raise InvalidToken(f"{source}: a token must be printable ASCII without spaces. Create one with: {MAKE_TOKEN}")
    return token


def _configured_file(
    environ: Mapping[str, str], variable: str, file: str, key: str, credential: str
) -> tuple[str, str] | None:
    """Return the file of a token and its source: a variable, else a key of the configuration, else a credential."""
    if environ.get(variable):
        return environ[variable], variable
    if file:
        return file, key
    path = Path(environ.get("CREDENTIALS_DIRECTORY") or "/nonexistent") / credential
    return (str(path), f"credential {credential}") if path.is_file() else None
