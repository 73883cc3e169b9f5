"""Call one loaded pipeline from several threads: measure problems per second and the cost of its locks.

    python -m benchmarks.threads RUN [--count 96]

RUN is a finished run of the demonstration. Each call answers one of its test problems, with two kinds of systems: the
run's full models, and adapters with random weights on its answer stage's model, with texts limited to 64 tokens.
Threads are compared with the same number of processes, each with its own pipeline, and with one or two torch threads.
Results are medians of 3. Prints a JSON object.
"""

import argparse
import statistics
import tempfile
import time
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tqdm.auto import tqdm

from benchmarks.bulk import problems
from benchmarks.setting import report
from modeling_mmcot import MMCoTForConditionalGeneration, MMCoTProcessor, MultimodalCoTPipeline

REPEATS = 3
CALLERS = (1, 2, 4)
PIPE: MultimodalCoTPipeline


def load(folder: str, torch_threads: int, all_loaded: Barrier | None = None) -> None:
    """Load the pipeline in this process, for later calls of `call`."""
    global PIPE
    torch.set_num_threads(torch_threads)
    model = MMCoTForConditionalGeneration.from_pretrained(folder)
    PIPE = MultimodalCoTPipeline(model=model, processor=MMCoTProcessor.from_pretrained(folder), check=False)
    if all_loaded is not None:
        all_loaded.wait()


def call(problem: dict) -> str:
    return PIPE(problem)["rationale"]


def with_adapters(hub: Path, folder: Path) -> str:
    """Save the answer stage's model as a base, an adapter for each stage, and the run's processor."""
    base = MMCoTForConditionalGeneration.from_pretrained(hub)
    processor = MMCoTProcessor.from_pretrained(hub)
    base.config.stage_adapters = [stage.name for stage in processor.stages]
    base.save_pretrained(folder)
    processor.save_pretrained(folder)
    for stage in processor.stages:
        model = MMCoTForConditionalGeneration.from_pretrained(folder)
        config = LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"], init_lora_weights=False)
        get_peft_model(model, config).save_pretrained(folder / stage.name)
        model.generation_config.max_new_tokens = 64
        model.generation_config.save_pretrained(folder / stage.name)
    return str(folder)


def speed(executor: Executor, problem_list: list[dict]) -> tuple[float, list[str]]:
    """Return problems per second, and the rationales."""
    list(executor.map(call, problem_list[:16]))  # processes start on first use, and wait for each other
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        rationales = list(executor.map(call, problem_list))
        seconds.append(time.perf_counter() - start)
    return round(len(problem_list) / statistics.median(seconds), 1), rationales


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--count", type=int, default=96)
    arguments = parser.parse_args()
    problem_list = list(problems(arguments.count))
    result: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as temporary:
        systems = {
            "full models": str(arguments.run / "hub"),
            "adapters": with_adapters(arguments.run / "hub", Path(temporary) / "adapters"),
        }
        cases = [(name, torch_threads, callers) for name in systems for torch_threads in (1, 2) for callers in CALLERS]
        for name, torch_threads, callers in tqdm(cases):
            load(systems[name], torch_threads)
            expected = [call(problem) for problem in problem_list]
            with ThreadPoolExecutor(callers) as executor:
                by_threads, rationales = speed(executor, problem_list)
            spawn = get_context("spawn")
            initargs = (systems[name], torch_threads, spawn.Barrier(callers))
            with ProcessPoolExecutor(callers, mp_context=spawn, initializer=load, initargs=initargs) as executor:
                by_processes, _ = speed(executor, problem_list)
            result[f"{name}, torch's threads: {torch_threads}, callers: {callers}"] = {
                "problems per second": {"threads": by_threads, "processes": by_processes},
                "same rationales": sum(map(str.__eq__, expected, rationales)),
            }
    report("threads", result, None)


if __name__ == "__main__":
    main()
