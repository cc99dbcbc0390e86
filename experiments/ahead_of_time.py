"""Compiles a training step for a TPU slice that is not there, and reads the compiler's figures.

``compile_step`` does it in a process of its own: a compilation cannot be stopped otherwise, and libtpu must not be
loaded where a run is to use another backend.
"""

import collections
import dataclasses
import importlib.util
import json
import math
import os
import pickle
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cloudpickle  # a network has functions as fields, which pickle alone cannot name
import flax.linen as nn
import jax
import jax.numpy as jnp

import ltp_jax as ltp
from experiments.config import LtpConfig, TrainConfig
from experiments.run import ltp_pruner, weights_optimizer
from ltp_jax.adapters import linen_apply
from ltp_jax.costs import uses_per_input
from ltp_jax.pruner import dense
from ltp_jax.sharding import batch_sharding, make_mesh, state_sharding
from ltp_jax.training import create_state, cross_entropy, make_train_step


class CompileError(Exception):
    """A step that could not be compiled. The message says why."""


class DoesNotFit(CompileError):
    """A step that needs more memory than a chip has: ``needed`` bytes, as far as the compiler says."""

    def __init__(self, message: str, needed: float | None):
        super().__init__(message)
        self.needed = needed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A training step to be compiled.

    Attributes:
      module: the network, in the compute dtype that it is to have.
      train: training of the weights; its batch is that of all chips.
      ltp: the pruning; None is the dense step.
      image_shape: ``(height, width, channels)``.
      train_size: images of an epoch.
      fsdp: devices that each parameter is split over.
      topology: the slice, such as ``v5e:4x4``.
    """

    module: nn.Module
    train: TrainConfig
    ltp: LtpConfig | None
    image_shape: tuple[int, int, int]
    train_size: int
    fsdp: int
    topology: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """Operations of one kind between chips: how many there are in a step, and the bytes that a chip gives to them."""

    count: int
    bytes: int


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


def abstract_step(step: Step, mesh: jax.sharding.Mesh) -> tuple[Any, Any, Any]:
    """The step as ``jax.jit`` has it in a run, with the shapes of its state and batch."""
    steps_per_epoch = max(step.train_size // step.train.batch_size, 1)
    image = jax.ShapeDtypeStruct((1, *step.image_shape), jnp.float32)
    variables = jax.eval_shape(lambda x: step.module.init(jax.random.key(0), x, train=False), image)
    optimizer = weights_optimizer(step.train, steps_per_epoch)
    pruner = dense()
    if step.ltp is not None:
        plan = ltp.plan(variables["params"])
        steps = step.train.epochs * steps_per_epoch
        pruner = ltp_pruner(step.ltp, plan, steps, lambda: uses_per_input(step.module, image, plan, train=False))
    state = jax.eval_shape(
        lambda key, params, batch_stats: create_state(params, batch_stats, optimizer, pruner, key),
        jax.random.key(0),
        variables["params"],
        variables.get("batch_stats", {}),
    )
    # Which numbers images are normalised with makes no difference to what it costs.
    apply = linen_apply(step.module, lambda images: (images.astype(jnp.float32) - 127.0) / 63.0)
    rows = step.train.batch_size
    batch = {
        "image": jax.ShapeDtypeStruct((rows, *step.image_shape), jnp.uint8),
        "label": jax.ShapeDtypeStruct((rows,), jnp.int32),
        "mask": jax.ShapeDtypeStruct((rows,), jnp.bool_),
    }
    shardings = state_sharding(state, mesh)
    function = jax.jit(
        make_train_step(apply, optimizer, pruner, cross_entropy(step.train.label_smoothing)),
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=shardings,
        donate_argnums=0,
    )
    return function, state, batch


def compile_step(step: Step, timeout: float) -> Figures:
    """Compiles a step in a process of its own.

    Args:
      step: what to compile.
      timeout: seconds that it may take.

    Raises:
      DoesNotFit: if the step needs more memory than a chip has.
      CompileError: if libtpu is not installed, knows no such slice, or does not come to an end.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise CompileError("the compiler for TPUs is not installed; it comes with: pip install libtpu")
    with tempfile.TemporaryDirectory() as directory:
        request, answer = Path(directory) / "step", Path(directory) / "figures"
        request.write_bytes(cloudpickle.dumps(step))
        # The compiler alone is wanted of libtpu: no TPU is looked for, nor asked about on the network, and another
        # compilation may be going on.
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "TPU_LOG_DIR": "disabled",
        }
        try:
            done = subprocess.run(
                [sys.executable, "-m", "experiments.ahead_of_time", str(request), str(answer)],
                env=environment,
                cwd=Path(__file__).parent.parent,
                capture_output=True,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired as error:
            raise CompileError(f"the compilation for {step.topology} did not end within {timeout:g} s") from error
        if not answer.exists():
            raise CompileError(f"the compiler ended with code {done.returncode}: {_last_line(done.stderr)}")
        found = json.loads(answer.read_text())
    if "error" in found:
        message = found["error"]
        if "RESOURCE_EXHAUSTED" in message or "Ran out of memory" in message:
            raise DoesNotFit(message, needed_bytes(message))
        raise CompileError(message)
    collectives = {kind: Collective(**row) for kind, row in found.pop("collectives").items()}
    return Figures(**found, collectives=collectives)


def measure(step: Step) -> Figures:
    """Compiles a step in this process, for devices that are described by libtpu and not present."""
    # Imported here: JAX loads libtpu with it.
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=step.topology).devices
    mesh = make_mesh(step.fsdp, devices)
    function, state, batch = abstract_step(step, mesh)
    lowered = function.lower(state, batch)
    start = time.monotonic()
    compiled = lowered.compile()
    seconds = time.monotonic() - start
    costs = compiled.cost_analysis()
    return Figures(
        flops=costs["flops"],
        bytes_accessed=costs["bytes accessed"],
        peak_bytes=compiled.memory_analysis().peak_memory_in_bytes,
        collectives=collectives(compiled.as_text()),
        compile_seconds=round(seconds, 1),
    )


KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "s8": 8, "u8": 8, "s32": 32, "u32": 32, "s64": 64}


def collectives(hlo: str) -> dict[str, Collective]:
    """The operations between chips in a compiled program, by kind; an asynchronous one is counted at its start."""
    counts: dict[str, int] = collections.Counter()
    sizes: dict[str, int] = collections.Counter()
    for result, kind, start in re.findall(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(", hlo):
        shapes = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", result)
        size = sum(BITS.get(dtype, 32) // 8 * math.prod(map(int, filter(None, d.split(",")))) for dtype, d in shapes)
        counts[kind] += 1
        # What starts an all-gather or a permutation gives back its operands beside its results.
        sizes[kind] += size // 2 if start and kind != "all-reduce" else size
    return {kind: Collective(count=counts[kind], bytes=sizes[kind]) for kind in KINDS if kind in counts}


def needed_bytes(message: str) -> float | None:
    """The memory that a step asks for, by the message of a compiler that ran out of it."""
    match = re.search(r"\(([\d.]+)([KMG])\) exceeds available|Used ([\d.]+)([KMG]) of", message)
    if match is None:
        return None
    number, unit = (group for group in match.groups() if group is not None)
    return float(number) * 2 ** {"K": 10, "M": 20, "G": 30}[unit]


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def _main(request: str, answer: str) -> None:
    step: Step = pickle.loads(Path(request).read_bytes())
    try:
        found = dataclasses.asdict(measure(step))
    except Exception as error:  # whatever the compiler raises is told to the process that asked
        found = {"error": " ".join(str(error).split())[:2000]}
    Path(answer).write_text(json.dumps(found))


if __name__ == "__main__":
    _main(*sys.argv[1:])
