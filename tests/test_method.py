"""The arithmetic against numbers worked out by hand, closed forms and finite differences."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltp_jax import method

W = np.array([0.5, -1.0, 2.0], np.float32)
TAU, T = np.float32(1.0), np.float32(0.5)
# (w² − τ)/T = −1.5, 0, 6; sigmoid of these, and s(1 − s)/T.
S = np.array([0.18242552, 0.5, 0.99752738])
SLOPE = np.array([0.29829290, 0.5, 0.00493302])


def test_soft_mask_by_hand():
    np.testing.assert_allclose(method.soft_mask(W, TAU, T), S, rtol=1e-6)


def test_soft_threshold_by_hand():
    pruned, count = method.soft_threshold(W, TAU, T)
    np.testing.assert_allclose(pruned, [0.09121276, -0.5, 1.99505476], rtol=1e-6)
    np.testing.assert_allclose(count, 1.67995290, rtol=1e-6)


def test_hard_threshold_by_hand():
    # A weight whose square is the threshold itself goes: w² > τ.
    np.testing.assert_array_equal(method.hard_threshold(W, TAU), [0.0, 0.0, 2.0])


def test_temperature_by_hand():
    # Eq. 15 with |w| = 1, 1, 3, 3: mean 2, variance 1.
    np.testing.assert_allclose(method.temperature(jnp.array([1.0, -1.0, 3.0, -3.0]), 1e-3), 1e-3, rtol=1e-6)


def test_gradients_of_eq_14_by_hand():
    g, lam = np.array([1.0, 2.0, -3.0], np.float32), np.float32(0.1)
    d_w, d_tau = pullback(g, lam)
    np.testing.assert_allclose(d_w, g * S, rtol=1e-6)
    # −[(0.5 + 0.1)·0.2982929 + (−2 + 0.1)·0.5 + (−6 + 0.1)·0.00493302]
    np.testing.assert_allclose(d_tau, 0.80012906, rtol=1e-5)


def test_l0_to_weights_by_hand():
    # Besides eq. 14's g·s: λ · 2 w · s(1 − s)/T.
    g, lam = np.array([1.0, 2.0, -3.0], np.float32), np.float32(0.1)
    d_w, _ = pullback(g, lam, l0_to_weights=True)
    np.testing.assert_allclose(d_w, g * S + 0.1 * 2 * W * SLOPE, rtol=1e-5)


def test_leak_by_hand():
    # A weight of which s is left gets g·(s + leak · (1 − s)); what the threshold gets stays as it is.
    g, lam = np.array([1.0, 2.0, -3.0], np.float32), np.float32(0.1)
    d_w, d_tau = pullback(g, lam, leak=0.2)
    np.testing.assert_allclose(d_w, [0.34594042, 1.2, -2.99406571], rtol=1e-6)
    np.testing.assert_allclose(d_tau, 0.80012906, rtol=1e-5)


@pytest.mark.parametrize("lam", [0.0, 0.3])
def test_exact_gradient_is_that_of_finite_differences(lam):
    rng = np.random.default_rng(0)
    w = rng.normal(size=(4, 5))
    g = rng.normal(size=(4, 5))

    def loss(w, tau):  # in float64, with nothing of ours
        s = 1 / (1 + np.exp(-(w**2 - tau) / 0.2))
        return np.sum(g * w * s) + lam * np.sum(s)

    d_w, d_tau = pullback(
        np.float32(g), np.float32(lam), w=np.float32(w), tau=0.7, t=0.2, exact_gradient=True, l0_to_weights=True
    )
    eps = 1e-6
    numeric = np.zeros_like(w)
    for i in np.ndindex(*w.shape):
        step = np.zeros_like(w)
        step[i] = eps
        numeric[i] = (loss(w + step, 0.7) - loss(w - step, 0.7)) / (2 * eps)
    np.testing.assert_allclose(d_w, numeric, rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(d_tau, (loss(w, 0.7 + eps) - loss(w, 0.7 - eps)) / (2 * eps), rtol=1e-4)


def test_gradient_is_that_of_a_sigmoid_held_constant():
    """Eq. 14 said in JAX's own words: stop the gradient at the weights inside the mask."""
    w = jax.random.normal(jax.random.key(0), (6, 7))
    g = jax.random.normal(jax.random.key(1), (6, 7))

    def plain(w, tau):
        s = jax.nn.sigmoid((jax.lax.stop_gradient(w) ** 2 - tau) / 0.3)
        return jnp.sum(g * w * s) + 0.2 * jnp.sum(s)

    def ours(w, tau):
        pruned, count = method.soft_threshold(w, tau, jnp.float32(0.3))
        return jnp.sum(g * pruned) + 0.2 * count

    expected = jax.grad(plain, (0, 1))(w, jnp.float32(0.5))
    actual = jax.grad(ours, (0, 1))(w, jnp.float32(0.5))
    chex.assert_trees_all_close(actual, expected, rtol=1e-5)


def test_mask_is_float32_for_bfloat16_weights():
    w = jnp.asarray([1.0, 1.0078125], jnp.bfloat16)  # neighbours in bfloat16; their squares differ by 0.0157
    s = method.soft_mask(w, jnp.float32(1.0), jnp.float32(1e-3))
    assert s.dtype == jnp.float32
    np.testing.assert_allclose(s, [0.5, 1.0], atol=1e-6)
    pruned, count = method.soft_threshold(w, jnp.float32(1.0), jnp.float32(1e-3))
    assert pruned.dtype == jnp.bfloat16
    assert count.dtype == jnp.float32
    grad = jax.grad(lambda w: method.soft_threshold(w, TAU, T)[0].astype(jnp.float32).sum())(w)
    assert grad.dtype == jnp.bfloat16


@pytest.mark.parametrize("size", [7, 4098, 3 * 2**13])
def test_the_sums_of_a_cpu_are_those_of_accelerators(size, monkeypatch):
    """A CPU adds in another order, by halves while there are more than 4096: sums and gradients are the same."""
    w = jax.random.normal(jax.random.key(0), (size,))

    def gradients():
        return jax.value_and_grad(lambda tau: method.soft_threshold(w, tau, jnp.float32(0.3))[1])(jnp.float32(0.5))

    by_halves = gradients()
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args))
    chex.assert_trees_all_close(gradients(), by_halves, rtol=1e-5)
    np.testing.assert_allclose(by_halves[0], np.sum(1 / (1 + np.exp((0.5 - np.float64(w) ** 2) / 0.3))), rtol=1e-5)


def test_rescaling_weights_and_threshold_leaves_masks_unchanged():
    w = jax.random.normal(jax.random.key(0), (200,))
    for scale in (0.125, 32.0):  # powers of two: exact in float32
        t, t_scaled = method.temperature(w, 1e-3), method.temperature(scale * w, 1e-3)
        np.testing.assert_allclose(t_scaled, scale**2 * t, rtol=1e-6)
        s = method.soft_mask(w, jnp.float32(0.3), t)
        np.testing.assert_allclose(method.soft_mask(scale * w, scale**2 * jnp.float32(0.3), t_scaled), s, atol=1e-4)


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_jit_and_no_jit_agree(self):
        pruned, count = self.variant(lambda w: method.soft_threshold(w, TAU, T))(W)
        np.testing.assert_allclose(pruned, W * S, rtol=1e-6)
        np.testing.assert_allclose(count, S.sum(), rtol=1e-6)


def test_works_under_vmap():
    taus = jnp.array([0.5, 1.0, 2.0])
    counts = jax.vmap(lambda tau: method.soft_threshold(jnp.asarray(W), tau, T)[1])(taus)
    np.testing.assert_allclose(counts, [method.soft_threshold(W, tau, T)[1] for tau in taus], rtol=1e-6)
    grads = jax.vmap(jax.grad(lambda tau: method.soft_threshold(jnp.asarray(W), tau, T)[1]))(taus)
    np.testing.assert_allclose(grads[1], -SLOPE.sum(), rtol=1e-5)


def pullback(g, lam, w=W, tau=TAU, t=T, **options):
    """The gradients of ``Σ g·v + λ·L0`` with respect to weights and threshold."""

    def loss(w, tau):
        pruned, count = method.soft_threshold(w, tau, jnp.float32(t), **options)
        return jnp.sum(g * pruned) + lam * count

    return jax.grad(loss, (0, 1))(jnp.asarray(w), jnp.float32(tau))
