"""PixArt (https://arxiv.org/abs/2310.00426, Sigma: https://arxiv.org/abs/2403.04692): a DiT that attends to a T5's tokens."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ldm.backbone.dit import DiT
from ldm.errors import Refusal
from ldm.interop.bundle import BETAS, DISCRETE, VERSION, Bundle
from ldm.interop.keys import check_keys
from ldm.interop.network.dit import HEADS, DiTNetwork, sizes
from ldm.interop.part.t5 import NODE, TARGET
from ldm.interop.part.t5 import PUBLISHED as PUBLISHED_T5
from ldm.interop.protocols import Built, Network, Ties
from ldm.interop.source import File
from ldm.interop.tie import Shapes, renamer, same, stacked, tied
from ldm.nn.transformer import sinusoidal_positions

T5 = {**NODE, "model": PUBLISHED_T5, "length": 300, "padding": "masked"}
BASE = 64  # latents' side that positions are laid over from 512 pixels on
DIFFUSERS = renamer(
    {
        "embed": "pos_embed.proj",
        "level.0": "adaln_single.emb.timestep_embedder.linear_1",
        "level.2": "adaln_single.emb.timestep_embedder.linear_2",
        "modulate": "adaln_single.linear",
        "read.wide": "caption_projection.linear_1",
        "read.out": "caption_projection.linear_2",
        "blocks": "transformer_blocks",
        "modulate.table": "scale_shift_table",
        "attend.out": "attn1.to_out.0",
        "attend_tokens.q": "attn2.to_q",
        "attend_tokens.out": "attn2.to_out.0",
        "feed.wide": "ff.net.0.proj",
        "feed.out": "ff.net.2",
        "last.modulate.table": "scale_shift_table",
        "last.out": "proj_out",
    }
)
PUBLISHED = renamer(
    {
        "embed": "x_embedder.proj",
        "level": "t_embedder.mlp",
        "modulate": "t_block.1",
        "read.wide": "y_embedder.y_proj.fc1",
        "read.out": "y_embedder.y_proj.fc2",
        "modulate.table": "scale_shift_table",
        "attend.qkv": "attn.qkv",
        "attend.out": "attn.proj",
        "attend_tokens.q": "cross_attn.q_linear",
        "attend_tokens.kv": "cross_attn.kv_linear",
        "attend_tokens.out": "cross_attn.proj",
        "feed.wide": "mlp.fc1",
        "feed.out": "mlp.fc2",
        "last.modulate.table": "final_layer.scale_shift_table",
        "last.out": "final_layer.linear",
    }
)
READS = "y_embedder.y_proj.fc1.weight"


class PixArt(Network):
    """Told a text, by tokens alone."""

    name = "PixArt"
    target = DiTNetwork.target
    made = DiT
    folder = "transformer"
    classes = ("PixArtTransformer2DModel",)
    single = "pixart"
    alone = True
    left = ("pos_embed", "y_embedder.y_embedding")  # positions are computed; a text that was dropped is the empty one
    diffusers_left = ("pos_embed.pos_embed",)

    def builds(self, bundle: Bundle) -> bool:
        """A DiT that reads tokens."""
        return super().builds(bundle) and "read.wide.weight" in bundle.backbone()

    def recognise(self, names: Iterable[str]) -> bool:
        """By the way its texts go in."""
        return READS in names

    def settings_of(self, shapes: Shapes, told: Mapping[str, Any]) -> Built:
        """The published names and shapes; where its positions lie is in none but those that Alpha's files hold."""
        try:
            width, channels, patch = shapes["x_embedder.proj.weight"][:3]
            tokens, outward = shapes[READS][1], shapes["final_layer.linear.weight"][0]
        except KeyError as error:
            raise Refusal(f"This is no PixArt in the published layout: {error} is missing among its tensors.") from error
        if "csize_embedder.mlp.0.weight" in shapes:
            raise Refusal("This PixArt is told sizes and aspects (csize_embedder), Alpha's of 1024 pixels; others are known.")
        side = min(BASE, int(shapes["pos_embed"][1] ** 0.5) * patch) if "pos_embed" in shapes else BASE
        depth = sum(name.endswith(".attn.qkv.weight") for name in shapes)
        heads = HEADS.get(width, max(1, width // 64))
        found = {"size": side, "patch": patch, "width": width, "depth": depth, "heads": heads}
        learn = outward == 2 * patch * patch * channels
        return {**found, "learn_range": learn, "shared": True}, channels, {"vector": 0, "tokens": tokens, "spatial": 0}

    def read_config(self, config: Mapping[str, Any]) -> Built:
        """PixArtTransformer2DModel's."""
        config = check_keys(config, "PixArtTransformer2DModel", "The transformer")
        channels, size = config["in_channels"], config["sample_size"]
        outward, heads = config["out_channels"] or channels, config["num_attention_heads"]
        width = heads * config["attention_head_dim"]
        scale, told = config.get("interpolation_scale") or max(size // BASE, 1), config.get("use_additional_conditions")
        wrong = {"out_channels": outward not in (channels, 2 * channels), "sample_size": size % scale != 0}
        wrong |= {"cross_attention_dim": config["cross_attention_dim"] != width}
        wrong |= {"caption_channels": not config.get("caption_channels")}
        wrong |= {"use_additional_conditions": bool(size == 128 if told is None else told)}
        if any(wrong.values()):
            name = next(name for name in wrong if wrong[name])
            raise Refusal(f"The transformer has {name}={config.get(name)}, which no PixArt that is known here has.")
        settings = {
            "size": size // scale,
            "patch": config["patch_size"],
            "width": width,
            "depth": config["num_layers"],
            "heads": heads,
            "learn_range": outward == 2 * channels,
            "shared": True,
        }
        return settings, channels, {"vector": 0, "tokens": config["caption_channels"], "spatial": 0}

    def config(self, settings: Mapping[str, Any], bundle: Bundle) -> dict[str, Any]:
        """The same; positions are laid over as much, and a picture's usual size is twice as large from 1024 pixels on."""
        backbone = bundle.backbone()
        return {
            "_class_name": "PixArtTransformer2DModel",
            **sizes(settings, backbone["embed.weight"].shape[1]),
            "cross_attention_dim": settings["width"],
            "caption_channels": backbone["read.wide.weight"].shape[1],
            "interpolation_scale": 1,
            "use_additional_conditions": False,
        }

    def single_ties(self, names: Iterable[str], settings: Mapping[str, Any], prediction: str) -> Ties:
        """The published ones."""
        return tied((name for name in names if name != "position"), lambda name: same(PUBLISHED(name)))

    def diffusers_ties(self, names: Iterable[str], settings: Mapping[str, Any]) -> Ties:
        """PixArtTransformer2DModel's, where queries, keys and values are apart."""

        def tie(name: str) -> Any:
            for piece, kind, letters in ((".attend.qkv.", "attn1", "qkv"), (".attend_tokens.kv.", "attn2", "kv")):
                if piece in name:
                    block, leaf = name.replace("blocks", "transformer_blocks").split(piece)
                    return stacked(*(f"{block}.{kind}.to_{letter}.{leaf}" for letter in letters))
            return same(DIFFUSERS(name))

        return tied((name for name in names if name != "position"), tie)

    def computed(self, settings: Mapping[str, Any]) -> dict[str, Tensor]:
        """Its positions."""
        side = settings["size"] // settings["patch"]
        return {"position": sinusoidal_positions(side, side, settings["width"])}

    def channels(self, bundle: Bundle) -> int:
        """As many as a patch of its last layer has."""
        s, out = self.settings(bundle), bundle.backbone()["last.out.weight"]
        return out.shape[0] // s["patch"] ** 2 // (2 if s["learn_range"] else 1)

    def tokens(self, bundle: Bundle) -> int:
        """As wide as its captions' layer reads."""
        return bundle.backbone()["read.wide.weight"].shape[1]

    def check_single(self, bundle: Bundle) -> None:
        """As PixArt's own, with as many heads, and positions laid over as much, as published networks have."""
        self._check(bundle)
        s = self.settings(bundle)
        if s["size"] != BASE or s["heads"] != HEADS.get(s["width"], max(1, s["width"] // 64)):
            raise Refusal(
                f"A file says neither how many heads there are nor what positions are laid over; this one has {s['heads']} and "
                f"backbone.size={s['size']}, not as published ones of its width. Use --to diffusers."
            )

    def check_diffusers(self, bundle: Bundle) -> None:
        """The same."""
        self._check(bundle)

    def _check(self, bundle: Bundle) -> None:
        usual = {"shared": True, "fixed": True, "tokens": "cross", "rms_norm": False, "swiglu": False, "rotary": False}
        usual |= {"norm_heads": False, "registers": 0, "fuse": None}
        settings = self.settings(bundle)
        strange = [f"backbone.{name}={settings[name]}" for name, value in usual.items() if settings[name] != value]
        condition = bundle.recipe["condition"]
        strange += [f"condition.{name}" for name, node in condition.items() if node.get("_target_") != TARGET]
        if strange:
            raise Refusal(f"Other layouts know DiTs that read tokens as PixArt is; this one has {', '.join(strange)}.")

    def conditions(self, bundle: Bundle, built: Built, config: Mapping[str, Any] | None, index: Mapping[str, Any]) -> None:
        """A single file holds no text tower: it is named."""
        if config is None:
            bundle.recipe["condition"]["language"] = dict(T5)
            bundle.assumed.append(f"text: {T5['model']}, {T5['length']} tokens of a caption (Alpha was trained on 120)")

    def schedule(self, file: File | None, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """DDPM's."""
        return {"_target_": "ldm.schedule.DDPM", **dict(zip(("beta_start", "beta_end"), BETAS["DDPM"]))}, dict(DISCRETE)

    def pipeline(self, bundle: Bundle) -> dict[str, Any]:
        """PixArtSigmaPipeline, which draws Alpha's of up to 512 pixels as well."""
        index: dict[str, Any] = {"_class_name": "PixArtSigmaPipeline", "_diffusers_version": VERSION}
        index |= {"transformer": ["diffusers", self.classes[0]], "vae": ["diffusers", "AutoencoderKL"]}
        index |= {"text_encoder": ["transformers", "T5EncoderModel"], "tokenizer": ["transformers", "T5Tokenizer"]}
        return {**index, "scheduler": ["diffusers", "DDIMScheduler"]}


NETWORK = PixArt()
