"""How much decoding in tiles differs from decoding at once: a wall of emoji, 512x512, through a trained autoencoder.

python -m benchmarks.tiling runs/autoencoders/f8-perceptual
"""

import sys

import torch

from ldm.autoencoder.tiled import Tiled
from ldm.build import build, load_autoencoder
from ldm.compose import compose_config

SIDE = 512  # pixels


@torch.no_grad()
def main(path):
    net = load_autoencoder(path)
    data = build(compose_config("train", ["data.size=64"]).data)
    data.prepare_data()
    images = torch.cat([data.on_after_batch_transfer(b)["image"] for b in data.ordered("val", 64)])[:64]
    wall = images.view(8, 8, 3, 64, 64).permute(2, 0, 3, 1, 4).reshape(1, 3, SIDE, SIDE)
    latents = net.encode(wall).mean
    whole = net.decode(latents)
    own = 10 * torch.log10(4 / (whole - wall).square().mean())
    print(f"{path}: the wall decoded at once is {own:.2f} dB from the original")
    print("| tile | overlap | PSNR to decoding at once (dB) | largest difference | PSNR to the original (dB) |")
    print("|---|---|---|---|---|")
    edge = SIDE // net.factor
    for tile in (edge // 2, edge // 4):
        for overlap in (0, tile // 8, tile // 4, tile // 2):
            tiled = Tiled(net, tile, overlap).decode(latents)
            apart, error = (tiled - whole).abs(), 10 * torch.log10(4 / (tiled - wall).square().mean())
            psnr = 10 * torch.log10(4 / apart.square().mean())
            print(f"| {tile} | {overlap} | {psnr:.1f} | {apart.max() / 2 * 255:.0f} of 255 | {error:.2f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
