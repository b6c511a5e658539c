"""What makes a step fast changes nothing of it, and what a step costs does not grow unseen."""

import pytest
import pytorch_lightning as pl
import torch
from test_survive import adamw, against
from test_training import contrast, diffusion, small, trainer
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.training.checkpoint import checkpoint_callback
from ldm.training.compile import Compile
from ldm.training.ema import EMA
from ldm.training.guard import Guard
from ldm.training.preempt import Preempt
from ldm.training.recompute import Recompute
from ldm.types import Cond


class Operations(TorchDispatchMode):
    """Counts operations by name, and the bytes that they read and write."""

    def __init__(self):
        super().__init__()
        self.counts, self.bytes = {}, 0

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        result = operation(*arguments, **(keywords or {}))
        name = str(operation.overloadpacket)
        self.counts[name] = self.counts.get(name, 0) + 1
        leaves = torch.utils._pytree.tree_leaves((arguments, keywords, result))
        self.bytes += sum(t.numel() * t.element_size() for t in leaves if isinstance(t, torch.Tensor))
        return result


class Watch(pl.Callback):
    """Counts from the beginning of one step to the beginning of the next."""

    def __init__(self, step):
        self.step, self.seen = step, Operations()

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            self.seen.__enter__()
        if trainer.global_step == self.step + 1:
            self.seen.__exit__(None, None, None)


def fused(stage):
    stage.optimizer = adamw
    return stage


def watched(stage, emoji_root, folder):
    """One step with all that a run has beside it by default."""
    watch = Watch(3)
    callbacks = [watch, EMA(0.9), Guard(str(folder)), Preempt(str(folder)), checkpoint_callback(str(folder), 100)]
    settings = {"gradient_clip_val": 1.0, "log_every_n_steps": 50}
    trainer(folder, 5, callbacks=callbacks, **settings).fit(stage, small(emoji_root))
    return watch.seen


@pytest.mark.parametrize("stage", [lambda: fused(diffusion()), against], ids=["diffusion", "autoencoding"])
def test_a_step_never_waits_for_the_device(stage, emoji_root, tmp_path):
    """No number is fetched: losses, norms, verdicts and averages stay where they are."""
    seen = watched(stage(), emoji_root, tmp_path)
    assert sum(seen.counts.values()) > 100
    assert not {name: n for name, n in seen.counts.items() if "_local_scalar_dense" in name or "nonzero" in name}


def test_what_the_processor_reads_stays_with_it():
    batch = {
        "image": torch.zeros(2, 3, 8, 8),
        "position": torch.arange(2),
        "label": torch.zeros(2, dtype=torch.int64),
        "key": ["a"],
    }
    moved = diffusion().transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert moved["image"].is_meta and moved["key"] == ["a"] and not moved["position"].is_meta and not moved["label"].is_meta
    told = Cond(vector=torch.zeros(2, 3)) + Cond(vector=torch.zeros(2, 4, device="meta"))
    assert told.vector.is_meta and told.vector.shape == (2, 7)


def trained(stage, emoji_root, folder, *callbacks, **kwargs):
    made = trainer(folder, 2, callbacks=list(callbacks), enable_checkpointing=False, **kwargs)
    made.fit(stage, small(emoji_root))
    return stage.state_dict()


@pytest.mark.parametrize(
    "fast",
    [
        pytest.param(lambda: Compile(backend="aot_eager"), id="compile", marks=pytest.mark.slow),
        pytest.param(lambda: Compile(regional=True, backend="aot_eager"), id="regional"),
        pytest.param(Recompute, id="recompute"),
    ],
)
def test_the_fast_path_is_the_plain_one(fast, emoji_root, tmp_path):
    torch._dynamo.reset()
    plain, other = trained(diffusion(), emoji_root, tmp_path), trained(diffusion(), emoji_root, tmp_path, fast())
    assert plain.keys() == other.keys()
    for name, weight in plain.items():
        torch.testing.assert_close(other[name], weight, atol=1e-4, rtol=1e-4)


def test_fused_adamw_is_the_plain_one(emoji_root, tmp_path):
    a, b = diffusion(), diffusion()
    a.optimizer, b.optimizer = adamw, lambda params: adamw(params, fused=False)
    plain, other = trained(a, emoji_root, tmp_path), trained(b, emoji_root, tmp_path)
    for name, weight in plain.items():
        torch.testing.assert_close(other[name], weight, atol=1e-4, rtol=1e-4)


def test_recomputing_keeps_less():
    """Of what the backward pass needs, only what enters the blocks is kept."""

    def kept(*callbacks):
        stage, total = diffusion(), []
        for callback in callbacks:
            callback.on_fit_start(None, stage)
        x = torch.randn(4, 3, 16, 16)
        cond = stage.model.conditioner({"label": torch.zeros(4, dtype=torch.int64)})
        with torch.autograd.graph.saved_tensors_hooks(lambda t: total.append(t.numel()) or t, lambda t: t):
            stage.model.denoiser(x, torch.full((4,), 0.5), cond)
        return sum(total)

    assert kept(Recompute()) < 0.6 * kept()


def test_bf16_is_within_its_own_error():
    """The network in bfloat16 is as near to float64 as bfloat16 allows."""
    stage = diffusion()
    cond = stage.model.conditioner({"label": torch.zeros(4, dtype=torch.int64)})
    net, x, level = stage.model.denoiser.backbone, torch.randn(4, 3, 8, 8), torch.zeros(4)
    with torch.autocast("cpu", torch.bfloat16):
        fast = net(x, level, cond).double()
    exact = net(x, level, cond).double()
    assert (fast - exact).norm() < 0.03 * exact.norm()


def test_every_stage_names_what_takes_its_time():
    from conftest import CLIP

    for stage in (diffusion(), against(), contrast(CLIP)):
        assert stage.compiled and all(stage.get_submodule(name) is not None for name in stage.compiled)
