"""Pictures -> the caption column of a dataset, written once: `python -m mmcot.features DATASET --captions MODEL`.

A folder with `captions.json` (`{"captions": {id: text}}`, the original's form, so that it may lie in a ScienceQA
folder) and `captions.jsonl`, a line a picture as it is captioned: a kill loses the batch in hand, and the same command
goes on. `train.py` and `mmcot.predict` take the former as `--captions`.
"""

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm

from mmcot.files import write_json
from mmcot.problems import content_key, distinct_pictures, read_picture
from modeling_mmcot.captioning_mmcot import Captioner
from modeling_mmcot.pictures_mmcot import as_rgb


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
    log = folder / "captions.jsonl"
    captions = read_log(log, {"model": captioner.checkpoint, "prompt": captioner.prompt})
    todo = [picture for picture in distinct_pictures(problems, first_only=True) if picture[0] not in captions]
    failed: list[str] = []
    for start in tqdm(range(0, len(todo), batch_size), desc="captions", unit="batch"):
        decoded = []
        for key, picture, problem_id in todo[start : start + batch_size]:
            try:
                decoded.append((key, as_rgb(read_picture(picture, problem_id))))
            except ValueError as error:
                failed.append(str(error))
        if decoded:
            texts = captioner([picture for _, picture in decoded])
            written = dict(zip([key for key, _ in decoded], texts, strict=True))
            with log.open("a") as file:
                file.write("".join(json.dumps({"picture": key, "caption": written[key]}) + "\n" for key in written))
            captions.update(written)
    rows = problems.select_columns(["id", "images"])
    keys = {row["id"]: content_key(row["images"][0]) for row in rows if row["images"]}
    by_id = {id_: captions[key] for id_, key in keys.items() if key in captions}
    write_json(folder / "captions.json", {"captions": by_id, "model": captioner.checkpoint, "prompt": captioner.prompt})
    return failed


def read_log(log: Path, header: dict[str, Any]) -> dict[str, str]:
    """The captions so far, by picture; the log's first line says by what they were written."""
    if not log.exists():
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(json.dumps(header) + "\n")
        return {}
    # What a killed run left of a line is taken away.
    lines = log.read_text().split("\n")[:-1]
    log.write_text("".join(f"{line}\n" for line in lines) or json.dumps(header) + "\n")
    try:
        first, *entries = [json.loads(line) for line in lines] or [header]
        captions = {entry["picture"]: entry["caption"] for entry in entries}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{log}: not a log of captions ({error!r}). Choose another --output.") from error
    if first != header:
        raise ValueError(f"{log} holds captions of {first}, not of {header}. Choose another --output.")
    return captions
