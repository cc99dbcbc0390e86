"""Counts of weights and thresholds that leave so many, by hand and beside a sort."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import THREE_LAYERS, three_layers

import ltp_jax as ltp
from ltp_jax import density

TOY = {"a": {"kernel": jnp.array([1.0, -2.0, 3.0, -4.0])}, "b": {"kernel": jnp.array([-5.0, 6.0, -7.0, 8.0])}}
ZERO = {"a/kernel": jnp.float32(0), "b/kernel": jnp.float32(0)}
SHARES = dict.fromkeys(THREE_LAYERS, 1 / 1696)


def test_exact_thresholds_keep_the_largest_and_one_of_each_layer():
    # Four of eight: by size all would come from b, but a keeps its 4, so 5 has to go.
    tau = density.exact_thresholds(TOY, ZERO, jnp.zeros(2), 0.5, dict.fromkeys(ZERO, 1 / 8))
    state = ltp.PruneState(tau, {})
    hard = ltp.hard_prune(TOY, state)
    np.testing.assert_array_equal(hard["a"]["kernel"], [0, 0, 0, -4])
    np.testing.assert_array_equal(hard["b"]["kernel"], [0, 6, -7, 8])
    assert tau["b/kernel"] == (25 + 36) / 2


def test_exact_thresholds_compare_weights_in_units_of_their_layers_scale():
    # With a scale of a half, the weights of a count as 2, 4, 6, 8 beside 5, 6, 7, 8: six of eight leave out 2 and 4.
    offsets = jnp.log(jnp.array([0.5, 1]))
    tau = density.exact_thresholds(TOY, ZERO, offsets, 6 / 8, dict.fromkeys(ZERO, 1 / 8))
    hard = ltp.hard_prune(TOY, ltp.PruneState(tau, {}))
    np.testing.assert_array_equal(hard["a"]["kernel"], [0, 0, 3, -4])
    np.testing.assert_array_equal(hard["b"]["kernel"], [-5, 6, -7, 8])


def test_exact_thresholds_count_all_of_the_largest_weights_of_one_size():
    # The weights of a count as 0.1 to 0.4, and the largest of a layer stay: both of 4. Five of eight leave room for 6,
    # 7 and 8, not for 5.
    params = TOY | {"a": {"kernel": jnp.array([1.0, 2, 4, -4])}}
    offsets = jnp.log(jnp.array([10.0, 1]))
    tau = density.exact_thresholds(params, ZERO, offsets, 5 / 8, dict.fromkeys(ZERO, 1 / 8))
    hard = ltp.hard_prune(params, ltp.PruneState(tau, {}))
    np.testing.assert_array_equal(hard["a"]["kernel"], [0, 0, 4, -4])
    np.testing.assert_array_equal(hard["b"]["kernel"], [0, 6, -7, 8])


def test_largest_weights_of_one_size_that_exceed_the_target_leave_the_others_theirs():
    # Three of eight cannot be: all four of a are of one size. They count as one, and b keeps the two that are left.
    params = TOY | {"a": {"kernel": jnp.full(4, 3.0)}}
    tau = density.exact_thresholds(params, ZERO, jnp.zeros(2), 3 / 8, dict.fromkeys(ZERO, 1 / 8))
    hard = ltp.hard_prune(params, ltp.PruneState(tau, {}))
    np.testing.assert_array_equal(hard["a"]["kernel"], [3, 3, 3, 3])
    np.testing.assert_array_equal(hard["b"]["kernel"], [0, 0, -7, 8])


def test_exact_thresholds_meet_a_budget_of_costs():
    # A weight of a costs 3, one of b costs 1, all 16. Half of it, 8, buys 5, 6, 7, 8 and 4: 7; with 3 it were 10.
    costs = {"a/kernel": 3 / 16, "b/kernel": 1 / 16}
    hard = ltp.hard_prune(TOY, ltp.PruneState(density.exact_thresholds(TOY, ZERO, jnp.zeros(2), 0.5, costs), {}))
    np.testing.assert_array_equal(hard["a"]["kernel"], [0, 0, 0, -4])
    np.testing.assert_array_equal(hard["b"]["kernel"], [-5, 6, -7, 8])


def test_lamp_by_hand():
    # Scores of a, 1/30, 4/29, 9/25, 16/16; of b, 25/174, 36/149, 49/113, 64/64. Five of eight leave out the first two
    # of a and the first of b.
    offsets = density.lamp_offsets(TOY, ZERO, 5 / 8, dict.fromkeys(ZERO, 1 / 8))
    np.testing.assert_allclose(offsets, np.log([3.0, 6.0]), rtol=1e-6)
    # Weights of a that cost three times as much: 4 of 16 buy the largest of each.
    offsets = density.lamp_offsets(TOY, ZERO, 4 / 16, {"a/kernel": 3 / 16, "b/kernel": 1 / 16})
    np.testing.assert_allclose(offsets, np.log([4.0, 8.0]), rtol=1e-6)


@pytest.mark.parametrize("left", [0.5, 1 / 16, 1 / 128])
def test_lamp_is_where_a_sort_would_have_it(left):
    params = jax.tree.map(lambda w: 3 * w, three_layers()) | {"one": three_layers(1)["one"]}
    squares, scores = {}, {}
    for path, w in ltp.named_leaves(params):
        if path in THREE_LAYERS:
            squares[path] = np.sort(np.square(np.ravel(w).astype(np.float64)))
            scores[path] = squares[path] / np.cumsum(squares[path][::-1])[::-1]
    least = np.sort(np.concatenate(list(scores.values())))[-int(left * 1696)]
    offsets = density.lamp_offsets(params, dict.fromkeys(THREE_LAYERS, jnp.zeros(())), left, SHARES)
    for path, offset in zip(sorted(THREE_LAYERS), offsets, strict=True):
        # The weight that the threshold is the size of, and the one below it, are on both sides of the least score.
        place = np.argmin(np.abs(np.log(squares[path]) / 2 - offset))
        assert np.log(squares[path][place]) / 2 == pytest.approx(float(offset), abs=1e-5)
        assert scores[path][place] > least * 0.999
        assert scores[path][place - 1] < least * 1.01


def test_lamp_keeps_the_largest_of_layers_of_one_size():
    # The scores of four weights of one size are 1/4, and no other is that small.
    params = TOY | {"a": {"kernel": jnp.full(4, 3.0)}}
    offsets = density.lamp_offsets(params, ZERO, 1 / 8, dict.fromkeys(ZERO, 1 / 8))
    np.testing.assert_allclose(offsets, np.log([3.0, 8.0]), rtol=1e-6)


def test_exact_thresholds_under_jit_leave_as_many():
    params = three_layers()
    zero = {path: jnp.zeros(()) for path in THREE_LAYERS}
    eager = density.exact_thresholds(params, zero, jnp.zeros(3), 0.1, SHARES)
    jitted = jax.jit(lambda p: density.exact_thresholds(p, zero, jnp.zeros(3), 0.1, SHARES))(params)
    counts = [int(ltp.summarize(params, ltp.PruneState(tau, {})).kept) for tau in (eager, jitted)]
    assert counts == [1696 // 10] * 2


@pytest.mark.parametrize(("kept", "size"), [(3, 13), (15, 53)])
def test_exact_thresholds_are_exact_whatever_rounding_says_of_the_shares(kept, size):
    params, share = {"kernel": jnp.arange(1.0, size + 1)}, np.float32(1 / size)
    assert share * np.float32(kept) > np.float32(kept / size)  # one weight too many, as float32 has it
    tau = density.exact_thresholds(params, {"kernel": jnp.zeros(())}, jnp.zeros(1), kept / size, {"kernel": 1 / size})
    assert int(ltp.summarize(params, ltp.PruneState(tau, {})).kept) == kept


def test_measure():
    params = {"kernel": jnp.array([0.5, 0.95, -1.0, 1.05, -2.0, 0.0])}
    measured = density.measure(params, {"kernel": jnp.float32(0.98)}, {"kernel": 0.1})
    assert float(measured.density) == pytest.approx(0.3)  # √0.98 = 0.990
    assert float(measured.present) == pytest.approx(0.5)
    # Between 0.896 and 1.094 lie three of them, in 0.2 of log √τ.
    assert measured.slopes.tolist() == pytest.approx([3 * 0.1 / 0.2])
    assert measured.largest.tolist() == [4]


@pytest.mark.parametrize("layers", [(), (6, 1, 1)])
def test_accelerators_count_as_a_cpu_does(layers, monkeypatch):
    params = {"kernel": jax.random.normal(jax.random.key(0), (6, 50, 41))}
    arguments = params, {"kernel": jnp.full(layers, 0.5)}, {"kernel": 1 / params["kernel"].size}
    on_a_cpu = density.measure(*arguments)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args))
    elsewhere = density.measure(*arguments)
    chex.assert_trees_all_equal(elsewhere, on_a_cpu)
    squares = np.square(params["kernel"]).reshape(6 if layers else 1, -1)
    np.testing.assert_allclose(elsewhere.kept, np.sum(squares > 0.5, axis=1) / squares.size, rtol=1e-6)
    np.testing.assert_array_equal(elsewhere.largest, squares.max(axis=1))
