"""The directive ``lightning-options``: a table of all --lightning-* flags, read from the parser at build time."""

from __future__ import annotations

import argparse
import dataclasses

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from lightning_megatron.config import LightningOptions
from lightning_megatron.training.arguments import add_arguments

HEAD = ("flag", "values, the default first", "meaning")
WIDTHS = (28, 27, 45)


def rows() -> list[tuple[str, str, str]]:
    """Flag, values and meaning of every argument of the group ``lightning`` whose name says so."""
    parser = add_arguments(argparse.ArgumentParser(prog="lightning-pretrain"))
    group = next(group for group in parser._action_groups if group.title == "lightning")
    defaults = {f"lightning_{field.name}": field.default for field in dataclasses.fields(LightningOptions)}
    found = []
    for action in group._group_actions:
        flag = action.option_strings[0]
        if not flag.startswith("--lightning-"):
            continue
        default = defaults.get(action.dest, action.default)
        if action.choices:
            values = ", ".join(sorted(map(str, action.choices), key=lambda value: value != default))
        elif isinstance(default, bool):
            values = "on, off" if default else "off, on"
        else:
            kind = action.metavar or (action.type.__name__ if action.type else "text")
            values = kind if default is None else f"{default} ({kind})"
        meaning = (action.help or "").replace(" (default: %(default)s)", "").replace("%%", "%")
        no = action.option_strings[1:]
        found.append((f"{flag}, {no[0]}" if no else flag, values, meaning))
    return found


class OptionsTable(SphinxDirective):
    has_content = False

    def run(self) -> list[nodes.Node]:
        group = nodes.tgroup(cols=len(HEAD))
        group += [nodes.colspec(colwidth=width) for width in WIDTHS]
        group += nodes.thead("", self.row(HEAD, head=True))
        group += nodes.tbody("", *(self.row(row) for row in rows()))
        return [nodes.table("", group)]

    def row(self, cells: tuple[str, str, str], head: bool = False) -> nodes.row:
        row = nodes.row()
        for column, text in enumerate(cells):
            paragraph = nodes.paragraph()
            for number, part in enumerate(text.split(", ") if column == 0 else [text]):
                paragraph += [nodes.Text(" ")] * bool(number)
                paragraph += nodes.literal("", part) if column == 0 and not head else nodes.Text(part)
            row += nodes.entry("", paragraph)
        return row


def setup(app: Sphinx) -> dict[str, object]:
    app.add_directive("lightning-options", OptionsTable)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
