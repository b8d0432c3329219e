"""docs/parity.md: it has all of Megatron's options, tests that it names exist, values of pairs, too, and what it says
is refused ends with its words.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fnmatch
import io
import os
import re
import sys
import warnings
from pathlib import Path

from megatron.core.package_info import VERSION
from megatron.core.transformer import MLATransformerConfig
from megatron.training.arguments import add_megatron_arguments

from tests.helpers.arguments import MODEL
from tests.helpers.pairs import OWN, RELEASED, RUN
from tests.launch import ROOT, spawn

TEXT = (ROOT / "docs" / "parity.md").read_text("utf-8")
ROWS = [tuple(cell.strip() for cell in line.strip("|").split(" | ")) for line in TEXT.splitlines() if "| " in line]
ROWS = [row for row in ROWS if len(row) == 3 and row[0] != "Option"]
FIRST_CELLS = [line.split("|")[1] for line in TEXT.splitlines() if line.startswith("|")]
OPTIONS = [  # or patterns of them
    word
    for cell in FIRST_CELLS
    for quoted in re.findall(r"`([^`]*)`", cell)
    for word in quoted.split()
    if word.startswith("--") and not word.startswith("--lightning-")
]
GROUPS = [title for cell in FIRST_CELLS for title in re.findall(r"group `([^`]*)`", cell)]
REFUSED = [(row[0], row[2]) for row in ROWS if row[1] == "refused"]


def test_rows_are_whole():
    assert len(ROWS) > 60 and len(REFUSED) > 20
    for option, decision, *words in ROWS:
        assert decision == "not ours" or decision in ("works", "refused") and words and words[0], option


def test_every_option_of_megatron_is_here():
    """By itself, or in a group of the parser; fields of the config, which layers may read, by themselves alone.

    Megatron's main has others from one day to the next: there, what differs is a warning.
    """
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    groups = {group.title: group._group_actions for group in parser._action_groups}
    known = parser._option_string_actions
    matches = {option: fnmatch.filter(known, option) for option in OPTIONS}
    named = {known[match].dest for found in matches.values() for match in found} | {"help"}
    grouped = {action.dest for title in GROUPS for action in groups.get(title, ())} - named
    fields = {field.name for field in dataclasses.fields(MLATransformerConfig)}
    wrong = {
        "not of Megatron": [option for option, found in matches.items() if not found] + [*({*GROUPS} - {*groups})],
        "read by layers, and hidden in a group": sorted(grouped & fields),
        "not on the page": sorted({action.dest for action in parser._actions} - named - grouped),
    }
    wrong = {why: which for why, which in wrong.items() if which}
    if VERSION[:2] == (0, 19):
        assert not wrong
    elif wrong:
        warnings.warn(f"docs/parity.md: {wrong}", stacklevel=1)


def test_tests_exist():
    named = re.findall(r"`((?:\w+/)?test_\w+\.py)(?:::(\w+))?`", TEXT)
    assert len(named) > 20
    for file, function in named:
        text = Path(ROOT, "tests", file).read_text("utf-8")
        assert not function or f"def {function}(" in text, f"{file}::{function}"


def test_pairs_hold_the_values():
    factors = OWN | RELEASED | RUN
    named = [x for found in re.findall(r"pairs \(([^)]*)\)", TEXT) for x in re.split(r", (?=[a-z ]+: )", found)]
    assert len(named) > 40
    for name, value in (x.split(": ", 1) for x in named):
        assert value in factors[name], (name, value)


def last_lines(rank: int, world: int, rows: list[tuple[str, str]]) -> list[str]:
    """What the own entry point says to each command line before it would train."""
    from megatron.core import num_microbatches_calculator
    from megatron.training import global_vars

    from lightning_megatron.training import run

    found = []
    for option, _ in rows:
        flags = re.findall(r"`([^`]*)`", option)[0]
        os.environ["WORLD_SIZE"] = "2" if "parallel-size 2" in flags else "1"
        sys.argv = ["pretrain", *MODEL.split(), *flags.split()]
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                run.configure()
            found.append("nothing")
        except (ValueError, AssertionError, SystemExit) as error:
            found.append(f"{error} {said.getvalue()}")
        global_vars.destroy_global_vars()
        num_microbatches_calculator.destroy_num_microbatches_calculator()
    return found


def test_what_is_refused_ends():
    (found,) = spawn(last_lines, 1, REFUSED, timeout=300)
    wrong = [
        f"{option}: {line[:200]}" for (option, words), line in zip(REFUSED, found, strict=True) if words not in line
    ]
    assert not wrong, "\n".join(wrong)
