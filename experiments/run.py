"""A whole run: train a dense network or take one, prune it epoch by epoch into a trail, and report."""

import contextlib
import dataclasses
import functools
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from rich.console import Console

import ltp_jax as ltp
from experiments import distributed, report
from experiments.components import (
    budget_left,
    check_batch,
    check_network,
    init_network,
    ltp_pruner,
    network_uses,
    normalising_apply,
    weights_optimizer,
)
from experiments.config import Config, LtpConfig, TrainConfig
from experiments.console import MetricsWriter, log, progress_bar, start_logging
from experiments.data.dataset import Dataset
from experiments.ending import Preempted, RunError, nobody_waits
from experiments.options import ConfigError
from experiments.record import of_a_job, only_writer, record
from ltp_jax.checkpoints import Resume, TrailError, holds_network, restore_network, save_network
from ltp_jax.pruner import Pruner, dense
from ltp_jax.sharding import global_batch, jit_beginning, jit_step, make_mesh, replicated
from ltp_jax.trail import Entry, Trail
from ltp_jax.training import (
    TrainState,
    create_state,
    cross_entropy,
    make_eval_step,
    make_train_step,
    zero_totals,
)

LOG_EVERY = 50  # steps between two looks at the loss, which cost a wait for the device


class Start(NamedTuple):
    """What a run begins from when it has no dense network of its own yet.

    Attributes:
      network: gives ``params`` and ``batch_stats``, arrays of any kind; asked only if there is no dense network yet.
      trained: whether this is the dense network already, or is to be trained into it.
      expected_top1: what its publisher measured on this dataset, in percent, if that is known.
      digest: of the file that it is read from, if there is one; a run goes on with the same alone.
    """

    network: Callable[[], dict[str, Any]]
    trained: bool
    expected_top1: float | None = None
    digest: str | None = None


def run(config: Config, module: nn.Module, dataset: Dataset, start: Start | None = None) -> Trail:
    """Carries out the configuration, from wherever an earlier start of the same command left it.

    Args:
      config: what to do.
      module: the network; takes normalised images and ``train``.
      dataset: what it learns.
      start: what to begin from; a random start if nothing is said.

    Returns:
      The finished trail.

    Raises:
      ConfigError: if the options do not go with the network, the data or the devices; nothing is written then. Later,
        if the hosts do not share the working directory, or a dense network that was trained or taken here cannot be
        pruned.
      RunError: if another run writes to the same directory, or the loss is no number.
      Preempted: if a process was asked to stop, after the state was saved.
    """
    uses = check_options(config, module, dataset, start)
    with contextlib.ExitStack() as stack:
        refusal = None
        if jax.process_index() == 0:
            try:
                stack.enter_context(only_writer(config.workdir))
            except (ConfigError, RunError, OSError) as error:
                refusal = error
        distributed.check_first(refusal)
        distributed.check_shared(config.workdir)
        distributed.check_same(of_a_job(config))
        record(config, weights=start and start.digest, write=jax.process_index() == 0)
        console = Console()
        start_logging(config.workdir, console)
        if jax.process_count() > 1:
            log.info("process %d of %d, %d devices", jax.process_index(), jax.process_count(), jax.device_count())
        metrics = MetricsWriter(config.workdir, config.tensorboard)
        with distributed.preemption_notice() as preempted:
            job = Job(config, module, dataset, start, metrics, console, preempted)
            params, batch_stats = job.dense_network()
            trail = job.prune(params, batch_stats, uses)
        metrics.close()
        if jax.process_index() == 0:
            paths = report.write(trail, config.workdir / "report", title=f"{config.arch} on {dataset.name}")
            console.print(report.terminal_table(trail, console.width))
            log.info("report: %s", paths["table"])
    return trail


def check_options(
    config: Config, module: nn.Module, dataset: Dataset, start: Start | None = None
) -> Mapping[str, float]:
    """Raises ConfigError or TrailError, before anything is trained, for options that cannot come to an end.

    Returns:
      How often each weight is used for one image, by path, which takes a trace of the network to count.
    """
    try:
        make_mesh(config.mesh.fsdp)
    except ValueError as error:
        raise ConfigError(f"--mesh.fsdp: {error}") from error
    devices = jax.device_count()
    check_batch("train", config.train, devices, dataset.train_size, dataset.name)
    if trains_dense(config, trained=start is not None and start.trained):
        check_batch("pretrain", config.pretrain, devices, dataset.train_size, dataset.name)
    network = jax.eval_shape(lambda: init_network(module, dataset.image_shape, config.seed))
    plan = ltp.plan(network["params"])
    uses = network_uses(module, dataset.image_shape, plan)
    make_pruner(config, plan, uses, dataset)
    if config.dense is not None:
        # What Orbax says of a directory that it did not write helps nobody.
        if config.dense.is_dir() and not holds_network(config.dense):
            raise ConfigError(
                f"--dense is {config.dense}, which holds no network of this project; accepted is the dense/ of another "
                "run"
            )
        given = restore_network(config.dense)
        check_network(given, network, config.dense, config.arch)
        check_weights(given["params"], plan, config.ltp)
    return uses


def trains_dense(config: Config, *, trained: bool) -> bool:
    """Whether a run that is to begin from a network, trained already or not, has a dense network to train."""
    return config.dense is None and not trained and not config.own_dense.is_dir()


def check_weights(params: Any, plan: ltp.Plan, config: LtpConfig) -> None:
    """Raises ConfigError for a dense network with a tensor that has no temperature, being constant or not finite."""
    try:
        ltp.init(params, plan, config.temperature)  # here, since under jit it cannot look at values
    except ValueError as error:
        raise ConfigError(f"the dense network cannot be pruned: {error}") from error


def make_pruner(config: Config, plan: ltp.Plan, uses: Mapping[str, float], dataset: Dataset) -> Pruner:
    """LTP as the options have it, for this network and this many images."""
    return ltp_pruner(config.ltp, plan, config.train.epochs * config.train.steps_per_epoch(dataset.train_size), uses)


class Job:
    """What the stages of a run share: network, data, devices, and where to write."""

    def __init__(
        self,
        config: Config,
        module: nn.Module,
        dataset: Dataset,
        start: Start | None,
        metrics: MetricsWriter,
        console: Console,
        preempted: Callable[[], bool],
    ):
        self.config = config
        self.dataset = dataset
        self.start = start
        self.metrics = metrics
        self.console = console
        self.preempted = preempted
        self.mesh = make_mesh(config.mesh.fsdp)
        self.module = module
        self.apply = normalising_apply(module, dataset)
        self.eval_step = jax.jit(make_eval_step(self.apply), out_shardings=replicated(self.mesh))

    def dense_network(self) -> tuple[Any, Any]:
        """Parameters and batch statistics of the dense network: given, trained before, or trained now."""
        config = self.config
        if config.dense is None:
            if not config.own_dense.is_dir():
                self._make_dense(config.own_dense)
            if jax.process_index() == 0:  # what an interrupted start left is cleared away, too
                for stale in (config.workdir / "pretrain", *config.workdir.glob("dense.orbax-checkpoint-tmp*")):
                    shutil.rmtree(stale, ignore_errors=True)
        path = config.dense or config.own_dense
        try:
            network = restore_network(path)
        except TrailError as error:
            if config.dense is not None:
                raise
            raise TrailError(f"{error}; remove {path}, and it is made anew") from error
        check_network(network, jax.eval_shape(self._init_network), path, config.arch)
        log.info("dense network: %s", path)
        return network["params"], network["batch_stats"]

    def _make_dense(self, path: Path) -> None:
        """Writes the dense network: what the run begins from, or what is trained from that or from a random start."""
        if self.start is None:
            self._pretrain(path, None)
            return
        network = self.start.network()
        check_network(network, jax.eval_shape(self._init_network), self.config.workdir, self.config.arch)
        if self.start.trained:
            check_weights(network["params"], ltp.plan(network["params"]), self.config.ltp)
            self._take(network, self.start.expected_top1, path)
        else:
            self._pretrain(path, network)

    def _take(self, network: dict[str, Any], expected_top1: float | None, path: Path) -> None:
        """Writes a trained network as the dense one, and says so if it is not what its publisher measured."""
        params, batch_stats = jax.device_put((network["params"], network["batch_stats"]), replicated(self.mesh))
        if expected_top1 is not None:
            (figures,) = self._evaluate(batch_stats, params)
            top1 = figures["top1"]
            if abs(top1 - expected_top1) > 1:
                log.warning(
                    "the dense network has %.2f %% top-1 where %.2f %% was published for these weights: check that the "
                    "weights, --origin and the data belong together before you let this run go on",
                    top1,
                    expected_top1,
                )
        save_network(path, params, batch_stats)

    def _pretrain(self, path: Path, begin: dict[str, Any] | None) -> None:
        """Trains the dense network and writes it."""
        config = self.config.pretrain
        optimizer = weights_optimizer(config, config.steps_per_epoch(self.dataset.train_size))
        # What was begun in the background is finished, whatever ends the stage.
        with (
            contextlib.closing(Resume(self.config.workdir / "pretrain")) as resume,
            nobody_waits(),
        ):
            state = self._fit(
                "pretrain",
                config,
                dense(),
                optimizer,
                begin,
                resume,
                keep=lambda state, epoch: None,
                settle=lambda: None,
            )
            save_network(path, state.params, state.batch_stats)

    def prune(self, params: Any, batch_stats: Any, uses: Mapping[str, float]) -> Trail:
        """Prunes a dense network, whose weights have these uses; each epoch's network is an entry of the trail."""
        config = self.config
        steps_per_epoch = config.train.steps_per_epoch(self.dataset.train_size)
        plan = ltp.plan(params)
        log.info("plan:\n%s", plan)
        check_weights(params, plan, config.ltp)
        pruner = make_pruner(config, plan, uses, self.dataset)
        optimizer = weights_optimizer(config.train, steps_per_epoch)
        harden, soften = jax.jit(pruner.harden), jax.jit(lambda *args: pruner.soften(*args)[0])
        summarize = jax.jit(
            lambda params, pruning: ltp.summarize(params, pruning.prune), out_shardings=replicated(self.mesh)
        )

        def keep(trail: Trail, state: TrainState, epoch: int) -> None:
            if epoch in trail.epochs:  # written by a start of this run that ended before it saved its state
                entry = next(entry for entry in trail.entries if entry.epoch == epoch)
                self.metrics.write("prune", "entry", entry.step, entry.figures())
                return
            hard = harden(state.params, state.pruning)
            soft = soften(state.params, state.pruning.thresholds, state.pruning, state.step)
            figures, soft_figures = self._evaluate(state.batch_stats, hard, soft)
            summary, totals = jax.device_get((summarize(state.params, state.pruning), state.totals))
            macs, macs_left = budget_left(summary, uses)
            entry = Entry.of(
                summary,
                epoch=epoch,
                step=int(state.step),
                top1=figures["top1"],
                top5=figures["top5"],
                loss=figures["loss"],
                soft_top1=soft_figures["top1"],
                soft_top5=soft_figures["top5"],
                soft_loss=soft_figures["loss"],
                train_loss=float(totals["loss"] / totals["examples"]) if totals["examples"] else None,
                macs_compression=macs / max(macs_left, 1),
            )
            # The report shows layers in the order in which the network calls them, and not by name.
            entry = dataclasses.replace(
                entry,
                densities={path: entry.densities[path] for path in uses},
                thresholds={path: entry.thresholds[path] for path in uses},
            )
            trail.save(entry, hard, state.batch_stats)
            self.metrics.write("prune", "entry", entry.step, entry.figures())
            log.info("%s (soft %.2f %%)", entry, entry.soft_top1)

        with (
            contextlib.closing(Trail(config.workdir / "trail", create=True)) as trail,
            contextlib.closing(Resume(config.workdir / "resume")) as resume,
            nobody_waits(),
        ):
            network = {"params": params, "batch_stats": batch_stats}
            keep_in_trail = functools.partial(keep, trail)
            latest = max(trail.epochs, default=0)
            if latest and not resume.steps and latest < config.train.epochs:
                log.warning(
                    "the trail goes to epoch %d, but there is no state in %s to go on from: training starts over, and "
                    "the entries that are there stay as they are",
                    latest,
                    resume.path,
                )
            if latest and 0 not in trail.epochs:  # it was broken and removed, and no state leads to it
                first, _ = self._first_state(pruner, optimizer, network)
                keep_in_trail(first(), 0)
            if resume.steps or latest < config.train.epochs:
                self._fit("prune", config.train, pruner, optimizer, network, resume, keep_in_trail, settle=trail.wait)
        return Trail(config.workdir / "trail")

    def _fit(
        self,
        stage: str,
        config: TrainConfig,
        pruner: Pruner,
        optimizer: optax.GradientTransformation,
        network: dict[str, Any] | None,
        resume: Resume,
        keep: Callable[[TrainState, int], None],
        settle: Callable[[], None],
    ) -> TrainState:
        """Trains one stage to its end, from its last saved state or from ``network``, a new one if that is None.

        ``keep(state, epoch)`` sees every epoch's end; ``settle()`` returns when what it wrote is on disk.

        Raises:
          Preempted: if a process was asked to stop, after the state was saved.
        """
        dataset, mesh = self.dataset, self.mesh
        first_state, abstract = self._first_state(pruner, optimizer, network)
        state = resume.restore(abstract)
        if state is None:
            state = first_state()
        new_totals = jax.jit(zero_totals, out_shardings=replicated(mesh))
        step_fn = jit_step(
            make_train_step(self.apply, optimizer, pruner, cross_entropy(config.label_smoothing)), abstract, mesh
        )
        steps_per_epoch = config.steps_per_epoch(dataset.train_size)
        step = first = int(state.step)
        if first:
            log.info("%s: goes on from step %d", stage, first)
        self.metrics.rewind(stage, first)
        if first % steps_per_epoch == 0:
            keep(state, first // steps_per_epoch)  # entry 0, or one that was lost with the process that wrote it
        batches = self._train_batches(config.batch_size, first)
        total = config.epochs * steps_per_epoch
        with progress_bar(self.console, stage, total, first, config.batch_size) as advance:
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
                if self.preempted() and step < total:
                    # The same of a state within an epoch.
                    self._means(stage, step, state)
                    settle()
                    resume.save(step, state)
                    resume.wait()
                    raise Preempted(
                        f"asked to stop: step {step} of {stage} is saved, and the same command goes on from there"
                    )
        return state

    def _first_state(
        self, pruner: Pruner, optimizer: optax.GradientTransformation, network: dict[str, Any] | None
    ) -> tuple[Callable[[], TrainState], TrainState]:
        """What makes the state before the first step, and the shapes, types and shardings of its leaves."""

        def initial(key: jax.Array, network: dict[str, Any] | None) -> TrainState:
            variables = self._init_network() if network is None else network
            return create_state(variables["params"], variables["batch_stats"], optimizer, pruner, key)

        key = jax.random.key(self.config.seed)
        make, abstract = jit_beginning(initial, self.mesh, key, network)
        return lambda: make(key, network), abstract

    def _means(self, stage: str, step: int, state: TrainState) -> dict[str, float]:
        """The running means of the epoch. Stops a run whose loss is no number before it is saved."""
        totals = {name: float(value) for name, value in jax.device_get(state.totals).items()}
        loss = totals["loss"] / totals["examples"]
        if not math.isfinite(loss):
            raise RunError(
                f"the loss is {loss} at step {step} of {stage}; what was saved before is whole. Lower "
                f"--{'pretrain' if stage == 'pretrain' else 'train'}.learning-rate and start in another --workdir"
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

    def _evaluate(self, batch_stats: Any, *networks: Any) -> list[dict[str, float]]:
        """Top-1 and top-5 in percent and mean loss of each of the parameters over the held-out images, read once."""
        devices = jax.device_count()
        batch_size = math.ceil(min(self.config.train.batch_size * 2, self.dataset.eval_size) / devices) * devices
        sums: Any = None
        for batch in self.dataset.evaluate(
            batch_size, process_index=jax.process_index(), process_count=jax.process_count()
        ):
            images = global_batch(batch, self.mesh)
            counts = [self.eval_step(params, batch_stats, images) for params in networks]
            sums = counts if sums is None else jax.tree.map(jnp.add, sums, counts)
        figures = [
            {
                "top1": 100 * float(counts["top1"]) / float(counts["examples"]),
                "top5": 100 * float(counts["top5"]) / float(counts["examples"]),
                "loss": float(counts["loss"]) / float(counts["examples"]),
            }
            for counts in jax.device_get(sums)
        ]
        for network in figures:
            if not math.isfinite(network["loss"]):
                raise RunError(
                    f"the loss on held-out images is {network['loss']}: some weights, biases or batch statistics of "
                    "the network are no numbers, or far too large. What was saved before is whole. Start in another "
                    "--workdir, with another dense network or a lower learning rate"
                )
        return figures

    def _init_network(self) -> dict[str, Any]:
        return init_network(self.module, self.dataset.image_shape, self.config.seed)
