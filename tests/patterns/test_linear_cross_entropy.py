"""The loss of a language model's head: how it is written, and what looks like it and is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from infuse.patterns.linear_cross_entropy import MIN_VOCAB
from infuse.settings import Settings
from tests.patterns.capture import MODES, Captured, assert_same_results, capture

VOCAB, DIM = MIN_VOCAB + 3, 8
Loss = Callable[["Head", Tensor, Tensor], Any]


class Head(nn.Module):
    """A language model's last linear, and its loss."""

    def __init__(self, loss: Loss, *, bias: bool = False, vocab: int = VOCAB) -> None:
        super().__init__()
        self.output = nn.Linear(DIM, vocab, bias=bias)
        self.embed = nn.Embedding(vocab, DIM)
        self.adapter = nn.Parameter(torch.randn(vocab, DIM))
        self.classes = nn.Parameter(torch.ones(vocab))
        self.loss = loss

    def forward(self, x: Tensor, target: Tensor) -> Any:
        return self.loss(self, x, target)


def flat(logits: Tensor) -> Tensor:
    return logits.view(-1, logits.shape[-1])


def entropy(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(flat(logits), target.reshape(-1), **options)


def huggingface(head: Head, x: Tensor, target: Tensor) -> Tensor:
    """As its causal language models do: the labels are shifted, padded by one that is ignored."""
    logits = head.output(x).float()
    shifted = F.pad(target, (0, 1), value=-100)[..., 1:].contiguous()
    loss = F.cross_entropy(flat(logits), shifted.view(-1).to(logits.device), ignore_index=-100, reduction="sum")
    return loss / torch.tensor(7, device=loss.device)


def shifted_logits(head: Head, x: Tensor, target: Tensor) -> Tensor:
    logits = head.output(x).float()
    return nn.CrossEntropyLoss()(flat(logits[..., :-1, :].contiguous()), target[..., 1:].contiguous().view(-1))


SPELLINGS: dict[str, tuple[Loss, str]] = {
    "flattened": (lambda m, x, t: entropy(m.output(x), t), "linear, cross_entropy"),
    "float": (lambda m, x, t: entropy(m.output(x).float(), t), "linear, float, cross_entropy"),
    "float behind the view": (lambda m, x, t: F.cross_entropy(flat(m.output(x)).float(), t.view(-1)), "linear, float"),
    "flattened before": (lambda m, x, t: F.cross_entropy(m.output(x.flatten(0, 1)), t.flatten()), "linear, cross"),
    "Hugging Face": (huggingface, "linear, float, cross_entropy"),
    "shifted": (shifted_logits, "linear, float, slice, cross_entropy"),
    "classes second": (lambda m, x, t: F.cross_entropy(m.output(x).transpose(1, 2), t), "linear, transposed"),
    "permuted, float": (lambda m, x, t: F.cross_entropy(m.output(x).permute(0, 2, 1).float(), t), "linear, transposed"),
    "log_softmax": (
        lambda m, x, t: F.nll_loss(F.log_softmax(flat(m.output(x)), -1, dtype=torch.float32), t.view(-1)),
        "log_softmax, nll_loss",
    ),
    "log_softmax of floats": (
        lambda m, x, t: F.nll_loss(flat(m.output(x)).float().log_softmax(dim=1), t.view(-1), reduction="sum"),
        "log_softmax, nll_loss",
    ),
    "smoothed, ignoring": (
        lambda m, x, t: entropy(m.output(x), t, label_smoothing=0.1, ignore_index=3, reduction="sum"),
        "linear, cross_entropy",
    ),
    "soft cap": (
        lambda m, x, t: entropy(torch.tanh(m.output(x) / 2.0).mul(2.0).float(), t),
        "linear, soft cap, float, cross_entropy",
    ),
    "soft cap, number first": (lambda m, x, t: entropy(2.0 * torch.tanh(m.output(x) * 0.5), t), "linear, soft cap"),
    "tied": (lambda m, x, t: entropy(F.linear(x + m.embed(t), m.embed.weight), t), "linear, cross_entropy"),
}


def inputs(dtype: torch.dtype, training: bool) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 5, DIM).to(dtype).requires_grad_(training)
    target = torch.randint(0, VOCAB, (2, 5))
    target[0, 2] = 3
    return x, target


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize(("dtype", "training", "dynamic"), MODES[1:3])
def test_spellings(name: str, dtype: torch.dtype, training: bool, dynamic: bool) -> None:
    loss, words = SPELLINGS[name]
    captured = capture(Head(loss).to(dtype), *inputs(dtype, training), training=training, dynamic=dynamic)
    assert captured.counts == {"linear_cross_entropy": 1}
    expected = words if dtype == torch.bfloat16 else words.replace(", float", "")
    assert expected in captured.spellings[0]
    assert not {"cross_entropy", "nll_loss", "log_softmax"} & captured.targets()
    assert_same_results(captured, training)


def test_bias() -> None:
    captured = capture(Head(SPELLINGS["shifted"][0], bias=True), *inputs(torch.float32, True), training=True)
    assert captured.spellings == ["linear with bias, slice, cross_entropy"]
    assert_same_results(captured, training=True)


def returned(head: Head, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    logits = head.output(x)
    return entropy(logits.float(), target), logits


def accuracy(head: Head, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    logits = flat(head.output(x))
    return F.cross_entropy(logits, target.view(-1)), (logits.argmax(-1) == target.view(-1)).sum()


def chunks(head: Head, x: Tensor, target: Tensor) -> Tensor:
    pairs = zip(x.split(1), target.split(1))
    return sum(entropy(head.output(a), b, reduction="sum") for a, b in pairs) / target.numel()  # type: ignore[return-value]


NEAR_MISSES: dict[str, tuple[Loss, str]] = {
    "logits returned": (returned, "the logits are read elsewhere too (output)"),
    "accuracy": (accuracy, "the logits are read elsewhere too (argmax)"),
    "chunks": (chunks, "its weight is read by 2 linears"),
    "weights of classes": (lambda m, x, t: entropy(m.output(x), t, weight=m.classes.detach()), "weights of classes"),
    "no reduction": (lambda m, x, t: entropy(m.output(x), t, reduction="none"), "each row's loss is wanted"),
    "probabilities": (
        lambda m, x, t: F.cross_entropy(flat(m.output(x)), F.one_hot(t.view(-1), VOCAB).float()),
        "the targets are probabilities",
    ),
    "soft cap by another number": (lambda m, x, t: entropy(30.0 * torch.tanh(m.output(x) / 20.0), t), "changed (mul)"),
    "soft cap by a tensor": (lambda m, x, t: entropy(torch.tanh(m.output(x) / 30.0) * m.classes, t), "changed (mul)"),
    "temperature": (lambda m, x, t: entropy(m.output(x) / 0.7, t), "changed (div)"),
    "part of the vocabulary": (
        lambda m, x, t: F.cross_entropy(m.output(x)[..., : VOCAB - 1].flatten(0, 1), t.view(-1).clamp(max=9)),
        "sliced across the vocabulary",
    ),
    "chosen rows": (
        lambda m, x, t: F.cross_entropy(flat(m.output(x))[torch.arange(4)], t.view(-1)[:4]),
        "changed by index",
    ),
    "sliced behind the view": (
        lambda m, x, t: F.cross_entropy(flat(m.output(x))[:-1], t.view(-1)[1:]),
        "sliced after they are flattened",
    ),
    "double": (lambda m, x, t: entropy(m.output(x).double(), t), "cast to torch.float64"),
    "merged adapter": (
        lambda m, x, t: entropy(F.linear(x, m.output.weight + m.adapter), t),
        "the weight is computed in the graph",
    ),
    "detached": (lambda m, x, t: entropy(m.output(x * m.classes[0]).detach(), t), "the logits are detached"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name: str) -> None:
    loss, reason = NEAR_MISSES[name]
    captured = capture(Head(loss), *inputs(torch.float32, True), training=True)
    assert captured.counts == {}
    assert captured.refusals and all(reason in refusal for refusal in captured.refusals)
    assert all(record.remedy for record in captured.records)


def test_tensor_subclass_is_refused() -> None:
    head = Head(SPELLINGS["flattened"][0])
    weight = head.output.weight.detach()
    head.output.weight = nn.Parameter(TwoTensor(weight, weight.clone()))
    captured = capture(head, *inputs(torch.float32, False))
    assert captured.counts == {} and "its input or weight is a TwoTensor" in captured.refusals[0]


def test_autocast_is_refused() -> None:
    def autocast(head: Head, x: Tensor, target: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return entropy(head.output(x).float(), target)

    captured = capture(Head(autocast), *inputs(torch.float32, True), training=True)
    assert captured.counts == {} and "as autocast makes them" in captured.refusals[0]


NOT_ONE: dict[str, tuple[Loss, int]] = {
    "classifier": (SPELLINGS["flattened"][0], MIN_VOCAB - 1),
    "no linear": (lambda m, x, t: entropy(m.classes * x[..., :1], t), VOCAB),
    "hidden layer": (lambda m, x, t: entropy(F.relu(m.output(x)), t), VOCAB),
    "softmax twice": (lambda m, x, t: F.nll_loss(F.softmax(flat(m.output(x)), -1), t.view(-1)), VOCAB),
    "softmax over rows": (lambda m, x, t: F.nll_loss(F.log_softmax(flat(m.output(x)), 0), t.view(-1)), VOCAB),
}


@pytest.mark.parametrize("name", NOT_ONE)
def test_what_is_none(name: str) -> None:
    loss, vocab = NOT_ONE[name]
    x, target = inputs(torch.float32, False)
    captured = capture(Head(loss, vocab=vocab), x, target.clamp(max=vocab - 1))
    assert captured.counts == {} and not captured.records


def test_exact_numerics_keep_the_rounding_of_half_precision() -> None:
    x, target = inputs(torch.bfloat16, False)
    exact = Settings(numerics="exact")
    rounded = capture(Head(SPELLINGS["flattened"][0]).bfloat16(), x, target, settings=exact)
    assert rounded.counts == {} and "probabilities are rounded" in rounded.refusals[0]
    widened = capture(Head(SPELLINGS["float"][0]).bfloat16(), x, target, settings=exact)
    assert widened.counts == {"linear_cross_entropy": 1}


def test_write_between_linear_and_loss_is_refused() -> None:
    def write(head: Head, x: Tensor, target: Tensor) -> Tensor:
        y = x * 2
        logits = head.output(y)
        y.zero_()
        return entropy(logits, target) + y.sum()

    captured: Captured = capture(Head(write), *inputs(torch.float32, False))
    assert captured.counts == {} and "writes in place" in captured.refusals[0]


def labelled(ids: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """Hugging Face's Llama, its embedding tied to the head, and the loss that it takes of labels."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=VOCAB, num_key_value_heads=1, tie_word_embeddings=True, **sizes)
    )
    return lambda: model(input_ids=ids, labels=labels, use_cache=False).loss  # type: ignore[no-any-return]


def test_loss_of_a_hugging_face_model() -> None:
    ids = torch.randint(0, VOCAB, (2, 6))
    captured = capture(labelled(ids, ids.clone().index_fill(1, torch.tensor([0, 1]), -100)), training=True)
    assert captured.counts["linear_cross_entropy"] == 1 and captured.refusals == []
    assert_same_results(captured, training=True)


def test_loss_of_a_torchtune_model() -> None:
    llama = pytest.importorskip("torchtune.models.llama3_1").llama3_1
    sizes = {"num_heads": 2, "num_kv_heads": 1, "embed_dim": 16, "max_seq_len": 8, "intermediate_dim": 24}
    model = llama(vocab_size=VOCAB, num_layers=1, **sizes)

    def loss(ids: Tensor) -> Tensor:
        return entropy(model(ids)[:, :-1].contiguous(), ids[:, 1:])

    captured = capture(loss, torch.randint(0, VOCAB, (2, 6)), training=True)
    assert captured.counts["linear_cross_entropy"] == 1 and captured.refusals == []
    assert_same_results(captured, training=True)
