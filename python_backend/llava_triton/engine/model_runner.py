"""The language model on its device: tokens and image features in, logits and keys/values out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from llava_triton.checkpoint import Checkpoint

SMALL_MODEL_PARAMETERS = 30_000_000


class KeyValues:
    """Keys and values of one session's tokens, for every layer, on the model's device."""

    def __init__(self) -> None:
        # Built without a model config on purpose: every layer then keeps all its tokens, also in
        # models with a sliding window (the mask does the sliding), so that any tail can be cut.
        self.cache = DynamicCache()

    def __len__(self) -> int:
        return int(self.cache.get_seq_length())

    def truncate(self, length: int) -> None:
        """Forget every token from position `length` on."""
        if length == 0:
            self.cache = DynamicCache()
            return
        for layer in self.cache.layers:
            if layer.is_initialized:
                layer.keys = layer.keys[..., :length, :]
                layer.values = layer.values[..., :length, :]


class ModelRunner:
    """Runs a LLaVA checkpoint's text model; the vision tower is not kept.

    Args:
        checkpoint: loaded on the device and in the dtype it is to run in.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        model = checkpoint.model
        config = model.config
        text_config = config.get_text_config()
        self._text_model = model.model.language_model
        self._lm_head = model.lm_head
        self._embed = self._text_model.get_input_embeddings()
        self.image_token_id = int(config.image_token_id)
        self.tokens_per_image = _tokens_per_image(config)
        self.context_length = int(text_config.max_position_embeddings)
        self.eos_token_ids = _eos_token_ids(model, checkpoint.tokenizer)
        # What is left refers to the text model only: the vision tower's memory goes free.
        model.model.vision_tower = None
        model.model.multi_modal_projector = None

    @property
    def device(self) -> torch.device:
        """Where features, keys and values live."""
        return torch.device(self._embed.weight.device)

    @property
    def hidden_size(self) -> int:
        """Width `D` of an image feature and of a token's embedding."""
        return int(self._embed.weight.shape[1])

    def features_on_device(self, features: Tensor) -> Tensor:
        """Image features [N, T, D] of any float dtype -> [N * T, D] as the model computes."""
        return features.to(self.device, self._embed.weight.dtype).flatten(0, 1)

    @torch.inference_mode()
    def forward(self, key_values: KeyValues, ids: Sequence[int], features: Tensor | None) -> Tensor:
        """Compute `ids` behind the tokens already in `key_values`, which grows by them.

        Args:
            key_values: the session's memory.
            ids: n >= 1 token IDs, image placeholders among them.
            features: [number of placeholders in `ids`, D], in their order; None where there are
                none.

        Returns:
            Logits [V] of the token after the last one, float32. The image placeholder's is -inf:
            spoken by the model it would stand for a picture that does not exist.
        """
        id_tensor = torch.tensor(ids, device=self.device)
        is_image = id_tensor == self.image_token_id
        embeddings = self._embed(id_tensor.masked_fill(is_image, 0))
        if features is not None:
            embeddings[is_image] = features
        output = self._text_model(
            inputs_embeds=embeddings[None], past_key_values=key_values.cache, use_cache=True
        )
        logits: Tensor = self._lm_head(output.last_hidden_state[0, -1]).float()
        logits[self.image_token_id] = -torch.inf
        return logits


def cpu_threads(model: Any) -> int:
    """Threads worth having for a model on the CPU, of those torch would take.

    A small model's layers are computed by one before a second one has woken up.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return 1 if parameters < SMALL_MODEL_PARAMETERS else torch.get_num_threads()


def _tokens_per_image(config: Any) -> int:
    """T, from the vision tower's geometry and the way features are selected."""
    vision = config.vision_config
    patches = (int(vision.image_size) // int(vision.patch_size)) ** 2
    return patches if config.vision_feature_select_strategy == "default" else patches + 1


def _eos_token_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends an answer, as transformers' `generate` would see it."""
    eos = model.generation_config.eos_token_id
    if eos is None:
        eos = tokenizer.eos_token_id
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)
