"""The tokens that open the doors: where they are named, and what one has to be. No message holds a token.

Reads the files that hold them, and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

MIN_TOKEN: Final = 24
MAKE_TOKEN: Final = "python3 -c 'import secrets; print(secrets.token_urlsafe(32))'"


class InvalidToken(Exception):
    """Which token is none, and why, in one line."""


def admin_tokens(file: str, environ: Mapping[str, str]) -> tuple[str, ...]:
    """Those that open everything; none where nobody has set any. `file`: [admin] token_file. Raises BadToken."""
    if environ.get("ADMIN_TOKEN"):
        return (check_token(environ["ADMIN_TOKEN"], "ADMIN_TOKEN"),)
    if environ.get("ADMIN_TOKEN_FILE"):
        return read_tokens(environ["ADMIN_TOKEN_FILE"], "ADMIN_TOKEN_FILE")
    if file:
        return read_tokens(file, "[admin] token_file")
    credential = _credential(environ, "admin_token")
    return read_tokens(str(credential), "credential admin_token") if credential.is_file() else ()


def read_only_tokens(file: str, environ: Mapping[str, str], admin_tokens: tuple[str, ...]) -> tuple[str, ...]:
    """Tokens for who may look at everything and change nothing; none where nobody has set any. Raises BadToken."""
    credential = _credential(environ, "admin_readonly_token")
    if environ.get("ADMIN_READONLY_TOKEN_FILE"):
        path, where = environ["ADMIN_READONLY_TOKEN_FILE"], "ADMIN_READONLY_TOKEN_FILE"
    elif file:
        path, where = file, "[admin] readonly_token_file"
    elif credential.is_file():
        path, where = str(credential), "credential admin_readonly_token"
    else:
        return ()
    tokens = read_tokens(path, where)
    if set(tokens) & set(admin_tokens):
        raise InvalidToken(
            f"{where}: {path}: the admin token is in it too, and would open everything. Make another one"
        )
    return tokens


def read_tokens(path: str, where: str) -> tuple[str, ...]:
    """One token a line; two may be valid at once, so that they can be rotated. Raises BadToken."""
    try:
        lines = Path(path).read_text("ascii").splitlines()
    except UnicodeDecodeError:
        raise InvalidToken(f"{where}: {path}: a token is printable ASCII") from None
    except OSError as error:
        raise InvalidToken(f"{where}: {path}: cannot be read: {error.strerror}") from None
    tokens = tuple(check_token(line.strip(), f"{where}: {path}") for line in lines if line.strip())
    if not 1 <= len(tokens) <= 2:
        raise InvalidToken(f"{where}: {path}: expected one token, or two while you rotate them, one a line")
    return tokens


def check_token(token: str, where: str) -> str:
    """A token is at least 24 printable ASCII characters. It is never part of a message. Raises BadToken."""
    if len(token) < MIN_TOKEN:
        raise InvalidToken(f"{where}: the token is shorter than {MIN_TOKEN} characters. Make one with: {MAKE_TOKEN}")
    if not re.fullmatch(r"[!-~]+", token):
        raise InvalidToken(f"{where}: a token is printable ASCII without spaces. Make one with: {MAKE_TOKEN}")
    return token


def _credential(environ: Mapping[str, str], name: str) -> Path:
    return Path(environ.get("CREDENTIALS_DIRECTORY") or "/nonexistent") / name
