"""Made this folder, at commit 23205a2, before models had a format number:  PYTHONPATH=. python tests/data/format0/make.py OUT

One tiny model of each family, a run with its checkpoint, what they draw and encode (expected.safetensors), and every
`_target_` of the configs with its parameters (targets.json). Kept to be read, not to be run again: a later commit writes
the later format.
The rows of the towers' vocabularies are a formula (`rows`), so that the files stay small.
"""

import shutil
import sys
from pathlib import Path

import open_clip
import torch
from ldm.folder import LOCAL, load_tensors, save_model, save_tensors, with_parts, write_json, write_text
from ldm.generate import generate
from omegaconf import OmegaConf

from ldm.build import build, frozen_parts, load_model
from ldm.compose import CONFIGS, compose_config
from ldm.guidance.cfg import CFG
from ldm.sampler.ddim import DDIM

SIZES = {"width": 4, "mult": [1, 1], "groups": 2, "res_blocks": 1}
UNET = {"_target_": "ldm.backbone.unet.UNet", "_partial_": True, "width": 4, "mult": [1, 1], "res_blocks": 1, "depth": [0, 1]}
UNET |= {"heads": 2, "groups": 2}
IDENTITY = {"_target_": "ldm.autoencoder.identity.Identity"}
THEORY = {
    "schedule": {"_target_": "ldm.schedule.Linear"},
    "prediction": {"_target_": "ldm.prediction.Flow"},
    "level": {"_target_": "ldm.denoiser.LogRatio", "scale": 50.0},
}
ASKS = {
    "text": {"caption": ["a fox", "two"]},
    "classes": {"label": torch.tensor([1, 2])},
    "words": {"caption": ["a fox", "red"]},
    "xl": {"caption": ["a fox", "two"], "height": torch.tensor([8, 8]), "crop": torch.tensor([0, 3])},
}


def rows(width):
    """The formula: (49408, width)."""
    return (torch.arange(49408 * width, dtype=torch.float64) * 0.37).sin().reshape(-1, width).float()


def loud(state, seed):
    """Random numbers in the place of weights, so that no branch is silent; statistics stay."""
    generator = torch.Generator().manual_seed(seed)
    kept = ("count", "mean", "std", "token_mean", "token_mix", "position", "freqs")
    for name, x in sorted(state.items()):
        if x.is_floating_point() and name.rsplit(".", 1)[-1] not in kept:
            scale = 0.1 if x.ndim < 2 else 0.7 * x[0].numel() ** -0.5
            x.copy_(torch.randn(x.shape, generator=generator) * scale + (1.0 if x.ndim == 1 and name.endswith("weight") else 0))
    return state


def autoencoder(folder, config, seed):
    state = loud(build(config).state_dict(), seed)
    state |= {"count": torch.tensor(5), "mean": torch.full_like(state["mean"], 0.1), "std": torch.full_like(state["std"], 0.5)}
    save_model(state, config, folder)


def clip(folder, seed, width, statistics=False):
    config = {
        "embed_dim": 4,
        "vision_cfg": {"image_size": 8, "patch_size": 8, "layers": 1, "width": 4, "head_width": 4},
        "text_cfg": {"context_length": 6, "vocab_size": 49408, "width": width, "heads": 2, "layers": 1},
    }
    state = loud(open_clip.CLIP(**config).state_dict(), seed)
    state["token_embedding.weight"] = rows(width)
    write_json({"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}, folder / "open_clip_config.json")
    save_tensors(state, folder / "open_clip_model.safetensors")
    if statistics:
        names = ("layer.0", "layer.1", "pooled")
        found = {f"{n}.mean": torch.full((width,), 0.1) for n in names}
        save_tensors(found | {f"{n}.covariance": torch.eye(width) * 0.3 + 0.05 for n in names}, folder / "statistics.safetensors")


def model(folder, condition, backbone, home, autoencoder, seed):
    coder = {"_target_": "ldm.build.load_autoencoder", "path": str(home / autoencoder)} if autoencoder else IDENTITY
    recipe = {"_target_": "ldm.build.assemble", "autoencoder": coder, "condition": condition, "backbone": backbone, **THEORY}
    made = build(recipe)
    frozen = tuple(f"{part}." for part in frozen_parts(made))
    own = {n: x for n, x in made.state_dict().items() if not n.startswith(frozen)}
    save_model(loud(own, seed), with_parts(recipe, folder), folder)


def models(out):
    home = out / "parts"
    autoencoder(home / "kl", {"_target_": "ldm.autoencoder.kl.KL", "channels": 2, **SIZES}, 1)
    autoencoder(home / "vq", {"_target_": "ldm.autoencoder.vq.VQ", "channels": 2, **SIZES, "codes": 8}, 2)
    clip(home / "clip", 3, 4, statistics=True)
    clip(home / "second", 4, 6)
    write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "fox"]) + "\n", home / "words" / "vocab.txt")
    text = {"_target_": "ldm.condition.text.Text", "model": f"{LOCAL}{home}/clip", "layers": [0, -1], "whiten": True}
    model(out / "text", {"text": text}, UNET, home, "kl", 5)
    label = {"_target_": "ldm.condition.label.Label", "classes": 3, "width": 8, "slot": "vector"}
    dit = {"_target_": "ldm.backbone.dit.DiT", "_partial_": True, "size": 4, "width": 8, "depth": 1, "heads": 2}
    model(out / "classes", {"label": label}, dit, home, "vq", 6)
    bert = {"_target_": "ldm.condition.bert.Bert", "vocabulary": f"{home}/words", "width": 8, "depth": 1, "heads": 2}
    mlp = {"_target_": "ldm.backbone.mlp.MLP", "_partial_": True, "size": 4, "width": 8, "depth": 1}
    model(out / "words", {"bert": bert | {"head_width": 4, "length": 5}}, mlp | {"size": 8}, home, None, 7)
    tower = {"_target_": "ldm.condition.text.Text", "layers": [-2], "final_norm": False, "dropped": "zeros"}
    first = {**tower, "model": f"{LOCAL}{home}/clip", "padding": 49407}
    second = {**tower, "model": f"{LOCAL}{home}/second", "padding": 0, "pooled": True}
    texts = {"_target_": "ldm.condition.text.Texts", "towers": {"large": first, "giant": second}}
    number = {"_target_": "ldm.condition.number.Number", "fields": {"height": "height", "crop": 0}, "width": 4, "rate": 0.0}
    model(out / "xl", {"text_sdxl": texts, "number": number}, UNET, home, None, 8)


def checkpoint(out):
    """Two steps of a pixel diffusion, with averages, as train.py leaves them."""
    from ldm.command.train import train

    run = f"runs={out}/trained data.root={out}/emoji logger=[] callback=[checkpoint,ema] callback.checkpoint.every=2"
    data = "data=emoji data.groups=[Activities] data.batch=4 data.size=8"
    length = "trainer.max_steps=2 trainer.val_check_interval=2 callback.ema.decay=0.5"
    network = "autoencoder=identity backbone=mlp backbone.size=8 backbone.width=4 condition.label.width=4"
    drop = "~backbone.mult ~backbone.res_blocks ~backbone.groups ~backbone.heads backbone.depth=1"
    return train(compose_config("train", f"experiment=emoji/class {run} {data} {length} {network} {drop}".split()))


def targets():
    """Every `_target_` that the configs can build -> its parameters there."""
    found = {}

    def walk(node):
        if isinstance(node, dict):
            if "_target_" in node:
                found.setdefault(node["_target_"], set()).update(k for k in node if k[0] != "_" and k != "defaults")
            node = list(node.values())
        for value in node if isinstance(node, list) else ():
            walk(value)

    for path in CONFIGS.rglob("*.yaml"):
        raw = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        base = raw.get("defaults", [None])[0]
        if isinstance(base, str) and "_target_" not in raw and (path.parent / f"{base}.yaml").is_file():
            raw = {**OmegaConf.to_container(OmegaConf.load(path.parent / f"{base}.yaml"), resolve=False), **raw}
        walk(raw)
        if path.is_relative_to(CONFIGS / "experiment"):
            name = str(path.relative_to(CONFIGS / "experiment").with_suffix(""))
            walk(OmegaConf.to_container(compose_config("train", [f"experiment={name}"]), resolve=False))
    return {target: sorted(names) for target, names in sorted(found.items())}


def main():
    out = Path(sys.argv[1])
    models(out)
    folder, expected = checkpoint(out), {}
    picture = torch.linspace(-1, 1, 3 * 8 * 8).reshape(1, 3, 8, 8)
    for name, ask in ASKS.items():
        held = load_model(out / name)
        expected[f"{name}.drawn"] = generate(held, ask, DDIM(3), CFG(2.0), [5, 6], (8, 8))
        encoded = held.autoencoder.encode(picture).mean
        if held.autoencoder.factor > 1:
            expected |= {f"{name}.encoded": encoded, f"{name}.decoded": held.autoencoder.decode(encoded)}
    (path,) = folder.rglob("*.ckpt")
    expected["checkpoint.drawn"] = generate(load_model(path), ASKS["classes"], DDIM(3), CFG(2.0), [5, 6], (8, 8))
    for name, x in expected.items():
        print(name, tuple(x.shape), f"std {x.std():.2f}, {(x.abs() >= 1).float().mean():.0%} at the ends")
    save_tensors(expected, out / "expected.safetensors")
    write_json(targets(), out / "targets.json")
    for exported in ("config.json", "model.safetensors"):
        (folder / exported).unlink()
    for tower in out.rglob("open_clip_model.safetensors"):
        save_tensors({n: x for n, x in load_tensors(tower).items() if n != "token_embedding.weight"}, tower)
    for rest in ("parts", "emoji"):
        shutil.rmtree(out / rest)


if __name__ == "__main__":
    main()
