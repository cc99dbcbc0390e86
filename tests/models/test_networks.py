"""What every network promises: its size, its dtypes, its names, and the plain operations on accelerators."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltp_jax import models
from ltp_jax.models import layers
from ltp_jax.models.inverted_residual import InvertedResidual, InvertedResidualNet, Stage

SMALL = ("digits", "lenet_300_100", "lenet5", "resnet20")


def _images(name: str, batch: int = 2, size: int | None = None) -> jax.Array:
    spec = models.spec(name)
    size = size or spec.input_size
    return jax.random.normal(jax.random.key(0), (batch, size, size, spec.channels))


def _shapes(name: str, **options: Any) -> Any:
    model = models.create(name, **options)
    return jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), _images(name, 1))


@pytest.mark.parametrize("name", models.names())
def test_parameter_count(name: str) -> None:
    leaves = jax.tree.leaves(_shapes(name)["params"])
    assert sum(leaf.size for leaf in leaves) == models.spec(name).parameters
    assert all(leaf.dtype == jnp.float32 for leaf in leaves)


@pytest.mark.parametrize("name", ["resnet50", "mixnet_s", "alexnet", "digits"])
def test_bfloat16_keeps_variables_and_logits_in_float32(name: str) -> None:
    model = models.create(name, num_classes=7, dtype=jnp.bfloat16)
    variables = _shapes(name, num_classes=7, dtype=jnp.bfloat16)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))

    def apply(variables: Any, images: jax.Array) -> Any:
        return model.apply(variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)})

    logits, updates = jax.eval_shape(apply, variables, _images(name))
    assert (logits.shape, logits.dtype) == ((2, 7), jnp.float32)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(updates))


@pytest.mark.parametrize("name", SMALL)
def test_small_network_runs_and_learns_something(name: str) -> None:
    model, images = models.create(name), _images(name, 8)
    # Each function runs once or twice: compiling it is what takes the time.
    jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    variables = dict(jit(lambda x: model.init(jax.random.key(1), x, train=False))(images))

    @jit
    def step(params: Any) -> Any:
        def loss(params: Any) -> Any:
            logits, _ = model.apply(variables | {"params": params}, images, train=True, mutable=["batch_stats"])
            return -jnp.mean(jax.nn.log_softmax(logits)[:, 0])

        value, gradients = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - 0.05 * g, params, gradients)

    before, params = step(variables["params"])
    after, _ = step(params)
    assert after < before


def test_names() -> None:
    paths = {"/".join(key.key for key in path) for path, _ in jax.tree.leaves_with_path(_shapes("mixnet_s")["params"])}
    assert {"stem/conv/kernel", "block3_0/depthwise/conv_2/kernel", "block3_0/se/reduce/kernel", "head/bias"} <= paths
    assert {path.rsplit("/", 1)[1] for path in paths} == {"kernel", "bias", "scale"}


def test_unknown_name_and_option_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown network 'resnet51': expected one of .*resnet50"):
        models.create("resnet51")
    with pytest.raises(ValueError, match=r"resnet50 has no option 'dropout_rate': expected one of .*repeats"):
        models.create("resnet50", dropout_rate=0.1)
    with pytest.raises(ValueError, match=r"unknown padding 'full'"):
        _shapes("mobilenet_v2", padding="full")


def _inverted_residual_net(**options: Any) -> InvertedResidualNet:
    """Four blocks that all have a shortcut, and so stochastic depth."""
    stages = (Stage(1, features=8, repeats=4, strides=1, expansion=1),)
    return InvertedResidualNet(num_classes=5, stages=stages, stem_features=8, head_features=16, **options)


@pytest.mark.parametrize(
    ("model", "size"),
    [(models.create("alexnet", dropout_rate=0.5), 63), (_inverted_residual_net(dropout_rate=0.5), 8)],
    ids=["alexnet", "inverted_residual_net"],
)
def test_dropout_depends_on_the_key_while_training_alone(model: Any, size: int) -> None:
    images = jnp.ones((2, size, size, 3))
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    variables = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01), shapes)

    @functools.partial(jax.jit, static_argnames="train")
    def logits(key: jax.Array, train: bool) -> jax.Array:
        return model.apply(variables, images, train=train, mutable=["batch_stats"], rngs={"dropout": key})[0]

    one, other = jax.random.key(1), jax.random.key(2)
    assert not np.array_equal(logits(one, train=True), logits(other, train=True))
    np.testing.assert_array_equal(logits(one, train=False), logits(other, train=False))


def test_stochastic_depth_drops_the_branch_of_whole_images() -> None:
    x = jax.random.normal(jax.random.key(0), (16, 4, 4, 8))
    block = functools.partial(
        InvertedResidual,
        Stage(1, features=8, repeats=1, strides=1, expansion=1),
        strides=1,
        padding="torch",
        epsilon=1e-5,
        dtype=jnp.float32,
    )
    variables = block(drop_rate=0.0).init(jax.random.key(1), x, train=False)

    def branch(drop_rate: float) -> np.ndarray:
        rngs = {"dropout": jax.random.key(2)}
        y, _ = block(drop_rate=drop_rate).apply(variables, x, train=True, mutable=["batch_stats"], rngs=rngs)
        return np.asarray(y - x)

    whole, dropped = branch(0.0), branch(0.75)
    kept = np.any(dropped, axis=(1, 2, 3))
    assert 0 < kept.sum() < len(x)
    np.testing.assert_allclose(dropped, np.where(kept[:, None, None, None], 4 * whole, 0), rtol=1e-4, atol=1e-4)


def test_rate_of_stochastic_depth_grows_from_block_to_block() -> None:
    rates = []

    def record(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if isinstance(context.module, nn.Dropout):
            rates.append(context.module.rate)
        return call(*args, **kwargs)

    model = _inverted_residual_net(dropout_rate=0.5, drop_path_rate=0.4)
    with nn.intercept_methods(record):
        jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), jnp.ones((1, 8, 8, 3)))
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.5])


@pytest.mark.parametrize(
    ("conv", "inputs", "variance"),
    [(layers.Conv(256), 64, 2 / (9 * 256)), (layers.Conv(512, 5, groups=512), 512, 2 / 25)],
    ids=["dense", "depthwise"],
)
def test_kernels_begin_with_the_variance_of_he(conv: layers.Conv, inputs: int, variance: float) -> None:
    kernel: Any = conv.init(jax.random.key(0), jnp.ones((1, 8, 8, inputs)))["params"]["kernel"]
    np.testing.assert_allclose(np.std(kernel), np.sqrt(variance), rtol=0.02)


@pytest.mark.parametrize(
    ("kernel", "stride", "groups"), [(1, 1, 1), (1, 2, 1), (3, 2, 8), (5, 1, 8), (7, 1, 8), (9, 2, 8)]
)
@pytest.mark.parametrize("padding", ["torch", "same"])
def test_cpu_form_of_a_convolution_equals_the_plain_one(
    kernel: int, stride: int, groups: int, padding: layers.Padding
) -> None:
    x = jax.random.normal(jax.random.key(0), (2, 11, 10, 8))
    w = jax.random.normal(jax.random.key(1), (kernel, kernel, 8 // groups, 8))
    pads = layers.explicit_padding(padding, (11, 10), kernel, stride)
    if padding == "same":
        pads_of_plain: Any = "SAME"
    else:
        pads_of_plain = [(kernel // 2, kernel // 2)] * 2

    def plain(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x,
            w,
            (stride, stride),
            pads_of_plain,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    def ours(x: jax.Array, w: jax.Array) -> jax.Array:
        return layers.conv2d(x, w, stride=stride, pads=pads, groups=groups)

    for function in (lambda f: f(x, w), lambda f: jax.grad(lambda x, w: jnp.sum(jnp.sin(f(x, w))), (0, 1))(x, w)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), function(ours), function(plain)
        )


@pytest.mark.parametrize(("window", "stride", "padding"), [(2, 2, 0), (3, 2, 0), (3, 2, 1)])
def test_cpu_form_of_max_pool_equals_the_plain_one(window: int, stride: int, padding: int) -> None:
    x = jax.random.normal(jax.random.key(0), (2, 9, 8, 3))
    plain = jax.lax.reduce_window(
        x,
        -jnp.inf,
        jax.lax.max,
        (1, window, window, 1),
        (1, stride, stride, 1),
        ((0, 0), (padding, padding), (padding, padding), (0, 0)),
    )
    np.testing.assert_array_equal(layers.max_pool(x, window, stride, padding), plain)


def test_accelerators_get_the_plain_operations() -> None:
    """The forms for the CPU leave nothing behind in the code of a TPU, forward and backward."""
    model, images = models.create("mobilenet_v2"), _images("mobilenet_v2", 2, 32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)

    def loss(params: Any, variables: Any) -> Any:
        logits, _ = model.apply(
            variables | {"params": params},
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(0)},
        )
        return jnp.sum(logits)

    def count(platform: str) -> tuple[int, int]:
        lowered = jax.jit(jax.grad(loss)).trace(variables["params"], variables).lower(lowering_platforms=(platform,))
        text = lowered.as_text()
        return text.count("stablehlo.convolution"), text.count("stablehlo.dot_general")

    # 52 convolutions, each with two gradients, but for the gradient of the images; and a dense layer.
    assert count("tpu") == (3 * 52 - 1, 2)
    convolutions, products = count("cpu")
    assert convolutions == 2  # the stem and its gradient
    assert products > 52
