"""Which fields of Vertex AI's requests are honoured here, which have no effect; every other is refused."""

from ..front.fields import fields

_POOL = "custom_job.job_spec.worker_pool_specs"

TABLES = {
    "CreateCustomJob": fields(
        "parent custom_job.display_name custom_job.labels "
        f"{_POOL}.replica_count {_POOL}.container_spec "
        "custom_job.job_spec.scheduling.timeout custom_job.job_spec.base_output_directory",
        # There are no images, machines, accelerators, disks, accounts or networks here, and a job is
        # neither queued nor restarted.
        f"{_POOL}.container_spec.image_uri "
        f"{_POOL}.machine_spec {_POOL}.disk_spec "
        "custom_job.job_spec.scheduling.restart_job_on_worker_restart "
        "custom_job.job_spec.scheduling.strategy custom_job.job_spec.scheduling.disable_retries "
        "custom_job.job_spec.scheduling.max_wait_duration "
        "custom_job.job_spec.service_account custom_job.job_spec.network",
    ),
    "GetCustomJob": fields("name"),
    "ListCustomJobs": fields("parent", "page_size page_token read_mask"),
    "CancelCustomJob": fields("name"),
}
