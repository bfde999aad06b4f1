"""What `deploy` knows of instance types."""

from __future__ import annotations

import pytest
from llava_sagemaker.deploy.instance_types import engines_of, gpus_of


@pytest.mark.parametrize(
    ("instance_type", "gpus"),
    [
        ("ml.g5.xlarge", 1),
        ("ml.g5.16xlarge", 1),
        ("ml.g5.12xlarge", 4),
        ("ml.g6e.48xlarge", 8),
        ("ml.g4dn.12xlarge", 4),
        ("ml.p4d.24xlarge", 8),
        ("ml.p5.4xlarge", 1),
        ("ml.m5.large", 0),
        ("something new", 0),
    ],
)
def test_gpus_and_engines(instance_type: str, gpus: int) -> None:
    assert gpus_of(instance_type) == gpus
    assert engines_of(instance_type) == max(1, gpus)
