"""The number of tokens in captions, for `data.filters={tokens: [null, 256]}`; a tower's weights are not needed."""

from collections.abc import Sequence

from ldm.files.folder import read_json
from ldm.tower.clip import PublishedTokenizer
from ldm.tower.language import folder_of, is_t5, load_words
from ldm.tower.t5 import SIZES

CLIP = "clip"


class Counter:
    """Counts the tokens of captions, the begin and the end included, as a text tower would read them.

    `model` is `clip`, whose tokenizer all CLIPs share (most read 77 tokens), or the tokenizer of a T5 or another language model:
    a folder, or a repository of the Hugging Face hub.

    Raises:
        Refusal: as `load_words`.
    """

    def __init__(self, model: str = CLIP) -> None:
        self.model = model
        if model == CLIP:
            pieces = PublishedTokenizer(77, 49407)
            self.rows = lambda captions: [[pieces.begin, *pieces.encode(caption), pieces.end] for caption in captions]
        else:
            folder = folder_of(model, "data.tokens.model")
            config = folder / "config.json"
            published = model in SIZES or not config.is_file() or is_t5(read_json(config))
            self.rows = load_words(model, "data.tokens", published).rows

    def __call__(self, captions: Sequence[str]) -> list[int]:
        """B captions -> the number of tokens of each."""
        return [len(row) for row in self.rows(captions)] if captions else []
