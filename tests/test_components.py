"""What a training is made of: the optimizer of the weights, and LTP as the options have it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ltp_jax as ltp
from experiments.components import ltp_pruner, weights_optimizer
from experiments.config import LtpConfig, TrainConfig

STEPS = 40
# Four weights with |w| = 1, 1, 3, 3: Var(|w|) = 1, so T = t0 and r = √τ.
W = {"kernel": jnp.array([[1.0, -1.0], [3.0, -3.0]])}


def learning_rates(config, steps_per_epoch):
    """What each step takes from a weight whose gradient is one."""
    optimizer, params = weights_optimizer(config, steps_per_epoch), {"kernel": jnp.ones((1, 1))}
    state, rates = optimizer.init(params), []
    for _ in range(config.epochs * steps_per_epoch):
        updates, state = optimizer.update(params, state, params)
        rates.append(-float(updates["kernel"][0, 0]))
    return rates


def test_learning_rate_rises_within_the_warm_up_and_falls_by_a_cosine_to_the_end():
    config = TrainConfig(epochs=4, batch_size=1, learning_rate=0.2, warmup_epochs=1.5, momentum=0.0)
    cosine = 0.1 * (1 + np.cos(np.pi * np.arange(10) / 10))
    np.testing.assert_allclose(learning_rates(config, 4), [*(0.2 * np.arange(6) / 6), *cosine], atol=1e-6)


def test_learning_rate_begins_at_its_highest_without_a_warm_up():
    config = TrainConfig(epochs=2, batch_size=1, learning_rate=0.2, momentum=0.0)
    cosine = 0.1 * (1 + np.cos(np.pi * np.arange(10) / 10))
    np.testing.assert_allclose(learning_rates(config, 5), cosine, atol=1e-6)


def test_weight_decay_is_of_kernels_alone():
    optimizer = weights_optimizer(
        TrainConfig(epochs=1, batch_size=1, learning_rate=0.2, momentum=0.0, weight_decay=0.5), 10
    )
    params = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full(2, 3.0)}
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], np.full((2, 2), -0.2 * 0.5 * 3), rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0)


def pruner_of(config, params):
    return ltp_pruner(config, ltp.plan(params), STEPS, {})


def test_options_of_a_penalty_are_those_of_the_pruner():
    config = LtpConfig(penalty=6.0, ramp=0.5, learn=0.5, reach=1.5, t0=1e-3 * 20)
    pruner = pruner_of(config, W)
    state = pruner.init(W)
    assert float(state.prune.temperatures["kernel"]) == pytest.approx(0.02)
    # It rises over ten of the twenty learning steps. All but e^−50 of each weight is left.
    penalties = [pruner.soften(W, state.thresholds, state, jnp.int32(step))[1] for step in (0, 5, 10, 39)]
    np.testing.assert_allclose(penalties, [0, 3, 6, 6], rtol=1e-5)
    # Adam's first step is its rate, a twentieth of the reach; after twenty steps nothing moves.
    for step, r in ((0, 1.5 / 20), (19, 1.5 / 20), (20, 0.0)):
        _, moved = pruner.update({"kernel": jnp.float32(-1)}, W, W, state, jnp.int32(step))
        assert float(moved.thresholds["kernel"]) == pytest.approx(r**2, rel=1e-4), step


@pytest.mark.parametrize(("option", "gradient"), [(None, 0.5), ("exact_gradient", 25.5), ("l0_to_weights", 75.5)])
def test_options_of_the_gradient_are_those_of_the_pruner(option, gradient):
    # The weight of one is at the threshold: s = 1/2, and s(1 − s)/T = 12.5. Its mask has the gradient 2w² · 12.5, and
    # its fourth of a penalty of 12 has 3 · 2w · 12.5.
    config = LtpConfig(penalty=12.0, ramp=0.0, t0=0.02, **({option: True} if option else {}))
    pruner = pruner_of(config, W)
    state, thresholds = pruner.init(W), {"kernel": jnp.float32(1)}

    def loss(params):
        pruned, penalty = pruner.soften(params, thresholds, state, jnp.int32(0))
        return pruned["kernel"][0, 0] + penalty

    assert float(jax.grad(loss)(W)["kernel"][0, 0]) == pytest.approx(gradient, rel=1e-4)


def test_options_of_a_target_are_those_of_the_pruner():
    params = {"kernel": jnp.array(np.random.default_rng(0).normal(size=(50, 40)), jnp.float32)}
    config = LtpConfig(target_density=1 / 4, prune=0.25, select=0.75, leak=0.2, t0=0.03)
    pruner = pruner_of(config, params)
    first = state = pruner.init(params)
    assert float(state.prune.temperatures["kernel"]) == pytest.approx(0.03 * np.var(np.abs(params["kernel"])), rel=1e-4)
    update, densities = jax.jit(pruner.update), []
    for step in range(STEPS):
        _, state = update({"kernel": jnp.float32(0)}, params, params, state, step)
        densities.append(float(ltp.summarize(params, state.prune).density))
        # Thirty of forty steps select, and the last of them fixes the masks.
        assert bool(state.fixed) == (step + 1 >= 30), step
    # Ten of forty descend: halfway the plan is at (1/4)^(1 − 1/8).
    np.testing.assert_allclose([densities[4], densities[9], densities[28]], [0.2973, 0.25, 0.25], rtol=0.05)
    # Of weights far below the threshold a fifth of the gradient is left at first, which falls to zero with the thirty.
    for step, leak in ((0, 0.2), (15, 0.1), (30, 0.0)):
        grads = jax.grad(
            lambda p, step=step: jnp.sum(pruner.soften(p, {"kernel": jnp.float32(99)}, first, step)[0]["kernel"])
        )(params)
        np.testing.assert_allclose(grads["kernel"], np.full((50, 40), leak), atol=1e-6)
