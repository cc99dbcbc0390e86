"""Compiles the programs of a run for a TPU slice that is not there, and reads the compiler's figures.

``compile_step`` does it in a process of its own: a compilation cannot be stopped otherwise, and libtpu must not be
loaded where a run is to use another backend.
"""

import dataclasses
import importlib.util
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import cloudpickle  # a network has functions as fields, which pickle alone cannot name
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import ltp_jax as ltp
from experiments.chips import topology as find_topology
from experiments.components import ltp_pruner, network_shapes, network_uses, weights_optimizer
from experiments.config import LtpConfig, TrainConfig
from experiments.hlo import Collective, collectives
from ltp_jax.adapters import linen_apply
from ltp_jax.pruner import Pruner, dense
from ltp_jax.sharding import jit_beginning, jit_step, make_mesh
from ltp_jax.training import TrainState, create_state, cross_entropy, make_train_step


class CompileError(Exception):
    """A step that could not be compiled. The message says why."""


class TooSlow(CompileError):
    """A step whose compilation did not end in time."""


class DoesNotFit(CompileError):
    """A step that needs more memory than a chip has."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A training step to be compiled, or what makes the state before the first one.

    Attributes:
      module: the network, in the compute dtype that it is to have.
      train: training of the weights; its batch is that of all chips.
      ltp: the pruning; None is the dense step.
      image_shape: ``(height, width, channels)``.
      train_size: images of an epoch.
      fsdp: devices that each parameter is split over.
      beginning: to compile what makes the state of a run from a dense network, in place of a step.
    """

    module: nn.Module
    train: TrainConfig
    ltp: LtpConfig | None
    image_shape: tuple[int, int, int]
    train_size: int
    fsdp: int
    beginning: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """What the compiler says of a step. All of it is per chip.

    Attributes:
      flops: floating-point operations.
      bytes_accessed: read from and written to memory.
      peak_bytes: the most memory that is taken at any time.
      collectives: operations between chips, by kind.
      compile_seconds: wall time of the compilation.
    """

    flops: float
    bytes_accessed: float
    peak_bytes: int
    collectives: dict[str, Collective]
    compile_seconds: float


class Parts(NamedTuple):
    """What the programs of a run are made of.

    Attributes:
      network: the shapes of the dense network, ``params`` and ``batch_stats``.
      optimizer: of the weights.
      pruner: the pruning.
    """

    network: dict[str, Any]
    optimizer: optax.GradientTransformation
    pruner: Pruner

    def begin(self, key: jax.Array, network: dict[str, Any]) -> TrainState:
        """The state before the first step."""
        return create_state(network["params"], network["batch_stats"], self.optimizer, self.pruner, key)


def parts(step: Step) -> Parts:
    """Those of a step's run."""
    steps_per_epoch = max(step.train.steps_per_epoch(step.train_size), 1)
    network = network_shapes(step.module, step.image_shape)
    pruner = dense()
    if step.ltp is not None:
        plan = ltp.plan(network["params"])
        steps = step.train.epochs * steps_per_epoch
        pruner = ltp_pruner(step.ltp, plan, steps, network_uses(step.module, step.image_shape, plan))
    return Parts(network, weights_optimizer(step.train, steps_per_epoch), pruner)


def abstract_beginning(step: Step, mesh: jax.sharding.Mesh) -> tuple[Any, Any, Any]:
    """The making of a run's first state as ``jax.jit`` has it there, with the shapes of its key and network."""
    run = parts(step)
    arguments = jax.eval_shape(lambda: jax.random.key(0)), run.network
    return jit_beginning(run.begin, mesh, *arguments)[0], *arguments


def abstract_step(step: Step, mesh: jax.sharding.Mesh) -> tuple[Any, Any, Any]:
    """The step as ``jax.jit`` has it in a run, with the shapes of its state and batch."""
    run = parts(step)
    _, state = jit_beginning(run.begin, mesh, jax.random.key(0), run.network)
    # Which numbers images are normalised with makes no difference to what it costs.
    apply = linen_apply(step.module, lambda images: (images.astype(jnp.float32) - 127.0) / 63.0)
    rows = step.train.batch_size
    batch = {
        "image": jax.ShapeDtypeStruct((rows, *step.image_shape), jnp.uint8),
        "label": jax.ShapeDtypeStruct((rows,), jnp.int32),
        "mask": jax.ShapeDtypeStruct((rows,), jnp.bool_),
    }
    train_step = make_train_step(apply, run.optimizer, run.pruner, cross_entropy(step.train.label_smoothing))
    return jit_step(train_step, state, mesh), state, batch


# The compiler alone is wanted of libtpu: no TPU is looked for, nor asked about on the network, and another compilation
# may be going on.
COMPILER_ONLY = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
}


def compile_step(step: Step, slice_name: str, timeout: float) -> Figures:
    """Compiles a step in a process of its own.

    Args:
      step: what to compile.
      slice_name: the slice that it is compiled for, such as ``v5e:4x4``.
      timeout: seconds that it may take.

    Raises:
      DoesNotFit: if the step needs more memory than a chip has.
      TooSlow: if the compilation does not end in time.
      CompileError: if libtpu is not installed, knows no such slice, or fails.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise CompileError("the compiler for TPUs is not installed; it comes with: pip install libtpu")
    with tempfile.TemporaryDirectory() as directory:
        request, answer = Path(directory) / "step", Path(directory) / "figures"
        request.write_bytes(cloudpickle.dumps(step))
        try:
            done = subprocess.run(
                [sys.executable, "-m", "experiments.ahead_of_time", str(request), slice_name, str(answer)],
                env=os.environ | COMPILER_ONLY,
                cwd=Path(__file__).parent.parent,
                capture_output=True,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired as error:
            raise TooSlow(f"the compilation for {slice_name} did not end within {timeout:g} s") from error
        if not answer.exists():
            raise CompileError(f"the compiler ended with code {done.returncode}: {_last_line(done.stderr)}")
        found = json.loads(answer.read_text())
    if "error" in found:
        message = found["error"]
        if "RESOURCE_EXHAUSTED" in message or "Ran out of memory" in message:
            raise DoesNotFit(message)
        raise CompileError(message)
    collectives = {kind: Collective(**row) for kind, row in found.pop("collectives").items()}
    return Figures(**found, collectives=collectives)


def slice_mesh(name: str, fsdp: int) -> jax.sharding.Mesh:
    """A mesh over the chips of a slice, which libtpu describes and which are not present."""
    # Imported here: JAX loads libtpu with it.
    from jax.experimental import topologies

    slice_ = find_topology(name)
    # A v4 chip has two cores, and libtpu would count each of them; a program has both as one device.
    options = {"chip_config_name": "megacore"} if slice_.chip.name == "v4" else {}
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    assert len(devices) == slice_.chips, f"libtpu has {len(devices)} devices for the {slice_.chips} chips of {name}"
    return make_mesh(fsdp, devices)


def measure(step: Step, slice_name: str) -> Figures:
    """Compiles a step, or a beginning, in this process, for the chips of a slice."""
    mesh = slice_mesh(slice_name, step.fsdp)
    function, *arguments = abstract_beginning(step, mesh) if step.beginning else abstract_step(step, mesh)
    lowered = function.lower(*arguments)
    start = time.monotonic()
    compiled = lowered.compile()
    seconds = time.monotonic() - start
    costs = compiled.cost_analysis()
    return Figures(
        flops=costs["flops"],
        bytes_accessed=costs["bytes accessed"],
        peak_bytes=compiled.memory_analysis().peak_memory_in_bytes,
        collectives=collectives(compiled.as_text(), mesh.size),
        compile_seconds=round(seconds, 1),
    )


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def _main(request: str, slice_name: str, answer: str) -> None:
    step: Step = pickle.loads(Path(request).read_bytes())
    try:
        found = dataclasses.asdict(measure(step, slice_name))
    except Exception as error:  # whatever the compiler raises is told to the process that asked
        found = {"error": " ".join(str(error).split())[:2000]}
    Path(answer).write_text(json.dumps(found))


if __name__ == "__main__":
    _main(*sys.argv[1:])
