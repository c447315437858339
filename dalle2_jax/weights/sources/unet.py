"""The ADM U-Net under other people's names: guided-diffusion's (GLIDE, Karlo's original files) and diffusers'.

Both walk the same blocks in the same order and differ in what they call them, and in how the projections of attention
are laid out: guided-diffusion's are one convolution with rows of [heads, parts, head_channels], diffusers' a Linear
layer each.
"""

from __future__ import annotations

from dalle2_jax.layers.unet import UNet
from dalle2_jax.weights.table import Table


class GuidedDiffusion:
    """Names of guided-diffusion's UNetModel (guided_diffusion/unet.py) and of GLIDE's and Karlo's heirs of it."""

    time = ("time_embed.0", "time_embed.2")
    conv_in, norm_out, conv_out = "input_blocks.0.0", "out.0", "out.2"

    def __init__(self, unet: UNet):
        self.unet = unet

    def _down(self, level: int, block: int) -> str:
        return f"input_blocks.{1 + level * (self.unet.depth + 1) + block}"

    def down_block(self, level: int, block: int) -> str:
        """The residual block of that number; number `depth` is the change of size."""
        return f"{self._down(level, block)}.0"

    def down_attention(self, level: int, block: int) -> str:
        return f"{self._down(level, block)}.1"

    def middle(self, block: int) -> str:
        return f"middle_block.{block if not self.unet.middle_attention else 2 * block}"

    middle_attention = "middle_block.1"

    def _up(self, level: int, block: int) -> str:
        levels = len(self.unet.channel_multipliers)
        return f"output_blocks.{(levels - 1 - level) * (self.unet.depth + 1) + block}"

    def up_block(self, level: int, block: int) -> str:
        return f"{self._up(level, block)}.0"

    def up_attention(self, level: int, block: int) -> str:
        return f"{self._up(level, block)}.1"

    def up_resample(self, level: int) -> str:
        return f"{self._up(level, self.unet.depth)}.{2 if self.unet.attends(level) else 1}"

    def residual(self, table: Table, target: str, source: str, skip: bool) -> None:
        table.norm(f"{target}/norm_1", f"{source}.in_layers.0")
        table.conv(f"{target}/conv_1", f"{source}.in_layers.2")
        table.dense(f"{target}/time", f"{source}.emb_layers.1")
        table.norm(f"{target}/norm_2", f"{source}.out_layers.0")
        table.conv(f"{target}/conv_2", f"{source}.out_layers.3")
        if skip:
            table.conv(f"{target}/skip", f"{source}.skip_connection")

    def resample(self, table: Table, target: str, source: str, direction: str) -> None:
        if self.unet.resblock_resampling:
            self.residual(table, target, source, False)
        else:
            table.conv(f"{target}/conv", f"{source}.{'op' if direction == 'down' else 'conv'}")

    def attention(self, table: Table, target: str, source: str, context: bool) -> None:
        table.norm(f"{target}/norm", f"{source}.norm")
        table.heads(f"{target}/qkv", f"{source}.qkv", 3, self.unet.head_channels, places=1)
        if context:
            table.heads(f"{target}/context_kv", f"{source}.encoder_kv", 2, self.unet.head_channels, places=1)
        table.dense(f"{target}/out", f"{source}.proj_out", places=1)


class Diffusers:
    """Names of diffusers' UNet2DModel and UNet2DConditionModel, whose size changes inside blocks (Resnet*Block2D) or by
    plain convolutions."""

    time = ("time_embedding.linear_1", "time_embedding.linear_2")
    conv_in, norm_out, conv_out = "conv_in", "conv_norm_out", "conv_out"
    middle_attention = "mid_block.attentions.0"

    def __init__(self, unet: UNet):
        self.unet = unet

    def down_block(self, level: int, block: int) -> str:
        if block == self.unet.depth:
            return f"down_blocks.{level}.downsamplers.0"
        return f"down_blocks.{level}.resnets.{block}"

    def down_attention(self, level: int, block: int) -> str:
        return f"down_blocks.{level}.attentions.{block}"

    def middle(self, block: int) -> str:
        return f"mid_block.resnets.{block}"

    def _up(self, level: int) -> str:
        return f"up_blocks.{len(self.unet.channel_multipliers) - 1 - level}"

    def up_block(self, level: int, block: int) -> str:
        return f"{self._up(level)}.resnets.{block}"

    def up_attention(self, level: int, block: int) -> str:
        return f"{self._up(level)}.attentions.{block}"

    def up_resample(self, level: int) -> str:
        return f"{self._up(level)}.upsamplers.0"

    def residual(self, table: Table, target: str, source: str, skip: bool) -> None:
        table.norm(f"{target}/norm_1", f"{source}.norm1")
        table.conv(f"{target}/conv_1", f"{source}.conv1")
        table.dense(f"{target}/time", f"{source}.time_emb_proj")
        table.norm(f"{target}/norm_2", f"{source}.norm2")
        table.conv(f"{target}/conv_2", f"{source}.conv2")
        if skip:
            table.conv(f"{target}/skip", f"{source}.conv_shortcut")

    def resample(self, table: Table, target: str, source: str, direction: str) -> None:
        if self.unet.resblock_resampling:
            self.residual(table, target, source, False)
        else:
            table.conv(f"{target}/conv", f"{source}.conv")

    def attention(self, table: Table, target: str, source: str, context: bool) -> None:
        table.norm(f"{target}/norm", f"{source}.group_norm")
        table.fused(f"{target}/qkv", [f"{source}.to_{part}" for part in "qkv"])
        if context:
            table.fused(f"{target}/context_kv", [f"{source}.add_{part}_proj" for part in "kv"])
        table.dense(f"{target}/out", f"{source}.to_out.0")


def unet_entries(
    table: Table, names: GuidedDiffusion | Diffusers, target: str, source: str = "", context: bool = False
) -> None:
    """Adds a whole U-Net below the path `target` from tensors below the prefix `source`; context: it reads tokens."""
    unet, levels = names.unet, len(names.unet.channel_multipliers)

    def residual(ours: str, theirs: str, skip: bool = False) -> None:
        names.residual(table, f"{target}{ours}", f"{source}{theirs}", skip)

    def attention(ours: str, theirs: str) -> None:
        names.attention(table, f"{target}{ours}", f"{source}{theirs}", context)

    table.dense(f"{target}time_1", f"{source}{names.time[0]}")
    table.dense(f"{target}time_2", f"{source}{names.time[1]}")
    table.conv(f"{target}conv_in", f"{source}{names.conv_in}")
    width = unet.channel_multipliers[0]
    skips = [width]
    for level, multiplier in enumerate(unet.channel_multipliers):
        for block in range(unet.depth):
            residual(f"down_{level}_res_{block}", names.down_block(level, block), width != multiplier)
            width = multiplier
            if unet.attends(level):
                attention(f"down_{level}_attention_{block}", names.down_attention(level, block))
            skips.append(width)
        if level < levels - 1:
            theirs = f"{source}{names.down_block(level, unet.depth)}"
            names.resample(table, f"{target}down_{level}_resample", theirs, "down")
            skips.append(width)
    residual("middle_res_0", names.middle(0))
    if unet.middle_attention:
        attention("middle_attention_0", names.middle_attention)
    residual("middle_res_1", names.middle(1))
    for level, multiplier in reversed(list(enumerate(unet.channel_multipliers))):
        for block in range(unet.depth + 1):
            skip = width + skips.pop() != multiplier
            residual(f"up_{level}_res_{block}", names.up_block(level, block), skip)
            width = multiplier
            if unet.attends(level):
                attention(f"up_{level}_attention_{block}", names.up_attention(level, block))
        if level:
            names.resample(table, f"{target}up_{level}_resample", f"{source}{names.up_resample(level)}", "up")
    table.norm(f"{target}norm_out", f"{source}{names.norm_out}")
    table.conv(f"{target}conv_out", f"{source}{names.conv_out}")
