"""The part of a LLaVA that the vision encoder runs: tower, feature selection, projector."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModel, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from llava_triton.checkpoint.weights import CONFIG, CheckpointError, CheckpointWeights


class VisionEncoder(nn.Module):
    """Pixel values to the image features that a LLaVA puts in place of its image tokens.

    The same computation as transformers' `LlavaModel.get_image_features`, stacked into one tensor.
    """

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.vision_tower = AutoModel.from_config(config.vision_config, trust_remote_code=False)
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        layers = config.vision_feature_layer
        self._layers: list[int] = [layers] if isinstance(layers, int) else list(layers)
        self._drops_class_token = config.vision_feature_select_strategy == "default"

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encode pictures.

        Args:
            pixel_values: float32 [N, 3, H, W], normalized by the checkpoint's image processor.

        Returns:
            float32 [N, T, D]: T tokens a picture, D the language model's hidden size.
        """
        hidden_states = self.vision_tower(pixel_values, output_hidden_states=True).hidden_states
        selected = [hidden_states[layer] for layer in self._layers]
        if self._drops_class_token:
            selected = [states[:, 1:] for states in selected]
        features: torch.Tensor = self.multi_modal_projector(torch.cat(selected, dim=-1))
        return features


def load_vision_encoder(config: LlavaConfig, weights: CheckpointWeights) -> VisionEncoder:
    """The vision encoder of a checkpoint, in float32 and eval mode; its language model is not read.

    Raises:
        CheckpointError: a weight of the checkpoint, wherever, is missing, unexpected or of the
            wrong shape.
    """
    with torch.device("meta"):
        whole = LlavaForConditionalGeneration(config)
    tied = ["lm_head.weight"] if config.text_config.tie_word_embeddings else []
    weights.check({name: tuple(each.shape) for name, each in whole.state_dict().items()}, tied)
    encoder = VisionEncoder(config)
    encoder.load_state_dict(weights.load(encoder.state_dict()), assign=True)
    return encoder.eval().requires_grad_(False)


def features_shape(config: LlavaConfig, image_side: int) -> tuple[int, int]:
    """Features of one picture: [T, D]; T tokens, D the language model's hidden size.

    Raises:
        CheckpointError: the tower does not take pictures of `image_side` pixels a side, which is
            what the checkpoint's image processor makes.
    """
    with torch.device("meta"):
        try:
            features = VisionEncoder(config)(torch.empty(1, 3, image_side, image_side))
        except ValueError as error:
            raise CheckpointError(
                f"the checkpoint's image processor and its vision tower do not fit: {error}"
            ) from error
    return features.shape[1], features.shape[2]


def llava_config(directory: Path) -> LlavaConfig:
    """The configuration of a LLaVA-1.5-family checkpoint.

    Raises:
        CheckpointError: `config.json` is missing, unreadable, or another model's.
    """
    try:
        kind = json.loads((directory / CONFIG).read_text()).get("model_type")
        if kind != "llava":
            raise CheckpointError(
                f"{directory} is a checkpoint of type {kind!r}; "
                "give one of the LLaVA-1.5 family, whose config.json has model_type 'llava'"
            )
        return LlavaConfig.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory / CONFIG} cannot be read: {error}") from error
