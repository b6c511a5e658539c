"""Completes ldm's words in a shell:  eval "$(ldm completion bash)"   in ~/.bashrc, or after zsh's bashcompinit

Commands, groups and their choices, and the names of settings are completed; where there is nothing to complete, files are.
"""

import argparse
import sys
from collections.abc import Sequence

SCRIPT = r"""
_ldm() {
  local line="${COMP_LINE:0:COMP_POINT}" word said
  word="${line##* }"
  said="${word%"${word##*=}"}"
  mapfile -t COMPREPLY < <(ldm completion query "$line" 2> /dev/null)
  if [[ "$COMP_WORDBREAKS" == *=* ]]; then COMPREPLY=("${COMPREPLY[@]#"$said"}"); fi
}
complete -o nospace -o default -F _ldm ldm
"""
CONFIGURED = ("train", "sample", "evaluate", "precompute", "prior", "draw")


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the script that a shell reads, or, asked by it, what the last word of a line may become."""
    parser = argparse.ArgumentParser(prog="ldm completion", description=__doc__.splitlines()[0])
    parser.add_argument("shell", choices=["bash", "query"], help="bash: the script, which zsh reads too")
    parser.add_argument("line", nargs="?", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.shell == "bash":
        print(SCRIPT.strip())
        return
    sys.stdout.write("".join(f"{word}\n" for word in completed(options.line)))


def completed(line: str) -> list[str]:
    """A command line up to the cursor -> what its last word may become."""
    words = line.split(" ")
    if len(words) < 3:
        from ldm.__main__ import COMMANDS

        return [f"{name} " for name in COMMANDS if name.startswith(words[-1] if len(words) == 2 else "")]
    command, word = words[1], words[-1]
    if command == "list":
        from ldm.command.list import groups

        return [name for name in groups() if name.startswith(word)]
    fixed = {"cache": ["list", "clear"], "completion": ["bash"]}
    if command not in CONFIGURED:
        return [name for name in fixed.get(command, []) if name.startswith(word)]
    group, _, name = word.partition("=")
    if name or word.endswith("="):
        from ldm.command.list import choices

        if named := [f"{group}={choice}" for choice, _ in choices(group) if choice.startswith(name)]:
            return sorted(named)
    return _settings(command, " ".join(words[2:]))


def _settings(config_name: str, line: str) -> list[str]:
    """What Hydra says of the last of some overrides."""
    from hydra import initialize_config_dir
    from hydra._internal.core_plugins.bash_completion import BashCompletion
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from ldm.compose import CONFIGS

    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        try:
            words = BashCompletion(loader)._query(config_name=config_name, line=line)
        except (HydraException, OmegaConfBaseException, ValueError):
            return []  # what stands before it is no line of a command
    groups = {word for word in words if loader.get_group_options(word) or loader.list_groups(word)}
    return sorted({f"{word}=" if word in groups else word for word in words if not word.startswith("hydra")})
