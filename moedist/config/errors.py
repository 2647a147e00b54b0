"""What a user sees when a value cannot work: the key, the value, what is wrong, and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterable

from moedist.config.exit_codes import ExitCode

SECRET = re.compile(
    r"(^|[._])(password|passwd|secret|credentials?|(api|access|private|secret)_?key|(api|access|auth|hf)_?token)$"
    r"|(^|\.)token$",
    re.IGNORECASE,
)
"""Keys whose text is a secret by their name: ``api_key`` and ``token``, but neither ``train.global_batch_tokens`` nor
``data.tokenizer``."""
HIDDEN = "<hidden>"


def names_secret(key: str) -> bool:
    """Whether a dotted key names a secret."""
    return SECRET.search(key) is not None


class ConfigError(ValueError):
    """One configuration value that cannot work.

    Args:
        key: dotted path of the value, as the user would write it (``mesh.ep``). Inside a config it is the field's
            own name; decoding puts the path in front (`under`).
        value: the offending value; text of a key that names a secret is not shown.
        problem: what is wrong, as the rest of a sentence that starts with ``key = value``.
        remedy: what to set instead, as a sentence.

    Attributes:
        exit_code: what a command that meets the error returns.
    """

    exit_code = ExitCode.CONFIG

    def __init__(self, key: str, value: object, problem: str, remedy: str):
        self.key, self.problem, self.remedy = key, problem, remedy
        self.value = HIDDEN if isinstance(value, str) and names_secret(key) and "${" not in value else value
        super().__init__(f"{key} = {self.value!r} {problem}. {remedy}")

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
