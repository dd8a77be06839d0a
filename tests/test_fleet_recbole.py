"""RecBole's own models on the fleet engine: what the local engine gives, or that engine and one line that says why."""

import pytest
import torch

from recbole_fedkd.model.batching import ClientTable

SAMPLING = {"distribution": "uniform", "sample_num": 2, "alpha": 1.0, "dynamic": False, "candidate_num": 0}
IMPLICIT = {"label_mode": "implicit", "train_neg_sample_args": SAMPLING}
SIZES = {"mf_embedding_size": 4, "mlp_embedding_size": 4, "mlp_hidden_size": [8, 4], "dropout_prob": 0.3}
# Its gradients are so small at first that Adam makes steps of what rounding leaves.
NEUMF = {**IMPLICIT, **SIZES, "learner": "sgd", "learning_rate": 1.0}
CLICKS = {"label_mode": "threshold", "mlp_hidden_size": [8, 4], "dropout_prob": 0.3}


def engines_of(prepared, model, **keys):
    _, local, _, _ = prepared(model, **{"learner": "adam", **keys}, engine="local")
    _, fleet, _, _ = prepared(model, **{"learner": "adam", **keys}, engine="fleet")
    assert (local.engine.name, fleet.engine.name) == ("local", "fleet")
    return local, fleet


def state_of(trainer, client):
    """A client's parameters in the model's own shapes; of the users' rows those of the client's users."""
    model = trainer.model
    members = torch.nonzero(model.client_of_user == client).flatten()
    if trainer.engine.name == "local":
        state = dict(model.networks[client].named_parameters())
        for name, (start, stop) in model.private_rows(client).items():
            table = state[name]
            state[name] = torch.cat([table[:start], table[start:stop][members], table[stop:]])
        return state
    (group,) = model.groups
    pack = group.pack(torch.tensor([client]), torch.arange(group.item_count).unsqueeze(0))
    base = (group.dense_base(), group.item_base(), group.user_table())
    named = {name: value[0] for name, value in group.named(group.weights(pack, base, serving=True)).items()}
    for path, table in group.whole.named_modules():
        name = f"{path}.weight"
        if isinstance(table, ClientTable) and table.of_users:
            named[name] = named[name][1:]
        elif isinstance(table, ClientTable) and table.users is not None:
            rest, own = named[name], named.pop(f"{path}.users")[1:]
            named[name] = torch.cat([rest[: table.start], own, rest[table.start :]])
    return named


def assert_same_rounds(local, fleet, rounds, tolerance=2e-4):
    for index in range(rounds):
        one, other = local.engine.run_round(index), fleet.engine.run_round(index)
        assert other.bytes_down == one.bytes_down
        assert other.bytes_up == one.bytes_up
        assert other.loss == pytest.approx(one.loss, rel=1e-4)
        for client in range(len(local.engine.clients)):
            expected, found = state_of(local, client), state_of(fleet, client)
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                told = f"round {index}, client {client}, {name}: "
                torch.testing.assert_close(
                    found[name],
                    value.detach(),
                    rtol=tolerance,
                    atol=tolerance,
                    msg=lambda m, t=told: t + m,
                )


@pytest.mark.parametrize("partition", ["user", "random"])
@pytest.mark.parametrize(
    ("model", "keys"),
    [("BPR", IMPLICIT), ("NeuMF", NEUMF), ("DeepFM", CLICKS)],
    ids=["BPR", "NeuMF", "DeepFM"],
)
@pytest.mark.parametrize("strategy", ["local", "fedavg"])
def test_a_recbole_model_trains_as_on_the_local_engine(prepared, model, keys, partition, strategy):
    local, fleet = engines_of(prepared, model, **keys, partition=partition, strategy=strategy)
    assert_same_rounds(local, fleet, 2)
