"""What do the directions that experts start from cost next to torch.linalg.svd in fp32, and how exact are they?

    python benchmarks/decomposition.py [--repetitions 3] [--shape "LLaMA-3-8B down (4096 x 14336)"]

One weight at a time, ours and the SVD in turn, both with all cores or on the GPU. The weights are random, in bf16, with
a spectrum that decays; r 32, 8 experts. An error is the largest ``‖W v - s u‖`` or ``‖Wᵀ u - s v‖``, relative to the
largest ``s``, of the directions in fp32, as they are kept.

Shape letters: O out features, I in features, R total rank.
"""

import argparse
import time
from collections.abc import Callable

import results
import torch
from torch import Tensor

from goat_ds.method.spectrum import Directions, Init, chosen_indices, decompose

R, NUM_EXPERTS = 32, 8
SQUARE, LARGE = "4096 x 4096", "LLaMA-3-8B down (4096 x 14336)"
SHAPES = {  # out features, in features
    SQUARE: (4096, 4096),
    "Gemma-3-270M up (2048 x 640)": (2048, 640),
    "LLaMA-3-8B k (1024 x 4096)": (1024, 4096),
    LARGE: (4096, 14336),
}
TARGETS = {SQUARE: 0.50}
ALLOWED_ERROR = 1e-5
"""Of a direction, relative to the largest singular value."""


def main() -> None:
    """Print a row for the time and one for the error of each shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=3, help="alternating repetitions")
    # The largest takes minutes.
    parser.add_argument("--shape", choices=list(SHAPES), nargs="*", default=[name for name in SHAPES if name != LARGE])
    results.add_flag(parser)
    arguments = parser.parse_args()
    rows = [row for name in arguments.shape for row in compare(name, repetitions=arguments.repetitions)]
    results.publish(rows, parser=parser, arguments=arguments)


def compare(name: str, *, repetitions: int) -> list[results.Row]:
    """Measure one shape."""
    weight_OI = decaying_weight(*SHAPES[name])
    indices_ED = chosen_indices(Init.GOAT, num_directions=min(SHAPES[name]), num_experts=NUM_EXPERTS, r=R)
    # The first call of either sets up more than it computes.
    for work in (decompose, by_svd):
        work(weight_OI[: 4 * R, : 4 * R], indices_ED % (4 * R))
    ours, rival, errors = [], [], []
    for _ in range(repetitions):
        found, took = timed(lambda: decompose(weight_OI, indices_ED))
        ours.append(took)
        errors.append(error_of(weight_OI, found))
        rival.append(timed(lambda: by_svd(weight_OI, indices_ED))[1])
    return [
        results.Row(
            question=f"one {name} weight's directions, against torch.linalg.svd",
            ours=tuple(ours),
            rival=tuple(rival),
            unit="s",
            at_most=TARGETS.get(name),
        ),
        results.Row(
            question=f"largest error of one {name} weight's directions, against what is allowed",
            ours=(max(errors),),
            rival=(ALLOWED_ERROR,),
            unit="of the largest",
            at_most=1.0,
        ),
    ]


def decaying_weight(out_features: int, in_features: int) -> Tensor:
    """Draw a bf16 weight whose columns, and with them its singular values, differ in size."""
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(out_features, in_features, generator=generator) * torch.linspace(1, 0.05, in_features)
    return weight_OI.to(torch.bfloat16).to("cuda" if torch.cuda.is_available() else "cpu")


def by_svd(weight_OI: Tensor, indices_ED: Tensor) -> Directions:
    """Take the chosen directions out of the whole SVD in fp32."""
    u_OQ, s_Q, vh_QI = torch.linalg.svd(weight_OI.float(), full_matrices=False)
    indices_R = indices_ED.flatten().to(weight_OI.device)
    return Directions(u_OQ[:, indices_R], s_Q[indices_R], vh_QI[indices_R])


def timed(work: Callable[[], Directions]) -> tuple[Directions, float]:
    """Return what was found and the seconds it took."""
    began = time.perf_counter()
    found = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return found, time.perf_counter() - began


def error_of(weight_OI: Tensor, directions: Directions) -> float:
    """Return the largest error of a triplet, in the precision in which triplets are kept."""
    u_OR, s_R, v_RI = (tensor.float().double() for tensor in directions)
    weight_OI = weight_OI.double()
    residuals = weight_OI @ v_RI.T - u_OR * s_R, weight_OI.T @ u_OR - v_RI.T * s_R
    # Expert 0 starts with the leading direction.
    return max(float(residual.norm(dim=0).max() / s_R[0]) for residual in residuals)


if __name__ == "__main__":
    main()
