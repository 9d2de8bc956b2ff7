"""A response as a record: a line of JSON that a table can take, with all that is known about the answer.

`answer_record.schema.json` is its JSON Schema and `answer_record.bigquery.json` the schema of a BigQuery
table for it, for a subscription that writes the responses topic to that table without any code.
"""

from __future__ import annotations

import json
from typing import Any

from apache_beam.io.gcp.pubsub import PubsubMessage

from helpers.model_handler import Response


def answer_record(message: PubsubMessage, response: Response, model_name: str) -> str:
    """The record of a message's response, as JSON.

    Args:
        message: what was asked. Its own attributes are in the record, as a list of names and values.
        response: the model's.
        model_name: the model that answered.
    """
    own = sorted((message.attributes or {}).items())
    attributes = [(name, value) for name, value in own if not name.lower().startswith("goog")]  # Pub/Sub's
    values: dict[str, Any] = {
        "prompt_message_id": message.message_id or "",
        "answer": response.text,
        "model_name": model_name,
        "finish_reason": response.finish_reason,
        "prompt_tokens": response.prompt_tokens,
        "response_tokens": response.response_tokens,
        "reasoning_tokens": response.reasoning_tokens,
        "ordering_key": message.ordering_key or "",
        "attributes": [{"name": name, "value": value} for name, value in attributes],
    }
    return json.dumps(values, ensure_ascii=False)
