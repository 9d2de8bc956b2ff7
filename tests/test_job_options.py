"""What is submitted to Dataflow: each option a reviewer would want to see, for CPU and for GPU.

The jobs are captured as templates, which Beam builds and stages as it does what it submits.
"""

import importlib.metadata
import json
import time
import zipfile
from pathlib import Path

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions, SetupOptions

from helpers import pipeline
from helpers.dataflow import job_options
from helpers.dataflow.job_options import (
    OptionError,
    disk_gb,
    label_value,
    set_defaults,
    torch_threads,
    valid_job_name,
)
from helpers.load_state_dict import WrongModelError, read_manifest
from helpers.load_state_dict.manifest import Manifest
from helpers.model_handler import AnsweringOptions
from helpers.models.names import CONFIGS
from helpers.pipeline.__main__ import main

GB = 10**9


def state_dict(folder: Path, name: str, size: int, dtype: str = "float16") -> str:
    """The path of a state dict of a real model's size, as far as a submission looks at it."""
    companion = folder / Path(name).name
    companion.mkdir(parents=True)
    config = CONFIGS / f"{name.replace('/', '--')}.json"
    (companion / "config.json").write_bytes(config.read_bytes())
    manifest = Manifest(model_name=name, dtype=dtype, parameters=size // 2, bytes=size, crc32c="AAAAAA==")
    (companion / "manifest.json").write_text(manifest.to_json())
    return f"{companion}.pt"


@pytest.fixture(scope="module")
def xl(tmp_path_factory) -> str:
    return state_dict(tmp_path_factory.mktemp("xl"), "google/flan-t5-xl", int(5.7 * GB))


def published_command(path: str, *more: str, model: str = "google/flan-t5-xl") -> list[str]:
    """The published sample's flags, without the machine type."""
    return [
        "--messages-topic=projects/my-project/topics/messages",
        "--responses-topic=projects/my-project/topics/responses",
        f"--state-dict-path={path}",
        f"--model-name={model}",
        "--runner=DataflowRunner",
        "--project=my-project",
        "--region=us-central1",
        *more,
    ]


@pytest.fixture
def capture(xl, bucket, tmp_path):
    """Gives the job, as JSON, that a command line would submit."""

    def capture(*more: str, path: str = xl, model: str = "google/flan-t5-xl") -> dict:
        template = tmp_path / "job.json"
        places = [f"--temp_location=gs://{bucket.name}/temp", f"--template_location={template}"]
        assert not pipeline.run([*published_command(path, model=model), *places, *more]).has_job
        return json.loads(template.read_text())

    return capture


def pool(job: dict) -> dict:
    (pool,) = job["environment"]["workerPools"]
    return pool


def test_a_cpu_job_has_what_a_language_model_needs(capture):
    job = capture()
    assert job["type"] == "JOB_TYPE_STREAMING"
    workers, experiments = pool(job), job["environment"]["experiments"]
    # The machine is sizing's: xl's 11.4 GB of weights in float32, batches of 32.
    assert workers["machineType"] == "n4-highmem-4"
    # One process, one model a machine.
    assert "no_use_multiple_sdk_containers" in experiments
    assert "use_multiple_sdk_containers" not in experiments
    # Bundles may be of one message: as many threads as fill a batch of 32, and a few more.
    assert workers["numThreadsPerWorker"] == 36
    assert {"enable_streaming_engine", "enable_windmill_service"} <= set(experiments)
    assert job["environment"]["serviceOptions"] == ["streaming_mode_at_least_once"]
    assert (workers["numWorkers"], workers["autoscalingSettings"]["maxNumWorkers"]) == (1, 4)
    # 25 GB for the system, as much for what it installs, and five times 5.7 GB: as it comes, and twice as it
    # is served, in float32.
    assert workers["diskSizeGb"] == 80
    assert job["labels"] == {"series": "streaming-llm", "step": "deploy", "model": "flan-t5-xl"}
    # The image is Beam's own, for this Beam and this Python.
    assert workers["workerHarnessContainerImage"].endswith(f":{beam.__version__}")
    assert job["name"].startswith("ask-flan-t5-xl-")


def test_a_gpu_job_names_its_accelerator_and_its_driver(capture):
    job = capture("--device=cuda")
    workers = pool(job)
    assert workers["machineType"] == "g2-standard-4"
    assert job["environment"]["serviceOptions"] == [
        "worker_accelerator=type:nvidia-l4;count:1;install-nvidia-driver",
        "streaming_mode_at_least_once",
    ]
    assert "no_use_multiple_sdk_containers" in job["environment"]["experiments"]
    assert workers["diskSizeGb"] == 90  # the system, the packages with CUDA, the driver, the state dict
    assert job["labels"]["series"] == "streaming-llm"
    assert (workers["numWorkers"], workers["autoscalingSettings"]["maxNumWorkers"]) == (1, 4)


def test_a_state_dict_of_another_model_is_refused_before_a_worker_starts(capture):
    with pytest.raises(WrongModelError, match="was made from"):
        capture(model="google/flan-t5-small")


@pytest.mark.parametrize("minutes", [0, -1, float("inf"), float("nan")])
def test_a_run_without_an_end_is_refused_before_it_starts(minutes, xl):
    with pytest.raises(OptionError, match="above 0"):
        options = PipelineOptions([])
        set_defaults(
            options,
            model_name="google/flan-t5-xl",
            state_dict_path=xl,
            answering=AnsweringOptions(),
            max_run_minutes=minutes,
        )


def test_a_model_that_is_too_large_for_one_gpu_gets_a_larger_one(tmp_path, capture):
    xxl = state_dict(tmp_path, "google/flan-t5-xxl", int(22.27 * GB))
    job = capture("--device=cuda", path=xxl, model="google/flan-t5-xxl")
    assert pool(job)["machineType"] == "a2-ultragpu-1g"
    assert (
        "worker_accelerator=type:nvidia-a100-80gb;count:1;install-nvidia-driver"
        in (job["environment"]["serviceOptions"])
    )


def test_a_gpu_machine_has_its_gpu_also_without_a_device(capture):
    options = capture("--machine_type=g2-standard-24")["environment"]["serviceOptions"]
    assert "worker_accelerator=type:nvidia-l4;count:2;install-nvidia-driver" in options
    options = capture("--machine_type=g2-standard-24", "--device=cpu")["environment"]["serviceOptions"]
    assert options == ["streaming_mode_at_least_once"]


def test_a_gpu_on_a_machine_without_one_is_an_error_that_says_what_to_name(capture):
    with pytest.raises(OptionError, match="worker_accelerator=type:"):
        capture("--device=cuda", "--machine_type=n1-standard-8")
    own = "worker_accelerator=type:nvidia-tesla-t4;count:1;install-nvidia-driver:5xx"
    job = capture("--device=cuda", "--machine_type=n1-standard-8", f"--dataflow_service_options={own}")
    assert job["environment"]["serviceOptions"] == [own, "streaming_mode_at_least_once"]


def test_what_the_user_gives_is_kept_and_merged(capture):
    job = capture(
        "--machine_type=n2-highmem-2",
        "--experiments=shuffle_mode=auto",
        "--experiments=use_multiple_sdk_containers",
        "--number_of_worker_harness_threads=2",
        "--dataflow_service_options=enable_google_cloud_profiler",
        "--disk_size_gb=77",
        "--num_workers=6",
        "--labels=team=search",
        "--labels=step=try",
        "--job_name=mine",
        "--sdk_container_image=gcr.io/p/worker:1",
        "--service_account_email=worker@p.iam.gserviceaccount.com",
    )
    workers, environment = pool(job), job["environment"]
    assert workers["machineType"] == "n2-highmem-2"
    assert {"shuffle_mode=auto", "use_multiple_sdk_containers"} <= set(environment["experiments"])
    assert "no_use_multiple_sdk_containers" not in environment["experiments"]
    assert workers["numThreadsPerWorker"] == 2
    many = PipelineOptions(["--experiments=use_multiple_sdk_containers"])
    assert torch_threads(many) == 1, "a process for each vCPU: one thread of torch in each"
    assert torch_threads(PipelineOptions([])) is None
    assert environment["serviceOptions"] == ["enable_google_cloud_profiler", "streaming_mode_at_least_once"]
    assert workers["diskSizeGb"] == 77
    assert (workers["numWorkers"], workers["autoscalingSettings"]["maxNumWorkers"]) == (6, 6)
    assert job["labels"] == {
        "series": "streaming-llm", "step": "try", "model": "flan-t5-xl", "team": "search"
    }  # fmt: skip
    assert job["name"] == "mine"
    assert workers["workerHarnessContainerImage"] == "gcr.io/p/worker:1"
    assert environment["serviceAccountEmail"] == "worker@p.iam.gserviceaccount.com"


def test_exactly_once_is_dataflows_own_default(capture):
    assert "serviceOptions" not in capture("--exactly-once")["environment"]
    own = capture("--dataflow_service_options=streaming_mode_exactly_once")["environment"]
    assert own["serviceOptions"] == ["streaming_mode_exactly_once"]


def test_a_fixed_number_of_workers_has_no_bound_beside_it(capture):
    workers = pool(capture("--autoscaling_algorithm=NONE", "--num_workers=2"))
    assert workers["numWorkers"] == 2
    assert "maxNumWorkers" not in workers["autoscalingSettings"]


def test_the_time_a_job_is_given_is_written_on_it(xl):
    options = PipelineOptions(["--machine_type=n4-standard-2"])
    before = time.time()
    set_defaults(
        options,
        model_name="google/flan-t5-xl",
        state_dict_path=xl,
        answering=AnsweringOptions(),
        max_run_minutes=10,
    )
    *_, label = options.view_as(GoogleCloudOptions).labels
    name, drain_after = label.split("=")
    assert name == "drain_after"
    assert before + 600 <= int(drain_after) <= time.time() + 601


def test_the_helpers_are_sent_along_unless_the_image_has_them(xl):
    def staged(*more: str) -> list[str]:
        places = ["--temp_location=gs://some-bucket/temp", "--dry_run=True"]
        result = pipeline.run([*published_command(xl), *places, *more])
        (environment,) = (
            environment
            for environment in result.job.proto_pipeline.components.environments.values()
            if environment.dependencies
        )
        return [artifact.role_payload.decode(errors="replace") for artifact in environment.dependencies]

    wheel = f"streaming_llm_helpers-{importlib.metadata.version('streaming-llm-helpers')}"
    assert any(wheel in name for name in staged())
    assert not any(
        wheel in name for name in staged("--helpers-in-image", "--sdk_container_image=gcr.io/p/w:1")
    )


def test_the_disk_holds_the_state_dict_as_it_is_computed_in():
    manifest = Manifest("m", "float16", 1, 20 * GB, "")
    assert disk_gb(manifest, "c4-standard-8") == 90  # bfloat16: 25 + 3 × 20
    assert disk_gb(manifest, "c4-standard-8", installs=True) == 110  # and CUDA's libraries
    assert disk_gb(manifest, "c4-standard-8", installs=True, has_cuda=False) == 90
    assert disk_gb(manifest, "g2-standard-8") == 110  # and the driver
    assert disk_gb(manifest, "n2-standard-8") == 130  # float32: 25 + 5 × 20
    assert disk_gb(manifest, "n4-standard-8", "int8") == 70  # 25 + 2 × 20
    assert disk_gb(Manifest("m", "float16", 1, 10**6, ""), "n4-standard-2") == 30


@pytest.mark.parametrize(
    ("answering", "machine_type", "uses"),
    [
        ({}, "c4-standard-2", False),  # torch, in bfloat16
        ({}, "n4-standard-2", True),  # which may not have it
        ({}, "n2-standard-2", True),
        ({"engine": "torch"}, "n2-standard-2", False),
        ({"dtype": "int8"}, "n4-standard-2", True),
        ({"dtype": "float32"}, "n4-standard-2", True),
        ({"device": "cuda"}, "g2-standard-4", False),
        ({"engine": "ctranslate2"}, "n4-standard-2", True),
    ],
)
def test_workers_get_the_second_engine_where_they_use_it(answering, machine_type, uses, tmp_path):
    beam_options = PipelineOptions([f"--machine_type={machine_type}"])
    job_options.stage_helpers(beam_options, str(tmp_path), AnsweringOptions(**answering))
    [wheel] = beam_options.view_as(SetupOptions).extra_packages
    with zipfile.ZipFile(wheel) as content:
        [metadata] = [name for name in content.namelist() if name.endswith("METADATA")]
        lines = content.read(metadata).decode().splitlines()
    asked = [line for line in lines if line.startswith("Requires-Dist: ctranslate2")]
    assert len(asked) == 1
    assert ("extra ==" not in asked[0]) == uses


def test_a_machine_is_chosen_for_what_computes(xl):
    manifest = read_manifest(xl)
    sized = {
        dtype: job_options.size_for_serving(
            xl, manifest, family="c4", **job_options.computing(AnsweringOptions(dtype=dtype))
        )
        for dtype in (None, "float32", "int8")
    }
    assert {one.compute_dtype: one.engine for one in sized.values()} == {
        "bfloat16": "torch",
        "float32": "torch",
        "int8": "ctranslate2",
    }
    weights = {dtype: one.serve.parts["weights"] for dtype, one in sized.items()}
    assert weights["float32"] == 2 * weights[None] == 4 * weights["int8"]


def test_what_is_for_dataflow_alone_is_refused_elsewhere():
    with pytest.raises(pipeline.CommandLineError, match="--max-run-minutes needs --runner=DataflowRunner"):
        pipeline.run(
            [
                "--messages-topic=projects/my-project/topics/m",
                "--responses-topic=projects/my-project/topics/r",
                "--state-dict-path=x.pt",
                "--model-name=m",
                "--max-run-minutes=5",
            ]
        )


def test_a_state_dict_that_is_not_there_is_told_before_anything_is_submitted(tmp_path):
    with pytest.raises(SystemExit, match=r"error: .*manifest.json does not exist: .*load_state_dict"):
        main(published_command(str(tmp_path / "none.pt")))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("ask-google/flan-t5-small-1", "ask-google-flan-t5-small-1"),
        ("Load It!", "load-it"),
        ("7 dwarfs", "job-7-dwarfs"),
        ("x" * 70, "x" * 63),
        ("/", "job"),
    ],
)
def test_job_names_become_valid(text, name):
    assert valid_job_name(text) == name


def test_label_values_become_valid():
    assert label_value("google/FLAN-t5.xl ") == "google-flan-t5-xl"
    assert len(label_value("x" * 99)) == 63


@pytest.mark.parametrize(
    "label", ["Team=ml", "team=ML Ops", "team=a.b", "team=" + "x" * 64, "goog-x=y", "=x"]
)
def test_a_label_that_dataflow_refuses_is_refused_before_it_is_asked(label, capture):
    with pytest.raises(OptionError, match="is not a label: write KEY=VALUE"):
        capture(f"--labels={label}")
    assert capture("--labels=team=ml_1-a")["labels"]["team"] == "ml_1-a"


def test_labels_may_be_a_json_object_as_beam_takes_them(capture):
    labels = capture('--labels={"team": "ml", "mass": "1_3kg"}', "--labels=step=try")["labels"]
    assert labels["series"] == "streaming-llm"
    assert (labels["team"], labels["mass"], labels["step"]) == ("ml", "1_3kg", "try")
    for wrong in ('{"team"', '{"Team": "ml"}'):
        with pytest.raises(OptionError, match="--labels"):
            capture(f"--labels={wrong}")


def test_workers_without_an_image_install_the_tested_versions(tmp_path):
    options = PipelineOptions(["--machine_type=n4-standard-2"])
    job_options.stage_helpers(options, str(tmp_path), AnsweringOptions(), "https://torch.example/cpu")
    setup = options.view_as(SetupOptions)
    lines = Path(setup.requirements_file).read_text().splitlines()
    assert lines[0] == "--extra-index-url https://torch.example/cpu"
    assert any(line.startswith("torch==") for line in lines)
    assert any(line.startswith("transformers==") for line in lines)
    assert setup.requirements_cache == "skip", "Beam would take the index for a package"


def test_an_image_or_a_requirements_file_of_ones_own_is_left_alone(tmp_path):
    for own in ("--sdk_container_image=gcr.io/p/w:1", "--requirements_file=mine.txt"):
        options = PipelineOptions([own])
        job_options.stage_helpers(options, str(tmp_path), AnsweringOptions())
        assert options.view_as(SetupOptions).requirements_file in (None, "mine.txt")


def test_dataflow_itself_is_told_the_time_limit_too():
    cloud = PipelineOptions(["--dataflow_service_options=a=b"]).view_as(GoogleCloudOptions)
    job_options._set_time_limit(cloud, 30)
    assert cloud.dataflow_service_options == ["a=b", "max_workflow_runtime_walltime_seconds=3600"]
    job_options._set_time_limit(cloud, 50)
    assert len(cloud.dataflow_service_options) == 2, "the user's own stays"


def test_a_persistent_disk_on_a_machine_that_takes_none_is_refused(capture):
    for disk in ("pd-ssd", "compute.googleapis.com/projects//zones//diskTypes/pd-standard"):
        with pytest.raises(OptionError, match="take no Persistent Disk"):
            capture("--machine_type=n4-highmem-4", f"--worker_disk_type={disk}")
    capture("--machine_type=n2-highmem-4", "--worker_disk_type=pd-ssd")
