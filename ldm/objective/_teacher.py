"""A frozen second model beside the one that is trained: the teacher of a distillation, the reference of preferences."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import Refusal
from ldm.objective._cond import each_slot
from ldm.objective.regression import Regression
from ldm.types import Batch, Cond, Denoise, Embedder, InTraining, Schedule


class Teacher(nn.Module):
    """A finished model's denoiser and conditions. Its autoencoder is left out: the latents are those of the model that learns.

    Texts that say the same in both models are kept and read once, by the model (`meet`). What they say of a dropped caption is
    read once and for all.
    """

    def __init__(self, load: Callable[[], Any]) -> None:
        super().__init__()
        model = load()
        self.denoiser, self.conditioner = model.denoiser, model.conditioner
        self.rates = {name: embedder.rate for name, embedder in model.conditioner.embedders.items()}
        self.shared: Sequence[str] = ()
        self.nothing: dict[str, Cond] = {}  # of one dropped caption

    def meet(self, model: Any) -> None:
        """Leaves those texts to the model that it has too, and does not train."""
        embedders, others = self.conditioner.embedders, model.conditioner.embedders
        self.shared = [name for name in self.rates if name in others and _alike(embedders[name], others[name])]
        for name in self.shared:
            del embedders[name]

    def condition(self, batch: Batch, parts: Mapping[str, Cond]) -> Cond:
        """What the teacher's conditions say of the batch; parts: what the model's say of it, by name."""
        return self._with(self.conditioner.parts(batch), parts)

    def null(self, model: InTraining, batch: Batch, parts: Mapping[str, Cond], count: int) -> Cond:
        """What the teacher's conditions say of the batch's `count` samples without them."""
        for name in self.shared if not self.nothing else ():
            with torch.inference_mode(False), torch.no_grad():
                self.nothing[name] = model.conditioner.embedders[name]([""], torch.tensor([True]))
        silent = {name: each_slot(cond, lambda x: x.expand(count, *x.shape[1:])) for name, cond in self.nothing.items()}
        silent |= {name: parts[name] for name in self.shared if not self.rates[name]}
        return self._with(self.conditioner.parts(batch, only=()), silent)

    def guided(self, cond: Cond, null: Cond | None, scale: float) -> Denoise:
        """Its estimate by classifier-free guidance; at scale 1, which needs no null, of its condition alone."""

        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            x_hat = self.denoiser(x_t, t, cond)
            if scale == 1:
                return x_hat
            x_null = self.denoiser(x_t, t, null)
            return x_null + scale * (x_hat - x_null)

        return denoise

    def _with(self, parts: Mapping[str, Cond], shared: Mapping[str, Cond]) -> Cond:
        return sum((shared[name] if name in self.shared else parts[name] for name in self.rates), Cond())

    def check_schedule(self, schedule: Schedule) -> None:
        """Raises Refusal where the model's is another."""
        if schedule != self.denoiser.schedule:
            raise Refusal(
                f"The teacher's schedule is {self.denoiser.schedule} and the model's {schedule}: learn on the teacher's "
                "(schedule=...)."
            )


class WithTeacher(Regression):
    """The base of objectives with a teacher, which is in no checkpoint.

    Args:
        teacher: loads a finished model of the same latents.
        **parts: as in regression.
    """

    frozen = ("teacher.denoiser", "teacher.conditioner")

    def __init__(self, teacher: Callable[[], Any], **parts: Any) -> None:
        super().__init__(**parts)
        self.teacher = Teacher(teacher)

    def meet(self, model: Any) -> bool:
        """Leaves the texts that both have to the model; conditions are asked for here."""
        self.teacher.meet(model)
        return True


def again(model: InTraining, batch: Batch, parts: Mapping[str, Cond]) -> Cond:
    """What the conditions of the model's average say, where `parts` are what the model's have said."""
    said = {name: parts[name] for name, embedder in model.conditioner.embedders.items() if _is_fixed(embedder)}
    return sum(model.average.conditioner.parts(batch, said=said).values(), Cond())


def _is_fixed(embedder: Embedder) -> bool:
    """Whether it is a text that is not trained, so that its embeddings could be kept ahead of time."""
    return embedder.settings() is not None and not any(p.requires_grad for p in embedder.parameters())


def _alike(one: Embedder, other: Embedder) -> bool:
    """Whether two texts say the same, now and after training."""
    if type(one) is not type(other) or not _is_fixed(other) or one.settings() != other.settings() or one.key != other.key:
        return False
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(_equal(x, b[name]) for name, x in a.items())


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same; those that have no numbers, as of a run that is only planned, by their shape."""
    if a.shape != b.shape or a.dtype != b.dtype or a.is_meta != b.is_meta:
        return False
    return a.is_meta or torch.equal(a, b.to(a.device))
