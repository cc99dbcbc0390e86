"""TPU slices and what their makers publish of a chip."""

import dataclasses
import math
import re

from experiments.options import ConfigError

COMPILE_TIMEOUT = 7200.0
"""Seconds. The slowest step of a preset took 8 minutes on two cores; others may be slower, or busy."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak figures of one chip, from the system-architecture pages of the Cloud TPU documentation.

    Attributes:
      name: as in the name of a slice.
      flops: peak bfloat16 floating-point operations per second.
      bandwidth: of the high-bandwidth memory, bytes per second.
      memory: high-bandwidth memory, bytes.
      interconnect: between chips of a slice, bytes per second, all links of a chip together.
      dimensions: of a slice.
      example: a slice with 16 chips.
    """

    name: str
    flops: float
    bandwidth: float
    memory: int
    interconnect: float
    dimensions: int
    example: str


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 1228e9, 32 * 2**30, 2400e9 / 8, 3, "v4:2x2x4"),
        Chip("v5e", 197e12, 819e9, 16 * 2**30, 1600e9 / 8, 2, "v5e:4x4"),
        Chip("v5p", 459e12, 2765e9, 95 * 2**30, 4800e9 / 8, 3, "v5p:2x2x4"),
        Chip("v6e", 918e12, 1640e9, 32 * 2**30, 3584e9 / 8, 2, "v6e:4x4"),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: ``chips`` of one kind."""

    name: str
    chip: Chip
    chips: int


def topology(name: str) -> Topology:
    """The slice of a name such as ``v5e:4x4``.

    Raises:
      ConfigError: for a name of another form, with the forms that there are.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    chip = CHIPS.get(match[1]) if match else None
    sizes = [int(size) for size in match[2].split("x")] if match else []
    if chip is None or len(sizes) != chip.dimensions or 0 in sizes:
        forms = ", ".join(f"{c.name}:{'x'.join('ABC'[: c.dimensions])} such as {c.example}" for c in CHIPS.values())
        raise ConfigError(f"--topology is {name}; accepted are {forms}")
    return Topology(name, chip, math.prod(sizes))
