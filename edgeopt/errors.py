"""Every error that edgeopt raises on purpose, and the exit code it ends a command with.

    EdgeoptError                 1  something failed
    ├── ConfigError              2  a value in a config, an override or an argument
    ├── InputError               2  a file that was given: model, text, engine
    ├── StepError                1  a compression step failed on a valid input
    ├── BuildError               1  a runtime could not build or open an engine
    ├── MeasureError             1  a measurement could not be taken
    ├── StoreError               1  the cache or study folder cannot be written
    ├── TrackingError            1  MLflow refuses
    │   └── UnreachableError     1  MLflow does not answer
    ├── InfeasibleError          3  nothing keeps every limit
    └── GateError                4  a release gate refused
        └── ApprovalPendingError 4  versions are registered and wait for approval

A message says what was received, where it stands and how to mend it.
"""

from __future__ import annotations


class EdgeoptError(Exception):
    """`what` happened, the `place` (file and key) where its cause stands, and the `mend`."""

    exit_code = 1

    def __init__(self, message: str, *, location: str = "", hint: str = "") -> None:
        super().__init__(message, location, hint)
        self.message = message
        self.location = location
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.location}: {self.message}" if self.location else self.message
        return f"{text}. {self.hint}" if self.hint else text

    def at(self, location: str) -> EdgeoptError:
        """The same error, with the outer place put before its own."""
        return type(self)(self.message, location=".".join(p for p in (location, self.location) if p), hint=self.hint)


class ConfigError(EdgeoptError):
    exit_code = 2


class InputError(EdgeoptError):
    exit_code = 2


class StepError(EdgeoptError):
    pass


class BuildError(EdgeoptError):
    pass


class MeasureError(EdgeoptError):
    pass


class StoreError(EdgeoptError):
    pass


class TrackingError(EdgeoptError):
    pass


class UnreachableError(TrackingError):
    pass


class InfeasibleError(EdgeoptError):
    exit_code = 3


class GateError(EdgeoptError):
    exit_code = 4


class ApprovalPendingError(GateError):
    """Versions were registered and wait for approval before an alias moves."""


def first_line(error: BaseException) -> str:
    """The first line of what a library's exception says, or its name where it says nothing.

    Of a database's error it is the driver's own word, without the statement and its values.
    """
    cause = getattr(error, "orig", None) or error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]
