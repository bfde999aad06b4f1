"""The order of things: what `up` brings, what is left over after an update, what `down` removes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from botocore.exceptions import BotoCoreError, ClientError

from llava_sagemaker.deploy import cost, endpoint, image, report, role, scaling, storage, watching
from llava_sagemaker.deploy.errors import DeployError, explain
from llava_sagemaker.deploy.place import Place
from llava_sagemaker.deploy.settings import Deployment, Wish, resolve


def up(place: Place, wish: Wish, confirm: Callable[[], None]) -> None:
    """Bring the deployment to what is wished, whatever of it exists; returns when it serves.

    Args:
        place: where.
        wish: what; see `settings.resolve`.
        confirm: asks the person; called after the cost was told, before anything is created, unless
            the endpoint exists and its cost stays. Raises to stop.

    Raises:
        DeployError: with what to do. What was created by then is tagged: run it again, or `down`.
    """
    running = endpoint.read_running(place)
    now = None if running is None else scaling.read_scaling(place, running.deployment)
    repository = wish.repository or (None if running is None else running.data_uri)
    if repository is None:
        raise DeployError(
            f"there is no endpoint {place.name} yet: give --repository, the folder that "
            "`make export MODEL=...` fills"
        )
    wanted = resolve(place, wish, now, partial(storage.max_sessions, place, repository))
    build = wish.image is None and (wish.build or running is None)
    if wish.image is not None:
        image.check(place, wish.image)
    if build:
        image.require_docker(place)
    report.say(cost.estimate(wanted, cost.price(place, wanted.instance_type)))
    if now is None or _instances(now) != _instances(wanted):
        confirm()

    watching.bring_log_group(place)
    if build:
        image_uri = image.build_and_push(place)
    elif wish.image is not None:
        image_uri = image.by_digest(place, wish.image)
    else:
        assert running is not None, "without an endpoint an image is given or built"
        image_uri = running.image
    data_uri = (
        storage.put_repository(place, repository) if isinstance(repository, Path) else repository
    )

    # Until the old instances are gone they need their image: one may start again.
    images = {image_uri} | ({running.image} if running is not None else set())
    role_arn = role.bring_role(place, images, wanted.image_buckets)
    guarded = watching.bring_alarm(place)
    model = endpoint.bring_model(place, wanted, image_uri, data_uri, role_arn)
    config = endpoint.bring_config(place, wanted, model)
    try:
        endpoint.bring_endpoint(place, config, guarded)
    except endpoint.RolledBack:
        _remove_unused(place)
        raise
    scaling.bring_scaling(place, wanted)
    _remove_unused(place)
    report.say(f"{place.name} is in service: llava-sagemaker chat {place.name} --image FILE")


def _instances(deployment: Deployment) -> tuple[str, int, int]:
    return deployment.instance_type, deployment.min_instances, deployment.max_instances


def _remove_unused(place: Place) -> None:
    """Delete what the endpoint, in service, does not use: the old version, or the failed one."""
    running = endpoint.read_running(place)
    if running is None or running.status != "InService":
        return
    for name in endpoint.find_configs(place):
        if name != running.config:
            endpoint.remove_config(place, name)
    for name in endpoint.find_models(place):
        if name != running.model:
            endpoint.remove_model(place, name)
    storage.remove_other_versions(place, running.data_uri)
    image.remove_other_images(place, running.image)
    role.bring_role(place, {running.image}, running.deployment.image_buckets)


@dataclass(frozen=True)
class Thing:
    """Something in AWS that is ours, and how it goes away."""

    kind: str
    name: str
    remove: Callable[[], None]


def inventory(place: Place) -> list[Thing]:
    """All that exists of the deployment, in the order in which it has to be removed."""
    things: list[Thing] = []

    def look(kind: str, name: str, found: bool, remove: Callable[[Place], None]) -> None:
        if found:
            things.append(Thing(kind, name, partial(remove, place)))

    look("autoscaling", place.name, scaling.find_scaling(place), scaling.remove_scaling)
    look("endpoint", place.name, endpoint.find_endpoint(place), endpoint.remove_endpoint)
    for name in endpoint.find_configs(place):
        remove = partial(endpoint.remove_config, place, name)
        things.append(Thing("endpoint configuration", name, remove))
    for name in endpoint.find_models(place):
        things.append(Thing("model", name, partial(endpoint.remove_model, place, name)))
    look("CloudWatch alarm", place.alarm, watching.find_alarm(place), watching.remove_alarm)
    look("S3 bucket", place.bucket, storage.find_bucket(place), storage.remove_bucket)
    found = image.find_repository(place)
    look("ECR repository", place.image_repository, found, image.remove_repository)
    look("IAM role", place.role, role.find_role(place), role.remove_role)
    # Last: instances write until they are gone.
    found = watching.find_log_group(place)
    look("log group", place.log_group, found, watching.remove_log_group)
    return things


def down(things: list[Thing]) -> None:
    """Remove all; a thing that cannot be removed does not keep the others.

    Raises:
        DeployError: names what is left.
    """
    left = []
    for thing in things:
        report.say(f"removing the {thing.kind} {thing.name}")
        try:
            thing.remove()
        except DeployError as error:
            left.append(f"the {thing.kind} {thing.name}: {error}")
        except (BotoCoreError, ClientError) as error:
            left.append(f"the {thing.kind} {thing.name}: {explain(error)}")
    if left:
        raise DeployError("not everything could be removed; run it again.\n" + "\n".join(left))
