"""Images per CPU-second of the photograph loader, next to a tf.data pipeline on the same JPEGs.

    pip install tensorflow-cpu    # optional: without it the loader is measured alone
    python -m experiments.benchmarks.input_pipeline --data-dir=DIR

Both pipelines read files in the format that is native to them, shuffle, cut a random part out of each image, resize it
to a square, mirror every other one and batch uint8 pixels. tf.data decodes only the part that it needs
(`tf.image.decode_and_crop_jpeg`), the form that its guides recommend. All pipelines are measured in turns, several
times over, so that whatever else the machine does falls on all of them.

A CPU-second is a second of one core, over all threads of the process. The scaling over worker processes is in images
per second of wall time, and means something only on an idle machine with as many cores.
"""

import importlib.util
import io
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from PIL import Image
from rich.console import Console
from rich.table import Table

from experiments.data.dataset import DataError
from experiments.data.photographs import photographs
from experiments.data.tfds_source import Example, open_split
from experiments.data.tfds_writing import serialize, write_dataset
from experiments.ending import run_command
from experiments.options import ConfigError, read_options, require, require_local, require_writable
from experiments.record import write_whole

LOADER = "this loader"


@dataclass(frozen=True)
class Options:
    """What to measure."""

    data_dir: Path | None = None
    """The TFDS data directory; TFDS's own default if not given."""
    dataset: str = "clothing_small"
    """A TFDS image-classification dataset whose training images are JPEGs."""
    images: int = 1024
    """How many of its training images to use, over and over."""
    qualities: tuple[int, ...] = (90, 98)
    """JPEG qualities at which to measure the images enlarged to 500×375 too, the usual size of ImageNet's."""
    image_size: int = 224
    """Side of the resulting squares, in pixels."""
    batch_size: int = 64
    """Images of a batch."""
    batches: int = 10
    """Measured in each turn of each pipeline."""
    turns: int = 7
    """How many times each pipeline is measured."""
    workers: tuple[int, ...] = (1, 2)
    """Numbers of worker processes for the measurement of scaling; none leaves it out."""
    out: Path = Path("runs/input_pipeline.json")
    """Where the raw results go."""

    def check(self) -> None:
        """Raises ConfigError for the first option that is impossible."""
        require_local(self, "data_dir", "out")
        for name in ("images", "image_size", "batch_size", "batches", "turns"):
            value = getattr(self, name)
            require(value >= 1, f"--{name.replace('_', '-')}", value, "at least 1")
        for quality in self.qualities:
            if not 1 <= quality <= 100:
                raise ConfigError(f"--qualities has {quality}; accepted are 1 to 100")
        for workers in self.workers:
            if workers < 0:
                raise ConfigError(f"--workers has {workers}; accepted are 0 or more")


def main() -> None:
    """Measures, prints a table, writes the raw results."""
    options = read_options(Options, prog="python -m experiments.benchmarks.input_pipeline", description=__doc__)
    require_writable("--out", options.out)
    console = Console()
    if not _has_tensorflow():
        console.print("TensorFlow is not installed, so there is nothing to compare with: the loader is measured alone.")
    # Where things lie on this machine is nobody else's business.
    settings = {key: value for key, value in asdict(options).items() if key not in ("data_dir", "out")}
    results: dict[str, Any] = {"options": settings, "machine": _machine()}
    stored = open_split(options.dataset, options.data_dir, "train")
    stored = stored.read(range(min(options.images, len(stored))))
    sets = {f"{options.dataset}, as stored": stored}
    for quality in options.qualities:
        sets[f"{options.dataset}, enlarged to 500×375, JPEG quality {quality}"] = [
            Example(_enlarge(example.image, quality), example.label) for example in stored
        ]
    for title, examples in sets.items():
        with tempfile.TemporaryDirectory() as folder:
            results[title] = measured = _measure(examples, Path(folder), options)
        console.print(_throughput_table(title, measured))
        if options.workers:
            console.print(_scaling_table(measured))
    write_whole(options.out, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    console.print(f"Raw results: {options.out}", markup=False)


def _measure(examples: Sequence[Example], folder: Path, options: Options) -> dict[str, Any]:
    features = {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(num_classes=max(example.label for example in examples) + 1),
    }
    serialized = [serialize(example._asdict()) for example in examples]
    write_dataset(folder / "benchmark" / "1.0.0", features, {"train": serialized})

    def loader(workers: int = 0) -> Iterator[Any]:
        return photographs(
            "benchmark", str(folder), image_size=options.image_size, eval_split="train", workers=workers
        ).train(options.batch_size, seed=0)

    pipelines: dict[str, Callable[[], Iterator[Any]]] = {LOADER: loader}
    if _has_tensorflow():
        pipelines |= _tf_data_pipelines(serialized, folder, options)

    per_cpu_second: dict[str, list[float]] = {name: [] for name in pipelines}
    scaling: dict[int, list[float]] = {workers: [] for workers in options.workers}
    for _ in range(options.turns):
        for name, start in pipelines.items():
            per_cpu_second[name].append(_rate(start(), time.process_time, options))
        for workers, rates in scaling.items():
            rates.append(_rate(loader(workers), time.perf_counter, options))
    return {
        "mean_jpeg_bytes": round(statistics.mean(len(example.image) for example in examples)),
        "images_per_cpu_second": per_cpu_second,
        "images_per_second_by_workers": scaling,
    }


def _rate(stream: Iterator[Any], clock: Callable[[], float], options: Options) -> float:
    """Images per second of a clock, after the pipeline has started up."""
    for _ in range(4):
        next(stream)
    start = clock()
    for _ in range(options.batches):
        next(stream)
    return options.batches * options.batch_size / (clock() - start)


def _tf_data_pipelines(
    examples: Sequence[bytes], folder: Path, options: Options
) -> dict[str, Callable[[], Iterator[Any]]]:
    import tensorflow as tf

    path = str(folder / "examples.tfrecord")
    with tf.io.TFRecordWriter(path) as writer:
        for example in examples:
            writer.write(example)
    size = options.image_size

    def prepare(serialized: Any, antialias: bool, dct_method: str) -> Any:
        features = {"image": tf.io.FixedLenFeature([], tf.string), "label": tf.io.FixedLenFeature([], tf.int64)}
        example = tf.io.parse_single_example(serialized, features)
        begin, extent, _ = tf.image.sample_distorted_bounding_box(
            tf.image.extract_jpeg_shape(example["image"]),
            tf.zeros([1, 0, 4], tf.float32),
            area_range=(0.08, 1.0),
            aspect_ratio_range=(3 / 4, 4 / 3),
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        box = tf.concat([begin[:2], extent[:2]], axis=0)
        image = tf.image.decode_and_crop_jpeg(example["image"], box, channels=3, dct_method=dct_method)
        image = tf.image.resize(image, [size, size], antialias=antialias)
        image = tf.image.random_flip_left_right(tf.cast(tf.round(image), tf.uint8))
        return {"image": image, "label": tf.cast(example["label"], tf.int32)}

    def start(antialias: bool, dct_method: str) -> Iterator[Any]:
        dataset = tf.data.TFRecordDataset(path).cache().shuffle(len(examples)).repeat()
        dataset = dataset.map(lambda x: prepare(x, antialias, dct_method), num_parallel_calls=tf.data.AUTOTUNE)
        return iter(dataset.batch(options.batch_size).prefetch(tf.data.AUTOTUNE))

    return {
        "tf.data": lambda: start(False, ""),
        "tf.data, fast inexact DCT": lambda: start(False, "INTEGER_FAST"),
        "tf.data, antialiased": lambda: start(True, ""),
    }


def _enlarge(encoded: bytes, quality: int) -> bytes:
    """Scales an image until its sides are at least 500 and 375 pixels, and cuts out the middle."""
    try:
        image = Image.open(io.BytesIO(encoded)).convert("RGB")
    except OSError as error:
        raise DataError(f"one of the images cannot be enlarged: {error}; choose another --dataset") from error
    width, height = (500, 375) if image.width >= image.height else (375, 500)
    scale = max(width / image.width, height / image.height)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    buffer = io.BytesIO()
    image.crop((left, top, left + width, top + height)).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _throughput_table(title: str, measured: dict[str, Any]) -> Table:
    table = Table(title=f"{title}: {measured['mean_jpeg_bytes'] / 1000:.0f} kB a file", title_justify="left")
    for column in ("pipeline", "images per CPU-second, median", "lowest", "highest", "loader / pipeline, median"):
        table.add_column(column, justify="left" if column == "pipeline" else "right")
    ours = measured["images_per_cpu_second"][LOADER]
    for name, rates in measured["images_per_cpu_second"].items():
        ratio = statistics.median(a / b for a, b in zip(ours, rates, strict=True))
        table.add_row(name, f"{statistics.median(rates):.0f}", f"{min(rates):.0f}", f"{max(rates):.0f}", f"{ratio:.2f}")
    return table


def _scaling_table(measured: dict[str, Any]) -> Table:
    table = Table()
    for column in ("worker processes", "images per second, median", "lowest", "highest"):
        table.add_column(column, justify="right")
    for workers, rates in measured["images_per_second_by_workers"].items():
        table.add_row(str(workers), f"{statistics.median(rates):.0f}", f"{min(rates):.0f}", f"{max(rates):.0f}")
    return table


def _has_tensorflow() -> bool:
    return importlib.util.find_spec("tensorflow") is not None


def _machine() -> dict[str, Any]:
    packages = ["grain", "simplejpeg", "opencv-python-headless", "pillow", "numpy"]
    packages += ["tensorflow-cpu"] if _has_tensorflow() else []
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "unknown"
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": versions,
    }


if __name__ == "__main__":
    run_command(main)
