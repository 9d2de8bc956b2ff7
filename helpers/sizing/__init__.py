"""Which machine a model needs: its parameters, the memory to convert and to serve it, the machine that
fits."""

from helpers import public

__all__, __getattr__ = public(
    __name__,
    {
        "machine_types": ["MachineType", "MachineTypeError", "check_machine_type"],
        "model_memory": ["SizingError"],
        "sizes": ["Phase", "Sizing", "size_model"],
    },
)
