"""The first stages' settings as diffusers' AutoencoderKL and VQModel say them, and as the yaml beside a single file does."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.errors import Refusal
from ldm.interop.bundle import VERSION
from ldm.interop.keys import check_keys


def vae_settings(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """AutoencoderKL's or VQModel's config -> how `KL` or `VQ` is built, `_target_` with it.

    Raises:
        Refusal: it is neither.
    """
    kind = config.get("_class_name")
    if kind not in ("AutoencoderKL", "VQModel"):
        raise Refusal(f"{folder} holds a {kind}; AutoencoderKL, VQModel and AutoencoderRAE are known.")
    config = check_keys(config, kind, str(folder))
    width, *_ = blocks = config["block_out_channels"]
    down, up, channels = config["down_block_types"], config["up_block_types"], config["latent_channels"]
    attends = [block == "AttnDownEncoderBlock2D" for block in down]
    kinds = [[f"{'Attn' if a else ''}{name}" for a in attends] for name in ("DownEncoderBlock2D", "UpDecoderBlock2D")]
    if list(down) != kinds[0] or list(up) != kinds[1][::-1] or any(ch % width for ch in blocks):
        raise Refusal(
            f"{folder} has down_block_types={down}, up_block_types={up} and block_out_channels={blocks}; down blocks, with or "
            "without attention, their mirror, and multiples of the first are known."
        )
    if kind == "VQModel" and config["vq_embed_dim"] not in (None, channels):
        raise Refusal(f"{folder} has vq_embed_dim={config['vq_embed_dim']}; as many as latent_channels, {channels}, are known.")
    ours = {"channels": channels, "width": width, "mult": [ch // width for ch in blocks]}
    ours |= {"res_blocks": config["layers_per_block"], "groups": config["norm_num_groups"]}
    ours["attention"] = [i for i, attend in enumerate(attends) if attend]
    around = [config.get(name, True) for name in ("use_quant_conv", "use_post_quant_conv")]  # a VQModel always has them
    if around[0] != around[1]:
        raise Refusal(f"{folder} has use_quant_conv={around[0]} and use_post_quant_conv={around[1]}; both or neither are known.")
    if kind == "AutoencoderKL":
        return {"_target_": "ldm.autoencoder.kl.KL", **ours, **({} if around[0] else {"quant_conv": False})}
    return {"_target_": "ldm.autoencoder.vq.VQ", **ours, "codes": config["num_vq_embeddings"]}


def vae_config(
    ours: Mapping[str, Any], scale: float, shift: float, weights: Mapping[str, Any], shifted: bool = False
) -> dict[str, Any]:
    """-> AutoencoderKL's or VQModel's config.

    Args:
        ours: how `KL` or `VQ` is built, the defaults filled in.
        scale, shift: of its latents.
        weights: its tensors, which say what is around the latents.
        shifted: whether a shift is said also where it is 0, as pipelines read it that always do.
    """
    quantised, around = "codebook" in weights, "quant_conv.weight" in weights
    attends = [i in ours["attention"] for i in range(len(ours["mult"]))]
    return {
        "_class_name": "VQModel" if quantised else "AutoencoderKL",
        "_diffusers_version": VERSION,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": ours["channels"],
        "block_out_channels": [ours["width"] * m for m in ours["mult"]],
        "down_block_types": ["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attends],
        "up_block_types": ["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attends)],
        "layers_per_block": ours["res_blocks"],
        "norm_num_groups": ours["groups"],
        "scaling_factor": scale,
        "act_fn": "silu",
        "sample_size": 256,
        **({"shift_factor": shift} if shift or shifted or not around else {}),
        **({} if around else {"use_quant_conv": False, "use_post_quant_conv": False}),
        **({"num_vq_embeddings": ours["codes"], "vq_embed_dim": ours["channels"]} if quantised else {}),
    }


def beside(ours: Mapping[str, Any], quantised: bool) -> dict[str, Any]:
    """What the original code is told of it."""
    network = {
        "double_z": not quantised,
        "z_channels": ours["channels"],
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": ours["width"],
        "ch_mult": list(ours["mult"]),
        "num_res_blocks": ours["res_blocks"],
        "attn_resolutions": [256 // 2**i for i in ours["attention"]],
        "dropout": 0.0,
    }
    params = {"embed_dim": ours["channels"], "ddconfig": network, **({"n_embed": ours["codes"]} if quantised else {})}
    return {"target": f"ldm.models.autoencoder.{'VQModelInterface' if quantised else 'AutoencoderKL'}", "params": params}
