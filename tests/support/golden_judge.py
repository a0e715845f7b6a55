"""Judge the package by golden cases.

Every tensor of a case is compared within its own tolerance (`recommended_atol`: about 30 times the original's noise in
float32, or more), integers exactly. `DELIBERATE` lists what is not compared. A stored tensor may be only the leading
corner of the recorded one (golden/README.md); of the rest only the shape is checked.
"""

import re
from collections.abc import Callable
from pathlib import Path

import golden_generation
import golden_models
import golden_parts
import golden_pictures
import torch
from golden_cases import Case, Public, Result
from torch import Tensor

UNUSED_CUT = (
    'v6.0\'s option detail="high": its model reads the first view alone, the whole picture '
    "(v60_truncation_detail_high). Nothing of what this cuts ever reached a model."
)

DELIBERATE: dict[tuple[str, str], str] = {
    ("v51_scans_b3", "logits128.rotation"): (
        "The original's 'rotation' turns the samples of a batch, so that pictures move between samples; the "
        "package has no such scan. For one sample it does nothing (v51_scans_b1_generate)."
    ),
    ("encode", "no_utf8"): (
        "The original decodes ids whose bytes are not UTF-8 throughout to a single U+FFFD; we keep what is "
        "readable."
    ),
    ("tiling", r"gpt4v_crop|crop_\d+_squares"): UNUSED_CUT,
}
"""Maps a case, and a pattern for the name of a tensor or the first word of a fact, to why that is not compared."""

RUNNERS: dict[str, Callable[[Case], Result]] = {
    name: runner
    for module in (golden_models, golden_generation, golden_parts, golden_pictures)
    for name, runner in module.RUNNERS.items()
}


@torch.no_grad()
def check_case(folder: Path, case_path: str) -> None:
    """Compare every tensor and every other fact of a case, and the logits of calls as users make them.

    Args:
        folder: A golden folder.
        case_path: A case in it, `<kind>/<case>`.

    Raises:
        AssertionError: If anything differs, was not computed, or is in a file that nothing reads. The message names
            all that differs.
    """
    case = Case(folder, case_path)
    assert case.name in RUNNERS, f"No runner knows the case {case_path}."
    result = RUNNERS[case.name](case)
    problems = [judge(case, name, result.tensors) for name in case.expected if is_judged(case, name)]
    problems += [judge_public(case, label, public) for label, public in result.public.items()]
    problems += [
        f"{name}: {found}, expected {expected}"
        for name, (found, expected) in result.facts.items()
        if is_judged(case, name.split()[0]) and found != expected
    ]
    problems = [problem for problem in problems if problem]
    assert not problems, "\n".join(problems)
    assert case.expected or result.facts
    unread = set(case.info["files"]) - case.files_read
    assert not unread, f"Nothing looked at {sorted(unread)}."


def is_judged(case: Case, name: str) -> bool:
    return not any(of == case.name and re.fullmatch(pattern, name) for of, pattern in DELIBERATE)


def judge(case: Case, name: str, found: dict[str, Tensor]) -> str | None:
    """Return what is wrong with our tensor `name`, or None."""
    if name not in found:
        return f"{name}: not computed"
    ours, golden, recorded = found[name], case.expected[name], case.info["tensors"][f"expected:{name}"]
    if list(ours.shape) != recorded["shape"]:
        return f"{name}: shape {list(ours.shape)}, expected {recorded['shape']}"
    ours = ours[tuple(slice(n) for n in golden.shape)]
    if not golden.is_floating_point():
        return None if torch.equal(ours, golden) else f"{name}: {ours.tolist()}, expected {golden.tolist()}"
    if name == "logits_bf16":
        return too_far_in_bfloat16(ours, golden, case.expected["logits_fp32"])
    return too_far(name, ours, golden, tolerance(case, name))


def too_far(name: str, ours: Tensor, golden: Tensor, atol: float | Tensor) -> str | None:
    difference = (ours.double() - golden.double()).abs()
    if bool((difference <= atol).all()):  # False for NaN
        return None
    return f"{name}: off by {difference.max():.3g}, more than {torch.as_tensor(atol).max():.3g}"


def tolerance(case: Case, name: str) -> float | Tensor:
    """Return the tolerance that the case recommends; without one, float32's usual noise, or bfloat16's rounding."""
    recorded = case.info["tensors"][f"expected:{name}"]
    if "recommended_atol" in recorded:
        return recorded["recommended_atol"]
    if not case.is_float_in_bfloat16(name):
        return 2e-5 * max(1.0, recorded["max_abs"])
    # Both round float32 once to 8 bits, so they may differ by one unit in the last place, 2^-7, and by the noise
    # before rounding. The original rounds gradients of parameters (2 dimensions) per sample, before it sums them:
    # there the unit is that of the summands, not of a sum that may be smaller.
    noise = case.info["tensors"][f"expected:{name.replace('bf16', 'fp32')}"]["recommended_atol"]
    size = case.expected[name].float().abs()
    return 2**-7 * (size.max() if size.ndim == 2 else size) + noise


def judge_public(case: Case, label: str, public: Public) -> str | None:
    """Return what is wrong with the logits of a call as users make it, or None."""
    name = label.split("#")[0].strip(".")
    golden = case.expected[name][public.rows, : public.logits.shape[1]]  # [R, T, columns]
    ours = public.logits[..., : golden.shape[-1]]
    return too_far(f"{label} (public)", ours[public.mask], golden[public.mask], tolerance(case, name))


def too_far_in_bfloat16(ours: Tensor, golden: Tensor, exact: Tensor) -> str | None:
    """Return what is wrong with bfloat16 logits, or None if they are about as far from float32 as the original's.

    They cannot be compared one by one, because roundings add up through all layers, in another order on every machine.
    """
    ours_off, golden_off = (ours.float() - exact).abs(), (golden.float() - exact).abs()
    if ours_off.max() <= 1.5 * golden_off.max() and ours_off.mean() <= 1.2 * golden_off.mean():
        return None
    return (
        f"logits_bf16: off float32 by at most {ours_off.max():.3g} and {ours_off.mean():.3g} on average, "
        f"the original by {golden_off.max():.3g} and {golden_off.mean():.3g}"
    )
