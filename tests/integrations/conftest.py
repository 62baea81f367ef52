"""Library models mix dtypes as they please, so JAX's standard promotion holds here, not the suite's strict one."""

import jax
import pytest


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield
