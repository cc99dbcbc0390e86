"""Compares pruning methods on the same network, trained weights, epochs and batches, each with tuned settings.

python -m experiments.compare tune    # fifteen settings of every method, judged on held-out training images
python -m experiments.compare run     # method × compression × seed, each a file; goes on where it stopped
python -m experiments.compare report  # the table and the pictures of what is there
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
import tyro

import ltp_jax as ltp
from experiments import baselines, compare_report, data
from experiments.compare_report import Cell
from experiments.config import ConfigError, TrainConfig, require, require_any, write_json
from experiments.console import run_command
from experiments.data.in_memory import InMemoryDataset
from experiments.harness import Harness, Run, hold_out
from experiments.run import weights_optimizer
from ltp_jax.pruner import Pruner, dense
from ltp_jax.target import target_density

HELD_OUT = 10_000  # training images that settings are judged on
TRIALS = 15  # settings that every method has
LEAK = 0.3  # of LTP with one
DECAYS = (0.0, 1e-3, 2e-3)  # of the weights; zero is that of the network
DESCENTS = {"gmp": (0.2, 0.5, 0.8), "ltp": (0.4, 0.6, 0.8)}  # shares of the run in which they prune
# Of STR's rate and decay in ten epochs, by the compression of tuning that they lie around (on ResNet-20 at 20, on
# LeNet-300-100 at the others) and by the rate, whose first is 0.2 · 0.1 to the last bit.
PRODUCTS = {
    20: {0.05: (8.5e-5, 1.3e-4, 1.8e-4), 0.1: (1.2e-4, 1.8e-4, 2.6e-4), 0.2: (1.7e-4, 2.5e-4, 3.7e-4)},
    32: dict.fromkeys((0.2 * 0.1, 0.05, 0.1), (1.2e-4, 2e-4, 3e-4)),
    128: dict.fromkeys((0.2 * 0.1, 0.05, 0.1), (2.5e-4, 3.5e-4, 4.5e-4)),
}


class Setup(NamedTuple):
    """How methods are compared on a network.

    Attributes:
      load: its dataset; the function has the name of the dataset.
      pretrain: how it is trained before it is pruned.
      train: and while it is.
      compressions: those of the grid.
      tuning_compressions: those that settings are judged at, by the mean over them.
    """

    load: Callable[[str | None], InMemoryDataset]
    pretrain: TrainConfig
    train: TrainConfig
    compressions: tuple[float, ...] = (8, 16, 32, 64, 128)
    tuning_compressions: tuple[int, ...] = (32,)


NETWORKS = {
    "lenet_300_100": Setup(
        data.fashion_mnist,
        TrainConfig(epochs=15, batch_size=128, learning_rate=0.05, weight_decay=5e-4),
        TrainConfig(epochs=10, batch_size=128, learning_rate=0.1, weight_decay=5e-4),
        tuning_compressions=(32, 128),
    ),
    "lenet5": Setup(
        data.fashion_mnist,
        TrainConfig(epochs=6, batch_size=128, learning_rate=0.02, warmup_epochs=1, weight_decay=5e-4),
        TrainConfig(epochs=5, batch_size=128, learning_rate=0.02, weight_decay=5e-4),
    ),
    "resnet20": Setup(
        data.cifar10,
        # Three core-minutes an epoch: as much as a grid of runs can have, and far from convergence.
        TrainConfig(epochs=5, batch_size=128, learning_rate=0.1, warmup_epochs=1, weight_decay=5e-4),
        TrainConfig(epochs=3, batch_size=128, learning_rate=0.05, weight_decay=5e-4),
        compressions=(5, 10, 20),
        tuning_compressions=(20,),
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What to compare."""

    command: tyro.conf.Positional[Literal["tune", "run", "report"]]
    """What to do."""
    arch: Literal["lenet_300_100", "lenet5", "resnet20"] = "lenet_300_100"
    """The network; the first two learn Fashion-MNIST, the last CIFAR-10."""
    methods: tuple[Literal["dense", "one_shot", "gmp_uniform", "gmp_global", "str", "ltp", "ltp_leak"], ...] = (
        "dense",
        "one_shot",
        "gmp_uniform",
        "gmp_global",
        "str",
        "ltp",
        "ltp_leak",
    )
    """Which methods."""
    compressions: tuple[float, ...] = ()
    """Prunable weights over those kept; 8 16 32 64 128, or for resnet20 5 10 20, if nothing is said."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Of the dense network, the order of the data, and nothing else."""
    tuning_seeds: tuple[int, ...] = (0, 1)
    """Those of tuning, which judges a setting by their mean."""
    tuning_compressions: tuple[Literal[20, 32, 128], ...] = ()
    """Those that settings are judged at, by the mean over them; 32, on lenet_300_100 128, too, and on resnet20 20,
    if nothing is said."""
    settings_of: Literal["lenet_300_100", "lenet5", "resnet20"] | None = None
    """Network whose tuning chooses the settings, relative to each network's own rate; its own if nothing is said."""
    epochs: int | None = None
    """Epochs with the method, in a comparison and with a tuning of their own; those of the network if nothing is
    said."""
    data_dir: str | None = None
    """Where TFDS finds its datasets; its own default if nothing is said."""
    workdir: Path = Path("runs/compare")
    """Where dense networks are kept."""
    results: Path = Path("experiments/results/compare")
    """Where the figures are kept, a file for each run."""
    pictures: Path = Path("docs")
    """Where the pictures of a report go."""

    def check(self) -> None:
        """Raises ConfigError for the first option that is impossible."""
        require_any("--methods", self.methods)
        for compression in self.compressions:
            if not 1 < compression < math.inf:
                raise ConfigError(f"--compressions has {compression:g}; accepted is a finite number, more than 1")
        if self.epochs is not None:
            require(self.epochs >= 1, "--epochs", self.epochs, "1 or more")
        check_seeds("--seeds", self.seeds)
        check_seeds("--tuning-seeds", self.tuning_seeds)


def check_seeds(option: str, seeds: Sequence[int]) -> None:
    """Raises ConfigError if there are none, or one of them is impossible."""
    require_any(option, seeds)
    for seed in seeds:
        if not 0 <= seed < 2**32:
            raise ConfigError(f"{option} has {seed}; accepted is 0 to 4294967295")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One setting of a method.

    Attributes:
      learning_rate: the highest of the weights.
      prune: share of the run in which the density descends; of no meaning to methods that do it at once.
      select: share of the run after which LTP fixes its masks.
      leak: share of its gradient that a weight pruned by LTP gets at first; it falls to zero until then.
      initial: STR's first ``s``.
      weight_decay: that of the network if it is zero; STR's is of ``s`` too, and decides how much it prunes.
    """

    learning_rate: float
    prune: float = 0.0
    select: float = 0.0
    leak: float = 0.0
    initial: float = 0.0
    weight_decay: float = 0.0


def trials(method: str, train: TrainConfig, compression: int = 32) -> list[Trial]:
    """The first nine settings of a method, around the network's own rate and weight decay.

    They are the same at all compressions of tuning, but for the decays of STR, which decide how much it prunes.
    """
    rate = train.learning_rate
    match method:
        case "dense" | "one_shot":
            return [Trial(learning_rate=f * rate, weight_decay=decay) for decay in DECAYS for f in (0.5, 1, 2)]
        case "gmp_uniform" | "gmp_global":
            return [
                Trial(learning_rate=rate, prune=share, weight_decay=decay)
                for decay in DECAYS
                for share in DESCENTS["gmp"]
            ]
        case "str":
            # What it prunes goes by the product of rate, decay and steps.
            # The rates are not relative to a network's own: at smaller ones, what prunes enough ruins the weights.
            return [
                Trial(learning_rate=rate, initial=-5.0, weight_decay=product * of_ten_epochs(train) / rate)
                for rate, products in PRODUCTS[compression].items()
                for product in products
            ]
        case "ltp" | "ltp_leak":
            leak = LEAK if method == "ltp_leak" else 0.0
            return [
                Trial(learning_rate=rate, prune=share, select=selected(share), leak=leak, weight_decay=decay)
                for decay in DECAYS
                for share in DESCENTS["ltp"]
            ]
    raise ValueError(method)


def of_ten_epochs(train: TrainConfig) -> float:
    """What share of STR's decay in ten epochs prunes about as much in a run of another length.

    In a longer run the loss has more time to resist: with a third of it, thirty epochs came to 92× and less where the
    settings have to lie on both sides of 128×.
    """
    share = 10 / train.epochs
    return share if share >= 1 else share ** (2 / 3)


def selected(prune: float) -> float:
    """The share of the run after which LTP fixes its masks, of that in which it prunes."""
    return max(0.75, prune + 0.1)


def further_trials(method: str, train: TrainConfig, best: Trial, compression: int = 32) -> list[Trial]:
    """Six more, from the best of the nine: at rates farther from the network's own, or other first values of ``s``.

    Args:
      method: the method.
      train: the network's own training.
      best: as ``chosen`` finds it.
      compression: that of tuning.
    """
    rate = train.learning_rate
    match method:
        case "dense" | "one_shot":
            return [
                dataclasses.replace(best, learning_rate=f * rate, weight_decay=decay)
                for decay in DECAYS
                for f in (0.25, 4)
            ]
        case "gmp_uniform" | "gmp_global":
            return [
                dataclasses.replace(best, learning_rate=f * rate, prune=share)
                for f in (0.5, 2)
                for share in DESCENTS["gmp"]
            ]
        case "str":
            # The farther from zero s begins, the more decay it takes to prune as much.
            return [
                dataclasses.replace(
                    best, initial=initial, weight_decay=product * factor * of_ten_epochs(train) / best.learning_rate
                )
                for initial, factor in ((-4.0, 0.9), (-8.0, 1.9))
                for product in PRODUCTS[compression][best.learning_rate]
            ]
        case "ltp" | "ltp_leak":
            return [
                dataclasses.replace(best, learning_rate=f * rate, prune=share, select=selected(share))
                for f in (0.5, 2)
                for share in DESCENTS["ltp"]
            ]
    raise ValueError(method)


def make_pruner(
    method: str, plan: ltp.Plan, compression: float, train: TrainConfig, steps: int, trial: Trial
) -> Pruner:
    """The method with a setting, for ``steps`` training steps."""
    prune_steps = max(round(trial.prune * steps), 1)
    match method:
        case "dense":
            return dense()
        case "one_shot":
            return baselines.one_shot_magnitude(plan, 1 / compression)
        case "gmp_uniform" | "gmp_global":
            every = max(min(100, prune_steps // 10), 1)  # ten changes of the masks at least
            uniform = method == "gmp_uniform"
            return baselines.gradual_magnitude(
                plan, 1 / compression, prune_steps=prune_steps, every=every, uniform=uniform
            )
        case "str":
            optimizer = optax.chain(
                optax.add_decayed_weights(trial.weight_decay),
                weights_optimizer(dataclasses.replace(train, weight_decay=0.0), steps // train.epochs),
            )
            return baselines.soft_threshold_reparameterization(plan, optimizer, initial=trial.initial)
        case "ltp" | "ltp_leak":
            select_steps = round(trial.select * steps)
            return target_density(
                plan, 1 / compression, prune_steps=prune_steps, select_steps=select_steps, leak=trial.leak
            )
    raise ValueError(method)


def run_cell(harness: Harness, compiled: Run, harden: Callable[[Any, Any], Any], seed: int) -> Cell:
    """One run: the figures of the pruned network after its last epoch, and the way there."""
    network = harness.dense_network(seed)
    sizes = {tensor.path: tensor.size for tensor in harness.plan.tensors if tensor.prune}
    curve = []
    for state in compiled(network, seed):
        hard = harden(state.params, state.pruning)
        kept = {path: int(jnp.count_nonzero(w)) for path, w in ltp.named_leaves(hard) if path in sizes}
        curve.append((sum(sizes.values()) / max(sum(kept.values()), 1), harness.top1(hard, state.batch_stats)))
    return {
        "achieved": curve[-1][0],
        "top1": curve[-1][1],
        "train_top1": harness.train_top1(hard, state.batch_stats),
        "dense_top1": harness.top1(network["params"], network["batch_stats"]),
        "densities": {path: kept[path] / size for path, size in sizes.items()},
        "epochs": [{"compression": compression, "top1": top1} for compression, top1 in curve],
    }


def fill(
    harness: Harness,
    train: TrainConfig,
    cells: Sequence[tuple[Path, int]],
    method: str,
    compression: float,
    trial: Trial,
) -> None:
    """Runs those of the cells, given as file and seed, that ``stored`` does not find."""
    missing = [(path, seed) for path, seed in cells if stored(path, trial, train) is None]
    if not missing:
        return
    train = dataclasses.replace(train, learning_rate=trial.learning_rate)
    if trial.weight_decay:
        train = dataclasses.replace(train, weight_decay=trial.weight_decay)
    try:
        pruner = make_pruner(method, harness.plan, compression, train, harness.steps(train), trial)
    except ValueError as error:
        raise ConfigError(f"--compressions has {compression:g}, which {method} cannot meet: {error}") from error
    compiled, harden = harness.compiled(pruner, train), jax.jit(pruner.harden)
    for path, seed in missing:
        figures = run_cell(harness, compiled, harden, seed)
        about = {
            "network": harness.arch,
            "dataset": harness.dataset.name,
            "method": method,
            "compression": None if method == "dense" else compression,
            "seed": seed,
            "trial": dataclasses.asdict(trial),
            "epochs_trained": train.epochs,
        }
        write_json(path, about | figures)
        print(f"{path.stem}: {figures['achieved']:.2f}× at {figures['top1']:.2f} %", flush=True)


def stored(path: Path, trial: Trial, train: TrainConfig) -> Cell | None:
    """The run of a file; None if there is none, or one with another setting or of another number of epochs."""
    cell = compare_report.read_cell(path) if path.exists() else None
    if cell is None or Trial(**cell["trial"]) != trial or cell["epochs_trained"] != train.epochs:
        return None
    return cell


def training(config: CompareConfig, arch: str) -> TrainConfig:
    """How a network is trained while it is pruned."""
    train = NETWORKS[arch].train
    return train if config.epochs is None else dataclasses.replace(train, epochs=config.epochs)


def folder(config: CompareConfig, arch: str, *, held_out: bool = False) -> Path:
    """Where the runs on the test images, or those of tuning on held-out images, are."""
    longer = "" if config.epochs is None else f"_{config.epochs}_epochs"
    return config.results / f"{NETWORKS[arch].load.__name__}{'_held_out' if held_out else ''}_{arch}{longer}"


class Setting(NamedTuple):
    """A setting that is tried in tuning, with its place in the list of its method, at one of tuning's compressions."""

    compression: int
    place: int
    trial: Trial


def tuning_settings(
    method: str, train: TrainConfig, compressions: Sequence[int], best: Trial | None = None
) -> list[Setting]:
    """What is tried: nine settings at every compression, and six more if the best of the nine is known."""
    if method == "dense":
        compressions = compressions[:1]  # it prunes nothing at any
    settings = []
    for compression in compressions:
        tried = trials(method, train, compression)
        if best is not None:
            tried += further_trials(method, train, best, compression)
        settings += [Setting(compression, place, trial) for place, trial in enumerate(tried)]
    return settings


def judged(config: CompareConfig) -> Sequence[int]:
    """The compressions of tuning."""
    return config.tuning_compressions or NETWORKS[config.settings_of or config.arch].tuning_compressions


def tune(config: CompareConfig, harness: Harness) -> None:
    """Runs every setting of every method at the compressions of tuning, on the held-out training images."""
    train, judged_at = training(config, config.arch), judged(config)

    def run(method: str, settings: Sequence[Setting]) -> None:
        for setting in settings:
            cells = [(tuning_file(config, config.arch, method, setting, seed), seed) for seed in config.tuning_seeds]
            fill(harness, train, cells, method, setting.compression, setting.trial)

    for method in config.methods:
        nine = tuning_settings(method, train, judged_at)
        run(method, nine)
        best = chosen(method, tuned_with(config, config.arch, method, nine), judged_at)
        run(method, tuning_settings(method, train, judged_at, best))


def tuning_file(config: CompareConfig, arch: str, method: str, setting: Setting, seed: int) -> Path:
    """The file of a setting, by its place in the list of its method's trials."""
    name = method if method == "dense" else f"{method}_{setting.compression}"
    return folder(config, arch, held_out=True) / f"{name}_trial{setting.place}_{seed}.json"


def tuned_with(config: CompareConfig, arch: str, method: str, settings: Iterable[Setting]) -> list[Cell]:
    """The runs of tuning, with its seeds, that are there of settings of a method."""
    files = [
        (tuning_file(config, arch, method, setting, seed), setting.trial)
        for setting in settings
        for seed in config.tuning_seeds
    ]
    found = (stored(path, trial, training(config, arch)) for path, trial in files)
    return [cell for cell in found if cell is not None]


def chosen(method: str, tuned: Sequence[Cell], compressions: Sequence[float]) -> Trial:
    """The setting that did best in tuning, by the mean over its seeds and compressions.

    STR has no target: its settings are learning rates and first values of ``s``, with several decays each. Those two
    are chosen that do best at the compressions of tuning, between the decays, or beyond them only if none has them
    between; the decay is that of ``decay_for`` then. Of settings that are equally good it is the first in the list.
    """
    groups: dict[Trial, list[Cell]] = {}
    for cell in compare_report.select(tuned, method=method):
        trial = without_decay(cell) if method == "str" else Trial(**cell["trial"])
        groups.setdefault(trial, []).append(cell)

    def merit(trial: Trial) -> tuple[bool, float]:
        if method != "str":
            # A share of images was divided in float32: equal numbers of them are equal to six digits, and not beyond.
            return True, round(statistics.fmean(cell["top1"] for cell in groups[trial]), 3)
        points = [(mean.achieved, mean.top1) for mean in by_decay(groups[trial])]
        between = min(points)[0] <= min(compressions) and max(compressions) <= max(points)[0]
        return between, statistics.fmean(at(compression, points) for compression in compressions)

    return max(groups, key=merit)


def tuning(config: CompareConfig) -> list[Cell]:
    """The runs of tuning. Those of another network are given the settings of the same place in this network's list.

    Behind the ninth place both lists go on from the best of the other network: what they keep of it, decays, leak and
    STR's rate, is not relative to a network.

    Raises:
      ConfigError: if a setting of one of the methods was not tried with every seed of tuning.
    """
    source = config.settings_of or config.arch
    theirs, ours = training(config, source), training(config, config.arch)
    judged_at = judged(config)
    cells, missing = [], {}
    for method in config.methods:
        settings = tuning_settings(method, theirs, judged_at)
        every = len(settings) // 9 * TRIALS * len(config.tuning_seeds)
        found = tuned_with(config, source, method, settings)
        best = chosen(method, found, judged_at) if len(found) == len(settings) * len(config.tuning_seeds) else None
        settings = tuning_settings(method, theirs, judged_at, best)
        found = tuned_with(config, source, method, settings)
        if len(found) < every:
            missing[method] = every - len(found)
            continue
        same_place = tuning_settings(method, ours, judged_at, best)
        own = {setting.trial: mine.trial for setting, mine in zip(settings, same_place, strict=True)}
        cells += [cell | {"trial": dataclasses.asdict(own[Trial(**cell["trial"])])} for cell in found]
    if missing:
        methods, seeds, at_each = (" ".join(map(str, words)) for words in (missing, config.tuning_seeds, judged_at))
        options = f"--methods {methods} --tuning-seeds {seeds} --tuning-compressions {at_each}"
        raise ConfigError(
            f"{sum(missing.values())} runs of the tuning on {source} are missing: "
            f"{command_for(config, 'tune', source)} {options}"
        )
    return cells


def command_for(config: CompareConfig, command: str, arch: str) -> str:
    """Another command on the same figures, without the options that say which of them."""
    words = ["python -m experiments.compare", command, f"--arch={arch}"]
    if config.epochs is not None:
        words.append(f"--epochs={config.epochs}")
    if config.results != CompareConfig.results:
        words.append(f"--results={config.results}")
    return " ".join(words)


def without_decay(cell: Cell) -> Trial:
    """What the settings of STR that differ in their decay alone have in common."""
    return dataclasses.replace(Trial(**cell["trial"]), weight_decay=0.0)


class Mean(NamedTuple):
    """What the seeds of a decay of STR had: the geometric mean of their compressions, and the mean top-1 in percent."""

    weight_decay: float
    achieved: float
    top1: float


def by_decay(cells: Iterable[Cell]) -> list[Mean]:
    """The means over seeds of runs of STR that differ in decay and seed."""
    groups: dict[float, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell["trial"]["weight_decay"], []).append(cell)
    return [
        Mean(
            decay,
            statistics.geometric_mean(cell["achieved"] for cell in group),
            statistics.fmean(cell["top1"] for cell in group),
        )
        for decay, group in groups.items()
    ]


def differ(one: float, other: float) -> bool:
    """Whether two compressions are far enough apart, by 2 %, for a line through their figures to have a slope."""
    return abs(math.log(one / other)) > 0.02


def at(compression: float, points: Sequence[tuple[float, float]]) -> float:
    """A figure at a compression, from ``(compression, figure)`` of settings: on the line, in the logarithm of the
    compression, through the nearest on either side, or the two nearest different ones if it lies beyond them all."""
    nearest = sorted(points, key=lambda point: abs(math.log(point[0] / compression)))
    first = nearest[0]
    others = [point for point in nearest if differ(point[0], first[0])]
    if not others:
        return first[1]
    beyond = [point for point in others if (point[0] < compression) != (first[0] < compression)]
    second = (beyond or others)[0]
    share = math.log(compression / first[0]) / math.log(second[0] / first[0])
    return first[1] + share * (second[1] - first[1])


def decay_for(compression: float, trial: Trial, own: Sequence[Cell], tuned: Sequence[Cell]) -> Trial:
    """STR's setting with the decay that is to give a compression, by runs that differ from it in their decay.

    Args:
      compression: the one wanted.
      trial: the setting, of any decay.
      own: runs of the network in the grid, the nearest to the compression first. They decide, if another one's
        compression differs from that of the first; otherwise the first is the level, and tuning the slope.
      tuned: those of tuning, which had fewer training images or another network.
    """

    def log_decay(compression: float, cells: Sequence[Cell]) -> float:
        return at(compression, [(mean.achieved, math.log(mean.weight_decay)) for mean in by_decay(cells)])

    if any(differ(cell["achieved"], own[0]["achieved"]) for cell in own):
        found = log_decay(compression, own)
    else:
        same = [cell for cell in tuned if without_decay(cell) == trial]
        found = log_decay(compression, same)
        if own:
            found += math.log(own[0]["trial"]["weight_decay"]) - log_decay(own[0]["achieved"], same)
    return dataclasses.replace(trial, weight_decay=float(f"{math.exp(found):.4g}"))


def grid(config: CompareConfig, harness: Harness) -> None:
    """Runs every method at every compression with every seed, with the setting that tuning chose."""
    train, tuned = training(config, config.arch), tuning(config)
    settings = {method: chosen(method, tuned, judged(config)) for method in config.methods}
    runs = folder(config, config.arch)
    for compression in config.compressions or NETWORKS[config.arch].compressions:
        for method, trial in settings.items():
            name = method if method == "dense" else f"{method}_{compression:g}"
            cells = [(runs / f"{name}_{seed}.json", seed) for seed in config.seeds]
            if method == "str":
                # Seeds that are added later have the decay of those that are there.
                there = (int(path.stem.rpartition("_")[2]) for path in runs.glob(f"{name}_*.json"))
                first = min(there, default=config.seeds[0])
                path = runs / f"{name}_{first}.json"
                trial = search_decay(harness, train, path, first, compression, trial, tuned)
            fill(harness, train, cells, method, compression, trial)


def search_decay(
    harness: Harness,
    train: TrainConfig,
    path: Path,
    seed: int,
    compression: float,
    trial: Trial,
    tuned: Sequence[Cell],
) -> Trial:
    """STR's setting with a decay that brings one seed within 5 % of a compression, or the nearest of five.

    More training images than in tuning are more steps, which prune more. Accuracy has no say in it. Every try is kept
    in a folder beside ``path``, for the searches at other compressions too; the one that is chosen becomes ``path``.
    """
    searched = path.parent / "str_search"

    def distance(cell: Cell) -> float:
        return abs(math.log(cell["achieved"] / compression))

    while True:
        files = sorted([*path.parent.glob(f"str_*_{seed}.json"), *searched.glob(f"*_{seed}.json")])
        same = [cell for cell in map(compare_report.read_cell, files) if without_decay(cell) == trial]
        same = compare_report.select(same, epochs_trained=train.epochs)
        tried = {cell["trial"]["weight_decay"]: cell for cell in same}
        own = sorted(tried.values(), key=distance)
        found = decay_for(compression, trial, own, tuned)
        enough = len(compare_report.select(own, compression=compression)) == 5 or found.weight_decay in tried
        if own and (enough or distance(own[0]) < math.log(1.05)):
            write_json(path, own[0] | {"compression": compression})
            return Trial(**own[0]["trial"])
        fill(harness, train, [(searched / f"{found.weight_decay:g}_{seed}.json", seed)], "str", compression, found)


def main() -> None:
    config = tyro.cli(CompareConfig, prog="python -m experiments.compare", description=__doc__)
    config.check()
    setup = NETWORKS[config.arch]
    if config.command == "report":
        runs, held_out = folder(config, config.arch), folder(config, config.arch, held_out=True)
        if not compare_report.read_cells(runs):
            raise ConfigError(f"there are no runs in {runs}: {command_for(config, 'run', config.arch)}")
        for path in compare_report.write(runs, config.pictures):
            print(path)
        if cells := compare_report.read_cells(held_out):
            (held_out / "table.md").write_text(compare_report.tuning_markdown(cells))
            print(held_out / "table.md")
        return
    dataset = setup.load(config.data_dir)
    if config.command == "tune":
        tune(config, Harness(hold_out(dataset, HELD_OUT), config.arch, config.workdir, setup.pretrain))
    else:
        grid(config, Harness(dataset, config.arch, config.workdir, setup.pretrain))


if __name__ == "__main__":
    run_command(main)
