"""What controls do to pictures: the 276 prompts of the Attend-and-Excite benchmark on the embedded model, judged.

    python benchmarks/effect.py --controls none segregation --seeds 2
    python benchmarks/effect.py --subset
    python benchmarks/effect.py perturb
    python benchmarks/effect.py regions
    python benchmarks/effect.py compose

The last three are perturbation guidance, see perturb_effect.py, regions, see placing.py, and composition, see
compose_effect.py (`perturb --help`).
All conditions draw from the same noise. Results are kept as they come: a killed run goes on where it was.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from cases import Case, Half, agree, half, opened, read_done, setting_of, subset, unfinished, write
from clock import placed
from conditions import CONDITIONS
from effect_report import contact_sheet, markdown, show, summary
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import attnctl
from attnctl.app import command
from attnctl.engine.control import Control
from attnctl.glyph import judge
from attnctl.glyph.words import Prompt, benchmark, triples
from attnctl.loading import USUAL


def draw(pipe: Any, controls: list[Control], texts: list[str], seeds: list[int], steps: int, guidance: float) -> Any:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    arguments = {"num_inference_steps": steps, "guidance_scale": guidance, "generator": generators}
    with attnctl.attach(pipe, *controls):
        return pipe(texts, **arguments).images


def draw_batch(pipe: Any, prompts: Sequence[Prompt], group: Sequence[Case], steps: int, guidance: float) -> Any:
    asked = [prompts[case.prompt] for case in group]
    seeds = [1000 * case.seed + case.prompt for case in group]
    return draw(pipe, CONDITIONS[group[0].condition](asked), [prompt.text for prompt in asked], seeds, steps, guidance)


def judged(prompt: Prompt, reading: judge.Reading) -> dict[str, Any]:
    """What the judge says of one picture.

    present: each thing is there. colours: of each thing that is to have a colour, whether it is there and has it.
    areas: of each thing, the part of the picture that it covers, 0 if it is not there.
    """
    present, colours = reading.satisfies(prompt)
    named = [bool(right) for right, (_, colour) in zip(colours, prompt.things, strict=True) if colour]
    areas = [round(reading.area_of(concept), 4) for concept, _ in prompt.things]
    return {"present": list(present), "colours": named, "areas": areas, "seen": reading.to_dict()}


def save(image: Image.Image, path: Path) -> None:
    beside = path.with_suffix(".partial")
    image.save(beside, format="PNG")
    os.replace(beside, path)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def main(
    controls: Annotated[
        list[str],
        typer.Option(metavar="NAME...", help=f"Conditions, the first the baseline: {', '.join(CONDITIONS)}."),
    ] = ["none", "segregation"],  # noqa: B006
    seeds: Annotated[int, typer.Option(min=1, help="Pictures of each prompt and condition.")] = 2,
    out: Annotated[Path, typer.Option(help="Folder for pictures, results and the sheet.")] = Path("out/effect"),
    things: Annotated[
        int, typer.Option(min=2, max=3, help="2: the benchmark. 3: 48 prompts of ours, of three things.")
    ] = 2,
    model: Annotated[str, typer.Option(help="Embedded name or pipeline folder.")] = "glyph-sd",
    steps: Annotated[int, typer.Option(min=1)] = 20,
    guidance: Annotated[float | None, typer.Option(help="Default: the model's.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures drawn together.")] = 12,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...: where pictures are drawn.")] = "cpu",
    prompts_of: Annotated[
        Half, typer.Option("--half", help="A fixed half of the prompts: tune on the one only.")
    ] = Half.all,
    every: Annotated[int, typer.Option(min=1, help="Of these prompts, only every Nth.")] = 1,
    subset_only: Annotated[
        bool, typer.Option("--subset", help="24 fixed prompts, one seed: about two minutes.")
    ] = False,
) -> None:
    if unknown := [name for name in controls if name not in CONDITIONS]:
        raise typer.BadParameter(f"no condition {unknown[0]!r}; there are {', '.join(CONDITIONS)}")
    command.check_writable(out)
    prompts = benchmark() if things == 2 else triples()
    console, pipe, eye = Console(), placed(attnctl.load(model), device, torch.float32), judge.load()
    pipe.set_progress_bar_config(disable=True)
    if guidance is None:
        guidance = float(USUAL.get(model, {}).get("guidance", 7.5))
    picked, seeds = (subset(prompts), 1) if subset_only else (list(range(len(prompts))), seeds)
    chosen = set(half(prompts, prompts_of))
    picked = [k for k in picked if k in chosen][::every]
    controls = list(dict.fromkeys(controls))
    cases = [Case(k, seed, name) for name in controls for seed in range(seeds) for k in picked]

    setting = setting_of(pipe, model, prompts, controls, steps=steps, guidance=guidance, batch=batch)
    setting |= {} if device == "cpu" else {"device": device}
    folder, log = out / "pictures", out / "results.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    with opened(log) as results:
        agree(out / "setting.json", log, setting)
        done = read_done(log, folder)
        missing = sum(case.name not in done for case in cases)
        if missing < len(cases):
            console.print(f"going on: {len(cases) - missing} of {len(cases)} pictures are there")

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
            line = bar.add_task("drawing", total=len(cases), completed=len(cases) - missing)
            for group in unfinished(cases, done, batch):
                bar.update(line, description=group[0].condition)
                start = time.perf_counter()
                images = draw_batch(pipe, prompts, group, steps, guidance)
                each = {"seconds": (time.perf_counter() - start) / len(group)}
                for case, image, reading in zip(group, images, eye.read(images), strict=True):
                    if case.name not in done:
                        save(image, folder / f"{case.name}.png")
                        done[case.name] = {"case": case.name} | each | judged(prompts[case.prompt], reading)
                        results.write(json.dumps(done[case.name]) + "\n")
                        bar.advance(line)
                results.flush()

        table = summary(prompts, cases, done)
        found = {"setting": setting, "seeds": seeds, "half": prompts_of, "every": every, "rates": table}
        write(out / "effect.json", json.dumps(found, indent=1))
        write(out / "table.md", markdown(table))
        contact_sheet(prompts, cases, done, folder).quantize(256).save(out / "sheet.png")
    show(table, console)
    console.print(f"{out / 'effect.json'}\n{out / 'table.md'}\n{out / 'sheet.png'}")


def repeated(words: Sequence[str]) -> list[str]:
    """`--controls one two` as click takes it: `--controls one --controls two`."""
    spread, within = list[str](), False
    for before, word in zip(["", *words], words, strict=False):
        if word.startswith("-"):
            within = word.split("=")[0] == "--controls"
        elif within and before != "--controls":
            spread.append("--controls")
        spread.append(word)
    return spread


def run() -> NoReturn:
    if sys.argv[1:2] == ["perturb"]:
        import perturb_effect

        command.run(perturb_effect.app, "effect perturb", sys.argv[2:])
    if sys.argv[1:2] == ["heads"]:
        import heads_effect

        command.run(heads_effect.app, "effect heads", sys.argv[2:])
    if sys.argv[1:2] == ["personalize"]:
        import personalize_effect

        command.run(personalize_effect.app, "effect personalize", sys.argv[2:])
    if sys.argv[1:2] == ["regions"]:
        import placing

        command.run(placing.app, "effect regions", sys.argv[2:])
    if sys.argv[1:2] == ["compose"]:
        import compose_effect

        command.run(compose_effect.app, "effect compose", sys.argv[2:])
    command.run(app, "effect", repeated(sys.argv[1:]))


if __name__ == "__main__":
    run()
