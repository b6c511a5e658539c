"""IP-Adapter: a picture as a prompt, beside the text (https://arxiv.org/abs/2308.06721).

softmax(q k^T / sqrt(D)) v of the text  +  strength softmax(q k'^T / sqrt(D)) v' of the picture  (equation 5, in each attention
to the text). The picture comes as tokens behind the text's (condition/image_prompt.py).
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ldm.adapter.controlnet import Controlled
from ldm.errors import Refusal
from ldm.files.process import first
from ldm.nn.empty import weightless
from ldm.nn.layers import visible, zero

ATTENTION = re.compile(r"denoiser\.backbone\.(.+\.attend_tokens)\.prompts\.[^.]+\.([kv]\.weight)")
PROMPT = re.compile(r"conditioner\.embedders\.[^.]+\.((?:image_tower|project)\..+)")
LAYERS = {"q", "k", "v", "out"}  # of an attention beside whose keys and values a picture's can stand


class KeysAndValues(nn.Module):
    """A picture's, of one attention."""

    def __init__(self, tokens: int, channels: int) -> None:
        super().__init__()
        self.k, self.v = nn.Linear(tokens, channels, bias=False), nn.Linear(tokens, channels, bias=False)


class Prompted(nn.Module):
    """An attention to a text's tokens, and to those of each picture by themselves, which lie behind the text's, in their order.

    A picture's last token is its strength, in each of its numbers. What has no keys and values here is not attended to.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.prompts = base, nn.ModuleDict()
        self.counts: list[int] = []

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        """x: (B, N, C), y: (B, L, D), mask: (B, 1, 1, L), True where y may be seen -> (B, N, C)."""
        base = self.base
        text, *pictures = y.split([y.shape[1] - sum(self.counts), *self.counts], dim=1)
        if mask is not None:  # as long as the text alone would be
            text, mask = visible(text, mask[:, 0, 0, : text.shape[1]])
        if not self.prompts:
            return base(x, text, mask)
        q, k, v = (self._heads(z) for z in (base.q(x), base.k(text), base.v(text)))
        h = scaled_dot_product_attention(q, k, v, mask)
        for prompt, picture in zip(self.prompts.values(), pictures, strict=True):
            tokens, strength = picture[:, :-1], picture[:, -1, 0]
            k, v = self._heads(prompt.k(tokens)), self._heads(prompt.v(tokens))
            h = h + strength[:, None, None, None] * scaled_dot_product_attention(q, k, v)
        return base.out(h.transpose(1, 2).flatten(2))

    def _heads(self, z: Tensor) -> Tensor:
        return z.unflatten(-1, (self.base.heads, -1)).transpose(1, 2)


class IPAdapter:
    """A picture as a prompt: keys and values for its tokens in each attention to the text.

    Args:
        prompt: makes the condition that reads the picture; it is told `width` and `key`.
        name: of the condition, and the field of a request, or of the data, that holds the picture.

    Raises:
        Refusal: a name that is no word.
    """

    wraps = 2
    scales = True

    def __init__(self, prompt: Callable[..., nn.Module], name: str = "image_prompt") -> None:
        if not str(name).isidentifier():
            raise Refusal(f"adapter.ip_adapter.name={name}: wanted a word, such as style, that names a field.")
        self.prompt, self.name = prompt, name

    def owns(self, name: str) -> bool:
        """By its beginning and end, whatever the picture is called."""
        return ATTENTION.fullmatch(name) is not None or PROMPT.fullmatch(name) is not None

    def attach(self, model: Any) -> list[str]:
        """Gives each attention to the text keys and values for a picture: the keys are the text's at first, and the values zero,
        so that the picture says nothing yet -> the names of what is trained, all but the image tower.

        Raises:
            Refusal: the network has no such attentions, or the model such a condition already.
        """
        places = self._places(model)
        width = next(iter(places.values())).k.in_features
        heard = {}
        for path, place in places.items():
            heard[path] = KeysAndValues(width, place.q.out_features)
            heard[path].k.weight.data.copy_(place.k.weight)
            zero(heard[path].v)
        self._join(model, self.prompt(width=width, key=self.name), heard)
        names = [name for name, _ in model.named_parameters() if self.owns(name) and ".image_tower." not in name]
        if first():
            count = sum(model.get_parameter(name).numel() for name in names)
            print(f"adapter.ip_adapter: {len(places)} attentions, {count:,} numbers, told by {self.name}", flush=True)
        return names

    def apply(self, model: Any, tensors: Mapping[str, Tensor], strength: float, base: Mapping[str, Tensor]) -> None:
        """Puts a trained one into the network; `strength` is meant where a request says none.

        Raises:
            Refusal: the network has no such attentions, or others; or the model has such a condition already.
        """
        places = self._places(model)
        width = next(iter(places.values())).k.in_features
        with weightless():
            prompt = self.prompt(width=width, key=self.name)
            heard = {path: KeysAndValues(width, place.q.out_features) for path, place in places.items()}
        _fill(prompt, {found[1]: x for n, x in tensors.items() if (found := PROMPT.fullmatch(n))})
        there = {(found[1], found[2]): x for n, x in tensors.items() if (found := ATTENTION.fullmatch(n))}
        if lost := sorted({path for path, _ in there} ^ heard.keys()):
            raise Refusal(f"{len(lost)} attentions are not in both, such as {lost[0]}; it is an IP-Adapter of another U-Net.")
        for path, own in heard.items():
            _fill(own, {leaf: x for (place, leaf), x in there.items() if place == path})
            own.requires_grad_(False).eval()
        prompt.strength, prompt.rate = strength, prompt.rate or 1.0  # dropped in the null
        self._join(model, prompt.requires_grad_(False).eval(), heard)

    def _join(self, model: Any, prompt: Any, heard: Mapping[str, KeysAndValues]) -> None:
        network, copies = _parts(model)
        for path, own in heard.items():
            _prompted(network, path).prompts[self.name] = own
        for part in (network, *copies):  # a ControlNet is told of the text alone
            for path in dict(_attentions(part)):
                _prompted(part, path).counts.append(prompt.count)
        model.conditioner.add(self.name, prompt)

    def _places(self, model: Any) -> dict[str, Any]:
        """The network's attentions to a text by name.

        Raises:
            Refusal: it has none, or others; or the model has such a condition already.
        """
        network, _ = _parts(model)
        places = dict(_attentions(network))
        if not places or not all(LAYERS <= dict(place.named_children()).keys() for place in places.values()):
            raise Refusal(f"an IP-Adapter needs a U-Net's attentions to a text; this backbone is a {type(network).__name__}.")
        if twice := [path for path, place in _attentions(network, ".attend_self") if place.k.in_features != place.q.in_features]:
            raise Refusal(
                f"{twice[0]} attends to the text as well, and not to the picture: no IP-Adapter is known for this U-Net."
            )
        if self.name in model.conditioner.embedders:
            raise Refusal(
                f"adapter.ip_adapter.name={self.name}: the model has a condition of that name "
                f"({list(model.conditioner.embedders)}); give it another, or NAME= in adapters=."
            )
        return places


def _parts(model: Any) -> tuple[nn.Module, list[nn.Module]]:
    """The network, and the copies of its first half that ControlNets are."""
    backbone = model.denoiser.backbone
    if isinstance(backbone, Controlled):
        return backbone.base, [net.copy for net in backbone.nets.values()]
    return backbone, []


def _attentions(network: nn.Module, end: str = ".attend_tokens") -> Iterator[tuple[str, Any]]:
    """Those to the text, by name, as they were without pictures."""
    for name, module in network.named_modules():
        if name.endswith(end):
            yield name, module.base if isinstance(module, Prompted) else module


def _prompted(network: nn.Module, path: str) -> Prompted:
    """The attention of that name, which can attend to pictures from now on."""
    owner, _, leaf = path.rpartition(".")
    module = network.get_submodule(path)
    if not isinstance(module, Prompted):
        module = Prompted(module)
        setattr(network.get_submodule(owner), leaf, module)
    return module


def _fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Gives a module the tensors that it was built without.

    Raises:
        Refusal: they are others, or of other shapes.
    """
    own = module.state_dict()
    if lost := sorted({name for name, x in own.items() if x.is_meta} - tensors.keys() | tensors.keys() - own.keys()):
        raise Refusal(f"{lost[0]} is {'missing' if lost[0] in own else 'of nothing here'}; it is no whole IP-Adapter.")
    for name, x in tensors.items():
        if x.shape != own[name].shape:
            raise Refusal(
                f"{name} is {tuple(x.shape)} in the IP-Adapter and {tuple(own[name].shape)} here; it is of another U-Net."
            )
    module.load_state_dict(tensors, strict=False, assign=True)
