"""What a model takes of memory: computed from its config, and measured."""
