"""Backbones: networks that turn a sample's field embeddings into one logit per label."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

CNN_LAYERS = 5


class HandedDropout(nn.Module):
    """Dropout that can be handed its masks: who trains many networks at once draws for each from a stream of its own.

    Args:
        probability: share of the entries that are set to 0.
        width: size of the last axis of what it is applied to; None: not known yet.

    Attributes:
        shapes: of what it is applied to in a pass, without the leading axis of samples, by the place of the call among the
            calls of all layers of a network; layers of the same place are called in the order in which they were made.
        handed: masks of the next calls, 1 where an entry stays, of the input's shape; none: drawn from torch's own stream.
    """

    def __init__(self, probability: float, width: int | None) -> None:
        super().__init__()
        self.probability = probability
        self.shapes: dict[int, tuple[int, ...]] = {} if width is None else {0: (width,)}
        self.handed: list[Tensor] = []

    def forward(self, values: Tensor) -> Tensor:
        """``[batch, ...]`` to the same shape; what stays is scaled up, so that the mean stays."""
        if not self.training or not self.probability:
            return values
        kept = 1.0 - self.probability
        mask = self.handed.pop(0) if self.handed else torch.empty_like(values).bernoulli_(kept)
        return values * mask.div(kept)


class Backbone(nn.Module):
    """Layers, the last of which makes logits of the last hidden layer.

    Args:
        layers: all of them.
        width: of the last hidden layer ``h``.
    """

    def __init__(self, layers: Sequence[nn.Module], width: int) -> None:
        super().__init__()
        self.layers, self.hidden_width = nn.Sequential(*layers), width

    def hidden(self, fields: Tensor) -> Tensor:
        """``[batch, fields, d]`` to the last hidden layer ``[batch, h]``."""
        out: Tensor = self.layers[:-1](fields)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """``[batch, h]`` to logits ``[batch, T]``."""
        out: Tensor = self.layers[-1](hidden)
        return out

    def _dense_parameters(self) -> list[Iterator[nn.Parameter]]:
        """Weight and bias of every linear layer."""
        return [layer.parameters() for layer in self.layers if isinstance(layer, nn.Linear)]


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
        super().__init__([*layers, HandedDropout(dropout_prob, last), nn.Linear(last, labels)], last)

    def hidden(self, fields: Tensor) -> Tensor:
        """See :meth:`Backbone.hidden`; embeddings are channels."""
        return super().hidden(fields.transpose(1, 2))

    def ranked(self, fields: Tensor) -> Tensor:
        """``[1 + fields + 1, d, batch]``, zeros first and last, to logits ``[T, batch]``, without dropout."""
        values, count, batch = fields, len(fields) - 2, fields.shape[2]
        for layer in self.layers:
            if not isinstance(layer, nn.Conv1d) or layer.bias is None:
                continue
            inputs, outputs = layer.in_channels, layer.out_channels
            kernel = layer.weight.permute(0, 2, 1).flatten(1).expand(count, -1, -1)
            # Three neighbouring fields of every field, in the memory in which they lie behind each other.
            seen = values.as_strided((count, 3 * inputs, batch), (inputs * batch, batch, 1))
            values = values.new_empty(count + 2, outputs, batch)
            values[:: count + 1] = 0.0
            torch.bmm(kernel, seen, out=values[1:-1])
            values[1:-1].add_(layer.bias.unsqueeze(1)).relu_()
        # A sample is flattened channels first.
        (weight, bias), last = self._dense_parameters()
        by_field = weight.unflatten(1, (-1, count)).transpose(1, 2).flatten(1)
        return _dense(values[1:-1].flatten(0, 1), [(by_field, bias), last])


class MlpBackbone(Backbone):
    """A multi-layer perceptron over the concatenated field embeddings. Arguments as for :class:`CnnBackbone`."""

    def __init__(self, fields: int, width: int, hidden_sizes: Sequence[int], labels: int, dropout_prob: float) -> None:
        sizes = [fields * width, *hidden_sizes]
        layers: list[nn.Module] = [nn.Flatten()]
        for size, following in pairwise(sizes):
            layers += [nn.Linear(size, following), nn.ReLU(), HandedDropout(dropout_prob, following)]
        super().__init__([*layers, nn.Linear(sizes[-1], labels)], sizes[-1])

    def ranked(self, fields: Tensor) -> Tensor:
        """``[1 + fields + 1, d, batch]``, zeros first and last, to logits ``[T, batch]``, without dropout."""
        return _dense(fields[1:-1].flatten(0, 1), self._dense_parameters())


def _dense(values: Tensor, layers: Sequence[Iterable[Tensor]]) -> Tensor:
    """Linear layers (weight, bias) of samples on the last axis, with rectifiers between them."""
    for number, (weight, bias) in enumerate(layers):
        values = (weight @ (values.relu_() if number else values)).add_(bias.unsqueeze(1))
    return values


BACKBONES: dict[str, type[CnnBackbone] | type[MlpBackbone]] = {"cnn": CnnBackbone, "mlp": MlpBackbone}
