"""`convert(..., recompute=names)`: blocks run again in backward, in their own way or not, and nothing else changes."""

import copy
import pickle

import pytest
import torch
from support import gradients, types
from torch import nn

import fewbit
from fewbit.errors import InputError

NOTHING = {"filter_fn": lambda module, name: False}


class Cache:
    """A cache that blocks fill as they run, as in transformers."""

    def __init__(self):
        self.items = []


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.dropout = nn.Linear(8, 8), nn.Dropout(0.3)

    def forward(self, x, cache=None):
        y = self.dropout(torch.tanh(self.layer(x)))
        if cache is None:
            return y
        cache.items.append(y)
        return sum(cache.items)


class Model(nn.Module):
    def __init__(self, cached=False):
        super().__init__()
        self.blocks, self.cached = nn.ModuleList(Block() for _ in range(3)), cached

    def forward(self, x):
        cache = Cache() if self.cached else None
        for block in self.blocks:
            x = block(x, cache)
        if cache is not None:
            assert len(cache.items) == 3
        return x


NAMES = ["blocks.0", "blocks.1", "blocks.2"]


def seeded(model, x):
    torch.manual_seed(1)
    return gradients(model, x)


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(4, 8)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("coded", [False, True])
def test_gradients_stay_bit_for_bit(cached, coded, x):
    model = Model(cached)
    if coded:
        fewbit.convert(model, 4)
    wanted, kept = seeded(model, x), fewbit.memory(model, x).activation_bytes
    fewbit.convert(model, 4, recompute=NAMES, **({} if coded else NOTHING))
    found = seeded(model, x)
    assert all(torch.equal(found[name], each) for name, each in wanted.items())
    if not coded:
        assert fewbit.memory(model, x).activation_bytes < kept
    before = types(Model())
    assert types(fewbit.revert(model)) == before


def test_the_forward_runs_twice(x):
    model, calls = Model(), []
    for block in model.blocks:
        block.layer.register_forward_hook(lambda *_: calls.append(1))
    fewbit.convert(model, recompute=NAMES[:2], **NOTHING)
    gradients(model, x)
    assert len(calls) == 3 + 2


def test_it_travels(x, tmp_path):
    model = fewbit.convert(Model(), 4, recompute=NAMES[1:])
    wanted = seeded(model, x)
    fewbit.save(model, tmp_path / "conversion.json")
    anew = Model()
    anew.load_state_dict(model.state_dict())
    for other in (fewbit.load(anew, tmp_path / "conversion.json"), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [other.blocks[i].runs_again for i in range(3)] == [False, True, True]
        assert all(torch.equal(each, wanted[name]) for name, each in seeded(other, x).items())


class OfDict(Block):
    """A block that changes the dictionary that it gets."""

    def forward(self, state):
        state["h"] = state["h"] + torch.tanh(self.layer(state["h"]))
        return state


class OfList(Block):
    """A block that appends to the list that it gets, as a DenseNet's layers do."""

    def forward(self, found):
        found.append(torch.tanh(self.layer(sum(found))))
        return found


@pytest.mark.parametrize(
    ("kind", "start", "end"), [(OfDict, "dict", lambda d: d["h"]), (OfList, "list", lambda found: found[-1])]
)
def test_containers_that_blocks_change(kind, start, end, x):
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.blocks = nn.Linear(8, 8), nn.ModuleList(kind() for _ in range(3))

        def forward(self, x):
            state = {"h": self.first(x)} if start == "dict" else [self.first(x)]
            for block in self.blocks:
                state = block(state)
            return state["h" if start == "dict" else -1]

    model = Whole()
    wanted = seeded(model, x)
    fewbit.convert(model, recompute=NAMES, **NOTHING)
    assert all(torch.equal(each, wanted[name]) for name, each in seeded(model, x).items())


@pytest.mark.parametrize("training", [True, False])
def test_buffers_change_once(training, x):
    """Running statistics, and a number of calls that the block counts and multiplies by."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
            self.register_buffer("count", torch.ones(()))
            self.register_buffer("constant", torch.randn(8))

        def forward(self, x):
            self.count += 1
            return torch.tanh(self.norm(self.layer(x))) * self.count.clone() + self.constant

    torch.manual_seed(0)
    plain = nn.Sequential(*(Counting() for _ in range(3))).train(training)
    model = fewbit.convert(copy.deepcopy(plain), recompute=["0", "1", "2"], **NOTHING)
    for _ in range(3):
        wanted = seeded(plain, x)
        assert all(torch.equal(each, wanted[name]) for name, each in seeded(model, x).items())
    assert all(torch.equal(each, model.state_dict()[name]) for name, each in plain.state_dict().items())
    model.train(not training)
    plain.train(not training)
    wanted = seeded(plain, x)
    assert all(torch.equal(each, wanted[name]) for name, each in seeded(model, x).items())
    assert all(torch.equal(each, model.state_dict()[name]) for name, each in plain.state_dict().items())


def test_names_of_all_kinds(x):
    """A generator of names, and one block with several names."""
    model = Model()
    model.again = model.blocks[1]
    fewbit.convert(model, recompute=(name for name in NAMES), **NOTHING)
    assert [block.runs_again for block in model.blocks] == [True] * 3
    fewbit.convert(model, recompute=["again"], **NOTHING)
    assert [getattr(block, "runs_again", False) for block in model.blocks] == [False, True, False]


def test_sequential_blocks(x):
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(2)))
    wanted = seeded(model, x)
    fewbit.convert(model, recompute=["0", "1"], **NOTHING)
    assert fewbit.memory(model, x).activation_bytes == x.nbytes
    assert all(torch.equal(each, wanted[name]) for name, each in seeded(model, x).items())


@pytest.mark.parametrize("kind", ["GPT2", "Llama", "T5"])
def test_layers_of_transformers_leave_out_their_cache(kind):
    transformers = pytest.importorskip("transformers")
    sizes = {
        "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0},
        "Llama": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vocab_size": 64,
        },
        "T5": {
            "d_model": 32,
            "d_ff": 64,
            "d_kv": 16,
            "num_layers": 2,
            "num_heads": 2,
            "vocab_size": 64,
            "decoder_start_token_id": 0,
        },
    }[kind]
    ending = "ForConditionalGeneration" if kind == "T5" else "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, kind + ending)(getattr(transformers, f"{kind}Config")(**sizes)).train()
    tokens = torch.randint(64, (2, 16))
    batch = {"input_ids": tokens, "labels": tokens}

    def loss(model, batch):
        torch.manual_seed(1)
        return model(**batch).loss

    wanted = gradients(model, batch, loss)
    blocks = [
        name
        for name, _ in model.named_modules()
        if name.split(".")[-1].isdigit() and name.split(".")[-2] in ("h", "layers", "block")
    ]
    before = {name: {**vars(module)} for name, module in model.named_modules()}
    fewbit.convert(model, recompute=blocks, **NOTHING)
    found = gradients(model, batch, loss)
    assert all(torch.allclose(found[name], each, rtol=1e-4, atol=1e-6) for name, each in wanted.items())
    assert getattr(model(**batch), "past_key_values", None) is None
    fewbit.revert(model)
    assert {name: {**vars(module)} for name, module in model.named_modules()} == before


class TestErrors:
    def test_unknown_names(self):
        with pytest.raises(InputError, match=r"'blocks.7'.*did you mean"):
            fewbit.convert(Model(), recompute=["blocks.7"])

    def test_what_is_no_list(self):
        with pytest.raises(InputError, match="list of the dotted names"):
            fewbit.convert(Model(), recompute="blocks.0")

    def test_layers_that_are_coded_themselves(self):
        model = Model()
        with pytest.raises(InputError, match="name a module around it"):
            fewbit.convert(model, recompute=["blocks.0.layer"])
        with pytest.raises(InputError, match="or those in it"):
            fewbit.convert(model, recompute=["blocks"])
        assert types(model) == types(Model())
