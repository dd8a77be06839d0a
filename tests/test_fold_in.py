"""Students that the fold-in teaches: what they are told of a pair, what is minimised, and label knowledge on top of it."""

from types import SimpleNamespace

import pytest
import torch

from recbole_fedkd import load_data_and_model
from recbole_fedkd.distillation.exchange import FactorExchange, FactorSettings
from recbole_fedkd.distillation.factors import Rows
from recbole_fedkd.errors import InputError
from recbole_fedkd.model.received import ReceivedTables

KEYS = {
    "strategy": "afd",
    "knowledge": "fold_in",
    "factor_size": 2,
    "sketch_width": 3,
    "sketch_passes": 1,
    "em_steps": 1,
    "metrics": ["MAE"],
    "valid_metric": "MAE",
    "use_user_id": False,
}
EXCHANGE = 4


@pytest.fixture
def taught(prepared):
    """A federation whose exchange is over."""

    def federation(**keys):
        _, trainer, _, _ = prepared("AttnFedKD", **{**KEYS, **keys})
        for index in range(EXCHANGE + 1):
            trainer.engine.run_round(index)
        return trainer.engine

    return federation


def test_the_loss_is_that_of_labels_and_of_the_teacher_on_rated_and_unrated_pairs(taught):
    engine = taught(fold_in_weight=0.7, unrated_pairs=2, reg_weight=0.0)
    task = engine.clients[0].task
    task.network.eval()
    batch = next(task.clean_batches())
    torch.manual_seed(3)
    loss = task.step(batch, True).loss
    torch.manual_seed(3)
    drawn = torch.randint(1, task.item_count, (2 * len(batch),))
    users, items = batch.users.repeat(3), torch.cat([batch.items, drawn])
    logits = task.network(users, items.unsqueeze(1)).squeeze(1)
    teacher = task.teacher.teacher(users, items).softmax(1)
    own = torch.nn.functional.cross_entropy(logits[: len(batch)], batch.labels)
    expected = own - 0.7 * (teacher * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss, expected)


def test_the_teacher_of_a_row_has_not_seen_its_label(taught):
    client = taught().clients[0]
    told, rows = client.task.teacher, client.task.teacher.exchange.rows
    other, _ = told.received.known_users.of_pairs(rows.users, rows.items)
    mean, _ = told.described(rows.users, rows.items)
    error = (mean - rows.values).square().mean()
    assert error > 1.2 * (other - rows.values).square().mean()
    torch.testing.assert_close(mean, told.received.of_rows[0])


def test_a_student_that_is_not_told_what_teaches_it_has_no_more_parameters(taught):
    network = taught().clients[0].task.network
    assert network._seen is None and not hasattr(network, "known_field")
    assert taught(known_features=True).clients[0].task.network.known_field.weight.grad is not None


def test_label_knowledge_follows_the_exchange_and_each_client_hears_the_others(taught):
    engine = taught(label_knowledge=True)  # its last round was the first of label knowledge
    client, state = engine.clients[0], engine.server.state
    others = [state[name].float() - client.link.sent[name] for name in ("sums", "weights")]
    assert min(engine.run_round(EXCHANGE + 1).bytes_up.values()) > 0
    known = others[1] > 0
    assert known.any() and torch.equal(client.received["known"], known)
    expected = (others[0] / others[1].unsqueeze(1))[known]
    torch.testing.assert_close(client.received["teacher"][known], expected, atol=1e-5, rtol=1e-4)
    assert set(client.received) >= {"histogram", "gradient_0"}


def test_clients_are_silent_after_the_exchange_without_label_knowledge(taught):
    assert sum(taught().run_round(EXCHANGE + 1).bytes_up.values()) == 0


@pytest.mark.parametrize("keys", [{}, {"known_features": True, "label_knowledge": True}])
def test_a_run_that_is_resumed_or_loaded_knows_the_same(run, tmp_path, keys):
    keys = {**KEYS, **keys, "epochs": EXCHANGE + 3, "stopping_step": 1}
    whole = run("AttnFedKD", checkpoint_dir=str(tmp_path / "whole"), **keys)
    assert len(whole["rounds"]) > EXCHANGE  # patience is not with rounds in which nobody trains
    cut = run("AttnFedKD", checkpoint_dir=str(tmp_path / "cut"), **{**keys, "epochs": EXCHANGE + 1})
    again = run("AttnFedKD", resume=cut["run_folder"], **keys)
    assert again["test_result"] == whole["test_result"]
    _, one, *_ = load_data_and_model(whole["run_folder"])
    _, other, *_ = load_data_and_model(again["run_folder"])
    pairs = SimpleNamespace(users=torch.tensor([1, 2]), items=torch.tensor([[1, 2, 3], [4, 5, 6]]))
    with torch.no_grad():
        assert torch.equal(one.logits(pairs.users, pairs.items), other.logits(pairs.users, pairs.items))


@pytest.mark.parametrize(("keys", "sentence"), [
    ({"label_mode": "implicit", "metrics": ["AUC"], "valid_metric": "AUC"}, "knowledge=fold_in is made of labels"),
    ({"clients_per_round": 1}, "needs every client in its exchange"),
])  # fmt: skip
def test_what_cannot_go_with_a_fold_in_is_refused(run, keys, sentence):
    with pytest.raises(InputError, match=sentence):
        run("AttnFedKD", saved=False, **{**KEYS, **keys})


def test_students_of_several_sizes_are_taught(taught):
    engine = taught(student_pool=[{"embedding_size": 2}, {"embedding_size": 6, "hidden_sizes": [6, 8]}])
    widths = [client.task.network.architecture.embedding_size for client in engine.clients]
    assert set(widths) == {2, 6}


def test_a_client_that_has_all_rows_is_trained_on_what_is_known_of_them():
    generator = torch.Generator().manual_seed(1)
    users, items = torch.nonzero(torch.rand(60, 12, generator=generator) < 0.6, as_tuple=True)
    strength = torch.randn(12, generator=generator)[items]
    labels = torch.bucketize(strength + 0.3 * torch.randn(len(users), generator=generator), torch.tensor([-0.5, 0.5]))
    values = torch.tensor([1.0, 2.0, 3.0])
    rows = Rows(users + 1, items, values.double()[labels], 61, 12)
    exchange = FactorExchange(
        FactorSettings(factor_size=2, sketch_width=3, sketch_passes=1, em_steps=1), rows, labels, values
    )
    totals = {}
    for stage in exchange.settings.stages:
        totals.update(exchange.answer(stage, totals))
    told = ReceivedTables(exchange)
    told.know(totals, totals)
    means, features = told.of_rows
    assert torch.corrcoef(torch.stack([means.double(), rows.values]))[0, 1] > 0.7
    assert features.std(0)[0] > 0.5
