"""Weights of the published networks behind metrics: downloaded, or a local file, whose sha256 is checked before it is read."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ldm.files import weights as files
from ldm.files.weights import weights_hash

OFFLINE = (
    "Or name a file, metric.<name>.weights=PATH; metric=[frechet_clip], or [frechet_reconstruction_clip], judges with a CLIP of "
    "your own and needs no download."
)


def read_weights(weights: str, published: str, url: str, sha256: str | None) -> dict[str, Tensor]:
    """Tensors by name, from `weights`: a local .pth or .safetensors file, or the name `published`, which stands for `url`.

    What is downloaded is kept in torch's hub folder. With `sha256` None, any file's numbers are taken.

    Raises:
        Unreachable: it could not be downloaded. NotFound: there is no such file. Refusal: its sha256 is another than `sha256`.
    """
    if weights == published:
        return files.download(url, sha256, OFFLINE)
    instead = f"Take {url} (`{published}` downloads it); a network with other numbers by metric.<name>.extractor.sha256=null."
    return files.read_weights(Path(weights), sha256, "weights", instead)


def frozen(net: nn.Module, name: str, resize: str, **more: Any) -> dict[str, Any]:
    """Freezes a network, in place -> its protocol: its name, its weights' hash, how pictures are resized, and `more`."""
    net.eval().requires_grad_(False)
    return {"extractor": name, "sha256": weights_hash(net), "resize": resize, **more}
