"""What `import ldm` offers: the commands as functions, and a model that draws, encodes and decodes PIL's pictures.

Settings are words as on the command line: `["trainer.max_steps=100", "data.batch=8"]`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor

from ldm import build
from ldm.command.evaluate import evaluate as run_evaluate
from ldm.command.sample import draw as run_draw
from ldm.command.train import train as run_train
from ldm.compose import compose_config
from ldm.drawing.generate import Watch
from ldm.drawing.precision import hold, precision_of
from ldm.errors import Refusal
from ldm.files.device import device_of
from ldm.files.picture import from_bytes, to_bytes, to_srgb, to_tensor
from ldm.model import LatentModel
from ldm.rest import at_rest, recipe_of
from ldm.types import Autoencoder, Batch, Guidance, Sampler

Picture = Image.Image
Output = Literal["pil", "pt"]
# Settings of sample.yaml that draw has not.
UNREAD = ("model", "seed", "tile", "offload", "compile", "device", "adapters", "base", "out")


class Pipeline:
    """A model that is ready to be drawn from; `load` makes it.

    model: the latent model, None for an autoencoder alone. autoencoder: its autoencoder. usual: how it is drawn from, and what it
    was trained on, as its config.json says. allow: packages of the user's own that its settings may be built from.
    """

    def __init__(
        self,
        model: LatentModel | None,
        autoencoder: Autoencoder,
        usual: Mapping[str, Any],
        allow: Sequence[str] = (),
    ) -> None:
        self.model, self.autoencoder, self.usual, self.allow = model, autoencoder, dict(usual), tuple(allow)

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next((self.model or self.autoencoder).parameters()).device

    def to(self, device: str | torch.device) -> Pipeline:
        """Brings the model to another device."""
        (self.model or self.autoencoder).to(device_of(str(device)))
        return self

    def draw(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative: str | None = None,
        seed: int = 0,
        count: int | None = None,
        steps: int | None = None,
        guidance: float | str | Guidance | None = None,
        sampler: str | Sampler | None = None,
        size: int | tuple[int, int] | None = None,
        init: Picture | str | None = None,
        mask: Picture | str | None = None,
        strength: float | None = None,
        ask: Mapping[str, Any] | None = None,
        settings: Sequence[str] = (),
        watch: Watch | None = None,
        output: Output = "pil",
    ) -> Any:
        """Draws pictures -> a list of PIL's, or for output="pt" a tensor (N, 3, height, width) in [-1, 1].

        Args:
            prompt: one, or several; of models that read captions.
            negative: what to move away from, for all prompts.
            seed: of the first picture; picture i is drawn from seed + i, and depends on nothing else that is drawn with it.
            count: pictures; by default one a prompt.
            steps: of the sampler.
            guidance: its scale (1 is none), the name of a guidance (`ldm list guidance`), or one that is built.
            sampler: a name (`ldm list sampler`), or one that is built, which then says the steps.
            size: pixels; height and width, or one number for both.
            init: a picture to begin from.
            mask: inpainting, white where `init` is drawn anew.
            strength: how much of `init` is drawn anew, in [0, 1]; by default 0.6, with a mask 1.
            ask: other conditions by the field that they read: {"label": "Food"}, {"map": a PIL picture}.
            settings: others of sample.yaml, such as ["sampler/grid=karras", "sampler.grid.rho=5", "batch=4"].
            watch: called after each step with (step, time, estimate of the latents), which `decode` makes pictures of.
            output: "pil" or "pt", as above.

        What is None is what the model is usually drawn with.

        Raises:
            Refusal: the model is not asked like that; it says how.
        """
        if self.model is None:
            raise Refusal("An autoencoder alone draws nothing: load a diffusion model, such as runs/quickstart/diffusion.")
        words = [f"sampler={sampler}"] if isinstance(sampler, str) else []
        words += [f"guidance={guidance}"] if isinstance(guidance, str) else []
        words += [f"guidance.scale={guidance}"] if isinstance(guidance, int | float) else []
        words += [] if steps is None else [f"sampler.steps={steps}"]
        if unread := [word for word in settings if word.split("=")[0] in UNREAD]:
            raise Refusal(f"settings={unread}: drawing reads none of these; seed= is a word of draw, the others are of ldm.load.")
        config = dict(_sampling((*words, *settings)))
        given = {"negative": negative, "count": count, "init": init, "mask": mask, "strength": strength}
        given |= {"resolution": None if size is None else size if isinstance(size, int) else list(size)}
        given |= {"prompt": prompt if prompt is None or isinstance(prompt, str) else list(prompt)}
        given |= {"strength": 1.0} if mask is not None and strength is None else {}
        given |= {"sampler": None if isinstance(sampler, str) else sampler}
        given |= {"guidance": None if isinstance(guidance, int | float | str) else guidance}
        config |= {name: value for name, value in given.items() if value is not None}
        config |= {"allow": list(self.allow), "seed": seed, "ask": {**config["ask"], **(ask or {})}}
        hold(self.model.denoiser.backbone, self.usual, precision_of(config["precision"], self.usual, self.device))
        images, _ = run_draw(self.model, self.usual, config, (*build.ALLOWED, *self.allow), lambda line: None, watch)
        return images if output == "pt" else to_pil(images)

    @torch.no_grad()
    def encode(self, pictures: Picture | Sequence[Picture] | Tensor) -> Tensor:
        """Pictures of one size, or a tensor (N, 3, height, width) in [-1, 1] -> latents (N, C, h, w), the posterior's means.

        Raises:
            Refusal: they differ in size, or the autoencoder's factor does not divide it.
        """
        images = pictures if isinstance(pictures, Tensor) else to_images(pictures)
        factor = self.autoencoder.factor
        if images.shape[2] % factor or images.shape[3] % factor:
            height, width = images.shape[2:]
            raise Refusal(f"Pictures of {width}x{height} pixels: this autoencoder takes multiples of {factor}; resize them.")
        return self.autoencoder.encode(images.to(self.device)).mean

    @torch.no_grad()
    def decode(self, latents: Tensor, output: Output = "pil") -> Any:
        """Latents (N, C, h, w) -> a list of PIL's pictures, or for output="pt" a tensor (N, 3, height, width) in [-1, 1]."""
        images = self.autoencoder.decode(latents.to(self.device)).clamp(-1, 1)
        return images if output == "pt" else to_pil(images)


def load(
    model: str | Path,
    device: str = "auto",
    allow: Sequence[str] = (),
    adapters: str | Sequence[str] | None = None,
    base: str | None = None,
) -> Pipeline:
    """A model from a run, a folder or file in any layout, hf://ORG/NAME or a published model's short name.

    It may be an autoencoder alone. What is in another layout than ours is brought into it once, and kept (`ldm cache`).

    Args:
        model: where it is, or its name.
        device: `auto` is a GPU where there is one; `cpu`, `cuda:1`, `mps`.
        allow: packages of your own that it may be built from.
        adapters: LoRAs and others that are put to work on it, such as "style.safetensors:0.8" (docs/finetuning.md).
        base: where the base of a run of adapters lies, if not where it was.

    Raises:
        NotFound: nothing is there. Refusal: it is no such model, or the device is not here.
    """
    folder, place = at_rest(model), device_of(device)
    recipe = recipe_of(folder)
    if recipe.get("_target_", "").startswith("ldm.autoencoder."):
        return Pipeline(None, build.load_autoencoder(str(folder)).to(place), recipe.get("usual", {}), allow)
    whole, usual = build.load_model(folder, allow, adapters, base), recipe.get("usual", {})
    hold(whole.denoiser.backbone, usual, precision_of(None, usual, place))
    whole.to(place)
    return Pipeline(whole, whole.autoencoder, usual, allow)


def train(experiment: str | None = None, settings: Sequence[str] = ()) -> Path:
    """Trains one stage, going on from where the same call stopped -> the folder of its run, which `load` takes.

    Args:
        experiment: such as "emoji/text" (`ldm list experiment`).

    Raises:
        Refusal: a setting is not known, or something that it names is not there.
    """
    return run_train(
        compose_config("train", [*([] if experiment is None else [f"experiment={experiment}"]), *settings], used=True)
    )


def batches(data: str = "emoji", settings: Sequence[str] = (), split: Literal["train", "val"] = "train") -> Iterator[Batch]:
    """Every sample of a data set once, in order, as training sees them: `image` (B, 3, h, w) in [-1, 1], `caption` a list, ...

    Args:
        data: "emoji", "shards", ... (`ldm list data`), with settings such as ["data.train=/data/laion", "data.batch=8"].
        split: "train" or "val".

    Raises:
        Refusal: the data are not there, or are damaged, or have no such split.
    """
    config = compose_config("train", [f"data={data}", *settings])
    module = build.build(config.data, build.allowed(config))
    module.prepare_data()
    module.setup()
    if split != "train" and not module.val_set:
        raise Refusal(f"data={data} has no {split} samples; name them: data.{split}=PATH.")
    return (module.on_after_batch_transfer(batch, 0) for batch in module.ordered(split, module.batch))


def evaluate(metric: str | Sequence[str], settings: Sequence[str] = (), **what: Any) -> dict[str, float]:
    """Measures -> numbers by name; metrics.json, with the protocol beside each number, lies where `out` says.

    Args:
        metric: such as "frechet" or ["kernel", "clip_score"] (`ldm list metric`).
        what: settings of evaluate.yaml by name: model=RUN, or images=FOLDER with reference=FOLDER, out=FOLDER, count=1000, ...

    Raises:
        Refusal: something is not there, or the metric does not go with it.
    """
    names = [metric] if isinstance(metric, str) else list(metric)
    words = [f"metric=[{','.join(names)}]", *(f"{name}={value}" for name, value in what.items())]
    return run_evaluate(compose_config("evaluate", [*words, *settings], used=True))[0]


def to_images(pictures: Picture | Sequence[Picture]) -> Tensor:
    """PIL's pictures of one size, upright and in sRGB -> (N, 3, height, width) in [-1, 1].

    Raises:
        Refusal: there are none, or they differ in size.
    """
    several = [pictures] if isinstance(pictures, Image.Image) else list(pictures)
    pixels = [to_tensor(to_srgb(picture)) for picture in several]
    if len({tuple(x.shape) for x in pixels}) != 1:
        sizes = sorted({picture.size for picture in several})
        raise Refusal(f"Pictures of one size are wanted, and these are of {sizes or 'none'}: resize them to one.")
    return from_bytes(torch.stack(pixels))


def to_pil(images: Tensor) -> list[Picture]:
    """(N, 3, height, width) in [-1, 1] -> PIL's pictures, rounded to 8 bits."""
    return [Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()) for pixels in to_bytes(images).cpu()]


@lru_cache(maxsize=32)
def _sampling(words: tuple[str, ...]) -> Mapping[str, Any]:
    """sample.yaml with these settings, plain."""
    config: DictConfig = compose_config("sample", ["model=loaded", *words], used=True)
    return OmegaConf.to_container(config, resolve=True)
