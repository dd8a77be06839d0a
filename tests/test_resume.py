"""Checkpoints: resume bit for bit, nothing private in the file, one clear line for a bad one."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from recbole.utils.case_study import full_sort_topk

from recbole_fedkd import load_data_and_model
from recbole_fedkd.checkpoint.reading import CHECKPOINT_VERSION, read_checkpoint
from recbole_fedkd.checkpoint.sealed import write_sealed
from recbole_fedkd.errors import InputError
from recbole_fedkd.quick_start import build_trainer

LONG = 4
AFD = {"model": "AttnFedKD", "switch_threshold": 0.05, "switch_reach": 1e9}


def assert_same_run(one: dict, other: dict) -> None:
    assert one["test_result"] == other["test_result"]
    assert one["best_valid_result"] == other["best_valid_result"]
    assert one["best_valid_score"] == other["best_valid_score"]
    assert one["communication"] == other["communication"]
    for name in ("best.pth", "last.pth"):
        first, second = (read_checkpoint(Path(run["run_folder"]) / name) for run in (one, other))
        assert first["epoch"] == second["epoch"]
        assert first["state_dict"].keys() == second["state_dict"].keys()
        for key, value in first["state_dict"].items():
            assert torch.equal(value, second["state_dict"][key]), key


@pytest.mark.parametrize("stopped_after", [1, 2, 3])
def test_a_federation_stopped_after_any_round_ends_as_one_never_stopped(run, stopped_after):
    whole = run(**AFD, epochs=LONG)
    part = run(**AFD, epochs=stopped_after)
    resumed = run(**AFD, epochs=LONG, resume=part["run_folder"])
    assert_same_run(whole, resumed)
    assert part["run_folder"] != resumed["run_folder"]


@pytest.mark.parametrize(
    ("model", "keys"),
    [
        ("AttnStudent", {}),
        ("AttnStudent", {"label_mode": "implicit"}),
        ("AttnFedKD", {"label_mode": "implicit"}),
        ("AttnFedKD", {"strategy": "local", "partition": "user", "learner": "adam"}),
        ("BPR", {"learner": "adamw"}),
        ("LightGCN", {}),
        ("NeuMF", {}),
        ("WideDeep", {"label_mode": "threshold"}),
        ("DeepFM", {"label_mode": "threshold"}),
        ("AutoInt", {"label_mode": "threshold"}),
        ("DIN", {"MAX_ITEM_LIST_LENGTH": 4, "train_batch_size": 256}),
        ("SASRec", {"MAX_ITEM_LIST_LENGTH": 4, "train_neg_sample_args": None, "n_layers": 1, "train_batch_size": 256}),
    ],
)
def test_other_trainings_resume_exactly_too(run, model, keys):
    keys = {"model": model, **keys}
    whole = run(**keys, epochs=3)
    part = run(**keys, epochs=1)
    assert_same_run(whole, run(**keys, epochs=3, resume=part["run_folder"]))


def test_a_run_killed_inside_a_round_goes_on_after_the_last_whole_one(run, monkeypatch):
    from recbole_fedkd.federated.client import Client

    whole = run(**AFD, epochs=LONG)
    train = Client.train

    def killed(self, round_index, on_step=None):
        if round_index == 2 and self.number == 1:
            raise KeyboardInterrupt
        return train(self, round_index, on_step)

    before = set(Path("saved").iterdir())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Client, "train", killed)
        run(**AFD, epochs=LONG)
    (folder,) = set(Path("saved").iterdir()) - before
    assert_same_run(whole, run(**AFD, epochs=LONG, resume=str(folder)))


def test_epochs_without_validation_are_saved_too(run):
    whole = run(**AFD, epochs=4, eval_step=2)
    part = run(**AFD, epochs=4, eval_step=2, stopping_step=10)
    assert part["test_result"] == whole["test_result"]
    half = run(**AFD, epochs=3, eval_step=2)
    assert_same_run(whole, run(**AFD, epochs=4, eval_step=2, resume=half["run_folder"]))


def test_a_run_shorter_than_eval_step_resumes_exactly_and_is_judged_once(run):
    keys = {"model": "AttnStudent", "eval_step": 3, "learning_rate": 0.1}
    whole = run(**keys, epochs=5)
    part = run(**keys, epochs=2)
    assert part["best_valid_result"] is not None and part["test_result"]
    assert_same_run(whole, run(**keys, epochs=5, resume=part["run_folder"]))


def test_a_resumed_run_can_be_resumed_again(run):
    whole = run(**AFD, epochs=3)
    one = run(**AFD, epochs=1)
    two = run(**AFD, epochs=2, resume=one["run_folder"])
    assert_same_run(whole, run(**AFD, epochs=3, resume=str(Path(two["run_folder"]) / "last.pth")))


def test_a_last_checkpoint_without_its_best_is_refused(run):
    keys = {**AFD, "eval_step": 2}  # the last round is not judged, whatever is drawn
    folder = Path(run(**keys, epochs=3)["run_folder"])
    last = read_checkpoint(folder / "last.pth")
    assert last["best_epoch"] < last["epoch"]
    Path("elsewhere").mkdir()
    shutil.copy(folder / "last.pth", "elsewhere/last.pth")
    with pytest.raises(InputError):
        run(**keys, epochs=4, resume="elsewhere/last.pth")


def test_numpy_numbers_in_the_config_do_not_spoil_the_checkpoint(run):
    result = run(**AFD, epochs=np.int64(1), learning_rate=np.float64(0.01))
    assert read_checkpoint(result["run_folder"])["config"]["learning_rate"] == 0.01


def test_a_text_of_the_config_stays_a_text_on_resume(run):
    keys = {**AFD, "user_inter_num_interval": "[2,100]"}
    from recbole_fedkd.config.values import parse_value

    assert parse_value(keys["user_inter_num_interval"]) == [2, 100]
    Path("keys.yaml").write_text('user_inter_num_interval: "[2,100]"\n')
    part = run(**AFD, epochs=1, config_file_list=["keys.yaml"])
    assert run(config_file_list=["keys.yaml"], **AFD, epochs=2, resume=part["run_folder"])["timing"]["rounds"] == 2


def test_resuming_without_saving_writes_nothing(run):
    part = run(**AFD, epochs=1)
    before = set(Path("saved").rglob("*.pth"))
    run(**AFD, epochs=2, resume=part["run_folder"], saved=False)
    assert set(Path("saved").rglob("*.pth")) == before


def test_a_result_without_a_number_is_null_in_the_json(run, tmp_path):
    file = tmp_path / "result.json"
    run(**AFD, epochs=1, result_file=str(file), eval_args={"split": {"RS": [0.8, 0.0, 0.2]}})
    text = file.read_text()
    assert json.loads(text)["best_valid_score"] is None
    assert "NaN" not in text and "Infinity" not in text


def test_a_finished_run_resumed_trains_nothing_and_keeps_its_best(run):
    whole = run(**AFD, epochs=2)
    again = run(**AFD, epochs=2, resume=whole["run_folder"])
    assert_same_run(whole, again)


def test_early_stopping_survives_a_resume(run):
    keys = {**AFD, "learning_rate": 0.3, "stopping_step": 1}
    whole = run(**keys, epochs=30)
    assert whole["timing"]["rounds"] < 30
    part = run(**keys, epochs=2)
    assert_same_run(whole, run(**keys, epochs=30, resume=part["run_folder"]))
    ended = run(**keys, epochs=30, resume=whole["run_folder"])
    assert ended["timing"]["rounds"] == whole["timing"]["rounds"]


def test_resume_needs_only_the_checkpoint(run, data_path):
    from recbole_fedkd import run_recbole_fedkd

    whole = run(**AFD, epochs=3)
    part = run(**AFD, epochs=1)
    resumed = run_recbole_fedkd(config_dict={"resume": part["run_folder"], "epochs": 3})
    assert_same_run(whole, resumed)


def test_the_resumed_run_leaves_the_first_ones_files_alone(run):
    part = run(**AFD, epochs=1)
    before = {path.name: path.read_bytes() for path in Path(part["run_folder"]).iterdir()}
    run(**AFD, epochs=2, resume=part["run_folder"])
    assert {path.name: path.read_bytes() for path in Path(part["run_folder"]).iterdir()} == before


def test_a_loaded_model_gives_the_runs_own_test_result(run):
    result = run(**AFD, epochs=2)
    for path in (Path(result["run_folder"]) / "best.pth", result["run_folder"]):
        config, model, dataset, _, _, test = load_data_and_model(path)
        trainer = build_trainer(config, model)
        assert dict(trainer.evaluate(test, load_best_model=False)) == result["test_result"]
    scores, items = full_sort_topk(dataset.token2id("user_id", ["u1", "u2"]), model, test.ranking_loader, k=3)
    assert scores.shape == items.shape == (2, 3)


def tensors_of(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from tensors_of(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from tensors_of(inner)


@pytest.mark.parametrize("model", ["AttnFedKD", "AttnStudent", "DIN"])
def test_a_checkpoint_holds_no_interaction_row(run, data_path, model):
    keys = {"MAX_ITEM_LIST_LENGTH": 3} if model == "DIN" else {}
    result = run(model, epochs=1, **keys)
    state = read_checkpoint(Path(result["run_folder"]) / "last.pth")
    # 30 users, 40 items, 20 interactions each: whatever has more entries on one axis than there are weights of the
    # widest layer, and is no state of a random generator, would have to be rows.
    longest = max(max(tensor.shape, default=0) for tensor in tensors_of(state["state_dict"]))
    random_state = [state.pop("random")]
    random_state += [client.pop("generator") for client in state["training"].get("clients", {}).values()]
    assert max(tensor.numel() for tensor in tensors_of(random_state)) <= 5056
    for tensor in tensors_of(state):
        assert max(tensor.shape, default=0) <= longest, tensor.shape
        assert tensor.is_floating_point() or tensor.numel() <= 100, tensor.shape
    assert longest < 400 or model == "DIN"
    assert all(not isinstance(value, list) or len(value) < 100 for value in state.values())


def test_two_runs_started_in_the_same_second_share_no_folder(run, monkeypatch):
    import recbole_fedkd.trainer.checkpointed as trainer

    monkeypatch.setattr(trainer, "get_local_time", lambda: "Jan-01-2026_00-00-00")
    one, other = run(epochs=1), run(epochs=1)
    assert one["run_folder"] != other["run_folder"]
    logs = list(Path("log/AttnFedKD").iterdir())
    assert len(logs) == 2
    assert len(list(Path("log_tensorboard").iterdir())) == 2


def test_the_log_file_and_tensorboard_hold_the_run(run):
    result = run(epochs=2, state="INFO")
    (log,) = Path("log/AttnFedKD").iterdir()
    text = log.read_text()
    assert "epoch 1 training" in text and "test result" in text and "\x1b" not in text
    assert log.stem == Path(result["run_folder"]).name
    (board,) = Path("log_tensorboard").iterdir()
    assert any(file.stat().st_size > 0 for file in board.rglob("events*"))


def test_without_saving_nothing_is_written(data_path):
    from conftest import SMALL

    from recbole_fedkd import run_recbole_fedkd

    keys = {"data_path": str(data_path), **SMALL, "epochs": 1}
    result = run_recbole_fedkd("AttnFedKD", "tiny", config_dict=keys, saved=False)
    assert result["run_folder"] is None
    assert not Path("saved").exists()


def test_result_file_is_json_with_everything_a_script_needs(run, tmp_path):
    file = tmp_path / "result.json"
    result = run(epochs=2, result_file=str(file))
    read = json.loads(file.read_text())
    assert read["test_result"] == result["test_result"]
    assert read["timing"]["seconds_per_round"] > 0
    assert read["communication"]["total_bytes"] == sum(
        sum(sum(counts) for counts in clients.values()) for clients in read["communication"]["clients_per_round"]
    )
    assert sum(client["users"] for client in read["partition"]["clients"]) == 30
    assert read["config"]["strategy"] == "afd"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".result")] == []


def test_the_map_of_users_to_clients_is_saved_with_the_run(run):
    result = run(epochs=1)
    saved = json.loads((Path(result["run_folder"]) / "partition.json").read_text())
    assert saved.keys() == {f"u{user}" for user in range(30)}
    sizes = [list(saved.values()).count(client) for client in range(3)]
    assert sizes == [client["users"] for client in result["partition"]["clients"]]


class TestBadCheckpoints:
    @pytest.fixture
    def folder(self, run) -> Path:
        return Path(run(**AFD, epochs=1)["run_folder"])

    def refused(self, run, path, **keys) -> str:
        kept = set(Path("saved").iterdir())
        with pytest.raises(InputError) as caught:
            run(**{**AFD, "epochs": 2, **keys}, resume=str(path))
        assert set(Path("saved").iterdir()) == kept
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_one_that_is_not_there(self, run, folder):
        assert "does not exist" in self.refused(run, folder / "other.pth")

    def test_one_of_another_config_names_the_key(self, run, folder):
        message = self.refused(run, folder, embedding_size=8)
        assert "embedding_size is 4 there and 8 here" in message

    def test_one_of_another_model(self, run, folder):
        assert "is that of model AttnFedKD, not of AttnStudent" in self.refused(
            run, folder, model="AttnStudent", switch_threshold=0.05, switch_reach=1e9
        )

    @pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
    def test_a_truncated_one(self, run, folder, share):
        whole = (folder / "last.pth").read_bytes()
        cut = folder.parent.parent / "cut.pth"
        cut.write_bytes(whole[: int(len(whole) * share)])
        assert "truncated" in self.refused(run, cut)

    def test_one_of_another_version(self, run, folder):
        state = read_checkpoint(folder / "last.pth")
        other = Path("other.pth")
        write_sealed({**state, "format_version": CHECKPOINT_VERSION + 1}, other)
        assert f"format version {CHECKPOINT_VERSION + 1}" in self.refused(run, other)

    def test_a_file_that_is_something_else(self, run, folder):
        Path("other.pth").write_text("hello")
        assert "not a checkpoint" in self.refused(run, "other.pth")

    def test_one_that_would_run_code_is_not_run(self, run, folder):
        import pickle

        class Evil:
            def __reduce__(self):
                return (Path("ran").touch, ())

        with Path("evil.pth").open("wb") as file:
            pickle.dump(Evil(), file)
        self.refused(run, "evil.pth")
        assert not Path("ran").exists()


def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path):
    file = tmp_path / "last.pth"
    write_sealed({"epoch": 1}, file)
    with pytest.raises(Exception, match="pickle"):
        write_sealed({"epoch": lambda: None}, file)
    assert torch.load(file, weights_only=True) == {"epoch": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last.pth"]
    shutil.rmtree(tmp_path)


class TestWhatSingleClientsCost:
    """It lies beside the checkpoints, a line a round, and is that of a run never stopped."""

    KEYS = {"strategy": "afd", "clients_per_round": 2}

    def test_a_checkpoint_does_not_grow_by_it(self, run):
        result = run(epochs=3, **self.KEYS)
        folder = Path(result["run_folder"])
        lines = (folder / "clients.jsonl").read_text().splitlines()
        assert [json.loads(line)["round"] for line in lines] == [1, 2, 3]
        told = [{int(number): pair for number, pair in json.loads(line)["clients"].items()} for line in lines]
        assert told == result["communication"]["clients_per_round"]
        for record in read_checkpoint(folder)["records"]:
            assert "clients" not in record and "missing" not in record

    def test_a_resumed_run_knows_it_of_all_rounds(self, run):
        whole, part = run(epochs=4, **self.KEYS), run(epochs=2, **self.KEYS)
        folder = Path(part["run_folder"])
        # A round that was not finished: its line was written and the checkpoint was not.
        with (folder / "clients.jsonl").open("a") as file:
            file.write('{"round": 3, "clients": {"0": [1')
        before = (folder / "clients.jsonl").read_bytes()
        resumed = run(epochs=4, resume=str(folder), **self.KEYS)
        assert resumed["communication"] == whole["communication"]
        assert (folder / "clients.jsonl").read_bytes() == before
        of_both = [(Path(each["run_folder"]) / "clients.jsonl").read_bytes() for each in (whole, resumed)]
        assert of_both[0] == of_both[1]

    def test_a_checkpoint_that_was_copied_alone_goes_on_without_it(self, run, tmp_path, caplog):
        whole, part = run(epochs=3, **self.KEYS), run(epochs=2, **self.KEYS)
        copy = tmp_path / "copy"
        copy.mkdir()
        for file in Path(part["run_folder"]).glob("*.pth"):
            shutil.copy(file, copy)
        resumed = run(epochs=3, resume=str(copy), **self.KEYS)
        assert "lies no clients.jsonl" in caplog.text
        assert resumed["test_result"] == whole["test_result"]
        per_round = resumed["communication"]["clients_per_round"]
        assert per_round[:2] == [{}, {}] and per_round[2] == whole["communication"]["clients_per_round"][2]
        again = run(epochs=4, resume=resumed["run_folder"], **self.KEYS)
        assert again["communication"]["clients_per_round"][:3] == per_round

    @pytest.mark.parametrize("damage", [b"", b"{}", b"\x00", b'{"round": 1, "clients": {}}\n'])
    def test_another_file_in_its_place_is_refused(self, run, damage):
        part = run(epochs=2, **self.KEYS)
        (Path(part["run_folder"]) / "clients.jsonl").write_bytes(damage * 3)
        with pytest.raises(InputError, match=r"clients.jsonl' is damaged, or that of another run"):
            run(epochs=3, resume=part["run_folder"], **self.KEYS)
