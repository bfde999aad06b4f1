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

from llava_sagemaker.deploy import cost, parameters, policies, report, stacks, storage
from llava_sagemaker.deploy import image as images
from llava_sagemaker.deploy import up as ups
from llava_sagemaker.deploy.errors import DeployError, explain
from llava_sagemaker.deploy.place import Place
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
        help="Open sessions per instance that autoscaling aims at "
        "[first: 70% of max_sessions, for each GPU]",
        show_default=False,
    ),
]
ScaleIn = Annotated[
    bool | None,
    typer.Option(
        help="Whether autoscaling may remove instances; their sessions go on from the journal, "
        "or end without one",
        show_default=False,
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
KmsKey = Annotated[
    str | None,
    typer.Option(help="ARN of a KMS key for bucket and journal", show_default=False),
]
ServerSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--setting", help="NAME=VALUE, a setting of the server (repeat); journal= : no journal"
    ),
]


class Routing(StrEnum):
    """Where requests outside sessions go; the names are SageMaker's, in small letters."""

    least_outstanding_requests = "least-outstanding-requests"
    prefix_aware = "prefix-aware"


RoutingOption = Annotated[
    Routing | None,
    typer.Option(
        help="Where requests outside sessions go [first: least-outstanding-requests]",
        show_default=False,
    ),
]


class Who(StrEnum):
    """Whom a policy is for."""

    deployer = "deployer"
    caller = "caller"
    openai = "openai"
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
    setting: ServerSettings = None,
    routing: RoutingOption = None,
    kms_key: KmsKey = None,
    yes: Yes = False,
) -> None:
    """Create the endpoint with all it needs, or bring it to what is asked for; safe to run again.

    Options that are not given leave things as they are.
    """
    with _plain_errors():
        place = _place(name, region)
        if context.info_name == "update" and stacks.describe_endpoint(place) is None:
            raise DeployError(f"there is no endpoint {name} in {place.region}: `up` makes one")
        given = {
            "InstanceType": instance_type,
            "MinInstances": _text(min_instances),
            "MaxInstances": _text(max_instances),
            "SessionsPerInstance": _text(sessions_per_instance),
            "ScaleIn": None if scale_in is None else str(scale_in).lower(),
            "VolumeGb": _text(volume_gb),
            "ImageHosts": _list(image_host),
            "ImageBuckets": _list(image_bucket),
            "ImageObjects": _list(
                image_bucket and [f"arn:{place.partition}:s3:::{b}/*" for b in image_bucket]
            ),
            "Routing": routing and routing.value.upper().replace("-", "_"),
            "KmsKeyArn": kms_key,
        }
        ups.up(place, given, _confirm(yes), repository, image, build, setting)


@app.command()
def package(name: Name, repository: Path, region: Region = None) -> None:
    """Upload a model repository, as `up` does first; only what is new travels."""
    with _plain_errors():
        place = _place(name, region)
        storage.check_repository(repository)
        stacks.bring_base(place, {})
        storage.put_repository(place, repository)


@app.command(name="image")
def build_image(name: Name, region: Region = None) -> None:
    """Build the container's image with docker and push it, as `up` does first."""
    with _plain_errors():
        place = _place(name, region)
        images.require_docker(place)
        stacks.bring_base(place, {})
        report.say(f"--image {images.build_and_push(place)}")


@app.command()
def status(name: Name, region: Region = None) -> None:
    """What exists of the deployment, and how it is."""
    with _plain_errors():
        place = _place(name, region)
        stack = stacks.read(place)
        if stack is None:
            report.say(f"nothing exists of {name} in {place.region}")
            return
        _list_resources(place)
        report.say(f"{'stack:':24}{stack.status}")
        running = stacks.describe_endpoint(place)
        if running is None:
            return
        now = stack.parameters
        report.say(f"{'status:':24}{running['EndpointStatus']}")
        report.say(f"{'image:':24}{now['ImageUri']}")
        report.say(f"{'model data:':24}{now['ModelDataUri']}")
        report.say(f"{'settings:':24}{now['Settings']}")
        count = running["ProductionVariants"][0]["CurrentInstanceCount"]
        limits = f"{now['MinInstances']} to {now['MaxInstances']}"
        report.say(f"{'instances:':24}{count} ({limits}), {now['InstanceType']}")
        report.say(f"{'sessions per instance:':24}{_open_sessions(place)}")
        report.say(cost.estimate(now, cost.price(place, now["InstanceType"])))


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
        if stacks.read(place) is None:
            report.say(f"nothing exists of {name} in {place.region}")
            return
        _list_resources(place)
        if not yes:
            typer.confirm("delete all this, with the journal of all sessions?", abort=True)
        stacks.remove(place)
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
        if who is Who.instances:
            document = policies.instances_policy(place)
        else:
            document = policies.policy(place, who.value)
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
        given = {
            "InstanceType": instance_type,
            "MinInstances": _text(min_instances),
            "MaxInstances": _text(max_instances),
        }
        wanted = parameters.resolve(place, given, {})
        report.say(cost.estimate(wanted, cost.price(place, wanted["InstanceType"])))


def _text(number: float | None) -> str | None:
    return None if number is None else f"{number:g}"


def _list(items: list[str] | None) -> str | None:
    return None if items is None else ",".join(items)


def _list_resources(place: Place) -> None:
    for logical, name in stacks.resources(place):
        report.say(f"{logical + ':':24}{name}")


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
