"""Whole training steps at a quarter of the width against diffusers': prediction, loss, gradients, AdamW, average of weights.

    taskset -c 0 python -m benchmarks.steps SD1.5 SD2 SDXL DiT-XL/2 --size 32 --batch 2      10 minutes of one core
    taskset -c 0 python -m benchmarks.steps SD3 SD3.5 Flux PixArt --size 32 --batch 2        2 minutes
    python -m benchmarks.steps SD2 --device cuda --batch 32 --part 1 --bf16                  one GPU, full width

Ours is fused AdamW and the average as `callback=ema` keeps it, and with --bf16 `callback=bfloat16` too; theirs is what
diffusers' training scripts do: torch's own AdamW and `EMAModel`. Both see the same noisy latents and start from the same
weights; the loss and a weight after the first step must agree. One row each in docs/benchmarks.md.
"""

import copy

import torch
from diffusers.training_utils import EMAModel
from torch.nn.functional import mse_loss

from benchmarks.options import options, prepare, setting
from benchmarks.page import put
from benchmarks.peers import CASES, pair
from benchmarks.race import HEAD, race
from ldm.training.callback.bfloat16 import keep_bfloat16

ADAMW = {"lr": 1e-4, "betas": (0.9, 0.999), "weight_decay": 1e-2}


def main():
    """Measures what is asked for."""
    race_steps(__doc__, CASES, str, measure, ("Training steps", "network"))


def race_steps(doc, names, case_of, measure, table):
    """A benchmark of steps: measures each name that is asked for, prints its row, and keeps it in docs/benchmarks.md.

    Args:
        doc: whose first line says what the program is for.
        names: what there is to measure.
        case_of: a name -> its network's in CASES.
        measure: (name, size, options) -> the race's result.
        table: the heading above it, and that of its first column.
    """
    parser = options(doc.splitlines()[0], names, rounds=15)
    parser.add_argument("--part", type=int, default=4, help="divides the width")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    asked = parser.parse_args()
    for name in asked.what:
        size = asked.size or CASES[case_of(name)].size
        result = measure(name, size, asked)
        how = f"{setting(asked, size)}, width / {asked.part}{', autocast to bfloat16' * asked.bf16}"
        row = [name, how, *result.cells(), result.speed(asked.batch)]
        print(*row, sep=" | ", flush=True)
        if not asked.dry:
            put(table[0], [table[1], "setting", *HEAD, "pictures/s"], row, keys=2)


def measure(name, size, asked):
    """-> the race's result; `asked` are the command line's options."""
    torch.manual_seed(0)
    net, peer, inputs = pair(name, asked.part, asked.device)
    args, theirs, kwargs = inputs(asked.batch, size)
    peer, noise = copy.deepcopy(peer), torch.randn_like(args[0])
    most = prepare(asked, net.eval(), peer.eval())  # diffusers' DiT drops labels at random in training; nothing else differs
    if asked.bf16:
        keep_bfloat16(net)
    casting = torch.autocast(torch.device(asked.device).type, torch.bfloat16, enabled=asked.bf16)

    def predict_ours():
        with casting:
            return net(*args)

    def predict_theirs():
        with casting:
            return peer(*theirs, **kwargs).sample[:, : noise.shape[1]]

    ours, last = our_step(net, predict_ours, noise), list(net.parameters())[-1].shape
    return race(ours, their_step(peer, predict_theirs, noise, last), asked.rounds, asked.minutes, asked.device, most, asked.tell)


def our_step(net, predict, noise):
    """-> () -> the loss, and the last weight after the step."""
    weights = list(net.parameters())
    optimizer, average = torch.optim.AdamW(weights, **ADAMW, fused=True), [p.detach().clone() for p in weights]

    def step():
        loss = mse_loss(predict().float(), noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(average, [p.detach() for p in weights], 1 - 0.999)
        return loss.detach()[None], weights[-1].detach().clone()

    return step


def their_step(peer, predict, noise, last):
    """As above, by diffusers' means; its last weight of the shape `last`, since others may come after it there."""
    weights = list(peer.parameters())
    shown = [p for p in weights if p.shape == last][-1]
    optimizer, average = torch.optim.AdamW(weights, **ADAMW), EMAModel(weights, decay=0.999, min_decay=0.999)

    def step():
        loss = mse_loss(predict().float(), noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.step(weights)
        return loss.detach()[None], shown.detach().clone()

    return step


if __name__ == "__main__":
    main()
