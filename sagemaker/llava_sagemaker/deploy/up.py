"""The order of things in `up`: what is there, what it costs, image and model data, the stack."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from llava_sagemaker.deploy import cost, image, parameters, report, stacks, storage, template
from llava_sagemaker.deploy.errors import DeployError
from llava_sagemaker.deploy.place import Place


def up(
    place: Place,
    given: Mapping[str, str | None],
    confirm: Callable[[], None],
    repository: Path | None = None,
    image_uri: str | None = None,
    build: bool = False,
    settings: list[str] | None = None,
) -> None:
    """Bring the deployment to what is wished, whatever of it exists; returns when it serves.

    Args:
        place: where.
        given: parameters of the template; None: leave it as it is.
        confirm: asks the person; called after the cost was told, before anything is created, unless
            the endpoint exists and its cost stays. Raises to stop.
        repository: an exported model repository; None: the one that runs.
        image_uri: an image in ECR; None: the one that runs, or one that is built.
        build: build one in any case.
        settings: NAME=VALUE, of the server.

    Raises:
        DeployError: with what to do. What was created by then is the stack's: run it again, or
            `down`.
    """
    stack = stacks.read(place)
    now = stack.parameters if stack is not None else {}
    running = now.get("ImageUri", "")
    source: Path | str | None = repository or (now["ModelDataUri"] if running else None)
    if source is None:
        raise DeployError(
            f"there is no endpoint {place.name} yet: give --repository, the folder that "
            "`make export MODEL=...` fills"
        )
    given = {
        **given,
        "Settings": parameters.changed_settings(
            place, now["Settings"] if running else None, settings or []
        ),
    }
    wanted = parameters.resolve(place, given, now)
    wanted = parameters.complete(wanted, given, now, storage.settings_of(place, source))
    build = image_uri is None and (build or not running)
    if repository is not None:
        storage.check_repository(repository)
    if image_uri is not None:
        image.check(place, image_uri)
    if build:
        image.require_docker(place)
    report.say(cost.estimate(wanted, cost.price(place, wanted["InstanceType"])))
    costs = ("InstanceType", "MinInstances", "MaxInstances")
    if not running or any(now[name] != wanted[name] for name in costs):
        confirm()

    stacks.bring_base(place, {"KmsKeyArn": wanted["KmsKeyArn"]})
    if build:
        new_image = image.build_and_push(place)
    else:
        new_image = image.by_digest(place, image_uri) if image_uri else running
    data_uri = storage.put_repository(place, source) if isinstance(source, Path) else source

    wanted |= {"ImageUri": new_image, "ModelDataUri": data_uri}
    wanted["Version"] = template.version(place, wanted)
    if wanted["Version"] != now.get("Version"):
        wanted["Guarded"] = "false" if stacks.alarm_is_raised(place) else "true"
    # Until the old instances are gone they need their image: one may start again.
    pulled = {image.arn(place, uri) for uri in (new_image, running) if uri}
    try:
        stacks.bring(place, wanted | {"PullFrom": ",".join(sorted(pulled))})
    except stacks.RolledBack:
        if running:
            _remove_unused(place, running, now["ModelDataUri"])
        raise
    stacks.bring(place, wanted | {"PullFrom": image.arn(place, new_image)})
    stacks.bring_instances(place, int(wanted["MinInstances"]), int(wanted["MaxInstances"]))
    _remove_unused(place, new_image, data_uri)
    report.say(f"{place.name} is in service: llava-sagemaker chat {place.name} --image FILE")


def _remove_unused(place: Place, image_uri: str, data_uri: str) -> None:
    """Delete the images and model data that the endpoint does not use."""
    storage.remove_other_versions(place, data_uri)
    image.remove_other_images(place, image_uri)
