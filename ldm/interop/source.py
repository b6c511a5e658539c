"""A single file that is being read: its tensors, what its yaml says, and which of its tensors were used."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ldm.errors import Refusal
from ldm.interop.bundle import BETAS
from ldm.interop.tie import Shapes, Tie, bring, taken
from ldm.interop.weights import Config

PREDICTIONS = {"eps": "Noise", "v": "Velocity", "x0": "Data"}
SAYS_VELOCITY, ZERO_SNR = "v_pred", "ztsnr"  # empty tensors by which XL's successors are marked
# Left by training, or computed again from settings: a schedule's tables; averages; another model, which makes depth maps.
LEFT = ("betas", "alphas_cumprod", "sqrt_", "log_one_minus", "posterior_", "logvar", "lvlb_weights", "denoiser.sigmas")
LEFT += ("model_ema.", "loss.", "first_stage_model.loss.", "first_stage_model.model_ema.", "scale_factor")
LEFT += ("cond_stage_model.logit_scale", "low_scale_model.", "depth_model.")


@dataclass
class File:
    """`told` is what the yaml beside it says of the model, nothing where there is none."""

    path: Path
    weights: Mapping[str, Tensor]
    told: Mapping[str, Any] = field(default_factory=dict)
    used: set[str] = field(default_factory=lambda: {SAYS_VELOCITY, ZERO_SNR})

    def below(self, prefix: str) -> Shapes:
        """Names and shapes behind a prefix."""
        return {n.removeprefix(prefix): tuple(x.shape) for n, x in self.weights.items() if n.startswith(prefix)}

    def take(self, ties: Mapping[str, Tie], shapes: Shapes, prefix: str = "") -> dict[str, Tensor]:
        """Tensors by our names, used from now on."""
        ours = bring(ties, self.weights, shapes, prefix)
        self.used |= taken(ties, prefix)
        return ours

    def check_left(self, left: tuple[str, ...] = ()) -> None:
        """Raises ValueError where a tensor was used by nobody."""
        known = (*LEFT, *left)
        over = [n for n in self.weights if n not in self.used and not n.startswith(known)]
        over = [n for n in over if not n.endswith(("position_ids", "logit_scale"))]
        if over:
            raise Refusal(f"{self.path} holds {len(over)} tensors that are none of this model's, such as {', '.join(over[:3])}.")

    def scale(self) -> float | None:
        """The scale factor of the latents: the one that was measured in training, else the yaml's, or None."""
        if "scale_factor" in self.weights:  # of `scale_by_std`; the yaml's was its start
            return float(self.weights["scale_factor"])
        return float(self.told["scale_factor"]) if "scale_factor" in self.told else None

    def prediction(self) -> str | None:
        """What the network says, where a mark or the yaml says it.

        Raises:
            Refusal: it is of no kind that is known.
        """
        if SAYS_VELOCITY in self.weights:
            return "Velocity"
        if (kind := self.told.get("parameterization")) is None:
            return None
        if kind not in PREDICTIONS:
            raise Refusal(f"{self.path.with_suffix('.yaml')} has parameterization={kind}; {', '.join(PREDICTIONS)} are known.")
        return PREDICTIONS[kind]

    def check_prediction(self, prediction: str | None) -> None:
        """Raises ValueError where a mark says something else than the caller."""
        if SAYS_VELOCITY in self.weights and prediction not in (None, "Velocity"):
            raise Refusal(
                f"{self.path} is marked to say velocity ({SAYS_VELOCITY}); leave --prediction {prediction.lower()} out."
            )

    def schedule(self) -> dict[str, Any]:
        """The noise schedule: the yaml's, else that of the file's own betas, else Stable Diffusion's.

        Raises:
            Refusal: the betas are not of this kind of table.
        """
        if "linear_start" in self.told or "betas" not in self.weights:
            usual = zip(("start", "end"), BETAS["ScaledLinear"])
            start, end = (float(self.told.get(f"linear_{name}", beta)) for name, beta in usual)
        else:
            betas = self.weights["betas"].double()
            start, end = (float(f"{float(betas[i]):.6g}") for i in (0, -1))
            wanted = torch.linspace(start**0.5, end**0.5, len(betas), dtype=torch.float64).square()
            if not torch.allclose(betas, wanted, rtol=1e-4):
                raise Refusal(f"{self.path}: its betas are no table whose square roots are linear, as this family's are.")
        zero = {"zero_terminal_snr": True} if ZERO_SNR in self.weights else {}
        return {"_target_": "ldm.schedule.ScaledLinear", "beta_start": start, "beta_end": end, **zero}


def told_beside(path: Path) -> Mapping[str, Any]:
    """What FILE's .yaml says of the model; nothing where there is none.

    Raises:
        Refusal: it is no such file.
    """
    beside = path.with_suffix(".yaml")
    if not beside.is_file():
        return {}
    try:
        held = Config(yaml.safe_load(beside.read_text()), beside)
    except yaml.YAMLError as error:
        raise Refusal(f"{beside} is not whole YAML ({' '.join(str(error).split())}).") from error
    return Config(Config(held["model"], beside)["params"], beside)
