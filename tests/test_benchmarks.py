"""The benchmarks' command lines and what they write; what they measure is not repeated here."""

import json
import math
import os
import shlex
import signal
import sys
import threading
import time

import jax
import pytest
import tyro

from experiments.ahead_of_time import CompileError, Figures
from experiments.benchmarks import input_pipeline, lean_step, rows, seeds, targets
from experiments.ending import START_AGAIN, Preempted, RunError, stops_when_asked
from experiments.options import ConfigError
from tests.entries import entry


@pytest.mark.parametrize(
    ("benchmark", "words", "message"),
    [
        (lean_step, ["time", "--arch=foo"], "^--arch is foo; accepted are digits, lenet_300_100, "),
        (lean_step, ["time", "--steps=0"], "^--steps is 0; accepted is at least 1"),
        (lean_step, ["time", "--batch-size=0"], "^--batch-size is 0; accepted is at least 1"),
        (lean_step, ["time", "--arch=alexnet", "--image-size=62"], "^--image-size is 62; accepted is at least 63"),
        (lean_step, ["compile", "--arch", "resnet50", "foo"], "^--arch is foo; accepted are digits, lenet_300_100, "),
        (lean_step, ["compile", "--methods", "foo"], "^--methods has foo; accepted are dense, penalty, target"),
        (lean_step, ["compile", "--methods"], "^--methods is empty; accepted is one or more"),
        (lean_step, ["compile", "--images-per-chip=0"], "^--images-per-chip is 0; accepted is at least 1"),
        (lean_step, ["compile", "--timeout=inf"], "^--timeout is inf; accepted is more than 0, and finite"),
        (lean_step, ["compile", "--out=gs://bucket/r.json"], "^--out is gs:/bucket/r.json; accepted is a path of this"),
        (lean_step, ["time", "--out=gs://bucket/r.json"], "^--out is gs:/bucket/r.json; accepted is a path of this"),
        (targets, ["--arch", "foo"], "^--arch is foo; accepted are digits, lenet_300_100, "),
        (targets, ["--arch", "alexnet", "--image-size=62"], "^--image-size is 62; accepted is at least 63 for alexnet"),
        (targets, ["--compressions", "1"], "^--compressions has 1; accepted is a finite number, more than 1"),
        (targets, ["--macs", "inf"], "^--macs has inf; accepted is a finite number, more than 1"),
        (targets, ["--steps=9"], "^--steps is 9; accepted is at least 10"),
        (targets, ["--batch-size=65"], "^--batch-size is 65; accepted is 1 to 64"),
        (seeds, ["--workdir=gs://bucket"], "^--workdir: gs:/bucket is no path of a file system; accepted"),
        (input_pipeline, ["--data-dir=gs://bucket"], "^--data-dir is gs:/bucket; accepted is a path of this machine"),
        (seeds, ["--seeds"], "^--seeds is empty; accepted is one or more"),
        (seeds, ["--seeds", "1", "2", "1"], "^--seeds has one of them twice; accepted is each once"),
        (seeds, ["--options=--workdir=a"], "^--options is --workdir=a; accepted is an option of the experiment but"),
        (seeds, ["--out=/dev/null/a"], "^--out is /dev/null/a, which cannot be written: /dev/null is a file"),
        (seeds, ["--out=/"], "^--out is /, which cannot be written: Is a directory"),
        (targets, ["--seed=-1"], "^--seed has -1; accepted is 0 to 4294967295"),
        (targets, ["--out=/proc/a/r.json"], "^--out is /proc/a/r.json, which cannot be written: No such file"),
        (
            lean_step,
            ["compile", "--out=experiments/results/lean_step_time.json"],
            "^--out is .*, which holds no results of this benchmark .a row lacks bytes_accessed, collectives",
        ),
        (input_pipeline, ["--out=/proc/a/r.json"], "^--out is /proc/a/r.json, which cannot be written: No such file"),
        (input_pipeline, ["--turns=0"], "^--turns is 0; accepted is at least 1"),
        (input_pipeline, ["--qualities", "90", "101"], "^--qualities has 101; accepted are 1 to 100"),
        (input_pipeline, ["--workers", "-1"], "^--workers has -1; accepted are 0 or more"),
    ],
)
def test_impossible_options_are_one_message(benchmark, words, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *words])
    with pytest.raises(ConfigError, match=message):
        benchmark.main()


@pytest.mark.parametrize("benchmark", [input_pipeline, lean_step, seeds, targets])
def test_help_names_the_command(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--help"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert capsys.readouterr().out.startswith(f"usage: python -m {benchmark.__name__} ")


def test_times_are_added_to_those_that_are_there(tmp_path, monkeypatch):
    out = tmp_path / "time.json"
    words = ["time", "--arch=lenet_300_100", "--batch-size=8", "--steps=1", f"--out={out}"]
    before = {"arch": "lenet_300_100", "image_size": 28, "batch_size": 8, "device": jax.devices()[0].device_kind}
    before |= dict.fromkeys(("seconds", "median_seconds", "ratio_to_dense"))
    rows.write(out, [before])
    monkeypatch.setattr(sys, "argv", ["lean_step.py", *words])
    monkeypatch.setattr(lean_step, "COMPARED", ("dense",))  # which is soon compiled
    lean_step.main()
    kept, added = json.loads(out.read_text())
    assert kept == before
    assert all(added[name] == before[name] for name in ("arch", "image_size", "batch_size", "device"))
    assert list(added["median_seconds"]) == ["dense"]


@pytest.mark.parametrize("text", ["{", "{}", "[1]", '[{"arch": "digits"}]'])
def test_file_of_something_else_is_refused_before_anything_is_measured(tmp_path, text):
    (tmp_path / "time.json").write_text(text)
    with pytest.raises(ConfigError, match=r"--out is .*time\.json, which holds no results of this benchmark"):
        lean_step.run_time(lean_step.Time(arch="digits", out=tmp_path / "time.json"))
    assert (tmp_path / "time.json").read_text() == text


def test_compiled_steps_are_added_and_not_compiled_again(tmp_path, monkeypatch):
    compiled = []

    def compile_step(step, slice_name, timeout):
        compiled.append(step.ltp)
        return Figures(flops=1.0, bytes_accessed=1.0, peak_bytes=1, collectives={}, compile_seconds=1.0)

    monkeypatch.setattr(lean_step, "compile_step", compile_step)
    for methods in (("dense",), ("dense", "target")):
        lean_step.run_compile(lean_step.Compile(arch=("digits",), methods=methods, out=tmp_path / "compile.json"))
    assert compiled == [None, lean_step.METHODS["target"]]
    assert [row["method"] for row in json.loads((tmp_path / "compile.json").read_text())] == ["dense", "target"]


def test_steps_that_are_not_compiled_are_an_error_after_the_others(tmp_path, monkeypatch, capsys):
    def compile_step(step, slice_name, timeout):
        if step.ltp is None:
            raise CompileError("no memory")
        return Figures(flops=1.0, bytes_accessed=1.0, peak_bytes=1, collectives={}, compile_seconds=1.0)

    monkeypatch.setattr(lean_step, "compile_step", compile_step)
    options = lean_step.Compile(arch=("digits",), methods=("dense", "target"), out=tmp_path / "compile.json")
    with pytest.raises(RunError, match=r"^1 of 2 steps were not compiled, as said above$"):
        lean_step.run_compile(options)
    assert "digits dense: no memory" in capsys.readouterr().out
    assert [row["method"] for row in json.loads(options.out.read_text())] == ["target"]


def test_table_of_compiled_steps_has_ratios_to_the_dense_step_of_the_same_kind():
    row = {"arch": "digits", "topology": "v5e:4x4", "images_per_chip": 256, "collectives": {"all-reduce": {"count": 3}}}
    dense = row | {"method": "dense", "flops": 2e9, "bytes_accessed": 4e9, "peak_bytes": 1e9}
    target = row | {"method": "target", "flops": 3e9, "bytes_accessed": 5e9, "peak_bytes": 1e9}
    _, _, *told = lean_step.compile_table([dense, target]).splitlines()
    assert told == [
        "| digits | dense | 2.00 | 4.00 | 1.00 | 3 |",
        "| digits | target | 3.00 (1.5000) | 5.00 (1.2500) | 1.00 (1.0000) | 3 |",
    ]
    for others in ([], [dense | {"images_per_chip": 128}]):
        *_, last = lean_step.compile_table([*others, target]).splitlines()
        assert last == "| digits | target | 3.00 | 5.00 | 1.00 | 3 |"


def test_targets_are_met_and_runs_that_are_there_are_not_run_again(tmp_path, monkeypatch, capsys):
    words = ["--arch", "digits", "--image-size=8", "--steps=12", f"--out={tmp_path / 'targets.json'}"]
    monkeypatch.setattr(sys, "argv", ["targets.py", *words, "--compressions", "20", "--macs", "4"])
    targets.main()
    by_weights, by_macs = json.loads((tmp_path / "targets.json").read_text())
    weights = 40_208  # of the five kernels
    assert by_weights["achieved"] == pytest.approx(weights / math.floor(weights / 20), rel=1e-6)
    assert by_macs["achieved"] == pytest.approx(4, rel=0.01)
    for row in (by_weights, by_macs):
        assert row["shares"][-1] == pytest.approx(1 / row["achieved"], rel=1e-5)
        assert len(row["shares"]) == 12
    # The descent takes the first six of the twelve steps.
    off_plan = [math.log(share * 20 ** (1 - max(1 - t / 6, 0) ** 3)) for t, share in enumerate(by_weights["shares"], 1)]
    assert by_weights["largest_factor_off_plan"] == pytest.approx(math.exp(max(map(abs, off_plan))), rel=1e-4)
    told = capsys.readouterr().out
    monkeypatch.setattr(targets, "run", lambda *args: pytest.fail("was run again"))
    targets.main()
    assert capsys.readouterr().out == told


def test_seeds_records_the_command_that_it_was_and_writes_beside_the_runs(tmp_path, monkeypatch):
    class Trail:
        entries = (entry(0, top1=50.0),)

        def __init__(self, path):
            assert path == tmp_path / "my runs" / "digits-3"

    commands = []

    def ended(command):
        commands.append(command)
        return 0

    monkeypatch.setattr(seeds, "Trail", Trail)
    monkeypatch.setattr(seeds, "ended", ended)
    words = [
        "--seeds",
        "3",
        "--workdir",
        str(tmp_path / "my runs"),
        "--options=--ltp.leak=0",
        "--options=--tensorboard",
    ]
    monkeypatch.setattr(sys, "argv", ["seeds.py", *words])
    seeds.main()
    written = json.loads((tmp_path / "my runs" / "digits.json").read_text())
    assert written["mean"]["top1"] == 50.0
    assert shlex.split(written["command"]) == ["python", "-m", "experiments.benchmarks.seeds", *words]
    of_the_run = ["--seed", "3", "--workdir", str(tmp_path / "my runs" / "digits-3")]
    assert commands[0][3:] == ["--ltp.leak=0", "--tensorboard", *of_the_run]


def test_a_run_of_seeds_that_is_to_stop_has_time_to_save(tmp_path):
    child = """
import signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), (folder / "saved").touch(), sys.exit(75)))
(folder / "began").touch()
time.sleep(60)
"""

    def ask():
        while not (tmp_path / "began").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=ask)
    asking.start()
    with stops_when_asked(), pytest.raises(Preempted):
        seeds.ended([sys.executable, "-c", child, str(tmp_path)])
    asking.join()
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize(("code", "error"), [(START_AGAIN, Preempted), (1, RunError)])
def test_seeds_ends_as_its_run_does(tmp_path, monkeypatch, code, error):
    monkeypatch.setattr(seeds, "ended", lambda command: code)
    monkeypatch.setattr(sys, "argv", ["seeds.py", f"--workdir={tmp_path}"])
    with pytest.raises(error, match="the run with seed 0"):
        seeds.main()


def test_seeds_tells_the_means_of_the_last_networks(tmp_path, monkeypatch, capsys):
    trails = {
        "digits-3": (entry(0, 1.0, 90.0, soft_top1=90.0), entry(1, 8.0, 89.5, soft_top1=88.75)),
        "digits-4": (entry(0, 1.0, 92.0), entry(1, 8.0, 94.0), entry(2, 16.0, 91.0, soft_top1=91.25)),
    }

    class Trail:
        def __init__(self, path):
            self.entries = trails[path.name]

    started = []
    monkeypatch.setattr(seeds, "Trail", Trail)
    monkeypatch.setattr(seeds, "ended", lambda words: started.append(words) or 0)
    words = ["--seeds", "3", "4", "--workdir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["seeds.py", *words])
    seeds.main()
    written = json.loads((tmp_path / "digits.json").read_text())
    assert written["mean"] == {"compression": 12.0, "top1": 90.25, "drop": 0.75, "largest_gap": 0.75}
    assert [run["last"]["top1"] for run in written["runs"]] == [89.5, 91.0]
    assert "mean: 12.00×, +0.75 ± 0.35 points below dense" in capsys.readouterr().out
    assert [words[words.index("--seed") + 1] for words in started] == ["3", "4"]


def test_the_example_of_seeds_can_be_typed():
    (example,) = (line.strip() for line in (seeds.__doc__ or "").splitlines() if f"{seeds.PROG} --" in line)
    options = tyro.cli(seeds.Seeds, args=shlex.split(example.removeprefix(seeds.PROG)))
    assert options.options == ("--data-dir=/data/tfds",)
