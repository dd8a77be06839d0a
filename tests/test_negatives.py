"""Honest negatives: a held-out item is as likely a training negative as any other item that the user has not met."""

import pytest
import torch
from recbole.model.abstract_recommender import AbstractRecommender
from recbole.utils import InputType, ModelType

from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.quick_start import _prepare

LEAVE_ONE_OUT = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": None}
RANKING = {"metrics": ["Hit", "NDCG"], "valid_metric": "NDCG@10", "topk": [10], "label_mode": "implicit"}
MANY = {"distribution": "uniform", "sample_num": 150, "alpha": 1.0, "dynamic": False, "candidate_num": 0}


def protocol(mode):
    return {"eval_args": {**LEAVE_ONE_OUT, "mode": {"valid": mode, "test": mode}}, **RANKING}


class Counter(AbstractRecommender):
    """No model: the fewer times an item came up as a negative of the user's, the better; ties in random order."""

    input_type, type = InputType.POINTWISE, ModelType.GENERAL

    def __init__(self, shown):
        super().__init__()
        noise = torch.rand(shown.shape, generator=torch.Generator().manual_seed(0))
        self.scores = -shown.float() - 0.5 * noise

    def predict(self, interaction):
        return self.scores[interaction["user_id"], interaction["item_id"]]

    def full_sort_predict(self, interaction):
        return self.scores[interaction["user_id"]].flatten()


def interactions(dataset):
    return dataset.inter_feat["user_id"], dataset.inter_feat["item_id"]


def shown_negatives(trainer):
    """How many times the clients drew each item as a negative of each user's, ``[users, items]``."""
    model = trainer.model
    shown = torch.zeros(len(model.client_of_user), model.item_num, dtype=torch.long)
    for number, client in enumerate(trainer.engine.clients):
        (user,) = torch.nonzero(model.client_of_user == number).flatten().tolist()
        for batch in client.task.clean_batches():
            shown[user] += torch.bincount(batch.items[batch.labels == 0], minlength=model.item_num)
    return shown


def test_a_counter_of_negatives_knows_nothing_unless_held_out_items_are_spared():
    keys = {"train_neg_sample_args": MANY, "show_progress": False, "state": "WARNING", "embedding_size": 1}
    clients = {"strategy": "fedavg", "partition": "user"}
    trainer, loaders, sampled = _prepare(FedKDConfig("MF", "ml-100k", config_dict=keys | clients | protocol("uni99")))
    _, _, full = _prepare(FedKDConfig("MF", "ml-100k", config_dict=keys | protocol("full")))
    model = trainer.model

    def hits(shown):
        trainer.model = Counter(shown)
        found = [trainer.evaluate(each[1], load_best_model=False)["hit@10"] for each in (sampled, full)]
        trainer.model = model
        return found

    honest = hits(shown_negatives(trainer))
    for number, client in enumerate(trainer.engine.clients):
        (user,) = torch.nonzero(model.client_of_user == number).flatten().tolist()
        own = [items[users == user] for users, items in (interactions(loader._dataset) for loader in loaders)]
        client.task._positives = torch.unique(model.item_num + torch.cat(own))
    dishonest = hits(shown_negatives(trainer))
    for found, chance in zip(honest, (10 / 100, 10 / 1575), strict=True):
        assert found == pytest.approx(chance, abs=4 * (chance * (1 - chance) / 943) ** 0.5)
    # The item held out for validation was never shown either, and users with few interactions draw few negatives.
    assert dishonest[0] > 0.8 and dishonest[1] > 0.4


@pytest.mark.parametrize(
    ("model", "keys"),
    [
        ("MF", {"strategy": "fedavg", "partition": "user"}),
        ("MF", {"strategy": "fedavg", "client_num": 3}),
        ("AttnFedKD", {"strategy": "afd", "partition": "user"}),
        ("NeuMF", {"strategy": "fedavg", "partition": "user"}),
        ("BPR", {"strategy": "fedavg", "client_num": 3}),
        ("MF", {}),
        ("NeuMF", {}),
    ],
)
def test_every_item_but_the_users_training_positives_comes_up_as_a_negative(prepared, model, keys):
    sampling = {**MANY, "sample_num": 1 if model == "BPR" else 20}
    keys = {"train_batch_size": 4096, **keys}
    _, trainer, loaders, _ = prepared(model, train_neg_sample_args=sampling, **keys, **protocol("full"))
    federated = "strategy" in keys
    users, items = interactions(loaders[0]._dataset)
    met = set(zip(users.tolist(), items.tolist(), strict=True))
    batches = [loaders[0]] if not federated else [client.task.batches for client in trainer.engine.clients]
    drawn = set()
    for number, source in enumerate(batches):
        for _ in range(60 if model == "BPR" else 12):
            for batch in source() if federated else source:
                drawn |= set(negatives_of(batch, trainer.model, number))
    unmet = {(user, item) for user in range(1, 31) for item in range(1, 41)} - met
    assert drawn == unmet


def negatives_of(batch, model, client):
    """User and item of every negative of a batch, in the dataset's ids."""
    if hasattr(batch, "labels"):
        members = torch.nonzero(model.client_of_user == client).flatten()
        users, items = members[batch.users[batch.labels == 0] - 1], batch.items[batch.labels == 0]
    elif "neg_item_id" in batch.interaction:
        users, items = batch["user_id"], batch["neg_item_id"]
    else:
        users, items = batch["user_id"][batch["label"] == 0], batch["item_id"][batch["label"] == 0]
    return zip(users.tolist(), items.tolist(), strict=True)


@pytest.mark.parametrize(("mode", "sentence"), [("uni99", "99 uniform negatives"), ("full", "full sort of all items")])
def test_leave_one_out_with_one_client_per_user_names_its_protocol(run, mode, sentence):
    mode = mode.replace("99", "9")
    result = run("MF", strategy="fedavg", partition="user", epochs=1, **protocol(mode))
    expected = f"{sentence.replace('99', '9')}, relevant: held-out test rows (leave-one-out, the latest of each user)"
    assert result["protocols"] == {"hit@10": expected, "ndcg@10": expected}
    central = run("MF", epochs=1, **protocol(mode))
    fleet = run("MF", strategy="fedavg", partition="user", engine="fleet", epochs=1, **protocol(mode))
    assert central["protocols"] == fleet["protocols"] == result["protocols"]
    assert fleet["test_result"] == pytest.approx(result["test_result"], abs=0.04)


def test_leave_one_out_holds_out_the_latest_of_each_user(prepared):
    _, _, loaders, _ = prepared("MF", strategy="fedavg", partition="user", **protocol("full"))
    times = [loader._dataset.inter_feat for loader in loaders]
    assert [len(each) for each in times] == [30 * 18, 30, 30]
    for user in range(1, 31):
        of_user = [each["recency_rank"][each["user_id"] == user].numpy() for each in times]
        assert of_user[0].max() < of_user[1].min() <= of_user[1].max() < of_user[2].min()


def test_a_random_interaction_held_out_is_not_called_the_latest(run):
    keys = {**protocol("full"), "eval_args": {**LEAVE_ONE_OUT, "order": "RO", "mode": "full"}}
    told = run("MF", epochs=1, **keys)["protocols"]["hit@10"]
    assert told.endswith("held-out test rows (leave-one-out, at random)")
