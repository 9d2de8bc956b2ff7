"""Which fields of Pub/Sub's requests are honoured here, and which have no effect; every other is refused."""

from ..front.fields import fields

_TOPIC = "name labels"
# Regions mean nothing here, what is retained is never deleted, and what the service sets itself is ignored.
_TOPIC_IDLE = "message_storage_policy message_retention_duration satisfies_pzs state"
_SUBSCRIPTION = "name topic labels ack_deadline_seconds"
_SUBSCRIPTION_IDLE = (
    "message_retention_duration expiration_policy topic_message_retention_duration state "
    "retain_acked_messages"
)

TABLES = {
    "CreateTopic": fields(_TOPIC, _TOPIC_IDLE),
    "Publish": fields(
        "topic messages.data messages.attributes",
        # An ordering key is carried, but orders nothing; the others are the service's to set.
        "messages.ordering_key messages.message_id messages.publish_time",
    ),
    "GetTopic": fields("topic"),
    "DeleteTopic": fields("topic"),
    # A push_config that is empty says that the subscription is pulled.
    "CreateSubscription": fields(_SUBSCRIPTION, _SUBSCRIPTION_IDLE),
    "GetSubscription": fields("subscription"),
    "DeleteSubscription": fields("subscription"),
    "ModifyAckDeadline": fields("subscription ack_ids ack_deadline_seconds"),
    "Acknowledge": fields("subscription ack_ids"),
    "Pull": fields("subscription max_messages return_immediately"),
    "StreamingPull": fields(
        "subscription ack_ids modify_deadline_seconds modify_deadline_ack_ids stream_ack_deadline_seconds "
        "max_outstanding_messages max_outstanding_bytes",
        "client_id protocol_version",
    ),
}
