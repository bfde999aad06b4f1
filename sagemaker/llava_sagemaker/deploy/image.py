"""The container's image: built and pushed by docker, kept in ECR, named by its digest."""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from botocore.exceptions import ClientError

from llava_sagemaker.deploy import report
from llava_sagemaker.deploy.errors import DeployError, code_of, is_absent
from llava_sagemaker.deploy.place import Place

CHECKOUT = Path(__file__).parents[3]
TEMPLATE = "sagemaker/llava_sagemaker/deploy/template.yaml"
_REGISTRY = re.compile(
    r"(?P<registry>(?P<account>\d{12})\.dkr\.ecr\.(?P<region>[a-z0-9-]+)\.amazonaws\.com(\.cn)?)"
)
_ECR = re.compile(
    _REGISTRY.pattern + r"/(?P<repository>[a-z0-9][a-z0-9._/-]*)(:[\w.-]+)?(@sha256:[0-9a-f]{64})?"
)


@dataclass(frozen=True)
class ImageName:
    """What an ECR image's URI says."""

    registry: str
    account: str
    region: str
    repository: str


def parse(uri: str) -> ImageName:
    """Raises DeployError unless the URI is one of ECR, the only registry SageMaker pulls from."""
    match = _ECR.fullmatch(uri)
    if match is None:
        raise DeployError(
            f"the image {uri!r} is not in Amazon ECR, from where SageMaker takes images: "
            "ACCOUNT.dkr.ecr.REGION.amazonaws.com/REPOSITORY:TAG is expected. "
            "`llava-sagemaker image NAME` builds and pushes one"
        )
    return ImageName(match["registry"], match["account"], match["region"], match["repository"])


def check(place: Place, uri: str) -> None:
    """Raises DeployError for an image that SageMaker cannot take."""
    region = parse(uri).region
    if region != place.region:
        raise DeployError(
            f"the image {uri} is in {region}, the endpoint in {place.region}: SageMaker wants both "
            "in one region"
        )


def require_docker(place: Place) -> None:
    """Raises DeployError, with what to run elsewhere, when no docker daemon answers here."""
    if shutil.which("docker") is None:
        raise DeployError(f"docker is not installed here. {_elsewhere(place)}")
    if subprocess.run(["docker", "info"], capture_output=True, check=False).returncode != 0:
        raise DeployError(
            "docker is installed, but its daemon does not answer (`docker info` fails). "
            f"{_elsewhere(place)}"
        )


def _elsewhere(place: Place) -> str:
    uri = f"{place.registry}/{place.image_repository}:latest"
    return (
        "On a machine with docker and this checkout, run\n"
        f"    llava-sagemaker image {place.name} --region {place.region}\n"
        "or, when only docker and the AWS command line are there (the first line once):\n"
        f"    aws cloudformation deploy --region {place.region} --stack-name {place.stack} "
        f"--template-file {TEMPLATE} --parameter-overrides Name={place.name} "
        f"--tags {place.tags[0]['Key']}={place.name} --capabilities CAPABILITY_IAM\n"
        f"    aws ecr get-login-password --region {place.region} | docker login --username AWS "
        f"--password-stdin {place.registry}\n"
        "(and the same login for the registry of the base image: see sagemaker/Dockerfile)\n"
        f"    docker build --platform linux/amd64 -f sagemaker/Dockerfile -t {uri} .\n"
        f"    docker push {uri}\n"
        f"then here: llava-sagemaker up {place.name} --image {uri} ..."
    )


def build_and_push(place: Place) -> str:
    """Build the image of this checkout and push it to the deployment's ECR repository.

    Returns:
        Its URI by digest, so that a model's image never changes under it.

    Raises:
        DeployError: no docker, or docker failed (its own output was shown).
    """
    require_docker(place)
    dockerfile = CHECKOUT / "sagemaker" / "Dockerfile"
    if not dockerfile.is_file():
        raise DeployError(f"{dockerfile} is missing: build from a checkout, or give --image")
    uri = f"{place.registry}/{place.image_repository}:latest"
    report.say(f"building {uri}")
    # The base image is AWS's own, in an ECR registry of AWS's.
    for base in _REGISTRY.finditer(dockerfile.read_text()):
        _login(place, base["registry"], base["region"])
    _docker(["build", "--platform", "linux/amd64", "-f", str(dockerfile), "-t", uri, str(CHECKOUT)])
    _login(place, place.registry, place.region)
    report.say(f"pushing {uri}")
    _docker(["push", uri])
    return by_digest(place, uri)


def by_digest(place: Place, uri: str) -> str:
    """`repository:tag` -> `repository@sha256:...`; raises DeployError without such an image."""
    name = parse(uri)
    if "@" in uri:
        return uri
    _, _, tag = uri.removeprefix(f"{name.registry}/").partition(":")
    ecr = place.client("ecr")
    try:
        images = ecr.describe_images(
            registryId=name.account,
            repositoryName=name.repository,
            imageIds=[{"imageTag": tag or "latest"}],
        )["imageDetails"]
    except ClientError as error:
        if code_of(error) == "ImageNotFoundException" or is_absent(error):
            raise DeployError(f"there is no image {uri}: push it first") from error
        raise
    return f"{name.registry}/{name.repository}@{images[0]['imageDigest']}"


def remove_other_images(place: Place, keep_uri: str) -> None:
    """Delete the images of the deployment's repository that nothing runs."""
    ecr = place.client("ecr")
    pages = ecr.get_paginator("list_images").paginate(repositoryName=place.image_repository)
    digests = {image["imageDigest"] for page in pages for image in page["imageIds"]}
    old = [{"imageDigest": digest} for digest in sorted(digests) if not keep_uri.endswith(digest)]
    for start in range(0, len(old), 100):  # ECR takes 100 at a time
        ecr.batch_delete_image(
            repositoryName=place.image_repository, imageIds=old[start : start + 100]
        )


def arn(place: Place, uri: str) -> str:
    """The ARN of the repository that an image lies in."""
    name = parse(uri)
    return f"arn:{place.partition}:ecr:{name.region}:{name.account}:repository/{name.repository}"


def _login(place: Place, registry: str, region: str) -> None:
    ecr = place.client("ecr", region)
    token = ecr.get_authorization_token()["authorizationData"][0]["authorizationToken"]
    user, password = base64.b64decode(token).decode().split(":", 1)
    _docker(["login", "--username", user, "--password-stdin", registry], password)


def _docker(arguments: list[str], stdin: str | None = None) -> None:
    """Run docker with its output shown, since it has its own progress."""
    # SageMaker takes no image index, which buildx makes to add its attestations.
    environment = os.environ | {"BUILDX_NO_DEFAULT_ATTESTATIONS": "1"}
    try:
        subprocess.run(["docker", *arguments], input=stdin, text=True, check=True, env=environment)
    except subprocess.CalledProcessError as error:
        raise DeployError(
            f"`docker {arguments[0]}` failed with exit status {error.returncode}; "
            "its own message is above"
        ) from error
