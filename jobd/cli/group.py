"""What both programs' verbs share: the group whose help has sections, and the --json option."""

from __future__ import annotations

from typing import Any, Final

import click

SETTINGS: Final[dict[str, Any]] = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class Sections(click.Group):
    """A group whose help lists its verbs under titles, in the order in which they were added."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.titles: dict[str, str] = {}

    def add_all(self, title: str, *verbs: click.Command) -> None:
        for verb in verbs:
            self.add_command(verb)
            self.titles[str(verb.name)] = title

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Without a verb: the help, on stderr, and exit code 2 (older click makes it 0)."""
        if not args and not ctx.resilient_parsing:
            click.echo(ctx.get_help(), err=True)
            ctx.exit(2)
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] == "artefact" and "artifact" in self.commands:
            ctx.fail("The verb is spelled artifact.")
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title in dict.fromkeys(self.titles.values()):
            rows = [
                (name, self.commands[name].get_short_help_str(70)) for name in self.titles if self.titles[name] == title
            ]
            with formatter.section(title):
                formatter.write_dl(rows)


def json_option(verb: Any) -> Any:
    return click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")(verb)
