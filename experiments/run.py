"""A whole run: train a dense network or take one, prune it epoch by epoch into a trail, and report."""

import contextlib
import hashlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from rich.console import Console

import ltp_jax as ltp
from experiments import distributed, report
from experiments.components import (
    check_batch,
    check_network,
    cost_of,
    ltp_pruner,
    network_shapes,
    network_uses,
    weights_optimizer,
)
from experiments.config import Config, LtpConfig
from experiments.console import MetricsWriter, log, start_logging
from experiments.data.dataset import Dataset
from experiments.ending import RunError, nobody_waits
from experiments.options import ConfigError
from experiments.record import of_a_job, only_writer, record
from experiments.trainer import Trainer
from ltp_jax.checkpoints import Resume, TrailError, holds_network, restore_network, save_network
from ltp_jax.pruner import Pruner, dense
from ltp_jax.sharding import replicated
from ltp_jax.trail import Entry, Trail
from ltp_jax.training import TrainState


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
      start: what to begin from; a random start if not given.

    Returns:
      The finished trail.

    Raises:
      ConfigError: if the options do not go with the network, the data or the devices; nothing is written then. Later,
        if the hosts do not share the working directory, or a dense network that was trained or taken here cannot be
        pruned.
      RunError: if another run writes to the same directory, or the loss is no number.
      Preempted: if a process was asked to stop, after the state was saved.
    """
    uses, weights = check_options(config, module, dataset, start)
    with contextlib.ExitStack() as stack:
        refusal = None
        if jax.process_index() == 0:
            try:
                stack.enter_context(only_writer(config.workdir))
            except (ConfigError, RunError, OSError) as error:
                refusal = error
        distributed.check_first(refusal)
        distributed.check_shared(config.workdir)
        images = {"training": dataset.train_size, "held out": dataset.eval_size, "classes": dataset.num_classes}
        distributed.check_same(of_a_job(config) | {"images": images, "weights": weights})
        record(
            config,
            images=images,
            weights=weights,
            pretrains=config.dense is None and not (start and start.trained),
            write=jax.process_index() == 0,
        )
        console = Console()
        start_logging(config.workdir, console)
        if jax.process_count() > 1:
            log.info("process %d of %d, %d devices", jax.process_index(), jax.process_count(), jax.device_count())
        metrics = stack.enter_context(contextlib.closing(MetricsWriter(config.workdir, config.tensorboard)))
        with distributed.preemption_notice() as preempted:
            trainer = Trainer(config, module, dataset, metrics, console, preempted)
            trail = prune(trainer, *dense_network(trainer, start), uses)
        if jax.process_index() == 0:
            paths = report.write(trail, config.workdir / "report", title=f"{config.arch} on {dataset.name}")
            console.print(report.terminal_table(trail, console.width))
            log.info("report: %s", paths["table"])
    return trail


def check_options(
    config: Config, module: nn.Module, dataset: Dataset, start: Start | None = None
) -> tuple[Mapping[str, float], str | None]:
    """Raises ConfigError or TrailError, before anything is trained, for options that cannot come to an end.

    Returns:
      How often each weight is used for one image, by path, which takes a trace of the network to count; and the digest
      of the weights that the run was given to begin from, if it was.
    """
    found = check_network_and_devices(
        config,
        module,
        dataset.image_shape,
        images=dataset.train_size,
        dataset=dataset.name,
        devices=jax.device_count(),
        pretrains=trains_dense(config, trained=start is not None and start.trained),
    )
    if config.dense is not None:
        return found.uses, digest(check_dense(config.dense, config, found.shapes, found.plan))
    return found.uses, start and start.digest


class Checked(NamedTuple):
    """What was found of a network.

    Attributes:
      shapes: of ``params`` and ``batch_stats``.
      plan: what is pruned.
      uses: of each weight for one image, by path.
    """

    shapes: dict[str, Any]
    plan: ltp.Plan
    uses: dict[str, float]


def check_network_and_devices(
    config: Config,
    module: nn.Module,
    image_shape: tuple[int, ...],
    *,
    images: int,
    dataset: str,
    devices: int,
    pretrains: bool,
) -> Checked:
    """Raises ConfigError for options that do not go with the network, the number of images or that of the devices.

    Neither the images nor the devices need be there. ``pretrains`` says whether the dense network is trained, too.
    """
    # With these every part of the mesh gets whole images: fsdp divides the devices, and they divide the batch.
    if devices % config.mesh.fsdp:
        raise ConfigError(f"--mesh.fsdp is {config.mesh.fsdp}; accepted are divisors of the {devices} devices")
    check_batch("train", config.train, devices, images, dataset)
    if pretrains:
        check_batch("pretrain", config.pretrain, devices, images, dataset)
    shapes = network_shapes(module, image_shape)
    plan = ltp.plan(shapes["params"])
    uses = network_uses(module, image_shape, plan)
    ltp_pruner(config.ltp, plan, config.train.steps(images), uses)
    return Checked(shapes, plan, uses)


def check_dense(path: Path, config: Config, network: Any, plan: ltp.Plan) -> dict[str, Any]:
    """The dense network of a path.

    Raises:
      ConfigError, TrailError: if it has none of these shapes that can be pruned.
    """
    # What Orbax says of a directory that it did not write helps nobody.
    if path.is_dir() and not holds_network(path):
        raise ConfigError(
            f"--dense is {path}, which holds no network of this project; accepted is the dense/ of another run"
        )
    given = restore_network(path)
    check_network(given, network, path, config.arch)
    check_weights(given["params"], plan, config.ltp)
    return given


def digest(network: dict[str, Any]) -> str:
    """The SHA-256 of the values of a network."""
    values = hashlib.sha256()
    for leaf in jax.tree.leaves(network):
        values.update(np.asarray(leaf).tobytes())
    return values.hexdigest()


def trains_dense(config: Config, *, trained: bool) -> bool:
    """Whether a run that is to begin from a network, trained already or not, has a dense network to train."""
    return config.dense is None and not trained and not config.own_dense.is_dir()


def check_weights(params: Any, plan: ltp.Plan, config: LtpConfig) -> None:
    """Raises ConfigError for a dense network with a tensor that has no temperature, being constant or not finite."""
    try:
        ltp.init(params, plan, config.temperature)  # here, since under jit it cannot look at values
    except ValueError as error:
        raise ConfigError(f"the dense network cannot be pruned: {error}") from error


def dense_network(trainer: Trainer, start: Start | None) -> tuple[Any, Any]:
    """Parameters and batch statistics of the dense network: given, trained before, or trained now."""
    config = trainer.config
    if config.dense is None:
        if not config.own_dense.is_dir():
            make_dense(trainer, start)
        if jax.process_index() == 0:  # what an interrupted start left is cleared away, too
            states = config.workdir / "pretrain"
            for stale in (*states.glob("[0-9]*"), *config.workdir.glob("dense.orbax-checkpoint-tmp*")):
                shutil.rmtree(stale, ignore_errors=True)
            with contextlib.suppress(OSError):  # somebody else may keep other things there, or nothing is there
                states.rmdir()
    path = config.dense or config.own_dense
    try:
        network = restore_network(path)
    except TrailError as error:
        if config.dense is not None:
            raise
        raise TrailError(f"{error}; remove {path}, and it is made anew") from error
    check_network(network, jax.eval_shape(trainer.init_network), path, config.arch)
    log.info("dense network: %s", path)
    return network["params"], network["batch_stats"]


def make_dense(trainer: Trainer, start: Start | None) -> None:
    """Writes the dense network: what the run begins from, or what is trained from that or from a random start."""
    config = trainer.config
    if start is None:
        pretrain(trainer, None)
        return
    network = start.network()
    check_network(network, jax.eval_shape(trainer.init_network), config.workdir, config.arch)
    if start.trained:
        check_weights(network["params"], ltp.plan(network["params"]), config.ltp)
        take(trainer, network, start.expected_top1)
    else:
        pretrain(trainer, network)


def take(trainer: Trainer, network: dict[str, Any], expected_top1: float | None) -> None:
    """Writes a trained network as the dense one, and says so if it is not what its publisher measured."""
    params, batch_stats = jax.device_put((network["params"], network["batch_stats"]), replicated(trainer.mesh))
    if expected_top1 is not None:
        (figures,) = trainer.evaluate(batch_stats, params)
        top1 = figures["top1"]
        if abs(top1 - expected_top1) > 1:
            log.warning(
                "the dense network has %.2f %% top-1 where %.2f %% was published for these weights: check that the "
                "weights, --origin and the data belong together before you let this run go on",
                top1,
                expected_top1,
            )
    save_network(trainer.config.own_dense, params, batch_stats)


def pretrain(trainer: Trainer, begin: dict[str, Any] | None) -> None:
    """Trains the dense network, from a random start if nothing is given, and writes it."""
    config = trainer.config.pretrain
    optimizer = weights_optimizer(config, config.steps_per_epoch(trainer.dataset.train_size))
    # What was begun in the background is finished, whatever ends the stage.
    with contextlib.closing(Resume(trainer.config.workdir / "pretrain")) as resume, nobody_waits():
        state = trainer.fit("pretrain", config, dense(), optimizer, begin, resume)
        save_network(trainer.config.own_dense, state.params, state.batch_stats)


def prune(trainer: Trainer, params: Any, batch_stats: Any, uses: Mapping[str, float]) -> Trail:
    """Prunes a dense network, whose weights have these uses; each epoch's network is an entry of the trail."""
    config = trainer.config
    plan = ltp.plan(params)
    log.info("plan:\n%s", plan)
    check_weights(params, plan, config.ltp)
    pruner = ltp_pruner(config.ltp, plan, config.train.steps(trainer.dataset.train_size), uses)
    optimizer = weights_optimizer(config.train, config.train.steps_per_epoch(trainer.dataset.train_size))
    with (
        contextlib.closing(Trail(config.workdir / "trail", create=True)) as trail,
        contextlib.closing(Resume(config.workdir / "resume")) as resume,
        nobody_waits(),
    ):
        network = {"params": params, "batch_stats": batch_stats}
        keep = keeper(trainer, pruner, trail, uses)
        latest = max(trail.epochs, default=0)
        if latest and not resume.steps and latest < config.train.epochs:
            log.warning(
                "the trail goes to epoch %d, but there is no state in %s to go on from: training starts over, and "
                "the entries that are there stay as they are",
                latest,
                resume.path,
            )
        if latest and 0 not in trail.epochs:  # it was broken and removed, and no state leads to it
            first, _ = trainer.first_state(pruner, optimizer, network)
            keep(first(), 0)
        if resume.steps or latest < config.train.epochs:
            trainer.fit("prune", config.train, pruner, optimizer, network, resume, keep, settle=trail.wait)
    trail = Trail(config.workdir / "trail")
    if missing := sorted(set(range(config.train.epochs + 1)) - set(trail.epochs)):
        log.warning(
            "the trail has no entries of the epochs %s: they were removed, and the states that made them are gone; "
            "only a run in another --workdir makes them anew",
            ", ".join(map(str, missing)),
        )
    return trail


def keeper(
    trainer: Trainer, pruner: Pruner, trail: Trail, uses: Mapping[str, float]
) -> Callable[[TrainState, int], None]:
    """What makes an entry of the trail from the state at the end of an epoch, if it has none of that epoch yet."""
    harden, soften = jax.jit(pruner.harden), jax.jit(lambda *args: pruner.soften(*args)[0])
    summarize = jax.jit(
        lambda params, pruning: ltp.summarize(params, pruning.prune), out_shardings=replicated(trainer.mesh)
    )

    def keep(state: TrainState, epoch: int) -> None:
        if epoch in trail.epochs:  # written by a start of this run that ended before it saved its state
            entry = next(entry for entry in trail.entries if entry.epoch == epoch)
            trainer.metrics.write("prune", "entry", entry.step, entry.figures())
            return
        hard = harden(state.params, state.pruning)
        soft = soften(state.params, state.pruning.thresholds, state.pruning, state.step)
        figures, soft_figures = trainer.evaluate(state.batch_stats, hard, soft)
        summary, totals = jax.device_get((summarize(state.params, state.pruning), state.totals))
        # The report shows layers in the order in which the network calls them, and not by name.
        summary = summary.replace(tensors={path: summary.tensors[path] for path in uses})
        macs, macs_left = cost_of(summary, uses)
        entry = Entry.of(
            summary,
            epoch=epoch,
            step=int(state.step),
            **figures,
            **{f"soft_{name}": figure for name, figure in soft_figures.items()},
            train_loss=float(totals["loss"] / totals["examples"]) if totals["examples"] else None,
            macs_compression=macs / max(macs_left, 1),
        )
        trail.save(entry, hard, state.batch_stats)
        trainer.metrics.write("prune", "entry", entry.step, entry.figures())
        log.info("%s (soft %.2f %%)", entry, entry.soft_top1)

    return keep
