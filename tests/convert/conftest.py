"""The converter knows one small family of models in these tests."""

import pytest

from tests.helpers.convert import toy  # noqa: F401 # a fixture


@pytest.fixture(autouse=True)
def _known(toy: None) -> None:  # noqa: F811
    """For every test of this folder."""
