"""A quantizer of one's own: which edges of a graph are quantised, and how each range is found.

The network of convnet_int8.py is trained on scikit-learn's digits and exported. `EdgesQuantizer`
annotates the inputs, the weights and the outputs of convolutions and linear layers, and leaves the
first and the last layer alone, which cost most accuracy and least time. It is tried with several
observers, and converted in both forms:

- layers: annotated nodes become qnn's int8 layers;
- qdq: quantise and dequantise nodes around float operators, for tools that lower from them.

    python examples/custom_quantizer.py           # a minute on two cores
    python examples/custom_quantizer.py --tiny    # a first look
"""

from __future__ import annotations

import argparse

import torch
from convnet_int8 import BATCH, TRAINED, digits, resnet, train
from torch.fx import GraphModule, Node

import qnn
from qnn import pt2e

FULL = {"width": 16, "epochs": 8}
TINY = {"width": 8, "epochs": 4}

aten = torch.ops.aten
PRODUCTS = (aten.conv2d.default, aten.linear.default)


class EdgesQuantizer(pt2e.Quantizer):
    """int8 for the products of a graph but the first and the last; `observer` finds the ranges of
    activations: `"minmax"`, `"mse"`, `"histogram"`, `"percentile"`.
    """

    def __init__(self, observer: str) -> None:
        self.activation = pt2e.QuantizationSpec(
            torch.uint8, observer, qscheme=torch.per_tensor_affine
        )
        self.weight = pt2e.QuantizationSpec(
            torch.int8, qscheme=torch.per_channel_symmetric, ch_axis=0
        )

    def annotate(self, model: GraphModule) -> GraphModule:
        products = [node for node in model.graph.nodes if node.target in PRODUCTS]
        for node in products[1:-1]:
            x, weight = node.args[:2]
            pt2e.annotate_input_qspec_map(node, x, self.activation)
            pt2e.annotate_input_qspec_map(node, weight, self.weight)
            # What follows at once is computed on the same values, and is where a range is seen.
            pt2e.annotate_output_qspec(self._end(node), self.activation)
        return model

    @staticmethod
    def _end(node: Node) -> Node:
        """The ReLU after a node, or the node."""
        users = list(node.users)
        return users[0] if [user.target for user in users] == [aten.relu.default] else node


def main() -> None:
    parser = argparse.ArgumentParser(description="Annotations of one's own, and what they become.")
    parser.add_argument("--tiny", action="store_true", help="a small model, few epochs")
    parser.add_argument("--epochs", type=int, help="of training in float32")
    parser.add_argument("--width", type=int, help="channels of the first block")
    parser.set_defaults(**(TINY if parser.parse_known_args()[0].tiny else FULL))
    a = parser.parse_args()
    torch.manual_seed(0)

    images, wanted = digits()
    model = resnet(a.width)
    train(model, images[:TRAINED], wanted[:TRAINED], a.epochs)
    batch = torch.export.Dim("batch", min=2, max=4096)
    program = torch.export.export(model, (images[:BATCH],), dynamic_shapes=({0: batch},))

    unseen, right = images[TRAINED:], wanted[TRAINED:]
    with torch.no_grad():
        floats = model(unseen)
        print(f"\n{'':12}{'accuracy':>9}{'SQNR dB':>9}{'int8 layers':>13}{'qdq nodes':>11}")
        print(f"{'float32':12}{100 * (floats.argmax(-1) == right).float().mean():8.2f}%")
        for observer in ("minmax", "mse", "histogram"):
            prepared = pt2e.prepare_pt2e(program, EdgesQuantizer(observer))
            qnn.calibrate(prepared, images[:512].split(BATCH))
            layers = pt2e.convert_pt2e(prepared)
            nodes = pt2e.convert_pt2e(prepared, form="qdq")
            logits = layers(unseen)
            found = sum(isinstance(module, qnn.Quantized) for module in layers.modules())
            count = sum("quantized_decomposed" in str(node.target) for node in nodes.graph.nodes)
            accuracy = 100 * (logits.argmax(-1) == right).float().mean()
            print(
                f"{observer:12}{accuracy:8.2f}%{qnn.sqnr(floats, logits):9.1f}{found:13}{count:11}"
            )
    print(f"\nthe two forms agree to {qnn.sqnr(nodes(unseen), layers(unseen)):.0f} dB")
    print(f"\n{qnn.summary(layers)}")


if __name__ == "__main__":
    main()
