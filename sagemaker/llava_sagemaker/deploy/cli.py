"""The command line: `llava-sagemaker`, or `python -m llava_sagemaker.deploy`."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import boto3
import typer
from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError

from llava_sagemaker.deploy import (
    cost,
    endpoint,
    lifecycle,
    policies,
    report,
    scaling,
    storage,
)
from llava_sagemaker.deploy import image as images
from llava_sagemaker.deploy.errors import DeployError, explain
from llava_sagemaker.deploy.place import Place
from llava_sagemaker.deploy.settings import Wish, resolve
from llava_sagemaker.scaling_metrics import ENDPOINT, NAMESPACE, OPEN_SESSIONS

app = typer.Typer(
    help="LLaVA with sessions on SageMaker: from an empty account to a chat, and back.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Name = Annotated[str, typer.Argument(help="The endpoint's name.", show_default=False)]
Region = Annotated[
    str | None, typer.Option(help="AWS region; by default the profile's.", show_default=False)
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Repository = Annotated[
    Path | None,
    typer.Option(
        help="Exported model repository, e.g. build/repositories/demo.", show_default=False
    ),
]
Image = Annotated[
    str | None, typer.Option(help="An image in ECR, instead of building one.", show_default=False)
]
Build = Annotated[bool, typer.Option("--build", help="Build the image anew from this checkout.")]
InstanceType = Annotated[
    str | None, typer.Option(help="Instance type [first time: ml.g5.xlarge]", show_default=False)
]
Min = Annotated[
    int | None, typer.Option("--min", help="Instances at least [first: 1]", show_default=False)
]
Max = Annotated[
    int | None,
    typer.Option(
        "--max", help="Instances at most; more than --min: autoscaling", show_default=False
    ),
]
Sessions = Annotated[
    float | None,
    typer.Option(
        help="Open sessions per instance that autoscaling aims at [first: 70% of max_sessions]",
        show_default=False,
    ),
]
ScaleIn = Annotated[
    bool | None,
    typer.Option(
        help="Whether autoscaling may remove instances; their sessions end", show_default=False
    ),
]
Volume = Annotated[
    int | None,
    typer.Option(help="Disk in GB; only for types without a disk of their own", show_default=False),
]
Hosts = Annotated[
    list[str] | None,
    typer.Option("--image-host", help="Host that https pictures may come from (repeat)"),
]
Buckets = Annotated[
    list[str] | None,
    typer.Option("--image-bucket", help="Bucket that s3 pictures may come from (repeat)"),
]


class Who(StrEnum):
    """Whom a policy is for."""

    deployer = "deployer"
    caller = "caller"
    instances = "instances"


@app.command()
@app.command(
    name="update",
    help="As `up`, for an endpoint that exists: it serves on, and goes back if it fails.",
)
def up(
    context: typer.Context,
    name: Name,
    region: Region = None,
    repository: Repository = None,
    image: Image = None,
    build: Build = False,
    instance_type: InstanceType = None,
    min_instances: Min = None,
    max_instances: Max = None,
    sessions_per_instance: Sessions = None,
    scale_in: ScaleIn = None,
    volume_gb: Volume = None,
    image_host: Hosts = None,
    image_bucket: Buckets = None,
    yes: Yes = False,
) -> None:
    """Create the endpoint with all it needs, or bring it to what is asked for; safe to run again.

    Options that are not given leave things as they are.
    """
    with _plain_errors():
        place = _place(name, region)
        if context.info_name == "update" and endpoint.read_running(place) is None:
            raise DeployError(f"there is no endpoint {name} in {place.region}: `up` makes one")
        wish = Wish(
            repository,
            image,
            build,
            instance_type,
            min_instances,
            max_instances,
            sessions_per_instance,
            scale_in,
            volume_gb,
            tuple(image_host) if image_host else None,
            tuple(image_bucket) if image_bucket else None,
        )
        lifecycle.up(place, wish, _confirm(yes))


@app.command()
def package(name: Name, repository: Path, region: Region = None) -> None:
    """Upload a model repository, as `up` does first; only what is new travels."""
    with _plain_errors():
        storage.put_repository(_place(name, region), repository)


@app.command(name="image")
def build_image(name: Name, region: Region = None) -> None:
    """Build the container's image with docker and push it, as `up` does first."""
    with _plain_errors():
        report.say(f"--image {images.build_and_push(_place(name, region))}")


@app.command()
def status(name: Name, region: Region = None) -> None:
    """What exists of the deployment, and how it is."""
    with _plain_errors():
        place = _place(name, region)
        things = lifecycle.inventory(place)
        if not things:
            report.say(f"nothing exists of {name} in {place.region}")
        for thing in things:
            report.say(f"{thing.kind + ':':24}{thing.name}")
        running = endpoint.read_running(place)
        if running is None:
            return
        now = scaling.read_scaling(place, running.deployment)
        report.say(f"{'status:':24}{running.status} {running.failure}".rstrip())
        report.say(f"{'image:':24}{running.image}")
        report.say(f"{'model data:':24}{running.data_uri}")
        limits = f"{now.min_instances} to {now.max_instances}"
        report.say(f"{'instances:':24}{running.instances} ({limits}), {now.instance_type}")
        report.say(f"{'sessions per instance:':24}{_open_sessions(place)}")
        report.say(cost.estimate(now, cost.price(place, now.instance_type)))


@app.command()
def chat(
    name: Name,
    image: Annotated[Path, typer.Option(help="The picture.", exists=True, dir_okay=False)],
    region: Region = None,
) -> None:
    """Ask about a picture, line by line; an empty line ends."""
    from llava_triton.client import Session, SessionError  # the only command that needs them

    url = f"sagemaker://{name}" + (f"?region={region}" if region else "")
    with _plain_errors():
        try:
            # An instance that is taken away takes its sessions along: the client begins again.
            with Session.open(url, image=image, replay=True) as session:
                while question := _question():
                    try:
                        for piece in session.stream(question):
                            typer.echo(piece, nl=False)
                        typer.echo()
                    except SessionError as error:
                        typer.echo(f"error: {error}", err=True)
        except SessionError as error:
            raise DeployError(str(error)) from error


@app.command()
def down(name: Name, region: Region = None, yes: Yes = False) -> None:
    """Delete everything that was created for the endpoint, half-finished runs included."""
    with _plain_errors():
        place = _place(name, region)
        things = lifecycle.inventory(place)
        if not things:
            report.say(f"nothing exists of {name} in {place.region}")
            return
        for thing in things:
            report.say(f"{thing.kind + ':':24}{thing.name}")
        if not yes:
            typer.confirm("delete all this?", abort=True)
        lifecycle.down(things)
        report.say(f"nothing is left of {name}")


@app.command()
def policy(
    name: Name,
    who: Annotated[Who, typer.Option(help="Whom it is for.")] = Who.deployer,
    region: Region = None,
    account: Annotated[
        str | None, typer.Option(help="Account ID, where there are no credentials.")
    ] = None,
) -> None:
    """Print an IAM policy (JSON) with no more than is needed."""
    with _plain_errors():
        place = _place(name, region, account)
        if who is Who.deployer:
            document = policies.deployer_policy(place)
        elif who is Who.caller:
            document = policies.caller_policy(place)
        else:
            own = f"{place.registry}/{place.image_repository}:latest"
            document = policies.execution_policy(place, [own], [])
        typer.echo(json.dumps(document, indent=2))


@app.command(name="cost")
def print_cost(
    name: Name,
    region: Region = None,
    instance_type: InstanceType = None,
    min_instances: Min = None,
    max_instances: Max = None,
) -> None:
    """What the instances would cost; creates nothing."""
    with _plain_errors():
        place = _place(name, region)
        wish = Wish(
            instance_type=instance_type, min_instances=min_instances, max_instances=max_instances
        )
        wanted = resolve(place, wish, None, lambda: 1.0)
        report.say(cost.estimate(wanted, cost.price(place, wanted.instance_type)))


def _place(name: str, region: str | None, account: str | None = None) -> Place:
    return Place(boto3.Session(region_name=region), name, account)


def _confirm(yes: bool) -> Callable[[], None]:
    def ask() -> None:
        if not yes:
            typer.confirm("go on?", abort=True)

    return ask


def _question() -> str:
    """What the person types; nothing at the end of the input."""
    try:
        return str(typer.prompt("you", default="", show_default=False)).strip()
    except typer.Abort:
        return ""


def _open_sessions(place: Place) -> str:
    """What the instances published in the last five minutes."""
    now = datetime.datetime.now(datetime.UTC)
    points: list[Any] = place.client("cloudwatch").get_metric_statistics(
        Namespace=NAMESPACE,
        MetricName=OPEN_SESSIONS,
        Dimensions=[{"Name": ENDPOINT, "Value": place.name}],
        StartTime=now - datetime.timedelta(minutes=5),
        EndTime=now,
        Period=60,
        Statistics=["Average"],
    )["Datapoints"]
    if not points:
        return "nothing published in the last five minutes"
    return f"{max(points, key=lambda point: point['Timestamp'])['Average']:.1f}"


@contextmanager
def _plain_errors() -> Iterator[None]:
    """A user's mistake is a sentence and exit status 1, never a traceback."""
    try:
        yield
    except DeployError as error:
        message = str(error)
    except (BotoCoreError, ClientError) as error:
        message = explain(error)
    except Boto3Error as error:  # an upload's; what S3 said is behind it
        cause = error.__context__
        message = explain(cause) if isinstance(cause, ClientError) else str(error)
    except KeyboardInterrupt:
        message = "stopped. AWS goes on with what was begun: see `llava-sagemaker status`"
    else:
        return
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)
