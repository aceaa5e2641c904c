"""Small tokenizers, made here."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def byte_level(**special):
    """GPT-2's kind: a token for each letter and a few longer ones; adds no special tokens."""
    pieces = ["<eos>", "<bos>", *"abcdefghijklmnopqrstuvwxyz.:", "Ġ", "Ċ"]
    merges = [("a", "b"), ("ab", "c"), ("c", "d"), ("b", "."), (".", "."), ("Ġ", "a")]
    pieces += ["".join(pair) for pair in merges]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {"bos_token": "<bos>", "eos_token": "<eos>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def sentence_pieces(begin="<s>", end="</s>"):
    """Llama's and T5's kind: words carry their space, which a text does not begin with."""
    pieces = ["<s>", "</s>", "<unk>", "▁a", "▁good", "▁film", "s", "▁was"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(filter(None, (begin, "$A", end))),
        special_tokens=[("<s>", 0), ("</s>", 1)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
