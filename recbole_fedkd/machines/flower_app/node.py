"""A node of Flower's own, beside a party that waits at a socket."""

from recbole_fedkd.machines.node import client_app

app = client_app()
