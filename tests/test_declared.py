"""What classes declare in Python stands in the properties files, which are read where torch is not loaded, as they declare it.

``python tests/test_declared.py`` writes it there: the lines of keys in ``overall.yaml``, and what ``outlines.yaml`` knows of
strategies, keys and metrics.
"""

import re
import sys

import pytest
import yaml

from recbole_fedkd.command_line.help import _value_text
from recbole_fedkd.config.files import PROPERTIES
from recbole_fedkd.config.outlines import described, metric_of, traits_of_stage, traits_of_strategy
from recbole_fedkd.evaluation.metrics import register as metrics
from recbole_fedkd.federated.stage import STAGES
from recbole_fedkd.federated.strategy import STRATEGIES
from recbole_fedkd.registry import registries, settings_of

OVERALL, OUTLINES = PROPERTIES / "overall.yaml", PROPERTIES / "described" / "outlines.yaml"


def shipped(registry):
    """What of a registry is the package's own or RecBole's, and not of a test."""
    return [name for name, entry in registry.items() if entry.__module__.startswith(("recbole_fedkd.", "recbole."))]


def declared():
    """Every key that the package declares in Python, by name."""
    settings = [registry.settings[name] for registry in registries().values() for name in shipped(registry)]
    return {name: key for each in settings for name, key in settings_of(each).items()}


def line_of(key):
    """The line of a key: ``key: default  # (type, allowed; roles) what it is``."""
    kind = "list" if list in key.kinds else key.kinds[0].__name__
    of = f" of {key.elements[0].__name__}" if key.elements else ""
    told = "; ".join(filter(None, (", ".join(filter(None, (kind + of, key.rule))), " ".join(sorted(key.roles)))))
    value = _value_text(key.default) or "~"
    return f"{f'{key.name}: {value}':<32}# ({told}) {key.sentence}"


def overall_written():
    """The file of the keys of every run, with the lines of those that are declared as they are declared."""
    keys, lines = declared(), OVERALL.read_text().splitlines()
    names = [line.partition(":")[0] for line in lines]
    assert keys.keys() <= set(names), (
        "give each a line under the heading to which it belongs; what it says is then written"
    )
    return "".join(
        f"{line_of(keys[name]) if name in keys else line}\n" for name, line in zip(names, lines, strict=True)
    )


def outlines_written():
    """The file of outlines, with what classes say in their sections."""
    strategies = shipped(STRATEGIES)
    sections = {
        "strategies": {name: sorted(traits_of_strategy(name)) for name in strategies},
        "stages": {name: sorted(traits_of_stage(name)) for name in shipped(STAGES)},
        "keys": {
            kind: {name: [*settings_of(registries()[kind].settings[name])] for name in shipped(registries()[kind])}
            for kind in described()["keys"]
        },
        "metrics": {name: words_of(metric_of(name)) for name in shipped(metrics.metrics_dict)},
    }
    text = OUTLINES.read_text()
    for heading, content in sections.items():
        written = yaml.safe_dump({heading: content}, default_flow_style=None, sort_keys=False, width=140)
        text = re.sub(rf"^{heading}:\n(?:  .*\n)+", lambda _, written=written: written, text, flags=re.M)
    return text


def words_of(metric):
    return [metric.kind.lower(), *(["k"] if metric.takes_k else []), *(["smaller"] if metric.smaller else [])]


WRITTEN = {OVERALL: overall_written, OUTLINES: outlines_written}


@pytest.mark.parametrize("file", WRITTEN, ids=lambda file: file.name)
def test_a_properties_file_says_what_classes_declare(file):
    assert file.read_text() == WRITTEN[file](), f"run python {sys.modules[__name__].__file__}"


if __name__ == "__main__":
    for written_file, written in WRITTEN.items():
        written_file.write_text(written())
