"""What every notebook needs: its packages, a connection to Google Cloud or to the local cloud, tables."""

from helpers import public

__all__, __getattr__ = public(
    __name__,
    {
        "connection": ["Connection", "ConnectionFailed", "connect"],
        "environment": ["prepare"],
        "interaction": [
            "at_least",
            "check_types",
            "job_options",
            "progress",
            "prompt_box",
            "quiet_interactive_beam",
            "rising",
            "texts",
        ],
        "scratch": ["clean_up", "scratch_folder"],
        "tables": ["Board", "Table", "table", "versions"],
    },
)
