"""Classifiers of many architectures, small enough to be made on the spot.

Their weights are random, and the heads so large that the logits of different texts differ by more
than one.
"""

from __future__ import annotations

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

WORDS = ("acute", "chest", "pain", "fever", "broken", "arm", "mild", "severe", "Anna", "Oslo")
PIECES = ("##s", "##ly", "##ed", "##er", ",", ".")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")

TEXTS = (
    "acute chest pain",
    "fever",
    "Anna broken arm, severe pain in Oslo.",
    "mildly severe fever mildly severe fever",
    "pains pains pains pains arms",
    "unheard-of things",
)

#: What several configurations call by the same name.
SIZES = {
    "vocab_size": len(SPECIAL) + len(WORDS) + len(PIECES),
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "initializer_range": 0.5,
}

#: Architecture -> (settings beyond SIZES, of which None takes one out; what becomes the head).
ARCHITECTURES = {
    "DistilBert": ({"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32}, "classifier"),
    "Bert": ({}, "classifier"),
    "Roberta": ({}, "classifier.out_proj"),
    "Electra": ({"embedding_size": 12}, "classifier.out_proj"),
    "DebertaV2": ({"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}, "classifier"),
    "Albert": ({"embedding_size": 12}, "classifier"),
    "MPNet": ({"pad_token_id": 1}, "classifier.out_proj"),
    "XLMRoberta": ({}, "classifier.out_proj"),
    "Camembert": ({}, "classifier.out_proj"),
    "Funnel": (
        {"num_hidden_layers": None, "block_sizes": [1, 1], "d_head": 8, "d_inner": 32},
        "classifier.linear_out",
    ),
    "XLNet": ({"max_position_embeddings": None, "d_inner": 32, "d_head": 8}, "logits_proj"),
    "GPT2": ({"n_embd": 16, "n_head": 2, "n_layer": 1, "n_positions": 40}, "score"),
    "Llama": ({}, "score"),
    "ModernBert": ({"global_attn_every_n_layers": 1}, "classifier"),
}


#: Architectures whose tokenizers mark the first token with a type of its own.
TYPED = ("Funnel", "XLNet")


def save_tokenizer(directory, *, words="pieces", token_types=False, padding_side="right"):
    """A tokenizer with words of several pieces: WordPiece's, or `bytes` as RoBERTa has them."""
    if words == "bytes":
        letters = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
        merges = [("A", "n"), ("n", "a"), ("Ġ", "O"), ("e", "r"), ("a", "i")]
        vocabulary = [*letters, *("".join(pair) for pair in merges)]
        places = {piece: place for place, piece in enumerate(vocabulary)}
        tokenizer = Tokenizer(models.BPE(places, merges, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        places = {word: place for place, word in enumerate((*SPECIAL, *WORDS, *PIECES))}
        tokenizer = Tokenizer(
            models.WordPiece(places, unk_token="[UNK]", continuing_subword_prefix="##")
        )
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:2 $A:0 [SEP]:0" if token_types else "[CLS] $A [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=32,
        padding_side=padding_side,
        **(
            {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
            if token_types
            else {}
        ),
    )
    wrapped.save_pretrained(directory)
    return wrapped


def save_checkpoint(
    directory,
    architecture,
    *,
    task="SequenceClassification",
    labels=("a", "b", "c"),
    words="pieces",
    seed=7,
    **settings,
):
    """A saved classifier; the loaded model is returned."""
    extra, _ = ARCHITECTURES[architecture]
    if words == "bytes":
        settings["vocab_size"] = 300
    chosen = SIZES | extra | {"id2label": dict(enumerate(labels))} | settings
    config = getattr(transformers, f"{architecture}Config")(
        **{name: value for name, value in chosen.items() if value is not None}
    )
    torch.manual_seed(seed)
    model = getattr(transformers, f"{architecture}For{task}")(config)
    with torch.no_grad():
        for name, values in model.named_parameters():
            # Random biases too, and factors of layer normalisations: a part that is left out shows.
            values.copy_(torch.randn_like(values) * 0.4 + ("norm" in name.lower()))
        head = model.get_submodule(split_of(architecture, task))
        head.weight.mul_(3.0)
    tokenizer = save_tokenizer(
        directory,
        words=words,
        token_types=architecture in TYPED,
        padding_side="left" if architecture == "XLNet" else "right",
    )
    if task == "TokenClassification":
        with torch.no_grad():  # on average no label is ahead, or one would win everywhere
            logits = [
                model.eval()(**tokenizer(text, return_tensors="pt")).logits[0] for text in TEXTS
            ]
            head.bias.sub_(torch.cat(logits).mean(dim=0))
    model.eval().save_pretrained(directory)
    return model


def split_of(architecture, task="SequenceClassification"):
    """The module that becomes the head."""
    if task == "TokenClassification":
        return "classifier" if architecture not in ("Llama", "GPT2") else "score"
    return ARCHITECTURES[architecture][1]
