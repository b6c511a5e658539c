"""Distillation: the way that DMD moves pictures and the path that LCM follows, in closed form; and the critic's own optimizer."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import softplus

from helpers.training import adam, diffusion, small, teacher, trainer
from ldm.autoencoder.identity import Identity
from ldm.backbone.mlp import MLP
from ldm.build import build
from ldm.condition.label import Label
from ldm.condition.text import Text
from ldm.conditioner import Conditioner
from ldm.denoiser import DataTime, Denoiser
from ldm.model import LatentModel
from ldm.nn.empty import weightless
from ldm.objective.dmd import DMD, direction, draw_along
from ldm.objective.latent_consistency import LatentConsistency
from ldm.objective.preference import Preference
from ldm.objective.regression import Regression
from ldm.prediction import Data, Flow
from ldm.sampler.consistency import Consistency
from ldm.schedule import Cosine, Linear
from ldm.training.callback.ema import EMA
from ldm.training.optimizer.rate import Constant
from ldm.training.saved import read_checkpoint
from ldm.training.stage.diffusion import Diffusion, Trained
from ldm.types import Cond, Draw, Widths, like

MEAN, STD = 0.3, 0.7
DRAW = Draw(0, torch.arange(64), 64)


class Gaussian(nn.Module):
    """The exact estimate of N(mean, std^2)."""

    def __init__(self, schedule, mean=MEAN, std=STD):
        super().__init__()
        self.schedule, self.mean, self.std, self.prediction = schedule, mean, std, Flow()

    def forward(self, x_t, t, cond=None, to=None):
        alpha, sigma = (like(s, x_t) for s in self.schedule(t))
        return self.mean + alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2) * (x_t - alpha * self.mean)


class Model:
    """As much of one as these objectives ask for."""

    def __init__(self, denoiser):
        self.denoiser, self.conditioner = denoiser, Conditioner({})
        self.average = self


def score(x_t, alpha, sigma, mean, std):
    return -(x_t - alpha * mean) / (alpha**2 * std**2 + sigma**2)


def test_the_way_is_the_difference_of_the_scores():
    """sigma^2 / alpha (score of fake - score of real), over the mean distance to the teacher's estimate."""
    schedule, t = Cosine(), 0.05 + 0.9 * torch.rand(64, dtype=torch.float64)
    drawn, noise = torch.randn(2, 64, 1, 2, 2, dtype=torch.float64)
    alpha, sigma = (like(s, drawn) for s in schedule(t))
    x_t = alpha * drawn + sigma * noise
    real, fake = Gaussian(schedule)(x_t, t), Gaussian(schedule, -0.5, 0.2)(x_t, t)
    scores = score(x_t, alpha, sigma, -0.5, 0.2) - score(x_t, alpha, sigma, MEAN, STD)
    wanted = sigma**2 / alpha * scores / (drawn - real).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(direction(drawn, real, fake), wanted)
    assert not direction(drawn, real, real).any()


def test_with_an_exact_critic_a_generator_reaches_the_teachers_distribution():
    """x = a z + b goes to a = STD, b = MEAN."""
    schedule, weights = Cosine(), torch.tensor([0.2, -1.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=0.03)
    for _ in range(300):
        z, noise = torch.randn(2, 512, 1, 1, 1, dtype=torch.float64)
        drawn, t = weights[0] * z + weights[1], torch.rand(512, dtype=torch.float64)
        with torch.no_grad():
            alpha, sigma = (like(s, drawn) for s in schedule(t))
            x_t = alpha * drawn + sigma * noise
            way = direction(drawn, *(g(x_t, t) for g in (Gaussian(schedule), Gaussian(schedule, *weights.tolist()[::-1]))))
        optimizer.zero_grad()
        ((drawn - (drawn - way).detach()).square().mean() / 2).backward()
        optimizer.step()
    assert weights.tolist() == pytest.approx([STD, MEAN], abs=0.1)


def test_it_draws_as_the_sampler_does():
    """The same noise, the same steps; the gradient is of the last estimate alone."""
    model, x = Gaussian(Linear()), torch.zeros(64, 1, 2, 2)
    calls = []

    def denoise(x_t, t):
        calls.append((torch.is_grad_enabled(), t[0].item()))
        return model(x_t, t)

    drawn = draw_along(denoise, Linear(), [1.0, 0.5], x, DRAW)
    assert calls == [(False, 1.0), (True, 0.5)]
    first, again = (DRAW.normal(f"drawn/{i}", x.shape[1:]) for i in range(2))
    sampler = Consistency(2)
    times, fresh = sampler.times(Linear()), iter([again])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ldm.sampler.consistency.Streams", lambda seeds: lambda x: next(fresh))
        wanted = sampler(lambda x_t, t: model(x_t, t), Linear(), first.double(), range(64))
    assert len(times) == 3
    torch.testing.assert_close(drawn.double(), wanted, atol=1e-5, rtol=1e-5)


class ExactConsistency(Gaussian):
    """Where the flow of the distribution ends."""

    def forward(self, x_t, t, cond=None, to=None):
        (alpha, sigma), (alpha_0, sigma_0) = ([like(s, x_t) for s in self.schedule(u)] for u in (t, 0 * t))
        end, here = ((a**2 * self.std**2 + s**2).sqrt() for a, s in ((alpha_0, sigma_0), (alpha, sigma)))
        return alpha_0 * self.mean + end / here * (x_t - alpha * self.mean)


def test_lcms_loss_of_the_exact_consistency_function_is_the_teachers_step_error():
    """Of second order in the step, and squared: 16 times less for twice the steps."""
    x, losses = MEAN + STD * torch.randn(64, 1, 2, 2, dtype=torch.float64), []
    for steps in (50, 100):
        objective = LatentConsistency(lambda: Model(Gaussian(Cosine())), steps, scale=1.0)
        t = ((0.3 + 0.4 * DRAW.uniform("t").double()) * 50).ceil() / 50  # a time of both grids
        objective.time = lambda u, schedule, t=t: t
        losses.append(objective(Model(ExactConsistency(Cosine())), {}, x, Cond(), DRAW)["loss"].item())
    assert losses[0] / losses[1] == pytest.approx(16, rel=0.2)


def toy(schedule=None, prediction=None):
    torch.manual_seed(0)
    return Model(Denoiser(MLP(1, Widths(), size=2, width=8, depth=1), schedule or Linear(), prediction or Flow(), DataTime()))


def test_what_does_not_fit_is_named():
    x = torch.zeros(64, 1, 2, 2)
    for objective in (DMD, LatentConsistency):
        with pytest.raises(ValueError, match=r"teacher's schedule is Cosine.*model's Linear"):
            objective(lambda: toy(Cosine()))(toy(), {}, x, Cond(), DRAW)
    with pytest.raises(ValueError, match="prediction=data: of what has no noise"):
        LatentConsistency(toy)(toy(prediction=Data()), {}, x, Cond(), DRAW)
    with pytest.raises(ValueError, match=r"objective\.steps=0"):
        DMD(toy, steps=0)


def test_a_discriminators_losses_are_the_published_ones():
    """Beside what there is without one: softplus(-D(drawn)); for the critic softplus(D(drawn)) + softplus(-D(data))."""
    x, seen = torch.randn(64, 1, 2, 2), []
    plain = DMD(toy, steps=1, scale=1.0)(toy(), {}, x, Cond(), DRAW)
    objective = DMD(toy, steps=1, scale=1.0, adversarial=0.5, layer=1, width=8)
    objective.judge.ear.take = lambda: objective.judge.ear.heard.reshape(64, 8, 1, 1)
    objective.judge.head.register_forward_hook(lambda module, inputs, output: seen.append(output))
    said = objective(toy(), {}, x, Cond(), DRAW)
    passed, of_drawn, of_data = seen
    torch.testing.assert_close(said["loss"] - plain["loss"], 0.5 * (1 + (-passed).exp()).log().mean())
    told_apart = -(of_drawn.sigmoid().neg() + 1).log().mean() - of_data.sigmoid().log().mean()
    torch.testing.assert_close(said["critic"] - plain["critic"], told_apart)
    assert plain.keys() == {"loss", "critic"} and 0 <= said["caught"] <= 1
    model = toy()
    drawn = objective(model, {}, x, Cond(), DRAW)
    gradients = [torch.autograd.grad(drawn["loss"], list(model.denoiser.parameters()), retain_graph=True)]
    gradients.append(torch.autograd.grad(drawn["loss"] - 0.5 * softplus(-seen[3]).mean(), list(model.denoiser.parameters())))
    assert any(not torch.equal(a, b) for a, b in zip(*gradients))  # what it says reaches the model
    assert not [p for p in DMD(toy).parameters() if p.shape[:1] == (8,) and p.ndim == 4] and DMD(toy).critic == ("fake",)


def test_a_discriminator_learns_to_tell_and_its_wrong_width_is_named(emoji_root, tmp_path):
    stage = stage_of(DMD(teacher, adversarial=0.1, width=8))
    before = stage.objective.judge.head[0].weight.clone()
    unsaid = stage_of(DMD(teacher, adversarial=0.1))
    assert unsaid.objective.judge.head[0].weight.shape == before.shape and len(unsaid.critic) == len(stage.critic)
    fit(stage, emoji_root, tmp_path, 1)
    assert not torch.equal(stage.objective.judge.head[0].weight, before)
    with pytest.raises(ValueError, match=r"of fake says 8 features a patch: objective\.width=8 \(found 4\)"):
        fit(stage_of(DMD(teacher, adversarial=0.1, width=4)), emoji_root, tmp_path, 1)


def test_as_many_steps_are_taken_by_every_process_and_all_numbers_of_them_come():
    objective = DMD(toy, steps=4)
    times = [objective._times(Draw(0, torch.arange(2), 2, step)) for step in range(40)]
    assert {len(t) for t in times} == {1, 2, 3, 4} and max(times, key=len) == [1.0, 0.75, 0.5, 0.25]


def reader(clip_folder, labels=False):
    """A model that is told captions by a frozen text tower, and perhaps labels by a table that is trained."""
    torch.manual_seed(0)
    told = {"label": Label(9, 4, slot="vector")} if labels else {}
    conditioner = Conditioner({**told, "text": Text(f"local-dir:{clip_folder}", pooled=True)})
    net = MLP(3, conditioner.widths, size=4, width=8, depth=1)
    return LatentModel(Identity(), conditioner, Denoiser(net, Linear(), Flow(), DataTime()))


def test_a_plan_counts_a_text_that_both_models_have_once(clip_folder):
    with weightless():
        model, objective = reader(clip_folder), LatentConsistency(lambda: reader(clip_folder))
    assert objective.meet(model) and objective.teacher.shared == ["text"]


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("kind", [DMD, LatentConsistency, Preference])
def test_a_text_that_both_models_have_is_kept_and_read_once(kind, labels, clip_folder):
    """Also by the average: one caption, one reading, one tower, no second autoencoder; and the loss is the same to rounding."""
    batch = {"image": torch.rand(4, 3, 4, 4), "worse": torch.rand(4, 3, 4, 4), "caption": ["a", "b c", "fox", ""]}
    batch |= {"label": torch.arange(4), "position": torch.arange(4)}
    draw, losses = Draw(0, torch.arange(4), 4), []
    apart, objective = reader(clip_folder, labels), kind(lambda: reader(clip_folder, labels))
    losses.append(objective(Trained(apart, lambda: apart), batch, batch["image"], Cond(), draw)["loss"])
    model, objective = reader(clip_folder, labels), kind(lambda: reader(clip_folder, labels))
    stage = stage_of(objective, model=model)
    average, calls = copy.deepcopy(model).requires_grad_(False), []
    for text in (model.conditioner.embedders["text"], average.conditioner.embedders["text"]):
        text.register_forward_hook(lambda module, inputs, output: calls.append(list(inputs[0])))
    stage.average = lambda: average
    with torch.no_grad():  # a critic is stepped by a trainer alone
        for _ in range(2):
            losses.append(stage.losses(batch, draw)["loss"])
    assert [call for call in calls if call != [""]] == [batch["caption"]] * 2
    assert calls.count([""]) == (kind is not Preference)
    torch.testing.assert_close(losses[1], losses[0])
    assert not [n for n in objective.teacher.state_dict() if "tower" in n] and "text" in model.conditioner.embedders
    assert stage.model.conditioner.embedders["text"].training


def test_a_text_that_differs_is_the_teachers_own(clip_folder):
    model, teacher = reader(clip_folder), reader(clip_folder)
    with torch.no_grad():
        teacher.conditioner.embedders["text"].tower.token_embedding.weight.add_(1)
    objective = LatentConsistency(lambda: teacher)
    assert objective.meet(model) and "text" in objective.teacher.conditioner.embedders
    for p in (trained := reader(clip_folder)).parameters():
        p.requires_grad_(True)
    objective = LatentConsistency(lambda: reader(clip_folder))
    assert objective.meet(trained) and "text" in objective.teacher.conditioner.embedders


class Judged(nn.Module):
    """Beside the loss a second network learns, through whose first opinion the loss's gradient passes."""

    critic = ("second",)

    def __init__(self, learns=True):
        super().__init__()
        torch.manual_seed(5)
        self.second, self.regression, self.learns = nn.Conv2d(3, 1, 1), Regression(), learns

    def forward(self, model, batch, x, cond, draw):
        estimate = model.denoiser(x, torch.tensor(0.5), cond)
        loss = self.regression(model, batch, x, cond, draw)["loss"] + self.second(estimate).mean()
        return {"loss": loss, "critic": (self.second(x) - 1).square().mean() * (1 if self.learns else 0)}


def stage_of(objective, seed=0, optimizer=adam, model=None):
    model = model or diffusion(seed).model
    stage = Diffusion(model=model, objective=objective, optimizer=optimizer, rate=Constant(), seed=0, batch=8)
    stage.frozen, stage.recipe = ("model.autoencoder", *stage.frozen), {"a": 1}
    return stage


def fit(stage, emoji_root, folder, steps, checkpoint=None, **settings):
    ema = EMA(0.9)
    run = trainer(folder, steps, callbacks=[ema], enable_checkpointing=False, **settings)
    run.fit(stage, small(emoji_root), ckpt_path=checkpoint, weights_only=True)
    return run, ema


def test_a_critic_is_stepped_beside_the_model_by_its_own_loss_alone(emoji_root, tmp_path):
    """One step by hand; the model's update is the same whether it learns or not; it is in no average."""

    def sgd(params):
        return torch.optim.SGD(params, lr=0.1)

    seen = []
    stage = stage_of(Judged(), optimizer=sgd)
    given = stage.given
    stage.given = lambda batch, draw: seen.append(given(batch, draw)) or seen[-1]
    _, ema = fit(stage, emoji_root, tmp_path, 1)
    by_hand = Judged().second
    (by_hand(seen[0][0]) - 1).square().mean().backward()
    with torch.no_grad():
        for p, q in zip(by_hand.parameters(), stage.objective.second.parameters()):
            torch.testing.assert_close(p - 0.1 * p.grad, q)
    assert not [name for name in ema.average if "second" in name] and not any(p.requires_grad for p in stage.critic)
    idle = stage_of(Judged(learns=False), optimizer=sgd)
    fit(idle, emoji_root, tmp_path, 1)
    assert all(torch.equal(p, q) for p, q in zip(stage.model.parameters(), idle.model.parameters()))
    assert torch.equal(idle.objective.second.weight, Judged().second.weight)


def test_a_critic_goes_on_to_the_bit(emoji_root, tmp_path):
    found = []
    for legs in ((4,), (2, 4)):
        checkpoint = None
        for steps in legs:
            stage = stage_of(Judged(), seed=steps if checkpoint else 0)
            run, _ = fit(stage, emoji_root, tmp_path, steps, checkpoint)
            checkpoint = tmp_path / f"{len(legs)}-{steps}.ckpt"
            run.save_checkpoint(checkpoint)
        found.append((stage.state_dict(), stage.beside.state_dict()["state"]))
    (weights, state), (again, state_again) = found
    assert all(torch.equal(weights[name], x) for name, x in again.items())
    assert state and all(torch.equal(state[i][name], x) for i, each in state_again.items() for name, x in each.items())
    assert "critic" in read_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["dmd", "latent_consistency"])
def test_a_model_is_distilled_and_its_teacher_stays_at_home(name, emoji_root, tmp_path):
    """Two steps of training on the way of a command: the teacher does not move and is in no checkpoint; fake is."""
    objective = build(
        {
            "_target_": {"dmd": "ldm.objective.dmd.DMD"}.get(name, "ldm.objective.latent_consistency.LatentConsistency"),
            "teacher": {"_target_": "helpers.training.teacher", "_partial_": True},
        },
        ("ldm", "helpers"),
    )
    stage = stage_of(objective)
    before = {n: x.clone() for n, x in stage.objective.teacher.state_dict().items()}
    run, ema = fit(stage, emoji_root, tmp_path, 2)
    assert all(torch.equal(x, before[n]) for n, x in stage.objective.teacher.state_dict().items())
    run.save_checkpoint(tmp_path / "a.ckpt")
    kept = read_checkpoint(tmp_path / "a.ckpt")["state_dict"]
    assert not [n for n in kept if "teacher" in n] and any("objective.fake" in n for n in kept) == (name == "dmd")
    assert not [n for n in ema.average if n.startswith("objective")]
    if name == "dmd":
        fake = dict(stage.objective.fake.named_parameters())
        moved = [not torch.equal(x, dict(stage.objective.teacher.denoiser.named_parameters())[n]) for n, x in fake.items()]
        assert any(moved)
