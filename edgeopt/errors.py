"""Define every error that edgeopt raises on purpose, with the exit code of the command.

    EdgeoptError                 1  an operation failed
    ├── ConfigError              2  invalid value in a config, an override or an argument
    ├── InputError               2  invalid file: model, text or engine
    ├── StepError                1  a compression step failed on valid input
    ├── BuildError               1  a runtime could not build or open an engine
    ├── MeasureError             1  a measurement could not be taken
    ├── StoreError               1  the cache or the study folder cannot be written
    ├── TrackingError            1  MLflow rejected a request
    │   └── UnreachableError     1  MLflow does not answer
    ├── InfeasibleError          3  no result satisfies every limit
    └── GateError                4  a release gate rejected the candidate
        └── ApprovalPendingError 4  versions are registered and wait for approval

A message states the rule and the value found. `location` names the file or key, `hint` the action that fixes it.
"""

from __future__ import annotations


class EdgeoptError(Exception):
    """Error with the `location` of its cause (file or config key) and a `hint` for fixing it."""

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
        """Return the same error with `location` prepended to its own location."""
        return type(self)(self.message, location=".".join(p for p in (location, self.location) if p), hint=self.hint)


class ConfigError(EdgeoptError):
    """Invalid value in a config, an override or an argument."""

    exit_code = 2


class InputError(EdgeoptError):
    """Invalid file: model, text or engine."""

    exit_code = 2


class StepError(EdgeoptError):
    """A compression step failed on valid input."""


class BuildError(EdgeoptError):
    """A runtime could not build or open an engine."""


class MeasureError(EdgeoptError):
    """A measurement could not be taken."""


class StoreError(EdgeoptError):
    """The cache or the study folder cannot be written."""


class TrackingError(EdgeoptError):
    """MLflow rejected a request."""


class UnreachableError(TrackingError):
    """MLflow does not answer."""


class InfeasibleError(EdgeoptError):
    """No result satisfies every limit."""

    exit_code = 3


class GateError(EdgeoptError):
    """A release gate rejected the candidate."""

    exit_code = 4


class ApprovalPendingError(GateError):
    """Versions were registered and wait for approval before an alias moves."""


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its class name if the message is empty.

    For a SQLAlchemy error, return the message of the driver, without the statement and its parameters.
    """
    cause = getattr(error, "orig", None) or error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]
