"""Our own descriptor pool, and what the generated modules in ``pb`` are made of.

protobuf keeps one default pool per process, and refuses a second file of the same name with other contents. Someone
who uses this library may well have generated containerd's API for themselves, of another version, so ours must not be
in that pool. protoc's own Python output knows no other; therefore ``pb`` holds descriptors as bytes, and this module
makes classes of them.

The classes are of their own kind, the well-known ones included: a ``google.protobuf.Any`` of the default pool cannot
be put into one of our messages. ``pb.wellknown_pb2`` has ours, and ``typeurl.pack`` takes messages of any pool.
"""

from typing import TYPE_CHECKING, ClassVar, NamedTuple

from google.protobuf import message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    import grpc
    from google.protobuf.descriptor import Descriptor, FileDescriptor
    from google.protobuf.message import Message

_descriptors = DescriptorPool()
_message_class: "Callable[[Descriptor], type[Message]]"
if hasattr(message_factory, "GetMessageClass"):
    _message_class = message_factory.GetMessageClass
else:  # protobuf 4.21 has only the factory object, and one of them must make all classes
    _message_class = message_factory.MessageFactory(_descriptors).GetPrototype  # type: ignore[attr-defined]


class File:
    """The messages and enums of one .proto file in our pool.

    Args:
        descriptor: The file, from our pool.
        module: Dotted name of the module that will hold the classes.
    """

    def __init__(self, descriptor: "FileDescriptor", module: str) -> None:
        self._descriptor = descriptor
        self._module = module

    def message(self, name: str) -> "type[Message]":
        """Returns the class of a top-level message, with its nested messages as attributes."""
        return self._build(self._descriptor.message_types_by_name[name])

    def enum(self, name: str) -> EnumTypeWrapper:
        """Returns the names and numbers of a top-level enum."""
        return EnumTypeWrapper(self._descriptor.enum_types_by_name[name])

    def _build(self, descriptor: "Descriptor") -> "type[Message]":
        built = _message_class(descriptor)
        built.__module__ = self._module
        for nested in descriptor.nested_types:
            if not nested.GetOptions().map_entry:
                setattr(built, nested.name, self._build(nested))
        return built


def add(module: str, name: str, serialized: bytes) -> File:
    """Adds one file to our pool; the files it imports must be there.

    Args:
        module: Name of the calling module.
        name: The file's path under ``protos``.
        serialized: Its FileDescriptorProto.
    """
    _descriptors.AddSerializedFile(serialized)
    return File(_descriptors.FindFileByName(name), module)


def add_installed(module: str, generated: "ModuleType") -> File:
    """Adds a copy of a file that an installed package has in the default pool, such as google/protobuf/any.proto."""
    descriptor: FileDescriptor = generated.DESCRIPTOR
    return add(module, descriptor.name, descriptor.serialized_pb)


class Method(NamedTuple):
    """One method of a gRPC service."""

    name: str
    request: "type[Message]"
    response: "type[Message]"
    client_streaming: bool
    server_streaming: bool

    @property
    def arity(self) -> str:
        """Its kind as gRPC spells it: ``unary_unary``, ``unary_stream``, ``stream_unary`` or ``stream_stream``."""
        spelled = ("unary", "stream")
        return f"{spelled[self.client_streaming]}_{spelled[self.server_streaming]}"


class Service(NamedTuple):
    """One gRPC service: its full name and its methods."""

    name: str
    methods: tuple[Method, ...]

    def path(self, method: Method) -> str:
        """Returns what HTTP/2 calls the method by, ``/<service>/<method>``."""
        return f"/{self.name}/{method.name}"


class Stub:
    """Base of the client stubs: one multi-callable per method, as an attribute of its name.

    Args:
        channel: Where the calls go, a plain or an intercepted one.
    """

    service: ClassVar[Service]

    def __init__(self, channel: "grpc.Channel") -> None:
        for method in self.service.methods:
            connect = getattr(channel, method.arity)
            multi_callable = connect(
                self.service.path(method),
                request_serializer=method.request.SerializeToString,
                response_deserializer=method.response.FromString,
            )
            setattr(self, method.name, multi_callable)


class Servicer:
    """Base of the servers' side: a subclass defines the methods it serves; gRPC answers UNIMPLEMENTED for the rest."""

    service: ClassVar[Service]

    def generic_handler(self) -> "grpc.GenericRpcHandler[Message, Message]":
        """Returns what ``grpc.Server.add_generic_rpc_handlers`` takes."""
        import grpc  # noqa: PLC0415  # the stubs' side, and everyone who only wants messages, does without

        handlers = {}
        for method in self.service.methods:
            behaviour = getattr(self, method.name, None)
            if behaviour is not None:
                handlers[method.name] = getattr(grpc, f"{method.arity}_rpc_method_handler")(
                    behaviour,
                    request_deserializer=method.request.FromString,
                    response_serializer=method.response.SerializeToString,
                )
        return grpc.method_handlers_generic_handler(self.service.name, handlers)
