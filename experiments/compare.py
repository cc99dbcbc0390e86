"""Compares pruning methods on the same network, trained weights, epochs and batches, each with tuned settings.

$ python -m experiments.compare tune    # fifteen settings of every method, judged on held-out training images
$ python -m experiments.compare run     # method × compression × seed, each a file; goes on where it stopped
$ python -m experiments.compare report  # the table and the pictures of what is there
"""

import dataclasses
import math
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import tyro

from experiments import compare_report
from experiments.compare_cells import Cell, Trial, read_cell, read_cells, select, with_setting_of
from experiments.compare_networks import HELD_OUT, NETWORKS
from experiments.compare_settings import (
    FIRST_TRIALS,
    TRIALS,
    Setting,
    borrowed,
    chosen,
    decay_for,
    first_settings,
    further_settings,
    make_pruner,
    without_decay,
)
from experiments.config import TrainConfig
from experiments.data.tfds_in_memory import cifar10
from experiments.ending import run_command
from experiments.harness import Harness, Run, augmented, hold_out, what_is_left
from experiments.options import (
    ConfigError,
    read_options,
    require,
    require_any,
    require_checkpoint_path,
    require_compressions,
    require_local,
    require_seeds,
    require_writable,
)
from experiments.record import write_json, write_whole

OF_SOME_COMMANDS = {
    "methods": ("tune", "run"),
    "compressions": ("run",),
    "seeds": ("run",),
    "tuning_seeds": ("tune", "run"),
    "setting_of": ("run",),
    "data_dir": ("tune", "run"),
    "workdir": ("tune", "run"),
    "pictures": ("report",),
}
"""The options that not all commands heed: a report shows all runs that are there."""

Method = Literal["dense", "one_shot", "gmp_uniform", "gmp_global", "str", "ltp", "ltp_leak"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What to compare."""

    command: tyro.conf.Positional[Literal["tune", "run", "report"]]
    """What to do. report takes only --arch, --augment, --epochs, --results and --pictures."""
    arch: Literal["lenet_300_100", "lenet5", "resnet20"] = "lenet_300_100"
    """The network; the first two learn Fashion-MNIST, the last CIFAR-10."""
    methods: tuple[Method, ...] = typing.get_args(Method)
    """dense (nothing is pruned: the control), magnitude pruning (one_shot; gmp_uniform and gmp_global, gradual), str
    (soft threshold weight reparameterization), ltp, and ltp_leak (LTP with a leak of 0.3)."""
    compressions: tuple[float, ...] = ()
    """Prunable weights over those kept; 8 16 32 64 128, or for resnet20 5 10 20, if not given."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of run: of the dense network and the order of the data; nothing else is random."""
    tuning_seeds: tuple[int, ...] = (0, 1)
    """Seeds of tune, which judges a setting by their mean."""
    setting_of: Literal["ltp", "gmp_global"] | None = None
    """Run all methods with the setting that tuning chose for this one, instead of their own. Not for str."""
    augment: bool = False
    """Shift the training images of Fashion-MNIST by up to two pixels and mirror each with probability 1/2, anew in
    every epoch: a comparison apart, with its own tuning. Images of CIFAR-10 always are shifted and mirrored."""
    epochs: int | None = None
    """Epochs with the method; the network's own number if not given. Another number is a comparison apart, with its own
    tuning, except that --setting-of takes the setting of the network's own number."""
    data_dir: Path | None = None
    """Where TFDS finds its datasets; its own default if not given."""
    workdir: Path = Path("runs/compare")
    """Where dense networks are kept."""
    results: Path = Path("experiments/results/compare")
    """Where the figures are kept, a file for each run."""
    pictures: Path = Path("docs")
    """Where the pictures of a report go."""

    def check(self) -> None:
        """Raises ConfigError for the first option that is impossible."""
        require_local(self, "data_dir", "results", "pictures")
        require_checkpoint_path("--workdir", self.workdir)
        require_any("--methods", self.methods)
        require_compressions("--compressions", self.compressions)
        if self.epochs is not None:
            require(self.epochs >= 1, "--epochs", self.epochs, "1 or more")
        if self.augment and NETWORKS[self.arch].load is cifar10:
            raise ConfigError("--augment is for Fashion-MNIST: the images of CIFAR-10 always are shifted and mirrored")
        for name, fits in OF_SOME_COMMANDS.items():
            if self.command not in fits and getattr(self, name) != getattr(CompareConfig, name):
                option = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{option} goes with {' and '.join(fits)}, not with {self.command}")
        if self.setting_of and "str" in self.methods:
            raise ConfigError(
                "--methods has str, which needs a decay for each compression; --setting-of has none for it"
            )
        require_seeds("--seeds", self.seeds)
        require_seeds("--tuning-seeds", self.tuning_seeds)


def run_cell(harness: Harness, compiled: Run, harden: Callable[[Any, Any], Any], seed: int) -> Cell:
    """One run: the figures of the pruned network after its last epoch, and the way there."""
    network = harness.dense_network(seed)
    curve = []
    for state in compiled(network, seed):
        hard = harden(state.params, state.pruning)
        compression, densities = what_is_left(harness.plan, hard)
        curve.append((compression, harness.top1(hard, state.batch_stats)))
    return {
        "achieved": curve[-1][0],
        "top1": curve[-1][1],
        "train_top1": harness.train_top1(hard, state.batch_stats),
        "dense_top1": harness.top1(network["params"], network["batch_stats"]),
        "densities": densities,
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
        pruner = make_pruner(method, harness.plan, compression, train, train.steps(harness.dataset.train_size), trial)
    except ValueError as error:
        raise ConfigError(f"--compressions has {compression:g}, which {method} cannot meet: {error}") from error
    compiled, harden = harness.compiled(pruner, train), jax.jit(pruner.harden)
    for path, seed in missing:
        if path.exists():
            print(f"{path.stem}: run anew, since what is there has another setting or number of epochs", flush=True)
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
    cell = read_cell(path) if path.exists() else None
    if cell is None or Trial(**cell["trial"]) != trial or cell["epochs_trained"] != train.epochs:
        return None
    return cell


def training(config: CompareConfig) -> TrainConfig:
    """How the network is trained while it is pruned."""
    train = NETWORKS[config.arch].train
    return train if config.epochs is None else dataclasses.replace(train, epochs=config.epochs)


def folder(config: CompareConfig, *, held_out: bool = False) -> Path:
    """Where the runs on the test images, or those of tuning on held-out images, are."""
    dataset = NETWORKS[config.arch].load.__name__ + ("_augmented" if config.augment else "")
    longer = "" if config.epochs is None else f"_{config.epochs}_epochs"
    if held_out:
        return config.results / f"{dataset}_held_out_{config.arch}{longer}"
    runs = config.results / f"{dataset}_{config.arch}{longer}"
    return with_setting_of(config.setting_of, runs) if config.setting_of else runs


def tune(config: CompareConfig, harness: Harness) -> None:
    """Runs every setting of every method at the compressions of tuning, on the held-out training images."""
    train, judged_at = training(config), NETWORKS[config.arch].tuning_compressions

    def run(method: str, settings: Sequence[Setting]) -> None:
        for setting in settings:
            cells = [(tuning_file(config, method, setting, seed), seed) for seed in config.tuning_seeds]
            fill(harness, train, cells, method, setting.compression, setting.trial)

    for method in config.methods:
        nine = first_settings(method, train, judged_at)
        run(method, nine)
        best = chosen(method, tuned_with(config, method, nine), judged_at)
        run(method, further_settings(method, train, judged_at, best))


def tuning_file(config: CompareConfig, method: str, setting: Setting, seed: int) -> Path:
    """The file of a setting, by its place in the list of its method's trials."""
    name = method if method == "dense" else f"{method}_{setting.compression}"
    return folder(config, held_out=True) / f"{name}_trial{setting.place}_{seed}.json"


def tuned_with(config: CompareConfig, method: str, settings: Iterable[Setting]) -> list[Cell]:
    """The runs of tuning, with its seeds, that are there of settings of a method."""
    files = [
        (tuning_file(config, method, setting, seed), setting.trial)
        for setting in settings
        for seed in config.tuning_seeds
    ]
    found = (stored(path, trial, training(config)) for path, trial in files)
    return [cell for cell in found if cell is not None]


def tuning(config: CompareConfig, methods: Sequence[str]) -> list[Cell]:
    """The runs of tuning of some methods.

    Raises:
      ConfigError: if a setting of one of the methods was not tried with every seed of tuning.
    """
    train, judged_at = training(config), NETWORKS[config.arch].tuning_compressions
    cells, missing = [], {}
    for method in methods:
        nine = first_settings(method, train, judged_at)
        found = tuned_with(config, method, nine)
        if len(found) == len(nine) * len(config.tuning_seeds):
            best = chosen(method, found, judged_at)
            found += tuned_with(config, method, further_settings(method, train, judged_at, best))
        if lacking := len(nine) // FIRST_TRIALS * TRIALS * len(config.tuning_seeds) - len(found):
            missing[method] = lacking
        cells += found
    if missing:
        names, seeds = (" ".join(map(str, words)) for words in (missing, config.tuning_seeds))
        raise ConfigError(
            f"{sum(missing.values())} runs of the tuning on {config.arch} are missing: "
            f"{command_for(config, 'tune')} --methods {names} --tuning-seeds {seeds}"
        )
    return cells


def command_for(config: CompareConfig, command: str) -> str:
    """Another command on the same figures."""
    words = ["python -m experiments.compare", command, f"--arch={config.arch}"]
    if config.augment:
        words.append("--augment")
    if config.epochs is not None:
        words.append(f"--epochs={config.epochs}")
    if config.results != CompareConfig.results:
        words.append(f"--results={config.results}")
    return " ".join(words)


def grid(config: CompareConfig, harness: Harness) -> None:
    """Runs every method at every compression with every seed, with the setting that tuning chose."""
    setup, train = NETWORKS[config.arch], training(config)
    if config.setting_of:
        tuned = tuning(dataclasses.replace(config, epochs=None), (config.setting_of,))
    else:
        tuned = tuning(config, config.methods)
    settings = {method: grid_setting(config, method, tuned) for method in config.methods}
    runs = folder(config)
    for compression in config.compressions or setup.compressions:
        if compression == round(compression):
            compression = round(compression)  # as those of the network are recorded; a command line has 32.0 for 32
        for method, trial in settings.items():
            name = method if method == "dense" else f"{method}_{compression}"
            cells = [(runs / f"{name}_{seed}.json", seed) for seed in config.seeds]
            if method == "str":
                # Seeds that are added later have the decay of those that are there.
                there = (read_cell(path)["seed"] for path in runs.glob(f"{name}_*.json"))
                first = min(there, default=config.seeds[0])
                path = runs / f"{name}_{first}.json"
                trial = search_decay(harness, train, path, first, compression, trial, tuned)
            fill(harness, train, cells, method, compression, trial)


def grid_setting(config: CompareConfig, method: str, tuned: Sequence[Cell]) -> Trial:
    """The setting of a method in the grid."""
    trial = chosen(config.setting_of or method, tuned, NETWORKS[config.arch].tuning_compressions)
    return borrowed(method, trial) if config.setting_of else trial


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
        same = [cell for cell in map(read_cell, files) if without_decay(cell) == trial]
        same = select(same, epochs_trained=train.epochs)
        tried = {cell["trial"]["weight_decay"]: cell for cell in same}
        own = sorted(tried.values(), key=distance)
        found = decay_for(compression, trial, own, tuned)
        enough = len(select(own, compression=compression)) >= 5 or found.weight_decay in tried
        if own and (enough or distance(own[0]) < math.log(1.05)):
            write_json(path, own[0] | {"compression": compression})
            return Trial(**own[0]["trial"])
        fill(harness, train, [(searched / f"{found.weight_decay:g}_{seed}.json", seed)], "str", compression, found)


def main() -> None:
    config = read_options(CompareConfig, prog="python -m experiments.compare", description=__doc__)
    setup = NETWORKS[config.arch]
    if config.command == "report":
        runs, held_out = folder(config), folder(config, held_out=True)
        compared, tuned = compare_report.read_compared(runs), read_cells(held_out)
        if not compared and not tuned:
            raise ConfigError(f"there are no runs in {runs}: {command_for(config, 'run')}")
        if compared:
            require_writable("--pictures", config.pictures / f"compare_{runs.name}.png")
            for path in compare_report.write(compared, runs, config.pictures):
                print(path)
        if tuned:
            write_whole(held_out / "table.md", compare_report.tuning_markdown(tuned))
            print(held_out / "table.md")
        return
    require_writable("--results", folder(config, held_out=config.command == "tune") / "table.md")
    require_writable("--workdir", config.workdir / "dense_0.json")
    dataset = setup.load(config.data_dir)
    if config.augment:
        dataset = augmented(dataset)
    if config.command == "tune":
        tune(config, Harness(hold_out(dataset, HELD_OUT), config.arch, config.workdir, setup.pretrain))
    else:
        grid(config, Harness(dataset, config.arch, config.workdir, setup.pretrain))


if __name__ == "__main__":
    run_command(main)
