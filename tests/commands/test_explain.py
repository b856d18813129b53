"""`stepwell explain`: the page and its numbers are what was measured; bad input is one line, exit code 2, and nothing is written."""

import contextlib
import importlib
import io
import json
import re
import sys
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from stepwell import cli
from stepwell.commands.explain import PAGE_FILE, RESULTS_FILE, parse_bits, parse_schemes, quantizer
from stepwell.commands.files import check_folder, write_together

SUBJECT = """
import torch
from torch import nn
from torch.nn.functional import cross_entropy, dropout

def data(count, seed, size=16):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(16, 3, generator=torch.Generator().manual_seed(99))
    batches = []
    for _ in range(count):
        x = torch.randn(size, 16, generator=generator)
        batches.append((x, (x @ mix).argmax(1)))
    return batches

def entropy(model, batch):
    return cross_entropy(model(batch[0]), batch[1])

def net(steps=200):
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for batch in data(steps, 7):
        optimizer.zero_grad()
        entropy(model, batch).backward()
        optimizer.step()
    return model, entropy, data(9, 3)

def raw():
    model, _, batches = net(0)
    return model, entropy, batches

def vector():
    model, _, batches = raw()
    return model, lambda m, b: cross_entropy(m(b[0]), b[1], reduction="none"), batches

def number():
    model, _, batches = raw()
    return model, lambda m, b: entropy(m, b).item(), batches

def infinite():
    model, _, batches = raw()
    return model, lambda m, b: entropy(m, b) / 0, batches

def dropping():
    model, _, batches = raw()
    return model, lambda m, b: entropy(m, (dropout(b[0]), b[1])), batches

def misfit():
    model, _, batches = raw()
    return model, lambda m, b: entropy(m, (b[0][:, :5], b[1])), batches

def late():
    model, loss, batches = raw()
    return model, loss, [*batches[:4], (batches[4][0][:, :5], batches[4][1]), *batches[5:]]

def hollow():
    model, loss, batches = raw()
    return model, loss, [(batches[0][0][:0], batches[0][1][:0]), *batches[1:]]

def chatty():
    print("a line of its own")
    return raw()

def training():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)).train()
    for x, _ in data(20, 5):
        model(x)
    return model, entropy, data(9, 3)

def unreached():
    model, _, batches = raw()
    return model, lambda m, b: m[2](m[1](m[0](b[0]))).square().mean(), batches

def nothing_to_quantize():
    return nn.Sequential(nn.LayerNorm(16)), lambda m, b: m(b[0]).square().mean(), data(3, 3)

def no_data():
    return *raw()[:2], []

def pair():
    return raw()[:2]

def overflowing():
    model = nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, 0.2]])
    return model, lambda m, b: 1 / m.weight.abs().min() + 0 * m(b).sum(), [torch.ones(1, 2)] * 3
"""
FAST = ["--bits", "8,2", "--quick", "--tolerance", "0.1"]


@pytest.fixture
def run(run_beside, monkeypatch):
    monkeypatch.setattr(cli, "COMMANDS", ("explain", "formats"))
    return partial(run_beside("subject_of_explain", SUBJECT), "explain")


class Reader(HTMLParser):
    """Collects what the tests look at: tags, and the text inside each of a few."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.inside, self.stack = [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("h1", "h2", "h3", "figcaption", "summary", "strong", "text"):
            self.stack.append(tag)
            self.inside.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        if self.stack and self.stack[-1] == tag:
            self.stack.pop()

    def handle_data(self, data):
        if self.stack:
            self.inside[self.stack[-1]][-1] += data


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """One run with two schemes: standard output, standard error, the page and the results."""
    folder = tmp_path_factory.mktemp("explain")
    (folder / "subject_of_explain.py").write_text(SUBJECT)
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    patch.setattr(sys, "path", list(sys.path))
    patch.setattr(sys, "argv", ["stepwell", "explain", "subject_of_explain:net", *FAST, "--schemes", "channel-mse,tensor-absmax", "--json"])
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error), pytest.raises(SystemExit) as left:
        cli.main()
    sys.modules.pop("subject_of_explain", None)
    patch.undo()
    assert left.value.code in (0, None), error.getvalue()
    written = folder / "out" / "explain"
    return out.getvalue(), error.getvalue(), (written / PAGE_FILE).read_text(), json.loads((written / RESULTS_FILE).read_text()), written


def test_two_files_are_written_and_json_is_the_second(once):
    out, error, _, results, written = once
    told = json.loads(out)
    assert told.pop("files") == {name: str(written / name) for name in (PAGE_FILE, RESULTS_FILE)}
    assert told == results
    assert sorted(path.name for path in written.iterdir()) == [PAGE_FILE, RESULTS_FILE]
    assert re.search(r"quick mode: 4 grids, 3 layers, about \d+ passes over 9 batches, \S+ s each", " ".join(error.split()))


def test_results_hold_everything_that_was_promised(once):
    results = once[3]
    assert [(one["scheme"], one["bits"]) for one in results["summary"]] == [
        ("channel-mse", 8), ("channel-mse", 2), ("tensor-absmax", 8), ("tensor-absmax", 2),
    ]  # fmt: skip
    for grid in results["grids"]:
        assert [one["method"] for one in grid["rounded"]] == ["RTN", "MSE scales", "curvature scales", "GPTQ"]
        assert (grid["rho_self"]["tautology"], grid["rho_uniform"]["tautology"]) == (True, False)
        assert len(grid["line"]["losses"]) == len(grid["line"]["positions"])
        verdict = grid["verdict"]
        assert verdict["method"] in ("RTN", "GPTQ", "train", "not reachable", "uncertain")
        assert verdict["low"] <= verdict["predicted"] <= verdict["high"]
        assert verdict["reasons"]
        assert set(verdict["cost"]) == {"forward", "backward"}
        assert verdict["estimates"][0]["method"] == "RTN"
        assert 0 < verdict["hit_rate"] <= 1
    closer = [grid["closer"] for grid in results["grids"] if grid["closer"]]
    assert len(closer) == 2  # one per scheme
    for one in closer:
        assert {"layers", "searches", "inward", "latent", "plane", "gptq_line", "quadratic"} == set(one)
        assert [search["method"] for search in one["searches"]] == ["flip search", "box QAT"]
    assert results["spent"][-1]["part"] == "advice"
    assert results["cost"]["forward"] == pytest.approx(sum(one["forward"] for one in results["spent"]))
    assert "On held-out data of" in results["worth"]


def test_every_figure_has_axes_a_sentence_and_its_numbers(once):
    reader = Reader(once[2])
    figures = sum(tag == "figure" for tag, _ in reader.tags)
    assert figures == 2 * 3 + 2 * 5  # loss, ratio and line per scheme; layers, searches, gradients and two slices per closer look
    handles = reader.inside["summary"]
    assert len(reader.inside["figcaption"]) == figures
    assert handles == ["The numbers in this figure"] * figures + ["The 3 parameters that stayed in float, and why"]
    assert all(len(words) > 40 and words.rstrip().endswith(".") for words in reader.inside["figcaption"])
    labels = " ".join(reader.inside["text"])
    for words in ("bits per weight", "loss (own units)", "rounding distance (basin widths)", "position (0 float, 1 rounded)",
                  "rho_self (tautology)", "cosine of descent and the way back", "random level", "tolerance", "threshold 1"):  # fmt: skip
        assert words in labels, words


def test_the_page_says_what_the_results_say(once):
    text, results = once[2], once[3]
    reader = Reader(text)
    for one, grid in zip(results["summary"], results["grids"], strict=True):
        label = {"RTN": "RTN is enough", "GPTQ": "GPTQ is enough"}.get(one["verdict"], one["verdict"])
        if one["verdict"] == "uncertain" and grid["verdict"]["safe"]:
            label = f"{grid['verdict']['safe']}, or less"
        headline = f"{one['scheme']}, {one['bits']} bits: {label}"
        assert any(headline == strong for strong in reader.inside["strong"]), headline
        if grid["closer"]:
            found = any(search["within"] for search in grid["closer"]["searches"])
            near = f"{one['scheme']}, {one['bits']} bits: {'found near' if found else 'none found near'}"
            assert (near in reader.inside["strong"]) == (not grid["rounded"][0]["within"])
            assert grid["closer"]["layers"][0]["name"] in text
    assert [one["name"] for one in results["floats"]] == ["0.bias", "2.bias", "4.bias"]
    assert all(f"<td>{one['reason']}</td>" in text for one in results["floats"])
    assert results["worth"] in text
    assert "A search that fails does not show that there is none" in text or any(
        search["loss"] <= 0.1 for grid in results["grids"] if grid["closer"] for search in grid["closer"]["searches"]
    )


def test_the_page_works_offline(once):
    reader, text = Reader(once[2]), once[2]
    assert not {"script", "link", "iframe", "img"} & {tag for tag, _ in reader.tags}
    outside = set(re.findall(r"https?://[^\s\"'<]+", text))
    assert outside <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert re.findall(r"(?:fill|stroke): ?#[0-9a-fA-F]{6}\b", text) == []


def test_the_table_fits_80_columns_and_names_the_page(run, tmp_path):
    threads = torch.get_num_threads()
    code, out, error = run("subject_of_explain:net", *FAST, "--out", tmp_path / "there")
    assert code == 0, error
    head, *_ = (index for index, line in enumerate(out.splitlines()) if line.startswith("bits"))
    rows = out.splitlines()[head : head + 4]
    assert all(len(line.rstrip()) <= 80 for line in rows)
    assert all(word in rows[0] for word in ("RTN", "searched", "GPTQ", "rho", "verdict", "expected"))
    assert [row.split()[0] for row in rows[2:]] == ["8", "2"]
    assert "forward and" in out
    assert torch.get_num_threads() == threads  # the command looks for the fastest number and puts back what was
    assert str(tmp_path / "there" / PAGE_FILE) in " ".join(out.split())


def test_a_loss_that_overflows_leaves_gaps(run, tmp_path):
    """Rounding to ternary makes the smaller weight 0, and the loss infinite there."""
    code, out, error = run("subject_of_explain:overflowing", "--bits", "2", "--quick", "--json")
    assert code == 0, error
    told = json.loads(out)
    assert told["grids"][0]["rounded"][0]["loss"] is None
    assert "nan%" not in (tmp_path / "out" / "explain" / PAGE_FILE).read_text()
    assert "+inf" in run("subject_of_explain:overflowing", "--bits", "2", "--quick")[1]


def test_a_language_model_is_explained_on_a_text(run, tmp_path):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=letters, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 24, "bos_token_id": None, "eos_token_id": None}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=len(letters), **sizes)).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("A stepwell is a basin that one reaches by stairs. " * 40)
    code, out, error = run("model", "--data", "text.txt", "--bits", 2, "--quick", "--batches", 6, "--window", 16, "--json")
    assert code == 0, error
    told = json.loads(out)
    assert told["unit"] == "nats per token"
    assert told["facts"]["data"] == "the first 384 tokens of text.txt"
    assert {one["name"] for one in told["grids"][0]["closer"]["layers"]} == {
        f"transformer.h.0.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["subject_of_explain"], "`model` must be `module:function`, `file.py:function` or a Hugging Face folder"),
        (["missing_module:f"], "there is no module 'missing_module'"),
        (["missing.py:f"], "there is no file 'missing.py'"),
        (["subject_of_explain:missing"], "has no function 'missing'"),
        (["subject_of_explain:pair"], "must return (model, loss, batches): got tuple of 2"),
        (["subject_of_explain:no_data"], "are empty: got none"),
        (["subject_of_explain:vector"], "`loss` must return a scalar"),
        (["subject_of_explain:number"], "`loss` must return a tensor"),
        (["subject_of_explain:infinite"], "`loss` must be finite"),
        (["subject_of_explain:dropping"], "Dropout left on"),
        (["subject_of_explain:misfit"], "the loss of subject_of_explain:misfit on batch 1 of 9 failed with RuntimeError"),
        (["subject_of_explain:late"], "the loss of subject_of_explain:late on batch 5 of 9 failed with RuntimeError"),
        (["subject_of_explain:hollow"], "`loss` must be finite on every batch"),
        (["subject_of_explain:unreached"], "`batches` never reach '4.weight'"),
        (["subject_of_explain:nothing_to_quantize"], "nothing is selected"),
        (["subject_of_explain:raw", "--skip", "no_such_layer"], "matches no parameter"),
        (["subject_of_explain:raw", "--data", "missing.txt"], "`data` must exist"),
        (["subject_of_explain:raw", "--data", "subject_of_explain.py"], "`data` must not be given"),
        (["subject_of_explain:raw", "--window", 8], "`window` must not be given with a function"),
        (["subject_of_explain:raw", "--bits", "four"], "`bits` must be whole numbers from 2 to 8"),
        (["subject_of_explain:raw", "--bits", "9"], "`bits` must be whole numbers from 2 to 8"),
        (["subject_of_explain:raw", "--bits", ""], "`bits` must be whole numbers from 2 to 8"),
        (["subject_of_explain:raw", "--schemes", "rows-mse"], "`schemes` must be such as tensor-absmax"),
        (["subject_of_explain:raw", "--schemes", "block7-mse"], "`block` must divide the contraction dimension: got block=7"),
        (["subject_of_explain:raw", "--tolerance", "0"], "`tolerance` must be a positive number"),
        (["subject_of_explain:raw", "--tolerance=-1"], "`tolerance` must be a positive number"),
        (["subject_of_explain:raw", "--tolerance", "nan"], "`tolerance` must be a positive number"),
        (["subject_of_explain:raw", "--batches", "2"], "`batches` must be at least 3"),
        (["subject_of_explain:raw", "--quick", "--full"], "`quick` and `full` exclude each other"),
        (["subject_of_explain:raw", "--out", "subject_of_explain.py/deeper"], "`out`: cannot write into the folder"),
        (["subject_of_explain:raw", "--out", "subject_of_explain.py"], "`out`: cannot write into the folder"),
        ([], "Missing argument 'model'"),
        (["."], "has no config.json"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_exit_code_2_and_nothing_is_written(run, tmp_path, arguments, words):
    more = ["--data", "subject_of_explain.py"] if arguments == ["."] else []
    code, out, error = run(*arguments, *more)
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert error.startswith("stepwell: ")
    assert words in error
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == ["subject_of_explain.py"]


def test_what_the_users_code_prints_stays_out_of_the_results(run):
    code, out, error = run("subject_of_explain:chatty", "--bits", "3", "--quick", "--json")
    assert code == 0
    assert json.loads(out)["model"] == "subject_of_explain:chatty"
    assert error.startswith("a line of its own\n")


def test_a_model_in_training_mode_keeps_its_statistics(run, tmp_path, monkeypatch):
    """A look in training mode would mix BatchNorm's statistics with those of the data that measures."""
    code, out, _ = run("subject_of_explain:training", "--bits", "3", "--quick", "--json")
    assert code == 0
    monkeypatch.syspath_prepend(tmp_path)
    model, loss, batches = importlib.import_module("subject_of_explain").training()
    sys.modules.pop("subject_of_explain", None)
    model.eval()
    with torch.no_grad():
        measured = [loss(model, batch).item() for index, batch in enumerate(batches) if index % 3]
    assert json.loads(out)["start"] == pytest.approx(sum(measured) / len(measured), rel=1e-6)


def test_a_failure_while_writing_leaves_what_was_there(tmp_path, monkeypatch):
    write_together(tmp_path, {"a.html": "old page", "b.json": "old numbers"})
    with pytest.raises(UnicodeEncodeError):
        write_together(tmp_path, {"a.html": "new page", "b.json": "\ud800"})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.html": "old page", "b.json": "old numbers"}


def test_files_appear_whole_and_readable_for_others(tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("x")
    paths = write_together(tmp_path / "deep" / "er", {"a.html": "page"})
    assert Path(paths["a.html"]).read_text() == "page"
    assert Path(paths["a.html"]).stat().st_mode == plain.stat().st_mode


def test_a_folder_is_tried_without_being_made(tmp_path):
    check_folder(tmp_path / "a" / "b", ["explain.html"])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="`out`: cannot write into the folder /dev/null/x"):
        check_folder(Path("/dev/null/x"))
    (tmp_path / "explain.html").mkdir()
    with pytest.raises(ValueError, match=r"explain\.html is a folder, where a file must go"):
        check_folder(tmp_path, ["explain.json", "explain.html"])


def test_words_become_grids():
    assert parse_bits("8, 4,4") == [8, 4]
    assert parse_schemes("block16-absmax,tensor-mse") == ["block16-absmax", "tensor-mse"]
    assert str(quantizer("block16-absmax", 3)) == "int3 block 16, absmax fp32 scales"
    assert str(quantizer("tensor-mse", 2)) == "int2 tensor, mse fp32 scales"
    assert str(quantizer("channel-mse", 2)) == "int2 channel, mse fp32 scales"
