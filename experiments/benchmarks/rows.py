"""What benchmarks have in common: the networks of the paper, and results as rows of a JSON file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.options import ConfigError
from experiments.record import write_whole
from ltp_jax import models

PAPER = ("resnet50", "alexnet", "mobilenet_v2", "efficientnet_b0", "mixnet_s")


def check_arch(arch: str) -> None:
    """Raises ConfigError if the library has no such network."""
    if arch not in models.names():
        raise ConfigError(f"--arch is {arch}; accepted are {', '.join(models.names())}")


def read(path: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a result file; none if it is not there. Raises ConfigError if it has others than of these keys."""
    try:
        rows = json.loads(path.read_text()) if path.exists() else []
        if not isinstance(rows, list):
            raise ValueError("it is no list")
        rows = [dict(row) for row in rows]
        if lacking := sorted({key for row in rows for key in keys if key not in row}):
            raise ValueError(f"a row lacks {', '.join(lacking)}")
        return rows
    except (TypeError, ValueError) as error:
        raise ConfigError(f"--out is {path}, which holds no results of this benchmark ({error})") from error


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes the rows, one on a line; the file is there as a whole or as it was."""
    write_whole(path, "[\n" + ",\n".join(f" {json.dumps(row)}" for row in rows) + "\n]\n")
