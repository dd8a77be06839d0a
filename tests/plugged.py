"""What is registered, plugins among it, for tests over registries; other tests are to know nothing of them.

``PLUGINS=mine.py pytest tests/test_contracts.py tests/test_engines_agree.py`` holds them against plugins of yours.
"""

import os
import sys
from contextlib import contextmanager, suppress

from recbole_fedkd.config.plugins import import_plugins
from recbole_fedkd.registry import all_or_nothing, registries

NAMED = [name for name in os.environ.get("PLUGINS", "").split(",") if name]


def entries_with(plugins):
    """By registry and name each entry and the dataclass of its keys; plugins are forgotten again."""
    modules, entries = set(sys.modules), {}
    with suppress(EOFError), all_or_nothing():
        import_plugins(plugins)
        for plural, registry in registries().items():
            entries[plural] = {name: (entry, registry.settings[name]) for name, entry in registry.items()}
        raise EOFError
    for name in set(sys.modules) - modules:
        if getattr(sys.modules[name], "__file__", None) in plugins:
            del sys.modules[name]
    return entries


@contextmanager
def registered(entries):
    """Inside, they are registered."""
    with suppress(EOFError), all_or_nothing():
        for plural, of_registry in entries.items():
            registry = registries()[plural]
            registry.update({name: entry for name, (entry, _) in of_registry.items()})
            registry.settings = {name: settings_type for name, (_, settings_type) in of_registry.items()}
        yield
        raise EOFError
