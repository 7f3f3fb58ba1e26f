"""The strict check: what the specification's JSON schema forbids and Go's decoder lets pass."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from libcontainerd.oci._base import JSONMember, Model, Rule, join
from libcontainerd.oci._model import PLATFORMS, Spec


@dataclass(frozen=True, slots=True)
class Finding:
    """One place where a document breaks the schema.

    Attributes:
        path: Where, in the specification's own names: `process.rlimits[0].type`.
        message: What is wrong there: `must match RLIMIT_[A-Z]+, and is 'NOFILE'`.
    """

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


def validate(document: Model) -> list[Finding]:
    """Check a document against the JSON schema of runtime-spec 1.3.0.

    Parsing accepts what Go's decoder accepts, and runtimes run most of it. This reports the rest of the
    schema: members that are required and missing, values outside an enumeration, a pattern or a bound, and
    nulls. Members that the
    schema does not know are no finding. The sections of other platforms are checked as well.

    Args:
        document: A spec, or any other model. Take one from `parse_spec` and its kin: what has been put into
            the lists of a model since is not checked for its type here.

    Returns:
        The findings in the order of the specification; none if the schema accepts the document.
    """
    return list(_model(document, ""))


def _model(model: Model, path: str) -> Iterator[Finding]:
    for name, field in type(model).model_fields.items():
        if name in PLATFORMS and isinstance(model, Spec):
            yield from _platform(model, name)
            continue
        member = join(path, field.alias or name)
        rule = next((item for item in field.metadata if isinstance(item, Rule)), None)
        if name in model.model_fields_set:
            if any(isinstance(item, JSONMember) for item in field.metadata):
                continue
            yield from _value(getattr(model, name), rule, member)
        elif rule is not None and rule.required:
            yield Finding(member, "is required")


def _platform(spec: Spec, name: str) -> Iterator[Finding]:
    section: object = getattr(spec, name)
    if name not in spec.model_fields_set:
        return
    if section is None:
        yield from _value(None, None, name)
        return
    # As in parsing: some forty models that Linux never needs.
    from libcontainerd.oci._platforms import SECTIONS  # noqa: PLC0415

    yield from _model(SECTIONS[name].model_validate(section, by_alias=True, by_name=False), name)


def _value(value: object, rule: Rule | None, path: str) -> Iterator[Finding]:
    if value is None:
        yield Finding(path, "is null, which the schema allows nowhere")
    elif isinstance(value, Model):
        yield from _model(value, path)
    elif isinstance(value, list):
        if rule is not None and len(value) < rule.min_items:
            yield Finding(path, f"must have {rule.min_items} element or more, and has {len(value)}")
        each = rule.each if rule is not None else None
        for index, item in enumerate(value):
            yield from _value(item, each, f"{path}[{index}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _value(item, None, join(path, str(key)))
    elif rule is not None:
        yield from (Finding(path, message) for message in _breaches(value, rule))


def _breaches(value: object, rule: Rule) -> Iterable[str]:
    if isinstance(value, str):
        if rule.one_of and value not in rule.one_of:
            yield f"must be one of {', '.join(rule.one_of)}, and is {value!r}"
        if rule.pattern and re.fullmatch(rule.pattern, value) is None:
            yield f"must match {rule.pattern}, and is {value!r}"
    elif isinstance(value, int):
        if rule.minimum is not None and value < rule.minimum:
            yield f"must be at least {rule.minimum}, and is {value}"
        if rule.maximum is not None and value > rule.maximum:
            yield f"must be at most {rule.maximum}, and is {value}"
