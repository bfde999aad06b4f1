"""The model repository in S3, uncompressed, so that SageMaker downloads many files at once.

Each version has a prefix of its own, named by its content, and never changes: an instance that
starts while an update runs, or after a rollback, finds exactly the version its model names. What a
new version shares with one that is there is copied inside S3; only changed files travel.

Content is compared by SHA-256, kept in the objects' metadata: ETags and S3's own checksums depend
on how a large file was cut in parts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError

from llava_sagemaker.deploy import report
from llava_sagemaker.deploy.errors import DeployError, is_absent
from llava_sagemaker.deploy.place import Place

_CHUNK = 1 << 22
_NEEDED = ("settings.json", "llava/config.pbtxt", "language_model/config.pbtxt")


@dataclass(frozen=True)
class LocalFile:
    """A file of the repository; `name` is its path inside it, with slashes."""

    name: str
    path: Path
    size: int
    sha256: str


def put_repository(place: Place, repository: Path) -> str:
    """Upload what S3 does not have yet.

    Returns:
        The S3 URI of this version, ending in a slash.

    Raises:
        DeployError: the folder is not an exported model repository, or the bucket is not ours.
    """
    files = _local_files(repository)
    prefix = _version(files)
    s3 = place.client("s3")
    _bring_bucket(place, s3)
    stored = {key: _stored_sha256(place, s3, key) for key in _keys(place, s3)}
    by_content = {sha256: key for key, sha256 in stored.items()}
    missing = [file for file in files if stored.get(prefix + file.name) != file.sha256]
    to_copy = [file for file in missing if file.sha256 in by_content]
    to_upload = [file for file in missing if file.sha256 not in by_content]
    for file in to_copy:
        s3.copy(
            {"Bucket": place.bucket, "Key": by_content[file.sha256]},
            place.bucket,
            prefix + file.name,
            ExtraArgs={"Metadata": {"sha256": file.sha256}, "MetadataDirective": "REPLACE"},
        )
    if to_upload:
        total = sum(file.size for file in to_upload)
        label = f"uploading {len(to_upload)} of {len(files)} files, {report.size(total)}"
        with report.bar(label, total) as advance:
            for file in to_upload:
                s3.upload_file(
                    str(file.path),
                    place.bucket,
                    prefix + file.name,
                    ExtraArgs={"Metadata": {"sha256": file.sha256}},
                    Callback=advance,
                )
    wanted = {prefix + file.name for file in files}
    _delete(place, s3, [key for key in stored if key.startswith(prefix) and key not in wanted])
    uri = f"s3://{place.bucket}/{prefix}"
    changed = "changed" if missing else "unchanged"
    report.say(f"model repository: {uri} ({len(files)} files, {changed})")
    return uri


def remove_other_versions(place: Place, keep_uri: str) -> None:
    """Delete all versions but one.

    Raises:
        DeployError: that one is not in this deployment's bucket.
    """
    s3 = place.client("s3")
    ours = f"s3://{place.bucket}/"
    if not keep_uri.startswith(ours):
        raise DeployError(f"{keep_uri} is not in {ours}: no version is deleted there")
    kept = keep_uri.removeprefix(ours)
    _delete(place, s3, [key for key in _keys(place, s3) if not key.startswith(kept)])


def max_sessions(place: Place, repository: Path | str) -> float:
    """How many sessions an instance holds, by a repository's settings: a folder, or its S3 URI.

    Raises:
        DeployError: the settings are missing or do not say it.
    """
    try:
        if isinstance(repository, Path):
            text = (repository / "settings.json").read_bytes()
        else:
            bucket, _, prefix = repository.removeprefix("s3://").partition("/")
            answer = place.client("s3").get_object(Bucket=bucket, Key=f"{prefix}settings.json")
            text = answer["Body"].read()
        return float(json.loads(text)["max_sessions"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DeployError(
            f"{repository}: settings.json does not say max_sessions ({error}). Give a repository "
            "that `make export MODEL=...` made, under build/repositories"
        ) from error


def find_bucket(place: Place) -> bool:
    """Whether the bucket exists and is ours."""
    tags = _bucket_tags(place, place.client("s3"))
    return tags is not None and place.owns(tags)


def remove_bucket(place: Place) -> None:
    """Delete the bucket with all versions."""
    s3 = place.client("s3")
    _delete(place, s3, list(_keys(place, s3)))
    s3.delete_bucket(Bucket=place.bucket)


def _bring_bucket(place: Place, s3: Any) -> None:
    tags = _bucket_tags(place, s3)
    if tags is not None:
        place.must_own("S3 bucket", place.bucket, tags)
        return
    # Outside us-east-1 S3 wants to be told the region once more.
    where = (
        {}
        if place.region == "us-east-1"
        else {"CreateBucketConfiguration": {"LocationConstraint": place.region}}
    )
    s3.create_bucket(Bucket=place.bucket, **where)
    try:
        s3.put_bucket_tagging(Bucket=place.bucket, Tagging={"TagSet": place.tags})
    except BaseException:
        s3.delete_bucket(Bucket=place.bucket)  # nothing without a tag stays behind
        raise
    report.say(f"created the S3 bucket {place.bucket}")


def _bucket_tags(place: Place, s3: Any) -> list[dict[str, str]] | None:
    """The bucket's tags; None when there is no bucket."""
    try:
        s3.head_bucket(Bucket=place.bucket)
    except ClientError as error:
        if is_absent(error):
            return None
        raise
    try:
        tags: list[dict[str, str]] = s3.get_bucket_tagging(Bucket=place.bucket)["TagSet"]
    except ClientError as error:
        if is_absent(error):
            return []
        raise
    return tags


def _keys(place: Place, s3: Any) -> Iterator[str]:
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket=place.bucket):
        yield from (entry["Key"] for entry in page.get("Contents", ()))


def _stored_sha256(place: Place, s3: Any, key: str) -> str | None:
    metadata = s3.head_object(Bucket=place.bucket, Key=key)["Metadata"]
    return str(metadata["sha256"]) if "sha256" in metadata else None


def _delete(place: Place, s3: Any, keys: list[str]) -> None:
    for start in range(0, len(keys), 1000):  # S3 takes 1,000 at a time
        objects = [{"Key": key} for key in keys[start : start + 1000]]
        answer = s3.delete_objects(Bucket=place.bucket, Delete={"Objects": objects, "Quiet": True})
        if answer.get("Errors"):
            first = answer["Errors"][0]
            raise DeployError(
                f"S3 did not delete s3://{place.bucket}/{first['Key']}: {first['Message']}"
            )


def _local_files(repository: Path) -> list[LocalFile]:
    missing = [name for name in _NEEDED if not (repository / name).is_file()]
    if missing:
        raise DeployError(
            f"{repository} is not an exported model repository ({missing[0]} is missing): give one "
            "that `make export MODEL=...` made, under build/repositories"
        )
    paths = [
        path
        for path in sorted(_walk(repository))
        if path.suffix != ".pyc" and not path.name.startswith(".")
    ]
    total = sum(path.stat().st_size for path in paths)
    with report.bar(f"reading {report.size(total)} of {repository}", total) as advance:
        files = []
        for path in paths:
            digest = hashlib.sha256()
            with path.open("rb") as stream:
                while chunk := stream.read(_CHUNK):
                    digest.update(chunk)
                    advance(len(chunk))
            name = path.relative_to(repository).as_posix()
            files.append(LocalFile(name, path, path.stat().st_size, digest.hexdigest()))
    return files


def _walk(folder: Path) -> Iterator[Path]:
    """All files below; links are followed, since the checkpoint may be one."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from _walk(path)
        elif path.is_file():
            yield path


def _version(files: list[LocalFile]) -> str:
    """The prefix of a version: the hash of its files' names and contents."""
    listing = "".join(f"{file.sha256} {file.name}\n" for file in files)
    return f"repository-{hashlib.sha256(listing.encode()).hexdigest()[:16]}/"
