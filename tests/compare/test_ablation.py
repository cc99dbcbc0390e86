"""The variants of the ablation, by numbers worked out by hand, and a small run of it."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ltp_jax as ltp
from experiments import ablation, ablation_variants, compare_networks
from experiments.ablation_variants import Job, Variant
from experiments.config import TrainConfig
from experiments.data.digits import digits
from experiments.harness import Harness
from experiments.options import ConfigError
from ltp_jax.penalty import LearnedThresholdState
from ltp_jax.pruner import Pruner
from ltp_jax.target import TargetState, target_density
from ltp_jax.transform import PruneState


def job(params, steps=20):
    return Job(ltp.plan(params), steps, {}, np.zeros(()))


def test_variants_have_files_of_their_own():
    names = [ablation.file_name(variant, 0) for variant in ablation.VARIANTS]
    assert len(set(names)) == len(names)


def test_units_decide_what_is_pruned_and_leave_the_weights_as_they_are():
    # In units of 1 and 1/4 the weights 1, 2 and −3 are 1, 2 and −0.75: half a budget of four keeps 1 and 2.
    params = {"kernel": jnp.array([[1.0], [2.0], [-3.0], [0.5]])}
    units = {"kernel": jnp.array([[1.0], [1.0], [0.25], [1.0]])}
    make = ablation_variants.in_units(
        lambda job: target_density(job.plan, 0.5, prune_steps=1, select_steps=1), lambda job: units
    )
    pruner = make(job(params))
    state = pruner.init(params)
    same, state = pruner.update({"kernel": jnp.float32(0)}, params, params, state, 0)
    np.testing.assert_array_equal(same["kernel"], params["kernel"])
    np.testing.assert_array_equal(pruner.harden(params, state)["kernel"], [[1.0], [2.0], [0.0], [0.0]])


def test_the_temperature_falls_within_its_share_of_the_run():
    seen = Pruner(
        lambda params: None,
        lambda params, thresholds, state, step: (state.prune.temperatures, jnp.zeros(())),
        lambda *args: None,
        lambda params, state: None,
    )
    params = {"kernel": jnp.ones((2, 2))}
    pruner = ablation_variants.annealed(lambda job: seen, 1 / 16, 0.5)(job(params))
    state = LearnedThresholdState(PruneState({"kernel": jnp.float32(0)}, {"kernel": jnp.float32(8)}), ())
    # Of 20 steps, 10: half of the way, in factors, is a fourth.
    found = [float(pruner.soften(params, {}, state, step)[0]["kernel"]) for step in (0, 5, 10, 20)]
    assert found == pytest.approx([8, 2, 0.5, 0.5])
    assert (pruner.init, pruner.update, pruner.harden) == (seen.init, seen.update, seen.harden)


def test_temperatures_that_go_with_the_threshold():
    # Of 20 steps 10 are the selection, half of which is left at step 5. The weights have T = 1e-2 · Var(|w|) = 0.04.
    params = {"kernel": jnp.array([[1.0, 5.0, -1.0, -5.0]])}
    pruner = ablation_variants.widened(
        lambda job: target_density(job.plan, 0.5, prune_steps=2, select_steps=10), lambda rest: 0.5 * rest, 0.5
    )(job(params))
    state = pruner.init(params)
    state = state.replace(prune=state.prune.replace(thresholds={"kernel": jnp.float32(4.0)}))

    def left(state, step):
        return pruner.soften(params, state.thresholds, state, step)[0]["kernel"][0, 0]

    # 1 − 4 over temperatures of 0.5 · 4, 0.25 · 4 and, none being left, 0.04.
    for step, temperature in ((0, 2), (5, 1), (10, 0.04)):
        np.testing.assert_allclose(left(state, step), 1 / (1 + np.exp(3 / temperature)), rtol=1e-5)
    np.testing.assert_allclose(left(state.replace(fixed=jnp.array(True)), 0), 0, atol=1e-20)


def test_leaks_by_other_rules():
    # Of 20 steps 10 are the selection, whose rest is 0.8 at the second step.
    params = {"kernel": jnp.array([[0.01, 5.0, -6.0]])}
    pruner = ablation_variants.leaking(
        lambda job: target_density(job.plan, 0.5, prune_steps=2, select_steps=10), lambda rest: 0.5 * rest**2, 0.5
    )(job(params))
    state, thresholds = pruner.init(params), {"kernel": jnp.float32(20.0)}

    def shares(state, step):
        return jax.grad(lambda p: jnp.sum(pruner.soften(p, thresholds, state, step)[0]["kernel"]))(params)["kernel"]

    for step, share in ((0, 0.5), (2, 0.32), (10, 0), (15, 0)):
        np.testing.assert_allclose(shares(state, step), [[share, 1, 1]], atol=1e-6)
    np.testing.assert_allclose(shares(state.replace(fixed=jnp.array(True)), 0), [[0, 1, 1]], atol=1e-6)


def test_other_offsets_begin_with_as_many_weights():
    # In units of 2 and 1, the weights above a scale of 1.5 are 4 and 8, and 3 and 5: four of eight. Of the weights as
    # they are, 1 1 1.2 2 3 4 5 8, four lie above 2.5.
    params = {"a": {"kernel": jnp.array([[1.0, -2, 4, 8]])}, "b": {"kernel": jnp.array([[1.0, 3, -5, 1.2]])}}
    own, tau = jnp.log(jnp.array([2.0, 1.0])), {"a/kernel": jnp.zeros(()), "b/kernel": jnp.zeros(())}
    state = TargetState(PruneState(tau, {}), jnp.log(1.5), own, jnp.zeros(2), (), jnp.zeros((), bool))
    pruner = target_density(ltp.plan(params), 0.5, prune_steps=1, select_steps=1)._replace(init=lambda params: state)
    found = ablation_variants.starting(lambda job: pruner, ablation_variants.at_zero)(job(params)).init(params)
    assert found.offsets.tolist() == [0, 0]
    assert float(jnp.exp(found.log_scale)) == pytest.approx(2.5)
    # |w| of 1 and 3, and of 1 and 1 + 2e: deviations of 1 and e.
    params = {"a": {"kernel": jnp.array([[1.0, -3]])}, "b": {"kernel": jnp.array([[-1.0, 1 + 2 * np.e]])}}
    spreads = ablation_variants.at_spread(ltp.plan(params), params)
    assert {path: float(a) for path, a in spreads.items()} == pytest.approx({"a/kernel": 0, "b/kernel": 1}, abs=1e-6)


def test_thresholds_that_grow_with_their_layers():
    # The weights of a grow to three times what they were, those of b stay; no other thing moves the offsets.
    params = {"a": {"kernel": jnp.array([[1.0, -2, 4, 8]])}, "b": {"kernel": jnp.array([[1.0, 3, -5, 1.2]])}}
    still = {"a/kernel": jnp.float32(0), "b/kernel": jnp.float32(0)}
    pruner = ablation_variants.growing(
        lambda job: target_density(job.plan, 0.5, prune_steps=5, select_steps=9, optimizer=optax.sgd(0.0))
    )(job(params))
    state = pruner.init(params)
    grown = params | {"a": {"kernel": 3 * params["a"]["kernel"]}}
    _, after = pruner.update(still, params, grown, state, 0)
    np.testing.assert_allclose(after.offsets - state.offsets, [np.log(3), 0], atol=1e-6)
    np.testing.assert_allclose(
        after.thresholds["a/kernel"] / after.thresholds["b/kernel"],
        9 * np.exp(2 * (state.offsets[0] - state.offsets[1])),
        rtol=1e-5,
    )


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize(
    ("make", "whole", "half"),
    [
        (ablation_variants.penalised(10.0), 5.0, 2.5),
        (ablation_variants.norm_penalised(10.0, 1), 5 * 8 / 4, 5 * 6 / 4),
        (ablation_variants.norm_penalised(10.0, 2), 5 * 20 / 4, 5 * 18 / 4),
    ],
)
def test_penalties_in_units_of_the_spread(make, whole, half, scale):
    # |w| of 1 and 3 have a spread of 1. At step 5 of the first 10 of 20 the penalty is 5, the half of it.
    params = {"kernel": scale * jnp.array([[3.0, -1.0], [1.0, -3.0]])}
    pruner = make(job(params))
    state = pruner.init(params)
    for tau, expected in ((0.0, whole), (4 * scale**2, half)):
        thresholds = {"kernel": jnp.float32(tau)}
        pruned, penalty = pruner.soften(params, thresholds, state, jnp.int32(5))
        assert float(penalty) == pytest.approx(expected, rel=1e-4)
        np.testing.assert_allclose(pruned["kernel"], params["kernel"] * (params["kernel"] ** 2 > tau), atol=1e-6)
    assert float(pruner.soften(params, thresholds, state, jnp.int32(0))[1]) == 0


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The ablation on digits: ``small(*words)`` is its command; the folder of its results."""
    train = TrainConfig(epochs=1, batch_size=128, learning_rate=0.05)
    monkeypatch.setitem(
        compare_networks.NETWORKS, ablation.ARCH, compare_networks.Setup(lambda data_dir: digits(), train, train)
    )
    monkeypatch.setattr(ablation, "HELD_OUT", 257)
    monkeypatch.setattr(ablation, "EPOCHS", 3)

    def command(*words):
        options = [f"--results={tmp_path / 'results'}", f"--workdir={tmp_path}", f"--pictures={tmp_path}"]
        monkeypatch.setattr(sys, "argv", ["somewhere/ablation.py", *words, *options])
        ablation.main()

    return command, tmp_path / "results"


def test_a_run_and_its_report(small, tmp_path, capsys, monkeypatch):
    command, results = small
    run = ("run", "--variants", "target", "magnitude, pruned within 50 %, distilled, half", "--seeds", "2")
    command(*run)
    assert [path.name for path in tmp_path.glob("digits*")] == ["digits_held_out_lenet_300_100"]  # not the test images
    files = sorted(results.glob("*.json"))
    assert [path.name for path in files] == [
        "magnitude__pruned_within_50____distilled__half_2.json",
        "target_2.json",
    ]
    for path in files:
        cell = json.loads(path.read_text())
        assert cell["seed"] == 2
        assert cell["compression"] == pytest.approx(64, rel=0.01)
        assert len(cell["epochs"]) == 3
        assert cell["epochs"][-1]["top1"] == cell["top1"]
        assert cell["epochs"][0]["compression"] < cell["compression"]
        assert cell["epochs"][-1]["soft_top1"] == cell["top1"]  # masks are fixed
    command("report")
    said = capsys.readouterr().out
    table = (results / "table.md").read_text().splitlines()
    gap = max((epoch["soft_top1"] - epoch["top1"] for epoch in cell["epochs"]), key=abs)
    assert table[2] == f"| target | 1 | {cell['compression']:.1f}× | {cell['top1']:.2f} | +0.00 | {gap:+.2f} |"
    assert table[3].startswith("| magnitude, pruned within 50 %, distilled, half | 1 | 64.")
    assert (tmp_path / "ablation_claims.png").read_bytes().startswith(b"\x89PNG")
    assert "ablation_claims.png" in said
    # What is there is not run again, but what had fewer epochs is.
    measured = []
    monkeypatch.setattr(
        ablation, "measure", lambda harness, *rest: measured.append(rest[-1]) or {"compression": 9.0, "top1": 9.0}
    )
    command(*run)
    assert measured == []
    files[1].write_text(json.dumps(cell | {"epochs": cell["epochs"][:2]}))
    command(*run)
    assert measured == [2]
    files[1].write_text("{}")
    with pytest.raises(ConfigError, match=r"target_2.json is no record of a run \(it lacks variant, seed, "):
        command("report")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--data-dir", "gs://bucket"), "^--data-dir is gs:/bucket; accepted is a path of this machine"),
        (("--seeds", "-1"), "--seeds has -1; accepted is 0 to 4294967295"),
        (("--seeds",), "--seeds is empty"),
        (("--variants", "target, T0 7"), "--variants has 'target, T0 7'; accepted are"),
    ],
)
def test_impossible_ablations_are_refused(small, words, message):
    with pytest.raises(ConfigError, match=message):
        small[0]("run", *words)


@pytest.mark.parametrize("words", [("--seeds", "1"), ("--variants", "target, T0 1e-3")])
def test_a_report_of_some_runs_is_refused(small, words):
    with pytest.raises(ConfigError, match="--variants and --seeds go with run; report shows all runs"):
        small[0]("report", *words)


def test_help_tells_the_command(small, capsys):
    with pytest.raises(SystemExit):
        small[0]("--help")
    assert capsys.readouterr().out.startswith("usage: python -m experiments.ablation ")


def test_how_a_variant_trains(tmp_path, monkeypatch):
    harness = Harness(digits(), "lenet_300_100", tmp_path, TrainConfig(epochs=1, batch_size=128, learning_rate=0.1))
    seen = []
    monkeypatch.setattr(harness, "compiled", lambda *args: seen.append(args))
    make = ablation_variants.targeted()
    for variant in (Variant(make), Variant(make, 0.2, 2e-3, 0.5, 0.05, 0.75)):
        ablation.prepare(harness, variant, {})
    (_, plain, distilled, optimizer), (_, train, more, until) = seen
    assert (plain.learning_rate, plain.weight_decay, distilled, optimizer) == (0.1, 1e-3, 0.0, None)
    assert (train.learning_rate, train.weight_decay, train.label_smoothing, more) == (0.2, 2e-3, 0.05, 0.5)
    # Without a gradient, a weight of one has its decay as the momentum until 3/4 of 10 epochs of 9 steps: step 67.
    params = {"kernel": jnp.ones((1, 1))}
    state, momentum = until.init(params), 0.0
    rate = optax.cosine_decay_schedule(0.2, 90)
    for step in range(72):
        decay = 2e-3 if step < 67.5 else 0.0
        momentum = 0.9 * momentum + decay
        updates, state = until.update({"kernel": jnp.zeros((1, 1))}, state, params)
        expected = -float(rate(step)) * (0.9 * momentum + decay)
        assert float(updates["kernel"][0, 0]) == pytest.approx(expected, rel=1e-3), step


def test_the_rate_of_a_variant(tmp_path, monkeypatch):
    # A peak of 0.2 over 90 steps: halfway down its fall the rate is half of what it fell from.
    harness = Harness(digits(), "lenet_300_100", tmp_path, TrainConfig(epochs=1, batch_size=128, learning_rate=0.1))
    seen = []
    monkeypatch.setattr(harness, "compiled", lambda *args: seen.append(args[-1]))
    rates = {0: 0.2, 17: 0.2, 54: 0.1}, {0: 0.2, 18: 0.1, 36: 0.1, 63: 0.05}
    for rate in (ablation_variants.held(0.2), ablation_variants.restarted(0.4, 0.5)):
        ablation.prepare(harness, Variant(ablation_variants.targeted(), 0.2, 0.0, rate=rate), {})
    for optimizer, expected in zip(seen, rates, strict=True):
        params = {"kernel": jnp.ones((1, 1))}
        state, momentum = optimizer.init(params), 0.0
        for step in range(90):
            momentum = 0.9 * momentum + 1
            updates, state = optimizer.update(params, state, params)
            if step in expected:
                rate = -float(updates["kernel"][0, 0]) / (0.9 * momentum + 1)
                assert rate == pytest.approx(expected[step], rel=1e-3), step
