"""attnctl concepts: what learnt concepts there are, and what is in their files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attnctl.app.command import UsageError, check_writable, plain

app = typer.Typer(no_args_is_help=True, help="What `attnctl personalize` has learnt.", rich_markup_mode="markdown")


@app.command("list", no_args_is_help=True)
def list_(
    folder: Annotated[Path, typer.Argument(help="A folder of concepts, or one with such folders in it.")],
) -> None:
    """List folders of concepts: the words and nouns in each, and the model that learnt them.

    - attnctl concepts list .
    """
    from attnctl.concepts import INDEX, read_learnt

    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder")
    found = [path.parent for path in sorted({*folder.glob(INDEX), *folder.glob(f"*/{INDEX}")})]
    if not found:
        raise UsageError(f"{folder} holds no concepts, and no folder in it does; attnctl personalize makes them")
    for path in found:
        learnt = read_learnt(path)
        print(f"{plain(path)}  {', '.join(one.phrase for one in learnt.concepts)}  (of {plain(learnt.base)})")


@app.command("info", no_args_is_help=True)
def info(folder: Annotated[Path, typer.Argument(help="A folder of concepts.")]) -> None:
    """Tell everything about the concepts of one folder: words, files, sizes, model and settings.

    - attnctl concepts info mine
    """
    from attnctl.concepts import read_learnt

    learnt = read_learnt(folder)
    print(f"model: {plain(learnt.base)}")
    for concept in learnt.concepts:
        widths = " + ".join(str(len(row)) for row in learnt.words[concept.word])
        print(f"{plain(concept.phrase)}  ({widths} numbers)")
    rank = next(iter(learnt.lora.values()))[0].shape[0]
    change = sum(float((up @ down).square().sum()) for down, up in learnt.lora.values()) ** 0.5
    print(f"weights: {len(learnt.lora)} modules, rank {rank}, norm of the change {change:.3g}")
    for name in learnt.files:
        path = folder / name
        print(f"{name}  {path.stat().st_size / 1024:.0f} KiB" if path.is_file() else f"{name}  missing")
    print("settings: " + ", ".join(f"{name}={value}" for name, value in learnt.settings.items()))


@app.command("fuse", no_args_is_help=True)
def fuse_(
    folder: Annotated[Path, typer.Argument(help="A folder of concepts.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="A new folder for the pipeline.", show_default=False)],
) -> None:
    """Write a whole pipeline that knows the concepts: the model that learnt them, with words and weights merged.

    - attnctl concepts fuse mine --out mine/fused

    Stock diffusers opens it with `DiffusionPipeline.from_pretrained`. It is as large as the model.
    """
    from attnctl import loading
    from attnctl.concepts import base_of
    from attnctl.fusing import check_new, fuse

    if base_of(folder) is None:
        raise UsageError(f"{folder} holds no concepts; attnctl personalize makes such a folder")
    check_new(out)
    check_writable(out)
    print(plain(fuse(loading.load(folder), out)))
