"""What makes a step fast changes nothing of it, and what a step costs does not grow unseen."""

import copy
import cProfile
import csv
import json
import pstats
import time
import traceback
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.clip import CLIP
from helpers.survive import adamw, against
from helpers.training import assert_same, captioned, contrast, diffusion, exact, small, train, trainer
from ldm.backbone.unet import UNet
from ldm.command.train import train as command
from ldm.compose import compose_config
from ldm.data.batch.ahead import Ahead, ahead
from ldm.schedule import Linear, ScaledLinear
from ldm.training.base import Stage
from ldm.training.callback.bfloat16 import Bfloat16
from ldm.training.callback.checkpoint import checkpoint_callback
from ldm.training.callback.compile import Compile
from ldm.training.callback.ema import EMA
from ldm.training.callback.guard import Guard
from ldm.training.callback.preempt import Preempt
from ldm.training.callback.profile import Profile
from ldm.training.callback.recompute import Recompute
from ldm.training.callback.throughput import Throughput, flops, peak_of
from ldm.training.optimizer.rate import Constant
from ldm.training.parallel import layout
from ldm.training.plan import _kept, cost, fits, plan
from ldm.training.run import fit
from ldm.training.stage.contrast import Contrast
from ldm.types import Cond, Draw, Widths

OPERATIONS, BYTES = 1750, 39_000_000  # of one step of the tiny diffusion model
CALLS = 3000  # of one step of a network of one number


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


class Waits(TorchDispatchMode):
    """Collects the copies from the processor to a device that the processor would wait for."""

    def __init__(self, device):
        super().__init__()
        self.device, self.found, self.copies = torch.device(device), [], 0

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        keywords = keywords or {}
        if operation is torch.ops.aten._to_copy.default and keywords.get("device") == self.device:
            if arguments[0].device.type == "cpu":
                self.copies += 1
                self.found += [] if keywords.get("non_blocking") else traceback.extract_stack()[-6:-1]
        return operation(*arguments, **keywords)


@pytest.mark.parametrize("schedule", [Linear(), ScaledLinear()])
def test_nothing_is_brought_to_the_device_that_is_waited_for(schedule):
    """Times, noise, labels, tables: the step goes on while they are under way."""
    stage = diffusion().to("meta")
    stage.model.denoiser.schedule = schedule
    batch = {"image": torch.zeros(2, 3, 8, 8, device="meta"), "position": torch.arange(2), "label": torch.tensor([1, 2])}
    with Waits("meta") as seen:
        stage.losses(batch, Draw(0, batch["position"], 2))["loss"].backward()
    assert seen.copies and not seen.found, traceback.format_list(seen.found)


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


# ---- the next batch, copied ahead


class Far(torch.Tensor):
    """A tensor that says it is on a GPU, and which streams it is used on."""

    is_cuda = True

    def record_stream(self, stream):
        stream.log.append(("used on", stream.name, int(self[0])))


class Stream:
    """Writes down what is put on it."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def record_event(self):
        self.log.append(("event", self.name))
        return len(self.log)

    def wait_event(self, event):
        self.log.append(("wait", self.name, event))


@pytest.fixture
def streams(monkeypatch):
    """A main and a side stream in the place of a GPU's; -> what was put on them, in order."""
    log = []
    now = [Stream("main", log)]

    @contextmanager
    def on(stream):
        now.append(stream)
        yield
        now.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side", log))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now[-1])
    return log


def test_a_batch_is_copied_before_the_one_ahead_of_it_is_used_and_used_once_it_has_come(streams):
    def move(batch):
        streams.append(("copy", torch.cuda.current_stream(None).name, int(batch["x"][0])))
        within = {"boxes": [(batch["x"] + 10).as_subclass(Far)]}
        return {"x": batch["x"].as_subclass(Far), "key": batch["key"], "within": within}

    for batch in Ahead([{"x": torch.tensor([n]), "key": ["a"]} for n in range(3)], move, torch.device("cuda")):
        streams.append(("step", "main", int(batch["x"][0])))
    at = {entry: i for i, entry in enumerate(streams)}
    for n in range(3):
        copied = at["copy", "side", n]
        assert streams[copied + 1] == ("event", "side")
        waited = at["wait", "main", copied + 2]
        assert copied < waited < at["used on", "main", n] < at["step", "main", n]
        assert waited < at["used on", "main", n + 10] < at["step", "main", n]
        assert n == 2 or at["copy", "side", n + 1] < waited
    assert ahead(streams, None) is streams  # nothing is copied where there is no GPU


def test_batches_that_were_fetched_but_not_trained_on_do_not_count(streams, emoji_root, tmp_path, monkeypatch):
    plain, average = train(emoji_root, tmp_path, [5])
    monkeypatch.setattr("ldm.data.shards.ahead", lambda loader, _: Ahead(loader, dict, torch.device("cpu")))
    legs, other = train(emoji_root, tmp_path, [2, 5])
    assert len(streams) > 3 * 5
    assert all(torch.equal(plain[k], legs[k]) for k in plain) and all(torch.equal(average[k], other[k]) for k in average)


def trained(stage, emoji_root, folder, *callbacks, **kwargs):
    made = trainer(folder, 2, callbacks=list(callbacks), enable_checkpointing=False, **kwargs)
    made.fit(*exact(stage, small(emoji_root)))
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
    assert_same(trained(diffusion(), emoji_root, tmp_path, fast()), trained(diffusion(), emoji_root, tmp_path))


def test_channels_last_is_the_plain_layout_also_after_a_checkpoint_of_the_other(emoji_root, tmp_path, monkeypatch):
    """A fused optimizer adds up what lies side by side in memory, whatever it belongs to."""

    def legs(*layouts):
        checkpoint = None
        for i, devices in enumerate(layouts):
            monkeypatch.setattr(layout, "CHANNELS_LAST", devices)
            stage, data = exact(fused(diffusion()), small(emoji_root))
            run = trainer(tmp_path, 2 * i + 2, enable_checkpointing=False)
            run.fit(stage, data, ckpt_path=checkpoint, weights_only=True)
            checkpoint = tmp_path / f"{i}.ckpt"
            run.save_checkpoint(checkpoint, weights_only=False)
        return stage.model.denoiser.backbone.state_dict()

    plain = legs((), ())
    for layouts in (("cpu",), ("cpu",)), ((), ("cpu",)), (("cpu",), ()):
        other = legs(*layouts)
        kernel = other["encoder.1.0.conv_in.weight"]
        assert kernel.is_contiguous(memory_format=torch.channels_last if layouts[1] else torch.contiguous_format)
        assert_same(other, plain)


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_cuda_graphs_are_refused_where_gradients_add_up(mode, emoji_root, tmp_path):
    made = trainer(tmp_path, 1, callbacks=[Compile(mode=mode)], enable_checkpointing=False, accumulate_grad_batches=2)
    with pytest.raises(ValueError, match=r"accumulate_grad_batches=2 .* use trainer.accumulate_grad_batches=1"):
        made.fit(diffusion(), small(emoji_root))


def test_fused_adamw_is_the_plain_one(emoji_root, tmp_path):
    a, b = diffusion(), diffusion()
    a.optimizer, b.optimizer = adamw, lambda params: adamw(params, fused=False)
    assert_same(trained(a, emoji_root, tmp_path), trained(b, emoji_root, tmp_path))


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


def test_bfloat16_is_the_copy_in_bfloat16_from_float32_weights():
    """What is put out, and the gradients, are to the last bit those of a network whose weights were rounded."""
    torch.manual_seed(0)
    net = UNet(3, Widths(tokens=8, vector=8), width=16, mult=(1, 2), res_blocks=1, depth=(1, 1), heads=2, groups=4)
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    stage, copied = diffusion(), copy.deepcopy(net).to(torch.bfloat16)
    stage.model.denoiser.backbone = net
    Bfloat16().on_fit_start(SimpleNamespace(precision="bf16-mixed"), stage)
    x, level = torch.randn(2, 3, 16, 16), 100 * torch.rand(2)
    cond = Cond(tokens=torch.randn(2, 5, 8), vector=torch.randn(2, 8))
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x, level, cond)
    other = copied(x.bfloat16(), level, cond)
    assert out.dtype == torch.bfloat16 and torch.equal(out, other)
    assert net(x, level, cond).dtype == torch.float32, "without autocast it is as ever"
    for y in (out, other):
        y.float().square().sum().backward()
    for (name, p), q in zip(net.named_parameters(), copied.parameters()):
        assert p.dtype == p.grad.dtype == torch.float32 and torch.equal(p.grad, q.grad.float()), name


def test_bfloat16_trains_as_float32_within_its_error_and_resumes_exactly(emoji_root, tmp_path):
    """Updates of a ten thousandth, which bfloat16 weights would never see, add up in the weights and in their average."""

    def run(*legs, **kwargs):
        checkpoint = None
        for steps in legs:
            stage, ema = diffusion(), EMA(0.9)
            stage.optimizer = partial(torch.optim.AdamW, lr=1e-4, fused=True)
            callbacks = [ema, *([Bfloat16()] if kwargs else []), Recompute()]
            made = trainer(tmp_path, steps, callbacks=callbacks, enable_checkpointing=False, **kwargs)
            made.fit(stage, small(emoji_root), ckpt_path=checkpoint, weights_only=True)
            checkpoint = tmp_path / f"{steps}.ckpt"
            made.save_checkpoint(checkpoint, weights_only=False)
        return stage.state_dict(), ema.average

    mixed = {"precision": "bf16-mixed"}
    (plain, plain_average), (whole, average), (legs, other) = run(6), run(6, **mixed), run(2, 6, **mixed)
    start = diffusion().state_dict()
    assert all(torch.equal(whole[k], legs[k]) for k in whole) and all(torch.equal(average[k], other[k]) for k in average)
    assert {x.dtype for x in (*whole.values(), *average.values()) if x.is_floating_point()} == {torch.float32}
    for a, b in ((whole, plain), (average, plain_average)):
        moved, apart = (torch.cat([(x[k] - y[k]).flatten() for k in average]) for x, y in ((b, start), (a, b)))
        assert 0 < moved.norm() and apart.norm() < 0.1 * moved.norm()


@pytest.mark.parametrize("stage", [diffusion, against, lambda: contrast(CLIP)], ids=["diffusion", "autoencoding", "contrast"])
def test_every_stage_trains_in_bfloat16(stage, emoji_root, tmp_path):
    made, stage = trainer(tmp_path, 1, precision="bf16-mixed", callbacks=[Bfloat16()], enable_checkpointing=False), stage()
    before = copy.deepcopy(stage.state_dict())
    made.fit(stage, captioned(emoji_root) if isinstance(stage, Contrast) else small(emoji_root))
    assert any(not torch.equal(value, before[name]) for name, value in stage.state_dict().items())


def test_weights_of_few_bits_are_refused(tmp_path):
    for precision in ("bf16-true", "16-true"):
        with pytest.raises(ValueError, match=f"{precision} would keep.* Use trainer.precision=bf16-mixed, and callback="):
            fit(diffusion(), None, trainer(tmp_path, 1, precision=precision), tmp_path)
    with pytest.raises(ValueError, match=r"precision=32-true: use it with trainer.precision=bf16-mixed"):
        Bfloat16().on_fit_start(SimpleNamespace(precision="32-true"), diffusion())


def test_every_stage_names_what_takes_its_time():
    for stage in (diffusion(), against(), contrast(CLIP)):
        assert stage.compiled and all(stage.get_submodule(name) is not None for name in stage.compiled)


# ---- what a run says of itself


class Slow(pl.Callback):
    """A validation that takes long."""

    def on_validation_batch_start(self, *_):
        time.sleep(0.3)


def test_speed_is_logged_by_its_closed_form(emoji_root, tmp_path, monkeypatch):
    """Pictures by the clock without validation, work by counting, waiting by a loader that sleeps."""
    stage, logger, data = diffusion(), CSVLogger(tmp_path), small(emoji_root)
    transfer = data.on_after_batch_transfer
    data.on_after_batch_transfer = lambda batch, i=0: time.sleep(0.05) or transfer(batch, i)
    callbacks = [Throughput(every=4, peak=1e9), Slow()]
    settings = {
        "enable_checkpointing": False,
        "val_check_interval": 4,
        "limit_val_batches": 1,
        "logger": logger,
        "accumulate_grad_batches": 2,
    }
    trainer(tmp_path, 8, callbacks=callbacks, **settings).fit(stage, data)
    logger.save()
    rows = [row for row in csv.DictReader((tmp_path / "lightning_logs/version_0/metrics.csv").open()) if row["speed/mfu"]]
    assert [row["step"] for row in rows] == ["4", "8"]
    for row, batches in zip(rows, (7, 8)):  # two micro-batches a step; the clock starts once the first has come
        speed, share, waiting = (float(row[f"speed/{name}"]) for name in ("images_per_second", "mfu", "waiting"))
        seconds = 4 * 8 / speed
        assert share == pytest.approx(speed * callbacks[0].flops / 1e9)
        assert batches * 0.05 <= waiting * seconds and waiting < 1


def test_work_is_counted_as_by_hand():
    """Of a linear map of N numbers to M: N M multiplications and additions, three times over, less the way to what is given."""

    class Linear(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.batch, self.seed = nn.Linear(30, 50), 4, 0

        def losses(self, batch, draw):
            return {"loss": self.net(batch["x"]).square().mean()}

        def forget(self):
            pass

    assert flops(Linear(), {"x": torch.randn(4, 30), "position": torch.arange(4)}) == 2 * 2 * 30 * 50
    stage, batch = against(), {"image": torch.randn(2, 3, 8, 8), "position": torch.arange(2)}
    made = trainer(".", 1, enable_checkpointing=False)
    stage.trainer = made
    before = {name: weight.clone() for name, weight in stage.state_dict().items()}
    assert flops(stage, batch) > 0 and all(p.grad is None for p in stage.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in stage.state_dict().items())
    assert peak_of("NVIDIA H200") == 989e12 and peak_of("H100 PCIe") == 756e12 and peak_of(torch.device("cpu")) is None


def test_a_plan_is_reckoned_without_a_step(emoji_root, tmp_path):
    """Parameters, batch, and 35 % of an H200's peak: the time follows from the work."""
    stage, made = diffusion(), trainer(tmp_path, 1000, enable_checkpointing=False, accumulate_grad_batches=2)
    count = sum(p.numel() for p in stage.parameters() if p.requires_grad)
    data = small(emoji_root)
    data.prepare_data()
    data.setup()
    wanted = flops(diffusion(), next(iter(data.ordered("train", 1))) | {"image": torch.zeros(1, 3, 8, 8)})
    page = plan(stage, small(emoji_root), made, "H200")
    assert f"{count / 1e6:,.1f} million trained" in page and "8 = 1 devices x 2 micro-batches x 4 samples" in page
    assert f"{8 / (8 * wanted / (0.35 * 989e12)):,.1f} samples/s on 1 x H200 at 35% of its peak" in page
    small_card, large_card = (plan(diffusion(), small(emoji_root), made, card) for card in ("0.9GB", "12GB"))
    assert "fits              into 12 GB, of which 1.00 GiB are left to CUDA" in large_card and "samples/s" not in large_card
    assert "does not fit      into 0.9 GB" in small_card and "nor does one sample" in small_card
    assert fits(12 * 2**30, 2 * 2**30, 3 * 2**30, batch=8, micro=8).endswith(
        "2 samples at a time do: trainer.accumulate_grad_batches=4"
    )
    with pytest.raises(ValueError, match="plan=abacus: its peak is not known"):
        plan(diffusion(), small(emoji_root), made, "abacus")
    again, batch = diffusion(), next(iter(data.ordered("train", 1))) | {"image": torch.zeros(1, 3, 8, 8)}
    Recompute().on_fit_start(None, again)
    (work, kept, _), (more, less, _) = cost(diffusion(), batch), cost(again, batch)
    assert work < more < 4 / 3 * work and less < kept, "what enters the blocks, for their forward once more"


class Attends(pl.LightningModule):
    """One head over N tokens of C features."""

    def __init__(self, net, *inputs):
        super().__init__()
        self.net, self.batch, self.inputs = net, 1, inputs

    def losses(self, batch, draw):
        return {"loss": self.net(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in self.inputs)).square().mean()}

    def forget(self):
        pass


def test_activations_are_counted_as_fused_kernels_keep_them():
    """By hand: the input, queries, keys and values, the output, and a number for each query; no weight for each pair."""

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x):
            q, k, v = self.qkv(x)[:, None].chunk(3, dim=-1)
            return nn.functional.scaled_dot_product_attention(q, k, v)

    n, c, position = 256, 8, torch.arange(1)
    stage = Attends(Head(), torch.randn(1, n, c)).to("meta")
    wanted = 4 * (n * c + n * 3 * c + n * c + n)
    assert _kept(stage, {"position": position}) == (wanted, 0) and wanted < 4 * n * n


@pytest.mark.slow
def test_what_stable_diffusion_2_takes_is_what_an_h200_measured():
    """A step of 32 at 512 x 512 in bfloat16: 53.4 GiB beside the peer's weights, moments and average of 12.9 (torch 2.11)."""
    with torch.device("meta"):
        net = UNet(4, Widths(tokens=1024), head_width=64)
    asked = (torch.randn(1, 4, 64, 64), torch.zeros(1), Cond(tokens=torch.randn(1, 77, 1024, device="meta")))
    each, norms = (size // 2 for size in _kept(Attends(net, *asked), {"position": torch.arange(1)}))
    count = sum(p.numel() for p in net.parameters())
    assert 0.1 * each < norms < 0.3 * each, "what float32 norms keep besides"
    assert 32 * each + (16 + 2) * count == pytest.approx((53.4 - 12.9) * 2**30, rel=0.1)


def test_a_published_recipe_is_planned_without_its_weights(monkeypatch):
    """Neither those of its towers, nor room for them in memory, nor those it would begin from."""
    untrained = ["autoencoder=kl", "~autoencoder.path", "model.init=nowhere"]
    config = compose_config("train", ["experiment=sd/v2", "plan=H200", *untrained])
    planned = []
    monkeypatch.setattr("ldm.training.plan.plan", lambda stage, *_: planned.append(stage))
    command(config)
    sizes = [p.numel() for p in planned[0].parameters() if p.is_meta and p.requires_grad]
    assert sum(sizes) == 865_910_724 and all(p.is_meta for p in planned[0].parameters())


def test_a_profile_is_left_where_it_is_said(emoji_root, tmp_path):
    profile = Profile(str(tmp_path / "profile"), warm=1, steps=1)
    trainer(tmp_path, 3, callbacks=[profile], enable_checkpointing=False).fit(diffusion(), small(emoji_root))
    assert "aten::convolution" in (tmp_path / "profile" / "table.txt").read_text()
    assert json.loads((tmp_path / "profile" / "trace.json").read_text())["traceEvents"]


# ---- what a step costs


def test_a_step_costs_no_more_than_it_did(emoji_root, tmp_path):
    """Operations and bytes of a whole training step, which no machine changes: raise them knowingly, or not at all."""
    seen = watched(fused(diffusion()), emoji_root, tmp_path)
    assert sum(seen.counts.values()) <= OPERATIONS and seen.bytes <= BYTES


class Idle(Stage):
    """A stage whose network is one number."""

    def __init__(self):
        super().__init__(lambda params: torch.optim.SGD(params, lr=0.0), Constant(), seed=0, batch=8)
        self.weight = nn.Parameter(torch.zeros(1))

    def losses(self, batch, draw):
        return {"loss": self.weight.sum()}


def test_the_loop_costs_no_more_calls_than_it_did(tmp_path):
    """Calls of functions a step in Lightning's loop, with the callbacks of every run: as above."""

    def calls(steps):
        callbacks = [EMA(0.9), Guard(str(tmp_path)), Preempt(str(tmp_path)), checkpoint_callback(str(tmp_path), 10**6)]
        loader = torch.utils.data.DataLoader([{"position": torch.arange(8)}] * 100, batch_size=None)
        made = trainer(tmp_path, steps, callbacks=callbacks, logger=CSVLogger(tmp_path), log_every_n_steps=20)
        with cProfile.Profile() as profile:
            made.fit(Idle(), loader)
        return pstats.Stats(profile).total_calls

    calls(50)  # what the first run imports and caches
    assert (calls(50) - calls(10)) / 40 <= CALLS
