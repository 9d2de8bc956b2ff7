"""Dataflow jobs of the local cloud, submitted with Beam's own DataflowRunner."""

import itertools
import os
import signal
import subprocess
import sys
import textwrap
import time

import apache_beam as beam
import psutil
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.dataflow.dataflow_runner import DataflowRunner
from apache_beam.runners.dataflow.internal.apiclient import DataflowJobAlreadyExistsError
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.transforms.periodicsequence import PeriodicImpulse
from google.api_core import exceptions
from google.cloud import dataflow_v1beta3 as dataflow
from google.cloud import pubsub_v1, storage
from google.protobuf import field_mask_pb2, struct_pb2

from helpers.dataflow import Job
from helpers.local_cloud.dataflow.dataflow_worker import bundles, graph

REGION = "us-central1"
BUCKET = "dataflow-test"
State = dataflow.JobState
ENDED = {"DONE", "FAILED", "CANCELLED", "UPDATED", "DRAINED"}
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def bucket(cloud):
    return storage.Client(project=cloud.project).create_bucket(BUCKET)


@pytest.fixture
def jobs(cloud, bucket):
    """Submits jobs; those that still run are cancelled at the end."""
    submitted = Jobs(cloud.project)
    yield submitted
    submitted.cancel_all()


@pytest.fixture
def pubsub(cloud):
    client = Messages(cloud.project)
    yield client
    client.close()


class Jobs:
    def __init__(self, project):
        self.project = project
        self.jobs = dataflow.JobsV1Beta3Client()
        self._messages = dataflow.MessagesV1Beta3Client()
        self._submitted = []

    def submit(self, build, *arguments, name=None, streaming=True):
        """Builds a pipeline and submits it; returns Beam's result."""
        options = PipelineOptions(
            [
                f"--project={self.project}",
                f"--region={REGION}",
                f"--temp_location=gs://{BUCKET}/temp",
                f"--job_name={name or f'job-{next(_numbers)}'}",
                "--labels=made-by=test",
                *(["--streaming"] if streaming else []),
                *arguments,
            ]
        )
        pipeline = beam.Pipeline(runner=DataflowRunner(), options=options)
        build(pipeline)
        result = pipeline.run()
        self._submitted.append(result.job_id())
        return result

    def of(self, request, job_id, **fields):
        return request(project_id=self.project, location=REGION, job_id=job_id, **fields)

    def get(self, job_id):
        return self.jobs.get_job(self.of(dataflow.GetJobRequest, job_id))

    def state(self, job_id):
        return self.get(job_id).current_state.name.removeprefix("JOB_STATE_")

    def ask(self, job_id, state):
        job = dataflow.Job(requested_state=State[f"JOB_STATE_{state}"])
        return self.jobs.update_job(self.of(dataflow.UpdateJobRequest, job_id, job=job))

    def drain(self, job_id):
        wait_until(lambda: self._may_drain(job_id))
        self.wait_for(job_id, "DRAINED")

    def _may_drain(self, job_id):
        try:
            return self.ask(job_id, "DRAINED")
        except exceptions.FailedPrecondition:  # it is not ready yet
            return None

    def wait_for(self, job_id, state, seconds=300):
        end = time.monotonic() + seconds
        while (now := self.state(job_id)) != state:
            if now in ENDED or time.monotonic() > end:
                pytest.fail(f"job {job_id} is {now}, not {state}: {self.messages(job_id)[-3:]}")
            time.sleep(0.1)

    def messages(self, job_id, importance="BASIC"):
        request = self.of(
            dataflow.ListJobMessagesRequest,
            job_id,
            minimum_importance=dataflow.JobMessageImportance[f"JOB_MESSAGE_{importance}"],
        )
        return [m.message_text for m in self._messages.list_job_messages(request)]

    def cancel_all(self):
        for job_id in self._submitted:
            if self.state(job_id) not in ENDED:
                self.ask(job_id, "CANCELLED")
        for job_id in self._submitted:
            wait_until(lambda job_id=job_id: self.state(job_id) in ENDED)


class Messages:
    """Topics with a subscription each, for one test."""

    def __init__(self, project):
        self.project = project
        self._publisher = pubsub_v1.PublisherClient()
        self._subscriber = pubsub_v1.SubscriberClient()
        self._made = []

    def make(self, name):
        """A new topic and its subscription."""
        unique = f"{name}-{next(_numbers)}"
        topic = f"projects/{self.project}/topics/{unique}"
        subscription = f"projects/{self.project}/subscriptions/{unique}"
        self._publisher.create_topic(name=topic)
        self._subscriber.create_subscription(name=subscription, topic=topic)
        self._made.append((topic, subscription))
        return topic, subscription

    def publish(self, topic, texts):
        """Returns the messages' ids."""
        futures = [self._publisher.publish(topic, text.encode(), source="test") for text in texts]
        return [future.result(300) for future in futures]

    def collect(self, subscription, count, seconds=300):
        """Pulls and acknowledges until `count` messages have come or the time is up."""
        collected, end = [], time.monotonic() + seconds
        while len(collected) < count and time.monotonic() < end:
            try:
                received = self._subscriber.pull(
                    subscription=subscription, max_messages=1000, timeout=2, retry=None
                ).received_messages
            except exceptions.DeadlineExceeded:
                if count == sys.maxsize:
                    break
                continue
            if received:
                ack_ids = [m.ack_id for m in received]
                self._subscriber.acknowledge(subscription=subscription, ack_ids=ack_ids)
                collected += [m.message for m in received]
        return collected

    def collect_rest(self, subscription):
        """What is left in a subscription."""
        return self.collect(subscription, sys.maxsize)

    def has_subscription_of(self, job_id):
        """Whether the subscription is there that a job has made for the topic that it reads."""
        name = f"projects/{self.project}/subscriptions/dataflow-{job_id}-0"
        try:
            return bool(self._subscriber.get_subscription(subscription=name))
        except exceptions.NotFound:
            return False

    def close(self):
        for topic, subscription in self._made:
            self._publisher.delete_topic(topic=topic)
            self._subscriber.delete_subscription(subscription=subscription)
        self._publisher.stop()
        self._subscriber.close()


def wait_until(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def worker_pids(cloud):
    pids = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if "dataflow_worker" in command and any(str(cloud.folder) in part for part in command):
            pids.append(process.pid)
    return pids


def echo(pause=0.0, fail_on=""):
    """A DoFn that answers a message with its text and its id; made here, it is pickled by value."""

    class Echo(beam.DoFn):
        answered = beam.metrics.Metrics.counter("test", "answered")
        lengths = beam.metrics.Metrics.distribution("test", "length")

        def process(self, message):
            text = message.data.decode()
            if fail_on and text == fail_on:
                raise ValueError(f"cannot answer {text}")
            time.sleep(pause)
            self.answered.inc()
            self.lengths.update(len(text))
            attributes = {**message.attributes, "prompt": message.message_id}
            yield beam.io.PubsubMessage(message.data, attributes)

    return Echo()


def stream(source, responses, function):
    """A pipeline from a subscription to a topic."""

    def build(pipeline):
        _ = (
            pipeline
            | "Read" >> beam.io.ReadFromPubSub(subscription=source, with_attributes=True)
            | "Answer" >> beam.ParDo(function)
            | "Write" >> beam.io.WriteToPubSub(responses, with_attributes=True)
        )

    return build


def test_a_batch_job_runs_with_its_package_and_writes_output_and_metrics(jobs, bucket, tmp_path, monkeypatch):
    setup = package(tmp_path, "set_up_package")
    monkeypatch.syspath_prepend(tmp_path)
    import set_up_package

    def build(pipeline):
        class Answer(beam.DoFn):
            words = beam.metrics.Metrics.counter("test", "words")

            def process(self, word):
                self.words.inc()
                yield set_up_package.answer(word)

        words = pipeline | beam.Create(["one", "two", "two"]) | "Answer" >> beam.ParDo(Answer())
        counts = words | beam.combiners.Count.PerElement() | beam.Map(lambda pair: f"{pair[0]}: {pair[1]}")
        _ = counts | beam.io.WriteToText(f"gs://{BUCKET}/output/words", shard_name_template="")

    result = jobs.submit(build, f"--setup_file={setup}", streaming=False)
    jobs.wait_for(result.job_id(), "DONE")
    written = bucket.blob("output/words").download_as_text().split("\n")
    assert sorted(written) == ["", "answer to one: 1", "answer to two: 2"]
    (counter,) = metrics_of(result)["counters"]
    assert (counter.key.step, counter.key.metric.name, counter.committed) == ("Answer", "words", 3)
    with pytest.raises(exceptions.FailedPrecondition):
        jobs.ask(result.job_id(), "CANCELLED")


def metrics_of(result):
    """What Beam's client makes of the job's metrics."""
    return result.metrics().query()


def test_a_failing_batch_job_ends_with_its_traceback_in_its_messages(jobs):
    def build(pipeline):
        _ = pipeline | beam.Create([1]) | "Divide" >> beam.Map(lambda x: x / 0)

    job_id = jobs.submit(build, streaming=False).job_id()
    jobs.wait_for(job_id, "FAILED")
    (error,) = jobs.messages(job_id, "ERROR")
    assert "Traceback" in error
    assert "ZeroDivisionError" in error
    with pytest.raises(exceptions.FailedPrecondition, match="FAILED"):
        jobs.ask(job_id, "DRAINED")


def test_a_drained_streaming_job_loses_nothing(cloud, jobs, pubsub):
    prompts, source = pubsub.make("prompts")
    responses, answers = pubsub.make("responses")
    result = jobs.submit(stream(source, responses, echo(pause=0.1)), name="drained")
    job_id = result.job_id()
    jobs.wait_for(job_id, "RUNNING")
    ids = pubsub.publish(prompts, [f"prompt {i}" for i in range(1000)])
    answered = pubsub.collect(answers, 100)

    with pytest.raises(DataflowJobAlreadyExistsError, match="already active job named drained"):
        jobs.submit(stream(source, responses, echo()), name="drained")
    active = dataflow.ListJobsRequest.Filter.ACTIVE
    (listed,) = jobs.jobs.list_jobs(
        dataflow.ListJobsRequest(project_id=cloud.project, location=REGION, filter=active)
    )
    assert (listed.id, dict(listed.labels)) == (job_id, {}), "a list holds summaries"
    assert dict(jobs.get(job_id).labels) == {"made-by": "test"}

    jobs.drain(job_id)
    answered += pubsub.collect_rest(answers)
    left = pubsub.collect_rest(source)
    assert 100 <= len(answered) < 1000
    assert sorted([m.attributes["prompt"] for m in answered] + [m.message_id for m in left]) == sorted(ids)
    assert {m.attributes["source"] for m in answered} == {"test"}

    found = metrics_of(result)
    (counter,), (distribution,) = found["counters"], found["distributions"]
    assert (counter.key.step, counter.committed) == ("Answer", len(answered))
    assert distribution.committed.count == len(answered)
    assert distribution.committed.min == len("prompt 0")
    with pytest.raises(exceptions.FailedPrecondition, match="DRAINED"):
        jobs.ask(job_id, "DRAINED")
    assert worker_pids(cloud) == []


def test_a_killed_worker_is_replaced_and_loses_nothing(cloud, jobs, pubsub):
    prompts, source = pubsub.make("prompts")
    responses, answers = pubsub.make("responses")
    job_id = jobs.submit(stream(source, responses, echo(pause=0.01))).job_id()
    jobs.wait_for(job_id, "RUNNING")
    ids = pubsub.publish(prompts, [str(i) for i in range(500)])
    answered = {m.attributes["prompt"] for m in pubsub.collect(answers, 50)}
    (pid,) = worker_pids(cloud)
    os.kill(pid, signal.SIGKILL)
    end = time.monotonic() + 90
    while len(answered) < len(ids) and time.monotonic() < end:
        answered |= {m.attributes["prompt"] for m in pubsub.collect(answers, 1, seconds=5)}
    assert answered == set(ids), jobs.messages(job_id, "BASIC")
    assert any("SIGKILL" in text for text in jobs.messages(job_id, "WARNING"))
    jobs.drain(job_id)
    # What was answered and not yet acknowledged when the worker was killed may come again.
    assert {m.message_id for m in pubsub.collect_rest(source)} <= answered


def test_a_message_that_always_fails_comes_again_and_lets_others_pass(jobs, pubsub):
    prompts, source = pubsub.make("prompts")
    responses, answers = pubsub.make("responses")
    job_id = jobs.submit(stream(source, responses, echo(fail_on="bad"))).job_id()
    jobs.wait_for(job_id, "RUNNING")
    pubsub.publish(prompts, ["bad" if i == 20 else "good" for i in range(50)])
    assert {m.data for m in pubsub.collect(answers, 49)} == {b"good"}
    errors = jobs.messages(job_id, "ERROR")
    assert "ValueError: cannot answer bad" in errors[0]
    jobs.ask(job_id, "CANCELLED")
    jobs.wait_for(job_id, "CANCELLED")
    # Messages that were answered but, because of the cancellation, not acknowledged may come with it.
    left: set[bytes] = set()
    for _ in range(3):
        if b"bad" not in left:
            left |= {m.data for m in pubsub.collect(source, 1, seconds=20)}
    assert b"bad" in left


def buffering(source, responses, build_buffer):
    """A pipeline whose messages wait in its state before they are published."""

    def build(pipeline):
        _ = (
            pipeline
            | beam.io.ReadFromPubSub(subscription=source)
            | beam.Map(lambda text: (text[:1], text))
            | "Wait" >> build_buffer()
            | "Write" >> beam.io.WriteToPubSub(responses)
        )

    return build


def test_an_update_puts_new_code_in_the_old_ones_place_and_loses_nothing(jobs, pubsub):
    prompts, _ = pubsub.make("prompts")
    responses, answers = pubsub.make("responses")

    def version(number):
        def build(pipeline):
            texts = pipeline | beam.io.ReadFromPubSub(topic=prompts)
            labelled = texts | beam.Map(lambda text: text + f" from version {number}".encode())
            _ = labelled | beam.io.WriteToPubSub(responses)

        return build

    old = jobs.submit(version(1), name="updated").job_id()
    jobs.wait_for(old, "RUNNING")
    pubsub.publish(prompts, [str(i) for i in range(50)])
    answered = pubsub.collect(answers, 50)
    new = jobs.submit(version(2), "--update", name="updated").job_id()
    pubsub.publish(prompts, [str(i) for i in range(50, 100)])
    jobs.wait_for(old, "UPDATED")
    assert jobs.state(new) == "RUNNING"
    assert jobs.get(old).replaced_by_job_id == new
    pubsub.publish(prompts, [str(i) for i in range(100, 150)])
    answered += pubsub.collect(answers, 100)
    texts = {m.data.decode().split(" from version ")[0]: m.data[-1:] for m in answered}
    assert texts.keys() == {str(i) for i in range(150)}
    assert {texts[str(i)] for i in range(50)} == {b"1"}
    assert {texts[str(i)] for i in range(100, 150)} == {b"2"}
    assert pubsub.has_subscription_of(old), "the new job reads it"
    jobs.drain(new)
    assert not pubsub.has_subscription_of(old)


@pytest.mark.slow
def test_a_job_whose_workers_all_break_down_fails_and_leaves_no_subscription(jobs, pubsub):
    prompts, _ = pubsub.make("prompts")

    def build(pipeline):
        def break_down(_):
            import os
            import signal

            os.kill(os.getpid(), signal.SIGKILL)

        _ = pipeline | beam.io.ReadFromPubSub(topic=prompts) | beam.Map(break_down)

    job_id = jobs.submit(build).job_id()
    jobs.wait_for(job_id, "RUNNING")
    pubsub.publish(prompts, ["deadly"])
    jobs.wait_for(job_id, "FAILED", seconds=300)
    assert "on signal SIGKILL" in jobs.messages(job_id, "ERROR")[-1]
    assert not pubsub.has_subscription_of(job_id)


@pytest.mark.slow
def test_ten_thousand_messages_go_through_and_memory_stays_flat(cloud, jobs, pubsub, capsys):
    prompts, source = pubsub.make("prompts")
    responses, answers = pubsub.make("responses")
    dead_letters, failures = pubsub.make("dead-letters")

    def build(pipeline):
        class Answer(beam.DoFn):
            def process(self, text):
                if text.startswith(b"bad"):
                    yield beam.pvalue.TaggedOutput("bad", text + b": it is bad")
                else:
                    yield b"answer to " + text

        texts = pipeline | beam.io.ReadFromPubSub(subscription=source)
        answer = beam.ParDo(Answer()).with_output_types(bytes)
        outputs = texts | answer.with_outputs("bad", main="good")
        _ = outputs.good | "Answers" >> beam.io.WriteToPubSub(responses)
        _ = outputs.bad | "Dead letters" >> beam.io.WriteToPubSub(dead_letters)

    job_id = jobs.submit(build).job_id()
    jobs.wait_for(job_id, "RUNNING")
    (pid,) = worker_pids(cloud)
    memory, start, answered = [], time.monotonic(), []
    for part in range(10):
        numbers = range(part * 1000, (part + 1) * 1000)
        pubsub.publish(prompts, [f"bad {i}" if i % 20 == 0 else f"good {i}" for i in numbers])
        answered += pubsub.collect(answers, 950)
        memory.append(psutil.Process(pid).memory_info().rss / 1e6)
    rejected = pubsub.collect(failures, 500)
    seconds = time.monotonic() - start
    jobs.drain(job_id)
    with capsys.disabled():
        print(f"\n10,000 messages in {seconds:.0f} s; worker memory in MB: {[round(m) for m in memory]}")
    assert len(answered) == 9500
    assert len({m.data for m in answered}) == 9500
    assert sorted(m.data for m in rejected) == sorted(b"bad %d: it is bad" % i for i in range(0, 10000, 20))
    assert pubsub.collect_rest(source) == []
    assert memory[-1] < memory[1] * 1.1


def package(folder, name):
    """A source package whose module has a function `answer`; the module can be imported here."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(
        textwrap.dedent(
            """
            def answer(text):
                return f"answer to {text}"
            """
        )
    )
    setup = folder / "setup.py"
    setup.write_text(
        f"from setuptools import setup\nsetup(name='{name}', version='1', packages=['{name}'])\n"
    )
    return setup


def test_a_job_whose_package_was_not_staged_fails_for_that_reason(jobs, pubsub, tmp_path, monkeypatch):
    package(tmp_path, "not_staged")
    monkeypatch.syspath_prepend(tmp_path)
    import not_staged

    _, source = pubsub.make("prompts")

    def build(pipeline):
        _ = pipeline | beam.io.ReadFromPubSub(subscription=source) | beam.Map(not_staged.answer)

    job_id = jobs.submit(build).job_id()
    jobs.wait_for(job_id, "FAILED")
    (error,) = jobs.messages(job_id, "ERROR")
    assert "ModuleNotFoundError: No module named 'not_staged'" in error


def test_an_extra_package_is_installed_and_a_requirements_file_is_not(jobs, bucket, tmp_path, monkeypatch):
    package(tmp_path, "extra_package")
    monkeypatch.syspath_prepend(tmp_path)
    import extra_package

    def build(pipeline):
        answers = pipeline | beam.Create(["one"]) | beam.Map(extra_package.answer)
        _ = answers | beam.io.WriteToText(f"gs://{BUCKET}/output/extra", shard_name_template="")

    requirements = tmp_path / "requirements.txt"
    requirements.write_text("a-package-that-is-nowhere\n")
    arguments = [f"--extra_package={wheel(tmp_path)}", f"--requirements_file={requirements}"]
    job_id = jobs.submit(build, *arguments, "--requirements_cache=skip", streaming=False).job_id()
    jobs.wait_for(job_id, "DONE")
    assert bucket.blob("output/extra").download_as_text() == "answer to one\n"
    assert "a-package-that-is-nowhere" in jobs.messages(job_id, "WARNING")[0]


def wheel(folder):
    options = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(folder)], check=True)
    return next(folder.glob("*.whl"))


def test_a_streaming_job_on_a_missing_resource_fails_and_names_it(jobs, pubsub):
    responses, source = pubsub.make("present")
    absent_source = source.rpartition("/")[0] + "/absent-subscription"
    absent_topic = responses.rpartition("/")[0] + "/absent-topic"
    unread = jobs.submit(stream(absent_source, responses, echo())).job_id()
    unwritten = jobs.submit(stream(source, absent_topic, echo())).job_id()
    jobs.wait_for(unread, "FAILED")
    jobs.wait_for(unwritten, "FAILED")
    assert "absent-subscription" in jobs.messages(unread, "ERROR")[0]
    assert "absent-topic" in jobs.messages(unwritten, "ERROR")[0]


def test_requests_that_make_no_sense_are_refused(cloud, jobs, bucket):
    def create(**fields):
        job = dataflow.Job(**fields)
        request = dataflow.CreateJobRequest(project_id=cloud.project, location=REGION, job=job)
        return jobs.jobs.create_job(request)

    with pytest.raises(exceptions.InvalidArgument, match="job name"):
        create(name="Not A Name")
    with pytest.raises(exceptions.InvalidArgument, match="no staged pipeline"):
        create(name="no-pipeline")
    options = struct_pb2.Struct()
    options.update({"options": {"pipelineUrl": f"gs://{BUCKET}/absent.pb"}})
    with pytest.raises(exceptions.InvalidArgument, match=r"absent\.pb does not exist"):
        create(name="absent", environment=dataflow.Environment(sdk_pipeline_options=options))
    for labels in ({"Team": "ml"}, {"team": "ML Ops"}, {"goog-x": "y"}, {"team": "x" * 64}):
        with pytest.raises(exceptions.InvalidArgument, match="is invalid: it has up to 63"):
            create(name="labelled", labels=labels)
    with pytest.raises(exceptions.NotFound, match="2020-01-01"):
        jobs.get("2020-01-01_00_00_00-1")


def test_runtime_parameters_of_a_streaming_job_are_updated(jobs, pubsub):
    _, source = pubsub.make("prompts")
    responses, _ = pubsub.make("responses")
    job_id = jobs.submit(stream(source, responses, echo())).job_id()

    def update(paths, **parameters):
        job = dataflow.Job(runtime_updatable_params=dataflow.RuntimeUpdatableParams(**parameters))
        mask = field_mask_pb2.FieldMask(paths=[f"runtime_updatable_params.{path}" for path in paths])
        return jobs.jobs.update_job(jobs.of(dataflow.UpdateJobRequest, job_id, job=job, update_mask=mask))

    update(["min_num_workers", "max_num_workers"], min_num_workers=2, max_num_workers=4)
    update(["max_num_workers"], max_num_workers=8)
    parameters = jobs.get(job_id).runtime_updatable_params
    assert (parameters.min_num_workers, parameters.max_num_workers) == (2, 8)
    with pytest.raises(exceptions.InvalidArgument, match="contradict"):
        update(["max_num_workers"], max_num_workers=1)
    with pytest.raises(exceptions.InvalidArgument, match="update_mask"):
        mask = field_mask_pb2.FieldMask(paths=["name"])
        jobs.jobs.update_job(jobs.of(dataflow.UpdateJobRequest, job_id, update_mask=mask))


def side_input(pipeline, messages):
    answers = pipeline | "Answers" >> beam.Create([("a", "b")])
    return messages | beam.Map(lambda m, known: known.get(m), known=beam.pvalue.AsDict(answers))


class Remembering(beam.DoFn):
    SEEN = beam.DoFn.StateParam(beam.transforms.userstate.BagStateSpec("seen", beam.coders.BytesCoder()))

    def process(self, element, seen=SEEN):
        seen.add(element[1])


@pytest.mark.parametrize(
    ("expected", "build"),
    [
        (True, lambda _, messages: messages | beam.Map(len)),
        (True, lambda _, messages: messages | beam.Reshuffle() | beam.BatchElements()),
        (False, side_input),
        (False, lambda _, messages: messages | beam.WithKeys(0) | beam.ParDo(Remembering())),
        (False, lambda _, messages: messages | beam.BatchElements(max_batch_duration_secs=1)),
        (False, lambda _, messages: messages | windows() | beam.WithKeys(0) | beam.GroupByKey()),
        (False, lambda p, messages: (messages, p | beam.Create([b"x"])) | beam.Flatten()),
        (False, lambda p, _: p | PeriodicImpulse(fire_interval=60)),
    ],
    ids=[
        "map",
        "reshuffle and batches",
        "side input",
        "state",
        "timed batches",
        "grouping",
        "element made once",
        "another unbounded source",
    ],
)
def test_only_a_pipeline_of_one_stage_without_state_is_imitated(expected, build):
    pipeline = beam.Pipeline(runner=FnApiRunner())
    messages = pipeline | beam.io.ReadFromPubSub(subscription="projects/project/subscriptions/subscription")
    build(pipeline, messages)
    graph_ = pipeline.to_runner_api()
    if expected:
        bundles.Stage(graph_, *graph.sources(graph_)).close()
    else:
        with pytest.raises(ValueError, match="not imitated by the local cloud"):
            bundles.Stage(graph_, *graph.sources(graph_))


def windows():
    return beam.WindowInto(beam.window.FixedWindows(60))


def test_a_worker_dies_with_the_local_cloud(tmp_path):
    code = f"""
import subprocess, sys, time
service = "from helpers.local_cloud.dataflow.dataflow_worker.service import Service"
worker = service + "; import time; Service(1); time.sleep(600)"
started = subprocess.Popen([sys.executable, "-c", worker], stdin=subprocess.PIPE, start_new_session=True)
open({str(tmp_path / "pid")!r}, "w").write(f"{{started.pid}}\\n")
time.sleep(600)
"""
    starter = subprocess.Popen([sys.executable, "-c", code])
    path = tmp_path / "pid"
    wait_until(lambda: path.exists() and path.read_text().endswith("\n"))
    pid = int(path.read_text())
    assert psutil.pid_exists(pid)
    starter.kill()
    starter.wait()
    wait_until(lambda: not psutil.pid_exists(pid))


def test_a_streaming_pipeline_with_state_is_refused_by_name(jobs, pubsub):
    _, source = pubsub.make("stateful")

    def build(pipeline):
        read = pipeline | beam.io.ReadFromPubSub(subscription=source)
        _ = read | beam.BatchElements(max_batch_duration_secs=1) | beam.Map(print)

    job_id = jobs.submit(build).job_id()
    jobs.wait_for(job_id, "FAILED")
    assert "is not imitated by the local cloud" in jobs.messages(job_id, "ERROR")[0]


def test_a_job_that_is_not_ready_to_drain_says_so_and_is_drained_by_asking_again(cloud, jobs, pubsub):
    responses, source = pubsub.make("young")
    job_id = jobs.submit(stream(source, responses, echo())).job_id()
    with pytest.raises(exceptions.FailedPrecondition, match="not yet ready for draining"):
        jobs.ask(job_id, "DRAINED")
    jobs.wait_for(job_id, "RUNNING")
    assert Job(cloud.project, REGION, job_id).drain(timeout=300) == "DRAINED"
    with pytest.raises(exceptions.FailedPrecondition, match="has terminated in state"):
        jobs.ask(job_id, "DRAINED")


def test_an_update_that_lacks_a_step_is_refused_and_the_old_job_goes_on(jobs, pubsub):
    responses, source = pubsub.make("steps")

    def build(name):
        def steps(pipeline):
            read = pipeline | "Read" >> beam.io.ReadFromPubSub(subscription=source)
            _ = read | name >> beam.Map(lambda data: data) | "Write" >> beam.io.WriteToPubSub(responses)

        return steps

    old = jobs.submit(build("Old step"), name="renamed").job_id()
    jobs.wait_for(old, "RUNNING")
    new = jobs.submit(build("New step"), "--update", name="renamed").job_id()
    jobs.wait_for(new, "FAILED")
    assert "missing steps Old step" in jobs.messages(new, "ERROR")[0]
    assert jobs.state(old) == "RUNNING"
    mapping = '--transform_name_mapping={"Old step": "New step"}'
    mapped = jobs.submit(build("New step"), "--update", mapping, name="renamed").job_id()
    jobs.wait_for(mapped, "RUNNING")
    jobs.wait_for(old, "UPDATED")
    jobs.drain(mapped)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--machine_type=n4-standart-2"], "does not exist"),
        (["--machine_type=a3-highgpu-1g"], "Spot or Flex-start"),
        (["--machine_type=n4-standard-2", "--worker_disk_type=pd-ssd"], "not compatible"),
        (["--region=atlantis1"], "not a region"),
    ],
)
def test_workers_that_the_service_refuses_are_refused(arguments, message, jobs, pubsub):
    responses, source = pubsub.make("refused")
    with pytest.raises(Exception, match=message):
        jobs.submit(stream(source, responses, echo()), *arguments)
