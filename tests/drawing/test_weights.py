"""Prompts with weights: what the web UI's own documentation says of them, and what they do to tokens."""

import pytest
import torch
from torch import nn

from helpers.family import their_pipeline
from ldm.build import load_model
from ldm.condition.label import Label
from ldm.conditioner import Conditioner
from ldm.denoiser import Denoiser, LogRatio
from ldm.drawing.request import read_request, skip_layers
from ldm.drawing.weights import in_turns, parts_of, taking_turns, weighted
from ldm.errors import Refusal
from ldm.model import LatentModel
from ldm.prediction import Flow
from ldm.rest import at_rest
from ldm.schedule import Linear

# The examples in AUTOMATIC1111/stable-diffusion-webui, modules/prompt_parser.py, parse_prompt_attention.
PEERS = {
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "(unbalanced": [("unbalanced", 1.1)],
    r"\(literal\]": [("(literal]", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1.0),
        ("house", 1.5730000000000004),
        (" ", 1.1),
        ("on", 1.0),
        (" a ", 1.1),
        ("hill", 0.55),
        (", sun, ", 1.1),
        ("sky", 1.4641000000000006),
        (".", 1.1),
    ],
}


@pytest.mark.parametrize("prompt", PEERS)
def test_weights_are_read_as_the_web_ui_reads_them(prompt):
    assert [(text, pytest.approx(weight)) for text, weight in parts_of(prompt)] == PEERS[prompt]


@pytest.mark.parametrize(
    "prompt, turns",
    [
        ("plain", ["plain"]),
        ("[cat|dog] on a mat", ["cat on a mat", "dog on a mat"]),
        ("[a|b|c] [x|y]", ["a x", "b y", "c x", "a y", "b x", "c y"]),
        ("([cow|horse]:1.2)", ["(cow:1.2)", "(horse:1.2)"]),
        (r"\[a|b\] [less]", [r"\[a|b\] [less]"]),
        ("[a|[b|c]]", ["a", "c"]),
    ],
)
def test_words_take_turns(prompt, turns):
    assert in_turns(prompt) == turns


@pytest.mark.parametrize("prompt", ["[a:b:0.5]", "[:b:10] c", "a BREAK b"])
def test_what_is_not_known_is_refused(prompt):
    with pytest.raises(Refusal, match=r"knows weights and \[a\|b\], no \[from:to:when\] and no BREAK"):
        weighted(prompt)


def test_a_weight_that_is_no_number_is_refused():
    with pytest.raises(Refusal, match=r"1\.2\.3 is no weight"):
        weighted("(a:1.2.3)")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A small Stable Diffusion 1 of diffusers', and the same here."""
    home = tmp_path_factory.mktemp("weights")
    pipeline = their_pipeline("sd1", home / "words")
    pipeline.save_pretrained(home / "sd1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LDM_CACHE", str(home / "cache"))
        return pipeline, load_model(at_rest(home / "sd1"))


def tokens(model, prompt, **how):
    ask, _ = read_request({"prompt": prompt, "resolution": 16, **how}, model)
    return model.condition(ask).tokens


def test_without_the_switch_brackets_are_text(published):
    _, model = published
    plain, ours = tokens(model, "a (red:1.4) fox"), published[0].encode_prompt("a (red:1.4) fox", "cpu", 1, False)[0]
    torch.testing.assert_close(plain, ours, atol=1e-4, rtol=0)


def test_tokens_are_as_heavy_as_they_are_told(published):
    """The web UI's rule: times the weight, token by token, then the mean as before (modules/sd_emphasis.py, Original)."""
    _, model = published
    plain = tokens(model, "a red fox")
    found = tokens(model, "a (red:1.4) fox", prompt_weights=True)
    weights = torch.ones(plain.shape[1])
    weights[2] = 1.4  # behind the begin, and `a`
    wanted = plain * weights[:, None]
    torch.testing.assert_close(found, wanted * plain.mean() / wanted.mean(), atol=1e-5, rtol=1e-5)
    assert torch.equal(tokens(model, "a red fox", prompt_weights=True), plain), "nothing is weighed, nothing is changed"


def test_each_of_several_prompts_has_its_own_weights(published):
    _, model = published
    both = tokens(model, ["a (red:1.4) fox", "a red fox"], prompt_weights=True)
    torch.testing.assert_close(both[:1], tokens(model, "a (red:1.4) fox", prompt_weights=True))
    torch.testing.assert_close(both[1:], tokens(model, "a red fox"))


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_clip_skip_reads_another_layer_of_transformers_tower(published, layers):
    """AUTOMATIC1111 counts the last layer as 1; the last LayerNorm comes behind whichever it is."""
    pipeline, model = published
    skip_layers(model, layers)
    ids = pipeline.tokenizer("a red fox", padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        hidden = pipeline.text_encoder(ids, output_hidden_states=True).hidden_states
        wanted = pipeline.text_encoder.final_layer_norm(hidden[-layers])
    torch.testing.assert_close(tokens(model, "a red fox"), wanted, atol=1e-4, rtol=0)
    skip_layers(model, None)
    torch.testing.assert_close(
        tokens(model, "a red fox"), pipeline.encode_prompt("a red fox", "cpu", 1, False)[0], atol=1e-4, rtol=0
    )
    with pytest.raises(Refusal, match="clip_skip=9: this model reads a tower of 3 layers"):
        skip_layers(model, 9)


def test_captions_take_turns_step_by_step(published):
    """Each step is guided by the next caption, however often a sampler calls within one."""
    ask, _ = read_request({"prompt": "[cat|dog]", "prompt_weights": True, "resolution": 16}, published[1])
    guided = taking_turns(lambda model, ask: lambda x_t, t: str(ask["caption"][0]))(None, ask)
    told = [guided(None, torch.tensor(t)) for t in (1.0, 1.0, 0.7, 0.7, 0.4, 0.1)]
    assert told == ["cat", "cat", "dog", "dog", "cat", "dog"]


def test_models_that_heed_no_weights_say_so():
    conditioner = Conditioner({"label": Label(3, 4)})
    model = LatentModel(nn.Identity(), conditioner, Denoiser(nn.Identity(), Linear(), Flow(), LogRatio()))
    with pytest.raises(Refusal, match="no text does not heed weights"):
        read_request({"ask": {"label": 1}, "prompt_weights": True, "resolution": 16}, model)
    with pytest.raises(Refusal, match="clip_skip=2: this model reads no captions"):
        skip_layers(model, 2)
