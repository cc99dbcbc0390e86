"""LTP to a target: the arithmetic by hand, and whole runs that have to land on it."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from networks import THREE_LAYERS, three_layers

import ltp_jax as ltp
from ltp_jax import pruner as pruners
from ltp_jax import target
from ltp_jax.penalty import learned_thresholds
from ltp_jax.training import create_state, cross_entropy, make_train_step

STEPS, PRUNE, SELECT = 60, 24, 36


def apply(params, batch_stats, images, *, train, key):
    del train, key
    x = jax.nn.relu(images @ params["one"]["kernel"] + params["one"]["bias"])
    x = jax.nn.relu(x @ params["two"]["kernel"] + params["two"]["bias"])
    return x @ params["head"]["kernel"] + params["head"]["bias"], batch_stats


def batch(step, seed=0):
    rng = np.random.default_rng((seed, step))
    images = rng.normal(size=(32, 16)).astype(np.float32)
    return {"image": images, "label": np.argmax(images[:, :4] + images[:, 4:8], -1).astype(np.int32)}


@functools.cache
def compiled(pruner):
    optimizer = optax.sgd(0.1, momentum=0.9)
    step = make_train_step(apply, optimizer, pruner, cross_entropy())

    @jax.jit
    def train(params, batches):
        def advance(state, batch):
            state = step(state, batch)
            return state, state

        first = create_state(params, {}, optimizer, pruner, jax.random.key(0))
        return first, jax.lax.scan(advance, first, batches)[1]

    return train


def run(pruner, seed=0, params=None):
    """States before the first and after each step."""
    batches = [batch(step, seed) for step in range(STEPS)]
    params = three_layers(seed) if params is None else params
    first, rest = compiled(pruner)(params, jax.tree.map(lambda *rows: np.stack(rows), *batches))
    return [first, *(jax.tree.map(lambda leaf, i=i: leaf[i], rest) for i in range(STEPS))]


@functools.cache
def pruner_to(compression, leak=0.3):
    plan = ltp.plan(three_layers())
    return target.target_density(plan, 1 / compression, prune_steps=PRUNE, select_steps=SELECT, leak=leak)


def kept(state):
    return int(ltp.summarize(state.params, state.pruning.prune).kept)


def test_plan():
    plan = target.planned_density(2**-8, 4)
    np.testing.assert_allclose([plan(t) for t in (0, 2, 4, 9)], [1, 2**-7, 2**-8, 2**-8], rtol=1e-5)


def test_nothing_is_sorted():
    # A sort of one layer can take the compiler for a TPU half a minute.
    params, pruner = three_layers(), pruner_to(16)
    state = pruner.init(params)
    made = jax.make_jaxpr(pruner.init)(params)
    updated = jax.make_jaxpr(pruner.update)(state.thresholds, params, params, state, 0)
    assert not re.search(r"\b(sort|cumsum|top_k)\b", f"{made} {updated}")


def test_component_along_the_budget_is_removed():
    # λ = <(3, 4), (1, 1)> / 2 = 3.5
    np.testing.assert_array_equal(target.without_component(jnp.array([3.0, 4.0]), jnp.ones(2)), [-0.5, 0.5])


def test_newton_step():
    slopes = jnp.array([0.1, 0.3])
    # The logarithm of the density has the slope 0.4 / 0.5 = 0.8.
    step = target.newton_step(jnp.float32(0.5), slopes, jnp.float32(0.45))
    assert float(step) == pytest.approx(math.log(0.5 / 0.45) / 0.8)
    # Where no weight is near a threshold, 0.65 · log 2 is taken for the slope, and a step is at most 0.3.
    empty = jnp.zeros(2)
    step = target.newton_step(jnp.float32(0.5), empty, jnp.float32(0.45))
    assert float(step) == pytest.approx(math.log(0.5 / 0.45) / (0.65 * math.log(2)), rel=1e-5)
    assert float(target.newton_step(jnp.float32(0.5), empty, jnp.float32(0.1))) == pytest.approx(0.3)


def test_offsets_stay_below_the_largest_weight():
    # The threshold (2 · 3)² would pass the largest weight of a, 4, and not that of b, 8.
    offsets = jnp.log(jnp.array([3.0, 3.0]))
    held = target.below_the_largest(offsets, jnp.log(2.0), jnp.array([16.0, 64.0]))
    assert float(held[0]) == pytest.approx(math.log(2 * 0.999), abs=1e-6)
    assert held[1] == offsets[1]


def test_thresholds_fall_where_a_layer_lacks_weights():
    # Half of what it has to have, with a slope of 4 in its logarithm; a third, with none that could be seen, where 2 is
    # taken and 0.3 is the most; enough.
    kept, slopes, least = jnp.array([0.05, 0.03, 0.1]), jnp.array([0.2, 0.0, 0.0]), jnp.array([0.1, 0.09, 0.1])
    fall = target.shortfall(kept, slopes, least, jnp.float32(-0.02))
    np.testing.assert_allclose(fall, [math.log(2) / 4, 0.3, 0], rtol=1e-6)
    # Such a threshold does not rise with the common scale.
    fall = target.shortfall(kept, slopes, least, jnp.float32(0.02))
    np.testing.assert_allclose(fall, [math.log(2) / 4 + 0.02, 0.32, 0], rtol=1e-6)


@pytest.mark.parametrize("density", [1 / 8, 1 / 64])
def test_a_layer_keeps_weights_while_all_others_grow(density):
    """The others grow four times as large, and the common scale with them: it would leave the layer a single weight."""
    keys = jax.random.split(jax.random.key(0))
    params = {
        "a": {"kernel": jax.random.normal(keys[0], (100, 100))},
        "b": {"kernel": jax.random.normal(keys[1], (200, 200))},
    }
    pruner = target.target_density(ltp.plan(params), density, prune_steps=60, select_steps=90)
    state = pruner.init(params)
    lamp = 10 * state.least[0] * 50_000  # weights that it would have by LAMP
    update, kept = jax.jit(pruner.update), []
    for step in range(100):
        old, params = params, {**params, "b": jax.tree.map(lambda w: 1.02 * w, params["b"])} if step < 75 else params
        params, state = update(jax.tree.map(jnp.zeros_like, state.thresholds), old, params, state, jnp.int32(step))
        summary = ltp.summarize(params, state.prune)
        kept.append(int(summary.tensors["a/kernel"].kept))
    # It falls below a tenth by what a step of all others' growth takes from it, and is back in the next one.
    assert min(kept) > 0.08 * lamp
    assert max(kept[50:]) < 0.105 * lamp
    assert summary.count_kept() == 50_000 * density // 1


def test_the_common_scale_rises_no_farther_than_a_threshold_does():
    # The thresholds of a and b can rise to 4 and 8, less a thousandth, and are at 2 · 1.5 and 2 · 1; c lacks weights.
    offsets, largest = jnp.log(jnp.array([1.5, 1.0, 1.0])), jnp.array([16.0, 64.0, 1e6])
    short = jnp.array([False, False, True])
    left = target.room(offsets, jnp.log(2.0), largest, short)
    assert float(left) == pytest.approx(math.log(4) - 1e-3, abs=1e-6)
    assert target.room(offsets, jnp.log(8.0), largest, short) == 0
    assert target.room(offsets, jnp.log(2.0), largest, jnp.ones(3, bool)) == 0


def held_still(params, density, steps):
    """The states of a target for weights that are not trained."""
    pruner = target.target_density(ltp.plan(params), density, prune_steps=steps // 4, select_steps=steps - 2)
    still = dict.fromkeys(THREE_LAYERS, jnp.float32(0))
    states = [pruner.init(params)]
    update = jax.jit(pruner.update)
    for step in range(steps):
        params, state = update(still, params, params, states[-1], jnp.int32(step))
        states.append(state)
    return params, states


@pytest.mark.parametrize("density", [1 / 16, 1 / 64])
def test_clipped_weights_of_which_the_target_leaves_fewer_than_are_the_largest(density):
    """A third of the weights are of one size, the largest of their layers, and kept or pruned together."""
    clip = 0.25
    params = jax.tree.map(lambda w: jnp.clip(w, -clip, clip), three_layers())
    largest = sum(np.count_nonzero(np.abs(w) == clip) for path, w in ltp.named_leaves(params) if path in THREE_LAYERS)
    assert largest > 1696 / 16
    params, states = held_still(params, density, steps=500)
    # The scale would rise by up to 0.3 in each step, and be infinite from 88 on.
    assert max(float(state.log_scale) for state in states) < 5
    assert all(np.isfinite(tau) for tau in states[-1].thresholds.values())
    # Each layer is taken to have one of them, so that the others are not emptied for what they cannot change.
    assert ltp.summarize(params, states[-1].prune).count_kept() == largest + 1696 * density // 1 - len(THREE_LAYERS)


def test_weights_of_one_size_and_zeros_have_a_scale_to_begin_with():
    params = jax.tree.map(lambda w: jnp.where(jnp.abs(w) > 0.2, jnp.sign(w), 0), three_layers())
    params, states = held_still(params, 1 / 16, steps=40)
    assert all(np.isfinite(state.log_scale) for state in states)


def test_two_updates_by_hand():
    # Two tensors of ten weights; √τ of 1 and 2 on the way from 16 of 20 weights to 4 of 20.
    sizes = np.array([0.5, 0.92, 1.04, 1.5, 1.6, 1.7, 1.8, 1.9, 1.95, 3.0], np.float32)
    params = {"a": {"kernel": jnp.asarray(sizes)[None]}, "b": {"kernel": 2 * jnp.asarray(sizes)[None]}}
    plan = ltp.plan(params)
    pruner = target.target_density(plan, 0.2, prune_steps=10, select_steps=12, optimizer=optax.sgd(0.1))
    first = pruner.init(params)
    offsets = jnp.log(jnp.array([1.0, 2.0]))
    tau = {"a/kernel": jnp.float32(1), "b/kernel": jnp.float32(4)}
    state = first.replace(offsets=offsets, log_scale=jnp.zeros(()), prune=first.prune.replace(thresholds=tau))
    grads = {"a/kernel": jnp.float32(0.3), "b/kernel": jnp.float32(-0.1)}
    # ∂L/∂a = 2τ · ∂L/∂τ = 0.6 and −0.8. In a tenth to both sides of each threshold lie two weights, so that the
    # slopes are equal and what keeps the budget is the distance to the mean: 0.7 and −0.7, of which a tenth is taken.
    wanted = np.array([-0.07, math.log(2) + 0.07])
    old = jax.tree.map(lambda w: 9 * w, params)  # those before the step are not what is left after it
    for step in (0, 1):
        _, new = pruner.update(grads, old, params, state, jnp.int32(step))
        np.testing.assert_allclose(new.offsets, wanted, atol=1e-6)
        # 16 of 20 are left, with the slope 4/20/0.2 = 1, in units of the density 1.25. The plan after the second step
        # is 0.2^(1 − 0.8³) = 0.456. The first step leaves the scale where it is.
        move = 0 if step == 0 else min(math.log(0.8 / 0.2 ** (1 - 0.8**3)) / 1.25, 0.3)
        assert float(new.log_scale) == pytest.approx(move, abs=1e-6)
        np.testing.assert_allclose([new.thresholds[path] for path in tau], np.exp(2 * (move + wanted)), rtol=1e-5)
        assert not new.fixed
    # At the twelfth update masks are fixed: 4 of 20, by size over exp(a_l), are 3.0, 1.95, 6.0 and 3.9.
    _, new = pruner.update(grads, old, params, state, jnp.int32(11))
    assert new.fixed
    left = [np.flatnonzero(w[0]).tolist() for w in jax.tree.leaves(pruner.harden(params, new))]
    assert sum(map(len, left)) == 4
    assert all(9 in places for places in left)


def test_offsets_begin_where_lamp_has_the_target():
    # As in the test of LAMP by hand: of weights of 1 to 4 and of 5 to 8 five of eight are left, the least of them 3 and
    # 6; where those of a cost three times as much, 4 of 16 buy the largest of each.
    params = {"a": {"kernel": jnp.arange(1.0, 5)[None]}, "b": {"kernel": jnp.arange(5.0, 9)[None]}}
    for density, costs, least in ((5 / 8, None, [3, 6]), (4 / 16, {"a/kernel": 3.0, "b/kernel": 1.0}, [4, 8])):
        pruner = target.target_density(ltp.plan(params), density, prune_steps=9, select_steps=9, costs=costs)
        np.testing.assert_allclose(pruner.init(params).offsets, np.log(least), rtol=1e-5)


@pytest.mark.parametrize(("first", "stride"), [(0, 1), (0, 7), (15, 1), (1000, 1)])
def test_masks_are_fixed_whatever_steps_are_counted(first, stride):
    params = three_layers()
    plan = ltp.plan(params)
    pruner = target.target_density(plan, 1 / 16, prune_steps=10, select_steps=20)
    state, still = pruner.init(params), dict.fromkeys(plan.paths, jnp.float32(0))
    update = jax.jit(pruner.update)
    for i in range(22):
        params, state = update(still, params, params, state, first + i * stride)
    assert int(ltp.summarize(params, state.prune).kept) == plan.prunable // 16


def test_pruned_weights_get_no_gradient_once_masks_are_fixed():
    params = three_layers()
    pruner = pruner_to(16)
    state, still = pruner.init(params), dict.fromkeys(ltp.plan(params).paths, jnp.float32(0))
    update = jax.jit(pruner.update)

    @jax.jit
    def grads(params, state):
        return jax.grad(lambda p: sum(map(jnp.sum, jax.tree.leaves(pruner.soften(p, state.thresholds, state, 0)[0]))))(
            params
        )

    for step in range(SELECT - 1):
        params, state = update(still, params, params, state, step)
    hard = pruner.harden(params, state)
    assert float(jnp.max(jnp.where(hard["one"]["kernel"] == 0, grads(params, state)["one"]["kernel"], 0))) >= 0.1
    for step in range(SELECT - 1, SELECT + 1):
        params, state = update(still, params, params, state, step)
    got = grads(params, state)["one"]["kernel"]
    np.testing.assert_array_equal(got, params["one"]["kernel"] != 0)


def test_nothing_comes_back_once_masks_are_fixed():
    old = {"kernel": jnp.array([0.0, 1.0, 0.5]), "bias": jnp.zeros(2)}
    new = {"kernel": jnp.array([0.1, 1.1, 0.4]), "bias": jnp.ones(2)}
    tau = {"kernel": jnp.float32(0.5)}
    fixed = pruners.project(new, old, tau, jnp.array(True))
    np.testing.assert_allclose(fixed["kernel"], [0, 1.1, 0])
    np.testing.assert_array_equal(fixed["bias"], new["bias"])
    before = pruners.project(new, old, tau, jnp.array(False))
    np.testing.assert_allclose(before["kernel"], [0, 1.1, 0.4])
    np.testing.assert_array_equal(before["bias"], new["bias"])


@pytest.mark.parametrize("leak", [0.0, 0.3])
def test_a_pruned_weight_gets_a_share_of_its_gradient_and_comes_back_by_it(leak):
    params = {"a": {"kernel": jnp.array([[0.1, -0.2, 1.0, 2.0, -3.0, 4.0]])}}
    pruner = target.target_density(
        ltp.plan(params), 0.5, prune_steps=1, select_steps=9, t0=1e-3, leak=leak, optimizer=optax.sgd(0.0)
    )
    state, masks = pruner.init(params), []

    def loss(params, thresholds, state, step):
        # Once half of them are pruned, it wants the smallest weight to be the largest one.
        return -(step > 1) * pruner.soften(params, thresholds, state, step)[0]["a"]["kernel"][0, 0]

    for step in range(12):
        grads, threshold_grads = jax.grad(loss, (0, 1))(params, state.thresholds, state, step)
        if step == 2:
            # Seven of nine steps are left of the selection.
            np.testing.assert_allclose(grads["a"]["kernel"], [[-leak * 7 / 9, 0, 0, 0, 0, 0]], atol=1e-6)
        moved = jax.tree.map(lambda w, g: w - 3 * g, params, grads)
        params, state = pruner.update(threshold_grads, params, moved, state, step)
        masks.append(np.asarray(pruner.harden(params, state)["a"]["kernel"][0] != 0))
    # Half are left, and the smallest of these gives way.
    assert masks[-1].tolist() == ([True, False, False, False, True, True] if leak else [False] * 3 + [True] * 3)


@pytest.mark.parametrize(("step", "share"), [(0, 0.3), (1, 0.25), (3, 0.15), (6, 0), (9, 0)])
def test_the_leak_falls_to_zero_while_the_masks_are_chosen(step, share):
    params = {"kernel": jnp.array([[0.01, 5.0, 6.0]])}
    pruner = target.target_density(ltp.plan(params), 0.5, prune_steps=2, select_steps=6, leak=0.3)
    state, thresholds = pruner.init(params), {"kernel": jnp.float32(20.0)}

    def total(params):
        return jnp.sum(pruner.soften(params, thresholds, state, step)[0]["kernel"])

    np.testing.assert_allclose(jax.grad(total)(params)["kernel"], [[share, 1, 1]], atol=1e-6)


@pytest.mark.parametrize(("compression", "leak"), [(2, 0.3), (16, 0.3), (16, 0.0), (128, 0.3)])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_target_is_met_and_kept(compression, leak, seed):
    plan = ltp.plan(three_layers())
    states = run(pruner_to(compression, leak), seed)
    counts = [kept(state) for state in states]
    assert counts[0] == plan.prunable
    assert set(counts[SELECT:]) == {int(plan.prunable / compression)}
    summary = ltp.summarize(states[-1].params, states[-1].pruning.prune)
    assert all(int(tensor.kept) >= 1 for tensor in summary.tensors.values())


def test_the_density_follows_the_plan():
    plan = ltp.plan(three_layers())
    states = run(pruner_to(16))
    planned = target.planned_density(1 / 16, PRUNE)
    for step in range(1, SELECT):
        ratio = kept(states[step]) / plan.prunable / float(planned(step))
        # At first so fast a descent is ahead of the largest step of the scale.
        assert 0.92 < ratio < 1.08 or (step < PRUNE // 4 and 0.85 < ratio < 1.3), step


@pytest.mark.parametrize(("share", "size"), [(0.03, 0.0), (0.6, 0.0), (0.03, 1e-25)])
def test_a_network_with_zeros_is_pruned_along_the_plan(share, size):
    rng = np.random.default_rng(0)
    params = {"one": {"kernel": rng.normal(size=(100, 100))}, "two": {"kernel": rng.normal(size=(100, 30))}}
    params = jax.tree.map(lambda w: jnp.float32(np.where(rng.random(w.shape) < share, size, w)), params)
    pruner = target.target_density(ltp.plan(params), 1 / 16, prune_steps=400, select_steps=600)
    state = pruner.init(params)
    grads = {path: jnp.zeros(()) for path in state.thresholds}

    @jax.jit
    def densities(state):
        def advance(state, step):
            state = pruner.update(grads, params, params, state, step)[1]
            return state, ltp.summarize(params, state.prune).density

        return jax.lax.scan(advance, state, jnp.arange(599))[1]

    # No more than what is not zero already can be left. A tenth is the delay with which the scale takes up the plan,
    # where few weights lie; once it never did, and all of them went at the last step.
    planned = target.planned_density(1 / 16, 400)(jnp.arange(1, 600))
    np.testing.assert_allclose(densities(state)[10:], jnp.minimum(planned, 1 - share)[10:], rtol=0.12)


@pytest.mark.parametrize("leak", [0.0, 0.3])
def test_a_pruned_network_is_pruned_further(leak):
    """What is zero stays zero, and the density waits for the plan to come to where it is."""
    start, pruner = run(pruner_to(8))[-1], pruner_to(16, leak)
    hard = pruner_to(8).harden(start.params, start.pruning)
    states = run(pruner, params=hard)
    planned = target.planned_density(1 / 16, PRUNE)
    # After the plan's first step, as it would be from a whole network, the scale waits until the plan is at an eighth.
    for step in range(1, STEPS + 1):
        wanted = float(planned(step)) if planned(step) < 1 / 8 else float(planned(1)) / 8
        assert kept(states[step]) == pytest.approx(wanted * 1696, rel=0.15), step
    last = states[-1]
    assert kept(last) == 1696 // 16
    further = pruner.harden(last.params, last.pruning)
    for (_, w), (_, before) in zip(ltp.named_leaves(further), ltp.named_leaves(hard), strict=True):
        assert not np.any((w != 0) & (before == 0))


def test_zeros_stay_zero_on_the_way_to_a_penalty():
    params = {"kernel": jnp.array([[0.0, -1.0], [3.0, -3.0]])}
    pruner = learned_thresholds(ltp.plan(params), lambda step: 0.0, optax.sgd(0.1), learn_steps=9)
    moved, _ = pruner.update(
        {"kernel": jnp.float32(0)}, params, {"kernel": params["kernel"] + 1}, pruner.init(params), 0
    )
    np.testing.assert_array_equal(moved["kernel"], [[0, 0], [4, -2]])


def test_rescaling_a_layer_that_normalisation_follows_does_not_change_what_is_pruned():
    plan = ltp.plan(three_layers())
    pruner = target.target_density(plan, 1 / 16, prune_steps=PRUNE, select_steps=SELECT)
    optimizer = optax.sgd(0.1)

    def normalised(params, batch_stats, images, *, train, key):
        del train, key
        x = images @ params["one"]["kernel"]
        x = jax.nn.relu((x - x.mean(0)) / jnp.maximum(x.std(0), 1e-12))
        x = jax.nn.relu(x @ params["two"]["kernel"] + params["two"]["bias"])
        return x @ params["head"]["kernel"] + params["head"]["bias"], batch_stats

    step = jax.jit(make_train_step(normalised, optimizer, pruner, cross_entropy()))

    def masks(scale):
        params = three_layers()
        params["one"]["kernel"] *= scale
        state = create_state(params, {}, optimizer, pruner, jax.random.key(0))
        still = state.params["one"]["kernel"]
        for i in range(SELECT):
            # The layer itself stays: its gradient falls as its weights grow, and rescaling changes how fast it learns.
            state = step(state, batch(i))
            state.params["one"]["kernel"] = jnp.where(state.params["one"]["kernel"] == 0, 0, still)
        return jax.tree.map(lambda w: np.asarray(w != 0), pruner.harden(state.params, state.pruning))

    plain, scaled = masks(1.0), masks(64.0)
    for path, mask in ltp.named_leaves(plain):
        if path in plan.paths:
            assert np.mean(mask != dict(ltp.named_leaves(scaled))[path]) < 2e-3, path


@pytest.mark.parametrize("prune_steps", [1, 5])
def test_no_layer_is_empty_on_the_way(prune_steps):
    # Weights of one size: as the threshold passes them, all of them are gone.
    params = three_layers()
    params["head"]["kernel"] = jnp.sign(params["head"]["kernel"]) + 1e-3 * params["head"]["kernel"]
    plan = ltp.plan(params)
    pruner = target.target_density(plan, 1 / 64, prune_steps=prune_steps, select_steps=20)
    state, still = pruner.init(params), dict.fromkeys(plan.paths, jnp.float32(0))
    update = jax.jit(pruner.update)
    for step in range(22):
        params, state = update(still, params, params, state, step)
        left = {path: int(tensor.kept) for path, tensor in ltp.summarize(params, state.prune).tensors.items()}
        assert all(left[path] >= 1 for path in plan.paths), (step, left)


def test_the_fixed_network_is_what_every_verb_says():
    plan = ltp.plan(three_layers())
    pruner = pruner_to(16)
    states = run(pruner)
    masks = jax.tree.map(lambda w: w != 0, pruner.harden(states[SELECT].params, states[SELECT].pruning))
    for state in states[SELECT + 1 :]:
        for path, w in ltp.named_leaves(state.params):
            if path in plan.paths:
                np.testing.assert_array_equal(w != 0, dict(ltp.named_leaves(masks))[path])
        # Nothing is searched for again: what is zero is all that is pruned.
        assert set(map(float, state.pruning.thresholds.values())) == {float(np.float32(target.FIXED_THRESHOLD))}
    state = states[-1]
    hard, soft = (verb(state.params, state.pruning.prune) for verb in (ltp.hard_prune, ltp.soft_prune))
    jax.tree.map(np.testing.assert_array_equal, hard, state.params)
    jax.tree.map(np.testing.assert_array_equal, soft, state.params)
    assert float(ltp.l0(state.params, state.pruning.prune)) == kept(state)
    # It goes on training all the same.
    assert not np.array_equal(state.params["one"]["kernel"], states[SELECT + 1].params["one"]["kernel"])


def test_a_budget_of_costs_is_met():
    plan = ltp.plan(three_layers())
    costs = {"one/kernel": 9.0, "two/kernel": 1.0, "head/kernel": 1.0}
    pruner = target.target_density(plan, 0.1, prune_steps=PRUNE, select_steps=SELECT, costs=costs)
    state = run(pruner)[-1]
    summary = ltp.summarize(state.params, state.pruning.prune)
    total = sum(costs[path] * tensor.weights for path, tensor in summary.tensors.items())
    left = sum(costs[path] * int(tensor.kept) for path, tensor in summary.tensors.items())
    assert 0.1 * total - 9 < left <= 0.1 * total


def test_offsets_descend_the_loss():
    # With a loss that wants the head whole, it keeps more than a common threshold would leave it.
    plan = ltp.plan(three_layers())

    def densities(rate):
        pruner = target.target_density(
            plan, 1 / 8, prune_steps=PRUNE, select_steps=SELECT, optimizer=optax.sgd(rate, momentum=0.9)
        )

        def soften(params, thresholds, state, step):
            pruned, penalty = pruner.soften(params, thresholds, state, step)
            # The loss reaches the thresholds alone: the weights themselves do not grow.
            unmoved, _ = pruner.soften(jax.lax.stop_gradient(params), thresholds, state, step)
            return pruned, penalty - jnp.sum(jnp.abs(unmoved["head"]["kernel"]))

        state = run(pruner._replace(soften=soften))[-1]
        return {p: float(t.density) for p, t in ltp.summarize(state.params, state.pruning.prune).tensors.items()}

    assert densities(1e-2)["head/kernel"] > densities(0.0)["head/kernel"]


@pytest.mark.parametrize("n", range(10))
def test_one_weight_for_each_layer_is_accepted(n):
    """Whatever the sum of their shares is rounded to."""
    params = {f"layer{i}": {"kernel": jnp.ones((100, 100 + i + n))} for i in range(5)}
    plan = ltp.plan(params)
    target.target_density(plan, 5 / plan.prunable, prune_steps=1, select_steps=1)


@pytest.mark.parametrize(
    ("density", "prune_steps", "select_steps", "message"),
    [
        (0.0, 1, 2, "density is 0.0; accepted is more than 0"),
        (1.0, 1, 2, "less than 1"),
        (0.5, 3, 2, "prune_steps is 3, select_steps 2"),
        (0.5, 0, 2, "prune_steps is 0"),
        (0.001, 1, 2, "fewer than one weight to each of the 3 layers"),
    ],
)
def test_refusals(density, prune_steps, select_steps, message):
    plan = ltp.plan(three_layers())
    with pytest.raises(ValueError, match=message):
        target.target_density(plan, density, prune_steps=prune_steps, select_steps=select_steps)


@pytest.mark.parametrize(
    "costs",
    [
        {},
        {"one/kernel": 1.0, "two/kernel": 0.0, "head/kernel": 1.0},
        {"one/kernel": math.inf},
        {"one/kernel": None},
        {"one/kernel": np.ones(3)},
    ],
)
def test_costs_that_are_none_are_refused(costs):
    plan, refused = ltp.plan(three_layers()), r"kernel has a cost of .*; accepted is a positive number"
    with pytest.raises(ValueError, match=refused):
        target.target_density(plan, 0.5, prune_steps=1, select_steps=2, costs=costs)
    with pytest.raises(ValueError, match=refused):
        learned_thresholds(plan, lambda step: 1.0, optax.sgd(0.1), learn_steps=1, costs=costs)


def test_a_plan_that_prunes_nothing_is_refused():
    with pytest.warns(UserWarning, match="the plan prunes no tensor"):
        plan = ltp.plan({"bias": jnp.zeros(3)})
    with pytest.raises(ValueError, match="the plan prunes no tensor"):
        target.target_density(plan, 0.5, prune_steps=1, select_steps=2)


def test_half_precision_is_refused():
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), three_layers())
    with pytest.raises(ValueError, match="of bfloat16; to meet a target weights have to be float32"):
        pruner_to(2).init(params)


def test_a_penalty_that_is_no_function_is_refused():
    with pytest.raises(TypeError, match=r"the penalty is 20.0; accepted is a function of the step"):
        learned_thresholds(ltp.plan(three_layers()), 20.0, optax.sgd(0.1), learn_steps=1)


@pytest.mark.parametrize("learn_steps", [0, -3])
def test_a_penalty_without_a_step_to_learn_in_is_refused(learn_steps):
    with pytest.raises(ValueError, match=f"learn_steps is {learn_steps}; accepted is 1 or more"):
        learned_thresholds(ltp.plan(three_layers()), lambda step: 1.0, optax.sgd(0.1), learn_steps=learn_steps)


def test_a_layer_without_spread_stays_whole_and_the_others_are_pruned():
    """Under ``jax.jit`` no one can see it."""
    params = {"a": {"kernel": jnp.array([[2.0]])}, "b": {"kernel": jax.random.normal(jax.random.key(0), (8, 8))}}
    pruner = learned_thresholds(ltp.plan(params), lambda step: 10.0, optax.sgd(0.1), learn_steps=99, t0=0.1)
    state = jax.jit(pruner.init)(params)
    for step in range(20):
        grads = jax.grad(lambda *args: pruner.soften(*args)[1], argnums=1)(params, state.thresholds, state, step)
        params, state = pruner.update(grads, params, params, state, step)
    assert state.thresholds["a/kernel"] == 0
    assert 0 < np.count_nonzero(pruner.harden(params, state)["b"]["kernel"]) < 64


def test_offsets_move_by_adam_at_a_rate_of_3e_4_if_nothing_is_said():
    # At the first step thresholds are zero, and so is the gradient. Then Adam takes a gradient of any size for a mean
    # of 0.1 / 0.19 and a mean square of 0.001 / 0.001999 of it.
    _, before, after = run(pruner_to(2))[:3]
    moves = jnp.abs(after.pruning.offsets - before.pruning.offsets)
    np.testing.assert_allclose(moves, 3e-4 * (0.1 / 0.19) / (0.001 / 0.001999) ** 0.5, rtol=0.01)


def test_a_leak_of_more_than_the_whole_gradient_is_refused():
    with pytest.raises(ValueError, match=r"the leak is 1.5; accepted is 0 to 1"):
        pruner_to(2, leak=1.5)


def test_one_trace_serves_the_whole_run():
    pruner, traces = pruner_to(16), []
    optimizer = optax.sgd(0.1)
    step = make_train_step(apply, optimizer, pruner, cross_entropy())

    @jax.jit
    def traced(state, batch):
        traces.append(1)
        return step(state, batch)

    initial = jax.jit(lambda params: create_state(params, {}, optimizer, pruner, jax.random.key(0)))
    state = initial(three_layers())
    for i in range(SELECT + 2):
        state = traced(state, batch(i))
    assert len(traces) == 1


def test_soft_and_hard_network_are_the_same_from_the_first_fixed_step():
    states = run(pruner_to(8))
    assert [bool(state.pruning.fixed) for state in states[SELECT - 1 : SELECT + 1]] == [False, True]
    state = states[SELECT]
    soft, _ = pruner_to(8).soften(state.params, state.pruning.thresholds, state.pruning, state.step)
    jax.tree.map(np.testing.assert_array_equal, soft, pruner_to(8).harden(state.params, state.pruning))


def test_one_bad_gradient_moves_no_offset():
    params, pruner = three_layers(), pruner_to(8)
    state, update = pruner.init(params), jax.jit(pruner.update)
    bad = dict.fromkeys(THREE_LAYERS, jnp.float32(0.1)) | {"two/kernel": jnp.float32(np.nan)}
    ends = []
    for grads in (bad, dict.fromkeys(THREE_LAYERS, jnp.float32(0))):
        now = update(dict.fromkeys(THREE_LAYERS, jnp.float32(0.1)), params, params, state, 0)[1]
        ends.append(update(grads, params, params, now, 1)[1].thresholds)
    jax.tree.map(np.testing.assert_array_equal, *ends)


def test_a_plan_of_many_steps_begins_to_prune():
    # After its first step it leaves all weights but a millionth; a scale of zero would stay at zero.
    params, still = three_layers(), dict.fromkeys(THREE_LAYERS, jnp.float32(0))
    pruner = target.target_density(ltp.plan(params), 0.9, prune_steps=10**6, select_steps=10**6)
    state = pruner.init(params)
    assert jnp.isfinite(state.log_scale)
    for step in (0, 1):
        _, state = pruner.update(still, params, params, state, jnp.int32(step))
    assert all(tau > 0 for tau in state.thresholds.values())


def test_an_optimizer_that_divides_by_a_gradient_of_zero_moves_no_offset():
    plan = ltp.plan(three_layers())
    prodigy = optax.contrib.prodigy(1.0)
    pruner = target.target_density(plan, 1 / 16, prune_steps=PRUNE, select_steps=SELECT, optimizer=prodigy)
    states = run(pruner)
    assert all(jnp.all(jnp.isfinite(state.pruning.offsets)) for state in states)
    assert kept(states[-1]) == plan.prunable // 16


def test_weights_may_be_small():
    """What a normalisation follows may have any scale: 1e-15 of the usual one here."""
    small = jax.tree.map(lambda w: w * 1e-15, three_layers())
    pruner = pruner_to(8, leak=0.0)
    state, update = pruner.init(small), jax.jit(pruner.update)
    still = dict.fromkeys(state.thresholds, jnp.float32(0))
    for step in range(SELECT + 2):
        small, state = update(still, small, small, state, step)
    assert state.fixed
    hard = pruner.harden(small, state)
    assert sum(np.count_nonzero(w) for path, w in ltp.named_leaves(hard) if path in THREE_LAYERS) == 1696 // 8


@pytest.mark.parametrize("axis", [0, -1])
def test_a_target_on_an_explicit_mesh(axis):
    """Sharding is part of the type there, with a single device as well."""
    params, pruner = three_layers(), pruner_to(8)
    mesh = jax.make_mesh((1,), ("devices",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        split = {
            layer: {
                name: jax.device_put(w, P(*np.roll(["devices", None], axis)[: w.ndim])) for name, w in tensors.items()
            }
            for layer, tensors in params.items()
        }
        state = pruner.init(split)
        soft = ltp.l0(split, state.prune)
        _, moved = jax.jit(pruner.update)(dict.fromkeys(THREE_LAYERS, jnp.float32(0.1)), split, split, state, 0)
    expected = pruner.init(params)
    np.testing.assert_allclose(soft, ltp.l0(params, expected.prune), rtol=1e-6)
    np.testing.assert_allclose(state.offsets, expected.offsets, rtol=1e-6)
    _, other = jax.jit(pruner.update)(dict.fromkeys(THREE_LAYERS, jnp.float32(0.1)), params, params, expected, 0)
    np.testing.assert_allclose(list(moved.thresholds.values()), list(other.thresholds.values()), rtol=1e-5)
