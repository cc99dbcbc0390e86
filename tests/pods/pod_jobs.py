"""Jobs of several processes on this machine: each has devices of its own, and they talk over the loopback."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from ltp_jax.checkpoints import restore_network
from ltp_jax.trail import Trail
from ltp_jax.trees import named_leaves

ROOT = Path(__file__).parents[2]
# Nine steps an epoch, in three epochs of pruning after one of training. Small steps and wide masks: what the usual
# settings make of so short a run depends on the last bit of every sum.
TINY = (
    "--pretrain.epochs=1",
    "--pretrain.warmup-epochs=0",
    "--pretrain.batch-size=128",
    "--train.epochs=3",
    "--train.warmup-epochs=0",
    "--train.batch-size=128",
    "--train.learning-rate=0.001",
    "--ltp.target-compression=None",
    "--ltp.penalty=10",
    "--ltp.reach=1",
    "--ltp.t0=1",
)
PATIENCE = 400  # seconds after which a job counts as hanging, however busy the machine


class Ended(NamedTuple):
    code: int
    stdout: str
    stderr: str


class Jobs:
    """Starts jobs, whose processes share one cache of compiled programs."""

    def __init__(self, cache: Path):
        self.environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "PYTHONPATH": str(ROOT),
        }

    def __call__(
        self,
        workdir: Path,
        *words: str,
        processes: int = 1,
        devices: int = 1,
        signals: dict[int, dict[str, str]] | None = None,
    ) -> list[Ended]:
        """Runs the digits experiment to its end.

        ``devices`` are those of each process; ``signals`` is the environment of ``worker.py`` for some of them.
        """
        script = str(Path(__file__).parent / "worker.py")
        command = [sys.executable, script, "--workdir", str(workdir), *TINY, *words]
        return self.start(command, processes, devices, signals or {})

    def start(
        self, command: list[str], processes: int, devices: int, signals: dict[int, dict[str, str]]
    ) -> list[Ended]:
        port = free_port()
        running = []
        for i in range(processes):
            words = (
                [
                    f"--distributed.coordinator-address=127.0.0.1:{port}",
                    f"--distributed.num-processes={processes}",
                    f"--distributed.process-id={i}",
                ]
                if processes > 1
                else []
            )
            environment = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", **signals.get(i, {})}
            running.append(
                subprocess.Popen(
                    [*command, *words],
                    cwd=ROOT,
                    env=self.environment | environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        ended, deadline = [], time.monotonic() + PATIENCE
        try:
            for process in running:
                out, err = process.communicate(timeout=max(deadline - time.monotonic(), 1))
                ended.append(Ended(process.returncode, out, err))
        finally:
            for process in running:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        return ended


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def codes(ended: list[Ended]) -> list[int]:
    return [process.code for process in ended]


def assert_all_done(ended: list[Ended]) -> None:
    assert codes(ended) == [0] * len(ended), "\n".join(process.stderr[-3000:] for process in ended)


def metrics(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def final_bits(workdir: Path) -> dict[str, bytes]:
    trail = Trail(workdir)
    return {name: np.asarray(leaf).tobytes() for name, leaf in named_leaves(trail.restore(trail.entries[-1]))}


def assert_trail_is_whole(workdir: Path, epochs: int = 3) -> None:
    """Each epoch has its entry, which can be read, and nothing half written or told twice lies about."""
    trail = Trail(workdir)
    assert trail.epochs == tuple(range(epochs + 1))
    for entry in trail.entries:
        network = trail.restore(entry)
        kept = sum(int(np.count_nonzero(w)) for path, w in named_leaves(network["params"]) if path in entry.densities)
        total = sum(w.size for path, w in named_leaves(network["params"]) if path in entry.densities)
        assert kept / total == pytest.approx(entry.density)
    assert not [path.name for path in workdir.rglob("*orbax-checkpoint-tmp*")]
    assert not (workdir / "pretrain").exists()
    told = [(row["stage"], row["kind"], row["step"]) for row in metrics(workdir)]
    assert len(told) == len(set(told))
    assert [row["epoch"] for row in metrics(workdir) if row["kind"] == "entry"] == list(range(epochs + 1))
    assert restore_network(workdir / "dense")["params"]


def assert_same_numbers(workdir: Path, other: Path, tolerance: float = 1e-5) -> None:
    """Losses, thresholds, accuracies and networks of two runs are equal up to float rounding."""
    for a, b in zip(metrics(workdir), metrics(other), strict=True):
        assert {key: a[key] for key in ("stage", "kind", "step")} == {key: b[key] for key in ("stage", "kind", "step")}
        assert a["loss"] == pytest.approx(b["loss"], rel=tolerance), (a["stage"], a["step"])
    for a, b in zip(Trail(workdir).entries, Trail(other).entries, strict=True):
        assert a.thresholds == pytest.approx(b.thresholds, rel=tolerance, abs=1e-9)
        assert a.soft_loss == pytest.approx(b.soft_loss, rel=tolerance)
        # A weight or an image on the border may fall to either side.
        assert a.density == pytest.approx(b.density, abs=1e-4)
        assert a.top1 == pytest.approx(b.top1, abs=0.2)
        network, other_network = Trail(workdir).restore(a), Trail(other).restore(b)
        other_leaves = dict(named_leaves(other_network))
        assert [name for name, _ in named_leaves(network)] == list(other_leaves)
        sizes = {path: w.size for path, w in named_leaves(network["params"])}
        for path, density in a.densities.items():
            assert density * sizes[path] == pytest.approx(b.densities[path] * sizes[path], abs=2), (a.epoch, path)
        for name, leaf in named_leaves(network):
            kept = (leaf != 0) & (other_leaves[name] != 0)
            np.testing.assert_allclose(
                leaf[kept], other_leaves[name][kept], rtol=1e-4, atol=1e-5, err_msg=f"epoch {a.epoch}, {name}"
            )
