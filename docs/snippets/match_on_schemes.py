"""Give every `int8` layer that a ReLU follows to an op of one's own, under `torch.compile`."""

import torch
from torch import Tensor, nn
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

import qnn
from qnn.passes import Region, match

calls = 0


# 1. The op: here qnn's own and a ReLU. Yours would call a fused kernel.
@torch.library.custom_op("example::int8_linear_relu", mutates_args=())
def int8_linear_relu(x: Tensor, w: Tensor, sw: Tensor, bias: Tensor | None) -> Tensor:
    global calls
    calls += 1
    return torch.ops.qnn.int8_linear(x, w, sw, bias).relu_()


@int8_linear_relu.register_fake
def _(x: Tensor, w: Tensor, sw: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.qnn.int8_linear(x, w, sw, bias)


# 2. The pattern: an `int8` layer whose only user is a ReLU.
def before_relu(region: Region) -> bool:
    users = () if region.result is None else region.result.users
    return [user.target for user in users] == [torch.ops.aten.relu.default]


# 3. The pass. Its uuid is part of the key of Inductor's caches.
class FuseRelu(CustomGraphPass):
    def __call__(self, graph: torch.fx.Graph) -> None:
        for region in match(graph.nodes, op="int8_linear", scheme="int8", where=before_relu):
            (relu,) = region.result.users
            operands = tuple(region.arguments[name] for name in ("x", "w", "sw", "bias"))
            with graph.inserting_before(relu):
                fused = graph.call_function(torch.ops.example.int8_linear_relu.default, operands)
            fused.meta.update(relu.meta)
            relu.replace_all_uses_with(fused)
            graph.erase_node(relu)
        graph.eliminate_dead_code()

    def uuid(self) -> bytes:
        return get_hash_for_files((__file__,))


# 4. Appended to the passes that are set already, which may be None, one pass or several.
def appended(passes, new: CustomGraphPass) -> list:
    present = passes if isinstance(passes, (list, tuple)) else [passes]
    return [*(one for one in present if one is not None), new]


# 5. In use. Without the `with`, assign the list to the setting: it then holds for the process.
layers = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 8)]
model = qnn.convert(nn.Sequential(*layers).eval(), "int8")
x = torch.randn(4, 64)
passes = appended(config.post_grad_custom_pre_pass, FuseRelu())
with torch.no_grad(), config.patch(post_grad_custom_pre_pass=passes):
    y = torch.compile(model, fullgraph=True)(x)

assert calls == 2, calls  # two of the three layers are followed by a ReLU
assert torch.equal(y, model(x))
print(f"{calls} layers went to example::int8_linear_relu")
