"""Image-classification networks in Flax Linen, by name.

```python
model = ltp_jax.models.create("resnet20")
variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
logits, updates = model.apply(variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": key})
```

Images are NHWC, float and already normalised; logits are float32; parameters are float32 whatever the compute dtype.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from ltp_jax.models import alexnet, cifar_resnet, efficientnet, mixnet, mobilenet, resnet, small
from ltp_jax.models.spec import NetworkSpec

__all__ = ["NetworkSpec", "create", "names", "spec"]

_FAMILIES = (small, cifar_resnet, alexnet, resnet, mobilenet, efficientnet, mixnet)
_NETWORKS = {row.name: row for family in _FAMILIES for row in family.NETWORKS}


def names() -> tuple[str, ...]:
    """The names that ``create`` and ``spec`` accept."""
    return tuple(_NETWORKS)


def spec(name: str) -> NetworkSpec:
    """What is fixed about the network ``name``: input size, channels, classes, parameters.

    Raises:
      ValueError: there is no network of that name; the message lists those there are.
    """
    if name not in _NETWORKS:
        raise ValueError(f"unknown network {name!r}: expected one of {', '.join(names())}")
    return _NETWORKS[name]


def create(name: str, *, num_classes: int | None = None, dtype: DTypeLike = jnp.float32, **overrides: Any) -> nn.Module:
    """Builds the network ``name`` as an unbound Linen module.

    Args:
      name: one of ``names()``.
      num_classes: logits of the head; the network's own number when None.
      dtype: dtype of activations and products, ``jnp.bfloat16`` for accelerators. Parameters, batch statistics and
        logits stay float32.
      **overrides: other fields of the module, such as ``padding``, ``epsilon`` or ``dropout_rate``.

    Returns:
      A module called as ``model.apply(variables, images, train=...)``.

    Raises:
      ValueError: an unknown name or option; the message lists those accepted.
    """
    network = spec(name)
    accepted = {field.name for field in dataclasses.fields(network.module)} - {"parent", "name", "num_classes", "dtype"}
    unknown = sorted(set(overrides) - accepted)
    if unknown:
        raise ValueError(f"{name} has no option {unknown[0]!r}: expected one of {', '.join(sorted(accepted))}")
    classes = network.num_classes if num_classes is None else num_classes
    return network.module(**{"num_classes": classes, "dtype": dtype, **network.options, **overrides})
