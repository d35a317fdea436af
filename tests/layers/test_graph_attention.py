"""GATv2 against its formula written with loops, and what must hold for any graph."""

import pytest
import torch
from torch import nn

from genesplice_hf.layers.graph_attention import (
    GATv2Layer,
    GeneGraphEncoder,
    neighbourhood,
    parameter_versions,
    reversed_edges,
    scatter_softmax,
    with_self_loops,
)

NODES, SIZE, HEADS, HEAD_DIM, CHANNELS = 9, 6, 3, 4, 2


def layer(seed: int = 0, **options) -> GATv2Layer:
    torch.manual_seed(seed)
    found = GATv2Layer(SIZE, HEAD_DIM, HEADS, CHANNELS, **options).double()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return found


def graph(seed: int = 0, edges: int = 20) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(NODES, SIZE, dtype=torch.float64, generator=generator)
    # Node 8 is reached by no edge.
    index = torch.stack(
        [torch.randint(NODES, (edges,), generator=generator), torch.randint(NODES - 1, (edges,), generator=generator)]
    )
    return x, index, torch.randn(edges, CHANNELS, dtype=torch.float64, generator=generator)


def slow(module: GATv2Layer, x: torch.Tensor, index: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """The slow twin: node after node, head after head, as torch_geometric's GATv2Conv computes it."""
    left = module.source(x).view(-1, HEADS, HEAD_DIM)
    right = left if module.target is None else module.target(x).view(-1, HEADS, HEAD_DIM)
    edge = module.edge(features).view(-1, HEADS, HEAD_DIM)
    rows = []
    for node in range(len(x)):
        incoming = [number for number in range(index.shape[1]) if index[1, number] == node]
        heads = []
        for head in range(HEADS):
            out = x.new_zeros(HEAD_DIM)
            if incoming:
                joint = [left[index[0, e], head] + right[node, head] + edge[e, head] for e in incoming]
                scores = [module.score.weight[head] @ nn.functional.leaky_relu(j, 0.2) for j in joint]
                alpha = torch.stack(scores).softmax(0)
                for weight, number in zip(alpha, incoming, strict=True):
                    out = out + weight * left[index[0, number], head]
            heads.append(out)
        rows.append(torch.cat(heads))
    return torch.stack(rows) + module.bias


@pytest.mark.parametrize("options", [{}, {"share_weights": True}])
@pytest.mark.parametrize("edges", [20, 1])
def test_values_and_gradients_are_those_of_the_loops(options: dict, edges: int) -> None:
    module = layer(**options)
    x, index, features = graph(edges=edges)
    found = []
    for run in (module, lambda *args: slow(module, *args)):
        module.zero_grad()
        inputs = x.clone().requires_grad_()
        out = run(inputs, index, features)
        (out * torch.arange(out.numel(), dtype=out.dtype).view_as(out).cos()).sum().backward()
        gradients = [p.grad.clone() for p in module.parameters()]
        found.append([out.detach(), inputs.grad, *gradients])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-10)


def test_a_node_without_edges_gets_the_bias_and_no_edge_at_all_works() -> None:
    module = layer()
    x, index, features = graph()
    assert torch.equal(module(x, index, features)[8], module.bias)
    nothing = module(x, index[:, :0], features[:0])
    assert torch.equal(nothing, module.bias.expand(NODES, -1))


def test_nodes_may_change_their_order() -> None:
    module = layer()
    x, index, features = graph()
    order = torch.randperm(NODES, generator=torch.Generator().manual_seed(4))
    place = torch.empty_like(order)
    place[order] = torch.arange(NODES)
    expected = module(x, index, features)[order]
    torch.testing.assert_close(module(x[order], place[index], features), expected)
    edges = torch.randperm(index.shape[1], generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(module(x, index[:, edges], features[edges]), module(x, index, features))


def test_a_repeated_edge_counts_twice() -> None:
    module = layer()
    x, index, features = graph(edges=6)
    doubled = torch.cat([index, index[:, :1]], 1), torch.cat([features, features[:1]])
    torch.testing.assert_close(module(x, *doubled), slow(module, x, *doubled))
    everything = torch.cat([index, index], 1), torch.cat([features, features])
    torch.testing.assert_close(module(x, *everything), module(x, index, features))


def test_softmax_of_large_and_half_precision_scores() -> None:
    scores = torch.tensor([[1000.0], [999.0], [-1000.0]])
    targets = torch.tensor([0, 0, 1])
    found = scatter_softmax(scores, targets, 3)
    torch.testing.assert_close(found.flatten(), torch.tensor([0.7310586, 0.2689414, 1.0]))
    assert scatter_softmax(scores.bfloat16(), targets, 3).dtype == torch.float32


def test_self_loops_carry_the_mean_of_what_comes_in() -> None:
    index = torch.tensor([[0, 1, 2, 2], [1, 2, 2, 1]])
    features = torch.tensor([[1.0, 0.0], [4.0, 2.0], [9.0, 9.0], [3.0, 6.0]])
    found, values = with_self_loops(index, features, 4)
    assert found.tolist() == [[0, 1, 2, 0, 1, 2, 3], [1, 2, 1, 0, 1, 2, 3]]
    assert values[3:].tolist() == [[0, 0], [2, 3], [4, 2], [0, 0]]


def test_reverses_are_another_kind_of_edge() -> None:
    index, features = reversed_edges(torch.tensor([[0], [1]]), torch.tensor([[5.0, 6.0]]))
    assert index.tolist() == [[0, 1], [1, 0]] and features.tolist() == [[5, 6, 0, 0], [0, 0, 5, 6]]


@pytest.mark.parametrize("directed", [True, False])
@pytest.mark.parametrize("add_self_loops", [True, False])
def test_a_neighbourhood_is_all_that_its_nodes_read(directed: bool, add_self_loops: bool) -> None:
    torch.manual_seed(0)
    encoder = GeneGraphEncoder(
        SIZE, 12, 2, HEADS, CHANNELS, directed=directed, add_self_loops=add_self_loops
    ).double()  # fmt: skip
    x, index, features = graph(edges=9)
    whole = encoder(x, index, features)
    wanted = torch.tensor([2, 5])
    nodes, inside = neighbourhood(wanted, index, NODES, 2 + int(add_self_loops), not directed)
    place = torch.full((NODES,), -1)
    place[nodes] = torch.arange(len(nodes))
    part = encoder(x[nodes], place[index[:, inside]], features[inside])
    torch.testing.assert_close(part[place[wanted]], whole[wanted])


def test_versions_tell_a_change() -> None:
    module = layer()
    before = parameter_versions(module)
    assert parameter_versions(module) == before
    with torch.no_grad():
        module.bias.add_(1)
    assert parameter_versions(module) != before
