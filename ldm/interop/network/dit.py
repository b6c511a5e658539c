"""DiT, SiT and LightningDiT, and what whole models on them are told: a class."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.backbone.dit import DiT
from ldm.errors import Refusal
from ldm.interop.bundle import BETAS, DISCRETE, VERSION, Bundle
from ldm.interop.conditions import LABEL
from ldm.interop.keys import check_keys
from ldm.interop.network._dit_names import (
    HEADS,
    ROTARY,
    TABLE,
    diffusers,
    diffusers_table,
    dit_shapes,
    node,
    published,
    settings_of,
)
from ldm.interop.protocols import Built, Network, Ties
from ldm.interop.source import File
from ldm.interop.tie import Shapes, Tie, check_whole, give
from ldm.nn.transformer import sinusoidal_positions

ROWS = 1001  # of the class table that diffusers' pipeline wants; it knows no label by its last
CLASS = "ldm.condition.label.Label"
OURS = ("rms_norm", "swiglu", "rotary", "norm_heads", "shared", "registers", "fuse", "head")  # which diffusers has not


class DiTNetwork(Network):
    """Told a class, as a vector that is added as it is."""

    name = "DiT"
    target = "ldm.backbone.dit.DiT"
    made = DiT
    folder = "transformer"
    classes = ("DiTTransformer2DModel", "Transformer2DModel")
    single = "dit"
    alone = True
    left = (ROTARY, "projectors.")  # REPA's heads, which training alone reads
    diffusers_left = ("pos_embed.pos_embed",)

    def builds(self, bundle: Bundle) -> bool:
        """One that reads no tokens."""
        return super().builds(bundle) and "read.wide.weight" not in bundle.backbone()

    def recognise(self, names: Iterable[str]) -> bool:
        """By its class table."""
        return TABLE in names

    def settings_of(self, shapes: Shapes, told: Mapping[str, Any]) -> Built:
        """The published names and shapes."""
        settings, channels = settings_of(shapes)
        return settings, channels, {"vector": settings["width"], "tokens": 0, "spatial": 0}

    def read_config(self, config: Mapping[str, Any]) -> Built:
        """DiTTransformer2DModel's."""
        kind = config.get("_class_name")
        if kind not in self.classes or config.get("num_embeds_ada_norm", 1000) is None:
            said = "" if kind not in self.classes else " with num_embeds_ada_norm=None"
            raise Refusal(f"The transformer is a {kind}{said}; of transformers the DiT of 2212.09748 is known.")
        config = check_keys(config, kind, "The transformer")
        channels = config["in_channels"]
        outward = config["out_channels"] or channels
        if outward not in (channels, 2 * channels):
            raise Refusal(f"The transformer has out_channels={outward}; {channels}, or twice as many with ranges, are known.")
        settings = {
            "size": config["sample_size"],
            "patch": config["patch_size"],
            "width": config["num_attention_heads"] * config["attention_head_dim"],
            "depth": config["num_layers"],
            "heads": config["num_attention_heads"],
            "learn_range": outward == 2 * channels,
        }
        return settings, channels, {"vector": settings["width"], "tokens": 0, "spatial": 0}

    def config(self, settings: Mapping[str, Any], bundle: Bundle) -> dict[str, Any]:
        """The same."""
        channels = bundle.backbone()["embed.weight"].shape[1]
        return {"_class_name": "DiTTransformer2DModel", **sizes(settings, channels), "num_embeds_ada_norm": ROWS - 1}

    def single_ties(self, names: Iterable[str], settings: Mapping[str, Any], prediction: str) -> Ties:
        """The published ones; those that say flow run time backwards."""
        return published(names, settings["swiglu"], reverse=prediction == "Flow")

    def diffusers_ties(self, names: Iterable[str], settings: Mapping[str, Any]) -> Ties:
        """DiTTransformer2DModel's."""
        return diffusers(names, settings["depth"])

    def shapes(self, channels: int, widths: Mapping[str, int], settings: Mapping[str, Any]) -> Shapes:
        """Those of a DiT that is told a vector as wide as it is."""
        return dit_shapes(channels, **settings)

    def node(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Its vector is added as it is."""
        return node(settings)

    def channels(self, bundle: Bundle) -> int:
        """As many as a patch of its last layer has."""
        s, out = self.settings(bundle), bundle.backbone()["last.out.weight"]
        return out.shape[0] // s["patch"] ** 2 // (2 if s["learn_range"] else 1)

    def check_single(self, bundle: Bundle) -> None:
        """A class alone, and as many heads as published networks have."""
        settings = self._whole(bundle)
        wanted = HEADS.get(settings["width"], max(1, settings["width"] // 64))
        if settings["heads"] != wanted:
            raise Refusal(
                f"A file does not say how many heads there are; published networks as wide have {wanted}, not this one."
            )

    def check_diffusers(self, bundle: Bundle) -> None:
        """A class alone, of the DiT of 2212.09748."""
        settings = self._whole(bundle)
        if ours := [name for name in OURS if settings[name]]:
            raise Refusal(
                f"diffusers' DiTPipeline knows the DiT of 2212.09748; this one has backbone.{', backbone.'.join(ours)}."
            )
        if (rows := len(bundle.weights[LABEL])) > ROWS:
            raise Refusal(f"diffusers' DiTPipeline knows {ROWS - 1} classes; this model has {rows - 1}.")

    def tables(self) -> dict[str, str]:
        """Of classes."""
        return {LABEL: TABLE}

    def diffusers_tables(self, config: Mapping[str, Any], built: Built) -> dict[str, tuple[Tie, tuple[int, ...]]]:
        """Of classes, one a block."""
        settings, _, _ = built
        ties = diffusers_table(settings["depth"])
        return {LABEL: (ties["table"], (config["num_embeds_ada_norm"] + 1, settings["width"]))}

    def diffusers_rows(self, bundle: Bundle) -> dict[str, Tensor]:
        """The same, of 1,000 classes and none."""
        table = bundle.weights[LABEL]
        between = table.new_zeros(ROWS - len(table), table.shape[1])
        ties = diffusers_table(self.settings(bundle)["depth"])
        return give(ties, {"table": torch.cat((table[:-1], between, table[-1:]))})

    def computed(self, settings: Mapping[str, Any]) -> dict[str, Tensor]:
        """Its positions."""
        side = settings["size"] // settings["patch"]
        return {"position": sinusoidal_positions(side, side, settings["width"])}

    def conditions(self, bundle: Bundle, built: Built, config: Mapping[str, Any] | None, index: Mapping[str, Any]) -> None:
        """The class."""
        label = {"classes": len(bundle.weights[LABEL]) - 1, "width": built[0]["width"], "slot": "vector"}
        bundle.recipe["condition"]["label"] = {"_target_": CLASS, **label}

    def says(self, file: File, bundle: Bundle, built: Built, prediction: str | None) -> str:
        """LightningDiT says flow.

        Raises:
            Refusal: DiT and SiT look alike.
        """
        if prediction is None and not built[0]["rms_norm"]:
            raise Refusal(
                f"{file.path} is a DiT, which says noise, or a SiT, which says flow; the weights look alike. Say --prediction "
                "noise or --prediction flow."
            )
        return prediction or "Flow"

    def schedule(self, file: File | None, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Straight paths told from the data's side, or DDPM's."""
        if kind == "Flow":
            return {"_target_": "ldm.schedule.Linear"}, {"_target_": "ldm.denoiser.DataTime"}
        return {"_target_": "ldm.schedule.DDPM", **dict(zip(("beta_start", "beta_end"), BETAS["DDPM"]))}, dict(DISCRETE)

    def assumed(self, file: File, bundle: Bundle, prediction: str | None) -> list[str]:
        """Heads, and what is LightningDiT's or DiT's."""
        s, flow = bundle.recipe["backbone"], bundle.recipe["prediction"]["_target_"].endswith("Flow")
        lines = [f"heads: {s['heads']}, as published networks {s['width']} wide have"]
        lines += [] if flow else ["schedule: DDPM's, betas 0.0001 to 0.02"]
        return lines + ([] if prediction else ["prediction: flow, as LightningDiT's"])

    def pipeline(self, bundle: Bundle) -> dict[str, Any]:
        """DiTPipeline, with the names of the classes."""
        classes = bundle.recipe["condition"]["label"]["classes"]
        names = {} if isinstance(classes, int) else {str(i): name for i, name in enumerate(classes)}
        index: dict[str, Any] = {"_class_name": "DiTPipeline", "_diffusers_version": VERSION, "id2label": names}
        index |= {"transformer": ["diffusers", "DiTTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]}
        return {**index, "scheduler": ["diffusers", "DDIMScheduler"]}

    def describe(self, bundle: Bundle) -> str:
        """Its sizes."""
        s, count = self.settings(bundle), sum(x.numel() for name, x in bundle.backbone().items() if name != "position")
        sizes = [f"width {s['width']}", f"depth {s['depth']}", f"{s['heads']} heads", f"patch {s['patch']}"]
        return f"DiT          {count:,} parameters: {', '.join(sizes + [name for name in OURS if s[name]])}"

    def _whole(self, bundle: Bundle) -> dict[str, Any]:
        """How it is built, where a class alone is told it, as a vector.

        Raises:
            Refusal: it is told otherwise.
        """
        told = [node["_target_"] for node in bundle.recipe["condition"].values()]
        mixes = any(name.startswith("vector.") for name in bundle.backbone())
        if told != [CLASS] or mixes:
            raise Refusal(
                f"Other layouts know DiT with a class alone, whose table is added as it is; this one is told {told}"
                f"{' through an MLP (backbone.vector)' if mixes else ''}."
            )
        settings, backbone = self.settings(bundle), bundle.backbone()
        channels = backbone["embed.weight"].shape[1] if "embed.weight" in backbone else 0
        check_whole(backbone, dit_shapes(channels, **settings), "The backbone")
        return settings


NETWORK = DiTNetwork()


def sizes(settings: Mapping[str, Any], channels: int) -> dict[str, Any]:
    """The sizes of a DiT in the words that the configs of diffusers' transformers of this kind share."""
    return {
        "_diffusers_version": VERSION,
        "num_attention_heads": settings["heads"],
        "attention_head_dim": settings["width"] // settings["heads"],
        "in_channels": channels,
        "out_channels": channels * (2 if settings["learn_range"] else 1),
        "num_layers": settings["depth"],
        "sample_size": settings["size"],
        "patch_size": settings["patch"],
    }
