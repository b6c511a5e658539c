"""Our own folders: a recipe, the trained weights, and a sub-folder for each frozen part."""

from pathlib import Path

from ldm.errors import Refusal
from ldm.files.folder import from_parts, read_recipe, read_weights, save_model, with_parts
from ldm.interop.bundle import AUTOENCODERS, Bundle
from ldm.interop.find import networks, parts
from ldm.interop.protocols import Layout
from ldm.interop.weights import Config, check_numbers, read_config


class Ours(Layout):
    """A folder whose config.json names a `_target_`."""

    def words(self) -> dict[str, str]:
        """--to ldm."""
        return {"ldm": ""}

    def recognise(self, path: Path) -> bool:
        """By its config."""
        return (path / "config.json").is_file() and "_target_" in read_config(path / "config.json")

    def read(self, path: Path, prediction: str | None) -> tuple[Bundle, str]:
        """See `read_folder`."""
        return read_folder(path), "ldm"

    def write(self, bundle: Bundle, target: Path) -> None:
        """See `write_folder`."""
        write_folder(bundle, target)


def read_folder(folder: Path) -> Bundle:
    """A model at rest, as training exports it, or an autoencoder alone.

    Raises:
        Refusal: it is not one. NotFound: a part of it is not there.
    """
    recipe, path = Config(read_recipe(folder), folder / "config.json"), folder / "model.safetensors"
    if recipe.get("_target_") in AUTOENCODERS:
        bundle = Bundle(None)
        for part in (part for part in parts() if part.alone):
            part.take_ours(bundle, folder)
        return bundle
    if recipe.get("_target_") != "ldm.build.assemble":
        raise Refusal(f"{folder} holds {recipe.get('_target_')}, neither a latent model nor an autoencoder.")
    recipe["autoencoder"]  # which is named where it is missing
    bundle = Bundle(recipe, read_weights(path), home=folder)
    for part in parts():
        part.take_ours(bundle, folder)
    check_numbers(bundle.weights, path)
    for network in networks():
        if network.builds(bundle):
            network.check(bundle, str(path))
    return bundle


def write_folder(bundle: Bundle, folder: Path) -> None:
    """The same folder again; its last file says that it is whole."""
    recipe = bundle.recipe
    if bundle.home is not None:
        recipe = with_parts(from_parts(recipe, bundle.home), folder)
    for part in parts():
        part.give_ours(bundle, folder)
    if recipe is not None:
        save_model(bundle.weights, recipe, folder)


LAYOUT = Ours()
