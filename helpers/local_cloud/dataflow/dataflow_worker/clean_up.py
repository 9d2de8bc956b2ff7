"""`python -m dataflow_worker.clean_up NAME...` deletes subscriptions that a killed worker left."""

import contextlib
import sys

from google.api_core import exceptions
from google.cloud import pubsub_v1

if __name__ == "__main__":
    client = pubsub_v1.SubscriberClient()
    for name in sys.argv[1:]:
        with contextlib.suppress(exceptions.NotFound):
            client.delete_subscription(subscription=name, timeout=10)
