"""The count of operations: loops, remat, gradients and convolutions, against counts by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from configs import shapes
from dalle2_jax.layers.fields import without_remat
from dalle2_jax.layers.flops import count_flops
from dalle2_jax.sharding import make_mesh
from tests.train.toy import ToyNet, toy_task
from train.step.flops import model_flops
from train.step.state import abstract_state
from train.step.step import make_step


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def flops(function, *arguments) -> int:
    return count_flops(jax.make_jaxpr(function)(*arguments))


def stack(weights, x, remat=False):
    def layer(x, w):
        return jnp.tanh(x @ w), None

    return jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, weights)[0].sum()


@pytest.mark.parametrize("depth", [2, 24])
def test_a_scan_counts_as_often_as_it_runs(depth):
    product = 2 * 8 * 16 * 16
    arguments = shape(depth, 16, 16), shape(8, 16)
    assert flops(stack, *arguments) == depth * product
    assert flops(jax.grad(stack, argnums=(0, 1)), *arguments) == 3 * depth * product
    # The layer's product is computed again, for its tanh.
    remat = jax.grad(lambda w, x: stack(w, x, remat=True), argnums=(0, 1))
    assert flops(remat, *arguments) == 4 * depth * product


def test_batched_products():
    def attend(q, k):
        return jnp.einsum("bqhd,bkhd->bhqk", q, k)

    assert flops(jax.jit(attend), shape(2, 5, 3, 7), shape(2, 6, 3, 7)) == 2 * 2 * 3 * 5 * 6 * 7


def test_convolutions_and_their_gradients():
    def convolve(x, kernel):
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return (y**2).sum()

    forward = 2 * 4 * 8 * 8 * 3 * 3 * 5 * 6
    arguments = shape(4, 8, 8, 5), shape(3, 3, 5, 6)
    assert flops(convolve, *arguments) == forward
    assert flops(jax.grad(convolve, argnums=(0, 1)), *arguments) == 3 * forward
    grouped = lambda x, kernel: jax.lax.conv_general_dilated(  # noqa: E731
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=5
    )
    assert flops(grouped, shape(4, 8, 8, 5), shape(3, 3, 1, 5)) == 2 * 4 * 8 * 8 * 5 * 9


def test_branches():
    def choose(x, flag):
        return jax.lax.cond(flag, lambda x: x @ x, lambda x: x @ x @ x, x)

    assert flops(choose, shape(4, 4), jax.ShapeDtypeStruct((), jnp.bool_)) == 2 * 2 * 4**3


@pytest.mark.parametrize("remat", [False, True])
def test_cudnn_attention_counts_as_its_products_in_xla(monkeypatch, remat):
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda _: True)
    arguments = [jax.ShapeDtypeStruct((2, tokens, 3, 16), jnp.bfloat16) for tokens in (64, 32, 32)]

    def attend(implementation):
        attention = lambda *qkv: jax.nn.dot_product_attention(*qkv, implementation=implementation)  # noqa: E731
        attention = jax.checkpoint(attention) if remat else attention
        return lambda *qkv: (attention(*qkv).astype(jnp.float32) ** 2).sum()

    forward = 2 * 2 * (2 * 3) * 64 * 32 * 16
    assert flops(attend("cudnn"), *arguments) == flops(attend("xla"), *arguments) == forward
    gradients = [flops(jax.grad(attend(name), argnums=(0, 1, 2)), *arguments) for name in ("cudnn", "xla")]
    assert gradients[0] == (4 if remat else 3) * forward
    assert gradients[1] == (4 if remat else 3) * forward - (forward // 2 if remat else 0)


@pytest.mark.parametrize("changes", [{}, {"optimizer": {"accumulation": 2}}])
def test_a_stage_counts_without_what_remat_computes_again(changes):
    class Hidden(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.tanh(nn.Dense(16)(x))

    class Twice(ToyNet):
        remat: bool = False

        @nn.compact
        def __call__(self, x):
            hidden = nn.remat(Hidden) if self.remat else Hidden
            return nn.Dense(48, name="out")(hidden(name="hidden")(x))

    mesh, traced, needed = make_mesh(devices=jax.devices()[:1]), {}, {}
    batch = {
        "image": jax.ShapeDtypeStruct((16, 4, 4, 3), jnp.uint8),
        "tokens": jax.ShapeDtypeStruct((16, 2), jnp.int32),
    }
    for remat in (False, True):
        task = toy_task(module=Twice(remat=remat), **changes)
        abstract = abstract_state(task, mesh)
        step = make_step(task, mesh, abstract)
        needed[remat] = model_flops(task, step, abstract, batch, {})
        traced[remat] = count_flops(step.trace(abstract, batch, {}).jaxpr)
    # The first layer's input needs no gradient: five products of equal size; remat adds one, for the tanh.
    product = 2 * 16 * 48 * 16
    assert traced == {False: 5 * product, True: 6 * product}
    assert needed == {False: 5 * product, True: 5 * product}


def test_remat_is_taken_out_of_nested_networks():
    decoder = shapes.system().stages["decoder"].module
    deep = decoder.clone(unet=decoder.unet.clone(remat=True))
    assert without_remat(deep).unet == decoder.unet.clone(remat=False)
    assert without_remat(deep) == decoder.clone(unet=decoder.unet.clone(remat=False))
