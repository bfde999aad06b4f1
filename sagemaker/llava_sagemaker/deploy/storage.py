"""The model repository in S3, uncompressed, so that SageMaker downloads many files at once.

Each version has a prefix of its own, named by its content, and never changes: an instance that
starts while an update runs, or after a rollback, finds exactly the version its model names. What a
new version shares with one that is there is copied inside S3; only changed files travel.

Content is compared by SHA-256, kept in the objects' metadata: ETags and S3's own checksums depend
on how a large file was cut in parts.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_sagemaker.deploy import report
from llava_sagemaker.deploy.errors import DeployError
from llava_sagemaker.deploy.place import Place
from llava_triton.contract.settings import FILE_NAME, Settings

_CHUNK = 1 << 22
_PREFIX = "repository-"  # the journal is the bucket's other half
_NEEDED = (FILE_NAME, "llava/config.pbtxt", "language_model/config.pbtxt")


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
        DeployError: the folder is not an exported model repository.
    """
    files = _local_files(repository)
    prefix = _version(files)
    s3 = place.client("s3")
    stored = {key: _stored_sha256(place, s3, key) for key in _keys(place, s3, _PREFIX)}
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
    _delete(place, s3, [key for key in _keys(place, s3, _PREFIX) if not key.startswith(kept)])


def settings_of(place: Place, repository: Path | str) -> Settings:
    """The settings of a model repository: a folder, or its S3 URI.

    Raises:
        DeployError: it holds none.
    """
    try:
        if isinstance(repository, Path):
            text = (repository / FILE_NAME).read_bytes()
        else:
            bucket, _, prefix = repository.removeprefix("s3://").partition("/")
            answer = place.client("s3").get_object(Bucket=bucket, Key=f"{prefix}{FILE_NAME}")
            text = answer["Body"].read()
        return Settings.from_json(text.decode())
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DeployError(
            f"{repository}: {FILE_NAME} holds no settings ({error}). Give a repository that "
            "`make export MODEL=...` made, under build/repositories"
        ) from error


def empty_bucket(place: Place) -> None:
    """Delete all that is in the bucket, if there is one: model repositories and journal."""
    s3 = place.client("s3")
    with contextlib.suppress(s3.exceptions.NoSuchBucket):
        _delete(place, s3, list(_keys(place, s3)))


def has_objects(place: Place) -> bool:
    """Whether there is a bucket with something in it."""
    s3 = place.client("s3")
    try:
        return next(_keys(place, s3), None) is not None
    except s3.exceptions.NoSuchBucket:
        return False


def _keys(place: Place, s3: Any, prefix: str = "") -> Iterator[str]:
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=place.bucket, Prefix=prefix)
    for page in pages:
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


def check_repository(repository: Path) -> None:
    """Raises DeployError unless the folder is an exported model repository."""
    missing = [name for name in _NEEDED if not (repository / name).is_file()]
    if missing:
        raise DeployError(
            f"{repository} is not an exported model repository ({missing[0]} is missing): give one "
            "that `make export MODEL=...` made, under build/repositories"
        )


def _local_files(repository: Path) -> list[LocalFile]:
    check_repository(repository)
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
    return f"{_PREFIX}{hashlib.sha256(listing.encode()).hexdigest()[:16]}/"
