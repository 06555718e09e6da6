# SPDX-License-Identifier: Apache-2.0
"""Run the demonstration and the evaluation of the bundled model, and write what they found into
README.md: `python benchmarks/demo_results.py`.
"""

import re
import shutil
import tempfile
from pathlib import Path

from jqx_interop import EvalSettings, evaluate
from jqx_interop.checkpoints import BUNDLED, bundled_model
from jqx_interop.demo import Demo, run_demo

ROOT = Path(__file__).resolve().parents[1]
PICTURE = Path("docs/bits_against_kl.png")


def table(done: Demo) -> str:
    """The rows of the demonstration in Markdown, and its picture."""
    lines = [
        "| recipe | bits per weight | size | perplexity | KL | top-1 |",
        "| --- | --- | --- | --- | --- | --- |",
        f"| none | 16.00 | {done.size / 1e6:.2f} MB | {done.perplexity:.2f} | | |",
    ]
    lines += [
        f"| `{row.recipe}` | {row.bits:.2f} | {row.size / 1e6:.2f} MB | {row.perplexity:.2f} "
        f"| {row.kl:.4f} ± {row.kl_se:.4f} | {row.top1:.1%} |"
        for row in done.rows
    ]
    return "\n".join([*lines, "", f"![KL against bits per weight, a point a recipe]({PICTURE})"])


def sentence() -> str:
    """How well the bundled model predicts, beside a bigram model."""
    whole = evaluate(BUNDLED, settings=EvalSettings(compute="float32"))
    card = (bundled_model() / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| .* \| [\d,]+ \| ([\d.]+) \| ([\d.]+) \|$", card, re.MULTILINE)
    (wiki, wiki_pairs), (papers, papers_pairs) = rows
    return (
        f"On the whole evaluation text, which it has not seen, it has a perplexity of "
        f"{whole.perplexity:.1f} a token (`jqx eval bundled`).\nOn all held-out Wikipedia articles "
        f"it has {wiki}, where a bigram model of the same tokens has {wiki_pairs}; on held-out "
        f"papers\n{papers}, where the bigram model has {papers_pairs}."
    )


def put(text: str, mark: str, content: str) -> str:
    """`text` with `content` between `<!-- mark -->` and the next `<!-- end -->`."""
    pattern = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- end -->)", re.DOTALL)
    assert len(pattern.findall(text)) == 1
    return pattern.sub(lambda m: f"{m[1]}{content}\n{m[2]}", text)


def main() -> None:
    """Run both and write README.md and the picture."""
    readme = ROOT / "README.md"
    with tempfile.TemporaryDirectory() as folder:
        done = run_demo(Path(folder) / "demo")
        (ROOT / PICTURE).parent.mkdir(exist_ok=True)
        shutil.copyfile(done.picture, ROOT / PICTURE)
    text = put(readme.read_text("utf-8"), "demo", table(done))
    readme.write_text(put(text, "perplexity", sentence()), "utf-8")
    print(f"{done.seconds:.0f} s for the demonstration")


if __name__ == "__main__":
    main()
