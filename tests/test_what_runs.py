"""Which exchange goes with which mechanism on which engine: the table of docs/privacy.md, of what the code refuses by name."""

from copy import deepcopy

import pytest
import torch
import yaml
from conftest import SMALL
from test_docs import ROOT

from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.data.schema import read_schema
from recbole_fedkd.distillation.knowledge import AGGREGATIONS
from recbole_fedkd.engine import ENGINES
from recbole_fedkd.engine.fleet.obstacle import obstacle
from recbole_fedkd.errors import InputError
from recbole_fedkd.federated.knowledge import KNOWLEDGE
from recbole_fedkd.federated.robust import ROBUST_MEANS
from recbole_fedkd.federated.strategy import STRATEGIES
from recbole_fedkd.federated.strategy.knowledge_exchange import ExchangeSettings
from recbole_fedkd.federation.parties import build_server
from recbole_fedkd.machines import processes
from recbole_fedkd.model import MODELS

pytest.importorskip("cryptography")

BOUND = {"clip": 1.0, "noise_multiplier": 1.0, "unit": "client"}
MEAN = {"client_weights": "uniform"}
FEW = {"factor_size": 2, "sketch_width": 3, "sketch_passes": 1}
"""Directions that the data determine: of others rounding decides."""

MECHANISMS = {
    "nothing": {},
    "masks": {"secure_aggregation": True},
    "noise of the server": {"privacy": BOUND, **MEAN},
    "shares of noise, in masks": {
        **MEAN,
        "privacy": {**BOUND, "noise": "distributed"},
        "secure_aggregation": True,
    },
    "noise of each client": {"privacy": {**BOUND, "noise": "local"}, **MEAN},
    "norm bound": {"stages": ["clip", "codecs"], "clip_norm": 1.0},
}


def exchanges():
    """What clients may send, by the keys that say so."""
    found = {}
    for name, kind in STRATEGIES.items():
        if name == "sums":
            for sums in sorted({each.sums for each in MODELS.values() if hasattr(each, "sums")}):
                models = [model for model, each in MODELS.items() if getattr(each, "sums", None) == sums]
                found[f"`sums` of `{'`, `'.join(models)}`"] = {"strategy": name, "model": models[0]}
        elif not kind.exchanges_knowledge:
            found[f"`{name}`"] = {"strategy": name}
        elif name == "afd":
            for knowledge in sorted(set(KNOWLEDGE) - {"gram", "label"}):  # `gram` is what `sums` exchanges
                found[f"`afd`, `fd`; `knowledge={knowledge}`"] = {"strategy": name, "knowledge": knowledge}
            for aggregation in AGGREGATIONS:
                keys = {"strategy": name, "knowledge": "label", "aggregation": aggregation}
                found[f"`afd`, `fd`; `label`, `aggregation={aggregation}`"] = keys
    for mean in ("changed", *ROBUST_MEANS):
        keys = {"row_mean": mean, "codecs": []} if mean == "changed" else {"robust_mean": mean}
        found[f"`fedavg`; `{next(iter(keys))}={mean}`"] = {"strategy": "fedavg", **keys}
    return found


def test_strategies_that_exchange_knowledge_differ_in_nothing_that_mechanisms_ask():
    kinds = [kind for name, kind in STRATEGIES.items() if kind.exchanges_knowledge and name != "sums"]
    assert {kind.name for kind in kinds} == {"afd", "fd"}
    for asked in ("needs_each", "empty", "upload_schema"):
        assert len({getattr(kind, asked) for kind in kinds}) == 1


def engines_of(data_path, schema, keys):
    """Engines that run a config; none where it is refused in a sentence."""
    given = {"data_path": str(data_path), **SMALL, "client_num": 4, "learner": "adam", **keys}
    try:
        config = FedKDConfig(given.pop("model", "AttnFedKD"), "tiny", config_dict=given)
        if config["strategy"] != "local" or config["privacy"] or config["secure_aggregation"]:
            build_server(config, schema)
    except InputError as error:
        assert "\n" not in str(error)
        return []
    hindrances = {"fleet": obstacle, "processes": processes.obstacle, "flower": processes.obstacle}
    return [engine for engine in ENGINES if engine not in hindrances or not hindrances[engine](config, 4)]


def table(data_path, schema):
    """The table as Markdown."""
    lines = [f"| what clients send | {' | '.join(MECHANISMS)} |", "|---" * (len(MECHANISMS) + 1) + "|"]
    for exchange, keys in exchanges().items():
        cells = []
        for mechanism in MECHANISMS.values():
            engines = engines_of(data_path, schema, {**keys, **mechanism})
            missing = [engine for engine in ENGINES if engine not in engines]
            cells.append("no" if not engines else f"all but `{', '.join(missing)}`" if missing else "all")
        lines.append(f"| {exchange} | {' | '.join(cells)} |")
    return lines


@pytest.fixture
def parsed_once(monkeypatch):
    """Every config reads RecBole's files; each is parsed once."""
    load, parsed = yaml.load, {}

    def once(text, Loader):
        if text not in parsed:
            parsed[text] = load(text, Loader=Loader)
        return deepcopy(parsed[text])

    monkeypatch.setattr(yaml, "load", once)


def test_the_table_of_the_page_is_what_the_code_takes_and_refuses(prepared, data_path, parsed_once):
    _, _, loaders, _ = prepared(client_num=4)
    made = table(data_path, read_schema(loaders[0]._dataset, 4))
    page = (ROOT / "docs" / "privacy.md").read_text(encoding="utf-8").splitlines()
    first = page.index(made[0])
    last = next(place for place in range(first, len(page)) if not page[place].startswith("|"))
    assert page[first:last] == made, "\n".join(made)


@pytest.mark.parametrize(
    "keys",
    [
        {"strategy": "afd", "knowledge": "prototype"},
        {
            "strategy": "afd",
            "knowledge": "fold_in",
            "label_knowledge": True,
            "label_mode": "rating",
            "em_steps": 1,
            **FEW,
        },
        {"strategy": "fml"},
        {"strategy": "sums", "model": "Bias", "label_mode": "rating"},
        {"strategy": "sums", "model": "GramEASE", "gram_size": 3, "sketch_passes": 1},
    ],
    ids=lambda keys: keys.get("model", keys.get("knowledge", keys["strategy"])),
)
def test_what_goes_with_masks_comes_to_the_sums_of_no_masks(prepared, keys):
    """Every kind that says it is additive and has no test of its own beside the masks'; to the end of its exchange."""
    states = []
    for masks in (True, False):
        _, trainer, _, _ = prepared(**keys, secure_aggregation=masks)
        for index in range(trainer.engine.server.strategy.exchange_rounds + 2):
            trainer.engine.run_round(index)
        states.append(trainer.engine.server.state)
    assert states[0].keys() == states[1].keys() and states[0]
    for name, value in states[1].items():
        torch.testing.assert_close(states[0][name], value, rtol=1e-4, atol=1e-5)


def test_a_weight_that_fd_leaves_out_is_said_to_change_nothing():
    strategy = STRATEGIES["fd"](ExchangeSettings(alpha=0.5))
    assert strategy.without_effect(4, 4).startswith("alpha=0.5 changes nothing: strategy fd")
    assert strategy.settings.alpha == 0
