"""Prompts to responses, and Pub/Sub messages to messages, as Beam transforms and as a pipeline."""

from helpers import public

__all__, __getattr__ = public(
    __name__,
    {
        "__main__": ["main"],
        "command_line": ["parser", "run"],
        "stream": ["CommandLineError", "build"],
        "transforms": ["AskMessages", "AskModel", "FailedPrompt", "FailedPromptError"],
    },
)
