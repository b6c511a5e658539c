"""The vocabulary: what the parts of a model, of its training and of its data are to each other. It imports nothing but torch.

Shapes
    B        batch
    C, H, W  latent channels, height, width;  C' channels of a spatial condition;  f pixels a side of a latent
    L, D     condition tokens, width of a token or a vector
    h, w     height, width in pixels: pictures are (B, 3, h, w) in [-1, 1];  (*) any shape

Words, one meaning each (docs/concepts.md has more)
    field      a named entry of a sample: image, caption, label, map;  a record is the JSON beside a sample
    batch      the fields of B samples, by name;  a request is what pictures are drawn from: the fields that conditions read
    condition  a part that reads fields and makes a `Cond` of them;  the null condition is a `Cond` with all of them dropped
    moments    mean and standard deviation of the distribution of latents that an encoder gives for a picture
    estimate   x_hat, the clean latents that a denoiser predicts from noisy ones
    recipe     the plain config from which a model is built again;  in configs/experiment/, that of a whole training
    position   a sample's place in the global order of training;  a refusal is a mistake that a person can mend, in one line

Time t runs from 0 (data) to 1 (noise), and  x_t = alpha(t) * x + sigma(t) * noise.  Latents have zero mean and unit variance, so
that x_t has variance alpha^2 + sigma^2.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ldm.errors import Refusal

# The fields of B samples, by name; `position` (B) int64 is among them in training.
Batch = Mapping[str, Any]

# (x_t: (B, C, H, W), t: () or (B)) -> x_hat: (B, C, H, W). Flow maps take a third argument, `to`, like t (denoiser.py).
Denoise = Callable[..., Tensor]


@dataclass(frozen=True)
class Widths:
    """The widths of a `Cond`: of its vector, of one of its tokens, and the channels of its maps; 0 where it has none."""

    vector: int = 0
    tokens: int = 0
    spatial: int = 0

    def __add__(self, other: Widths) -> Widths:
        """The widths of two `Cond` joined: those of vectors and maps add up, those of tokens must agree.

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
    """A condition as the backbone reads it, in up to three ways, called slots.

    vector:  (B, D)         added to the time embedding
    tokens:  (B, L, D)      a sequence for cross-attention
    mask:    (B, L) bool    True where a token may be attended to; None where all may
    spatial: (B, C', H, W)  maps at latent resolution, concatenated to the noisy latents by channel
    """

    vector: Tensor | None = None
    tokens: Tensor | None = None
    mask: Tensor | None = None
    spatial: Tensor | None = None

    def __add__(self, other: Cond) -> Cond:
        """Both conditions at once: vectors are concatenated by width, tokens by length, maps by channel."""
        return self._joined(other, 1)

    def stack(self, other: Cond) -> Cond:
        """Concatenates two conditions with the same slots along the batch, (B, ...) -> (2 B, ...).

        Raises:
            Refusal: the two do not fill the same slots, or bring different numbers of tokens.
        """
        for slot in ("vector", "tokens", "spatial"):
            a, b = getattr(self, slot), getattr(other, slot)
            if (a is None) != (b is None) or (a is not None and a.shape[1:] != b.shape[1:]):
                shapes = [None if v is None else tuple(v.shape) for v in (a, b)]
                raise Refusal(f"Conditions with {slot} of shapes {shapes[0]} and {shapes[1]} cannot share a batch.")
        return self._joined(other, 0)

    def to(self, device: torch.device | str) -> Cond:
        """The same on another device."""
        return Cond(*(None if x is None else x.to(device) for x in (self.vector, self.tokens, self.mask, self.spatial)))

    def _joined(self, other: Cond, dim: int) -> Cond:
        vector, tokens, spatial = (_join(getattr(self, s), getattr(other, s), dim) for s in ("vector", "tokens", "spatial"))
        masks = [self.mask, other.mask]
        if any(mask is not None for mask in masks):  # then tokens without a mask are all attended to
            sides = zip(masks, (self.tokens, other.tokens))
            masks = [x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None and x is not None else mask for mask, x in sides]
        return Cond(vector, tokens, _join(*masks, dim), spatial)


@dataclass(frozen=True)
class Draw:
    """The random numbers of training, as a function of (seed, stream, global sample position).

    So a resumed run, or one on another number of ranks or workers, draws the same numbers for the same sample. `position` (B)
    int64 is on the CPU; `batch` is the global batch's size, for stratified numbers; `step` counts the updates made so far.
    """

    seed: int
    position: Tensor
    batch: int
    step: int = 0

    def normal(self, stream: str, shape: Sequence[int]) -> Tensor:
        """-> (B, *shape), unit normal, on the CPU; pinned where there is a GPU, for `.to(device, non_blocking=True)`."""
        numbers = self._each(stream, lambda g: torch.randn(*shape, generator=g))
        return numbers.pin_memory() if torch.cuda.is_available() else numbers

    def uniform(self, stream: str, shape: Sequence[int] = ()) -> Tensor:
        """-> (B, *shape) in [0, 1), on the CPU."""
        return self._each(stream, lambda g: torch.rand(tuple(shape), generator=g))

    def stratified(self, stream: str) -> Tensor:
        """-> (B) in [0, 1): one number in each of `batch` equal intervals over the global batch, on the CPU."""
        return (self.position % self.batch + self.uniform(stream)) / self.batch

    def _each(self, stream: str, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        name, generator = zlib.crc32(stream.encode()), torch.Generator()
        return torch.stack([draw(generator.manual_seed(mix(self.seed, name, p))) for p in self.position.tolist()])


@dataclass(frozen=True)
class Moments:
    """An encoder's normal distribution of whitened latents; `mean` and `std` are (B, C, H, W).

    Over the data, mean + std * noise has zero mean and unit variance per channel.
    """

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """noise: (B, C, H, W), unit normal -> latents mean + std * noise: (B, C, H, W)."""
        return self.mean + self.std * noise.to(self.mean, non_blocking=True)


class Schedule(Protocol):
    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t: (*) in [0, 1] -> alpha: (*), sigma: (*), both above 0."""

    def inverse(self, log_ratio: Tensor) -> Tensor:
        """log(sigma / alpha): (*) -> t: (*) in [0, 1]."""


class Prediction(Protocol):
    def target(self, x: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What the network should predict; all are (B, C, H, W), or broadcast to it."""

    def to_data(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The estimate of x that the network's output stands for: (B, C, H, W)."""


class Backbone(Protocol):
    blocks: Iterable[nn.Module]  # in order: what is compiled, recomputed and sharded one by one, and where hidden states are read

    def __call__(self, x: Tensor, noise_level: Tensor, cond: Cond) -> Tensor:
        """x: (B, C, H, W), noise_level: (B) -> (B, C, H, W), what the prediction reads."""


class Denoiser(Protocol):
    backbone: Backbone
    schedule: Schedule
    prediction: Prediction

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond, to: Tensor | None = None) -> Tensor:
        """x_t: (B, C, H, W), t: () or (B), to: as t, where a flow map goes -> x_hat: (B, C, H, W)."""

    def output(self, x_t: Tensor, t: Tensor, cond: Cond, to: Tensor | None = None) -> Tensor:
        """The network's own output, before `prediction.to_data`: (B, C, H, W)."""


class Sampler(Protocol):
    """Ours `walk` over the times of a `grid` in `steps`, and have the other two from sampler/_walk.py."""

    def __call__(self, denoise: Denoise, schedule: Schedule, noise: Tensor, seeds: Sequence[int]) -> Tensor:
        """noise: (B, C, H, W), unit normal; seeds: one a picture -> latents x: (B, C, H, W)."""

    def walk(self, denoise: Denoise, schedule: Schedule, x: Tensor, times: Tensor, seeds: Sequence[int]) -> Tensor:
        """Goes from x_t at the first of some times to x_t at the last: (B, C, H, W) -> (B, C, H, W).

        Args:
            denoise, schedule: the estimate of the data, and t -> (alpha, sigma).
            x: (B, C, H, W), at times[0].
            times: (N) in [0, 1], falling; deterministic samplers can also be walked upwards, to invert them.
            seeds: B of them, of the fresh noise of samplers that add some.
        """

    def times(self, schedule: Schedule, sides: Sequence[int] | None = None) -> Tensor:
        """-> (steps + 1), from the first time down to the last, float64; `sides` are the latents' height and width."""


class Conditioned(Protocol):
    """A model as guidance and objectives see it."""

    denoiser: Denoiser
    conditioner: Any  # whose `embedders` are the conditions by name

    def condition(self, request: Batch, only: Sequence[str] | None = None) -> Cond:
        """request: fields, B of each -> its `Cond`. With `only`, the other conditions are dropped; `()` gives the null condition.

        A condition that is left out by `only` reads `negative.<field>` in the place of its field where the request has that.
        """


class Guidance(Protocol):
    def __call__(self, model: Conditioned, ask: Batch) -> Denoise:
        """model, ask: the request's fields, B of each -> the guided estimate, (x_t, t) -> x_hat."""


class InTraining(Conditioned, Protocol):
    average: Conditioned  # the same model with the averaged weights; it takes no gradients

    def encode(self, images: Tensor) -> Moments:
        """(B, 3, h, w) in [-1, 1] -> the autoencoder's whitened moments of (B, C, H, W), without gradients."""

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) whitened -> (B, 3, h, w), about [-1, 1], with gradients."""


class Objective(Protocol):
    """What is minimised; it may also be one that `Freezes`, is `Critical`, or `Meets` the model."""

    def __call__(self, model: InTraining, batch: Batch, x: Tensor, cond: Cond, draw: Draw) -> dict[str, Tensor]:
        """-> scalars to log by name, among them `loss`, which is minimised.

        Args:
            model, draw: what is trained, and the random numbers of this step.
            batch, x: the fields of B samples, and their clean latents, (B, C, H, W).
            cond: their condition, in which each part is dropped at its rate.
        """


class Embedder(Protocol):
    """One condition. It may leave out all but `key`, `rate`, `widths` and the call: embedder.py has the defaults."""

    key: str | tuple[str, ...]  # the batch field it reads, or several
    rate: float  # the share of samples for which it is dropped in training, in [0, 1]
    widths: Widths
    frozen: tuple[str, ...]  # names of its parts that come from elsewhere: not trained, nor in checkpoints
    unreached: tuple[str, ...]  # names of its parts that no gradient reaches: their output is not read, or read without one
    hole: tuple[str, str] | None  # the fields of an inpainting model's picture and mask
    stands_for: str | None  # the condition with whose random numbers it is dropped, where that is another
    drop_from: float  # it is dropped where its random number is in [drop_from, drop_from + rate)
    weighs: bool  # whether it applies the weights of a caption's parts (embedder.py's Weighted)
    cut: Any  # counts captions that were cut (`seen`, `cut`), and is a sentence as `str`; None where nothing can be cut
    taught: tuple[str, ...]  # words that adapters added to its vocabulary

    def __call__(self, value: Any, drop: Tensor) -> Cond:
        """value: the field, or a list of the fields; drop: (B) bool, on the CPU, True where it is dropped -> its `Cond`."""

    def derive(self, batch: Batch, draw: Draw | None) -> dict[str, Any]:
        """-> fields that the batch lacks and that follow from its others, by name; `draw` is None outside training."""

    def check(self, values: Mapping[str, Sequence[Any]]) -> None:
        """Refuses a request as a person wrote it, N values by field, before it is read; `init` is the picture to begin from."""

    def read(self, field: str, values: Sequence[Any], size: tuple[int, int]) -> Any:
        """N values that a person wrote for a field, for pictures of size (height, width) -> the field of a batch of N."""

    def show(self, value: Any) -> Tensor | None:
        """value: as in the call -> a picture of it, (B, 3, h, w) in [-1, 1]; None where there is none."""

    def input(self, field: str) -> Any:
        """How a person writes a field on a page (embedder.py's Input); None: not at all."""

    def skip(self, layers: int | None) -> None:
        """Reads the text tower's `layers`-th layer from its end (1 is the last), or with None the one it was built with."""

    def unasked(self, field: str, size: tuple[int, int]) -> list[Any] | None:
        """-> the values of a field that the request does not name, as a person would write them; None: it must be named."""

    def settings(self) -> dict[str, Any] | None:
        """-> what, besides its weights, decides its embeddings, as plain values; None where they cannot be precomputed."""

    def original(self) -> Embedder | None:
        """-> the condition whose precomputed embeddings this one reads, loaded and compared with them; None for any other."""


class Autoencoder(Protocol):
    channels: int  # C
    factor: int  # f

    def encode(self, images: Tensor) -> Moments:
        """(B, 3, f * H, f * W) in [-1, 1] -> whitened moments of (B, C, H, W)."""

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) whitened -> (B, 3, f * H, f * W) in [-1, 1]."""


@runtime_checkable
class StandIn(Protocol):
    """An autoencoder that training never runs, in the place of the one that the data were encoded with."""

    def original(self) -> Autoencoder:
        """-> that one, loaded, after its sizes were compared with this one's."""


class Samples(Protocol):
    """A split of the data."""

    index: Any  # of its shards; its `fingerprint()` is their hash
    selection: Any  # which samples of the index count; its `content()` is their hash

    def __len__(self) -> int:
        """How many samples there are."""

    def captions(self) -> list[str]:
        """All captions, in order."""


class DataModule(Protocol):
    """What stages, evaluation and commands use of a data module, besides Lightning's hooks."""

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
        """Writes and indexes what must be on the disk, once on each node."""

    def setup(self, stage: str | None = None) -> None:
        """Opens and checks the splits, on every process."""

    def ordered(self, split: str, batch: int, rank: int = 0, world: int = 1) -> Iterable[Batch]:
        """-> batches with this process' share of a split, every sample of which comes once, in order, over all of `world`."""

    def parts(self, split: str) -> tuple[Sequence[Any], Sequence[tuple[int, int]]]:
        """-> the selected samples of each bucket, and the buckets' heights and widths."""

    def rows(self, split: str, chosen: Sequence[int]) -> Batch:
        """The chosen samples of a split as one batch."""

    def transfer_batch_to_device(self, batch: Batch, device: Any, dataloader_idx: int) -> Batch:
        """The same batch on the device."""

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int = 0) -> Batch:
        """The same batch with pictures and arrays as float32, pictures in [-1, 1]."""


@runtime_checkable
class Draws(Protocol):
    """A stage of training that may train a latent model."""

    def latent_model(self) -> Any | None:
        """-> the model, with its `autoencoder` and `conditioner`; None where another part is trained."""


@runtime_checkable
class Freezes(Protocol):
    """An objective or autoencoder, a torch module, with `frozen` sub-modules: they are neither trained nor in checkpoints."""

    frozen: tuple[str, ...]


@runtime_checkable
class Critical(Protocol):
    """An objective, a torch module, some of whose sub-modules learn from the loss `critic` that it gives, and not from `loss`."""

    critic: tuple[str, ...]


@runtime_checkable
class Meets(Protocol):
    """An objective that meets the model before training, such as one with a second model, which leaves to it what both have."""

    def meet(self, model: Any) -> bool:
        """-> whether it asks for conditions itself (`model.conditioner`), and need be given none."""


def like(scale: Tensor, x: Tensor) -> Tensor:
    """Views scale, () or (B), so that it broadcasts over x, (B, ...)."""
    return scale.reshape(-1, *(1,) * (x.ndim - 1)).to(x, non_blocking=True)


def _join(a: Tensor | None, b: Tensor | None, dim: int) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    if a.device != b.device:  # numbers are embedded on the CPU
        device = b.device if a.device.type == "cpu" else a.device
        a, b = a.to(device, non_blocking=True), b.to(device, non_blocking=True)
    return torch.cat((a, b), dim)


def mix(*words: int) -> int:
    """Hashes integers into one in [0, 2^63) (splitmix64, https://doi.org/10.1145/2660193.2660195), equal on every platform."""
    state = 0
    for word in words:
        state = (state + word + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1
