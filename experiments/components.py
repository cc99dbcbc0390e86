"""What a training is made of: the network on a dataset's images, its optimizer, and LTP as the options have it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import ltp_jax as ltp
from experiments.config import LtpConfig, TrainConfig
from experiments.data.dataset import Dataset
from experiments.options import ConfigError
from ltp_jax.adapters import linen_apply
from ltp_jax.checkpoints import TrailError
from ltp_jax.costs import uses_per_input
from ltp_jax.penalty import learned_thresholds
from ltp_jax.pruner import Pruner
from ltp_jax.target import target_density
from ltp_jax.training import Apply


def init_network(module: nn.Module, image_shape: tuple[int, ...], seed: int) -> dict[str, Any]:
    """A random network for images of ``[height, width, channels]``: ``params`` and ``batch_stats``."""
    variables = module.init(jax.random.key(seed), jnp.zeros((1, *image_shape), jnp.float32), train=False)
    return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}


def network_shapes(module: nn.Module, image_shape: tuple[int, ...]) -> dict[str, Any]:
    """The same as shapes alone."""
    return jax.eval_shape(lambda: init_network(module, image_shape, 0))


def network_plan(module: nn.Module, image_shape: tuple[int, ...]) -> ltp.Plan:
    """What is pruned of a network for images of ``[height, width, channels]``, from shapes alone."""
    return ltp.plan(network_shapes(module, image_shape)["params"])


def check_network(network: dict[str, Any], shapes: Any, path: Path, arch: str) -> None:
    """Raises TrailError, naming the first difference, if a restored network is not of these shapes."""
    kinds = ("params", "batch_stats")
    expected = {name: leaf.shape for name, leaf in ltp.named_leaves({kind: shapes[kind] for kind in kinds})}
    found = {name: leaf.shape for name, leaf in ltp.named_leaves({kind: network.get(kind, {}) for kind in kinds})}
    for name in dict.fromkeys([*expected, *found]):
        if expected.get(name) != found.get(name):
            raise TrailError(
                f"the network in {path} is no {arch}: {name} has shape {found.get(name, 'none')}, "
                f"expected is {expected.get(name, 'none')}"
            )


def normalising_apply(module: nn.Module, dataset: Dataset) -> Apply:
    """The network on the dataset's own images, normalised on the device."""
    mean, std = np.asarray(dataset.mean, np.float32), np.asarray(dataset.std, np.float32)
    return linen_apply(module, lambda images: (images.astype(jnp.float32) - mean) / std)


def network_uses(module: nn.Module, image_shape: tuple[int, ...], plan: ltp.Plan) -> dict[str, float]:
    """How often each weight is used for one image of ``[height, width, channels]``, by path.

    Raises:
      ConfigError: if that cannot be counted.
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    try:
        return uses_per_input(module, images, plan, train=False)
    except ValueError as error:
        raise ConfigError(f"the multiply-accumulates of this network cannot be counted: {error}") from error


def cost_of(summary: ltp.Summary, costs: Mapping[str, float]) -> tuple[float, float]:
    """What all prunable weights cost, and those that are kept, by what a weight of each tensor costs.

    With the uses of weights for one image that is in multiply-accumulates.
    """
    tensors = summary.tensors.items()
    return sum(costs[path] * t.weights for path, t in tensors), sum(costs[path] * int(t.kept) for path, t in tensors)


def check_batch(stage: str, train: TrainConfig, devices: int, images: int, dataset: str) -> None:
    """Raises ConfigError for a batch that the images of a dataset do not fill or the devices cannot share, and for more
    steps than a state can count."""
    if train.batch_size > images:
        raise ConfigError(f"--{stage}.batch-size is {train.batch_size}; {dataset} has {images} images")
    if train.batch_size % devices:
        raise ConfigError(
            f"--{stage}.batch-size is {train.batch_size}; accepted are multiples of the {devices} devices"
        )
    most = np.iinfo(np.int32).max // train.steps_per_epoch(images)
    if train.epochs > most:
        raise ConfigError(f"--{stage}.epochs is {train.epochs}; accepted is at most {most}, of 2^31 steps")


def weights_optimizer(
    config: TrainConfig, steps_per_epoch: int, schedule: optax.Schedule | None = None
) -> optax.GradientTransformation:
    """SGD with momentum; weight decay on tensors of two and more dimensions.

    Args:
      config: the training.
      steps_per_epoch: its training steps.
      schedule: of the learning rate; warm-up and cosine if not given.
    """
    steps = config.epochs * steps_per_epoch
    if schedule is None:
        schedule = optax.warmup_cosine_decay_schedule(
            init_value=0.0 if config.warmup_epochs else config.peak_learning_rate,
            peak_value=config.peak_learning_rate,
            warmup_steps=min(round(config.warmup_epochs * steps_per_epoch), steps - 1),
            decay_steps=steps,
        )
    sgd = optax.sgd(schedule, momentum=config.momentum, nesterov=True)
    if not config.weight_decay:
        return sgd
    return optax.chain(kernel_decay(config.weight_decay), sgd)


def kernel_decay(weight_decay: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Weight decay on tensors of two and more dimensions."""
    return optax.add_decayed_weights(weight_decay, mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params))


def ltp_pruner(config: LtpConfig, plan: ltp.Plan, steps: int, uses: Mapping[str, float]) -> Pruner:
    """LTP as the options have it: to a penalty with a linear ramp and Adam for the thresholds, or to a target.

    Args:
      config: the options.
      plan: which tensors are pruned.
      steps: training steps of the run.
      uses: of each weight for one image, by path, for a target of multiply-accumulates.

    Raises:
      ConfigError: if the target leaves less than one weight to each tensor.
    """
    if config.density is not None:
        prune_steps = config.descent(steps)
        try:
            return target_density(
                plan,
                config.density,
                prune_steps=prune_steps,
                select_steps=max(round(config.select * steps), prune_steps),
                t0=config.temperature,
                leak=config.leak,
                costs=None if config.target_macs is None else uses,
            )
        except ValueError as error:
            raise ConfigError(f"the target of --ltp cannot be met: {error}") from error
    penalty = 20.0 if config.penalty is None else config.penalty
    learn_steps = max(round(config.learn * steps), 1)
    ramp_steps = round(config.ramp * learn_steps)
    return learned_thresholds(
        plan,
        optax.linear_schedule(0.0, penalty, ramp_steps) if ramp_steps else optax.constant_schedule(penalty),
        optax.adam(config.reach / learn_steps),
        learn_steps=learn_steps,
        t0=config.temperature,
        exact_gradient=config.exact_gradient,
        l0_to_weights=config.l0_to_weights,
    )
