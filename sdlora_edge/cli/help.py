"""Help pages: panels and colours on a terminal, plain text with the same groups in a pipe."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from typer.core import TyperCommand, TyperGroup

from .terminal import unescaped

CONTEXT = {"help_option_names": ["-h", "--help"]}


class Command(TyperCommand):
    """A command whose help is drawn past the escaping of other output."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        with unescaped():
            super().format_help(ctx, formatter)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """The plain page: arguments, then each panel of options under its own name."""
        sections: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for parameter in self.get_params(ctx):
            if not (record := parameter.get_help_record(ctx)):
                continue
            if parameter.param_type_name == "argument":  # without the type, as `<list[path]>`
                name = f"{parameter.metavar}{'...' if parameter.nargs != 1 else ''}"
                sections["Arguments"].append((name, record[1]))
            else:
                sections[getattr(parameter, "rich_help_panel", None) or "Options"].append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


class Group(TyperGroup):
    """A group of commands whose help is drawn past the escaping of other output."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        with unescaped():
            super().format_help(ctx, formatter)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The plain list, with the whole first sentence of each command."""
        found = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        with formatter.section("Commands"):
            formatter.write_dl([(n, c.get_short_help_str(200)) for n, c in found.items() if c])
