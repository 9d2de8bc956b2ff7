"""How fast and how late a stream is: load at given rates, and a model of the queue that predicts the rest."""

from helpers import public

__all__, __getattr__ = public(
    __name__,
    {
        "arrivals": ["Phase", "poisson_arrivals", "volleys"],
        "batch_times": ["BatchTimes", "measured_batch_times"],
        "capacity": [
            "Predicted",
            "compare",
            "highest_rate",
            "most_rate",
            "off_by",
            "predict_points",
            "predict_rates",
            "predicted_curve",
            "simulate_stream",
        ],
        "load": ["Record", "Records", "SendingError", "send_load"],
        "plan": ["Candidate", "Demand", "Plan", "PlanError", "make_plan"],
        "queueing": ["Simulated", "simulate"],
        "result": ["Result", "read_result", "this_machine"],
        "service_time": ["Observed", "ServiceTime", "fit"],
        "changes": ["NotAnsweredError", "label_of", "measure_changes", "warm_up"],
        "first_answer": ["start_up"],
        "sweep": ["Point", "SweepError", "knee", "sweep_rates"],
    },
)
