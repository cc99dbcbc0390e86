"""Training and evaluation of a network on all devices, from wherever a saved state leads to."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from rich.console import Console

from experiments.components import init_network, normalising_apply
from experiments.config import Config, TrainConfig
from experiments.console import MetricsWriter, log, progress_bar
from experiments.data.dataset import Dataset
from experiments.ending import Preempted, RunError
from ltp_jax.checkpoints import Resume
from ltp_jax.pruner import Pruner
from ltp_jax.sharding import global_batch, jit_beginning, jit_step, make_mesh, replicated
from ltp_jax.training import TrainState, create_state, cross_entropy, make_eval_step, make_train_step, zero_totals

LOG_EVERY = 50  # steps between two looks at the loss, which cost a wait for the device


class Trainer:
    """A network, its data and the devices that train it.

    Args:
      config: the options of the run.
      module: the network; takes normalised images and ``train``.
      dataset: what it learns.
      metrics: where figures go.
      console: where progress is shown.
      preempted: whether a process of the job was asked to stop.
    """

    def __init__(
        self,
        config: Config,
        module: nn.Module,
        dataset: Dataset,
        metrics: MetricsWriter,
        console: Console,
        preempted: Callable[[], bool],
    ):
        self.config = config
        self._module = module
        self.dataset = dataset
        self.metrics = metrics
        self.mesh = make_mesh(config.mesh.fsdp)
        self._console = console
        self._preempted = preempted
        self._apply = normalising_apply(module, dataset)
        self._eval_step = jax.jit(make_eval_step(self._apply), out_shardings=replicated(self.mesh))

    def init_network(self) -> dict[str, Any]:
        """``params`` and ``batch_stats`` before any training, of the run's seed."""
        return init_network(self._module, self.dataset.image_shape, self.config.seed)

    def fit(
        self,
        stage: str,
        config: TrainConfig,
        pruner: Pruner,
        optimizer: optax.GradientTransformation,
        network: dict[str, Any] | None,
        resume: Resume,
        keep: Callable[[TrainState, int], None] = lambda state, epoch: None,
        settle: Callable[[], None] = lambda: None,
    ) -> TrainState:
        """Trains one stage to its end, from its last saved state or from ``network``, a new one if that is None.

        ``keep(state, epoch)`` sees every epoch's end; ``settle()`` returns when what it wrote is on disk.

        Raises:
          Preempted: if a process was asked to stop, after the state was saved.
          RunError: if the loss is no number.
        """
        dataset, mesh = self.dataset, self.mesh
        first_state, abstract = self.first_state(pruner, optimizer, network)
        state = resume.restore(abstract)
        if state is None:
            state = first_state()
        new_totals = jax.jit(zero_totals, out_shardings=replicated(mesh))
        step_fn = jit_step(
            make_train_step(self._apply, optimizer, pruner, cross_entropy(config.label_smoothing)), abstract, mesh
        )
        steps_per_epoch = config.steps_per_epoch(dataset.train_size)
        step = first = int(state.step)
        if first:
            log.info("%s: goes on from step %d", stage, first)
        self.metrics.rewind(stage, first)
        if first % steps_per_epoch == 0:
            keep(state, first // steps_per_epoch)  # entry 0, or one that was lost with the process that wrote it
        batches = self._train_batches(config.batch_size, first)
        total = config.steps(dataset.train_size)
        with progress_bar(self._console, stage, total, first, config.batch_size) as advance:
            while step < total:
                if step % steps_per_epoch == 0:
                    state = state.replace(totals=new_totals())
                batch = next(batches)
                with jax.transfer_guard("disallow"):
                    state = step_fn(state, batch)
                step += 1
                advance()
                if step % LOG_EVERY == 0 or step % steps_per_epoch == 0:
                    self.metrics.write(stage, "train", step, self._means(stage, step, state))
                if step % steps_per_epoch == 0:
                    # The state goes first: a run that ends during the evaluations makes the entry from it. Only an
                    # entry at the end of an epoch can be made anew, so the one before this must be on disk by now.
                    settle()
                    resume.save(step, state)
                    keep(state, step // steps_per_epoch)
                if self._preempted() and step < total:
                    # The same of a state within an epoch.
                    self._means(stage, step, state)
                    settle()
                    resume.save(step, state)
                    resume.wait()
                    raise Preempted(
                        f"asked to stop: step {step} of {stage} is saved, and the same command goes on from there"
                    )
        return state

    def first_state(
        self, pruner: Pruner, optimizer: optax.GradientTransformation, network: dict[str, Any] | None
    ) -> tuple[Callable[[], TrainState], TrainState]:
        """What makes the state before the first step, and the shapes, types and shardings of its leaves."""

        def initial(key: jax.Array, network: dict[str, Any] | None) -> TrainState:
            variables = self.init_network() if network is None else network
            return create_state(variables["params"], variables["batch_stats"], optimizer, pruner, key)

        key = jax.random.key(self.config.seed)
        make, abstract = jit_beginning(initial, self.mesh, key, network)
        return lambda: make(key, network), abstract

    def evaluate(self, batch_stats: Any, *networks: Any) -> list[dict[str, float]]:
        """Top-1 and top-5 in percent and mean loss of each of the parameters over the held-out images, read once.

        Raises:
          RunError: if a loss is no number, or there is none since no image could be read.
        """
        devices = jax.device_count()
        batch_size = math.ceil(min(self.config.train.batch_size * 2, self.dataset.eval_size) / devices) * devices
        sums: Any = None
        for batch in self.dataset.evaluate(
            batch_size, process_index=jax.process_index(), process_count=jax.process_count()
        ):
            images = global_batch(batch, self.mesh)
            counts = [self._eval_step(params, batch_stats, images) for params in networks]
            sums = counts if sums is None else jax.tree.map(jnp.add, sums, counts)
        sums = jax.device_get(sums)
        if not sums[0]["examples"]:
            raise RunError(
                f"none of the held-out images of {self.dataset.name} can be read. What was saved before is whole: "
                "prepare the dataset again, and the same command goes on from there"
            )
        figures = [
            {
                "top1": 100 * float(counts["top1"]) / float(counts["examples"]),
                "top5": 100 * float(counts["top5"]) / float(counts["examples"]),
                "loss": float(counts["loss"]) / float(counts["examples"]),
            }
            for counts in sums
        ]
        for network in figures:
            if not math.isfinite(network["loss"]):
                raise RunError(
                    f"the loss on held-out images is {network['loss']}: some weights, biases or batch statistics of "
                    "the network are no numbers, or far too large. What was saved before is whole. Start in another "
                    "--workdir, with another dense network or a lower learning rate"
                )
        return figures

    def _means(self, stage: str, step: int, state: TrainState) -> dict[str, float]:
        """The running means of the epoch. Stops a run whose loss is no number before it is saved."""
        totals = {name: float(value) for name, value in jax.device_get(state.totals).items()}
        loss = totals["loss"] / totals["examples"]
        if not math.isfinite(loss):
            flag, kept = "--train.learning-rate", f", with --dense={self.config.dense or self.config.own_dense}"
            if stage == "pretrain":
                flag, kept = "--pretrain.learning-rate", ""
            raise RunError(
                f"the loss is {loss} at step {step} of {stage}; what was saved before is whole. Lower {flag} and start "
                f"in another --workdir{kept}"
            )
        return {"loss": loss, "accuracy": 100 * totals["correct"] / totals["examples"]}

    def _train_batches(self, batch_size: int, start_step: int) -> Iterator[dict[str, jax.Array]]:
        stream = self.dataset.train(
            batch_size,
            seed=self.config.seed,
            start_step=start_step,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        return (global_batch(batch, self.mesh) for batch in stream)
