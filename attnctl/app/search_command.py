"""attnctl search: find what to control, by drawing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attnctl.app.command import MODEL_HELP, UsageError, check_writable, plain, tell
from attnctl.app.search_objectives import HELP, objective_of

if TYPE_CHECKING:
    from attnctl.pipelines.head_bench import Progress

app = typer.Typer(no_args_is_help=True, help="Search for what to control, by drawing.", rich_markup_mode="markdown")

SHOWN = 12


@app.callback()
def _group() -> None:
    pass


@app.command(no_args_is_help=True)
def heads(
    budget: Annotated[int, typer.Option(help="Forward passes of the denoiser, each for one picture.", min=1)],
    out: Annotated[Path, typer.Option("--out", "-o", help="File for the heads, .json.")],
    model: Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)] = "glyph-sd",
    where: Annotated[str, typer.Option("--heads", help="Where to search: all, 7-10, mid, ...")] = "all",
    prompts: Annotated[Path | None, typer.Option(help="A file, one prompt a line; glyph-sd has its own.")] = None,
    objective: Annotated[
        str | None,
        typer.Option(help=f"What is to be high: {HELP}"),
    ] = None,
    style: Annotated[str | None, typer.Option(help='Draw "STYLE, prompt": heads of a style.')] = None,
    method: Annotated[str, typer.Option(help="race, ours, or greedy, the paper's.")] = "race",
    rounds: Annotated[int, typer.Option(help="Of greedy.", min=1)] = 1,
    each: Annotated[int, typer.Option(help="Of greedy: how many heads a round adds.", min=1)] = 3,
    steps: Annotated[int, typer.Option(help="Of a picture.", min=1)] = 10,
    strength: Annotated[float, typer.Option("-u", help="How far heads are broken, to 1.")] = 1.0,
    scale: Annotated[float, typer.Option(help="Weight of the difference.")] = 3.0,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance; 1 is none.")] = 1.0,
    batch: Annotated[int, typer.Option(help="Pictures drawn together.", min=1)] = 16,
    device: Annotated[
        str | None,
        typer.Option("--device", "--devices", help="cpu, cuda, ...; several, as in cuda:0,cuda:1, draw side by side."),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the processor.")] = None,
) -> None:
    """Find the attention heads whose perturbation helps, and write a preset for the control perturb.

    - attnctl search heads --model glyph-sd --budget 20000 --out heads.json
    - attnctl generate 'a cat' --control 'perturb(preset=heads.json)'

    Scores are kept beside the file as they come: a search that was stopped, in whatever way, goes on from there when it
    is started again.
    """
    if out.suffix != ".json":
        raise UsageError(f"--out {out}: the name of a file of heads ends in .json")
    check_writable(out.parent)
    if model != "glyph-sd" and (objective is None or prompts is None):
        raise UsageError(f"--model {model} needs --objective and --prompts; only glyph-sd has its own")
    texts = _lines(prompts) if prompts is not None else []
    import torch

    from attnctl.app.asked import open_model
    from attnctl.app.bars import bars, paused
    from attnctl.glyph.objective import usual_prompts
    from attnctl.loading import usable_device
    from attnctl.pipelines.head_hunter import HeadHunter
    from attnctl.pipelines.head_objectives import styled

    devices = [one.strip() for one in (device or "").split(",")]
    for name in filter(None, devices):
        usable_device(name)
    place = devices[0] or ("cuda" if torch.cuda.is_available() else "cpu")
    score = objective_of(objective or "judge", place)  # before the model: it may be refused
    texts = texts or usual_prompts()
    with bars() as bar:
        pipe = open_model(model, place, "float32", bar, threads)
        hunter = HeadHunter(
            pipe,
            score,
            styled(style, texts) if style is not None else texts,
            heads=where,
            steps=steps,
            u=strength,
            scale=scale,
            call={"guidance_scale": guidance},
            batch=batch,
            model=model,
            objective_name=objective or "judge",
        )
        task = bar.add_task("searching", total=budget)

        def show(now: Progress) -> None:
            left = "" if math.isnan(now.seconds) else f", {now.seconds / 60:.0f} min left"
            bar.update(task, completed=now.spent, description=f"{now.stage}{left}")

        log = out.with_name(f"{out.stem}.scores.jsonl")
        many = devices if len(devices) > 1 else ()
        found = hunter.hunt(
            budget,
            method=method,  # type: ignore[arg-type]
            rounds=rounds,
            each=each,
            log=log,
            devices=many,
            progress=show,
        )
        found.save(out)
        saved = hunter.saved(found.heads)
        with paused(bar):
            for one in found.ranks[:SHOWN]:
                print(one)
            print(f"heads {plain(found.heads)} (u {found.u:g}, scale {found.scale:g}), {found.spent} forward passes")
            print(plain(out), plain(out.with_suffix(".png")), sep="\n", flush=True)
    if saved is not None:
        tell(str(saved))
    if not found.sure:
        tell("on unseen seeds these heads gain less than two standard errors; a larger budget may tell more")


def _lines(path: Path) -> list[str]:
    lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not lines:
        raise UsageError(f"--prompts {path} holds no prompt")
    return lines
