"""Latents ahead of time:  python precompute.py model=runs/quickstart/autoencoder data=emoji out=runs/quickstart/latents

With condition=[text], settings and all, what the text tower says of the captions is kept as well, for condition=[cached_text];
with several, such as condition=[text_sd3,t5_sd3], what they say together, as of one text. keep=[edges] writes further fields
of the data, +data.fields.edges=edges.png, beside them, cut as the pictures were.
Under torchrun or srun every process writes shards of its own; started again, it goes on where it stopped.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.command.line import command
from ldm.compose import CONFIGS
from ldm.errors import Refusal
from ldm.files.process import process

OTHERS = ("_target_", "_partial_", "key", "rate")  # settings that are not of what a text says


def precompute(config: DictConfig) -> Path:
    """Writes shards of moments beside their captions and records, OUT/train and OUT/val, and OUT/text; -> OUT."""
    from ldm.build import allowed, build
    from ldm.condition.cached_text import save_null, spoken_only
    from ldm.data.batch.latents import write_latents
    from ldm.data.usual import KEPT, usual_of
    from ldm.files.device import device_of
    from ldm.files.folder import write_json
    from ldm.rest import autoencoder_of

    (rank, world, _), device, place = process(), device_of(config.device), autoencoder_of(config.model)
    trained = {"_target_": "ldm.build.load_autoencoder", "path": str(place)}
    autoencoder = build(trained, allowed(config)).to(device)
    data = build(config.data, allowed(config), batch=1)  # no bucket is too small to be encoded
    data.prepare_data()
    data.setup()
    members = _text_conditions(config, device)
    text = next(((member, partial(spoken_only, member)) for member in members.values()), None)
    splits = ("train", "val") if data.val_set else ("train",)
    for split in splits:
        folder = Path(config.out) / split
        settings = (config.batch, device, config.per_shard, config.half, rank, world, text, list(config.keep))
        write_latents(autoencoder, data, split, folder, *settings)
    if rank > 0:
        return Path(config.out)
    for name, cut in ((name, member.cut) for name, member in members.items()):
        print(f"condition.{name}: {cut}\n" if cut and cut.cut else "", end="")
    write_json(usual_of(OmegaConf.to_container(config.data, resolve=True)), Path(config.out) / "train" / KEPT)
    for member in members.values():
        save_null(member, Path(config.out) / "text")
    use = _use(config, data, autoencoder, place, members)
    print(f"The latents are in {config.out}{' once the other processes are done' if world > 1 else ''}; train on them with")
    print(shlex.join(use))
    return Path(config.out)


def _use(config: DictConfig, data: Any, autoencoder: Any, place: Path, members: Mapping[str, Any]) -> list[str]:
    """The settings with which a model is trained on the latents of the autoencoder that lies in `place`."""
    use = [
        "data=latents",
        *(f"data.{split}={config.out}/{split}" for split in (("train", "val") if data.val_set else ("train",))),
        f"data.size={data.size}",
    ]
    use += [] if data.val_set else ["data.val=null"]
    use += [f"data.buckets={[list(size) for size in data.sizes]}".replace(" ", "")] if len(data.sizes) > 1 else []
    use += ["autoencoder=cached", f"autoencoder.channels={autoencoder.channels}", f"autoencoder.factor={autoencoder.factor}"]
    use += [f"autoencoder.load.path={place}"]
    use += _kept_words(data, config.keep)
    for name, member in members.items():
        use += _words(name, member, config)
    return use


def _kept_words(data: Any, keep: Sequence[str]) -> list[str]:
    """The settings that read the fields that were kept."""
    from ldm.data.batch.keep import members_of

    mixtures = {
        field: ",".join(f"{data.fields[name]}:{share:g}" for name, share in data.mixed[field].items())
        for field in keep
        if field in data.mixed
    }
    plain = members_of(data.fields, {}, [field for field in keep if field not in mixtures])
    return [f"data.fields.{field}={{{shares}}}" for field, shares in mixtures.items()] + [
        f"+data.fields.{field}={member}" for field, member in plain.items()
    ]


def _text_conditions(config: DictConfig, device: Any) -> dict[str, Any]:
    """The one text condition whose embeddings are kept, by name, or none; several are made one, in the config too.

    Raises:
        Refusal: one of them is no text.
    """
    from ldm.build import build_members
    from ldm.condition.together import Together
    from ldm.embedder import complete

    members = {name: complete(member) for name, member in build_members(config, "condition").items()}
    if any(member.settings() is None for member in members.values()):
        raise Refusal(
            f"condition=[{','.join(members)}]: embeddings are kept of text conditions, such as condition=[text]. One of your own "
            "says by `settings()` what its text depends on beside its weights (ldm/embedder.py)."
        )
    for cut in (member.cut for member in members.values() if member.cut is not None):
        cut.always = True
    if len(members) > 1:
        nodes = OmegaConf.to_container(config.condition, resolve=True)
        target, key = f"{Together.__module__}.{Together.__qualname__}", next(iter(members.values())).key
        members = {"together": Together(members, key)}
        config.condition = {"together": {"_target_": target, "members": nodes, "key": key}}
    members = {name: member.to(device).eval() for name, member in members.items()}
    return members


def _words(name: str, text: Any, config: DictConfig) -> list[str]:
    """The settings of condition=[cached_text] that stand for the text condition `name`."""
    from ldm.condition.cached_text import embed

    use = ["condition=[cached_text]", f"condition.cached_text.path={config.out}/text"]
    use += [] if name == "text" else [f"condition.cached_text.stands_for={name}"]
    use += [] if text.key == "caption" else [f"condition.cached_text.key={text.key}"]
    node = OmegaConf.to_container(config.condition[name], resolve=True)
    settings = {key: _written(value) for key, value in node.items() if key not in OTHERS}
    usual = OmegaConf.load(CONFIGS / "condition" / "cached_text.yaml").cached_text.load._target_
    if node["_target_"] == usual:
        use += [f"++condition.cached_text.load.{key}={value}" for key, value in settings.items()]
    else:
        made = {"_target_": json.dumps(node["_target_"]), "_partial_": "true", "key": json.dumps(text.key), **settings}
        made = ", ".join(f"{key}: {value}" for key, value in made.items())
        use += ["~condition.cached_text.load", f"+condition.cached_text.load={{{made}}}"]
    return use + [f"+data.fields.{text.key}_{member.split('.')[1]}={member}" for member in embed(text, [""])]


def _written(value: Any) -> str:
    """A plain value in Hydra's grammar, whose keys are not quoted."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_written(inner)}" for key, inner in value.items()) + "}"
    return json.dumps(value)


main = command("precompute")(precompute)
