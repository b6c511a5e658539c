"""Which settings of the optimizer go to which weights."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ldm.errors import Refusal


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]],
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    scales: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """named: weights by name -> groups for an optimizer, frozen weights left out.

    `settings` maps a regular expression, searched for in a weight's name, to what differs there: any setting of the
    optimizer, or `scale`, a factor of the learning rate. The first that is found counts. `scales` are factors by whole names,
    on top of these. Weights of fewer than two dimensions (biases, gains of norms) are not decayed, unless their settings say so.

    Raises:
        Refusal: an expression that is found in no name.
    """
    settings, groups, met = dict(settings or {}), {}, set()
    for name, weight in named:
        if not weight.requires_grad:
            continue
        pattern = next((p for p in settings if re.search(p, name)), "")
        met.add(pattern)
        plain = {"weight_decay": 0.0} if weight.ndim < 2 else {}
        here, factor = settings.get(pattern, {}), (scales or {}).get(name, 1.0)
        made = {**plain, **here, "scale": here.get("scale", 1.0) * factor, "params": []}
        groups.setdefault((pattern, bool(plain), factor), made)["params"].append(weight)
    unmet = [pattern for pattern in settings if pattern not in met]
    if unmet:
        raise Refusal(f"groups.{unmet[0]}: no trained weight has a name with that in it; names look like {name}.")
    return list(groups.values())
