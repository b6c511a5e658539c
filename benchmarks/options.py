"""What every benchmark of networks may be told."""

import argparse

import torch

from ldm.training.parallel.layout import lay_out


def options(purpose, names, rounds):
    """-> a parser with the options that all share, `names` being what there is to measure."""
    parser = argparse.ArgumentParser(description=purpose)
    parser.add_argument("what", nargs="+", help=", ".join(names))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, help="latent height and width; by default the network's own")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--minutes", type=float, default=5.0, help="for each; three rounds are measured at least")
    parser.add_argument("--compile", action="store_true", help="compile both, and lay both out channels last")
    parser.add_argument("--mode", default="default", help="torch.compile's, such as reduce-overhead (CUDA graphs)")
    parser.add_argument("--dry", action="store_true", help="print, and leave the page alone")
    parser.set_defaults(tell=None)
    return parser


def prepare(asked, net, peer):
    """Lays both out and compiles them as asked for; -> the largest difference of outputs that is allowed.

    A CPU computes on one thread. On a GPU ours lies channels last, as training lays it out, and cuDNN may look for the fastest
    convolutions of both.
    """
    torch.set_num_threads(1)
    torch.backends.cudnn.benchmark = True
    lay_out([net], torch.device(asked.device))
    for module in (net, peer) if asked.compile else ():
        module.to(memory_format=torch.channels_last).compile(mode=asked.mode, dynamic=False)
    return 1e-4 if asked.dtype == "float32" and not getattr(asked, "bf16", False) else 5e-2


def setting(asked, size):
    """-> the cell that says how it was measured."""
    compiled = {"default": "compiled, "}.get(asked.mode, f"compiled ({asked.mode}), ") if asked.compile else ""
    return f"{compiled}{asked.device} {asked.dtype}, batch {asked.batch}, {size} latents"
