"""Where arrays of a state lie, on a mesh without devices where that is enough."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from ltp_jax.sharding import jit_step, make_mesh, replicated, state_sharding
from tests.commands import run_python


@pytest.mark.parametrize(
    ("shape", "split"),
    [
        ((128, 512), P(None, "fsdp")),  # the largest dimension
        ((512, 3, 16), P("fsdp", None, None)),
        ((130, 513, 64), P(None, None, "fsdp")),  # the largest that four devices can share
        ((131, 513), P()),  # none that they can
        ((128, 127), P()),  # small
        ((), P()),
    ],
)
def test_arrays_are_split_along_the_largest_dimension_that_devices_can_share(shape, split):
    array = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert state_sharding(array, AbstractMesh((2, 4), ("data", "fsdp"))).spec == split
    assert state_sharding(array, AbstractMesh((8, 1), ("data", "fsdp"))).spec == P()


def test_an_axis_that_does_not_divide_the_devices_is_refused():
    for fsdp in (0, 3):
        with pytest.raises(ValueError, match=f"a mesh of 4 devices cannot have an fsdp axis of {fsdp}"):
            make_mesh(fsdp, devices=[object()] * 4)


def test_a_compiled_step_takes_over_the_arrays_of_the_state():
    mesh = make_mesh(devices=jax.devices()[:1])
    state = jax.device_put({"step": jnp.zeros(()), "w": jnp.ones(8)}, replicated(mesh))
    step = jit_step(lambda state, batch: jax.tree.map(lambda leaf: leaf + batch.sum(), state), state, mesh)
    after = step(state, jnp.ones(4))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(after))


EAGER = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import ltp_jax as ltp

mesh = jax.make_mesh((4,), ("x",), (AxisType.Explicit,))
w = jax.random.normal(jax.random.key(0), (16, 64))
for spec in (P(), P(None, None), P("x"), P(None, "x")):
    params = {"kernel": jax.device_put(w, NamedSharding(mesh, spec))}
    state = ltp.init(params, ltp.plan(params))
    state = state.replace(thresholds={"kernel": jnp.float32(0.5)})
    hard, soft = ltp.hard_prune(params, state)["kernel"], ltp.soft_prune(params, state)["kernel"]
    np.testing.assert_array_equal(hard, np.where(np.square(w) > 0.5, w, 0))
    np.testing.assert_allclose(ltp.l0(params, state), np.sum(np.asarray(soft) / np.asarray(w)), rtol=1e-5)
    assert all(array.sharding.is_equivalent_to(params["kernel"].sharding, 2) for array in (hard, soft))
"""


def test_verbs_take_arrays_of_an_explicit_mesh_one_by_one():
    """Outside of ``jax.jit`` and of ``jax.set_mesh``, as in a notebook."""
    done = run_python("-c", EAGER, XLA_FLAGS="--xla_force_host_platform_device_count=4")
    assert done.returncode == 0, done.stderr
