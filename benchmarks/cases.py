"""What is measured: networks, batches and steps, as plain numbers that all sides read; nothing is imported here.

A case's own fields describe our network and diffusers', which have the same layers and so the same parameters.
dalle2-pytorch's networks are of another kind: its field of a case says at which of its own sizes it comes nearest to
the same number of parameters, within 2%. `scan_layers` is ours alone: a CPU is faster without, a deep stack compiles
faster with it. Which sides have networks of which kind says `benchmarks.compare`.

clip        a vision transformer on images of `size` pixels in patches of `patch`, a causal transformer on captions
            (`text_width`, `text_depth`, `text_heads`), and the contrastive loss over the batch
prior       a transformer over the caption's states `[text_length, embedding]`, its embedding, time, noised image
            embedding and query
decoder     a U-Net on `size` pixels that attends at `attends` (and in the middle), conditioned on the caption's states
            and the image embedding
upsampler   a U-Net on `size` pixels without attention, conditioned on the image at `low_size`
generate    the caption's states -> prior -> decoder -> upsampler -> image; `steps` of each, the first two guided
"""

TEXT_LENGTH = 77

CLIP_B16 = {
    "kind": "clip",
    "size": 224,
    "patch": 16,
    "width": 768,
    "depth": 12,
    "heads": 12,
    "text_width": 512,
    "text_depth": 12,
    "text_heads": 8,
    "text_length": TEXT_LENGTH,
    "vocabulary": 49_408,
    "embedding": 512,
    "activation": "quick_gelu",
    "scan_layers": False,
}
PRIOR_40M = {
    "kind": "prior",
    "embedding": 512,
    "width": 512,
    "depth": 12,
    "heads": 8,
    "text_length": 78,
    "scan_layers": False,
    "dalle2_pytorch": {"ff_mult": 3.1875},
}
DECODER_110M = {
    "kind": "decoder",
    "size": 64,
    "embedding": 512,
    "channels": 128,
    "multipliers": (1, 2, 3, 4),
    "depth": 2,
    "attends": (32, 16, 8),
    "head_channels": 64,
    "text_width": 512,
    "text_length": TEXT_LENGTH,
    "dalle2_pytorch": {
        "dim": 144,
        "cond_dim": 384,
        "self_attn": (False, True, True, True),
        "attn_dim_head": 64,
        "attn_heads": 8,
    },
}
UPSAMPLER_22M = {
    "kind": "upsampler",
    "size": 128,
    "low_size": 64,
    "embedding": 512,
    "channels": 64,
    "multipliers": (1, 2, 3, 4),
    "depth": 2,
    "dalle2_pytorch": {"dim": 64, "cond_dim": 32},
}
PRIOR_1B = {
    **PRIOR_40M,
    "embedding": 1024,
    "width": 2048,
    "depth": 24,
    "heads": 32,
    "text_length": 256,
    # Its prior is as wide as its embeddings.
    "dalle2_pytorch": {"ff_mult": 3.25, "dim": 2048},
}
KARLO_PRIOR = {**PRIOR_1B, "embedding": 768, "depth": 20, "text_length": TEXT_LENGTH, "dalle2_pytorch": None}
KARLO_DECODER = {
    **DECODER_110M,
    "embedding": 768,
    "channels": 320,
    "depth": 3,
    "text_width": 1536,
    "dalle2_pytorch": {
        "dim": 384,
        "cond_dim": 512,
        "num_resnet_blocks": 3,
        "self_attn": (False, True, True, True),
        "attn_dim_head": 64,
        "attn_heads": 16,
    },
}
KARLO_UPSAMPLER = {
    **UPSAMPLER_22M,
    "size": 256,
    "embedding": 768,
    "channels": 320,
    "depth": 3,
    "dalle2_pytorch": {"dim": 344, "cond_dim": 320, "num_resnet_blocks": 3},
}

TINY_CLIP = {
    **CLIP_B16,
    "size": 16,
    "patch": 8,
    "width": 16,
    "depth": 1,
    "heads": 2,
    "text_width": 16,
    "text_depth": 1,
    "text_heads": 2,
    "text_length": 4,
    "vocabulary": 32,
    "embedding": 16,
}
TINY_PRIOR = {
    **PRIOR_40M,
    "embedding": 16,
    "width": 16,
    "depth": 1,
    "heads": 2,
    "text_length": 4,
    "dalle2_pytorch": {"ff_mult": 3.0},
}
TINY_DECODER = {
    **DECODER_110M,
    "size": 16,
    "embedding": 16,
    "channels": 32,
    "multipliers": (1, 2),
    "depth": 1,
    "attends": (8,),
    "head_channels": 32,
    "text_width": 32,
    "text_length": 4,
    "dalle2_pytorch": {"dim": 32, "cond_dim": 32},
}
TINY_UPSAMPLER = {
    **UPSAMPLER_22M,
    "size": 32,
    "low_size": 16,
    "embedding": 16,
    "channels": 32,
    "multipliers": (1, 2),
    "depth": 1,
    "dalle2_pytorch": {"dim": 32, "cond_dim": 32},
}

CASES = {
    "prior-2": {"title": "prior, 12 layers of 512, 82 positions", **PRIOR_40M, "batch": 2},
    "prior-8": {"title": "prior, 12 layers of 512, 82 positions", **PRIOR_40M, "batch": 8},
    "decoder": {"title": "decoder, 64 px, attention at 32, 16 and 8", **DECODER_110M, "batch": 2},
    "decoder-plain": {
        "title": "decoder, 64 px, attention in the middle alone (dalle2-pytorch's own choice)",
        **DECODER_110M,
        "attends": (),
        "batch": 2,
        "dalle2_pytorch": {"dim": 136, "cond_dim": 256},
    },
    "upsampler": {"title": "super-resolution, 64 to 128 px", **UPSAMPLER_22M, "batch": 1},
    "generate": {
        "kind": "generate",
        "title": "caption to image, 128 px, 4 + 4 + 2 steps",
        "prior": {**PRIOR_40M, "text_length": TEXT_LENGTH},
        "decoder": DECODER_110M,
        "upsampler": UPSAMPLER_22M,
        "steps": (4, 4, 2),
        "guidance": (4.0, 8.0),
        "batch": 1,
    },
    "clip-b16": {"title": "CLIP ViT-B/16, 224 px, captions of 77 tokens", **CLIP_B16, "batch": 128},
    "prior-1b": {"title": "prior of the paper, 24 layers of 2048, 260 positions", **PRIOR_1B, "batch": 32},
    "decoder-1b": {"title": "Karlo's decoder, 64 px", **KARLO_DECODER, "batch": 16},
    "upsampler-1b": {"title": "Karlo's super-resolution, 64 to 256 px", **KARLO_UPSAMPLER, "batch": 4},
    "generate-karlo": {
        "kind": "generate",
        "title": "caption to image, Karlo's shapes, 256 px, 25 + 25 + 7 steps",
        "prior": KARLO_PRIOR,
        "decoder": KARLO_DECODER,
        "upsampler": KARLO_UPSAMPLER,
        "steps": (25, 25, 7),
        "guidance": (4.0, 8.0),
        "batch": 1,
    },
    "tiny-clip": {"title": "to try whether it runs", **TINY_CLIP, "batch": 2},
    "tiny-prior": {"title": "to try whether it runs", **TINY_PRIOR, "batch": 2},
    "tiny-decoder": {"title": "to try whether it runs", **TINY_DECODER, "batch": 2},
    "tiny-upsampler": {"title": "to try whether it runs", **TINY_UPSAMPLER, "batch": 2},
    "tiny-generate": {
        "kind": "generate",
        "title": "to try whether it runs",
        "prior": TINY_PRIOR,
        "decoder": TINY_DECODER,
        "upsampler": TINY_UPSAMPLER,
        "steps": (2, 2, 2),
        "guidance": (4.0, 8.0),
        "batch": 1,
    },
}

# What is run where nothing else is asked for.
OF_DEVICE = {
    "cpu": ("prior-2", "prior-8", "decoder", "decoder-plain", "upsampler", "generate"),
    "cuda": ("clip-b16", "prior-1b", "decoder-1b", "upsampler-1b", "generate-karlo"),
}
