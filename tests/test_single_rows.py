"""A batch of one row: batch normalisation takes its running statistics, and no model of RecBole ends in a traceback."""

from itertools import islice

import pytest
import torch
from torch import nn

from recbole_fedkd.model import normalise_single_rows

CLICKS = {"threshold": {"rating": 3}}
BATCHES = {"MAX_ITEM_LIST_LENGTH": 4}
# Models that torch or RecBole refused a batch of one row.
MODELS = {
    "NFM": CLICKS,
    "DCN": CLICKS,
    "DCNV2": CLICKS,
    "DSSM": CLICKS,
    "KD_DAGFM": CLICKS,
    "DIN": BATCHES,
    "DIEN": BATCHES,
    "BERT4Rec": {**BATCHES, "mask_ratio": 0.3, "train_neg_sample_args": None},
}


def test_one_row_is_normalised_by_the_running_statistics_and_leaves_them():
    layer = nn.BatchNorm1d(2)
    normalise_single_rows(layer)
    layer(torch.tensor([[0.0, 2.0], [4.0, 2.0], [2.0, 8.0]]))  # mean 2 and 4, unbiased variance 4 and 12
    mean, variance, batches = layer.running_mean.clone(), layer.running_var.clone(), int(layer.num_batches_tracked)
    assert mean.tolist() == pytest.approx([0.2, 0.4])
    assert variance.tolist() == pytest.approx([1.3, 2.1])
    row = torch.tensor([[3.2, 0.4]], requires_grad=True)
    out = layer(row)
    assert out[0].tolist() == pytest.approx([3.0 / (1.3 + 1e-5) ** 0.5, 0.0], abs=1e-6)
    out.sum().backward()
    assert row.grad[0].tolist() == pytest.approx([(1.3 + 1e-5) ** -0.5, (2.1 + 1e-5) ** -0.5])
    assert layer.bias.grad.tolist() == [1.0, 1.0]
    assert layer.training
    assert (layer.running_mean == mean).all()
    assert (layer.running_var == variance).all()
    assert int(layer.num_batches_tracked) == batches


@pytest.mark.parametrize("shape", [(2, 3), (5, 3), (1, 3, 2), (4, 3, 2)])
@pytest.mark.parametrize("training", [True, False])
def test_every_other_batch_is_normalised_bit_for_bit_as_torch_does(shape, training):
    ours, torchs = nn.BatchNorm1d(3).train(training), nn.BatchNorm1d(3).train(training)
    normalise_single_rows(ours)
    for _ in range(3):
        rows = torch.randn(shape)
        assert torch.equal(ours(rows), torchs(rows))
    assert ours.state_dict().keys() == torchs.state_dict().keys()
    assert all(torch.equal(value, torchs.state_dict()[name]) for name, value in ours.state_dict().items())


def test_a_model_without_batch_normalisation_is_not_touched(prepared):
    _, trainer, _, _ = prepared("BPR")
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in trainer.model.modules())


@pytest.mark.parametrize("model", MODELS)
def test_an_epoch_whose_last_batch_is_one_row_trains(prepared, model):
    _, trainer, loaders, evaluations = prepared(model, epochs=1, **MODELS[model])
    rows = len(loaders[0]._dataset)
    sizes = []
    _, trainer, loaders, evaluations = prepared(
        model, epochs=1, train_batch_size=(rows - 1) * (2 if model in ("DIN", "DIEN") else 1), **MODELS[model]
    )
    original = trainer.model.calculate_loss
    trainer.model.calculate_loss = lambda batch: sizes.append(len(batch)) or original(batch)
    trainer.fit(loaders[0], evaluations[0], saved=False)
    assert min(sizes) <= 2  # the row, and its sampled negative where there is one


@pytest.mark.parametrize("model", MODELS)
def test_the_loss_of_one_row_is_a_number(prepared, model):
    _, trainer, loaders, _ = prepared(model, train_batch_size=1, **MODELS[model])
    trainer.model.train()
    for batch in islice(loaders[0], 60):
        loss = trainer.model.calculate_loss(batch)
        assert torch.isfinite(loss)
        loss.backward()
    assert all(torch.isfinite(each.grad).all() for each in trainer.model.parameters() if each.grad is not None)


@pytest.mark.parametrize("engine", ["local", "fleet"])
@pytest.mark.parametrize("model", ["NFM", "DCN", "DCNV2", "DSSM"])
def test_clients_of_one_row_take_part(tmp_path, model, engine):
    from recbole_fedkd import run_recbole_fedkd

    folder = tmp_path / "lone"
    folder.mkdir()
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    for user in range(6):
        for row in range(3 if user < 3 else 12):  # leave-one-out leaves the first three users one row
            lines.append(f"u{user}\ti{(user * 5 + row) % 17}\t{1 + (row + user) % 5}\t{row}")
    (folder / "lone.inter").write_text("\n".join(lines) + "\n")
    result = run_recbole_fedkd(
        model,
        "lone",
        config_dict={
            "data_path": str(tmp_path),
            "load_col": {"inter": ["user_id", "item_id", "rating", "timestamp"]},
            "threshold": {"rating": 3},
            "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "labeled"},
            "strategy": "fedavg",
            "partition": "user",
            "client_num": 6,
            "engine": engine,
            "epochs": 2,
            "show_progress": False,
            "state": "ERROR",
        },
        saved=False,
    )
    assert [client["samples"] for client in result["partition"]["clients"]].count(1) == 3
    assert not result["partition"]["idle_clients"]
    assert result["test_result"]
