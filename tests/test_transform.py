"""The selection and the verbs over pytrees: Linen, NNX, and any other."""

import re
import warnings

import chex
import jax
import jax.numpy as jnp
import networks
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import ltp_jax as ltp
from ltp_jax.penalty import learned_thresholds
from ltp_jax.trail import Entry

KERNELS = {"conv/kernel": 3 * 3 * 3 * 8, "depthwise/kernel": 3 * 3 * 8, "head/kernel": 40}


@pytest.fixture
def params():
    return networks.linen_variables()["params"]


@pytest.fixture
def state(params):
    """Thresholds at half the mean square of each kernel: some weights go, some stay, some are in the band."""
    state = ltp.init(params, ltp.plan(params), t0=0.1)
    leaves = dict(ltp.named_leaves(params))
    return state.replace(thresholds={path: jnp.mean(leaves[path] ** 2) / 2 for path in state.thresholds})


def test_default_plan_selects_kernels_and_nothing_else(params):
    plan = ltp.plan(params)
    assert {t.path: t.size for t in plan.tensors if t.prune} == KERNELS
    assert {t.path for t in plan.tensors if not t.prune} == {
        "depthwise/bias",
        "head/bias",
        "norm/bias",
        "norm/scale",
    }
    assert plan.prunable == sum(KERNELS.values())


def test_embeddings_are_left_alone():
    tree = {"embed": {"embedding": jnp.ones((10, 4))}, "dense": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}}
    assert ltp.plan(tree).paths == ("dense/kernel",)


def test_first_matching_rule_wins(params):
    rules = [ltp.Rule("head/kernel"), ltp.Rule("head/.*", prune=False), ltp.Rule(".*conv.*", prune=False)]
    plan = ltp.plan(params, rules=rules)
    assert set(plan.paths) == {"head/kernel", "depthwise/kernel"}
    assert plan.unused_rules == ()
    decided = {t.path: t.rule for t in plan.tensors}
    assert decided["head/kernel"] == rules[0]
    assert decided["head/bias"] == rules[1]


def test_rules_match_whole_paths(params):
    with pytest.warns(UserWarning, match="'head' decides no tensor"):
        plan = ltp.plan(params, rules=[ltp.Rule("head", prune=False)])
    assert plan.unused_rules == (ltp.Rule("head", prune=False),)
    assert "unused rule: keep head" in str(plan)


def test_plan_that_prunes_nothing_warns():
    with pytest.warns(UserWarning, match="prunes no tensor"):
        ltp.plan({"w": jnp.ones((3, 3))})


def test_plan_needs_shapes_alone(params):
    abstract = jax.eval_shape(lambda: networks.linen_variables()["params"])
    assert ltp.plan(abstract) == ltp.plan(params)


def test_plan_prints_path_shape_parameters_and_rule(params):
    line = next(line for line in str(ltp.plan(params)).splitlines() if line.startswith("conv/kernel"))
    assert line.split() == ["conv/kernel", "3×3×3×8", "216", "prune", "(.*/)?kernel"]


def test_an_nnx_module_in_place_of_its_state_is_refused():
    with pytest.raises(TypeError, match=r"an NNX module, where shared layers would be met twice; give its nnx.state"):
        ltp.plan(networks.NnxNet(nnx.Rngs(0)))


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_init_refuses_weights_whose_squares_are_no_numbers(scale):
    tree = {"kernel": scale * jax.random.normal(jax.random.key(0), (3, 3))}
    with pytest.raises(ValueError, match="so small or large that float32 has no number for their squares"):
        ltp.init(tree, ltp.plan(tree))


def test_parameters_that_are_no_arrays_are_named():
    with pytest.raises(TypeError, match=r"scale is 1.0; accepted are arrays"):
        ltp.plan({"dense": {"kernel": jnp.ones((2, 3))}, "scale": 1.0})


def test_two_tensors_with_one_path_are_refused():
    with pytest.raises(ValueError, match="several tensors have the same path: a/b/kernel"):
        ltp.plan({"a/b": {"kernel": jnp.ones((2, 2))}, "a": {"b": {"kernel": jnp.ones((2, 2))}}})


@pytest.mark.parametrize("pattern", ["head(", 3, None])
def test_broken_pattern_is_refused(pattern):
    with pytest.raises(ValueError, match=rf"{re.escape(repr(pattern))} is not a regular expression"):
        ltp.Rule(pattern)


@pytest.mark.parametrize("axes", [0, [0], (0.0,), (True,), (None,)])
def test_stack_axes_that_are_no_tuple_of_axes_are_refused(axes):
    with pytest.raises(TypeError, match=r"stack_axes is .*; accepted is a tuple"):
        ltp.Rule("kernel", stack_axes=axes)


@pytest.mark.parametrize("given", [{"prune": "False"}, {"prune": 0}, {"min_ndim": "2"}, {"min_ndim": None}])
def test_a_rule_of_other_types_is_refused(given):
    with pytest.raises(TypeError, match=r"prune is .* and min_ndim .*; accepted are a bool and an int"):
        ltp.Rule("kernel", **given)


def test_what_a_rule_says_is_named():
    with pytest.raises(TypeError, match="positional argument"):
        ltp.Rule("kernel", (0,))  # pyright: ignore


def test_a_tensor_without_weights_is_named():
    tree = {"a": {"kernel": jnp.zeros((0, 4))}}
    with pytest.raises(ValueError, match=r"a/kernel of shape \(0, 4\) has no weights; a rule with prune=False"):
        ltp.init(tree, ltp.plan(tree))


def test_a_threshold_without_a_temperature_is_named(params):
    state = ltp.init(params, ltp.plan(params))
    path = next(iter(state.thresholds))
    lacking = state.replace(temperatures={name: t for name, t in state.temperatures.items() if name != path})
    with pytest.raises(ValueError, match=f"the state has a threshold for {path} and no temperature"):
        ltp.soft_prune(params, lacking)


@pytest.mark.parametrize("rules", [ltp.Rule("head/.*"), "head/.*", ["head/.*"], None, iter([ltp.Rule("head/.*")])])
def test_what_is_no_list_of_rules_is_refused(params, rules):
    with pytest.raises(TypeError, match=r"the rules are .*; accepted is a list of ltp_jax\.Rule"):
        ltp.plan(params, rules)


def test_init_gives_eq_15_per_tensor_and_zero_thresholds(params):
    state = ltp.init(params, ltp.plan(params), t0=2e-3)
    assert set(state.thresholds) == set(state.temperatures) == set(KERNELS)
    for path, leaf in ltp.named_leaves(params):
        if path in KERNELS:
            expected = 2e-3 * np.var(np.abs(np.asarray(leaf, np.float64)))
            np.testing.assert_allclose(state.temperatures[path], expected, rtol=1e-5)
            assert state.thresholds[path].shape == ()
            assert state.thresholds[path].dtype == jnp.float32
            assert state.thresholds[path] == 0


@pytest.mark.parametrize("value", [0.0, 0.3, np.nan])  # of 0.3 rounding makes a variance of 9e-14
def test_init_refuses_a_tensor_without_spread(value):
    tree = {"kernel": jnp.full((10, 10), value)}
    with pytest.raises(ValueError, match="kernel has a temperature of"):
        ltp.init(tree, ltp.plan(tree))


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.int8])
def test_init_refuses_what_is_not_of_floating_point(dtype):
    tree = {"kernel": jnp.arange(9).reshape(3, 3).astype(dtype)}
    with pytest.raises(ValueError, match=f"kernel is of {jnp.dtype(dtype)}; what is pruned has to be of floating"):
        ltp.init(tree, ltp.plan(tree))


def test_init_refuses_a_plan_of_other_shapes(params):
    plan = ltp.plan({"conv": {"kernel": jnp.ones((2, 2))}})
    with pytest.raises(ValueError, match=r"conv/kernel of shape \(2, 2\), the parameters have \(3, 3, 3, 8\)"):
        ltp.init(params, plan)


@pytest.mark.parametrize("verb", [ltp.soft_prune, ltp.hard_prune, ltp.mask, ltp.l0, ltp.summarize])
def test_verbs_refuse_parameters_that_lack_a_tensor(verb, params, state):
    with pytest.raises(ValueError, match="lack head/kernel"):
        verb({"conv": params["conv"], "depthwise": params["depthwise"]}, state)


def test_what_is_not_selected_is_never_touched(params, state):
    for pruned in (ltp.soft_prune(params, state), ltp.hard_prune(params, state)):
        chex.assert_trees_all_equal_structs(pruned, params)
        for (path, before), (_, after) in zip(ltp.named_leaves(params), ltp.named_leaves(pruned), strict=True):
            assert before.dtype == after.dtype
            if path in KERNELS:
                assert not np.array_equal(before, after)
            else:
                assert after is before


def test_hard_prune_and_summary_agree_with_numpy(params, state):
    hard = dict(ltp.named_leaves(ltp.hard_prune(params, state)))
    report = ltp.summarize(params, state)
    kept = 0
    for path, w in ltp.named_leaves(params):
        if path in KERNELS:
            survivors = np.asarray(w) ** 2 > np.asarray(state.thresholds[path])
            np.testing.assert_array_equal(hard[path], np.where(survivors, w, 0))
            assert report.tensors[path].kept == survivors.sum()
            assert report.tensors[path].weights == w.size
            np.testing.assert_allclose(report.tensors[path].density, survivors.mean(), rtol=1e-6)
            kept += survivors.sum()
    total = sum(KERNELS.values())
    assert report.kept == kept
    np.testing.assert_allclose(report.compression, total / kept, rtol=1e-6)
    unpruned = 8 + 8 + 8 + 5  # biases and normalisation
    assert report.parameters == total + unpruned
    np.testing.assert_allclose(report.network_compression, (total + unpruned) / (kept + unpruned), rtol=1e-6)
    lines = str(report).splitlines()
    assert [line.split()[0] for line in lines[2:5]] == list(KERNELS)
    assert lines[-1] == f"compression {total / kept:.2f}×"


def test_the_mask_of_trained_weights_goes_over_other_weights(params, state):
    kept = ltp.mask(params, state)
    chex.assert_trees_all_equal_shapes(kept, params)
    hard, other = ltp.hard_prune(params, state), jax.tree.map(lambda w: 1 - w, params)
    masked = dict(ltp.named_leaves(jax.tree.map(lambda w, m: jnp.where(m, w, 0), other, kept)))
    for (path, w), (_, before) in zip(ltp.named_leaves(hard), ltp.named_leaves(other), strict=True):
        # Biases are zero in the one network, and none of them is masked.
        np.testing.assert_array_equal(masked[path], np.where((w == 0) & (path in KERNELS), 0, before))


def test_l0_is_the_sum_over_layers_and_weighs_costs(params, state):
    leaves = dict(ltp.named_leaves(params))
    counts = {
        path: np.sum(
            1 / (1 + np.exp(-(np.float64(leaves[path]) ** 2 - state.thresholds[path]) / state.temperatures[path]))
        )
        for path in KERNELS
    }
    np.testing.assert_allclose(ltp.l0(params, state), sum(counts.values()), rtol=1e-5)
    costs = {"conv/kernel": 36.0, "depthwise/kernel": 10.0, "head/kernel": 1.0}
    np.testing.assert_allclose(
        ltp.l0(params, state, costs=costs), sum(costs[path] * counts[path] for path in KERNELS), rtol=1e-5
    )


def test_a_cost_that_is_missing_is_named(params, state):
    with pytest.raises(ValueError, match="the costs lack depthwise/kernel, head/kernel"):
        ltp.l0(params, state, costs={"conv/kernel": 1.0, "hed/kernel": 2.0})


def test_l0_gradient_reaches_weights_only_if_asked(params, state):
    zero = jax.grad(ltp.l0)(params, state)
    chex.assert_trees_all_equal(zero, jax.tree.map(jnp.zeros_like, params))
    asked = jax.grad(lambda p: ltp.l0(p, state, l0_to_weights=True))(params)
    assert np.abs(asked["conv"]["kernel"]).max() > 0
    np.testing.assert_array_equal(asked["norm"]["scale"], 0)


@pytest.mark.parametrize("option", ["exact_gradient", "l0_to_weights"])
def test_gradients_are_asked_for_by_name(params, state, option):
    """What a method of training passes on to the verbs, and these to the arithmetic."""
    g, path, t = jax.random.normal(jax.random.key(0), (3, 3, 3, 8)), "conv/kernel", 0.1
    costs = {"conv/kernel": 3.0, "depthwise/kernel": 1.0, "head/kernel": 2.0}
    total = sum(costs[path] * size for path, size in KERNELS.items())
    pruner = learned_thresholds(
        ltp.plan(params), lambda step: 5.0, optax.sgd(0.1), learn_steps=1, t0=t, costs=costs, **{option: True}
    )
    learned = pruner.init(params)

    def by_name(w):
        tree = params | {"conv": {"kernel": w}}
        pruned, penalty = pruner.soften(tree, state.thresholds, learned, jnp.int32(0))
        return jnp.sum(g * pruned["conv"]["kernel"]) + penalty

    def by_hand(w):
        s = jax.nn.sigmoid((w**2 - state.thresholds[path]) / state.temperatures[path])
        held = jax.lax.stop_gradient(s)
        mask, counted = (s, held) if option == "exact_gradient" else (held, s)
        return jnp.sum(g * w * mask) + 5.0 * costs[path] * jnp.sum(counted) / total

    w = params["conv"]["kernel"]
    np.testing.assert_allclose(jax.grad(by_name)(w), jax.grad(by_hand)(w), rtol=1e-4, atol=1e-6)
    verb = jax.grad(lambda p: jnp.sum(g * ltp.soft_prune(p, state, exact_gradient=True)["conv"]["kernel"]))(params)
    if option == "exact_gradient":
        np.testing.assert_allclose(verb["conv"]["kernel"], jax.grad(by_hand)(w), rtol=1e-4, atol=1e-6)


def test_thresholds_may_be_numbers(params, state):
    numbers = ltp.PruneState(
        {path: float(tau) for path, tau in state.thresholds.items()},
        {path: float(t) for path, t in state.temperatures.items()},
    )
    for verb in (ltp.soft_prune, ltp.hard_prune, ltp.mask, ltp.l0):
        chex.assert_trees_all_close(verb(params, numbers), verb(params, state), rtol=1e-6)
    assert ltp.summarize(params, numbers).kept == ltp.summarize(params, state).kept


def test_a_rule_passes_over_tensors_of_fewer_dimensions():
    tree = {"norm": {"kernel": jnp.ones(4)}, "dense": {"kernel": jnp.ones((4, 4))}}
    assert ltp.plan(tree, [ltp.Rule(".*kernel", min_ndim=2)]).paths == ("dense/kernel",)
    assert ltp.plan(tree, [ltp.Rule(".*kernel")]).paths == ("dense/kernel", "norm/kernel")


def test_linen_and_nnx_give_the_same_paths_and_numbers(params, state):
    model = networks.NnxNet(nnx.Rngs(0))
    nnx_state = nnx.state(model, nnx.Param)
    nnx.replace_by_pure_dict(nnx_state, params)
    plan = ltp.plan(nnx_state)
    assert sorted(plan.paths) == sorted(ltp.plan(params).paths)
    of_nnx = ltp.init(nnx_state, plan, t0=0.1)
    chex.assert_trees_all_close(of_nnx.temperatures, state.temperatures, rtol=1e-6)
    of_nnx = of_nnx.replace(thresholds=state.thresholds)
    for verb in (ltp.soft_prune, ltp.hard_prune):
        pruned = verb(nnx_state, of_nnx)
        assert isinstance(pruned, nnx.State)
        chex.assert_trees_all_equal(nnx.to_pure_dict(pruned), verb(params, state))
    np.testing.assert_allclose(ltp.l0(nnx_state, of_nnx), ltp.l0(params, state), rtol=1e-6)
    assert ltp.summarize(nnx_state, of_nnx).kept == ltp.summarize(params, state).kept
    nnx.update(model, ltp.hard_prune(nnx_state, of_nnx))  # goes back into the model
    assert (model.conv.kernel[...] == 0).sum() > 0


def test_any_pytree_will_do():
    tree = [jnp.arange(1.0, 5.0).reshape(2, 2), (jnp.ones(3),)]
    state = ltp.init(tree, ltp.plan(tree, rules=[ltp.Rule("0")]))
    state = state.replace(thresholds={"0": jnp.float32(6.0)})
    hard = ltp.hard_prune(tree, state)
    np.testing.assert_array_equal(hard[0], [[0, 0], [3, 4]])
    assert hard[1][0] is tree[1][0]


def test_verbs_work_under_jit_grad_vmap_and_eval_shape(params, state):
    plan = ltp.plan(params)
    chex.assert_trees_all_close(jax.jit(ltp.init)(params, plan, 0.1).temperatures, state.temperatures, rtol=1e-6)
    chex.assert_trees_all_close(jax.jit(ltp.soft_prune)(params, state), ltp.soft_prune(params, state), rtol=1e-5)
    chex.assert_trees_all_equal(jax.jit(ltp.hard_prune)(params, state), ltp.hard_prune(params, state))
    assert jax.jit(ltp.summarize)(params, state).kept == ltp.summarize(params, state).kept
    abstract = jax.eval_shape(lambda p, s: (ltp.soft_prune(p, s), ltp.summarize(p, s), ltp.l0(p, s)), params, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract[0], params)
    chex.assert_shape(abstract[2], ())
    grads = jax.grad(lambda s: ltp.l0(params, s))(state)
    assert all(g < 0 for g in grads.thresholds.values())  # a higher threshold leaves fewer weights
    assert all(g == 0 for g in grads.temperatures.values())  # eq. 15: a constant
    scales = jnp.array([0.5, 1.0, 2.0])
    counts = jax.vmap(
        lambda scale: ltp.l0(params, state.replace(thresholds={p: scale * t for p, t in state.thresholds.items()}))
    )(scales)
    np.testing.assert_allclose(counts[1], ltp.l0(params, state), rtol=1e-6)
    assert counts[0] > counts[1] > counts[2]


def test_hard_masks_are_the_limit_of_soft_ones(params, state):
    cold = state.replace(temperatures={p: t * 1e-6 for p, t in state.temperatures.items()})
    chex.assert_trees_all_close(ltp.soft_prune(params, cold), ltp.hard_prune(params, cold), atol=1e-6)


def test_nothing_is_said_for_an_ordinary_plan(params):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ltp.plan(params, rules=[ltp.Rule("head/.*", prune=False)])


def test_threshold_below_zero_counts_as_zero_and_can_come_back(params, state):
    zero, below = (state.replace(thresholds=dict.fromkeys(state.thresholds, jnp.float32(tau))) for tau in (0.0, -1.0))
    chex.assert_trees_all_equal(ltp.soft_prune(params, below), ltp.soft_prune(params, zero))
    chex.assert_trees_all_equal(ltp.hard_prune(params, below), ltp.hard_prune(params, zero))
    assert {float(t.threshold) for t in ltp.summarize(params, below).tensors.values()} == {0.0}

    def slopes(state):
        return jax.grad(lambda thresholds: ltp.l0(params, state.replace(thresholds=thresholds)))(state.thresholds)

    chex.assert_trees_all_equal(slopes(below), slopes(zero))
    assert all(slope < 0 for slope in slopes(below).values())


def test_thresholds_without_bound(params, state):
    for tau, kept in ((np.inf, 0), (-np.inf, sum(KERNELS.values()))):
        beyond = state.replace(thresholds=dict.fromkeys(state.thresholds, jnp.float32(tau)))
        assert ltp.l0(params, beyond) == pytest.approx(kept, rel=0.5)
        assert ltp.summarize(params, beyond).kept == kept
        assert all(np.isfinite(w).all() for w in jax.tree.leaves(ltp.soft_prune(params, beyond)))


def test_what_is_no_number_is_not_taken_for_pruned(params, state):
    params = params | {"head": {**params["head"], "kernel": params["head"]["kernel"].at[0].set(np.nan)}}
    assert np.isnan(ltp.hard_prune(params, state)["head"]["kernel"][0]).all()
    nowhere = state.replace(thresholds=dict.fromkeys(state.thresholds, jnp.float32(np.nan)))
    assert ltp.summarize(params, nowhere).kept == sum(KERNELS.values())


def test_summary_of_a_plan_that_prunes_nothing(params):
    with pytest.warns(UserWarning, match="prunes no tensor"):
        plan = ltp.plan(params, rules=[ltp.Rule(".*", prune=False)])
    summary = ltp.summarize(params, ltp.init(params, plan))
    assert (summary.compression, summary.network_compression) == (1, 1)
    assert str(summary).endswith("compression 1.00×")


def test_summary_of_a_network_of_which_nothing_is_left(params, state):
    nothing = ltp.summarize(params, state.replace(thresholds=dict.fromkeys(KERNELS, jnp.float32(1e9))))
    assert np.isinf(nothing.compression)
    assert nothing.network_compression == nothing.parameters / nothing.unpruned
    assert "0.00%" in str(nothing)
    entry = Entry.of(nothing, epoch=1, step=2, top1=90.0, top5=99.0, loss=0.1)  # JSON has no infinity
    assert (entry.compression, entry.density) == (nothing.weights, 0)


def test_summary_of_more_weights_than_int32_counts():
    half = ltp.transform.TensorSummary(weights=3 * 2**29, kept=jnp.int32(2**30), threshold=jnp.float32(0))
    summary = ltp.transform.Summary({"a": half, "b": half}, unpruned=2**30)
    assert float(summary.kept) == 2**31
    np.testing.assert_allclose(summary.density, 2 / 3, rtol=1e-6)
    np.testing.assert_allclose(summary.compression, 3 / 2, rtol=1e-6)
    np.testing.assert_allclose(summary.network_compression, 4 / 3, rtol=1e-6)
    assert "2,147,483,648" in str(summary)
    assert jax.eval_shape(lambda s: s.compression, summary).shape == ()


def test_gradients_of_split_weights(params, state):
    """Within jax.shard_map, whose types tell what differs between devices: it is so with a single one as well."""
    mesh = jax.make_mesh((1,), ("devices",), axis_types=(AxisType.Auto,))
    split = jax.tree.map(lambda w: P(*(None,) * (w.ndim - 1), "devices"), params)

    def loss(params, thresholds, leak):
        now = state.replace(thresholds=thresholds)
        pruned = ltp.soft_prune(params, now, leak=leak)
        return sum(jnp.sum(w**2) for w in jax.tree.leaves(pruned)) + ltp.l0(params, now)

    parts = jax.shard_map(
        lambda *args: jax.lax.psum(loss(*args), "devices"), mesh=mesh, in_specs=(split, P(), P()), out_specs=P()
    )
    args = params, state.thresholds, jnp.float32(0.3)
    in_parts, whole = (jax.jit(jax.grad(function, (0, 1)))(*args) for function in (parts, loss))
    chex.assert_trees_all_close(in_parts, whole, rtol=1e-5)
