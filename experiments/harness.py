"""Training of small networks, many times over.

It takes the same steps on the same batches as ``experiments.run``, without a trail and without a pause to resume from,
and so serves to run many short trainings that are to be compared. Steps are dispatched one by one: in a compiled loop
over the steps of an epoch, XLA's convolutions on the CPU take 16 to 50 times as long.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import ltp_jax as ltp
from experiments.components import (
    check_network,
    init_network,
    network_plan,
    network_shapes,
    normalising_apply,
    weights_optimizer,
)
from experiments.config import TrainConfig
from experiments.data.in_memory import InMemoryDataset
from experiments.ending import require_device
from experiments.options import ConfigError
from experiments.record import differences, write_json
from ltp_jax import models
from ltp_jax.checkpoints import TrailError, restore_network, save_network
from ltp_jax.pruner import Pruner, dense
from ltp_jax.training import (
    Batch,
    TrainState,
    create_state,
    cross_entropy,
    make_eval_step,
    make_train_step,
    zero_totals,
)

EVAL_BATCH = 1000

Network = dict[str, Any]
"""``params`` and ``batch_stats``."""
Run = Callable[[Network, int], Iterator[TrainState]]
"""``(network, seed) -> states``: trains a network and yields the state after each epoch, donated to the next one."""


def hold_out(dataset: InMemoryDataset, size: int) -> InMemoryDataset:
    """The dataset without its evaluation split: the last ``size`` training images take its place.

    For choosing settings: figures of the real evaluation split are then those of settings that never saw it.
    """
    return dataclasses.replace(
        dataset,
        name=f"{dataset.name}_held_out",
        train_size=dataset.train_size - size,
        eval_size=size,
        train_images=dataset.train_images[:-size],
        train_labels=dataset.train_labels[:-size],
        eval_images=dataset.train_images[-size:],
        eval_labels=dataset.train_labels[-size:],
    )


def augmented(dataset: InMemoryDataset) -> InMemoryDataset:
    """The dataset with training images that are shifted by up to two pixels and mirrored, anew in every epoch."""
    return dataclasses.replace(dataset, name=f"{dataset.name}_augmented", padding=2, flip=True)


def what_is_left(plan: ltp.Plan, hard: Any) -> tuple[float, dict[str, float]]:
    """The compression of a hard-pruned network, and the density of each pruned tensor by path."""
    sizes = {tensor.path: tensor.size for tensor in plan.tensors if tensor.prune}
    kept = {path: int(jnp.count_nonzero(w)) for path, w in ltp.named_leaves(hard) if path in sizes}
    return plan.prunable / max(sum(kept.values()), 1), {path: kept[path] / size for path, size in sizes.items()}


def check_training(record: Path, train: TrainConfig) -> None:
    """Raises ConfigError if the network beside a record was trained in another way."""
    wanted, path = dataclasses.asdict(train), record.with_suffix("")
    try:
        found = dict(json.loads(record.read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{record} is no record of a training ({error}); remove it and {path}, and both are made again"
        ) from error
    if changed := [f"{name} {how}" for name, how in differences(found, wanted).items()]:
        raise ConfigError(
            f"{path} was trained in another way: {'; '.join(changed)}. Remove it, and it is trained again, or choose "
            "another --workdir"
        )


class Harness:
    """A dataset in memory and a network that learns it.

    Args:
      dataset: the data; training batches are its own stream, a function of seed and step alone.
      arch: the name of the network in ``ltp_jax.models``.
      workdir: where dense networks are kept, one a seed, each with a record of its training.
      pretrain: how they are trained.
    """

    def __init__(self, dataset: InMemoryDataset, arch: str, workdir: Path, pretrain: TrainConfig):
        require_device()
        self.dataset = dataset
        self.arch = arch
        self.pretrain = pretrain
        self.workdir = workdir
        self.module = models.create(arch, num_classes=dataset.num_classes)
        self.apply = normalising_apply(self.module, dataset)
        self.plan = network_plan(self.module, dataset.image_shape)
        self._evaluate = jax.jit(make_eval_step(self.apply))

    def dense_network(self, seed: int) -> Network:
        """The trained network that every method starts from: trained once a seed, then read from disk.

        Raises:
          ConfigError: if the one on disk was trained in another way, or it cannot be pruned: a tensor that did not
            learn, or weights that are not finite.
          TrailError: if the one on disk is damaged.
        """
        path = self.workdir / f"{self.dataset.name}_{self.arch}" / f"dense_{seed}"
        known = path.is_dir()
        if known:
            check_training(path.with_suffix(".json"), self.pretrain)
            try:
                network = restore_network(path)
            except TrailError as error:
                raise TrailError(f"{error}; remove {path}, and it is trained again") from error
            check_network(network, network_shapes(self.module, self.dataset.image_shape), path, self.arch)
        else:
            *_, state = self._train_dense(init_network(self.module, self.dataset.image_shape, seed), seed)
            network = {"params": state.params, "batch_stats": state.batch_stats}
        try:
            # In compiled code no one can look at values, and all figures of such a network would be no numbers.
            ltp.init(network["params"], self.plan)
        except ValueError as error:
            remedy = f"remove {path}, and it is trained again" if known else "it has to be trained in another way"
            raise ConfigError(f"the dense network of seed {seed} cannot be pruned: {error}; {remedy}") from error
        if not known:
            write_json(path.with_suffix(".json"), dataclasses.asdict(self.pretrain))
            save_network(path, network["params"], network["batch_stats"])
        return network

    def compiled(
        self,
        pruner: Pruner,
        config: TrainConfig,
        distill: float = 0.0,
        optimizer: optax.GradientTransformation | None = None,
    ) -> Run:
        """Training with a method, compiled once for any number of networks and seeds.

        Args:
          pruner: the method.
          config: the training.
          distill: share of the labels that is what the network at the start of the run says of the image.
          optimizer: of the weights; that of the configuration if not given.
        """
        steps = config.steps_per_epoch(self.dataset.train_size)
        optimizer = weights_optimizer(config, steps) if optimizer is None else optimizer
        label_loss = cross_entropy(config.label_smoothing)

        def loss(logits: jax.Array, batch: Batch) -> jax.Array:
            if not distill:
                return label_loss(logits, batch)
            teacher_loss = jnp.mean(optax.softmax_cross_entropy(logits, batch["teacher"]))
            return (1 - distill) * label_loss(logits, batch) + distill * teacher_loss

        step = jax.jit(make_train_step(self.apply, optimizer, pruner, loss), donate_argnums=0)

        @jax.jit
        def probabilities(network: Network, images: jax.Array) -> jax.Array:
            return jax.nn.softmax(
                self.apply(network["params"], network["batch_stats"], images, train=False, key=None)[0]
            )

        @jax.jit
        def initial(network: Network, key: jax.Array) -> TrainState:
            return create_state(network["params"], network["batch_stats"], optimizer, pruner, key)

        def run(network: Network, seed: int) -> Iterator[TrainState]:
            state = initial(network, jax.random.key(seed))
            stream = self.dataset.train(config.batch_size, seed=seed)
            for _ in range(config.epochs):
                state = state.replace(totals=zero_totals())
                for batch in itertools.islice(stream, steps):
                    arrays = {key: batch[key] for key in ("image", "label")}
                    if distill:
                        arrays["teacher"] = probabilities(network, batch["image"])
                    state = step(state, arrays)
                yield state

        return run

    @functools.cached_property
    def _train_dense(self) -> Run:
        return self.compiled(dense(), self.pretrain)

    def top1(self, params: Any, batch_stats: Any) -> float:
        """Percent of the evaluation split that the network classifies rightly."""
        return self._percent_right(self.dataset, params, batch_stats)

    def train_top1(self, params: Any, batch_stats: Any) -> float:
        """The same of the training images, of the first as many as there are to evaluate on."""
        size, data = min(self.dataset.eval_size, self.dataset.train_size), self.dataset
        first = dataclasses.replace(
            data, eval_size=size, eval_images=data.train_images[:size], eval_labels=data.train_labels[:size]
        )
        return self._percent_right(first, params, batch_stats)

    def _percent_right(self, dataset: InMemoryDataset, params: Any, batch_stats: Any) -> float:
        sums = [
            self._evaluate(params, batch_stats, {key: batch[key] for key in ("image", "label", "mask")})
            for batch in dataset.evaluate(min(EVAL_BATCH, dataset.eval_size))
        ]
        totals = jax.tree.map(lambda *parts: sum(parts), *jax.device_get(sums))
        return 100 * float(totals["top1"] / totals["examples"])
