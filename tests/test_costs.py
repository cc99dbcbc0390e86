"""Uses of weights, against convolutions counted by hand."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ltp_jax as ltp
from ltp_jax import models
from ltp_jax.costs import uses_per_input
from ltp_jax.models.layers import Conv


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = Conv(8, 3, strides=2, name="strided")(x)  # 6×6 → 3×3
        x = Conv(8, 3, groups=8, name="depthwise")(x)
        x = nn.Conv(4, (2, 2), padding="VALID", feature_group_count=2, name="grouped")(x)  # 3×3 → 2×2
        shared = nn.Dense(4, name="shared")
        return nn.Dense(5, name="head")(shared(shared(x)).mean((1, 2)))


class Inside(nn.Module):
    """A layer alone, called as networks are."""

    layer: Any

    @nn.compact
    def __call__(self, x, train):
        return self.layer(x)


def plan_of(module, shape):
    images = jnp.zeros(shape)
    return ltp.plan(jax.eval_shape(lambda: module.init(jax.random.key(0), images, train=False))["params"]), images


def test_uses_by_hand():
    plan, images = plan_of(Net(), (7, 6, 6, 3))
    assert list(uses_per_input(Net(), images, plan, train=False).items()) == [  # in the order of their calls
        ("strided/kernel", 9),
        ("depthwise/kernel", 9),
        ("grouped/kernel", 4),
        ("shared/kernel", 2 * 4),  # twice, at four positions
        ("head/kernel", 1),
    ]


def test_kernels_with_metadata():
    kernel = nn.with_partitioning(nn.initializers.ones, (None, "model"))
    for layer in (nn.Dense(3, kernel_init=kernel), nn.Conv(3, (1, 1), kernel_init=kernel)):
        plan, images = plan_of(Inside(layer), (2, 5, 6, 4))
        assert uses_per_input(Inside(layer), images, plan, train=False) == {"layer/kernel": 30}


def test_multiply_accumulates_of_known_networks():
    # LeNet-5: 24²·20·25 + 8²·50·500 + 400,000 + 5,000; ResNet-20: 40.6 million (He et al.)
    for name, shape, macs in (("lenet5", (1, 28, 28, 1), 2_293_000), ("resnet20", (1, 32, 32, 3), 40_551_040)):
        module = models.create(name, num_classes=10)
        plan, images = plan_of(module, shape)
        uses = uses_per_input(module, images, plan, train=False)
        assert sum(uses[tensor.path] * tensor.size for tensor in plan.tensors if tensor.prune) == macs


def test_uses_of_projections_to_several_axes():
    """Attention projects 16 positions of 12 features to 4 heads of 3 and back."""
    attention = Inside(nn.MultiHeadDotProductAttention(4))
    plan, images = plan_of(attention, (2, 16, 12))
    uses = uses_per_input(attention, images, plan, train=False)
    assert uses == {f"layer/{name}/kernel": 16 for name in ("query", "key", "value", "out")}
    heads = Inside(nn.DenseGeneral((4, 3)))
    plan, images = plan_of(heads, (2, 12))
    assert uses_per_input(heads, images, plan, train=False) == {"layer/kernel": 1}


SHARED = {"variable_axes": {"params": None}, "split_rngs": {"params": False}}


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.ConvTranspose(4, (2, 2), strides=(2, 2)), (2, 4, 4, 3)),
        (nn.Conv(4, (2, 2), input_dilation=2, padding=1), (2, 4, 4, 3)),
        (nn.ConvLocal(4, (2, 2)), (2, 4, 4, 3)),
        (nn.Einsum((4, 3), "bij,ij->bij"), (2, 4, 3)),
        (nn.DenseGeneral(3, batch_dims=(0,)), (2, 4, 3)),
        (nn.Conv(4, (2, 2)), (5, 4, 3)),  # no batch: the first axis is a spatial one
        (nn.vmap(nn.Dense, **SHARED)(3), (2, 5, 3)),
        (nn.RNN(nn.SimpleCell(5)), (2, 7, 3)),
    ],
    ids=lambda value: None if isinstance(value, tuple) else type(value).__name__,
)
def test_what_cannot_be_counted_for_certain_is_refused(layer, shape):
    plan, images = plan_of(Inside(layer), shape)
    with pytest.raises(ValueError, match=r"kernel are not known.*give their costs yourself"):
        uses_per_input(Inside(layer), images, plan, train=False)


def test_what_happens_at_initialisation_alone_does_not_count():
    class Eager(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            dense, auxiliary = nn.Dense(3, name="dense"), nn.Dense(9, name="auxiliary")
            if train or self.is_initializing():
                dense(x), auxiliary(x)
            return nn.Dropout(0.5)(dense(x), deterministic=not train)

    plan, images = plan_of(Eager(), (2, 7, 5))
    assert uses_per_input(Eager(), images, plan, train=True) == {"dense/kernel": 14, "auxiliary/kernel": 7}
    with pytest.raises(ValueError, match="calls no module with auxiliary/kernel; the plan has to be of"):
        uses_per_input(Eager(), images, plan, train=False)
    plan = ltp.plan({"dense": {"kernel": jnp.zeros((5, 3))}})
    assert uses_per_input(Eager(), images, plan, train=False) == {"dense/kernel": 7}


def test_one_call_that_cannot_be_counted_leaves_the_sum_unknown():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            shared = nn.Conv(3, (2, 2))
            return shared(x) + shared(x[0])

    plan, images = plan_of(Twice(), (2, 4, 4, 3))
    with pytest.raises(ValueError, match="kernel are not known"):
        uses_per_input(Twice(), images, plan, train=False)


def test_a_module_that_pools_what_came_out_of_its_kernel_is_not_counted():
    class Pooled(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return (x @ self.param("kernel", nn.initializers.ones, (3, 4))).mean(1)

    plan, images = plan_of(Pooled(), (2, 10, 3))
    with pytest.raises(ValueError, match="the uses of kernel are not known"):
        uses_per_input(Pooled(), images, plan, train=False)


class Twice(nn.Dense):
    @nn.compact
    def __call__(self, inputs):
        return super().__call__(inputs) + super().__call__(-inputs)


class PooledConv(nn.Conv):
    @nn.compact
    def __call__(self, inputs):
        return nn.avg_pool(super().__call__(inputs), (2, 2), (2, 2))


class PooledGeneral(nn.DenseGeneral):
    @nn.compact
    def __call__(self, inputs):
        return super().__call__(inputs).mean(1)


class Siamese(nn.Module):
    base: nn.Module
    other: nn.Module | None = None

    def setup(self):
        nn.share_scope(self, self.base)
        if self.other is not None:
            nn.share_scope(self, self.other)

    def __call__(self, x):
        y = self.base(x) + self.base(x[:, ::-1])
        return y if self.other is None else self.other(y)


@pytest.mark.parametrize(
    ("layer", "shape", "uses"),
    [
        (Twice(3), (4, 5, 6), 10),
        (PooledConv(4, (3, 3)), (2, 8, 8, 3), 64),
        (PooledGeneral(4), (4, 5, 6), 5),
        (Siamese(nn.Dense(3)), (4, 5, 6), 10),
    ],
)
def test_weights_are_used_where_the_innermost_call_is(layer, shape, uses):
    plan, images = plan_of(Inside(layer), shape)
    assert list(uses_per_input(Inside(layer), images, plan, train=False).values()) == [uses]


def test_which_of_several_modules_of_one_scope_has_the_kernel_is_not_known():
    network = Inside(Siamese(nn.Dense(3), nn.LayerNorm(use_bias=False)))
    plan, images = plan_of(network, (4, 5, 6))
    with pytest.raises(ValueError, match="kernel are not known"):
        uses_per_input(network, images, plan, train=False)


def test_a_module_of_several_inputs_is_refused_by_name():
    class Fused(nn.Module):
        @nn.compact
        def __call__(self, pair):
            x = jnp.concatenate(pair, -1)
            return x @ self.param("kernel", nn.initializers.ones, (x.shape[-1], 8))

    class Pair(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dense(3, name="head")(Fused(name="fused")((x, 2 * x)))

    plan, images = plan_of(Pair(), (2, 5, 3))
    with pytest.raises(ValueError, match="the uses of fused/kernel are not known"):
        uses_per_input(Pair(), images, plan, train=False)
    plan = ltp.plan({"head": {"kernel": jnp.zeros((8, 3))}})
    assert uses_per_input(Pair(), images, plan, train=False) == {"head/kernel": 5}


def test_a_tensor_whose_uses_cannot_be_counted_is_named():
    class Odd(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return x @ self.param("kernel", nn.initializers.ones, (3, 4)).T.T @ jnp.ones((4, 5))

    plan, images = plan_of(Odd(), (2, 3))
    with pytest.raises(ValueError, match="the uses of kernel are not known"):
        uses_per_input(Odd(), images, plan, train=False)


@pytest.mark.parametrize("batch", [1, 3])
def test_positions_that_are_folded_into_the_batch_count(batch):
    class Folded(nn.Module):
        """Six frames by a convolution for one, windows of four positions by a dense layer."""

        @nn.compact
        def __call__(self, x, train):
            frames = nn.Conv(5, (3, 3), name="frames")(x.reshape(-1, 8, 8, 3))
            windows = nn.Dense(4, name="windows")(frames.reshape(-1, 4, 5))
            return windows.reshape(x.shape[0], -1)

    plan, images = plan_of(Folded(), (batch, 6, 8, 8, 3))
    uses = uses_per_input(Folded(), images, plan, train=False)
    assert uses == {"frames/kernel": 6 * 64, "windows/kernel": 6 * 64}


def test_a_layer_that_extends_another_is_called_once():
    class Standardised(nn.Conv):
        @nn.compact
        def __call__(self, inputs):
            return super().__call__(inputs) / 2

    plan, images = plan_of(Inside(Standardised(3, (2, 2))), (2, 4, 4, 3))
    assert uses_per_input(Inside(Standardised(3, (2, 2))), images, plan, train=False) == {"layer/kernel": 16}


def test_a_kernel_that_another_method_uses_is_not_counted():
    class Tied(nn.Module):
        def setup(self):
            self.kernel = self.param("kernel", nn.initializers.ones, (3, 4))

        def __call__(self, x):
            return self.project(x)

        def project(self, x):
            return x @ self.kernel

        def back(self, x):
            return x @ self.kernel.T

    class Autoencoder(nn.Module):
        back: bool

        @nn.compact
        def __call__(self, x, train):
            tied = Tied(name="tied")
            return tied.back(tied(x)) if self.back else tied(x)

    plan, images = plan_of(Autoencoder(False), (2, 3))
    assert uses_per_input(Autoencoder(False), images, plan, train=False) == {"tied/kernel": 1}
    with pytest.raises(ValueError, match="the uses of tied/kernel are not known"):
        uses_per_input(Autoencoder(True), images, plan, train=False)


def test_another_network_that_is_called_within_is_not_counted():
    teacher, x = nn.Dense(3), jnp.zeros((2, 7, 8))
    frozen = teacher.init(jax.random.key(0), x)

    class Taught(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            seen = teacher.apply(frozen, x).mean(1)
            return nn.Dense(4, name="head")(seen) + nn.Sequential([nn.Dense(4)], name="layers_of")(seen)

    class Collides(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dense(4)(teacher.clone(name="Dense_0").apply(frozen, x).mean(1))

    class Settings(nn.Module):
        width: int = 4

        def double(self):
            return 2 * self.width

    settings = Settings()

    class Asks(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dense(settings.double())(x.mean(1))

    for module in (Taught(), Collides(), Asks()):
        plan, images = plan_of(module, (2, 7, 8))
        assert set(uses_per_input(module, images, plan, train=False).values()) == {1.0}


def test_features_may_be_a_number_of_numpy():
    module = Inside(nn.DenseGeneral(np.int64(5)))
    plan, images = plan_of(module, (2, 7, 8))
    assert list(uses_per_input(module, images, plan, train=False).values()) == [7.0]
