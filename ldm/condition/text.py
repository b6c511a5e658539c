"""Captions, read by the frozen text towers of one or several CLIPs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ldm.embedder import Condition, Weighted, texts
from ldm.errors import NotFound, Refusal
from ldm.files.folder import LOCAL, load_tensors
from ldm.tower.clip import FIRST_LEARNED, PublishedTokenizer, embed_text, load_text_tower, names_of, text_mask, warn_of_cut
from ldm.tower.cut import Cut
from ldm.tower.taught import Rows, Taught
from ldm.types import Cond, Widths


class Text(Condition):
    """A caption -> tokens (B, L, D) of the text tower's layers, and its pooled vector.

    Args:
        model, pretrained: open_clip's: a name with a tag or a local file; or `local-dir:FOLDER` and None.
        layers: hidden states, 0 before the transformer, k after its k-th block, -1 the last; several are joined by width, and
            with none there are no tokens.
        final_norm: whether the tower's last LayerNorm is put on all hidden states but 0.
        pooled: whether the text feature is told as well, as a vector.
        padding: the id behind a caption's end: 0 as open_clip and Stable Diffusion 2 have it, 49407 (the end token) as Stable
            Diffusion 1 has it; the backbone attends to the padding as well. None: padding is masked.
        whiten: whether the channels of each layer, and of the pooled vector, become uncorrelated with zero mean and unit
            variance over the training captions; the statistics are `statistics.safetensors` beside the tower (the `contrast`
            stage writes them).
        dropped: what a withheld caption says: that of the `empty_prompt` (Stable Diffusion 1 and 2), or `zeros` (XL).
        key: the field of the captions.
        rate: the share of samples for which the caption is dropped in training, in [0, 1].
        tokenizer: what cuts captions into tokens: `open_clip`, or `clip`, as published models were trained
            (`PublishedTokenizer`), which needs a `padding`.
        learned: words whose rows follow the tower's 49,408 (textual inversion); the tokenizer `clip` knows them.
        projected: whether the pooled feature is projected as for pictures, where the tower can, or as it is before that (Flux).

    Raises:
        Refusal: the tower has no such layer, or fewer rows than words.
    """

    frozen = ("tower",)
    weighs = True

    def __init__(
        self,
        model: str,
        pretrained: str | None = None,
        layers: Sequence[int] = (-1,),
        final_norm: bool = True,
        pooled: bool = False,
        padding: int | None = None,
        whiten: bool = False,
        dropped: Literal["empty_prompt", "zeros"] = "empty_prompt",
        key: str = "caption",
        rate: float = 0.1,
        tokenizer: Literal["open_clip", "clip"] = "open_clip",
        learned: Sequence[str] = (),
        projected: bool = True,
    ) -> None:
        super().__init__()
        self.key, self.rate, self.layers, self.final_norm, self.pooled = key, rate, tuple(layers), final_norm, pooled
        self.padding, self.dropped, self.whiten, self.projected = padding, dropped, whiten, projected
        self.tower = load_text_tower(model, pretrained, "condition.text")
        self.published, self.learned = tokenizer == "clip", tuple(learned)
        self.tokenizer = self._tokenizer(model)
        self.cut = Cut(self.tower.context_length - 2, lambda captions: [len(self.tokenizer.encode(c)) for c in captions])
        width, count = self.tower.token_embedding.embedding_dim, len(self.tower.transformer.resblocks) + 1
        if not (layers or (pooled and not whiten)) or not all(-count <= i < count for i in layers):
            raise Refusal(
                f"condition.text.layers={list(layers)}: wanted this tower's hidden states, 0 to {count - 1} or -1 to -{count}; "
                "or none, with pooled=true and whiten=false."
            )
        projection = self.tower.text_projection if projected else None
        vector = width if projection is None else projection.shape[1]
        self.widths = Widths(tokens=width * len(self.layers), vector=vector if pooled else 0)
        if whiten:
            names = [f"layer.{i % count}" for i in self.layers] + (["pooled"] if pooled else [])
            table = statistics(model)
            means, mixes = zip(*(whitening(table[f"{n}.mean"], table[f"{n}.covariance"]) for n in names))
            tokens = len(self.layers)
            self.register_buffer("token_mean", torch.cat(means[:tokens]))
            self.register_buffer("token_mix", torch.block_diag(*mixes[:tokens]))
            if pooled:
                self.register_buffer("vector_mean", means[-1])
                self.register_buffer("vector_mix", mixes[-1])

    @property
    def unreached(self) -> tuple[str, ...]:
        """The blocks behind the last one that is read."""
        count = len(self.tower.transformer.resblocks)
        last = count if self.pooled else max(i % (count + 1) for i in self.layers)
        return tuple(f"tower.transformer.resblocks.{i}" for i in range(last, count))

    def forward(self, value: Sequence[str], drop: Tensor) -> Cond:
        """value: B captions, drop: (B) bool, True where the caption is withheld -> tokens, their mask, vector."""
        captions = ["" if d else v for v, d in zip(value, drop.tolist())]
        ids = self.ids(captions)
        mask = None if self.padding is not None else text_mask(ids, self.end)
        hidden, vector = embed_text(self.tower, ids, self.end, self.projected)
        states = [
            self.tower.ln_final(h) if self.final_norm and h is not hidden[0] else h for h in (hidden[i] for i in self.layers)
        ]
        tokens = torch.cat(states, dim=2) if states else vector[:, None, :0]
        if self.whiten:
            tokens = (tokens - self.token_mean) @ self.token_mix
            vector = (vector - self.vector_mean) @ self.vector_mix if self.pooled else None
        tokens = self._weighed(tokens, captions)
        if self.dropped == "zeros":
            heard = (~drop).to(tokens, non_blocking=True)[:, None]
            tokens, vector = tokens * heard[..., None], vector * heard if self.pooled else None
        vector = vector if self.pooled else None
        return Cond(tokens=tokens, mask=mask, vector=vector) if states else Cond(vector=vector)

    def ids(self, captions: Sequence[str]) -> Tensor:
        """B captions -> (B, L) token ids, cut or padded to the tower's context."""
        ids = self.tokenizer(texts(captions))
        for row, caption in zip(ids, captions):
            if isinstance(caption, Weighted):
                row.copy_(self._parts(caption, row)[0])
        if (self.training or self.cut.always) and hasattr(self.tokenizer, "encode"):
            self.cut.count(captions, (ids[:, -1] != 0).tolist())
        ids = ids.to(self.tower.token_embedding.weight.device, non_blocking=True)
        return ids if self.published or not self.padding else ids.masked_fill(~text_mask(ids, self.end), self.padding)

    @property
    def end(self) -> int | None:
        """The id that ends a caption; None where it is the largest there is, as long as no word is learned."""
        return self.tokenizer.end if self.published or self.learned else None

    def begin(self, words: str, count: int) -> Tensor:
        """Plain words -> (count, D), the rows of their tokens in turn, with which a new word begins.

        Raises:
            Refusal: they have none, or more.
        """
        ids = self._plain().encode(words)
        if not 1 <= len(ids) <= count:
            tokens = "|".join(self.tokenizer.decode([i]).strip() for i in ids)
            raise Refusal(
                f"adapter.textual_inversion.begin={words!r} has {len(ids)} tokens ({tokens}) for {count} vectors: wanted one to "
                "as many; take a plainer word, or more vectors."
            )
        table = self.tower.token_embedding.weight.detach()
        return torch.stack([table[ids[i % len(ids)]] for i in range(count)])

    def learn(self, word: str, rows: Tensor) -> None:
        """Teaches one more word. rows: (n, D), which are read wherever a caption spells it.

        Raises:
            Refusal: it is a word already, or none; or its rows are of another width.
        """
        width = self.tower.token_embedding.embedding_dim
        if rows.ndim != 2 or rows.shape[1] != width:
            raise Refusal(f"the rows of {word} are {rows.shape[-1]} wide, and this text tower's {width}: it is of another model.")
        plain, known = self._plain().encode(word), [other.lower() for other in (*self.learned, *self.taught)]
        if len(plain) < 2 or word.lower() in known:
            raise Refusal(f"word={word!r} is {'a word already' if plain else 'empty'}; write <{word.strip('<> ') or 'fox'}>.")
        first = FIRST_LEARNED + len(self.learned)
        self.tower.token_embedding = Rows(self.tower.token_embedding, rows.clone(), first)
        self.learned, self.taught = (*self.learned, *names_of(word, len(rows))), (*self.taught, word)
        if self.published:
            self.tokenizer = PublishedTokenizer(self.tower.context_length, self.padding, self.learned)
            return
        known = self.tokenizer.words if isinstance(self.tokenizer, Taught) else {}
        self.tokenizer = Taught(self._plain(), {**known, word: range(first, first + len(rows))})

    def _plain(self) -> Any:
        """The tokenizer, without what was learned.

        Raises:
            Refusal: it is not CLIP's.
        """
        from open_clip.tokenizer import SimpleTokenizer

        plain = self.tokenizer.tokenizer if isinstance(self.tokenizer, Taught) else self.tokenizer
        if not self.published and not isinstance(plain, SimpleTokenizer):
            raise Refusal(f"this text tower's {type(plain).__name__} cannot be taught words; CLIP's own vocabulary can.")
        return plain

    def _parts(self, caption: Weighted, plain: Tensor) -> tuple[Tensor, Tensor]:
        """plain: (L) ids of the caption as one text -> (L) those of its parts, each cut by itself, and their weights."""
        if not hasattr(self.tokenizer, "encode"):
            raise Refusal("prompt_weights=true: this tower's tokenizer does not say which tokens are whose; write plain prompts.")
        pairs = [(number, weight) for text, weight in caption.parts for number in self.tokenizer.encode(text)][: len(plain) - 2]
        ids = torch.full_like(plain, self.tokenizer.padding if self.published else 0)
        weights = torch.ones(len(plain))
        ids[0], ids[len(pairs) + 1] = plain[0], plain.max() if self.end is None else self.end
        for i, (number, weight) in enumerate(pairs, 1):
            ids[i], weights[i] = number, weight
        return ids, weights

    def _weighed(self, tokens: Tensor, captions: Sequence[str]) -> Tensor:
        """tokens: (B, L, D) -> each times its weight, and each caption's mean as it was, as AUTOMATIC1111 has it; whitened
        tokens, whose mean is next to nothing, stay as they come.
        """
        if not any(isinstance(caption, Weighted) for caption in captions):
            return tokens
        plain = self.tokenizer(list(captions))
        ones = torch.ones(plain.shape[1])
        rows = [self._parts(c, row)[1] if isinstance(c, Weighted) else ones for c, row in zip(captions, plain)]
        weights = torch.stack(rows).to(tokens)[..., None]
        weighed = tokens * weights
        heavy = (weights != 1).any(1, keepdim=True)
        mended = weighed * tokens.mean((1, 2), keepdim=True) / weighed.mean((1, 2), keepdim=True)
        return torch.where(heavy, weighed if self.whiten else mended, tokens)

    def read(self, field: str, values: Sequence[Any], size: tuple[int, int]) -> list[str]:
        """-> the prompts; warns of what the tower's context is too short for."""
        return [warn_of_cut(str(a), self.tokenizer, self.tower.context_length) for a in values]

    def tokens(self, caption: str) -> list[str]:
        """The pieces that a caption is cut into; a learned word's further rows are its own."""
        ids = self.tokenizer.encode(caption) if hasattr(self.tokenizer, "encode") else []
        return [self.tokenizer.decode([i]).strip() for i in ids]

    def skip(self, layers: int | None) -> None:
        """Reads another layer, with the last LayerNorm as before: 1 the last, 2 the one before; None its own again.

        Raises:
            Refusal: it reads several, or whitened ones, or has not as many.
        """
        original = self.__dict__.setdefault("own_layers", self.layers)
        if layers is None:
            self.layers = original
            return
        count = len(self.tower.transformer.resblocks)
        if len(original) != 1 or self.whiten or not 1 <= layers <= count:
            several = f"{len(original)} layers" if len(original) != 1 else f"a tower of {count} layers"
            kind = "whitened layers" if self.whiten else several
            raise Refusal(f"clip_skip={layers}: this model reads {kind}; clip_skip=null reads what it was trained with.")
        self.layers = (-layers,)

    def settings(self) -> dict[str, Any]:
        """What, besides its weights, decides what it says."""
        names = ("layers", "final_norm", "pooled", "padding", "whiten", "dropped")
        cut = {"tokenizer": "clip", "learned": list(self.learned)} if self.published else {}
        cut |= {"learned": list(self.learned)} if self.learned else {}
        cut |= {} if self.projected else {"projected": False}
        return {name: getattr(self, name) for name in names} | {"layers": list(self.layers)} | cut

    def _tokenizer(self, model: str) -> Any:
        length, rows = self.tower.context_length, self.tower.token_embedding.num_embeddings
        if not self.published:
            if self.learned:
                raise Refusal(f"condition.text.learned={list(self.learned)} wants condition.text.tokenizer=clip.")
            import open_clip

            return open_clip.get_tokenizer(model, context_length=length)
        if self.padding is None:
            raise Refusal("condition.text.tokenizer=clip wants condition.text.padding, 0 or 49407, as published models pad.")
        if rows < FIRST_LEARNED + len(self.learned):
            raise Refusal(
                f"condition.text.learned has {len(self.learned)} words, and the tower's table {rows} rows; "
                f"{FIRST_LEARNED} + {len(self.learned)} were wanted."
            )
        return PublishedTokenizer(length, self.padding, self.learned)


class Texts(Condition):
    """A caption read by several `towers`, whose tokens and vectors are joined by width (https://arxiv.org/abs/2307.01952, 2.1).

    Each is a `Text` of its own; `key` and `rate` here are for all of them. The mask is the first tower's. With `width`, tokens
    are filled up with zeros to it: to stand beside a T5's (https://arxiv.org/abs/2403.03206, figure 2).

    Raises:
        Refusal: the towers read captions of different lengths, or together are wider than that.
    """

    weighs = True

    def __init__(self, towers: Mapping[str, Text], key: str = "caption", rate: float = 0.1, width: int | None = None) -> None:
        super().__init__()
        self.key, self.rate, self.towers = key, rate, nn.ModuleDict(towers)
        self.cut = next(iter(towers.values())).cut
        self.frozen = tuple(f"towers.{name}.{part}" for name, tower in towers.items() for part in tower.frozen)
        lengths = {name: tower.tower.context_length for name, tower in towers.items()}
        if len(set(lengths.values())) > 1:
            raise Refusal(f"The towers read captions of different lengths, {lengths}; tokens join by width where they agree.")
        each = [tower.widths for tower in towers.values()]
        together = sum(w.tokens for w in each)
        if width is not None and width < together:
            raise Refusal(f"condition.text.width={width}: the towers' tokens are {together} wide together; as much, or more.")
        self.widths = Widths(tokens=width or together, vector=sum(w.vector for w in each))

    @property
    def unreached(self) -> tuple[str, ...]:
        """Those of the towers."""
        return tuple(f"towers.{name}.{part}" for name, tower in self.towers.items() for part in tower.unreached)

    def forward(self, value: Sequence[str], drop: Tensor) -> Cond:
        """value: B captions, drop: (B) bool -> tokens: (B, L, D), mask: (B, L) or None, vector: (B, sum of E) or None."""
        conds = [tower(value, drop) for tower in self.towers.values()]
        vectors = [cond.vector for cond in conds if cond.vector is not None]
        vector = torch.cat(vectors, dim=1) if vectors else None
        tokens = torch.cat([cond.tokens for cond in conds], dim=2)
        return Cond(tokens=pad(tokens, (0, self.widths.tokens - tokens.shape[2])), mask=conds[0].mask, vector=vector)

    @property
    def taught(self) -> tuple[str, ...]:
        """What each of its towers was taught."""
        return tuple(dict.fromkeys(word for tower in self.towers.values() for word in tower.taught))

    def settings(self) -> dict[str, Any]:
        """What, besides their weights, decides what they say."""
        wide = {"width": self.widths.tokens} if self.widths.tokens > sum(t.widths.tokens for t in self.towers.values()) else {}
        return {name: tower.settings() for name, tower in self.towers.items()} | wide

    def read(self, field: str, values: Sequence[Any], size: tuple[int, int]) -> list[str]:
        """-> the prompts; warns of what the first tower's context is too short for."""
        return next(iter(self.towers.values())).read(field, values, size)


def statistics(model: str) -> dict[str, Tensor]:
    """The mean and covariance of each layer over the training captions, from beside a local tower.

    Raises:
        NotFound: they are not there.
    """
    path = Path(model.removeprefix(LOCAL)) / "statistics.safetensors"
    if not model.startswith(LOCAL) or not path.is_file():
        raise NotFound(
            f"condition.text.whiten=true needs {path}, the statistics of the training captions, which the `contrast` stage "
            "writes. Use such a folder as condition.text.model, or condition.text.whiten=false."
        )
    return load_tensors(path)


def whitening(mean: Tensor, covariance: Tensor, ridge: float = 1e-2) -> tuple[Tensor, Tensor]:
    """mean: (D), covariance: (D, D) -> mean and W with (x - mean) @ W white (ZCA).

    A `ridge` of the mean eigenvalue keeps directions that the captions hardly use from being blown up.
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    scale = (values.clamp(min=0) + ridge * values.mean()).rsqrt()
    return mean, (vectors * scale @ vectors.T).float()
