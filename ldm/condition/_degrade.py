"""How a picture becomes a worse, smaller one."""

import io

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.functional import gaussian_blur

from ldm.errors import Refusal
from ldm.files.picture import from_bytes, to_bytes, to_tensor


def bicubic(image: Tensor, scale: int, generator: torch.Generator) -> Tensor:
    """image: (B, 3, h, w) in [-1, 1] -> (B, 3, h / scale, w / scale), by bicubic interpolation with antialiasing."""
    return _shrink(image, scale, "bicubic").clamp(-1, 1)


def bsr_light(image: Tensor, scale: int, generator: torch.Generator) -> Tensor:
    """image: (B, 3, h, w) in [-1, 1] -> (B, 3, h / scale, w / scale), by a random chain of mild damages.

    Two blurs, the downscaling, weak noise and JPEG, the first in random order (BSRGAN, https://arxiv.org/abs/2103.14006,
    section 3, in the light form of Latent Diffusion's super-resolution): blurs of 0.1 to 0.5 `scale` pixels; bicubic, bilinear or
    area; noise of 0 to 2 / 255 of the range; JPEG of quality 80 to 95, always last.
    """

    def pick(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    shrunk = False
    for step in torch.randperm(3, generator=generator).tolist():
        if step == 1:
            image, shrunk = _shrink(image, scale, ("bicubic", "bilinear", "area")[int(pick(0, 3))]), True
        else:
            sigma = pick(0.1, 0.5) * (1 if shrunk else scale)
            image = gaussian_blur(image, [2 * int(2 * sigma) + 3] * 2, [sigma] * 2)
    noise = torch.randn(image.shape, generator=generator).to(image)
    return _jpeg((image + 2 * pick(0, 2 / 255) * noise).clamp(-1, 1), int(pick(80, 96)))


def _shrink(image: Tensor, scale: int, mode: str) -> Tensor:
    height, width = image.shape[2:]
    if height % scale or width % scale:
        raise Refusal(
            f"A picture of {height}x{width} pixels is no multiple of {scale} (data.size, condition.low_resolution.scale)."
        )
    size = (height // scale, width // scale)
    return interpolate(image, size, mode=mode, antialias=mode != "area")


def _jpeg(image: Tensor, quality: int) -> Tensor:
    decoded = []
    for picture in to_bytes(image).permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=quality)
        decoded.append(to_tensor(Image.open(file, formats=("JPEG",))))
    return from_bytes(torch.stack(decoded)).to(image)
