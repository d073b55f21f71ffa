"""Whole models on a CUDA device: gradients as on the CPU, memory, and special cases of such devices."""

import copy
import warnings

import pytest
import torch
from support import gradients
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fewbit
from fewbit.bench.models import LlamaBlock
from fewbit.demo import Block

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
WIDTH, TOKENS, BATCH = 128, 64, 4


class Residual(nn.Module):
    """Convolutions and group norms. The input is added to their output."""

    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(channels, channels, 3, padding=1), nn.GroupNorm(4, channels), nn.SiLU()),
            *(nn.Conv2d(channels, channels, 3, padding=1), nn.InstanceNorm2d(channels, affine=True), nn.Hardswish()),
        )

    def forward(self, x):
        return x + self.body(x)


class Gated(nn.Module):
    """A gated product with any activation, and a norm of rows before it."""

    def __init__(self):
        super().__init__()
        self.norm, self.gate, self.up, self.down = nn.LayerNorm(WIDTH), *(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        x = self.norm(x)
        return self.down(F.gelu(self.gate(x)) * self.up(x))


class Recurrent(nn.Module):
    """A recurrent layer, and a layer that reads its last steps."""

    def __init__(self, kind, **options):
        super().__init__()
        self.layer = getattr(nn, kind)(WIDTH, WIDTH, batch_first=True, **options)
        self.head = nn.LazyLinear(WIDTH)

    def forward(self, x):
        return self.head(self.layer(x)[0])


class Words(nn.Module):
    """An embedding, a transformer of torch's own, and a head."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, WIDTH)
        self.body = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, 50)

    def forward(self, x):
        return self.head(self.body(self.embedding((x.abs() * 10).long() % 50)[:, :, 0]))


def convolutional():
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(Residual(32), nn.Conv2d(32, 64, 3, groups=4), nn.BatchNorm2d(64), nn.LeakyReLU(0.1), nn.AdaptiveAvgPool2d(2)),
        *(nn.Flatten(), nn.LazyLinear(10)),
    )


MODELS = {
    "gpt": lambda: nn.Sequential(*(Block(nn.GELU(), WIDTH, 2) for _ in range(2))),
    "llama": lambda: nn.Sequential(*(LlamaBlock(WIDTH, TOKENS) for _ in range(2))),
    "gated": Gated,
    "convolutional": convolutional,
    "lstm": lambda: Recurrent("LSTM", num_layers=2, bidirectional=True),
    "gru": lambda: Recurrent("GRU", num_layers=2),
    "rnn": lambda: Recurrent("RNN", nonlinearity="relu"),
    "words": Words,
    "activations": lambda: nn.Sequential(
        *(nn.Linear(WIDTH, WIDTH), nn.Mish(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.ELU()),
        *(nn.Linear(WIDTH, WIDTH), nn.PReLU(), nn.Linear(WIDTH, WIDTH), nn.Sigmoid(), nn.RMSNorm(WIDTH), nn.Softplus()),
    ),
}


def subject(name, dtype=torch.float32, device="cuda"):
    """The model, and a batch of normal numbers, both made on the CPU."""
    torch.manual_seed(0)
    x = torch.randn(BATCH, 3, 64, 64) if name == "convolutional" else torch.randn(BATCH, TOKENS, WIDTH)
    model = MODELS[name]()
    model(x)  # for lazy layers
    return model.to(device, dtype), x.to(device, dtype)


def coded(model, bits=4, **options):
    return fewbit.convert(copy.deepcopy(model), bits=bits, **options)


def loss(model, x):
    y = model(x)
    return (y * torch.linspace(-1, 1, y.shape[-1], device=y.device, dtype=y.dtype)).square().sum()


def distance(found, expected):
    """The relative distance of all gradients, taken as one vector."""
    assert found.keys() == expected.keys()
    found, expected = (torch.cat([each.double().flatten().cpu() for each in one.values()]) for one in (found, expected))
    assert bool(found.isfinite().all())
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_cpu(name):
    """In float64, since its rounding hardly moves any number across a threshold."""
    found = {}
    for device in ("cpu", "cuda"):
        model, x = subject(name, torch.float64, device)
        found[device] = gradients(coded(model), x, loss)
    assert distance(found["cuda"], found["cpu"]) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_torchs_and_gradients_near(name, dtype):
    model, x = subject(name, dtype)
    exact = gradients(model, x, loss)
    for bits, bound in ((8, 0.03), (4, 0.2)):
        converted = coded(model, bits)
        with torch.no_grad():
            tolerance = 8 * torch.finfo(dtype).eps
            expected = model(x)
            assert float((converted(x) - expected).abs().max()) <= tolerance * float(expected.abs().max())
        rounding = 0 if dtype == torch.float32 else 0.05
        assert distance(gradients(converted, x, loss), exact) < bound + rounding


@pytest.mark.parametrize("name", MODELS)
def test_twice_the_same(name):
    model, x = subject(name)
    converted = coded(model)
    first, second = gradients(converted, x, loss), gradients(converted, x, loss)
    assert distance(first, second) < 1e-6  # sums of torch's own, by atomic additions, may differ


@pytest.mark.parametrize("name", ["gpt", "llama", "convolutional"])
def test_what_is_kept_is_what_the_report_says(name):
    """Up to the rounding of the allocator, and small sums."""
    model, x = subject(name)
    converted, x = coded(model), torch.cat([x] * 8).requires_grad_()
    gradients(converted, x, loss)
    report = fewbit.memory(converted, x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = converted(x)
    kept = torch.cuda.memory_allocated() - before - y.nbytes
    assert abs(kept - report.activation_bytes) < 0.05 * report.activation_bytes + 2**18
    assert kept < 0.45 * fewbit.memory(model, x).activation_bytes


@pytest.mark.parametrize("name", ["gpt", "llama", "gated", "convolutional", "words"])
def test_nothing_waits_for_the_device(name):
    model, x = subject(name)
    converted = coded(model)
    gradients(converted, x, loss)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        converted(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["gpt", "llama", "convolutional"])
def test_steps_in_a_cuda_graph(name):
    model, x = subject(name)
    converted = coded(model)
    converted.eval()  # so that running statistics do not change
    expected = gradients(converted, x, loss)
    static = x.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            converted.zero_grad(set_to_none=True)
            loss(converted, static).backward()
    torch.cuda.current_stream().wait_stream(stream)
    converted.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss(converted, static).backward()
    for factor in (2.0, 1.0):
        static.copy_(factor * x)
        graph.replay()
    found = {name: each.grad for name, each in converted.named_parameters() if each.grad is not None}
    assert distance(found, expected) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["gpt", "llama", "convolutional", "lstm"])
def test_autocast(name, dtype):
    model, x = subject(name)

    def cast(model, x):
        with torch.autocast("cuda", dtype):
            y = model(x)
        return y.float().square().mean()

    exact = gradients(model, x, cast)
    converted = coded(model, 8)
    assert float(cast(converted, x).detach()) == pytest.approx(float(cast(model, x).detach()), rel=1e-2)
    assert distance(gradients(converted, x, cast), exact) < 0.08
    scaler = torch.amp.GradScaler("cuda")
    scaler.scale(cast(converted, x)).backward()
    assert all(bool(each.grad.isfinite().all()) for each in converted.parameters() if each.grad is not None)


@pytest.mark.skipif(torch.__version__ < "2.13", reason="what compiled code needs of torch is in 2.13")
@pytest.mark.parametrize("name", ["gpt", "llama", "convolutional"])
def test_compiled(name):
    model, x = subject(name)
    converted = coded(model)
    expected = gradients(converted, x, loss)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(converted)
        found = gradients(compiled, x, loss)
    found = {name.removeprefix("_orig_mod."): each for name, each in found.items()}
    assert distance(found, expected) < 0.05  # sums in another order move numbers across thresholds


def test_checkpointed():
    """The boundary is exact. A block's codes are those of its second run, which has the dropout of the first."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(0.3), nn.Linear(WIDTH, WIDTH)).cuda()
    converted, x = coded(body), torch.randn(512, WIDTH, device="cuda")

    def run(again):
        torch.manual_seed(1)
        x_leaf = x.clone().requires_grad_()
        y = checkpoint(converted, x_leaf, use_reentrant=False) if again else converted(x_leaf)
        return y, torch.autograd.grad(y.square().sum(), [x_leaf, *converted.parameters()])

    (y, found), (expected, gradients_of) = run(True), run(False)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    for one, other in zip(found, gradients_of, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout(p):
    """The numbers that torch drops are dropped, and the gradients of the others are exact."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(1000, WIDTH, device="cuda", dtype=dtype).requires_grad_()
        torch.manual_seed(3)
        expected = F.dropout(x, p)
        torch.manual_seed(3)
        found = coded(nn.Sequential(nn.Dropout(p)))(x)
        after = torch.rand(3, device="cuda")
        assert torch.equal(found, expected)
        grad = torch.randn_like(x)
        torch.testing.assert_close(
            torch.autograd.grad(found, x, grad)[0], torch.autograd.grad(expected, x, grad)[0], rtol=1e-2, atol=1e-6
        )
        torch.manual_seed(3)
        F.dropout(x, p)
        assert torch.equal(torch.rand(3, device="cuda"), after)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_attention(dtype, causal):
    q, k, v = (torch.randn(2, 4, 128, 64, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3))
    grad = torch.randn_like(q)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    found = fewbit.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, bits=8)
    assert torch.equal(found, expected)
    for one, other in zip(
        torch.autograd.grad(found, [q, k, v], grad), torch.autograd.grad(expected, [q, k, v], grad), strict=True
    ):
        assert float((one - other).float().norm() / other.float().norm()) < 0.04


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}], ids=str)
def test_recurrent_outputs_are_cudnns(kind, options):
    torch.manual_seed(0)
    layer = getattr(nn, kind)(WIDTH, WIDTH, **options).cuda()
    x = torch.randn(TOKENS, BATCH, WIDTH, device="cuda", requires_grad=True)
    (expected, _), (found, _) = layer(x), coded(layer)(x)
    assert torch.equal(found, expected)
    grad = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, x, grad)[0]
    assert float((torch.autograd.grad(found, x, grad)[0] - wanted).norm() / wanted.norm()) < 0.2


def test_on_another_stream():
    model, x = subject("gpt")
    converted = coded(model)
    expected = gradients(converted, x, loss)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = gradients(converted, x, loss)
    stream.synchronize()
    assert distance(found, expected) < 1e-6


def test_one_call_each():
    """Planning, calibration, allocation and fidelity."""
    model, x = subject("gpt")
    plan = fewbit.memory(model, x).plan(bits=4)
    assert plan.convert() is not None
    model, x = subject("gpt")
    assert fewbit.calibrate(model, [x], loss).layers
    assert distance(gradients(model, x, loss), gradients(subject("gpt")[0], x, loss)) < 0.2
    model, x = subject("gpt")
    assert fewbit.fidelity(coded(model), [x, x.flip(0)], loss).verdict


def test_training():
    """Twenty steps of Adam in bfloat16 autocast go where exact ones go."""
    ends = []
    for bits in (None, 5):
        model, x = subject("gpt")
        model = model if bits is None else coded(model, bits)
        target = torch.roll(x, 1, dims=1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(20):
            with torch.autocast("cuda", torch.bfloat16):
                value = F.mse_loss(model(x).float(), target)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        ends.append(float(value.detach()))
    assert ends[1] == pytest.approx(ends[0], rel=0.02)
