"""The base of every config, and the errors that users see. Standard library only.

A config is a frozen dataclass. It has defaults, checks itself when made, and builds the thing it describes:
``TopKConfig(top_k=4).build(...)``. Where several implementations of one contract exist, the config is a `Choice`:
its ``kind`` is the name of the module that holds it, so that ``moe.router: {kind: topk}`` in YAML, the module
``moedist.moe.router.topk`` and the override ``moe/router=topk`` are one name.
"""

from moedist.config.base import Choice, Config, require, to_mapping
from moedist.config.errors import ConfigError, ConfigErrors, names_secret

__all__ = ["Choice", "Config", "ConfigError", "ConfigErrors", "names_secret", "require", "to_mapping"]
