"""Averages of the weights of any length, after training:  python -m ldm average RUN OUT --std 0.07

From the snapshots that `callback=[...,power_ema]` left in RUN/averages (EDM2, https://arxiv.org/abs/2312.02696, section 3 and
appendix C). A power-function average at step T weighs the weights of step n by n^gamma; its length is told as the std of that
profile, relative to T.
"""

import argparse
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.errors import NotFound, Refusal
from ldm.files.folder import from_parts, read_model, read_weights, save_model, with_parts

Profile = tuple[int, float]  # the last step, and gamma
LONGEST = 1 / math.sqrt(12)  # the std of the plain mean of all steps, gamma = 0


def exponent(std: float) -> float:
    """gamma of the profile of that relative std, by bisection: std^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).

    Raises:
        Refusal: a std that no profile has.
    """
    if not 0 < std < LONGEST:
        raise Refusal(f"std={std}: the relative length of an average is between 0 and {LONGEST:.3f}, the mean of all steps.")
    low, high = 0.0, 1.0 / std**2
    for _ in range(100):
        gamma = (low + high) / 2
        low, high = (gamma, high) if (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) > std**2 else (low, gamma)
    return gamma


def weights_of(profiles: Sequence[Profile], wanted: Profile) -> tuple[Tensor, float]:
    """-> how much of each snapshot makes the wanted profile, by least squares, and the relative error of that profile."""
    inner = torch.tensor([[_product(a, b) for b in profiles] for a in profiles], dtype=torch.float64)
    with_wanted = torch.tensor([_product(a, wanted) for a in profiles], dtype=torch.float64)
    # The minimal-norm answer of a matrix whose snapshots resemble each other: no large weights of opposite sign.
    weights = torch.linalg.lstsq(inner, with_wanted[:, None], driver="gelsd", rcond=1e-12).solution[:, 0]
    norm = _product(wanted, wanted)
    left = norm - 2 * weights @ with_wanted + weights @ inner @ weights
    return weights, max(left.item() / norm, 0.0) ** 0.5


def reconstruct(folder: Path, std: float, step: int | None = None) -> tuple[dict[str, Tensor], float]:
    """folder: of snapshots -> the average of relative length `std` at `step` (the last one), and its profile's relative error.

    Raises:
        NotFound: there are no snapshots. Refusal: none so late, or no profile has that std.
    """
    files = [(path, re.fullmatch(r"step-(\d+)-std-([\d.]+)", path.stem)) for path in sorted(folder.glob("*.safetensors"))]
    snapshots = [(path, (int(match[1]), exponent(float(match[2])))) for path, match in files if match]
    if not snapshots:
        raise NotFound(f"There are no snapshots in {folder}; train with callback=[checkpoint,ema,bar,power_ema].")
    last = max(step for _, (step, _) in snapshots)
    wanted = last if step is None else step
    if not 0 < wanted <= last:
        raise Refusal(f"step={wanted}: the snapshots in {folder} go to step {last}.")
    weights, error = weights_of([profile for _, profile in snapshots], (wanted, exponent(std)))
    average: dict[str, Tensor] = {}
    for weight, (path, _) in zip(weights.tolist(), snapshots):
        for name, tensor in read_weights(path).items():
            average[name] = average.get(name, 0) + weight * tensor.double()
    return {name: tensor.float() for name, tensor in average.items()}, error


def _product(a: Profile, b: Profile) -> float:
    """The integral of two profiles' product; that of (T, gamma) is (gamma + 1) / T (n / T)^gamma, for n from 0 to T."""
    (s, g), (t, h) = sorted((a, b))
    return (g + 1) * (h + 1) / (g + h + 1) / t * (s / t) ** h


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m ldm average", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a finished run, with snapshots in its folder `averages`")
    parser.add_argument("out", type=Path, help="the folder of the new model")
    parser.add_argument("--std", type=float, required=True, help="the relative length: 0.05 to 0.15 are usual")
    parser.add_argument("--step", type=int, help="where the average ends; the last step by default")
    options = parser.parse_args(arguments)
    try:
        average, error = reconstruct(options.run / "averages", options.std, options.step)
        recipe, weights = read_model(options.run)
        unknown = sorted(average.keys() - weights.keys())
        if unknown:
            raise Refusal(f"The snapshots in {options.run} are of another model; it does not know {unknown[:3]}.")
        save_model(weights | average, with_parts(from_parts(recipe, options.run), options.out), options.out)
    except Refusal as wrong:
        sys.exit(f"error: {wrong}")
    print(f"The average of std {options.std:g} is in {options.out}; its profile is met to {error:.1%}.")


if __name__ == "__main__":
    main()
