"""The recipe of the Transformer: its numbers by hand, what is held out, and toy tasks learned."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import shapes
from dalle2_jax.errors import InputError
from dalle2_jax.lineage.encoder_decoder import END, EncoderDecoder
from dalle2_jax.lineage.encoder_decoder_sampling import greedy_decode
from dalle2_jax.lineage.sequence_tasks import SequenceTask, is_held_out, make_sequences
from dalle2_jax.sharding import make_mesh
from train.config.optimizer import Optimizer
from train.recipes.encoder_decoder import EncoderDecoderRecipe
from train.run.plan import check_stages
from train.step.state import abstract_state, create_state
from train.step.step import make_step

BATCH = 8
TINY = {"width": 8, "depth": 2, "heads": 2, "hidden": 12, "dropout": 0.1, "max_length": 8}


def recipe(symbols=5, length=4, name="reverse", module=None, **changes) -> EncoderDecoderRecipe:
    sequences = SequenceTask(name, symbols, length, changes.pop("shortest", None))
    sizes = {**TINY, "vocabulary_size": sequences.vocabulary_size, **(module or {})}
    fields = {"steps": 4, "batch_size": BATCH, **changes}
    return EncoderDecoderRecipe(module=EncoderDecoder(**sizes), sequences=sequences, **fields)


def batch_of(count=BATCH):
    return {"image": np.zeros((count, 1, 1, 3), np.uint8), "index": np.arange(3, 3 + count, dtype=np.int32)}


def test_the_numbers_of_a_network_that_knows_nothing_and_of_one_that_says_end():
    made = recipe(label_smoothing=0.2)
    task = made.build({})
    assert not made.reads_captions and not task.batch_spec.captions
    assert made.describe()["training"] == {"sequences": made.sequences, "label_smoothing": 0.2}
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), jax.eval_shape(task.init, jax.random.key(0)))
    # The last norm's bias is what every state is: its product with END's row is 3 there and nothing elsewhere.
    ending = jax.tree.map(jnp.copy, zero)
    ending["token_embedding"]["embedding"] = zero["token_embedding"]["embedding"].at[END, 0].set(1.0)
    ending["decoder_blocks"]["mlp_norm"]["bias"] = zero["decoder_blocks"]["mlp_norm"]["bias"].at[-1, 0].set(3.0)

    loss_of = jax.jit(lambda params: task.loss(params, batch_of(), jax.random.key(0), {}, None)[:2])
    loss, metrics = loss_of(zero)
    assert set(metrics) == {"cross_entropy", "token_accuracy"} and metrics["token_accuracy"] == 0
    assert loss == pytest.approx(np.log(8), rel=1e-5) and metrics["cross_entropy"] == pytest.approx(float(loss))
    loss, metrics = loss_of(ending)
    # Four symbols and an end: one label in five is END.
    log_p = np.array([3.0, 0.0]) - np.log(np.exp(3) + 7)
    cross_entropy = -(log_p[0] + 4 * log_p[1]) / 5
    assert metrics["cross_entropy"] == pytest.approx(cross_entropy, rel=1e-5)
    assert loss == pytest.approx(0.8 * cross_entropy - 0.2 * (log_p[0] + 7 * log_p[1]) / 8, rel=1e-5)
    assert metrics["token_accuracy"] == pytest.approx(1 / 5)


def test_training_never_sees_what_is_held_out():
    task = recipe(shortest=1).build({})
    sequences = {held: jax.jit(lambda batch, key, held=held: task._sequences(batch, key, held)) for held in (0, 1)}
    for step in range(3):
        key = jax.random.key(step)
        assert not is_held_out(task.recipe.sequences, sequences[0](batch_of(), key).source).any()
        assert is_held_out(task.recipe.sequences, sequences[1](batch_of(), key).source).all()
    one, again = (sequences[0](batch_of(), jax.random.key(0)).source for _ in range(2))
    np.testing.assert_array_equal(one, again)
    assert (one != sequences[0](batch_of(), jax.random.key(1)).source).any()
    assert len({tuple(row) for row in np.asarray(one).tolist()}) > BATCH / 2
    # An image's sequence is its own, whatever batch it is in.
    np.testing.assert_array_equal(sequences[0](batch_of(2), jax.random.key(0)).source, one[:2])


@pytest.mark.slow
def test_it_learns_to_copy():
    adam = Optimizer(name="adam", learning_rate=1e-2, warmup_steps=10, beta2=0.98)
    sizes = {"width": 16, "depth": 1, "hidden": 32, "dropout": 0.0}
    task = recipe(4, 3, "copy", sizes, steps=150, optimizer=adam, label_smoothing=0.0).build({})
    optimizer = task.gradient_transformation()

    @jax.jit
    def train(key):
        def step(carry, key):
            params, state = carry
            loss, gradient = jax.value_and_grad(lambda p: task.loss(p, batch_of(32), key, {}, None)[0])(params)
            changes, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, changes), state), loss

        start = task.init(key)
        (params, _), losses = jax.lax.scan(step, (start, optimizer.init(start)), jax.random.split(key, 150))
        return start, params, losses

    validate = jax.jit(lambda params: task.validate(params, batch_of(64), jax.random.key(1), {}))
    start, params, losses = train(jax.random.key(0))
    before, after = validate(start), validate(params)
    assert losses[0] > 1.5 and losses[-1] < 0.1 and before["loss"] > 1.5 and after["loss"] < 0.1
    assert set(after) == {"loss", "cross_entropy", "token_accuracy", "sequence_accuracy"}
    assert before["sequence_accuracy"] < 0.1 and after["sequence_accuracy"] > 0.95 and after["token_accuracy"] > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reverse", "sort"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_it_learns_to_reverse_and_to_sort(name, norm_first):
    """Held-out sequences of ten of twenty symbols, whole and as greedy decoding writes them."""
    adam = Optimizer(
        name="adam",
        learning_rate=2e-3,
        warmup_steps=100,
        schedule="cosine",
        beta2=0.98,
        epsilon=1e-9,
        ema_decay=0.99,
    )
    sizes = {"width": 64, "depth": 2, "heads": 4, "hidden": 128, "dropout": 0.0, "max_length": 16}
    sizes |= {"norm_first": norm_first, "final_norm": norm_first}
    made = recipe(20, 10, name, sizes, steps=800, batch_size=64, optimizer=adam)
    task, mesh = made.build({}), make_mesh(devices=jax.devices()[:1])
    abstract = abstract_state(task, mesh)
    state, step = create_state(task, abstract), make_step(task, mesh, abstract)
    for _ in range(made.steps):
        state, _ = step(state, batch_of(made.batch_size), {})
    source, target = make_sequences(jax.random.key(9), made.sequences, 500, held_out=True)
    written = jax.jit(greedy_decode, static_argnums=(0, 3))(made.module, state["ema"], source, 11)
    assert (written == target[:, 1:]).all(1).mean() >= 0.99


def test_it_stands_beside_stages_that_read_captions():
    """Whose tokenizer has more tokens than it has; and one step of it is lowered as those of others are."""
    system = shapes.system().with_stage("transformer", recipe())
    assert system.vocabulary_size > system.stages["transformer"].module.vocabulary_size
    check_stages(system, ["transformer"], make_mesh(devices=jax.devices()[:1]))
    clip = system.stages["clip"]
    short = clip.module.clone(text=clip.module.text.clone(vocabulary_size=300))
    with pytest.raises(InputError, match="set clip.module.text.vocabulary_size=512"):
        system.with_stage("clip", dataclasses.replace(clip, module=short))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: recipe(module={"vocabulary_size": 7}), "5 symbols with padding, start and end are 8 tokens; set enc"),
        (lambda: recipe(module={"max_length": 4}), "a sequence of 4 symbols has an end too; set encoder_decoder.mod"),
        (lambda: recipe(label_smoothing=1.0), "encoder_decoder.label_smoothing is 1.0; it must be 0 or more and below"),
        (lambda: recipe(module={"dtype": "int8"}), "encoder_decoder.module.dtype is 'int8'; it must be one of float32"),
    ],
)
def test_refused(make, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        make()
    assert not str(error.value).endswith(".")
