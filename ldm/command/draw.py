"""A page to draw with, in the browser:  ldm draw model=runs/quickstart/diffusion    two models side by side: model=[A,B]"""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ldm.command.line import command

PASSED_ON = ("base", "tile", "device", "precision", "allow")  # settings of sample.yaml that hold for all drawings


def draw(config: DictConfig) -> None:
    """Reads the models, then serves the page until it is closed (Ctrl-C)."""
    from hydra.core.global_hydra import GlobalHydra

    from ldm.page.server import listen, serve

    GlobalHydra.instance().clear()  # each drawing is composed anew
    with listen(config.port) as socket:  # first: a port that is taken is said before models are read
        session = session_of(config)
        for name in session.models:
            print(f"Reading {name} ...", flush=True)
        session.load()
        serve(session, socket)


def session_of(config: DictConfig) -> "Session":  # noqa: F821
    """What lies behind the page, of a composed draw.yaml."""
    from ldm.command import sample
    from ldm.command.usual import as_usual
    from ldm.compose import spoken
    from ldm.data.usual import size_of
    from ldm.page.session import Commands, Session

    commands = Commands(sample.check, sample.ready, sample.draw, as_usual, size_of)
    said = {name: config[name] for name in PASSED_ON if config[name] not in (None, [], "auto")}
    base = [f"{name}={_word(value) if OmegaConf.is_list(value) else spoken(str(value))}" for name, value in said.items()]
    return Session(_listed(config.model), _listed(config.adapters), base, Path(config.out), commands)


def _word(values: list[str]) -> str:
    return f"[{','.join(values)}]"


def _listed(value: object) -> list[str]:
    return [] if value is None else [str(one) for one in value] if OmegaConf.is_list(value) else [str(value)]


main = command("draw")(draw)
