"""Generate config.toml and the tables of docs/configuration.md from the classes of the configuration.

`python -m tests.support.config_reference` rewrites both files. A test fails if one of them is out of date.
The text of each key is the docstring below its field: the first line goes into both files, the rest into the table.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from pathlib import Path
from typing import Final, NamedTuple

from msgspec import NODEFAULT, Struct, structs

from jobd.config import RELOADABLE, WEBHOOKS, Config, to_toml
from jobd.webhooks.config import WebhookSection

ROOT: Final = Path(__file__).parent.parent.parent
EXAMPLE: Final = ROOT / "config.toml"
REFERENCE: Final = ROOT / "docs/configuration.md"
COMMAND: Final = "python -m tests.support.config_reference"

BEGIN: Final = f"<!-- generated from jobd/config.py by `{COMMAND}` -->\n"
END: Final = "<!-- end of the generated part -->\n"

HEADER: Final = """\
# Configuration of jobd: every key with its default. Uncomment the keys that you change.
# Durations are strings ("500ms", "10s", "15m", "1h", "7d"), sizes are bytes.
# Environment variables (JOBD_LOCKS_TTL=20m) override this file; flags of `jobd serve` override both.
# `jobd check-config` prints the effective configuration and the source of each value.
# docs/configuration.md describes every key in full.
"""
FOOTER: Final = """\
# Receivers of signed HTTP messages about events and problems. Each webhook has its own block:
#
#   [[webhooks]]
"""
WEBHOOK: Final = {
    "name": '"billing"',
    "url": '"https://example.com/hook"',
    "secret": '"whsec_…"',
    "secret_file": '"/etc/jobd/billing"',
}


class Key(NamedTuple):
    """A field of a section: its default as TOML writes it, and its docstring in two parts."""

    name: str
    default: str
    summary: str
    details: str


def keys(section: type[Struct]) -> list[Key]:
    """Return the fields of `section` in order. Raises KeyError if one has no docstring."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(tree, ast.ClassDef)
    described: dict[str, str] = {}
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            described[field.target.id] = inspect.cleandoc(ast.literal_eval(text.value))
    found = []
    for field_info in structs.fields(section):
        summary, _, details = described[field_info.name].partition("\n\n")
        found.append(Key(field_info.name, default(field_info), summary, " ".join(details.split())))
    return found


def default(field_info: structs.FieldInfo) -> str:
    if field_info.default is not NODEFAULT:
        return to_toml(field_info.default)
    return "" if field_info.default_factory is NODEFAULT else to_toml(field_info.default_factory())


def sections() -> list[tuple[str, type[Struct]]]:
    return [(field.name, type(field.default)) for field in structs.fields(Config)]


def lead(section: type[Struct]) -> str:
    """Return the first line of the section's docstring."""
    return (inspect.getdoc(section) or "").partition("\n")[0]


def example() -> str:
    """Return the text of config.toml."""
    lines = [HEADER]
    for name, section in sections():
        lines += [f"# {plain(lead(section))}", f"[{name}]"]
        for key in keys(section):
            lines += [f"# {plain(key.summary)}", f"#{key.name} = {key.default}"]
        lines.append("")
    lines.append(FOOTER.rstrip("\n"))
    for key in keys(WebhookSection):
        lines += [f"#   # {plain(key.summary)}", f"#   {key.name} = {WEBHOOK.get(key.name, key.default)}"]
    return "\n".join(lines) + "\n"


def plain(text: str) -> str:
    return text.replace("`", "")


def tables() -> str:
    """Return the generated part of docs/configuration.md."""
    lines = []
    for name, section in sections():
        lines += [
            f"### `[{name}]`",
            "",
            lead(section),
            "",
            "| key | default | reload | description |",
            "| --- | --- | --- | --- |",
        ]
        for key in keys(section):
            reload = "yes" if f"{name}.{key.name}" in RELOADABLE else ""
            lines.append(
                f"| `{name}.{key.name}` | `{key.default}` | {reload} | {described(key)} |".replace("|  |", "| |")
            )
        lines.append("")
    lines += [
        f"### `[[{WEBHOOKS}]]`",
        "",
        "Receivers of [webhooks](operations.md#webhooks). All keys are reloadable.",
        "",
    ]
    lines += ["| key of a webhook | default | description |", "| --- | --- | --- |"]
    lines += [f"| `{key.name}` | {ticked(key.default)} | {described(key)} |" for key in keys(WebhookSection)]
    return "\n".join([*lines, ""])


def described(key: Key) -> str:
    return f"{key.summary} {key.details}".strip()


def ticked(text: str) -> str:
    return f"`{text}`" if text else "required"


def reference() -> str:
    """Return the text of docs/configuration.md with its generated part replaced."""
    before, _, rest = REFERENCE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{tables()}\n{END}{after}"


def generated() -> dict[Path, str]:
    """Return each generated file with the text that it must have."""
    return {EXAMPLE: example(), REFERENCE: reference()}


def main() -> None:
    """Write the generated files."""
    for file, text in generated().items():
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
