"""Command lines of Megatron's parser, and packages that seem not to be installed."""

import functools

import pytest

from tests.helpers.arguments import pretend_without


@pytest.fixture
def without(monkeypatch):
    return functools.partial(pretend_without, monkeypatch)
