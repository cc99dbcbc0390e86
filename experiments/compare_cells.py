"""The runs of a comparison on disk, a JSON file each."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments.options import ConfigError

OWN = ("ltp", "ltp_leak")
"""Those that are ours."""
Cell = dict[str, Any]

KEYS = (
    "network",
    "dataset",
    "method",
    "compression",
    "seed",
    "trial",
    "epochs_trained",
    "achieved",
    "top1",
    "dense_top1",
    "densities",
    "epochs",
)
"""What a run of the comparison tells."""


def read_cell(path: Path, keys: Sequence[str] = KEYS) -> Cell:
    """A run. Raises ConfigError if the file is no such thing, or lacks one of the keys."""
    try:
        cell = dict(json.loads(path.read_text()))
        if lacking := [key for key in keys if key not in cell]:
            raise ValueError(f"it lacks {', '.join(lacking)}")
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path} is no record of a run ({error}); remove it, and it is run again") from error
    return cell


def read_cells(folder: Path, keys: Sequence[str] = KEYS) -> list[Cell]:
    """All runs of a folder, by file name, in which a number comes before a larger one."""

    def parts(path: Path) -> list[str | int]:
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]

    return [read_cell(path, keys) for path in sorted(folder.glob("*.json"), key=parts)]


def select(cells: Iterable[Cell], **wanted: Any) -> list[Cell]:
    """The cells that have all of these values."""
    return [cell for cell in cells if all(cell[key] == value for key, value in wanted.items())]
