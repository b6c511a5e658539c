"""Where rooms meet: config -> objects. The only file of the library that knows Hydra.

What a config may build is a positive list of module prefixes; the config `allow=[mine]` adds a user's own package.
"""

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ldm.adapt import ADAPTED, Asked, Given, as_asked, asked, attach, base_of, check_base, check_new, kept_of, put_on
from ldm.check import check_nodes, nearest
from ldm.compose import CONFIGS
from ldm.conditioner import Conditioner
from ldm.denoiser import Denoiser
from ldm.errors import NotFound, Refusal
from ldm.files.called import command_line
from ldm.files.folder import as_run, read_recipe, read_weights, without_usual
from ldm.files.moved import moved
from ldm.files.process import first
from ldm.model import LatentModel
from ldm.nn.empty import is_weightless, weighted, weightless
from ldm.rest import at_rest, content_of, from_checkpoint, holds_ours, in_our_layout, is_own, read_at_rest
from ldm.training.saved import newest
from ldm.types import Widths

ALLOWED = ("ldm", "torch.optim", "torch.nn", "torchvision.datasets", "pytorch_lightning")
# What a model at rest, perhaps a stranger's, may build: its parts, and nothing that writes, downloads or trains.
ROOMS = (
    "autoencoder",
    "backbone",
    "nn",
    "condition",
    "schedule",
    "prediction",
    "denoiser",
    "build.assemble",
    "build.load_autoencoder",
    "build.adapted",
    "adapter",
)
NARROW = tuple(f"ldm.{room}" for room in ROOMS)
# The list of the build under way: packages that the user trusts hold for the folders it loads too, whatever these say.
UNDER_WAY: ContextVar[Sequence[str]] = ContextVar("under_way", default=())


def build(config: Any, allow: Sequence[str] = ALLOWED, **arguments: Any) -> Any:
    """Builds what `_target_` says, and all below it, after checking every node's target, names and types.

    Names of before a move are read as the present ones (moved.py).

    Raises:
        Refusal: a target outside the allowlist, an unknown or missing name, a wrong type.
    """
    plain = OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else config
    plain = moved(plain)
    check_nodes(plain, allow)
    before = UNDER_WAY.set(allow)
    try:
        return instantiate(plain, _convert_="all", **arguments)
    except InstantiationException as error:
        cause: BaseException = error
        while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
            cause = cause.__cause__
        raise cause from None
    finally:
        UNDER_WAY.reset(before)


def build_members(config: DictConfig, group: str) -> dict[str, Any]:
    """What a list such as callback=[checkpoint,ema] chose, by name."""
    nodes = OmegaConf.to_container(config.get(group) or OmegaConf.create({}), resolve=True)
    return {name: build(node, allowed(config)) for name, node in chosen(nodes, group).items()}


def chosen(nodes: Mapping[str, Any], group: str) -> dict[str, Any]:
    """The members that a list chose. Settings of one that was not chosen are an experiment's, for when it is.

    Raises:
        Refusal: settings of a member that there is not.
    """
    members = {name: node for name, node in nodes.items() if "_target_" in (node or {})}
    for name in nodes:
        if name not in members and name not in _members_of(group):
            raise Refusal(f"{group}.{name} has settings but there is no such member.{nearest(name, _members_of(group))}")
    return members


@lru_cache
def _members_of(group: str) -> list[str]:
    """-> the names of all members of a group of which several can be chosen."""
    return sorted({str(name) for path in (CONFIGS / group).glob("*.yaml") for name in OmegaConf.load(path)})


def allowed(config: DictConfig) -> tuple[str, ...]:
    """The module prefixes that a run's config may build."""
    return (*ALLOWED, *config.get("allow", ()))


def narrowed(allow: Sequence[str]) -> tuple[str, ...]:
    """What a model at rest may build, where a run may build `allow`: models, and the user's own packages."""
    return (*NARROW, *(prefix for prefix in allow if prefix not in (*ALLOWED, *NARROW)))


def assemble(
    autoencoder: Any,
    condition: Mapping[str, Any],
    backbone: Callable[..., nn.Module],
    schedule: Any,
    prediction: Any,
    level: Any,
    unit_input: bool = True,
    span: int = 0,
) -> LatentModel:
    """A latent model of its parts; partials are told what they work on: conditions the autoencoder, the backbone the widths.

    Args:
        autoencoder: the first stage.
        condition: the conditions by name.
        backbone: makes the network from `channels` and `widths`.
        schedule: t -> (alpha, sigma).
        prediction: what the network says.
        level: how the network is told the noise level.
        unit_input: whether x_t is scaled to unit variance before the network sees it.
        span: of a flow map, the width of what it is told of its second time; 0 for any other.
    """
    conditioner = Conditioner({n: e(autoencoder=autoencoder) if isinstance(e, partial) else e for n, e in condition.items()})
    network = backbone(channels=autoencoder.channels, widths=conditioner.widths + Widths(vector=span))
    return LatentModel(autoencoder, conditioner, Denoiser(network, schedule, prediction, level, unit_input, span))


def adapted(base: str | None, adapters: Mapping[str, Any] | None = None, rates: Mapping[str, float] | None = None) -> LatentModel:
    """A model at rest, frozen, with adapters beside it, which alone are trained; without adapters it is trained as a whole.

    Args:
        base: whatever `at_rest` takes. adapters: by name. rates: other dropout rates of its conditions while it is trained.
    """
    if base is None:
        raise Refusal("training=finetune begins from a model at rest: model.init=FOLDER.")
    place = at_rest(base)
    check_base(place)
    model = load_model(place, UNDER_WAY.get())
    attach(model, adapters or {}, rates or {})
    return model.train()


def build_stage(config: DictConfig, begins: bool = True) -> Any:
    """The training stage of a composed train.yaml, which takes over the weights that model.init names if it `begins`."""
    plain = moved(OmegaConf.to_container(config, resolve=True))
    recipe = plain["training"].pop("recipe")
    if recipe.get("_target_") != ADAPTED and (plain.get("adapter") or plain.get("rates")):
        raise Refusal("adapter=[...] and rates= are of training=finetune, which begins from model.init=MODEL.")
    if plain.get("parametrization") and "parametrization" not in plain["training"]:
        raise Refusal("parametrization=mup is of training=diffusion, which makes its weights anew.")
    for model in (recipe, plain["training"].get("model", {})):
        for group, place in (("condition", "condition"), ("adapter", "adapters")):
            if place in model:
                model[place] = chosen(model[place], group)
        if model.get("base") is not None:
            model["base"] = in_our_layout(model["base"])
    stage = build(plain["training"], allowed(config))
    stage.recipe = recipe
    if recipe.get("_target_") == ADAPTED:
        base = at_rest(recipe["base"])
        stage.recipe, stage.began = kept_of(recipe, base), content_of(base)
    model = stage.latent_model()
    frozen = () if model is None else frozen_parts(model)
    stage.frozen = (*(f"model.{part}" for part in frozen), *stage.frozen)
    if begins and config.model.init is not None and recipe.get("_target_") != ADAPTED:
        from ldm.interop.begin import begin  # which loads open_clip and torchvision

        weights, part = _beginning(stage.trains, config.model.init, recipe), f"{stage.trains}."
        elsewhere = [name.removeprefix(part) for name in stage.frozen if name.startswith(part)]
        print(begin(stage.get_submodule(stage.trains), weights, config.model.init, elsewhere), flush=True)
    return stage


def _beginning(part: str, source: str, recipe: Mapping[str, Any]) -> dict:
    """The weights that `model.init` names: of a run that is not exported yet its newest checkpoint, else of a model at rest."""
    from ldm.interop.begin import check_unseen, weights_for
    from ldm.interop.cache import is_named

    source = in_our_layout(source) if is_named(source) else source
    path = Path(source)
    unfinished = path.is_dir() and not any(path.glob("*.safetensors")) and newest(path) is not None
    if unfinished or (path.suffix == ".ckpt" and is_own(path)):
        there, weights = from_checkpoint(path, part)
        check_unseen(recipe, there, source)
        return weights
    kind = recipe["prediction"]["_target_"].split(".")[-1] if "prediction" in recipe else None
    return weights_for(part, source, kind, recipe)


def frozen_parts(model: LatentModel) -> list[str]:
    """The parts of a latent model that come from elsewhere: its autoencoder, and what its conditions declare frozen.

    Where adapters alone are trained, all other tensors.
    """
    if model.trained is not None:
        return [name for name in model.state_dict() if name not in model.trained]
    embedders = model.conditioner.embedders.items()
    return ["autoencoder", *(f"conditioner.embedders.{n}.{part}" for n, e in embedders for part in e.frozen)]


def load_autoencoder(path: str) -> nn.Module:
    """A trained autoencoder from its folder.

    Raises:
        NotFound: nothing is there. Refusal: its latents' statistics were never measured.
    """
    folder = Path(path)
    if not (folder / "model.safetensors").is_file():
        raise NotFound(
            f"There is no autoencoder in {path} (model.safetensors is missing). Train one first: "
            f"{command_line('train')} experiment=emoji/autoencoder {as_run(folder)}; or name another: autoencoder.path=FOLDER."
        )
    with weightless():
        autoencoder = build(without_usual(read_recipe(folder))[0], narrowed(UNDER_WAY.get()))
    weights = {name: x.float() if x.is_floating_point() else x for name, x in read_weights(folder / "model.safetensors").items()}
    with weighted():
        autoencoder.load_state_dict(weights, assign=True)
    if "count" in weights and not weights["count"]:
        raise Refusal(
            f"The autoencoder in {path} has no latent statistics, without which latents are not whitened. They are measured at "
            f"the end of its training: run its `{command_line('train')} ...` command again to finish it, or, for weights from "
            f"elsewhere, measure them alone: {command_line('train')} training=autoencoding training.perceptual=null "
            f"model.init={path} trainer.max_steps=0 run_id=NAME autoencoder=... data=... with the sizes and "
            "the pictures of these weights."
        )
    return autoencoder.eval()


def load_model(
    path: str | Path, allow: Sequence[str] = (), adapters: str | Sequence[str] | None = None, base: str | None = None
) -> LatentModel:
    """A latent model from whatever `at_rest` takes, with its averaged weights where it has them.

    Args:
        allow: packages of the user's own that it may be built from.
        adapters: what is put to work on it, as `[NAME=]SOURCE[:STRENGTH[:TEXT_STRENGTH]][:guess]` (adapt.py).
        base: where the base of a run of adapters lies, if not where it was.

    Raises:
        NotFound: nothing is there. Refusal: its weights do not fit its config, or an adapter does not fit it.
    """
    if path is None:
        raise Refusal("No model is named: model.init=RUN, or the path= of what loads one, such as objective.teacher.path=RUN.")
    place, given = at_rest(path), []
    recipe, weights = read_at_rest(place)
    if recipe["_target_"] == ADAPTED:
        given = [Given(Asked(str(path)), _members(recipe, allow), weights, content_of(place))]
        recipe, weights = read_at_rest(base_of(path, recipe, None if base is None else at_rest(base)))
    elif base is not None:
        raise Refusal(f"base={base}: {path} is a whole model and stands on no base.")
    model = _whole(path, recipe, weights, allow)
    state = model.state_dict()
    mine = {one.sha256 for one in given}
    for one in [_given(one, recipe, state, allow) for one in asked(adapters)]:
        if one.sha256 in mine:
            raise Refusal(
                f"adapters={one.asked.source} is at work already, since model={path} is its run: model=BASE with "
                f"adapters={one.asked.source}:0.5 draws with half of it."
            )
        check_new(one, given)
        given.append(one)
    if given:
        put_on(model, given)
    return model.eval()


def _whole(path: str | Path, recipe: Mapping[str, Any], weights: Mapping[str, Any], allow: Sequence[str]) -> LatentModel:
    empty = is_weightless()
    with weightless():
        model = build(without_usual(recipe)[0], narrowed(allow))
    if not isinstance(model, LatentModel):
        raise Refusal(f"{path} holds a {type(model).__name__}, not a latent diffusion model; use its diffusion run (model=...).")
    state, frozen = model.state_dict(), frozen_parts(model)
    missing = [k for k in state.keys() - weights.keys() if not any(k.startswith(f"{part}.") for part in frozen)]
    unknown = sorted(weights.keys() - state.keys())
    if missing or unknown:
        raise Refusal(f"The weights in {path} do not fit its config: missing {sorted(missing)[:3]}, unknown {unknown[:3]}.")
    if not empty:
        whole = {name: x.float() if x.is_floating_point() else x for name, x in weights.items()}
        model.load_state_dict(whole, strict=False, assign=True)
    return model


def _given(one: Asked, recipe: Mapping[str, Any], state: Mapping[str, Any], allow: Sequence[str]) -> Given:
    """An adapter that is asked for, of a run here or in another layout, as a model of that recipe and tensors takes it."""
    from ldm.interop.hub import here

    path = here(one.source)
    if path.exists() and holds_ours(path):
        node, tensors = read_at_rest(path)
        if node["_target_"] != ADAPTED:
            raise Refusal(f"adapters={one.source} is a whole model: model={one.source} draws from it.")
        return Given(one, _members({"adapters": as_asked(node["adapters"], one)}, allow), tensors, content_of(path))
    from ldm.interop.adapters import read_adapter

    read, sha256 = read_adapter(one.source, one.name, recipe, state)
    print(*(read.said if first() else ()), sep="\n", end="\n" if read.said and first() else "", flush=True)
    nodes = as_asked({read.node["_target_"].split(".")[-2]: read.node}, one)
    return Given(one, _members({"adapters": nodes}, allow), read.tensors, sha256)


def _members(recipe: Mapping[str, Any], allow: Sequence[str]) -> dict[str, Any]:
    """The adapters of a recipe, built."""
    return {name: build(node, narrowed(allow)) for name, node in recipe["adapters"].items()}
