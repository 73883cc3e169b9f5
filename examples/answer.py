"""Ask a model about a picture: rationale, answer and the probability of each choice.

python -m examples.answer [MODEL] [PICTURE] [QUESTION] [CHOICE …]

MODEL is a folder in the Hub's layout or a Hub id. The default is the model that `examples/fine_tune.py` trains, whose
answers are near chance; `make demo` trains a model that reads these charts (`runs/demo/hub`).
"""

import sys
from pathlib import Path

from transformers import pipeline

PICTURE = str(Path(__file__).parents[1] / "space" / "examples" / "bar_chart.png")
DEFAULTS = ["runs/own_data/hub", PICTURE, "Which bar is the tallest?", "red", "green", "black"]

if __name__ == "__main__":
    given = sys.argv[1:]
    model, picture, question, *choices = given + DEFAULTS[len(given) :] if len(given) < 4 else given
    # trust_remote_code runs the Python files of the model's repository: see docs/security.md.
    answer = pipeline("multimodal-cot", model=model, trust_remote_code=True)
    result = answer({"image": picture, "question": question, "choices": choices})
    print("rationale:", result.get("rationale", "(this model writes no rationale)"))
    print("answer:   ", result["answer"])
    for choice, probability in zip(choices, result["scores"], strict=True):
        print(f"  {100 * probability:5.1f} %  {choice}")
