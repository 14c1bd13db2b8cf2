"""`QEmbedding` and `QEmbeddingBag`: drop-in tables that hold their rows quantised."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import nn

from qnn.functional.embedding import embedding_bag_of, embedding_of
from qnn.kernels import get_scheme
from qnn.kernels.backends import table_backend
from qnn.kernels.schemes import schemes_of
from qnn.nn.base import Quantized
from qnn.nn.values import of_other_kind, require_floats

TableT = TypeVar("TableT", bound="Table")
DEFAULT = "int8_weight"


class Table(Quantized):
    """What both layers share."""

    op: ClassVar[str]
    """What `Scheme.ops` calls the layer."""
    float_class: ClassVar[type[nn.Module]]
    options: ClassVar[tuple[str, ...]]
    """The arguments that both constructors have besides the sizes, device and dtype."""

    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None
    max_norm: float | None

    def _build(self, device: Any, dtype: torch.dtype | None) -> None:
        """The rest of a constructor, once the attributes are there."""
        self._set_dtype(dtype)
        if (reason := why_not(self.op, self.scheme, self)) is not None:
            raise ValueError(f"{self._who}: {reason}.")
        if self.padding_idx is not None:
            rows = self.num_embeddings
            if not -rows <= self.padding_idx < rows:
                raise ValueError(
                    f"{self._who}: padding_idx must be a row, {-rows} … {rows - 1}, got "
                    f"{self.padding_idx}."
                )
            self.padding_idx %= rows
        self._empty_weights(device)
        self.reset_parameters()

    @property
    def _who(self) -> str:
        sizes = f"{self.num_embeddings}, {self.embedding_dim}"
        return f"qnn.{type(self).__name__}({sizes}, scheme={self.scheme!r})"

    def _weight_shapes(self) -> dict[str, tuple[int, int]]:
        return {"weight": (self.num_embeddings, self.embedding_dim)}

    def _backend(self) -> str:
        return table_backend(cast(str, self._scheme.op(self.op)), self._device)

    def _float(self, device: Any) -> nn.Module:
        given = {name: getattr(self, name) for name in self.options}
        sizes = self.num_embeddings, self.embedding_dim
        return self.float_class(*sizes, **given, device=device, dtype=self.dtype)

    @property
    def stored(self) -> tuple[nn.Parameter, ...]:
        """The parameters that the table is stored in, the values first."""
        return self._stored_of("weight")

    @classmethod
    def around(cls: type[TableT], table: Any, scheme: str) -> TableT:
        """`from_float`."""
        name = cls.float_class.__name__
        if not isinstance(table, cls.float_class) or isinstance(table, Quantized):
            raise TypeError(
                f"qnn.{cls.__name__}.from_float takes an nn.{name}, got {type(table).__name__}."
            )
        weight = cast(torch.Tensor, table.weight)
        require_floats(f"qnn.{cls.__name__}.from_float({table!r})", {"weight": weight})
        given: dict[str, Any] = {name: getattr(table, name) for name in cls.options}
        sizes: Any = table
        layer: Any = cls(
            sizes.num_embeddings, sizes.embedding_dim, **given, device="meta", dtype=weight.dtype,
            scheme=scheme,
        )  # fmt: skip
        layer._take({"weight": weight})
        return cast(TableT, layer.train(table.training))

    def _require_ids(self, input: torch.Tensor) -> None:
        """Raise a TypeError or ValueError for what are no ids for this layer."""
        if input.dtype not in (torch.int64, torch.int32):
            raise TypeError(
                f"{self._who}: the input must be ids, int64 or int32, got {input.dtype}; cast it "
                "with .long()."
            )
        if input.device != self._device:
            raise ValueError(
                f"{self._who}: the input is on {input.device}, the layer on {self._device}; move "
                "one of them with .to(device)."
            )

    def extra_repr(self) -> str:
        words = [str(self.num_embeddings), str(self.embedding_dim)]
        if self.padding_idx is not None:
            words.append(f"padding_idx={self.padding_idx}")
        if self.op == "embedding_bag":
            words.append(f"mode={cast(Any, self).mode!r}")
        if self.dtype != torch.float32:
            words.append(f"dtype={self.dtype}")
        return ", ".join([*words, f"scheme={self.scheme!r}"])


class QEmbedding(Table, nn.Embedding):
    """`y[...] = dequantize(weight)[input[...]]`, an `nn.Embedding` whose table is quantised.

    One call decodes the rows that are asked for; there is no float table at any time. The tensors
    are those of `QLinear` for a weight `[num_embeddings, embedding_dim]`: `weight` and
    `weight_scale`, with per-channel scales (a row is a channel), and for nvfp4 and int4 per-group
    ones. `layer.weight` reads as the float table. It is frozen, and so the result needs no
    gradient, and `sparse` and
    `scale_grad_by_freq`, which are about the gradient of a table, are kept for `dequantize()` and
    do nothing. A linear layer whose weight is tied to the table keeps it in common where both have
    one format of weights, such as `int8` and `int8_weight`.

    Args:
        num_embeddings, embedding_dim, padding_idx, scale_grad_by_freq, sparse, device: as in
            `nn.Embedding`. `embedding_dim` must be a multiple of 16 for nvfp4, and of the group
            for int4.
        max_norm, norm_type: of `nn.Embedding`, which writes into the table at each call: only
            None can be taken.
        dtype: of the result; torch's default dtype if None.
        scheme: `"int8_weight"`, `"fp8_weight"`, `"nvfp4_weight"` or `"int4_weight"`; there is no
            activation to quantise, so `"int8"`, `"fp8"` and `"nvfp4"` are the same here.

    Shape:
        input: ids, int64 or int32, of any shape; output `[*input.shape, embedding_dim]`.

    Raises:
        IndexError: of the call: an id that is not a row of the table.
        ValueError: a size that the scheme does not take, a scheme without tables, a `max_norm`.
        TypeError: `dtype` is not a float dtype.

    >>> layer = QEmbedding(30522, 384, padding_idx=0)
    >>> layer(torch.tensor([[7, 8, 0]])).shape
    torch.Size([1, 3, 384])
    """

    op = "embedding"
    float_class = nn.Embedding
    options = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        scheme: str = DEFAULT,
    ) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.scheme = num_embeddings, embedding_dim, scheme
        self.padding_idx, self.max_norm, self.norm_type = padding_idx, max_norm, norm_type
        self.scale_grad_by_freq, self.sparse = scale_grad_by_freq, sparse
        self._build(device, dtype)

    @classmethod
    def from_float(cls, embedding: nn.Embedding, scheme: str = DEFAULT) -> QEmbedding:
        """The quantised twin of a float layer: same device, mode and options.

        Raises:
            TypeError: `embedding` is not an `nn.Embedding` of floats.
            ValueError: the table holds NaN or inf, or has a size that `scheme` does not take; the
                layer has a `max_norm`.
        """
        return cls.around(embedding, scheme)

    @classmethod
    def from_pretrained(
        cls,
        embeddings: torch.Tensor,
        freeze: bool = True,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        *,
        scheme: str = DEFAULT,
    ) -> QEmbedding:
        """A layer over a float table, as of `nn.Embedding`; it is frozen in any case."""
        _require_frozen(cls, freeze)
        return cls.around(
            nn.Embedding.from_pretrained(
                embeddings, True, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
            ),
            scheme,
        )

    def dequantize(self) -> nn.Embedding:
        """A float `nn.Embedding` with the table that the codes stand for, in `dtype`."""
        return cast(nn.Embedding, super().dequantize())

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if type(input) is not torch.Tensor and (y := _of_other_kind(self, input)) is not None:
            return cast(torch.Tensor, y)
        if torch.compiler.is_compiling():
            self._require_ids(input)
        try:
            return embedding_of(input, self._held("weight"), self.dtype, self.scheme)
        except (RuntimeError, TypeError, ValueError):
            self._require_ids(input)  # the same fault, in words about the layer
            raise


class QEmbeddingBag(Table, nn.EmbeddingBag):
    """The sum, mean or largest value of rows of a quantised table: an `nn.EmbeddingBag`.

    State, `layer.weight` and what is frozen are those of `QEmbedding`. Sums are in float32, with
    one cast at the end. `per_sample_weights` have their gradient.

    Args:
        num_embeddings, embedding_dim, scale_grad_by_freq, mode, sparse, include_last_offset,
            padding_idx, device: as in `nn.EmbeddingBag`.
        max_norm, norm_type: only None can be taken, as in `QEmbedding`.
        dtype, scheme: as in `QEmbedding`.

    Shape:
        input: ids, int64 or int32: `[B, L]`, a bag a row, or `[N]` with `offsets` `[B]`;
        per_sample_weights: of the shape of `input`, in `dtype`; output `[B, embedding_dim]`.

    Raises:
        IndexError: of the call: an id that is not a row of the table.
        ValueError: as of `QEmbedding`; of the call: offsets that are missing, given twice or no
            bounds of bags, weights for another mode than `"sum"`.

    >>> layer = QEmbeddingBag(1000, 64, mode="sum")
    >>> layer(torch.tensor([3, 4, 5, 6]), torch.tensor([0, 3])).shape
    torch.Size([2, 64])
    """

    op = "embedding_bag"
    float_class = nn.EmbeddingBag
    options = (
        "max_norm", "norm_type", "scale_grad_by_freq", "mode", "sparse", "include_last_offset",
        "padding_idx",
    )  # fmt: skip

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        scheme: str = DEFAULT,
    ) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.scheme = num_embeddings, embedding_dim, scheme
        self.padding_idx, self.max_norm, self.norm_type = padding_idx, max_norm, norm_type
        self.scale_grad_by_freq, self.sparse = scale_grad_by_freq, sparse
        self.mode, self.include_last_offset = mode, include_last_offset
        if mode not in ("sum", "mean", "max"):
            raise ValueError(f"{self._who}: mode must be 'sum', 'mean' or 'max', got {mode!r}.")
        self._build(device, dtype)

    @classmethod
    def from_float(cls, bag: nn.EmbeddingBag, scheme: str = DEFAULT) -> QEmbeddingBag:
        """The quantised twin of a float layer, as of `QEmbedding`."""
        return cls.around(bag, scheme)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, embeddings: torch.Tensor, freeze: bool = True, *, scheme: str = DEFAULT, **options: Any
    ) -> QEmbeddingBag:
        """A layer over a float table, as of `nn.EmbeddingBag`; it is frozen in any case."""
        _require_frozen(cls, freeze)
        bag = nn.EmbeddingBag.from_pretrained(embeddings, True, **options)
        return cls.around(bag, scheme)

    def dequantize(self) -> nn.EmbeddingBag:
        """A float `nn.EmbeddingBag` with the table that the codes stand for, in `dtype`."""
        return cast(nn.EmbeddingBag, super().dequantize())

    def forward(
        self,
        input: torch.Tensor,
        offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if isinstance(input, torch.fx.Proxy):
            return cast(torch.Tensor, of_other_kind(self, input, offsets, per_sample_weights))
        if torch.compiler.is_compiling():
            self._require_ids(input)
        try:
            return embedding_bag_of(
                input, self._held("weight"), offsets, self.mode, per_sample_weights,
                self.include_last_offset, self.padding_idx, self.dtype, self.scheme,
            )  # fmt: skip
        except (RuntimeError, TypeError, ValueError):
            self._require_ids(input)
            raise


_SIZES = ("num_embeddings", "embedding_dim")


def why_not(op: str, scheme: str, table: Any) -> str | None:
    """Why a table, float or quantised, cannot be held in a scheme, or None."""
    known = get_scheme(scheme)
    if known.op(op) is None:
        able = ", ".join(map(repr, schemes_of(op)))
        return f"scheme {scheme!r} has no embedding; use one of {able}"
    if table.max_norm is not None:
        return (
            f"max_norm={table.max_norm} has each call write into the table, and a quantised one is "
            "frozen; set max_norm to None, with the rows scaled down once, or leave it in float"
        )
    rows, columns = table.num_embeddings, table.embedding_dim
    for name, size in zip(_SIZES, (rows, columns), strict=True):
        if not isinstance(size, int | torch.SymInt) or size < 1:
            return f"{name} must be an integer, at least 1, got {size!r}"
    multiple = known.weight.columns_multiple_of
    if columns % multiple:
        return (
            f"embedding_dim must be a multiple of {multiple}, got {columns}; leave such a layer in "
            "float, or use 'int8_weight'"
        )
    return None


def _require_frozen(cls: type, freeze: bool) -> None:
    if not freeze:
        raise ValueError(
            f"qnn.{cls.__name__}.from_pretrained: freeze=False: a quantised table cannot be "
            "trained; train it in float and convert it afterwards."
        )


def _of_other_kind(layer: QEmbedding, input: Any) -> Any:
    """`of_other_kind`, of which a jagged input of ids ends in its ragged axis."""
    if isinstance(input, torch.Tensor) and input.layout == torch.jagged:
        nested: Any = input
        return torch.nested.nested_tensor_from_jagged(
            QEmbedding.forward(layer, nested.values()),  # not what a subclass has around it
            nested.offsets(),
            nested.lengths(),
            jagged_dim=nested._ragged_idx,
        )
    return of_other_kind(layer, input)


__all__ = ["QEmbedding", "QEmbeddingBag", "Table", "why_not"]
