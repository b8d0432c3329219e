"""Command lines of Megatron's parser, and packages that seem not to be installed."""

import functools

import pytest

from tests.helpers.arguments import parse_flags, pretend_without


@pytest.fixture
def parse(monkeypatch):
    return functools.partial(parse_flags, monkeypatch)


@pytest.fixture
def without(monkeypatch):
    return functools.partial(pretend_without, monkeypatch)
