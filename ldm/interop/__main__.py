"""Converts a model:  python -m ldm convert SOURCE TARGET --to ldm|diffusers|compvis|dit"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ldm.adapt import asked
from ldm.errors import Refusal
from ldm.interop.adapters import base_of, is_adapter, merge, read_all, with_towers, write_adapters
from ldm.interop.convert import LAYOUTS, add_autoencoder, add_words, check, describe, read, write
from ldm.interop.find import adapter_kinds
from ldm.interop.hub import HUB, here, push

KINDS = {"noise": "Noise", "velocity": "Velocity", "data": "Data", "flow": "Flow"}


def main(argv: Sequence[str] | None = None) -> None:
    """Reads SOURCE, says what it is, writes TARGET, and where --push says so puts it onto the hub."""
    parser = argparse.ArgumentParser(prog="python -m ldm convert", description=__doc__)
    parser.add_argument("source", help=f"a folder, a .safetensors, .ckpt or .pt file, or {HUB}org/name")
    parser.add_argument("target", type=Path, help="a folder; for compvis and dit FILE.safetensors")
    more = [layout for kind in adapter_kinds() for layout in kind.layouts]
    parser.add_argument("--to", required=True, choices=[*dict.fromkeys([*LAYOUTS, *more])])
    parser.add_argument("--prediction", choices=KINDS, help="what the network says, where the weights cannot tell")
    parser.add_argument("--autoencoder", help="whose latents the network draws, where SOURCE holds none: as SOURCE")
    parser.add_argument("--vocabulary", help="folder of a T5's tokenizer, or BERT's uncased vocab.txt, where SOURCE holds none")
    parser.add_argument("--licence", default="unknown", help="for the model card, such as apache-2.0")
    parser.add_argument("--push", metavar="ORG/NAME", help="then upload TARGET to the Hugging Face hub")
    parser.add_argument("--base", help="the model that an adapter is for, a folder of ours; of a run here the one it names")
    parser.add_argument("--adapters", nargs="+", metavar="SOURCE[:STRENGTH]", help="LoRAs that are merged into the model")
    told = parser.parse_args(argv)
    try:
        if told.push and told.push.count("/") != 1:
            raise Refusal(f"--push {told.push}: name a repository as ORG/NAME.")
        source = str(here(told.source))
        if is_adapter(source):
            _convert_adapter(told)
            return
        if told.base is not None:
            raise Refusal(f"--base {told.base}: {told.source} is a whole model and stands on no base.")
        bundle, layout = read(source, KINDS.get(told.prediction))
        if told.autoencoder:
            add_autoencoder(bundle, told.autoencoder, KINDS.get(told.prediction))
        if told.vocabulary:
            add_words(bundle, Path(told.vocabulary))
        check(bundle, told.source, KINDS.get(told.prediction))
        if told.adapters:
            merge(bundle, asked(told.adapters))
        print(f"{told.source} is in the layout of {layout}:\n{describe(bundle)}")
        write(bundle, told.target, told.to, told.licence, told.source)
        print(f"The model is in {told.target}")
        if told.push:
            print(f"It is on the hub: {push(told.target, told.push)}")
    except Refusal as error:
        sys.exit(f"error: {error}")


def _convert_adapter(told: argparse.Namespace) -> None:
    """An adapter from one layout into another, by the names of its base's weights.

    Raises:
        Refusal: a word that is for whole models.
    """
    if unread := [word for word in ("prediction", "autoencoder", "vocabulary", "push", "adapters") if vars(told)[word]]:
        raise Refusal(f"--{unread[0]}: {told.source} is an adapter, and this is of whole models. Leave it out.")
    base = told.base or base_of(told.source)
    if base is None:
        raise Refusal(f"{told.source} is an adapter, which does not say of which model; name that: --base FOLDER.")
    bundle = with_towers(read(base)[0])
    adapters = read_all(told.source, bundle)
    write_adapters(told.source, adapters, bundle, base, told.target, told.to)
    print("\n".join([*(line for read in adapters.values() for line in read.said), f"The adapter is in {told.target}"]))


if __name__ == "__main__":
    main()
