"""diffusers' own fast tests of its pipelines, run plain and with controls attached: do they pass as often?

    python benchmarks/upstream_suites.py PATH/TO/diffusers

PATH is a checkout of diffusers: only its tests are used, the library is the installed one. They need the packages
parameterized, requests_mock and scipy. Plain: as they are. Identity: every pipeline call runs with a control at every
site that does nothing. Maps: with the maps of all words. A test differs if its outcome does, or what it says when it
fails: pictures that are the same bit for bit miss an expected number by the same amount. What attnctl refuses by name
(sliced attention, three rows a picture) is counted apart. Where a test asks a UNet for eager attention, fused
attention is set, plain too.

The tests fetch small tokenizers from a hub. Without --hub they are made here, so tests that expect certain numbers
fail, plain too.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

SUITES = {
    "sd1": ["stable_diffusion/test_stable_diffusion", "stable_diffusion/test_stable_diffusion_img2img"]
    + ["stable_diffusion/test_stable_diffusion_inpaint"],
    "sdxl": ["stable_diffusion_xl/test_stable_diffusion_xl", "stable_diffusion_xl/test_stable_diffusion_xl_img2img"]
    + ["stable_diffusion_xl/test_stable_diffusion_xl_inpaint"],
    "sd3": ["stable_diffusion_3/test_pipeline_stable_diffusion_3"]
    + [f"stable_diffusion_3/test_pipeline_stable_diffusion_3_{kind}" for kind in ("img2img", "inpaint")],
    "flux": ["flux/test_pipeline_flux", "flux/test_pipeline_flux_img2img", "flux/test_pipeline_flux_inpaint"]
    + ["flux/test_pipeline_flux_kontext"],
}
WAYS = ("plain", "identity", "maps")
Outcome = tuple[str, str]  # passed, failed or skipped, and what a failure says first


def outcomes(checkout: Path, files: list[str], way: str, hub: bool, limit: int) -> dict[str, Outcome]:
    """Test -> outcome, of one run of some test files."""
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.jsonl"
        environment = os.environ | {
            "ATTNCTL_WAY": way,
            "ATTNCTL_LOG": str(log),
            "ATTNCTL_STAND_INS": "0" if hub else "1",
            "PYTHONPATH": os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]),
        }
        if not hub:
            environment["HF_HUB_OFFLINE"] = "1"
        paths = [path for name in files if (path := f"tests/pipelines/{name}.py") and (checkout / path).exists()]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "upstream_plugin"]
        done = subprocess.run(
            [*command, *paths], cwd=checkout, env=environment, capture_output=True, text=True, timeout=limit
        )
        if not log.exists():
            raise SystemExit(f"pytest ran no test of {', '.join(paths) or checkout}:\n{done.stdout[-2000:]}")
        rows = [json.loads(line) for line in log.read_text().splitlines()]
    found: dict[str, Outcome] = {}
    for row in rows:
        if found.get(row["test"], ("passed",))[0] != "failed":  # a test may pass and its tear-down fail
            found[row["test"]] = row["outcome"], row["line"]
    return found


def spelled(found: dict[str, Outcome]) -> str:
    """How many passed and failed."""
    count = Counter("refused" if refused(outcome) else outcome[0] for outcome in found.values())
    return f"{count['passed']} passed, {count['failed']} failed" + f", {count['refused']} refused" * bool(
        count["refused"]
    )


def refused(outcome: Outcome) -> bool:
    """Whether a test failed since attnctl does not take its model or processor."""
    return "attnctl.errors.Unsupported" in outcome[1]


def differences(plain: dict[str, Outcome], other: dict[str, Outcome]) -> list[tuple[str, str, str]]:
    """(test, what it says plain, what it says now) where that is not the same."""

    def said(outcome: Outcome) -> str:
        return ": ".join(filter(None, outcome))

    missing = ("not run", "")
    pairs = {test: (plain.get(test, missing), other.get(test, missing)) for test in plain | other}
    return [(test, said(one), said(two)) for test, (one, two) in pairs.items() if one != two]


def main(
    checkout: Annotated[Path, typer.Argument(help="A checkout of diffusers.", exists=True, file_okay=False)],
    suite: Annotated[list[str], typer.Option(help=f"Any of {', '.join(SUITES)}.")] = list(SUITES),  # noqa: B006
    way: Annotated[list[str], typer.Option(help="Of identity, maps; plain is always run.")] = list(WAYS[1:]),  # noqa: B006
    files: Annotated[int, typer.Option(min=1, help="So many test files of each suite: text to image is first.")] = 9,
    hub: Annotated[bool, typer.Option("--hub", help="Fetch what the tests fetch.")] = False,
    limit: Annotated[int, typer.Option(help="Seconds for one run of one suite.")] = 1800,
) -> None:
    for given, known in ((suite, SUITES), (way, WAYS[1:])):
        if unknown := [name for name in given if name not in known]:
            raise typer.BadParameter(f"no {unknown[0]!r}; there are {', '.join(known)}")
    console, table = Console(), Table("suite", "plain", *way)
    told, differ = list[str](), 0
    for name in suite:
        found = dict[str, dict[str, Outcome]]()
        for one in ("plain", *way):
            found[one] = outcomes(checkout, SUITES[name][:files], one, hub, limit)
            console.print(f"{name}, {one}: {spelled(found[one])}")
        table.add_row(name, *map(spelled, found.values()))
        for one in way:
            for test, before, after in differences(found["plain"], found[one]):
                differ += not refused(found[one].get(test, ("", "")))
                told.append(f"{name}, {one}: {test.rpartition('/')[2]}\n  plain: {before}\n  {one}: {after}")
    console.print(table)
    for line in told:
        console.print(line, markup=False)
    console.print("no test differs" if not differ else f"{differ} tests differ")
    raise typer.Exit(bool(differ))


if __name__ == "__main__":
    typer.run(main)
