"""The tiny run, loaded once for all tests of what is done with it."""

import pytest

from dalle2_jax import DALLE2


@pytest.fixture(scope="session")
def model(tiny):
    return DALLE2.load(tiny.run_dir)
