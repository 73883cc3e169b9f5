"""Writes captions of a dataset's pictures: `python -m mmcot.features DATASET --captions MODEL`.

The output folder contains `captions.json` (`{"captions": {id: text}}`, the original's format, so that it can be added
to a ScienceQA folder without captions) and `captions.jsonl`, a log with a line for each picture. After a kill, the same
command resumes and repeats only the interrupted batch. `train.py` and `mmcot.predict` read `captions.json` by
`--captions`.
"""

import contextlib
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm

from mmcot.pictures.reading import decode, distinct_pictures
from mmcot.problems.digests import content_key
from mmcot.storage.files import read_json, resolve_path, write_json
from mmcot.storage.resumable_log import OtherHeader, ResumableLog
from modeling_mmcot.captioning_mmcot import Captioner


def write_captions(
    problems: Dataset, folder: str | Path, model: str, prompt: str | None = None, batch_size: int = 8
) -> list[str]:
    """
    Caption the first picture of each problem. A picture that several problems show is captioned once.

    Returns:
        An error message for each picture that could not be decoded. The problems of all other pictures have a caption.
    """
    folder = Path(folder)
    captioner = Captioner(model, prompt, "cuda" if torch.cuda.is_available() else "cpu")
    header = {"model": resolve_path(captioner.checkpoint), "prompt": captioner.prompt}
    result = folder / "captions.json"
    finished = read_finished(result, header)
    failed: list[str] = []
    with contextlib.closing(open_log(folder / "captions.jsonl", header)) as log:
        captions = {entry["picture"]: entry["caption"] for entry in log.entries}
        todo = [picture for picture in distinct_pictures(problems, first_only=True) if picture[0] not in captions]
        for start in tqdm(range(0, len(todo), batch_size), desc="captions", unit="batch"):
            decoded, errors = decode(todo[start : start + batch_size])
            failed.extend(errors)
            if decoded:
                written = dict(zip(decoded, captioner(list(decoded.values())), strict=True))
                log.append(*({"picture": key, "caption": caption} for key, caption in written.items()))
                captions.update(written)
    rows = problems.select_columns(["id", "images"])
    keys = {row["id"]: content_key(row["images"][0]) for row in rows if row["images"]}
    by_id = {id_: captions[key] for id_, key in keys.items() if key in captions}
    write_json(result, {"captions": {**finished, **by_id}, **header})
    return failed


def read_finished(result: Path, header: dict[str, Any]) -> dict[str, str]:
    """Return the captions that an earlier call wrote with the same model, for example for other splits."""
    if not result.exists():
        return {}
    earlier = read_json(result)
    origin = {name: earlier.get(name) for name in header}
    if origin != header:
        raise ValueError(f"{result} contains captions of {origin}, not of {header}. Choose another --output.")
    return earlier["captions"]


def open_log(file: Path, header: dict[str, Any]) -> ResumableLog:
    """Open the log of finished captions, a line for each picture; its header names the model that wrote them."""
    try:
        return ResumableLog(file, header)
    except OtherHeader as error:
        reason = f"{file} contains captions of {error.found}, not of {header}"
    except ValueError as error:
        reason = f"{error}: not a log of captions"
    raise ValueError(f"{reason}. Choose another --output.")
