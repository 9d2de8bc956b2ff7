"""Each field of a request is honoured, without effect as the page says, or refused by its name."""

import itertools
from importlib.metadata import version

import local_cloud_fields
import pytest
from google.api_core import exceptions
from google.cloud import pubsub_v1
from google.protobuf.descriptor import FieldDescriptor
from local_cloud_fields import PACKAGES, PAGE, SERVICES, request_type

from helpers.local_cloud.cloud_storage import fields as cloud_storage
from helpers.local_cloud.front.fields import (
    REFUSED,
    every_field,
    fields,
    refused_in_json,
    refused_in_message,
)

CALLS = [
    pytest.param(request_type(modules, call), table, id=f"{service} {call}")
    for service, (modules, tables) in SERVICES.items()
    for call, table in tables.items()
]


def test_the_table_of_fields_is_up_to_date():
    text = PAGE.read_text()
    if not all(f"{name} {version(name)}" in text for name in PACKAGES):
        pytest.skip("other versions of the clients")
    assert text == local_cloud_fields.page(), "run python tests/local_cloud_fields.py"


def set_field(message, path: str) -> None:
    """Gives the field at a path some value."""
    *outer, name = path.split(".")
    for part in outer:
        field = message.DESCRIPTOR.fields_by_name[part]
        value = getattr(message, part)
        message = value.add() if field.is_repeated else value
    field = message.DESCRIPTOR.fields_by_name[name]
    value = getattr(message, name)
    if field.message_type and field.message_type.GetOptions().map_entry:
        if field.message_type.fields_by_name["value"].message_type:
            value["key"].SetInParent()
        else:
            value["key"] = "value"
    elif field.message_type:
        inner = value.add() if field.is_repeated else value
        fill(inner)
    else:
        one = {FieldDescriptor.CPPTYPE_STRING: "x", FieldDescriptor.CPPTYPE_BOOL: True}.get(field.cpp_type, 1)
        one = b"x" if field.type == FieldDescriptor.TYPE_BYTES else one
        value.append(one) if field.is_repeated else setattr(message, name, one)


def fill(message) -> None:
    """Sets the first field of a message that can be set, however deep."""
    for field in message.DESCRIPTOR.fields:
        try:
            set_field(message, field.name)
        except RecursionError:
            continue
        if message.ListFields():
            return


@pytest.mark.parametrize(("request_class", "table"), CALLS)
def test_a_field_is_refused_if_and_only_if_the_table_says_so(request_class, table):
    for path, kind in every_field(request_class.DESCRIPTOR, table):
        request = request_class()
        set_field(request, path)
        refused = refused_in_message(request, table)
        assert refused == (path if kind == REFUSED else None), path


def test_every_name_in_a_table_is_a_field():
    for modules, tables in SERVICES.values():
        for call, table in tables.items():
            for path in itertools.chain(table.honoured, table.without_effect, table.refused):
                descriptor = request_type(modules, call).DESCRIPTOR
                for part in path.split("."):
                    assert part in descriptor.fields_by_name, f"{call}: {path}"
                    descriptor = descriptor.fields_by_name[part].message_type


def test_a_call_with_a_refused_field_is_refused_with_its_name(cloud):
    client = pubsub_v1.PublisherClient()
    name = f"projects/{cloud.project}/topics/with-a-tag"
    with pytest.raises(exceptions.MethodNotImplemented, match="the field tags of CreateTopic"):
        client.create_topic(request={"name": name, "tags": {"tagKeys/1": "tagValues/1"}})
    client.stop()


@pytest.mark.parametrize(
    ("content", "path"),
    [
        ({"versioning": {"enabled": True}}, "versioning"),
        ({"versioning": {"enabled": False}}, None),
        ({"encryption": {"defaultKmsKeyName": None}}, None),
        ({"encryption": {"defaultKmsKeyName": "k"}}, "encryption"),
        ({"name": "n", "acl": []}, None),
        ({"acl": [{"entity": "allUsers"}]}, "acl"),
        ({"retentionPolicy": {"retentionPeriod": "5"}}, "retentionPolicy"),
        ({"softDeletePolicy": {"retentionDurationSeconds": "5"}}, None),
        ({"addedLater": 1}, "addedLater"),
    ],
)
def test_fields_of_a_bucket(content, path):
    assert refused_in_json(content, cloud_storage.BUCKET) == path


def test_entries_in_a_field_leave_the_rest_of_it_refused():
    table = fields("a.b", "a.c.d", "")
    assert refused_in_json({"a": {"b": 1, "c": {"d": 1}}}, table) is None
    assert refused_in_json({"a": [{"b": 1}, {"x": 1}]}, table) == "a.x"
    assert refused_in_json({"a": {"c": {"e": 1}}}, table) == "a.c.e"
    assert refused_in_json({"a": 5}, table) == "a"
