"""From the tensors of other formats to those of compressed-tensors, which are ours.

int4 zero points are not packed here: int8 `[N, groups]`, 0 to 15, as a layer holds them.
"""

from __future__ import annotations

import torch

from qnn.integrations.checkpoints.numbers import Numbers
from qnn.kernels.formats import int4

Tensors = dict[str, torch.Tensor]

# The column that each nibble of AutoAWQ's words holds is 0, 2, 4, 6, 1, 3, 5, 7; this is where the
# columns are.
_AWQ = (0, 4, 1, 5, 2, 6, 3, 7)


def bytes_of_scales(tensors: Tensors, numbers: Numbers) -> Tensors:
    """Exponents of E8M0 as bytes."""
    scale = tensors["weight_scale"]
    same = scale if scale.dtype == torch.uint8 else scale.view(torch.uint8)
    return {**tensors, "weight_scale": same}


def without_zeros(tensors: Tensors, numbers: Numbers) -> Tensors:
    """Nothing of the zero points of a symmetric weight, which early writers store."""
    zero = tensors.get("weight_zero_point")
    if zero is None or not numbers.symmetric:
        return tensors
    if bool(zero.any()):
        raise ValueError("weight_zero_point is not 0, and the config says symmetric")
    return {name: tensor for name, tensor in tensors.items() if name != "weight_zero_point"}


def unpacked_zeros(tensors: Tensors, numbers: Numbers) -> Tensors:
    """Zero points, eight rows a word, as bytes."""
    zero, made = tensors.get("weight_zero_point"), dict(tensors)
    if numbers.symmetric and zero is not None:
        raise ValueError("weight_zero_point is there, and the config says symmetric")
    if not numbers.symmetric:
        if zero is None:
            raise ValueError("weight_zero_point is missing")
        rows = tensors["weight_packed"].shape[0]
        made["weight_zero_point"] = int4.unpack(zero.mT).mT[:rows].to(torch.int8).contiguous()
    if "weight_g_idx" in made:
        made["g_idx"] = made.pop("weight_g_idx")
    return made


def unpacked_bytes(tensors: Tensors, numbers: Numbers) -> Tensors:
    """8-bit codes, four a word, as int8."""
    made = dict(tensors)
    words = made.pop("weight_packed")
    rows, columns = made.pop("weight_shape").tolist()
    octets = int4.unpack(words).unflatten(-1, (-1, 2))  # nibbles, the lower one first
    codes = (octets[..., 0] | octets[..., 1] << 4)[:rows, :columns]
    made["weight"] = (codes.to(torch.int16) - 128).to(torch.int8).contiguous()
    return made


def from_deepseek(tensors: Tensors, numbers: Numbers) -> Tensors:
    made = dict(tensors)
    scale = made.pop("weight_scale_inv")
    made["weight_scale"] = scale.float() if scale.dtype == torch.float8_e8m0fnu else scale
    return made


def from_modelopt(tensors: Tensors, numbers: Numbers) -> Tensors:
    made = dict(tensors)
    made["weight_packed"] = made.pop("weight")
    made["weight_global_scale"] = 1 / made.pop("weight_scale_2").float().reshape(1)
    if "input_scale" in made:
        made["input_global_scale"] = 1 / made.pop("input_scale").float().reshape(1)
    return made


def from_awq(tensors: Tensors, numbers: Numbers) -> Tensors:
    """`qweight [K, N/8]`, whose words hold eight rows of ours in an order of their own."""
    codes = _awq_columns(tensors["qweight"]).mT
    zero = tensors.get("qzeros")
    made = {
        **{name: t for name, t in tensors.items() if name not in ("qweight", "qzeros", "scales")},
        "weight_packed": int4.pack(codes),
        "weight_scale": tensors["scales"].mT.contiguous(),
    }
    if zero is None and not numbers.symmetric:
        raise ValueError("qzeros is missing")
    if zero is not None:
        zero = _awq_columns(zero).mT.to(torch.int8).contiguous()
        if not numbers.symmetric:
            made["weight_zero_point"] = zero
        elif not bool((zero == 8).all()):
            raise ValueError("the config says zero_point: false, and qzeros are not 8")
    return made


def _awq_columns(words: torch.Tensor) -> torch.Tensor:
    codes = int4.unpack(words)
    order = torch.tensor(_AWQ)
    columns: torch.Tensor = codes.unflatten(-1, (-1, 8))[..., order].flatten(-2)
    return columns


def from_gptq(tensors: Tensors, numbers: Numbers) -> Tensors:
    """`qweight [K/8, N]`, our words turned over; stored zero points are one less."""
    return _from_gptq(tensors, numbers, 1)


def from_gptq_v2(tensors: Tensors, numbers: Numbers) -> Tensors:
    """The same, with the zero points themselves."""
    return _from_gptq(tensors, numbers, 0)


def _from_gptq(tensors: Tensors, numbers: Numbers, less: int) -> Tensors:
    made = {name: t for name, t in tensors.items() if name not in ("qweight", "qzeros", "scales")}
    zero = int4.unpack(tensors["qzeros"]).mT
    if less and bool((zero == 15).any()):
        raise ValueError(
            "qzeros holds 15, which readers of checkpoint_format 'gptq' take for a zero point of 0 "
            "or of 16; have the file saved as 'gptq_v2'"
        )
    zero = zero + less
    if numbers.symmetric and not bool((zero == 8).all()):
        raise ValueError(
            "the config says sym, and the zero points are not 8: another checkpoint_format than "
            "the config's, or not symmetric"
        )
    made["weight_packed"] = tensors["qweight"].mT.contiguous()
    made["weight_scale"] = tensors["scales"].mT.contiguous()
    if not numbers.symmetric:
        made["weight_zero_point"] = zero.to(torch.int8).contiguous()
    return made
