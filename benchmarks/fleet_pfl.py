"""PFedRec's maths by pfl (pfl-research), as it simulates on one process.

    <python with pfl> benchmarks/fleet_pfl.py rows.npz 3

Called by ``benchmarks/fleet.py``; prints one line of JSON.
"""

import json
import sys

import torch
from fleet_rows import BATCH, ITEM_RATE, SCORE_RATE, WIDTH, Rows, Stopwatch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByUser
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch.nn import functional


class ItemsAndScores(torch.nn.Module):
    """Items, which are averaged, and the score function of every client, which is not and which pfl does not see."""

    def __init__(self, item_count: int, clients: int) -> None:
        super().__init__()
        self.items = torch.nn.Parameter(torch.randn(item_count, WIDTH) * 0.1)
        self.scores = [torch.zeros(WIDTH + 1, requires_grad=True) for _ in range(clients)]

    def loss(self, items, labels, client):
        """Mean binary cross-entropy of a batch."""
        score = self.scores[client]
        if score.grad is not None:
            # The step of the batch before: pfl's optimiser holds shared parameters alone.
            score.data.sub_(score.grad, alpha=SCORE_RATE)
            score.grad = None
        logits = functional.embedding(items, self.items) @ score[:WIDTH] + score[WIDTH]
        return functional.binary_cross_entropy_with_logits(logits, labels)

    def metrics(self, items, labels, eval=True, client=0):
        """None: pfl asks in the first round, which is not counted."""
        return {}


class Epochs(TrainingProcessCallback):
    """Draws the rows of the next round and stops the time of the one that has ended."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.watch = rows, Stopwatch()
        self.drawn = list(rows.epoch())

    def dataset(self, client: int) -> Dataset:
        """The rows of a client in this round."""
        items, labels = self.drawn[client]
        return Dataset((torch.from_numpy(items), torch.from_numpy(labels)), train_kwargs={"client": client})

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        """See pfl."""
        self.watch.lap()
        self.drawn = list(self.rows.epoch())
        return False, Metrics()


def main() -> None:
    """Time the rounds."""
    torch.set_num_threads(1)
    rows, rounds = Rows(sys.argv[1]), int(sys.argv[2]) + 1
    epochs = Epochs(rows)
    module = ItemsAndScores(rows.item_count, rows.clients)
    model = PyTorchModel(module, torch.optim.SGD, torch.optim.SGD(module.parameters(), lr=1.0))
    sampler = get_user_sampler("minimize_reuse", list(range(rows.clients)))
    backend = SimulatedBackend(FederatedDataset(epochs.dataset, sampler), None, postprocessors=[WeightByUser()])
    FederatedAveraging().run(
        NNAlgorithmParams(rounds, evaluation_frequency=rounds + 1, train_cohort_size=rows.clients, val_cohort_size=0),
        backend,
        model,
        NNTrainHyperParams(local_num_epochs=1, local_learning_rate=ITEM_RATE, local_batch_size=BATCH),
        callbacks=[epochs],
    )
    print(json.dumps(epochs.watch.result(rows.clients)))


if __name__ == "__main__":
    main()
