"""Networks and models: what a prediction may depend on, and one answer from every way of asking."""

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction

from recbole_fedkd.errors import InputError
from recbole_fedkd.model.dropout import drawn_mask
from recbole_fedkd.model.network import Architecture, AttentiveNetwork, FeatureTable, History

ARCHITECTURE = Architecture(
    labels=5,
    embedding_size=4,
    backbone="mlp",
    hidden_sizes=[8],
    dropout_prob=0.0,
    attention=True,
    attention_heads=3,
    use_user_id=True,
    history_length=4,
    item_prior=False,
)


def build(items_of_user: list[int], labels: list[int]) -> AttentiveNetwork:
    torch.manual_seed(0)
    users = FeatureTable("user_id", 2, {"age": torch.tensor([0, 1])}, {"age": 3})
    items = FeatureTable("item_id", 9, {"genre": torch.randint(0, 3, (9, 2))}, {"genre": 3})
    history = History(torch.tensor([[0] * 5, items_of_user]), torch.tensor([[0] * 5, labels]))
    network = AttentiveNetwork(ARCHITECTURE, users, items, history).eval()
    for parameter in network.parameters():  # position biases start at zero and would hide an off-by-one
        parameter.data += 0.1 * torch.randn_like(parameter)
    return network


def predict(network: AttentiveNetwork, item: int) -> torch.Tensor:
    return network(torch.tensor([1]), torch.tensor([[item]])).detach()


def test_a_row_in_the_history_never_sees_its_own_label():
    item = 3
    one, other = build([5, 3, 7, 2, 8], [0, 0, 1, 2, 3]), build([5, 3, 7, 2, 8], [0, 4, 1, 2, 3])
    assert torch.equal(predict(one, item), predict(other, item))


def test_a_row_sees_the_labels_of_the_other_rows():
    one, other = build([5, 3, 7, 2, 8], [0, 0, 1, 2, 3]), build([5, 3, 7, 2, 8], [4, 0, 1, 2, 3])
    assert not torch.equal(predict(one, 3), predict(other, 3))


def test_held_out_and_training_rows_see_equally_long_histories():
    # For a row outside the history the oldest slot is hidden, for a row inside its own: four slots either way.
    outside_a, outside_b = build([5, 3, 7, 2, 8], [0, 1, 1, 2, 3]), build([5, 3, 7, 2, 8], [0, 1, 1, 2, 0])
    assert torch.equal(predict(outside_a, 6), predict(outside_b, 6))
    assert not torch.equal(predict(outside_a, 3), predict(outside_b, 3))


def test_recent_interactions_can_matter_more():
    network = build([5, 3, 7, 2, 8], [0, 1, 1, 2, 3])
    swapped = build([2, 3, 7, 5, 8], [2, 1, 1, 0, 3])
    assert not torch.allclose(predict(network, 6), predict(swapped, 6))


@pytest.mark.parametrize("switch", [{"attention": False}, {"history_length": 0}, {"use_user_id": False}])
def test_parts_can_be_switched_off(prepared, switch):
    _, trainer, _, _ = prepared("AttnStudent", **switch)
    network = trainer.model.network
    assert (network.field_attention is None) == (switch.get("attention") is False)
    assert (network.history_attention is None) == (switch.get("history_length") == 0)
    assert ("field_user_id" in network.embeddings) == (switch.get("use_user_id") is not False)


def test_side_features_can_be_switched_off_one_by_one(prepared):
    def fields(**keys):
        network = prepared("AttnStudent", **keys)[1].model.network
        return set(network.user_fields + network.item_fields)

    assert fields() == {"user_id", "item_id", "group", "genre"}
    assert fields(feature_fields=["genre"]) == {"user_id", "item_id", "genre"}
    assert fields(feature_fields=[]) == {"user_id", "item_id"}
    with pytest.raises(InputError, match=r"feature_fields names .genr.*did you mean .genre."):
        fields(feature_fields=["genr"])


def test_a_field_may_be_called_like_an_attribute_of_a_module():
    items = FeatureTable(
        "item_id",
        3,
        {"type": torch.zeros(3, dtype=torch.long), "a.b": torch.zeros(3, dtype=torch.long)},
        {"type": 2, "a.b": 2},
    )
    network = AttentiveNetwork(ARCHITECTURE, FeatureTable("user_id", 2, {}, {}), items, None)
    assert network(torch.tensor([1]), torch.tensor([[1, 2]])).shape == (1, 2, 5)


@pytest.mark.parametrize("backbone", ["cnn", "mlp"])
@pytest.mark.parametrize("model", ["AttnStudent", "AttnTeacher", "AttnFedKD"])
def test_full_sort_equals_predicting_every_pair(prepared, model, backbone):
    _, trainer, _, _ = prepared(model, backbone=backbone)
    network = trainer.model.eval()
    users = torch.tensor([1, 5, 2, 29])
    every = network.full_sort_predict(Interaction({"user_id": users})).view(len(users), -1)
    items = torch.arange(every.shape[1])
    for row, user in enumerate(users):
        pairs = Interaction({"user_id": user.expand(len(items)), "item_id": items})
        torch.testing.assert_close(every[row], network.predict(pairs), rtol=1e-4, atol=1e-5)


def test_the_population_serves_each_user_by_his_own_client(prepared):
    _, trainer, _, _ = prepared()
    model = trainer.model.eval()
    users = torch.arange(1, 31)
    before = model.predict(Interaction({"user_id": users, "item_id": torch.full((30,), 3)}))
    with torch.no_grad():
        for parameter in model.networks[1].parameters():
            parameter.add_(1.0)
    after = model.predict(Interaction({"user_id": users, "item_id": torch.full((30,), 3)}))
    changed = before != after
    assert torch.equal(changed, model.client_of_user[users] == 1)


def test_a_clients_network_holds_the_rows_of_its_own_users_only(prepared):
    _, trainer, loaders, _ = prepared()
    model = trainer.model
    pairs = loaders[0]._dataset.inter_feat
    for number, network in enumerate(model.networks):
        members = torch.nonzero(model.client_of_user == number).flatten()
        assert network.embeddings["field_user_id"].weight.shape[0] == len(members) + 1
        for local, user in enumerate(members.tolist(), start=1):
            own = set(pairs["item_id"][pairs["user_id"] == user].tolist()) | {0}
            assert set(network.history_items[local].tolist()) <= own


def test_clients_start_from_the_same_shared_weights(prepared):
    _, trainer, _, _ = prepared()
    first, second = (dict(network.named_parameters()) for network in trainer.model.networks[:2])
    for name, weight in first.items():
        if name != "embeddings.field_user_id.weight":
            assert torch.equal(weight, second[name])


def test_histories_hold_training_rows_only_most_recent_first(prepared):
    _, trainer, loaders, _ = prepared("AttnStudent")
    train, valid, test = (loader._dataset.inter_feat for loader in loaders)
    items, labels = loaders[0]._dataset.history(5)
    stars = trainer.model.label_values
    for user in range(1, 31):
        rows = train["user_id"] == user
        order = train["recency_rank"][rows].argsort(descending=True)[:6]
        assert items[user][: len(order)].tolist() == train["item_id"][rows][order].tolist()
        assert stars[labels[user][: len(order)]].tolist() == train["rating"][rows][order].tolist()
        for held_out in (valid, test):
            assert not set(items[user].tolist()) & set(held_out["item_id"][held_out["user_id"] == user].tolist())


def test_no_history_of_ml_100k_holds_a_validation_or_test_row():
    from recbole_fedkd.config import FedKDConfig
    from recbole_fedkd.quick_start import _prepare

    config = FedKDConfig("AttnStudent", "ml-100k", config_dict={"state": "WARNING"})
    _, loaders, _ = _prepare(config)
    items, _ = loaders[0]._dataset.history(30)
    width = items.shape[1]
    users = np.repeat(np.arange(len(items)), width)
    seen = set(zip(users.tolist(), items.flatten().tolist(), strict=True))
    for loader in loaders[1:]:
        rows = loader._dataset.inter_feat
        assert not seen & set(zip(rows["user_id"].tolist(), rows["item_id"].tolist(), strict=True))
    trained = loaders[0]._dataset.inter_feat
    pairs = set(zip(trained["user_id"].tolist(), trained["item_id"].tolist(), strict=True))
    assert {pair for pair in seen if pair[1]} <= pairs


def test_ratings_stay_in_stars_whatever_the_datasets_yaml_says():
    from recbole_fedkd.config import FedKDConfig
    from recbole_fedkd.quick_start import create_dataset

    config = FedKDConfig("AttnStudent", "ml-100k", config_dict={"state": "WARNING"})
    assert config["normalize_all"] is True
    dataset = create_dataset(config)
    assert dataset.label_values == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_regulariser_touches_only_the_rows_of_the_batch(prepared):
    _, trainer, _, _ = prepared("AttnStudent", history_length=0)
    network = trainer.model.network
    network.touched_squared_norm(torch.tensor([1, 2]), torch.tensor([[3], [4]])).backward()
    item_gradient = network.embeddings["field_item_id"].weight.grad.abs().sum(1)
    assert torch.nonzero(item_gradient).flatten().tolist() == [3, 4]
    assert all(parameter.grad is not None for parameter in network.backbone.parameters())


@pytest.mark.parametrize("kept", [0.8, 0.31])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 16), (129, 17)])
def test_dropout_draws_a_number_an_entry_in_order_whoever_made_the_processor(kept, shape):
    values = torch.randn(shape)
    torch.manual_seed(4)
    drawn = [float(torch.rand((), dtype=torch.float64)) for _ in range(values.numel())]
    expected, state = (torch.tensor(drawn).view(shape) < kept).float(), torch.get_rng_state()
    torch.manual_seed(4)
    assert torch.equal(drawn_mask(values, kept), expected) and torch.equal(torch.get_rng_state(), state)
