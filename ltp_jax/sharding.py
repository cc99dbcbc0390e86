"""Where arrays live: a mesh of all devices, batches split over it, parameters replicated or split."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def make_mesh(fsdp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes ``data`` and ``fsdp`` over all devices. Batches are split over both.

    Args:
      fsdp: over how many devices each parameter is split; 1 keeps them whole on every device.
      devices: all there are, if not given.

    Raises:
      ValueError: if ``fsdp`` does not divide the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if fsdp < 1 or len(devices) % fsdp:
        raise ValueError(f"a mesh of {len(devices)} devices cannot have an fsdp axis of {fsdp}: it must divide them")
    return jax.make_mesh((len(devices) // fsdp, fsdp), ("data", "fsdp"), (AxisType.Auto,) * 2, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over all devices."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def state_sharding(tree: Any, mesh: Mesh) -> Any:
    """A sharding for every array of a state: replicated, or split over the ``fsdp`` axis where there is one.

    An array is split along its largest dimension that the axis divides; small arrays stay whole. Give it to ``jax.jit``
    as ``in_shardings`` and ``out_shardings``: otherwise XLA may split small arrays, and the second step is compiled
    anew.

    Args:
      tree: the state, or its shapes from ``jax.eval_shape``.
      mesh: the devices, with an axis ``fsdp``.

    Returns:
      A ``NamedSharding`` in the place of every leaf.
    """
    n = mesh.shape["fsdp"]

    def leaf_sharding(leaf) -> NamedSharding:
        dims = [d for d, size in enumerate(leaf.shape) if size % n == 0]
        if n == 1 or not dims or leaf.size < 2**14:
            return replicated(mesh)
        split = max(dims, key=lambda d: leaf.shape[d])
        return NamedSharding(mesh, P(*("fsdp" if d == split else None for d in range(len(leaf.shape)))))

    return jax.tree.map(leaf_sharding, tree)


def jit_beginning(begin: Callable[..., Any], mesh: Mesh, *arguments: Any) -> tuple[Callable[..., Any], Any]:
    """A function that makes the first state, compiled for a mesh.

    Args:
      begin: the function.
      mesh: the devices.
      *arguments: of the function, or their shapes; they lie whole on every device.

    Returns:
      The compiled function, and the shapes, dtypes and shardings of the state's leaves.
    """
    shapes = jax.eval_shape(begin, *arguments)
    shardings = state_sharding(shapes, mesh)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )
    return jax.jit(begin, in_shardings=replicated(mesh), out_shardings=shardings), abstract


def jit_step(step: Callable[[Any, Any], Any], state: Any, mesh: Mesh) -> Callable[[Any, Any], Any]:
    """A training step, compiled for a mesh; the state is donated.

    Args:
      step: ``(state, batch) -> state``, as ``make_train_step`` makes it.
      state: one whose leaves have the shardings that they are to keep, or their shapes with these.
      mesh: the devices, over which the batch is split.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(step, in_shardings=(shardings, batch_sharding(mesh)), out_shardings=shardings, donate_argnums=0)


def global_batch(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """This process's rows of a batch as its part of the global arrays.

    Args:
      batch: arrays by name, ``[rows, ...]``; every process has as many rows.
      mesh: the devices.

    Returns:
      By name the global arrays, ``[processes · rows, ...]``, split over all devices.

    Raises:
      ValueError: if the number of devices does not divide the global number of rows.
    """
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
