"""What a run would do and cost, without data and without an accelerator."""

import dataclasses
import math
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from experiments.ahead_of_time import CompileError, DoesNotFit, Figures, Step, TooSlow, compile_step
from experiments.chips import Topology
from experiments.chips import topology as find_topology
from experiments.components import network_shapes, weights_optimizer
from experiments.ending import RunError
from experiments.imagenet_config import ImagenetConfig
from experiments.options import ConfigError, require_writable
from experiments.record import write_json
from experiments.run import Checked, check_dense, check_network_and_devices
from ltp_jax import models
from ltp_jax.pruner import dense
from ltp_jax.training import create_state


def report(
    config: ImagenetConfig, module: nn.Module, *, image_size: int, train_size: int, pretrains: bool
) -> dict[str, Any]:
    """Prints what the run would do, and writes it to ``dry_run.json`` in the working directory.

    Args:
      config: the options; with a topology, the training step is compiled for that slice, pruning and dense, and what
        makes the state that pruning begins with.
      module: the network, in the compute dtype of the run.
      image_size: side of the images in pixels.
      train_size: images of an epoch.
      pretrains: whether the run trains its dense network.

    Returns:
      What is written: the facts of the run and, if there is a topology, the compiler's figures: ``ltp``, ``dense`` and
      ``beginning``.

    Raises:
      ConfigError: for an unknown topology, a batch or mesh that does not go with the chips or the data, or a target
        that the network cannot meet.
      RunError: if one of these cannot be compiled.
    """
    started = time.time()
    console = Console()
    topology = None if config.topology is None else find_topology(config.topology)
    devices = jax.device_count() if topology is None else topology.chips
    train = config.train
    shape = (image_size, image_size, models.spec(config.arch).channels)
    checked = check_network_and_devices(
        config, module, shape, images=train_size, dataset="the dataset", devices=devices, pretrains=pretrains
    )
    if config.dense is not None and config.dense.exists():
        check_dense(config.dense, config, checked.shapes, checked.plan)
    path = config.workdir / "dry_run.json"
    require_writable("--workdir", path)
    facts = _facts(config, module, checked, shape, devices, train_size)
    console.print(str(checked.plan), highlight=False, soft_wrap=True)
    console.print(_facts_table(config.arch, facts, devices, topology))
    found: dict[str, Any] = {"arch": config.arch, "topology": config.topology, "devices": devices, **facts}
    if topology is not None:
        step = Step(
            module=module,
            train=train,
            ltp=config.ltp,
            image_shape=shape,
            train_size=train_size,
            fsdp=config.mesh.fsdp,
        )
        for name, method in (("ltp", config.ltp), ("dense", None)):
            console.print(f"compiling the {name} step for {topology.name}, which may take minutes …", highlight=False)
            figures = _compile(dataclasses.replace(step, ltp=method), topology, config.dry_run_timeout)
            found[name] = dataclasses.asdict(figures) | roofline(figures, topology, train.batch_size, train_size)
        console.print(f"compiling what LTP begins with for {topology.name} …", highlight=False)
        found["beginning"] = dataclasses.asdict(_compile_beginning(step, topology, config.dry_run_timeout))
        console.print(_figures_table(found, topology))
    found["seconds"] = round(time.time() - started, 1)
    write_json(path, found)
    console.print(f"written to {path}", highlight=False, markup=False)
    return found


def roofline(figures: Figures, topology: Topology, batch_size: int, train_size: int) -> dict[str, Any]:
    """How fast a step can be at best, by a chip's published peaks: as slow as the slowest of its three resources.

    Returns:
      ``seconds`` by resource and of the step, ``images_per_second`` of the slice, and ``epoch_seconds``.
    """
    chip = topology.chip
    seconds = {
        "compute_seconds": figures.flops / chip.flops,
        "memory_seconds": figures.bytes_accessed / chip.bandwidth,
        "interconnect_seconds": sum(row.sent_bytes for row in figures.collectives.values()) / chip.interconnect,
    }
    step = max(seconds.values())
    return {
        **seconds,
        "step_seconds": step,
        "images_per_second": batch_size / step,
        "epoch_seconds": (train_size // batch_size) * step,
    }


def activation_bytes(module: nn.Module, image_shape: tuple[int, ...]) -> int:
    """An upper estimate of the bytes that a training step keeps of one image for its backward pass.

    It counts what goes into each convolution and dense layer and what comes out of it; the rest a compiler computes
    again from these. With it the memory of a device is 15 to 22 % above the TPU compiler's peak for AlexNet, ResNet-50
    and MixNet-S, and twice the peak for MobileNetV2 and EfficientNet-B0, where it computes one again from the other.
    """
    inputs: dict[int, Any] = {}
    outputs: list[Any] = []

    def watch(next_method, args, kwargs, context):
        output = next_method(*args, **kwargs)
        if context.method_name == "__call__" and context.module.has_variable("params", "kernel"):
            inputs[id(args[0])] = args[0]  # kept, so that no later array has the same id
            outputs.append(output)
        return output

    with nn.intercept_methods(watch):
        network_shapes(module, image_shape)
    width = jnp.dtype(getattr(module, "dtype", jnp.float32)).itemsize
    return width * sum(math.prod(array.shape) for array in (*inputs.values(), *outputs))


def _facts(
    config: ImagenetConfig,
    module: nn.Module,
    checked: Checked,
    image_shape: tuple[int, ...],
    devices: int,
    train_size: int,
) -> dict[str, Any]:
    network, plan, uses = checked
    train, params, batch_stats = config.train, network["params"], network["batch_stats"]
    optimizer = weights_optimizer(train, 1)
    state = jax.eval_shape(lambda p, s: create_state(p, s, optimizer, dense(), jax.random.key(0)), params, batch_stats)
    sizes = {tensor.path: tensor.size for tensor in plan.tensors}
    state_bytes, parameter_bytes = _bytes(state), _bytes(params)
    images = train.batch_size // devices
    kept = plan.prunable / 10
    bits = 32 * kept + _entropy_bits(plan.prunable, kept) + 8 * (parameter_bytes - 4 * plan.prunable)
    return {
        "parameters": sum(sizes.values()),
        "prunable": plan.prunable,
        "macs": round(sum(uses[path] * sizes[path] for path in plan.paths)),
        "train_size": train_size,
        "batch_size": train.batch_size,
        "images_per_device": images,
        "steps_per_epoch": train.steps_per_epoch(train_size),
        "epochs": train.epochs,
        "state_bytes": state_bytes,
        # The gradients are as large as the parameters.
        "predicted_bytes": round((state_bytes + parameter_bytes) / config.mesh.fsdp)
        + images * (activation_bytes(module, image_shape) + math.prod(image_shape)),
        "entry_bytes": _bytes(network),
        "entry_bytes_10x": round(bits / 8) + _bytes(batch_stats),
    }


def _bytes(tree: Any) -> int:
    return sum(
        leaf.size * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )


def _entropy_bits(n: int, kept: float) -> float:
    """The least bits that say which ``kept`` of ``n`` weights are not zero."""
    p = kept / n
    return n * (-p * math.log2(p) - (1 - p) * math.log2(1 - p))


def _compile(step: Step, topology: Topology, timeout: float) -> Figures:
    try:
        return compile_step(step, topology.name, timeout)
    except DoesNotFit as error:
        largest = _largest_batch(step, topology, timeout)
        raise ConfigError(
            f"--train.batch-size is {step.train.batch_size}, which does not fit into the "
            f"{topology.chip.memory / 2**30:.0f} GiB of a {topology.chip.name} chip on {topology.name}; {largest}"
        ) from error
    except CompileError as error:
        raise _run_error(error, topology) from error


def _compile_beginning(step: Step, topology: Topology, timeout: float) -> Figures:
    try:
        return compile_step(dataclasses.replace(step, beginning=True), topology.name, timeout)
    except DoesNotFit as error:
        raise ConfigError(
            f"what LTP begins with does not fit into the {topology.chip.memory / 2**30:.0f} GiB of a "
            f"{topology.chip.name} chip on {topology.name}, whatever the batch; --mesh.fsdp splits the state over chips"
        ) from error
    except CompileError as error:
        raise _run_error(error, topology) from error


def _run_error(error: CompileError, topology: Topology) -> RunError:
    if isinstance(error, TooSlow):
        return RunError(f"{error}; --dry-run-timeout allows more")
    return RunError(f"{topology.name}: {error}")


def _largest_batch(step: Step, topology: Topology, timeout: float) -> str:
    """The largest batch that compiles where this step's does not, in steps of eight images a chip if there are many."""
    images = step.train.batch_size // topology.chips
    unit = (8 if images > 8 else 1) * topology.chips
    low, high = 0, -(-step.train.batch_size // unit)  # the one fits, the other does not
    while high - low > 1:
        middle = (low + high) // 2
        try:
            train = dataclasses.replace(step.train, batch_size=middle * unit)
            compile_step(dataclasses.replace(step, train=train), topology.name, timeout)
            low = middle
        except DoesNotFit:
            high = middle
        except CompileError as other:
            return f"about {middle * unit} may, but that could not be compiled ({other})"
    if not low:
        return f"not even {unit} does; --mesh.fsdp splits the parameters over chips"
    return f"the largest that does, in steps of {unit}, is {low * unit}"


def _facts_table(arch: str, facts: dict[str, Any], devices: int, topology: Topology | None) -> Table:
    table = Table(title=f"dry run: {arch}", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    of = "" if topology is None else f" of {topology.chip.memory / 2**30:.0f} GiB"
    rows = {
        "parameters": f"{facts['parameters']:,}",
        "of which prunable": f"{facts['prunable']:,}",
        "multiply-accumulates of the dense network, one image": f"{facts['macs']:,}",
        "devices": f"{devices}",
        "images a step, and on each device": f"{facts['batch_size']:,}, {facts['images_per_device']:,}",
        "predicted memory of each device, at most about": f"{facts['predicted_bytes'] / 2**30:.2f} GiB{of}",
        "images of an epoch, and steps": f"{facts['train_size']:,}, {facts['steps_per_epoch']:,}",
        "epochs": f"{facts['epochs']}",
        "trail entry, uncompressed": f"{facts['entry_bytes'] / 1e6:.1f} MB",
        "trail entry, at 10× and by entropy": f"{facts['entry_bytes_10x'] / 1e6:.1f} MB",
        "trail of the run, at most": f"{(facts['epochs'] + 1) * facts['entry_bytes'] / 1e9:.2f} GB",
        "resume states, two": f"{2 * facts['state_bytes'] / 1e9:.2f} GB",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _figures_table(found: dict[str, Any], topology: Topology) -> Table:
    table = Table(title=f"{topology.name}: the compiler's figures for each chip and step; nothing was run")
    for name in ("", "LTP", "dense", "LTP / dense"):
        table.add_column(name, justify="right" if name else "left")
    pruning, plain = found["ltp"], found["dense"]

    def row(name: str, key: str, unit: float, form: str = ",.2f") -> None:
        a, b = pruning[key], plain[key]
        table.add_row(name, f"{a / unit:{form}}", f"{b / unit:{form}}", f"{a / b:.4f}" if b else "")

    row("GFLOP", "flops", 1e9)
    row("GB accessed", "bytes_accessed", 1e9)
    row(f"peak GiB, of {topology.chip.memory / 2**30:.0f}", "peak_bytes", 2**30)
    for kind in dict.fromkeys([*pruning["collectives"], *plain["collectives"]]):
        none = {"count": 0, "bytes": 0, "sent_bytes": 0}
        a, b = (side["collectives"].get(kind, none) for side in (pruning, plain))
        table.add_row(f"{kind}: count", f"{a['count']}", f"{b['count']}", "")
        table.add_row(f"{kind}: MB", f"{a['bytes'] / 1e6:.2f}", f"{b['bytes'] / 1e6:.2f}", "")
        table.add_row(f"{kind}: MB sent", f"{a['sent_bytes'] / 1e6:.2f}", f"{b['sent_bytes'] / 1e6:.2f}", "")
    row("compile time, s", "compile_seconds", 1, ".0f")
    table.add_row("of what LTP begins with: compile time, s", f"{found['beginning']['compile_seconds']:.0f}", "", "")
    table.add_row("and its peak GiB", f"{found['beginning']['peak_bytes'] / 2**30:.2f}", "", "")
    row("roofline, compute, ms", "compute_seconds", 1e-3)
    row("roofline, memory, ms", "memory_seconds", 1e-3)
    row("roofline, interconnect, ms", "interconnect_seconds", 1e-3)
    row("roofline, step, ms", "step_seconds", 1e-3)
    row("images/s of the slice, at most", "images_per_second", 1, ",.0f")
    row("epoch, s, at least", "epoch_seconds", 1, ",.1f")
    return table
