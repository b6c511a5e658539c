"""KL-f8 against diffusers' AutoencoderKL: the same weights, the same picture, one pinned thread, interleaved.

    taskset -c 0 python -m benchmarks.autoencoder [ROUNDS] [SIZE]       6 rounds of 256 px: 4 minutes

Prints the largest difference of the outputs and, for encoder and decoder, the median of the rounds' ratios of process time.
"""

import re
import statistics
import sys
import time

import torch
from diffusers import AutoencoderKL

from ldm.autoencoder.kl import KL

BLOCKS = {"skip": "conv_shortcut", "norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}


def peer_of(net, width, mult, res_blocks, groups):
    """diffusers' module of the same shape with the weights of `net`."""
    with torch.device("meta"):
        peer = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * len(mult),
            up_block_types=["UpDecoderBlock2D"] * len(mult),
            block_out_channels=[width * m for m in mult],
            layers_per_block=res_blocks,
            latent_channels=net.channels,
            norm_num_groups=groups,
        )
    own = {peer_name(k, res_blocks): v for k, v in net.state_dict().items() if k not in ("mean", "std", "count")}
    peer.load_state_dict(own, assign=True)
    return peer.eval()


def peer_name(name, res_blocks):
    """Our name of a weight -> diffusers'."""
    if found := re.match(r"(encoder|decoder)\.levels\.(\d+)\.(\d+)\.(.*)", name):
        side, level, block, rest = found.groups()
        blocks, sampler = ("down_blocks", "downsamplers") if side == "encoder" else ("up_blocks", "upsamplers")
        if rest in ("weight", "bias"):
            return f"{side}.{blocks}.{level}.{sampler}.0.conv.{rest}"
        return f"{side}.{blocks}.{level}.resnets.{block}.{_within(rest)}"
    if found := re.match(r"(encoder|decoder)\.middle\.(\d)\.(.*)", name):
        side, block, rest = found.groups()
        place = "attentions.0" if block == "1" else f"resnets.{int(block) // 2}"
        return f"{side}.mid_block.{place}.{_within(rest)}"
    return name.replace("norm_out", "conv_norm_out")


def _within(rest):
    first, _, last = rest.partition(".")
    return f"{BLOCKS.get(first, first)}.{last}"


def clock(work, x):
    start = time.process_time()
    out = work(x)
    return time.process_time() - start, out


@torch.no_grad()
def main(rounds=6, size=256):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = KL().eval()
    peer = peer_of(net, 128, (1, 2, 4, 4), 2, 32)
    images = (torch.rand(1, 3, size, size) * 2 - 1).contiguous(memory_format=torch.channels_last)
    latents = torch.randn(1, 4, size // 8, size // 8)
    pairs = {
        "encode": (lambda x: net.encode(x).mean, lambda x: peer.encode(x).latent_dist.mean, images),
        "decode": (net.decode, lambda x: peer.decode(x).sample, latents),
    }
    print(f"torch {torch.__version__}, {size}x{size}, batch 1, float32, {rounds} rounds")
    for name, (ours, theirs, x) in pairs.items():
        ratios, seconds = [], []
        for i in range(rounds + 1):
            order = [ours, theirs] if i % 2 else [theirs, ours]
            times = {work: clock(work, x) for work in order}
            if i:  # the first warms up
                ratios.append(times[ours][0] / times[theirs][0])
                seconds.append(times[ours][0])
        apart = (times[ours][1] - times[theirs][1]).abs().max().item()
        print(
            f"{name}: {statistics.median(ratios):.3f} of diffusers' time (from {min(ratios):.3f} to {max(ratios):.3f}), "
            f"{statistics.median(seconds):.2f} s, largest difference {apart:.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
