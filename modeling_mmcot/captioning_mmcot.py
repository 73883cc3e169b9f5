"""Picture -> caption, by any image-text-to-text checkpoint of transformers.

Used where a recipe reads captions: by `MultimodalCoTPipeline` for a problem that comes without one, and by
`python -m mmcot.features --captions` for a dataset. It does not know problems or stages.
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
    """A captioner as somebody used it."""

    checkpoint: str
    prompt: str
    generation: dict


CAPTIONERS: dict[str, CaptionerPreset] = {
    # The authors' extract_caption.py, with the decoding that LAVIS gives it by default.
    "instructblip": CaptionerPreset(
        "Salesforce/instructblip-vicuna-7b",
        "Write a detailed description.",
        {"num_beams": 5, "repetition_penalty": 1.5, "max_new_tokens": 256},
    )
}
GENERATION = {"num_beams": 1, "max_new_tokens": 256}


class Captioner:
    """
    Args:
        model (`str`): a name in `CAPTIONERS`, a folder or a Hub id.
        prompt (`str`, *optional*): what the model is asked; by default the preset's, or nothing.
        device (`torch.device`, *optional*)

    Raises:
        ValueError: the checkpoint is not one that turns pictures into text.
    """

    def __init__(self, model: str, prompt: str | None = None, device: torch.device | str = "cpu"):
        preset = CAPTIONERS.get(model, CaptionerPreset(model, "", GENERATION))
        checkpoint = preset.checkpoint
        model_type = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False).model_type
        if model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            raise ValueError(
                f"{checkpoint} is of model_type {model_type!r}, which writes no text from a picture; expected a "
                f"checkpoint of AutoModelForImageTextToText."
            )
        self.checkpoint, self.prompt, self.generation = checkpoint, prompt or preset.prompt, preset.generation
        self.model: PreTrainedModel = (
            AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=False).to(device).eval()
        )
        self.processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=False)
        self.image_processor = None
        if not isinstance(self.processor, ProcessorMixin):  # a VisionEncoderDecoder has its parts side by side
            self.processor = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
            self.image_processor = AutoImageProcessor.from_pretrained(checkpoint, trust_remote_code=False)
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        tokenizer.padding_side = "left"  # what is generated goes on from the end of the prompt

    @torch.no_grad()
    def __call__(self, pictures: list[Image.Image]) -> list[str]:
        """A caption for each RGB picture, without sampling; white space folded."""
        inputs = self.prepare(pictures).to(self.model.device, self.model.dtype)
        tokens = self.model.generate(**inputs, do_sample=False, **self.generation)
        prompt = inputs.get("input_ids")
        if prompt is not None and torch.equal(tokens[:, : prompt.shape[1]], prompt):
            tokens = tokens[:, prompt.shape[1] :]
        texts = self.processor.batch_decode(tokens, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    def prepare(self, pictures: list[Image.Image]):
        if self.image_processor is not None:
            return self.image_processor(pictures, return_tensors="pt")
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": self.prompt or "Describe the picture."}]
            text = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
            # A list of pictures for each text, as chat models with several pictures take it.
            return self.processor(
                images=[[picture] for picture in pictures],
                text=[text] * len(pictures),
                padding=True,
                return_tensors="pt",
            )
        text = {"text": [self.prompt] * len(pictures), "padding": True} if self.prompt else {}
        return self.processor(images=pictures, return_tensors="pt", **text)
