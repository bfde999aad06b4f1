"""How many GPUs an instance type has: the container starts an engine on each."""

from __future__ import annotations

# By family: what all its sizes have that are not named. Of AWS's pages of instance types; AWS's
# API would tell (ec2:DescribeInstanceTypes), but not for the `ml.` names, and needs a permission.
_GPUS: dict[str, dict[str, int]] = {
    "p2": {"": 1, "8xlarge": 8, "16xlarge": 16},
    "p3": {"": 1, "8xlarge": 4, "16xlarge": 8},
    "p3dn": {"": 8},
    "p4d": {"": 8},
    "p4de": {"": 8},
    "p5": {"": 8, "4xlarge": 1},
    "p5e": {"": 8},
    "p5en": {"": 8},
    "p6-b200": {"": 8},
    "g4dn": {"": 1, "12xlarge": 4},
    "g5": {"": 1, "12xlarge": 4, "24xlarge": 4, "48xlarge": 8},
    "g6": {"": 1, "12xlarge": 4, "24xlarge": 4, "48xlarge": 8},
    "g6e": {"": 1, "12xlarge": 4, "24xlarge": 4, "48xlarge": 8},
}


def gpus_of(instance_type: str) -> int:
    """The GPUs of a type such as "ml.g5.12xlarge"; 0 for one of CPUs, or one that is not known."""
    family, _, size = instance_type.removeprefix("ml.").partition(".")
    sizes = _GPUS.get(family, {"": 0})
    return sizes.get(size, sizes[""])


def engines_of(instance_type: str) -> int:
    """How many engines the container starts on a type: one a GPU, and one where there is none.
    Each has sessions of its own, `max_sessions` of them."""
    return max(1, gpus_of(instance_type))
