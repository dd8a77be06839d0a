"""Somebody who listens in between, and what must not be heard: tokens of users and rows of parties."""

import socket
import threading

from conftest import write_dataset

TOKEN = "Zorro-7f3a-"


class Tap:
    """Passes on whatever comes, in both directions, and keeps every byte, of each direction of each connection in its order.

    Args:
        listener: a socket that listens.
        target: address of who is meant, a file or host and port.
    """

    def __init__(self, listener, target):
        self.streams, self.listener, self.target = [], listener, target
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def heard(self):
        """All bytes, one direction after the other: what came in two parts is in one piece."""
        return b"\0next\0".join(map(bytes, self.streams))

    def _accept(self):
        while True:
            try:
                one, _ = self.listener.accept()
            except OSError:
                return  # nobody listens any more
            other = socket.socket(self.listener.family, socket.SOCK_STREAM)
            try:
                other.connect(self.target)
            except OSError:  # whoever is meant has gone
                one.close()
                continue
            for ends in ((one, other), (other, one)):
                self.streams.append(bytearray())
                threading.Thread(target=self._pass_on, args=(*ends, self.streams[-1]), daemon=True).start()

    def _pass_on(self, source, target, stream):
        try:
            while found := source.recv(65536):
                stream.extend(found)
                target.sendall(found)
        except OSError:
            pass
        for end in (source, target):
            end.close()


def marked_dataset(folder):
    """The small data set, of users whose tokens are met nowhere else."""
    file = write_dataset(folder) / "tiny"
    for name in ("tiny.inter", "tiny.user"):
        head, *rows = (file / name).read_text().splitlines()
        (file / name).write_text("\n".join([head, *(TOKEN + row for row in rows)]) + "\n")
    return folder


def marks_of(parts):
    """What no byte of a wire or of a server's folder may hold, of the rows of every party."""
    columns = [rows.interactions[name] for rows in parts for name in ("item_id", "rating", "timestamp")]
    return [TOKEN.encode(), *(column[:12].numpy().tobytes() for column in columns)]
