"""Mutual k-NN scores against their definition in plain torch, and nearest neighbours against faiss.

    pip install faiss-cpu
    python examples/benchmarks/neighbors.py            # scores of N = 1,000 and 4,000; neighbours of N = 100,000
    python examples/benchmarks/neighbors.py --small    # in seconds

1. Scores of attention heads, from pooled vectors and the output projection's weight: the function that `rank_heads`
   scores each layer with, teacher's neighbours included, against a loop over heads that writes mutual k-NN down as it
   is defined. The loop forms z = p W in d_model dimensions, and sorts the full similarity matrix of both spaces. Whole
   layers of SmolLM2-135M's shape are scored, not all 30 of them: cost is proportional to their number.
2. `nearest_neighbors` against faiss's exact IndexFlatIP, on as many threads, and its memory in a fresh process beyond
   the vectors themselves, in units of the similarity matrix.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import torch.nn.functional as F
from harness import Pairs, Result, Row, fresh_process, paired
from peak_memory import extra_bytes
from torch import Tensor

from hera_trainer.heads.scoring import head_neighbors
from hera_trainer.objectives.metrics import nearest_neighbors, neighbor_overlap

K = 10
HEADS, HEAD_WIDTH, WIDTH = 9, 64, 576  # of a layer of SmolLM2-135M
TEACHER_WIDTH = 384  # DINOv2 ViT-S


def score_by_definition(pooled: Tensor, blocks: Tensor, teacher: Tensor, k: int) -> Tensor:
    """Mutual k-NN of each head `[H]`, with the full similarity matrix and a full sort of both spaces."""

    def neighbors(x: Tensor) -> Tensor:
        x = F.normalize(x, dim=-1)
        similarity = x @ x.T
        similarity.fill_diagonal_(-torch.inf)
        return similarity.argsort(dim=-1, descending=True)[:, :k]

    scores = []
    for head, block in enumerate(blocks):
        a, b = neighbors(pooled[:, head] @ block), neighbors(teacher)
        scores.append((a[:, :, None] == b[:, None]).any(-1).float().mean())
    return torch.stack(scores)


def _layer(n: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled vectors, projection blocks and teacher vectors that have something in common."""
    common = torch.randn(n, 32)
    pooled = torch.einsum("nc,chd->nhd", common, torch.randn(32, heads, HEAD_WIDTH))
    pooled += 3 * torch.randn_like(pooled)
    teacher = common @ torch.randn(32, TEACHER_WIDTH) + 3 * torch.randn(n, TEACHER_WIDTH)
    return pooled, torch.randn(heads, HEAD_WIDTH, WIDTH), teacher


def scoring_row(n: int, layers: int, heads: int, pairs: int) -> Row:
    """Scores of some layers' heads of n samples."""
    inputs = [_layer(n, heads) for _ in range(layers)]
    teacher = inputs[0][2]
    found: dict[str, Tensor] = {}

    def ours() -> None:
        targets = nearest_neighbors(teacher, K)
        spaces = (space for pooled, blocks, _ in inputs for space in head_neighbors(pooled, blocks, K, True))
        found["ours"] = torch.tensor([neighbor_overlap(space, targets) for space in spaces])

    def theirs() -> None:
        parts = [score_by_definition(pooled, blocks, teacher, K) for pooled, blocks, _ in inputs]
        found["theirs"] = torch.cat(parts)

    measured = paired(ours, theirs, pairs)
    difference = (found["ours"] - found["theirs"]).abs().max().item()
    # Two neighbours that are as near as float32 can tell may change places: one in N k.
    assert difference <= 2 / (n * K), f"The scores differ by {difference}."
    return measured.row(
        f"`mutual_knn` scores of {layers * heads} heads given pooled vectors, N = {n}: speed-up",
        "a loop over heads with full similarity and argsort of both spaces",
        at_least=20,
        note=f"seconds; scores of {found['ours'].min():.3f} to {found['ours'].max():.3f} differ by {difference:.1e}",
    )


def faiss_row(n: int, d: int, pairs: int) -> Row:
    """Nearest neighbours of n vectors against faiss."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError("This benchmark compares with faiss. Install it with `pip install faiss-cpu`.") from error
    faiss.omp_set_num_threads(torch.get_num_threads())
    x = F.normalize(torch.randn(n, d), dim=-1)
    index = faiss.IndexFlatIP(d)
    index.add(x.numpy())
    found: dict[str, Tensor] = {}

    def ours() -> None:
        found["ours"] = nearest_neighbors(x, K)

    def theirs() -> None:
        found["theirs"] = torch.from_numpy(index.search(x.numpy(), K + 1)[1][:, 1:])  # the first is the vector itself

    measured = paired(ours, theirs, pairs)
    same = (found["ours"] == found["theirs"]).float().mean().item()
    assert same > 0.999, f"Only {same:.2%} of the neighbours are those of faiss."
    return measured.row(
        f"`nearest_neighbors`, N = {n}, d = {d}, k = {K}: time",
        f"faiss-cpu {faiss.__version__}, exact IndexFlatIP, as many threads",
        at_most=1.2,
        note=f"seconds; {same:.4%} of the neighbours are equal",
    )


def memory_row(n: int, d: int, pairs: int) -> Row:
    """Peak memory of the neighbours of n vectors."""
    ours = [fresh_process(__file__, "--memory", f"{n},{d}")["bytes"] / 1e6 for _ in range(pairs)]
    return Pairs(ours, [4e-6 * n * n] * pairs).row(
        f"`nearest_neighbors`, N = {n}, d = {d}, k = {K}: peak memory without its input",
        "the similarity matrix [N, N]",
        at_most=None if n < 100_000 else 0.05,
        note=f"MB; the vectors are {4e-6 * n * d:.0f} MB",
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="few samples")
    parser.add_argument("--device", choices=("cpu",), default="cpu", help="faiss-cpu and peak memory are the CPU's")
    parser.add_argument("--without-faiss", action="store_true", help="leave out the comparison with faiss")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    torch.manual_seed(0)
    if chosen.memory:
        n, d = map(int, chosen.memory.split(","))
        nearest_neighbors(torch.randn(64, d), K)  # what is loaded and started once
        x = torch.randn(n, d)
        print(json.dumps({"bytes": extra_bytes(lambda: nearest_neighbors(x, K))}))
        return
    n, d = (500, 32) if chosen.small else (100_000, TEACHER_WIDTH)
    rows = [memory_row(n, d, min(chosen.pairs, 3))]
    if not chosen.without_faiss:
        rows.insert(0, faiss_row(n, d, chosen.pairs))
    scored = [(100, 1, 2)] if chosen.small else [(1000, 3, HEADS), (4000, 1, HEADS)]
    rows = [scoring_row(*size, chosen.pairs) for size in scored] + rows
    name = "neighbors_small" if chosen.small else "neighbors"
    options = (" --small" if chosen.small else "") + (" --without-faiss" if chosen.without_faiss else "")
    Result(name, f"python examples/benchmarks/neighbors.py --pairs {chosen.pairs}{options}", rows).save()


if __name__ == "__main__":
    main()
