"""The Dataflow job around the pipeline: its options, its state, its end."""
