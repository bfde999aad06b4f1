"""The part of a LLaVA that the vision encoder runs: tower, feature selection, projector."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForImageTextToText
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from llava_triton.checkpoint.families import Config, family_of
from llava_triton.checkpoint.weights import CheckpointError, CheckpointWeights

PATCHES = "vision_tower.embeddings.patch_embedding.weight"
"""Canonical name of the weights that make features of a patch: [..., P, P]."""


class VisionEncoder(nn.Module):
    """Pixel values of tiles to the image features that a LLaVA makes its image tokens of.

    The same computation as in transformers' `get_image_features` of every family, before a
    family arranges the tiles of a picture. All of them have LLaVA's projector.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.vision_tower = AutoModel.from_config(config.vision_config, trust_remote_code=False)
        self.multi_modal_projector = LlavaMultiModalProjector(config)  # type: ignore[arg-type]
        layers = config.vision_feature_layer
        self._layers: list[int] = [layers] if isinstance(layers, int) else list(layers)
        self._drops_class_token = config.vision_feature_select_strategy == "default"
        self._pooler = family_of(config).pooler()

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encode tiles.

        Args:
            pixel_values: float32 [N, 3, H, W], normalized by the checkpoint's image processor.

        Returns:
            float32 [N, T, D]: T tokens a tile, D the language model's hidden size. Where the
            family has a pooler, the last of the T are those that a video's frame has.
        """
        hidden_states = self.vision_tower(pixel_values, output_hidden_states=True).hidden_states
        selected = [hidden_states[layer] for layer in self._layers]
        if self._drops_class_token:
            selected = [states[:, 1:] for states in selected]
        whole = torch.cat(selected, dim=-1)
        if self._pooler is not None:
            whole = torch.cat([whole, self._pooler(whole)], dim=1)
        features: torch.Tensor = self.multi_modal_projector(whole)
        return features


def load_vision_encoder(config: Config, weights: CheckpointWeights) -> VisionEncoder:
    """The vision encoder of a checkpoint, in float32 and eval mode; its language model is not read.

    Raises:
        CheckpointError: a weight of the checkpoint, wherever, is missing, unexpected or of the
            wrong shape.
    """
    checked_skeleton(config, weights)
    encoder = VisionEncoder(config)
    encoder.load_state_dict(weights.load(encoder.state_dict()), assign=True)
    return encoder.eval().requires_grad_(False)


def checked_skeleton(config: Config, weights: CheckpointWeights) -> Any:
    """transformers' model of a checkpoint on the device "meta": all but its weights.

    Raises:
        CheckpointError: a weight of the checkpoint is missing, unexpected or of the wrong shape.
            transformers would fill it with random numbers and go on, which is how a vision tower
            saved under another release's names turns into noise.
    """
    _check_patches(config, weights)
    with torch.device("meta"):
        whole = AutoModelForImageTextToText.from_config(config).eval()
    text = config.get_text_config()
    tied = ["lm_head.weight"] if text.tie_word_embeddings or config.tie_word_embeddings else []
    weights.check({name: tuple(each.shape) for name, each in whole.state_dict().items()}, tied)
    return whole


def load_newline(weights: CheckpointWeights) -> torch.Tensor | None:
    """What stands behind a line of tiles, float32 [D]; None: the checkpoint has none such."""
    name = "image_newline"
    return weights.load([name])[name] if name in weights else None


def _check_patches(config: Config, weights: CheckpointWeights) -> None:
    stored, configured = weights.shape(PATCHES), int(config.vision_config.patch_size)
    if stored is not None and stored[-1] != configured:
        raise CheckpointError(
            f"the vision tower's weights in {weights.directory} are for patches of {stored[-1]} "
            f"pixels a side and config.json has {configured}, which is transformers' default where "
            f'it is missing; set "patch_size": {stored[-1]} in its vision_config'
        )


def features_shape(config: Config, image_side: int) -> tuple[int, int]:
    """Features of one tile: [T, D]; T tokens, D the language model's hidden size.

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
