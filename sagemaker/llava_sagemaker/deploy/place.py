"""One deployment's place in an AWS account: its clients, the names of what belongs to it, its tag.

Every name follows from the deployment's name, so that nothing has to be written down; the tag says
that a stack with such a name is really ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache, cached_property
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import UnknownRegionError

from llava_sagemaker.deploy.errors import DeployError

TAG = "llava-triton:endpoint"
VARIANT = "sessions"
POLL_SECONDS = 15.0
"""How often a state that is waited for is asked."""
_NAME = re.compile(r"[a-z0-9](-?[a-z0-9])*")
_LONGEST_NAME = 20  # S3 allows 63 characters; the rest is the prefix, the account and the region


class Place:
    """Where the deployment called `name` is.

    Args:
        session: gives credentials and region.
        name: the endpoint's name.
        account_id: asked from AWS when it is not given.

    Raises:
        DeployError: the name is not one that all of S3, IAM, ECR and SageMaker take.
    """

    def __init__(self, session: boto3.Session, name: str, account_id: str | None = None) -> None:
        if not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME:
            raise DeployError(
                f"the name {name!r} cannot be used: at most {_LONGEST_NAME} lower-case letters, "
                "digits and single hyphens are expected"
            )
        self.name = name
        self._session = session
        self._account_id = account_id
        self.client = cache(self._new_client)

    def _new_client(self, service: str, region: str | None = None, attempts: int = 8) -> Any:
        # "standard" tries again when AWS says that calls come too fast.
        config = Config(retries={"mode": "standard", "max_attempts": attempts})
        return self._session.client(service, region_name=region or self.region, config=config)

    @cached_property
    def region(self) -> str:
        """The AWS region.

        Raises:
            DeployError: none is set, or there is none of that name.
        """
        region: str | None = self._session.region_name
        if region is None:
            raise DeployError("no AWS region is set: give --region, for example us-east-1")
        try:
            self._session.get_partition_for_region(region)
        except UnknownRegionError as error:
            raise DeployError(f"there is no AWS region called {region!r}") from error
        return region

    @cached_property
    def partition(self) -> str:
        """`aws`, or `aws-cn`, `aws-us-gov`."""
        return str(self._session.get_partition_for_region(self.region))

    @cached_property
    def account_id(self) -> str:
        """The account's 12 digits."""
        return self._account_id or str(self.client("sts").get_caller_identity()["Account"])

    # ---- names ----

    @property
    def bucket(self) -> str:
        """The S3 bucket with the model repository's versions and the journal."""
        return f"llava-triton-{self.name}-{self.account_id}-{self.region}"

    @property
    def stack(self) -> str:
        """The CloudFormation stack."""
        return f"llava-triton-{self.name}"

    @property
    def image_repository(self) -> str:
        """The ECR repository."""
        return f"llava-triton/{self.name}"

    @property
    def registry(self) -> str:
        """The account's ECR registry in the region."""
        suffix = ".cn" if self.partition == "aws-cn" else ""
        return f"{self.account_id}.dkr.ecr.{self.region}.amazonaws.com{suffix}"

    @property
    def log_group(self) -> str:
        """Where SageMaker puts the containers' output."""
        return f"/aws/sagemaker/Endpoints/{self.name}"

    @property
    def alarm(self) -> str:
        """The CloudWatch alarm that stops a bad update."""
        return f"llava-triton-{self.name}-errors"

    # ---- tags ----

    @property
    def tags(self) -> list[dict[str, str]]:
        """The tag; CloudFormation gives the stack's to all that is in it."""
        return [{"Key": TAG, "Value": self.name}]

    def must_own(self, kind: str, thing: str, tags: Iterable[Mapping[str, str]]) -> None:
        """Raises DeployError when a thing has a name of ours but not the tag."""
        if not any(tag["Key"] == TAG and tag["Value"] == self.name for tag in tags):
            raise DeployError(
                f"the {kind} {thing} exists already, without the tag {TAG}={self.name}: it is "
                "somebody else's. Choose another deployment name, or remove it yourself"
            )
