"""Sources of pictures in files: folders, ADM's .npz batches, and published statistics of features."""

import zipfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.data.shard.decode import View, decode_picture
from ldm.errors import NotFound, Refusal
from ldm.evaluation.rows import fingerprint
from ldm.files.content import file_content, files_content
from ldm.files.lines import read_lines
from ldm.files.picture import ENDINGS, FORMATS, from_bytes, left_out, open_picture, picture_size, pictures_in, to_srgb, to_tensor
from ldm.files.process import by_first, rank
from ldm.measure import Rows
from ldm.types import Batch

THREADS = 8  # that decode a folder's pictures


class Folder:
    """All pictures below a folder, in natural order.

    Args:
        path: the folder.
        size: pixels; the shorter side is resized to it, and the middle kept. None for pictures as they are, all of one size.
        device: where pictures are put.
        captions: one a picture; None where there are none.
        limit: the share of pictures, in [0, 1], that may be unreadable; they are counted and left out.
        option: the setting to name in errors.

    Raises:
        NotFound: there are no pictures. Refusal: there are not as many captions as pictures.
    """

    def __init__(
        self,
        path: str,
        size: int | None,
        device: Any,
        captions: Sequence[str] | None = None,
        limit: float = 0,
        option: str = "images",
    ) -> None:
        self.path, self.size, self.device, self.limit, self.option = Path(path), size, device, limit, option
        self.files, others = pictures_in(self.path)
        if not self.files:
            none = f"there are no pictures ({', '.join(ENDINGS)}) in it"
            raise NotFound(f"{option}={path}: {none if self.path.is_dir() else 'wanted a folder of pictures'}.")
        if others and rank() == 0:
            print(left_out(f"{option}={path}", others))
        self.count, self.captions = len(self.files), captions
        if captions is not None and len(captions) != self.count:
            few = "fewer captions than pictures" if len(captions) < self.count else "more captions than pictures"
            raise Refusal(
                f"{few}: prompts has {len(captions)} lines, and {option}={path} {self.count} pictures; line i belongs to "
                "the i-th picture by name, 2.png before 10.png."
            )
        content = by_first(lambda: files_content(self.files, self.path))
        self.protocol = {"files": content, "count": self.count, "size": size}
        self.protocol |= {} if captions is None else {"captions": fingerprint(list(captions))}

    def fields(self, numbers: Sequence[int]) -> Batch:
        """B numbers -> image: (B, 3, h, w) in [-1, 1]; corrupt: (B) bool, where the picture could not be read, and is grey; and
        caption, where there are captions.
        """
        with ThreadPoolExecutor(THREADS) as pool:
            pixels = list(pool.map(self._read, [self.files[n] for n in numbers]))
        shape = self._as_they_are if self.size is None else (self.size, self.size)
        blank = torch.full((3, *shape), 128, dtype=torch.uint8)
        images = torch.stack([blank if image is None else image for image in pixels]).to(self.device)
        fields = {"image": from_bytes(images), "corrupt": torch.tensor([image is None for image in pixels])}
        return fields if self.captions is None else {**fields, "caption": [self.captions[n] for n in numbers]}

    def images(self, numbers: Sequence[int], fields: Batch) -> Tensor:
        """The pictures themselves."""
        return fields["image"]

    @cached_property
    def _as_they_are(self) -> tuple[int, int]:
        """The one height and width of all pictures whose size can be read."""
        sizes = set()
        for file in self.files:
            with suppress(OSError, ValueError):
                sizes.add(picture_size(file.read_bytes())[::-1])
        if len(sizes) > 1:
            several = ", ".join(f"{h}x{w}" for h, w in sorted(sizes)[:4])
            raise Refusal(f"{self.option}={self.path} holds mixed sizes ({several}); resolution=256 brings them to one.")
        return sizes.pop() if sizes else (8, 8)

    def check(self, corrupt: Sequence[int]) -> None:
        """Refuses the folder where more pictures than `limit` could not be read; `corrupt` are their numbers."""
        if len(corrupt) > self.limit * self.count:
            named = ", ".join(str(self.files[n]) for n in corrupt[:3])
            raise Refusal(
                f"{len(corrupt)} of {self.count} pictures in {self.option}={self.path} cannot be read, such as {named}; at most "
                f"a share of {self.limit} is passed over (corrupt=...)."
            )

    def _read(self, file: Path) -> Tensor | None:
        try:
            data = file.read_bytes()
            if self.size is None:
                return to_tensor(to_srgb(open_picture(data)))
            return decode_picture(data, View(self.size, self.size), formats=FORMATS)
        except (OSError, ValueError):
            return None


class Archive:
    """Pictures and statistics in an .npz, as ADM's reference batches: `arr_0` uint8 (N, h, w, 3), `mu` (D) and `sigma` (D, D).

    Either may be missing: pytorch-fid writes statistics alone, ADM's samplers pictures alone. Errors name the setting `option`.

    Raises:
        Refusal: the file is damaged, or holds neither.
    """

    features = "inception"  # of which the statistics are

    def __init__(self, path: str, device: Any, option: str = "reference") -> None:
        self.path, self.device, self.option = path, device, option
        try:
            with np.load(path, allow_pickle=False) as file:
                names = set(file.files)
                self.array = file["arr_0"] if "arr_0" in names else None
                self.statistics = (file["mu"], file["sigma"]) if {"mu", "sigma"} <= names else None
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise Refusal(f"{option}={path} is no whole .npz file: {error}.") from error
        if self.array is None and self.statistics is None:
            raise Refusal(f"{option}={path} holds {sorted(names)}; wanted arr_0 (pictures), or mu and sigma (statistics).")
        if self.array is not None and (self.array.ndim != 4 or self.array.shape[3] != 3 or self.array.dtype != np.uint8):
            raise Refusal(
                f"{option}={path}: arr_0 is {self.array.dtype} of shape {self.array.shape}; wanted uint8 (N, height, width, 3)."
            )
        self.count = 0 if self.array is None else len(self.array)
        self.protocol = {"file": Path(path).name, "sha256": file_content(path), "count": self.count}

    def fields(self, numbers: Sequence[int]) -> Batch:
        """B numbers -> image: (B, 3, h, w) in [-1, 1].

        Raises:
            Refusal: the file holds statistics alone.
        """
        if self.array is None:
            raise Refusal(
                f"{self.option}={self.path} holds statistics alone, which do for the Fréchet distance of Inception; other "
                "metrics see the pictures themselves: name a folder, shards, or an .npz with arr_0."
            )
        images = torch.from_numpy(self.array[list(numbers)]).permute(0, 3, 1, 2)
        return {"image": from_bytes(images.to(self.device))}

    def images(self, numbers: Sequence[int], fields: Batch) -> Tensor:
        """The pictures themselves."""
        return fields["image"]

    def moments(self) -> Rows | None:
        """-> the file's statistics, mean (D) and covariance (D, D) in float64; None where it has none."""
        if self.statistics is None:
            return None
        mean, covariance = (torch.from_numpy(np.asarray(x, dtype=np.float64)) for x in self.statistics)
        return {"mean": mean, "covariance": covariance}


class Known:
    """A reference with published `moments` of its features; `rows` gives the features themselves, or refuses."""

    def __init__(self, moments: Rows, rows: Callable[[], Rows]) -> None:
        self.moments, self.rows = moments, rows

    def kept(self, name: str, make: Callable[[Rows], Rows]) -> Mapping[str, Tensor]:
        """-> the moments where they are wanted; anything else is made of the rows."""
        return self.moments if name == "moments" else make(self.rows())


def read_captions(path: str) -> list[str]:
    """A file of captions, one a line -> the captions.

    Raises:
        NotFound: there is no such file. Refusal: a line is empty.
    """
    lines = read_lines(path)
    if "" in lines:
        raise Refusal(f"prompts={path}: line {lines.index('') + 1} is empty; every picture has its line.")
    return lines
