"""The representation autoencoder, by the names of diffusers' AutoencoderRAE, which is a model alone: no pipeline there has one.

diffusers keeps the encoder by the names of transformers 5; those of version 4, which published folders have, are read too.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.autoencoder._encoder import KINDS, Kind, Named
from ldm.autoencoder.rae import RAE
from ldm.errors import Refusal
from ldm.files.folder import read_recipe, read_weights, save_model, save_tensors, without_usual, write_json
from ldm.interop import protocols
from ldm.interop.bundle import VERSION, Bundle, Part, filled, home_of, shapes_of
from ldm.interop.files import take_part
from ldm.interop.keys import check_keys
from ldm.interop.tie import Tie, check_whole, give, same, stacked
from ldm.interop.weights import check_numbers, read_config
from ldm.nn.vit import ViT

TARGET, ENCODER, PLACE = "ldm.autoencoder.rae.RAE", "ldm.nn.vit.ViT", "autoencoder"
CLASS = "AutoencoderRAE"
EPS = 1e-5  # what diffusers adds to a deviation
HEAD_WIDTH = 64  # of every encoder there
SPAN = 16  # places that positions are counted over
POSITIONS = {"dinov2": 518, "siglip2": 256, "mae": 224}  # pixels a side of the pictures that positions are of
INNER = 3072  # features within the feed-forwards, whatever the width, but of a DINOv2: there 4 times as wide
LAYER = {"norm_in": "layernorm_before", "norm_out": "layernorm_after", "wide": "intermediate.dense", "narrow": "output.dense"}
LAYER["attend.out"] = "attention.to_out.0"
OUTER = {"embed": "embed", "norm": "norm", "out": "pred"}
DECODER = {
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "inner": "intermediate_size",
}
COLOURS = {"pixel_mean": "encoder_mean", "pixel_std": "encoder_std"}


def settings_of(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """AutoencoderRAE's config -> how `RAE` is built, `_target_` with it.

    Raises:
        Refusal: it says what is not known.
    """
    config = check_keys(config, CLASS, str(folder))
    kind, width, patch = config["encoder_type"], config["encoder_hidden_size"], config["encoder_patch_size"]
    side, factor = config["encoder_input_size"] // patch, config["patch_size"]
    if config["image_size"] not in (None, side * factor) or width % HEAD_WIDTH or config["encoder_input_size"] % patch:
        raise Refusal(
            f"{folder} has image_size={config['image_size']}, encoder_hidden_size={width} and "
            f"encoder_input_size={config['encoder_input_size']}; {side * factor}, the pixels of {side} patches of {factor}, a "
            f"multiple of {HEAD_WIDTH}, and one of {patch} were wanted."
        )
    encoder = {"_target_": ENCODER, "patch": patch, "width": width, "depth": config["encoder_num_hidden_layers"]}
    encoder |= {"heads": width // HEAD_WIDTH, "inner": 4 * width if kind == "dinov2" else INNER}
    encoder |= {"side": POSITIONS[kind] // patch, **KINDS[kind].settings}
    decoder = {name: config[f"decoder_{there}"] for name, there in DECODER.items()}
    return {"_target_": TARGET, "encoder": encoder, "side": side, "factor": factor, **decoder, "noise": config["noise_tau"]}


def config_of(settings: Mapping[str, Any], kind: str, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """How `RAE` is built, the defaults filled in, and diffusers' tensors -> AutoencoderRAE's config."""
    encoder = filled(ViT, settings["encoder"])
    return {
        "_class_name": CLASS,
        "_diffusers_version": VERSION,
        "encoder_type": kind,
        "encoder_hidden_size": encoder["width"],
        "encoder_patch_size": encoder["patch"],
        "encoder_num_hidden_layers": encoder["depth"],
        "encoder_input_size": settings["side"] * encoder["patch"],
        "encoder_norm_mean": list(settings["pixel_mean"]),
        "encoder_norm_std": list(settings["pixel_std"]),
        **{f"decoder_{there}": settings[name] for name, there in DECODER.items()},
        "patch_size": settings["factor"],
        "image_size": settings["side"] * settings["factor"],
        "num_channels": 3,
        "latents_mean": weights["_latents_mean"].tolist(),
        "latents_std": weights["_latents_std"].tolist(),
        "noise_tau": settings["noise"],
        "reshape_to_2d": True,
        "use_encoder_loss": False,
        "scaling_factor": 1.0,
    }


def kind_of(settings: Mapping[str, Any]) -> str:
    """Which of diffusers' encoders one is.

    Raises:
        Refusal: none.
    """
    if settings["span"] != SPAN:
        raise Refusal(
            f"diffusers' {CLASS} counts its decoder's positions over {SPAN} places; autoencoder.span={settings['span']}."
        )
    encoder = filled(ViT, settings["encoder"])
    wanted = {"heads": encoder["width"] // HEAD_WIDTH}
    for name, kind in KINDS.items():
        sizes = {"inner": 4 * encoder["width"] if name == "dinov2" else INNER, "side": POSITIONS[name] // encoder["patch"]}
        if all(encoder[key] == value for key, value in {**kind.settings, **wanted, **sizes}.items()):
            return name
    raise Refusal(f"diffusers' {CLASS} has the encoders {', '.join(KINDS)} at their own sizes; autoencoder.encoder={encoder}.")


def built(settings: Mapping[str, Any]) -> RAE:
    """Such an autoencoder, without weights."""
    told = {name: value for name, value in settings.items() if name not in ("_target_", "encoder", "weights")}
    with torch.device("meta"):
        return RAE(ViT(**{k: v for k, v in settings["encoder"].items() if k[0] != "_"}), **told)


def diffusers(net: RAE, kind: Kind) -> dict[str, Tie]:
    """Our names -> diffusers'."""
    ties = {f"encoder.{name}": _encoder_tie(named) for name, named in kind.names(net.encoder).items()}
    ties["decoder.first"] = Tie(("decoder.trainable_cls_token",), lambda x: x[0, 0], lambda x: (x[None, None],))
    for end in ("weight", "bias"):
        ties |= {f"decoder.{ours}.{end}": same(f"decoder.decoder_{there}.{end}") for ours, there in OUTER.items()}
        for i in range(len(net.decoder.blocks)):
            ours, theirs = f"decoder.blocks.{i}", f"decoder.decoder_layers.{i}"
            ties |= {f"{ours}.{name}.{end}": same(f"{theirs}.{there}.{end}") for name, there in LAYER.items()}
            ties[f"{ours}.attend.qkv.{end}"] = stacked(*(f"{theirs}.attention.to_{letter}.{end}" for letter in "qkv"))
    return ties


def _encoder_tie(named: Named) -> Tie:
    names = tuple(f"encoder.{name}" for name in named.names)
    if not named.ones:
        return stacked(*names) if len(names) > 1 else same(*names)
    return Tie(names, lambda x: x.flatten(0, named.ones), lambda x: (x[(None,) * named.ones],))


class Representation(protocols.Part):
    """A representation autoencoder, in the place of the autoencoder; in diffusers it is a model alone."""

    kind = "rae"
    word = "autoencoder"
    classes = (CLASS,)
    alone = True

    def take_folder(self, folder: Path, index: Mapping[str, Any], bundle: Bundle) -> None:
        """AutoencoderRAE's own folder."""
        if bundle.recipe is None:
            bundle.parts[PLACE] = read_rae(folder)

    def give_folder(self, bundle: Bundle, folder: Path, index: Mapping[str, Any]) -> None:
        """The same. What an encoder of transformers holds beside what AutoencoderRAE reads is zeros."""
        if (part := self._of(bundle)) is None:
            return
        settings = part.settings()
        kind, net = kind_of(settings), built(settings)
        ties = diffusers(net, KINDS[kind]) | _statistics_ties(()) | {n: _flat(there) for n, there in COLOURS.items()}
        colours = {name: torch.tensor(list(settings[name])) for name in COLOURS}
        weights = give(ties, {**part.weights, **colours}) | _unread(kind, settings)
        write_json(config_of(settings, kind, weights), folder / "config.json")
        save_tensors({n: x.contiguous() for n, x in weights.items()}, folder / "diffusion_pytorch_model.safetensors")

    def give_file(self, bundle: Bundle) -> dict[str, Tensor]:
        """No code reads one from a file.

        Raises:
            Refusal: always, of such an autoencoder.
        """
        if self._of(bundle) is not None:
            raise Refusal(
                "A representation autoencoder has no place in a single file; --to diffusers writes AutoencoderRAE's folder."
            )
        return {}

    def take_ours(self, bundle: Bundle, folder: Path) -> None:
        """The folder that the recipe names, or this one, where it holds such an autoencoder."""
        home = folder
        if bundle.recipe is not None:
            node = bundle.recipe["autoencoder"]
            home = home_of(node["path"], folder) if "path" in node else folder
        config = without_usual(read_recipe(home))[0] if (home / "config.json").is_file() else {}
        if config.get("_target_") != TARGET:
            return
        weights, path = read_weights(home / "model.safetensors"), home / "model.safetensors"
        check_whole(weights, shapes_of(built(filled(RAE, config))), str(path))
        check_numbers(weights, path)
        bundle.parts[PLACE] = Part(dict(config), weights, self.kind)

    def give_ours(self, bundle: Bundle, folder: Path) -> None:
        """The same."""
        if (part := self._of(bundle)) is not None:
            save_model(part.weights, part.config, folder if bundle.recipe is None else folder / PLACE)

    def check_folder(self, bundle: Bundle) -> None:
        """Raises Refusal, since no pipeline reads one."""
        if self._of(bundle) is not None:
            raise Refusal("diffusers' pipelines read AutoencoderKL; this model's autoencoder is a representation autoencoder.")

    def _of(self, bundle: Bundle) -> Part | None:
        part = bundle.parts.get(PLACE)
        return part if part is not None and part.kind == self.kind else None


def read_rae(folder: Path) -> Part:
    """AutoencoderRAE's folder; how many pictures its statistics come from nobody says: -1.

    Raises:
        Refusal: names what is missing, unknown, or read by nobody.
    """
    config = read_config(folder / "config.json")
    ours = settings_of(config, folder)
    name = config.get("encoder_type", "dinov2")
    net, kind = built(ours), KINDS[name]
    shapes = {n: shape for n, shape in shapes_of(net).items() if n != "count"} | dict.fromkeys(COLOURS, (3,))
    ties = diffusers(net, kind) | _statistics_ties(shapes["mean"]) | {n: _flat(there) for n, there in COLOURS.items()}

    def today(tensor: str) -> str:
        head, _, rest = tensor.partition(".")
        return f"encoder.{kind.today(rest)}" if head == "encoder" else tensor

    weights = take_part(folder, ties, shapes, left=(*_unread(name, ours), "decoder.decoder_pos_embed"), today=today)
    weights["std"] = weights["std"] / config.get("scaling_factor", 1.0)
    colours = {n: [float(f"{x:.6g}") for x in weights.pop(n).tolist()] for n in COLOURS}
    return Part({**ours, **colours}, {**weights, "count": torch.tensor(-1)}, Representation.kind)


def _statistics_ties(shape: tuple[int, ...]) -> dict[str, Tie]:
    """Statistics, there of all numbers, of each channel, or of each channel and place; diffusers adds a little to a deviation."""

    def whole(x: Tensor) -> Tensor:
        x = x.squeeze(0) if x.ndim == 4 else x
        return (x[:, None, None] if x.ndim == 1 else x).expand(shape).clone()

    std = Tie(("_latents_std",), lambda x: whole(x) + EPS, lambda x: (x - EPS,))
    return {"mean": Tie(("_latents_mean",), whole, lambda x: (x,)), "std": std}


def _flat(name: str) -> Tie:
    return Tie((name,), lambda x: x.flatten(), lambda x: (x.view(1, 3, 1, 1),))


def _unread(kind: str, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the encoders of transformers hold beside: zeros in the place of numbers that change no feature."""
    encoder = filled(ViT, settings["encoder"])
    width, inner = encoder["width"], encoder["inner"]
    if kind == "dinov2":
        return {"encoder.embeddings.mask_token": torch.zeros(1, width)}
    if kind == "mae":
        return {}
    shapes = {"probe": (1, 1, width), "attention.in_proj_weight": (3 * width, width), "attention.in_proj_bias": (3 * width,)}
    shapes |= {"attention.out_proj.weight": (width, width), "attention.out_proj.bias": (width,)}
    shapes |= {"layernorm.weight": (width,), "layernorm.bias": (width,), "mlp.fc1.weight": (inner, width)}
    shapes |= {"mlp.fc1.bias": (inner,), "mlp.fc2.weight": (width, inner), "mlp.fc2.bias": (width,)}
    return {f"encoder.head.{name}": torch.zeros(shape) for name, shape in shapes.items()}


PART = Representation()
