"""Federation: what crosses, what does not, and equality with a simple slow version of a round."""

import copy
import io
import pickle
import shutil
import struct

import numpy as np
import pytest
import torch
from torch.nn import functional

from recbole_fedkd.federated.draws import KeyedDraws, StreamDraws
from recbole_fedkd.federated.message import ArraySpec, Message, Schema
from recbole_fedkd.federated.strategy import STRATEGIES, Strategy, register_strategy
from recbole_fedkd.federated.task import sample_negatives, shuffled
from recbole_fedkd.model.dropout import dropping_by

EXCHANGING = ["afd", "fd"]


def engine_of(prepared, model="AttnFedKD", **keys):
    _, trainer, _, _ = prepared(model, **keys)
    return trainer, trainer.engine


def record_payloads(engine):
    """Everything that crosses from now on, as ``(direction, client, bytes)``."""
    crossed = []
    send_down = engine.server.send

    def spy_down(client, round_index):
        payload = send_down(client, round_index)
        crossed.append(("down", client, payload))
        return payload

    engine.server.send = spy_down
    for client in engine.clients:
        send_up = client.send

        def spy_up(round_index, number=client.number, send_up=send_up):
            payload = send_up(round_index)
            crossed.append(("up", number, payload))
            return payload

        client.send = spy_up
    return crossed


@pytest.mark.parametrize("strategy", EXCHANGING)
def test_only_label_knowledge_crosses_whatever_the_size_of_model_and_data(prepared, strategy):
    sizes = set()
    for width in (4, 32):
        _, engine = engine_of(prepared, strategy=strategy, embedding_size=width)
        crossed = record_payloads(engine)
        report = [engine.run_round(index) for index in range(2)][1]
        assert {direction for direction, _, payload in crossed if payload} == {"down", "up"}
        for direction, _, payload in crossed:
            if not payload:
                continue
            message = Message.from_bytes(payload)
            shapes = {name: array.shape for name, array in message.arrays.items()}
            assert shapes == {"sums": (5, 5), "weights": (5,)}
            sizes.add((direction, len(payload)))
            assert len(payload) < 300
        counted = sum(len(payload) for _, _, payload in crossed[-2 * len(engine.clients) :])
        assert report.total_bytes == counted
    assert len(sizes) == 2


@pytest.mark.parametrize("strategy", ["afd", "fd", "local"])
def test_a_marker_planted_in_private_data_never_leaves_in_a_message(prepared, strategy):
    marker = 12345.678
    trainer, engine = engine_of(prepared, strategy=strategy, learner="sgd", learning_rate=0.0)
    with torch.no_grad():
        for network in trainer.model.networks:
            network.embeddings["field_user_id"].weight.fill_(marker)
    crossed = record_payloads(engine)
    for index in range(2):
        engine.run_round(index)
    patterns = [struct.pack(code, marker) for code in ("<f", ">f", "<d", ">d")]
    for client in engine.clients:
        for ids in (client.task.samples.users[:4], client.task.samples.items[:4]):
            for dtype in (np.int64, np.int32, np.float32):
                patterns.append(ids.numpy().astype(dtype).tobytes())
    assert all(pattern not in payload for _, _, payload in crossed for pattern in patterns)
    assert any(payload for _, _, payload in crossed) == (strategy != "local")


def test_the_server_and_the_clients_share_no_memory(prepared):
    _, engine = engine_of(prepared, strategy="afd")
    engine.run_round(0)
    engine.run_round(1)
    server = {tensor.untyped_storage().data_ptr() for tensor in engine.server.state.values()}
    held = set()
    for client in engine.clients:
        own = {parameter.untyped_storage().data_ptr() for parameter in client.task.network.parameters()}
        own |= {tensor.untyped_storage().data_ptr() for tensor in client.received.values()}
        own |= {
            getattr(client.task.samples, name).untyped_storage().data_ptr() for name in ("users", "items", "labels")
        }
        assert not own & server
        assert not own & held
        held |= own


class Reached(pickle.Pickler):
    """Notes the memory of every tensor and array that an object can reach."""

    def __init__(self):
        super().__init__(io.BytesIO())
        self.storages = set()

    def persistent_id(self, reached):
        if isinstance(reached, torch.Tensor):
            self.storages.add(reached.untyped_storage().data_ptr())
            return "tensor"
        return "array" if isinstance(reached, np.ndarray) and reached.dtype != object else None


@pytest.mark.parametrize(
    ("model", "keys"),
    [
        ("AttnFedKD", {"strategy": "afd"}),
        ("AttnFedKD", {"strategy": "fedavg", "codecs": ["int8"]}),
        ("AttnFedKD", {"strategy": "fedkd"}),
        ("AttnFedKD", {"strategy": "fedavg", "label_mode": "implicit"}),
        ("MF", {"strategy": "fedavg"}),
        ("BPR", {"strategy": "fedavg"}),
        ("WideDeep", {"strategy": "fedavg", "label_mode": "threshold"}),
    ],
)
def test_nothing_of_another_client_is_in_a_clients_reach(prepared, model, keys):
    _, engine = engine_of(prepared, model=model, **keys)
    engine.run_round(0)
    of_each = []
    for client in engine.clients:
        pickle.dumps(client)  # as it is, classes and all
        pickler = Reached()
        pickler.dump(client)
        of_each.append(pickler.storages)
    for number, client in enumerate(engine.clients):
        own = {value.untyped_storage().data_ptr() for value in client.task.network.parameters()}
        if hasattr(client.task, "samples"):
            own |= {getattr(client.task.samples, name).untyped_storage().data_ptr() for name in ("items", "labels")}
        else:
            columns = client.task._build_loader.args[1].inter_feat.interaction
            own |= {column.untyped_storage().data_ptr() for column in columns.values()}
        assert own <= of_each[number]
        assert all(not own & reached for other, reached in enumerate(of_each) if other != number)


def test_a_clients_teacher_does_not_depend_on_its_own_upload(prepared):
    def teacher_of_client_0(perturb: bool):
        _, engine = engine_of(prepared, strategy="afd")
        if perturb:
            with torch.no_grad():
                for parameter in engine.clients[0].task.network.parameters():
                    parameter.mul_(3.0)
        engine.run_round(0)
        engine.clients[0].receive(engine.server.send(0, 1))
        return engine.clients[0].received["teacher"].numpy()

    np.testing.assert_array_equal(teacher_of_client_0(False), teacher_of_client_0(True))


def test_no_two_clients_or_rounds_or_runs_share_a_seed():
    drawn = [KeyedDraws(run, range(300), index).seeds for run in (0, 1, 2020) for index in range(20)]
    seeds = {seed for of_clients in drawn for seed in of_clients}
    assert len(seeds) > 18_000 - 4  # of 32 bits: a chance collision in 18,000 draws is a matter of 4 %
    assert all(0 <= seed < 2**32 for seed in seeds)
    bits = np.array([[seed >> place & 1 for place in range(32)] for seed in seeds])
    assert (abs(bits.mean(0) - 0.5) < 0.02).all()


def slow_round(networks, samples, teachers, keys, round_index):
    """One round of AFD in plain loops: what the engine must do."""
    uploads = []
    for number, (network, (users, items, labels)) in enumerate(zip(networks, samples, strict=True)):
        optimizer = torch.optim.SGD(network.parameters(), lr=keys["learning_rate"])
        network.train()
        draws = KeyedDraws(2020, [number], round_index)
        order = draws.epoch().orders([len(users)])[0]
        with dropping_by(network, draws.dropout.of_one):
            for batch in order.split(keys["train_batch_size"]):
                logits = network(users[batch], items[batch, None])[:, 0]
                loss = functional.cross_entropy(logits, labels[batch])
                if teachers is not None:
                    for row, label in zip(logits, labels[batch], strict=True):
                        target, known = teachers[number]
                        if known[label]:
                            q, log_q = target[label].softmax(0), target[label].log_softmax(0)
                            log_p = row.log_softmax(0)
                            term = (
                                -keys["gamma"] * (q * log_p).sum()
                                + keys["alpha"] * (log_p.exp() * (log_p - log_q)).sum()
                            )
                            loss = loss + term / len(batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        network.eval()
        with torch.no_grad():
            logits = network(users, items[:, None])[:, 0]
        uploads.append({label: logits[labels == label].mean(0) for label in range(5) if (labels == label).any()})
    following = []
    for number in range(len(networks)):
        target, known = torch.zeros(5, 5), [False] * 5
        for label in range(5):
            others = [upload[label] for k, upload in enumerate(uploads) if k != number and label in upload]
            if others:
                target[label], known[label] = torch.stack(others).mean(0), True
        following.append((target, known))
    return following


def test_two_rounds_equal_a_slow_version_in_plain_loops(prepared):
    keys = {"learning_rate": 0.05, "train_batch_size": 64, "gamma": 0.4, "alpha": 0.2}
    _, engine = engine_of(prepared, strategy="afd", learner="sgd", **keys)
    networks = [copy.deepcopy(client.task.network) for client in engine.clients]
    samples = [(c.task.samples.users, c.task.samples.items, c.task.samples.labels) for c in engine.clients]
    teachers = None
    for index in range(2):
        engine.run_round(index)
        teachers = slow_round(networks, samples, teachers, keys, index)
    for client, network in zip(engine.clients, networks, strict=True):
        for (name, fast), slow in zip(client.task.network.named_parameters(), network.parameters(), strict=True):
            torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert engine.server.send(0, 2) == engine.server.send(1, 2)
    engine.clients[1].receive(engine.server.send(1, 2))
    torch.testing.assert_close(engine.clients[1].received["teacher"], teachers[1][0], rtol=1e-4, atol=1e-4)


def test_the_order_in_which_clients_run_changes_nothing(prepared):
    _, forward = engine_of(prepared, strategy="afd")
    _, backward = engine_of(prepared, strategy="afd")
    backward.clients.reverse()
    for index in range(2):
        forward.run_round(index)
        backward.run_round(index)
    for one, other in zip(forward.clients, reversed(backward.clients), strict=True):
        for a, b in zip(one.task.network.parameters(), other.task.network.parameters(), strict=True):
            assert torch.equal(a, b)


def test_fd_is_afd_without_divergence(prepared):
    _, afd = engine_of(prepared, strategy="afd", alpha=0.0, aggregation="weighted", gamma=0.3)
    _, fd = engine_of(prepared, strategy="fd", alpha=0.9, aggregation="weighted", gamma=0.3)
    for index in range(2):
        afd.run_round(index)
        fd.run_round(index)
    for one, other in zip(afd.clients, fd.clients, strict=True):
        assert all(
            torch.equal(a, b)
            for a, b in zip(one.task.network.parameters(), other.task.network.parameters(), strict=True)
        )


def test_knowledge_is_the_mean_of_one_clean_pass_however_many_local_epochs(prepared):
    _, engine = engine_of(prepared, strategy="afd", local_epochs=3, dropout_prob=0.5)
    client = engine.clients[0]
    client.train(0)
    sent = Message.from_bytes(client.send(0)).arrays
    client.task.network.eval()
    with torch.no_grad():
        logits = client.task.network(client.task.samples.users, client.task.samples.items[:, None])[:, 0]
    for label in range(5):
        rows = client.task.samples.labels == label
        assert sent["weights"][label] == int(rows.any())
        if rows.any():
            np.testing.assert_allclose(sent["sums"][label], logits[rows].mean(0).numpy(), rtol=1e-4, atol=1e-5)


def test_last_epoch_knowledge_counts_every_sample_once(prepared):
    _, engine = engine_of(prepared, strategy="afd", aggregation="weighted", local_epochs=3, knowledge_pass="last_epoch")
    client = engine.clients[0]
    client.train(0)
    assert Message.from_bytes(client.send(0)).arrays["weights"].sum() == len(client.task.samples)


def test_an_error_inside_a_client_names_client_round_and_stage(prepared):
    from recbole_fedkd.engine import ClientError

    _, engine = engine_of(prepared)
    engine.clients[1].task.network.backbone = None
    with pytest.raises(ClientError, match="client 1, round 5, training"):
        engine.run_round(4)


@pytest.mark.parametrize(("ratio", "trims"), [(0.3, False), (0.4, True)])
def test_a_trimmed_mean_that_leaves_nobody_out_is_told(prepared, caplog, ratio, trims):
    prepared("AttnFedKD", strategy="afd", client_num=4, aggregation="trimmed_mean", trim_ratio=ratio)
    sentence = "trim_ratio=0.3 of 3 other client(s) is less than one: aggregation=trimmed_mean leaves nobody out"
    assert (sentence in caplog.text) is not trims


@pytest.mark.parametrize(("chosen", "trims"), [(3, False), (None, True)])
def test_a_robust_mean_that_leaves_nobody_of_a_round_out_is_told(prepared, caplog, chosen, trims):
    keys = {"strategy": "fedavg", "robust_mean": "trimmed_mean", "trim_ratio": 0.3, "clients_per_round": chosen}
    prepared("AttnFedKD", client_num=4, **keys)
    sentence = "trim_ratio=0.3 of 3 client(s) is less than one: robust_mean=trimmed_mean leaves nobody out"
    assert (sentence in caplog.text) is not trims


def test_a_client_without_a_training_sample_is_named_and_sits_out(prepared, monkeypatch, caplog):
    _, trainer, loaders, evaluations = prepared(strategy="afd", partition="user")
    dataset = loaders[0]._dataset
    keep = dataset.inter_feat["user_id"] != 4
    dataset.inter_feat = dataset.inter_feat[torch.nonzero(keep).flatten()]
    engine = trainer.prepare(loaders[0])
    assert trainer.idle_clients == [3]
    assert "1 client(s) hold no training sample (3)" in caplog.text
    trainer.engine = engine
    before = copy.deepcopy(trainer.model.networks[3].state_dict())
    engine.run_round(0)
    assert 3 not in engine.run_round(1).bytes_up
    after = trainer.model.networks[3].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    result = trainer.evaluate(evaluations[1], load_best_model=False)
    assert np.isfinite(list(result.values())).all()


def test_gradient_clipping_reaches_the_clients(prepared):
    def first_step(**keys):
        _, engine = engine_of(prepared, strategy="local", learner="sgd", learning_rate=1.0, **keys)
        before = [parameter.detach().clone() for parameter in engine.clients[0].task.network.parameters()]
        task = engine.clients[0].task
        task.samples = task.samples.select(torch.arange(32))
        engine.clients[0].train(0)
        moved = zip(before, engine.clients[0].task.network.parameters(), strict=True)
        return float(sum((new - old).pow(2).sum() for old, new in moved).sqrt())

    assert first_step() > 0.02
    assert first_step(clip_grad_norm={"max_norm": 0.01}) == pytest.approx(0.01, rel=1e-3)


def test_negatives_are_never_training_positives_and_all_others_come_up():
    users = torch.tensor([1, 1, 1, 2, 2])
    items = torch.tensor([1, 2, 3, 4, 5])
    positives = torch.unique(users * 7 + items)
    asked = torch.tensor([1, 2]).repeat(500)
    drawn = sample_negatives(asked, positives, 7, StreamDraws(torch.Generator().manual_seed(0)))
    assert set(drawn[asked == 1].tolist()) == {4, 5, 6}
    assert set(drawn[asked == 2].tolist()) == {1, 2, 3, 6}


def test_a_user_with_every_item_cannot_be_sampled_for():
    positives = torch.tensor([1 * 4 + 1, 1 * 4 + 2, 1 * 4 + 3])
    with pytest.raises(ValueError, match="every item"):
        sample_negatives(torch.tensor([1]), positives, 4, StreamDraws(torch.Generator()))


def test_a_strategy_can_be_added_from_outside(run):
    @register_strategy
    class Shout(Strategy):
        """Sends one number up and nothing down."""

        name = "shout"

        def download(self, state, client, round_index):
            return None

        def loss(self, step, received, shared):
            return step.loss

        def upload(self, result, client, round_index):
            return Message("shout", round_index, client, {"one": np.ones(1, np.float32)})

        def upload_schema(self, state):
            return Schema("shout", {"one": ArraySpec((1,), np.float32)})

        def aggregate(self, state, uploads):
            return {"heard": torch.tensor([float(len(uploads))])}

    try:
        result = run(strategy="shout", epochs=1)
        assert result["communication"]["bytes_up"] > 0 and result["communication"]["bytes_down"] == 0
    finally:
        del STRATEGIES["shout"]


def test_an_epoch_has_the_order_of_torchs_loader_and_leaves_its_generator_as_the_loader_does():
    ours, loaders = (torch.Generator().manual_seed(5) for _ in range(2))
    loader = torch.utils.data.DataLoader(range(11), 4, shuffle=True, generator=loaders, collate_fn=torch.tensor)
    for _ in range(3):
        expected = list(loader)
        drawn = list(shuffled(11, 4, ours))
        assert all(torch.equal(a, b) for a, b in zip(drawn, expected, strict=True))
        assert torch.equal(ours.get_state(), loaders.get_state())


@pytest.mark.parametrize(
    "keys", [{"engine": "local", "preset": "factors"}, {"engine": "fleet", "strategy": "fedavg"}], ids=str
)
def test_labels_among_which_is_no_1_are_labels(run, data_path, tmp_path, keys):
    """Rows are made up where networks are built of what is public, and their label has to be one."""
    folder = tmp_path / "shifted" / "tiny"
    shutil.copytree(data_path / "tiny", folder)
    lines = (folder / "tiny.inter").read_text().splitlines()
    rows = [line.split("\t") for line in lines[1:]]
    moved = [f"{user}\t{item}\t{int(stars) + 10}\t{time}" for user, item, stars, time in rows]
    (folder / "tiny.inter").write_text("\n".join([lines[0], *moved]) + "\n")
    result = run(data_path=str(folder.parent), epochs=1, **keys)
    assert result["test_result"]["mae"] < 5
