"""Train the bundled reference model on text that is part of every Python installation.

    .venv/bin/python scripts/train_reference_model.py --out edgeopt/reference

The corpus is the standard library of the interpreter that runs this script: sources without tests, pydoc's language
topics and the docstrings of C modules. The hash of a document's name assigns it to training, calibration or validation,
so the splits are disjoint. Training stops when the validation loss stops falling. The output contains the best weights
as fp16 safetensors, the tokenizer, calibration and validation text, and a model card. The same command continues an
interrupted run.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import math
import pkgutil
import platform
import random
import sys
import sysconfig
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "pydoc_data", "ensurepip", "msilib"}
TEXT_LIMIT_BYTES = {"calibration": 210_000, "validation": 180_000}


@dataclass(frozen=True)
class Document:
    """One text of the corpus."""

    name: str
    text: str

    @property
    def split(self) -> str:
        """Return `training`, `calibration` or `validation`; it depends on the name only."""
        bucket = int(hashlib.sha256(self.name.encode()).hexdigest(), 16) % 100
        return "calibration" if bucket < 4 else "validation" if bucket < 8 else "training"


def stdlib_sources() -> list[Document]:
    """Return the Python sources of the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(name.parts[:-1]):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        if "decoding_table" in text or len(text) < 200:  # character maps are data, not code
            continue
        documents.append(Document(str(name), text))
    return documents


def language_topics() -> list[Document]:
    """Return pydoc's topics on the Python language."""
    from pydoc_data.topics import topics

    return [Document(f"topics/{name}", text) for name, text in sorted(topics.items())]


def extension_docstrings() -> list[Document]:
    """Return the docstrings of modules written in C, whose sources are not installed."""
    documents = []
    builtin = set(sys.builtin_module_names) | {m.name for m in pkgutil.iter_modules() if m.name.startswith("_")}
    for module_name in sorted(builtin | {"math", "array", "itertools", "builtins", "zlib", "select"}):
        try:
            module = import_module(module_name)
        except ImportError:  # some modules exist on other platforms only
            continue
        if str(getattr(module, "__file__", "")).endswith(".py"):
            continue
        parts = [inspect.getdoc(module) or ""]
        for name, member in sorted(vars(module).items()):
            if inspect.isroutine(member) or inspect.isclass(member):
                parts.append(f"{name}\n{inspect.getdoc(member) or ''}")
        text = "\n\n".join(parts)
        if len(text) > 500:
            documents.append(Document(f"docstrings/{module_name}", text))
    return documents


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer like that of GPT-2, which encodes any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def model_config(args: argparse.Namespace) -> LlamaConfig:
    """Return the architecture of the reference model."""
    return LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=args.context,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def epoch_windows(documents: list[list[int]], context: int, rng: random.Random) -> torch.Tensor:
    """Return windows of one epoch, shape (windows, context + 1).

    The documents are joined in a random order and cut at a random offset.
    """
    order = documents[:]
    rng.shuffle(order)
    stream = [token for document in order for token in document]
    stream = stream[rng.randrange(context) :]
    count = (len(stream) - 1) // context
    flat = torch.tensor(stream[: count * context + 1])
    windows = flat.unfold(0, context + 1, context)
    return windows[torch.tensor(rng.sample(range(count), count))]


def mean_loss(model: LlamaForCausalLM, windows: torch.Tensor) -> float:
    """Return the mean next-token negative log-likelihood in nats, for windows of shape (windows, tokens)."""
    model.eval()
    with torch.inference_mode():
        losses = [loss_of(model, batch).item() * len(batch) for batch in windows.split(16)]
    model.train()
    return sum(losses) / len(windows)


def loss_of(model: torch.nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Return the next-token cross-entropy in nats of a batch of windows, shape (batch, tokens)."""
    logits = model(windows[:, :-1]).logits
    return cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """Return approximately the nearest semi-orthogonal matrix, by five quintic Newton-Schulz iterations."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        gram = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


class Muon(torch.optim.Optimizer):
    """Orthogonalized momentum (K. Jordan et al., 2024), with updates scaled like AdamW's (arXiv 2502.16982).

    torch.optim.Muon computes in bfloat16, which is 20 times slower on CPUs that emulate it.
    """

    def __init__(self, params: list[torch.nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                average = self.state[p]["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(p.grad.lerp(average, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-0.2 * group["lr"] * max(p.shape) ** 0.5)


def create_optimizers(model: LlamaForCausalLM, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Return AdamW for all parameters, or Muon for the matrices of the layers and AdamW for the others."""
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    embedding = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" in n]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    if args.optimizer == "adamw":
        groups = [{"params": hidden + embedding, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        return [torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95))]
    return [
        Muon(hidden, lr=args.learning_rate, weight_decay=0.1),
        torch.optim.AdamW(
            [{"params": embedding, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
            lr=args.learning_rate,
            betas=(0.9, 0.95),
        ),
    ]


def learning_rate_factor(step: int, steps: int, warmup: int = 50, floor: float = 0.02) -> float:
    """Return the factor of a schedule with warm-up, a constant phase and linear decay (WSD, arXiv 2404.06395)."""
    if step < warmup:
        return (step + 1) / warmup
    return max(floor, min(1.0, 2.0 * (1.0 - step / steps)))


def train(model: LlamaForCausalLM, splits: dict[str, list[list[int]]], args: argparse.Namespace) -> dict[str, object]:
    """Train `model` in place, restore its best weights and return the record for the model card."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    rng = random.Random(args.seed)
    validation_windows = epoch_windows(splits["validation"], args.context, random.Random(0))
    validation_windows = validation_windows[: args.validation_windows].to(device)
    tokens = sum(map(len, splits["training"]))
    steps = round(args.epochs * tokens / (args.batch * args.context))
    optimizers = create_optimizers(model, args)
    curve: list[dict[str, float]] = []
    best, evaluations_since_best, step, elapsed_s = math.inf, 0, 0, 0.0
    checkpoint = args.out / "training-state.pt"
    best_weights = {name: value.clone() for name, value in model.state_dict().items()}
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        best_weights = state["best_weights"]
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        curve, best, evaluations_since_best = state["curve"], state["best"], state["since_best"]
        step, elapsed_s = state["step"], state["elapsed_s"]
        rng = random.Random(args.seed + step)
    forward = torch.compile(model) if args.compile else model
    start = time.monotonic() - elapsed_s
    batches: list[torch.Tensor] = []
    loss_sum = 0.0
    while step < steps and evaluations_since_best < args.patience:
        if not batches:
            batches = list(epoch_windows(splits["training"], args.context, rng).split(args.batch))[:-1]
        factor = learning_rate_factor(step, steps)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * factor
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_of(forward, batches.pop().to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        loss_sum += loss.item()
        step += 1
        if step % args.evaluate_every and step != steps:
            continue
        validation = mean_loss(model, validation_windows)
        steps_since = step - (curve[-1]["step"] if curve else 0)
        curve.append({"step": step, "training": loss_sum / steps_since, "validation": validation})
        loss_sum = 0.0
        evaluations_since_best = 0 if validation < best else evaluations_since_best + 1
        if validation < best:
            best, best_weights = validation, {n: v.clone() for n, v in model.state_dict().items()}
        elapsed_s = time.monotonic() - start
        tokens_per_s = step * args.batch * args.context / elapsed_s
        print(
            f"{step}/{steps}  training {curve[-1]['training']:.4f}  validation {validation:.4f}  "
            f"{tokens_per_s:.0f} tokens/s  {elapsed_s / 60:.1f} min",
            file=sys.stderr,
            flush=True,
        )
        scratch = checkpoint.with_suffix(".partial")
        torch.save(
            {
                "model": model.state_dict(),
                "best_weights": best_weights,
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "curve": curve,
                "best": best,
                "since_best": evaluations_since_best,
                "step": step,
                "elapsed_s": elapsed_s,
            },
            scratch,
        )
        scratch.replace(checkpoint)
    model.load_state_dict(best_weights)
    model.to("cpu", torch.float32)
    return {
        "steps": step,
        "epochs": args.epochs,
        "tokens_seen": step * args.batch * args.context,
        "training_tokens": tokens,
        "curve": curve,
        "elapsed_s": round(elapsed_s),
        "device": device.type,
    }


def select_documents(documents: list[Document], limit_bytes: int) -> list[Document]:
    """Return a pseudo-random sample of the documents within the size limit.

    Documents longer than 12,000 characters are cut at the end of a line.
    """
    selected, used_bytes = [], 0
    for document in sorted(documents, key=lambda d: hashlib.sha256(d.name.encode()).hexdigest()):
        text = document.text
        if len(text) > 12_000:
            text = text[: text.rindex("\n", 0, 12_000)]
        size_bytes = len(json.dumps({"text": text, "source": document.name})) + 1
        if used_bytes + size_bytes <= limit_bytes:
            selected.append(Document(document.name, text))
            used_bytes += size_bytes
    return selected


def write_card(out: Path, record: dict[str, object], config: LlamaConfig, parameters: int, perplexity: float) -> None:
    """Write the model card."""
    curve = record["curve"]
    assert isinstance(curve, list)
    stride = max(1, len(curve) // 12)
    points = curve[::stride] + ([] if (len(curve) - 1) % stride == 0 else curve[-1:])
    rows = "\n".join(f"| {p['step']} | {p['training']:.3f} | {p['validation']:.3f} |" for p in points)
    (out / "README.md").write_text(f"""# edgeopt reference model

A small Llama model of Python text, for trying, testing and benchmarking edgeopt on real weights without a network
connection. It is not intended for production.

| | |
|---|---|
| architecture | Llama, {config.num_hidden_layers} layers, width {config.hidden_size}, MLP {config.intermediate_size}, \
{config.num_attention_heads} heads, {config.num_key_value_heads} KV heads, head size {config.head_dim}, \
tied embeddings, context {config.max_position_embeddings} |
| parameters | {parameters:,} |
| tokenizer | byte-level BPE, {config.vocab_size} tokens |
| weights | fp16 safetensors |
| data | standard library of Python {platform.python_version()}: \
sources without tests, pydoc topics, docstrings of C modules |
| split | by sha256 of the document's name: 92 % training, 4 % calibration, 4 % validation |
| licence of data | Python Software Foundation License 2.0 |
| licence of weights | Apache-2.0 |
| training tokens | {record["training_tokens"]:,} ({record["tokens_seen"]:,} seen) |
| seed, steps | {record["seed"]}, {record["steps"]} |
| training time | {int(str(record["elapsed_s"])) / 60:.0f} minutes on {record["device"]} |
| validation perplexity | {perplexity:.2f} per token, fp16 weights in fp32 arithmetic |

Loss in nats per token:

| step | training | validation |
|---|---|---|
{rows}

Created by `scripts/train_reference_model.py`. `calibration.jsonl` and `validation.jsonl` are samples of the two splits
that were not used for training, with each document cut to 12 kB. The weights are those of the lowest validation loss.
""")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--evaluate-every", type=int, default=200)
    parser.add_argument("--validation-windows", type=int, default=96)
    parser.add_argument("--patience", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    documents = stdlib_sources() + language_topics() + extension_docstrings()
    by_split = {s: [d for d in documents if d.split == s] for s in ("training", "calibration", "validation")}
    tokenizer = train_tokenizer([d.text for d in by_split["training"]], args.vocabulary)
    splits = {name: tokenizer([d.text for d in members])["input_ids"] for name, members in by_split.items()}
    for name, members in by_split.items():
        print(
            f"{name}: {len(members)} documents, {sum(len(d.text) for d in members):,} characters, "
            f"{sum(map(len, splits[name])):,} tokens",
            file=sys.stderr,
            flush=True,
        )

    config = model_config(args)
    model = LlamaForCausalLM(config)
    record = train(model, splits, args) | {"seed": args.seed}
    model.half()
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    windows = epoch_windows(splits["validation"], args.context, random.Random(0))
    perplexity = math.exp(mean_loss(model.float(), windows))
    for name, limit in TEXT_LIMIT_BYTES.items():
        lines = [json.dumps({"text": d.text, "source": d.name}) for d in select_documents(by_split[name], limit)]
        (args.out / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    write_card(args.out, record, config, model.num_parameters(), perplexity)
    print(f"validation perplexity {perplexity:.2f}")


if __name__ == "__main__":
    main()
