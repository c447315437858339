"""A network's initial parameters, computed leaf by leaf.

As one program those of a decoder of a billion parameters take minutes to compile, since it draws each of its hundreds
of arrays by itself. Here every leaf is a program of its own, and leaves of one shape, which differ in keys and scales
alone, share one; what is left is compiled on all cores of the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var, jaxpr_as_fun
from jax.interpreters import partial_eval
from jax.sharding import Sharding

from dalle2_jax.sharding import available_cores
from train.machine.compiler import initial_options


def by_leaf(function: Callable[[jax.Array], Any], key: jax.Array, shardings: Any) -> Any:
    """What `jax.jit(function, out_shardings=shardings)(key)` gives, with a small program for each leaf.

    function: of a PRNG key. shardings: one for each leaf, in a tree like the result's.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(key)
    parts = _Parts(closed, key)
    programs: dict[Any, Future[Callable[..., jax.Array]]] = {}
    calls = []
    with ThreadPoolExecutor(available_cores()) as pool:
        for out, sharding in zip(closed.jaxpr.outvars, jax.tree.leaves(shardings), strict=True):
            part, values = parts.find(out)
            name = str(part), sharding
            if name not in programs:
                programs[name] = pool.submit(_compiled, part, values, sharding)
            calls.append((name, values))
        made = [programs[name].result()(*values) for name, values in calls]  # while others are compiled
    return jax.tree.unflatten(jax.tree.structure(shapes), made)


def _compiled(part: Jaxpr, values: Sequence[Any], sharding: Sharding) -> Callable[..., jax.Array]:
    platform = next(iter(sharding.device_set)).platform
    return jax.jit(_function(part), out_shardings=sharding).lower(*values).compile(initial_options(platform))


def _function(part: Jaxpr) -> Callable[..., jax.Array]:
    return lambda *inputs: jaxpr_as_fun(ClosedJaxpr(part, ()))(*inputs)[0]


class _Parts:
    """A traced function of a key, of which parts are taken."""

    def __init__(self, closed: ClosedJaxpr, key: jax.Array) -> None:
        self.equations = closed.jaxpr.eqns
        self.debug_info = closed.jaxpr.debug_info.with_unknown_names()
        self.makers = {var: number for number, equation in enumerate(self.equations) for var in equation.outvars}
        self.known = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True)) | {closed.jaxpr.invars[0]: key}
        self.programs: dict[str, Callable[..., jax.Array]] = {}

    def find(self, out: Any) -> tuple[Jaxpr, list[Any]]:
        """What of the function makes `out`, and the values of its inputs: keys, constants and single numbers.

        Keys that are made of other keys are computed on the way, by programs that all of them share.
        """
        pending, needed = [out], set()
        while pending:
            atom = pending.pop()
            if isinstance(atom, Literal) or atom in self.known:
                continue
            if atom is not out and jax.dtypes.issubdtype(atom.aval.dtype, jax.dtypes.prng_key):
                self.known[atom] = self.compute(atom)
                continue
            if (number := self.makers[atom]) not in needed:
                needed.add(number)
                pending += self.equations[number].invars
        inputs: dict[Var, Any] = {}

        def given(atom: Any) -> Any:
            if isinstance(atom, Literal):
                if atom.aval.shape:
                    return atom
                inputs[var := Var(atom.aval)] = atom.val
                return var
            if atom in self.known:
                inputs[atom] = self.known[atom]
            return atom

        chosen = [self.equations[number] for number in sorted(needed)]
        equations = [equation.replace(invars=[given(atom) for atom in equation.invars]) for equation in chosen]
        result = given(out)
        # Of an equation that makes several leaves, as a scan over layers does, the rest is left out.
        part = Jaxpr((), [*inputs], [result], equations, debug_info=self.debug_info)
        part, _ = partial_eval.dce_jaxpr(part, [True], instantiate=True)
        return part, [*inputs.values()]

    def compute(self, out: Var) -> jax.Array:
        part, values = self.find(out)
        program = self.programs.setdefault(str(part), jax.jit(_function(part)))
        return program(*values)
