"""The trail on disk: what is written, what is read back, what is picked, and what is refused."""

import contextlib
import dataclasses
import json
import math
import shutil
import threading
from pathlib import Path

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import ltp_jax as ltp
from ltp_jax.adapters import nnx_apply
from ltp_jax.checkpoints import Resume, TrailError, restore_network, save_network, writing
from ltp_jax.trail import Trail, pareto
from tests.entries import entry

PARAMS = {"conv": {"kernel": jnp.array([[1.5, 0.0], [0.0, -2.0]]), "bias": jnp.ones(2)}}
STATS = {"norm": {"mean": jnp.zeros(2)}}


ENTRIES = (entry(0, 1.0, 90.0), entry(1, 4.0, 89.5), entry(2, 9.0, 88.0), entry(3, 16.0, 89.2), entry(4, 30.0, 86.0))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "trail"
    trail = Trail(path, create=True)
    for e in ENTRIES:
        trail.save(e, jax.tree.map(lambda w, e=e: w * (e.epoch + 1), PARAMS), STATS)
    trail.close()
    return path


def test_every_entry_stays_and_reads_back(path):
    trail = Trail(path)
    assert trail.epochs == (0, 1, 2, 3, 4)
    assert trail.entries == ENTRIES
    assert trail.dense == ENTRIES[0]
    assert ENTRIES[1].gap == pytest.approx(0.5)


def test_working_directory_leads_to_its_trail(path):
    assert Trail(path.parent).path == path


def test_restored_network_is_dense_arrays_with_zeros(path):
    network = Trail(path).restore(ENTRIES[2])
    assert type(network["params"]["conv"]["kernel"]) is np.ndarray
    np.testing.assert_array_equal(network["params"]["conv"]["kernel"], [[4.5, 0.0], [0.0, -6.0]])
    chex.assert_trees_all_equal(network["batch_stats"], jax.device_get(STATS))


def test_plain_orbax_reads_an_entry(path):
    """What somebody does who does not have ltp_jax."""
    network = ocp.StandardCheckpointer().restore(path / "1" / "network")
    np.testing.assert_array_equal(network["params"]["conv"]["kernel"], [[3.0, 0.0], [0.0, -4.0]])
    metrics = json.loads((path / "1" / "metrics" / "metrics").read_text())
    assert metrics["compression"] == 4.0
    assert metrics["gap"] == 0.5


def test_pareto_set(path):
    assert [e.epoch for e in pareto(Trail(path).entries)] == [0, 1, 3, 4]
    # Of two that are equal in both, one is enough.
    assert len(pareto((entry(1, 4.0, 89.0), entry(2, 4.0, 89.0)))) == 1
    # One of which nothing is known beats none.
    assert [e.epoch for e in pareto((entry(1, 4.0, 89.0), entry(2, 8.0, float("nan"))))] == [1]


@pytest.mark.parametrize(
    ("request_", "epoch"),
    [
        ({"min_compression": 9}, 3),  # the most accurate of those sparse enough
        ({"min_compression": 20}, 4),
        ({"max_top1_drop": 0.5}, 1),  # the sparsest of those accurate enough
        ({"max_top1_drop": 1.0}, 3),
        ({"max_top1_drop": 0.0}, 0),
        ({"min_compression": 3, "max_top1_drop": 2.0}, 3),
        ({"min_compression": 3, "max_top1_drop": 0.6}, 1),
    ],
)
def test_pick(path, request_, epoch):
    assert Trail(path).pick(**request_).epoch == epoch


def test_of_equals_the_better_one_is_picked(tmp_path):
    trail = Trail(tmp_path, create=True)
    for e in (ENTRIES[0], entry(1, 9.0, 88.0), entry(2, 9.0, 89.0), entry(3, 8.0, 89.0)):
        trail.save(e, PARAMS, STATS)
    assert trail.pick(max_top1_drop=5).epoch == 2  # as sparse as 1, and more accurate
    assert trail.pick(min_compression=5).epoch == 2  # as accurate as 3, and sparser
    trail.close()


def test_of_entries_about_as_sparse_the_better_one_is_picked(tmp_path):
    """While masks move, compression is beside the target by less than a hundredth, now above it, now below."""
    trail = Trail(tmp_path, create=True)
    for e in (ENTRIES[0], entry(1, 16.1, 88.5), entry(2, 16.0, 89.5), entry(3, 15.9, 89.8)):
        trail.save(e, PARAMS, STATS)
    assert trail.pick(max_top1_drop=2).epoch == 2
    assert trail.pick(max_top1_drop=2, min_compression=16.05).epoch == 1
    trail.close()


def test_a_drop_is_from_the_dense_network_and_not_from_the_best(tmp_path):
    trail = Trail(tmp_path, create=True)
    for e in (ENTRIES[0], entry(1, 4.0, 91.0), entry(2, 16.0, 89.5)):
        trail.save(e, PARAMS, STATS)
    assert trail.pick(max_top1_drop=0.6).epoch == 2
    trail.close()


def test_an_entry_can_be_read_as_soon_as_it_is_saved(tmp_path):
    kernel = jnp.ones((1000, 1000))  # of a size that takes a while to write
    trail = Trail(tmp_path, create=True)
    trail.save(ENTRIES[0], {"kernel": kernel}, {})
    np.testing.assert_array_equal(trail.restore(ENTRIES[0])["params"]["kernel"], kernel)
    trail.save(ENTRIES[1], {"kernel": kernel}, {})
    assert trail.entries == ENTRIES[:2]
    trail.close()


def test_a_target_that_is_met_to_one_weight_in_a_million_is_met(tmp_path):
    trail = Trail(tmp_path, create=True)
    for e in (ENTRIES[0], entry(1, 5242880 / 2621441, 88.0)):
        trail.save(e, PARAMS, STATS)
    assert trail.pick(min_compression=2).epoch == 1
    trail.close()


def test_a_drop_that_is_met_but_for_rounding_is_met(tmp_path):
    trail = Trail(tmp_path, create=True)
    for e in (entry(0, 1.0, 90.01), entry(1, 4.0, 89.99)):
        trail.save(e, PARAMS, STATS)
    assert 90.01 - 0.02 > 89.99
    assert trail.pick(max_top1_drop=0.02).epoch == 1
    trail.close()


def test_an_address_is_no_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for opened in (
        lambda: Trail("gs://bucket/run", create=True),
        lambda: Trail(Path("gs://bucket/run")),
        lambda: Resume("gs://bucket/run"),
        lambda: save_network("s3://bucket/network", PARAMS, STATS),
        lambda: restore_network("s3://bucket/network"),
    ):
        with pytest.raises(TrailError, match=r"(gs|s3)://?bucket.* is no path of a file system; accepted is one"):
            opened()
    assert list(tmp_path.iterdir()) == []


def test_a_pattern_is_no_path(tmp_path, monkeypatch):
    """Orbax writes there, and later looks for it among the paths that the pattern fits."""
    (tmp_path / "[a]").mkdir()
    monkeypatch.chdir(tmp_path / "[a]")
    for opened in (
        lambda: Trail("run", create=True),
        lambda: Resume(tmp_path / "run?"),
        lambda: save_network(tmp_path / "*" / "network", PARAMS, STATS),
        lambda: restore_network("network"),
    ):
        with pytest.raises(TrailError, match=r"(\[a\]/run|run\?|\*/network|network) is a pattern to Orbax; accepted"):
            opened()
    assert [path.name for path in tmp_path.rglob("*")] == ["[a]"]


def test_entries_without_an_accuracy_are_not_picked(tmp_path):
    trail = Trail(tmp_path, create=True)
    for e in (entry(0, 1.0, math.nan), entry(1, 4.0, 80.0), entry(2, 8.0, math.nan)):
        trail.save(e, PARAMS, STATS)
    assert trail.pick(min_compression=2).epoch == 1
    with pytest.raises(TrailError, match=r"no entry has at least 5×; the nearest is epoch 1: 4.00×"):
        trail.pick(min_compression=5)
    with pytest.raises(TrailError, match=r"the dense network of the trail in .* has no accuracy to be compared with"):
        trail.pick(max_top1_drop=1)
    trail.close()


def test_a_tensor_without_elements_is_refused_by_its_name(tmp_path):
    with pytest.raises(TrailError, match=r"^params/a has no elements"):
        save_network(tmp_path / "network", {"a": jnp.zeros((0, 4))}, {})


@pytest.mark.parametrize(
    ("request_", "nearest"),
    [
        ({"min_compression": 100}, r"at least 100×; the nearest is epoch 4: 30.00× at 86.00 %"),
        ({"min_compression": 20, "max_top1_drop": 1}, r"at least 20× and at most 1 points below 90.00 %; .* epoch 3"),
        ({"max_top1_drop": -1}, r"the nearest is epoch 0"),
    ],
)
def test_impossible_request_names_the_nearest(path, request_, nearest):
    with pytest.raises(TrailError, match=nearest):
        Trail(path).pick(**request_)


def test_request_for_nothing_is_refused(path):
    with pytest.raises(TrailError, match="min_compression, max_top1_drop, or both"):
        Trail(path).pick()


def test_no_trail_is_said(tmp_path):
    with pytest.raises(TrailError, match="there is no trail in"):
        Trail(tmp_path / "absent")


def test_empty_trail_is_said(tmp_path):
    Trail(tmp_path / "trail", create=True).close()
    trail = Trail(tmp_path / "trail")
    assert trail.entries == ()
    with pytest.raises(TrailError, match="lacks the dense network"):
        _ = trail.dense
    with pytest.raises(TrailError, match="has no entry yet"):
        trail.pick(min_compression=1)


def test_a_folder_in_a_trail_does_not_take_its_place(path, tmp_path):
    shutil.copytree(path, tmp_path / "trail")
    shutil.copytree(path / "2", tmp_path / "trail" / "trail" / "2")
    assert Trail(tmp_path).epochs == Trail(tmp_path / "trail").epochs == (0, 1, 2, 3, 4)


def test_a_full_disk_is_told_in_plain_words(tmp_path):
    said = f"RESOURCE_EXHAUSTED: {'/a/long/path' * 40} [OS error 28: No space left on device]"
    wanted = f"^cannot write to {tmp_path}: No space left on device; what was saved"
    with pytest.raises(TrailError, match=wanted), writing(tmp_path):
        raise ValueError(said)


def test_broken_entry_is_named(path, tmp_path):
    shutil.copytree(path, tmp_path / "trail")
    for text in ('{"epoch":', "[1]", "{}"):
        (tmp_path / "trail" / "2" / "metrics" / "metrics").write_text(text)
        with pytest.raises(TrailError, match=r"entry 2 of .* cannot be read"):
            _ = Trail(tmp_path / "trail").entries
    figures = json.loads((tmp_path / "trail" / "3" / "metrics" / "metrics").read_text())
    for name, value in (("top1", "x"), ("top1", None), ("densities", 0.5), ("thresholds", {"a": None})):
        (tmp_path / "trail" / "2" / "metrics" / "metrics").write_text(json.dumps(figures | {name: value}))
        with pytest.raises(TrailError, match=rf"entry 2 of .* cannot be read: .*its {name} is {value!r}"):
            _ = Trail(tmp_path / "trail").entries
    shutil.rmtree(tmp_path / "trail" / "3" / "network" / "d")
    shutil.rmtree(tmp_path / "trail" / "3" / "network" / "ocdbt.process_0")
    with pytest.raises(TrailError, match=r"the network in .*3/network cannot be read"):
        Trail(tmp_path / "trail").restore(ENTRIES[3])


def test_broken_entry_is_named_to_a_run_that_goes_on(path, tmp_path):
    shutil.copytree(path, tmp_path / "trail")
    (tmp_path / "trail" / "2" / "metrics" / "metrics").write_text('{"epoch"')
    with pytest.raises(TrailError, match=r"entry 2 .* cannot be read.*; the others can be once .*trail/2 is removed"):
        Trail(tmp_path, create=True)
    shutil.rmtree(tmp_path / "trail" / "2")
    trail = Trail(tmp_path, create=True)
    assert trail.epochs == (0, 1, 3, 4)
    trail.close()


def test_half_written_entry_is_no_entry(path, tmp_path):
    shutil.copytree(path, tmp_path / "trail")
    (tmp_path / "trail" / "4").rename(tmp_path / "trail" / "4.orbax-checkpoint-tmp")
    assert Trail(tmp_path / "trail").epochs == (0, 1, 2, 3)
    with pytest.raises(TrailError, match="opened to be read"):
        Trail(tmp_path / "trail").save(ENTRIES[4], PARAMS, STATS)
    trail = Trail(tmp_path / "trail", create=True)  # the writer clears it away, and can write it again
    trail.save(ENTRIES[4], PARAMS, STATS)
    trail.close()
    assert sorted(p.name for p in (tmp_path / "trail").iterdir()) == ["0", "1", "2", "3", "4"]


def test_unwritable_place_is_said(tmp_path):
    trail = Trail(tmp_path / "trail", create=True)
    shutil.rmtree(tmp_path / "trail")
    (tmp_path / "trail").write_text("a file where the directory was")
    before = threading.enumerate()

    def write():
        trail.save(ENTRIES[0], PARAMS, STATS)
        trail.wait()

    with pytest.raises(TrailError, match="cannot write to"):
        write()
    with pytest.raises(TrailError, match="cannot write to"):
        save_network(tmp_path / "trail" / "network", PARAMS, STATS)
    # Nothing of Orbax is left that would keep a script from its end, waiting for what failed.
    left = [thread for thread in threading.enumerate() if not (thread.daemon or thread in before)]
    assert [thread for thread in left if not thread.name.startswith("asyncio")] == []  # idle ones, which end with it


def abstract(tree):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def test_resume_keeps_the_latest_two_and_gives_back_every_bit(tmp_path):
    state = {"w": jax.random.normal(jax.random.key(0), (5, 7)), "key": jax.random.key(3), "step": jnp.int32(0)}
    resume = Resume(tmp_path / "resume")
    assert resume.restore(abstract(state)) is None
    for step in (1, 2, 3):
        resume.save(step, state | {"step": jnp.int32(step)})
    resume.close()
    assert sorted(p.name for p in (tmp_path / "resume").iterdir()) == ["2", "3"]
    restored = Resume(tmp_path / "resume").restore(abstract(state))
    assert restored is not None
    np.testing.assert_array_equal(restored["w"], state["w"])
    assert restored["step"] == 3
    np.testing.assert_array_equal(jax.random.key_data(restored["key"]), jax.random.key_data(state["key"]))


def test_broken_resume_state_gives_way_to_the_one_before(tmp_path, caplog):
    state = {"w": jnp.ones((40, 50)), "step": jnp.int32(0)}
    resume = Resume(tmp_path / "resume")
    for step in (1, 2):
        resume.save(step, state | {"step": jnp.int32(step)})
    resume.close()
    shutil.rmtree(tmp_path / "resume" / "2" / "state" / "ocdbt.process_0")
    shutil.rmtree(tmp_path / "resume" / "2" / "state" / "d")
    resume = Resume(tmp_path / "resume")
    restored = resume.restore(abstract(state))
    assert restored is not None
    assert restored["step"] == 1
    assert "the state of step 2" in caplog.text
    # It makes room for what is trained anew.
    resume.save(2, state | {"step": jnp.int32(2)})
    resume.close()
    restored = Resume(tmp_path / "resume").restore(abstract(state))
    assert restored is not None
    assert restored["step"] == 2


@pytest.mark.parametrize(
    ("pattern", "elsewhere"),
    [("_METADATA", "/proc/self/mem"), ("manifest.ocdbt", "/" + 300 * "a"), ("ocdbt.process_0/d/*", "/" + 300 * "a")],
)
def test_a_state_that_the_file_system_does_not_give_is_left_as_it_is(tmp_path, pattern, elsewhere):
    """As it may for a moment: what links lead to gives an input/output error, or has too long a name."""
    state = {"w": jax.random.normal(jax.random.key(0), (40, 50))}
    with contextlib.closing(Resume(tmp_path / "resume")) as resume:
        resume.save(1, state)
        resume.save(2, state)
    shutil.copytree(tmp_path / "resume" / "2", tmp_path / "whole")
    for path in (tmp_path / "resume" / "2" / "state").glob(pattern):
        path.unlink()
        path.symlink_to(elsewhere)
    with contextlib.closing(Resume(tmp_path / "resume")) as resume:
        with pytest.raises(TrailError, match=r"the state of step 2 in .* could not be read \(.*\); it stays as it is"):
            resume.restore(abstract(state))
        shutil.rmtree(tmp_path / "resume" / "2")
        shutil.copytree(tmp_path / "whole", tmp_path / "resume" / "2")
        assert resume.restore(abstract(state)) is not None
        assert resume.steps == (1, 2)


def test_a_state_never_stands_in_for_that_of_another_run(tmp_path):
    state = {"w": jnp.ones(3)}
    with contextlib.closing(Resume(tmp_path / "resume")) as resume:
        for step in (10, 20, 20):
            resume.save(step, state)
    with contextlib.closing(Resume(tmp_path / "resume")) as resume:
        for step in (5, 10, 20):
            with pytest.raises(
                TrailError, match=rf"a state of step 20 already, .* in place of this one of step {step};"
            ):
                resume.save(step, {"w": jnp.zeros(3)})
        assert resume.restore(abstract(state)) is not None
        resume.save(20, state)  # it is the one
        resume.save(21, {"w": jnp.zeros(3)})
    restored = Resume(tmp_path / "resume").restore(abstract(state))
    assert restored is not None
    np.testing.assert_array_equal(restored["w"], np.zeros(3))


def test_resume_state_of_another_run_is_refused(tmp_path):
    resume = Resume(tmp_path / "resume")
    resume.save(1, {"w": jnp.ones(3)})
    resume.close()
    with pytest.raises(TrailError, match="remove that directory to start over"):
        Resume(tmp_path / "resume").restore(abstract({"other": jnp.ones(4)}))


def test_network_by_itself(tmp_path):
    save_network(tmp_path / "dense", PARAMS, {})
    network = restore_network(tmp_path / "dense")
    chex.assert_trees_all_equal(network, {"params": jax.device_get(PARAMS), "batch_stats": {}})
    with pytest.raises(TrailError, match="there is no network in"):
        restore_network(tmp_path / "absent")


def test_an_epoch_that_is_there_is_not_written_again(tmp_path):
    trail = Trail(tmp_path, create=True)
    for e in (ENTRIES[0], ENTRIES[2]):
        trail.save(e, PARAMS, STATS)
    for e in (ENTRIES[0], entry(2, 8.0)):
        with pytest.raises(TrailError, match=f"has an entry of epoch {e.epoch} already"):
            trail.save(e, PARAMS, STATS)
    trail.close()
    assert trail.entries == Trail(tmp_path).entries == (ENTRIES[0], ENTRIES[2])
    with pytest.raises(TrailError, match="was opened to be read, or closed"):
        trail.save(ENTRIES[3], PARAMS, STATS)


def test_lost_entries_are_saved_anew_behind_later_ones(tmp_path):
    with contextlib.closing(Trail(tmp_path, create=True)) as trail:
        trail.save(ENTRIES[2], PARAMS, STATS)
    with contextlib.closing(Trail(tmp_path, create=True)) as trail:
        for e in (ENTRIES[0], ENTRIES[1]):
            trail.save(e, PARAMS, STATS)
        assert trail.epochs == (0, 1, 2)
    assert Trail(tmp_path).entries == ENTRIES[:3]
    chex.assert_trees_all_equal(trail.restore(trail.dense)["params"], jax.device_get(PARAMS))


@pytest.mark.parametrize("epoch", [1.0, np.float32(2), 0.5, -1, None])
def test_an_epoch_is_a_whole_number(tmp_path, epoch):
    with contextlib.closing(Trail(tmp_path, create=True)) as trail:
        with pytest.raises(TrailError, match=r"an entry is of epoch .*; accepted is a whole number, 0 or more"):
            trail.save(dataclasses.replace(ENTRIES[1], epoch=epoch), PARAMS, STATS)
        trail.save(dataclasses.replace(ENTRIES[1], epoch=np.int32(1)), PARAMS, STATS)
    assert Trail(tmp_path).entries == (ENTRIES[1],)


def test_a_network_replaces_nothing(tmp_path):
    """A network that is there would be lost, too, if the new one could not be written."""
    save_network(tmp_path / "dense", PARAMS, {})
    (tmp_path / "thesis.tex").write_text("years")
    for taken in (tmp_path, tmp_path / "dense", tmp_path / "thesis.tex"):
        with pytest.raises(TrailError, match=f"^{taken} is there already; remove it, or name another directory$"):
            save_network(taken, {"w": jnp.ones(3)}, {})
    assert list(restore_network(tmp_path / "dense")["params"]) == ["conv"]
    assert (tmp_path / "thesis.tex").read_text() == "years"
    (tmp_path / "empty").mkdir()
    save_network(tmp_path / "empty", PARAMS, {})
    assert list(restore_network(tmp_path / "empty")["params"]) == ["conv"]


def test_states_do_not_take_the_place_of_what_others_have_numbered(tmp_path):
    with contextlib.closing(Trail(tmp_path / "trail", create=True)) as trail:
        trail.save(ENTRIES[0], PARAMS, STATS)
    (tmp_path / "classes" / "7").mkdir(parents=True)
    for folder in ("trail/0", "classes/7"):
        with pytest.raises(TrailError, match=rf"{folder} is no state to resume from, and would be removed in time"):
            Resume((tmp_path / folder).parent)


def test_tensors_that_would_be_one_on_disk_are_refused(tmp_path):
    with pytest.raises(TrailError, match=r"two tensors would both be params\.a\.b\.w on disk"):
        save_network(tmp_path / "dense", {"a.b": {"w": jnp.zeros(1)}, "a": {"b.w": jnp.ones(1)}}, {})
    assert not (tmp_path / "dense").exists()


def test_a_home_directory_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_network("~/dense", PARAMS, {})
    assert (tmp_path / "dense").is_dir()


@pytest.mark.parametrize("figures", [{"top5": None}, {"top1": "91.2"}, {"loss": np.ones(2)}, {"densities": {"k": "1"}}])
def test_an_entry_that_could_not_be_read_is_not_written(tmp_path, figures):
    trail = Trail(tmp_path, create=True)
    good = entry(0, 1.0, 90.0)
    with pytest.raises(TrailError, match=r"the entry of epoch 0 cannot be kept: .*; accepted are numbers, NaN for one"):
        trail.save(dataclasses.replace(good, **figures), {"kernel": np.ones(2)}, {})
    trail.save(dataclasses.replace(good, top5=math.nan), {"kernel": np.ones(2)}, {})
    trail.close()
    assert math.isnan(Trail(tmp_path).dense.top5)


def test_figures_may_be_arrays(tmp_path):
    trail = Trail(tmp_path, create=True)
    figures = {"step": jnp.int32(10), "compression": jnp.float32(4.0), "top1": np.float32(89.5)}
    trail.save(dataclasses.replace(ENTRIES[1], **figures), PARAMS, STATS)
    assert trail.entries == (ENTRIES[1],)
    assert type(trail.entries[0].step) is int
    trail.close()


class Net(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)])
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.layers[1](self.dropout(self.norm(self.layers[0](x))))


def test_a_state_of_another_structure_is_named(tmp_path):
    with contextlib.closing(Resume(tmp_path)) as resume:
        resume.save(1, {"a": jnp.ones(3), "b": jnp.ones(2)})
        with pytest.raises(TrailError, match=r"can be read as one of this run \(.*\bb: \S"):
            resume.restore({"a": jax.ShapeDtypeStruct((3,), jnp.float32)})


def test_an_nnx_network_goes_back_into_its_model(tmp_path):
    model = Net(nnx.Rngs(0))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    trail = Trail(tmp_path / "trail", create=True)
    trail.save(ENTRIES[0], params, rest)
    save_network(tmp_path / "dense", params, rest)
    images = jnp.ones((5, 3))
    expected, _ = nnx_apply(graphdef)(params, rest, images, train=False, key=None)
    for network in (trail.restore(ENTRIES[0]), restore_network(tmp_path / "dense")):
        assert [path for path, _ in ltp.named_leaves(network["params"])] == [p for p, _ in ltp.named_leaves(params)]
        other = Net(nnx.Rngs(1))
        for kind, part in ((nnx.Param, "params"), (nnx.BatchStat, "batch_stats")):
            state = nnx.state(other, kind)
            pure = nnx.restore_int_paths(network[part])
            nnx.replace_by_pure_dict(state, {key: pure[key] for key in nnx.to_pure_dict(state)})
            nnx.update(other, state)
        other.eval()
        np.testing.assert_array_equal(other(images), expected)
        # Whole, as it is, and trained on: the new network has random streams of its own.
        graphdef, *parts = nnx.split(Net(nnx.Rngs(1)), nnx.Param, ...)
        for state, part in zip(parts, ("params", "batch_stats"), strict=True):
            nnx.replace_by_pure_dict(state, nnx.restore_int_paths(network[part]))
        nnx_apply(graphdef)(*parts, images, train=True, key=jax.random.key(0))
    trail.close()


def test_nnx_states_within_a_tree_are_written_as_those_that_are_the_whole(tmp_path):
    _, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)
    save_network(tmp_path / "dense", {"backbone": params}, {"backbone": rest})
    network = restore_network(tmp_path / "dense")
    for part, state in (("params", params), ("batch_stats", nnx.filter_state(rest, nnx.BatchStat))):
        found = [path for path, _ in ltp.named_leaves(network[part])]
        assert found == [f"backbone/{path}" for path, _ in ltp.named_leaves(state)]


def test_boxes_of_linen_metadata_are_not_written(tmp_path):
    kernel = nn.with_partitioning(nn.initializers.ones, (None, "model"))
    params = nn.Dense(2, kernel_init=kernel).init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    save_network(tmp_path / "dense", params, {})
    assert restore_network(tmp_path / "dense")["params"]["kernel"].shape == (3, 2)
