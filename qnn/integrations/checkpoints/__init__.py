"""Checkpoints of qnn and of others: one table of formats, a reader and a writer."""

from qnn.integrations.checkpoints.load import load_checkpoint
from qnn.integrations.checkpoints.save import save_checkpoint, share_scales

__all__ = ["load_checkpoint", "save_checkpoint", "share_scales"]
