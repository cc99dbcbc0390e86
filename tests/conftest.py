import logging
import os
import sys
import tempfile

import pytest

# Before any test imports JAX: no accelerator is looked for, and what one test or process has compiled, another reads.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="ltp-jax-compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"


@pytest.fixture(autouse=True)
def process_wide_settings():
    """A command sets them for its process, which it ends."""
    hook, raising = sys.unraisablehook, logging.raiseExceptions
    yield
    sys.unraisablehook, logging.raiseExceptions = hook, raising
