"""Checkpoint to state dict: read, round, write, check, here or in a Vertex AI custom job."""
