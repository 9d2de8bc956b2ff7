"""The catalogue of machine types, and the choice of the smallest that fits."""

import pytest

from helpers.sizing import machine_types
from helpers.sizing.machine_types import GIB, MachineTypeError, cost, get, smallest, smallest_gpu


@pytest.mark.parametrize(
    ("name", "vcpus", "memory_gb"),
    [
        ("e2-highcpu-32", 32, 32),
        ("n2-standard-48", 48, 192),
        ("n2-highmem-128", 128, 864),
        ("n2d-standard-224", 224, 896),
        ("n4-highcpu-80", 80, 160),
        ("c3-highmem-176", 176, 1408),
        ("c4-standard-2", 2, 7),
        ("c4-highmem-2", 2, 15),
        ("c4-highmem-192", 192, 1488),
        ("a2-ultragpu-1g", 12, 170),
    ],
)
def test_sizes_are_those_of_the_documentation(name, vcpus, memory_gb):
    assert (get(name).vcpus, get(name).memory_gb) == (vcpus, memory_gb)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "n4-standard-8",
            "c4-standard-288",
            "n2-custom-4-16384",
            "custom-2-8192-ext",
            "e2-medium",
            "f1-micro",
        ),
        *(
            "c3-standard-8-lssd",
            "n1-standard-1",
            "m3-ultramem-32",
            "e2-custom-micro-1024",
            "z3-highmem-192-highlssd-metal",
            "a4-highgpu-8g",
            "ct5lp-hightpu-4t",
        ),
    ],
)
def test_a_name_that_could_be_a_machine_type_is_taken(name):
    machine_types.check_machine_type(name)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("n4-standard-3", "its sizes are 2, 4, 8"),
        ("n4-standard-2000", "its sizes are 2, 4, 8"),
        ("n4-standart-4", "n4 has standard, highmem, highcpu"),
        ("large", "one is called n4-standard-4"),
        ("n4-standard", "one is called n4-standard-4"),
        ("n4-standard-08", "one is called"),
        ("n4-standard-²", "one is called"),
        ("", "one is called"),
    ],
)
def test_a_name_that_cannot_be_is_refused_with_a_hint(name, hint):
    with pytest.raises(MachineTypeError, match=f"There is no machine type '{name}': {hint}"):
        machine_types.check_machine_type(name)


def test_every_machine_of_the_catalogue_has_a_name_that_is_taken():
    for name in machine_types.CATALOGUE:
        machine_types.check_machine_type(name)


def test_every_family_is_in_the_catalogue():
    families = {machine.family for machine in machine_types.CATALOGUE.values()}
    assert families == {"e2", "n2", "n2d", "n4", "c3", "c4", "g2", "a2", "a3"}
    assert all(machine.name == name for name, machine in machine_types.CATALOGUE.items())


def test_gpu_machines_and_only_they_have_gpus_with_memory():
    for machine in machine_types.CATALOGUE.values():
        has_gpu = machine.family in machine_types.GPU_FAMILIES
        assert has_gpu == bool(machine.gpu) == bool(machine.gpu_count) == bool(machine.gpu_memory_gb)


@pytest.mark.parametrize(
    ("gigabytes", "family", "expected"),
    [
        (1, "n2", "n2-standard-2"),  # never highcpu-2 with its 2 GB
        (9, "n2", "n2-highmem-2"),
        (9, "c3", "c3-standard-4"),
        (7, "c3", "c3-highcpu-4"),
        (40, "n2", "n2-highmem-8"),  # not n2-highcpu-48, which has less memory and 40 more vCPUs
        (20, "e2", "e2-highmem-4"),
        (100, "e2", "e2-highmem-16"),
    ],
)
def test_the_fewest_vcpus_win_and_then_the_least_memory(gigabytes, family, expected):
    assert smallest(gigabytes * GIB, family=family).name == expected


def test_exactly_full_does_not_fit():
    assert smallest(8 * GIB - 1, family="n4").name == "n4-standard-2"
    assert smallest(8 * GIB, family="n4").name == "n4-highmem-2"


def test_headroom_stays_free():
    assert smallest(7 * GIB, family="n4", headroom=0.1).name == "n4-standard-2"
    assert smallest(7 * GIB, family="n4", headroom=0.15).name == "n4-highmem-2"


@pytest.mark.parametrize("headroom", [-0.1, 1, 1.5, float("nan")])
def test_a_headroom_that_is_no_share_is_refused(headroom):
    with pytest.raises(MachineTypeError, match="headroom"):
        smallest(GIB, headroom=headroom)
    with pytest.raises(MachineTypeError, match="headroom"):
        smallest_gpu(GIB, headroom=headroom)


def test_too_large_for_a_family_names_one_that_has_such_a_machine():
    with pytest.raises(MachineTypeError, match=r"e2-standard-32, 128 GB.*n4 family.*640 GB"):
        smallest(200 * GIB, family="e2")


def test_too_large_for_every_family_says_where_to_look():
    with pytest.raises(MachineTypeError, match="memory-optimized"):
        smallest(10_000 * GIB, family="n2")


def test_unknown_families_are_refused_with_those_there_are():
    with pytest.raises(MachineTypeError, match=r"'x9'.*n2d.*g2"):
        smallest(GIB, family="x9")
    with pytest.raises(MachineTypeError, match="smallest_gpu"):
        smallest(GIB, family="g2")
    with pytest.raises(MachineTypeError, match=r"'n2'.*g2, a2, a3"):
        smallest_gpu(GIB, family="n2")


@pytest.mark.parametrize(
    ("gigabytes", "expected"),
    [(10, "g2-standard-4"), (30, "a2-highgpu-1g"), (60, "a2-ultragpu-1g")],
)
def test_the_smallest_gpu_that_holds_the_model(gigabytes, expected):
    assert smallest_gpu(gigabytes * 10**9).name == expected


def test_a_gpu_machine_has_the_memory_that_its_host_needs():
    assert smallest_gpu(10 * 10**9, host_memory_bytes=20 * GIB).name == "g2-standard-8"


def test_a_model_too_large_for_a_familys_gpu_is_sent_to_the_next_family():
    with pytest.raises(MachineTypeError, match="a2 family"):
        smallest_gpu(60 * 10**9, family="g2")
    for size, family in ((200, "a3"), (100, None)):  # A3 is not to be had for the asking
        with pytest.raises(MachineTypeError, match="any single GPU"):
            smallest_gpu(size * 10**9, family=family)
    assert smallest_gpu(100 * 10**9, family="a3").name == "a3-ultragpu-8g"


def test_an_unknown_machine_type_is_refused():
    with pytest.raises(MachineTypeError, match="'n2-standard-3'"):
        get("n2-standard-3")


def test_cost_multiplies_the_price_that_was_given():
    assert cost(0.5, hours=3, workers=2) == 3.0
    for wrong in ((-1,), (float("nan"),), (1, -1), (1, 1, 0)):
        with pytest.raises(ValueError, match="price"):
            cost(*wrong)
