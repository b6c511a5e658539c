"""Fields that lie beside latents made ahead of time, such as a ControlNet's picture, cut and scaled as the encoded one was."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm.data.batch.mixed import Mixed
from ldm.data.shard.decode import decoder, is_image, is_text
from ldm.errors import Refusal
from ldm.files.picture import to_bytes


def members_of(fields: Mapping[str, str], mixed: Mixed, keep: Sequence[str]) -> dict[str, str]:
    """Which fields are kept, with a mixture those of all its texts -> under which member each: pictures as PNG, which loses
    nothing, whatever they were.

    Raises:
        Refusal: there is no such field, or it is neither picture, label map nor text.
    """
    kept = {}
    for field in (part for name in keep for part in mixed.get(name, [name])):
        if field not in fields:
            raise Refusal(f"keep=[{field}]: data.fields names {', '.join(fields)}; add +data.fields.{field}=MEMBER.")
        member = fields[field]
        if is_image(member):
            kept[field] = member if member.endswith("png") else f"{member.rpartition('.')[0]}.png".lstrip(".")
        elif is_text(member) or decoder(member) is decoder("map.png"):
            kept[field] = member
        else:
            raise Refusal(f"keep=[{field}]: {member} is neither a picture, nor a label map, nor a text.")
    return kept


def kept_of(batch: Mapping[str, Any], members: Mapping[str, str], i: int) -> dict[str, Any]:
    """The i-th sample's kept pictures and maps by member; texts are copied as they lie."""
    return {member: _png(batch[field][i]) for field, member in members.items() if not is_text(member)}


def _png(value: Tensor) -> bytes:
    """A picture, (3, h, w) in [-1, 1], or a map, (h, w) of whole numbers, as PNG."""
    if value.ndim == 3:
        image = Image.fromarray(to_bytes(value[None].cpu())[0].permute(1, 2, 0).contiguous().numpy())
    else:
        image = Image.fromarray(value.cpu().to(torch.uint8 if int(value.max()) < 256 else torch.int32).numpy())
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
