"""What every benchmark of networks may be told."""

import argparse

import torch


def options(purpose, names, rounds):
    """-> a parser with the options that all share, `names` being what there is to measure."""
    parser = argparse.ArgumentParser(description=purpose)
    parser.add_argument("what", nargs="+", help=", ".join(names))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, help="latent height and width; by default the network's own")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--minutes", type=float, default=5.0, help="for each")
    parser.add_argument("--compile", action="store_true", help="compile both, and lay both out channels last")
    parser.add_argument("--dry", action="store_true", help="print, and leave the page alone")
    return parser


def prepare(asked, *modules):
    """Modules as asked for, and the largest difference of outputs that is allowed; a CPU computes on one thread."""
    torch.set_num_threads(1)
    for module in modules if asked.compile else ():
        module.to(memory_format=torch.channels_last).compile(dynamic=False)
    return 1e-4 if asked.dtype == "float32" else 5e-2


def setting(asked, size):
    """-> the cell that says how it was measured."""
    return f"{'compiled, ' * asked.compile}{asked.device} {asked.dtype}, batch {asked.batch}, {size} latents"
