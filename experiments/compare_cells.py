"""The runs of a comparison on disk, a JSON file each."""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.options import ConfigError
from ltp_jax import models

OWN = ("ltp", "ltp_leak")
"""Those that are ours."""
Cell = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One setting of a method.

    Attributes:
      learning_rate: the highest of the weights.
      prune: share of the run in which the density descends; of no meaning to methods that do it at once.
      select: share of the run after which LTP fixes its masks.
      leak: share of its gradient that a weight pruned by LTP gets at first; it falls to zero until then.
      initial: STR's first ``s``.
      weight_decay: that of the network if it is zero; STR's is of ``s`` too, and decides how much it prunes.
    """

    learning_rate: float
    prune: float = 0.0
    select: float = 0.0
    leak: float = 0.0
    initial: float = 0.0
    weight_decay: float = 0.0


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def is_positive(value: Any) -> bool:
    return is_number(value) and value > 0


def is_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(map(is_number, value.values()))


def is_rows(*keys: str) -> Callable[[Any], bool]:
    """Whether there is something for each epoch: a number above zero under each of the keys."""

    def check(value: Any) -> bool:
        return isinstance(value, list) and all(
            isinstance(row, dict) and all(is_positive(row.get(key)) for key in keys) for row in value
        )

    return check


Fields = Mapping[str, Callable[[Any], bool]]

FIELDS: Fields = {
    "network": lambda value: value in models.names(),
    "dataset": is_text,
    "method": is_text,
    "compression": lambda value: value is None or is_positive(value),
    "seed": is_count,
    "trial": is_numbers,
    "epochs_trained": is_positive,
    "achieved": is_positive,
    "top1": is_number,
    "dense_top1": is_number,
    "densities": is_numbers,
    "epochs": is_rows("compression"),
}
"""What a run of the comparison tells, and what each of it has to be. Some tell ``train_top1``, too."""


def read_cell(path: Path, fields: Fields = FIELDS) -> Cell:
    """A run. Raises ConfigError if the file is no such thing, or one of the fields is not there or not what it is."""
    try:
        cell = dict(json.loads(path.read_text()))
        if lacking := [key for key in fields if key not in cell]:
            raise ValueError(f"it lacks {', '.join(lacking)}")
        for key, check in {**fields, "train_top1": is_number}.items():
            if key in cell and not check(cell[key]):
                raise ValueError(f"its {key} is {cell[key]!r:.40}")
        if "trial" in cell:
            # With what it leaves out; TypeError if it lacks what it needs, or has what nobody knows.
            cell["trial"] = dataclasses.asdict(Trial(**cell["trial"]))
        if len(cell["epochs"]) != cell.get("epochs_trained", len(cell["epochs"])):
            raise ValueError(f"it has {len(cell['epochs'])} of {cell['epochs_trained']} epochs")
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no record of a run ({error}); remove it, and it is run again") from error
    return cell


def read_cells(folder: Path, fields: Fields = FIELDS) -> list[Cell]:
    """All runs of a folder, by file name, in which a number comes before a larger one."""

    def parts(path: Path) -> list[str | int]:
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]

    return [read_cell(path, fields) for path in sorted(folder.glob("*.json"), key=parts)]


def with_setting_of(origin: str, folder: Path) -> Path:
    """Where the runs of a folder's methods are that have the setting of another one: beside it."""
    return folder.parent / f"setting_of_{origin}_{folder.name}"


def select(cells: Iterable[Cell], **wanted: Any) -> list[Cell]:
    """The cells that have all of these values."""
    return [cell for cell in cells if all(cell[key] == value for key, value in wanted.items())]
