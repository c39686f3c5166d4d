"""From a folder of code reviews to a log that ``env.name: recorded`` reads, and the folder itself, made by rule.

    python examples/code_reviews.py make reviews           # 1024 reviews: a change request, a submission, a comment
    python examples/code_reviews.py log reviews log.jsonl  # the folder as records
    python examples/code_reviews.py log reviews shuffled.jsonl --shuffled     # the control: comments of other reviews
    vpd train --config examples/code_reviews.yaml --env.path log.jsonl --run.output_dir reviewed

The language is that of the shipped tiny base: a request names a rule by its letter, a submission is what the base wrote
for it, and the reviewer says which operation the letter stands for.  Nobody grades a submission.
"""

import argparse
import json
import random
from pathlib import Path

import vpd
from vpd.envs.digits import Digits

FIELDS = ("request", "submission", "review")


def make(folder: Path, count: int, seed: int) -> None:
    """Let the base write submissions, and a reviewer who knows the rules comment on each; one file a review."""
    folder.mkdir(parents=True)
    sampled = folder / "sampled.jsonl"
    vpd.collect(
        sampled,
        "tiny",
        env=Digits(),
        options={"tasks": count, "outcome": False},
        rollout={"num_generations": 1, "prompts_per_step": 256},
        run={"seed": 1000 + seed},
    )
    for number, line in enumerate(sampled.read_text().splitlines()):
        row = json.loads(line)
        review = row["feedback"] or "right"
        texts = (row["messages"][-1]["content"], row["completion"], review)
        text = "".join(f"{name}: {value}\n" for name, value in zip(FIELDS, texts, strict=True))
        (folder / f"{number:05d}.txt").write_text(text)
    sampled.unlink()


def read(path: Path) -> dict[str, str]:
    """One review."""
    return dict(line.split(": ", 1) for line in path.read_text().splitlines())


def log(folder: Path, path: Path, *, shuffled: bool, seed: int) -> None:
    """The reviews as records without outcomes; ``shuffled`` gives each submission the comment of another."""
    reviews = [read(file) for file in sorted(folder.glob("*.txt"))]
    comments = [review["review"] for review in reviews]
    if shuffled:
        random.Random(seed).shuffle(comments)
    with path.open("w") as file:
        for review, comment in zip(reviews, comments, strict=True):
            record = {"prompt": review["request"], "completion": review["submission"], "feedback": comment}
            file.write(json.dumps(record) + "\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("make", "log"):
        command = commands.add_parser(name)
        command.add_argument("folder", type=Path)
        command.add_argument("--seed", type=int, default=0)
        if name == "make":
            command.add_argument("--count", type=int, default=1024)
        else:
            command.add_argument("path", type=Path)
            command.add_argument("--shuffled", action="store_true")
    options = parser.parse_args()
    if options.command == "make":
        make(options.folder, options.count, options.seed)
    else:
        log(options.folder, options.path, shuffled=options.shuffled, seed=options.seed)


if __name__ == "__main__":
    main()
