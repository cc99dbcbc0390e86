"""A run of every method of the comparison, and that its settings are what it is run with."""

import dataclasses
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ltp_jax as ltp
from experiments import compare, compare_cells
from experiments.compare_settings import Trial, make_pruner
from experiments.config import TrainConfig
from experiments.data.digits import digits
from experiments.harness import Harness, what_is_left

TRAIN = TrainConfig(epochs=2, batch_size=128, learning_rate=0.05, weight_decay=5e-4)
TRIALS = {
    "dense": Trial(learning_rate=0.04, weight_decay=1e-3),
    "one_shot": Trial(learning_rate=0.04),
    "gmp_uniform": Trial(learning_rate=0.04, prune=0.8),
    "gmp_global": Trial(learning_rate=0.04, prune=0.8, weight_decay=1e-3),
    "str": Trial(learning_rate=0.04, initial=-3.0, weight_decay=2e-3),
    "ltp_leak": Trial(learning_rate=0.04, prune=0.6, select=0.8, leak=0.1, weight_decay=1e-3),
    "ltp": Trial(learning_rate=0.04, prune=0.6, select=0.8),
}


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    return Harness(digits(), "lenet_300_100", tmp_path_factory.mktemp("fill"), TRAIN)


@pytest.mark.parametrize("method", TRIALS)
def test_a_run_of_every_method(tmp_path, harness, monkeypatch, method):
    trained, compiled, trial = [], harness.compiled, TRIALS[method]
    network = harness.dense_network(1)
    monkeypatch.setattr(harness, "compiled", lambda pruner, train: trained.append(train) or compiled(pruner, train))
    judged = []

    def judging(top1):
        def judge(params, batch_stats):
            judged.append(what_is_left(harness.plan, params)[0])
            return top1(params, batch_stats)

        return judge

    for name in ("top1", "train_top1"):
        monkeypatch.setattr(harness, name, judging(getattr(harness, name)))
    compare.fill(harness, TRAIN, [(tmp_path / "cell.json", 1)], method, 8.0, trial)

    cell = compare_cells.read_cell(tmp_path / "cell.json")
    about = {"network": "lenet_300_100", "dataset": "digits", "method": method, "seed": 1, "epochs_trained": 2}
    assert about | {"compression": None if method == "dense" else 8.0} | cell == cell
    assert Trial(**cell["trial"]) == trial
    decay = trial.weight_decay or TRAIN.weight_decay
    assert trained == [dataclasses.replace(TRAIN, learning_rate=0.04, weight_decay=decay)]

    sizes = {tensor.path: tensor.size for tensor in harness.plan.tensors if tensor.prune}
    kept = sum(cell["densities"][path] * size for path, size in sizes.items())
    assert cell["achieved"] == pytest.approx(sum(sizes.values()) / kept)
    assert cell["epochs"][-1] == {"compression": cell["achieved"], "top1": cell["top1"]}
    assert cell["dense_top1"] == harness.top1(network["params"], network["batch_stats"])
    assert cell["train_top1"] > 25
    assert cell["top1"] > 25  # of ten classes

    first, last = (epoch["compression"] for epoch in cell["epochs"])
    assert judged[:4] == [first, last, last, 1]  # on either kind of images, what is left and not what was trained
    densities = list(cell["densities"].values())
    if method == "dense":
        assert (first, last) == (1, 1)
    elif method == "str":
        assert 1 < first < last
    else:
        assert last == pytest.approx(8, rel=1e-3)
        assert first == pytest.approx(8, rel=1e-3) if method == "one_shot" else 1 < first < 8
        assert (np.ptp(densities) < 1e-3) == (method == "gmp_uniform")


def test_each_seed_has_a_network_of_its_own(tmp_path, monkeypatch):
    harness, begun = Harness(digits(), "lenet_300_100", tmp_path, TRAIN), {}

    def compiled(pruner, train):
        return lambda network, seed: [begun.setdefault(seed, SimpleNamespace(**network))]

    monkeypatch.setattr(harness, "compiled", compiled)
    for seed in (1, 2):
        harness.dense_network(seed)
        expected = harness.module.init(jax.random.key(seed), jnp.zeros((1, 8, 8, 1)), train=False)
        jax.tree.map(np.testing.assert_array_equal, begun[seed].params, expected["params"])


PARAMS = {
    "a": {"kernel": jnp.array([[1.0, -2.0], [3.0, -4.0]])},
    "b": {"kernel": jnp.array([[-5.0, 6.0], [-7.0, 8.0]])},
}


def states(method, params=PARAMS, **settings):
    """The pruner for 20 steps to a fourth, and its states before each, while nothing is trained."""
    plan, trial = ltp.plan(params), Trial(learning_rate=0.1, **settings)
    pruner = make_pruner(method, plan, 4, dataclasses.replace(TRAIN, learning_rate=0.1), 20, trial)
    still = dict.fromkeys(plan.paths, jnp.float32(0))

    def steps():
        state, update = pruner.init(params), jax.jit(pruner.update)
        for step in itertools.count():
            yield state
            _, state = update(still, params, params, state, step)

    return pruner, list(itertools.islice(steps(), 21))


def left(pruner, state, params=PARAMS):
    return tuple(int(jnp.count_nonzero(w)) for _, w in ltp.named_leaves(pruner.harden(params, state)))


def test_one_shot_pruning_is_global_and_at_once():
    pruner, (first, *_) = states("one_shot")
    assert left(pruner, first) == (0, 2)


@pytest.mark.parametrize(("share", "reached"), [(0.5, 10), (1.0, 20)])
def test_gradual_pruning_ends_after_its_share_of_the_run(share, reached):
    for method, half, end in (("gmp_global", (0, 3), (0, 2)), ("gmp_uniform", (1, 1), (1, 1))):
        pruner, found = states(method, prune=share)
        # Halfway 1/4 + 3/4 · 1/8 of 8 and of 4: round(2.75), round(1.375).
        assert left(pruner, found[0]) == (4, 4)
        assert left(pruner, found[reached // 2]) == half
        assert left(pruner, found[reached]) == left(pruner, found[-1]) == end


def test_the_decay_of_str_is_that_of_its_setting_and_acts_on_s():
    _, found = states("str", initial=-4.0, weight_decay=0.2)
    assert all(float(s) == -4 for s in found[0].thresholds.values())
    # Nesterov's momentum of 0.9 makes 1.9 of the first gradient, which is 0.2 · −4; the rate is 0.1.
    for s in found[1].thresholds.values():
        assert float(s) == pytest.approx(-4 + 0.1 * 1.9 * 0.2 * 4)
    # The cosine of the network ends with the run: the last step is 3e-4 of the first one's size.
    assert abs(float(found[20].thresholds["a/kernel"] - found[19].thresholds["a/kernel"])) < 0.01
    assert float(found[20].thresholds["a/kernel"]) > -1


@pytest.mark.parametrize(("method", "leak"), [("ltp_leak", 0.3), ("ltp", 0.0)])
def test_ltp_has_its_leak_until_its_masks_are_fixed(method, leak):
    pruner, found = states(method, prune=0.5, select=0.7, leak=leak)
    assert left(pruner, found[0]) == (4, 4)
    assert [bool(state.fixed) for state in found] == [False] * 14 + [True] * 7
    assert sum(left(pruner, found[14])) == 2

    def smallest(state):
        grads = jax.grad(lambda p: sum(map(jnp.sum, jax.tree.leaves(pruner.soften(p, state.thresholds, state, 0)[0]))))
        return min(float(jnp.min(w)) for w in jax.tree.leaves(grads(PARAMS)))

    assert smallest(found[13]) == pytest.approx(leak, abs=1e-3)
    assert smallest(found[14]) == 0


def test_the_descent_of_ltp_takes_its_share_of_the_run():
    # The plan is (1/4)^(1 − (1 − t/n)³): of n = 4 steps a fourth after 5, and of 16 steps 0.39.
    params = {"kernel": jnp.array(np.random.default_rng(0).normal(size=(50, 40)), jnp.float32)}
    for share, density in ((0.2, 0.25), (0.8, 0.392)):
        pruner, found = states("ltp", params, prune=share, select=0.8)
        assert left(pruner, found[5], params)[0] / 2000 == pytest.approx(density, rel=0.05)
