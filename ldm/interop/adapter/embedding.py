"""Learned words (textual inversion): A1111's `.pt` and `.safetensors`, ComfyUI's, diffusers' learned_embeds, XL's two keys."""

from pathlib import Path

import torch
from torch import Tensor

from ldm.adapter.textual_inversion import NAME
from ldm.errors import NotFound, Refusal
from ldm.files.folder import save_tensors
from ldm.files.weights import PICKLES
from ldm.files.whole import write_whole
from ldm.interop.bundle import Bundle
from ldm.interop.foreign import Foreign
from ldm.interop.part._towers import towers
from ldm.interop.protocols import AdapterKind, Read
from ldm.interop.weights import check_numbers

TARGET = "ldm.adapter.textual_inversion.TextualInversion"
OLD, PLAIN = "string_to_param.*", "emb_params"  # the keys of A1111's .pt, and of its and kohya's .safetensors
TWO = ("clip_l", "clip_g")  # of Stable Diffusion XL, in the order of its towers
FAMILIES = {(768,): "Stable Diffusion 1", (1024,): "Stable Diffusion 2", (768, 1280): "Stable Diffusion XL"}
FILES = ("learned_embeds.safetensors", "learned_embeds_2.safetensors")  # what diffusers calls those of its text encoders
PLACES = (".weight", ".bias", "lora", "_proj", "hada_", "lokr_", "oft_")  # what ends the names of tensors of a network
ROWS = ".tower.token_embedding.rows"
WIDEST = 8192  # a matrix that is wider is no row of a text tower


class EmbeddingFile(AdapterKind):
    """A word's rows, of one text tower or of two."""

    adapter = "textual_inversion"
    word = "an embedding (textual inversion)"
    named = True
    layouts = ("a1111", "diffusers")
    file = ""  # a folder's files have names of their own

    def owns(self, name: str) -> bool:
        """By the end of its name."""
        return NAME.fullmatch(name) is not None

    def recognise(self, source: Foreign) -> bool:
        """By A1111's keys; or of diffusers', a file for each tower, by one name, of a word, and a few rows under it."""
        if source.names & {OLD, PLAIN, *TWO}:
            return True
        held = [x for tensors in source.each.values() for x in tensors.values()]
        alone = len(source.names) == 1 and not any(end in name for name in source.names for end in PLACES)
        return alone and all(x.ndim in (1, 2) and 1 < x.shape[-1] <= WIDEST for x in held)

    def read(self, source: Foreign, bundle: Bundle, name: str | None) -> Read:
        """Every key of it is used, or named."""
        rows, word = _rows(source)
        places = _places(bundle)
        if not places:
            told = ", ".join(bundle.recipe["condition"]) or "nothing"
            raise Refusal(f"{source.path}: no text tower is run here that could be taught a word (the model is told by {told}).")
        if set(rows) < set(TWO) and len(places) > 1:
            (lacking,) = set(TWO) - set(rows)
            raise Refusal(f"{source.path} holds {', '.join(rows)} and no {lacking}; this model has {len(places)} text towers.")
        found, widths = (tuple(sizes) for sizes in ([x.shape[1] for x in rows.values()], [_width(p, bundle) for p in places]))
        if found != widths:
            of = f" ({FAMILIES[found]})" if found in FAMILIES else ""
            here = f"this tower {widths[0]}" if len(widths) == 1 else f"these towers {' and '.join(map(str, widths))}"
            raise Refusal(f"{source.path} is {' and '.join(map(str, found))} wide{of}, {here}.")
        if len(counts := {len(x) for x in rows.values()}) > 1:
            raise Refusal(f"{source.path} has {sorted(counts)} rows of its two towers; as many of each were wanted.")
        tensors = {f"{place}{ROWS}": x for place, x in zip(places, rows.values())}
        (count,) = counts
        word = name or word or source.path.stem
        node = {"_target_": TARGET, "word": word, "begin": None, "vectors": count}
        return Read(node, tensors, (f"{source.path}: {word} is {count} row{'s' if count > 1 else ''}",))

    def write(self, adapter: Read, bundle: Bundle, target: Path, layout: str) -> None:
        """One file for A1111 and ComfyUI, .pt or .safetensors; for diffusers one for each text tower, in a folder or named.

        Raises:
            Refusal: the file's name ends otherwise.
        """
        word, rows = adapter.node["word"], [adapter.tensors[f"{p}{ROWS}"].float().contiguous() for p in _places(bundle)]
        if layout == "diffusers":
            single = target.suffix == ".safetensors"
            if (single and len(rows) > 1) or target.suffix in PICKLES:
                raise Refusal(f"{target}: diffusers has a file for each of the {len(rows)} text towers; name a folder.")
            for file, x in zip([target] if single else [target / name for name in FILES], rows, strict=single):
                save_tensors({word: x}, file)
            return
        if target.suffix not in (".safetensors", ".pt") or (len(rows) > 1 and target.suffix == ".pt"):
            raise Refusal(f"{target}: an embedding in the layout of {layout} is one file; name it FILE.safetensors.")
        if target.suffix == ".safetensors":
            save_tensors(dict(zip(TWO, rows)) if len(rows) > 1 else {PLAIN: rows[0]}, target)
            return
        held = {"string_to_token": {"*": 265}, "string_to_param": {"*": rows[0]}, "name": word, "step": 0}
        held |= {"sd_checkpoint": None, "sd_checkpoint_name": None}
        write_whole(target, lambda path: torch.save(held, path))


def _rows(source: Foreign) -> tuple[dict[str, Tensor], str | None]:
    """Its rows, (n, D) of each text tower, in their order, and the word that it names.

    Raises:
        Refusal: it holds something else beside them, or numbers that are not finite.
    """
    pieces = [(name, x) for tensors in source.each.values() for name, x in tensors.items()]
    for tensors in source.each.values():
        check_numbers(tensors, source.path)
    keys = next((keys for keys in ((OLD,), (PLAIN,), TWO) if source.names & set(keys)), tuple(source.names))
    if lost := sorted(source.names - set(keys)):
        raise Refusal(f"{source.path} holds {lost[0]} beside {keys[0]}, which is no row of a word.")
    if bad := [f"{name} is {tuple(x.shape)}" for name, x in pieces if x.ndim not in (1, 2)]:
        raise Refusal(f"{source.path}: {bad[0]}; rows of a word, (n, D), were wanted.")
    if keys == TWO:
        pieces.sort(key=lambda piece: TWO.index(piece[0]))
    word = source.metadata.get("name") if keys == (OLD,) else None if keys in ((PLAIN,), TWO) else keys[0]
    return {n if keys == TWO else str(i): x.float().reshape(-1, x.shape[-1]) for i, (n, x) in enumerate(pieces)}, word


def _places(bundle: Bundle) -> list[str]:
    """Where a model's text towers lie, in their order."""
    return [f"conditioner.embedders.{place.removeprefix('condition.')}" for place in towers(bundle.recipe["condition"])]


def _width(place: str, bundle: Bundle) -> int:
    """How wide a text tower's rows are.

    Raises:
        NotFound: the model's tensors do not hold its table.
    """
    for end in ("weight", "rows"):
        if (table := bundle.weights.get(f"{place}.tower.token_embedding.{end}")) is not None:
            return table.shape[1]
    raise NotFound(f"{place} has no table of words among the model's tensors.")


KIND = EmbeddingFile()
