"""The TPU compiler on a small network, and what a dry run tells and refuses. No TPU is needed, libtpu is."""

import dataclasses
import importlib.util
import json

import jax.numpy as jnp
import pytest

from experiments import dry_run
from experiments.ahead_of_time import COMPILER_ONLY, DoesNotFit, Figures
from experiments.chips import topology
from experiments.config import LtpConfig, MeshConfig
from experiments.ending import RunError
from experiments.hlo import collectives
from experiments.imagenet_config import PRESETS
from experiments.options import ConfigError
from ltp_jax import models
from tests.commands import run_python

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the compiler for TPUs, is not installed"
)


def report(workdir, train_size=1257, batch_size=64, **options):
    """The dry run of a network that compiles fast."""
    preset = PRESETS["resnet18"]
    train = dataclasses.replace(preset.train, epochs=2, batch_size=batch_size)
    options = {"arch": "digits", "workdir": workdir, "train": train, "ltp": LtpConfig()} | options
    module = models.create("digits", num_classes=10, dtype=jnp.bfloat16)
    config = dataclasses.replace(preset, **options)
    return dry_run.report(config, module, image_size=8, train_size=train_size, pretrains=False)


@needs_libtpu
def test_dry_run_compiles_for_a_slice(tmp_path, capsys):
    report(tmp_path, topology="v5e:2x2")
    found = json.loads((tmp_path / "dry_run.json").read_text())
    assert found["devices"] == 4
    for side in (found["ltp"], found["dense"]):
        assert side["flops"] > 0
        assert 0 < side["peak_bytes"] < topology("v5e:2x2").chip.memory
        assert side["bytes_accessed"] > 0
        assert side["collectives"]["all-reduce"]["bytes"] > 2 * found["parameters"]  # of gradients, at least bfloat16
        assert side["images_per_second"] > 0
    assert found["ltp"]["collectives"]["all-reduce"]["count"] == found["dense"]["collectives"]["all-reduce"]["count"]
    beginning = found["beginning"]
    assert beginning["collectives"] == {}
    assert 4 * found["prunable"] < beginning["peak_bytes"] < found["ltp"]["peak_bytes"]
    assert beginning["flops"] < found["ltp"]["flops"] / 10  # of no images
    assert "the compiler's figures" in capsys.readouterr().out


@needs_libtpu
def test_slow_compilation_is_told_with_the_option_that_allows_more(tmp_path):
    with pytest.raises(RunError, match=r"v5e:2x2 did not end within 0\.1 s; --dry-run-timeout allows more"):
        report(tmp_path, topology="v5e:2x2", dry_run_timeout=0.1)


@needs_libtpu
def test_mesh_of_each_kind_of_slice():
    """A device for each chip: JAX makes no mesh of the cores of a chip."""
    code = (
        "from experiments.ahead_of_time import slice_mesh;"
        "print([tuple(slice_mesh(name, 2).shape.items()) for name in ('v4:2x2x2', 'v5e:2x4', 'v5p:2x2x2', 'v6e:2x4')])"
    )
    done = run_python("-c", code, timeout=300, **COMPILER_ONLY)
    assert done.stdout.count("('data', 4), ('fsdp', 2)") == 4, done.stderr


def test_batch_that_does_not_fit_is_refused_with_the_largest(tmp_path, monkeypatch):
    """By a compiler that takes up to 1,000 images a chip."""

    def compile_step(step, slice_name, timeout):
        images = step.train.batch_size // 4
        tried.append(images)
        if images > 1000:
            raise DoesNotFit("RESOURCE_EXHAUSTED")

    tried = []
    monkeypatch.setattr(dry_run, "compile_step", compile_step)
    wanted = r"--train.batch-size is 16384, which does not fit into the 16 GiB .* that does, in steps of 32, is 4000$"
    with pytest.raises(ConfigError, match=wanted):
        report(tmp_path, train_size=2**20, batch_size=2**14, topology="v5e:2x2")
    assert len(tried) <= 10


def test_beginning_that_does_not_fit_is_refused(tmp_path, monkeypatch):
    def compile_step(step, slice_name, timeout):
        if step.beginning:
            raise DoesNotFit("RESOURCE_EXHAUSTED")
        return Figures(flops=1, bytes_accessed=1, peak_bytes=1, collectives={}, compile_seconds=1)

    monkeypatch.setattr(dry_run, "compile_step", compile_step)
    wanted = r"^what LTP begins with does not fit into the 16 GiB of a v5e chip on v5e:2x2, .* --mesh.fsdp splits"
    with pytest.raises(ConfigError, match=wanted):
        report(tmp_path, topology="v5e:2x2")


def test_batch_that_never_fits_is_refused(tmp_path, monkeypatch):
    def compile_step(step, slice_name, timeout):
        raise DoesNotFit("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(dry_run, "compile_step", compile_step)
    with pytest.raises(ConfigError, match=r"not even 32 does; --mesh.fsdp splits the parameters over chips"):
        report(tmp_path, topology="v5e:2x2")


def test_dry_run_without_a_slice(tmp_path):
    found = report(tmp_path)
    assert (found["parameters"], found["steps_per_epoch"]) == (40_570, 19)
    assert found["entry_bytes"] > found["entry_bytes_10x"] > found["prunable"] / 10 * 4
    # 144 and 4,608 weights are used at 64 positions, 18,432 at 16, and those of two dense layers once.
    assert found["macs"] == (144 + 4_608) * 64 + 18_432 * 16 + 16_384 + 640


def test_memory_estimate_grows_with_the_batch(tmp_path):
    small = report(tmp_path)
    large = report(tmp_path, batch_size=128)
    images = large["images_per_device"] - small["images_per_device"]
    grown = large["predicted_bytes"] - small["predicted_bytes"]
    assert grown % images == 0
    assert grown > 0


@pytest.mark.parametrize("name", ["v7:2x2", "v5e", "v5e:4", "v4:2x2", "v5e:0x4", "v5e:2x2x2"])
def test_unknown_topology_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=rf"--topology is {name}; accepted are v4:AxBxC .* v6e:AxB"):
        report(tmp_path, topology=name)


def test_batch_that_chips_cannot_share_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--train.batch-size is 66; accepted are multiples of the 16 devices"):
        report(tmp_path, batch_size=66, topology="v5e:4x4")


def test_batch_that_the_data_do_not_fill_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--train.batch-size is 64; the dataset has 63 images"):
        report(tmp_path, train_size=63)


@pytest.mark.parametrize("goal", [{"target_compression": 1e5}, {"target_density": 1e-5}, {"target_macs": 1e6}])
def test_target_that_the_network_cannot_meet_is_refused(tmp_path, goal):
    with pytest.raises(ConfigError, match=r"^the target of --ltp cannot be met: .*fewer than one weight"):
        report(tmp_path, ltp=LtpConfig(**goal))
    assert not (tmp_path / "dry_run.json").exists()


@pytest.mark.parametrize("fsdp", [3, 32])
def test_mesh_that_chips_cannot_form_is_refused(tmp_path, fsdp):
    with pytest.raises(ConfigError, match=rf"--mesh.fsdp is {fsdp}; accepted are divisors of the 16 devices"):
        report(tmp_path, mesh=MeshConfig(fsdp=fsdp), topology="v5e:4x4")


def found_in(hlo, chips=8):
    return {kind: dataclasses.astuple(row) for kind, row in collectives(hlo, chips).items()}


def test_collectives_of_a_program():
    """Between all of 8 chips: 7/8 of the bytes are sent, and twice that by what reduces for all."""
    hlo = """
      %a = (f32[64]{0:T(128)S(1)}, bf16[2,4]{1,0}) all-reduce(%x, %y), channel_id=1
      %b = f32[10]{0} all-reduce-start(%z), channel_id=2
      %d = f32[10]{0} all-reduce-done(%b)
      %e = f32[16384]{0} all-gather(%w), channel_id=4
      %f = (f32[4], f32[4]) collective-permute-start(%v), source_target_pairs={{0,1},{1,0}}
    """
    assert found_in(hlo) == {
        "all-reduce": (2, 272 + 40, 476 + 70),
        "all-gather": (1, 65_536, 57_344),
        "collective-permute": (1, 16, 16),
    }


@pytest.mark.parametrize(
    ("dtype", "width"), [("pred", 1), ("s8", 1), ("f8e4m3fn", 1), ("bf16", 2), ("u16", 2), ("f32", 4), ("u64", 8)]
)
def test_bytes_of_an_element(dtype, width):
    assert found_in(f"%a = {dtype}[10,3]{{1,0}} collective-permute(%v)") == {
        "collective-permute": (1, 30 * width, 30 * width)
    }


def test_asynchronous_forms_count_as_the_others():
    """What starts one gives back its operands and marks of the runtime beside the results."""
    for gather in (
        "f32[16384]{0} all-gather(%w), replica_groups={{0,1,2,3},{4,5,6,7}}",
        "(f32[4096]{0}, f32[16384]{0}) all-gather-start(%w), replica_groups={{0,1,2,3},{4,5,6,7}}",
        "((f32[1024], f32[3072]), (f32[4096], f32[12288])) all-gather-start(%v, %w), replica_groups=[2,4]<=[8]",
    ):
        assert found_in(f"%a = {gather}") == {"all-gather": (1, 65_536, 49_152)}
    for scatter in (
        "f32[2048]{0} reduce-scatter(%w), replica_groups=[1,8]<=[8]",
        "((f32[16384]{0}), f32[2048]{0}, u32[], u32[]) reduce-scatter-start(%w), replica_groups={}",
    ):
        assert found_in(f"%a = {scatter}") == {"reduce-scatter": (1, 65_536, 57_344)}


@pytest.mark.parametrize(
    ("groups", "n"),
    [
        ("{{0,1},{2,3}}", 2),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", 2),
        ("mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_0','axis_2'}", 4),
        ("{}", 8),
    ],
)
def test_a_ring_goes_through_the_group_of_its_operation(groups, n):
    hlo = f"%a = f32[8]{{0}} all-reduce(%x), channel_id=1, replica_groups={groups}, use_global_device_ids=true"
    assert found_in(hlo) == {"all-reduce": (1, 32, 64 * (n - 1) // n)}


def test_an_operation_beside_computations_is_counted_once():
    """As the TPU compiler writes it: in the computation that starts it, those that go on meanwhile, and the last."""
    hlo = """
%fused_computation.1 (p: bf16[8]) -> (bf16[8], bf16[64], u32[]) {
  %all-gather.1 = bf16[64]{0} all-gather(%p), channel_id=6, replica_groups=[1,8]<=[8]
}
%fused_computation.2 (p: bf16[8]) -> bf16[64] {
  %all-gather.2 = bf16[64]{0} all-gather(%p), channel_id=6, replica_groups=[1,8]<=[8]
}
    """
    assert found_in(hlo) == {"all-gather": (1, 128, 112)}


def test_a_scattered_sum_is_no_sum_for_all():
    """A TPU program reduces as a whole in a computation of that name, of which each chip keeps a part."""
    hlo = """
%all-reduce-scatter (input: bf16[64]) -> bf16[8] {
  %all-reduce.1 = bf16[64]{0} all-reduce(%input), channel_id=3, replica_groups={{0,1,2,3,4,5,6,7}}
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %all-reduce.2 = f32[8]{0} all-reduce(%p), channel_id=4, replica_groups={{0,1,2,3,4,5,6,7}}
}
    """
    assert found_in(hlo) == {"all-reduce": (1, 32, 56), "reduce-scatter": (1, 128, 112)}


def test_roofline_charges_what_is_sent():
    rows = collectives("%a = f32[500]{0} all-gather(%x), replica_groups={{0,1},{2,3}}", 4)
    figures = Figures(flops=197e9, bytes_accessed=819e6, peak_bytes=0, collectives=rows, compile_seconds=0)
    found = dry_run.roofline(figures, topology("v5e:2x2"), batch_size=64, train_size=640)
    assert found["interconnect_seconds"] == pytest.approx(1000 / 200e9)
    assert found["compute_seconds"] == pytest.approx(1e-3)
    assert found["epoch_seconds"] == pytest.approx(1e-2)
