"""A model's name to its checkpoint folder, its config and its architecture."""

from helpers import public

__all__, __getattr__ = public(
    __name__,
    {
        "architecture": ["Architecture", "architecture_of"],
        "model_error": ["ModelError"],
        "names": ["load_config", "resolve"],
        "packaged": ["DEFAULT_MODEL"],
    },
)
