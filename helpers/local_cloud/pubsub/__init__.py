"""Pub/Sub: topics, subscriptions, and the messages between them."""
