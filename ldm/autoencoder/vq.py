"""The vector-quantised autoencoder of Latent Diffusion (https://arxiv.org/abs/1711.00937; https://arxiv.org/abs/2112.10752, 3.1).

e = the code nearest to z = encoder(x),  x_hat = decoder(z + sg(e - z))
loss = |sg(z) - e|^2 + beta |z - sg(e)|^2  (1711.00937, equation 3; sg: no gradient), the first term unless the codes follow
running means of the z that chose them (its appendix A.1)

Encoder and decoder are the KL autoencoder's. As in LDM's VQModelInterface, `encode` gives the latents z before quantisation,
which are what a diffusion model learns, and `decode` quantises first.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ldm.autoencoder.kl import Decoder, Encoder, check_size, unwhiten, whiten
from ldm.types import Draw, Moments

ROWS = 16384  # vectors whose distances to all codes are held at once


class VQ(nn.Module):
    """(B, 3, f * H, f * W) <-> (B, channels, H, W), f = 2 ^ (levels - 1); the defaults are LDM's VQ-f4.

    The buffers `mean`, `std` and `count` are as in `KL`; `codebook` is (codes, channels).

    Args:
        channels: of the latents and of a code.
        width, mult, res_blocks, groups, attention, checkpointing: as in `KL`.
        codes: vectors in the codebook.
        commitment: beta above.
        ema: whether codes follow the running mean of the latents that chose them; else they learn by gradient.
        decay: of the running means, in [0, 1).
        dead: a code that is chosen less often than `dead` times the mean is replaced by a latent of the batch; 0 keeps all.
    """

    mean: Tensor
    std: Tensor
    count: Tensor
    codebook: Tensor
    hits: Tensor
    sums: Tensor
    terms = ("codebook",)  # of the bottleneck, those that have a weight

    def __init__(
        self,
        channels: int = 3,
        width: int = 128,
        mult: Sequence[int] = (1, 2, 4),
        res_blocks: int = 2,
        groups: int = 32,
        attention: Sequence[int] = (),
        checkpointing: bool = False,
        codes: int = 8192,
        commitment: float = 0.25,
        ema: bool = True,
        decay: float = 0.99,
        dead: float = 0.01,
    ) -> None:
        super().__init__()
        self.channels, self.factor = channels, 2 ** (len(mult) - 1)
        self.commitment, self.ema, self.decay, self.dead = commitment, ema, decay, dead
        self.encoder = Encoder(channels, width, mult, res_blocks, groups, attention, checkpointing)
        self.decoder = Decoder(channels, width, mult, res_blocks, groups, attention, checkpointing)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        codebook = torch.empty(codes, channels).uniform_(-1 / codes, 1 / codes)
        if ema:
            self.register_buffer("codebook", codebook)
        else:
            self.codebook = nn.Parameter(codebook)
        self.register_buffer("hits", torch.zeros(codes))
        self.register_buffer("sums", torch.zeros(codes, channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.window: list[tuple[Tensor, Tensor]] = []

    def encode(self, images: Tensor) -> Moments:
        """(B, 3, f * H, f * W) in [-1, 1] -> whitened latents before quantisation, (B, C, H, W), as moments with std 0.

        Raises:
            Refusal: f does not divide the size.
        """
        return whiten(self.posterior(images), self.mean, self.std)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) whitened, not quantised -> (B, 3, f * H, f * W), about [-1, 1]."""
        return self.reconstruct(self.quantise(unwhiten(latents, self.mean, self.std))[0])

    def posterior(self, images: Tensor) -> Moments:
        """(B, 3, f * H, f * W) in [-1, 1] -> latents before quantisation, (B, C, H, W), not whitened, as moments with std 0.

        Raises:
            Refusal: f does not divide the size.
        """
        check_size(images, self.factor)
        z = self.quant_conv(self.encoder(images))
        return Moments(z, torch.zeros_like(z))

    def reconstruct(self, z: Tensor) -> Tensor:
        """(B, C, H, W), quantised -> (B, 3, f * H, f * W), about [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))

    def quantise(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W), not whitened -> the nearest codes (B, C, H, W) and their numbers (B, H, W)."""
        rows = z.detach().permute(0, 2, 3, 1).flatten(0, 2).float()
        with torch.autocast(z.device.type, enabled=False):
            book = self.codebook.float()
            numbers = torch.cat([(book.square().sum(1) - 2 * part @ book.T).argmin(1) for part in rows.split(ROWS)])
        numbers = numbers.view(z.shape[0], *z.shape[2:])
        return self.codebook[numbers].permute(0, 3, 1, 2), numbers

    def bottleneck(self, images: Tensor, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, 3, f * H, f * W) in [-1, 1] -> quantised latents (B, C, H, W), with the gradient of the straight-through estimator,
        and numbers: `codebook`, the loss above as a mean over all numbers, and `perplexity` and `usage` of the chosen codes.
        """
        z = self.posterior(images).mean.to(self.sums)
        e, numbers = self.quantise(z)
        loss = self.commitment * (z - e.detach()).square().mean()
        if not self.ema:
            loss = loss + (z.detach() - e).square().mean()
        if self.training:
            self.window.append((z.detach().permute(0, 2, 3, 1).flatten(0, 2), numbers.flatten()))
        return z + (e - z).detach(), {"codebook": loss, **self.used(numbers)}

    def used(self, numbers: Tensor) -> dict[str, Tensor]:
        """Numbers of chosen codes, (*) -> `perplexity`, exp of their entropy, in [1, codes], and `usage`, the share of all codes
        that was chosen.
        """
        share = self._count(numbers.flatten()) / numbers.numel()
        return {"perplexity": torch.special.entr(share).sum().exp(), "usage": (share > 0).float().mean()}

    def codes(self) -> int:
        """-> the number of vectors in the codebook."""
        return len(self.codebook)

    def moving(self) -> list[Tensor]:
        """-> the tensors that `update` changes."""
        return [self.codebook.data, self.hits, self.sums]

    def forget(self) -> None:
        """Forgets the latents that were encoded since the last update."""
        self.window.clear()

    @torch.no_grad()
    def update(self, step: int, reduce: Callable[[Tensor], Tensor], rank: int = 0, world: int = 1) -> None:
        """Once a training step: moves the codes towards the latents that chose them on all ranks, and replaces dead ones.

        Latents that are not finite, on any rank, leave everything as it was. `step` seeds the choice of replacements; `reduce`
        sums a tensor over the `world` ranks, all of which must have seen equally many pictures.
        """
        rows, numbers = (torch.cat(parts) for parts in zip(*self.window))
        self.window.clear()
        fresh = self.hits.sum() == 0
        hits, sums = reduce(self._count(numbers)), reduce(torch.zeros_like(self.sums).index_add_(0, numbers, rows))
        finite = sums.isfinite().all()
        self.hits.lerp_(torch.where(finite, hits, self.hits), 1 - self.decay)
        self.sums.lerp_(torch.where(finite, sums, self.sums), 1 - self.decay)
        if self.ema:
            self._move(finite & (self.hits > 1e-5), self.sums / self.hits[:, None].clamp(min=1e-5))
        if self.dead:
            usual = self.hits.mean()
            dead = finite & ((self.hits < self.dead * usual) | fresh)
            vectors = self._pick(rows, step, reduce, rank, world)
            self._move(dead, vectors)
            self.hits.copy_(torch.where(dead, usual, self.hits))
            self.sums.copy_(torch.where(dead[:, None], vectors * usual, self.sums))

    def _count(self, numbers: Tensor) -> Tensor:
        """Numbers of chosen codes, (N) -> each code's count, (codes); bincount would make the host wait for the device."""
        return torch.zeros_like(self.hits).index_add_(0, numbers, torch.ones_like(numbers, dtype=self.hits.dtype))

    def _move(self, which: Tensor, vectors: Tensor) -> None:
        self.codebook.copy_(torch.where(which[:, None], vectors, self.codebook))

    def _pick(self, rows: Tensor, step: int, reduce: Callable[[Tensor], Tensor], rank: int, world: int) -> Tensor:
        """-> a latent of the global batch for each code, (codes, C), the same for any number of ranks."""
        generator = torch.Generator().manual_seed(step)
        place = torch.randint(world * len(rows), (len(self.hits),), generator=generator).to(rows.device) - rank * len(rows)
        mine = (place >= 0) & (place < len(rows))
        return reduce(torch.where(mine[:, None], rows[place.clamp(0, len(rows) - 1)], 0.0))

    @property
    def last_layer(self) -> nn.Parameter:
        """The last convolution's weight, on which the adaptive adversarial weight is measured."""
        return self.decoder.conv_out.weight
