"""Cloud Monitoring, of what Pub/Sub measures."""
