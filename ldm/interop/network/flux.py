"""Flux: schnell, and dev, which is told a guidance scale."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ldm.backbone.flux import Flux
from ldm.errors import Refusal
from ldm.interop.bundle import SHARE, STRAIGHT, VERSION, Bundle
from ldm.interop.keys import check_keys
from ldm.interop.network._stream_names import check_told, depth_of, paired
from ldm.interop.part.t5 import NODE
from ldm.interop.part.t5 import PUBLISHED as PUBLISHED_T5
from ldm.interop.protocols import Built, Network, Ties
from ldm.interop.schedulers import flow_config
from ldm.interop.source import File
from ldm.interop.tie import Shapes, Tie, renamer, same, tied

HEAD, AXES, WAVES = 128, [16, 56, 56], 256  # a published head's features, how they are turned, and a guidance scale's waves
GUIDANCE = {"_target_": "ldm.condition.number.Number", "fields": {"guidance": 3.5}, "width": WAVES, "scale": 1000.0}
ALL = {
    "embed": "img_in",
    "read": "txt_in",
    "level.0": "time_in.in_layer",
    "level.2": "time_in.out_layer",
    "vector.0": "vector_in.in_layer",
    "vector.2": "vector_in.out_layer",
    "guidance.0": "guidance_in.in_layer",
    "guidance.2": "guidance_in.out_layer",
    "last.modulate": "final_layer.adaLN_modulation.1",
    "last.out": "final_layer.linear",
}
DOUBLE = {"blocks": "double_blocks"}
for ours, theirs in (("picture", "img"), ("text", "txt")):
    DOUBLE |= {
        f"{ours}.modulate": f"{theirs}_mod.lin",
        f"{ours}.attend.qkv": f"{theirs}_attn.qkv",
        f"{ours}.attend.out": f"{theirs}_attn.proj",
        f"{ours}.attend.norm_q.weight": f"{theirs}_attn.norm.query_norm.scale",
        f"{ours}.attend.norm_k.weight": f"{theirs}_attn.norm.key_norm.scale",
        f"{ours}.feed.wide": f"{theirs}_mlp.0",
        f"{ours}.feed.out": f"{theirs}_mlp.2",
    }
SINGLE = {"modulate": "modulation.lin", "into": "linear1", "out": "linear2"}
SINGLE |= {"norm_q.weight": "norm.query_norm.scale", "norm_k.weight": "norm.key_norm.scale"}
PUBLISHED, PUBLISHED_SINGLE = renamer(ALL | DOUBLE), renamer(SINGLE)
DIFFUSERS_SINGLE = renamer({"modulate": "norm.linear", "norm_q": "attn.norm_q", "norm_k": "attn.norm_k", "out": "proj_out"})


class FluxNetwork(Network):
    """Told texts, by tokens and a vector, and perhaps a guidance scale."""

    name = "Flux"
    target = "ldm.backbone.flux.Flux"
    made = Flux
    folder = "transformer"
    classes = ("FluxTransformer2DModel",)
    single = "flux"
    alone = True
    shift = 0.1159
    straight = True
    drawn = "FluxPipeline"

    def recognise(self, names: Iterable[str]) -> bool:
        """By its blocks of one sequence."""
        return "single_blocks.0.linear1.weight" in names

    def settings_of(self, shapes: Shapes, told: Mapping[str, Any]) -> Built:
        """The published names and shapes."""
        try:
            width, inward = shapes["img_in.weight"]
            guided, head = "guidance_in.in_layer.weight" in shapes, shapes["single_blocks.0.norm.key_norm.scale"][0]
            settings = {
                "patch": 2,
                "width": width,
                "depth": depth_of(shapes, "double_blocks."),
                "single": depth_of(shapes, "single_blocks."),
                "heads": width // head,
                "axes": [head - 4 * (head * 7 // 32), *[head * 7 // 32 * 2] * 2],  # as AXES
                "guided": guided,
            }
            widths = {"vector": shapes["vector_in.in_layer.weight"][1] + WAVES * guided, "tokens": shapes["txt_in.weight"][1]}
            channels = shapes["final_layer.linear.weight"][0] // 4
        except (KeyError, ValueError) as error:
            raise Refusal(f"This is no Flux in the published layout: {error} is missing among its tensors.") from error
        return settings, channels, {**widths, "spatial": inward // 4 - channels}

    def read_config(self, config: Mapping[str, Any]) -> Built:
        """FluxTransformer2DModel's, whose channels are a patch's of 2 x 2."""
        config = check_keys(config, "FluxTransformer2DModel", "The transformer")
        inward, heads, guided = config["in_channels"], config["num_attention_heads"], config["guidance_embeds"]
        outward = config.get("out_channels") or inward
        settings = {
            "patch": 2,
            "width": heads * config["attention_head_dim"],
            "depth": config["num_layers"],
            "single": config["num_single_layers"],
            "heads": heads,
            "axes": list(config["axes_dims_rope"]),
            "guided": guided,
        }
        vector = config["pooled_projection_dim"] + WAVES * guided
        widths = {"vector": vector, "tokens": config["joint_attention_dim"], "spatial": (inward - outward) // 4}
        return settings, outward // 4, widths

    def config(self, settings: Mapping[str, Any], bundle: Bundle) -> dict[str, Any]:
        """The same."""
        backbone = bundle.backbone()
        inward, outward = backbone["embed.weight"].shape[1], backbone["last.out.weight"].shape[0]
        return {
            "_class_name": "FluxTransformer2DModel",
            "_diffusers_version": VERSION,
            "patch_size": 1,
            "in_channels": inward,
            "out_channels": None if inward == outward else outward,
            "num_layers": settings["depth"],
            "num_single_layers": settings["single"],
            "attention_head_dim": settings["width"] // settings["heads"],
            "num_attention_heads": settings["heads"],
            "joint_attention_dim": backbone["read.weight"].shape[1],
            "pooled_projection_dim": backbone["vector.0.weight"].shape[1],
            "guidance_embeds": settings["guided"],
            "axes_dims_rope": list(settings["axes"]),
        }

    def single_ties(self, names: Iterable[str], settings: Mapping[str, Any], prediction: str) -> Ties:
        """The published ones."""

        def tie(name: str) -> Tie:
            place, inner = _single(name, settings["depth"])
            return same(PUBLISHED(name) if place is None else f"single_blocks.{place}.{PUBLISHED_SINGLE(inner)}")

        return tied(names, tie)

    def diffusers_ties(self, names: Iterable[str], settings: Mapping[str, Any]) -> Ties:
        """FluxTransformer2DModel's."""

        def tie(name: str) -> Tie:
            place, inner = _single(name, settings["depth"])
            if place is None:
                return paired(name, "flux", name.startswith("last.modulate."))
            block, (stem, _, leaf) = f"single_transformer_blocks.{place}", inner.partition(".")
            if stem != "into":
                return same(f"{block}.{DIFFUSERS_SINGLE(inner)}")
            parts = (*(f"attn.to_{letter}" for letter in "qkv"), "proj_mlp")
            return Tie(tuple(f"{block}.{part}.{leaf}" for part in parts), lambda *x: torch.cat(x), _apart)

        return tied(names, tie)

    def channels(self, bundle: Bundle) -> int:
        """As many as a patch of its last layer has."""
        return bundle.backbone()["last.out.weight"].shape[0] // self.settings(bundle)["patch"] ** 2

    def tokens(self, bundle: Bundle) -> int:
        """As wide as the layer reads by which they go in."""
        return bundle.backbone()["read.weight"].shape[1]

    def check_single(self, bundle: Bundle) -> None:
        """Patches of 2 x 2."""
        self._check(bundle)

    def check_diffusers(self, bundle: Bundle) -> None:
        """The same."""
        self._check(bundle)

    def _check(self, bundle: Bundle) -> None:
        flow_config(bundle.recipe)
        check_told(bundle, *(["Number"] if self.settings(bundle)["guided"] else []))
        if (patch := self.settings(bundle)["patch"]) != 2:
            raise Refusal(f"Other layouts know Flux with patches of 2x2; this one has backbone.patch={patch}.")

    def scheduler(self, bundle: Bundle) -> dict[str, Any]:
        """Dev's steps are shifted by the picture's size."""
        guided = self.settings(bundle)["guided"]
        sizes = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
        return flow_config(bundle.recipe, **({"shift": 3.0, "use_dynamic_shifting": True, **sizes} if guided else {}))

    def conditions(self, bundle: Bundle, built: Built, config: Mapping[str, Any] | None, index: Mapping[str, Any]) -> None:
        """The guidance scale, and the published text towers by name, of which a single file holds none.

        Raises:
            Refusal: it is told a picture, by channels beside the noisy ones.
        """
        if (spatial := built[2]["spatial"]) != 0:
            raise Refusal(
                f"The Flux takes {spatial} channels beside the {built[1]} noisy ones, as Fill (a masked picture, its mask) and "
                "Canny and Depth (a control picture) do; dev and schnell are known."
            )
        if (kind := index.get("_class_name", self.drawn)) != self.drawn:
            bundle.assumed.append(f"pipeline: {kind}, of which text to picture is known: no other picture is told it")
        condition = bundle.recipe["condition"]
        if config is None:
            text = {"model": "ViT-L-14-quickgelu", "pretrained": "openai", "layers": [], "pooled": True, "projected": False}
            condition["text"] = {"_target_": "ldm.condition.text.Text", **text, "padding": 49407}
            length = 512 if built[0]["guided"] else 256  # schnell's pipeline reads as many; its users say 256
            condition["language"] = {**NODE, "model": PUBLISHED_T5, "length": length, "padding": "attended"}
            bundle.assumed.append(f"text: OpenAI's CLIP L, and {PUBLISHED_T5}, {length} tokens, which the file does not hold")
        if built[0]["guided"]:
            condition["guidance"] = dict(GUIDANCE)

    def scale(self, file: File) -> float:
        """Flux'."""
        return 0.3611

    def says(self, file: File, bundle: Bundle, built: Built, prediction: str | None) -> str:
        """Flow."""
        return prediction or "Flow"

    def schedule(self, file: File | None, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Straight paths."""
        return dict(STRAIGHT), dict(SHARE)

    def pipeline(self, bundle: Bundle) -> dict[str, Any]:
        """FluxPipeline, of a CLIP and a T5."""
        index: dict[str, Any] = {"_class_name": self.drawn, "_diffusers_version": VERSION}
        index |= {"transformer": ["diffusers", self.classes[0]], "vae": ["diffusers", "AutoencoderKL"]}
        index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
        index |= {"text_encoder_2": ["transformers", "T5EncoderModel"], "tokenizer_2": ["transformers", "T5TokenizerFast"]}
        return {**index, "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}

    def describe(self, bundle: Bundle) -> str:
        """Its sizes."""
        s, count = self.settings(bundle), sum(x.numel() for x in bundle.backbone().values())
        sizes = [f"width {s['width']}", f"depth {s['depth']} + {s['single']}", f"{s['heads']} heads"]
        return f"Flux         {count:,} parameters: {', '.join([*sizes, *(['told a guidance scale'] if s['guided'] else [])])}"


def _single(name: str, depth: int) -> tuple[int | None, str]:
    """blocks.30.into.weight -> 11, into.weight, where `depth` is 19; other names: None."""
    head, number, inner = [*name.split(".", 2), "", ""][:3]
    if head != "blocks" or int(number) < depth:
        return None, name
    return int(number) - depth, inner


def _apart(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Queries, keys, values, and the feed-forward, which is four times as wide."""
    q, k, v, *wide = x.chunk(7)
    return q, k, v, torch.cat(wide)


NETWORK = FluxNetwork()
