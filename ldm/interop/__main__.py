"""Converts a model:  python -m ldm.interop SOURCE TARGET --to ldm|diffusers|compvis"""

import argparse
import sys
from pathlib import Path

from ldm.interop.convert import HUB, LAYOUTS, describe, read, write

KINDS = {"noise": "Noise", "velocity": "Velocity", "data": "Data"}


def main() -> None:
    """Reads SOURCE, says what it is, writes TARGET, and where --push says so puts it onto the hub."""
    parser = argparse.ArgumentParser(prog="python -m ldm.interop", description=__doc__)
    parser.add_argument("source", help=f"a folder, a .safetensors or .ckpt file, or {HUB}org/name")
    parser.add_argument("target", type=Path, help="a folder; for compvis FILE.safetensors")
    parser.add_argument("--to", required=True, choices=LAYOUTS)
    parser.add_argument("--prediction", choices=KINDS, help="what the network says, where the weights cannot tell")
    parser.add_argument("--licence", default="unknown", help="for the model card, such as apache-2.0")
    parser.add_argument("--push", metavar="ORG/NAME", help="then upload TARGET to the Hugging Face hub")
    told = parser.parse_args()
    try:
        bundle, layout = read(told.source, KINDS.get(told.prediction))
        print(f"{told.source} is in the layout of {layout}:\n{describe(bundle)}")
        write(bundle, told.target, told.to, told.licence, told.source)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"The model is in {told.target}")
    if told.push:
        from huggingface_hub import HfApi

        HfApi().create_repo(told.push, exist_ok=True)
        HfApi().upload_folder(repo_id=told.push, folder_path=told.target)
        print(f"It is on the hub: https://huggingface.co/{told.push}")


if __name__ == "__main__":
    main()
