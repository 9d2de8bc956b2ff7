"""Dataflow: jobs, and the worker process that runs each of them."""
