"""Cloud Storage over a folder of files.

json_api, xml_api, uploads, downloads, batches     what clients call
object_store, bucket_store                         where objects and buckets are on disk
names, listing, preconditions, resource, ...       the service's rules, each on its own
"""

from .json_api import CloudStorage

__all__ = ["CloudStorage"]
