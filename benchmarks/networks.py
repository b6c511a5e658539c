"""The published networks against diffusers': the same weights and batch, interleaved, outputs compared before any timing.

    taskset -c 0 python -m benchmarks.networks SD1.5 SD1.5:backward SD2 SDXL DiT-XL/2 --size 32     15 minutes of one core
    python -m benchmarks.networks SD2 --device cuda --dtype bfloat16 --batch 8 --compile            one H200

One row a network and pass goes into docs/benchmarks.md as soon as it is measured, in the place of the row of the same setting; so
it may be run in pieces. On a CPU it is one thread.
"""

import argparse

import torch

from benchmarks.page import put
from benchmarks.peers import CASES, pair
from benchmarks.race import race

HEAD = ["network", "setting", "of diffusers' time", "range", "rounds", "ours (s)", "diffusers (s)", "largest difference"]


def main():
    """Measures what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="+", help=f"{', '.join(CASES)}; with :backward the gradients of the weights as well")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, help="latent height and width; by default the network's own")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--minutes", type=float, default=5.0, help="for each")
    parser.add_argument("--compile", action="store_true", help="compile both, and lay both out channels last")
    parser.add_argument("--dry", action="store_true", help="print, and leave the page alone")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for what in asked.what:
        name, _, backward = what.partition(":")
        result = measure(name, bool(backward), asked)
        mode = f"{'compiled, ' * asked.compile}{asked.device} {asked.dtype}, batch {asked.batch}, {size(name, asked)} latents"
        row = [f"{name} {'forward and backward' if backward else 'forward'}", mode, *result.cells()]
        print(*row, sep=" | ", flush=True)
        if not asked.dry:
            put("Networks", HEAD, row, keys=2)


def measure(name, backward, asked):
    """-> the race's result; `asked` are the command line's options."""
    torch.manual_seed(0)
    dtype = getattr(torch, asked.dtype)
    net, peer, inputs = pair(name, device=asked.device, dtype=dtype)
    args, theirs, kwargs = inputs(asked.batch, size(name, asked))
    for module in (net, peer):
        module.eval()
        if asked.compile:
            module.to(memory_format=torch.channels_last).compile(mode="max-autotune-no-cudagraphs")
    works = (lambda: net(*args), lambda: peer(*theirs, **kwargs).sample[:, :4])
    most = 1e-4 if dtype == torch.float32 else 5e-2
    if backward:
        works = tuple(with_gradients(work, module) for work, module in zip(works, (net, peer)))
        return race(*works, asked.rounds, asked.minutes, asked.device, most)
    with torch.no_grad():
        return race(*works, asked.rounds, asked.minutes, asked.device, most)


def size(name, asked):
    """Latent height and width."""
    return asked.size or CASES[name].size


def with_gradients(work, module):
    """The work, then the gradients of all weights; those of the first and the last convolution are put out too."""
    weights = [p for p in module.parameters() if p.ndim == 4]

    def run():
        module.zero_grad(set_to_none=True)
        out = work()
        out.square().sum().backward()
        return out.detach(), weights[0].grad, weights[-1].grad

    return run


if __name__ == "__main__":
    main()
