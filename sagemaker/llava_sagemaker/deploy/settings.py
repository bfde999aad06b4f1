"""What a deployment is to be: what the command line says, then what runs, then the defaults."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from llava_sagemaker.deploy.errors import DeployError
from llava_sagemaker.deploy.place import Place

_DEFAULT_INSTANCE_TYPE = "ml.g5.xlarge"
_TARGET_LOAD = 0.7
"""Share of an instance's sessions at which another is wanted: it takes minutes to start."""


@dataclass(frozen=True)
class Deployment:
    """Everything about the endpoint that AWS keeps, except image and model data."""

    instance_type: str
    min_instances: int
    max_instances: int
    sessions_per_instance: float
    """Open sessions per instance that autoscaling aims at."""
    scale_in: bool
    """Whether autoscaling may take instances away, and with them their sessions."""
    volume_gb: int | None
    """Size of the disk; None: SageMaker's default. Types with a disk of their own take none."""
    image_hosts: tuple[str, ...]
    """Hosts that https pictures may come from."""
    image_buckets: tuple[str, ...]
    """Buckets that s3 pictures may come from."""


@dataclass(frozen=True)
class Wish:
    """What the command line gave; None means: leave it as it is, or take the default."""

    repository: Path | None = None
    image: str | None = None
    build: bool = False
    instance_type: str | None = None
    min_instances: int | None = None
    max_instances: int | None = None
    sessions_per_instance: float | None = None
    scale_in: bool | None = None
    volume_gb: int | None = None
    image_hosts: tuple[str, ...] | None = None
    image_buckets: tuple[str, ...] | None = None


def resolve(
    place: Place, wish: Wish, now: Deployment | None, max_sessions: Callable[[], float]
) -> Deployment:
    """The deployment that is wanted.

    Args:
        place: where.
        wish: what was asked for.
        now: what runs, if anything does.
        max_sessions: tells how many sessions an instance holds; asked when nobody gave a target.

    Raises:
        DeployError: no such instance type, or numbers that make no sense.
    """
    old = now or Deployment(_DEFAULT_INSTANCE_TYPE, 1, 1, 0.0, True, None, (), ())
    minimum = _first(wish.min_instances, old.min_instances)
    # Who asks for more at least than there may be at most means more at most.
    maximum = _first(wish.max_instances, max(old.max_instances, minimum))
    sessions = _first(wish.sessions_per_instance, old.sessions_per_instance)
    deployment = Deployment(
        instance_type=_first(wish.instance_type, old.instance_type),
        min_instances=minimum,
        max_instances=maximum,
        sessions_per_instance=(sessions or max(1.0, round(_TARGET_LOAD * max_sessions()))),
        scale_in=_first(wish.scale_in, old.scale_in),
        volume_gb=_first(wish.volume_gb, old.volume_gb),
        image_hosts=_first(wish.image_hosts, old.image_hosts),
        image_buckets=_first(wish.image_buckets, old.image_buckets),
    )
    _check(place, deployment)
    return deployment


_T = TypeVar("_T")


def _first(given: _T | None, old: _T) -> _T:
    return old if given is None else given


def _check(place: Place, deployment: Deployment) -> None:
    known: list[str] = (
        place.client("sagemaker").meta.service_model.shape_for("ProductionVariantInstanceType").enum
    )
    given = deployment.instance_type
    if given not in known:
        alike = difflib.get_close_matches(given, known, n=3)
        raise DeployError(
            f"SageMaker has no instance type {given!r} for endpoints: "
            + (
                f"did you mean {', '.join(alike)}?"
                if alike
                else "one like ml.g5.xlarge is expected"
            )
        )
    if not 1 <= deployment.min_instances <= deployment.max_instances:
        raise DeployError(
            f"{deployment.min_instances} to {deployment.max_instances} instances were asked for: "
            "at least 1 is expected, and --max not below --min"
        )
    if deployment.sessions_per_instance <= 0:
        raise DeployError(
            f"{deployment.sessions_per_instance:g} sessions per instance were asked for: "
            "more than 0 are expected"
        )
