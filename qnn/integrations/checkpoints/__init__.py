"""Checkpoints of qnn and of others: one table of formats, a reader and a writer."""

from qnn.integrations.checkpoints.load import load_checkpoint

__all__ = ["load_checkpoint"]
