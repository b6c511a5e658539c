"""MMDiT: Stable Diffusion 3 (medium) and 3.5 (medium, with a second attention, and large)."""

from collections.abc import Iterable, Mapping
from typing import Any

from ldm.backbone.mmdit import MMDiT
from ldm.errors import Refusal
from ldm.interop.bundle import SHARE, STRAIGHT, VERSION, Bundle
from ldm.interop.keys import check_keys
from ldm.interop.network._stream_names import check_told, depth_of, paired
from ldm.interop.part.t5 import NODE, SILENCE, widen
from ldm.interop.part.t5 import PUBLISHED as PUBLISHED_T5
from ldm.interop.protocols import Built, Network, Ties
from ldm.interop.schedulers import flow_config
from ldm.interop.source import File
from ldm.interop.tie import Shapes, Tie, renamer, same, tied

POSITION = Tie(("pos_embed.pos_embed",), lambda x: x[0], lambda x: (x[None],))
PUBLISHED = renamer(
    {
        "embed": "x_embedder.proj",
        "position": "pos_embed",
        "level": "t_embedder.mlp",
        "vector": "y_embedder.mlp",
        "read": "context_embedder",
        "blocks": "joint_blocks",
        "picture": "x_block",
        "text": "context_block",
        "modulate": "adaLN_modulation.1",
        "attend": "attn",
        "again": "attn2",
        "norm_q": "ln_q",
        "norm_k": "ln_k",
        "attend.out": "attn.proj",
        "again.out": "attn2.proj",
        "feed.wide": "mlp.fc1",
        "feed.out": "mlp.fc2",
        "last.modulate": "final_layer.adaLN_modulation.1",
        "last.out": "final_layer.linear",
    }
)
BASE = 128  # latents' side on which published positions are one apart
HEAD = 64  # features of a published head


class MMDiTNetwork(Network):
    """Told texts, by tokens and a vector."""

    name = "MMDiT"
    target = "ldm.backbone.mmdit.MMDiT"
    made = MMDiT
    folder = "transformer"
    classes = ("SD3Transformer2DModel",)
    single = "sd3"
    prefix = "model.diffusion_model."
    shift = 0.0609
    straight = True

    def recognise(self, names: Iterable[str]) -> bool:
        """By the way its texts go in."""
        return f"{self.prefix}context_embedder.weight" in names

    def settings_of(self, shapes: Shapes, told: Mapping[str, Any]) -> Built:
        """The published names and shapes; a head's features show in none."""
        try:
            width, channels, patch = shapes["x_embedder.proj.weight"][:3]
            settings = {
                "size": BASE,
                "most": int(shapes["pos_embed"][1] ** 0.5),
                "patch": patch,
                "width": width,
                "depth": depth_of(shapes, "joint_blocks."),
                "heads": width // HEAD,
                "again": sum(name.endswith(".attn2.qkv.weight") for name in shapes),
                "norm_heads": "joint_blocks.0.x_block.attn.ln_q.weight" in shapes,
            }
            widths = {"vector": shapes["y_embedder.mlp.0.weight"][1], "tokens": shapes["context_embedder.weight"][1]}
        except KeyError as error:
            raise Refusal(f"This is no MMDiT in the published layout: {error} is missing among its tensors.") from error
        return settings, channels, {**widths, "spatial": 0}

    def read_config(self, config: Mapping[str, Any]) -> Built:
        """SD3Transformer2DModel's."""
        config = check_keys(config, "SD3Transformer2DModel", "The transformer")
        channels, heads = config["in_channels"], config["num_attention_heads"]
        width, again = heads * config["attention_head_dim"], list(config.get("dual_attention_layers") or ())
        wrong = {"out_channels": config["out_channels"] not in (None, channels)}
        wrong |= {"caption_projection_dim": config["caption_projection_dim"] != width}
        wrong |= {"dual_attention_layers": again != list(range(len(again)))}
        if any(wrong.values()):
            name = next(name for name in wrong if wrong[name])
            raise Refusal(f"The transformer has {name}={config.get(name)}, which no published MMDiT has.")
        settings = {
            "size": config["sample_size"],
            "most": config["pos_embed_max_size"],
            "patch": config["patch_size"],
            "width": width,
            "depth": config["num_layers"],
            "heads": heads,
            "again": len(again),
            "norm_heads": config.get("qk_norm") == "rms_norm",
        }
        widths = {"vector": config["pooled_projection_dim"], "tokens": config["joint_attention_dim"]}
        return settings, channels, {**widths, "spatial": 0}

    def config(self, settings: Mapping[str, Any], bundle: Bundle) -> dict[str, Any]:
        """The same."""
        backbone = bundle.backbone()
        channels = backbone["embed.weight"].shape[1]
        return {
            "_class_name": "SD3Transformer2DModel",
            "_diffusers_version": VERSION,
            "sample_size": settings["size"],
            "patch_size": settings["patch"],
            "in_channels": channels,
            "out_channels": channels,
            "num_layers": settings["depth"],
            "attention_head_dim": settings["width"] // settings["heads"],
            "num_attention_heads": settings["heads"],
            "joint_attention_dim": backbone["read.weight"].shape[1],
            "caption_projection_dim": settings["width"],
            "pooled_projection_dim": backbone["vector.0.weight"].shape[1],
            "pos_embed_max_size": settings["most"],
            "dual_attention_layers": list(range(settings["again"])),
            "qk_norm": "rms_norm" if settings["norm_heads"] else None,
        }

    def single_ties(self, names: Iterable[str], settings: Mapping[str, Any], prediction: str) -> Ties:
        """The published ones."""

        def tie(name: str) -> Tie:
            theirs = PUBLISHED(name)
            return Tie((theirs,), POSITION.join, POSITION.split) if name == "position" else same(theirs)

        return tied(names, tie)

    def diffusers_ties(self, names: Iterable[str], settings: Mapping[str, Any]) -> Ties:
        """SD3Transformer2DModel's."""
        last = ("last.modulate.", f"blocks.{settings['depth'] - 1}.text.modulate.")
        return tied(names, lambda name: POSITION if name == "position" else paired(name, "mmdit", name.startswith(last)))

    def channels(self, bundle: Bundle) -> int:
        """As many as a patch of its last layer has."""
        return bundle.backbone()["last.out.weight"].shape[0] // self.settings(bundle)["patch"] ** 2

    def tokens(self, bundle: Bundle) -> int:
        """As wide as the layer reads by which they go in."""
        return bundle.backbone()["read.weight"].shape[1]

    def scheduler(self, bundle: Bundle) -> dict[str, Any]:
        """Its steps are shifted by 3."""
        return flow_config(bundle.recipe, shift=3.0)

    def conditions(self, bundle: Bundle, built: Built, config: Mapping[str, Any] | None, index: Mapping[str, Any]) -> None:
        """The published text towers by name, where a single file holds none."""
        condition = bundle.recipe["condition"]
        if config is None and "text" not in condition:
            condition |= {"text": published_texts(built[2]["tokens"]), **condition}
            bundle.assumed.append("text: CLIP L and G by open_clip's names, which the file does not hold")
        if config is None and "language" not in condition:
            condition["language"] = {**NODE, "model": PUBLISHED_T5, "length": 256, "padding": "attended"}
            widen(bundle, built[2]["tokens"])
            bundle.assumed.append(f"text: {PUBLISHED_T5}, which the file does not hold")

    def check_diffusers(self, bundle: Bundle) -> None:
        """Told by text alone."""
        flow_config(bundle.recipe)
        check_told(bundle)

    def check_single(self, bundle: Bundle) -> None:
        """Straight paths, and as many heads as published networks have."""
        self.check_diffusers(bundle)
        s = self.settings(bundle)
        if s["width"] != HEAD * s["heads"]:
            raise Refusal(
                f"A file does not say how many heads there are; published networks have {HEAD} features a head, this one "
                f"{s['width'] // s['heads']}. Use --to diffusers."
            )

    def scale(self, file: File) -> float:
        """Stable Diffusion 3's."""
        return 1.5305

    def says(self, file: File, bundle: Bundle, built: Built, prediction: str | None) -> str:
        """Flow."""
        return prediction or "Flow"

    def schedule(self, file: File | None, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Straight paths."""
        return dict(STRAIGHT), dict(SHARE)

    def assumed(self, file: File, bundle: Bundle, prediction: str | None) -> list[str]:
        """Heads."""
        return [f"heads: {bundle.recipe['backbone']['heads']}, {HEAD} features each"]

    def pipeline(self, bundle: Bundle) -> dict[str, Any]:
        """StableDiffusion3Pipeline, of two CLIPs and a T5."""
        index: dict[str, Any] = {"_class_name": "StableDiffusion3Pipeline", "_diffusers_version": VERSION}
        index |= {"transformer": ["diffusers", self.classes[0]], "vae": ["diffusers", "AutoencoderKL"]}
        for i in ("", "_2"):
            index |= {f"text_encoder{i}": ["transformers", "CLIPTextModelWithProjection"]}
            index |= {f"tokenizer{i}": ["transformers", "CLIPTokenizer"]}
        third = {"text_encoder_3": ["transformers", "T5EncoderModel"], "tokenizer_3": ["transformers", "T5TokenizerFast"]}
        index |= {name: [None, None] for name in third} if bundle.made_by(SILENCE) else third
        return {**index, "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}

    def describe(self, bundle: Bundle) -> str:
        """Its sizes."""
        s, count = self.settings(bundle), sum(x.numel() for name, x in bundle.backbone().items() if name != "position")
        again = [f"{s['again']} blocks with a second attention"] if s["again"] else []
        sizes = [f"width {s['width']}", f"depth {s['depth']}", f"{s['heads']} heads", *again]
        return f"MMDiT        {count:,} parameters: {', '.join(sizes)}"


def published_texts(width: int) -> dict[str, Any]:
    """The config of Stable Diffusion 3's two CLIPs, whose tokens are filled up to `width`."""
    told = {"layers": [-2], "final_norm": False, "pooled": True}
    large = {"model": "ViT-L-14-quickgelu", "pretrained": "openai", "padding": 49407, **told}
    giant = {"model": "ViT-bigG-14", "pretrained": "laion2b_s39b_b160k", "padding": 0, **told}
    towers = {name: {"_target_": "ldm.condition.text.Text", **node} for name, node in (("large", large), ("giant", giant))}
    return {"_target_": "ldm.condition.text.Texts", "towers": towers, "width": width}


NETWORK = MMDiTNetwork()
