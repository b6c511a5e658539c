"""How many tokens captions have, for `data.filters={tokens: [null, 256]}`: without a tower's weights."""

from collections.abc import Sequence

from ldm.files.folder import read_json
from ldm.tower.clip import PublishedTokenizer
from ldm.tower.language import folder_of, is_t5, load_words
from ldm.tower.t5 import SIZES

CLIP = "clip"


class Counter:
    """Counts the tokens of captions, the begin and the end among them, as a text tower reads them.

    `model` is `clip`, whose byte pairs all CLIPs share (77 fit, or as many as its context), or the folder, or the repository
    of the Hugging Face hub, of a T5 or another language model's tokenizer.
    """

    def __init__(self, model: str = CLIP) -> None:
        self.model = model
        if model == CLIP:
            pieces = PublishedTokenizer(77, 49407)
            self.rows = lambda captions: [[pieces.begin, *pieces.encode(caption), pieces.end] for caption in captions]
        else:
            folder = folder_of(model, "data.tokens.model")
            told = folder / "config.json"
            published = model in SIZES or not told.is_file() or is_t5(read_json(told))
            self.rows = load_words(model, "data.tokens", published).rows

    def __call__(self, captions: Sequence[str]) -> list[int]:
        """B captions -> how many tokens each has."""
        return [len(row) for row in self.rows(captions)] if captions else []
