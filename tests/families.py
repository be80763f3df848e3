"""Tiny random models of the families that rlpost supports, as ordinary checkpoint folders.

`make(family, folder)` writes config, safetensors, a byte-level BPE tokenizer and a chat template.
The models are small enough for unit tests and shaped for vLLM: head sizes are 64 (its kernels
refuse less for linear attention), the hybrid has three Gated DeltaNet layers to one of full
attention, Gemma slides over a window that is shorter than the test sequences, and Qwen and Gemma
tie the head to the embedding.
"""

from pathlib import Path

import torch
import transformers

FAMILIES = ("qwen2", "qwen3", "llama", "gemma3", "qwen3_5")

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 384
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,  # wide enough that log-probabilities differ from token to token
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)


def configuration(family: str) -> transformers.PretrainedConfig:
    """The config of a tiny model; raises KeyError for an unknown family."""
    return {
        "qwen2": lambda: transformers.Qwen2Config(
            **{**SHAPE, "hidden_size": 128}, num_hidden_layers=2, tie_word_embeddings=True
        ),
        "qwen3": lambda: transformers.Qwen3Config(
            **SHAPE, num_hidden_layers=2, head_dim=64, tie_word_embeddings=True
        ),
        "llama": lambda: transformers.LlamaConfig(
            **SHAPE, num_hidden_layers=2, head_dim=64, tie_word_embeddings=False
        ),
        "gemma3": lambda: transformers.Gemma3TextConfig(
            **SHAPE,
            num_hidden_layers=2,
            head_dim=64,
            query_pre_attn_scalar=64,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"],
        ),
        "qwen3_5": lambda: transformers.Qwen3_5TextConfig(
            **SHAPE,
            num_hidden_layers=4,
            head_dim=64,
            linear_key_head_dim=64,
            linear_value_head_dim=64,
            linear_num_key_heads=1,
            linear_num_value_heads=2,
            layer_types=["linear_attention"] * 3 + ["full_attention"],
            tie_word_embeddings=True,
        ),
    }[family]()


def make(family: str, folder: str | Path, *, seed: int = 0) -> Path:
    """Writes a random fp32 model of `family` with its tokenizer into `folder`, which is
    returned."""
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(
            configuration(family), dtype=torch.float32
        )
        with torch.no_grad():  # norms of one would hide a norm that is not published
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = [2, 0]
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def vision_language(folder: str | Path, *, seed: int = 0) -> Path:
    """Writes a random vision-language Qwen3.5: the class that its real checkpoints name."""
    vision = transformers.models.qwen3_5.Qwen3_5VisionConfig(
        depth=1,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        out_hidden_size=SHAPE["hidden_size"],
        num_position_embeddings=16,
    )
    config = transformers.Qwen3_5Config(
        text_config=configuration("qwen3_5").to_dict(),
        vision_config=vision.to_dict(),
        image_token_id=380,
        video_token_id=381,
        vision_start_token_id=382,
        vision_end_token_id=383,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return Path(folder)


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of VOCABULARY tokens that ends a turn with `<|im_end|>` (id 2)."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    text = (
        'user assistant system\n{"company": "ACME SDN BHD", "date": "01/02/2018", "address": "12, '
        'JALAN TUN RAZAK", "total": "12.90"}\nExtract these fields from the receipt as one JSON '
        "object with the keys company, date, address, total. Copy the text as printed."
    )
    bpe.train_from_iterator([text] * 20, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    )
