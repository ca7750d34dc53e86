# SPDX-License-Identifier: MIT
"""An export of MSD in sentence-transformers: its modules.json names the class below.

An export holds this file beside the model.py that it imports; here it is not imported.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .model import load, need, pool


class SentenceEncoder(nn.Module):
    """An Encoder as the one module of a sentence-transformers model."""

    save_in_root = True

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder.requires_grad_()
        self.tokenizer = encoder.tokenizer

    @classmethod
    def load(cls, path, **options):
        """path: a folder, or a name on the hub, from which these files alone are fetched."""
        from sentence_transformers.util import load_file_path

        known = ("token", "cache_folder", "revision", "local_files_only")
        where = {k: options.get(k) for k in known}
        names = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
        files = [load_file_path(path, name, **where) for name in names]
        encoder = load(Path(files[0]).parent, "float32", "cpu")
        return cls(encoder.float())  # the table may be float16, which does not train

    def save(self, folder, **_):
        self.encoder.save(folder, new=False)

    def tokenize(self, texts, **_):
        flat, starts = self.encoder.tokenize(texts, prompt="")  # the prompt is there already
        # On the CPU: a DataLoader pins what it collates, and its workers must not touch a GPU.
        ids, mask = self.encoder.batch(flat, starts, np.arange(len(texts)), "cpu")
        return {"input_ids": ids, "attention_mask": mask.long()}  # (N, T) each

    def forward(self, features, **_):
        e = self.encoder
        trains = self.training and torch.is_grad_enabled()
        need(not (trains and e.int8), "int8 weights cannot be trained; train the float32 model")
        mask = features["attention_mask"].bool()
        e.dtype = e.embeddings.norm.weight.dtype  # half() and bfloat16() are obeyed
        x = e.hidden(features["input_ids"], mask)  # (N, T, H)
        v = e.dense(pool(x, mask, e.config.pooling))
        v = F.normalize(v, dim=-1) if e.config.normalize else v
        return {**features, "token_embeddings": x, "sentence_embedding": v}

    def get_embedding_dimension(self):
        return self.encoder.config.width

    get_sentence_embedding_dimension = get_embedding_dimension  # the name before version 5

    @property
    def max_seq_length(self):
        return self.encoder.config.max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, tokens):
        c = self.encoder.config
        tokens = min(tokens, c.max_position_embeddings - c.first_position)
        self.encoder.config = replace(c, max_seq_length=tokens)
        self.encoder.tokenizer.enable_truncation(tokens)
