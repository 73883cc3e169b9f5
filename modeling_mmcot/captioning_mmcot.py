"""Picture -> caption, with any image-text-to-text checkpoint of transformers.

A stage can read captions: `MultimodalCoTPipeline` computes them for problems without a caption, and
`python -m mmcot.features --captions` for a whole dataset. This file does not depend on problems or stages.
"""

from dataclasses import dataclass

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


@dataclass(frozen=True)
class CaptionerPreset:
    """A published captioning setup: checkpoint, prompt and settings of `generate`."""

    checkpoint: str
    prompt: str
    generation: dict


CAPTIONERS: dict[str, CaptionerPreset] = {
    # The authors' extract_caption.py, with the default decoding of LAVIS.
    "instructblip": CaptionerPreset(
        "Salesforce/instructblip-vicuna-7b",
        "Write a detailed description.",
        {"num_beams": 5, "repetition_penalty": 1.5, "max_new_tokens": 256},
    )
}
GENERATION = {"num_beams": 1, "max_new_tokens": 256}


class Captioner:
    """
    Captions RGB pictures.

    Args:
        model (`str`):
            A name in `CAPTIONERS`, a folder or a Hub id.
        prompt (`str`, *optional*):
            The prompt for the model. Defaults to the prompt of the preset, or to none.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`):
            The device of the model.

    Raises:
        ValueError: If the checkpoint is not an image-text-to-text model.
    """

    def __init__(self, model: str, prompt: str | None = None, device: torch.device | str = "cpu"):
        preset = CAPTIONERS.get(model, CaptionerPreset(model, "", GENERATION))
        checkpoint = preset.checkpoint
        model_type = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False).model_type
        if model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            raise ValueError(
                f"{checkpoint} has model_type {model_type!r}, which does not generate text from pictures; expected a "
                f"checkpoint of AutoModelForImageTextToText."
            )
        self.checkpoint, self.prompt, self.generation = checkpoint, prompt or preset.prompt, preset.generation
        self.model: PreTrainedModel = (
            AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=False).to(device).eval()
        )
        self.processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=False)
        self.image_processor = None
        if not isinstance(self.processor, ProcessorMixin):  # VisionEncoderDecoder has no processor of its own
            self.processor = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
            self.image_processor = AutoImageProcessor.from_pretrained(checkpoint, trust_remote_code=False)
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        tokenizer.padding_side = "left"  # generation continues from the end of the prompt

    @torch.no_grad()
    def __call__(self, pictures: list[Image.Image]) -> list[str]:
        """Return a caption for each RGB picture, without sampling and with white space folded."""
        inputs = self.prepare(pictures).to(self.model.device, self.model.dtype)
        tokens = self.model.generate(**inputs, do_sample=False, **self.generation)
        prompt = inputs.get("input_ids")
        if prompt is not None and torch.equal(tokens[:, : prompt.shape[1]], prompt):
            tokens = tokens[:, prompt.shape[1] :]
        texts = self.processor.batch_decode(tokens, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    def prepare(self, pictures: list[Image.Image]):
        """Return the model's inputs for the pictures and the prompt."""
        if self.image_processor is not None:
            return self.image_processor(pictures, return_tensors="pt")
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": self.prompt or "Describe the picture."}]
            text = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
            # One list of pictures per text, the format of chat models that accept several pictures.
            return self.processor(
                images=[[picture] for picture in pictures],
                text=[text] * len(pictures),
                padding=True,
                return_tensors="pt",
            )
        text = {"text": [self.prompt] * len(pictures), "padding": True} if self.prompt else {}
        return self.processor(images=pictures, return_tensors="pt", **text)
