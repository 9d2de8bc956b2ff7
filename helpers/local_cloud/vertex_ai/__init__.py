"""Vertex AI: custom jobs."""
