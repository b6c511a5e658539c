"""What a command says and nothing reads is refused by name, or said."""

import re
from functools import cache

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from ldm.compose import CONFIGS, compose_config
from ldm.errors import Refusal
from ldm.unused import PREVIEWED, READ, check_used

BESIDE = ("training=finetune", "model.init=m", "adapter=[lora]")
AUTOENCODER, VQ, TEXT = ("experiment=emoji/autoencoder",), ("experiment=emoji/vq",), ("experiment=emoji/text",)
composed = cache(lambda name, *words: compose_config(name, words))


def parsed(*words):
    return OverridesParser.create().parse_overrides(list(words))


def check(name, words, *more):
    """As a command that says `more` besides; what they set changes nothing of who reads what."""
    check_used(composed(name, *words), name, parsed(*more), CONFIGS)


@pytest.mark.parametrize(
    "words, word, said",
    [
        (BESIDE, "backbone=dit", "training=finetune takes the backbone of the model that it begins from (model.init=m)"),
        (BESIDE, "backbone.width=8", "takes the backbone"),
        (BESIDE, "condition=[label]", "takes the condition"),
        (BESIDE, "schedule=cosine", "takes the schedule"),
        (BESIDE, "prediction=velocity", "takes the prediction"),
        (BESIDE, "level=timestep", "takes the level"),
        (BESIDE, "autoencoder=kl", "takes the autoencoder"),
        (BESIDE, "model.span=64", "takes the model.span"),
        (BESIDE, "sampler=heun", "takes the sampler"),
        (BESIDE, "loss=lpips", "nothing in this training reads `loss`. It goes with training=autoencoding."),
        (AUTOENCODER, "guidance.scale=3", "nothing in this training reads `guidance`"),
        (TEXT, "rates.text=0.5", "goes with training=finetune"),
        (TEXT, "adversary=patchgan", "goes with training=autoencoding"),
        (AUTOENCODER, "training.codebook_weight=2", "KL has no such term, but kl"),
        (VQ, "training.kl_weight=1e-3", "VQ has no such term, but codebook"),
        (
            (*AUTOENCODER, "training.perceptual=null"),
            "training.perceptual_share=0.5",
            "training.perceptual=null compares no features",
        ),
        (TEXT, "+nonsense=3", "nothing in this training reads `nonsense`"),
        (TEXT, "callback.levels.every=9", "levels is not chosen, so that this changes nothing; say callback=[checkpoint,bar,"),
    ],
)
def test_what_a_training_does_not_read_is_refused_by_name(words, word, said):
    with pytest.raises(Refusal, match=rf"{re.escape(word.lstrip('+'))}.*{re.escape(said)}"):
        check("train", words, word)


def test_a_command_refuses_it():
    with pytest.raises(Refusal, match=r"backbone=dit changes nothing here: training=finetune takes the backbone"):
        compose_config("train", [*BESIDE, "backbone=dit"], used=True)


def test_what_is_read_passes():
    check("train", [*TEXT, "parametrization=mup", "coordinates=[32,64]"], "coordinates=[32,64]")
    check("train", BESIDE, "optimizer.lr=1e-3", "rates.text=0.5", "adapter.lora.rank=2", "objective.time.mean=1")
    check("train", (*AUTOENCODER, "training.perceptual=null"), "training.perceptual_weight=0", "training.kl_weight=1e-3")
    check("train", VQ, "training.codebook_weight=2", "training.kl_weight=0")
    previews = OmegaConf.create(OmegaConf.to_container(composed("train", *BESIDE), resolve=False))
    previews.callback.drawings = OmegaConf.load(CONFIGS / "callback" / "drawings.yaml").drawings
    check_used(previews, "train", parsed("sampler=heun"), CONFIGS)
    check(
        "train", TEXT, "sampler=heun", "backbone=dit", "model.span=64", "groups.decoder={scale: 0.1}", "+trainer.benchmark=true"
    )
    check("train", AUTOENCODER, "adversary=patchgan", "loss.model=x", "model={init: x}", "callback@always=[guard]", "~logger.csv")


@pytest.mark.parametrize("words", [BESIDE, AUTOENCODER, TEXT], ids=lambda words: words[0])
def test_each_setting_is_refused_exactly_where_it_changes_nothing_that_is_built(words):
    """One leaf of every group, set to something else: what OmegaConf resolves of what is read changes, or it is refused."""
    config = composed("train", *words)
    roots = [*READ, *(PREVIEWED if words == TEXT else ())]

    def resolved():
        plain = OmegaConf.to_container(config, resolve=True)
        return {**{name: plain[name] for name in roots}, "init": plain["model"]["init"]}

    before = resolved()
    for place, node in leaves(config):
        value, refused = node._value(), False
        node._set_value(12345)
        changes = resolved() != before
        node._set_value(value)
        try:
            check("train", words, f"{place}=12345")
        except Refusal:
            refused = True
        assert refused == (not changes), place


def leaves(config):
    """The first plain setting of each group, and where it stands."""
    for group in config:
        node = config._get_node(group)
        while OmegaConf.is_dict(node) and node._value() is not None:
            inner = [key for key in node if not str(key).startswith("_")]
            if not inner:
                break
            group, node = f"{group}.{inner[0]}", node._get_node(inner[0])
        else:
            if not OmegaConf.is_config(node):
                yield group, node


DATA = ("data=shards", "data.train=x")
PRECOMPUTE, EVALUATE = ("precompute", "model=m", "out=o", "condition=[text]", *DATA), ("evaluate", "model=m", *DATA)


@pytest.mark.parametrize(
    "command, word, said",
    [
        (PRECOMPUTE, "data.flip=0.5", "takes pictures as they are"),
        (PRECOMPUTE, "data.crop=random", "takes pictures as they are"),
        (EVALUATE, "data.buckets=sdxl", "takes pictures as they are"),
        (EVALUATE, "data.flip=0.5", "takes pictures as they are"),
        (EVALUATE, "logger=[csv]", "only the numbers of a sweep"),
    ],
)
def test_what_would_change_pictures_that_are_taken_in_order_is_refused(command, word, said):
    with pytest.raises(Refusal, match=rf"{re.escape(word)}.*{re.escape(said)}"):
        check(command[0], command[1:], word)


@pytest.mark.parametrize("command", [PRECOMPUTE, EVALUATE], ids=["precompute", "evaluate"])
def test_what_only_says_how_training_reads_is_said(command, capsys):
    (name, *words), idle = command, ["data.workers=3", "data.batch=8", "data.seed=1", "data.window=2"]
    idle += ["condition.text.rate=0.2"] * (name == "precompute")
    check(name, words, "data.flip=0.0", "data.crop=center", *idle)
    assert f"Not used, since {name} takes samples once, in order: {', '.join(idle)}\n" in capsys.readouterr().out


class Own:
    """An objective of the user's own, without weights."""

    def __init__(self, time=None):
        self.time = time


def test_a_part_of_what_takes_no_such_part_is_refused_if_it_is_said():
    """Which the config offers to all objectives, and is left out where nobody says it."""
    config = OmegaConf.create(OmegaConf.to_container(composed("train", *TEXT), resolve=False))
    config.objective._target_ = f"{__name__}.Own"
    said = [parsed(word) for word in ("objective/time=uniform", "objective/weight=min_snr")]
    check_used(config, "train", said[0], CONFIGS)
    with pytest.raises(Refusal, match=r"objective/weight=min_snr changes nothing here: .*Own has no weight"):
        check_used(config, "train", said[1], CONFIGS)
