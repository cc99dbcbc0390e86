"""The baselines, by numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ltp_jax as ltp
from experiments import baselines

PARAMS = {
    "a": {"kernel": jnp.array([[1.0, -2.0], [3.0, -4.0]]), "bias": jnp.ones(2)},
    "b": {"kernel": jnp.array([[-5.0, 6.0], [-7.0, 8.0]])},
}
PLAN = ltp.plan(PARAMS)
FIRST = jnp.int32(0)


def kernels(params):
    return np.ravel(params["a"]["kernel"]).tolist(), np.ravel(params["b"]["kernel"]).tolist()


def test_one_shot_keeps_the_largest_of_the_whole_network():
    pruner = baselines.one_shot_magnitude(PLAN, 3 / 8)
    state = pruner.init(PARAMS)
    assert kernels(pruner.harden(PARAMS, state)) == ([0, 0, 0, 0], [0, 6, -7, 8])
    np.testing.assert_array_equal(pruner.soften(PARAMS, {}, state, jnp.array(0))[0]["a"]["bias"], [1, 1])


def test_pruned_weights_are_not_trained():
    pruner = baselines.one_shot_magnitude(PLAN, 3 / 8)
    state = pruner.init(PARAMS)
    gradient = jax.grad(lambda p: sum(jnp.sum(w) for w in jax.tree.leaves(pruner.soften(p, {}, state, FIRST)[0])))(
        PARAMS
    )
    assert kernels(gradient) == ([0, 0, 0, 0], [0, 1, 1, 1])
    # Momentum would move them all: the masked ones stay where they are.
    moved = jax.tree.map(lambda w: w + 10, PARAMS)
    params, _ = pruner.update({}, PARAMS, moved, state, jnp.array(0))
    assert kernels(params) == ([1, -2, 3, -4], [-5, 16, 3, 18])
    np.testing.assert_array_equal(params["a"]["bias"], [11, 11])


def densities(pruner, steps):
    """Kept weights of both kernels before each step, while nothing is trained."""
    state, params, rows = pruner.init(PARAMS), PARAMS, []
    for step in range(steps):
        rows.append(tuple(sum(w != 0 for w in kernel) for kernel in kernels(pruner.harden(params, state))))
        params, state = jax.jit(pruner.update)({}, params, params, state, jnp.array(step))
    return rows


def test_global_schedule():
    # Density 1/4 + 3/4·(1 − t/4)³ at t = 0, 2, 4: 1, 0.34375, 0.25 of 8 weights: 8, round(2.75) = 3, 2.
    pruner = baselines.gradual_magnitude(PLAN, 1 / 4, prune_steps=5, every=2)
    assert densities(pruner, 7) == [(4, 4), (4, 4), (0, 3), (0, 3), (0, 2), (0, 2), (0, 2)]


def test_the_last_change_of_the_masks_leaves_the_target():
    # Within seven steps of which every fourth changes them, the last does so at step 4: the plan ends there, and is not
    # at 1/8 + 7/8·(3/7)³ = 0.19 of 8 weights.
    pruner = baselines.gradual_magnitude(PLAN, 1 / 8, prune_steps=7, every=4)
    assert densities(pruner, 9) == [(4, 4)] * 4 + [(0, 1)] * 5


def test_uniform_schedule():
    # Of 4 weights each: 4, round(1.375) = 1, 1.
    pruner = baselines.gradual_magnitude(PLAN, 1 / 4, prune_steps=4, every=2, uniform=True)
    assert densities(pruner, 5) == [(4, 4), (4, 4), (1, 1), (1, 1), (1, 1)]
    state = pruner.init(PARAMS)
    _, state = pruner.update({}, PARAMS, PARAMS, state, jnp.array(3))
    assert kernels(pruner.harden(PARAMS, state)) == ([0, 0, 0, -4], [0, 0, 0, 8])


def test_masks_come_from_all_weights_and_not_from_those_left():
    pruner = baselines.gradual_magnitude(PLAN, 1 / 2, prune_steps=4, every=2)
    _, state = pruner.update({}, PARAMS, PARAMS, pruner.init(PARAMS), jnp.array(1))
    assert kernels(pruner.harden(PARAMS, state)) == ([0, 0, 0, 0], [-5, 6, -7, 8])  # round(8 · 0.5625) = 4
    shrunk = PARAMS | {"b": {"kernel": PARAMS["b"]["kernel"].at[0, 0].set(0.1)}}
    _, state = pruner.update({}, PARAMS, shrunk, state, jnp.array(3))
    assert kernels(pruner.harden(shrunk, state)) == ([0, 0, 0, -4], [0, 6, -7, 8])
    shrunk = PARAMS | {"b": {"kernel": jnp.full((2, 2), 0.1)}}
    _, state = pruner.update({}, shrunk, shrunk, state, jnp.array(3))
    assert kernels(pruner.harden(shrunk, state)) == ([1, -2, 3, -4], [0, 0, 0, 0])


def test_str_shrinks_and_learns_its_thresholds():
    # sigmoid(log 1.5 … ) is chosen so that the threshold is 0.6; then |w| − 0.6 is left of each weight above it.
    s = float(np.log(0.6 / 0.4))
    params = {"kernel": jnp.array([[0.5, -1.0], [2.0, -0.1]])}
    pruner = baselines.soft_threshold_reparameterization(ltp.plan(params), optax.sgd(0.1), initial=s)
    state = pruner.init(params)
    np.testing.assert_allclose(pruner.harden(params, state)["kernel"], [[0, -0.4], [1.4, 0]], rtol=1e-6)

    def loss(params, s):
        return jnp.sum(pruner.soften(params, s, state, FIRST)[0]["kernel"] ** 2) / 2

    d_params, d_s = jax.grad(loss, argnums=(0, 1))(params, state.thresholds)
    np.testing.assert_allclose(d_params["kernel"], [[0, -0.4], [1.4, 0]], rtol=1e-6)
    # −(0.4 + 1.4) · sigmoid′ = −1.8 · 0.6 · 0.4
    assert float(d_s["kernel"]) == pytest.approx(-1.8 * 0.24, rel=1e-5)
    _, state = pruner.update(d_s, params, params, state, FIRST)
    assert float(state.thresholds["kernel"]) == pytest.approx(s + 0.1 * 1.8 * 0.24, rel=1e-5)


def test_str_is_pruned_by_weight_decay():
    params = {"kernel": jnp.array([[0.5, -1.0]])}
    optimizer = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.5))
    pruner = baselines.soft_threshold_reparameterization(ltp.plan(params), optimizer, initial=-4.0)
    _, state = pruner.update({"kernel": jnp.float32(0)}, params, params, pruner.init(params), FIRST)
    assert float(state.thresholds["kernel"]) == pytest.approx(-4 + 0.5 * 0.1 * 4)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.01, float("nan")])
def test_densities_out_of_range_are_refused(density):
    for make in (baselines.one_shot_magnitude, lambda *args: baselines.gradual_magnitude(*args, prune_steps=4)):
        with pytest.raises(ValueError, match=f"the density is {density}; accepted is more than 0, at most 1"):
            make(PLAN, density)
        make(PLAN, 1.0)


@pytest.mark.parametrize(("prune_steps", "every"), [(0, 2), (4, 0)])
def test_a_schedule_without_steps_is_refused(prune_steps, every):
    with pytest.raises(ValueError, match=f"prune_steps is {prune_steps}, every is {every}; accepted is at least 1"):
        baselines.gradual_magnitude(PLAN, 0.5, prune_steps=prune_steps, every=every)


@pytest.mark.parametrize(
    "make",
    [
        lambda plan: baselines.one_shot_magnitude(plan, 0.5),
        lambda plan: baselines.gradual_magnitude(plan, 0.5, prune_steps=4),
        lambda plan: baselines.soft_threshold_reparameterization(plan, optax.sgd(0.1), initial=-5.0),
    ],
)
def test_a_plan_that_prunes_nothing_is_refused(make):
    with pytest.raises(ValueError, match="the plan prunes no tensor"):
        make(ltp.Plan(()))
