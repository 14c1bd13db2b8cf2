"""Print the graph of a small attention-like block before and after qnn's pass."""

import torch
from torch import Tensor, nn
from torch._inductor import config

import qnn
from qnn.passes import fusion


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, 64) for _ in range(3))
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.q(x) * self.k(x) * self.v(x)
        return x + self.down(nn.functional.gelu(self.up(x)))


def show(graph: torch.fx.Graph) -> None:
    """The calls, with their activations; the parameters are left out."""
    hidden = [node for node in graph.nodes if node.op == "get_attr"]
    hidden += [node for node in graph.find_nodes(op="placeholder") if "arg0" not in node.name]
    if len(graph.nodes) < 10:
        return  # the graph of one region
    for node in graph.nodes:
        if node.op == "call_function":
            shown = [arg for arg in (*node.args, *node.kwargs.values()) if arg not in hidden]
            name = node.target.__name__.removesuffix(".default")
            print(f"{node.name} = {name}({', '.join(map(str, shown))})")
    print()


fusion.install()  # otherwise done by the first trace
present = config.post_grad_custom_post_pass
present = present if isinstance(present, (list, tuple)) else [present]


def passes(graph: torch.fx.Graph) -> None:
    for run in (show, *present, show):
        run(graph)


torch.manual_seed(0)
model = qnn.convert(Block().eval(), "int8")
x = torch.randn(4, 64)
with torch.no_grad(), config.patch(post_grad_custom_post_pass=passes):
    y = torch.compile(model, fullgraph=True)(x)
assert torch.allclose(y, model(x), atol=1e-2)
