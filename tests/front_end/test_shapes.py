"""The shared shapes are those of the real models."""

import pytest
import shapes


@pytest.mark.parametrize(
    ("model", "leaves", "parameters"),
    [
        ("gpt2-small", 148, 124_439_808),
        ("resnet50", 161, 25_557_032),
        ("vit-b16", 152, 86_567_656),
        ("llama-1b", 11, 1_235_814_400),
    ],
)
def test_counts(model, leaves, parameters):
    tree = shapes.MODELS[model]()
    assert len(tree) == leaves
    assert shapes.num_parameters(tree) == parameters


def test_gpt2_names():
    tree = shapes.gpt2_small()
    assert tree["wte"] == (50257, 768)
    assert tree["wpe"] == (1024, 768)
    assert tree["h.11.attn.c_attn.weight"] == (768, 2304)
    assert tree["ln_f.bias"] == (768,)


@pytest.mark.parametrize("leaves", [0, 1, 12, 100, 1000])
def test_repeated(leaves):
    tree = shapes.repeated(leaves)
    assert len(tree) == leaves
    assert set(tree.values()) <= set(shapes.gpt2_small().values())


def test_structs():
    tree = shapes.structs({"a": (2, 3), "b": ()}, "bfloat16")
    assert {k: (x.shape, x.dtype.name) for k, x in tree.items()} == {
        "a": ((2, 3), "bfloat16"),
        "b": ((), "bfloat16"),
    }
