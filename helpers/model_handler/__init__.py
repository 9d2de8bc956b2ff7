"""A state dict to answers: the RunInference handler, and the options that say how it answers."""

from helpers import public

__all__, __getattr__ = public(
    __name__,
    {
        "answers": ["Failure", "Response"],
        "handler": ["LanguageModelHandler", "NAMESPACE"],
        "hardware": ["LoadError"],
        "local_state_dict": ["state_dict_cache"],
        "options": ["AnsweringOptions"],
    },
)
