"""Gemmas of a few thousand random weights, as `training.base.hugging_face_folder` leaves a base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LETTERS = "abcdefghijklmnopqrstuvwxyz {}:,\"'0123456789_<>\n"
_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "sliding_window": 64,
}
_KINDS: dict[str, dict[str, Any]] = {
    "gemma3_text": {},
    "gemma2": {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "final_logit_softcapping": 3.0,
    },
}


def tiny_config(kind: str = "gemma3_text", words: int = 64, **changes: Any) -> Any:
    """The configuration of a tiny model, one of _KINDS."""
    from transformers import AutoConfig

    more = {"vocab_size_per_layer_input": words} if kind == "gemma3n_text" else {}
    return AutoConfig.for_model(kind, vocab_size=words, **(_SHAPE | _KINDS[kind] | more | changes))


def tiny_base(folder: Path, kind: str = "gemma3_text", **changes: Any) -> Path:
    """A folder with a tiny random model, and a tokenizer of letters."""
    from training.base import stay_offline

    stay_offline()
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    words = {word: number for number, word in enumerate([*special, *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(special)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", pad_token="<pad>")
    made.save_pretrained(folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(kind, len(words), **changes))
    model.save_pretrained(folder)
    return folder
