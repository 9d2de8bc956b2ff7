"""What computes: token ids of a batch in, token ids of the responses out. See `engine.Engine`."""
