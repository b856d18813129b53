"""Small language models as Hugging Face folders, made on the spot: a byte-level tokenizer and a text that it was made from."""

import json
import shutil

import torch

TEXT = "A stepwell is a basin that one reaches by stairs. Here the stairs are the grid and the basin is the region of low loss. " * 120
LENGTH = 32


def tokenizer():
    """Return a byte-level tokenizer, so that every text has tokens, with a few merges learned from the text."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=288, initial_alphabet=alphabet, show_progress=False))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made)


def llama(folder, *, hidden=64, feed=96, layers=2, tied=False, dtype=torch.float32, shard="5GB", seed=0):
    """Write a random Llama with its tokenizer and `text.txt` into a folder and return it."""
    import transformers

    torch.manual_seed(seed)
    words = tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(words), max_position_embeddings=LENGTH, hidden_size=hidden, intermediate_size=feed, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    words.save_pretrained(folder)
    (folder / "text.txt").write_text(TEXT)
    return model.eval()


def copied(source, target):
    """Return a copy of a folder, to be damaged."""
    shutil.copytree(source, target)
    return target


def edited(file, **changes):
    """Change the top level of a JSON file; None removes a key."""
    held = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in held.items() if value is not None}))
