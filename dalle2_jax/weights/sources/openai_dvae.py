"""The discrete VAE of DALL-E as OpenAI published it: `encoder.pkl` and `decoder.pkl`.

Source: openai/DALL-E, dall_e/encoder.py, decoder.py and utils.py. The files are whole modules, pickled, which are read
without torch and without their code (`weights.pickled`); their sizes follow from their shapes.
"""

from __future__ import annotations

from pathlib import Path

from dalle2_jax.lineage.dvae import DVAE
from dalle2_jax.weights.conversion import Conversion, Part, array
from dalle2_jax.weights.pickled import open_module
from dalle2_jax.weights.table import Table
from dalle2_jax.weights.tensors import Tensors, WeightsError, joined

PARTS = ("encoder", "decoder")
PARAMETERS = {"encoder": 53_786_240, "decoder": 43_829_766}
PUBLISHED_AT = "https://cdn.openai.com/dall-e/"
MULTIPLIERS = (1, 2, 4, 8)  # of the width, in OpenAI's code
SHARED = ("dall_e.utils.Conv2d", "torch.nn.modules.activation.ReLU", "torch.nn.modules.container.Sequential")
MODULES = {
    "encoder": (
        *SHARED,
        "dall_e.encoder.Encoder",
        "dall_e.encoder.EncoderBlock",
        "torch.nn.modules.linear.Identity",
        "torch.nn.modules.pooling.MaxPool2d",
    ),
    "decoder": (
        *SHARED,
        "dall_e.decoder.Decoder",
        "dall_e.decoder.DecoderBlock",
        "torch.nn.modules.linear.Identity",
        "torch.nn.modules.upsampling.Upsample",
    ),
}


def conversions(folder: Path) -> list[Conversion]:
    """The one stage of a folder with both files.

    Raises:
        WeightsError: if one is missing, damaged, of another model, or refers to more than the published modules.
    """
    paths = {part: folder / f"{part}.pkl" for part in PARTS}
    missing = [path.name for path in paths.values() if not path.is_file()]
    if missing:
        raise WeightsError(
            f"{folder} has no {' and no '.join(missing)}; download encoder.pkl and decoder.pkl from {PUBLISHED_AT}"
        )
    tensors = joined((f"{part}.", open_module(path, MODULES[part])) for part, path in paths.items())
    module = dvae_module(tensors)
    parts = tuple(Part(part, part, PARAMETERS[part]) for part in PARTS)
    inputs = {"images": array(1, module.image_size, module.image_size, module.channels)}
    record = {"image_size": module.image_size}
    return [
        Conversion(
            "dvae", "dvae", module, dvae_table(module), tensors, inputs, record, method="reconstruct", parts=parts
        )
    ]


def dvae_module(tensors: Tensors) -> DVAE:
    """The network of these sizes. What has no tensor here has OpenAI's size, and is missed by the table."""
    default = DVAE()

    def size(name: str, axis: int, otherwise: int) -> int:
        shape = tensors.shapes.get(f"{name}.w", ())
        return shape[axis] if len(shape) == 4 else otherwise

    blocks = {name.split(".")[3] for name in tensors.shapes if name.startswith("encoder.blocks.group_1.block_")}
    return DVAE(
        channels=size("encoder.blocks.input", 1, default.channels),
        codebook_size=size("encoder.blocks.output.conv", 0, default.codebook_size),
        code_width=size("decoder.blocks.input", 0, default.code_width),
        width=size("encoder.blocks.input", 0, default.width),
        multipliers=MULTIPLIERS,
        blocks=len(blocks) or default.blocks,
    )


def dvae_table(module: DVAE) -> Table:
    """The table of both files."""
    table, widths = Table(), [module.width * multiplier for multiplier in module.multipliers]
    _conv(table, "encoder/input", "encoder.blocks.input")
    _conv(table, "encoder/output", "encoder.blocks.output.conv")
    _groups(table, module, "encoder", [module.width, *widths])
    table.add(
        "decoder/codebook/embedding",
        ["decoder.blocks.input.w"],
        lambda shape: [(shape[1], shape[0], 1, 1)],
        lambda x: x.reshape(x.shape[:2]).T,
    )
    table.plain("decoder/codebook/bias", "decoder.blocks.input.b")
    _conv(table, "decoder/output", "decoder.blocks.output.conv")
    _groups(table, module, "decoder", [module.code_width, *reversed(widths)])
    return table


def _groups(table: Table, module: DVAE, part: str, channels: list[int]) -> None:
    """The residual blocks; channels: before the first group, and of each."""
    for group, (before, after) in enumerate(zip(channels, channels[1:], strict=False), 1):
        for block in range(1, module.blocks + 1):
            target, source = f"{part}/group_{group}_block_{block}", f"{part}.blocks.group_{group}.block_{block}"
            for number in range(1, 5):
                _conv(table, f"{target}/conv_{number}", f"{source}.res_path.conv_{number}")
            if block == 1 and before != after:
                _conv(table, f"{target}/skip", f"{source}.id_path")


def _conv(table: Table, target: str, source: str) -> None:
    """Their Conv2d [out, in, height, width]."""
    table.add(
        f"{target}/kernel",
        [f"{source}.w"],
        lambda shape: [(shape[3], shape[2], shape[0], shape[1])],
        lambda x: x.transpose(2, 3, 1, 0),
    )
    table.plain(f"{target}/bias", f"{source}.b")
