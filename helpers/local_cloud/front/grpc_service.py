"""A gRPC service made of ordinary methods over the Google clients' own protobuf types."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import grpc

from .fields import Fields, refused_in_message
from .permissions import Permissions, denied_text, email

_CANCELLED = 5  # JOB_STATE_CANCELLED


class RpcError(Exception):
    """The failure of a call: the gRPC status its client sees, and the message that goes with it.

    A method raises this wherever it finds the fault, even while it holds a lock: the lock is released on the
    way out, and only then is the call ended.
    """

    def __init__(self, code: grpc.StatusCode, message: str):
        super().__init__(message)
        self.code = code


def not_found(message: str) -> RpcError:
    return RpcError(grpc.StatusCode.NOT_FOUND, message)


def already_exists(message: str) -> RpcError:
    return RpcError(grpc.StatusCode.ALREADY_EXISTS, message)


def invalid_argument(message: str) -> RpcError:
    return RpcError(grpc.StatusCode.INVALID_ARGUMENT, message)


def failed_precondition(message: str) -> RpcError:
    return RpcError(grpc.StatusCode.FAILED_PRECONDITION, message)


def unimplemented(message: str) -> RpcError:
    return RpcError(grpc.StatusCode.UNIMPLEMENTED, f"The local cloud does not imitate this: {message}")


def add_service(
    server: grpc.Server,
    name: str,
    methods: Mapping[Callable[[Any, grpc.ServicerContext], Any], type],
    tables: Mapping[str, Fields],
    permissions: Permissions,
    streaming: Mapping[Callable[[Any, grpc.ServicerContext], Any], type] | None = None,
) -> None:
    """Adds a service to a server.

    Args:
      server: a server that has not been started yet.
      name: the service's full name, such as `google.pubsub.v1.Publisher`.
      methods: maps each method, named after its RPC, to the protobuf class of its request. The method takes
        the request and the call's context, and returns the protobuf message of the answer.
      tables: what becomes of the fields of each RPC's request, by the RPC's name.
      permissions: of the accounts that call.
      streaming: the same for RPCs that take an iterator of requests and yield answers.
    """
    service = name.removeprefix("google.").removeprefix("cloud.").split(".")[0]
    handlers = {
        method.__name__: grpc.unary_unary_rpc_method_handler(
            _answer(method, tables[method.__name__], service, permissions), request.FromString, _serialize
        )
        for method, request in methods.items()
    }
    for method, request in (streaming or {}).items():
        handlers[method.__name__] = grpc.stream_stream_rpc_method_handler(
            _answer_stream(method, tables[method.__name__], service, permissions),
            request.FromString,
            _serialize,
        )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))


def _serialize(message: Any) -> bytes:
    return message.SerializeToString()


def check_permission(permissions: Permissions, service: str, call: str, request: Any, context: Any) -> None:
    """Raises RpcError if the caller may not make a call."""
    account = permissions.account_of(dict(context.invocation_metadata()).get("authorization"))
    if permission := permissions.missing(account, call):
        resource = getattr(request, "parent", "") or getattr(request, "name", "")
        address = email(account, permissions.project)
        text = denied_text(service, permission, permissions.project, address, resource)
        raise RpcError(grpc.StatusCode.PERMISSION_DENIED, text)


def _answer(method: Callable, table: Fields, service: str, permissions: Permissions) -> Callable:
    def call(request: Any, context: grpc.ServicerContext) -> Any:
        try:
            name = method.__name__
            if name == "UpdateJob" and request.job.requested_state == _CANCELLED:
                name = "CancelJob"  # which has a permission of its own
            check_permission(permissions, service, name, request, context)
            return method(_checked(request, method, table), context)
        except RpcError as error:
            context.abort(error.code, str(error))

    return call


def _answer_stream(method: Callable, table: Fields, service: str, permissions: Permissions) -> Callable:
    def call(requests: Any, context: grpc.ServicerContext) -> Any:
        try:
            check_permission(permissions, service, method.__name__, None, context)
            yield from method((_checked(request, method, table) for request in requests), context)
        except RpcError as error:
            context.abort(error.code, str(error))

    return call


def _checked(request: Any, method: Callable, table: Fields) -> Any:
    if path := refused_in_message(request, table):
        raise unimplemented(f"the field {path} of {method.__name__}.")
    return request
