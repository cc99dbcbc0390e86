"""The networks give the numbers of torchvision and timm, on weights and images filled by a rule.

``make_fixtures.py`` made the reference numbers; neither torch nor timm is needed here.
"""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import save_file

from ltp_jax import models, pretrained
from ltp_jax.models.torch_names import torch_names
from tests.models.filling import FIXTURES, fill_images, fill_labels, fill_state_dict, sample

# A network, and the origin of its weights where that is not the first.
TRAINED = ("alexnet", "resnet50", "mobilenet_v2", "efficientnet_b0", "efficientnet_lite0-timm", "mixnet_s-timm")
# These differ in blocks, width, names or padding; their training is that of the others.
ONLY_EVALUATED = ("resnet18", "mobilenet_v2_050-timm", "efficientnet_b0-timm", "efficientnet_lite0-timm-tf")
MOMENTUM = 0.9
# Each function below runs once: compiling it is what takes the time.
FAST_COMPILATION = {"xla_backend_optimization_level": 0}


def _get(tree: dict[str, Any], path: str) -> Any:
    for key in path.split("/"):
        tree = tree[key]
    return tree


def _replace(tree: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    key, _, rest = path.partition("/")
    return tree | {key: _replace(tree[key], rest, value) if rest else value}


def _assert_close(ours: Any, theirs: np.ndarray, scale: float, tolerance: float) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * float(scale))


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Reference numbers, with the same weights read through the import and the model built for them."""
    name, _, origin = request.param.partition("-")
    numbers: dict[str, Any] = dict(np.load(FIXTURES / f"{request.param}.npz"))
    path = tmp_path_factory.mktemp("weights") / "filled.safetensors"
    save_file(fill_state_dict(request.param), path)
    variables, settings = pretrained.load(path, name, origin=origin or None)
    path.unlink()
    without_dropout = {"dropout_rate": 0.0, "drop_path_rate": 0.0}
    accepted = vars(models.create(name))
    options: dict[str, Any] = {key: value for key, value in without_dropout.items() if key in accepted}
    return numbers | {
        "name": request.param,
        "variables": variables,
        "settings": settings,
        "model": models.create(name, **settings.options, **options),
        "images": fill_images(int(numbers["batch"]), int(numbers["size"])),
    }


@pytest.mark.parametrize("case", TRAINED + ONLY_EVALUATED, indirect=True)
def test_logits(case: dict[str, Any]) -> None:
    apply = functools.partial(case["model"].apply, train=False)
    logits = jax.jit(apply, compiler_options=FAST_COMPILATION)(case["variables"], case["images"])
    assert logits.dtype == jnp.float32
    _assert_close(sample(np.asarray(logits), 512), case["logits"], case["largest_logit"], 1e-4)


@pytest.mark.parametrize("case", TRAINED, indirect=True)
def test_training_step(case: dict[str, Any]) -> None:
    """Loss, gradients of the first and the last kernel, and running statistics after one batch."""
    model, variables = case["model"], case["variables"]
    first, last = "conv1/kernel" if case["name"] == "alexnet" else "stem/conv/kernel", "head/kernel"
    labels = fill_labels(len(case["images"]))

    @functools.partial(jax.jit, compiler_options=FAST_COMPILATION)
    def step(variables: Any, kernels: Any) -> Any:
        def loss(kernels: Any) -> Any:
            params = variables["params"]
            for path, kernel in kernels.items():
                params = _replace(params, path, kernel)
            logits, updates = model.apply(
                variables | {"params": params}, case["images"], train=True, mutable=["batch_stats"]
            )
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return loss, updates.get("batch_stats", {})

        return jax.value_and_grad(loss, has_aux=True)(kernels)

    kernels = {path: _get(variables["params"], path) for path in (first, last)}
    (loss, statistics), gradients = step(variables, kernels)
    np.testing.assert_allclose(loss, case["loss"], rtol=1e-4)
    # An activation that rounding carries over the kink of a rectifier moves the first gradient by up to a per cent.
    for key, path, tolerance in (("first", first, 2e-2), ("last", last, 1e-3)):
        gradient = np.asarray(gradients[path])
        gradient = gradient.transpose(3, 2, 0, 1) if gradient.ndim == 4 else gradient.T
        np.testing.assert_allclose(np.linalg.norm(gradient), case[f"{key}_gradient_norm"], rtol=tolerance / 4)
        scale = np.abs(case[f"{key}_gradient"]).max()
        _assert_close(sample(gradient), case[f"{key}_gradient"], scale, tolerance)
    _check_statistics(case, variables, statistics)


def _check_statistics(case: dict[str, Any], variables: Any, statistics: Any) -> None:
    counts = json.loads(case["norms"].tobytes())
    if not counts:
        assert not statistics
        return
    settings = case["settings"]
    shapes = {
        "/".join(key.key for key in path): leaf.shape for path, leaf in jax.tree.leaves_with_path(variables["params"])
    }
    names = torch_names(settings.network, settings.naming, shapes)
    modules = {names[path].removesuffix(".weight"): path.removesuffix("/scale") for path in shapes if "/scale" in path}
    assert modules.keys() == counts.keys()

    means, variances = [], []
    for name, count in counts.items():
        old, new = _get(variables["batch_stats"], modules[name]), _get(statistics, modules[name])
        means.append(np.asarray(new["mean"]))
        # PyTorch averages the unbiased variance of a batch, we the biased one.
        batch_variance = new["var"] - MOMENTUM * old["var"]
        variances.append(np.asarray(MOMENTUM * old["var"] + batch_variance * count / (count - 1)))
    for key, ours in (("running_mean", means), ("running_var", variances)):
        np.testing.assert_allclose([np.linalg.norm(value) for value in ours], case[key], rtol=1e-4)
        _assert_close(sample(ours[-1]), case[f"last_{key}"], np.abs(case[f"last_{key}"]).max(), 1e-4)
