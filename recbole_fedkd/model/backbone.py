"""Backbones: networks that turn a sample's field embeddings into one logit per label."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from recbole_fedkd.model.convolving import Linear, convolve, convolves
from recbole_fedkd.model.dropout import HandedDropout

CNN_LAYERS = 5


class Backbone(nn.Module):
    """Layers, the last of which makes logits of the last hidden layer.

    Args:
        layers: all of them.
        fields: number of fields in a sample.
        width: of the last hidden layer ``h``.
    """

    def __init__(self, layers: Sequence[nn.Module], fields: int, width: int) -> None:
        super().__init__()
        self.layers, self.count, self.hidden_width = nn.Sequential(*layers), fields, width

    def hidden(self, fields: Tensor) -> Tensor:
        """``[batch, fields, d]`` to the last hidden layer ``[batch, h]``."""
        out: Tensor = self.layers[:-1](fields)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """``[batch, h]`` to logits ``[batch, T]``."""
        out: Tensor = self.layers[-1](hidden)
        return out

    def first(self) -> tuple[Tensor, Tensor]:
        """The first layer as a linear map of all fields, weight ``[outputs, fields, d]`` and bias ``[outputs]``."""
        raise NotImplementedError

    def first_shape(self) -> tuple[int, int, int]:
        """Fields, outputs of the first layer's own weight, and ``d``."""
        raise NotImplementedError

    @staticmethod
    def first_places(fields: int, outputs: int, width: int) -> tuple[Tensor, int]:
        """Which number of the first layer's own weight is where in :meth:`first`, and the place that is none's.

        Arguments as of :meth:`first_shape`.
        """
        raise NotImplementedError

    def others(self) -> list[Linear]:
        """The other layers, weight and bias; a rectifier stands before each.

        A weight ``[outputs, inputs]`` is of all that comes before it, one ``[fields, outputs, 3 inputs]`` of three
        neighbouring fields, the same for every field.
        """
        raise NotImplementedError

    def _dense(self) -> list[Linear]:
        """Weight and bias of every linear layer."""
        return [(layer.weight, layer.bias) for layer in self.layers if isinstance(layer, nn.Linear)]


class CnnBackbone(Backbone):
    """The five-layer CNN of AFD's experiments: convolutions along the fields, embeddings as channels.

    Args:
        fields: number of fields in a sample.
        width: embedding size ``d``.
        hidden_sizes: channels of the first layer and width of the last hidden layer; one number serves both.
        labels: number of labels ``T``.
        dropout_prob: dropout before the last layer.
    """

    def __init__(self, fields: int, width: int, hidden_sizes: Sequence[int], labels: int, dropout_prob: float) -> None:
        channels, last = hidden_sizes[0], hidden_sizes[-1]
        layers: list[nn.Module] = []
        for layer in range(CNN_LAYERS - 2):
            layers += [nn.Conv1d(width if layer == 0 else channels, channels, 3, padding=1), nn.ReLU()]
        layers += [nn.Flatten(), nn.Linear(channels * fields, last), nn.ReLU()]
        super().__init__([*layers, HandedDropout(dropout_prob, last), nn.Linear(last, labels)], fields, last)

    def hidden(self, fields: Tensor) -> Tensor:
        """See :meth:`Backbone.hidden`; embeddings are channels."""
        convolutions, dense = self._convolutions(), self._dense()[0]
        if not convolves(fields, convolutions, dense):
            return super().hidden(fields.transpose(1, 2))
        hidden: Tensor = self.layers[-2](convolve(fields, convolutions, dense))
        return hidden

    def first(self) -> tuple[Tensor, Tensor]:
        """See :meth:`Backbone.first`; outputs are fields, then channels."""
        weight, bias = self._convolutions()[0]
        places, _ = self.first_places(*self.first_shape())
        numbers = functional.pad(weight.flatten(), (0, 1))
        return numbers.index_select(0, places.flatten().to(weight.device)).view(places.shape), bias.repeat(self.count)

    def first_shape(self) -> tuple[int, int, int]:
        """See :meth:`Backbone.first_shape`."""
        weight, _ = self._convolutions()[0]
        return self.count, len(weight), weight.shape[1]

    @staticmethod
    @cache
    def first_places(fields: int, outputs: int, width: int) -> tuple[Tensor, int]:
        """See :meth:`Backbone.first_places`; a field sees itself and its two neighbours."""
        own, nothing = torch.arange(outputs * width * 3).view(outputs, width, 3), outputs * width * 3
        places = torch.full((fields, outputs, fields, width), nothing)
        numbers = torch.arange(fields)
        for tap in range(3):
            seen = numbers[(numbers + tap >= 1) & (numbers + tap <= fields)]
            places[seen, :, seen + tap - 1] = own[:, :, tap]
        return places.flatten(0, 1), nothing

    def others(self) -> list[Linear]:
        """See :meth:`Backbone.others`; a sample is flattened channels first, and here fields first."""
        convolutions = [
            (weight.permute(0, 2, 1).flatten(1).expand(self.count, -1, -1), bias.repeat(self.count))
            for weight, bias in self._convolutions()[1:]
        ]
        (weight, bias), last = self._dense()
        return [*convolutions, (weight.unflatten(1, (-1, self.count)).transpose(1, 2).flatten(1), bias), last]

    def _convolutions(self) -> list[Linear]:
        """Weight and bias of every convolution."""
        layers = [layer for layer in self.layers if isinstance(layer, nn.Conv1d)]
        return [(layer.weight, layer.bias) for layer in layers if layer.bias is not None]


class MlpBackbone(Backbone):
    """A multi-layer perceptron over the concatenated field embeddings. Arguments as for :class:`CnnBackbone`."""

    def __init__(self, fields: int, width: int, hidden_sizes: Sequence[int], labels: int, dropout_prob: float) -> None:
        sizes = [fields * width, *hidden_sizes]
        layers: list[nn.Module] = [nn.Flatten()]
        for size, following in pairwise(sizes):
            layers += [nn.Linear(size, following), nn.ReLU(), HandedDropout(dropout_prob, following)]
        super().__init__([*layers, nn.Linear(sizes[-1], labels)], fields, sizes[-1])

    def first(self) -> tuple[Tensor, Tensor]:
        """See :meth:`Backbone.first`."""
        weight, bias = self._dense()[0]
        return weight.unflatten(1, (self.count, -1)), bias

    def first_shape(self) -> tuple[int, int, int]:
        """See :meth:`Backbone.first_shape`."""
        weight, _ = self._dense()[0]
        return self.count, len(weight), weight.shape[1] // self.count

    @staticmethod
    def first_places(fields: int, outputs: int, width: int) -> tuple[Tensor, int]:
        """See :meth:`Backbone.first_places`."""
        return torch.arange(outputs * fields * width).view(outputs, fields, width), -1

    def others(self) -> list[Linear]:
        """See :meth:`Backbone.others`."""
        return self._dense()[1:]


BACKBONES: dict[str, type[CnnBackbone] | type[MlpBackbone]] = {"cnn": CnnBackbone, "mlp": MlpBackbone}
