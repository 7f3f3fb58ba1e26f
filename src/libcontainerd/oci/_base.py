"""What every runtime-spec model shares: strictness, member names, integer widths and schema rules."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

# A member nobody knows is kept, so its depth is the sender's choice. Real documents stay under 20.
MAX_DEPTH = 100

JSONObject: TypeAlias = dict[str, object]

_IRREGULAR_NAMES = {
    "allow_unqualified_dns_query": "allowUnqualifiedDNSQuery",
    "block_io": "blockIO",
    "capped_cpu": "cappedCPU",
    "class_": "class",
    "class_id": "classID",
    "clos_id": "closID",
    "container_id": "containerID",
    "disable_oom_killer": "disableOOMKiller",
    "dns_search_list": "DNSSearchList",
    "exec_cpu_affinity": "execCPUAffinity",
    "first_gfn": "firstGFN",
    "first_mfn": "firstMFN",
    "host_id": "hostID",
    "kernel_tcp": "kernelTCP",
    "nr_mfns": "nrMFNs",
    "throttle_read_iops_device": "throttleReadIOPSDevice",
    "throttle_write_iops_device": "throttleWriteIOPSDevice",
    "utility_vm_path": "utilityVMPath",
}


def json_name(name: str) -> str:
    """Give the member name that runtime-spec uses for a Python attribute."""
    if name in _IRREGULAR_NAMES:
        return _IRREGULAR_NAMES[name]
    head, *rest = name.split("_")
    return head + "".join(word[:1].upper() + word[1:] for word in rest)


# Go's decoder also takes U+017F for "s" and U+212A for "k" when it compares member names.
_FOLDS = {0x017F: "s", 0x212A: "k"}


def folded(name: str) -> str:
    """Fold a member name as Go's decoder does when it looks for the field that a member belongs to."""
    return name.translate(_FOLDS).lower()


@dataclass(frozen=True, slots=True)
class Rule:
    """What the JSON schema of runtime-spec 1.3.0 demands of a member beyond what Go's decoder does.

    Parsing ignores it; `validate` reports where a document breaks it.
    """

    required: bool = False
    one_of: tuple[str, ...] = ()
    pattern: str = ""
    minimum: int | None = None
    maximum: int | None = None
    min_items: int = 0
    each: "Rule | None" = None


REQUIRED = Rule(required=True)


class _NullElement:
    """Lets an element of an array or map be null, which Go's decoder takes as the zero value.

    The annotation stays `str`, `int` or a model: a null element is legal to Go but written by nobody on
    purpose, and every reader of `process.args` would pay for it. `validate` reports it.
    """

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.nullable_schema(handler(source))


_NULL_ELEMENT = _NullElement()
_T = TypeVar("_T")
Element = Annotated[_T, _NULL_ELEMENT]
Array = list[Element[_T]]
Map = dict[str, Element[_T]]

UInt8 = Annotated[int, Field(ge=0, le=2**8 - 1)]
UInt16 = Annotated[int, Field(ge=0, le=2**16 - 1)]
UInt32 = Annotated[int, Field(ge=0, le=2**32 - 1)]
UInt64 = Annotated[int, Field(ge=0, le=2**64 - 1)]
Int32 = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]


class UnknownMembers:
    """Passed as the validation context: remembers whether any member was met that no model knows."""

    __slots__ = ("found",)

    def __init__(self) -> None:
        self.found = False


def _refuse(path: str, problem: str) -> PydanticCustomError:
    # The problem is foreign text: braces in it must not be read as a template.
    return PydanticCustomError("json_value", "{problem}", {"inner": path, "problem": problem})


def copy_json(value: object, path: str = "", depth: int = 1) -> object:
    """Copy a JSON value, refusing what JSON cannot say and what nests too deeply.

    Raises:
        PydanticCustomError: for another type, a number that is not finite, a string that is not Unicode text,
            a key that is not a string, or more than `MAX_DEPTH` levels (which a cycle has, too).
    """
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise _refuse(path, f"must be a finite number, not {value}")
        return value
    if isinstance(value, str):
        if not is_text(value):
            raise _refuse(path, "must be Unicode text, and holds a lone surrogate")
        return value
    if depth > MAX_DEPTH:
        raise _refuse("", f"is nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, list):
        return [copy_json(item, f"{path}[{index}]", depth + 1) for index, item in enumerate(value)]
    if isinstance(value, dict):
        copied: JSONObject = {}
        for key, item in value.items():
            if not isinstance(key, str) or not is_text(key):
                raise _refuse(path, f"has a member name that is not Unicode text: {key!r}")
            copied[key] = copy_json(item, join(path, key), depth + 1)
        return copied
    raise _refuse(path, f"must be a JSON value, not {type(value).__name__}")


def is_text(value: str) -> bool:
    """Say whether a string can be written as UTF-8: it cannot with a lone surrogate in it."""
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def join(path: str, member: str) -> str:
    """Add a member to a path: `linux.resources`, or `annotations["a.b"]` for a name like that."""
    if not member.replace("-", "_").isidentifier():
        return f'{path}["{member}"]'
    return f"{path}.{member}" if path else member


def path_of(steps: Iterable[int | str], start: str = "") -> str:
    """Write the steps to a value as one path: `mounts[3].options[0]`."""
    path = start
    for step in steps:
        path = f"{path}[{step}]" if isinstance(step, int) else join(path, step)
    return path


def _unknown_member(value: object, info: core_schema.ValidationInfo) -> object:
    context: object = info.context
    if isinstance(context, UnknownMembers):
        context.found = True
    return copy_json(value)


class JSONMember:
    """Marks a member that may hold any JSON."""

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_plain_validator_function(_unknown_member)


AnyJSON = Annotated[object, JSONMember()]


def _object_only(value: object) -> object:
    if not isinstance(value, dict):
        raise PydanticCustomError("dict_type", "Input should be a valid dictionary")
    return copy_json(value)


class _JSONObject:
    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(_object_only)


AnyObject = Annotated[JSONObject, _JSONObject()]


class Model(BaseModel):
    """A runtime-spec object.

    Attributes are the specification's members in snake_case. `None` is a member that is unset (or null in the
    document it came from); which of the two is remembered, so that writing gives back what was read. Members
    that the model does not know are kept, and are in `model_extra`.

    Constructing a model and assigning to an attribute check the value as Go's decoder would and raise
    `pydantic.ValidationError`, a `ValueError`. Instances are plain mutable data: share one between threads
    only while nobody changes it.
    """

    model_config = ConfigDict(
        strict=True,
        extra="allow",
        alias_generator=json_name,
        validate_by_alias=True,
        validate_by_name=True,
        validate_assignment=True,
        revalidate_instances="never",
        protected_namespaces=(),
        # Built at the import, which only one thread does. Put off, it would happen at the first use, and of
        # two threads that are first at once pydantic 2.11 gives one an error.
        defer_build=False,
    )

    if TYPE_CHECKING:
        # No argument of the constructor, for users whose type checker does not know pydantic.
        __pydantic_extra__: dict[str, object] = Field(init=False)
    else:
        # Without a value, which would hide the slot that pydantic keeps for it. And evaluated here and now
        # (no postponed annotations in this module): pydantic before 2.12 looks for a postponed one's names in
        # the module of the subclass.
        __pydantic_extra__: dict[str, AnyJSON]

    def __repr_args__(self) -> Iterator[tuple[str | None, object]]:
        """Show only what is set: unset members are most of them."""
        for name, value in super().__repr_args__():
            if name in self.model_fields_set:
                yield name, value
