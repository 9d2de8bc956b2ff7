"""A state dict to the file of an inference engine: CTranslate2's, which computes faster on CPUs without
bfloat16, and in 8-bit integers on all of them.

The state dict stays the one source. An engine's file is made from it and can be made again; `description`
says what belongs to one, and where it stands.
"""

from helpers import public

__all__, __getattr__ = public(
    __name__,
    {
        "description": ["ENGINE_DTYPES", "EngineError", "EngineFile", "read_engine_file"],
        "making": ["make", "put_beside", "why_not"],
    },
)
