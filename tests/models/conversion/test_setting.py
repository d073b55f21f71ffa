"""The forms that `bits` takes, and their meaning. Each error names the rule, what was got and the remedy."""

import copy

import numpy as np
import pytest
import torch

import fewbit
from fewbit.constants import KINDS
from fewbit.errors import DesignError
from fewbit.models.conversion.setting import Setting, parse_bits


def types(model):
    return [type(module) for module in model.modules()]


def batch():
    return torch.randn(8, 3, 6, 6)


RULE = "bits must be an integer from 1 to 8, for every kind, or a mapping from kind to such an integer, as in bits={'"


KINDS_ARE = "he kinds are activation, linear, norm, product, attention, recurrent, rest"


class TestBits:
    """The forms that `bits` takes. Each error names the rule, what was got and the remedy."""

    @pytest.mark.parametrize(
        ("bits", "rule", "got"),
        [
            (True, RULE, "got True"),
            (0, RULE, "got 0"),
            (9, RULE, "got 9"),
            (-1, RULE, "got -1"),
            ("4", RULE, "got '4'"),
            (4.0, RULE, "got 4.0"),
            (None, RULE, "got None"),
            ([4], RULE, "got [4]"),
            ({"linear": 0}, RULE, "got {'linear': 0}"),
            ({"activation": 3, "linear": True}, RULE, "got {'activation': 3, 'linear': True}"),
            ({"linear": "4"}, RULE, "got {'linear': '4'}"),
            ({}, "bits must name at least one kind, of activation, linear, ", "got {}"),
            ({"linaer": 4}, "did you mean 'linear'? T" + KINDS_ARE, "unknown kind 'linaer'"),
            ({"norm": 4, "Activations": 4}, "did you mean 'activation'? T" + KINDS_ARE, "unknown kind 'Activations'"),
            ({"everything": 4}, "t" + KINDS_ARE, "unknown kind 'everything'"),
            ({4: "linear"}, "t" + KINDS_ARE, "unknown kind 4"),
        ],
        ids=str,
    )
    def test_wrong(self, model, bits, rule, got):
        before = types(fewbit.convert(model, bits=2))
        given = (
            lambda: fewbit.convert(model, bits=bits),
            lambda: fewbit.patch(bits=bits),
            lambda: fewbit.memory(model, batch()).plan(bits=bits),
            lambda: fewbit.calibrate(model, [batch()], bits=bits),
        )
        for call in given[: 3 if bits is None else 4]:  # for calibrate, None means the bits that modules have
            with pytest.raises(DesignError) as raised:
                call()
            assert rule in str(raised.value)
            assert got in str(raised.value)
            assert types(model) == before

    def test_none_is_no_setting(self):
        with pytest.raises(DesignError, match="got None"):
            Setting.of(None)

    def test_numpys_integers(self, model):
        fewbit.convert(model, bits={"linear": np.int64(3)})
        assert model.head.bits == 3
        assert type(model.head.bits) is int
        assert fewbit.convert(model, bits=np.uint8(5)).head.bits == 5

    def test_one_number_is_every_kind(self, model):
        alike = copy.deepcopy(model)
        fewbit.convert(model, bits=3)
        fewbit.convert(alike, bits=dict.fromkeys(KINDS, 3))
        assert repr(model) == repr(alike)
        assert Setting.of(3) == Setting.of({**dict.fromkeys(KINDS, 3), "rest": 8})
        assert Setting.of({"linear": 4, "activation": 3}) == Setting.of({"activation": 3, "linear": 4})

    def test_linear_layers_read_codes_of_the_larger_number(self, model):
        fewbit.convert(model, bits={"activation": 2, "norm": 3, "product": 6, "linear": 4})
        assert [model.get_submodule(name).bits for name in ("mlp.3", "norm", "mlp.1", "head")] == [4, 4, 6, 4]
        fewbit.convert(model, bits={"activation": 2, "norm": 3, "product": 6})
        assert [model.get_submodule(name).bits for name in ("mlp.3", "norm", "mlp.1")] == [2, 3, 6]

    @pytest.mark.parametrize("text", ["", "four", "linear", "linear=", "linear=3,norm", "linear=3;norm=4", "4.0"])
    def test_wrong_on_the_command_line(self, text):
        with pytest.raises(DesignError, match="bits must be a number such as 4, or activation=3,linear=4; got"):
            parse_bits(text)

    def test_on_the_command_line(self):
        assert parse_bits(" 4") == 4
        assert parse_bits("activation=3, linear=4") == {"activation": 3, "linear": 4}
