"""The TPU compiler on a small network, and what a dry run tells and refuses. No TPU is needed, libtpu is."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax.numpy as jnp
import pytest

from experiments import dry_run
from experiments.ahead_of_time import CompileError, DoesNotFit, Step, collectives, compile_step, needed_bytes
from experiments.chips import topology
from experiments.config import ConfigError, LtpConfig, MeshConfig, TrainConfig
from ltp_jax import models

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the compiler for TPUs, is not installed"
)


@dataclasses.dataclass(frozen=True)
class Options:
    workdir: Path
    arch: str = "digits"
    train: TrainConfig = TrainConfig(epochs=2, batch_size=64, learning_rate=0.1)
    ltp: LtpConfig = LtpConfig()
    mesh: MeshConfig = MeshConfig()
    image_size: int | None = None
    topology: str | None = None


def module():
    return models.create("digits", num_classes=10, dtype=jnp.bfloat16)


@needs_libtpu
def test_dry_run_compiles_for_a_slice(tmp_path, capsys):
    dry_run.report(Options(tmp_path, topology="v5e:2x2"), module(), train_size=1257)
    found = json.loads((tmp_path / "dry_run.json").read_text())
    assert found["devices"] == 4
    for side in (found["ltp"], found["dense"]):
        assert side["flops"] > 0
        assert 0 < side["peak_bytes"] < topology("v5e:2x2").chip.memory
        assert side["bytes_accessed"] > 0
        assert side["collectives"]["all-reduce"]["bytes"] > 2 * found["parameters"]  # of gradients, at least bfloat16
        assert side["images_per_second"] > 0
    assert found["ltp"]["collectives"]["all-reduce"]["count"] == found["dense"]["collectives"]["all-reduce"]["count"]
    assert "the compiler's figures" in capsys.readouterr().out


@needs_libtpu
def test_compilation_that_does_not_end_is_told(tmp_path):
    step = Step(
        module=module(),
        train=Options.train,
        ltp=None,
        image_shape=(8, 8, 1),
        train_size=1257,
        fsdp=1,
        topology="v5e:2x2",
    )
    with pytest.raises(CompileError, match=r"v5e:2x2 did not end within 0\.1 s"):
        compile_step(step, timeout=0.1)


@pytest.mark.parametrize("mebibytes", [15, 17, 400])
def test_batch_that_does_not_fit_is_refused_with_the_largest(tmp_path, monkeypatch, mebibytes):
    """A compiler that takes up to 1,000 images a chip, whatever it said that an image needs."""

    def compile_step(step, timeout):
        images = step.train.batch_size // 4
        tried.append(images)
        if images > 1000:
            raise DoesNotFit("RESOURCE_EXHAUSTED", needed=images * mebibytes * 2**20)

    tried = []
    monkeypatch.setattr(dry_run, "compile_step", compile_step)
    options = Options(tmp_path, train=dataclasses.replace(Options.train, batch_size=2**14), topology="v5e:2x2")
    wanted = r"--train.batch-size is 16384, which does not fit into the 16 GiB .* that does, in steps of 32, is 4000$"
    with pytest.raises(ConfigError, match=wanted):
        dry_run.report(options, module(), train_size=2**20)
    assert len(tried) < 20


def test_batch_that_never_fits_is_refused(tmp_path, monkeypatch):
    def compile_step(step, timeout):
        raise DoesNotFit("RESOURCE_EXHAUSTED", needed=None)

    monkeypatch.setattr(dry_run, "compile_step", compile_step)
    with pytest.raises(ConfigError, match=r"not even 32 does; --mesh.fsdp splits the parameters over chips"):
        dry_run.report(Options(tmp_path, topology="v5e:2x2"), module(), train_size=1257)


def test_memory_that_the_compiler_asks_for():
    message = "the total memory required for HLO temporaries (772.25G) exceeds available HBM (15.75G)."
    assert needed_bytes(message) == 772.25 * 2**30
    assert needed_bytes("Ran out of memory in memory space hbm. Used 20.50M of 15.75G hbm.") == 20.5 * 2**20
    assert needed_bytes("no figure") is None


def test_dry_run_without_a_slice(tmp_path):
    found = dry_run.report(Options(tmp_path), module(), train_size=1257)
    assert (found["parameters"], found["steps_per_epoch"]) == (40_570, 19)
    assert found["entry_bytes"] > found["entry_bytes_10x"] > found["prunable"] / 10 * 4
    # 144 weights used at 64 positions, 4,608 and 18,432 at 16, and two dense layers.
    assert found["macs"] > 16_384 + 640


def test_memory_estimate_grows_with_the_batch(tmp_path):
    small = dry_run.report(Options(tmp_path), module(), train_size=1257)
    train = dataclasses.replace(Options.train, batch_size=128)
    large = dry_run.report(Options(tmp_path, train=train), module(), train_size=1257)
    images = large["images_per_device"] - small["images_per_device"]
    grown = large["predicted_bytes"] - small["predicted_bytes"]
    assert grown % images == 0
    assert grown > 0


@pytest.mark.parametrize("name", ["v7:2x2", "v5e", "v5e:4", "v4:2x2", "v5e:0x4", "v5e:2x2x2"])
def test_unknown_topology_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=rf"--topology is {name}; accepted are v4:AxBxC .* v6e:AxB"):
        dry_run.report(Options(tmp_path, topology=name), module())


def test_batch_that_chips_cannot_share_is_refused(tmp_path):
    train = dataclasses.replace(Options.train, batch_size=66)
    with pytest.raises(ConfigError, match=r"--train.batch-size is 66; accepted are multiples of the 16 devices"):
        dry_run.report(Options(tmp_path, train=train, topology="v5e:4x4"), module())


def test_collectives_of_a_program():
    hlo = """
      %a = (f32[64]{0:T(128)S(1)}, bf16[2,3]{1,0}) all-reduce(%x, %y), channel_id=1
      %b = f32[10]{0} all-reduce-start(%z), channel_id=2
      %c = (f32[4]{0}, f32[8]{0}) all-gather-start(%w), channel_id=3
      %d = f32[10]{0} all-reduce-done(%b)
    """
    found = {kind: dataclasses.astuple(row) for kind, row in collectives(hlo).items()}
    assert found == {"all-reduce": (2, 64 * 4 + 6 * 2 + 40), "all-gather": (1, 24)}
