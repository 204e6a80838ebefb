"""GraphDiffusionMemory: what reading finds, what each step changes, and that reading changes nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infuse.models.mahia import GraphDiffusionMemory, MemoryState
from tests.tolerances import error

DIM = 8


def module(**settings: object) -> GraphDiffusionMemory:
    return GraphDiffusionMemory(DIM, 6, cache_size=3, **settings).double()  # type: ignore[arg-type]


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, DIM, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(5,), (2, 4)])
def test_reading_is_attention_without_a_scale(shape: tuple[int, ...]) -> None:
    memory, x = module(), rows(*shape)
    memory.store(memory.write(rows(4)))
    flat = x.reshape(1, -1, DIM)
    found = [F.scaled_dot_product_attention(flat, table[None], table[None], scale=1.0) for table in memory.state()[:2]]
    expected = F.linear(torch.cat((flat, found[0] + found[1]), -1), memory.fusion.weight, memory.fusion.bias)
    assert error(memory(x), expected.view(x.shape)) < 1e-12


def test_reading_changes_nothing() -> None:
    memory = module()
    before = {name: value.clone() for name, value in memory.state_dict().items()}
    assert torch.equal(memory(rows(5))[:0], rows(0)) and memory.training
    for name, value in memory.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_an_empty_cache_adds_nothing() -> None:
    memory, x = module(), rows(5)
    found = F.scaled_dot_product_attention(x[None], memory.nodes[None], memory.nodes[None], scale=1.0)[0]
    assert error(memory(x), memory.fusion(torch.cat((x, found), -1))) < 1e-12


def test_diffusion_moves_the_nodes_towards_their_neighbours() -> None:
    memory = module(diffusion_rate=0.25)
    step = 0.75 * torch.eye(6, dtype=torch.float64) + 0.25 * memory.adjacency.softmax(-1)
    before = memory.nodes.detach().clone()
    state = memory.diffuse(steps=3)
    assert error(state.nodes, step @ step @ step @ before) < 1e-12
    assert torch.equal(memory.nodes, before)
    assert state.cache is memory.cache and state.position is memory.position


def test_the_cache_is_written_oldest_row_first() -> None:
    memory = module()
    batches = [rows(2, 4) for _ in range(4)]
    state = memory.state()
    for batch in batches:
        state = memory.write(batch, state)
    means = [batch.mean((0, 1)) for batch in batches]
    assert error(state.cache, torch.stack((means[3], means[1], means[2]))) < 1e-12
    assert state.position == 1
    assert memory.position == 0 and not memory.cache.any()


def test_a_stored_state_is_in_the_state_dict() -> None:
    memory = module()
    state = memory.write(rows(4), memory.diffuse())
    memory.store(state)
    assert memory.nodes.requires_grad and memory.nodes.is_leaf
    other = module()
    other.load_state_dict(memory.state_dict())
    for kept, expected in zip(other.state(), state):
        assert torch.equal(kept, expected)


def test_training_through_diffusion_and_writing_reaches_everything() -> None:
    """A few steps of gradient descent on the adjacency alone bring the diffused nodes nearer to a target."""
    memory = module(diffusion_rate=1.0)
    target = memory.nodes.detach().roll(1, 0)
    optimiser = torch.optim.Adam([memory.adjacency], lr=0.3)
    losses = []
    for _ in range(30):
        loss = (memory.diffuse().nodes - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


def test_the_steps_compile_as_one_graph_each() -> None:
    memory, x = module(), rows(4)

    def step(x: Tensor) -> None:
        memory.store(memory.write(x, memory.diffuse()))

    expected = memory.write(x, memory.diffuse())
    torch.compile(step, backend="aot_eager", fullgraph=True)(x)
    for kept, wanted in zip(memory.state(), expected):
        assert error(kept, wanted) < 1e-12


def test_many_writes_compile_once() -> None:
    memory = module()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph

    write = torch.compile(lambda x: memory.store(memory.write(x)), backend=backend, fullgraph=True)
    for _ in range(5):
        write(rows(4))
    assert len(graphs) == 1 and memory.position == 2


@pytest.mark.parametrize("rate", [0.0, -1.0, 1.5, float("nan")])
def test_wrong_rates_are_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="diffusion_rate: got .*, expected above 0 and at most 1"):
        module(diffusion_rate=rate)


def test_wrong_inputs_are_refused() -> None:
    memory = module()
    with pytest.raises(ValueError, match=r"x: got shape \(5, 9\), expected \[B, 8\] or \[B, L, 8\]"):
        memory(torch.zeros(5, 9))
    with pytest.raises(ValueError, match=r"GraphDiffusionMemory.write: x: got shape \(0, 8\)"):
        memory.write(rows(0))
    with pytest.raises(ValueError, match="steps: got 0"):
        memory.diffuse(steps=0)
    with pytest.raises(ValueError, match=r"state.nodes: got shape \(5, 8\), expected \(6, 8\)"):
        memory(rows(2), MemoryState(rows(5), memory.cache, memory.position))
