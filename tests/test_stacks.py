"""Layers that are stacked in one tensor, beside the same layers in tensors of their own."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import ltp_jax as ltp
from ltp_jax import method
from ltp_jax.adapters import linen_apply, nnx_apply
from ltp_jax.density import measure
from ltp_jax.penalty import learned_thresholds
from ltp_jax.target import target_density
from ltp_jax.trail import Entry
from ltp_jax.training import create_state, cross_entropy, make_train_step

DEPTH, WIDTH, STEPS = 3, 12, 40


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.relu(nn.LayerNorm()(nn.Dense(WIDTH, name="dense")(x))), None


class Stacked(nn.Module):
    axis: int = 0

    @nn.compact
    def __call__(self, x, train):
        blocks = nn.scan(Block, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=DEPTH)
        return nn.Dense(4, name="head")(blocks(name="blocks")(x, None)[0])


class Unrolled(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        for i in range(DEPTH):
            x, _ = Block(name=f"block{i}")(x, None)
        return nn.Dense(4, name="head")(x)


def stack_of(layers, axis=0):
    return jax.tree.map(lambda *parts: jnp.stack(parts, axis), *layers)


def layers_of(stack, axis=0):
    return [jax.tree.map(lambda w, i=i: jnp.take(w, i, axis), stack) for i in range(DEPTH)]


def networks(axis=0):
    """Parameters of both networks, which compute the same; normalisation hides the small scale of the last block."""
    params = Unrolled().init(jax.random.key(0), jnp.zeros((1, WIDTH)), train=True)["params"]
    params["block2"]["dense"]["kernel"] *= 0.01
    blocks = [params[f"block{i}"] for i in range(DEPTH)]
    return params, {"blocks": stack_of(blocks, axis), "head": params["head"]}


def rules(axis=0):
    return [ltp.Rule(r"blocks/.*kernel", stack_axes=(axis,))]


def batches():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(STEPS, 32, WIDTH)).astype(np.float32)
    return {"image": images, "label": np.argmax(images[..., :4] + images[..., 4:8], -1).astype(np.int32)}


def train(module, params, pruner):
    optimizer = optax.sgd(0.05, momentum=0.9)
    step = make_train_step(linen_apply(module), optimizer, pruner, cross_entropy())
    state = create_state(params, {}, optimizer, pruner, jax.random.key(0))
    return jax.jit(lambda state: jax.lax.scan(lambda s, b: (step(s, b), None), state, batches())[0])(state)


def to_target(plan):
    return target_density(plan, 1 / 6, prune_steps=STEPS // 2, select_steps=STEPS * 3 // 4, leak=0.3)


def to_penalty(plan):
    return learned_thresholds(
        plan, optax.linear_schedule(0.0, 60.0, STEPS), optax.adam(0.06), learn_steps=STEPS * 3 // 4, t0=0.05
    )


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("method_to", [to_target, to_penalty])
def test_a_stack_is_pruned_as_its_layers_would_be(method_to, axis):
    params, stacked = networks(axis)
    plan, stacked_plan = ltp.plan(params), ltp.plan(stacked, rules(axis))
    alone = train(Unrolled(), params, method_to(plan))
    together = train(Stacked(axis), stacked, method_to(stacked_plan))

    kept = ltp.summarize(alone.params, alone.pruning.prune)
    kept_of_stack = ltp.summarize(together.params, together.pruning.prune)
    assert 1.5 < kept.compression < 100
    assert int(kept_of_stack.kept) == int(kept.kept)
    np.testing.assert_array_equal(
        kept_of_stack.tensors["blocks/dense/kernel"].kept.ravel(),
        [kept.tensors[f"block{i}/dense/kernel"].kept for i in range(DEPTH)],
    )
    hard, hard_stack = (
        to(s.params, s.pruning.prune) for to, s in ((ltp.hard_prune, alone), (ltp.hard_prune, together))
    )
    chex.assert_trees_all_close(
        [hard[f"block{i}"] for i in range(DEPTH)], layers_of(hard_stack["blocks"], axis), rtol=1e-3, atol=1e-4
    )
    chex.assert_trees_all_close(
        together.pruning.thresholds["blocks/dense/kernel"].ravel(),
        jnp.stack([alone.pruning.thresholds[f"block{i}/dense/kernel"] for i in range(DEPTH)]),
        rtol=1e-3,
    )


def test_without_the_rule_the_layer_of_small_weights_is_lost():
    """What the rule is for: normalisation makes the last block as useful as the others."""
    _, stacked = networks()
    for given, lost in ((), True), (rules(), False):
        pruner = to_target(ltp.plan(stacked, given))
        params, state, update = stacked, pruner.init(stacked), jax.jit(pruner.update)
        for step in range(STEPS):
            params, state = update(jax.tree.map(jnp.zeros_like, state.thresholds), params, params, state, step)
        kept = np.count_nonzero(pruner.harden(params, state)["blocks"]["dense"]["kernel"], (1, 2))
        assert (kept[2] == 0) == lost
        assert np.all(kept[:2] > 0)


def test_a_stack_by_hand():
    w = jnp.array([[1.0, 10.0], [2.0, 20.0], [3.0, 40.0]])
    plan = ltp.plan({"kernel": w}, [ltp.Rule("kernel", stack_axes=(-1,))])
    assert plan.tensors[0].threshold_shape == (1, 2)
    assert plan.tensors[0].layers == 2
    state = ltp.init({"kernel": w}, plan, t0=0.5)
    np.testing.assert_allclose(state.temperatures["kernel"], [[0.5 * 2 / 3, 0.5 * 1400 / 9]], rtol=1e-6)
    state = state.replace(thresholds={"kernel": jnp.array([[1.5, 500.0]])})
    np.testing.assert_array_equal(ltp.hard_prune({"kernel": w}, state)["kernel"], [[0, 0], [2, 0], [3, 40]])
    np.testing.assert_array_equal(ltp.mask({"kernel": w}, state)["kernel"], [[0, 0], [1, 0], [1, 1]])
    squares = np.asarray(w, np.float64) ** 2
    soft = 1 / (1 + np.exp(-(squares - [[1.5, 500.0]]) / np.asarray(state.temperatures["kernel"], np.float64)))
    np.testing.assert_allclose(ltp.l0({"kernel": w}, state), soft.sum(), rtol=1e-6)
    summary = ltp.summarize({"kernel": w}, state)
    np.testing.assert_array_equal(summary.tensors["kernel"].kept, [[2, 1]])
    np.testing.assert_allclose(summary.tensors["kernel"].density, [[2 / 3, 1 / 3]])
    assert (summary.weights, int(summary.kept), float(summary.compression)) == (6, 3, 2.0)
    rows = [line.split() for line in str(summary).splitlines()]
    entry = Entry.of(summary, epoch=1, step=2, top1=90.0, top5=99.0, loss=0.1)
    assert (entry.compression, entry.density, entry.gap) == (2.0, 0.5, None)
    assert entry.densities == {"kernel[0]": 2 / 3, "kernel[1]": 1 / 3}
    assert entry.thresholds == {"kernel[0]": 1.5, "kernel[1]": 500.0}
    assert ["kernel[0]", "3", "2", "66.67%", "1.500e+00"] in rows
    assert ["kernel[1]", "3", "1", "33.33%", "5.000e+02"] in rows


def test_a_stack_along_two_axes_has_a_threshold_for_each_pair():
    w = jax.random.normal(jax.random.key(0), (2, 5, 3, 7))
    plan = ltp.plan({"experts": {"kernel": w}}, [ltp.Rule(".*kernel", stack_axes=(0, 2))])
    assert "a stack along 0, 2" in str(plan)
    state = ltp.init({"experts": {"kernel": w}}, plan)
    expected = [[np.var(np.abs(w[i, :, j])) * 1e-3 for j in range(3)] for i in range(2)]
    np.testing.assert_allclose(state.temperatures["experts/kernel"][:, 0, :, 0], expected, rtol=1e-5)
    assert "experts/kernel[1, 2]" in str(ltp.summarize({"experts": {"kernel": w}}, state))


@pytest.mark.parametrize("axes", [(3,), (-4,), (0, 1, 2)])
def test_axes_that_make_no_stack_are_refused(axes):
    with pytest.raises(ValueError, match=r"kernel of shape \(2, 3, 4\) cannot be a stack along"):
        ltp.plan({"kernel": jnp.ones((2, 3, 4))}, [ltp.Rule("kernel", stack_axes=axes)])


def test_a_layer_without_spread_is_named():
    w = jnp.stack([jnp.arange(6.0).reshape(2, 3), jnp.ones((2, 3))])
    with pytest.raises(ValueError, match=r"kernel\[1\] has a temperature of 0"):
        ltp.init({"kernel": w}, ltp.plan({"kernel": w}, [ltp.Rule("kernel", stack_axes=(0,))]))


def test_every_layer_of_a_stack_needs_a_weight():
    _, stacked = networks()
    with pytest.raises(ValueError, match="each of the 4 layers"):
        target_density(ltp.plan(stacked, rules()), 3.5 / 480, prune_steps=1, select_steps=2)


def test_gradients_of_a_stack_are_those_of_its_layers():
    w = jax.random.normal(jax.random.key(0), (DEPTH, 5, 7))
    tau, temperature = jnp.array([0.2, 0.5, 1.0]), jnp.array([0.1, 0.2, 0.3])
    prune = functools.partial(method.soft_threshold, exact_gradient=True, l0_to_weights=True, leak=0.3)

    def loss(v, count):
        return jnp.sum(v**3) + 0.3 * jnp.sum(count * jnp.array([1.0, 2.0, 3.0]).reshape(count.shape))

    def of_stack(w, tau):
        return loss(*prune(w, tau[:, None, None], temperature[:, None, None]))

    def of_layers(w, tau):
        return loss(*jax.vmap(prune)(w, tau, temperature))

    chex.assert_trees_all_close(jax.grad(of_stack, (0, 1))(w, tau), jax.grad(of_layers, (0, 1))(w, tau), rtol=1e-5)


@pytest.mark.parametrize("split", [P("devices"), P(None, "devices"), P(None, None, "devices")])
def test_a_stack_on_an_explicit_mesh(split):
    _, stacked = networks()
    plan = ltp.plan(stacked, rules())
    pruner = to_target(plan)

    def figures(params):
        state = pruner.init(params)
        soft, grads = jax.value_and_grad(lambda taus: ltp.l0(params, state.prune.replace(thresholds=taus)))(
            state.thresholds
        )
        params, moved = jax.jit(pruner.update)(grads, params, params, state, 0)
        return soft, grads, state.offsets, moved.thresholds, ltp.summarize(params, moved.prune).kept

    mesh = jax.make_mesh((1,), ("devices",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        params = jax.tree.map(lambda w: jax.device_put(w, split if w.ndim == 3 else P()), stacked)
        on_mesh = figures(params)
    chex.assert_trees_all_close(jax.device_get(on_mesh), jax.device_get(figures(stacked)), rtol=1e-5)


def test_a_stack_of_nnx_layers_meets_its_target():
    class Net(nnx.Module):
        def __init__(self, rngs):
            make = nnx.vmap(lambda rngs: nnx.Linear(WIDTH, WIDTH, rngs=rngs), in_axes=0)
            self.blocks = make(rngs.split(DEPTH))
            self.head = nnx.Linear(WIDTH, 4, rngs=rngs)

        def __call__(self, x):
            x = nnx.scan(lambda x, block: x + nnx.relu(block(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
                x, self.blocks
            )
            return self.head(x)

    graphdef, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)
    pruner = to_target(ltp.plan(params, rules()))
    optimizer = optax.sgd(0.05)
    step = make_train_step(nnx_apply(graphdef), optimizer, pruner, cross_entropy())
    state = create_state(params, rest, optimizer, pruner, jax.random.key(0))
    state = jax.jit(lambda state: jax.lax.scan(lambda s, b: (step(s, b), None), state, batches())[0])(state)
    summary = ltp.summarize(state.params, state.pruning.prune)
    assert summary.tensors["blocks/kernel"].kept.shape == (DEPTH, 1, 1)
    assert np.all(summary.tensors["blocks/kernel"].kept > 0)
    assert int(summary.kept) == (DEPTH * WIDTH * WIDTH + WIDTH * 4) // 6


def test_a_state_of_other_layers_is_refused():
    _, stacked = networks()
    state = ltp.init(stacked, ltp.plan(stacked, rules()))
    alone = {"blocks": layers_of(stacked["blocks"])[0], "head": stacked["head"]}
    for verb in (ltp.soft_prune, ltp.hard_prune, ltp.mask, ltp.l0, ltp.summarize):
        with pytest.raises(ValueError, match=r"blocks/dense/kernel is of shape \(12, 12\).*\(3, 1, 1\)"):
            verb(alone, state)


def test_one_threshold_may_serve_all_layers():
    """A user's own, with the temperatures of the layers: as if each had it, and its gradient is the sum of theirs."""
    _, stacked = networks()
    state, path = ltp.init(stacked, ltp.plan(stacked, rules()), t0=0.1), "blocks/dense/kernel"
    one, each = jnp.float32(0.01), jnp.full((3, 1, 1), 0.01)

    def counted(tau):
        return ltp.l0(stacked, state.replace(thresholds=state.thresholds | {path: tau}))

    (value, gradient), (expected, gradients) = (jax.value_and_grad(counted)(tau) for tau in (one, each))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, gradients.sum(), rtol=1e-5)


def test_costs_of_layers_have_the_shape_of_their_counts():
    _, stacked = networks()
    state = ltp.init(stacked, ltp.plan(stacked, rules()))
    costs = {"blocks/dense/kernel": jnp.array([1.0, 2.0, 3.0]), "head/kernel": 0.0}
    with pytest.raises(
        ValueError, match=r"blocks/dense/kernel is of shape \(3,\); accepted is a number, or \(3, 1, 1\)"
    ):
        ltp.l0(stacked, state, costs=costs)
    costs["blocks/dense/kernel"] = costs["blocks/dense/kernel"].reshape(3, 1, 1)
    each = ltp.soft_prune_and_count(stacked, state)[1]["blocks/dense/kernel"].ravel()
    np.testing.assert_allclose(ltp.l0(stacked, state, costs=costs), each @ jnp.array([1.0, 2.0, 3.0]), rtol=1e-6)


def test_a_stack_of_more_weights_than_int32_counts():
    kept = jnp.full((2, 1, 1), 2 * 10**9, jnp.int32)
    tensor = ltp.transform.TensorSummary(weights=2 * 10**9, kept=kept, threshold=jnp.zeros((2, 1, 1)))
    summary = ltp.transform.Summary({"kernel": tensor}, unpruned=0)
    assert "4,000,000,000  100.00%" in str(summary)
    assert Entry.of(summary, epoch=1, step=2, top1=90.0, top5=99.0, loss=0.1).density == 1.0

    def density():
        w = jnp.broadcast_to(jax.lax.optimization_barrier(jnp.float32(1)), (3, 2**15, 2**15))  # never in memory
        return measure({"kernel": w}, {"kernel": jnp.zeros((3, 1, 1))}, {"kernel": 1 / w.size}).density

    np.testing.assert_allclose(jax.jit(density)(), 1.0, rtol=1e-5)
