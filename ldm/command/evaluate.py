"""Measures a model:  python evaluate.py model=runs/quickstart/diffusion metric=[text_match,reconstruction] count=128 out=DIR

On several processes: torchrun --nproc-per-node 8 evaluate.py ..., or srun -n 8 python evaluate.py ...; with many settings:
sweep='guidance.scale=1,2,4 sampler=ddim,dpmpp'.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.command.line import command
from ldm.compose import compose_config
from ldm.errors import Refusal


def run(config: DictConfig) -> None:
    """One evaluation, a sweep of them, or a comparison of those that were made."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    if config.compare:
        from ldm.evaluation.compare import compare
        from ldm.files.table import show

        others = [o for o in HydraConfig.get().overrides.task if o.split("=")[0] not in ("compare", "debug", "allow")]
        if others:
            raise Refusal(f"compare=... puts numbers beside each other that were made already; leave out {', '.join(others)}.")
        header, rows = compare(config.compare)
        show(header, rows, headed=True)
    elif config.sweep:
        GlobalHydra.instance().clear()  # every setting is composed anew
        sweep([o for o in HydraConfig.get().overrides.task if o.split("=")[0] != "sweep"], config.sweep)
    else:
        evaluate(config)


def evaluate(config: DictConfig) -> tuple[dict[str, float], dict[str, Any], dict[str, Any]]:
    """Writes OUT/metrics.json, the protocol beside each number; -> numbers, pictures judged, and the metrics that judged."""
    entries, pictures, metrics, _ = judge(config)
    return {name: entry["value"] for name, entry in entries.items()}, pictures, metrics


def judge(config: DictConfig) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], Any]:
    """-> what OUT/metrics.json holds, pictures by kind, the metrics, and what was measured."""
    from ldm.build import allowed, build
    from ldm.check import check_counts
    from ldm.command.subject import Subject
    from ldm.evaluation.pictures import Kept
    from ldm.evaluation.protocol import entries, show, write_numbers
    from ldm.evaluation.run import measure
    from ldm.files.process import by_first, meet

    meet()
    plain = OmegaConf.to_container(config, resolve=True)
    check_counts(count=plain["count"], batch=plain["batch"])
    out = place(plain)
    subject = Subject(plain, out)
    metrics = build(plain["metric"], allowed(plain))
    subject.make(metrics)
    measured, corrupt = measure(metrics, subject.pictures, subject.real, out / "rows", Path(plain["cache"]), plain["batch"])
    numbers = entries(measured, metrics, subject.used, subject.settings, subject.what, corrupt)
    pictures = {kind: source.pictures() for kind, source in subject.used.items() if isinstance(source, Kept)}
    by_first(lambda: (write_numbers(numbers, out), show(metrics, subject.used, out)))
    return numbers, pictures, metrics, subject


def sweep(overrides: Sequence[str], words: str) -> Path:
    """Evaluates every setting of `words` into OUT/<setting>, and writes OUT/report.html about all of them; -> that page.

    What was drawn before is not drawn again.
    """
    from ldm.build import build_members
    from ldm.files.folder import write_text
    from ldm.files.process import meet, rank
    from ldm.files.table import show
    from ldm.report.sweep import Setting, grid, name_of, settings, sweep_page, sweep_table
    from ldm.training.logging import close, log_picture

    meet()
    chosen, rows, captions = settings(words), [], []
    base = compose_config("evaluate", [*overrides, *chosen[0]])
    out = place(base) if base.out else Path(base.runs) / "sweep"
    base = compose_config("evaluate", [*overrides, *chosen[0], f"out={out}"])
    loggers = list(build_members(base, "logger").values()) if rank() == 0 else []
    for step, setting in enumerate(chosen):
        if rank() == 0:
            print(f"== {step + 1} of {len(chosen)}: {', '.join(setting)}", flush=True)
        numbers, pictures, _, subject = judge(compose_config("evaluate", [*overrides, *setting, f"out={out / name_of(setting)}"]))
        rows.append(Setting(setting, numbers, pictures.get("drawing")))
        captions = captions or subject.captions(8)
        for logger in loggers:
            logger.log_metrics({f"sweep/{name}": entry["value"] for name, entry in numbers.items()}, step=step)
        if "drawing" in pictures:
            log_picture(loggers, f"sweep/{name_of(setting)}", grid(pictures["drawing"]), step)
    close(loggers)
    if rank() == 0:
        write_text(sweep_page(rows, captions, base.model), out / "report.html")
        show(*sweep_table(rows), headed=True)
        print(f"Look at it: {out}/report.html")
    return out / "report.html"


def place(config: Mapping[str, Any]) -> Path:
    """Where the results go, OUT or a folder beside what is measured."""
    if config["out"] is not None:
        return Path(config["out"])
    from ldm.interop.cache import is_foreign

    if config["images"] is not None:
        return Path(f"{config['images'].rstrip('/')}-evaluation")
    model = Path(config["model"] or "runs")
    if not model.exists():  # a name of what is elsewhere
        return Path(config["runs"]) / f"{model.name}-evaluation"
    ours = model.is_dir() and not is_foreign(model)
    return model / "evaluation" if ours else model.with_name(f"{model.stem if model.is_file() else model.name}-evaluation")


main = command("evaluate")(run)
