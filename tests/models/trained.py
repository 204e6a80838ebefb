"""A small real checkpoint: transformers' Llama and a tokenizer, both trained for seconds on Python's own sources."""

from __future__ import annotations

import itertools
import math
import sysconfig
from pathlib import Path
from typing import Any

import torch

from infuse.models.extras import import_extra, quiet_imports
from infuse.models.text import batches

VOCAB_SIZE = 384
SCALE = math.log(VOCAB_SIZE)  # the loss of a model that has learned nothing
BATCH_SIZE, SEQ_LEN = 8, 48
MAX_SEQ_LEN = 128
END_OF_TEXT = "<|end_of_text|>"


def save_trained(folder: Path, steps: int = 120) -> tuple[float, float]:
    """Fills the folder and returns the losses of the first and the last step, in nats a token."""
    text = "\n".join(path.read_text() for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("a*.py")))
    tokenizer = train_tokenizer(text)
    transformers = import_extra("transformers")
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_SEQ_LEN,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=()), quiet_imports():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        losses = _train(model, torch.tensor(tokenizer(text)["input_ids"]), steps)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return losses[0], losses[-1]


def train_tokenizer(text: str) -> Any:
    """Byte-level BPE, as Llama 3's and Qwen's are."""
    tokenizers = import_extra("tokenizers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([text], trainer)
    return import_extra("transformers").PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT)


def _train(model: Any, tokens: torch.Tensor, steps: int) -> list[float]:
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for inputs, targets in itertools.islice(batches(tokens, batch_size=BATCH_SIZE, seq_len=SEQ_LEN, seed=0), steps):
        logits = model.train()(input_ids=inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    model.eval()
    return losses
