"""The settings that every method is tried with in a comparison, and which of them is chosen.

STR has no target: its settings have decays, and one for a compression is read off the runs that are there.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import optax

import ltp_jax as ltp
from experiments import baselines
from experiments.compare_cells import OWN, Cell, Trial, select
from experiments.components import weights_optimizer
from experiments.config import TrainConfig
from ltp_jax.pruner import Pruner, dense
from ltp_jax.target import target_density

FIRST_TRIALS, TRIALS = 9, 15  # settings that every method has: around the network's own, and with six from the best
LEAK = 0.3  # of LTP with one
DECAYS = (0.0, 1e-3, 2e-3)  # of the weights; zero is that of the network
DESCENTS = {"gmp": (0.2, 0.5, 0.8), "ltp": (0.4, 0.6, 0.8)}  # shares of the run in which they prune
RATES = (0.2 * 0.1, 0.05, 0.1)  # of STR on the two LeNets; the first to the last bit, as its runs have it
# Of STR's rate and decay in ten epochs, by the compression of tuning that they lie around (on ResNet-20 at 20, on
# LeNet-300-100 at the others) and by the rate.
PRODUCTS = {
    20: {0.05: (8.5e-5, 1.3e-4, 1.8e-4), 0.1: (1.2e-4, 1.8e-4, 2.6e-4), 0.2: (1.7e-4, 2.5e-4, 3.7e-4)},
    32: dict.fromkeys(RATES, (1.2e-4, 2e-4, 3e-4)),
    128: dict.fromkeys(RATES, (2.5e-4, 3.5e-4, 4.5e-4)),
}


def trials(method: str, train: TrainConfig, compression: int) -> list[Trial]:
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
            leak = leak_of(method)
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


def leak_of(method: str) -> float:
    """The leak that a method has: no setting of tuning, but what the method is."""
    return LEAK if method == "ltp_leak" else 0.0


def selected(prune: float) -> float:
    """The share of the run after which LTP fixes its masks, of that in which it prunes."""
    return max(0.75, prune + 0.1)


def borrowed(method: str, trial: Trial) -> Trial:
    """A method's setting with rate, decay and descent of another's; the leak and when masks are fixed are its own."""
    select = selected(trial.prune) if method in OWN else 0.0
    return dataclasses.replace(trial, select=select, leak=leak_of(method))


def further_trials(method: str, train: TrainConfig, best: Trial, compression: int) -> list[Trial]:
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


class Setting(NamedTuple):
    """A setting that is tried in tuning, with its place in the list of its method, at one of tuning's compressions."""

    compression: int
    place: int
    trial: Trial


def first_settings(method: str, train: TrainConfig, compressions: Sequence[int]) -> list[Setting]:
    """Nine settings at every compression of tuning."""
    return _at_each(method, compressions, lambda compression: trials(method, train, compression), 0)


def further_settings(method: str, train: TrainConfig, compressions: Sequence[int], best: Trial) -> list[Setting]:
    """Six more at every one, from the best of the nine."""
    return _at_each(
        method, compressions, lambda compression: further_trials(method, train, best, compression), FIRST_TRIALS
    )


def _at_each(
    method: str, compressions: Sequence[int], tried: Callable[[int], list[Trial]], first_place: int
) -> list[Setting]:
    return [
        Setting(compression, place, trial)
        for compression in (compressions[:1] if method == "dense" else compressions)  # dense prunes nothing at any
        for place, trial in enumerate(tried(compression), first_place)
    ]


def chosen(method: str, tuned: Sequence[Cell], compressions: Sequence[float]) -> Trial:
    """The setting that did best in tuning, by the mean over its seeds and compressions.

    STR has no target: its settings are learning rates and first values of ``s``, with several decays each. Those two
    are chosen that do best at the compressions of tuning, between the decays, or beyond them only if none has them
    between; the decay is that of ``decay_for`` then. Of settings that are equally good it is the first in the list.
    """
    groups: dict[Trial, list[Cell]] = {}
    for cell in select(tuned, method=method):
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
