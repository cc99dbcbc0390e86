"""The variants of the ablation: how to make each pruner, and how the weights are trained with it."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

import ltp_jax as ltp
from experiments.baselines import gradual_magnitude
from experiments.harness import Network
from ltp_jax.penalty import learned_thresholds
from ltp_jax.pruner import Pruner
from ltp_jax.target import target_density
from ltp_jax.trees import map_selected

COMPRESSION = 64.0  # of the variants that have a target


class Job(NamedTuple):
    """What a pruner is made for: the tensors it prunes, the training steps, the network it begins with, and images."""

    plan: ltp.Plan
    steps: int
    network: Network
    images: np.ndarray


Make = Callable[[Job], Pruner]


def penalised(penalty: float, **options: Any) -> Make:
    """LTP to a penalty: a ramp over the first half of the run, then frozen thresholds, Adam for them."""

    def make(job: Job) -> Pruner:
        learn_steps = job.steps // 2
        ramp = optax.linear_schedule(0.0, penalty, learn_steps)
        return learned_thresholds(job.plan, ramp, optax.adam(6 / learn_steps), learn_steps=learn_steps, **options)

    return make


def norm_penalised(penalty: float, order: int) -> Make:
    """The same with an L1 or L2 penalty on the pruned weights in place of L0.

    It is in units of each layer's spread: of normally distributed weights one counts 1.3 by L1 and 2.8 by L2.
    """

    def make(job: Job) -> Pruner:
        t0 = 1e-3
        pruner = penalised(0.0, t0=t0)(job)
        ramp = optax.linear_schedule(0.0, penalty, job.steps // 2)

        def norms(params: Any) -> dict[str, jax.Array]:
            leaves = dict(ltp.named_leaves(params))
            return {path: jnp.sum(jnp.abs(leaves[path]) ** order) for path in job.plan.paths}

        def soften(params, thresholds, state, step):
            pruned, _ = pruner.soften(params, thresholds, state, step)
            # The spread of the trained weights, Var(|w|) = T / t0, makes layers of all scales count alike.
            scales = {path: (t / t0) ** (order / 2) for path, t in state.prune.temperatures.items()}
            total = sum((norm / scales[path] for path, norm in norms(pruned).items()), start=jnp.zeros(()))
            return pruned, ramp(step) * total / job.plan.prunable

        return pruner._replace(soften=soften)

    return make


def targeted(
    *,
    prune: float = 0.4,
    select: float = 0.75,
    t0: float = 1e-2,
    leak: float = 0.0,
    optimizer: optax.GradientTransformation | None = None,
) -> Make:
    """LTP to a target: the shares of the run that it prunes and selects in, and the offsets' optimizer."""

    def make(job: Job) -> Pruner:
        return target_density(
            job.plan,
            1 / COMPRESSION,
            prune_steps=round(prune * job.steps),
            select_steps=round(select * job.steps),
            t0=t0,
            leak=leak,
            optimizer=optimizer,
        )

    return make


def magnitude(prune: float) -> Make:
    """Global magnitude pruning with a cubic schedule."""
    return lambda job: gradual_magnitude(job.plan, 1 / COMPRESSION, prune_steps=round(prune * job.steps), every=20)


def tempered(make: Make, rule: Callable[[Any, jax.Array], dict[str, jax.Array]], until: float) -> Make:
    """Other temperatures: ``rule(state, passed)`` by path; ``passed`` is 1 after a share ``until`` of the run."""

    def made(job: Job) -> Pruner:
        pruner = make(job)

        def soften(params, thresholds, state, step):
            prune = state.prune.replace(temperatures=rule(state, step / (until * job.steps)))
            return pruner.soften(params, thresholds, state.replace(prune=prune), step)

        return pruner._replace(soften=soften)

    return made


def annealed(make: Make, end: float, until: float) -> Make:
    """The temperature falls geometrically to a share ``end`` of itself within a share ``until`` of the run."""

    def cooled(state: Any, passed: jax.Array) -> dict[str, jax.Array]:
        factor = jnp.float32(end) ** jnp.clip(passed, 0, 1)
        return {path: t * factor for path, t in state.prune.temperatures.items()}

    return tempered(make, cooled, until)


def widened(make: Make, share: Callable[[jax.Array], ArrayLike], until: float = 0.75) -> Make:
    """The temperature is no less than a share of the threshold: ``share(rest)`` of what is left of the selection.

    By eq. 15 it stays what it was for the trained weights, whose squares lie far below the threshold at a high
    compression, so that few of them are in the band in which masks are soft.
    """

    def warmed(state: Any, passed: jax.Array) -> dict[str, jax.Array]:
        least = share(jnp.clip(1 - passed, 0, 1))
        return {
            path: jnp.where(state.fixed, t, jnp.maximum(t, least * state.thresholds[path]))
            for path, t in state.prune.temperatures.items()
        }

    return tempered(make, warmed, until)


def leaking(make: Make, leak: Callable[[jax.Array], ArrayLike], until: float = 0.75) -> Make:
    """A leak by another rule: ``leak(rest)`` of what is left of the selection, which ends after a share of the run."""

    def made(job: Job) -> Pruner:
        pruner = make(job)

        def soften(params, thresholds, state, step):
            rest = jnp.clip(1 - step / (until * job.steps), 0, 1)
            now = jnp.where(state.fixed, 0.0, leak(rest))
            pruned = ltp.soft_prune(params, state.prune.replace(thresholds=thresholds), leak=now)
            return pruned, jnp.zeros((), jnp.float32)

        return pruner._replace(soften=soften)

    return made


def starting(make: Make, offsets: Callable[[ltp.Plan, Any], dict[str, jax.Array]]) -> Make:
    """Offsets begin at other values than those of LAMP: ``offsets(plan, params)`` by path."""

    def made(job: Job) -> Pruner:
        pruner = make(job)

        def init(params: Any) -> Any:
            state = pruner.init(params)
            # A scale that leaves as many weights as the pruner's own.
            by_path = ravel_pytree(state.thresholds)[1]
            moved = offsets(job.plan, params)
            weights = dict(ltp.named_leaves(params))
            sizes, whole = (
                jnp.concatenate([jnp.abs(weights[path]).ravel() / jnp.exp(scales[path]) for path in job.plan.paths])
                for scales in (moved, by_path(state.offsets))
            )
            share = jnp.mean(whole > jnp.exp(state.log_scale))
            log_scale = jnp.log(jnp.quantile(sizes, 1 - share))
            return state.replace(offsets=ravel_pytree(moved)[0], log_scale=log_scale)

        return pruner._replace(init=init)

    return made


def growing(make: Make) -> Make:
    """Thresholds grow and shrink as the norms of their layers' weights do while these are trained."""

    def made(job: Job) -> Pruner:
        pruner = make(job)

        def log_norms(params: Any) -> jax.Array:
            leaves = dict(ltp.named_leaves(params))
            return jnp.log(ravel_pytree({path: jnp.linalg.norm(leaves[path]) for path in job.plan.paths})[0])

        def update(grads, old_params, params, state, step):
            offsets = state.offsets + log_norms(params) - log_norms(old_params)
            return pruner.update(grads, old_params, params, state.replace(offsets=offsets), step)

        return pruner._replace(update=update)

    return made


def at_zero(plan: ltp.Plan, params: Any) -> dict[str, jax.Array]:
    """The weights of all layers are compared as they are."""
    del params
    return dict.fromkeys(plan.paths, jnp.zeros((), jnp.float32))


def at_spread(plan: ltp.Plan, params: Any) -> dict[str, jax.Array]:
    """The weights of all layers are compared in units of the spread of their layer."""
    leaves = dict(ltp.named_leaves(params))
    return {path: jnp.log(jnp.std(jnp.abs(leaves[path]))) for path in plan.paths}


def divided(make: Make, axis: int) -> Make:
    """A threshold for each slice of a kernel along an axis, where a layer has one: for each input, or each neuron."""

    def made(job: Job) -> Pruner:
        rule = dataclasses.replace(ltp.DEFAULT_RULES[0], stack_axes=(axis,))
        return make(job._replace(plan=ltp.plan(job.network["params"], rules=[rule])))

    return made


Units = dict[str, jax.Array]
"""Factors of the weights by path, which broadcast to their shapes."""


def in_units(make: Make, units: Callable[[Job], Units]) -> Make:
    """Weights are compared after they were multiplied by factors of their own, as rows and columns have them."""

    def made(job: Job) -> Pruner:
        pruner = make(job)
        factors = {path: jnp.ones(()) for path in job.plan.paths} | units(job)

        def times(params: Any, sign: int) -> Any:
            return map_selected(lambda path, w: w * factors[path] ** sign, params, factors)

        def soften(params, thresholds, state, step):
            pruned, penalty = pruner.soften(times(params, 1), thresholds, state, step)
            return times(pruned, -1), penalty

        def update(grads, old_params, params, state, step):
            params, state = pruner.update(grads, times(old_params, 1), times(params, 1), state, step)
            return times(params, -1), state

        return Pruner(
            init=lambda params: pruner.init(times(params, 1)),
            soften=soften,
            update=update,
            harden=lambda params, state: times(pruner.harden(times(params, 1), state), -1),
        )

    return made


def pixel_spreads(power: float) -> Callable[[Job], Units]:
    """The first layer's weights in units of how much their pixels vary over the images, to a power."""

    def units(job: Job) -> Units:
        pixels = job.images.reshape(len(job.images), -1).astype(np.float32)
        return {"dense1/kernel": _relative(pixels.std(0))[:, None] ** power}

    return units


def activation_spreads(inputs: bool, normalisation: bool) -> Callable[[Job], Units]:
    """Weights in units of how much what they multiply varies, and of what normalisation makes of their product."""

    def units(job: Job) -> Units:
        params, statistics = job.network["params"], job.network["batch_stats"]
        x = job.images[:5000].reshape(5000, -1).astype(np.float32)
        x = (x - x.mean()) / x.std()
        factors = {path: jnp.ones((1, 1)) for path in job.plan.paths}
        for name, norm in (("dense1", "norm1"), ("dense2", "norm2"), ("head", None)):
            path = f"{name}/kernel"
            if inputs:
                factors[path] *= _relative(x.std(0))[:, None]
            if norm is not None:
                factor = params[norm]["scale"] / jnp.sqrt(statistics[norm]["var"] + 1e-5)
                if normalisation:
                    factors[path] *= _relative(jnp.abs(factor))[None]
                x = x @ params[name]["kernel"] - statistics[norm]["mean"]
                x = jax.nn.relu(x * factor + params[norm]["bias"])
        return factors

    return units


def _relative(spread: Any) -> jax.Array:
    """In units of the root of the mean of the squares, and no less than a hundredth, so that it can be divided by."""
    spread = jnp.asarray(spread)
    return jnp.maximum(spread / jnp.sqrt(jnp.mean(jnp.square(spread))), 0.01)


def held(until: float) -> Callable[[float, int], optax.Schedule]:
    """The rate stays where it begins for a share of the run, and then falls to zero along a cosine."""

    def rate(peak: float, steps: int) -> optax.Schedule:
        first = round(until * steps)
        falling = optax.cosine_decay_schedule(peak, steps - first)
        return optax.join_schedules([optax.constant_schedule(peak), falling], [first])

    return rate


def restarted(after: float, share: float) -> Callable[[float, int], optax.Schedule]:
    """The rate falls to zero along a cosine within a share of the run, and once more from a share of what it was."""

    def rate(peak: float, steps: int) -> optax.Schedule:
        first = round(after * steps)
        falls = [optax.cosine_decay_schedule(peak, first), optax.cosine_decay_schedule(share * peak, steps - first)]
        return optax.join_schedules(falls, [first])

    return rate


class Variant(NamedTuple):
    """How to make a pruner, and how the weights are trained with it.

    The decay ends after a share of the run; the rate, by its peak and the number of steps, is a cosine if not
    given.
    """

    make: Make
    learning_rate: float = 0.1
    weight_decay: float = 1e-3
    distill: float = 0.0
    label_smoothing: float = 0.0
    decay_until: float = 1.0
    rate: Callable[[float, int], optax.Schedule] | None = None


PENALTIES = (10.0, 40.0)
CLAIMS: dict[str, Make] = {
    **{f"L0 on thresholds alone, eq. 14, penalty {p:g}": penalised(p) for p in PENALTIES},
    **{f"exact gradient of the mask, penalty {p:g}": penalised(p, exact_gradient=True) for p in PENALTIES},
    **{f"L0 on weights too, penalty {p:g}": penalised(p, l0_to_weights=True) for p in PENALTIES},
    **{f"L1 in place of L0, penalty {p:g}": norm_penalised(p, 1) for p in PENALTIES},
    **{f"L2 in place of L0, penalty {p:g}": norm_penalised(p, 2) for p in PENALTIES},
    **{f"T0 {t0:g}, penalty 10": penalised(10.0, t0=t0) for t0 in (1e-4, 1e-2, 1e-1)},
}
"""The paper's choices and their opposites, to a penalty, without weight decay."""
IDEAS: dict[str, Variant] = {
    "target": Variant(targeted()),
    "target, no weight decay": Variant(targeted(), weight_decay=0.0),
    "target, weight decay 5e-4": Variant(targeted(), weight_decay=5e-4),
    "target, weight decay 2e-3": Variant(targeted(), weight_decay=2e-3),
    "target, rate 0.05": Variant(targeted(), learning_rate=0.05),
    "target, rate 0.2": Variant(targeted(), learning_rate=0.2),
    "target, pruned within 20 %": Variant(targeted(prune=0.2)),
    "target, pruned within 80 %, selects until 90 %": Variant(targeted(prune=0.8, select=0.9)),
    "target, selects until 40 %": Variant(targeted(select=0.4)),
    "target, selects until 90 %": Variant(targeted(select=0.9)),
    "target, offsets begin at zero": Variant(starting(targeted(), at_zero)),
    "target, offsets begin at the spreads": Variant(starting(targeted(), at_spread)),
    "target, one threshold for all layers": Variant(starting(targeted(optimizer=optax.sgd(0.0)), at_zero)),
    "target, offsets stay where they begin": Variant(targeted(optimizer=optax.sgd(0.0))),
    "target, offsets by Adam at 1e-3": Variant(targeted(optimizer=optax.adam(1e-3))),
    "target, offsets by Adam at 3e-3": Variant(targeted(optimizer=optax.adam(3e-3))),
    "target, offsets by Adam at 1e-2": Variant(targeted(optimizer=optax.adam(1e-2))),
    "target, offsets by Adam at 3e-2": Variant(targeted(optimizer=optax.adam(3e-2))),
    "target, offsets by Adam at 1e-3, no momentum": Variant(targeted(optimizer=optax.adam(1e-3, b1=0.0))),
    "target, T0 1e-3": Variant(targeted(t0=1e-3)),
    "target, T0 5e-2": Variant(targeted(t0=5e-2)),
    "target, T0 falls from 5e-2 to 1e-3": Variant(annealed(targeted(t0=5e-2), 0.02, 0.75)),
    "target, T0 1e-1": Variant(targeted(t0=1e-1)),
    "target, temperature of a tenth of the threshold": Variant(widened(targeted(), lambda rest: 0.1)),
    "target, temperature falls from 0.3 of the threshold": Variant(widened(targeted(), lambda rest: 0.3 * rest)),
    "target, temperature falls from the threshold": Variant(widened(targeted(), lambda rest: rest)),
    "target, leak of 0.01 until masks are fixed": Variant(leaking(targeted(), lambda rest: 0.01)),
    "target, leak of 0.03 until masks are fixed": Variant(leaking(targeted(), lambda rest: 0.03)),
    "target, leak of 0.1 until masks are fixed": Variant(leaking(targeted(), lambda rest: 0.1)),
    "target, leak of 0.1 until masks are fixed, pruned within 80 %, selects until 90 %": Variant(
        leaking(targeted(prune=0.8, select=0.9), lambda rest: 0.1, until=0.9)
    ),
    "target, leak of 0.3 until masks are fixed": Variant(leaking(targeted(), lambda rest: 0.3)),
    "target, leak of 1 until masks are fixed": Variant(leaking(targeted(), lambda rest: 1.0)),
    "target, leak falls from 0.1": Variant(targeted(leak=0.1)),
    "target, leak falls from 0.3": Variant(targeted(leak=0.3)),
    "target, leak falls from 1": Variant(targeted(leak=1.0)),
    "target, leak falls from 0.3 with the square of the rest": Variant(leaking(targeted(), lambda rest: 0.3 * rest**2)),
    "target, a threshold for each neuron": Variant(divided(targeted(), 1)),
    "target, a threshold for each input": Variant(divided(targeted(), 0)),
    "target, in units of the pixels' spread": Variant(in_units(targeted(), pixel_spreads(1.0))),
    "target, in units of the root of the pixels' spread": Variant(in_units(targeted(), pixel_spreads(0.5))),
    "target, in units of all inputs' spread": Variant(in_units(targeted(), activation_spreads(True, False))),
    "target, in units of normalisation's factor": Variant(in_units(targeted(), activation_spreads(False, True))),
    "target, in units of both": Variant(in_units(targeted(), activation_spreads(True, True))),
    "target, thresholds grow with their layers": Variant(growing(targeted())),
    "target, thresholds grow with their layers, leak falls from 0.3": Variant(growing(targeted(leak=0.3))),
    "target, weight decay until masks are fixed": Variant(targeted(), decay_until=0.75),
    "target, weight decay 2e-3 until masks are fixed": Variant(targeted(), weight_decay=2e-3, decay_until=0.75),
    "target, rate constant until masks are fixed": Variant(targeted(), rate=held(0.75)),
    "target, rate constant until the target is reached": Variant(targeted(), rate=held(0.4)),
    "target, rate falls twice, the second time from a half": Variant(targeted(), rate=restarted(0.75, 0.5)),
    "target, rate falls twice, the second time from a fifth": Variant(targeted(), rate=restarted(0.75, 0.2)),
    "target, label smoothing 0.05": Variant(targeted(), label_smoothing=0.05),
    "target, distilled from the dense network, half": Variant(targeted(), distill=0.5),
    "magnitude, pruned within 50 %": Variant(magnitude(0.5)),
    "magnitude, pruned within 50 %, distilled, half": Variant(magnitude(0.5), distill=0.5),
}
"""Ideas for the way to 64×, each a change of the first."""
VARIANTS = {name: Variant(make, 0.05, 0.0) for name, make in CLAIMS.items()} | IDEAS
"""All that can be run."""
