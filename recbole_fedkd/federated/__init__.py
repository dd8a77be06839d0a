"""Clients, a server, and the messages that are all that passes between them."""
