"""The model shapes that tests, benches and tools share: leaf name -> shape."""

from collections.abc import Callable, Mapping
import itertools
import math
from typing import Any, TypeAlias

import jax

Shape: TypeAlias = tuple[int, ...]
Shapes: TypeAlias = dict[str, Shape]


def gpt2_small() -> Shapes:
    """GPT-2 small: 148 leaves, 124.4 M parameters; the head is tied to ``wte``."""
    width = 768
    return {
        "wte": (50257, width),
        "wpe": (1024, width),
        **{f"h.{i}.{name}": shape for i in range(12) for name, shape in _gpt2_layer(width).items()},
        **_affine("ln_f", (width,)),
    }


def resnet50() -> Shapes:
    """ResNet-50 for ImageNet: 161 leaves, 25.6 M parameters; kernels are HWIO."""
    shapes = _conv_bn("conv1", "bn1", (7, 7, 3, 64))
    inputs = 64
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        width = 32 * 2**stage
        for block in range(blocks):
            prefix = f"layer{stage}.{block}."
            shapes |= _conv_bn(f"{prefix}conv1", f"{prefix}bn1", (1, 1, inputs, width))
            shapes |= _conv_bn(f"{prefix}conv2", f"{prefix}bn2", (3, 3, width, width))
            shapes |= _conv_bn(f"{prefix}conv3", f"{prefix}bn3", (1, 1, width, 4 * width))
            if block == 0:
                down = f"{prefix}downsample."
                shapes |= _conv_bn(f"{down}0", f"{down}1", (1, 1, inputs, 4 * width))
            inputs = 4 * width
    return shapes | _dense("fc", inputs, 1000)


def vit_b16() -> Shapes:
    """ViT-B/16 for ImageNet at 224 pixels: 152 leaves, 86.6 M parameters."""
    width, patches = 768, (224 // 16) ** 2
    layer = {
        **_affine("ln_1", (width,)),
        **_dense("attn.in_proj", width, 3 * width),
        **_dense("attn.out_proj", width, width),
        **_affine("ln_2", (width,)),
        **_dense("mlp.0", width, 4 * width),
        **_dense("mlp.3", 4 * width, width),
    }
    return {
        "class_token": (1, 1, width),
        "conv_proj.weight": (16, 16, 3, width),
        "conv_proj.bias": (width,),
        "pos_embedding": (1, patches + 1, width),
        **{f"encoder.{i}.{name}": shape for i in range(12) for name, shape in layer.items()},
        **_affine("encoder.ln", (width,)),
        **_dense("head", width, 1000),
    }


def llama_1b() -> Shapes:
    """Llama 3.2 1B, layers stacked for ``lax.scan``: 11 leaves, 1.24 G parameters."""
    layers, width, keys, hidden = 16, 2048, 512, 8192
    return {
        "embed": (128256, width),
        "layers.attn_norm": (layers, width),
        "layers.q": (layers, width, width),
        "layers.k": (layers, width, keys),
        "layers.v": (layers, width, keys),
        "layers.o": (layers, width, width),
        "layers.mlp_norm": (layers, width),
        "layers.gate": (layers, width, hidden),
        "layers.up": (layers, width, hidden),
        "layers.down": (layers, hidden, width),
        "norm": (width,),
    }


MODELS: dict[str, Callable[[], Shapes]] = {
    "gpt2-small": gpt2_small,
    "resnet50": resnet50,
    "vit-b16": vit_b16,
    "llama-1b": llama_1b,
}


def repeated(leaves: int) -> Shapes:
    """A tree of this many leaves: GPT-2 small's layers, over and over."""
    names = (
        (f"h.{i}.{name}", shape)
        for i in itertools.count()
        for name, shape in _gpt2_layer(768).items()
    )
    return dict(itertools.islice(names, leaves))


def num_parameters(shapes: Mapping[str, Shape]) -> int:
    """How many elements all leaves have together."""
    return sum(math.prod(shape) for shape in shapes.values())


def structs(shapes: Mapping[str, Shape], dtype: Any = "float32") -> dict[str, jax.ShapeDtypeStruct]:
    """The tree without its memory: for ``jax.eval_shape``, tracing and lowering."""
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}


# ------------------------------------------------------------------------------- parts


def _gpt2_layer(width: int) -> Shapes:
    return {
        **_affine("ln_1", (width,)),
        **_dense("attn.c_attn", width, 3 * width),
        **_dense("attn.c_proj", width, width),
        **_affine("ln_2", (width,)),
        **_dense("mlp.c_fc", width, 4 * width),
        **_dense("mlp.c_proj", 4 * width, width),
    }


def _dense(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (inputs, outputs), f"{name}.bias": (outputs,)}


def _affine(name: str, shape: Shape) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape}


def _conv_bn(conv: str, norm: str, kernel: Shape) -> Shapes:
    return {f"{conv}.weight": kernel, **_affine(norm, kernel[-1:])}
