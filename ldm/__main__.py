"""The entry point:  ldm COMMAND ...  (or python -m ldm COMMAND ...); alone it lists the commands."""

import os
import sys
from importlib import import_module

from ldm.files.table import once_a_minute

COMMANDS = {
    "train": "trains one stage: experiment=emoji/text",
    "sample": "draws pictures: model=RUN prompt='[red apple,fox]'",
    "draw": "opens a page to draw with, in the browser: model=RUN",
    "evaluate": "measures a model or a folder of pictures: model=RUN metric=[frechet,clip_score]",
    "precompute": "encodes a data set ahead of time: model=RUN data=shards data.train=DIR out=DIR",
    "quickstart": "trains, draws and measures small models on the emoji, in minutes",
    "prior": "draws class pictures for DreamBooth: model=RUN prompt='a photo of a dog' out=DIR",
    "convert": "converts weights between layouts: SOURCE TARGET --to diffusers",
    "pack": "packs pictures and captions into shards: PICTURES OUT --size 512",
    "doctor": "says what is in shards and what is broken: SHARDS",
    "average": "averages a run's weights over any length: RUN OUT --std 0.07",
    "cache": "lists the models that were brought from elsewhere, and clears them: clear NAME",
    "completion": 'completes ldm\'s words in a shell: eval "$(ldm completion bash)"',
    "list": "lists the choices of a config group: experiment, sampler, ...",
}


def main() -> None:
    """Runs the command that the first word names, with the other words as its arguments."""
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        os.environ["LDM_COMMAND"] = name = sys.argv.pop(1)
    elif "LOCAL_RANK" in os.environ and "LDM_COMMAND" in os.environ:  # a process that Lightning started with our arguments
        name = os.environ["LDM_COMMAND"]
    else:
        from ldm.check import nearest

        if sys.argv[1:2] in (["--version"], ["-V"]):
            from importlib.metadata import version

            print(f"ldm {version('ldm')}, torch {version('torch')}, Python {sys.version.split()[0]}")
            sys.exit(0)
        print("usage: ldm COMMAND ...\n")
        print("\n".join(f"  {name:12s}{purpose}" for name, purpose in COMMANDS.items()))
        print("\n`ldm COMMAND --help` says what a command takes; `ldm list experiment` what can be trained.")
        unknown = [word for word in sys.argv[1:2] if word not in ("-h", "--help")]
        sys.exit(f"\nerror: there is no command `{unknown[0]}`.{nearest(unknown[0], list(COMMANDS))}" if unknown else 0)
    once_a_minute()
    from ldm.files.process import end_soon

    end_soon()
    sys.exit(import_module(f"ldm.command.{name}").main())


if __name__ == "__main__":
    main()
