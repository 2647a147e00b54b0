"""What a user sees when a value cannot work: the key, the value, what is wrong, and what to do."""

from __future__ import annotations

from collections.abc import Iterable

from moedist.config.exit_codes import ExitCode


class ConfigError(ValueError):
    """One configuration value that cannot work.

    Args:
        key: dotted path of the value, as the user would write it (``mesh.ep``). Inside a config it is the field's
            own name; decoding puts the path in front (`under`).
        value: the offending value.
        problem: what is wrong, as the rest of a sentence that starts with ``key = value``.
        remedy: what to set instead, as a sentence.

    Attributes:
        exit_code: what a command that meets the error returns.
    """

    exit_code = ExitCode.CONFIG

    def __init__(self, key: str, value: object, problem: str, remedy: str):
        self.key, self.value, self.problem, self.remedy = key, value, problem, remedy
        super().__init__(f"{key} = {value!r} {problem}. {remedy}")

    def under(self, prefix: str) -> ConfigError:
        """The same error, its key below ``prefix``."""
        return ConfigError(f"{prefix}.{self.key}" if prefix else self.key, self.value, self.problem, self.remedy)


class ConfigErrors(ConfigError):
    """Every error of one configuration, so that a user mends them in one go."""

    def __init__(self, errors: Iterable[ConfigError]):
        self.errors = tuple(errors)
        assert self.errors, "no errors to raise"
        first = self.errors[0]
        self.key, self.value, self.problem, self.remedy = first.key, first.value, first.problem, first.remedy
        ValueError.__init__(self, "\n".join(str(error) for error in self.errors))
