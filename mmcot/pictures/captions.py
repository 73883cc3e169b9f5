"""Pictures -> the caption column of a dataset, written once: `python -m mmcot.features DATASET --captions MODEL`.

A folder with `captions.json` (`{"captions": {id: text}}`, the original's form, so that it may lie in a ScienceQA
folder that has none) and `captions.jsonl`, a line a picture as it is captioned: a kill loses the batch in hand, and the
same command goes on. `train.py` and `mmcot.predict` take the former as `--captions`.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm

from mmcot.pictures.reading import decode, distinct_pictures
from mmcot.problems.digests import content_key
from mmcot.storage.files import read_json, resolved, write_json
from modeling_mmcot.captioning_mmcot import Captioner


def write_captions(
    problems: Dataset, folder: str | Path, model: str, prompt: str | None = None, batch_size: int = 8
) -> list[str]:
    """
    Caption the first picture of each problem; a picture that several show is captioned once.

    Returns:
        The pictures that could not be decoded, an error message each. The problems of all others have their caption.
    """
    folder = Path(folder)
    captioner = Captioner(model, prompt, "cuda" if torch.cuda.is_available() else "cpu")
    header = {"model": resolved(captioner.checkpoint), "prompt": captioner.prompt}
    log, result = folder / "captions.jsonl", folder / "captions.json"
    finished = read_finished(result, header)
    captions = read_log(log, header)
    todo = [picture for picture in distinct_pictures(problems, first_only=True) if picture[0] not in captions]
    failed: list[str] = []
    for start in tqdm(range(0, len(todo), batch_size), desc="captions", unit="batch"):
        decoded, errors = decode(todo[start : start + batch_size])
        failed.extend(errors)
        if decoded:
            written = dict(zip(decoded, captioner(list(decoded.values())), strict=True))
            with log.open("a") as file:
                file.write("".join(json.dumps({"picture": key, "caption": written[key]}) + "\n" for key in written))
            captions.update(written)
    rows = problems.select_columns(["id", "images"])
    keys = {row["id"]: content_key(row["images"][0]) for row in rows if row["images"]}
    by_id = {id_: captions[key] for id_, key in keys.items() if key in captions}
    write_json(result, {"captions": {**finished, **by_id}, **header})
    return failed


def read_finished(result: Path, header: dict[str, Any]) -> dict[str, str]:
    """The captions that an earlier call wrote by the same model, of other splits for one."""
    if not result.exists():
        return {}
    earlier = read_json(result)
    origin = {name: earlier.get(name) for name in header}
    if origin != header:
        raise ValueError(f"{result} holds captions of {origin}, not of {header}. Choose another --output.")
    return earlier["captions"]


def read_log(log: Path, header: dict[str, Any]) -> dict[str, str]:
    """The captions so far, by picture; the log's first line says by what they were written."""
    if not log.exists():
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(json.dumps(header) + "\n")
        return {}
    content = log.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    try:
        first, *entries = [json.loads(line) for line in whole.splitlines()] or [header]
        captions = {entry["picture"]: entry["caption"] for entry in entries}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{log}: not a log of captions ({error!r}). Choose another --output.") from error
    if first != header or (not whole and not json.dumps(header).encode().startswith(content)):
        raise ValueError(f"{log} holds captions of {first}, not of {header}. Choose another --output.")
    # What a killed run left of a line is taken away.
    os.truncate(log, len(whole))
    if not whole:
        log.write_text(json.dumps(header) + "\n")
    return captions
