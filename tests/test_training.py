"""The thresholds' own optimizer, the training step, and the evaluation step."""

import itertools

import chex
import jax
import jax.numpy as jnp
import networks
import numpy as np
import optax
import pytest
from flax import nnx

import ltp_jax as ltp
from ltp_jax import pruner as pruners
from ltp_jax.adapters import linen_apply, nnx_apply
from ltp_jax.penalty import LearnedThresholdState, learned_thresholds, step_thresholds
from ltp_jax.target import target_density
from ltp_jax.training import create_state, cross_entropy, make_eval_step, make_train_step

# Four weights with |w| = 1, 1, 3, 3: Var(|w|) = 1, so T = t0 and r = √τ.
W = {"kernel": jnp.array([[1.0, -1.0], [3.0, -3.0]])}


def threshold_state(optimizer, tau, params=W, t0=1e-3):
    prune = ltp.init(params, ltp.plan(params), t0)
    return LearnedThresholdState(prune.replace(thresholds={"kernel": jnp.float32(tau)}), optimizer.init(jnp.zeros(1)))


def test_step_of_a_threshold_by_hand():
    optimizer = optax.sgd(0.1)
    # r = 0.5, ∂L/∂r = ∂L/∂τ · 2 r = 2, r' = 0.5 − 0.2, τ' = 0.09.
    state = step_thresholds({"kernel": jnp.float32(2.0)}, threshold_state(optimizer, 0.25), optimizer, 1e-3)
    np.testing.assert_allclose(state.thresholds["kernel"], 0.09, rtol=1e-5)


def test_first_step_of_a_threshold_by_hand():
    # From r = 0 the derivative is that at a hundredth, ∂L/∂r = −2 · 2 · 0.01, r' = 0.004, τ' = 1.6e-5.
    optimizer = optax.sgd(0.1)
    state = step_thresholds({"kernel": jnp.float32(-2.0)}, threshold_state(optimizer, 0.0), optimizer, 1e-3)
    np.testing.assert_allclose(state.thresholds["kernel"], 1.6e-5, rtol=1e-4)


def test_the_optimizer_of_thresholds_is_told_where_they_are():
    # As prodigy and others need it, in units of the spread: r = 0.5, and decay adds half of it to ∂L/∂r = 2.
    optimizer = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.1))
    state = step_thresholds({"kernel": jnp.float32(2.0)}, threshold_state(optimizer, 0.25), optimizer, 1e-3)
    np.testing.assert_allclose(state.thresholds["kernel"], (0.5 - 0.1 * 2.25) ** 2, rtol=1e-5)


def test_threshold_stays_in_its_valid_range():
    optimizer = optax.sgd(10.0)
    state = step_thresholds({"kernel": jnp.float32(2.0)}, threshold_state(optimizer, 0.25), optimizer, 1e-3)
    assert state.thresholds["kernel"] == 0
    # From zero it can rise again: the gradient does not vanish there.
    state = step_thresholds({"kernel": jnp.float32(-2.0)}, state, optimizer, 1e-3)
    assert state.thresholds["kernel"] > 0


def test_step_of_a_threshold_is_free_of_scale():
    optimizer = optax.sgd(0.1)
    scaled = {"kernel": 8 * W["kernel"]}
    # The loss does not depend on the scale of the layer: ∂L/∂τ falls as 1/scale².
    state = step_thresholds({"kernel": jnp.float32(2.0)}, threshold_state(optimizer, 0.25), optimizer, 1e-3)
    other = step_thresholds(
        {"kernel": jnp.float32(2.0 / 64)}, threshold_state(optimizer, 0.25 * 64, scaled), optimizer, 1e-3
    )
    np.testing.assert_allclose(other.thresholds["kernel"], 64 * state.thresholds["kernel"], rtol=1e-5)


def make(params, *, penalty=0.0, learn_steps=100, weights=None, batch_stats=None, thresholds=None, **options):
    pruner = learned_thresholds(
        ltp.plan(params),
        optax.constant_schedule(penalty),
        thresholds or optax.sgd(0.1),
        learn_steps=learn_steps,
        **options,
    )
    optimizer = weights or optax.sgd(0.0)
    apply = linen_apply(networks.LinenNet())
    step = make_train_step(apply, optimizer, pruner, cross_entropy())
    state = create_state(params, batch_stats or {}, optimizer, pruner, jax.random.key(0))
    return step, state, pruner


@pytest.fixture
def variables():
    return networks.linen_variables()


def test_rescaling_a_layer_before_batch_norm_does_not_change_what_is_pruned(variables):
    def masks(scale):
        params = jax.tree.map(lambda w: w, variables["params"])
        params["conv"]["kernel"] = params["conv"]["kernel"] * scale
        step, state, pruner = make(params, penalty=3.0, batch_stats=variables["batch_stats"], t0=0.05)
        step = jax.jit(step)
        for i in range(30):
            state = step(state, networks.batch(seed=i))
        return pruner.harden(state.params, state.pruning), state.pruning.thresholds

    hard, thresholds = masks(1.0)
    hard_scaled, thresholds_scaled = masks(16.0)
    np.testing.assert_allclose(thresholds_scaled["conv/kernel"], 256 * thresholds["conv/kernel"], rtol=1e-3)
    pruned = hard["conv"]["kernel"] == 0
    assert 0.05 < pruned.mean() < 0.95  # something was pruned, and something was not
    np.testing.assert_array_equal(hard_scaled["conv"]["kernel"] == 0, pruned)
    np.testing.assert_array_equal(hard_scaled["head"]["kernel"] == 0, hard["head"]["kernel"] == 0)


def test_weight_decay_never_touches_thresholds(variables):
    params = variables["params"]
    decay = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(1.0))
    step, state, _ = make(params, weights=decay, learn_steps=1, batch_stats=variables["batch_stats"])
    thresholds = {path: jnp.float32(0.01) for path in state.pruning.thresholds}
    pruning = state.pruning.replace(prune=state.pruning.prune.replace(thresholds=thresholds))
    after = jax.jit(step)(state.replace(pruning=pruning, step=jnp.int32(1)), networks.batch())
    assert np.abs(after.params["conv"]["kernel"]).sum() < np.abs(params["conv"]["kernel"]).sum()
    chex.assert_trees_all_equal(after.pruning.thresholds, thresholds)


def test_thresholds_are_frozen_after_the_learning_steps(variables):
    step, state, _ = make(variables["params"], penalty=10.0, learn_steps=2, batch_stats=variables["batch_stats"])
    seen = []
    for i in range(4):
        state = jax.jit(step)(state, networks.batch(seed=i))
        seen.append(jax.device_get(state.pruning))
    assert seen[0].thresholds["conv/kernel"] > 0
    assert seen[1].thresholds["conv/kernel"] != seen[0].thresholds["conv/kernel"]
    chex.assert_trees_all_equal(seen[2], seen[1])
    chex.assert_trees_all_equal(seen[3], seen[1])


def test_loss_and_penalty_are_what_they_say(variables):
    step, state, pruner = make(variables["params"], penalty=10.0, batch_stats=variables["batch_stats"])
    batch = networks.batch()
    totals = jax.device_get(jax.jit(step)(state, batch).totals)
    soft = ltp.soft_prune(state.params, state.pruning.prune)
    logits, _ = networks.LinenNet().apply(
        {"params": soft, "batch_stats": variables["batch_stats"]}, batch["image"], train=True, mutable=["batch_stats"]
    )
    loss = -np.mean(np.log(jax.nn.softmax(logits))[np.arange(16), batch["label"]])
    np.testing.assert_allclose(totals["loss"] / totals["examples"], loss, rtol=1e-5)
    # λ·N = 10 times the soft density.
    density = ltp.l0(state.params, state.pruning.prune) / sum(v for v in (216, 72, 40))
    penalty = pruner.soften(state.params, state.pruning.thresholds, state.pruning, state.step)[1]
    np.testing.assert_allclose(penalty, 10 * density, rtol=1e-5)
    assert totals["examples"] == 16


def test_the_penalty_is_that_of_the_step():
    # Next to nothing is soft at this temperature: the density is 1, and the penalty what its schedule says.
    ramp = optax.linear_schedule(0.0, 8.0, 4)
    pruner = learned_thresholds(ltp.plan(W), ramp, optax.sgd(0.1), learn_steps=9, t0=1e-3)
    state = pruner.init(W)
    penalties = [pruner.soften(W, state.thresholds, state, jnp.int32(step))[1] for step in (0, 1, 3, 7)]
    np.testing.assert_allclose(penalties, [0, 2, 6, 8], rtol=1e-5)


def test_a_method_is_told_how_many_steps_were_taken():
    """Of one whose penalty has the step for its gradient: three steps of rate 1 take 0 + 1 + 2 from the weight."""
    pruner = pruners.dense()._replace(
        soften=lambda params, thresholds, state, step: (params, step * params["kernel"][0, 0])
    )
    optimizer, batch = optax.sgd(1.0), {"image": np.zeros((4, 3)), "label": np.zeros(4, int)}
    step = jax.jit(make_train_step(product, optimizer, pruner, cross_entropy()))
    state = create_state({"kernel": jnp.zeros((3, 5))}, {}, optimizer, pruner, jax.random.key(0))
    for _ in range(3):
        state = step(state, batch)
    np.testing.assert_array_equal(state.params["kernel"], [[-3, 0, 0, 0, 0], [0] * 5, [0] * 5])


def test_totals_of_an_epoch_by_hand():
    """Of a network that stays as it is, and gives its images for logits."""
    optimizer, pruner = optax.sgd(0.0), pruners.dense()
    step = jax.jit(make_train_step(product, optimizer, pruner, cross_entropy()))
    state = create_state({"kernel": jnp.eye(3)}, {}, optimizer, pruner, jax.random.key(0))
    for labels in ([0, 1, 2, 2], [1, 1, 0, 2]):  # of images that are largest in 0, 1, 1, 1: two are right, then one
        images = np.float32([[2, 0, 0], [0, 2, 0], [0, 2, 0], [0, 2, 0]])
        state = step(state, {"image": images, "label": np.array(labels)})
    right, wrong = (np.log(np.exp(2) + 2) - logit for logit in (2, 0))
    totals = {name: float(value) for name, value in state.totals.items()}
    assert totals == pytest.approx({"correct": 3, "examples": 8, "loss": 3 * right + 5 * wrong}, rel=1e-5)


def test_dense_method_trains_the_network_as_it_is(variables):
    pruner = pruners.dense()
    optimizer = optax.sgd(0.1)
    step = make_train_step(linen_apply(networks.LinenNet()), optimizer, pruner, cross_entropy())
    state = create_state(variables["params"], variables["batch_stats"], optimizer, pruner, jax.random.key(0))
    batch = networks.batch()

    def loss(params):
        logits, _ = networks.LinenNet().apply(
            {"params": params, "batch_stats": variables["batch_stats"]},
            batch["image"],
            train=True,
            mutable=["batch_stats"],
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    expected = jax.tree.map(lambda w, g: w - 0.1 * g, variables["params"], jax.grad(loss)(variables["params"]))
    chex.assert_trees_all_close(jax.jit(step)(state, batch).params, expected, rtol=1e-4, atol=1e-6)


def test_one_trace_serves_learning_and_recovery(variables):
    step, state, _ = make(variables["params"], penalty=1.0, learn_steps=2, batch_stats=variables["batch_stats"])
    step = jax.jit(chex.assert_max_traces(step, n=1), donate_argnums=0)
    for i in range(5):
        state = step(state, networks.batch(seed=i))
    assert state.step == 5


def test_the_state_keeps_its_types_with_64_bits_switched_on(variables):
    """A loop of XLA wants the same types before a step and after."""
    with jax.enable_x64(True):
        step, state, _ = make(variables["params"], penalty=1.0, batch_stats=variables["batch_stats"])
        batches = jax.tree.map(lambda row: jnp.stack([row, row]), networks.batch())
        after, _ = jax.lax.scan(lambda s, batch: (step(s, batch), None), state, batches)
        assert after.totals["loss"].dtype == jnp.float32


def test_the_state_has_arrays_of_its_own(variables):
    step, state, pruner = make(variables["params"], batch_stats=variables["batch_stats"])
    key = jax.random.key(0)
    state = create_state(variables["params"], variables["batch_stats"], optax.sgd(0.0), pruner, key)
    jax.jit(step, donate_argnums=0)(state, networks.batch())
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((variables, key)))


def test_an_optimizer_may_begin_with_the_very_weights(variables):
    weights = optax.contrib.prodigy()
    step, state, _ = make(variables["params"], weights=weights, batch_stats=variables["batch_stats"])
    after = jax.jit(step, donate_argnums=0)(state, networks.batch())
    assert after.step == 1


def test_an_optimizer_of_thresholds_may_begin_with_the_very_ones(variables):
    step, state, _ = make(variables["params"], thresholds=optax.contrib.prodigy(), batch_stats=variables["batch_stats"])
    after = jax.jit(step, donate_argnums=0)(state, networks.batch())
    assert after.step == 1


def product(params, batch_stats, images, *, train, key):
    return images @ params["kernel"], batch_stats


def test_a_label_for_each_position():
    """As in segmentation: the same images and labels count alike, as rows of a batch or as positions of an image."""
    params, pruner, optimizer = {"kernel": jnp.eye(3, 5) + 0.1}, pruners.dense(), optax.sgd(0.1)
    step = jax.jit(make_train_step(product, optimizer, pruner, cross_entropy()))
    rng = np.random.default_rng(0)
    batch = {"image": rng.normal(size=(24, 3)), "label": rng.integers(0, 5, 24)}
    pixels = {"image": batch["image"].reshape(2, 3, 4, 3), "label": batch["label"].reshape(2, 3, 4)}
    state = create_state(params, {}, optimizer, pruner, jax.random.key(0))
    rows, positions = step(state, batch), step(state, pixels)
    chex.assert_trees_all_close((rows.params, rows.totals), (positions.params, positions.totals), rtol=1e-5)
    assert positions.totals["examples"] == 24
    evaluate, real = make_eval_step(product), rng.random(24) < 0.5
    counted = evaluate(params, {}, batch | {"mask": real})
    chex.assert_trees_all_close(evaluate(params, {}, pixels | {"mask": real.reshape(2, 3, 4)}), counted, rtol=1e-5)
    assert counted["examples"] == real.sum()


@pytest.mark.parametrize(("name", "shape"), [("label", (24, 1)), ("label", ()), ("mask", (24, 1)), ("mask", (1,))])
def test_labels_that_would_be_broadcast_are_refused(name, shape):
    params, pruner, optimizer = {"kernel": jnp.eye(3, 5) + 0.1}, pruners.dense(), optax.sgd(0.1)
    step = make_train_step(product, optimizer, pruner, cross_entropy())
    batch = {"image": np.zeros((24, 3)), "label": np.zeros(24, int), "mask": np.ones(24, bool)}
    batch[name] = np.ones(shape, batch[name].dtype)
    refused = rf"the batch has {name} of shape .*, the network gives logits of shape \(24, 5\); accepted is .*\(24,\)"
    with pytest.raises(ValueError, match=refused):
        make_eval_step(product)(params, {}, batch)
    if name == "label":
        with pytest.raises(ValueError, match=refused):
            step(create_state(params, {}, optimizer, pruner, jax.random.key(0)), batch)


def test_a_network_that_gives_more_than_logits_is_refused():
    batch = {"image": np.zeros((24, 3)), "label": np.zeros(24, int)}

    def two(*args, **kwargs):
        logits, batch_stats = product(*args, **kwargs)
        return (logits, logits), batch_stats

    with pytest.raises(ValueError, match="the network gives a tuple; accepted are its logits alone"):
        make_eval_step(two)({"kernel": jnp.eye(3, 5)}, {}, batch)


def test_each_step_has_a_dropout_of_its_own():
    """Of a network that gives what it drew, in the bias that it trains: the draws of two steps from one state."""

    def apply(params, batch_stats, images, *, train, key):
        return jnp.zeros((4, 5)) + params["bias"], {"drawn": jax.random.uniform(key, (3,))}

    pruner, optimizer = pruners.dense(), optax.sgd(0.1)
    step = jax.jit(make_train_step(apply, optimizer, pruner, cross_entropy()))
    batch = {"image": np.zeros((4, 3)), "label": np.zeros(4, int)}
    states = [create_state({"bias": jnp.zeros(5)}, {"drawn": jnp.zeros(3)}, optimizer, pruner, jax.random.key(0))]
    for _ in range(3):
        states.append(step(states[-1], batch))
    draws = {tuple(np.asarray(state.batch_stats["drawn"])) for state in states[1:]}
    assert len(draws) == 3
    again = step(states[1], batch)
    np.testing.assert_array_equal(again.batch_stats["drawn"], states[2].batch_stats["drawn"])


class Sowing(nnx.Module):
    """As networks do that show what is within them."""

    def __init__(self, rngs):
        self.dense = nnx.Linear(3, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.dense(x))
        self.sow(nnx.Intermediate, "seen", x)
        return x


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
def test_an_nnx_network_that_sows_is_trained():
    graphdef, params, rest = nnx.split(Sowing(nnx.Rngs(0)), nnx.Param, ...)
    pruner, optimizer, apply = pruners.dense(), optax.sgd(0.1), nnx_apply(graphdef)
    step = jax.jit(chex.assert_max_traces(make_train_step(apply, optimizer, pruner, cross_entropy()), n=1))
    state = create_state(params, rest, optimizer, pruner, jax.random.key(0))
    for _ in range(3):
        state = step(state, {"image": jnp.ones((4, 3)), "label": jnp.zeros(4, jnp.int32)})
    assert state.step == 3
    apply(state.params, state.batch_stats, jnp.ones((4, 3)), train=False, key=None)


class Dropping(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(3, 5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.dense(x))


def test_the_kind_of_key_of_a_run_need_not_be_that_of_an_nnx_network():
    graphdef, params, rest = nnx.split(Dropping(nnx.Rngs(0)), nnx.Param, ...)
    pruner, optimizer = pruners.dense(), optax.sgd(0.1)
    step = make_train_step(nnx_apply(graphdef), optimizer, pruner, cross_entropy())
    state = create_state(params, rest, optimizer, pruner, jax.random.key(0, impl="rbg"))
    batches = {"image": jnp.ones((3, 4, 3)), "label": jnp.zeros((3, 4), jnp.int32)}
    state, losses = jax.lax.scan(lambda state, batch: (step(state, batch), state.totals["loss"]), state, batches)
    assert len({float(after - before) for before, after in itertools.pairwise(losses)}) == 2  # it drops out others


def test_parameters_of_weak_types_take_one_trace():
    params = {"kernel": 0.3 * jnp.arange(6.0).reshape(3, 2), "bias": jnp.full(2, 0.1)}
    assert params["bias"].weak_type

    def apply(params, batch_stats, images, *, train, key):
        return images @ params["kernel"] + params["bias"], batch_stats

    pruner, optimizer = pruners.dense(), optax.sgd(0.1, momentum=0.9)
    step = jax.jit(chex.assert_max_traces(make_train_step(apply, optimizer, pruner, cross_entropy()), n=1))
    state = create_state(params, {}, optimizer, pruner, jax.random.key(0))
    for _ in range(3):
        state = step(state, {"image": jnp.ones((4, 3)), "label": jnp.zeros(4, jnp.int32)})


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
def test_what_an_nnx_network_sowed_before_the_split_is_refused():
    model = Sowing(nnx.Rngs(0))
    model(jnp.ones((4, 3)))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    with pytest.raises(ValueError, match=r"call nnx.pop\(model, nnx.Intermediate\) before nnx.split"):
        nnx_apply(graphdef)(params, rest, jnp.ones((4, 3)), train=True, key=None)


class Counted(nnx.Variable):
    pass


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
@pytest.mark.parametrize("called_before", [False, True])
def test_what_an_nnx_network_adds_to_its_state_is_refused(called_before):
    class Adding(Sowing):
        def __call__(self, x):
            self.sow(Counted, "sown", x)
            return super().__call__(x)

    model = Adding(nnx.Rngs(0))
    if called_before:
        model(jnp.ones((4, 3)))
        nnx.pop(model, nnx.Intermediate)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    added = "sown/value/1" if called_before else "sown/value/0"
    with pytest.raises(ValueError, match=f"^a call of the network adds or drops {added}, of which the split does not"):
        nnx_apply(graphdef)(params, rest, jnp.ones((4, 3)), train=True, key=None)


def test_an_nnx_network_that_is_trained_in_part_keeps_the_rest():
    model = networks.NnxNet(nnx.Rngs(0))
    graphdef, params, rest = nnx.split(model, nnx.All(nnx.Param, nnx.PathContains("head")), ...)
    assert {path.partition("/")[0] for path, _ in ltp.named_leaves(params)} == {"head"}
    pruner = target_density(ltp.plan(params), 0.25, prune_steps=1, select_steps=2)
    apply, optimizer = nnx_apply(graphdef), optax.sgd(0.1)
    step = jax.jit(chex.assert_max_traces(make_train_step(apply, optimizer, pruner, cross_entropy()), n=1))
    state = create_state(params, rest, optimizer, pruner, jax.random.key(0))
    for i in range(3):
        state = step(state, networks.batch(seed=i))
    frozen = {path: leaf for path, leaf in ltp.named_leaves(rest) if path.endswith("kernel")}
    assert frozen
    after = dict(ltp.named_leaves(state.batch_stats))
    for path, leaf in frozen.items():
        np.testing.assert_array_equal(after[path], leaf)
    assert np.count_nonzero(state.params["head"]["kernel"][...]) == np.size(params["head"]["kernel"][...]) // 4


def test_what_cannot_be_trained_is_no_parameter(variables):
    params = variables["params"] | {"number": jnp.zeros(3, jnp.int32)}
    with pytest.raises(ValueError, match=r"^number is of int32, which cannot be trained; .* belongs into batch_stats"):
        create_state(params, {}, optax.sgd(0.1), pruners.dense(), jax.random.key(0))


def test_a_plan_that_prunes_nothing_has_no_thresholds_to_learn(variables):
    with pytest.warns(UserWarning, match="the plan prunes no tensor"):
        plan = ltp.plan(variables["params"], [ltp.Rule(".*", prune=False)])
    with pytest.raises(ValueError, match=r"^the plan prunes no tensor: there is no threshold to learn"):
        learned_thresholds(plan, lambda step: 1.0, optax.adam(0.1), learn_steps=1)


def test_thresholds_of_half_precision_weights_are_not_learned(variables):
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), variables["params"])
    pruner = learned_thresholds(ltp.plan(half), lambda step: 1.0, optax.sgd(0.1), learn_steps=2)
    with pytest.raises(ValueError, match="of bfloat16; to be trained with a threshold weights have to be float32"):
        pruner.init(half)


@pytest.mark.parametrize("to_target", [False, True])
def test_strict_promotion_of_dtypes(variables, to_target):
    """Whoever has JAX refuse a bfloat16 with a float32 can train, count and evaluate."""
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), variables["params"])
    with jax.numpy_dtype_promotion("strict"):
        params, plan = variables["params"], ltp.plan(variables["params"])
        if to_target:
            sgd = optax.sgd(1e-3)  # Adam, the default, promotes
            pruner = target_density(plan, 0.3, prune_steps=2, select_steps=3, leak=0.3, optimizer=sgd)
        else:
            pruner = learned_thresholds(plan, lambda step: jnp.float32(1), optax.sgd(0.1), learn_steps=2)
        apply, optimizer = linen_apply(networks.LinenNet()), optax.sgd(0.1)
        step = jax.jit(make_train_step(apply, optimizer, pruner, cross_entropy()))
        state = create_state(params, variables["batch_stats"], optimizer, pruner, jax.random.key(0))
        for i in range(4):
            state = step(state, networks.batch(seed=i))
        make_eval_step(apply)(pruner.harden(state.params, state.pruning), state.batch_stats, networks.batch())
        assert "compression" in str(ltp.summarize(state.params, state.pruning.prune))
        of_half = ltp.init(half, plan)
        for verb in (ltp.soft_prune, ltp.hard_prune, ltp.l0):
            jax.grad(lambda p, verb=verb: sum(map(jnp.sum, jax.tree.leaves(verb(p, of_half)))))(half)
        summary = ltp.summarize(half, of_half)
        assert (float(summary.density), float(summary.compression)) == (1, 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_bad_gradient_moves_no_threshold(bad):
    # Momentum alone moves it: r = 0.5 − 0.1 · 2, then − 0.1 · 0.9 · 2.
    optimizer = optax.sgd(0.1, momentum=0.9)
    state = step_thresholds({"kernel": jnp.float32(2.0)}, threshold_state(optimizer, 0.25), optimizer, 1e-3)
    state = step_thresholds({"kernel": jnp.float32(bad)}, state, optimizer, 1e-3)
    np.testing.assert_allclose(state.thresholds["kernel"], (0.5 - 0.2 - 0.18) ** 2, rtol=1e-5)


def test_an_optimizer_that_divides_by_a_gradient_of_zero_moves_no_threshold():
    optimizer = optax.stateless(lambda grads, params: -0.1 * grads / jnp.abs(grads))
    state = step_thresholds({"kernel": jnp.float32(0.0)}, threshold_state(optimizer, 0.25), optimizer, 1e-3)
    np.testing.assert_allclose(state.thresholds["kernel"], 0.25, rtol=1e-6)


def test_a_threshold_below_zero_is_one_of_zero():
    optimizer = optax.sgd(0.1)
    below, zero = (
        step_thresholds({"kernel": jnp.float32(-2.0)}, threshold_state(optimizer, tau), optimizer, 1e-3)
        for tau in (-1e-3, 0.0)
    )
    assert below.thresholds["kernel"] == zero.thresholds["kernel"] > 0


def test_jit_and_no_jit_agree(variables):
    step, state, _ = make(
        variables["params"], penalty=1.0, weights=optax.sgd(0.1), batch_stats=variables["batch_stats"], t0=0.05
    )
    plain, compiled = step(state, networks.batch()), jax.jit(step)(state, networks.batch())
    chex.assert_trees_all_close(plain.params, compiled.params, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(plain.pruning.thresholds, compiled.pruning.thresholds, rtol=1e-3)


@pytest.mark.parametrize("kept", [True, False])
def test_an_nnx_optimizer_writes_in_place(kept):
    """So that the parameters before its step have to be kept, or what was pruned comes back by its momentum."""
    model = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    pruner = target_density(ltp.plan(nnx.state(model, nnx.Param)), 1 / 4, prune_steps=2, select_steps=4)

    @nnx.jit
    def step(model, optimizer, state, i):
        graphdef, params = nnx.split(model)
        old = jax.tree.map(lambda w: w, params) if kept else params

        def loss(params, thresholds):
            pruned, penalty = pruner.soften(params, thresholds, state, i)
            return jnp.mean(nnx.merge(graphdef, pruned)(jnp.eye(8)) ** 2) + penalty

        grads, threshold_grads = jax.grad(loss, (0, 1))(params, state.thresholds)
        optimizer.update(model, grads)
        params, state = pruner.update(threshold_grads, old, nnx.state(model, nnx.Param), state, i)
        nnx.update(model, params)
        return state

    state = pruner.init(nnx.state(model, nnx.Param))
    if not kept:
        with pytest.raises(ValueError, match="are the same NNX variables as those after it, which it wrote"):
            step(model, optimizer, state, 0)
        return
    for i in range(9):
        state = step(model, optimizer, state, i)
    assert jnp.count_nonzero(model.kernel[...]) == 16


def test_linen_and_nnx_train_alike(variables):
    model = networks.NnxNet(nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    nnx.replace_by_pure_dict(params, variables["params"])
    nnx.update(model, params)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def train(apply, params, rest):
        pruner = learned_thresholds(
            ltp.plan(params), optax.constant_schedule(1.0), optax.sgd(0.1), learn_steps=10, t0=0.05
        )
        optimizer = optax.sgd(0.1)
        state = create_state(params, rest, optimizer, pruner, jax.random.key(0))
        step = jax.jit(make_train_step(apply, optimizer, pruner, cross_entropy()))
        for i in range(3):
            state = step(state, networks.batch(seed=i))
        logits, _ = apply(state.params, state.batch_stats, networks.batch()["image"], train=False, key=None)
        return state, logits

    linen, linen_logits = train(linen_apply(networks.LinenNet()), variables["params"], variables["batch_stats"])
    of_nnx, nnx_logits = train(nnx_apply(graphdef), params, rest)
    chex.assert_trees_all_close(nnx.to_pure_dict(of_nnx.params), linen.params, rtol=1e-3, atol=1e-5)
    chex.assert_trees_all_close(of_nnx.pruning.thresholds, linen.pruning.thresholds, rtol=1e-2)
    np.testing.assert_allclose(nnx_logits, linen_logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("train", [True, False])
def test_images_are_preprocessed(variables, train):
    graphdef, params, rest = nnx.split(networks.NnxNet(nnx.Rngs(0)), nnx.Param, ...)
    images, key = networks.batch()["image"], jax.random.key(0)
    for adapter, network, *state in (
        (linen_apply, networks.LinenNet(), variables["params"], variables["batch_stats"]),
        (nnx_apply, graphdef, params, rest),
    ):
        given = adapter(network, lambda images: 3 * images - 1)(*state, images, train=train, key=key)
        expected = adapter(network)(*state, 3 * images - 1, train=train, key=key)
        chex.assert_trees_all_equal(given, expected)


def test_linen_trains_without_a_key(variables):
    network, images = variables["params"], networks.batch()["image"]
    _, after = linen_apply(networks.LinenNet())(network, variables["batch_stats"], images, train=True, key=None)
    before = {path: leaf for path, leaf in ltp.named_leaves(variables["batch_stats"]) if path.endswith("mean")}
    assert before
    moved = dict(ltp.named_leaves(after))
    assert all(not np.array_equal(moved[path], leaf) for path, leaf in before.items())


def test_linen_does_not_begin_anew_with_batch_statistics_that_are_missing(variables):
    apply, images = linen_apply(networks.LinenNet()), networks.batch()["image"]
    with pytest.raises(ValueError, match=r"the network has batch statistics that were not given: .*mean"):
        apply(variables["params"], {}, images, train=True, key=jax.random.key(0))


def test_nnx_trains_without_a_key():
    graphdef, params, rest = nnx.split(networks.NnxNet(nnx.Rngs(0)), nnx.Param, ...)
    _, after = nnx_apply(graphdef)(params, rest, networks.batch()["image"], train=True, key=None)
    before = {path: leaf for path, leaf in ltp.named_leaves(rest) if path.endswith("mean")}
    assert before
    moved = dict(ltp.named_leaves(after))
    assert all(not np.array_equal(moved[path], leaf) for path, leaf in before.items())


class Noisy(nnx.Module):
    """Two layers that ``nnx.scan`` runs, each with a dropout of its own, and noise of a stream with another name."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def layers(rngs):
            return nnx.Dropout(0.5, rngs=rngs)

        self.dropouts = layers(rngs)
        self.noise = rngs.noise.fork()

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def forward(dropout, x):
            return dropout(x)

        return forward(self.dropouts, x), jax.random.normal(self.noise(), (8,))


def test_the_key_reseeds_all_streams_of_an_nnx_network():
    graphdef, params, rest = nnx.split(Noisy(nnx.Rngs(0, noise=1)), nnx.Param, ...)
    apply, x = nnx_apply(graphdef), jnp.ones((4, 8))
    (dropped, noise), _ = apply(params, rest, x, train=True, key=jax.random.key(0))
    (again, same), after = apply(params, rest, x, train=True, key=jax.random.key(0))
    np.testing.assert_array_equal(dropped, again)
    np.testing.assert_array_equal(noise, same)
    # Nothing of the state that a run begins with or has come to decides, but the key alone.
    (later, later_noise), _ = apply(params, after, x, train=True, key=jax.random.key(0))
    np.testing.assert_array_equal(noise, later_noise)
    np.testing.assert_array_equal(dropped, later)
    (other, other_noise), _ = apply(params, rest, x, train=True, key=jax.random.key(1))
    assert not np.array_equal(dropped, other)
    assert not np.array_equal(noise, other_noise)
    # A layer drops half, two layers that draw alike would leave a half.
    wide, _ = apply(params, rest, jnp.ones((100, 100)), train=True, key=jax.random.key(0))
    assert np.mean(np.asarray(wide[0]) > 0) == pytest.approx(0.25, abs=0.05)


def fixed_logits(logits):
    return make_eval_step(lambda params, batch_stats, images, *, train, key: (jnp.asarray(logits), batch_stats))


def test_evaluation_counts_by_hand():
    logits = np.zeros((4, 7), np.float32)
    logits[0, 2] = 5  # label 2: first
    logits[1, [0, 1, 3, 4]] = [4, 3, 2, 1]  # label 1: second
    logits[2] = [7, 6, 5, 4, 3, 2, 1]  # label 6: last of seven
    logits[3, 0] = 9  # padding
    batch = {
        "image": jnp.zeros((4, 1)),
        "label": jnp.array([2, 1, 6, 0]),
        "mask": jnp.array([True, True, True, False]),
    }
    counts = jax.device_get(fixed_logits(logits)({}, {}, batch))
    assert (counts["top1"], counts["top5"], counts["examples"]) == (1, 2, 3)
    losses = [np.log(np.exp(row).sum()) - row[label] for row, label in zip(np.float64(logits), (2, 1, 6), strict=False)]
    np.testing.assert_allclose(counts["loss"], sum(losses), rtol=1e-6)


def test_evaluation_is_no_training():
    """Of a network that is right when it is evaluated, and wrong while it is trained or draws at random."""

    def apply(params, batch_stats, images, *, train, key):
        return jnp.roll(jnp.eye(3), int(train or key is not None), axis=0), batch_stats

    assert make_eval_step(apply)({}, {}, {"image": jnp.zeros((3, 1)), "label": jnp.arange(3)})["top1"] == 3


def test_evaluation_without_padding_needs_no_mask():
    batch = {"image": jnp.zeros((7, 1)), "label": jnp.arange(7), "mask": jnp.ones(7, bool)}
    logits = np.random.default_rng(0).normal(size=(7, 7))
    masked = fixed_logits(logits)({}, {}, batch)
    assert fixed_logits(logits)({}, {}, {key: batch[key] for key in ("image", "label")}) == masked
    assert masked["examples"] == 7


def test_network_that_says_nothing_gets_no_credit():
    """All logits alike: one class in seven is right, not every one."""
    batch = {"image": jnp.zeros((7, 1)), "label": jnp.arange(7), "mask": jnp.ones(7, bool)}
    counts = fixed_logits(np.zeros((7, 7), np.float32))({}, {}, batch)
    assert counts["top1"] == 1
    assert counts["top5"] == 5


def test_network_whose_logits_are_no_numbers_gets_no_credit():
    """The first class that is no number would pass for the highest, and is the right one of most examples."""
    logits = np.zeros((3, 7), np.float32)
    logits[0] = np.nan
    logits[1, 0] = np.nan
    batch = {"image": jnp.zeros((3, 1)), "label": jnp.zeros(3, jnp.int32)}
    counts = fixed_logits(logits)({}, {}, batch)
    assert (counts["top1"], counts["top5"], counts["examples"]) == (1, 1, 3)

    def apply(params, batch_stats, images, *, train, key):
        return params["w"] * logits, batch_stats

    optimizer, pruner = optax.sgd(0.1), pruners.dense()
    state = create_state({"w": jnp.ones(())}, {}, optimizer, pruner, jax.random.key(0))
    assert make_train_step(apply, optimizer, pruner, cross_entropy())(state, batch).totals["correct"] == 1


def test_padding_cannot_spoil_the_loss():
    logits = np.zeros((2, 3), np.float32)
    logits[1] = np.nan
    batch = {"image": jnp.zeros((2, 1)), "label": jnp.array([0, 0]), "mask": jnp.array([True, False])}
    np.testing.assert_allclose(fixed_logits(logits)({}, {}, batch)["loss"], np.log(3), rtol=1e-6)


def test_the_loss_is_float32_for_half_precision():
    logits = jnp.array([[0.0, 1.0, 3.0]], jnp.bfloat16)
    loss = cross_entropy()(logits, {"label": jnp.array([1])})
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, np.log(1 + np.e + np.e**3) - 1, rtol=0.01)  # the logarithms are of half precision


def test_evaluation_of_half_precision_adds_in_float32():
    """A sum of 10,000 losses in bfloat16 stops where one of them is less than half its last digit."""
    logits = jnp.tile(jnp.array([[0.0, 1.0, 3.0]], jnp.bfloat16), (10_000, 1))
    batch = {"image": jnp.zeros((10_000, 1)), "label": jnp.ones(10_000, jnp.int32)}
    counts = fixed_logits(logits)({}, {}, batch)
    assert {value.dtype for value in counts.values()} == {jnp.dtype("float32")}
    np.testing.assert_allclose(counts["loss"] / counts["examples"], np.log(1 + np.e + np.e**3) - 1, rtol=1e-5)


def test_label_smoothing_by_hand():
    logits = jnp.array([[2.0, 0.0]])
    p = 1 / (1 + np.exp(-2.0))
    expected = -(0.9 + 0.05) * np.log(p) - 0.05 * np.log(1 - p)  # a tenth of the label over two classes
    np.testing.assert_allclose(cross_entropy(0.1)(logits, {"label": jnp.array([0])}), expected, rtol=1e-5)
