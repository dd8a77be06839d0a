"""What a checkpoint may do: be loaded, ready to predict, for RecBole's examples and own models; never open or run anything."""

import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from recbole.model.general_recommender.bpr import BPR
from recbole.utils.case_study import full_sort_scores, full_sort_topk

from recbole_fedkd import load_data_and_model
from recbole_fedkd.checkpoint.reading import read_checkpoint
from recbole_fedkd.checkpoint.sealed import write_sealed
from recbole_fedkd.errors import InputError
from recbole_fedkd.quick_start import build_trainer

QUICK = {"model": "BPR", "eval_args": {"split": {"RS": [0.8, 0.1, 0.1]}}}
PREDICTS = {
    "AttnFedKD": {"model": "AttnFedKD", "dropout_prob": 0.5},
    "fleet": {"model": "AttnFedKD", "dropout_prob": 0.5, "engine": "fleet", "strategy": "local", "partition": "user"},
    "AttnStudent": {"model": "AttnStudent", "dropout_prob": 0.5},
    "value metrics alone": {"model": "AttnStudent", "dropout_prob": 0.5, "metrics": ["MAE"], "valid_metric": "MAE"},
    "WideDeep": {"model": "WideDeep", "label_mode": "threshold", "dropout_prob": 0.5},
    "NeuMF": {"model": "NeuMF", "dropout_prob": 0.5},
    "SASRec": {"model": "SASRec", "MAX_ITEM_LIST_LENGTH": 4, "train_neg_sample_args": None, "n_layers": 1},
    "sampled candidates": {
        "model": "BPR",
        "eval_args": {"mode": "uni5", "split": {"LS": "valid_and_test"}, "order": "TO"},
    },
}


@pytest.mark.parametrize("name", PREDICTS)
def test_recboles_examples_take_what_load_data_and_model_returns(run, name):
    result = run(**PREDICTS[name], epochs=1)
    config, model, dataset, _, _, test = load_data_and_model(result["run_folder"])
    assert not model.training and not any(each.training for each in model.modules())
    users = dataset.token2id(dataset.uid_field, ["u1", "u2"])
    scores = full_sort_scores(users, model, test, device=config["device"])
    top, items = full_sort_topk(users, model, test, k=3, device=config["device"])
    assert scores.shape == (2, dataset.item_num) and items.shape == (2, 3)
    assert torch.equal(scores, full_sort_scores(users, model, test))
    assert (items > 0).all() and torch.equal(top, scores.topk(3).values)
    assert len(dataset.inter_feat) == 600 or name == "SASRec"
    assert dict(build_trainer(config, model).evaluate(test, load_best_model=False)) == result["test_result"]


@pytest.mark.parametrize("metrics", [["Hit", "MAE"], ["MAE"]])
def test_users_without_a_relevant_row_are_served_too(run, metrics):
    result = run(model="AttnFedKD", epochs=1, metrics=metrics, valid_metric="MAE", topk=[3])
    _, model, dataset, train, _, test = load_data_and_model(result["run_folder"])
    users = list(range(1, dataset.user_num))
    assert set(users) > set(map(int, test.uid_list))
    _, items = full_sort_topk(users, model, test, k=3)
    rows = train._dataset.inter_feat
    for user, top in zip(users, items.tolist(), strict=True):
        assert len(set(top)) == 3 and not set(top) & {0, *rows["item_id"][rows["user_id"] == user].tolist()}


def test_loading_writes_nothing(run, tmp_path, monkeypatch):
    folder = Path(run(**QUICK, epochs=1)["run_folder"]).resolve()
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    load_data_and_model(folder)
    assert not list(empty.iterdir())


class Mine(BPR):
    """A model of the user's own."""


OWN = """
from recbole.model.general_recommender.bpr import BPR
class Own(BPR):
    pass
"""


class TestModelsOfOnesOwn:
    KEYS = {name: value for name, value in QUICK.items() if name != "model"}

    def test_a_class_is_given_again(self, run):
        whole = run(Mine, **self.KEYS, epochs=2)
        folder = run(Mine, **self.KEYS, epochs=1)["run_folder"]
        assert run(Mine, **self.KEYS, epochs=2, resume=folder)["test_result"] == whole["test_result"]
        assert type(load_data_and_model(folder, model=Mine)[1]) is Mine
        with pytest.raises(InputError, match=r"model 'Mine' is unknown.*as its class.*plugins"):
            load_data_and_model(folder)
        with pytest.raises(InputError, match="is that of model Mine, not of BPR"):
            load_data_and_model(folder, model=BPR)

    @pytest.mark.parametrize("as_file", [True, False])
    def test_plugins_name_its_module(self, run, tmp_path, monkeypatch, as_file):
        name = "own_models_of_a_test" if as_file else "own_module_of_a_test"
        (tmp_path / f"{name}.py").write_text(OWN)
        monkeypatch.syspath_prepend(str(tmp_path))
        plugins = [f"{name}.py" if as_file else name]
        folder = run("Own", **self.KEYS, plugins=plugins, epochs=1)["run_folder"]
        assert type(load_data_and_model(folder, {"plugins": plugins})[1]).__name__ == "Own"
        with pytest.raises(InputError, match="model 'Other' is unknown"):
            run("Other", **self.KEYS, plugins=plugins)

    def test_a_plugin_that_cannot_be_imported_is_named(self, run):
        Path("broken.py").write_text("1 / 0")
        with pytest.raises(InputError, match=r"plugins names 'broken.py'.*ZeroDivisionError"):
            run("Own", plugins=["broken.py"])
        with pytest.raises(InputError, match="plugins names 'no_such_module'"):
            run("Own", plugins=["no_such_module"])


class Bomb:
    """Leaves a file behind where it is unpickled."""

    def __reduce__(self):
        return (Path("exploded").touch, ())


class TestNoPickleIsOpened:
    @pytest.fixture(autouse=True)
    def never_explodes(self, tmp_path):
        yield
        assert not (tmp_path / "exploded").exists()

    @staticmethod
    def bomb(file: str) -> str:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_bytes(pickle.dumps(Bomb()))
        return file

    @pytest.fixture
    def folder(self, run) -> Path:
        return Path(run(**QUICK, epochs=1)["run_folder"])

    def test_files_of_the_names_that_recbole_looks_for_are_left_alone(self, run, folder):
        for name in ("tiny-Dataset.pth", "tiny-BPRDataset.pth", "tiny-for-BPR-dataloader.pth"):
            self.bomb(f"saved/{name}")
        run(**QUICK, epochs=1)
        run(**QUICK, epochs=2, resume=str(folder))
        load_data_and_model(folder)

    @pytest.mark.parametrize("key", ["dataset_save_path", "dataloaders_save_path"])
    def test_keys_that_name_one_are_refused(self, run, folder, key):
        file = self.bomb("evil.pth")
        with pytest.raises(InputError, match=f"{key} is 'evil.pth': RecBole keeps"):
            run(**QUICK, **{key: file})
        with pytest.raises(InputError, match=key):
            load_data_and_model(self.crafted(folder, {key: file}))
        with pytest.raises(InputError, match=key):
            load_data_and_model(folder, {key: file})

    @pytest.mark.parametrize("key", ["save_dataset", "save_dataloaders"])
    def test_none_is_written(self, run, key):
        with pytest.raises(InputError, match=f"{key} is True"):
            run(**QUICK, **{key: True})

    def test_a_pretrained_file_is_no_pickle_either(self, run):
        file = self.bomb("mf.pth")
        keys = {"use_pretrain": True, "mf_pretrain_path": file, "mlp_pretrain_path": file}
        with pytest.raises(InputError):
            run(**{**QUICK, "model": "NeuMF"}, **keys)

    @staticmethod
    def crafted(folder: Path, changes: dict) -> Path:
        state = read_checkpoint(folder / "best.pth")
        write_sealed({**state, "config": {**state["config"], **changes}}, Path("crafted.pth"))
        return Path("crafted.pth")

    @pytest.mark.parametrize(
        "changes",
        [
            {"plugins": ["evil"]},
            {"plugins": ["./evil.py"]},
            {"plugins": "evil"},
            {"mf_pretrain_path": "evil.pth"},
            {"pre_model_path": "evil.pth"},
            {"warm_up": "evil.pth"},
            {"some_file": "evil.pth"},
            {"config_files": ["evil.yaml"]},
            {"benchmark_filename": ["../../evil"]},
            {"additional_feat_suffix": ["x/../../evil"]},
            {"additional_feat_suffix": "x/../../evil"},
            {"dataset": "../evil"},
        ],
    )
    def test_a_checkpoint_names_nothing_to_open_or_to_run(self, run, folder, changes, monkeypatch, tmp_path):
        (tmp_path / "evil.py").write_text("from pathlib import Path\nPath('exploded').touch()\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        crafted = self.crafted(folder, changes)
        for use in (lambda: load_data_and_model(crafted), lambda: run(**QUICK, epochs=2, resume=str(crafted))):
            with pytest.raises(InputError) as caught:
                use()
            assert "\n" not in str(caught.value)
        assert "evil" not in sys.modules

    def test_a_checkpoint_says_not_where_to_write(self, run, folder, tmp_path):
        for name in ("checkpoint_dir", "result_file"):
            crafted = self.crafted(folder, {name: str(tmp_path / "there")})
            run(**QUICK, epochs=2, resume=str(crafted))
            assert not (tmp_path / "there").exists()

    def test_no_data_set_is_downloaded_on_the_word_of_a_checkpoint(self, folder, tmp_path):
        moved = tmp_path / "elsewhere" / "ml-1m"
        crafted = self.crafted(folder, {"dataset": "ml-1m", "data_path": str(moved)})
        with pytest.raises(InputError, match="where it was; name the folder"):
            load_data_and_model(crafted)
        assert not moved.exists()


class TestCraftedCheckpoints:
    @pytest.fixture(scope="class")
    def state(self, tmp_path_factory, data_path):
        from conftest import SMALL

        from recbole_fedkd import run_recbole_fedkd

        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path_factory.mktemp("run"))
            keys = {"data_path": str(data_path), **SMALL, "epochs": 1, "model": "AttnFedKD"}
            folder = run_recbole_fedkd(dataset="tiny", config_dict=keys)["run_folder"]
            return read_checkpoint(folder)

    def refused(self, run, state) -> None:
        write_sealed(state, Path("crafted.pth"))
        keys = {"model": "AttnFedKD", "epochs": 2, "resume": "crafted.pth"}
        for use in (lambda: run(**keys), lambda: load_data_and_model("crafted.pth")):
            with pytest.raises(InputError) as caught:
                use()
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 600

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("config", None), ("config", {}), ("config", "text"), ("config", {"model": "AttnFedKD"}), ("config", {1: 2}),
            ("epoch", "three"), ("epoch", -1), ("epoch", None), ("epoch", 2**70), ("epoch", True), ("epoch", 1.5),
            ("cur_step", []), ("best_valid_score", "good"), ("best_epoch", "x"), ("best_valid_result", {"mae": "low"}),
            ("train_loss", []), ("records", {}), ("records", [1]), ("state_dict", {}), ("state_dict", []),
            ("state_dict", {"a": 1}), ("other_parameter", {"a": 1}), ("other_parameter", {"forward": torch.zeros(1)}),
            ("random", None), ("training", None), ("data", "x"), ("data", None), ("data", {}),
            ("data", {"key": 1}), ("format_version", "4"),
            ("format_version", None), ("surplus", 1),
        ],
    )  # fmt: skip
    def test_fields_of_another_form(self, run, state, field, value):
        self.refused(run, {**state, field: value})

    @pytest.mark.parametrize("field", ["config", "epoch", "state_dict", "random", "data", "format_version", "training"])
    def test_missing_fields(self, run, state, field):
        self.refused(run, {name: value for name, value in state.items() if name != field})

    @pytest.mark.parametrize(
        "change",
        [
            lambda tensor: tensor[..., :1],
            lambda tensor: tensor.double(),
            lambda tensor: tensor.long(),
            lambda tensor: torch.full_like(tensor, float("nan")),
            lambda tensor: torch.where(torch.arange(tensor.numel()).view(tensor.shape) == 1, float("inf"), tensor),
            lambda tensor: tensor.to_sparse(),
            lambda tensor: torch.zeros(0),
        ],
    )
    def test_parameters_that_do_not_fit(self, run, state, change):
        parameters = state["state_dict"]
        name = next(name for name, each in parameters.items() if each.is_floating_point() and each.dim() == 2)
        self.refused(run, {**state, "state_dict": {**parameters, name: change(parameters[name])}})

    def test_all_weights_nan(self, run, state):
        spoiled = {
            name: torch.full_like(each, float("nan")) if each.is_floating_point() else each
            for name, each in state["state_dict"].items()
        }
        self.refused(run, {**state, "state_dict": spoiled})

    @pytest.mark.parametrize("field", ["records", "training", "random"])
    @pytest.mark.parametrize("seed", range(8))
    def test_what_only_a_resumed_run_reads(self, run, state, field, seed):
        """Somewhere inside a text stands where something else belongs, or an entry is missing."""
        generator = np.random.default_rng(seed)

        def spoil(value):
            if isinstance(value, dict) and value:
                name = list(value)[generator.integers(len(value))]
                if generator.random() < 0.3:
                    return {key: each for key, each in value.items() if key != name}
                return {**value, name: spoil(value[name])}
            if isinstance(value, list) and value:
                place = generator.integers(len(value))
                return [*value[:place], spoil(value[place]), *value[place + 1 :]]
            return "text"

        write_sealed({**state, field: spoil(state[field])}, Path("crafted.pth"))
        try:
            run(model="AttnFedKD", epochs=2, resume="crafted.pth")
        except InputError as error:
            assert "\n" not in str(error)


def test_a_checkpoint_folder_may_be_moved(run, tmp_path):
    whole = run(**QUICK, epochs=2)
    shutil.move(whole["run_folder"], tmp_path / "kept")
    assert run(**QUICK, epochs=2, resume=str(tmp_path / "kept"))["test_result"] == whole["test_result"]
