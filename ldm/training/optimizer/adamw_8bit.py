"""AdamW whose moments lie in 8 bits (https://arxiv.org/abs/2110.02861): 2 bytes a weight instead of 8, by bitsandbytes.

A weight of fewer than 4096 numbers keeps its moments in float32. A checkpoint holds the 8-bit numbers and their scales, so that
a run goes on to the bit.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ldm.errors import Refusal

BYTES = 2  # of both moments of a weight


def adamw_8bit(
    params: Iterable[Any],
    lr: float = 1e-4,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> Optimizer:
    """bitsandbytes' AdamW8bit, which calls the hooks of `load_state_dict` as torch's optimizers do.

    Args:
        params: weights, or groups of them with their settings.
        lr: the learning rate.
        betas: of the averages of the gradient and of its square, in [0, 1) each.
        eps: added to the root of the latter.
        weight_decay: of each step, times lr.

    Raises:
        Refusal: bitsandbytes is missing, or finds no library for this machine; weights are shared out.
    """
    try:
        from bitsandbytes.optim import AdamW8bit
    except (ImportError, OSError, RuntimeError) as error:
        raise Refusal(
            f"optimizer=adamw_8bit is bitsandbytes' ({type(error).__name__}: {error}): pip install 'ldm[eight_bit]', or "
            "optimizer=adamw."
        ) from error

    class Hooked(AdamW8bit):
        def load_state_dict(self, state_dict: Mapping[str, Any], *more: Any, **settings: Any) -> None:
            for hook in self._optimizer_load_state_dict_pre_hooks.values():
                state_dict = hook(self, state_dict) or state_dict
            super().load_state_dict(state_dict, *more, **settings)
            for hook in self._optimizer_load_state_dict_post_hooks.values():
                hook(self)

    made = Hooked(params, lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay)
    if any(isinstance(weight, DTensor) for group in made.param_groups for weight in group["params"]):
        raise Refusal("optimizer=adamw_8bit with trainer=fsdp, which shares out weights: optimizer=adamw, or trainer=ddp.")
    return made
