"""Look inside a model: where on the picture each token looked, and what an answer depends on.

python -m examples.look_inside [MODEL] [OUTPUT.png]

MODEL is a folder in the Hub's layout or a Hub id with a picture tower; by default the one that `examples/fine_tune.py`
leaves. The first part draws the attention of the fusion over the picture. The second part asks the same question
without the picture, and with a rationale that names another choice. `python -m mmcot.probes` does this for a split.
"""

import sys
from pathlib import Path

import matplotlib
from PIL import Image
from transformers import pipeline

matplotlib.use("Agg")
from matplotlib import pyplot

PICTURE = Path(__file__).parents[1] / "space" / "examples" / "bar_chart.png"


def draw_maps(picture: Image.Image, tokens: list[str], maps, output: str) -> None:
    """One panel a token: the picture, and over it the attention to each patch."""
    columns = 8
    rows = -(-len(tokens) // columns)
    figure, panels = pyplot.subplots(rows, columns, figsize=(1.6 * columns, 1.8 * rows), squeeze=False)
    for panel in panels.flat:
        panel.axis("off")
    for panel, token, weights in zip(panels.flat, tokens, maps, strict=False):
        panel.imshow(picture, extent=(0, 1, 0, 1))
        panel.imshow(weights, extent=(0, 1, 0, 1), cmap="hot", alpha=0.5)
        panel.set_title(token, fontsize=8)
    figure.savefig(output, bbox_inches="tight")


if __name__ == "__main__":
    model = sys.argv[1] if len(sys.argv) > 1 else "runs/own_data/hub"
    output = sys.argv[2] if len(sys.argv) > 2 else "attention.png"
    answer = pipeline("multimodal-cot", model=model, trust_remote_code=True)
    picture = Image.open(PICTURE).convert("RGB")
    problem = {"image": picture, "question": "Which bar is the tallest?", "choices": ["red", "green", "black"]}

    first = answer.processor.stages[0].name
    seen = answer.token_maps(problem, first)
    draw_maps(picture, seen.tokens, seen.maps[0].numpy(), output)
    print(f"where each token of the {first} stage looked: {output}")

    other = {"rationale": "Solution: The black bar is the tallest. So, it is black."}
    for name, result in {
        "as it is": answer(problem),
        "without the picture": answer({**problem, "image": None}),
        "another rationale": answer(problem, given=other),
    }.items():
        pairs = zip(problem["choices"], result["scores"], strict=True)
        scores = ", ".join(f"{choice} {score:.2f}" for choice, score in pairs)
        print(f"{name:>20}: {result['answer']:6} ({scores})  {result['rationale']}")
