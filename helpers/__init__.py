"""Streaming LLM inference with Apache Beam and Dataflow: from a model's name to a running job."""
