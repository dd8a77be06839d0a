"""The coordinator."""

from recbole_fedkd.machines.superlink import server_app

app = server_app()
