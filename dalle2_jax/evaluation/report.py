"""Reports as lines to read."""

from __future__ import annotations

from typing import Any

ATTRIBUTES = ("color", "background", "shape", "size", "all")
Report = dict[str, Any]


def format_report(report: Report) -> str:
    """The report as lines to read."""
    lines = []
    for name, title in (
        ("oracle", f"{report['captions']} test captions"),
        ("oracle_embedding_only", "caption withheld"),
        ("oracle_other_embedding", "another's embedding"),
        ("chance", "(chance for that)"),
        ("oracle_unseen_pairs", f"{report['captions_unseen_pairs']} unseen pairs"),
    ):
        figures = "  ".join(f"{attribute} {report[name][attribute]:.2f}" for attribute in ATTRIBUTES)
        lines.append(f"{title:>20}  {figures}")
    retrieval = report["retrieval"]
    lines.append(
        f"{'CLIP retrieval':>20}  caption -> image R@1 {retrieval['text_to_image_r1']:.2f} R@5 "
        f"{retrieval['text_to_image_r5']:.2f}   image -> caption R@1 {retrieval['image_to_text_r1']:.2f} R@5 "
        f"{retrieval['image_to_text_r5']:.2f}"
    )
    prior = report["prior"]
    for name, range_text in prior["healthy_ranges"].items():
        verdict = "healthy" if prior["healthy"][name] else "NOT healthy"
        lines.append(f"{'prior ' + name:>30}  {prior[name]:+.3f}  {verdict} (healthy: {range_text})")
    return "\n".join([*lines, *fidelity_lines(report)])


def fidelity_lines(report: Report) -> list[str]:
    """What a report says of images that should come out of the decoder or the upsamplers as they are."""
    inversion = report["inversion"]
    lines = [f"{'DDIM there and back':>20}  {inversion['psnr']:.1f} dB in {inversion['steps']} steps each way"]
    if "upsampler" in report:
        figures = report["upsampler"]
        lines.append(
            f"{'upsampler':>20}  {figures['psnr']:.1f} dB, bicubic {figures['psnr_bicubic']:.1f} dB, "
            f"gain {figures['gain_db']:+.1f} dB"
        )
    return lines


def format_images_report(report: Report) -> str:
    """The report as lines to read."""
    lines = []
    for part, title in (("test", f"{report['split']} captions"), ("unseen", "unseen combinations")):
        if part not in report:
            continue
        figures = report[part]
        lines.append(f"{figures['captions']} {title}; R@1 / R@5 by chance {_pair(figures['chance'], '')}")
        for name in ("generated", "real"):
            found = figures[name]
            lines.append(
                f"{name + ' images':>20}  image -> caption {_pair(found, 'image_to_text_')}   caption -> image "
                f"{_pair(found, 'text_to_image_')}   cosine {found['clip_score']:.3f}"
            )
        prior = figures["prior"]
        lines.append(
            f"{'prior':>20}  to the true image {prior['to_true_image']:+.3f}, to its caption "
            f"{prior['to_text']:+.3f} (true images {prior['baseline_true_to_text']:+.3f}), to another caption "
            f"{prior['to_unrelated_text']:+.3f}"
        )
    return "\n".join([*lines, *fidelity_lines(report)])


def _pair(figures: dict[str, float], prefix: str) -> str:
    return f"{figures[prefix + 'r1']:.2f} / {figures[prefix + 'r5']:.2f}"
