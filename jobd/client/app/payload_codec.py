"""Convert the arguments of a task to a payload and back, by the signature and the annotations of its function."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgspec
from msgspec import Raw

from jobd.client.outcomes import PayloadMismatch

# Errors of msgspec and of a type's own code. A model of pydantic raises a ValueError.
_UNFIT: Final = (msgspec.MsgspecError, TypeError, ValueError, OverflowError, RecursionError)
_HOW: Final = "use dataclasses, msgspec structs, pydantic models, or types such as str, int, datetime, UUID and Decimal"


def check_signature(function: Callable[..., Any], name: str) -> None:
    """Raise TypeError if a task cannot be made of `function`."""
    if not (inspect.isfunction(function) or inspect.ismethod(function)):
        raise TypeError(f"{function!r} cannot be a task; a task is a function or a bound method")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise TypeError(f"task {name!r} is a generator; a task returns its result")
    parameters = list(inspect.signature(function).parameters.values())
    if parameters and parameters[0].name == "self":
        raise TypeError(
            f"task {name!r} has the parameter self. Make the task of the bound method: "
            f'app.task(name="{name}")(instance.{function.__name__})'
        )
    for parameter in parameters:
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            shown = parameter.replace(annotation=parameter.empty)
            raise TypeError(
                f"task {name!r} has the parameter {shown}. Each parameter of a task has its own name, because the "
                "payload is an object: *args, **kwargs and positional-only parameters are not possible"
            )


class PayloadCodec:
    """The payload and the result of one task. Raises TypeError if an annotation cannot be used."""

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self._name = name
        self._signature = inspect.signature(function)
        parameters = self._signature.parameters.values()
        self._positional = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
        hints = _hints(function, name)
        fields: list[Any] = []
        for each in parameters:
            default = [] if each.default is each.empty else [msgspec.field(default_factory=_returning(each.default))]
            fields.append((each.name, hints.get(each.name, Any), *default))
        try:
            arguments = msgspec.defstruct("Arguments", fields, forbid_unknown_fields=True, kw_only=True)
            self._arguments = msgspec.json.Decoder(arguments, dec_hook=_decode_model)
            self._result = msgspec.json.Decoder(hints.get("return", Any), dec_hook=_decode_model)
        except (TypeError, NotImplementedError) as error:
            raise TypeError(f"task {name!r} has an annotation that cannot be used: {error}") from None

    def encode(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Raw:
        """Return the payload of a call, without the defaults of other parameters. Raises TypeError."""
        given: dict[str, Any] = dict(zip(self._positional, args, strict=False))
        given.update(kwargs)
        try:
            if len(given) != len(args) + len(kwargs):  # too many, or one twice
                self._signature.bind(*args, **kwargs)
            payload = encode(given)
            self._arguments.decode(payload)
        except _UNFIT as error:
            try:
                self._signature.bind(*args, **kwargs)  # slow, with a better message
            except TypeError as wrong:
                raise TypeError(f"task {self._name!r}: {wrong}. Its parameters are {self._signature}") from None
            raise TypeError(f"the arguments of task {self._name!r} do not fit its signature: {error}") from None
        return Raw(payload)

    def decode(self, payload: bytes | Raw, changed: Mapping[str, Raw] | None = None) -> dict[str, Any]:
        """Return the arguments of a job, with those that have changed. A payload of null has none.

        Raises PayloadMismatch.
        """
        body = b"{}" if payload == b"null" else bytes(payload)
        try:
            if changed:
                body = msgspec.json.encode(msgspec.json.decode(body, type=dict[str, Raw]) | dict(changed))
            return msgspec.structs.asdict(self._arguments.decode(body))
        except _UNFIT as error:
            raise PayloadMismatch(f"The payload does not fit task {self._name!r}: {error}") from error

    def encode_changed(self, changed: Mapping[str, Any], payload: bytes | Raw) -> dict[str, Raw]:
        """Return arguments that differ in the next attempt. Raises TypeError if they do not fit."""
        if unknown := changed.keys() - self._signature.parameters.keys():
            names = ", ".join(sorted(unknown))
            raise TypeError(f"Retry changes {names}, but the parameters of task {self._name!r} are {self._signature}")
        try:
            encoded = {name: Raw(encode(value)) for name, value in changed.items()}
            self.decode(payload, encoded)
        except (*_UNFIT, PayloadMismatch) as error:
            raise TypeError(f"Retry changes arguments of task {self._name!r} that do not fit: {error}") from None
        return encoded

    def encode_result(self, value: Any) -> Raw:
        """Return the result as metadata. Raises TypeError."""
        try:
            result = encode(value)
        except _UNFIT as error:
            raise TypeError(f"the result of task {self._name!r} cannot be encoded as JSON: {error}") from None
        try:
            self._result.decode(result)
        except _UNFIT as error:
            raise TypeError(f"the result of task {self._name!r} does not fit its annotation: {error}") from None
        return Raw(result)

    def decode_result(self, metadata: Raw | None) -> Any:
        """Return the result of a completed job. Raises TypeError if it is not that of this task."""
        try:
            return self._result.decode(b"null" if metadata is None else metadata)
        except _UNFIT as error:
            raise TypeError(
                f"the result of the job does not fit the annotation of task {self._name!r}: {error}"
            ) from None


def _hints(function: Callable[..., Any], name: str) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function, include_extras=True)
    except NameError as error:
        raise TypeError(
            f"task {name!r}: {error}. Annotations have to be names of the module, also when the program runs: "
            "not of a function, and not imported under TYPE_CHECKING"
        ) from None


def _returning(value: Any) -> Callable[[], Any]:
    return lambda: value


def encode(value: Any) -> bytes:
    """Encode a value of a task. Raises TypeError and other errors of the value."""
    return msgspec.json.encode(value, enc_hook=_encode_model)


def _encode_model(value: Any) -> Any:
    """Encode a model of pydantic, which jobd never imports."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    raise TypeError(f"{type(value).__name__} cannot be sent as JSON; {_HOW}")


def _decode_model(kind: Any, value: Any) -> Any:
    if hasattr(kind, "model_validate"):
        return kind.model_validate(value)
    raise TypeError(f"{getattr(kind, '__name__', kind)} cannot be read from JSON; {_HOW}")
