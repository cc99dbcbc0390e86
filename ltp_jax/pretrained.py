"""Pretrained ImageNet weights of torchvision and timm, from a file to Flax variables.

```python
from ltp_jax import models, pretrained

variables, settings = pretrained.load("resnet50.safetensors", "resnet50")
model = models.create("resnet50", dtype=jnp.bfloat16, **settings.options)
logits = model.apply(variables, (images / 255 - np.array(settings.mean)) / np.array(settings.std), train=False)
```
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ltp_jax import models
from ltp_jax.models.state_dict import PretrainedError, StateDict, read_state_dict
from ltp_jax.models.torch_names import torch_names
from ltp_jax.models.weights import WEIGHTS, WeightSettings, settings
from ltp_jax.trees import named_leaves

__all__ = ["PretrainedError", "WeightSettings", "alternatives", "likeliest", "load", "settings"]

Variables = dict[str, Any]
Shape = tuple[int, ...]

_STATISTICS = ("/mean", "/var")


def load(
    path: str | os.PathLike[str],
    name: str,
    *,
    origin: str | None = None,
    num_classes: int | None = None,
    head_key: jax.Array | None = None,
) -> tuple[Variables, WeightSettings]:
    """Reads the weights of the network ``name`` from a file of PyTorch's names and layouts.

    Args:
      path: safetensors, ``.npz``, or a ``torch.save`` file, which is read by an unpickler that admits tensors and
        containers only.
      name: one of the networks for which ``settings(name)`` is not empty.
      origin: whose weights they are, an ``origin`` of ``settings(name)``. When None it is seen from the tensors' names
        and the digest in the file's name; where both leave a choice, which ``alternatives`` tells, the first of
        ``settings(name)`` is taken.
      num_classes: classes of the head; the network's own number when None.
      head_key: when given, the head in the file is ignored and a new one, for ``num_classes``, is drawn from this key.

    Returns:
      ``{"params": ..., "batch_stats": ...}`` with float32 NumPy arrays (``batch_stats`` is empty for a network without
      batch normalisation), and the settings that these weights need.

    Raises:
      PretrainedError: (a ValueError) the file cannot be read; or a tensor is missing, is not of this network, or has a
        shape other than expected. The message names the tensor and the expected shape.
      ValueError: there is no such network or origin; the message lists those there are.
      OSError: there is no such file.
    """
    candidates = settings(name) if name in models.names() else ()
    if not candidates:
        known = dict.fromkeys(row.network for row in WEIGHTS)
        raise ValueError(f"no pretrained weights are known for {name!r}: expected one of {', '.join(known)}")
    if origin is not None:
        origins = [row.origin for row in candidates]
        candidates = tuple(row for row in candidates if row.origin == origin)
        if not candidates:
            raise ValueError(f"unknown origin {origin!r} of {name}: expected one of {', '.join(origins)}")

    tensors = read_state_dict(path)
    template = _template(name, num_classes)
    try:
        chosen = _choose(candidates, tensors, template, os.path.basename(path))
        names = torch_names(name, chosen.naming, template)
        if head_key is not None:
            for key in ("head/kernel", "head/bias"):
                tensors.pop(names.pop(key), None)
        arrays = _convert(tensors, {key: template[key] for key in names}, names)
    except PretrainedError as error:
        raise PretrainedError(f"{os.fspath(path)}: {error}") from None
    if head_key is not None:
        kernel = nn.initializers.lecun_normal()(head_key, template["head/kernel"], jnp.float32)
        arrays |= {"head/kernel": np.asarray(kernel), "head/bias": np.zeros(template["head/bias"], np.float32)}

    flat = {f"{'batch_stats' if key.endswith(_STATISTICS) else 'params'}/{key}": value for key, value in arrays.items()}
    return {"params": {}, "batch_stats": {}} | traverse_util.unflatten_dict(flat, sep="/"), chosen


def alternatives(path: str | os.PathLike[str], chosen: WeightSettings) -> tuple[str, ...]:
    """Origins that a file may be of as well as of the one chosen: nothing in it or in its name tells them apart."""
    if _is_named(chosen, os.path.basename(path)):
        return ()
    template = _template(chosen.network, None)
    names = torch_names(chosen.network, chosen.naming, template)
    return tuple(
        row.origin
        for row in settings(chosen.network)
        if row.origin != chosen.origin and torch_names(row.network, row.naming, template) == names
    )


def likeliest(candidates: Sequence[WeightSettings], path: str | os.PathLike[str]) -> WeightSettings:
    """Of settings, those whose digest is in the name of a file; the first where there are none such."""
    return next((row for row in candidates if _is_named(row, os.path.basename(path))), candidates[0])


def _is_named(row: WeightSettings, file_name: str) -> bool:
    return row.digest is not None and row.digest in file_name


def _template(name: str, num_classes: int | None) -> dict[str, Shape]:
    """The shape of every parameter and statistic of a network by its path; the two kinds differ in the last part."""
    network = models.spec(name)
    model = models.create(name, num_classes=num_classes)
    image = jax.ShapeDtypeStruct((1, network.input_size, network.input_size, network.channels), jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), image)
    return {path.partition("/")[2]: leaf.shape for path, leaf in named_leaves(variables)}


def _choose(
    candidates: Sequence[WeightSettings], tensors: StateDict, template: Mapping[str, Shape], file_name: str
) -> WeightSettings:
    """The candidate whose names are those in the file, then the one whose digest is in the file's name."""
    network = candidates[0].network
    overlaps = {
        row.naming: len(tensors.keys() & set(torch_names(network, row.naming, template).values())) for row in candidates
    }
    best = max(overlaps.values())
    if best == 0:
        example = next(iter(tensors), None)
        raise PretrainedError(
            f"no tensor has a name that {' or '.join(overlaps)} gives to {network}"
            + (f"; the file has {example!r}" if example else "; the file has no tensors")
        )
    return likeliest([row for row in candidates if overlaps[row.naming] == best], file_name)


def _convert(tensors: StateDict, template: Mapping[str, Shape], names: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Checks the tensors of the file against the template, and brings them into our layout and float32."""
    known = set(names.values())
    for name, tensor in tensors.items():
        if name not in known and not name.endswith(".num_batches_tracked"):
            raise PretrainedError(f"unexpected tensor {name!r} of shape {tensor.shape}")
    arrays = {}
    for path, shape in template.items():
        name, expected = names[path], _torch_shape(path, shape)
        if name not in tensors:
            raise PretrainedError(f"missing tensor {name!r}, expected with shape {expected}")
        tensor = tensors[name]
        if tensor.shape != expected:
            hint = (
                "; give the num_classes of the file, or head_key to replace the head"
                if path.startswith("head/")
                else ""
            )
            raise PretrainedError(f"tensor {name!r} has shape {tensor.shape}, expected {expected}{hint}")
        arrays[path] = _from_torch(path, tensor, shape)
    return arrays


def _torch_shape(path: str, shape: Shape) -> Shape:
    """The shape that PyTorch gives to the parameter that has ``shape`` here."""
    if path.endswith("/kernel"):
        shape = (shape[-1], shape[-2], *shape[:-2])
        if "/se/" in path:  # a dense layer here, a 1x1 convolution there
            shape = (*shape, 1, 1)
    return shape


def _from_torch(path: str, tensor: np.ndarray, shape: Shape) -> np.ndarray:
    tensor = tensor.astype(np.float32)
    if path == "dense1/kernel":
        # AlexNet flattens 6x6 pixels with the channels first there, last here.
        tensor = tensor.reshape(tensor.shape[0], -1, 6, 6)
    if path.endswith("/kernel") and tensor.ndim == 4:
        tensor = tensor.transpose(2, 3, 1, 0)
    elif path.endswith("/kernel"):
        tensor = tensor.T
    return np.ascontiguousarray(tensor).reshape(shape)
