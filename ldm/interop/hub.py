"""The Hugging Face hub: what is read comes from there, and what is written goes there, where the command says so."""

from pathlib import Path

from ldm.errors import Refusal, Unreachable
from ldm.files.pieces import KINDS

HUB = "hf://"


def here(source: str) -> Path:
    """A path, or hf://org/name[/FILE], which is fetched -> where it is.

    Raises:
        Refusal, Unreachable: as `download`.
    """
    return download(source) if source.startswith(HUB) else Path(source)


def download(source: str) -> Path:
    """hf://org/name -> the folder of its snapshot: one copy of the weights, and settings, and never code.
    hf://org/name/FILE -> that file.

    Raises:
        Refusal: the name is no org/name. Unreachable: the hub is not reached, or does not give it, and it is not in its cache.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HTTPError  # what a connection that fails raises, where it is no OSError

    name, file = repository(source)
    try:
        if file:
            return Path(hf_hub_download(name, file))
        return Path(snapshot_download(name, allow_patterns=_wanted(HfApi().list_repo_files(name))))
    except (OSError, HTTPError) as error:  # offline: what was downloaded before
        try:
            return Path(
                hf_hub_download(name, file, local_files_only=True) if file else snapshot_download(name, local_files_only=True)
            )
        except OSError:
            why = " ".join(str(error).split()).rstrip(".")
            raise Unreachable(
                f"{source} was not fetched before, and is not had now: {why}. {_mend(name, file, error)}"
            ) from error


def repository(source: str) -> tuple[str, str]:
    """hf://org/name or hf://org/name/FILE -> "org/name", and FILE or "".

    Raises:
        Refusal: it is neither.
    """
    org, _, rest = source.removeprefix(HUB).partition("/")
    name, _, file = rest.partition("/")
    if not org or not name:
        raise Refusal(
            f"{source}: name a repository of the Hugging Face hub as {HUB}org/name, or a file of it as {HUB}org/name/FILE."
        )
    return f"{org}/{name}", file


def _mend(name: str, file: str, error: Exception) -> str:
    """What a person can do about it."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    page = f"https://huggingface.co/{name}"
    if isinstance(error, GatedRepoError):
        return f"It is gated: consent to its licence at {page}, and set HF_TOKEN=TOKEN, your token at the hub."
    if isinstance(error, RepositoryNotFoundError):
        return f"Look whether there is a {page}; one that is private wants HF_TOKEN=TOKEN."
    what = f"`hf download {name}{f' {file}' if file else ''} --local-dir DIR`"
    return f"Where there is a network, fetch it by {what}, copy DIR here, and name it: model=DIR{f'/{file}' if file else ''}."


def _wanted(files: list[str]) -> list[str]:
    """Of a repository's files those that `read` reads: of a pipeline its parts, and each part once, in full precision."""
    whole = [f for f in files if "model_index.json" not in files or "/" in f or f == "model_index.json"]
    weights = [f for f in whole if f.endswith((".safetensors", ".bin"))]
    settings = [f for f in whole if f.endswith((".json", ".txt", ".yaml", "spiece.model"))]

    def rank(f: str) -> tuple[int, bool]:
        kinds = (*KINDS, "non_ema")
        return (next((i for i, kind in enumerate(kinds) if kind and kind in f), 0), f.endswith(".bin"))

    best = {folder: min(rank(f) for f in weights if Path(f).parent == folder) for folder in {Path(f).parent for f in weights}}
    return settings + [f for f in weights if rank(f) == best[Path(f).parent]]


def push(target: Path, name: str) -> str:
    """Uploads a folder, or a file with the yaml beside it, to the repository org/name of the hub -> its address.

    Raises:
        OSError: the hub refuses, or is not reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    api = HfApi()
    try:
        address = api.create_repo(name, exist_ok=True)
        if target.is_dir():
            api.upload_folder(repo_id=name, folder_path=target)
        else:
            for path in (p for p in (target, target.with_suffix(".yaml")) if p.is_file()):
                api.upload_file(path_or_fileobj=path, path_in_repo=path.name, repo_id=name)
    except (OSError, HTTPError) as error:
        raise Unreachable(f"--push {name}: {' '.join(str(error).split())}. The model is in {target}.") from error
    return str(address)
