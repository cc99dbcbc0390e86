"""Commands in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_python(*words: object, timeout: float = 900, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python`` with these words, in the folder of the repository and without an accelerator."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
