"""Converts a model:  python -m ldm convert SOURCE TARGET --to ldm|diffusers|compvis|dit"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ldm.errors import Refusal
from ldm.interop.convert import LAYOUTS, add_autoencoder, add_words, check, describe, read, write
from ldm.interop.hub import HUB, push

KINDS = {"noise": "Noise", "velocity": "Velocity", "data": "Data", "flow": "Flow"}


def main(argv: Sequence[str] | None = None) -> None:
    """Reads SOURCE, says what it is, writes TARGET, and where --push says so puts it onto the hub."""
    parser = argparse.ArgumentParser(prog="python -m ldm convert", description=__doc__)
    parser.add_argument("source", help=f"a folder, a .safetensors, .ckpt or .pt file, or {HUB}org/name")
    parser.add_argument("target", type=Path, help="a folder; for compvis and dit FILE.safetensors")
    parser.add_argument("--to", required=True, choices=LAYOUTS)
    parser.add_argument("--prediction", choices=KINDS, help="what the network says, where the weights cannot tell")
    parser.add_argument("--autoencoder", help="whose latents the network draws, where SOURCE holds none: as SOURCE")
    parser.add_argument("--vocabulary", help="folder of a T5's tokenizer, or BERT's uncased vocab.txt, where SOURCE holds none")
    parser.add_argument("--licence", default="unknown", help="for the model card, such as apache-2.0")
    parser.add_argument("--push", metavar="ORG/NAME", help="then upload TARGET to the Hugging Face hub")
    told = parser.parse_args(argv)
    try:
        if told.push and told.push.count("/") != 1:
            raise Refusal(f"--push {told.push}: name a repository as ORG/NAME.")
        bundle, layout = read(told.source, KINDS.get(told.prediction))
        if told.autoencoder:
            add_autoencoder(bundle, told.autoencoder, KINDS.get(told.prediction))
        if told.vocabulary:
            add_words(bundle, Path(told.vocabulary))
        check(bundle, told.source, KINDS.get(told.prediction))
        print(f"{told.source} is in the layout of {layout}:\n{describe(bundle)}")
        write(bundle, told.target, told.to, told.licence, told.source)
        print(f"The model is in {told.target}")
        if told.push:
            print(f"It is on the hub: {push(told.target, told.push)}")
    except Refusal as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
