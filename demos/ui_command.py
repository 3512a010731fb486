"""`attnctl ui`."""

from typing import Annotated

import typer

from attnctl.app.cli import DEVICE_HELP, DTYPE_HELP, MODEL_HELP, app
from attnctl.app.command import UsageError


@app.command()
def ui(
    model: Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)] = "glyph-sd",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
    auth: Annotated[str | None, typer.Option(help="USER:PASSWORD that visitors must give.")] = None,
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = "float32",
    open_: Annotated[bool, typer.Option("--open", help="Also open the page in a browser.")] = False,
) -> None:
    """Open the studio: a page in the browser to try controls, with both pictures side by side. Ctrl-C ends it.

    - attnctl ui
    - attnctl ui --model ./my-model --port 8000 --auth me:secret
    """
    user, colon, password = (auth or "").partition(":")
    if auth is not None and not (user and colon and password):
        raise UsageError("--auth: write it as USER:PASSWORD")
    try:
        import gradio  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise UsageError(
            'the studio needs gradio: pip install "attnctl[ui]" (in a checkout: pip install ".[ui]")'
        ) from None
    from attnctl.demos.studio import serve

    serve(model, host, port, (user, password) if auth else None, device, dtype, open_)
