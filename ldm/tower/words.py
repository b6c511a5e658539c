"""T5's tokenizer from a published folder, which holds `tokenizer.json` or SentencePiece's `spiece.model`."""

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram

from ldm.errors import NotFound, Refusal

FILES = ("tokenizer.json", "spiece.model")
PAD, END, UNKNOWN, EXTRA = "<pad>", "</s>", "<unk>", 100  # T5's; EXTRA words more, <extra_id_99> to <extra_id_0>, follow its own
VARINT, EIGHT, BYTES, FOUR = 0, 1, 2, 5  # how a field's value is written in a protocol buffer


class Words:
    """T5's tokenizer, equal to transformers' T5Tokenizer: a caption's tokens, then the end token. `option` is named in errors.

    Raises:
        NotFound: the folder holds no tokenizer. Refusal: it is damaged, or not T5's.
    """

    def __init__(self, folder: Path, option: str) -> None:
        whole, pieces = (folder / name for name in FILES)
        if not whole.is_file() and not pieces.is_file():
            raise NotFound(
                f"There is no tokenizer in {folder} ({' or '.join(FILES)}); in folders of diffusers it lies beside the tower: "
                f"{option}.tokenizer=FOLDER."
            )
        try:
            self.pieces = Tokenizer.from_file(str(whole)) if whole.is_file() else from_sentencepiece(pieces.read_bytes())
        except Exception as error:  # the library has no class of its own
            raise Refusal(f"{whole if whole.is_file() else pieces} is no whole tokenizer ({error}). Copy it again.") from error
        self.pieces.no_truncation()
        self.pieces.no_padding()
        self.padding, self.end = (self.pieces.token_to_id(word) for word in (PAD, END))
        if None in (self.padding, self.end) or self.pieces.encode("").ids != [self.end]:
            raise Refusal(f"{folder} holds a tokenizer that does not end captions with {END}, as T5's does; T5's is known.")

    def rows(self, captions: Sequence[str]) -> list[list[int]]:
        """-> the ids of each caption and of the end token, not truncated."""
        return [row.ids for row in self.pieces.encode_batch(list(captions))]

    def cut(self, caption: str, length: int) -> list[int]:
        """-> the ids of a caption, truncated to `length`, the end token included."""
        (row,) = self.rows([caption])
        return row if len(row) <= length else [*row[: length - 1], self.end]

    def decode(self, ids: Sequence[int]) -> str:
        """-> the text of some ids."""
        return self.pieces.decode(list(ids))


def from_sentencepiece(data: bytes) -> Tokenizer:
    """The bytes of T5's spiece.model -> its tokenizer.

    The file is a protocol buffer (SentencePiece's sentencepiece_model.proto) that holds pieces of words with their scores, and a
    table that normalises characters.

    Raises:
        ValueError: it is cut off, or no protocol buffer.
    """
    vocabulary, table = [], b""
    for number, value in fields(data):
        if number == 1:
            piece = dict(fields(value))
            vocabulary.append((piece[1].decode(), piece.get(2, 0.0)))
        elif number == 3:  # of the normalizer
            table = dict(fields(value)).get(2, b"")
    return tokenizer_of(vocabulary, table)


def tokenizer_of(vocabulary: Sequence[tuple[str, float]], table: bytes = b"") -> Tokenizer:
    """-> T5's tokenizer of word pieces and scores, <pad>, </s> and <unk> included; `table` normalises characters first."""
    extra = [f"<extra_id_{i}>" for i in reversed(range(EXTRA))]
    unknown = [word for word, _ in vocabulary].index(UNKNOWN)
    tokenizer = Tokenizer(Unigram([*vocabulary, *((word, 0.0) for word in extra)], unknown, byte_fallback=False))
    if table:
        tokenizer.normalizer = normalizers.Precompiled(table)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in (END, UNKNOWN, PAD, *extra)])
    ends = [(END, tokenizer.token_to_id(END))]
    tokenizer.post_processor = processors.TemplateProcessing(single=["$A", END], special_tokens=ends)
    return tokenizer


def fields(data: bytes) -> Iterator[tuple[int, bytes | float | int]]:
    """The fields of a protocol buffer -> (number, value): bytes, integers, and floats for values of 4 or 8 bytes.

    Raises:
        ValueError: it is cut off, or no protocol buffer.
    """
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == VARINT:
            value, at = _varint(data, at)
        elif kind == BYTES:
            size, at = _varint(data, at)
            value, at = data[at : at + size], at + size
        elif kind == FOUR:
            (value,), at = struct.unpack_from("<f", data, at), at + 4
        elif kind == EIGHT:
            (value,), at = struct.unpack_from("<d", data, at), at + 8
        else:
            raise ValueError(f"a field of kind {kind}")
        if at > len(data):
            raise ValueError("it is cut off")
        yield key >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """-> the integer at a place, 7 bits a byte with the lowest first, and the place behind it."""
    number = shift = 0
    while data[at] & 128:
        number |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
    return number | data[at] << shift, at + 1
