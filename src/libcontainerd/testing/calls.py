"""What every call passes: the record of calls, the faults, and refusals on their way to becoming status codes."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

import grpc
import structlog

from libcontainerd.errors import DeadlineExceededError, InvalidParameterError
from libcontainerd.testing.refusals import Refusal, closing, namespace_in

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from libcontainerd.testing.releases import Release

_log = structlog.get_logger("libcontainerd")

_PENDING: Final = ""


@dataclass(eq=False)
class Call:
    """One call that a client has made.

    Attributes:
        method: Service and method, such as ``Tasks/Start``.
        namespace: The containerd namespace in its header, or nothing.
        request: What it asked; None where the client sends a stream.
        code: The status that it ended with, such as ``OK`` or ``NOT_FOUND``; empty while it goes on.
        details: The text of that status.
    """

    method: str
    namespace: str
    request: Message | None
    code: str = _PENDING
    details: str = ""


class CallLog:
    """The calls, in the order in which they came. Thread-safe."""

    def __init__(self) -> None:
        # Guards the list and every Call in it; innermost. Waiters wait on it.
        self._changed = threading.Condition(threading.Lock())
        self._calls: list[Call] = []

    def all(self, method: str | None = None) -> list[Call]:
        """The calls so far, of one method or of all."""
        with self._changed:
            return [call for call in self._calls if method in (None, call.method)]

    def clear(self) -> None:
        """Forget them."""
        with self._changed:
            self._calls.clear()

    def wait_for(
        self,
        method: str,
        count: int = 1,
        *,
        where: Callable[[Call], bool] = lambda _: True,
        timeout: float = 10.0,
    ) -> Call:
        """Wait for the nth call of a method (that fulfils `where`), and return it.

        Raises:
            DeadlineExceededError: it did not come in time (seconds); the message tells what did.
        """

        def found() -> list[Call]:
            return [call for call in self._calls if call.method == method and where(call)]

        with self._changed:
            if self._changed.wait_for(lambda: len(found()) >= count, timeout):
                return found()[count - 1]
            seen = ", ".join(call.method for call in self._calls[-20:])
        raise DeadlineExceededError(f"call {count} of {method} did not come in {timeout:g} s, but: {seen}")

    def begin(self, call: Call) -> None:
        """Note a call."""
        with self._changed:
            self._calls.append(call)
            self._changed.notify_all()

    def end(self, call: Call, code: str, details: str) -> None:
        """Note how it ended."""
        with self._changed:
            call.code, call.details = code, details
            self._changed.notify_all()


class Fault:
    """What is done to some calls of one method. Made by `FakeContainerd.fail`, `delay` and `hang`. Thread-safe.

    Attributes:
        method: The method, such as ``Tasks/Start``.
        hits: How many calls it has caught.
    """

    def __init__(
        self,
        method: str,
        *,
        refusal: Refusal | None = None,
        seconds: float = 0.0,
        nth: int = 1,
        times: int | None = 1,
        after: bool = False,
        where: Callable[[Message], bool] | None = None,
    ) -> None:
        if nth < 1 or (times is not None and times < 1):
            raise InvalidParameterError(f"nth and times count from 1, not {nth!r} and {times!r}")
        self.method = method
        self.hits = 0
        self.refusal = refusal
        self.seconds = seconds
        self.after = after
        self._nth = nth
        self._times = times
        self._where = where
        self._seen = 0
        self._removed = False
        # Guards the counts; innermost. Waiters wait on it.
        self._changed = threading.Condition(threading.Lock())

    def catches(self, request: Message | None) -> bool:
        """Whether it is this call's turn; counts it."""
        if self._where is not None and (request is None or not self._where(request)):
            return False
        with self._changed:
            self._seen += 1
            last = math.inf if self._times is None else self._nth + self._times - 1
            if self._removed or not self._nth <= self._seen <= last:
                return False
            self.hits += 1
            self._changed.notify_all()
            return True

    def wait_hit(self, count: int = 1, timeout: float = 10.0) -> None:
        """Wait until so many calls were caught.

        Raises:
            DeadlineExceededError: they did not come in time (seconds).
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.hits >= count, timeout):
                raise DeadlineExceededError(
                    f"{self.method} was caught {self.hits} times in {timeout:g} s, not {count}"
                )

    def remove(self) -> None:
        """Catch no more calls, and let those go that hang."""
        with self._changed:
            self._removed = True
            self._changed.notify_all()

    release = remove

    def hold(self, context: grpc.ServicerContext, stopping: Callable[[], bool]) -> None:
        """Keep a call: for its delay, or until it is released, cancelled, or the server stops."""
        if not self.seconds:
            return

        def wake() -> None:
            with self._changed:
                self._changed.notify_all()

        context.add_callback(wake)
        end = time.monotonic() + self.seconds
        with self._changed:
            while not self._removed and context.is_active() and not stopping():
                left = end - time.monotonic()
                if left <= 0:
                    return
                self._changed.wait(min(left, threading.TIMEOUT_MAX))

    def wake(self) -> None:
        """Have the calls that are kept look again."""
        with self._changed:
            self._changed.notify_all()


class Faults:
    """The faults there are; for each call the first that catches it counts. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the list; innermost, nothing is called while it is held
        self._faults: list[Fault] = []

    def add(self, fault: Fault) -> Fault:
        """Add one."""
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        """Remove all, and let calls go that hang."""
        with self._lock:
            faults, self._faults = self._faults, []
        for fault in faults:
            fault.remove()

    def wake(self) -> None:
        """Have every call that is kept look again."""
        with self._lock:
            faults = list(self._faults)
        for fault in faults:
            fault.wake()

    def catch(self, method: str, request: Message | None) -> Fault | None:
        """The fault for a call."""
        with self._lock:
            faults = [fault for fault in self._faults if fault.method == method]
        return next((fault for fault in faults if fault.catches(request)), None)


_Behaviour = Callable[[object, grpc.ServicerContext], object]


class Gate(grpc.ServerInterceptor):  # type: ignore[type-arg] # grpc-stubs make it generic, grpcio does not
    """Stands before every service.

    Args:
        log: The record of calls.
        faults: What is done to some of them.
        stopping: Says whether the server is going away.
        release: The containerd in whose words it refuses.
        served: The services that there are, by their full names.
    """

    def __init__(
        self,
        log: CallLog,
        faults: Faults,
        stopping: Callable[[], bool],
        release: Release,
        served: frozenset[str],
    ) -> None:
        self._log = log
        self._faults = faults
        self._stopping = stopping
        self._release = release
        self._served = served

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Message, Message] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Message, Message]:
        """Wrap a method; one that is not served answers UNIMPLEMENTED in containerd's words."""
        handler = continuation(handler_call_details)
        service, _, method = handler_call_details.method.lstrip("/").partition("/")
        name = f"{service.rpartition('.')[2]}/{method}"
        if handler is None:
            return grpc.unary_unary_rpc_method_handler(self._unserved(name, service, method))
        kinds = {
            (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler, self._unary),
            (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler, self._stream),
            (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler, self._stream),
        }
        attribute, make, wrap = kinds[(handler.request_streaming, handler.response_streaming)]
        behaviour = cast("_Behaviour", getattr(handler, attribute))
        return make(
            wrap(name, behaviour, streamed=handler.request_streaming),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _unserved(
        self, name: str, service: str, method: str
    ) -> Callable[[bytes, grpc.ServicerContext], bytes]:
        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:  # noqa: ARG001 - gRPC's form
            call = Call(name, namespace_in(context), None)
            self._log.begin(call)
            known = service in self._served
            text = f"unknown method {method} for service {service}" if known else f"unknown service {service}"
            self._log.end(call, "UNIMPLEMENTED", text)
            context.abort(grpc.StatusCode.UNIMPLEMENTED, text)

        return answer

    def _begin(
        self, name: str, request: object, context: grpc.ServicerContext, *, streamed: bool
    ) -> tuple[Call, Fault | None]:
        message = None if streamed else cast("Message", request)
        call = Call(name, namespace_in(context), message)
        self._log.begin(call)
        return call, self._faults.catch(name, message)

    def _strike(self, fault: Fault | None, context: grpc.ServicerContext, *, after: bool) -> None:
        if fault is None or fault.after is not after:
            return
        fault.hold(context, self._stopping)
        if self._stopping():
            raise closing()
        if fault.refusal is not None:
            raise fault.refusal

    def _fail(self, call: Call, context: grpc.ServicerContext, error: Exception) -> None:
        """End a call with an error: a refusal as it is, anything else as a mistake of this program."""
        if isinstance(error, Refusal):
            code, details = error.code, error.said_by(self._release)
        else:
            _log.exception("fake_failed", method=call.method, namespace=call.namespace)
            code, details = grpc.StatusCode.INTERNAL, f"FakeContainerd failed: {error!r}"
        self._log.end(call, code.name, details)
        if context.is_active():
            context.abort(code, details)

    def _unary(self, name: str, behaviour: _Behaviour, *, streamed: bool) -> _Behaviour:
        def answer(request: object, context: grpc.ServicerContext) -> object:
            call, fault = self._begin(name, request, context, streamed=streamed)
            try:
                self._strike(fault, context, after=False)
                response = behaviour(request, context)
                self._strike(fault, context, after=True)
            except Exception as error:  # every failure becomes a status
                self._fail(call, context, error)
                raise
            self._log.end(call, "OK", "")
            return response

        return answer

    def _stream(
        self, name: str, behaviour: _Behaviour, *, streamed: bool
    ) -> Callable[[object, grpc.ServicerContext], Iterator[object]]:
        def answer(request: object, context: grpc.ServicerContext) -> Iterator[object]:
            call, fault = self._begin(name, request, context, streamed=streamed)
            try:
                self._strike(fault, context, after=False)
                yield from cast("Iterator[object]", behaviour(request, context))
                self._strike(fault, context, after=True)
            except GeneratorExit:
                self._log.end(call, "CANCELLED", "")
                raise
            except Exception as error:  # noqa: BLE001 - every failure becomes a status
                self._fail(call, context, error)
                return
            self._log.end(call, "OK", "")

        return answer
