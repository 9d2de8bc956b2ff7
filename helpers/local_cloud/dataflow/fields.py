"""Which fields of Dataflow's requests are honoured here, and which have no effect; every other is refused."""

from ..front.fields import fields

_JOB = "project_id job_id location"

TABLES = {
    "CreateJob": fields(
        "project_id location replace_job_id job.project_id job.location job.name job.type_ job.labels "
        "job.client_request_id job.replace_job_id job.runtime_updatable_params "
        "job.environment.sdk_pipeline_options job.transform_name_mapping",
        # There are no images, machines, disks, accounts, networks or several workers here, and Beam's client
        # describes the pipeline a second time for the console. The service sets the rest itself.
        "view job.environment job.pipeline_description job.stage_states job.job_metadata job.temp_files "
        "job.execution_info job.id job.current_state job.current_state_time "
        "job.create_time job.start_time job.replaced_by_job_id job.satisfies_pzs job.satisfies_pzi",
        "job.environment.service_kms_key_name",
    ),
    "GetJob": fields(_JOB, "view"),
    "UpdateJob": fields(
        f"{_JOB} update_mask job.requested_state job.runtime_updatable_params",
        "job.id job.project_id job.location",  # the request's own count
    ),
    "ListJobs": fields("project_id location filter", "view page_size page_token"),
    "ListJobMessages": fields(f"{_JOB} minimum_importance start_time end_time", "page_size page_token"),
    "GetJobMetrics": fields(_JOB, "start_time"),  # all metrics come, changed or not
}
