"""A bucket for the series, made so that an organisation's usual policies allow it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from google.cloud.storage import Bucket, Client

SOFT_DELETE = "constraints/storage.softDeletePolicySeconds"


def make_bucket(client: Client, name: str, location: str) -> Bucket:
    """Makes a bucket with uniform access, closed to the public, and without soft delete.

    Organisations often require the first two. Soft delete, which is on by default, keeps what is deleted for
    seven days, and bills it: parts of uploads, and what each job stages. An organisation may require that as
    well; then the bucket has the organisation's default.

    Raises:
        google.api_core.exceptions.GoogleAPICallError: the bucket cannot be made.
    """
    from google.api_core.exceptions import PreconditionFailed

    def closed() -> Bucket:
        bucket = client.bucket(name)
        bucket.iam_configuration.uniform_bucket_level_access_enabled = True
        bucket.iam_configuration.public_access_prevention = "enforced"
        return bucket

    bucket = closed()
    bucket.soft_delete_policy.retention_duration_seconds = 0
    try:
        return client.create_bucket(bucket, location=location)
    except PreconditionFailed as error:
        if SOFT_DELETE not in str(error):
            raise
    return client.create_bucket(closed(), location=location)
