"""Who comes over a socket, who is let in, and that nobody keeps others waiting."""

import datetime
import ipaddress
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from tapped import Tap

from recbole_fedkd.errors import InputError
from recbole_fedkd.federated.envelope import DECLARED, HELLO, Answer
from recbole_fedkd.machines import processes
from recbole_fedkd.machines.channel import clear_socket, client_tls, go_to, let_in, read_address, read_key, server_tls
from recbole_fedkd.machines.sockets import SocketTransport, serve

MANIFEST, KEY = b"m" * 16, b"k" * 32


def hello(number, manifest=MANIFEST):
    return Answer(number, "", HELLO, 0, manifest, numbers=dict.fromkeys(DECLARED, 1.0)).to_bytes()


def party(transport, number, answer=lambda request: b"answer to " + request, **keys):
    """A party of a thread, which ends when the server is gone."""
    told = {"key": KEY, "patience": 0.2, **keys}
    thread = threading.Thread(target=serve, args=(answer, lambda: hello(number), transport.address), kwargs=told)
    thread.start()
    return thread


@pytest.fixture
def listening(tmp_path):
    made = []

    def listen(address=None, key=KEY, tls=None):
        made.append(SocketTransport(address or str(tmp_path / "s"), MANIFEST, 9, key, tls))
        return made[-1]

    yield listen
    for each in made:
        each.close()


def raw(transport):
    """A connection that has said nothing yet."""
    address = transport.address
    connection = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
    connection.connect(address)
    return connection


@pytest.mark.parametrize("sent", [b"", b"\0\0\0", (100).to_bytes(8, "big"), (100).to_bytes(8, "big") + b"half of it"])
def test_a_party_that_sends_half_a_message_keeps_nobody_waiting(listening, sent):
    transport = listening()
    connection = raw(transport)
    channel = go_to(connection, KEY, None, "", "the server")
    channel.send(hello(0))
    half = threading.Event()
    others = [party(transport, number, lambda request: request * half.wait(60)) for number in (1, 2)]
    assert transport.await_parties({0, 1, 2}, 60) == {0, 1, 2}

    def send_half():
        assert channel.receive(patience=60) == b"a"
        connection.sendall(sent)
        half.set()

    sending = threading.Thread(target=send_half)
    sending.start()
    answers = transport.exchange(dict.fromkeys(range(3), b"a"), 60)
    assert dict([next(answers), next(answers)]) == {1: b"a", 2: b"a"}
    answers.close()
    sending.join(60)
    # Back on another connection it is asked what is asked now.
    again = party(transport, 0)
    assert next(transport.exchange({0: b"b"}, 60)) == (0, b"answer to b")
    transport.close()
    for thread in [*others, again]:
        thread.join(60)
        assert not thread.is_alive()
    connection.close()


def test_silent_strangers_keep_nobody_waiting(listening):
    transport = listening()
    silent = [raw(transport) for _ in range(20)]
    thread = party(transport, 0)
    assert transport.await_parties({0}, 60) == {0}
    assert next(transport.exchange({0: b"a"}, 60)) == (0, b"answer to a")
    transport.close()
    thread.join(60)
    for each in silent:
        each.close()


def test_a_late_answer_leaves_the_question_open(listening):
    transport, release = listening(), threading.Event()

    def slow(request):
        if request == b"first":
            release.wait(60)
        return request

    thread = party(transport, 0, slow)
    transport.await_parties({0}, 60)
    assert list(transport.exchange({0: b"first"}, 0.01)) == []
    answers = transport.exchange({0: b"second"}, 60)
    release.set()
    assert [next(answers), next(answers)] == [(0, b"first"), (0, b"second")]
    transport.close()
    thread.join(60)


def refused(transport, **keys):
    """The sentence of a party that is not let in."""
    told = {"key": KEY, "patience": 5, **keys}
    with pytest.raises(InputError) as error:
        serve(lambda request: request, lambda: hello(0), transport.address, **told)
    return str(error.value)


def test_a_stranger_without_the_key_is_refused_in_a_sentence(listening, caplog, tmp_path):
    transport = listening()
    assert refused(transport, key=b"w" * 32).endswith("and this party do not share a key")
    assert refused(transport, key=None).endswith("asks for a key; name it by --secret")
    connection = raw(transport)
    connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
    connection.recv(100)
    connection.close()
    assert not transport.greeted
    open_to_all = listening(str(tmp_path / "o"), key=None)
    assert "do not share a key: it has none" in refused(open_to_all)
    assert "it does not know the key" in caplog.text and "it is no party" in caplog.text


def test_a_party_of_another_manifest_is_refused(listening, caplog):
    transport = listening()
    channel = go_to(raw(transport), KEY, None, "", "the server")
    channel.send(hello(0, b"x" * 16))
    with pytest.raises(OSError):
        channel.receive(patience=60)
    assert "client 0 has another manifest" in caplog.text and not transport.greeted


def certificate(folder, name, host="127.0.0.1"):
    """Files of a certificate that speaks for itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    told = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    today = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(told)
        .issuer_name(told)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(today - datetime.timedelta(days=1))
        .not_valid_after(today + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host))]), False)
        .sign(key, hashes.SHA256())
    )
    pem, private = folder / f"{name}.crt", folder / f"{name}.key"
    pem.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    form = serialization.PrivateFormat.PKCS8
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    return str(pem), str(private)


def test_over_tls_a_wrong_certificate_is_refused_and_nothing_can_be_read(listening, tmp_path, caplog):
    right, wrong = certificate(tmp_path, "right"), certificate(tmp_path, "wrong")
    elsewhere = certificate(tmp_path, "elsewhere", "10.0.0.1")
    transport = listening(("127.0.0.1", 0), tls=server_tls(*right))
    assert "shows a certificate that is not believed: self-signed" in refused(transport, tls=client_tls(wrong[0]))
    assert refused(transport).endswith("speaks TLS; name who has signed its certificate by --authority")
    plain = listening(("127.0.0.1", 0))
    assert "does not speak TLS" in refused(plain, tls=client_tls(right[0]))
    other_host = listening(("127.0.0.1", 0), tls=server_tls(*elsewhere))
    assert "IP address mismatch" in refused(other_host, tls=client_tls(elsewhere[0]))

    # Somebody who listens in between: the bytes of both directions.
    middle = socket.create_server(("127.0.0.1", 0))
    tap = Tap(middle, transport.address)
    channel = go_to(
        socket.create_connection(middle.getsockname()), KEY, client_tls(right[0]), "127.0.0.1", "the server"
    )
    channel.send(hello(0))
    transport.await_parties({0}, 60)
    message = threading.Thread(target=lambda: (channel.receive(), channel.send(b"a secret answer")))
    message.start()
    assert next(transport.exchange({0: b"a secret question"}, 60)) == (0, b"a secret answer")
    message.join(60)
    heard = tap.heard
    assert len(heard) > 1000 and b"secret" not in heard and b"samples" not in heard
    middle.close()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: read_address("nowhere"), "must be unix:<file> or <host>:<port>"),
        (lambda: read_address("host:99999"), "must be unix:<file> or <host>:<port>"),
        (lambda: read_address("unix:/" + "x" * 200), "longer than the system allows"),
        (lambda: read_key("missing"), "cannot be read: No such file"),
        (lambda: server_tls("missing.crt", None), "needs both --certificate and --private-key"),
        (lambda: server_tls("missing.crt", "missing.key"), "cannot be used: No such file"),
        (lambda: client_tls("missing.crt"), "cannot be used: No such file"),
        (lambda: SocketTransport("/nowhere/s", MANIFEST, 9), "cannot be listened at: No such file"),
        (lambda: SocketTransport(("192.0.2.1", 8900), MANIFEST, 9), "'192.0.2.1:8900' cannot be listened at: [^(]*$"),
    ],
)
def test_what_cannot_be_used_is_said_in_a_sentence(call, sentence):
    with pytest.raises(InputError, match=sentence):
        call()


def test_both_ends_know_a_key_or_none():
    for key in (None, KEY):
        one, other = socket.socketpair()
        found = []
        thread = threading.Thread(target=lambda one=one, key=key, found=found: found.append(let_in(one, key, None)))
        thread.start()
        channel = go_to(other, key, None, "", "the server")
        thread.join(60)
        sending = threading.Thread(target=channel.send, args=(b"x" * 3_000_000,))
        sending.start()
        assert found[0].receive() == b"x" * 3_000_000
        sending.join(60)
        channel.close()
        found[0].close()


def test_folders_of_runs_that_were_killed_are_removed_and_of_those_that_run_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(processes.tempfile, "tempdir", str(tmp_path))
    code = (
        "import os, sys, signal, tempfile; tempfile.tempdir = sys.argv[1]\n"
        "from recbole_fedkd.machines.processes import _new_folder\n"
        "print(_new_folder()[0], flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    told = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    left = Path(told.stdout.strip())
    assert left.is_dir() and left.parent == tmp_path, told.stderr
    mine, _ = processes._new_folder()
    another, _ = processes._new_folder()
    assert not left.exists() and mine.is_dir() and another.is_dir()


def test_of_what_lies_at_an_address_only_a_socket_that_nobody_listens_at_is_taken_away(tmp_path):
    notes, left = tmp_path / "notes.txt", tmp_path / "left.sock"
    notes.write_text("mine")
    clear_socket(str(tmp_path / "nothing"))
    for other in (notes, tmp_path):
        with pytest.raises(InputError, match="is a file or folder of another kind"):
            clear_socket(str(other))
    assert notes.read_text() == "mine"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(left))
        listener.listen()
        with pytest.raises(InputError, match="somebody listens at address"):
            clear_socket(str(left))
    clear_socket(str(left))
    assert not left.exists()
