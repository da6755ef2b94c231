"""Makes a tiny model, a text, and `run.yaml`: two steps with DeepSpeed on two workers, in seconds.

    python tiny_run.py && raytune pretrain run.yaml

Tries an image, without a network, and with nothing but the installed package.
"""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = "Stages meet only through directories. 人民日报一九九八年一月一日。\n"

RUN = """\
run_dir: run
model: {path: model}
data: {sources: [{path: corpus.txt}], store_dir: store}
lora: {rank: 4}
batch: {sequence_tokens: 32, sequences_per_step: 4, micro_batch_sequences: 2}
engine: {strategy: deepspeed, zero_stage: 2, precision: fp32}
scale: {num_workers: 2}
logging: {every_steps: 1, tensorboard: false}
max_steps: 2
"""


def main() -> None:
    """Write the files into this folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained("model")
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained("model")
    Path("corpus.txt").write_text(TEXT * 100, encoding="utf-8")
    Path("run.yaml").write_text(RUN, encoding="utf-8")


if __name__ == "__main__":
    main()
