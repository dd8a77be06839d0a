"""Over Flower, with a real SuperLink, nodes of their own and own rows alone, a run is that of one process to the bit."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from time import monotonic, sleep
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import SMALL
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from tapped import Tap, marked_dataset, marks_of
from test_machines import CASES, assert_same, result_of
from test_sockets import certificate

from recbole_fedkd.checkpoint.sealed import read_sealed
from recbole_fedkd.command_line import main
from recbole_fedkd.data.schema import ClientRows
from recbole_fedkd.engine import ClientError
from recbole_fedkd.errors import InputError
from recbole_fedkd.federated.envelope import Request
from recbole_fedkd.machines import flower, node, running
from recbole_fedkd.machines import superlink as superlinks
from recbole_fedkd.machines.coordinator import SERVER_STATE, sole_coordinator
from recbole_fedkd.machines.journal import LOG, read_events
from recbole_fedkd.machines.manifest import Manifest
from recbole_fedkd.machines.nursery import Nursery
from recbole_fedkd.machines.party import STATE, Party, served
from recbole_fedkd.machines.trust import SCHEME, Trust
from recbole_fedkd.splitting import split_federation

pytest.importorskip("flwr", reason="Flower is not installed: pip install -c constraints.txt -e '.[flower]'")

TRUSTING = Trust()
ROUNDS = 3
FEDERATIONS = {**CASES, "masks": {"strategy": "fedavg"}}
PROCESSES = multiprocessing.get_context("forkserver")  # which loads torch and RecBole once for all of them
PROCESSES.set_forkserver_preload(["recbole_fedkd.machines.running"])
JUDGED = {"epochs": ROUNDS, "metrics": ["MAE"], "valid_metric": "MAE", "stopping_step": 10, "client_num": 4}


class SuperLink:
    """Flower's server in the middle, a program of its own."""

    def __init__(self, folder, *options):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        listener = socket.create_server(("127.0.0.1", 0))
        self.tap = Tap(listener, ("127.0.0.1", self.port))
        self.address = f"127.0.0.1:{listener.getsockname()[1]}"
        self.folder, self.options, self.process = folder, options or ("--insecure",), None
        self.start()

    def start(self):
        program = str(Path(sys.executable).parent / "flower-superlink")
        command = [program, "--port", str(self.port), "--disable-runtime-dependency-installation", *self.options]
        # Flower finds its other programs by the path.
        paths = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        environment = {**os.environ, **paths, "FLWR_TELEMETRY_ENABLED": "0", "FLWR_HOME": str(self.folder)}
        log = (self.folder / "superlink.log").open("ab")
        self.process = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True, cwd=self.folder
        )

    def programs(self, name):
        """Processes of a running program of it, such as ``flwr-serverapp``."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if any(name in part for part in child.cmdline()):
                    found.append(child.pid)
            except psutil.Error:
                continue
        return found

    def kill(self):
        for child in psutil.Process(self.process.pid).children(recursive=True):
            child.kill()
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def superlink(tmp_path_factory):
    made = SuperLink(tmp_path_factory.mktemp("superlink"))
    superlinks.await_superlink(f"127.0.0.1:{made.port}", 240)  # whoever listens in between is there at once
    yield made
    made.kill()
    made.tap.listener.close()


@pytest.fixture(scope="module")
def data_path(tmp_path_factory):
    return marked_dataset(tmp_path_factory.mktemp("marked"))


@pytest.fixture
def cut(prepared, data_path, tmp_path):
    """Folders of parties beside a manifest, and the engine that runs the same clients in one process."""

    def make(case, **more):
        keys = {**FEDERATIONS[case], **JUDGED, **more}
        _, trainer, _, _ = prepared("AttnFedKD", **keys)
        given = {"data_path": str(data_path), **SMALL, **keys, "secure_aggregation": case == "masks"}
        return split_federation("AttnFedKD", "tiny", tmp_path / case / "cut", [], given), trainer.engine

    return make


@pytest.fixture
def federation(cut, tmp_path, superlink):
    """As :func:`cut`, with a node of the SuperLink for each party; files lie in a folder that is called as the case is."""
    nurseries = []

    def make(case, held_back=0, given=None, **keys):
        folders, local = cut(case, **keys)
        lock = os.open(tmp_path, os.O_RDONLY)
        address = f"{SCHEME}{superlink.address}"
        nursery = Nursery(tmp_path / case / "cut" / "manifest", given or {}, address, tmp_path / "nothing", lock)
        os.close(lock)
        nurseries.append(nursery)
        for number, folder in enumerate(folders[: len(folders) - held_back]):
            nursery.start(number, folder)
        return folders, local, nursery

    yield make
    for each in nurseries:
        each.close()


def coordinated(superlink, folder, trust=TRUSTING, **keys):
    keys |= {"client_timeout": 300.0}
    return running.coordinate(
        folder / "cut" / "manifest", f"{SCHEME}{superlink.address}", folder / "server", trust, keys
    )


def assert_nothing_of(folders, server, *passed):
    """No token of a user and no row of a party is among the bytes that have passed, or in the server's folder."""
    files = [file for file in server.rglob("*") if file.is_file()]
    assert SERVER_STATE in {file.name for file in files}
    marks = marks_of([ClientRows.load(folder / "rows.npz") for folder in folders])
    for content in [*passed, *(file.read_bytes() for file in files)]:
        assert not any(mark in content for mark in marks)


def assert_as_local(folders, local, server, rounds=ROUNDS):
    """Networks of all parties and what the server holds are those of one process after as many rounds."""
    for index in range(rounds):
        local.run_round(index)
    state, _ = read_sealed(server / SERVER_STATE)
    found = [served(folder / STATE)[0] for folder in folders], state["engine"]["server"]["strategy"]
    expected = [client.task.network.state_dict() for client in local.clients], local.server.state
    if "masks" not in server.parts:
        assert_same(found, expected)
        return
    for name, value in expected[1].items():  # masks round to fixed point
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5)


def test_in_one_command_a_run_over_flower_is_that_of_one_process(run):
    assert result_of(run, "flower", "afd") == result_of(run, "local", "afd")


SPOILS = """
import sys

import msgpack

from recbole_fedkd.machines.masks import PartyMasks

answer, due = PartyMasks.answer, {(1, 0): "shares", (2, 1): "unmasking"}


def spoils(self, name, content):
    said = answer(self, name, content)
    return b"rubbish" if msgpack.unpackb(content)[0] == due.get((self.client.number, self.message.round)) else said


if "pytest" not in sys.modules:
    PartyMasks.answer = spoils
"""
"""Plugin by which two parties each say rubbish in a step of the masks, in a round each."""


def fails_in(local, number, index):
    """One client of one process fails at the end of a round."""
    run_client = local._run_client

    def fails(client, told, current):
        if (client.number, current.index) != (number, index):
            return run_client(client, told, current)
        client.receive(told)
        client.train(current.index)
        client.send(current.index)
        raise ClientError("lost")

    local._run_client = fails


def test_federations_of_one_superlink_are_those_of_one_process_each(federation, superlink, tmp_path):
    """All at once, one under masks, where two say rubbish: nobody is mistaken for another, and each has its own rows alone."""
    cases = ["afd", "items", "factors", "masks"]
    (tmp_path / "spoils.py").write_text(SPOILS)
    masks = {"given": {"plugins": [str(tmp_path / "spoils.py")]}, "min_clients": 3}
    made = {case: federation(case, epochs=2, **(masks if case == "masks" else {})) for case in cases}
    fails_in(made["masks"][1], 1, 0)
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(lambda case: coordinated(superlink, tmp_path / case), cases))
    passed = superlink.tap.heard
    assert passed.count(b"recbole_fedkd") > 2 * 4 * len(cases)
    for case, result in zip(cases, results, strict=True):
        assert result["engine"] == "flower" and len(result["rounds"]) == 2 and len(result["parties"]) == 4
        folders, local, _ = made[case]
        assert_as_local(folders, local, tmp_path / case / "server", rounds=2)
        assert_nothing_of(folders, tmp_path / case / "server", passed)
    rounds = results[-1]["rounds"]
    assert [list(each["missing"]) for each in rounds] == [["1"], []] and "masks" in rounds[0]["missing"]["1"]
    assert [each["ignored"] for each in rounds] == [{"1": {"mask": 1}}, {"2": {"mask": 1}}]


FAILS = """
import sys

from recbole_fedkd.federated.client import Client

train = Client.train


def fails(self, *given):
    if self.number < 2:
        raise RuntimeError("cannot train")
    return train(self, *given)


if "pytest" not in sys.modules:
    Client.train = fails
"""


def commanded(told, *arguments):
    """The command line, and what it says beside its result in a file."""
    with Path(told).open("w", buffering=1) as sys.stderr:
        sys.exit(main(list(arguments)))


def test_a_command_that_is_killed_follows_its_app_and_a_run_that_fails_ends_with_the_exit_code_of_its_fault(
    federation, superlink, tmp_path
):
    """1 below ``min_clients``, which may go on; 2 where the input is wrong, after which no supervisor starts it again.

    Of two commands of a folder the second is refused, and has no part in the run of the first.
    """
    (tmp_path / "fails.py").write_text(FAILS)
    given = {"plugins": [str(tmp_path / "fails.py")]}
    folders, _, nursery = federation("fedavg", held_back=4, given=given, min_clients=3)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / SERVER_STATE).write_bytes(b"rubbish")
    due = {
        "server": (1, "error: round 1: 2 of 4 clients answered, min_clients asks for 3 (client 0, failed"),
        "damaged": (2, f"error: state of a coordinator '{tmp_path}/damaged/server.pth' cannot be read"),
    }
    manifest, address = tmp_path / "fedavg" / "cut" / "manifest", f"{SCHEME}{superlink.address}"

    def started(name):
        told = ("coordinate", str(manifest), f"--out={tmp_path / name}", f"--address={address}", "--client_timeout=300")
        command = PROCESSES.Process(target=commanded, args=(tmp_path / f"{name}.err", *told), daemon=True)
        command.start()
        return command

    def waits():
        return sum(event["event"] == "waiting" for event in read_events(tmp_path / "server" / LOG))

    commands = {name: started(name) for name in due}
    until(lambda: waits() == 1)
    with pytest.raises(InputError, match="another coordinator runs in"):
        running.coordinate(manifest, address, tmp_path / "server", TRUSTING, {})
    commands["server"].kill()
    commands["server"].join()
    commands["server"] = started("server")
    until(lambda: "is still running; this command follows it" in (tmp_path / "server.err").read_text())
    for number, folder in enumerate(folders):
        nursery.start(number, folder)
    for name, (code, sentence) in due.items():
        commands[name].join(400)
        said = (tmp_path / f"{name}.err").read_text()
        assert (commands[name].exitcode, said.count("error: ")) == (code, 1) and sentence in said
    assert waits() == 1


def test_an_app_that_comes_second_leaves_the_run_of_the_first_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(superlinks, "_LET_GO", 0.0)
    told = {"relay": "", "out": str(tmp_path), "manifest": "nowhere", "keys": "{}", "address": ""}
    with sole_coordinator(tmp_path), pytest.raises(InputError, match="another coordinator runs in"):
        superlinks.server_app()(None, SimpleNamespace(run_config=told))
    assert not (tmp_path / superlinks.FAILED).exists()
    with pytest.raises(InputError):
        superlinks.server_app()(None, SimpleNamespace(run_config=told))
    assert (tmp_path / superlinks.FAILED).read_text().startswith("InputError")


def test_a_late_answer_is_pulled_and_one_to_a_question_that_was_asked_again_comes_once(monkeypatch):
    """Over a stand-in for Flower's way to its nodes, since a late answer of a real one is a matter of seconds."""
    asked, ready = [], []

    def answer(place, content):
        metadata, has = SimpleNamespace(reply_to_message_id=f"m{place}"), lambda: True
        parts = {"recbole_fedkd": {"bytes": content}}
        ready.append(SimpleNamespace(metadata=metadata, has_error=lambda: False, has_content=has, content=parts))

    def push(messages):
        asked.extend(messages)
        if len(asked) == 2:  # to the first question, when the second is asked
            answer(1, b"late")
        if len(asked) in (2, 3):
            answer(len(asked), b"in time")
        return [f"m{len(asked)}"]

    def pull(names):
        found = [each for each in ready if each.metadata.reply_to_message_id in names]
        ready[:] = [each for each in ready if each not in found]
        return found

    monkeypatch.setattr("flwr.app.Message", lambda *parts: parts)
    ticks = count()
    monkeypatch.setattr(flower, "monotonic", lambda: next(ticks) / 100)
    monkeypatch.setattr(flower, "sleep", lambda _: None)
    grid = SimpleNamespace(get_node_ids=lambda: [7], push_messages=push, pull_messages=pull)
    wire = flower.FlowerTransport(grid, b"", 1)
    wire._node_of = {0: 7}
    assert list(wire.exchange({0: b"one"}, 0.5)) == [] and len(asked) == 1
    assert list(wire.exchange({0: b"two"}, 0.5)) == [(0, b"late"), (0, b"in time")]
    monkeypatch.setattr(flower, "_ASK_AGAIN_AFTER", -1.0)
    assert list(wire.exchange({0: b"three"}, 0.5)) == [(0, b"in time")] and wire._open == {}


def test_a_node_of_flowers_own_hands_on_to_the_party_at_its_socket_what_it_is_asked_and_loads_no_torch(tmp_path):
    party = threading.Thread(target=node.wait_at, args=(lambda asked: asked[::-1], str(tmp_path / "p")), daemon=True)
    party.start()
    until((tmp_path / "p").exists)
    assert (tmp_path / "p").stat().st_mode & 0o777 == 0o600
    code = f"""
import sys
from importlib import import_module
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from recbole_fedkd.machines.node import content_of, record_of
sys.path.insert(0, {str(superlinks.APP)!r})
TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1  # of the SuperLink, which asks
context = Context(1, 7, {{"party": {str(tmp_path / "p")!r}}}, RecordDict(), {{}})
for asked in (b"", b"abc" * 10**6):
    message = Message(record_of(asked), 7, "query")
    assert content_of(import_module("node").app(message, context)) == asked[::-1]
assert not {{"torch", "recbole"}} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with pytest.raises(InputError, match="cannot be listened at"):
        node.wait_at(None, "/nowhere/p")


def key_pair(file):
    """A private key, and beside it the public one, as of ssh-keygen."""
    made = ec.generate_private_key(ec.SECP384R1())
    form = serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    file.write_bytes(made.private_bytes(serialization.Encoding.PEM, *form))
    public = made.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    file.with_suffix(".pub").write_bytes(public)
    return str(file)


def test_over_tls_with_keys_a_run_is_that_of_one_process_and_strangers_are_refused(cut, tmp_path, monkeypatch):
    folders, local = cut("fedavg", epochs=2)
    (right, private), (wrong, _) = certificate(tmp_path, "right"), certificate(tmp_path, "wrong")
    keys = [key_pair(tmp_path / f"node-{number}") for number in range(5)]
    tls = ["--ssl-certfile", right, "--ssl-keyfile", private, "--ssl-ca-certfile", right]
    made = SuperLink(tmp_path, *tls, "--enable-supernode-auth", "--database", str(tmp_path / "superlink.db"))
    home, parties = tmp_path / "fedavg", []
    try:
        superlinks.await_superlink(f"127.0.0.1:{made.port}", 240)
        administrator = superlinks.Submitted(made.address, tmp_path / "administrator", right, {})
        for folder, key in zip(folders, keys, strict=False):
            administrator._flwr("supernode", "register", f"{key}.pub", "link")
            trust = Trust(authority=right, node_key=key)
            told = (folder, home / "cut" / "manifest", f"{SCHEME}{made.address}", trust, {})
            parties.append(PROCESSES.Process(target=running.live, args=told, daemon=True))
            parties[-1].start()
        monkeypatch.setattr(flower, "_REFUSED_FOR", -1.0)
        for authority, key, sentence in (
            (wrong, keys[4], "shows a certificate that is not believed"),
            (right, None, "asks for a registered key; name it by --node-key"),
            (right, keys[4], "does not let this party in: it does not know the key"),
        ):
            with pytest.raises(InputError, match=sentence):
                flower.serve(None, made.address, authority, key)
        coordinated(made, home, Trust(authority=right))
    finally:
        for each in parties:
            each.kill()
        made.kill()
    assert_as_local(folders, local, home / "server", rounds=2)
    kept = b"".join(file.read_bytes() for file in sorted(tmp_path.glob("superlink.db*")))
    assert b"recbole_fedkd" in kept and b"recbole_fedkd" not in made.tap.heard
    assert_nothing_of(folders, home / "server", kept)


DIES = """
import os, signal, sys
from pathlib import Path

from recbole_fedkd import files

synchronise = files._synchronise


def dies_once(path):
    name = path.name.split(".")[1:2]
    flags = [Path({flags!r}) / each for each in (["server", "superlink"] if name == ["server"] else name)]
    due = [flag for flag in flags if flag.name in ("server", "state", "superlink") and not flag.exists()]
    if due:
        os.truncate(path, path.stat().st_size // 2)
        due[0].touch()
        while due[0].name == "superlink":
            signal.pause()
        os.kill(os.getpid(), signal.SIGKILL)
    synchronise(path)


if "pytest" not in sys.modules:
    files._synchronise = dies_once
"""
"""Plugin by which the first coordinator, and the first party, that writes its state dies in the middle of it; the second
coordinator waits there for its SuperLink to be killed."""


def held(folder, manifest, address, moments):
    """A party, a process of its own, that says when it is asked in the second round, and answers there when it may."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as of a command in a terminal
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    party = Party(folder, Manifest.load(manifest))
    answer = party.answer

    def waits(packed):
        asked = Request.from_bytes(packed)
        if asked.round == 1 and asked.operation in moments:
            reached, go = moments[asked.operation]
            reached.set()
            go.wait()
        return answer(packed)

    party.answer = waits
    running.attend(party, address, Trust())


def until(true):
    """Wait for something that is sure to come, if all is well."""
    end = monotonic() + 400
    while not true():
        assert monotonic() < end
        sleep(0.1)


def test_node_serverapp_and_superlink_may_be_killed(federation, superlink, tmp_path):
    """Each while states are written, in training and in judging, which one party keeps from ending until all are back."""
    (tmp_path / "flags").mkdir()
    (tmp_path / "dies.py").write_text(DIES.format(flags=str(tmp_path / "flags")))
    plugins = {"plugins": [str(tmp_path / "dies.py")]}
    folders, local, nursery = federation("codecs", held_back=1, given=plugins, epochs=2)
    moments = {operation: (PROCESSES.Event(), PROCESSES.Event()) for operation in ("train", "judge")}
    home = tmp_path / "codecs"
    told = (folders[-1], home / "cut" / "manifest", f"{SCHEME}{superlink.address}", moments)
    last = PROCESSES.Process(target=held, args=told, daemon=True)
    killed = []

    def lives():
        """How often a coordinator has come, as its log tells; it begins when all are there, and one party is held."""
        return sum(event["event"] == "waiting" for event in read_events(home / "server" / LOG))

    def kill_node():
        children = psutil.Process(nursery.process.pid).children
        nodes = {child.pid for child in children()}
        os.kill(min(nodes), signal.SIGKILL)
        until(lambda: len({child.pid for child in children()} - {min(nodes)}) == len(nodes))
        killed.append("node")

    def kill_serverapp():
        before = lives()
        for app in superlink.programs("flwr-serverapp"):
            os.kill(app, signal.SIGKILL)
        until(lambda: lives() > before)
        killed.append("serverapp")

    def kill_superlink():
        before = lives()
        superlink.kill()
        superlink.start()
        until(lambda: lives() > before)
        killed.append("superlink")

    def killer():
        try:
            until((tmp_path / "flags" / "superlink").exists)
            kill_superlink()
            for reached, go in moments.values():
                assert reached.wait(400)
                for kill in (kill_node, kill_serverapp, kill_superlink):
                    kill()
                go.set()
        finally:
            for _, go in moments.values():
                go.set()

    last.start()
    thread = threading.Thread(target=killer)
    thread.start()
    try:
        coordinated(superlink, home, **plugins)
    finally:
        thread.join()
        last.kill()
    assert killed == ["superlink", *2 * ["node", "serverapp", "superlink"]]
    assert {flag.name for flag in (tmp_path / "flags").iterdir()} == {"server", "state", "superlink"}
    assert_as_local(folders, local, home / "server", rounds=2)
