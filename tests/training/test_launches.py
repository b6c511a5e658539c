"""What a step asks of a GPU: nothing that the host waits for, few launches, few bytes. Counted where there is none."""

from contextlib import contextmanager
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from helpers.clip import CLIP
from helpers.members import config_with, write_home
from helpers.nowhere import Device, OneStep, one_step
from helpers.survive import adamw, against
from helpers.training import adam, assert_same, captioned, contrast, diffusion, exact, small, trainer
from ldm.build import build_stage
from ldm.errors import Refusal
from ldm.nn.empty import weightless
from ldm.training.callback.ema import EMA
from ldm.training.callback.graph import Graph, Replay, replace_forward
from ldm.training.callback.guard import Guard, gradient_norm
from ldm.training.callback.recompute import Recompute
from ldm.training.parallel.layout import pays_to_search
from ldm.types import Cond

FUSED = {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 1e-3, "fused": True}
TEXT = 2800  # operations of a step of experiment=emoji/text, AdamW in Muon's place


@pytest.fixture(scope="module")
def runs(tmp_path_factory, clip_folder):
    return write_home(tmp_path_factory.mktemp("home") / "runs", clip_folder)


def of_recipe(runs, group="objective", name="regression"):
    """The stage of emoji/text with a fused optimizer, without numbers."""
    config = config_with("emoji/text", group, name, runs)
    OmegaConf.update(config, "optimizer", FUSED, merge=False)
    OmegaConf.update(config, "model.span", 64 if name in ("mean_flow", "shortcut") else 0)
    with weightless():
        return build_stage(config, begins=False)


def fused(stage):
    stage.optimizer = adamw
    return stage


STAGES = {"contrast": (lambda: fused(contrast(CLIP)), captioned), "against": (against, small)}


@pytest.mark.parametrize("name", STAGES)
def test_a_step_asks_the_device_for_no_number_and_waits_for_no_copy(name, emoji_root, tmp_path):
    """On a device without numbers any question fails: `.item()`, a branch on a tensor, boolean indexing."""
    stage, data = STAGES[name]
    assert not one_step(stage(), data(emoji_root), tmp_path).waits


def test_a_text_recipes_step_neither_asks_nor_waits_nor_launches_more_than_it_did(runs, emoji_root, tmp_path):
    seen = one_step(of_recipe(runs), captioned(emoji_root), tmp_path)
    assert not seen.waits and seen.operations.total() <= TEXT, seen.operations.most_common(12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group", "name"),
    [
        *(("objective", name) for name in ("contrastive", "dmd", "latent_consistency", "mean_flow", "shortcut", "reward")),
        *(("objective/noise", name) for name in ("normal", "offset")),
        *(("schedule", name) for name in ("cosine", "ddpm", "karras", "scaled_linear")),
    ],
)
def test_no_objective_asks_or_waits(group, name, runs, emoji_root, tmp_path):
    """objective/noise=coupled does: a processor solves its assignment."""
    assert not one_step(of_recipe(runs, group, name), captioned(emoji_root), tmp_path).waits


def test_what_asks_the_device_is_caught(emoji_root, tmp_path):
    stage, losses = fused(diffusion()), diffusion().losses

    def asks(batch, draw):
        found = stage.objective(stage.model, batch, *stage.given(batch, draw), draw)
        return found if found["loss"] > 0 else losses(batch, draw)

    stage.losses = asks
    with pytest.raises(RuntimeError, match="meta tensor"):
        one_step(stage, small(emoji_root), tmp_path)


# ---- passes over the weights


def counted(work):
    with Device() as seen:
        work()
    return seen.operations


def test_the_average_and_the_optimizer_are_one_launch_each(tmp_path):
    stage = fused(diffusion())
    ema, run = EMA(0.9), SimpleNamespace(global_step=0)
    ema.on_train_start(run, stage)
    run.global_step = 1
    assert counted(lambda: ema.on_train_batch_end(run, stage)) == {"aten._foreach_lerp_": 1}
    optimizer = stage.configure_optimizers()["optimizer"]
    for p in stage.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    found = counted(optimizer.step)
    assert found["aten._fused_adamw_"] == len(optimizer.param_groups) and found.total() <= 3 * len(optimizer.param_groups)


def test_gradients_are_measured_once_a_step(emoji_root, tmp_path):
    """The guard's length serves the clipping."""
    norms = {}
    for guarded in (False, True):
        stage = fused(diffusion())
        callbacks = [Guard(str(tmp_path))] if guarded else []
        measured = one_step_on_cpu(stage, small(emoji_root), tmp_path, callbacks)
        norms[guarded] = measured["aten.linalg_vector_norm"]
    assert 0 < norms[True] <= norms[False] + 1


def one_step_on_cpu(stage, data, folder, callbacks):
    watch = OneStep()
    trainer(folder, 3, callbacks=[watch, *callbacks], gradient_clip_val=1.0, limit_val_batches=0).fit(stage, data)
    return watch.seen.operations


def test_clipping_by_the_guards_length_is_torchs(emoji_root, tmp_path):
    def run(*callbacks):
        made = trainer(tmp_path, 2, callbacks=[*callbacks, EMA(0.9)], gradient_clip_val=0.01, limit_val_batches=0)
        made.fit(*exact(diffusion(), small(emoji_root)))
        return made.lightning_module.state_dict()

    assert_same(run(Guard(str(tmp_path))), run())


# ---- cuDNN's search, and a step's graph


def test_cudnn_searches_where_kernels_are_large(runs):
    assert not pays_to_search(of_recipe(runs)) and not pays_to_search(diffusion())
    with torch.device("meta"):
        large = nn.ModuleList([nn.Conv2d(1024, 1024, 3), nn.Conv2d(512, 512, 3)])
    assert pays_to_search(large)


class Captured:
    """In the place of a captured graph: the same memory for what goes in, comes out, and comes back."""

    def __init__(self, flat, samples):
        self.flat, self.samples = flat, samples
        self.weights = [p for p in flat.parameters() if p.requires_grad]
        self.out = self.back = None
        self.replays = 0

    def __call__(self, *given):
        captured = self

        class Run(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *inputs):
                captured.replays += 1
                with torch.no_grad():
                    for sample, value in zip(captured.samples, inputs):
                        sample.copy_(value)
                with torch.enable_grad():
                    captured.whole = captured.flat(*captured.samples)
                captured.out = captured.whole.detach() if captured.out is None else captured.out.copy_(captured.whole.detach())
                return captured.out.detach()

            @staticmethod
            def backward(ctx, grad):
                wanted = [x for x in (*captured.samples, *captured.weights) if x.requires_grad]
                found = torch.autograd.grad(captured.whole, wanted, grad, allow_unused=True)
                found = [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, found)]
                if captured.back is None:
                    captured.back = found
                for static, g in zip(captured.back, found):
                    static.copy_(g)
                back = iter(captured.back)
                return tuple(next(back).detach() if x.requires_grad else None for x in (*captured.samples, *captured.weights))

        return Run.apply(*given, *self.weights)


@pytest.fixture
def captures(monkeypatch):
    """What was captured, in the place of CUDA's graphs."""
    made = []

    def capture(flat, samples, allow_unused_input, capture_error_mode):
        assert allow_unused_input and capture_error_mode == "thread_local"
        made.append(Captured(flat, samples))
        return made[-1]

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    return made


class Replays(Graph):
    """As on a GPU."""

    def on_fit_start(self, trainer, module):
        super().on_fit_start(trainer, module)
        self.replay = replace_forward(module.model.denoiser.backbone)


def test_a_replayed_step_is_the_plain_one(captures, emoji_root, tmp_path):
    """Also with a validation in between, whose batches are of other sizes; what is exported has no trace of it."""

    def run(*callbacks):
        stage = diffusion()
        made = trainer(tmp_path, 4, callbacks=[*callbacks, EMA(0.9), Guard(str(tmp_path))], gradient_clip_val=1.0)
        made.fit(*exact(stage, small(emoji_root)))
        return stage.state_dict()

    assert_same(run(Replays()), run())
    assert [c.replays for c in captures] == [4]


@contextmanager
def replaying(stage):
    replay = replace_forward(stage.model.denoiser.backbone)
    yield replay
    del stage.model.denoiser.backbone.forward


def test_only_a_steps_first_call_with_gradients_is_replayed(captures):
    stage = diffusion()
    ask = (torch.randn(2, 3, 8, 8), torch.rand(2), Cond(tokens=torch.randn(2, 1, 8)))
    net = stage.model.denoiser.backbone
    with replaying(stage) as replay:
        first = net(*ask)
        second = net(*ask)
        assert captures[0].replays == 1 and torch.equal(first, second)
        replay.begin()
        with torch.no_grad():
            net(*ask)
        net.eval()
        net(*ask)
        net.train()
        assert captures[0].replays == 1
        for size in (3, 4, 5, 6):
            replay.begin()
            net(torch.randn(size, 3, 8, 8), torch.rand(size), Cond(tokens=torch.randn(size, 1, 8)))
        assert len(captures) == 4, "the fifth size is run as ever"
        copied = deepcopy(net)
        assert isinstance(copied.forward, Replay) and copied.forward.network is copied and not copied.forward.graphs
        assert torch.equal(copied(*ask), first)


def test_graphs_are_refused_where_they_would_overwrite_what_is_read(emoji_root, tmp_path):
    for stage, settings, said in (
        (diffusion(), {"accumulate_grad_batches": 2}, "accumulate_grad_batches=2"),
        (diffusion(), {"callbacks": [Graph(), Recompute()]}, r"callback=\[recompute\]"),
        (against(), {}, "no diffusion model"),
    ):
        made = trainer(tmp_path, 1, **{"callbacks": [Graph()], **settings})
        with pytest.raises(Refusal, match=said):
            made.fit(stage, small(emoji_root))


def test_the_length_of_all_gradients_is_that_of_one_vector():
    stage = diffusion()
    optimizer = adam(stage.parameters())
    for p in stage.parameters():
        p.grad = torch.randn_like(p)
    whole = torch.cat([p.grad.flatten() for p in stage.parameters()])
    torch.testing.assert_close(gradient_norm(optimizer), whole.norm())
