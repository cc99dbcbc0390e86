import atexit
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

# Before any test imports JAX: no accelerator is looked for, and what one test or process has compiled, another reads.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled = tempfile.mkdtemp(prefix="ltp-jax-compiled-")
    atexit.register(shutil.rmtree, compiled, ignore_errors=True)  # by the process that starts the others
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"


@pytest.fixture(scope="session")
def data_dir() -> str:
    """The TFDS data directory with the datasets to develop with; tests that need it are skipped where it is absent."""
    path = Path(os.environ.get("LTP_DATA_DIR", Path(__file__).parents[1].parent / "shared" / "tfds"))
    if not path.is_dir():
        pytest.skip(f"no datasets in {path}; LTP_DATA_DIR says where they are")
    return str(path)


@pytest.fixture(autouse=True)
def process_wide_settings():
    """A command sets them for its process, which it ends."""
    hook, raising = sys.unraisablehook, logging.raiseExceptions
    yield
    sys.unraisablehook, logging.raiseExceptions = hook, raising
