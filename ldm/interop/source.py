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
from ldm.interop.keys import real
from ldm.interop.tie import Shapes, Tie, bring, taken
from ldm.interop.weights import Config

PREDICTIONS = {"eps": "Noise", "v": "Velocity", "x0": "Data"}  # of a yaml
SCALINGS = {"EpsScaling": "Noise", "VScaling": "Velocity"}  # of Stability's yaml
HEADER = {"epsilon": "Noise", "v": "Velocity", "v_prediction": "Velocity", "sample": "Data"}  # modelspec.prediction_type
ARCHITECTURES = {"stable-diffusion-v2-768-v": "Velocity", "stable-diffusion-v2-512": "Noise"}  # modelspec.architecture
# What a yaml says of the model: what is read, or shows in the weights, or was of training; and what has one value here.
YAML = """
parameterization linear_start linear_end scale_factor shift_factor unet_config first_stage_config cond_stage_config network_config
denoiser_config conditioner_config num_timesteps_cond log_every_t first_stage_key cond_stage_key image_size channels
cond_stage_trainable conditioning_key monitor use_ema scheduler_config loss_type v_posterior original_elbo_weight
l_simple_weight learn_logvar logvar_init scale_by_std concat_mode clip_denoised ckpt_path ignore_keys finetune_keys
low_scale_config low_scale_key noise_level_key cond_stage_forward force_null_conditioning ucg_training
unfreeze_model loss_fn_config sampler_config optimizer_config input_key log_keys no_cond_log compile_model
disable_first_stage_autocast en_and_decode_n_samples_a_time ema_decay_rate base_learning_rate depth_stage_config
"""
YAML_ONLY: dict[str, tuple[Any, ...]] = {
    "timesteps": (1000,),
    "beta_schedule": ("linear",),
    "given_betas": (),
    "rescale_betas_zero_snr": (False,),
    "unet_config.params.use_new_attention_order": (False,),
    "unet_config.params.dims": (2,),
    "first_stage_config.params.ddconfig.tanh_out": (False,),
    "denoiser_config.params.num_idx": (1000,),
}
SAYS_VELOCITY, ZERO_SNR = "v_pred", "ztsnr"  # empty tensors by which XL's successors are marked
# Left by training, or computed again from settings: a schedule's tables; averages; another model, which makes depth maps.
LEFT = ("betas", "alphas_cumprod", "sqrt_", "log_one_minus", "posterior_", "logvar", "lvlb_weights", "denoiser.sigmas")
LEFT += ("model_ema.", "loss.", "first_stage_model.loss.", "first_stage_model.model_ema.", "scale_factor")
LEFT += ("cond_stage_model.logit_scale", "low_scale_model.", "depth_model.")


@dataclass
class File:
    """A single file, and which of its tensors were read.

    Args:
        path: of the file.
        weights: its tensors.
        told: what the yaml beside it says of the model; empty where there is none.
        header: what the file says of itself.
        used: the names of the tensors that were read.
    """

    path: Path
    weights: Mapping[str, Tensor]
    told: Mapping[str, Any] = field(default_factory=dict)
    header: Mapping[str, str] = field(default_factory=dict)
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

    def scale(self, usual: float | None = None) -> float | None:
        """The scale factor of the latents: the one that was measured in training, else the yaml's, or None.

        In half precision it is `usual`, of the family, where that rounds to it.

        Raises:
            Refusal: it is no number above 0.
        """
        said = self.told.get("scale_factor")
        if (measured := self.weights.get("scale_factor")) is not None:  # of `scale_by_std`; the yaml's was its start
            same = usual is not None and torch.tensor(usual).to(measured.dtype) == measured
            said = usual if same else shortest(measured)
        if said is not None and not (real(said) and said > 0):
            raise Refusal(f"{self.path} says scale_factor={said}; a number above 0 was wanted.")
        return None if said is None else float(said)

    def shift(self, usual: float) -> float:
        """The shift of the latents: the yaml's, or the family's.

        Raises:
            Refusal: it is no number.
        """
        if not real(said := self.told.get("shift_factor", usual)):
            raise Refusal(f"{self.path} says shift_factor={said}; a number was wanted.")
        return float(said)

    def prediction(self) -> str | None:
        """What the network says, where a mark, the header or the yaml says it.

        Raises:
            Refusal: it is of no kind that is known, or they say different things.
        """
        says = {place: kind for place, kind in self._says().items() if kind is not None}
        if len(set(says.values())) > 1:
            told = ", ".join(f"{place} says {kind.lower()}" for place, kind in says.items())
            raise Refusal(f"{self.path}: {told}. Say which by --prediction.")
        return next(iter(says.values()), None)

    def _says(self) -> dict[str, str | None]:
        beside = self.path.with_suffix(".yaml")
        kind, header = self.told.get("parameterization"), self.header.get("modelspec.prediction_type")
        scaling = inner(self.told, "denoiser_config.params.scaling_config.target")
        for place, word, known in (
            (f"{beside} has parameterization", kind, PREDICTIONS),
            (f"{beside} has scaling_config.target", scaling and scaling.rpartition(".")[2], SCALINGS),
            (f"{self.path} has modelspec.prediction_type", header, HEADER),
        ):
            if word is not None and word not in known:
                raise Refusal(f"{place}={word}; {', '.join(known)} are known.")
        architecture = self.header.get("modelspec.architecture", "").partition("/")[0]
        return {
            f"the mark {SAYS_VELOCITY}": "Velocity" if SAYS_VELOCITY in self.weights else None,
            "its header (modelspec.prediction_type)": HEADER.get(header),
            "its header (modelspec.architecture)": None if header else ARCHITECTURES.get(architecture),
            "its yaml": PREDICTIONS.get(kind) or SCALINGS.get(scaling and scaling.rpartition(".")[2]),
        }

    def check_prediction(self, prediction: str | None) -> None:
        """Raises ValueError where a mark says something else than the caller."""
        if SAYS_VELOCITY in self.weights and prediction not in (None, "Velocity"):
            raise Refusal(
                f"{self.path} is marked to say velocity ({SAYS_VELOCITY}); leave --prediction {prediction.lower()} out."
            )

    def schedule(self) -> dict[str, Any]:
        """The noise schedule: the yaml's, else that of the file's own betas, else Stable Diffusion's.

        Raises:
            Refusal: the file's tables are not of this kind, or are another's than the yaml's.
        """
        usual = zip(("start", "end"), BETAS["ScaledLinear"])
        ends = {f"beta_{end}": self.told.get(f"linear_{end}", beta) for end, beta in usual}
        if not all(real(beta) for beta in ends.values()):
            raise Refusal(f"{self.path.with_suffix('.yaml')} has betas from {list(ends.values())}; numbers were wanted.")
        betas = self.weights.get("betas")
        if betas is not None and "linear_start" not in self.told:
            ends = {f"beta_{name}": shortest(betas[i]) for name, i in (("start", 0), ("end", -1))}
        tables, gone = {"betas": betas, "alphas_cumprod": self.weights.get("alphas_cumprod")}, {"zero_terminal_snr": True}
        for zero in (gone if ZERO_SNR in self.weights else {}, gone):  # a table may say by itself that no signal is left
            wrong = [name for name, table in tables.items() if table is not None and not _fits(table, name, **ends, **zero)]
            if not wrong:
                return {"_target_": "ldm.schedule.ScaledLinear", **ends, **zero}
        raise Refusal(
            f"{self.path}: its {wrong[0]} are no table whose square roots are linear from {ends['beta_start']:g} to "
            f"{ends['beta_end']:g}, as this family's are{' and its yaml says' if 'linear_start' in self.told else ''}."
        )

    def unread(self) -> list[str]:
        """What the yaml beside it says, and nothing here reads, in words for `assumed`.

        Raises:
            Refusal: a value that is not the only one that is built.
        """
        beside = self.path.with_suffix(".yaml")
        for place, only in YAML_ONLY.items():
            if (value := inner(self.told, place)) is not None and value not in only:
                raise Refusal(f"{beside} has {place}={value}; {' or '.join(map(str, only))} is known.")
        strange = sorted(name for name in self.told if name not in YAML.split() and name not in YAML_ONLY)
        return [f"yaml: {', '.join(strange)}, which nothing here reads"] if strange else []


def inner(told: Mapping[str, Any], place: str) -> Any:
    """What stands at a dotted place of a yaml, or None."""
    for name in place.split("."):
        told = told.get(name) if isinstance(told, Mapping) else None
    return told


def shortest(x: Tensor) -> float:
    """The shortest decimal number that a number of some precision stands for."""
    value, most = float(x), 6 if x.dtype.itemsize > 2 else 9
    tries = (float(f"{value:.{digits}g}") for digits in range(1, most))
    return next((t for t in tries if torch.tensor(t, dtype=torch.float64).to(x.dtype) == x), float(f"{value:.6g}"))


def _fits(table: Tensor, name: str, beta_start: float, beta_end: float, zero_terminal_snr: bool = False) -> bool:
    """Whether a file's table of 1,000 betas, or of their cumulated alphas, is the one of such a schedule, but for rounding."""
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, 1000, dtype=torch.float64).square()
    alpha = (1 - betas).cumprod(0).sqrt()
    if zero_terminal_snr:  # algorithm 1 of 2305.08891
        alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
        betas = 1 - alpha.square() / torch.cat((alpha.new_ones(1), alpha[:-1])).square()
    wanted = alpha.square() if name == "alphas_cumprod" else betas
    if len(table) != 1000 or not table.is_floating_point():
        return False
    off = max(1e-4, 2 * torch.finfo(table.dtype).eps)
    return torch.allclose(table.double(), wanted, rtol=off, atol=off * float(wanted.max()))


def told_beside(path: Path) -> Mapping[str, Any]:
    """What FILE's .yaml says of the model; nothing where there is none.

    Raises:
        Refusal: it is no such file.
    """
    beside = path.with_suffix(".yaml")
    if not beside.is_file():
        return {}
    try:
        held = Config(yaml.safe_load(beside.read_text(encoding="utf-8-sig")), beside)
    except yaml.YAMLError as error:
        raise Refusal(f"{beside} is not whole YAML ({' '.join(str(error).split())}).") from error
    params = Config(Config(Config(held["model"], beside)["params"], beside), beside)
    for name in ("unet_config", "network_config", "cond_stage_config"):
        node = params.get(name) or {}
        if not (isinstance(node, str) or (isinstance(node, Mapping) and isinstance(node.get("params") or {}, Mapping))):
            raise Refusal(f"{beside} has {name}={params[name]}; a target and params were wanted.")
    return params
