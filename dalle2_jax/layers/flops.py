"""Floating-point operations of a traced function: its matrix products and convolutions.

XLA's own count (`Lowered.cost_analysis`) takes the body of a loop once, however often it runs, so a transformer that is
scanned over 24 layers would count as one. Here a scan counts as often as it runs. What is computed again under `remat`
counts again, elementwise work does not count. cuDNN's attention counts as its products would in XLA: what its backward
pass computes again does not count, and of a causal mask the masked half does.
"""

import math
from collections.abc import Iterator
from typing import Any

# Products of queries by keys by head size in cuDNN's kernels.
CUDNN_ATTENTION = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 4}


def count_flops(jaxpr: Any) -> int:
    """Operations of a jaxpr, open or closed, over the whole batch and all devices; a multiply-add is two.

    Of a `cond` the costliest branch counts, of a `while` one turn, since the number of its turns is not in the program.
    """
    return _Counter().count(getattr(jaxpr, "jaxpr", jaxpr))


class _Counter:
    """Remembers what it has counted: one jaxpr is often called from many places."""

    def __init__(self) -> None:
        self.known: dict[int, int] = {}

    def count(self, jaxpr: Any) -> int:
        if id(jaxpr) not in self.known:
            self.known[id(jaxpr)] = sum(self._equation(equation) for equation in jaxpr.eqns)
        return self.known[id(jaxpr)]

    def _equation(self, equation: Any) -> int:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
        if name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            features = kernel[params["dimension_numbers"].rhs_spec[0]]
            return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // features
        if name in CUDNN_ATTENTION:
            (batch, queries, heads, size), keys = equation.invars[0].aval.shape, equation.invars[1].aval.shape[1]
            return 2 * CUDNN_ATTENTION[name] * batch * heads * queries * keys * size
        inner = [self.count(jaxpr) for jaxpr in _inner(params)]
        if name == "cond":
            return max(inner)
        return sum(inner) * (params["length"] if name == "scan" else 1)


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs among an equation's parameters."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item
