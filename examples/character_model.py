"""Flatness per token of a small causal language model: characters of a licence text, a minute of training.

The same measures hold for every position of a sequence: features (N, L, D), targets (N, L), padding ignored. A model of
four layers is trained on the text of flatcore's own LICENSE until it knows its phrases; then the tokens it is sure of are
flat, and those at the branching points (the first characters of words) carry the mean. This shows the mechanism; nothing
is claimed about large models.

    python examples/character_model.py            600 steps (a minute)
    python examples/character_model.py --quick    60 steps

Writes character_model.html (the report) and character_model.csv (a row per token), and prints the text with its sharpest
characters marked.
Exit status: 0 success, 1 failure, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    import torch
    from torch import Tensor, nn
    from tqdm import tqdm

    import flatcore
except ImportError as error:
    if __name__ != "__main__":
        raise
    sys.exit(
        f"character_model: {(error.name or 'a package').partition('.')[0]} cannot be imported ({error}); "
        "pip install -c constraints.txt '.[examples]' brings what this example needs."
    )

TEXT = Path(__file__).parents[1] / "LICENSE"
WIDTH, LENGTH, IGNORED = 128, 96, -100


class CharacterModel(nn.Module):
    """A causal transformer; its last layer, the head, maps features (N, L, 128) to logits (N, L, C)."""

    def __init__(self, characters: int):
        super().__init__()
        self.embedding = nn.Embedding(characters, WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 4, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, characters)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of each position's next character."""
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device)
        x = self.embedding(tokens) + self.places[:length]
        return self.head(self.body(x, mask=mask, is_causal=True))


def lines_of(text: str, alphabet: str) -> tuple[Tensor, Tensor]:
    """Lines as tokens (N, LENGTH), and targets: each position's next character, IGNORED beyond the line's end."""
    lines = [line.strip() for line in text.splitlines() if len(line.strip()) > 20]
    tokens = torch.zeros(len(lines), LENGTH, dtype=torch.int64)
    target = torch.full((len(lines), LENGTH), IGNORED)
    for row, line in enumerate(lines):
        codes = torch.tensor([alphabet.index(c) for c in line[: LENGTH + 1]])
        tokens[row, : len(codes) - 1], target[row, : len(codes) - 1] = codes[:-1], codes[1:]
    return tokens, target


def train(model: nn.Module, tokens: Tensor, target: Tensor, steps: int) -> float:
    """Train with Adam on random batches of 32 lines; return the last loss."""
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in tqdm(range(steps), desc="training", disable=None):
        rows = torch.randint(0, len(tokens), (32,))
        loss = nn.functional.cross_entropy(
            model(tokens[rows]).flatten(0, 1), target[rows].flatten(), ignore_index=IGNORED
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return loss.item()


def marked(report: flatcore.Report, tokens: Tensor, alphabet: str, row: int) -> tuple[str, str]:
    """One line of the text, and below it ^ under the sharpest tenth of its tokens."""
    here = report.rows["row"] == row
    logs, positions = report.rows["log_layerwise"][here], report.rows["position"][here]
    limit = sorted(logs)[-max(len(logs) // 10, 1)]
    text = "".join(alphabet[t] for t in tokens[row, : len(logs)]) + alphabet[int(report.rows["target"][here][-1])]
    marks = [" "] * len(text)
    for position, log in zip(positions, logs, strict=True):
        if log >= limit:
            marks[position + 1] = "^"  # the character that was to be foretold
    return text, "".join(marks)


def run(out: Path, steps: int, seed: int) -> None:
    """Train, measure every token, write the files into ``out`` and print what is sharp.

    Raises:
        OSError: the text cannot be read, or ``out`` or a file in it cannot be written.
    """
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    text = TEXT.read_text(encoding="utf-8")
    alphabet = "".join(sorted(set(text)))
    tokens, target = lines_of(text, alphabet)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CharacterModel(len(alphabet))
        loss = train(model, tokens, target, steps)
    print(f"Trained for {steps} steps on {len(tokens)} lines, {len(alphabet)} characters: loss {loss:.3f}")
    report = flatcore.evaluate(model, list(zip(tokens.split(64), target.split(64), strict=True)), ignore_index=IGNORED)
    print(report)
    firsts = [alphabet[t] == " " for t in tokens[report.rows["row"], report.rows["position"]]]
    logs = torch.tensor(report.rows["log_layerwise"])
    first = torch.tensor(firsts)
    print(
        f"Median log flatness: first characters of words {logs[first].median():.2f}, others {logs[~first].median():.2f}"
    )
    for row in (0, len(tokens) // 2):
        print("\n".join(marked(report, tokens, alphabet, row)))
    report.to_html(out / "character_model.html", title="Flatness per token of a small character model")
    report.to_csv(out / "character_model.csv")
    print(f"Report: {out / 'character_model.html'}\nValues per token: {out / 'character_model.csv'}")


def main(argv: list[str] | None = None) -> int:
    """Run the example and return its exit status: 0 success, 1 failure, 2 wrong usage, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="character_model.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("flatcore-demo"), metavar="DIR",
                        help="folder for the files, made if absent (default: %(default)s)")  # fmt: skip
    parser.add_argument("--seed", type=int, choices=range(10_000), default=0, metavar="N",
                        help="seed of the training, 0 to 9999 (default: %(default)s)")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="60 steps: seconds")
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has printed what there is to say
        return int(stop.code or 0)
    try:
        run(arguments.out, 60 if arguments.quick else 600, arguments.seed)
    except KeyboardInterrupt:
        print("character_model: interrupted.", file=sys.stderr)
        return 130
    except OSError as error:
        print(
            f"character_model: cannot use {error.filename or 'the files'}: {error.strerror or error}.", file=sys.stderr
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
