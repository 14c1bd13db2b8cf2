"""The kind of embedding tables: `nn.Embedding` and `nn.EmbeddingBag`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn

from qnn.kernels import get_scheme
from qnn.kernels.schemes import schemes_of
from qnn.kinds import Kind, Own, qualified, register_kind
from qnn.nn.embedding import own_forward
from qnn.nn.embedding.quantized import QEmbedding, QEmbeddingBag, Table, why_not


class EmbeddingKind(Kind):
    """Rows of a table, looked up by ids."""

    name = "embedding"
    floats = (nn.Embedding, nn.EmbeddingBag)
    titles = ("nn.Embedding", "nn.EmbeddingBag")
    quantized = (Table,)
    shares = True
    held_as = "rows"
    when_named = "embeddings are taken when named: {nn.Embedding: 'int8_weight'}, or by their names"

    def names(self, module: nn.Module) -> tuple[str, ...]:
        return ("weight", *own_forward.own_tensors(module)[0])

    def keeps(self, module: nn.Module) -> Iterable[str]:
        return own_forward.own_tensors(module)[1]

    def weights(self, module: nn.Module) -> dict[str, Any]:
        return {"weight": module._parameters["weight"]}

    def why_left(
        self, module: nn.Module, scheme: str, *, named: bool = False, training: bool = False
    ) -> str | None:
        made = _of(module)
        if own_forward.has_own_forward(module):
            if (reason := own_forward.why_not_own(module)) is not None:
                return reason
        elif type(module).forward is not made.float_class.forward:
            title = f"nn.{made.float_class.__name__}"
            name = qualified(type(module))
            return f"{name} is a subclass of {title} with a forward, and so a meaning of its own"
        if training:
            return "there is no embedding layer that trains in low precision"
        if not named:
            return self.when_named
        if get_scheme(scheme).op(made.op) is None:
            able = ", ".join(map(repr, schemes_of(made.op)))
            return f"scheme {scheme!r} has no embedding; {able} have one"
        return None

    def why_not(self, module: nn.Module, scheme: str) -> str | None:
        return why_not(_of(module).op, scheme, module)

    def quantize(self, layer: nn.Module, scheme: str, own: Own) -> Table:
        if own_forward.has_own_forward(layer):
            return own_forward.around(cast(nn.Embedding, layer), scheme, own)
        return _of(layer).around(layer, scheme)

    def sample(self, layer: type[nn.Module], size: int) -> tuple[nn.Module, torch.Tensor]:
        return layer(size, size), torch.randint(size, (3, 5))


def _of(module: nn.Module) -> type[Table]:
    return QEmbedding if isinstance(module, nn.Embedding) else QEmbeddingBag


register_kind(EmbeddingKind())
