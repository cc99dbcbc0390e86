"""Where arrays of a state lie, said of a mesh without devices."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from ltp_jax.sharding import make_mesh, state_sharding


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
