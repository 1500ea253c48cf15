"""The help text of a command with many options, readable at 80 columns: by group, each option above its description.

It depends on typer's options, not on their meaning.
"""

import textwrap
from typing import Any

import typer
from typer.core import TyperCommand

INDENT = 6


class GroupedCommand(TyperCommand):
    """A command whose parameters are shown under the panel that each names."""

    def format_help(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]
        """Write usage, description, and a section for each group, in the order of its first parameter."""
        self.format_usage(ctx, formatter)
        self.format_help_text(ctx, formatter)
        groups: dict[str, list[str]] = {}
        for parameter in self.get_params(ctx):
            panel = getattr(parameter, "rich_help_panel", None) or "Options"
            groups.setdefault(panel, []).append(_entry(parameter, formatter.width))
        for group, entries in groups.items():
            with formatter.section(group):
                formatter.write("\n".join(entries) + "\n")


def _entry(parameter: Any, width: int) -> str:
    options = [] if parameter.param_type_name == "argument" else [*parameter.opts, *parameter.secondary_opts]
    heading = " ".join(filter(None, ("/".join(options), parameter.metavar)))
    margin = " " * INDENT
    text = textwrap.fill(
        parameter.help or "",
        width,
        initial_indent=margin,
        subsequent_indent=margin,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return f"  {heading}\n{text}"
