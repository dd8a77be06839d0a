"""Parties on machines of their own, and what asks them: folders, processes and sockets."""
