"""The code that ships to the Hub. This file does not ship: it registers the classes with transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
)
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_mmcot import MMCoTConfig
from .modeling_mmcot import MMCoTForConditionalGeneration
from .pipeline_mmcot import MultimodalCoTPipeline
from .processing_mmcot import MMCoTProcessor

AutoConfig.register("mmcot", MMCoTConfig)
AutoProcessor.register(MMCoTConfig, MMCoTProcessor)
for auto_class in (AutoModel, AutoModelForSeq2SeqLM, AutoModelForImageTextToText):
    auto_class.register(MMCoTConfig, MMCoTForConditionalGeneration)
PIPELINE_REGISTRY.register_pipeline(
    "multimodal-cot", pipeline_class=MultimodalCoTPipeline, pt_model=AutoModelForSeq2SeqLM, type="multimodal"
)

__all__ = ["MMCoTConfig", "MMCoTForConditionalGeneration", "MMCoTProcessor", "MultimodalCoTPipeline"]
