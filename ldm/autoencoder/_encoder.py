"""The published encoders of pictures, and their weights by the names that transformers gives them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.errors import Refusal
from ldm.files.folder import read_json
from ldm.files.pieces import read_folder
from ldm.nn.vit import ViT

OURS = "encoder."  # where an encoder's names begin in an exported autoencoder
# Names of before version 5 of transformers.
EARLIER = {
    r"^(vit|vision_model)\.": "",
    r"\.attention\.attention\.query\.": ".attention.q_proj.",
    r"\.attention\.attention\.key\.": ".attention.k_proj.",
    r"\.attention\.attention\.value\.": ".attention.v_proj.",
    r"\.attention\.output\.dense\.": ".attention.o_proj.",
    r"\.intermediate\.dense\.": ".mlp.fc1.",
    r"\.output\.dense\.": ".mlp.fc2.",
}


@dataclass(frozen=True)
class Named:
    """What a tensor of ours is called there: several are one below the other in ours, and have `ones` dimensions of 1 before."""

    names: tuple[str, ...]
    ones: int = 0


@dataclass(frozen=True)
class Kind:
    """A family of encoders: how `ViT` is built for it, its names in transformers, and what it leaves there.

    Args:
        settings: of `ViT`, but for sizes.
        models: its words in a config.json.
        layer: how a block's names begin, with a place for its number.
        norms, attention, out: layers in a block: the two norms, the attention, and that one's last layer.
        unread: how names begin that say nothing of the features.
        embed, position: of the patches.
        layers_before: how the blocks' names began before version 5, where that was otherwise.
    """

    settings: Mapping[str, object]
    models: tuple[str, ...]
    layer: str
    norms: tuple[str, str]
    attention: str
    out: str
    unread: tuple[str, ...]
    embed: str = "embeddings.patch_embeddings.projection"
    position: str = "embeddings.position_embeddings"
    layers_before: str | None = None

    def names(self, encoder: ViT) -> dict[str, Named]:
        """An encoder's names -> theirs."""
        first = encoder.first is not None
        names = {f"embed.{end}": Named((f"{self.embed}.{end}",)) for end in ("weight", "bias")}
        names["position"] = Named((self.position,), ones=int(first))
        names |= {"first": Named(("embeddings.cls_token",), ones=2)} if first else {}
        names |= {} if encoder.registers is None else {"registers": Named(("embeddings.register_tokens",), ones=1)}
        for i, block in enumerate(encoder.blocks):
            block_there = self.layer.format(i)
            layers = {"norm_in": self.norms[0], "norm_out": self.norms[1], "wide": "mlp.fc1", "narrow": "mlp.fc2"}
            layers["attend.out"] = f"{self.attention}.{self.out}"
            for end in ("weight", "bias"):
                names |= {f"blocks.{i}.{ours}.{end}": Named((f"{block_there}.{name}.{end}",)) for ours, name in layers.items()}
                names[f"blocks.{i}.attend.qkv.{end}"] = Named(
                    tuple(f"{block_there}.{self.attention}.{x}_proj.{end}" for x in "qkv")
                )
            if block.scale_in is not None:
                for ours, n in (("scale_in", 1), ("scale_out", 2)):
                    names[f"blocks.{i}.{ours}"] = Named((f"{block_there}.layer_scale{n}.lambda1",))
        return names

    def today(self, name: str) -> str:
        """What a tensor that an earlier version named is called now."""
        for pattern, now in EARLIER.items():
            name = re.sub(pattern, now, name)
        return name if self.layers_before is None else name.replace(self.layers_before, self.layer.partition("{")[0])


PLAIN = {"first": True, "registers": 0, "scaled": False, "tanh": False, "antialias": False, "eps": 1e-6}
KINDS = {
    "dinov2": Kind(
        {**PLAIN, "registers": 4, "scaled": True, "antialias": True},
        ("dinov2_with_registers",),
        "encoder.layer.{}",
        ("norm1", "norm2"),
        "attention",
        "o_proj",
        ("embeddings.mask_token", "layernorm."),
    ),
    "siglip2": Kind(
        {**PLAIN, "first": False, "tanh": True},
        ("siglip", "siglip_vision_model"),
        "encoder.layers.{}",
        ("layer_norm1", "layer_norm2"),
        "self_attn",
        "out_proj",
        ("post_layernorm.", "head.", "text_model.", "logit_"),
        "embeddings.patch_embedding",
        "embeddings.position_embedding.weight",
    ),
    "mae": Kind(
        {**PLAIN, "eps": 1e-12},
        ("vit_mae",),
        "layers.{}",
        ("layernorm_before", "layernorm_after"),
        "attention",
        "o_proj",
        ("layernorm.", "decoder.", "mask_token"),
        layers_before="encoder.layer.",
    ),
}


def published(source: str, encoder: ViT) -> dict[str, Tensor]:
    """The weights of an encoder in a folder or repository of transformers, or in an exported autoencoder, by our names.

    Raises:
        Refusal: they are of another network. NotFound, Unreachable: they are not there.
    """
    from ldm.tower.language import folder_of  # which loads tokenizers

    folder = folder_of(source, "autoencoder.weights")
    config = read_json(folder / "config.json")
    if "_target_" in config:
        if not isinstance(config.get("encoder"), dict):
            raise Refusal(f"autoencoder.weights={source} holds {config['_target_']}, no representation autoencoder.")
        check_kind(encoder, {name: config["encoder"].get(name, value) for name, value in encoder.kind.items()}, source)
        weights = {n.removeprefix(OURS): x for n, x in read_folder(folder).items() if n.startswith(OURS)}
        return _whole(weights, encoder, source)
    kind = next((kind for kind in KINDS.values() if config.get("model_type") in kind.models), None)
    if kind is None:
        known = ", ".join(name for each in KINDS.values() for name in each.models)
        raise Refusal(f"autoencoder.weights={source} is a {config.get('model_type')}; {known} are known.")
    said = {**config, **config.get("vision_config", {})}
    check_kind(encoder, {**kind.settings, "heads": said.get("num_attention_heads", encoder.heads)}, source)
    return _read(read_folder(folder), encoder, kind, source)


def check_kind(encoder: ViT, wanted: Mapping[str, object], source: str) -> None:
    """Raises Refusal where an encoder is not built as its weights want it, by the names of its settings."""
    here = {**encoder.kind, "heads": encoder.heads}
    if wrong := [f"{name}={here[name]} ({value} there)" for name, value in wanted.items() if here[name] != value]:
        raise Refusal(f"autoencoder.weights={source} is of another network: autoencoder.encoder has {', '.join(wrong)}.")


def _read(weights: Mapping[str, Tensor], encoder: ViT, kind: Kind, source: str) -> dict[str, Tensor]:
    weights, names = {kind.today(name): x for name, x in weights.items()}, kind.names(encoder)
    wanted = {name for named in names.values() for name in named.names}
    wrong = [f"{name} is missing" for name in sorted(wanted - weights.keys())]
    wrong += [f"{name} is unknown" for name in sorted(weights.keys() - wanted) if not name.startswith(kind.unread)]
    if wrong:
        raise Refusal(f"autoencoder.weights={source} does not fit autoencoder.encoder: {'; '.join(wrong[:3])}.")
    ours = {}
    for name, named in names.items():
        whole = torch.cat([weights[one] for one in named.names])
        ours[name] = whole.flatten(0, named.ones) if named.ones else whole
    return _whole(ours, encoder, source)


def _whole(weights: Mapping[str, Tensor], encoder: ViT, source: str) -> dict[str, Tensor]:
    here = encoder.state_dict()
    wrong = [name for name in here.keys() | weights.keys() if name not in here or name not in weights]
    wrong = wrong or [name for name, x in here.items() if x.shape != weights[name].shape]
    if wrong:
        shown = [
            f"{n} {tuple(weights[n].shape) if n in weights else None} there, {tuple(here[n].shape) if n in here else None} here"
            for n in sorted(wrong)[:3]
        ]
        raise Refusal(f"autoencoder.weights={source} does not fit autoencoder.encoder: {'; '.join(shown)}.")
    return {name: x.to(here[name].dtype) for name, x in weights.items()}
