"""PFedRec's maths by FedJAX.

    <python with fedjax> benchmarks/fleet_fedjax.py rows.npz 3

Called by ``benchmarks/fleet.py``; prints one line of JSON. JAX takes as many cores as there are.
"""

import json
import sys

import fedjax
import jax
import jax.numpy as jnp
import numpy as np
from fleet_rows import BATCH, ITEM_RATE, SCORE_RATE, WIDTH, Rows, Stopwatch


def loss(state, batch):
    """Mean binary cross-entropy of the real rows of a padded batch."""
    scores = state["items"][batch["item"]] @ state["score"] + state["bias"]
    entropy = jnp.logaddexp(0.0, scores) - scores * batch["label"]
    mask = batch["__mask__"].astype(jnp.float32)
    return (entropy * mask).sum() / mask.sum()


def client_step(state, batch):
    """One step of SGD."""
    gradient = jax.grad(loss)(state, batch)
    rates = {"items": ITEM_RATE, "score": SCORE_RATE, "bias": SCORE_RATE}
    return {name: state[name] - rates[name] * gradient[name] for name in state}


def main() -> None:
    """Time the rounds."""
    rows = Rows(sys.argv[1])
    clients = rows.clients
    shared = jnp.asarray(np.random.default_rng(0).normal(size=(rows.item_count, WIDTH)).astype(np.float32) * 0.1)
    own = [{"score": jnp.zeros(WIDTH), "bias": jnp.zeros(())} for _ in range(clients)]
    run = fedjax.for_each_client(
        lambda shared, own: {"items": shared, **own},
        client_step,
        lambda shared, state: {"change": state["items"] - shared, "score": state["score"], "bias": state["bias"]},
    )
    watch = Stopwatch()
    for _ in range(int(sys.argv[2]) + 1):
        batches = []
        for client, (items, labels) in enumerate(rows.epoch()):
            data = fedjax.ClientDataset({"item": items, "label": labels})
            padded = data.padded_batch(batch_size=BATCH, num_batch_size_buckets=4)
            batches.append((client, padded, own[client]))
        total = jnp.zeros_like(shared)
        for client, output in run(shared, batches):
            total = total + output["change"]
            own[client] = {"score": output["score"], "bias": output["bias"]}
        shared = (shared + total / clients).block_until_ready()
        watch.lap()
    print(json.dumps(watch.result(clients)))


if __name__ == "__main__":
    main()
