"""The streaming job on Dataflow: submitted, watched, updated, stopped; what it needs, and what it costs."""

from helpers import public

__all__, __getattr__ = public(
    __name__,
    {
        "cloud_checks": ["Finding"],
        "job": ["Distribution", "Job", "JobError", "TERMINAL"],
        "job_checks": ["PreflightError", "misses", "preflight", "require"],
        "job_estimate": ["estimate"],
        "job_list": ["ListedJob", "find_name", "list_series", "reap"],
        "job_options": ["OptionError", "new_job_name", "size_for_serving", "valid_job_name"],
        "job_status": ["Status"],
        "jobs": ["UPDATE_SECONDS", "submit", "update"],
        "worker_image": ["build_image"],
    },
)
