"""Embedding tables, and their kinds."""

from qnn.nn.embedding import kind
from qnn.nn.embedding.quantized import QEmbedding, QEmbeddingBag

__all__ = ["QEmbedding", "QEmbeddingBag", "kind"]
