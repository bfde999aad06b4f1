"""Who may do what: as little as each needs. Actions without resource-level permissions have `*`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from llava_sagemaker.deploy import image
from llava_sagemaker.deploy.place import TAG, Place
from llava_sagemaker.scaling_metrics import NAMESPACE

Policy = dict[str, Any]

_AWS_IMAGES = "763104351884"
"""AWS's account with the image that ours is built on."""


def trust_policy(place: Place) -> Policy:
    """Who may take the execution role: SageMaker, on behalf of this account only."""
    return {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Effect": "Allow",
                "Principal": {"Service": "sagemaker.amazonaws.com"},
                "Action": "sts:AssumeRole",
                "Condition": {"StringEquals": {"aws:SourceAccount": place.account_id}},
            }
        ],
    }


def execution_policy(
    place: Place, image_uris: Iterable[str], image_buckets: Sequence[str]
) -> Policy:
    """What the endpoint's instances may do.

    Args:
        place: the deployment's.
        image_uris: images to pull: the new one and, while an update runs, the old one.
        image_buckets: buckets that `s3://` pictures may be read from.
    """
    images = sorted({_image_arn(place, uri) for uri in image_uris})
    logs = place.arn("logs", f"log-group:{place.log_group}")
    statements = [
        _allow("Models", ["s3:GetObject"], [_bucket_arn(place, place.bucket) + "/*"]),
        _allow("ModelList", ["s3:ListBucket"], [_bucket_arn(place, place.bucket)]),
        _allow(
            "Image",
            ["ecr:BatchCheckLayerAvailability", "ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer"],
            images,
        ),
        _allow("ImageLogin", ["ecr:GetAuthorizationToken"], ["*"]),
        _allow(
            "Logs",
            [
                "logs:CreateLogGroup",
                "logs:CreateLogStream",
                "logs:DescribeLogStreams",
                "logs:PutLogEvents",
            ],
            [logs, logs + ":*"],
        ),
        # The second namespace is that of SageMaker's own figures about the instances.
        _allow(
            "Metrics",
            ["cloudwatch:PutMetricData"],
            ["*"],
            {"StringEquals": {"cloudwatch:namespace": [NAMESPACE, "/aws/sagemaker/Endpoints"]}},
        ),
    ]
    if image_buckets:
        pictures = [_bucket_arn(place, bucket) + "/*" for bucket in sorted(image_buckets)]
        statements.append(_allow("Pictures", ["s3:GetObject"], pictures))
    return {"Version": "2012-10-17", "Statement": statements}


def caller_policy(place: Place) -> Policy:
    """What somebody needs who only chats."""
    actions = ["sagemaker:InvokeEndpoint", "sagemaker:InvokeEndpointWithResponseStream"]
    return {
        "Version": "2012-10-17",
        "Statement": [_allow("Chat", actions, [place.arn("sagemaker", f"endpoint/{place.name}")])],
    }


def deployer_policy(place: Place) -> Policy:
    """What a person needs who deploys, updates and deletes the endpoint."""
    tagged = {"StringEquals": {f"aws:RequestTag/{TAG}": place.name}}
    role = place.arn("iam", f"role/{place.role}")
    endpoint = place.arn("sagemaker", f"endpoint/{place.name}")
    models = place.arn("sagemaker", f"model/{place.name}-*")
    configs = place.arn("sagemaker", f"endpoint-config/{place.name}-*")
    bucket = _bucket_arn(place, place.bucket)
    repository = place.arn("ecr", f"repository/{place.image_repository}")
    logs = place.arn("logs", f"log-group:{place.log_group}")
    target = place.arn("application-autoscaling", "scalable-target/*")
    alarms = [
        place.arn("cloudwatch", f"alarm:{place.alarm}"),
        place.arn("cloudwatch", f"alarm:TargetTracking-endpoint/{place.name}/*"),
    ]
    linked = (
        f"arn:{place.partition}:iam::{place.account_id}:role/aws-service-role/"
        "sagemaker.application-autoscaling.amazonaws.com/*"
    )
    return {
        "Version": "2012-10-17",
        "Statement": [
            _allow(
                "Models",
                [
                    "s3:CreateBucket",
                    "s3:DeleteBucket",
                    "s3:GetBucketTagging",
                    "s3:ListBucket",
                    "s3:PutBucketTagging",
                ],
                [bucket],
            ),
            _allow(
                "ModelFiles",
                ["s3:AbortMultipartUpload", "s3:DeleteObject", "s3:GetObject", "s3:PutObject"],
                [bucket + "/*"],
            ),
            _allow(
                "Image",
                [
                    "ecr:BatchCheckLayerAvailability",
                    "ecr:BatchDeleteImage",
                    "ecr:BatchGetImage",
                    "ecr:CompleteLayerUpload",
                    "ecr:CreateRepository",
                    "ecr:DeleteRepository",
                    "ecr:DescribeImages",
                    "ecr:DescribeRepositories",
                    "ecr:GetDownloadUrlForLayer",
                    "ecr:InitiateLayerUpload",
                    "ecr:ListImages",
                    "ecr:ListTagsForResource",
                    "ecr:PutImage",
                    "ecr:TagResource",
                    "ecr:UploadLayerPart",
                ],
                [repository],
            ),
            _allow(
                "BaseImage",
                [
                    "ecr:BatchCheckLayerAvailability",
                    "ecr:BatchGetImage",
                    "ecr:GetDownloadUrlForLayer",
                ],
                [f"arn:{place.partition}:ecr:*:{_AWS_IMAGES}:repository/*"],
            ),
            _allow(
                "Role",
                [
                    "iam:CreateRole",
                    "iam:DeleteRole",
                    "iam:DeleteRolePolicy",
                    "iam:GetRole",
                    "iam:GetRolePolicy",
                    "iam:ListRolePolicies",
                    "iam:PutRolePolicy",
                    "iam:TagRole",
                ],
                [role],
            ),
            _allow(
                "GiveRole",
                ["iam:PassRole"],
                [role],
                {"StringEquals": {"iam:PassedToService": "sagemaker.amazonaws.com"}},
            ),
            _allow(
                "CreateTagged",
                [
                    "sagemaker:AddTags",
                    "sagemaker:CreateEndpoint",
                    "sagemaker:CreateEndpointConfig",
                    "sagemaker:CreateModel",
                ],
                [endpoint, configs, models],
                tagged,
            ),
            _allow(
                "Endpoint",
                [
                    "sagemaker:DeleteEndpoint",
                    "sagemaker:DeleteEndpointConfig",
                    "sagemaker:DeleteModel",
                    "sagemaker:DescribeEndpoint",
                    "sagemaker:DescribeEndpointConfig",
                    "sagemaker:DescribeModel",
                    "sagemaker:InvokeEndpoint",
                    "sagemaker:InvokeEndpointWithResponseStream",
                    "sagemaker:ListTags",
                    "sagemaker:UpdateEndpoint",
                    "sagemaker:UpdateEndpointWeightsAndCapacities",
                ],
                [endpoint, configs, models],
            ),
            _allow(
                "Scaling",
                [
                    "application-autoscaling:DeleteScalingPolicy",
                    "application-autoscaling:DeregisterScalableTarget",
                    "application-autoscaling:ListTagsForResource",
                    "application-autoscaling:PutScalingPolicy",
                    "application-autoscaling:RegisterScalableTarget",
                    "application-autoscaling:TagResource",
                ],
                [target],
            ),
            _allow(
                "ScalingRole",
                ["iam:CreateServiceLinkedRole"],
                [linked],
                {
                    "StringEquals": {
                        "iam:AWSServiceName": "sagemaker.application-autoscaling.amazonaws.com"
                    }
                },
            ),
            _allow(
                "Alarms",
                [
                    "cloudwatch:DeleteAlarms",
                    "cloudwatch:ListTagsForResource",
                    "cloudwatch:PutMetricAlarm",
                    "cloudwatch:TagResource",
                ],
                alarms,
            ),
            _allow(
                "Logs",
                [
                    "logs:CreateLogGroup",
                    "logs:DeleteLogGroup",
                    "logs:ListTagsForResource",
                    "logs:PutRetentionPolicy",
                    "logs:TagResource",
                ],
                [logs, logs + ":*"],
            ),
            _allow(
                "Look",
                [
                    "application-autoscaling:DescribeScalableTargets",
                    "application-autoscaling:DescribeScalingPolicies",
                    "cloudwatch:DescribeAlarms",
                    "cloudwatch:GetMetricStatistics",
                    "ecr:GetAuthorizationToken",
                    "logs:DescribeLogGroups",
                    "pricing:GetProducts",
                    "sagemaker:ListEndpointConfigs",
                    "sagemaker:ListModels",
                    "sts:GetCallerIdentity",
                ],
                ["*"],
            ),
        ],
    }


def _allow(
    sid: str,
    actions: list[str],
    resources: list[str],
    condition: dict[str, Any] | None = None,
) -> Policy:
    statement: Policy = {"Sid": sid, "Effect": "Allow", "Action": actions, "Resource": resources}
    if condition is not None:
        statement["Condition"] = condition
    return statement


def _bucket_arn(place: Place, bucket: str) -> str:
    return f"arn:{place.partition}:s3:::{bucket}"


def _image_arn(place: Place, uri: str) -> str:
    name = image.parse(uri)
    return f"arn:{place.partition}:ecr:{name.region}:{name.account}:repository/{name.repository}"
