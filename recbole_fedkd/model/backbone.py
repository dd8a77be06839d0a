"""Backbones: networks that turn a sample's field embeddings into one logit per label."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

CNN_LAYERS = 5


class CnnBackbone(nn.Module):
    """The five-layer CNN of AFD's experiments: convolutions along the fields, embeddings as channels.

    Args:
        fields: number of fields in a sample.
        width: embedding size ``d``.
        hidden_sizes: channels of the first layer and width of the last hidden layer; one number serves both.
        labels: number of labels ``T``.
        dropout_prob: dropout before the last layer.
    """

    def __init__(self, fields: int, width: int, hidden_sizes: Sequence[int], labels: int, dropout_prob: float) -> None:
        super().__init__()
        channels, last = hidden_sizes[0], hidden_sizes[-1]
        layers: list[nn.Module] = []
        for layer in range(CNN_LAYERS - 2):
            layers += [nn.Conv1d(width if layer == 0 else channels, channels, 3, padding=1), nn.ReLU()]
        layers += [nn.Flatten(), nn.Linear(channels * fields, last), nn.ReLU()]
        layers += [nn.Dropout(dropout_prob), nn.Linear(last, labels)]
        self.layers = nn.Sequential(*layers)
        self.hidden_width = last

    def hidden(self, fields: Tensor) -> Tensor:
        """``[batch, fields, d]`` to the last hidden layer ``[batch, h]``."""
        out: Tensor = self.layers[:-1](fields.transpose(1, 2))
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """``[batch, h]`` to logits ``[batch, T]``."""
        out: Tensor = self.layers[-1](hidden)
        return out


class MlpBackbone(nn.Module):
    """A multi-layer perceptron over the concatenated field embeddings. Arguments as for :class:`CnnBackbone`."""

    def __init__(self, fields: int, width: int, hidden_sizes: Sequence[int], labels: int, dropout_prob: float) -> None:
        super().__init__()
        sizes = [fields * width, *hidden_sizes]
        layers: list[nn.Module] = [nn.Flatten()]
        for size, following in pairwise(sizes):
            layers += [nn.Linear(size, following), nn.ReLU(), nn.Dropout(dropout_prob)]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], labels))
        self.hidden_width = sizes[-1]

    def hidden(self, fields: Tensor) -> Tensor:
        """``[batch, fields, d]`` to the last hidden layer ``[batch, h]``."""
        out: Tensor = self.layers[:-1](fields)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """``[batch, h]`` to logits ``[batch, T]``."""
        out: Tensor = self.layers[-1](hidden)
        return out


BACKBONES: dict[str, type[CnnBackbone] | type[MlpBackbone]] = {"cnn": CnnBackbone, "mlp": MlpBackbone}
