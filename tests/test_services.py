"""Machine types by service: what Vertex AI and Dataflow take, here and in the local cloud alike."""

import pytest

from helpers.local_cloud.dataflow.workers import check_worker_pool
from helpers.local_cloud.front.grpc_service import RpcError
from helpers.local_cloud.vertex_ai.job import MACHINE_TYPE
from helpers.sizing import MachineTypeError, machine_types
from helpers.sizing.services import (
    HYPERDISK_FAMILIES,
    NEVER_ON_DEMAND,
    VERTEX_TRAINING,
    check_dataflow_worker,
    check_vertex_training,
)


def test_vertex_ai_takes_no_e2_standard_2():
    """The published sample's first table had it; Google corrected it to e2-standard-4."""
    with pytest.raises(MachineTypeError, match="of e2-standard it takes e2-standard-4, e2-standard-8"):
        check_vertex_training("e2-standard-2")
    check_vertex_training("e2-standard-4")


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("n4-standard-4", "it takes the families e2, n2, n1"),
        ("e2-highmem-32", "e2-highmem-2, e2-highmem-4"),
        ("n2-custom-4-8192", "of n2 it takes n2-standard, n2-highmem"),
        ("", "it takes the families"),
    ],
)
def test_another_type_is_refused_with_those_that_it_takes(name, advice):
    with pytest.raises(MachineTypeError, match=advice):
        check_vertex_training(name)


def test_the_local_vertex_ai_takes_the_same():
    for name in {*machine_types.CATALOGUE, *VERTEX_TRAINING, "n2-standard-96", "c3-standard-4"}:
        assert bool(MACHINE_TYPE.fullmatch(name)) == (name in VERTEX_TRAINING), name


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("c4a-standard-4", "Arm"),
        ("t2a-standard-4", "Arm"),
        ("a3-highgpu-1g", "Spot or Flex-start"),
        ("n4-standart-4", "n4 has standard"),
    ],
)
def test_a_worker_that_a_streaming_job_cannot_have_is_refused(name, advice):
    with pytest.raises(MachineTypeError, match=advice):
        check_dataflow_worker(name)


def test_an_image_of_ones_own_may_be_for_arm():
    check_dataflow_worker("c4a-standard-4", has_own_image=True)


class Pool:
    def __init__(self, machine_type="n4-standard-2", disk_type="", disk_size_gb=30):
        self.machine_type, self.disk_type, self.disk_size_gb = machine_type, disk_type, disk_size_gb


def test_the_local_dataflow_takes_what_the_catalogue_has():
    for name in machine_types.CATALOGUE:
        if name not in NEVER_ON_DEMAND:
            check_worker_pool(Pool(name), is_streaming=True)
    check_worker_pool(Pool("a3-highgpu-1g"), is_streaming=False)


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        (Pool("n4-standart-2"), "does not exist"),
        (Pool("a3-highgpu-2g"), "Spot or Flex-start"),
        (Pool(disk_type="compute.googleapis.com/projects/p/zones/z/diskTypes/pd-ssd"), "not compatible"),
        (Pool(disk_size_gb=20), "at least 30"),
    ],
)
def test_the_local_dataflow_refuses_what_the_service_refuses(pool, message):
    with pytest.raises(RpcError, match=message):
        check_worker_pool(pool, is_streaming=True)


def test_families_without_persistent_disks_are_those_of_the_catalogue():
    assert {"n4", "c4"} <= HYPERDISK_FAMILIES
    assert not HYPERDISK_FAMILIES & {"c3", "n2", "e2"}
