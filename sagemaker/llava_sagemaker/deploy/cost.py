"""What the instances cost, told before anything is created.

Prices come from AWS's Price List; where it cannot be asked, from a small table of rounded prices,
which is said.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from llava_sagemaker.deploy.errors import code_of
from llava_sagemaker.deploy.instance_types import engines_of
from llava_sagemaker.deploy.place import Place

_PRICE_LIST_REGION = {"aws": "us-east-1", "aws-cn": "cn-northwest-1"}
_PAGE = "https://aws.amazon.com/sagemaker/ai/pricing/"
_HOURS_A_MONTH = 730

_TABLE_DATE = "late 2025"
_TABLE = {
    "ml.c5.xlarge": 0.20,
    "ml.m5.xlarge": 0.23,
    "ml.g4dn.xlarge": 0.74,
    "ml.g4dn.2xlarge": 0.94,
    "ml.g5.xlarge": 1.41,
    "ml.g5.2xlarge": 1.52,
    "ml.g5.4xlarge": 2.03,
    "ml.g5.12xlarge": 7.09,
    "ml.g6.xlarge": 1.13,
    "ml.g6.2xlarge": 1.22,
    "ml.g6.4xlarge": 1.65,
    "ml.g6e.xlarge": 2.33,
    "ml.g6e.2xlarge": 2.80,
    "ml.p4d.24xlarge": 37.69,
}
"""Dollars an hour in us-east-1, rounded, for the first look."""


@dataclass(frozen=True)
class Price:
    """An instance's price; None when nobody knows."""

    dollars_an_hour: float | None
    source: str


def price(place: Place, instance_type: str) -> Price:
    """Ask the Price List; whatever goes wrong there is no reason to stop."""
    try:
        listed = _listed_price(place, instance_type)
        reason = "the Price List does not name it"
    except ClientError as error:
        listed, reason = None, f"the Price List was not to be had: {code_of(error)}"
    except (BotoCoreError, ValueError, KeyError, TypeError) as error:
        listed, reason = None, f"the Price List was not to be had: {type(error).__name__}"
    if listed is not None:
        return Price(listed, f"AWS Price List, {place.region}")
    known = _TABLE.get(instance_type)
    if known is None:
        return Price(None, f"{reason}; see {_PAGE}")
    return Price(known, f"{reason}; rounded price of {_TABLE_DATE} in us-east-1, see {_PAGE}")


def estimate(parameters: Mapping[str, str], found: Price) -> str:
    """Some lines for people, about the template's parameters."""
    low, high = int(parameters["MinInstances"]), int(parameters["MaxInstances"])
    instances = f"{low}" if low == high else f"{low} to {high}"
    instance_type = parameters["InstanceType"]
    engines = engines_of(instance_type)
    each = f" of {engines} GPUs" if engines > 1 else ""
    lines = [
        f"cost of {instances} x {instance_type}{each}",
        f"  price from: {found.source}",
    ]
    if found.dollars_an_hour is None:
        lines.append("  the price is unknown")
    else:
        for count in dict.fromkeys((low, high)):
            hour = count * found.dollars_an_hour
            lines.append(
                f"  {count} instance{'s' * (count > 1)}: ${hour:,.2f} an hour, "
                f"${hour * _HOURS_A_MONTH:,.0f} a month, used or not"
            )
        lines.append("  while an update runs: twice that")
    lines.append("  storage, metrics, alarms and logs: a few dollars a month besides")
    lines.append("  the journal: by what is said and shown (docs/operations.md)")
    return "\n".join(lines)


def _listed_price(place: Place, instance_type: str) -> float | None:
    region = _PRICE_LIST_REGION.get(place.partition)
    if region is None:
        return None
    filters = [
        {"Type": "TERM_MATCH", "Field": field, "Value": value}
        for field, value in (("instanceName", instance_type), ("regionCode", place.region))
    ]
    pages = (
        place.client("pricing", region, attempts=2)
        .get_paginator("get_products")
        .paginate(ServiceCode="AmazonSageMaker", Filters=filters)
    )
    products = [json.loads(entry) for page in pages for entry in page["PriceList"]]
    prices = [_hourly(product) for product in products if _is_hosting(product)]
    return max(prices, default=None)


def _is_hosting(product: dict[str, Any]) -> bool:
    """Endpoints, not notebooks or training; the list has called it by two names."""
    attributes = product["product"]["attributes"]
    return "Hosting" in (attributes.get("component"), attributes.get("platoinstancetype"))


def _hourly(product: dict[str, Any]) -> float:
    (term,) = product["terms"]["OnDemand"].values()
    return max(
        float(amount)
        for dimension in term["priceDimensions"].values()
        for amount in dimension["pricePerUnit"].values()
    )
