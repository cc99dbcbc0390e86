"""The published weights that a run of the ImageNet command begins from, and what images they want."""

import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments.console import log
from experiments.data.dataset import Dataset
from experiments.data.photographs import is_imagenet
from experiments.imagenet_config import ImagenetConfig
from experiments.options import ConfigError
from experiments.run import Start
from ltp_jax import models, pretrained
from ltp_jax.pretrained import WeightSettings


def weight_settings(config: ImagenetConfig) -> WeightSettings:
    """The settings of the weights that the options name, before the weights are read: the most likely ones.

    Raises:
      ConfigError: if no published weights of the network have that origin.
    """
    rows = pretrained.settings(config.arch)
    named = [row for row in rows if config.origin is None or row.origin == config.origin]
    if not named:
        origins = ", ".join(row.origin for row in rows)
        raise ConfigError(f"--origin is {config.origin}; accepted for {config.arch} are {origins}")
    return named[0] if config.pretrained is None else pretrained.likeliest(named, config.pretrained)


def planned_settings(config: ImagenetConfig) -> WeightSettings:
    """The settings of a dry run, which needs no weights and no dense network, but looks at them where they are.

    Raises:
      ConfigError: if the run itself would be refused for them.
    """
    if config.pretrained is not None and config.pretrained.exists():
        return read_weights(config.pretrained, config).settings
    return dense_settings(config) if config.dense is not None and config.dense.is_dir() else weight_settings(config)


def dense_settings(config: ImagenetConfig) -> WeightSettings:
    """The settings of a run without ``--pretrained``: those of the run that ``--dense`` is from.

    Raises:
      ConfigError: if several sorts of weights exist and nothing says which these are.
    """
    rows = pretrained.settings(config.arch)
    if config.dense is None or config.origin is not None or len(rows) == 1:
        return weight_settings(config)
    path = config.dense.parent / "config.json"
    try:
        origin = json.loads(path.read_text())["origin"]
    except (OSError, ValueError, KeyError, TypeError):
        origin = None
    if origin is None:
        raise ConfigError(
            f"--origin is missing: {path} does not say whose weights --dense began from, and so what images they want; "
            f"accepted for {config.arch} are {', '.join(row.origin for row in rows)}"
        )
    if origin not in [row.origin for row in rows]:
        raise ConfigError(
            f"--dense began from weights of {origin}, by {path}; of {config.arch} there are none of these"
        )
    return weight_settings(dataclasses.replace(config, origin=origin))


class Weights(NamedTuple):
    """Published weights, read from a file.

    Attributes:
      path: the file.
      variables: ``params`` and ``batch_stats``, with the head that was published.
      settings: whose weights they are, and what images they want.
      others: whose they might be as well, for all that the file and its name tell.
      digest: of the file.
    """

    path: Path
    variables: dict[str, Any]
    settings: WeightSettings
    others: tuple[str, ...]
    digest: str


def read_weights(path: Path, config: ImagenetConfig) -> Weights:
    """Reads the file of ``--pretrained``.

    Raises:
      ConfigError: if the file is not there, cannot be read, or is not of this network.
    """
    try:
        variables, settings = pretrained.load(path, config.arch, origin=config.origin)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"--pretrained is {path}, which cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"--pretrained: {error}") from error
    others = () if config.origin is not None else pretrained.alternatives(path, settings)
    return Weights(path, variables, settings, others, digest)


def start_from(weights: Weights, config: ImagenetConfig, dataset: Dataset) -> Start:
    """What a run on a dataset begins from.

    A dataset with another number of classes than the weights gets a new head, and training before it is pruned.
    """
    settings = weights.settings
    fits = dataset.num_classes == models.spec(config.arch).num_classes
    published = (
        is_imagenet(dataset.name)
        and config.eval_split in (None, "validation")
        and config.image_size in (None, settings.input_size)
    )
    return Start(
        functools.partial(_network, weights, config, None if fits else dataset.num_classes),
        trained=fits,
        expected_top1=settings.top1 if fits and published else None,
        digest=weights.digest,
    )


def _network(weights: Weights, config: ImagenetConfig, num_classes: int | None) -> dict[str, Any]:
    """The network of the weights, with a new head if a number of classes is given, and a word of it to the log."""
    settings = weights.settings
    log.info(
        "weights: %s of %s (%s): the middle %d px of images resized to %d, %s, top-1 %s",
        config.arch,
        settings.origin,
        settings.release,
        settings.input_size,
        settings.resize_size,
        settings.interpolation,
        "not published" if settings.top1 is None else f"{settings.top1} % as published",
    )
    if weights.others:
        log.warning(
            "weights: nothing in %s or its name tells whether they are of %s; %s is assumed, --origin says it",
            weights.path,
            " or ".join((settings.origin, *weights.others)),
            settings.origin,
        )
    if num_classes is None:
        return weights.variables
    key = jax.random.key(config.seed)
    fresh, _ = pretrained.load(weights.path, config.arch, origin=settings.origin, num_classes=num_classes, head_key=key)
    return fresh
