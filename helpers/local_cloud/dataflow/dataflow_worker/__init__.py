"""The worker of a Dataflow job of the local cloud: the program in its "image" that runs what was staged.

It stands alone: the service starts it as `python -m dataflow_worker` in a sandbox, where this project
exists only if the job staged it.
"""
