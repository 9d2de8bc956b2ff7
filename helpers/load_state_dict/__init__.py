"""A model's checkpoint to a half-precision state dict, here or in a Vertex AI custom job."""

from helpers import public

__all__, __getattr__ = public(
    __name__,
    {
        "checkpoint": ["Checkpoint", "CheckpointError"],
        "conversion": ["convert", "describe", "ensure"],
        "custom_job": ["CustomJobError"],
        "manifest": [
            *("CompanionError", "Manifest", "WrongModelError", "companion_folder"),
            *("read_companion", "read_manifest"),
        ],
        "mapped_model": ["LoadError"],
        "rounding": ["RoundingError"],
        "versions": ["ReplacedError", "check_companions"],
        "vertex_conversion": ["vertex", "where_to_convert"],
    },
)
