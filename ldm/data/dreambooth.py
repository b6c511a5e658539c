"""A few pictures of one thing, and, in a fixed share of each batch, pictures of its class: DreamBooth (2208.12242).

The loss is a mean over the batch: (L_instance + w L_prior) / (1 + w), the papers' sum but for a factor, whatever weighs the
samples. Class pictures are the model's own (`ldm prior`), which keep it from forgetting what else it knows, or anybody's with a
caption beside each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ldm.data.folder import Folder, read_rows
from ldm.data.order.order import Mixture, Steps, Stream
from ldm.data.packing.packed import Packed, Row
from ldm.data.shard.selection import Selection
from ldm.errors import Refusal
from ldm.files.folder import read_json

RECORD, PICTURES = "prior.json", "pictures"  # in a folder of class pictures that `ldm prior` drew: how, and they themselves
# https://github.com/rinongal/textual_inversion, ldm/data/personalized.py and personalized_style.py
OBJECT = (
    "a photo of a {}|a rendering of a {}|a cropped photo of the {}|the photo of a {}|a photo of a clean {}|a photo of a dirty {}|"
    "a dark photo of the {}|a photo of my {}|a photo of the cool {}|a close-up photo of a {}|a bright photo of the {}|"
    "a cropped photo of a {}|a photo of the {}|a good photo of the {}|a photo of one {}|a close-up photo of the {}|"
    "a rendition of the {}|a photo of the clean {}|a rendition of a {}|a photo of a nice {}|a good photo of a {}|"
    "a photo of the nice {}|a photo of the small {}|a photo of the weird {}|a photo of the large {}|a photo of a cool {}|"
    "a photo of a small {}"
)
STYLE = (
    "a painting|a rendering|a cropped painting|the painting|a clean painting|a dirty painting|a dark painting|a picture|"
    "a cool painting|a close-up painting|a bright painting|a cropped painting|a good painting|a close-up painting|a rendition|"
    "a nice painting|a small painting|a weird painting|a large painting"
)
TEMPLATES = {"object": OBJECT.split("|"), "style": [f"{begin} in the style of {{}}" for begin in STYLE.split("|")]}


class DreamBooth(Folder):
    """Instance pictures, each once with every caption, and class pictures.

    Args:
        pictures: a folder, or several, of pictures of the one thing.
        prompt: their caption, such as `a photo of sks dog`, or what stands in the templates for it, such as `<fox>`; None takes
            what lies beside each picture.
        templates: captions with {} for the prompt: those of textual inversion for an `object` or a `style`, or your own.
        prior: a folder that `ldm prior` wrote, or of pictures with a caption beside each.
        prior_weight: w, the class pictures for each instance picture; 1 where there is a prior.
        **data: fields, size, batch, seed, workers, crop, flip, max_bad_fraction and on_mismatch, as in Shards.

    Raises:
        Refusal: the batch has no room for both, or settings do not go together.
    """

    def __init__(
        self,
        pictures: str | Path | Sequence[str | Path],
        prompt: str | None = None,
        templates: Literal["object", "style"] | Sequence[str] | None = None,
        prior: str | Path | None = None,
        prior_weight: float | None = None,
        **data: Any,
    ) -> None:
        super().__init__(pictures, None, **data)
        self.prompt, self.prior = prompt, prior
        self.templates = _templates(templates, prompt)
        if prior is None and prior_weight is not None:
            raise Refusal(
                f"data.prior_weight={prior_weight} without data.prior: class pictures are drawn by ldm prior model=MODEL "
                "prompt='a photo of a dog' count=200 out=runs/prior/dog."
            )
        if prior is not None:
            weight = 1.0 if prior_weight is None else float(prior_weight)
            if weight <= 0:
                raise Refusal(f"data.prior_weight={weight}: wanted more than 0; leave data.prior out for none.")
            least = math.ceil((1 + weight) / min(1, weight) - 1e-9)
            if self.batch < least:
                raise Refusal(f"data.batch={self.batch} has no room for instance and prior (data.batch={least}).")
            if len(self.sizes) > 1:
                raise Refusal("data.buckets: with data.prior all pictures are of one size (data.size); leave data.buckets out.")
            self.weights = [1.0, weight]

    def setup(self, stage: str | None = None) -> None:
        """Checks the samples, and that the class pictures are of the model that is trained."""
        super().setup(stage)
        began = None if self.trainer is None else self.trainer.lightning_module.began
        record = _record(self.prior)
        if None not in (began, record.get("sha256")) and record["sha256"] != began:
            raise Refusal(
                f"data.prior={self.prior} was drawn by {record['model']} with sha256 {record['sha256'][:12]}, and model.init is "
                f"{began[:12]}: its class pictures are what this model is to keep. Draw them by it, into another folder: ldm "
                f"prior model=MODEL prompts=FILE count={record['count']} out=FOLDER."
            )

    @cached_property
    def steps(self) -> Steps:
        """The order of training; of instance and class pictures each has epochs of its own."""
        if self.prior is None:
            return super().steps
        _ = self.train_set
        (whole,) = self._buckets["train"]
        rows = whole.rows_of(0)
        sets = [Selection.of([rows[rows < self.instances]]), Selection.of([rows[rows >= self.instances]])]
        streams = [Stream(one, self.seed, self.window, number=i) for i, one in enumerate(sets)]
        mixture = Mixture(streams, self.weights, self.batch, self.seed)
        return Steps([mixture], self.sizes, [len(whole)], self.batch, self.seed)

    def _gathered(self, split: str, source: Any, packed: Packed) -> list[Row]:
        rows = super()._gathered(split, source, packed)
        rows = [each for row in rows for each in self._told(row)]
        self.instances = len(rows)
        return rows if self.prior is None else rows + self._class_rows()

    def _told(self, row: Row) -> list[Row]:
        """A picture with each of its captions."""
        caption = row.caption if self.prompt is None else self.prompt
        if not caption:
            raise Refusal(f"data.prompt: {row.name} has no caption beside it; say one for all, such as 'a photo of sks dog'.")
        return [replace(row, caption=template.replace("{}", caption), label=None) for template in self.templates]

    def _class_rows(self) -> list[Row]:
        folder, record, packed = Path(self.prior), _record(self.prior), Packed()
        rows = read_rows(folder / PICTURES if record else folder, packed, "data.prior")
        if record and len(rows) < record["count"]:
            raise Refusal(
                f"data.prior={folder} holds {len(rows)} of the {record['count']} class pictures that were asked of "
                f"{record['model']}; the ldm prior command that drew them goes on where it stopped."
            )
        if silent := [row.name for row in rows if not row.caption]:
            raise Refusal(
                f"data.prior={folder}: {len(silent)} of {len(rows)} pictures have no caption, such as {silent[0]}: write each "
                "beside it (0.txt), or let the model draw them: ldm prior model=MODEL prompt='a photo of a dog' out=FOLDER."
            )
        return self._whole([replace(row, label=None) for row in rows], "prior", packed)


def _templates(templates: str | Sequence[str] | None, prompt: str | None) -> list[str]:
    """The captions, with {} for the prompt.

    Raises:
        Refusal: there is nothing to put into them, or one has no place for it.
    """
    if templates is None:
        return ["{}"]
    if isinstance(templates, str) and templates not in TEMPLATES:
        raise Refusal(f"data.templates={templates}: there are {', '.join(TEMPLATES)}; or a list of your own, each with {{}}.")
    captions = TEMPLATES[templates] if isinstance(templates, str) else list(templates)
    if prompt is None:
        raise Refusal("data.templates want data.prompt, what they say in the place of {}: such as '<fox>'.")
    if bad := [template for template in captions if "{}" not in template]:
        raise Refusal(f"data.templates: {bad[0]!r} has no {{}} for data.prompt.")
    return captions


def _record(prior: str | Path | None) -> dict[str, Any]:
    """How `ldm prior` drew a folder's pictures; nothing of others."""
    path = None if prior is None else Path(prior) / RECORD
    return dict(read_json(path)) if path is not None and path.is_file() else {}
