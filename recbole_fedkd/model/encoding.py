"""Attention encoding in front of a RecBole model: between its embeddings and the rest, with no change to the model."""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any

from recbole.model.abstract_recommender import ContextRecommender
from recbole.model.layers import ContextSeqEmbLayer
from torch import Tensor, nn

from recbole_fedkd.errors import InputError
from recbole_fedkd.model.attention import TargetAttention


class FieldAttention(nn.Module):
    """Residual target attention over feature fields: ``V + sum_i a_i V_i``, with the mean of the fields as query (AFD).

    Args:
        width: size ``d`` of a field's embedding.
        heads: attention vectors that are averaged.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = TargetAttention(width, heads)

    def forward(self, fields: Tensor) -> Tensor:
        """``[..., fields, d]`` to the same shape."""
        flat = fields.reshape(-1, *fields.shape[-2:])
        encoded: Tensor = flat + self.attention(flat.mean(1, keepdim=True), flat)[0]
        return encoded.view_as(fields)


def has_fields(model_class: type) -> bool:
    """Whether a model embeds feature fields in one of the ways that :func:`with_attention` knows."""
    modules = [sys.modules.get(base.__module__) for base in model_class.__mro__]
    return issubclass(model_class, ContextRecommender) or any(
        hasattr(module, "ContextSeqEmbLayer") for module in modules
    )


@lru_cache
def with_attention(model_class: type) -> type:
    """The model class with attention over its embedded feature fields; its name stays, so RecBole finds what belongs to it.

    Context-aware models embed by ``concat_embed_input_fields``, DIN and DIEN by an ``embedding_layer``, where every item of the
    sequence and the target are encoded alike.

    Raises:
        InputError: the model embeds no feature fields.
    """
    if not has_fields(model_class):
        raise InputError(
            f"attention is True, but model '{model_class.__name__}' embeds no feature fields that it could encode"
        )

    def build(self: Any, config: Any, dataset: Any) -> None:
        model_class.__init__(self, config, dataset)  # type: ignore[misc]
        layer = getattr(self, "embedding_layer", None)
        self.field_attention = FieldAttention(config["embedding_size"], config["attention_heads"])
        if isinstance(layer, ContextSeqEmbLayer):
            layer.register_forward_hook(lambda module, arguments, output: _encode_items(self, output))

    def concat_embed_input_fields(self: Any, interaction: Any) -> Tensor:
        encoded: Tensor = self.field_attention(model_class.concat_embed_input_fields(self, interaction))  # type: ignore[attr-defined]
        return encoded

    members: dict[str, Any] = {"__init__": build, "__module__": model_class.__module__}
    if issubclass(model_class, ContextRecommender):
        members["concat_embed_input_fields"] = concat_embed_input_fields
    return type(model_class.__name__, (model_class,), members)


def _encode_items(model: Any, output: tuple[dict[str, Tensor | None], dict[str, Tensor | None]]) -> Any:
    """Encode the items' token fields of an ``embedding_layer``'s output, ``[batch, length, fields, d]``."""
    sparse, dense = output
    items = sparse["item"]
    return ({**sparse, "item": model.field_attention(items)} if items is not None else sparse), dense
