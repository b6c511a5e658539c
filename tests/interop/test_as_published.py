"""Configs as published pipelines have them, which say more, or less, than those that today's classes write."""

import json

import pytest

from ldm.interop.layout.diffusers import _network

ATTENDS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")
LARGE = {"in_channels": 4, "out_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "norm_eps": 1e-5, "act_fn": "silu"}
LARGE |= {"center_input_sample": False, "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0}
LARGE |= {"mid_block_scale_factor": 1, "_class_name": "UNet2DConditionModel"}
FOUR = {"down_block_types": [ATTENDS[0]] * 3 + [PLAIN[0]], "up_block_types": [PLAIN[1]] + [ATTENDS[1]] * 3}
FOUR |= {"block_out_channels": [320, 640, 1280, 1280]}
THREE = {"down_block_types": [PLAIN[0]] + [ATTENDS[0]] * 2, "up_block_types": [ATTENDS[1]] * 2 + [PLAIN[1]]}
THREE |= {"block_out_channels": [320, 640, 1280], "addition_embed_type": "text_time", "addition_time_embed_dim": 256}
THREE |= {"addition_embed_type_num_heads": 64, "projection_class_embeddings_input_dim": 2816, "conv_in_kernel": 3}
THREE |= {"transformer_layers_per_block": [1, 2, 10], "num_attention_heads": None, "upcast_attention": None}
OLD = {"activation_fn": "gelu-approximate", "attention_bias": True, "attention_head_dim": 72, "dropout": 0.0, "in_channels": 4}
OLD |= {"norm_elementwise_affine": False, "norm_num_groups": 32, "num_attention_heads": 16, "num_embeds_ada_norm": 1000}
OLD |= {"num_layers": 28, "num_vector_embeds": None, "only_cross_attention": False, "out_channels": 8, "patch_size": 2}
OLD |= {"upcast_attention": False, "use_linear_projection": False, "_class_name": "Transformer2DModel"}
SINGLE = {"norm_type": "ada_norm_single", "norm_eps": 1e-6, "attention_type": "default", "double_self_attention": False}
SINGLE |= {"caption_channels": 4096, "cross_attention_dim": 1152, "sample_size": 64}
ZERO = {"norm_type": "ada_norm_zero", "cross_attention_dim": None, "sample_size": 32}
STREAMS = {"_class_name": "SD3Transformer2DModel", "attention_head_dim": 64, "caption_projection_dim": 1536, "in_channels": 16}
STREAMS |= {"joint_attention_dim": 4096, "num_attention_heads": 24, "num_layers": 24, "out_channels": 16, "patch_size": 2}
STREAMS |= {"pooled_projection_dim": 2048, "sample_size": 128}
FLUX = {"_class_name": "FluxTransformer2DModel", "_name_or_path": "../checkpoints/flux-dev/transformer", "guidance_embeds": True}
FLUX |= {"attention_head_dim": 128, "in_channels": 64, "joint_attention_dim": 4096, "num_attention_heads": 24, "num_layers": 19}
FLUX |= {"num_single_layers": 38, "patch_size": 1, "pooled_projection_dim": 768}
SAID = {
    "Stable Diffusion 1": (LARGE | FOUR | {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}, "U-Net", 320),
    "Stable Diffusion 2": (
        LARGE
        | FOUR
        | {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
        | {"dual_cross_attention": False, "num_class_embeds": None, "only_cross_attention": False},
        "U-Net",
        320,
    ),
    "XL": (
        LARGE | THREE | {"cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20], "use_linear_projection": True},
        "U-Net",
        320,
    ),
    "Stable Diffusion 3": (STREAMS | {"pos_embed_max_size": 192}, "MMDiT", 1536),
    "Stable Diffusion 3.5": (
        STREAMS | {"pos_embed_max_size": 384, "dual_attention_layers": [*range(13)], "qk_norm": "rms_norm"},
        "MMDiT",
        1536,
    ),
    "Flux": (FLUX, "Flux", 3072),
    "DiT": (OLD | ZERO, "DiT", 1152),
    "PixArt": (OLD | SINGLE, "PixArt", 1152),
}


@pytest.mark.parametrize("kind", SAID)
def test_published_networks_are_known(kind, tmp_path):
    """DiT's and PixArt's by the one name that both had."""
    config, name, width = SAID[kind]
    part = "unet" if name == "U-Net" else "transformer"
    (tmp_path / part).mkdir()
    (tmp_path / part / "config.json").write_text(json.dumps(config))
    index = {"_class_name": "Any", part: ["diffusers", config["_class_name"]], "vae": ["diffusers", "AutoencoderKL"]}
    network, told = _network(tmp_path, index)
    settings, channels, _ = network.read_config(told)
    assert (network.name, settings["width"]) == (name, width) and channels in (4, 16)
