"""From a request to pictures: condition -> guidance -> sampler -> autoencoder.

x_hat = guidance(model, request), latents = sampler(x_hat, schedule, noise), pictures = decode(latents)
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ldm.errors import TOO_LARGE, Refusal
from ldm.model import LatentModel
from ldm.types import Batch, Denoise, Guidance, Sampler

# Called after each step with its number, from 1, its time t, and x_hat: (B, C, H, W) latents; what it raises stops the drawing.
Watch = Callable[[int, float, Tensor], None]


@runtime_checkable
class OfOneSize(Protocol):
    """An autoencoder of pictures of one size alone."""

    side: int  # its latents' height and width


@torch.no_grad()
def generate(
    model: LatentModel,
    ask: Batch,
    sampler: Sampler,
    guidance: Guidance,
    seeds: Sequence[int],
    size: tuple[int, int],
    paste: str | None = "latents",
    watch: Watch | None = None,
) -> Tensor:
    """Draws one batch -> (B, 3, height, width) in [-1, 1]. A picture depends on its seed and its request alone, not on the batch.

    Args:
        model: what draws.
        ask: the request's fields, B of each.
        sampler: from noise to latents.
        guidance: from the model and the request to an estimate.
        seeds: B integers, one a picture.
        size: height and width in pixels.
        paste: what is done about an inpainting model's known part, as in `paste_known`.
        watch: called after each step; the autoencoder can decode the estimate that it is given.

    Raises:
        Refusal: the autoencoder's factor does not divide the size, or it decodes to numbers that are not finite.
    """
    device = next(model.denoiser.parameters()).device
    noise = unit_noise(seeds, latent_shape(model, size)).to(device)
    ask = {field: value.to(device) if isinstance(value, Tensor) else value for field, value in ask.items()}
    ask = model.conditioner.fill(ask)
    denoise = guidance(model, ask)
    latents = sampler(denoise if watch is None else watched(denoise, watch), model.denoiser.schedule, noise, seeds)
    images = model.autoencoder.decode(latents)
    if latents.isfinite().all() and not images.isfinite().all():
        raise Refusal(f"The autoencoder decodes to what is not finite: {TOO_LARGE}, or draw in another precision (32 or bf16).")
    return paste_known(model, ask, images.clamp(-1, 1), paste)


def watched(denoise: Denoise, watch: Watch) -> Denoise:
    """-> the same estimate, which calls `watch` once a step: at the first call at a lower time than before."""
    step, lowest = 0, math.inf

    def estimate(x_t: Tensor, t: Tensor, *to: Tensor) -> Tensor:
        nonlocal step, lowest
        x_hat = denoise(x_t, t, *to)
        if (time := float(t.max())) < lowest:
            step, lowest = step + 1, time
            watch(step, time, x_hat)
        return x_hat

    return estimate


def paste_known(model: LatentModel, ask: Batch, images: Tensor, how: str | None) -> Tensor:
    """images: (B, 3, h, w) that an inpainting model drew -> the same, with the request's image outside its mask.

    With `how` = `latents` the pasted picture goes through the autoencoder once more, which leaves no seam, but the autoencoder's
    error; with `pixels` it does not, as in the script of https://arxiv.org/abs/2112.10752; with None nothing is pasted. Pictures
    of models that do not inpaint come back as they are.

    Raises:
        Refusal: another `how`, or `pixels` for a model that does not inpaint.
    """
    check_paste(model, how)
    if how is None or model.conditioner.hole is None:
        return images
    image, mask = (ask[field].to(images) for field in model.conditioner.hole)
    whole = torch.where(mask > 0, images, image)
    return whole if how == "pixels" else model.autoencoder.decode(model.autoencoder.encode(whole).mean).clamp(-1, 1)


def check_paste(model: LatentModel, how: str | None) -> None:
    """Refuses a way of pasting that does not exist, or that is not for this model."""
    if how not in (None, "latents", "pixels"):
        raise Refusal(f"paste={how}: wanted latents, pixels or null.")
    if how == "pixels" and model.conditioner.hole is None:
        raise Refusal(f"paste=pixels is for inpainting models; this one's conditions are {list(model.conditioner.embedders)}.")


def compile_backbone(backbone: nn.Module) -> None:
    """Compiles a backbone in place for drawing: once for each size of batch and latents, on a GPU as a captured graph.

    Its output is copied, since the graph's next call overwrites it, and samplers use earlier outputs.
    """
    run = torch.compile(backbone.to(memory_format=torch.channels_last).forward, mode="reduce-overhead", dynamic=False)
    backbone.forward = lambda *inputs: run(*inputs).clone()


def unit_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """seeds: B integers -> (B, *shape), unit normal, drawn on the CPU so that devices agree."""
    return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(s)) for s in seeds])


def latent_shape(model: LatentModel, size: tuple[int, int]) -> tuple[int, int, int]:
    """size: height, width in pixels -> (C, H, W).

    Raises:
        Refusal: the autoencoder's factor does not divide the size, or it is of another.
    """
    f = model.autoencoder.factor
    only = model.autoencoder.side * f if isinstance(model.autoencoder, OfOneSize) else None
    if only is not None and tuple(size) != (only, only):
        raise Refusal(
            f"A picture of {size[0]}x{size[1]} pixels was asked for; the autoencoder is of one size (resolution={only})."
        )
    if size[0] % f or size[1] % f:
        raise Refusal(
            f"A picture of {size[0]}x{size[1]} pixels was asked for; the autoencoder needs multiples of {f} (resolution=...)."
        )
    return model.autoencoder.channels, size[0] // f, size[1] // f


def draw_all(
    model: LatentModel,
    ask: Batch,
    sampler: Sampler,
    guidance: Guidance,
    seeds: Sequence[int],
    size: tuple[int, int],
    batch: int,
    paste: str | None = "latents",
    watch: Watch | None = None,
) -> Tensor:
    """As `generate`, for any number of pictures -> (N, 3, height, width) in [-1, 1], on the CPU.

    Args:
        model, sampler, guidance, size, paste: as in `generate`.
        ask: the request's fields, lists or tensors of N.
        seeds: N integers, one a picture.
        batch: pictures at a time; the last batch is filled up, so that all have one size, and cut afterwards.
        watch: as in `generate`, for the steps of every batch.

    Raises:
        Refusal: as `generate`.
    """
    check_paste(model, paste)
    seeds, images = list(seeds), []
    batch = max(1, min(batch, len(seeds)))
    for start in tqdm(range(0, len(seeds), batch), desc="drawing", disable=len(seeds) <= batch):
        rows = [min(i, len(seeds) - 1) for i in range(start, start + batch)]
        part = {name: value[rows] if isinstance(value, Tensor) else [value[i] for i in rows] for name, value in ask.items()}
        drawn = generate(model, part, sampler, guidance, [seeds[i] for i in rows], size, paste, watch)
        images.append(drawn[: len(seeds) - start].cpu())
    return torch.cat(images)
