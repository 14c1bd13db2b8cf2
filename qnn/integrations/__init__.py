"""Other libraries: how a model describes itself to them, and how they read it back."""

from qnn.integrations import compressed_tensors
from qnn.integrations.checkpoints import load_checkpoint, save_checkpoint, share_scales
from qnn.integrations.load_pretrained import load_pretrained

__all__ = [
    "compressed_tensors",
    "load_checkpoint",
    "load_pretrained",
    "save_checkpoint",
    "share_scales",
]
