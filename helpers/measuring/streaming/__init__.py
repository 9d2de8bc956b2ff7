"""How fast and how late a stream is: load at given rates, and a model of the queue that predicts the rest."""

from helpers import public

__all__, __getattr__ = public(
    __name__,
    {
        "arrivals": ["Phase", "poisson_arrivals"],
        "bundle_times": ["BundleTimes", "measured_bundle_times"],
        "load": ["Record", "Records", "SendingError", "send_load"],
        "plan": ["Candidate", "Demand", "Plan", "PlanError", "make_plan"],
        "queueing": ["Simulated", "simulate"],
        "service_time": ["Observed", "ServiceTime", "fit"],
        "sweep": ["Point", "SweepError", "knee", "sweep_rates"],
    },
)
