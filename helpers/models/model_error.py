"""What is raised for a model that cannot be used."""


class ModelError(ValueError):
    """A model that cannot be found or used; the message says why, and what to do next."""
