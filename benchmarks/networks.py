"""The published networks against diffusers': the same weights and batch, interleaved, outputs compared before any timing.

    taskset -c 0 python -m benchmarks.networks SD1.5 SD1.5:backward SD2 SDXL DiT-XL/2 --size 32     15 minutes of one core
    taskset -c 0 python -m benchmarks.networks SD3 SD3.5 Flux PixArt --size 32                      5 minutes
    python -m benchmarks.networks SD2 --device cuda --dtype bfloat16 --batch 8 --compile            one GPU

One row a network and pass goes into docs/benchmarks.md as soon as it is measured, in the place of the row of the same setting; so
it may be run in pieces. `NAME:backward` takes the gradients of all weights as well.
"""

import torch

from benchmarks.options import options, prepare, setting
from benchmarks.page import put
from benchmarks.peers import CASES, pair
from benchmarks.race import HEAD, race


def main():
    """Measures what is asked for."""
    parser = options(__doc__.splitlines()[0], CASES, rounds=12)
    parser.add_argument("--part", type=int, default=1, help="divides the width")
    asked = parser.parse_args()
    for what in asked.what:
        name, _, backward = what.partition(":")
        size = asked.size or CASES[name].size
        result = measure(name, size, bool(backward), asked)
        row = [
            f"{name} {'forward and backward' if backward else 'forward'}",
            f"{setting(asked, size)}{f', width / {asked.part}' * (asked.part > 1)}",
            *result.cells(),
        ]
        print(*row, sep=" | ", flush=True)
        if not asked.dry:
            put("Networks", ["network", "setting", *HEAD], row, keys=2)


def measure(name, size, backward, asked):
    """-> the race's result; `asked` are the command line's options."""
    torch.manual_seed(0)
    net, peer, inputs = pair(name, asked.part, asked.device, dtype=getattr(torch, asked.dtype))
    args, theirs, kwargs = inputs(asked.batch, size)
    most = prepare(asked, net.eval(), peer.eval())
    works = (lambda: (net(*args),), lambda: (peer(*theirs, **kwargs).sample[:, : args[0].shape[1]],))
    if backward:
        works = tuple(with_gradients(work, module) for work, module in zip(works, (net, peer)))
    with torch.set_grad_enabled(backward):
        return race(*works, asked.rounds, asked.minutes, asked.device, most)


def with_gradients(work, module):
    """The work, then the gradients of all weights; those of the first and the last convolution, if any, are put out too."""
    weights = [p for p in module.parameters() if p.ndim == 4]

    def run():
        module.zero_grad(set_to_none=True)
        (out,) = work()
        out.square().sum().backward()
        return out.detach(), *(weight.grad for weight in weights[:1] + weights[-1:])

    return run


if __name__ == "__main__":
    main()
