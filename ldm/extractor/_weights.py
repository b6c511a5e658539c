"""Weights of published networks: downloaded or a local file, checked by sha256 before they are read, never running code."""

import hashlib
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor, nn

from ldm.errors import NotFound, Refusal, Unreachable
from ldm.files.folder import load_tensors
from ldm.measure import weights_sha256


def read_weights(weights: str, published: str, url: str, sha256: str | None) -> dict[str, Tensor]:
    """weights: the name `published`, which is downloaded once into torch's hub folder, or a local .pth or .safetensors file.

    Raises:
        OSError: it could not be downloaded, or there is no such file. Refusal: its sha256 is another than `sha256`.
    """
    path = _download(url) if weights == published else Path(weights)
    if not path.is_file():
        raise NotFound(f"weights={weights}: there is no such file; wanted a path, or `{published}`, which downloads {url}.")
    if sha256 is not None:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            raise Refusal(
                f"{path} has sha256 {found}, not {sha256}: it is damaged, or another network with other numbers. "
                f"Fetch {url} again, or say metric.<name>.extractor.sha256=null if you mean it."
            )
    return load_tensors(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)


def frozen(net: nn.Module, name: str, resize: str, **more: Any) -> dict[str, Any]:
    """Freezes a network for good -> its protocol."""
    net.eval().requires_grad_(False)
    return {"extractor": name, "sha256": weights_sha256(net), "resize": resize, **more}


def _download(url: str) -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path))
        except (URLError, OSError) as error:
            raise Unreachable(
                f"{url} could not be downloaded ({error}). Copy it to {path}, or name a file, metric.<name>.weights=PATH; "
                "metric=[frechet_clip], or [frechet_reconstruction_clip], judges with a CLIP of your own and needs no download."
            ) from error
    return path
