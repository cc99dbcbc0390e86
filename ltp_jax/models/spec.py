"""What is fixed about a network: the row that a family's table has for each of its members."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn


@dataclasses.dataclass(frozen=True)
class NetworkSpec:
    """One network of the registry.

    Attributes:
      name: what ``ltp_jax.models.create`` calls it.
      module: the Linen class that builds it.
      options: the fields of ``module`` that make it this member of its family.
      input_size: height and width, in pixels, of the images that it was designed for.
      min_size: the smallest height and width that it computes.
      parameters: how many parameters it has with its own number of classes.
      channels: of an input image.
      num_classes: logits when nothing else is asked for.
    """

    name: str
    module: type[nn.Module]
    options: Mapping[str, Any]
    input_size: int
    parameters: int
    channels: int = 3
    num_classes: int = 1000
    min_size: int = 1
