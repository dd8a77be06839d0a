"""The ``fleet`` engine: the clients of a round train side by side, in tensors with a leading axis of clients."""
