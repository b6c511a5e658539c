"""Whether a drawing looks like the class that was asked for, by a small network trained on the training pictures."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy, pad
from tqdm import tqdm

from ldm.errors import Refusal
from ldm.files.picture import from_bytes, to_bytes
from ldm.measure import Estimate, Reference, Rows
from ldm.types import Batch

SHIFT = 4  # pixels by which training pictures move, at most


class Classifier:
    """Top-1 accuracy of a convolutional network that is trained from scratch on the training pictures, pooled to side x side.

    It is for small pictures, of which no published network knows much; elsewhere `class_accuracy` on a strong extractor is less
    work. The trained network is kept beside the reference. `right` holds the answers, picture by picture.

    Args:
        key: the field that holds the class.
        side: pixels that pictures are pooled to.
        steps: of training, with AdamW.
        batch: mirrored and shifted pictures of a step.
        width: channels of the first layer.
    """

    of, against = "drawing", "train"

    def __init__(self, key: str = "label", side: int = 32, steps: int = 1000, batch: int = 64, width: int = 32) -> None:
        self.key, self.side, self.steps, self.batch, self.width = key, side, steps, batch, width
        self.protocol = {"extractor": "pooled pixels", "side": side, "class": key}

    def look(self, images: Tensor, batch: Batch) -> Rows:
        """images: (B, 3, h, w) in [-1, 1]; batch: the class, (B), image -> pixels, real: uint8 (B, 3, side, side), label: (B).

        `real`, the picture that the request came from, is there where it is held out.

        Raises:
            Refusal: the requests have no class.
        """
        if self.key not in batch:
            raise Refusal(
                f"classifier reads the field `{self.key}`, and there is only {sorted(batch)}: +data.fields.{self.key}=cls"
            )
        rows = {"pixels": self._pooled(images), "label": torch.as_tensor(batch[self.key])}
        held_out = "image" in batch and batch.get("split") != "train"
        return rows | ({"real": self._pooled(batch["image"])} if held_out else {})

    def compute(self, rows: Rows, reference: Reference | None) -> Mapping[str, Estimate]:
        """-> `classifier_accuracy` of the drawings, in [0, 1], and `classifier_accuracy_real`, what perfect drawings would get.

        The latter is of the held-out pictures that the requests came from, and missing where there are none: where the requests
        are of the training set, or come with no picture.
        """
        weights = reference.kept(f"classifier-{self.width}-{self.steps}-{self.batch}", self._trained)
        net = self._network(len(weights["head.bias"]))
        net.load_state_dict(weights)
        answers = {name: answer(net.eval(), rows[name]) == rows["label"] for name in ("pixels", "real") if name in rows}
        self.right = answers["pixels"]
        names = {"pixels": "classifier_accuracy", "real": "classifier_accuracy_real"}
        return {names[name]: Estimate.mean(right) for name, right in answers.items()}

    def _pooled(self, images: Tensor) -> Tensor:
        return to_bytes(adaptive_avg_pool2d(images.float(), self.side))

    def _network(self, classes: int) -> nn.Sequential:
        w = self.width
        net = nn.Sequential()
        for i, (before, after, stride) in enumerate([(3, w, 2), (w, w, 1), (w, 2 * w, 2), (2 * w, 2 * w, 1), (2 * w, 4 * w, 2)]):
            net.add_module(f"conv{i}", nn.Conv2d(before, after, 3, stride, padding=1, bias=False))
            net.add_module(f"norm{i}", nn.BatchNorm2d(after))
            net.add_module(f"relu{i}", nn.ReLU())
        net.add_module("pool", nn.AdaptiveAvgPool2d(1))
        net.add_module("flat", nn.Flatten())
        net.add_module("head", nn.Linear(4 * w, classes))
        return net

    @torch.enable_grad()
    def _trained(self, rows: Rows) -> Rows:
        """pixels, label of the training pictures -> the network's weights, the same every time."""
        pixels, label = rows["pixels"], rows["label"]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = self._network(int(label.max()) + 1)
            optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
            rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, self.steps)
            for _ in tqdm(range(self.steps), desc="training the classifier", unit="step"):
                chosen = torch.randint(len(label), (self.batch,))
                loss = cross_entropy(net(changed(from_bytes(pixels[chosen]))), label[chosen], label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rate.step()
        return net.state_dict()


def changed(images: Tensor) -> Tensor:
    """(B, 3, h, w) -> the same, each mirrored or not and moved by up to SHIFT pixels."""
    height, width = images.shape[2:]
    wide = pad(images, (SHIFT,) * 4, mode="replicate")
    places = torch.randint(2 * SHIFT + 1, (len(images), 2)).tolist()
    moved = torch.stack([picture[:, y : y + height, x : x + width] for picture, (y, x) in zip(wide, places)])
    return torch.where((torch.rand(len(images), 1, 1, 1) < 0.5), moved.flip(3), moved)


@torch.no_grad()
def answer(net: nn.Module, pixels: Tensor) -> Tensor:
    """uint8 (N, 3, h, w) -> the likeliest classes, (N)."""
    return torch.cat([net(from_bytes(part)).argmax(1) for part in pixels.split(256)])
