"""How near LTP comes to its target and to the plan for the way there, on any network of the library.

    python -m experiments.benchmarks.targets
    python -m experiments.benchmarks.targets --arch mobilenet_v2 --compressions 128 --steps 100

Weights begin at random, and a few random images with random labels are learned by heart: what is looked at is how many
weights are left, not what the network is good for. Each run is a row of `runs/targets.json` or of the file of `--out`;
one that is there is not run again.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

import ltp_jax as ltp
from experiments.benchmarks.rows import PAPER, check_arch, read, write
from experiments.components import cost_of, init_network, ltp_pruner, network_uses, weights_optimizer
from experiments.config import LtpConfig, TrainConfig
from experiments.ending import require_device, run_command
from experiments.options import (
    ConfigError,
    read_options,
    require,
    require_any,
    require_compressions,
    require_local,
    require_seeds,
    require_writable,
)
from ltp_jax import models
from ltp_jax.adapters import linen_apply
from ltp_jax.target import planned_density
from ltp_jax.training import create_state, cross_entropy, make_train_step

IMAGES = 64  # that are learned by heart
KEYS = ("arch", "of", "target", "achieved", "off_target", "largest_factor_off_plan", "fewest_weights_of_a_layer")
"""What a row tells."""


@dataclasses.dataclass(frozen=True)
class Targets:
    """What to run."""

    arch: tuple[str, ...] = PAPER
    """The networks."""
    compressions: tuple[float, ...] = (2, 16, 128)
    """Targets of weights."""
    macs: tuple[float, ...] = (8,)
    """Targets of multiply-accumulates."""
    steps: int = 200
    """Training steps of a run."""
    image_size: int = 64
    """Side of the images in pixels."""
    batch_size: int = 8
    """Images a step."""
    seed: int = 0
    """Of weights, images and labels."""
    out: Path = Path("runs/targets.json")
    """The JSON file to add to."""

    def check(self) -> None:
        """Raises ConfigError for the first option that is impossible."""
        require_local(self, "out")
        require_seeds("--seed", (self.seed,))
        require_any("--arch", self.arch)
        for arch in self.arch:
            check_arch(arch)
            smallest = models.spec(arch).min_size
            require(self.image_size >= smallest, "--image-size", self.image_size, f"at least {smallest} for {arch}")
        for option, values in {"--compressions": self.compressions, "--macs": self.macs}.items():
            require_compressions(option, values)
        require(self.steps >= 10, "--steps", self.steps, "at least 10")
        if not 1 <= self.batch_size <= IMAGES:
            raise ConfigError(f"--batch-size is {self.batch_size}; accepted is 1 to {IMAGES}")


def run(arch: str, of: str, compression: float, options: Targets) -> dict[str, Any]:
    """One run: the share that is left after every step, how far it is off the plan, and in the end off the target."""
    spec = models.spec(arch)
    module = models.create(arch)
    rng = np.random.default_rng(options.seed)
    images = rng.normal(size=(IMAGES, options.image_size, options.image_size, spec.channels)).astype(np.float32)
    labels = rng.integers(0, spec.num_classes, IMAGES, np.int32)
    network = init_network(module, images.shape[1:], options.seed)
    plan = ltp.plan(network["params"])
    uses = network_uses(module, images.shape[1:], plan)
    train = TrainConfig(epochs=1, batch_size=options.batch_size, learning_rate=0.02, weight_decay=5e-5)
    target = LtpConfig(target_macs=compression) if of == "MACs" else LtpConfig(target_compression=compression)
    pruner = ltp_pruner(target, plan, options.steps, uses)
    optimizer = weights_optimizer(train, options.steps)
    step = jax.jit(make_train_step(linen_apply(module), optimizer, pruner, cross_entropy()), donate_argnums=0)
    summarize = jax.jit(lambda state: ltp.summarize(state.params, state.pruning.prune))
    key = jax.random.key(options.seed)
    state = create_state(network["params"], network["batch_stats"], optimizer, pruner, key)
    wanted = 1 / compression
    planned = planned_density(wanted, target.descent(options.steps))
    budget = uses if of == "MACs" else dict.fromkeys(plan.paths, 1.0)
    shares, off_plan, fewest = [], 0.0, math.inf
    for i in range(options.steps):
        rows = rng.choice(IMAGES, options.batch_size, replace=False)
        state = step(state, {"image": images[rows], "label": labels[rows]})
        summary = jax.device_get(summarize(state))
        whole, left = cost_of(summary, budget)
        shares.append(left / whole)
        off_plan = max(off_plan, abs(math.log(shares[-1] / float(planned(i + 1)))))
        fewest = min(fewest, *(int(np.min(tensor.kept)) for tensor in summary.tensors.values()))
    return {
        "achieved": 1 / shares[-1],
        "off_target": shares[-1] / wanted - 1,
        "largest_factor_off_plan": math.exp(off_plan),
        "fewest_weights_of_a_layer": fewest,
        "shares": [float(f"{share:.6g}") for share in shares],
    }


def main() -> None:
    options = read_options(Targets, prog="python -m experiments.benchmarks.targets", description=__doc__)
    require_writable("--out", options.out)
    require_device()
    read(options.out, KEYS)  # a file of something else is refused before anything is run
    targets = [("weights", compression) for compression in options.compressions]
    targets += [("MACs", compression) for compression in options.macs]
    for arch in options.arch:
        for of, compression in targets:
            settings = {name: getattr(options, name) for name in ("steps", "image_size", "batch_size", "seed")}
            row = {"arch": arch, "of": of, "target": compression} | settings
            done = next((old for old in read(options.out, KEYS) if row.items() <= old.items()), None)
            if done is None:
                done = row | run(arch, of, compression, options)
                write(options.out, [*read(options.out, KEYS), done])  # another start of this may have added to it
            print(
                f"{arch}, {compression:g}× fewer {of}: {done['achieved']:.4f}× ({done['off_target']:+.4%}), on the "
                f"way off the plan by up to {done['largest_factor_off_plan'] - 1:.1%}, at least "
                f"{done['fewest_weights_of_a_layer']} weights to a layer",
                flush=True,
            )


if __name__ == "__main__":
    run_command(main)
