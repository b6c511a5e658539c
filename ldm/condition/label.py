"""Class labels, trained with the backbone."""

import torch
from torch import Tensor, nn

from ldm.types import Cond, Widths


class Label(nn.Module):
    """A class index -> one token (https://arxiv.org/abs/2112.10752, appendix E.2). The table's last row means "no label"."""

    def __init__(self, classes: int, width: int, key: str = "label", rate: float = 0.1) -> None:
        super().__init__()
        self.key, self.rate, self.widths = key, rate, Widths(tokens=width)
        self.table = nn.Embedding(classes + 1, width)

    def forward(self, value: Tensor, drop: Tensor) -> Cond:
        """value: (B) integers in [0, classes), drop: (B) bool -> tokens: (B, 1, D).

        Raises:
            ValueError: a label is out of range.
        """
        nothing = self.table.num_embeddings - 1
        value = torch.as_tensor(value, device=self.table.weight.device)
        if value.numel() and not 0 <= int(value.min()) <= int(value.max()) < nothing:
            raise ValueError(
                f"Labels from {int(value.min())} to {int(value.max())} were found; this model knows 0 to {nothing - 1} "
                "(condition.label.classes=...)."
            )
        return Cond(tokens=self.table(value.masked_fill(drop.to(value.device), nothing))[:, None])
