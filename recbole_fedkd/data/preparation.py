"""From a dataset to RecBole's three loaders, without the files that RecBole would open or write on the way."""

from __future__ import annotations

from typing import Any

from recbole.sampler import KGSampler
from recbole.utils import ModelType

from recbole_fedkd.data.rows import create_samplers, evaluation_loader, training_loader

Loaders = tuple[Any, Any, Any]


def data_preparation(config: Any, dataset: Any) -> Loaders:
    """Split a dataset and make the training, validation and test loader, as RecBole's function of this name.

    RecBole first looks for a file of saved loaders, also where no key names one, and unpickles it, which runs what it says.

    Args:
        config: the run's config.
        dataset: the whole dataset.
    """
    splits = dataset.build()
    samplers = create_samplers(config, dataset, splits)
    more: list[Any] = []
    if config["MODEL_TYPE"] == ModelType.KNOWLEDGE:
        sampling = config["train_neg_sample_args"]
        more.append(KGSampler(dataset, sampling["distribution"], sampling["alpha"]))
    shuffle = True if more else config["shuffle"]
    train = training_loader(config)(config, splits[0], samplers[0], *more, shuffle=shuffle)
    valid, test = (
        evaluation_loader(config, phase)(config, splits[part], samplers[part], shuffle=False)
        for part, phase in ((1, "valid"), (2, "test"))
    )
    return train, valid, test
