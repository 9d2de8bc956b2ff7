"""What proves the others: memory and throughput measured, answers compared, the published sample's way."""

from helpers import public

__all__, __getattr__ = public(
    __name__,
    {
        "comparison": ["Comparison", "compare"],
        "evaluation": ["CaseError", "Evaluation", "Outcome", "TICKETS", "evaluate"],
        "memory": ["Measurement", "measure_model", "measure_models"],
        "process_memory": ["MeasureError"],
        "rounding": ["RoundingLoss", "rounding_loss"],
        "throughput": ["Throughput", "measure_throughput"],
    },
)
