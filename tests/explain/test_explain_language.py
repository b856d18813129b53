"""Language models from a Hugging Face folder: the loss is transformers' own, pickles are never opened, what is missing is named."""

import json
import math
import pickle

import pytest
import torch

from stepwell.explain.language import from_folder

transformers = pytest.importorskip("transformers")
TEXT = "A stepwell is a basin that one reaches by stairs. Here the stairs are the grid and the basin is the region of low loss. " * 60
LENGTH = 32


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level, so that every text has tokens, with a few merges learned from the text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made)


def llama(vocabulary):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=vocabulary, max_position_embeddings=LENGTH, **sizes))


def gpt2(vocabulary):
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": LENGTH, "bos_token_id": None, "eos_token_id": None}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=vocabulary, **sizes))


def save(folder, tokenizer, kind=llama):
    torch.manual_seed(0)
    model = kind(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "text.txt").write_text(TEXT)
    return model.eval()


@pytest.mark.parametrize("kind", [llama, gpt2])
def test_the_loss_is_transformers_own_on_the_text_in_order(tmp_path, tokenizer, kind):
    model = save(tmp_path, tokenizer, kind)
    subject = from_folder(tmp_path, tmp_path / "text.txt", limit=3, window=16)
    assert all(batch.shape == (4, 16) for batch in subject.batches)
    tokens = torch.tensor(tokenizer.encode(TEXT, add_special_tokens=False))
    assert torch.equal(torch.cat([batch.flatten() for batch in subject.batches]), tokens[: 3 * 4 * 16])
    batch = subject.batches[1]
    assert subject.loss(subject.model, batch).item() == pytest.approx(model(input_ids=batch, labels=batch).loss.item(), rel=1e-5)
    assert {parameter.dtype for parameter in subject.model.parameters()} == {torch.float32}
    assert not subject.model.training


def test_half_precision_weights_arrive_in_float32(tmp_path, tokenizer):
    model = save(tmp_path, tokenizer)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    subject = from_folder(tmp_path, tmp_path / "text.txt", limit=3)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(subject.model.get_parameter(name), model.get_parameter(name).float())


def test_the_window_is_what_the_model_can_read(tmp_path, tokenizer):
    save(tmp_path, tokenizer)
    subject = from_folder(tmp_path, tmp_path / "text.txt", limit=3)
    assert subject.batches[0].shape == (4, LENGTH)
    with pytest.raises(ValueError, match=f"`window` must be 2 to {LENGTH} tokens"):
        from_folder(tmp_path, tmp_path / "text.txt", limit=3, window=LENGTH + 1)


def test_nothing_is_printed_while_it_loads(tmp_path, tokenizer, capfd):
    save(tmp_path, tokenizer)
    capfd.readouterr()
    from_folder(tmp_path, tmp_path / "text.txt", limit=3)
    assert capfd.readouterr() == ("", "")


def test_a_pickle_is_never_opened(tmp_path, tokenizer):
    class Loud:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was opened",))

    save(tmp_path, tokenizer)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Loud()))
    with pytest.raises(ValueError, match=r"no safetensors, only pytorch_model.bin: pickles can run code and are never read"):
        from_folder(tmp_path, tmp_path / "text.txt", limit=3)
    (tmp_path / "other.safetensors").write_bytes(b"")  # the folder has one, but not the model's
    with pytest.raises(ValueError, match="cannot be loaded as a causal language model"):
        from_folder(tmp_path, tmp_path / "text.txt", limit=3)


def remove(*patterns):
    def change(folder):
        for pattern in patterns:
            for path in folder.glob(pattern):
                path.unlink()

    return change


def fewer_weights(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.0.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def smaller_vocabulary(folder):
    llama(100).save_pretrained(folder)


def code_of_its_own(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "unheard_of", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text("raise SystemExit('code from the folder ran')\n")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (remove("config.json"), "has no config.json"),
        (remove("*.safetensors"), "has no safetensors."),
        (remove("tokenizer*"), "has no tokenizer"),
        (fewer_weights, "lack or misfit 1 weights such as model.layers.0.mlp.up_proj.weight"),
        (smaller_vocabulary, "they do not belong together"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be loaded as a causal language model"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"garbage"), "cannot be loaded as a causal language model"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "the tokenizer in"),
        (code_of_its_own, "cannot be loaded as a causal language model"),
        (lambda folder: (folder / "text.txt").unlink(), "does not exist"),
        (lambda folder: (folder / "text.txt").write_text(" \n"), "is empty"),
        (lambda folder: (folder / "text.txt").write_bytes(b"PK\3\4\0\0\0\0"), "holds zero bytes"),
        (lambda folder: (folder / "text.txt").write_bytes(b"caf\xe9 " * 500), "must be UTF-8 text"),
        (lambda folder: (folder / "text.txt").write_text("Too short."), "is too short"),
    ],
    ids=range(14),
)
def test_what_is_missing_or_broken_is_one_clear_line(tmp_path, tokenizer, change, words):
    save(tmp_path, tokenizer)
    change(tmp_path)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are compared below
        from_folder(tmp_path, tmp_path / "text.txt", limit=3)
    assert words in str(caught.value)


def test_a_folder_or_nothing_is_no_text(tmp_path, tokenizer):
    save(tmp_path, tokenizer)
    with pytest.raises(ValueError, match="`data` must be a text file: got none"):
        from_folder(tmp_path, None, limit=3)
    with pytest.raises(ValueError, match="which is a folder"):
        from_folder(tmp_path, tmp_path, limit=3)


def test_the_extra_is_named_where_it_is_missing(tmp_path, tokenizer, monkeypatch):
    save(tmp_path, tokenizer)
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r"stepwell\[hf\]"):
        from_folder(tmp_path, tmp_path / "text.txt", limit=3)


def test_an_untrained_model_is_near_chance(tmp_path, tokenizer):
    save(tmp_path, tokenizer)
    subject = from_folder(tmp_path, tmp_path / "text.txt", limit=3)
    assert subject.loss(subject.model, subject.batches[0]).item() == pytest.approx(math.log(len(tokenizer)), rel=0.05)
