"""The commands of `llava-triton`. Each is a few lines here; what it does lies beside this file.

Imports that take long, or packages that not everybody has, wait until their command is called.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Literal

import typer

from llava_cli.errors import CommandError, told
from llava_cli.files import DEMO

app = typer.Typer(
    help="Chat about pictures with low latency: LLaVA on NVIDIA Triton.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

URL = "grpc://localhost:8001"
URLS = (
    "grpc://HOST:PORT or http://HOST:PORT (Triton), http://HOST:PORT/v1 (OpenAI's paths), or "
    "sagemaker://ENDPOINT"
)

Model = Annotated[
    str,
    typer.Argument(
        envvar="LLAVA_MODEL",
        help="A LLaVA checkpoint: a directory, a hub name or NAME@REVISION; or a model repository "
        "that was exported already.",
    ),
]
Server = Annotated[str, typer.Argument(metavar="URL", envvar="LLAVA_URL", help=URLS)]
Dtype = Annotated[
    str | None,
    typer.Option(
        envvar="LLAVA_DTYPE",
        help="What the language model computes in: float32, bfloat16, float16 or auto.",
        show_default=False,
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        envvar="LLAVA_WEIGHTS",
        help="How its weights are kept: unrounded, int8 or int4.",
        show_default=False,
    ),
]
MaxSessions = Annotated[
    int | None,
    typer.Option(envvar="LLAVA_MAX_SESSIONS", help="Sessions open at once.", show_default=False),
]
SettingsFile = Annotated[
    Path | None,
    typer.Option(
        "--settings",
        envvar="LLAVA_SETTINGS",
        metavar="FILE",
        help="JSON with any of the settings; the options beside it go before it.",
        show_default=False,
    ),
]


def needs(extra: str, *packages: str) -> None:
    """Make sure that an extra is installed.

    Raises:
        CommandError: one of its packages is missing.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(
            f"this needs {', '.join(missing)}; install with: pip install 'llava-triton[{extra}]'"
        )


@app.command()
def demo() -> None:
    """Show a picture to a real server and ask about it, with a session and without."""
    with told():
        needs("server", "onnx", "onnxruntime", "onnxscript")
        from llava_cli.demo import run
        from llava_cli.serving import exported

        status = run(exported(DEMO, None))
    raise typer.Exit(status)


@app.command()
def serve(
    model: Model = DEMO,
    port: Annotated[
        int,
        typer.Option(
            "--port",
            "--openai-port",
            envvar="LLAVA_PORT",
            help="OpenAI's and SageMaker's paths: what one opens to others.",
        ),
    ] = 8080,
    host: Annotated[
        str, typer.Option(envvar="LLAVA_HOST", help="The address that --port listens on.")
    ] = "127.0.0.1",
    http_port: Annotated[
        int,
        typer.Option(
            envvar="LLAVA_HTTP_PORT",
            help="Triton's HTTP; of a second engine three higher, and so on.",
        ),
    ] = 8000,
    grpc_port: Annotated[int, typer.Option(envvar="LLAVA_GRPC_PORT", help="Triton's gRPC.")] = 8001,
    metrics_port: Annotated[
        int, typer.Option(envvar="LLAVA_METRICS_PORT", help="Triton's metrics.")
    ] = 8002,
    triton_host: Annotated[
        str,
        typer.Option(
            envvar="LLAVA_TRITON_HOST",
            help="The address of Triton's own ports; whoever reaches them can end the server.",
        ),
    ] = "127.0.0.1",
    dtype: Dtype = None,
    weights: Weights = None,
    max_sessions: MaxSessions = None,
    settings: SettingsFile = None,
    engines: Annotated[
        int | None,
        typer.Option(
            envvar="LLAVA_ENGINES",
            help="How many Tritons share the sessions.  [default: one a GPU; one without GPUs]",
            show_default=False,
        ),
    ] = None,
    log: Annotated[
        Path | None,
        typer.Option(
            envvar="LLAVA_LOG",
            help="File for the server's log; NAME-0.log and so on for several engines.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Serve a model until Ctrl-C: Triton's HTTP, gRPC and metrics, and OpenAI's paths.

    A checkpoint is exported first, where that has not been done before.
    """
    with told():
        needs("server", "onnx", "onnxruntime", "onnxscript", "uvicorn", "starlette", "uvloop")
        from llava_sagemaker.adapter_process import KeptAdapter, api_key

        from llava_cli.serving import exported, settings_from
        from llava_triton.server import foreground
        from llava_triton.server.engines import servers_on
        from llava_triton.server.machine import shares

        # What is wrong is told before an export, which takes minutes.
        api_key()
        machine = shares(engines)
        chosen = settings_from(settings, dtype=dtype, weights=weights, max_sessions=max_sessions)
        servers = servers_on(
            exported(model, chosen),
            machine,
            [http_port, grpc_port, metrics_port],
            host=triton_host,
            logs=foreground.logs_beside(log, len(machine)),
        )
        status = foreground.serve(servers, companion=KeptAdapter(host, port, servers))
    raise typer.Exit(status)


@app.command()
def export(
    model: Model,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder to fill.  [default: one in the cache]", show_default=False),
    ] = None,
    target: Annotated[
        Literal["cpu", "gpu"],
        typer.Option(help="cpu, or gpu: a TensorRT plan, for a Triton that has TensorRT."),
    ] = "cpu",
    precision: Annotated[
        Literal["fp32", "fp16"] | None,
        typer.Option(help="Of the vision encoder: fp32 or fp16.", show_default=False),
    ] = None,
    compute_capability: Annotated[
        str | None,
        typer.Option(
            metavar="X.Y", help="GPU to build for.  [default: this machine's]", show_default=False
        ),
    ] = None,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy the checkpoint instead of linking to it.")
    ] = False,
    dtype: Dtype = None,
    weights: Weights = None,
    max_sessions: MaxSessions = None,
    settings: SettingsFile = None,
) -> None:
    """Fill a model repository that Triton can serve from a LLaVA checkpoint."""
    with told():
        needs("export", "onnx", "onnxruntime", "onnxscript")
        from llava_cli.files import checkpoint_of, repository_of
        from llava_cli.serving import settings_from
        from llava_export.cli import make_job
        from llava_export.repository import export as fill
        from llava_triton.contract.settings import Settings

        chosen = settings_from(settings, dtype=dtype, weights=weights, max_sessions=max_sessions)
        job = make_job(
            checkpoint_of(model),
            output or repository_of(model),
            chosen or Settings(),
            target=target,
            precision=precision,
            compute_capability=compute_capability,
            copy=copy,
        )
        done = fill(job)
    typer.echo(f"{job.output} is {'ready' if done else 'up to date'}")


@app.command()
def chat(
    url: Server = URL,
    image: Annotated[
        list[Path] | None, typer.Option("--image", "-i", help="A picture to begin with (repeat).")
    ] = None,
    web: Annotated[bool, typer.Option("--web", help="On a page instead.")] = False,
    web_port: Annotated[
        int, typer.Option(envvar="LLAVA_WEB_PORT", help="Where the page is.")
    ] = 7860,
    web_host: Annotated[
        str, typer.Option(envvar="LLAVA_WEB_HOST", help="The address that the page is at.")
    ] = "127.0.0.1",
) -> None:
    """Chat in the terminal, or on a page with --web."""
    with told():
        if web:
            needs("web", "gradio")
            from llava_cli.web import run
            from llava_triton.server.ports import check_ports

            check_ports(web_host, {"web": web_port})
            run(url, web_host, web_port)
            return
        from llava_cli.terminal import talk

        talk(url, image or [])


@app.command()
def ask(
    text: Annotated[str, typer.Argument(help="The question.", show_default=False)],
    image: Annotated[
        list[Path] | None, typer.Option("--image", "-i", help="A picture (repeat).")
    ] = None,
    url: Annotated[str, typer.Option(envvar="LLAVA_URL", help=URLS)] = URL,
) -> None:
    """Ask one question; the answer goes to standard output as it comes."""
    with told():
        from llava_cli.terminal import ask_once

        ask_once(url, text, image or [])


@app.command()
def bench(
    url: Annotated[
        str,
        typer.Argument(
            metavar="URL",
            envvar="LLAVA_URL",
            help="grpc://HOST:PORT, http://HOST:PORT (whole answers) or sagemaker://ENDPOINT",
        ),
    ] = URL,
    sessions: Annotated[int, typer.Option(min=1, help="How many, all at once.")] = 8,
    turns: Annotated[int, typer.Option(min=1, help="Questions in each session.")] = 4,
    tokens: Annotated[int, typer.Option(min=1, help="Length of every answer.")] = 64,
    image: Annotated[
        Path | None,
        typer.Option("--image", "-i", help="The picture.  [default: an example]"),
    ] = None,
) -> None:
    """Measure a running server: opening, first token, tokens per second."""
    with told():
        from llava_cli.bench import run
        from llava_cli.files import example_pictures

        run(url, image or example_pictures()[0], sessions, turns, tokens)


@app.command()
def check(
    host: Annotated[str, typer.Option(help="Where the ports are to be.")] = "127.0.0.1",
) -> None:
    """Look at this machine, and say what to do so that it can serve."""
    with told():
        from llava_cli.check import look

        well = look(host)
    raise typer.Exit(0 if well else 1)


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def sagemaker(context: typer.Context) -> None:
    """Endpoints on AWS: up, update, down and more (`llava-triton sagemaker --help`)."""
    with told():
        needs("deploy", "boto3")
    from llava_sagemaker.deploy.cli import app as deploy

    deploy(args=context.args, prog_name="llava-triton sagemaker")


def main() -> None:
    """The command."""
    app(prog_name="llava-triton")
