"""Predictions of the study's arms that `train.py` does not make: one generation, other passages, a search by stage."""

import copy
from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from mmcot.prediction.passages import add_passages
from mmcot.prediction.predictor import PredictOptions, predict_stage
from mmcot.prediction.self_consistency import Drawing
from mmcot.prediction.system import load_system
from mmcot.storage.run_folder import RunFolder
from modeling_mmcot import MMCoTForConditionalGeneration, MMCoTProcessor
from modeling_mmcot.stage_mmcot import RETRIEVE, Stages
from studies.stage_arms import ONE_PASS, answer_in, passages_for

OPTIONS = PredictOptions(batch_size=100)
NUM_CANDIDATES = 4
Predictions = dict[str, dict[str, Any]]


def predict_one_pass(run: RunFolder, problems: Dataset) -> Predictions:
    """Predict with the only trained stage of a run, and read the answers in its texts."""
    folder = str(run.stage(ONE_PASS))
    processor = MMCoTProcessor.from_pretrained(folder, trust_remote_code=False)
    model = MMCoTForConditionalGeneration.from_pretrained(folder, trust_remote_code=False)
    predictions: Predictions = {problem_id: {} for problem_id in problems["id"]}
    stage = processor.stages.named(ONE_PASS)
    predict_stage(model, processor, stage, problems, predictions, OPTIONS)
    for row in problems.remove_columns("images"):
        columns = predictions[row["id"]]
        columns["answer"] = answer_in(columns[stage.writes], row["choices"])
    return predictions


def predict_with_passages(run: RunFolder, split: str, problems: Dataset, origin: str, dataset: str) -> Predictions:
    """Predict the stages after the retrieval again, with the passages of `passages_for`."""
    processor, models = load_system(str(run))
    (retrieval,) = processor.stages.retrieving
    kept = [stage.writes for stage in processor.stages.before(retrieval)]
    passages = passages_for(origin, problems, dataset, retrieval.num_passages)
    predictions = {
        problem_id: {name: columns[name] for name in kept} | {retrieval.writes: passages[problem_id]}
        for problem_id, columns in run.predictions_so_far(split).items()
    }
    return complete(processor, models, processor.stages.after(retrieval), problems, predictions)


def predict_with_search(run: RunFolder, problems: Dataset) -> Predictions:
    """
    Search by stage, as LLaVA-CoT does (Xu et al. 2024, arXiv 2411.10440, section 3.3): each stage samples
    `NUM_CANDIDATES` texts for each problem, and the search keeps the one after which the answering stage, with all
    stages between greedily, gives a choice the highest probability.
    """
    processor, models = load_system(str(run))
    predictions: Predictions = {problem_id: {} for problem_id in problems["id"]}
    for stage in processor.stages:
        if stage.kind == RETRIEVE or stage.answers:
            complete(processor, models, Stages([stage]), problems, predictions)
            continue
        candidates = []
        for sample in Drawing(NUM_CANDIDATES).samples():
            candidate = copy.deepcopy(predictions)
            predict_stage(models[stage.name], processor, stage, problems, candidate, OPTIONS, sample=sample)
            candidates.append(complete(processor, models, processor.stages.after(stage), problems, candidate))
        for problem_id, columns in predictions.items():
            best = max((candidate[problem_id] for candidate in candidates), key=lambda text: max(text["scores"]))
            columns[stage.writes] = best[stage.writes]
    return predictions


def complete(
    processor: MMCoTProcessor,
    models: Mapping[str, PreTrainedModel],
    stages: Stages,
    problems: Dataset,
    predictions: Predictions,
) -> Predictions:
    """Add the columns of the given stages to the predictions, and return them."""
    for stage in stages:
        if stage.kind == RETRIEVE:
            add_passages(predictions, processor, stage, problems)
        else:
            predict_stage(models[stage.name], processor, stage, problems, predictions, OPTIONS)
    return predictions
