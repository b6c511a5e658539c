"""The words every room speaks. Imports nothing but torch.

Shapes
    B        batch
    C, H, W  latent channels, height, width;  C' channels of a spatial condition
    L, D     condition tokens, width of a token or a vector

Words, one meaning each (docs/concepts.md has more)
    field      a named entry of a sample: image, caption, label, map;  a record is the JSON beside a sample
    batch      fields of B samples, by name
    request    what pictures are asked by: the fields that a model's conditions read, B of each
    condition  a part that reads fields and says a `Cond` of them;  the null condition is that of nothing
    moments    mean and std of the latents that an encoder sees in a picture
    estimate   x_hat, the clean latents that a denoiser believes in
    recipe     the plain config that builds a model again;  in configs/experiment/, that of a whole training
    position   a sample's place in the global order of training
    refusal    a mistake that a person can mend, in one line

Time
    t runs from 0 (data) to 1 (noise), and  x_t = alpha(t) * x + sigma(t) * noise.
    Latents have zero mean and unit variance, so x_t has variance alpha^2 + sigma^2.

Pictures are (B, 3, height, width) in [-1, 1].
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ldm.errors import Refusal

# What the shards hold, by field name; `position` (B,) int64 is the sample's place in the global order of training.
Batch = Mapping[str, Any]

# (x_t: (B, C, H, W), t: () or (B)) -> x_hat: (B, C, H, W); a third, `to`, like t, is for flow maps alone: flow_map.py
Denoise = Callable[..., Tensor]


@dataclass(frozen=True)
class Widths:
    """How wide each way of listening is; 0 means that nothing is said that way."""

    vector: int = 0
    tokens: int = 0
    spatial: int = 0

    def __add__(self, other: Widths) -> Widths:
        """Vectors and maps join by width; tokens line up, so their widths must agree.

        Raises:
            Refusal: two conditions bring tokens of different widths.
        """
        if self.tokens and other.tokens and self.tokens != other.tokens:
            raise Refusal(
                f"Two conditions bring tokens of different widths, {self.tokens} and {other.tokens}; a backbone attends to "
                "tokens of one width. Give both the same width (`condition.<name>.width`)."
            )
        return Widths(self.vector + other.vector, self.tokens or other.tokens, self.spatial + other.spatial)


@dataclass(frozen=True)
class Cond:
    """What the backbone is told, in the three ways a backbone can listen.

    vector:  (B, D)         everywhere the same, joins the time embedding
    tokens:  (B, L, D)      a sequence to attend to
    mask:    (B, L) bool    True where a token speaks; None where all do
    spatial: (B, C', H, W)  maps at latent resolution, concatenated to the noisy latent's channels
    """

    vector: Tensor | None = None
    tokens: Tensor | None = None
    mask: Tensor | None = None
    spatial: Tensor | None = None

    def __add__(self, other: Cond) -> Cond:
        """Says both: vectors join by width, tokens line up, maps join by channel."""
        both_have_tokens = self.tokens is not None and other.tokens is not None
        one_is_masked = self.mask is not None or other.mask is not None
        return Cond(
            vector=_join(self.vector, other.vector, dim=1),
            tokens=_join(self.tokens, other.tokens, dim=1),
            mask=torch.cat((self._full_mask(), other._full_mask()), 1)
            if both_have_tokens and one_is_masked
            else (self.mask if self.mask is not None else other.mask),
            spatial=_join(self.spatial, other.spatial, dim=1),
        )

    def stack(self, other: Cond) -> Cond:
        """Lays two conditions of the same kind end to end along the batch, (B, ...) -> (2B, ...).

        Raises:
            Refusal: the two do not fill the same slots, or bring different numbers of tokens.
        """
        for slot in ("vector", "tokens", "spatial"):
            a, b = getattr(self, slot), getattr(other, slot)
            if (a is None) != (b is None) or (a is not None and a.shape[1:] != b.shape[1:]):
                shapes = [None if v is None else tuple(v.shape) for v in (a, b)]
                raise Refusal(f"Conditions with {slot} of shapes {shapes[0]} and {shapes[1]} cannot share a batch.")
        masked = self.mask is not None or other.mask is not None
        return Cond(
            vector=_join(self.vector, other.vector, dim=0),
            tokens=_join(self.tokens, other.tokens, dim=0),
            mask=torch.cat((self._full_mask(), other._full_mask())) if masked else None,
            spatial=_join(self.spatial, other.spatial, dim=0),
        )

    def to(self, device: torch.device | str) -> Cond:
        """The same on another device."""
        slots = {name: getattr(self, name) for name in ("vector", "tokens", "mask", "spatial")}
        return replace(self, **{name: None if v is None else v.to(device) for name, v in slots.items()})

    def _full_mask(self) -> Tensor:
        assert self.tokens is not None
        return self.mask if self.mask is not None else self.tokens.new_ones(self.tokens.shape[:2], dtype=torch.bool)


@dataclass(frozen=True)
class Draw:
    """The randomness of training, as a function of (seed, stream, global sample position).

    So a resumed run, or one on another number of ranks or workers, draws the same numbers for the same sample.
    position: (B,) int64, on the CPU; batch: samples in the global batch, over which stratified numbers are laid; step: of
    training, updates made so far.
    """

    seed: int
    position: Tensor
    batch: int
    step: int = 0

    def normal(self, stream: str, shape: Sequence[int]) -> Tensor:
        """-> (B, *shape) unit normal, on the CPU; pinned where there is a GPU, for `.to(device, non_blocking=True)`."""
        numbers = self._each(stream, lambda g: torch.randn(*shape, generator=g))
        return numbers.pin_memory() if torch.cuda.is_available() else numbers

    def uniform(self, stream: str, shape: Sequence[int] = ()) -> Tensor:
        """-> (B, *shape) in [0, 1), on the CPU."""
        return self._each(stream, lambda g: torch.rand(tuple(shape), generator=g))

    def stratified(self, stream: str) -> Tensor:
        """-> (B) in [0, 1): one number in each of `batch` equal intervals over the global batch, on the CPU."""
        return (self.position % self.batch + self.uniform(stream)) / self.batch

    def _each(self, stream: str, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        name = zlib.crc32(stream.encode())
        generator = torch.Generator()
        return torch.stack([draw(generator.manual_seed(mix(self.seed, name, p))) for p in self.position.tolist()])


@dataclass(frozen=True)
class Moments:
    """A normal distribution of whitened latents, as an encoder tells it.

    mean, std: (B, C, H, W); over the data, mean + std * noise has zero mean and unit variance per channel.
    """

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """noise: (B, C, H, W) unit normal -> latents: (B, C, H, W)."""
        return self.mean + self.std * noise.to(self.mean, non_blocking=True)


class Schedule(Protocol):
    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t: (*) in [0, 1] -> alpha: (*), sigma: (*)."""

    def inverse(self, log_ratio: Tensor) -> Tensor:
        """log(sigma / alpha): (*) -> t: (*) in [0, 1]."""


@runtime_checkable
class Terminal(Protocol):
    """A schedule that can be told to leave no signal at t = 1."""

    zero_terminal_snr: bool


class Prediction(Protocol):
    def target(self, x: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What the network should say, (B, C, H, W)."""

    def to_data(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What the network's output means: its estimate of x, (B, C, H, W)."""


class Backbone(Protocol):
    blocks: Iterable[nn.Module]  # in order: what is compiled, recomputed and sharded one by one, and where hidden states are read

    def __call__(self, x: Tensor, noise_level: Tensor, cond: Cond) -> Tensor:
        """x: (B, C, H, W), noise_level: (B) -> (B, C, H, W)."""


class Denoiser(Protocol):
    backbone: Backbone
    schedule: Schedule
    prediction: Prediction

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond, to: Tensor | None = None) -> Tensor:
        """x_t: (B, C, H, W), t: () or (B), to: as t, where a flow map goes -> x_hat: (B, C, H, W)."""

    def output(self, x_t: Tensor, t: Tensor, cond: Cond, to: Tensor | None = None) -> Tensor:
        """The network's own output, before `prediction.to_data`: (B, C, H, W)."""


class Sampler(Protocol):
    """Ours are a `walk` over the times of a `grid` in `steps`, and have the rest from sampler/walk.py."""

    def __call__(self, denoise: Denoise, schedule: Schedule, noise: Tensor, seeds: Sequence[int]) -> Tensor:
        """noise: (B, C, H, W) unit normal, seeds: one an image -> x: (B, C, H, W)."""

    def walk(self, denoise: Denoise, schedule: Schedule, x: Tensor, times: Tensor, seeds: Sequence[int]) -> Tensor:
        """Goes from x: (B, C, H, W) at times[0] to times[-1]; seeds feed the samplers that add noise on the way."""

    def times(self, schedule: Schedule, sides: Sequence[int] | None = None) -> Tensor:
        """-> (steps + 1), from the first time down to the last, float64. sides: the latents' height and width."""


class Conditioned(Protocol):
    """What guidance and objectives may ask of a model: its denoiser, its conditions by name, and what they say of a request."""

    denoiser: Denoiser
    conditioner: Any  # whose `embedders` are by name

    def condition(self, request: Batch, only: Sequence[str] | None = None) -> Cond:
        """request: fields, B of each -> its condition; `only` keeps those named, `()` is the null condition.

        What `only` keeps out is told `negative.<field>` instead, where the request has that.
        """


class Guidance(Protocol):
    def __call__(self, model: Conditioned, ask: Batch) -> Denoise:
        """Binds a model and a request into a plain denoiser."""


class InTraining(Conditioned, Protocol):
    average: Conditioned  # the same model with the averaged weights; it takes no gradients

    def encode(self, images: Tensor) -> Moments:
        """As the autoencoder's, without gradients."""


class Objective(Protocol):
    """It may also be a `Freezes`."""

    def __call__(self, model: InTraining, batch: Batch, x: Tensor, cond: Cond, draw: Draw) -> dict[str, Tensor]:
        """batch: what the shards hold; x: (B, C, H, W) its clean latents; cond: its condition, dropped now and then.

        -> scalars to log, among them `loss`.
        """


class Embedder(Protocol):
    """One condition. It may leave out all but `key`, `rate`, `widths` and the call: embedder.py has the defaults."""

    key: str | tuple[str, ...]  # the batch field it reads, or several
    rate: float
    widths: Widths
    frozen: tuple[str, ...]  # names of its parts that come from elsewhere: not trained, nor in checkpoints
    hole: tuple[str, str] | None  # the fields of an inpainting model's picture and mask
    stands_for: str | None  # the condition with whose random numbers it is dropped, where that is another
    drop_from: float  # it is dropped where such a number is in [drop_from, drop_from + rate)
    weighs: bool  # whether it heeds the weights of a caption's parts (embedder.py's Weighted)
    cut: Any  # counts captions that were cut (`seen`, `cut`) and says so by `str`; None where there is nothing to say
    taught: tuple[str, ...]  # words that adapters taught it

    def __call__(self, value: Any, drop: Tensor) -> Cond:
        """value: the field, or one of each; drop: (B) bool, on the CPU, True where nothing must be told."""

    def derive(self, batch: Batch, draw: Draw | None) -> dict[str, Any]:
        """What the batch lacks and other fields tell, by field; draw is None outside training."""

    def check(self, asked: Mapping[str, Sequence[Any]]) -> None:
        """Refuses what a person writes, by field N of it, before it is read."""

    def read(self, field: str, asked: Sequence[Any], size: tuple[int, int]) -> Any:
        """What a person writes for a field, N of it, for pictures of size (height, width) -> what a batch of N holds."""

    def show(self, value: Any) -> Tensor | None:
        """value: as in the call -> a picture of what it was told, (B, 3, h, w) in [-1, 1]."""

    def skip(self, layers: int | None) -> None:
        """Reads its text tower's last layer but `layers` - 1, or, told None, its own."""

    def unasked(self, field: str, size: tuple[int, int]) -> list[Any] | None:
        """What a person means who does not write a field; None: it must be written."""

    def settings(self) -> dict[str, Any] | None:
        """Of a text whose embeddings can be kept ahead of time: plain values that decide, besides its weights, what it says."""

    def original(self) -> Embedder | None:
        """Of one that reads what another said ahead of time: that other one, read and compared with what is kept, or None."""


class Autoencoder(Protocol):
    channels: int
    factor: int

    def encode(self, images: Tensor) -> Moments:
        """(B, 3, f * H, f * W) in [-1, 1] -> whitened moments of (B, C, H, W)."""

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) whitened -> (B, 3, f * H, f * W) in [-1, 1]."""


@runtime_checkable
class StandIn(Protocol):
    """An autoencoder that training never runs, for one that encoded the data ahead of time."""

    def original(self) -> Autoencoder:
        """That one, read, and compared with what this was told of it."""


class Samples(Protocol):
    """A split of the data."""

    index: Any  # of its shards; `fingerprint()` is theirs
    selection: Any  # which of the index' samples; `content()` is its hash

    def __len__(self) -> int:
        """How many there are."""

    def captions(self) -> list[str]:
        """All captions, in order."""


class DataModule(Protocol):
    """What stages, evaluation and commands ask of data; beside it, a Lightning data module's hooks."""

    train: Any
    val: Any
    train_set: Samples
    val_set: Samples | None
    fields: Mapping[str, str]  # batch field -> member of the shards
    filters: Mapping[str, Any]
    size: int  # pixels
    sizes: Sequence[tuple[int, int]]  # of training pictures, height and width
    trainer: Any

    def prepare_data(self) -> None:
        """Writes and indexes what must be there, once on each node."""

    def setup(self, stage: str | None = None) -> None:
        """Checks the samples, on every process."""

    def ordered(self, split: str, batch: int, rank: int = 0, world: int = 1) -> Iterable[Batch]:
        """Every sample of a split once, in order, over all `world` processes."""

    def parts(self, split: str) -> tuple[Sequence[Any], Sequence[tuple[int, int]]]:
        """-> the selected samples of each bucket, and its height and width."""

    def rows(self, split: str, chosen: Sequence[int]) -> Batch:
        """The chosen samples of a split as one batch."""

    def transfer_batch_to_device(self, batch: Batch, device: Any, dataloader_idx: int) -> Batch:
        """The same on the device."""

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int = 0) -> Batch:
        """Pictures and arrays as float32, on the device."""


@runtime_checkable
class Draws(Protocol):
    """A stage of training that may be of a latent model."""

    def latent_model(self) -> Any | None:
        """The model with its `autoencoder` and `conditioner`; None where another part is trained."""


@runtime_checkable
class Freezes(Protocol):
    """An objective, a torch module, some of whose modules come from elsewhere: they are not trained, nor in checkpoints."""

    frozen: tuple[str, ...]


class AdversarialLoss(Protocol):
    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        """Logits (B, 1, h, w) of each -> (), what the discriminator minimises."""

    def generator(self, fake: Tensor) -> Tensor:
        """Logits (B, 1, h, w) -> (), what the autoencoder minimises."""


def like(scale: Tensor, x: Tensor) -> Tensor:
    """Views scale, () or (B), so that it broadcasts over x, (B, ...)."""
    return scale.reshape(-1, *(1,) * (x.ndim - 1)).to(x, non_blocking=True)


def _join(a: Tensor | None, b: Tensor | None, dim: int) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    if a.device != b.device:  # numbers are told on the CPU
        device = b.device if a.device.type == "cpu" else a.device
        a, b = a.to(device, non_blocking=True), b.to(device, non_blocking=True)
    return torch.cat((a, b), dim)


def mix(*words: int) -> int:
    """Hashes integers to one of 63 bits (splitmix64, Steele et al. 2014), the same on every platform."""
    state = 0
    for word in words:
        state = (state + word + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1
