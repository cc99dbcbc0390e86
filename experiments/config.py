"""The typed configuration of a run, and its command line."""

import argparse
import dataclasses
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from experiments.options import ConfigError, read_options, require, require_checkpoint_path, require_local

C = TypeVar("C", bound="Config")

WEEK = 7 * 24 * 3600  # JAX cannot take more than a certain number of seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Training of the weights: SGD with momentum, warm-up, and a cosine to zero."""

    epochs: int
    """Passes over the training data."""
    batch_size: int
    """Images per step, over all devices."""
    learning_rate: float
    """The highest learning rate of the weights."""
    warmup_epochs: float = 0.0
    """Epochs over which the learning rate rises from zero."""
    momentum: float = 0.9
    """Of SGD, in Nesterov's form."""
    weight_decay: float = 0.0
    """L2 penalty on kernels; never on biases, normalisation or thresholds."""
    label_smoothing: float = 0.0
    """Share of each label that is spread over all classes."""

    @property
    def peak_learning_rate(self) -> float:
        """The highest learning rate of the weights, at this batch size."""
        return self.learning_rate

    def steps_per_epoch(self, images: int) -> int:
        """Training steps of an epoch of so many images; those that do not fill a batch are left out."""
        return images // self.batch_size

    def steps(self, images: int) -> int:
        """Training steps of the whole training."""
        return self.epochs * self.steps_per_epoch(images)

    def check(self, name: str) -> None:
        require(self.epochs >= 1, f"--{name}.epochs", self.epochs, "at least 1")
        require(self.batch_size >= 1, f"--{name}.batch-size", self.batch_size, "at least 1")
        require(self.learning_rate > 0, f"--{name}.learning-rate", self.learning_rate, "more than 0")
        require(
            0 <= self.warmup_epochs < self.epochs,
            f"--{name}.warmup-epochs",
            self.warmup_epochs,
            "0 to less than epochs",
        )
        require(0 <= self.momentum < 1, f"--{name}.momentum", self.momentum, "0 to less than 1")
        require(self.weight_decay >= 0, f"--{name}.weight-decay", self.weight_decay, "0 or more")
        require(0 <= self.label_smoothing < 1, f"--{name}.label-smoothing", self.label_smoothing, "0 to less than 1")


TARGETS = ("target_compression", "target_density", "target_macs")
GOALS = ("penalty", *TARGETS)
"""What a run can prune to; accepted is one of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LtpConfig:
    """Learned Threshold Pruning, to a penalty or to a target."""

    penalty: float | None = None
    """λ·N: what keeping all prunable weights costs, in units of the loss; 20 if neither it nor a target is given.
    More prunes more, but how much is not the same from run to run. It takes the place of a target."""
    ramp: float = 1.0
    """With a penalty: share of the learning steps over which it rises linearly from zero."""
    learn: float = 0.5
    """With a penalty: share of the run in which thresholds are learned; then they are frozen while the network
    recovers."""
    reach: float = 6.0
    """With a penalty: how far a threshold can move while it is learned, in units of std(|w|); Adam's rate times the
    learning steps."""
    t0: float | None = None
    """How soft the masks are: the temperature of their sigmoid, in units of Var(|w|) (eq. 15 of arXiv 2003.00075);
    1e-3, or 1e-2 with a target, if not given."""
    target_compression: float | None = None
    """Prunable weights over weights kept that the run is to reach, exactly. It takes the place of the penalty."""
    target_density: float | None = None
    """The same as a share of the prunable weights."""
    target_macs: float | None = None
    """The same as a compression of the multiply-accumulates of one image: weights count as often as they are used."""
    prune: float = 0.5
    """With a target: share of the run in which the density descends to it."""
    select: float = 0.75
    """With a target: share of the run after which the masks are fixed."""
    leak: float = 0.0
    """With a target: share of its gradient that a pruned weight gets at first, so that it may come back; the share
    falls to zero by the time the masks are fixed. 0 is the paper's eq. 14: a pruned weight gets no gradient."""
    exact_gradient: bool = False
    """With a penalty: differentiate the mask with respect to the weights, too, instead of eq. 14."""
    l0_to_weights: bool = False
    """With a penalty: let the gradient of the L0 penalty reach the weights, too."""

    @property
    def density(self) -> float | None:
        """The share of the weights, or of the multiply-accumulates, that the target leaves; None with a penalty."""
        compression = self.target_compression or self.target_macs
        return 1 / compression if compression else self.target_density

    def descent(self, steps: int) -> int:
        """Of the training steps of a run, those in which the density descends to the target; one at least."""
        return max(round(self.prune * steps), 1)

    @property
    def to_target(self) -> bool:
        """Whether the goal is a target, and no penalty."""
        return self.density is not None

    @property
    def temperature(self) -> float:
        """``t0``, whether it was given or not."""
        if self.t0 is not None:
            return self.t0
        return 1e-2 if self.to_target else 1e-3

    @property
    def idle(self) -> tuple[str, ...]:
        """The options that have a value all the same where the goal gives them no meaning."""
        return ("ramp", "learn", "reach") if self.to_target else ("prune", "select")

    def check(self) -> None:
        require(self.penalty is None or self.penalty >= 0, "--ltp.penalty", self.penalty, "0 or more")
        require(0 <= self.ramp <= 1, "--ltp.ramp", self.ramp, "0 to 1")
        require(0 < self.learn <= 1, "--ltp.learn", self.learn, "more than 0, at most 1")
        require(self.reach > 0, "--ltp.reach", self.reach, "more than 0")
        require(self.t0 is None or self.t0 > 0, "--ltp.t0", self.t0, "more than 0")
        targets = {name: value for name in TARGETS if (value := getattr(self, name)) is not None}
        for name, value in targets.items():
            flag = f"--ltp.{name.replace('_', '-')}"
            if name == "target_density":
                require(0 < value < 1, flag, value, "more than 0, less than 1")
            else:
                require(value > 1, flag, value, "more than 1")
        given = [f"--ltp.{name.replace('_', '-')}" for name in GOALS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} exclude each other; accepted is one of them")
        if targets and (self.exact_gradient or self.l0_to_weights):
            raise ConfigError("--ltp.exact-gradient and --ltp.l0-to-weights go with a penalty, not with a target")
        require(0 < self.prune <= self.select, "--ltp.prune", self.prune, "more than 0, at most --ltp.select")
        require(self.select <= 1, "--ltp.select", self.select, "at most 1")
        require(0 <= self.leak <= 1, "--ltp.leak", self.leak, "0 to 1")
        if self.leak and not targets:
            raise ConfigError("--ltp.leak goes with a target, not with a penalty")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How devices share the work."""

    fsdp: int = 1
    """Devices that each parameter is split over; 1 keeps the parameters whole on every device."""

    def check(self) -> None:
        require(self.fsdp >= 1, "--mesh.fsdp", self.fsdp, "at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """Where the other processes of the job are; if not given, a cluster's environment says it."""

    coordinator_address: str | None = None
    """HOST:PORT of the first process."""
    num_processes: int | None = None
    """How many processes there are."""
    process_id: int | None = None
    """Which of them this one is, from 0."""
    heartbeat_timeout: int = 100
    """Seconds of silence after which a process counts as lost and the others stop."""
    initialization_timeout: int = 300
    """Seconds to wait for all processes to start."""

    def check(self) -> None:
        name = "--distributed"
        address = self.coordinator_address
        match = re.fullmatch(r".+:(\d+)", address or "HOST:1")
        require(
            match is not None and 0 < int(match[1]) < 2**16,
            f"{name}.coordinator-address",
            address,
            "HOST:PORT, the port 1 to 65535",
        )
        processes, index = self.num_processes, self.process_id
        require(processes is None or processes >= 1, f"{name}.num-processes", processes, "at least 1")
        require(
            index is None or processes is None or 0 <= index < processes,
            f"{name}.process-id",
            index,
            "0 to less than --distributed.num-processes",
        )
        for option in ("heartbeat_timeout", "initialization_timeout"):
            seconds, flag = getattr(self, option), f"{name}.{option.replace('_', '-')}"
            require(1 <= seconds <= WEEK, flag, seconds, f"1 to {WEEK} seconds, a week")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The options that every experiment has."""

    arch: str
    """The network."""
    workdir: Path
    """Where the run writes: trail/, resume/, dense/, report/, config.json, metrics.jsonl, log.txt."""
    data_dir: Path | None = None
    """Where TFDS finds its datasets; its own default if not given."""
    dense: Path | None = None
    """A trained dense network to prune: the dense/ of another run. Trained here first if not given."""
    seed: int = 0
    """Of initialisation, data order, augmentation and dropout; both stages of a run begin with the same."""
    tensorboard: bool = False
    """Write TensorBoard files to tensorboard/ as well, a run for each stage."""
    pretrain: TrainConfig
    """Training of the dense network."""
    train: TrainConfig
    """Training while pruning."""
    ltp: LtpConfig = LtpConfig()
    mesh: MeshConfig = MeshConfig()
    distributed: DistributedConfig = DistributedConfig()

    @property
    def own_dense(self) -> Path:
        """Where the run keeps the dense network that it trained or took; ``--dense`` is that of another."""
        return self.workdir / "dense"

    def check(self) -> None:
        """Raises ConfigError for the first option that is impossible."""
        require(0 <= self.seed < 2**32, "--seed", self.seed, "0 to 4294967295")
        require_local(self, "data_dir")
        require_checkpoint_path("--workdir", self.workdir)
        if self.dense is not None:
            require_checkpoint_path("--dense", self.dense)
        self.pretrain.check("pretrain")
        self.train.check("train")
        self.ltp.check()
        self.mesh.check()
        self.distributed.check()


def parse(presets: Mapping[str, C], description: str, argv: Sequence[str] | None = None) -> C:
    """The configuration that a command line asks for.

    Args:
      presets: the defaults for each network, by its name; the first is the default network.
      description: what ``--help`` says first.
      argv: the words of the command; those of this process if not given.

    Raises:
      ConfigError: for an impossible value, or one that the goal of the pruning leaves without a meaning.
      SystemExit: after ``--help``, or an unknown option or value, with the accepted ones on stderr.
    """
    argv = sys.argv[1:] if argv is None else argv
    # The network decides the other defaults, so it is looked up first; tyro then judges every word.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--arch", nargs="?")
    arch = first.parse_known_args(argv)[0].arch
    default = presets.get(arch, next(iter(presets.values())))
    typed = {word.partition("=")[0].replace("_", "-") for word in argv}
    if goals := {name for name in GOALS if f"--ltp.{name.replace('_', '-')}" in typed}:
        # What the user wants takes the place of what the preset wants.
        rest = dict.fromkeys(set(GOALS) - goals)
        default = dataclasses.replace(default, ltp=dataclasses.replace(default.ltp, **rest))
    prog = f"python -m experiments.{Path(sys.argv[0]).stem}"
    config = read_options(type(default), prog=prog, default=default, args=argv, description=description)
    if idle := [flag for name in config.ltp.idle if (flag := f"--ltp.{name}") in typed]:
        other, goal = ("a penalty", "a target") if config.ltp.to_target else ("a target", "a penalty")
        raise ConfigError(f"{' and '.join(idle)} would do nothing: this run prunes to {goal}, not to {other}")
    return config
