"""Eight CPU devices, strict dtype promotion, and `--require`: what must be there, so that no test is skipped for it."""

from __future__ import annotations

import importlib.util
import itertools
import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require", default="", help="implementations and packages that must be usable, comma-separated")


def pytest_sessionstart(session: pytest.Session) -> None:
    import jaxq.primitives.common as common

    for name in filter(None, session.config.getoption("--require").split(",")):
        if name in common.IMPLEMENTATIONS:
            reason = common.IMPLEMENTATIONS[name].unavailable()
        else:
            reason = (
                None if importlib.util.find_spec(name) else "there is neither an implementation nor a package so named"
            )
        if reason is not None:
            raise pytest.UsageError(f"--require={name}, but it can't be used here: {reason}")


_tests_run = itertools.count(1)


@pytest.fixture(autouse=True)
def _forget_programs():
    """Compiled programs live as long as the process; thousands of them are gigabytes."""
    yield
    if next(_tests_run) % 100 == 0:
        jax.clear_caches()
