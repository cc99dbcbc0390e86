"""What LTP adds to a training step: a step that prunes over a dense one of the same network.

    python -m experiments.benchmarks.lean_step compile                # by the TPU compiler; needs libtpu, no TPU
    python -m experiments.benchmarks.lean_step time --arch=resnet20   # by the clock, on the devices of this machine

Two ways of pruning stand beside the dense step: LTP to a penalty, as in the paper, and LTP to a target compression.
What the latter begins with is compiled once in a run; `--methods beginning` has the compiler's figures of it.
Results are added to `runs/lean_step_compile.json`, one row for each step, and `lean_step_time.json`, one for each
measurement, or to the file of `--out`; what is there stays.
"""

import dataclasses
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.ahead_of_time import CompileError, Step, abstract_step, compile_step
from experiments.benchmarks.rows import PAPER, check_arch, read, write
from experiments.chips import COMPILE_TIMEOUT, topology
from experiments.config import LtpConfig, TrainConfig
from experiments.data.photographs import usable_cores
from experiments.ending import RunError, require_device, run_command
from experiments.imagenet_config import IMAGENET_TRAIN_SIZE
from experiments.options import ConfigError, read_options, require, require_any, require_local, require_writable
from ltp_jax import models
from ltp_jax.sharding import make_mesh

METHODS = {
    "dense": None,
    "penalty": LtpConfig(),
    "target": LtpConfig(target_compression=10.0),
    "target, leak": LtpConfig(target_compression=10.0, leak=0.3),
    "beginning": LtpConfig(target_compression=10.0),  # what makes the state before the first step to a target
}
COMPARED = ("dense", "penalty", "target")
COMPILE_KEYS = ("arch", "method", "topology", "images_per_chip", "flops", "bytes_accessed", "peak_bytes", "collectives")
TIME_KEYS = ("arch", "seconds", "median_seconds", "ratio_to_dense")


@dataclasses.dataclass(frozen=True)
class Compile:
    """FLOPs, bytes accessed, peak memory and collectives, as the compiler has them for a TPU slice."""

    arch: tuple[str, ...] = PAPER
    """The networks."""
    methods: tuple[str, ...] = COMPARED
    """Of dense, penalty, target, "target, leak" and beginning."""
    topology: str = "v5e:4x4"
    """The slice."""
    images_per_chip: int = 256
    """The batch of each chip."""
    timeout: float = COMPILE_TIMEOUT
    """Seconds that a compilation may take."""
    out: Path = Path("runs/lean_step_compile.json")
    """The JSON file to add to; what it has is not compiled again."""

    def check(self) -> None:
        """Raises ConfigError for the first option that is impossible."""
        require_local(self, "out")
        require_any("--arch", self.arch)
        require_any("--methods", self.methods)
        for arch in self.arch:
            check_arch(arch)
        for method in self.methods:
            if method not in METHODS:
                raise ConfigError(f"--methods has {method}; accepted are {', '.join(METHODS)}")
        require(self.images_per_chip >= 1, "--images-per-chip", self.images_per_chip, "at least 1")
        require(self.timeout > 0, "--timeout", self.timeout, "more than 0")


@dataclasses.dataclass(frozen=True)
class Time:
    """Step times, measured in turns in one run."""

    arch: str = "resnet50"
    """The network."""
    image_size: int | None = None
    """Side of the images in pixels; that of the network if not given."""
    batch_size: int = 32
    """Images a step."""
    steps: int = 30
    """Steps of each kind that are timed, after three that are not."""
    out: Path = Path("runs/lean_step_time.json")
    """The JSON file to add to."""

    def check(self) -> None:
        """Raises ConfigError for the first option that is impossible, RunError if there is no device."""
        require_local(self, "out")
        check_arch(self.arch)
        if self.image_size is not None:
            smallest = models.spec(self.arch).min_size
            require(self.image_size >= smallest, "--image-size", self.image_size, f"at least {smallest}")
        require(self.batch_size >= 1, "--batch-size", self.batch_size, "at least 1")
        require_device()
        if self.batch_size % jax.device_count():
            raise ConfigError(
                f"--batch-size is {self.batch_size}; accepted are multiples of the {jax.device_count()} devices"
            )
        require(self.steps >= 1, "--steps", self.steps, "at least 1")


def training_step(arch: str, method: str, *, size: int, batch: int, dtype: Any) -> Step:
    """The step of an ImageNet run, dense or pruning, or the beginning of one."""
    spec = models.spec(arch)
    return Step(
        module=models.create(arch, dtype=dtype),
        train=TrainConfig(
            epochs=30, batch_size=batch, learning_rate=0.1, warmup_epochs=1, weight_decay=5e-5, label_smoothing=0.1
        ),
        ltp=METHODS[method],
        image_shape=(size, size, spec.channels),
        train_size=IMAGENET_TRAIN_SIZE,
        fsdp=1,
        beginning=method == "beginning",
    )


def run_compile(options: Compile) -> None:
    """Compiles what is not in the results yet. Raises RunError at the end for what could not be compiled."""
    failed = 0
    chips = topology(options.topology).chips
    for arch in options.arch:
        for method in options.methods:
            row = {
                "arch": arch,
                "method": method,
                "topology": options.topology,
                "images_per_chip": options.images_per_chip,
            }
            if any(all(old.get(key) == value for key, value in row.items()) for old in read(options.out, COMPILE_KEYS)):
                print(f"{arch} {method}: is in {options.out}", flush=True)
                continue
            size = models.spec(arch).input_size
            step = training_step(arch, method, size=size, batch=chips * options.images_per_chip, dtype=jnp.bfloat16)
            try:
                figures = dataclasses.asdict(compile_step(step, options.topology, options.timeout))
            except CompileError as error:
                print(f"{arch} {method}: {error}", flush=True)
                failed += 1
                continue
            rows = read(options.out, COMPILE_KEYS)  # another start of this benchmark may have added to it
            write(options.out, [*rows, row | {"image_size": size, "jax": jax.__version__} | figures])
            print(compile_table([r for r in read(options.out, COMPILE_KEYS) if r["arch"] == arch]), flush=True)
    if failed:
        raise RunError(f"{failed} of {len(options.arch) * len(options.methods)} steps were not compiled, as said above")


def compile_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown, with ratios to the dense step of the same network where there is one."""
    lines = [
        "| network | step | GFLOP | GB accessed | peak GB | collectives |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        keys = ("arch", "topology", "images_per_chip")
        dense = next((r for r in rows if r["method"] == "dense" and all(r[k] == row[k] for k in keys)), None)
        base = None if row["method"] in ("dense", "beginning") else dense

        def cell(key: str, unit: float, row=row, base=base) -> str:
            ratio = f" ({row[key] / base[key]:.4f})" if base else ""
            return f"{row[key] / unit:,.2f}{ratio}"

        count = sum(kind["count"] for kind in row["collectives"].values())
        figures = (cell("flops", 1e9), cell("bytes_accessed", 1e9), cell("peak_bytes", 1e9), str(count))
        lines.append(f"| {row['arch']} | {row['method']} | {' | '.join(figures)} |")
    return "\n".join(lines)


def run_time(options: Time) -> None:
    """Times steps in turns, so that whatever else the machine does falls on all of them."""
    size = options.image_size or models.spec(options.arch).input_size
    read(options.out, TIME_KEYS)  # refused now, if it holds something else
    mesh = make_mesh()
    rng = np.random.default_rng(0)
    running: dict[str, tuple[Any, Any, Any]] = {}
    for method in COMPARED:
        step = training_step(options.arch, method, size=size, batch=options.batch_size, dtype=jnp.float32)
        function, state, batch = abstract_step(step, mesh)
        running[method] = function, _fill(state, rng), _fill(batch, rng)
    seconds: dict[str, list[float]] = {method: [] for method in COMPARED}
    for turn in range(options.steps + 3):
        order = COMPARED if turn % 2 else COMPARED[::-1]
        for method in order:
            function, state, batch = running[method]
            start = time.perf_counter()
            state = jax.block_until_ready(function(state, batch))
            if turn >= 3:
                seconds[method].append(time.perf_counter() - start)
            running[method] = function, state, batch
    row = {
        "arch": options.arch,
        "image_size": size,
        "batch_size": options.batch_size,
        "device": jax.devices()[0].device_kind,
        "cores": len(jax.devices()) if jax.default_backend() != "cpu" else usable_cores(),
        "machine": platform.machine(),
        "jax": jax.__version__,
        "seconds": {method: [round(s, 5) for s in times] for method, times in seconds.items()},
        "median_seconds": {method: statistics.median(times) for method, times in seconds.items()},
        # Of the ratios of neighbours in time: what slows the machine for a while slows both.
        "ratio_to_dense": {
            method: statistics.median(a / b for a, b in zip(times, seconds["dense"], strict=True))
            for method, times in seconds.items()
        },
    }
    write(options.out, [*read(options.out, TIME_KEYS), row])  # another start may have added to it
    for method in COMPARED:
        print(f"{options.arch} {method}: {row['median_seconds'][method]:.4f} s, ×{row['ratio_to_dense'][method]:.4f}")


def _fill(shapes: Any, rng: np.random.Generator) -> Any:
    """Arrays of these shapes: small random floats, and the rest zeros but for images and keys."""

    def leaf(path: Any, shape: jax.ShapeDtypeStruct) -> Any:
        if jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        name = jax.tree_util.keystr(path)
        if shape.dtype == jnp.uint8:
            return rng.integers(0, 255, shape.shape, np.uint8)
        if "temperatures" in name:
            return np.full(shape.shape, 1e-6, shape.dtype)
        if jnp.issubdtype(shape.dtype, jnp.floating) and "params" in name:
            return rng.normal(0, 0.05, shape.shape).astype(shape.dtype)
        return np.full(shape.shape, "var" in name, shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def main() -> None:
    kinds: Any = Annotated[Compile, tyro.conf.subcommand("compile")] | Annotated[Time, tyro.conf.subcommand("time")]
    options = read_options(kinds, prog="python -m experiments.benchmarks.lean_step", description=__doc__)
    require_writable("--out", options.out)
    run_compile(options) if isinstance(options, Compile) else run_time(options)


if __name__ == "__main__":
    run_command(main)
