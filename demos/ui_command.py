"""`attnctl ui`."""

from importlib.util import find_spec
from typing import Annotated

import typer

from attnctl.app.cli import DEVICE_HELP, DTYPE_HELP, MODEL_HELP, app
from attnctl.app.command import UsageError
from attnctl.app.limits import LARGEST, STEPS


@app.command()
def ui(
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help=f"{MODEL_HELP} Given several times: a list to choose from."),
    ] = None,
    allow_any_model: Annotated[
        bool, typer.Option("--allow-any-model", help="Visitors may name any model, also folders of this machine.")
    ] = False,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
    auth: Annotated[str | None, typer.Option(help="USER:PASSWORD that visitors must give.")] = None,
    max_steps: Annotated[int, typer.Option(min=1, max=STEPS, help="The most steps of a picture.")] = 100,
    max_side: Annotated[int, typer.Option(min=8, max=LARGEST, help="The most pixels of a side.")] = 1024,
    max_seconds: Annotated[int, typer.Option(min=1, help="The most time of a run.")] = 600,
    max_jobs: Annotated[int, typer.Option(min=1, help="The most pictures of a batch.")] = 100,
    max_upload: Annotated[int, typer.Option(min=1, help="The largest upload, in megabytes.")] = 20,
    max_waiting: Annotated[int, typer.Option(min=1, help="The most runs that wait in the queue.")] = 64,
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = "float32",
    mcp: Annotated[bool, typer.Option("--mcp", help="Also serve the endpoints as tools of MCP.")] = False,
    open_: Annotated[bool, typer.Option("--open", help="Also open the page in a browser.")] = False,
) -> None:
    """Open the studio: a page in the browser to try controls, with both pictures side by side. Ctrl-C ends it.

    - attnctl ui
    - attnctl ui --model ./my-model --model glyph-sd --port 8000 --auth me:secret
    """
    user, colon, password = (auth or "").partition(":")
    if auth is not None and not (user and colon and password):
        raise UsageError("--auth: write it as USER:PASSWORD")
    for needed, extra in (("gradio", "ui"), *([("mcp", "mcp")] * mcp)):
        if find_spec(needed) is None:
            raise UsageError(f'this needs {needed}: pip install "attnctl[{extra}]" (in a checkout: ".[{extra}]")')
    from attnctl.app.service import Limits, Service
    from attnctl.demos.studio import serve

    limits = Limits(
        steps=max_steps, side=max_side, seconds=max_seconds, jobs=max_jobs, upload=max_upload, waiting=max_waiting
    )
    service = Service(model or ["glyph-sd"], device, dtype, allow_any_model, limits)
    serve(service, host, port, (user, password) if auth else None, open_, mcp)
