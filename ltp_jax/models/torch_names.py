"""The names that PyTorch libraries give to our parameters, as tables of patterns over our paths.

A pattern matches a path without its last part; the first that matches gives the name of the PyTorch module. In a
template, ``{stage}`` and ``{index}`` are the numbers in ``block{stage}_{index}``, ``{below}`` is one less than the
stage, ``{flat}`` counts blocks over all stages from 0 on and ``{flat1}`` from 1, and ``{n}`` is the last number in the
pattern.
"""

import re
from collections.abc import Iterable, Mapping

from ltp_jax.models.weights import Naming

Table = tuple[tuple[str, str], ...]

_BLOCK = r"block(?P<stage>\d+)_(?P<index>\d+)"
_FIRST = r"block(?P<stage>1)_(?P<index>\d+)"

_ALEXNET: Table = (
    (r"conv1", "features.0"),
    (r"conv2", "features.3"),
    (r"conv3", "features.6"),
    (r"conv4", "features.8"),
    (r"conv5", "features.10"),
    (r"dense1", "classifier.1"),
    (r"dense2", "classifier.4"),
    (r"head", "classifier.6"),
)

_RESNET: Table = (
    (r"stem/conv", "conv1"),
    (r"stem/norm", "bn1"),
    (_BLOCK + r"/conv(?P<n>\d)", "layer{stage}.{index}.conv{n}"),
    (_BLOCK + r"/norm(?P<n>\d)", "layer{stage}.{index}.bn{n}"),
    (_BLOCK + r"/shortcut/conv", "layer{stage}.{index}.downsample.0"),
    (_BLOCK + r"/shortcut/norm", "layer{stage}.{index}.downsample.1"),
    (r"head", "fc"),
)

_MOBILENET: Table = (
    (r"stem/conv", "features.0.0"),
    (r"stem/norm", "features.0.1"),
    (_FIRST + r"/depthwise/conv", "features.{flat1}.conv.0.0"),
    (_FIRST + r"/depthwise/norm", "features.{flat1}.conv.0.1"),
    (_FIRST + r"/project/conv", "features.{flat1}.conv.1"),
    (_FIRST + r"/project/norm", "features.{flat1}.conv.2"),
    (_BLOCK + r"/expand/conv", "features.{flat1}.conv.0.0"),
    (_BLOCK + r"/expand/norm", "features.{flat1}.conv.0.1"),
    (_BLOCK + r"/depthwise/conv", "features.{flat1}.conv.1.0"),
    (_BLOCK + r"/depthwise/norm", "features.{flat1}.conv.1.1"),
    (_BLOCK + r"/project/conv", "features.{flat1}.conv.2"),
    (_BLOCK + r"/project/norm", "features.{flat1}.conv.3"),
    (r"top/conv", "features.18.0"),
    (r"top/norm", "features.18.1"),
    (r"head", "classifier.1"),
)

_EFFICIENTNET: Table = (
    (r"stem/conv", "features.0.0"),
    (r"stem/norm", "features.0.1"),
    (_FIRST + r"/depthwise/conv", "features.{stage}.{index}.block.0.0"),
    (_FIRST + r"/depthwise/norm", "features.{stage}.{index}.block.0.1"),
    (_FIRST + r"/se/reduce", "features.{stage}.{index}.block.1.fc1"),
    (_FIRST + r"/se/expand", "features.{stage}.{index}.block.1.fc2"),
    (_FIRST + r"/project/conv", "features.{stage}.{index}.block.2.0"),
    (_FIRST + r"/project/norm", "features.{stage}.{index}.block.2.1"),
    (_BLOCK + r"/expand/conv", "features.{stage}.{index}.block.0.0"),
    (_BLOCK + r"/expand/norm", "features.{stage}.{index}.block.0.1"),
    (_BLOCK + r"/depthwise/conv", "features.{stage}.{index}.block.1.0"),
    (_BLOCK + r"/depthwise/norm", "features.{stage}.{index}.block.1.1"),
    (_BLOCK + r"/se/reduce", "features.{stage}.{index}.block.2.fc1"),
    (_BLOCK + r"/se/expand", "features.{stage}.{index}.block.2.fc2"),
    (_BLOCK + r"/project/conv", "features.{stage}.{index}.block.3.0"),
    (_BLOCK + r"/project/norm", "features.{stage}.{index}.block.3.1"),
    (r"top/conv", "features.8.0"),
    (r"top/norm", "features.8.1"),
    (r"head", "classifier.1"),
)

_TIMM: Table = (
    (r"stem/conv", "conv_stem"),
    (r"stem/norm", "bn1"),
    (_FIRST + r"/depthwise/conv", "blocks.{below}.{index}.conv_dw"),
    (_FIRST + r"/depthwise/norm", "blocks.{below}.{index}.bn1"),
    (_FIRST + r"/project/conv", "blocks.{below}.{index}.conv_pw"),
    (_FIRST + r"/project/norm", "blocks.{below}.{index}.bn2"),
    (_BLOCK + r"/expand/conv", "blocks.{below}.{index}.conv_pw"),
    (_BLOCK + r"/expand/conv_(?P<n>\d)", "blocks.{below}.{index}.conv_pw.{n}"),
    (_BLOCK + r"/expand/norm", "blocks.{below}.{index}.bn1"),
    (_BLOCK + r"/depthwise/conv", "blocks.{below}.{index}.conv_dw"),
    (_BLOCK + r"/depthwise/conv_(?P<n>\d)", "blocks.{below}.{index}.conv_dw.{n}"),
    (_BLOCK + r"/depthwise/norm", "blocks.{below}.{index}.bn2"),
    (_BLOCK + r"/se/reduce", "blocks.{below}.{index}.se.conv_reduce"),
    (_BLOCK + r"/se/expand", "blocks.{below}.{index}.se.conv_expand"),
    (_BLOCK + r"/project/conv", "blocks.{below}.{index}.conv_pwl"),
    (_BLOCK + r"/project/conv_(?P<n>\d)", "blocks.{below}.{index}.conv_pwl.{n}"),
    (_BLOCK + r"/project/norm", "blocks.{below}.{index}.bn3"),
    (r"top/conv", "conv_head"),
    (r"top/norm", "bn2"),
    (r"head", "classifier"),
)

_EFFICIENTNET_PYTORCH: Table = (
    (r"stem/conv", "_conv_stem"),
    (r"stem/norm", "_bn0"),
    (_BLOCK + r"/expand/conv", "_blocks.{flat}._expand_conv"),
    (_BLOCK + r"/expand/norm", "_blocks.{flat}._bn0"),
    (_BLOCK + r"/depthwise/conv", "_blocks.{flat}._depthwise_conv"),
    (_BLOCK + r"/depthwise/norm", "_blocks.{flat}._bn1"),
    (_BLOCK + r"/project/conv", "_blocks.{flat}._project_conv"),
    (_BLOCK + r"/project/norm", "_blocks.{flat}._bn2"),
    (r"top/conv", "_conv_head"),
    (r"top/norm", "_bn1"),
    (r"head", "_fc"),
)

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def _table(network: str, naming: Naming) -> Table:
    if naming == "efficientnet_pytorch":
        return _EFFICIENTNET_PYTORCH
    if network == "alexnet":
        return _ALEXNET
    if network.startswith("resnet"):
        return _RESNET  # timm kept torchvision's names
    if naming == "timm":
        return _TIMM
    return _MOBILENET if network.startswith("mobilenet") else _EFFICIENTNET


def torch_names(network: str, naming: Naming, paths: Iterable[str]) -> dict[str, str]:
    """The name in the file for each of our paths, ``block1_0/conv1/kernel`` -> ``layer1.0.conv1.weight``.

    Args:
      network: a name of ``ltp_jax.models``.
      naming: the library that wrote the file.
      paths: all paths of the network, parameters and batch statistics.
    """
    table = _table(network, naming)
    paths = list(paths)
    found = {(int(match["stage"]), int(match["index"])) for path in paths if (match := re.match(_BLOCK + "/", path))}
    flat = {block: position for position, block in enumerate(sorted(found))}
    return {path: _name(path, table, flat) for path in paths}


def _name(path: str, table: Table, flat: Mapping[tuple[int, int], int]) -> str:
    module, _, leaf = path.rpartition("/")
    for pattern, template in table:
        match = re.fullmatch(pattern, module)
        if match is None:
            continue
        numbers = {key: int(value) for key, value in match.groupdict().items()}
        if "stage" in numbers:
            position = flat[numbers["stage"], numbers["index"]]
            numbers |= {"below": numbers["stage"] - 1, "flat": position, "flat1": position + 1}
        return f"{template.format(**numbers)}.{_LEAVES[leaf]}"
    raise KeyError(f"no row of the table of names matches {path!r}")
