"""Which fields of Pub/Sub's requests are honoured here, and which have no effect; every other is refused."""

from ..front.fields import fields

_TOPIC = "name labels"
# Regions mean nothing here, what is retained is never deleted, and what the service sets itself is ignored.
_TOPIC_IDLE = "message_storage_policy message_retention_duration satisfies_pzs state"
_SUBSCRIPTION = "name topic labels ack_deadline_seconds retain_acked_messages"
_SUBSCRIPTION_IDLE = (
    "message_retention_duration expiration_policy topic_message_retention_duration state detached"
)
_LIST_IDLE = "page_size page_token"  # lists come as one page

TABLES = {
    "CreateTopic": fields(_TOPIC, _TOPIC_IDLE),
    # The mask says what is to change, and is checked by itself.
    "UpdateTopic": fields("topic update_mask"),
    "Publish": fields(
        "topic messages.data messages.attributes",
        # An ordering key is carried, but orders nothing; the others are the service's to set.
        "messages.ordering_key messages.message_id messages.publish_time",
    ),
    "GetTopic": fields("topic"),
    "ListTopics": fields("project", _LIST_IDLE),
    "ListTopicSubscriptions": fields("topic", _LIST_IDLE),
    "DeleteTopic": fields("topic"),
    "DetachSubscription": fields("subscription"),
    # A push_config that is empty says that the subscription is pulled.
    "CreateSubscription": fields(_SUBSCRIPTION, _SUBSCRIPTION_IDLE),
    "GetSubscription": fields("subscription"),
    "UpdateSubscription": fields("subscription update_mask"),
    "ListSubscriptions": fields("project", _LIST_IDLE),
    "DeleteSubscription": fields("subscription"),
    "ModifyAckDeadline": fields("subscription ack_ids ack_deadline_seconds"),
    "Acknowledge": fields("subscription ack_ids"),
    "Pull": fields("subscription max_messages return_immediately"),
    "Seek": fields("subscription time"),
    "StreamingPull": fields(
        "subscription ack_ids modify_deadline_seconds modify_deadline_ack_ids stream_ack_deadline_seconds "
        "max_outstanding_messages max_outstanding_bytes",
        "client_id protocol_version",
    ),
    "TestIamPermissions": fields("resource permissions"),
    "GetIamPolicy": fields("resource", "options"),
}
