"""Adapters of PEFT on frozen models: what is kept, outputs, gradients of the adapters, and uses of adapters."""

import importlib.util

import pytest
import torch
from support import bytes_kept, flat
from torch import nn

import fewbit
from tools.studies import lora
from tools.studies.huggingface import BATCH, CASES, TOKENS

pytestmark = [
    # PEFT uses a name that transformers 5 deprecates
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.* is deprecated:FutureWarning"),
    # what torchao and bitsandbytes warn of when they are imported, and PEFT of torchao's weights: that they cannot be merged
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:TorchaoLoraLinear:UserWarning"),
]
SLOW = pytest.mark.slow
LEAST_KEPT = 0.22  # of exact, at most


def batches(name, number=3):
    return [CASES[name].sample(torch.Generator().manual_seed(seed)) for seed in range(number)]


def gradients(model, batch):
    model.zero_grad()
    torch.manual_seed(2)  # of dropouts
    output = model(**batch)
    output.loss.backward()
    found = {name: each.grad for name, each in model.named_parameters() if each.requires_grad}
    return output.logits.detach(), found


def check(name, adapter, when, base=""):
    exact, model = lora.build(name, adapter, base), lora.build(name, adapter, base, when)
    batch = batches(name, 1)[0]
    logits, true = gradients(exact, batch)
    coded_logits, coded = gradients(model, batch)
    assert torch.equal(coded_logits, logits)
    assert list(coded) == list(true)
    assert all("lora_" in each for each in coded)
    assert 0 < (flat(coded) - flat(true)).norm() < 0.12 * flat(true).norm()
    report = fewbit.memory(model, batch)
    assert report.activation_bytes <= LEAST_KEPT * fewbit.memory(exact, batch).activation_bytes
    assert lora.codes_of_attention_input(report) == 1


@pytest.mark.parametrize("when", lora.WHEN)
@pytest.mark.parametrize("adapter", ["LoRA", "LoRA, dropout", "DoRA", pytest.param("DoRA, dropout", marks=SLOW)])
def test_llama(adapter, when):
    check("Llama", adapter, when)


@pytest.mark.parametrize("adapter", ["LoRA, dropout", pytest.param("DoRA, dropout", marks=SLOW)])
@pytest.mark.parametrize("name", ["GPT-2", "BERT"])
def test_others(name, adapter):
    check(name, adapter, "after")


@pytest.mark.parametrize("adapter", ["LoRA", "DoRA, dropout"])
@pytest.mark.parametrize("base", lora.BASES)
def test_quantized_bases(base, adapter):
    package = lora.BASES[base][0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if not lora.works(adapter, base):
        pytest.skip("the exact model does not train")
    check("Llama", adapter, "before", base)


@pytest.mark.parametrize("precision", ["bfloat16", "autocast"])
def test_half_precision(precision):
    exact, coded = (lora.kept("GPT-2", "LoRA", "", when, [precision])[precision] for when in ("", "after"))
    assert coded.activation_bytes <= LEAST_KEPT * exact.activation_bytes


def test_dropouts_of_the_first_block_share_a_code():
    """There nothing needs a gradient, but x is not a batch that the caller holds."""
    report = fewbit.memory(lora.build("Llama", "LoRA, dropout", when="after"), batches("Llama", 1)[0])
    sizes = [each.bytes for each in report.storages if ".layers.0.self_attn.q_proj.lora_A" in each.savers[0].module]
    n = BATCH * TOKENS * 64
    assert n // 2 in sizes  # a code of 4 bits
    assert n // 8 in sizes  # a mask
    assert max(sizes) < n


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_plans_predict_what_is_kept(name):
    model, batch = lora.build(name, "LoRA, dropout"), batches(name, 1)[0]
    plan = fewbit.memory(model, batch).plan(bits=4)
    assert fewbit.memory(fewbit.convert(model, bits=4), batch).activation_bytes == plan.after_bytes


def ready(adapter="LoRA", name="Llama"):
    return lora.build(name, adapter, when="after")


@pytest.mark.slow
def test_prepare_says_safe():
    model = lora.build("Llama", "LoRA")
    done = fewbit.prepare(model, batches("Llama", 2))
    assert done.fidelity.level == "safe"
    assert done.kept[1] <= LEAST_KEPT * done.kept[0]


@pytest.mark.parametrize("adapter", ["LoRA", "DoRA"])
def test_merge(adapter):
    model, batch = ready(adapter).eval(), batches("Llama", 1)[0]
    with torch.no_grad():
        expected = model(**batch).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, expected, atol=1e-4, rtol=1e-4)
    fewbit.revert(merged)
    assert not any(type(each).__module__.startswith("fewbit") for each in merged.modules())
    assert {type(each) for each in merged.modules() if isinstance(each, nn.Linear)} == {nn.Linear}


def test_save_and_load(tmp_path):
    from peft import PeftModel

    model, batch = ready(), batches("Llama", 1)[0]
    model.save_pretrained(tmp_path)
    assert list(model.state_dict()) == list(lora.build("Llama", "LoRA").state_dict())
    base = lora.huggingface.build(CASES["Llama"])
    loaded = PeftModel.from_pretrained(base, tmp_path, is_trainable=True).train()
    for each in (loaded, fewbit.convert(loaded, bits=4)):
        assert torch.equal(each(**batch).logits, model(**batch).logits)
    assert torch.equal(flat(gradients(loaded, batch)[1]), flat(gradients(model, batch)[1]))


def test_disable_adapter():
    model, batch = ready("LoRA, dropout"), batches("Llama", 1)[0]
    base = lora.huggingface.build(CASES["Llama"])
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, base(**batch).logits)
    assert not torch.equal(model(**batch).logits, base(**batch).logits)


def test_adapters_learn_as_exact_ones_do():
    losses = {}
    for when in ("", "after"):
        model, sampler = lora.build("Llama", "LoRA", when=when), torch.Generator().manual_seed(0)
        optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
        frozen = {name: each.clone() for name, each in model.named_parameters() if not each.requires_grad}
        losses[when] = []
        for _ in range(15):
            loss = model(**CASES["Llama"].sample(sampler)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[when].append(loss.item())
        assert all(torch.equal(each, frozen[name]) for name, each in model.named_parameters() if name in frozen)
    assert losses["after"][-1] < 0.95 * losses["after"][0]
    assert losses["after"][-1] == pytest.approx(losses[""][-1], rel=0.03)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_chosen_layer_of_a_plain_network(when, tmp_path):
    """A frozen base: its activations only keep codes, and the adapters are trained, saved, loaded and merged."""
    from peft import LoraConfig, PeftModel, get_peft_model

    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 128), nn.GELU(), nn.Linear(128, 16), nn.SiLU(), nn.Linear(16, 1))

    def adapted(model):
        return get_peft_model(model, LoraConfig(r=4, target_modules=["0", "4"], init_lora_weights=False))

    exact = adapted(base())
    model = (
        adapted(fewbit.convert(base(), bits={"activation": 3}))
        if when == "before"
        else fewbit.convert(adapted(base()), bits={"activation": 3})
    )
    assert list(model.state_dict()) == list(exact.state_dict())
    exact.load_state_dict(model.state_dict())
    x = torch.randn(256, 16)
    assert torch.equal(model(x), exact(x))
    assert bytes_kept(model, x) < bytes_kept(exact, x) - 0.8 * (256 * 128 * 4)
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    optimizer, found = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr=1e-2), []
    for _ in range(10):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert found[-1] < 0.8 * found[0]
    for name, each in model.named_parameters():
        assert torch.equal(each, before[name]) != ("lora_" in name), name
    model.save_pretrained(tmp_path)
    expected = model(x)
    assert torch.equal(PeftModel.from_pretrained(base(), tmp_path)(x), expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), expected, atol=1e-4, rtol=1e-4)
    assert list(merged.state_dict()) == list(base().state_dict())
