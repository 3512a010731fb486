"""A worker draws groups, one after the other; it keeps the model of the last one loaded."""

import gc
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnctl.app.asked import control_of, open_model, recipe_of
from attnctl.app.batch.planning import Group, Task
from attnctl.app.command import plain, was_interrupted
from attnctl.errors import AttnctlError, short

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL import Image
    from rich.progress import Progress

    from attnctl.app.batch.jobs import Job
    from attnctl.app.drawing import Drawing
    from attnctl.app.recipe import Recipe


@dataclass(frozen=True)
class Drawn:
    """A task with its picture and how to write each of its files, the picture last; or with an `error` in one line."""

    task: Task
    picture: "Image.Image | None" = None
    files: dict[Path, Callable[[Path], object]] = field(default_factory=dict)
    error: str | None = None


class Worker:
    """Draws on one device.

    Args:
        device: as for `attnctl.load`; default: cuda if there is one, else cpu.
        dtype: "float32", "float16" or "bfloat16".
        threads: of the processor; default: 1 for an embedded model, else torch's own number.
        bar: shows the steps.
    """

    def __init__(self, device: str | None, dtype: str, threads: int | None, bar: "Progress"):
        import torch

        self.device, self.dtype, self.threads, self.bar = device, dtype, threads, bar
        self._own = torch.get_num_threads()
        self._model: str | None = None
        self._pipe: DiffusionPipeline | None = None
        self._weights, self._fits = "", 0
        self._inversions: OrderedDict[str, Any] = OrderedDict()

    def close(self) -> None:
        """Give back the model and torch's own number of threads."""
        import torch

        self._model = self._pipe = None
        torch.set_num_threads(self._own)

    def draw(self, group: Group) -> Iterator[Drawn]:
        """What becomes of the missing tasks of a group. A fault of one of them is none of the others'."""
        try:
            self._load(group.model)
        except Exception as error:
            said = said_of(error)
            yield from (Drawn(task, error=said) for task in group.to_draw)
            return
        before = set(self.bar.task_ids)
        for drawn in self._drawn(group.tasks, group.missing):
            yield drawn
            for one in set(self.bar.task_ids) - before:
                self.bar.remove_task(one)

    def _load(self, model: str) -> None:
        from attnctl.app.recipe import weights_hash
        from attnctl.loading import embedded

        if model == self._model:
            return
        self._model = self._pipe = None
        gc.collect()  # two models need not fit
        threads = self.threads or (1 if model in embedded() else self._own)  # as `attnctl generate` does
        self._pipe = open_model(model, self.device, self.dtype, self.bar, threads)
        self._weights, self._fits, self._model = weights_hash(self._pipe), 0, model
        self._inversions.clear()

    def _drawn(self, tasks: Sequence[Task], missing: frozenset[str]) -> Iterator[Drawn]:
        wanted = [task for task in tasks if task.key in missing]
        if not wanted:
            return
        size = len(tasks)
        if size > 1 and self._fits and size > self._fits:
            yield from self._halves(tasks, missing)
            return
        try:
            found = self._pictures(tasks)
        except Exception as error:
            said, full = said_of(error), _out_of_memory(error)
            if full and size > 1:
                self._fits = size // 2
        else:
            yield from (found[task.key] for task in wanted)
            return
        if full and size > 1:
            _empty_caches()
            yield from self._halves(tasks, missing)
        elif size > 1:  # whose fault it is, shows when each is drawn alone
            for task in wanted:
                yield from self._drawn([task], missing)
        else:
            yield Drawn(wanted[0], error=said)

    def _halves(self, tasks: Sequence[Task], missing: frozenset[str]) -> Iterator[Drawn]:
        half = (len(tasks) + 1) // 2
        yield from self._drawn(tasks[:half], missing)
        yield from self._drawn(tasks[half:], missing)

    def _pictures(self, tasks: Sequence[Task]) -> dict[str, Drawn]:
        """By key."""
        from attnctl.app import drawing

        pipe, first = self._pipe, tasks[0].job
        assert pipe is not None
        if first.compose is not None:
            return {tasks[0].key: self._composed(tasks[0])}
        if first.shape is not None:
            drawing.check_size(pipe, *first.shape)
        maps = drawing.shown_words(pipe, first.prompt)[0] if first.maps is True else first.maps or ()
        recipes = [replace(self._recipe(task.job, maps), together=len(tasks)) for task in tasks]
        label = plain(short(first.prompt, 40)) + (f" and {len(tasks) - 1} more" if len(tasks) > 1 else "")
        controls = [control_of(text) for text in first.controls]
        drawn = drawing.draw_together(pipe, recipes, controls, label, self.bar, first.trace)
        together = zip(tasks, recipes, drawn, strict=True)
        return {task.key: Drawn(task, one.picture, _files(task, recipe, one)) for task, recipe, one in together}

    def _recipe(self, job: "Job", maps: tuple[str, ...] = ()) -> "Recipe":
        assert self._pipe is not None
        return recipe_of(
            self._pipe,
            model=job.model,
            weights=self._weights,
            prompt=job.prompt,
            negative=job.negative,
            seed=job.seed,
            steps=job.steps,
            size=job.shape,
            guidance=job.guidance,
            controls=job.controls,
            maps=maps,
        )

    def _composed(self, task: Task) -> Drawn:
        """Beside it, a sheet of what it was made of."""
        from attnctl.app.batch.folder import png, write_whole
        from attnctl.app.composing import checked, composed, recipe_for, sheet
        from attnctl.app.recipe import save

        job, asked = task.job, task.job.compose
        assert asked is not None
        request = checked(asked, job.prompt, job.seed, job.steps, job.guidance)
        recipe, controls = recipe_for(self._recipe(job), request), [control_of(text) for text in job.controls]
        turns = composed(self._pipe, request, job.shape, job.negative, controls, self.bar, kept=self._inversions)
        picture = turns[-1].picture
        files: dict[Path, Callable[[Path], object]] = {
            beside(task, "sheet.png"): partial(write_whole, content=png(sheet(turns))),
            task.path: partial(save, picture, recipe=recipe),
        }
        return Drawn(task, picture, files)


def _files(task: Task, recipe: "Recipe", drawn: "Drawing") -> dict[Path, Callable[[Path], object]]:
    """How each file of a task is written, that of the picture last: once it is there, all are."""
    from attnctl.app import drawing
    from attnctl.app.batch.folder import png, write_whole
    from attnctl.app.recipe import save

    kind = "controlled" if recipe.controls else "plain"
    files: dict[Path, Callable[[Path], object]] = {}
    if drawn.trace is not None:
        told = {"prompt": recipe.prompt, "seed": recipe.seed} | drawn.trace.report
        files[beside(task, "trace.json")] = partial(write_whole, content=json.dumps(told, indent=1).encode())
        for name, picture in drawn.trace.pictures.items():
            files[beside(task, f"{name}.png")] = partial(write_whole, content=png(picture))
    if recipe.maps:
        sheet = drawing.pictures({kind: drawn}, recipe)["maps"]
        files[beside(task, "maps.png")] = partial(save, sheet, recipe=replace(recipe, shows="maps"))
    files[task.path] = partial(save, drawn.picture, recipe=replace(recipe, shows=kind))
    return files


def beside(task: Task, name: str) -> Path:
    """A file that stands beside the picture of a task."""
    return task.path.with_name(f"{task.path.stem}-{name}")


def said_of(error: Exception) -> str:
    """An error in one line; Ctrl-C, whatever a library made of it, stays what it is."""
    if was_interrupted(error):
        raise KeyboardInterrupt from error
    text = " ".join(str(error).split())
    return text if isinstance(error, AttnctlError) else f"{type(error).__name__}: {short(text, 300)}"


def _out_of_memory(error: Exception) -> bool:
    from attnctl.app.drawing import OutOfMemoryError

    return isinstance(error, OutOfMemoryError)


def _empty_caches() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
