"""One tiny Llama for all tests of this folder; a test that damages it takes a copy."""

import pytest
from tests.ship.models import llama


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A Llama of two layers in float32, one file."""
    pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("models") / "llama"
    path.mkdir()
    llama(path)
    return path
