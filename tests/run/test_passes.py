"""Three ways through the same functions: whole tensors, cache-sized pieces, and torch.compile; the same numbers.

Tolerance of the compiled path: forward passes are elementwise after one maximum per block, so they are equal bit for bit. LOTION's scale
term is a sum over a block, which a compiler adds up in another order: relative error 16 * 2**-24 = 1e-6 of a force that moves a weight by
at most the rate, 0.01, per step; over 5 steps 5e-8, and Adam's division by the root of a small second moment is worth a factor of a few.
Learned scales have such sums too. The soft staircase has an error function of the compiler's own, 2 to 4 ulp from torch's, at four or so
thresholds that are near: 1e-6 of a step of about .1 in what the forward pass sees, 1e-7 in a gradient, a few times that after Adam's root.
"""

import shutil
import warnings

import pytest
import torch
from tests.cases import GRIDS, METHODS, OWN_SCALES, REPRESENTATIVES, ROUNDED, gaussian, refit
from tests.run.throwaway import everything
from tests.run.training import batches, latents, network, ones, same, train, weights

import stepwell as sw
from stepwell.run import passes

Q = sw.int3(block=16)
SUMS, ERF = 2e-7, 1e-6
ELEMENTWISE = ("ste", "clipped ste", "held scales", "parq", "binary relax", "learned scale", "annealed", "pulled")
needs_compiler = pytest.mark.skipif(not any(shutil.which(name) for name in ("g++", "clang++", "c++")), reason="no C++ compiler")


def methods(quantizer=Q):
    return {
        **{name: make(quantizer) for name, make in METHODS.items() if quantizer.format.levels != "affine" or name not in OWN_SCALES},
        "curvature": sw.lotion(quantizer, strength=0.03, curvature=ones(network())),  # stronger, they chatter about the grid
        **everything(quantizer),
    }


def trained(method, *, compile, steps=5, optimizer=torch.optim.AdamW):
    """Return latent and shown weights after some steps, and the run."""
    model = network()
    made = optimizer(model.parameters(), lr=0.01)
    run = sw.attach(model, method, made, compile=compile, refit=2)
    train(model, made, batches(steps))
    return {**latents(run, model), **{f"shown {name}": value for name, value in weights(model).items()}}, run


@pytest.mark.parametrize("name", methods())
def test_pieces_equal_the_whole(name, monkeypatch):
    """Pieces of 40 elements hold two blocks of 16; the last one of a weight may hold one."""
    whole, _ = trained(methods()[name], compile=False)
    monkeypatch.setattr(passes, "PIECE", 40)
    pieces, _ = trained(methods()[name], compile=False)
    assert same(whole, pieces)


@pytest.mark.parametrize("quantizer", [q for q in REPRESENTATIVES if q.block in (16, 32, "channel")], ids=str)
def test_pieces_equal_the_whole_on_every_grid(quantizer, monkeypatch):
    """One scale per tensor behind the scales (e4m3) is of the whole weight, not of a piece."""
    found = []
    for piece in (1 << 16, 70):
        monkeypatch.setattr(passes, "PIECE", piece)
        model = torch.nn.Linear(64, 24, bias=False)
        model.weight.data = gaussian(24, 64, seed=1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run = sw.attach(model, sw.lotion(quantizer, curvature={"weight": torch.ones(24, 64)}, forward="nearest"), optimizer)
        for _ in range(2):
            model.weight.grad = gaussian(24, 64, seed=2)
            optimizer.step()
        found.append({"shown": model.weight.detach().clone(), **latents(run, model)})
    assert same(*found)


@pytest.mark.filterwarnings("ignore:.*half precision")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("quantizer", REPRESENTATIVES, ids=str)
def test_what_is_trained_on_is_what_is_finalized(quantizer, dtype):
    """Codes and scales in training and on disk are the same: finalize changes nothing in the model of a rounded forward pass."""
    model = torch.nn.Linear(128, 24, bias=False)
    model.weight.data = gaussian(24, 128, seed=1).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-6)  # float16 cannot hold the usual epsilon
    run = sw.attach(model, sw.lotion(quantizer, loss_terms=10, forward="nearest"), optimizer, refit=2)
    for step in range(3):
        model.weight.grad = gaussian(24, 128, seed=step).to(dtype)
        optimizer.step()
    shown = model.weight.detach().clone()
    with run.deployed():
        assert torch.equal(model.weight, shown)
    encoded = run.finalize()
    assert torch.equal(encoded["weight"].decode().to(dtype), shown)
    assert torch.equal(model.weight, shown)
    assert shown.isfinite().all()


@pytest.mark.parametrize("quantizer", GRIDS, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_on_every_grid_and_ends_where_it_deploys(name, quantizer):
    """Schedules have ended after six steps: what the forward pass sees then is what is shipped, to the last bit."""
    model = torch.nn.Linear(128, 24, bias=False)
    model.weight.data = gaussian(24, 128, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    run = sw.attach(model, METHODS[name](quantizer), optimizer)
    for step in range(6):
        model.weight.grad = gaussian(24, 128, seed=step)
        optimizer.step()
    shown, held = model.weight.detach().clone(), latents(run, model)["weight"]
    assert (held - gaussian(24, 128, seed=1)).abs().max() > 0.02  # it has moved by more than two learning rates
    encoded = run.finalize()["weight"]
    assert torch.equal(encoded.decode(), model.weight)
    if "prox" not in name or refit(quantizer).exact:  # a proximal step rounds the latent weights, whose scales are then fitted again
        assert torch.equal(shown, model.weight) == (name in ROUNDED)


def graphs():
    """Return how many graphs torch has compiled since the last reset."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def reset():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@needs_compiler
def test_compiled_equals_eager_without_compiling_again():
    """Push, deploy and the first show: three graphs serve weights of three shapes and every step."""
    reset()
    expected, _ = trained(methods()["ste + lotion"], compile=False)
    found, run = trained(methods()["ste + lotion"], compile=True)
    assert graphs() == 3
    assert "compiled path" in repr(run)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=SUMS)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("quantizer", [Q, sw.nvfp4(), sw.intn(3, block=16, levels="full"), sw.intn(4, block=16, levels="affine")], ids=str)
@pytest.mark.parametrize("name", [name for name in methods() if name != "randomized"])
def test_every_method_compiled_equals_eager(name, quantizer):
    if name == "learned scale" and quantizer is not Q:
        pytest.skip("the throw-away method knows symmetric grids with scales of their own")
    if name not in methods(quantizer):
        pytest.skip("a grid with zero points has no scales that could be held")
    reset()
    method = methods(quantizer)[name]
    optimizer = torch.optim.SGD if name in ("curvature", "pulled") else torch.optim.AdamW
    expected, _ = trained(method, compile=False, optimizer=optimizer)
    found, _ = trained(method, compile=True, optimizer=optimizer)
    used = graphs()
    sums = 0.0 if name in ELEMENTWISE else ERF if name == "soft" else SUMS
    for key, value in expected.items():
        if sums and key.startswith("shown"):
            continue  # an ulp of the latent weight may be a step of the grid
        torch.testing.assert_close(found[key], value, rtol=0, atol=sums)
    trained(method, compile=True, steps=12, optimizer=optimizer)
    assert graphs() - used <= used  # twice the steps, in a new run with copies of its own: no more graphs than before


@needs_compiler
def test_failed_compilation_goes_on_eagerly_with_one_warning(monkeypatch):
    """On the automatic path; who insists on it gets the error."""

    def broken(*arguments, **options):
        raise RuntimeError("no headers")

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(passes, "PAYS", 1)
    expected, _ = trained(methods()["ste"], compile=False)
    with pytest.warns(UserWarning, match=r"torch.compile failed \(RuntimeError: no headers\)") as caught:
        found, run = trained(methods()["ste"], compile=None)
    assert len(caught) == 1
    assert same(found, expected)
    assert "eager path" in repr(run)
    with pytest.raises(RuntimeError, match="no headers"):
        trained(methods()["ste"], compile=True)


def test_small_models_and_machines_without_a_compiler_do_not_compile(monkeypatch):
    assert not passes.compile_pays(passes.PAYS - 1, torch.device("cpu"))
    monkeypatch.setattr(passes.shutil, "which", lambda name: None)
    assert not passes.compile_pays(passes.PAYS, torch.device("cpu"))
    monkeypatch.setattr(passes.shutil, "which", lambda name: "/usr/bin/g++" if name == "g++" else None)
    assert passes.compile_pays(passes.PAYS, torch.device("cpu"))
    assert passes.compile_pays(passes.PAYS, torch.device("cuda"))


@needs_compiler
@pytest.mark.slow
def test_many_runs_in_one_process_keep_their_own_graphs():
    """torch gives up on a code object after eight recompilations; every run's passes have code objects of their own."""
    reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for bits in (2, 3, 4, 5, 6, 7, 8):
            for _ in range(2):
                method = sw.ste(sw.intn(bits, block=16))
                assert same(trained(method, compile=True, steps=1)[0], trained(method, compile=False, steps=1)[0])
