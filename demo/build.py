"""The untrained parts of the demo checkpoint: tokenizer, chat template, processor and model."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

# The Pillow image processor: the other one needs torchvision.
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from demo.conversations import random_conversation

IMAGE_SIDE = 96
PATCH_SIDE = 16
# An upper limit: the generated language runs out of merges before.
VOCABULARY = 800
WIDTH = 128
LAYERS = 4
HEADS = 4
POSITIONS = 1024
SPECIAL_TOKENS = ("<s>", "</s>", "<pad>", "<unk>", "<image>")

# LLaVA-1.5's, with the end-of-sequence token after every answer as it was trained with.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- 'USER: ' -}}
{%- elif message['role'] == 'assistant' -%}
{{- 'ASSISTANT: ' -}}
{%- else -%}
{{- raise_exception('The roles are user and assistant, not ' + message['role'] + '.') -}}
{%- endif -%}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] if part['type'] == 'image' -%}
{{- '<image>\\n' -}}
{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}
{{- part['text'] -}}
{%- endfor -%}
{%- endif -%}
{{- ' ' if message['role'] == 'user' else '</s>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- 'ASSISTANT:' -}}
{%- endif -%}
"""


def _corpus(conversations: int) -> Iterator[str]:
    for seed in range(conversations):
        turns = random_conversation(random.Random(f"tokenizer {seed}"), 9).turns
        for turn in turns:
            yield f"USER: {turn.question} ASSISTANT: {turn.answer}"
            yield f"\n{turn.question} ASSISTANT:"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer for the demo's language; it can encode any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[
            AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS
        ],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(4000), trainer)
    start = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", start)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def build_processor() -> LlavaProcessor:
    """Tokenizer, image processor and chat template as one."""
    side = {"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIDE}, crop_size=side)
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(),
        patch_size=PATCH_SIDE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    )


def write_processor(processor: LlavaProcessor, directory: Path) -> None:
    """Write the files that ``AutoProcessor`` and ``AutoTokenizer`` read."""
    processor.save_pretrained(directory)
    file = directory / "tokenizer_config.json"
    config = json.loads(file.read_text())
    # The name that every release knows; transformers 5 writes one of its own.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["extra_special_tokens"] = {"image_token": "<image>"}
    file.write_text(json.dumps(config, indent=2) + "\n")


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """The model with random weights."""
    token = tokenizer.convert_tokens_to_ids
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        # The tower's last layer is not used, as in LLaVA-1.5.
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=IMAGE_SIDE,
        patch_size=PATCH_SIDE,
        projection_dim=WIDTH,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=POSITIONS,
        bos_token_id=token("<s>"),
        eos_token_id=token("</s>"),
        pad_token_id=token("<pad>"),
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=token("<image>"),
        image_seq_length=(IMAGE_SIDE // PATCH_SIDE) ** 2,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    # CLIP starts with places too faint to be told apart beside the patches' contents.
    nn.init.normal_(model.model.vision_tower.embeddings.position_embedding.weight, std=0.4)
    model.generation_config.bos_token_id = text.bos_token_id
    model.generation_config.eos_token_id = text.eos_token_id
    model.generation_config.pad_token_id = text.pad_token_id
    return model
