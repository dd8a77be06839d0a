"""PFedRec's maths by FedJAX: one local epoch of SGD, four negatives per positive, shared items, a private score function.

    <python with fedjax> benchmarks/fleet_fedjax.py rows.npz 3

Called by ``benchmarks/fleet.py``; prints one line of JSON.
"""

import json
import os
import resource
import sys
from time import perf_counter, process_time

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import fedjax
import jax
import jax.numpy as jnp
import numpy as np

WIDTH, BATCH, NEGATIVES, SCORE_RATE, ITEM_RATE = 32, 256, 4, 0.1, 13456.0


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


def negatives(users, positives, item_count, generator):
    """In bulk: an item that is no training positive of each user."""
    items = np.empty(len(users), dtype=np.int64)
    pending = np.arange(len(users))
    while len(pending):
        drawn = generator.integers(1, item_count, len(pending))
        items[pending] = drawn
        pending = pending[positives[users[pending], drawn]]
    return items


def main() -> None:
    """Time the rounds."""
    rows = np.load(sys.argv[1])
    users, items, item_count = rows["users"], rows["items"], int(rows["item_count"])
    clients = int(users.max()) + 1
    starts = np.searchsorted(users, np.arange(clients + 1))
    positives = np.zeros((clients, item_count), dtype=bool)
    positives[users, items] = True
    generator = np.random.default_rng(0)
    shared = jnp.asarray(generator.normal(size=(item_count, WIDTH)).astype(np.float32) * 0.1)
    own = [{"score": jnp.zeros(WIDTH), "bias": jnp.zeros(())} for _ in range(clients)]
    run = fedjax.for_each_client(
        lambda shared, own: {"items": shared, **own},
        client_step,
        lambda shared, state: {"change": state["items"] - shared, "score": state["score"], "bias": state["bias"]},
    )
    clock, processor = [], []
    for _ in range(int(sys.argv[2]) + 1):
        started, used = perf_counter(), process_time()
        drawn = negatives(np.repeat(users, NEGATIVES), positives, item_count, generator)
        batches = []
        for client in range(clients):
            first, last = starts[client], starts[client + 1]
            found = np.concatenate([items[first:last], drawn[NEGATIVES * first : NEGATIVES * last]])
            labels = np.zeros(len(found), dtype=np.float32)
            labels[: last - first] = 1.0
            order = generator.permutation(len(found))
            data = fedjax.ClientDataset({"item": found[order], "label": labels[order]})
            padded = data.padded_batch(batch_size=BATCH, num_batch_size_buckets=4)
            batches.append((client, padded, own[client]))
        total = jnp.zeros_like(shared)
        for client, output in run(shared, batches):
            total = total + output["change"]
            own[client] = {"score": output["score"], "bias": output["bias"]}
        shared = (shared + total / clients).block_until_ready()
        clock.append(perf_counter() - started)
        processor.append(process_time() - used)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    best = {"seconds": min(clock[1:]), "processor_seconds": min(processor[1:]), "peak_gb": peak, "clients": clients}
    print(json.dumps(best))


if __name__ == "__main__":
    main()
