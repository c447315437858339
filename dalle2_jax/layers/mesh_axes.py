"""What the networks ask of a mesh: that the compiler may decide how what they compute is split."""

import jax
from jax.sharding import AxisType

from dalle2_jax.errors import InputError


def check_mesh_axes(x: jax.Array) -> None:
    """Refuses an array that is split over Explicit mesh axes, which `jax.make_mesh` gives by default.

    Raises:
      InputError: saying how to make a mesh of Auto axes.
    """
    sharding = getattr(jax.typeof(x), "sharding", None)
    mesh, spec = getattr(sharding, "mesh", None), getattr(sharding, "spec", ())
    if mesh is not None and AxisType.Explicit in getattr(mesh, "axis_types", ()) and any(spec):
        raise InputError(
            f"the networks leave it to the compiler how arrays are split, and this one is split by {spec} over a mesh "
            "with Explicit axes; make the mesh with dalle2_jax.sharding.make_mesh, or with "
            "axis_types=(jax.sharding.AxisType.Auto,) * n"
        )
